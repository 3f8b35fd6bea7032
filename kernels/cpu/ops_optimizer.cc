// AdamW and the global norm.
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/row_kernels.h"

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
    parallel_for(profile_.threads, chunks, kSquaredNormChunk, [&](std::int64_t chunk) {
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
    clip = std::min(
        1.0f, a.max_norm / (a.grad_factor * std::sqrt(a.squared_norm.as<float>()[0]) + 1e-6f));
  const double steps = static_cast<double>(a.step);
  const double correction1 = 1.0 - std::pow(static_cast<double>(a.beta1), steps);
  const double correction2 = 1.0 - std::pow(static_cast<double>(a.beta2), steps);
  const AdamWStep step{clip * a.grad_factor,
                       a.beta1,
                       a.beta2,
                       a.eps,
                       1.0f - a.lr * a.weight_decay,
                       static_cast<float>(a.lr / correction1),
                       static_cast<float>(std::sqrt(correction2))};
  const std::int64_t n = a.param.elements();
  constexpr std::int64_t kBlock = 1 << 14;
  parallel_for(profile_.threads, (n + kBlock - 1) / kBlock, kBlock, [&](std::int64_t block) {
    const std::int64_t begin = block * kBlock, count = std::min(kBlock, n - begin);
    float* param = a.param.as<float>() + begin;
    row_kernels().adamw(step, a.grad.as<float>() + begin, a.m.as<float>() + begin,
                        a.v.as<float>() + begin, param, count);
    if (!a.param_cd.defined()) return;
    if (a.param_cd.dtype == DType::kF32)
      std::copy(param, param + count, a.param_cd.as<float>() + begin);
    else
      row_kernels().round_bf16(param, a.param_cd.as<bf16>() + begin, count);
  });
}

}  // namespace tandem::kernels::cpu
