// What full fine-tuning and shards of the vocabulary need beside the ops of LoRA: gradients of
// weights, new values into weights, and the loss over logits that already exist.
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/row_statistics.cuh"
#include "kernels/cuda_workspace.h"

#include <algorithm>

namespace tandem::kernels::cuda {
namespace {

constexpr int kThreads = 256;

/// One block a row, which adds all rows of its token, ascending, if it is the first of them.
template <class T>
__global__ void __launch_bounds__(kThreads)
    embedding_backward_kernel(const std::int32_t* ids, const T* dout, std::int64_t rows,
                              std::int64_t columns, std::int64_t first, std::int64_t entries,
                              float* dtable) {
  const std::int64_t own = blockIdx.x, id = ids[own] - first;
  if (id < 0 || id >= entries) return;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  bool earlier = false;
  for (std::int64_t row = thread; row < own && !earlier; row += kThreads)
    earlier = ids[row] - first == id;
  if (__syncthreads_or(earlier) != 0) return;
  __shared__ std::int64_t found[kThreads];
  __shared__ int counts[kThreads / 32];
  float* to = dtable + id * columns;
  for (std::int64_t begin = own; begin < rows; begin += kThreads) {
    const std::int64_t row = begin + thread;
    const bool same = row < rows && ids[row] - first == id;
    const unsigned mask = __ballot_sync(0xffffffffu, same);
    if (lane == 0) counts[warp] = __popc(mask);
    __syncthreads();
    int at = __popc(mask & ((1u << lane) - 1)), total = 0;
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) at += counts[w];
      total += counts[w];
    }
    if (same) found[at] = row;
    __syncthreads();
    for (std::int64_t c = thread; total > 0 && c < columns; c += kThreads) {
      float sum = to[c];
#pragma unroll 4
      for (int i = 0; i < total; ++i) sum += load_f32(dout[found[i] * columns + c]);
      to[c] = sum;
    }
  }
}

constexpr int kColumns = 16, kRowLanes = 64;

/// out[c] += sum over rows of dy * (residual * rstd), or of dy alone without `residual`. Each lane
/// takes every kRowLanes-th row, in f64; lanes are added in order.
template <class T>
__global__ void __launch_bounds__(kColumns* kRowLanes)
    column_sums_kernel(const T* dy, const T* residual, const float* rstd, std::int64_t rows,
                       std::int64_t columns, float* out) {
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  double sum = 0.0;
  if (c < columns) {
#pragma unroll 8
    for (std::int64_t row = threadIdx.y; row < rows; row += kRowLanes) {
      const float g = load_f32(dy[row * columns + c]);
      sum += residual == nullptr
                 ? static_cast<double>(g)
                 : static_cast<double>(g) *
                       static_cast<double>(load_f32(residual[row * columns + c]) * rstd[row]);
    }
  }
  __shared__ double lanes[kRowLanes][kColumns];
  lanes[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || c >= columns) return;
  double total = static_cast<double>(out[c]);
  for (int lane = 0; lane < kRowLanes; ++lane) total += lanes[lane][threadIdx.x];
  out[c] = static_cast<float>(total);
}

template <class T>
void column_sums(cudaStream_t stream, const Tensor& dy, const Tensor& residual, const Tensor& rstd,
                 const Tensor& out) {
  const std::int64_t rows = dy.dim(0), columns = dy.dim(1);
  column_sums_kernel<T>
      <<<static_cast<unsigned>((columns + kColumns - 1) / kColumns), dim3(kColumns, kRowLanes), 0,
         stream>>>(static_cast<const T*>(dy.data), static_cast<const T*>(residual.data),
                   static_cast<const float*>(rstd.data), rows, columns, out.as<float>());
  TANDEM_LAUNCHED("column_sums_kernel");
}

/// As rms_norm_backward_kernel (ops_rows.cu), which it gives its bits; each block goes over every
/// gridDim.x-th row, and leaves the sum of their dy * (residual * rstd) in its row of `parts`.
/// Threads hold kChunks accesses of a row at most.
template <class T, int kChunks>
__global__ void __launch_bounds__(kThreads, 4 / kChunks)
    norm_backward_kernel(const T* dy, const T* residual, const T* weight, const float* rstd,
                         std::int64_t rows, std::int64_t columns, T* dresidual, float* parts) {
  launch_dependents();
  wait_for_inputs();
  constexpr int kSize = Vec<T>::kSize;
  const auto column = [&](int j) {
    return (std::int64_t{j} * kThreads + static_cast<int>(threadIdx.x)) * kSize;
  };
  Vec<T> w[kChunks];
  float sums[kChunks][kSize] = {};
#pragma unroll
  for (int j = 0; j < kChunks; ++j)
    if (column(j) < columns) w[j] = load_vec(weight + column(j));
  for (std::int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const std::int64_t base = row * columns;
    Vec<T> g[kChunks], x[kChunks], out[kChunks];
    const float r = rstd[row];
    float dot = 0.0f;
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      const std::int64_t at = base + column(j);
      if (column(j) < columns) {
        g[j] = load_vec(dy + at);
        x[j] = load_vec(residual + at);
        out[j] = load_vec(dresidual + at);
      }
    }
#pragma unroll
    for (int j = 0; j < kChunks; ++j)
      if (column(j) < columns)
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float gi = load_f32(g[j].at[i]), xi = load_f32(x[j].at[i]);
          dot = fmaf(gi * load_f32(w[j].at[i]), xi, dot);
          sums[j][i] = fmaf(gi, xi * r, sums[j][i]);
        }
    dot = block_sum<kThreads>(dot);
    const float k = r * r * r * dot / static_cast<float>(columns);
#pragma unroll
    for (int j = 0; j < kChunks; ++j)
      if (column(j) < columns) {
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          out[j].at[i] =
              store_as<T>(load_f32(out[j].at[i]) + r * load_f32(w[j].at[i]) * load_f32(g[j].at[i]) -
                          k * load_f32(x[j].at[i]));
        store_vec(dresidual + base + column(j), out[j]);
      }
  }
#pragma unroll
  for (int j = 0; j < kChunks; ++j)
    if (column(j) < columns)
#pragma unroll
      for (int i = 0; i < kSize; ++i) parts[blockIdx.x * columns + column(j) + i] = sums[j][i];
}

template <class T>
void norm_backward(cudaStream_t stream, const RmsNormBackwardArgs& a, const Tensor& parts) {
  const std::int64_t columns = a.dy.dim(1), row_bytes = columns * dtype_bytes(a.dy.dtype);
  const auto kernel = row_bytes <= kNormRowBytesMax / 4   ? norm_backward_kernel<T, 1>
                      : row_bytes <= kNormRowBytesMax / 2 ? norm_backward_kernel<T, 2>
                                                          : norm_backward_kernel<T, 4>;
  launch_early("norm_backward_kernel", kernel, dim3(static_cast<unsigned>(parts.dim(0))),
               dim3(kThreads), 0, stream, static_cast<const T*>(a.dy.data),
               static_cast<const T*>(a.residual.data), static_cast<const T*>(a.weight.data),
               a.rstd.as<const float>(), a.dy.dim(0), columns, static_cast<T*>(a.dresidual.data),
               parts.as<float>());
}

template <class T>
void add_rows(cudaStream_t stream, const EmbeddingBackwardArgs& a) {
  embedding_backward_kernel<T><<<static_cast<unsigned>(a.dout.dim(0)), kThreads, 0, stream>>>(
      a.ids.as<std::int32_t>(), static_cast<const T*>(a.dout.data), a.dout.dim(0), a.dout.dim(1),
      a.first, a.dtable.dim(0), a.dtable.as<float>());
  TANDEM_LAUNCHED("embedding_backward_kernel");
}

__global__ void __launch_bounds__(kStatisticsThreads)
    stats_kernel(const float* logits, std::int64_t v, const std::int32_t* labels,
                 std::int64_t first, float* stats) {
  const std::int64_t row = blockIdx.x;
  const float* x = logits + row * v;
  const RowStatistics s = row_statistics<kStatisticsThreads>(x, v);
  if (threadIdx.x != 0) return;
  const std::int64_t label = labels[row] - first;
  float* out = stats + row * 4;
  out[0] = s.top;
  out[1] = s.sum;
  out[2] = label >= 0 && label < v ? x[label] : 0.0f;
  out[3] = static_cast<float>(first + s.argmax);
}

/// One block a row; the statistics of all shards give the row's softmax.
template <class T>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_kernel(const float* logits, std::int64_t v, const std::int32_t* labels,
                         std::int64_t first, const float* stats, int shards, std::int64_t rows,
                         float gradient_scale, float* loss, float* correct, T* dlogits) {
  const std::int64_t row = blockIdx.x;
  const std::int32_t label = labels[row];
  float top = -INFINITY, sum = 0.0f, label_logit = 0.0f, argmax = 0.0f;
  for (int s = 0; s < shards; ++s) {
    const float* one = stats + (s * rows + row) * 4;
    if (one[0] > top) {
      top = one[0];
      argmax = one[3];
    }
    label_logit += one[2];  // zero but in one shard
  }
  for (int s = 0; s < shards; ++s) {
    const float* one = stats + (s * rows + row) * 4;
    sum += one[1] * expf(one[0] - top);
  }
  const float own = label < 0 ? 0.0f : top + logf(sum) - label_logit;
  if (threadIdx.x == 0) {
    loss[row] = own;
    if (correct != nullptr)
      correct[row] = label >= 0 && argmax == static_cast<float>(label) ? 1.0f : 0.0f;
  }
  if (dlogits == nullptr) return;
  const float scale = label < 0 ? 0.0f : gradient_scale / sum;
  const float* x = logits + row * v;
  T* dx = dlogits + row * v;
  const auto gradient = [&](std::int64_t j, float logit) {
    if (label < 0) return store_as<T>(0.0f);
    return store_as<T>(j == label - first ? gradient_scale * expm1f(-own)
                                          : scale * expf(logit - top));
  };
  const std::int64_t quads = is_quad(x) && is_quad(dx) ? v / 4 : 0;
#pragma unroll 4
  for (std::int64_t i = threadIdx.x; i < quads; i += kThreads) {
    const Quad<float> four = reinterpret_cast<const Quad<float>*>(x)[i];
    Quad<T> out;
#pragma unroll
    for (int e = 0; e < 4; ++e) out.at[e] = gradient(4 * i + e, four.at[e]);
    reinterpret_cast<Quad<T>*>(dx)[i] = out;
  }
  for (std::int64_t j = 4 * quads + threadIdx.x; j < v; j += kThreads) dx[j] = gradient(j, x[j]);
}

template <class T>
void run_cross_entropy(cudaStream_t stream, const CrossEntropyArgs& a) {
  const std::int64_t rows = a.logits.dim(0);
  cross_entropy_kernel<T><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
      a.logits.as<float>(), a.logits.dim(1), a.labels.as<std::int32_t>(), a.first,
      a.stats.as<float>(), static_cast<int>(a.stats.dim(0)), rows, a.gradient_scale,
      a.loss.as<float>(), static_cast<float*>(a.correct.data), static_cast<T*>(a.dlogits.data));
  TANDEM_LAUNCHED("cross_entropy_kernel");
}

}  // namespace

void CudaOps::do_embedding_backward(Exec& exec, const EmbeddingBackwardArgs& a) {
  if (a.dout.dim(0) == 0) return;
  const Profiler::Scope scope(profiler_, stream(exec), "embedding_backward",
                              static_cast<double>(a.dout.bytes()));
  TANDEM_CUDA_DISPATCH(a.dout.dtype, add_rows, stream(exec), a);
}

bool CudaOps::add_norm_weight_grad(Exec& exec, const RmsNormBackwardArgs& a) {
  const NormBackwardLayout layout = norm_backward_layout(a, profile_);
  const Scratch scratch(exec, layout.bytes);
  const auto whole = [](const Tensor& x) {
    return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0;
  };
  if (layout.blocks == 0 || !whole(a.dy) || !whole(a.residual) || !whole(a.weight) ||
      !whole(a.dresidual)) {
    TANDEM_CUDA_DISPATCH(a.dy.dtype, column_sums, stream(exec), a.dy, a.residual, a.rstd,
                         a.dweight);
    return false;
  }
  const Tensor parts = scratch.tensor(layout.parts, DType::kF32, Shape{layout.blocks, a.dy.dim(1)});
  TANDEM_CUDA_DISPATCH(a.dy.dtype, norm_backward, stream(exec), a, parts);
  add_column_sums(exec, parts, a.dweight);
  return true;
}

void CudaOps::add_column_sums(const Exec& exec, const Tensor& parts, const Tensor& sums) {
  column_sums<float>(stream(exec), parts, {}, {}, sums);
}

void CudaOps::do_linear_weight_grad(Exec& exec, const LinearWeightGradArgs& a) {
  const Profiler::Scope scope(
      profiler_, stream(exec), "linear_weight_grad",
      static_cast<double>(a.dy.bytes() + a.x.bytes() + (a.overwrite ? 1 : 2) * a.dweight.bytes()));
  const Scratch scratch(exec, workspace_bytes(a, profile_));
  blas_.product(stream(exec), exec.numerics, transpose(matrix(a.dy)), matrix(a.x),
                matrix(a.dweight), !a.overwrite, nullptr, scratch.at<char>(0));
  if (a.dbias.defined())
    TANDEM_CUDA_DISPATCH(a.dy.dtype, column_sums, stream(exec), a.dy, Tensor{}, Tensor{}, a.dbias);
}

void CudaOps::do_repack_weight(Exec& exec, const RepackWeightArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "repack_weight",
                              1.5 * static_cast<double>(a.rows.bytes()));
  do_copy(exec, a.rows, {a.weight->storage.data, a.weight->dtype, a.rows.shape});
}

void CudaOps::do_cross_entropy_stats(Exec& exec, const CrossEntropyStatsArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "cross_entropy_stats",
                              static_cast<double>(a.logits.bytes()));
  stats_kernel<<<static_cast<unsigned>(a.logits.dim(0)), kStatisticsThreads, 0, stream(exec)>>>(
      a.logits.as<float>(), a.logits.dim(1), a.labels.as<std::int32_t>(), a.first,
      a.stats.as<float>());
  TANDEM_LAUNCHED("stats_kernel");
}

void CudaOps::do_cross_entropy(Exec& exec, const CrossEntropyArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "cross_entropy",
                              1.5 * static_cast<double>(a.logits.bytes()));
  const DType cd = a.dlogits.defined() ? a.dlogits.dtype : DType::kF32;
  TANDEM_CUDA_DISPATCH(cd, run_cross_entropy, stream(exec), a);
}

}  // namespace tandem::kernels::cuda
