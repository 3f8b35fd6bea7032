// Seconds that a step takes on given devices, from what its dry run counts: rates of one device and
// of the links between ranks. Defaults are measured values of machines that the project has seen;
// `bench_layout --write DATA_DIR/cost_model.json` fits them to the machine at hand. Pure; any
// thread.
#pragma once

#include "kernels/device_profile.h"
#include "kernels/op_cost.h"
#include "protocol/base/dtype.h"
#include "protocol/base/result.h"
#include "worker/comm/communicator.h"

#include <string>

namespace tandem::worker::memory {

/// One kind of transfer: `hop_seconds` for each of the steps that a ring of n ranks takes, and the
/// bytes that pass through a rank's link at `bytes_per_second`.
struct LinkCost {
  double hop_seconds = 0.0;
  double bytes_per_second = 1.0;
};

struct CostModel {
  /// Of one rank (all its threads, or its GPU): large products by compute dtype (f16 as bf16);
  /// gradients of weights and products through an adapter's few columns, as shares of that.
  double product_flops_bf16 = 1.0, product_flops_f32 = 1.0;
  double weight_grad_share = 1.0, low_rank_share = 1.0;
  double low_rank_seconds = 0.0;  ///< of each of these beside its work
  double attention_flops = 1.0;
  double logits_per_second = 1.0;        ///< loss and gradient, beside the head's products
  double row_bytes_per_second = 1.0;     ///< of passes over rows of activations
  double memory_bytes_per_second = 1.0;  ///< of everything else: the optimizer, copies
  double op_seconds = 0.0;               ///< of every op beside its work: starting it
  LinkCost all_reduce, all_gather, reduce_scatter, exchange;
  double sum_16_bit_slowdown = 1.0;  ///< a byte of a sum in 16 bits takes so much longer
  /// What goes on in the background; work beside it takes so much longer.
  LinkCost background_gather, background_reduce;
  double background_slowdown = 1.0;

  /// Operations and bytes add up: a small or narrow product is limited by its bytes, and neither a
  /// core nor a GPU hides all of them behind those of a large one.
  [[nodiscard]] double seconds(const kernels::OpCost& cost, DType dtype) const;
  /// Of a collective from the moment its last rank has come; of an exchange's messages, see below.
  [[nodiscard]] double seconds(const comm::CommCall& call) const;
  /// Of a message between two ranks from the moment both are there.
  [[nodiscard]] double message_seconds(std::int64_t bytes) const;

  [[nodiscard]] std::string to_json() const;
  /// Every field, or invalid_error with the field's name.
  static Result<CostModel> parse(const std::string& json, const std::string& where);
};

/// For a device as its profile describes it, ranks on one host.
CostModel default_cost_model(const kernels::DeviceProfile& profile);

/// In a worker's data directory; without it the defaults hold.
inline constexpr char kCostModelFile[] = "cost_model.json";

/// The file that `bench_layout --write` made; not_found or invalid_error.
Result<CostModel> read_cost_model(const std::string& path);

}  // namespace tandem::worker::memory
