// AdamW and the global norm.
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/parallel.h"

#include <algorithm>
#include <cmath>

namespace tandem::kernels::cpu {

void CpuOps::do_squared_norm(Exec& exec, const SquaredNormArgs& a) {
  const SquaredNormWorkspace layout = squared_norm_workspace(a, profile_);
  const Scratch scratch(exec, layout.bytes);
  double* partial = scratch.at<double>(layout.partial);
  std::int64_t done = 0;
  for (const Tensor& tensor : a.tensors) {
    const std::int64_t n = tensor.elements();
    const std::int64_t chunks = (n + kSquaredNormChunk - 1) / kSquaredNormChunk;
    const float* x = tensor.as<float>();
    parallel_for(profile_.threads, chunks, [&](std::int64_t chunk) {
      constexpr int kLanes = 8;
      double lanes[kLanes] = {};
      const std::int64_t begin = chunk * kSquaredNormChunk;
      const std::int64_t count = std::min(kSquaredNormChunk, n - begin);
      std::int64_t j = 0;
      for (; j + kLanes <= count; j += kLanes)
        for (int l = 0; l < kLanes; ++l) {
          const double value = x[begin + j + l];
          lanes[l] += value * value;
        }
      for (; j < count; ++j) lanes[0] += static_cast<double>(x[begin + j]) * x[begin + j];
      double sum = 0.0;
      for (double lane : lanes) sum += lane;
      partial[done + chunk] = sum;
    });
    done += chunks;
  }
  double sum = 0.0;
  for (std::int64_t chunk = 0; chunk < done; ++chunk) sum += partial[chunk];
  a.out.as<float>()[0] = static_cast<float>(sum);
}

void CpuOps::do_adamw(Exec&, const AdamWArgs& a) {
  float clip = 1.0f;
  if (a.max_norm > 0.0f)
    clip = std::min(1.0f, a.max_norm / (std::sqrt(a.squared_norm.as<float>()[0]) + 1e-6f));
  const double step = static_cast<double>(a.step);
  const double correction1 = 1.0 - std::pow(static_cast<double>(a.beta1), step);
  const double correction2 = 1.0 - std::pow(static_cast<double>(a.beta2), step);
  const float step_size = static_cast<float>(a.lr / correction1);
  const float root2 = static_cast<float>(std::sqrt(correction2));
  const float keep = 1.0f - a.lr * a.weight_decay;
  const std::int64_t n = a.param.elements();
  float* param = a.param.as<float>();
  const float* grad = a.grad.as<float>();
  float* m = a.m.as<float>();
  float* v = a.v.as<float>();
  constexpr std::int64_t kBlock = 1 << 14;
  parallel_for(profile_.threads, (n + kBlock - 1) / kBlock, [&](std::int64_t block) {
    const std::int64_t begin = block * kBlock, end = std::min(n, begin + kBlock);
    for (std::int64_t j = begin; j < end; ++j) {
      const float g = grad[j] * clip;
      m[j] = m[j] + (1.0f - a.beta1) * (g - m[j]);
      v[j] = a.beta2 * v[j] + (1.0f - a.beta2) * g * g;
      param[j] = param[j] * keep - step_size * (m[j] / (std::sqrt(v[j]) / root2 + a.eps));
    }
    if (!a.param_cd.defined()) return;
    if (a.param_cd.dtype == DType::kF32)
      std::copy(param + begin, param + end, a.param_cd.as<float>() + begin);
    else
      for (std::int64_t j = begin; j < end; ++j) a.param_cd.as<bf16>()[j] = to_bf16(param[j]);
  });
}

}  // namespace tandem::kernels::cpu
