// Private to kernels/cpu: what the row-wise ops do to one row (or one block of elements), compiled
// once per instruction set and chosen at run time. One thread each; no memory is allocated. A row's
// bits depend on the row alone: 16 lanes in a fixed order, tails through the same code padded.
#pragma once

#include "kernels/cpu/log_sum_exp.h"
#include "protocol/base/dtype.h"

#include <cstdint>

namespace tandem::kernels::cpu {

/// Formulas and dtypes: kernels/op_args.h. T is float or bf16.
template <class T>
struct RowKernelsOf {
  /// residual += delta (unless null); y = norm; returns rstd.
  float (*add_rms_norm)(T* residual, const T* delta, const T* weight, float eps, T* y,
                        std::int64_t c);
  /// dresidual += d norm.
  void (*rms_norm_grad)(const T* dy, const T* residual, const T* weight, float rstd, T* dresidual,
                        std::int64_t c);
  void (*silu_mul)(const T* gate, const T* up, T* out, std::int64_t f);
  /// dgate and dup may be gate and up.
  void (*silu_mul_grad)(const T* dout, const T* gate, const T* up, T* dgate, T* dup,
                        std::int64_t f);
  /// Turns `heads` heads of `2 * half` elements by the angles whose cosines and sines are given.
  void (*rotate)(T* x, std::int64_t heads, std::int64_t half, const float* cosines,
                 const float* sines);
  /// In place over one row of logits: T element j = scale * exp(logit j - top), as T, from the
  /// row's first byte on.
  void (*softmax_gradient)(float* logits, std::int64_t v, float top, float scale);
};

struct AdamWStep {
  float clip, beta1, beta2, eps, keep, step_size, root2;  ///< root2 = sqrt(1 - beta2^step)
};

struct RowKernels {
  RowKernelsOf<float> f32;
  RowKernelsOf<bf16> half;
  /// cos and sin of position * inv_freq[j], times factor, for j < half; sines times sign too.
  void (*angles)(float position, const float* inv_freq, std::int64_t half, float factor, float sign,
                 float* cosines, float* sines);
  RowStatistics (*statistics)(const float* logits, std::int64_t n);
  /// out[j] = exp((logits[j] - top) * inverse_temperature).
  void (*weights)(const float* logits, std::int64_t n, float top, float inverse_temperature,
                  float* out);
  /// Sum of n <= kSumBlock elements.
  float (*sum)(const float* x, std::int64_t n);
  void (*adamw)(const AdamWStep& step, const float* grad, float* m, float* v, float* param,
                std::int64_t n);
  void (*round_bf16)(const float* x, bf16* out, std::int64_t n);
};

inline constexpr std::int64_t kSumBlock = 256;

extern const RowKernels kRowKernelsGeneric;
#if defined(__x86_64__)
extern const RowKernels kRowKernelsAvx2;
extern const RowKernels kRowKernelsAvx512;
#endif

/// The table for this processor (cpu_features.h).
const RowKernels& row_kernels();
template <class T>
const RowKernelsOf<T>& row_kernels_of();

}  // namespace tandem::kernels::cpu
