// Private to kernels/cuda: what a product of one row makes of its outputs in place of the op that
// would follow (LinearReader). Both ops read pairs of outputs, `distance` apart: gate and up, or
// the halves of a head. Products of a few rows make silu * up alone (skinny.cu).
#pragma once

#include "kernels/cuda/rotation.cuh"
#include "kernels/cuda/silu.cuh"

#include <type_traits>

namespace tandem::kernels::cuda {

enum class Then { kNothing, kSiluMul, kRope };

struct ThenView {
  int distance;
  RopeView rope;

  /// Pair `index` of all: its first output.
  [[nodiscard]] __device__ std::int64_t first_of(std::int64_t index) const {
    return index / distance * 2 * distance + index % distance;
  }
};

inline ThenView then_view(const LinearArgs& a) {
  const RopeArgs& rope = a.then.rope;
  if (!rope.qkv.defined()) return {static_cast<int>(a.weight->n / 2), {}};
  return {static_cast<int>(rope.head_dim / 2), rope_view(rope)};
}

/// Calls f<E, Out, kThen>.
template <class F>
void with_outputs(const LinearArgs& a, const F& f) {
  with_element(a.weight->dtype, [&]<class E>(E) {
    if (a.then.silu_mul.out.defined()) return f.template operator()<E, E, Then::kSiluMul>();
    if (a.then.rope.qkv.defined()) return f.template operator()<E, E, Then::kRope>();
    if (a.y.dtype == DType::kF32) return f.template operator()<E, float, Then::kNothing>();
    f.template operator()<E, E, Then::kNothing>();
  });
}
/// Where the results go.
inline void* output_of(const LinearArgs& a) {
  return a.then.silu_mul.out.defined() ? a.then.silu_mul.out.data : a.y.data;
}

/// By one thread, of the only row: outputs n and n + distance, as sums with their bias.
template <class E, Then kThen>
__device__ inline void store_pair(const ThenView& v, E* y, std::int64_t n, float low, float high) {
  low = load_f32(store_as<E>(low)), high = load_f32(store_as<E>(high));
  if constexpr (kThen == Then::kSiluMul) {
    y[n] = store_as<E>(silu_mul(low, high));
  } else {
    const RopeView& r = v.rope;
    const int head = static_cast<int>(n) / r.dim, d = static_cast<int>(n) % r.dim;
    E a = store_as<E>(low), b = store_as<E>(high);
    if (r.rotates(head)) {
      const float2 angle = rope_angle(static_cast<float>(r.positions[0]), r.inv_freq[d], r.factor);
      a = store_as<E>(rotated_low(low, high, angle));
      b = store_as<E>(rotated_high(low, high, angle));
    }
    y[n] = a, y[n + v.distance] = b;
    if (E* to = rope_cached<E>(r, cached_row(r, 0), head, d); to != nullptr)
      to[0] = a, to[v.distance] = b;
  }
}

}  // namespace tandem::kernels::cuda
