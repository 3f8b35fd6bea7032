// AdamW and the global norm.
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/device.cuh"

#include <algorithm>
#include <cmath>

namespace tandem::kernels::cuda {
namespace {

constexpr int kThreads = 256;

constexpr std::int64_t kVector = 4;  ///< elements of one access
static_assert(kSquaredNormChunk % kVector == 0);

/// Several tensors of one launch: the chunks of `at[t]` begin at block `first`. As many as fit the
/// 4 KiB of a kernel's arguments.
constexpr int kTensorsMax = 128;
struct Chunks {
  struct Entry {
    const float* x;
    std::int64_t n, first;
  };
  int count = 0;
  Entry at[kTensorsMax];
};
static_assert(sizeof(Chunks) + 2 * sizeof(void*) <= 4096);

/// One block a chunk of kSquaredNormChunk elements; f64, in an order that is fixed.
__global__ void __launch_bounds__(kThreads)
    squared_norm_kernel(const __grid_constant__ Chunks chunks, double* partial) {
  int t = 0;
  for (int step = kTensorsMax / 2; step > 0; step /= 2)
    if (t + step < chunks.count && chunks.at[t + step].first <= blockIdx.x) t += step;
  const float* x = chunks.at[t].x;
  const std::int64_t n = chunks.at[t].n;
  const std::int64_t begin =
      (static_cast<std::int64_t>(blockIdx.x) - chunks.at[t].first) * kSquaredNormChunk;
  const std::int64_t end = n < begin + kSquaredNormChunk ? n : begin + kSquaredNormChunk;
  const auto square = [](float value) {
    return static_cast<double>(value) * static_cast<double>(value);
  };
  double sum = 0.0;
  const std::int64_t whole = is_quad(x) ? begin + (end - begin) / kVector * kVector : begin;
#pragma unroll 8
  for (std::int64_t i = begin + threadIdx.x * kVector; i < whole; i += kThreads * kVector) {
    const float4 four = __ldcs(reinterpret_cast<const float4*>(x + i));
    sum += square(four.x) + square(four.y) + (square(four.z) + square(four.w));
  }
  for (std::int64_t i = whole + threadIdx.x; i < end; i += kThreads) sum += square(x[i]);
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
  float max_norm, grad_factor, beta1, beta2, eps, keep, step_size, root2;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(float* param, const float* grad, float* m, float* v, T* param_cd,
                 const float* squared_norm, std::int64_t n, Step a) {
  float clip = 1.0f;
  if (a.max_norm > 0.0f)
    clip = fminf(1.0f, a.max_norm / (__fmul_rn(a.grad_factor, sqrtf(*squared_norm)) + 1e-6f));
  clip *= a.grad_factor;
  const auto step = [&](float gradient, float& p, float& m_at, float& v_at) {
    const float g = __fmul_rn(gradient, clip);  // alone: the same bits in both loops
    m_at = fmaf(1.0f - a.beta1, g - m_at, m_at);
    v_at = fmaf(1.0f - a.beta2, g * g, a.beta2 * v_at);
    const float update = m_at / fmaf(sqrtf(v_at), 1.0f / a.root2, a.eps);
    p = fmaf(-a.step_size, update, p * a.keep);
  };
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t whole =
      is_quad(param) && is_quad(grad) && is_quad(m) && is_quad(v) && is_quad(param_cd)
          ? n / kVector * kVector
          : 0;
  for (std::int64_t i = first * kVector; i < whole; i += stride * kVector) {
    const Vec<float> g = load_vec(grad + i);
    Vec<float> p = load_vec(param + i), m4 = load_vec(m + i), v4 = load_vec(v + i);
#pragma unroll
    for (int e = 0; e < kVector; ++e) step(g.at[e], p.at[e], m4.at[e], v4.at[e]);
    store_vec(m + i, m4);
    store_vec(v + i, v4);
    store_vec(param + i, p);
    if (param_cd == nullptr) continue;
    Quad<T> rounded;
#pragma unroll
    for (int e = 0; e < kVector; ++e) rounded.at[e] = store_as<T>(p.at[e]);
    *reinterpret_cast<Quad<T>*>(param_cd + i) = rounded;
  }
  for (std::int64_t i = whole + first; i < n; i += stride) {
    step(grad[i], param[i], m[i], v[i]);
    if (param_cd != nullptr) param_cd[i] = store_as<T>(param[i]);
  }
}

template <class T>
void run_adamw(cudaStream_t stream, const AdamWArgs& a, const Step& step) {
  const std::int64_t n = a.param.elements();
  constexpr std::int64_t kEach = kThreads * kVector;
  const auto blocks =
      static_cast<unsigned>(std::min<std::int64_t>((n + kEach - 1) / kEach, 1 << 16));
  adamw_kernel<T><<<blocks, kThreads, 0, stream>>>(
      a.param.as<float>(), a.grad.as<float>(), a.m.as<float>(), a.v.as<float>(),
      static_cast<T*>(a.param_cd.data), static_cast<const float*>(a.squared_norm.data), n, step);
  TANDEM_LAUNCHED("adamw_kernel");
}

}  // namespace

void CudaOps::do_squared_norm(Exec& exec, const SquaredNormArgs& a) {
  double bytes = 0.0;
  for (const Tensor& tensor : a.tensors) bytes += static_cast<double>(tensor.bytes());
  const Profiler::Scope scope(profiler_, stream(exec), "squared_norm", bytes);
  const cudaStream_t s = stream(exec);
  const SquaredNormWorkspace layout = squared_norm_workspace(a, profile_);
  const Scratch scratch(exec, layout.bytes);
  auto* partial = scratch.at<double>(layout.partial);
  std::int64_t done = 0, blocks = 0;
  Chunks chunks;
  const auto launch = [&] {
    if (blocks == 0) return;
    squared_norm_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, s>>>(chunks, partial + done);
    TANDEM_LAUNCHED("squared_norm_kernel");
    done += blocks;
    blocks = 0;
    chunks.count = 0;
  };
  for (const Tensor& tensor : a.tensors) {
    const std::int64_t n = tensor.elements();
    if (n == 0) continue;
    chunks.at[chunks.count++] = {tensor.as<float>(), n, blocks};
    blocks += (n + kSquaredNormChunk - 1) / kSquaredNormChunk;
    if (chunks.count == kTensorsMax) launch();
  }
  launch();
  sum_partials_kernel<<<1, kThreads, 0, s>>>(partial, done, a.out.as<float>());
  TANDEM_LAUNCHED("sum_partials_kernel");
}

void CudaOps::do_adamw(Exec& exec, const AdamWArgs& a) {
  const Profiler::Scope scope(
      profiler_, stream(exec), "adamw",
      static_cast<double>(a.param.bytes() * 7) +
          (a.param_cd.defined() ? static_cast<double>(a.param_cd.bytes()) : 0.0));
  const double steps = static_cast<double>(a.step);
  const double correction1 = 1.0 - std::pow(static_cast<double>(a.beta1), steps);
  const double correction2 = 1.0 - std::pow(static_cast<double>(a.beta2), steps);
  const Step step{a.max_norm,
                  a.grad_factor,
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
