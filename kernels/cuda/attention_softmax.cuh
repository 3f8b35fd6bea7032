// Private to kernels/cuda: the running softmax of attention over blocks of keys. The kernels that
// share it (attention_own_forward.cu, paged_ordered.cu) give a row the same bits, so every rounding
// is named here and left to no compiler's contraction.
#pragma once

#include "kernels/cuda/device.cuh"

#include <cmath>

namespace tandem::kernels::cuda {

/// Of the two rows a thread holds: the largest score, and this thread's part of the sum of
/// exponentials.
struct RowState {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
};

/// Scores [rows, kCount / 2 keys] as the tensor cores leave them (hopper.cuh). Those beyond the
/// diagonal or behind the window become -inf. `query` and `other` are the positions of
/// the thread's rows, `key` that of its first column; window 0: all keys.
template <int kCount>
__device__ inline void mask_scores(float (&s)[kCount], int query, int other, int key, int window) {
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int q = i / 2 == 0 ? query : other, k = key + 8 * j + i % 2;
      if (k > q || (window != 0 && q - k >= window)) s[4 * j + i] = -INFINITY;
    }
}

/// Scores become exponentials relative to the rows' largest so far; gives the factors by which what
/// was summed before shrinks, 1 where a block has nothing larger. A block of which a row sees no
/// key leaves it as it was.
template <int kCount>
__device__ inline void exponentiate(float (&s)[kCount], RowState& state, float scale_log2,
                                    float (&shrink)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float top = state.top[h];
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j)
      top = fmaxf(top, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    const float offset = top == -INFINITY ? 0.0f : __fmul_rn(top, scale_log2);
    shrink[h] = exp2_fast(__fsub_rn(__fmul_rn(state.top[h], scale_log2), offset));
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[4 * j + 2 * h + i];
        x = exp2_fast(__fmaf_rn(x, scale_log2, -offset));
        sum = __fadd_rn(sum, x);
      }
    state.sum[h] = __fmaf_rn(state.sum[h], shrink[h], sum);
    state.top[h] = top;
  }
}

/// Under kInvariant each segment of keys, counted from the sequence's start, has a softmax of its
/// own, and they are added from a row's last down: so few rows of long sequences fill a device.
constexpr int kSegmentKeys = 512;

/// Factors by which what a row has of the segments above, and what it has of the next one, shrink
/// when they are added; top and sum become those of both.
struct SegmentFactors {
  float all, next;
};
__device__ inline SegmentFactors add_segment(float& top, float& sum, float next_top, float next_sum,
                                             float scale_log2) {
  const float both = fmaxf(top, next_top);
  const float offset = both == -INFINITY ? 0.0f : __fmul_rn(both, scale_log2);
  const SegmentFactors f{exp2_fast(__fsub_rn(__fmul_rn(top, scale_log2), offset)),
                         exp2_fast(__fsub_rn(__fmul_rn(next_top, scale_log2), offset))};
  sum = __fmaf_rn(sum, f.all, __fmul_rn(next_sum, f.next));
  top = both;
  return f;
}
__device__ inline float add_values(float all, float next, const SegmentFactors& f) {
  return __fmaf_rn(all, f.all, __fmul_rn(next, f.next));
}

/// The whole row's sum, of a quad's parts; every lane gets it.
__device__ inline float row_sum(float sum) {
  sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 1));
  return __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 2));
}

}  // namespace tandem::kernels::cuda
