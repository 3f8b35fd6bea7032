// Scratch bytes of collectives as pure functions of sizes, and the sum that all CPU implementations
// share. Any thread.
#pragma once

#include "kernels/allocator.h"
#include "kernels/tensor.h"

#include <span>

namespace tandem::worker::comm {

/// Sums are taken a piece of at most so many bytes at a time: scratch stays small beside tensors.
inline constexpr std::int64_t kPieceBytes = 4 << 20;

/// A sum over `elements` is cut into pieces of `piece` elements (the last may be smaller).
struct SumPlan {
  std::int64_t piece = 0;  ///< elements
  std::int64_t slice = 0;  ///< of a piece, per rank: ceil(piece / size) (all_reduce only)
  std::int64_t bytes = 0;  ///< scratch
};
/// all_reduce: scratch holds `size` slices, one from each rank.
SumPlan all_reduce_plan(std::int64_t elements, DType dtype, int size);
/// reduce_scatter with `elements` in out: scratch holds `size` pieces, one from each rank.
SumPlan reduce_scatter_plan(std::int64_t elements, DType dtype, int size);

/// out[e] = ((0 + parts[0][e]) + parts[1][e]) + ...; f32 and bf16 in f32, f64 in f64. out may be
/// one of the parts.
void sum_in_rank_order(std::span<const void* const> parts, DType dtype, std::int64_t count,
                       void* out);

}  // namespace tandem::worker::comm
