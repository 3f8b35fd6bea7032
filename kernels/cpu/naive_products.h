// Private to kernels/cpu: plain products over row-major weights. Each output element is one fixed
// sequence of operations on its own row.
#pragma once

#include "kernels/cpu/parallel.h"
#include "protocol/base/dtype.h"

#include <algorithm>
#include <cstdint>

namespace tandem::kernels::cpu {

template <class T>
float dot(const T* a, const T* b, std::int64_t n) {
  constexpr std::int64_t kLanes = 16;
  float lanes[kLanes] = {};
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (std::int64_t l = 0; l < kLanes; ++l) lanes[l] += to_f32(a[j + l]) * to_f32(b[j + l]);
  for (std::int64_t l = 0; j < n; ++j, ++l) lanes[l] += to_f32(a[j]) * to_f32(b[j]);
  float sum = 0.0f;
  for (float lane : lanes) sum += lane;
  return sum;
}

/// y[t, n] = x[t, i] w[n, i]^T + bias.
template <class T, class Y>
void product(const T* x, const T* w, const T* bias, Y* y, std::int64_t t, std::int64_t n,
             std::int64_t i, int threads) {
  constexpr std::int64_t kBlock = 32;
  parallel_for(threads, (n + kBlock - 1) / kBlock, [&](std::int64_t block) {
    for (std::int64_t row = 0; row < t; ++row)
      for (std::int64_t j = block * kBlock; j < std::min(n, (block + 1) * kBlock); ++j)
        y[row * n + j] = from_f32<Y>(dot(x + row * i, w + j * i, i) +
                                     (bias == nullptr ? 0.0f : to_f32(bias[j])));
  });
}

/// dx[t, i] = dy[t, n] w[n, i].
template <class T>
void product_grad(const T* dy, const T* w, T* dx, std::int64_t t, std::int64_t n, std::int64_t i,
                  int threads) {
  constexpr std::int64_t kBlock = 256;
  const std::int64_t blocks = (i + kBlock - 1) / kBlock;
  parallel_for(threads, t * blocks, [&](std::int64_t task) {
    const std::int64_t row = task / blocks, begin = task % blocks * kBlock;
    const std::int64_t count = std::min(kBlock, i - begin);
    float sums[kBlock] = {};
    for (std::int64_t j = 0; j < n; ++j) {
      const float d = to_f32(dy[row * n + j]);
      for (std::int64_t c = 0; c < count; ++c) sums[c] += d * to_f32(w[j * i + begin + c]);
    }
    for (std::int64_t c = 0; c < count; ++c) dx[row * i + begin + c] = from_f32<T>(sums[c]);
  });
}

}  // namespace tandem::kernels::cpu
