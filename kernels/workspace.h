// Scratch bytes of every op as pure functions of shapes, dtypes and the device profile. The CPU
// backend takes exactly these bytes from Exec::workspace and cuts them up as the layouts say; the
// meta backend takes the same bytes and cuts nothing. That is why the two ledgers agree.
// Any thread.
#pragma once

#include "kernels/device_profile.h"
#include "kernels/op_args.h"

namespace tandem::kernels {

/// Bytes of a packed weight W [n, i].
std::int64_t packed_weight_bytes(DType dtype, std::int64_t n, std::int64_t i,
                                 const DeviceProfile& profile);

/// Rows of f32 that FillRows is asked for at once: at most this many bytes, at least one block.
inline constexpr std::int64_t kPackBlockBytes = 4 << 20;
inline constexpr std::int64_t kPackBlockRows = 32;
struct PackWeightScratch {
  std::int64_t block_rows = 0;  ///< a multiple of kPackBlockRows
  std::int64_t bytes = 0;       ///< f32 [block_rows, i]
};
PackWeightScratch pack_weight_scratch(std::int64_t n, std::int64_t i);

/// Offsets are from the scratch's start and multiples of kDeviceAlignment; `bytes` is the whole.
struct LinearForwardScratch {
  std::int64_t u = 0;  ///< [T, sites * rank_max] cd, where the caller keeps none
  std::int64_t x = 0;  ///< [T, I] cd: dropout(x), one site at a time; only with dropout
  std::int64_t bytes = 0;
};
LinearForwardScratch linear_forward_scratch(const LinearArgs& args, const DeviceProfile& profile);

struct LinearBackwardScratch {
  std::int64_t u = 0;   ///< [T, sites * rank_max] cd, where forward kept none
  std::int64_t du = 0;  ///< [T, sites * rank_max] cd: s dy B
  std::int64_t x = 0;   ///< [T, I] cd: dropout(x); only with dropout
  std::int64_t bytes = 0;
};
LinearBackwardScratch linear_backward_scratch(const LinearBackwardArgs& args,
                                              const DeviceProfile& profile);

struct LinearCrossEntropyScratch {
  std::int64_t chunk_rows = 0;
  std::int64_t logits = 0;   ///< [chunk_rows, V] f32
  std::int64_t dlogits = 0;  ///< [chunk_rows, V] cd; only with dx
  std::int64_t bytes = 0;
};
LinearCrossEntropyScratch linear_cross_entropy_scratch(const LinearCrossEntropyArgs& args,
                                                       const DeviceProfile& profile);

struct AttentionScratch {
  std::int64_t bytes = 0;
};
AttentionScratch attention_forward_scratch(const AttentionArgs& args, const DeviceProfile& profile);
AttentionScratch attention_backward_scratch(const AttentionBackwardArgs& args,
                                            const DeviceProfile& profile);
AttentionScratch paged_attention_forward_scratch(const PagedAttentionArgs& args,
                                                 const DeviceProfile& profile);

struct SampleScratch {
  std::int64_t weights = 0;     ///< f32 [threads, V]
  std::int64_t candidates = 0;  ///< 8 bytes (f32, i32) [threads, V]
  std::int64_t bytes = 0;
};
SampleScratch sample_scratch(const SampleArgs& args, const DeviceProfile& profile);

/// Elements whose squares one partial sum holds.
inline constexpr std::int64_t kSquaredNormChunk = 1 << 16;
struct SquaredNormScratch {
  std::int64_t partial = 0;  ///< f64 [chunks over all tensors]
  std::int64_t chunks = 0;
  std::int64_t bytes = 0;
};
SquaredNormScratch squared_norm_scratch(const SquaredNormArgs& args, const DeviceProfile& profile);

}  // namespace tandem::kernels
