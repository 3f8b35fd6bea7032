// AdamW and the global norm.
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/device.cuh"

#include <algorithm>
#include <cmath>

namespace tandem::kernels::cuda {
namespace {

constexpr int kThreads = 256;

/// One block a chunk of kSquaredNormChunk elements; f64, in an order that is fixed.
__global__ void __launch_bounds__(kThreads)
    squared_norm_kernel(const float* x, std::int64_t n, double* partial) {
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kSquaredNormChunk;
  const std::int64_t end = n < begin + kSquaredNormChunk ? n : begin + kSquaredNormChunk;
  double sum = 0.0;
#pragma unroll 8
  for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads)
    sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) partial[blockIdx.x] = sums[0];
}

__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const double* partial, std::int64_t n, float* out) {
  __shared__ double sums[kThreads];
  double sum = 0.0;
  for (std::int64_t i = threadIdx.x; i < n; i += kThreads) sum += partial[i];
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[0] = static_cast<float>(sums[0]);
}

struct Step {
  float max_norm, beta1, beta2, eps, keep, step_size, root2;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(float* param, const float* grad, float* m, float* v, T* param_cd,
                 const float* squared_norm, std::int64_t n, Step a) {
  float clip = 1.0f;
  if (a.max_norm > 0.0f) clip = fminf(1.0f, a.max_norm / (sqrtf(*squared_norm) + 1e-6f));
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n;
       i += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    const float g = grad[i] * clip, m_old = m[i];
    const float m_new = fmaf(1.0f - a.beta1, g - m_old, m_old);
    const float v_new = fmaf(1.0f - a.beta2, g * g, a.beta2 * v[i]);
    const float update = m_new / fmaf(sqrtf(v_new), 1.0f / a.root2, a.eps);
    const float p = fmaf(-a.step_size, update, param[i] * a.keep);
    m[i] = m_new;
    v[i] = v_new;
    param[i] = p;
    if (param_cd != nullptr) param_cd[i] = store_as<T>(p);
  }
}

template <class T>
void run_adamw(cudaStream_t stream, const AdamWArgs& a, const Step& step) {
  const std::int64_t n = a.param.elements();
  const auto blocks =
      static_cast<unsigned>(std::min<std::int64_t>((n + kThreads - 1) / kThreads, 1 << 16));
  adamw_kernel<T><<<blocks, kThreads, 0, stream>>>(
      a.param.as<float>(), a.grad.as<float>(), a.m.as<float>(), a.v.as<float>(),
      static_cast<T*>(a.param_cd.data), static_cast<const float*>(a.squared_norm.data), n, step);
  TANDEM_LAUNCHED("adamw_kernel");
}

}  // namespace

void CudaOps::do_squared_norm(Exec& exec, const SquaredNormArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "squared_norm", static_cast<double>(0));
  const cudaStream_t s = stream(exec);
  const SquaredNormWorkspace layout = squared_norm_workspace(a, profile_);
  const Scratch scratch(exec, layout.bytes);
  auto* partial = scratch.at<double>(layout.partial);
  std::int64_t done = 0;
  for (const Tensor& tensor : a.tensors) {
    const std::int64_t n = tensor.elements();
    const std::int64_t chunks = (n + kSquaredNormChunk - 1) / kSquaredNormChunk;
    if (chunks == 0) continue;
    squared_norm_kernel<<<static_cast<unsigned>(chunks), kThreads, 0, s>>>(tensor.as<float>(), n,
                                                                           partial + done);
    TANDEM_LAUNCHED("squared_norm_kernel");
    done += chunks;
  }
  sum_partials_kernel<<<1, kThreads, 0, s>>>(partial, done, a.out.as<float>());
  TANDEM_LAUNCHED("sum_partials_kernel");
}

void CudaOps::do_adamw(Exec& exec, const AdamWArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "adamw",
                              static_cast<double>(a.param.bytes() * 7));
  const double steps = static_cast<double>(a.step);
  const double correction1 = 1.0 - std::pow(static_cast<double>(a.beta1), steps);
  const double correction2 = 1.0 - std::pow(static_cast<double>(a.beta2), steps);
  const Step step{a.max_norm,
                  a.beta1,
                  a.beta2,
                  a.eps,
                  1.0f - a.lr * a.weight_decay,
                  static_cast<float>(a.lr / correction1),
                  static_cast<float>(std::sqrt(correction2))};
  const DType cd = a.param_cd.defined() ? a.param_cd.dtype : DType::kF32;
  TANDEM_CUDA_DISPATCH(cd, run_adamw, stream(exec), a, step);
}

}  // namespace tandem::kernels::cuda
