// Sequence parallelism (Korthikanti et al. 2022): of the T rows of a micro-batch each of n
// tensor-parallel ranks has S = T / n of the residual stream. Products see all rows, so that rows
// are gathered before qkv and gate_up, and addends summed behind o and down, each rank keeping its
// own rows; backward does it the other way round.
//
// Where collectives go on in the background, rows are cut into parts: a part's collectives run
// beside the products of others. Rank r has the r-th n-th of every part, so that all ranks take
// part in each collective equally; its S rows lie in the order of the parts. Bits do not change
// where a product's rows do not depend on each other. One device thread.
#pragma once

#include "worker/model/context.h"

#include <memory>
#include <vector>

namespace tandem::worker::model {

/// What collectives of the stream read, in memory that they share (Communicator::share) and that a
/// session holds while it lives.
struct StreamRoom {
  kernels::Tensor addends;    ///< [T_max, C] what is being summed
  kernels::Tensor normed;     ///< [S_max, C] a norm's output on its way to all ranks
  kernels::Tensor gradients;  ///< [S_max, C] the residual stream's gradient
  /// A part has about as many bytes of [T, C]. Large enough that a product's last wave of tiles and
  /// a collective's beginning are small beside it.
  std::int64_t part_bytes = 0;
};
inline constexpr std::int64_t kStreamPartBytes = 32 << 20;
inline constexpr std::int64_t kStreamPartsMax = 8;

/// Room for micro-batches of up to T rows of `width`, in an arena of Sharing::kPeers. All ranks at
/// once.
StreamRoom make_stream_room(Context& ctx, kernels::Arena& arena, std::int64_t rows,
                            std::int64_t width, std::int64_t part_bytes);

/// How many parts T rows are cut into, S of them here: the same on every rank. 1: not at all, as
/// where every rank has all rows, or nobody made room.
std::int64_t stream_parts(const Context& ctx, std::int64_t t, std::int64_t s);

/// Part p of rows [T, ...] or [S, ...]; an undefined tensor has none.
inline kernels::Tensor stream_part(const kernels::Tensor& x, std::int64_t p, std::int64_t parts) {
  if (!x.defined() || parts == 1) return x;
  const std::int64_t rows = x.dim(0) / parts;
  return x.rows(p * rows, rows);
}

/// A collective for each part; null: nothing to wait for.
using PartsPending = std::vector<std::unique_ptr<comm::Pending>>;
void wait_part(const Context& ctx, PartsPending& pending, std::int64_t p);
void wait_parts(const Context& ctx, PartsPending& pending);

/// All rows of a stream, on their way from the ranks.
struct GatheredRows {
  kernels::Tensor all;  ///< [T, C]
  PartsPending pending;

  /// Part p of `parts`, when it has come.
  kernels::Tensor part(const Context& ctx, std::int64_t p, std::int64_t parts) {
    wait_part(ctx, pending, p);
    return stream_part(all, p, parts);
  }
  const kernels::Tensor& wait(const Context& ctx) {
    wait_parts(ctx, pending);
    return all;
  }
};

/// x [S, C], as all [T, C]; and the sum over ranks of all [T, C], as this rank's x [S, C]. Done
/// when they return, as far as ctx.exec's queue sees.
void gather_stream(Context& ctx, const kernels::Tensor& x, const kernels::Tensor& all);
void sum_stream(Context& ctx, const kernels::Tensor& all, const kernels::Tensor& x);

}  // namespace tandem::worker::model
