// Loss over the vocabulary in chunks of rows.
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/row_statistics.cuh"
#include "kernels/cuda_workspace.h"

#include <algorithm>

namespace tandem::kernels::cuda {
namespace {

constexpr int kThreads = kStatisticsThreads;

/// One block a row: loss and hit; the row's logits become gradient_scale * (softmax - one-hot) in
/// T, element j at byte j * sizeof(T) of the row. A sweep goes up, and what it writes never lies
/// beyond what the sweep has read.
template <class T>
__global__ void __launch_bounds__(kThreads)
    row_loss_kernel(float* logits, std::int64_t v, const std::int32_t* labels, float gradient_scale,
                    bool backward, float* loss, float* correct) {
  const std::int64_t row = blockIdx.x;
  float* x = logits + row * v;
  T* out = reinterpret_cast<T*>(x);
  const std::int32_t label = labels[row];
  if (label >= v) __trap();
  if (label < 0) {
    if (threadIdx.x == 0) {
      loss[row] = 0.0f;
      if (correct != nullptr) correct[row] = 0.0f;
    }
    if (!backward) return;
    for (std::int64_t j = threadIdx.x; j < v; j += kThreads) out[j] = store_as<T>(0.0f);
    return;
  }
  const RowStatistics s = row_statistics<kThreads>(x, v);
  const float own = s.lse() - x[label];
  if (threadIdx.x == 0) {
    loss[row] = own;
    if (correct != nullptr) correct[row] = s.argmax == label ? 1.0f : 0.0f;
  }
  if (!backward) return;
  const float scale = gradient_scale / s.sum;
  constexpr int kUnroll = 4;
  for (std::int64_t begin = 0; begin < v; begin += kThreads * kUnroll) {
    float g[kUnroll];
    __syncthreads();  // the last sweep's writes; and every thread has read x[label]
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t j = begin + u * kThreads + threadIdx.x;
      if (j < v) g[u] = x[j];
    }
    __syncthreads();
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t j = begin + u * kThreads + threadIdx.x;
      if (j >= v) continue;
      // exp(-loss) - 1 without cancellation: the label's own gradient is small once trained.
      out[j] = store_as<T>(j == label ? gradient_scale * expm1f(-own) : scale * expf(g[u] - s.top));
    }
  }
}

template <class T>
void row_loss(cudaStream_t stream, const LinearCrossEntropyArgs& a, std::int64_t begin,
              std::int64_t rows, float* logits) {
  row_loss_kernel<T><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
      logits, a.weight->n, a.labels.as<std::int32_t>() + begin, a.gradient_scale, a.dx.defined(),
      a.loss.as<float>() + begin, a.correct.defined() ? a.correct.as<float>() + begin : nullptr);
  TANDEM_LAUNCHED("row_loss_kernel");
}

/// In f32 one chain over 300,000 entries loses what is below half an ulp: it is cut into blocks.
constexpr std::int64_t kBlockF32 = 16384;

void input_grad(cudaStream_t stream, Numerics numerics, Blas& blas, const Matrix& dlogits,
                const Matrix& w, const Matrix& dx, void* gemm) {
  const std::int64_t v = w.rows, size = dtype_bytes(w.dtype);
  const std::int64_t block = w.dtype == DType::kF32 ? kBlockF32 : v;
  for (std::int64_t begin = 0; begin < v; begin += block) {
    Matrix part = dlogits, weights = w;
    part.columns = weights.rows = std::min(block, v - begin);
    part.data = static_cast<const char*>(dlogits.data) + begin * size;
    weights.data = static_cast<const char*>(w.data) + begin * w.ld * size;
    blas.product(stream, numerics, part, weights, dx, begin > 0, nullptr, gemm);
  }
}

}  // namespace

void CudaOps::do_linear_cross_entropy(Exec& exec, const LinearCrossEntropyArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "linear_cross_entropy",
                              static_cast<double>(a.x.bytes()));
  const cudaStream_t s = stream(exec);
  const std::int64_t t = a.x.dim(0), c = a.x.dim(1), v = a.weight->n;
  const DType cd = a.x.dtype;
  const LinearCrossEntropyLayout layout = linear_cross_entropy_layout(a);
  const Scratch scratch(exec, layout.bytes);
  auto* logits = scratch.at<float>(layout.logits);
  void* gemm = scratch.at<char>(layout.gemm);
  const Matrix w{a.weight->storage.data, cd, v, c, c, false};
  for (std::int64_t begin = 0; begin < t; begin += layout.chunk_rows) {
    const std::int64_t rows = std::min(layout.chunk_rows, t - begin);
    blas_.product(s, exec.numerics, matrix(a.x.rows(begin, rows)), transpose(w),
                  {logits, DType::kF32, rows, v, v, false}, false, nullptr, gemm);
    {
      const Profiler::Scope pass(profiler_, s, "  row loss", static_cast<double>(rows * v) * 10.0);
      TANDEM_CUDA_DISPATCH(cd, row_loss, s, a, begin, rows, logits);
    }
    if (!a.dx.defined()) continue;
    // A row of gradients begins where its logits began: in bf16 rows are 2 V elements apart.
    const Matrix dlogits{logits, cd, rows, v, v * 4 / dtype_bytes(cd), false};
    input_grad(s, exec.numerics, blas_, dlogits, w, matrix(a.dx.rows(begin, rows)), gemm);
  }
}

}  // namespace tandem::kernels::cuda
