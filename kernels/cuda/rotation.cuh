// Private to kernels/cuda: rotary positions as kernels see them. Every kernel that rotates takes it
// from here, so that all give the same bits.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/op_args.h"

namespace tandem::kernels::cuda {

/// RopeArgs without qkv.
struct RopeView {
  const std::int32_t* positions;
  const float* inv_freq;
  float factor;
  int heads, kv_heads, dim;
  void *k = nullptr, *v = nullptr;  ///< null: nowhere
  const std::int32_t* slots = nullptr;
  int blocks = 0, block_size = 1;

  [[nodiscard]] __device__ bool rotates(int head) const { return head < heads + kv_heads; }
};

inline RopeView rope_view(const RopeArgs& a) {
  RopeView v{
      a.positions.as<std::int32_t>(), a.inv_freq.as<float>(),       a.attention_factor,
      static_cast<int>(a.heads),      static_cast<int>(a.kv_heads), static_cast<int>(a.head_dim)};
  if (a.cache == nullptr) return v;
  v.k = a.cache->k.data, v.v = a.cache->v.data;
  v.slots = a.cache_slots.as<std::int32_t>();
  v.blocks = static_cast<int>(a.cache->k.dim(0));
  v.block_size = static_cast<int>(a.cache->block_size);
  return v;
}

/// Cosine and sine of an element's angle.
__device__ inline float2 rope_angle(float position, float inv_freq, float factor) {
  float s, c;
  sincosf(position * inv_freq, &s, &c);
  return {c * factor, s * factor};
}
/// An element of the head's first half, and the one half a head behind.
__device__ inline float rotated_low(float low, float high, float2 angle) {
  return __fmaf_rn(low, angle.x, -__fmul_rn(high, angle.y));
}
__device__ inline float rotated_high(float low, float high, float2 angle) {
  return __fmaf_rn(high, angle.x, __fmul_rn(low, angle.y));
}

/// Where the cache has a row's keys and values.
struct CachedRow {
  std::int64_t block = 0;
  int offset = -1;  ///< in it; -1: nowhere
};
__device__ inline CachedRow cached_row(const RopeView& v, int t) {
  const int slot = v.k == nullptr ? -1 : v.slots[t];
  if (slot < 0) return {};
  if (slot / v.block_size >= v.blocks) __trap();
  return {slot / v.block_size, slot % v.block_size};
}
/// Element d of a head of keys or values there; null: nowhere.
template <class E>
__device__ inline E* rope_cached(const RopeView& v, const CachedRow& row, int head, int d) {
  if (row.offset < 0 || head < v.heads) return nullptr;
  const int of = head - v.heads - (v.rotates(head) ? 0 : v.kv_heads);
  return static_cast<E*>(v.rotates(head) ? v.k : v.v) +
         ((row.block * v.kv_heads + of) * v.block_size + row.offset) * v.dim + d;
}

}  // namespace tandem::kernels::cuda
