// How the ranks of a gang share a job: pure numbers, and the groups that follow from them. Adjacent
// ranks talk most: tensor-parallel ranks are innermost, then data, then pipeline stages.
#pragma once

#include "protocol/base/result.h"
#include "worker/comm/communicator.h"

#include <string>
#include <string_view>

namespace tandem::worker::comm {

/// What pipeline stages share evenly: the arithmetic of a token, parameters, or blocks (serving).
enum class StageBalance : int { kCompute, kMemory, kBlocks };

struct Layout {
  int dp = 1, tp = 1, pp = 1;
  int zero = 0;  ///< 0: every dp rank holds everything; 1, 2, 3: optimizer, gradients, parameters
                 ///< are sharded over dp
  int virtual_pp = 1;  ///< stages on each pipeline rank; 2 or more: interleaved
  /// Tensor-parallel ranks share the rows of the residual stream (does nothing where tp is 1).
  bool sequence_parallel = true;
  StageBalance balance = StageBalance::kCompute;

  [[nodiscard]] int ranks() const { return dp * tp * pp; }
  [[nodiscard]] int tp_rank(int rank) const { return rank % tp; }
  [[nodiscard]] int dp_rank(int rank) const { return rank / tp % dp; }
  [[nodiscard]] int pp_rank(int rank) const { return rank / (tp * dp); }
  [[nodiscard]] int rank_of(int dp_at, int tp_at, int pp_at) const {
    return (pp_at * dp + dp_at) * tp + tp_at;
  }
  /// "dp2 x tp2 x pp1, zero 3"; "dp1 x tp1 x pp2 (2 virtual)"; "dp1 x tp2 x pp1,
  /// whole streams" without sequence parallelism
  [[nodiscard]] std::string to_string() const;
  /// "tp2xpp2", "dp2 x zero3", "pp2, virtual 2", or what to_string() says of dp, tp, pp and zero: a
  /// name and a number each, what is not named is 1 (zero 0). invalid_error names what it cannot
  /// read. validate() is the caller's.
  static Result<Layout> parse(std::string_view text);
  /// Sizes at least 1, zero 0..3 (and only with data parallelism behind it), virtual stages only
  /// with pipeline ranks.
  [[nodiscard]] Status validate() const;
  /// Communicators of several ranks that a rank of a job has, the gang's own among them (which is
  /// also that of every group of all ranks).
  [[nodiscard]] int groups() const;
};

/// One rank's communicators. Each is of size 1 where the layout does not split.
struct Groups {
  std::unique_ptr<Communicator> tp, dp, pp;
  std::unique_ptr<Communicator> model;  ///< tp x pp: the ranks that hold one copy of the model
};
/// Called by every rank of the gang at once; the gang's size is layout.ranks().
Groups make_groups(Communicator& gang, const Layout& layout);

}  // namespace tandem::worker::comm
