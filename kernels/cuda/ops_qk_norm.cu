// The norm of every head of q and k with the rotation behind it, and both backward. A head is a
// group of lanes of one warp: each has the same pairs (d, d + D/2) in the norm and in the rotation,
// so a head is read once and written once.
#include "kernels/cuda/chunk.cuh"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/rotation.cuh"
#include "kernels/cuda_workspace.h"

#include <algorithm>

namespace tandem::kernels::cuda {
namespace {

constexpr int kBackwardThreads = 128;

/// How a head lies over lanes: chunk j of lane l is chunk l + j * lanes of half a head.
template <bool kVector>
inline constexpr int kChunks = kVector ? 1 : static_cast<int>(kQkNormDimMax) / 2 / 32;
int lanes_of(int chunks) {
  int lanes = 1;
  while (lanes < chunks && lanes < 32) lanes *= 2;
  return lanes;
}

/// Calls f(chunk, its first element) for a lane's chunks of the first `end` elements.
template <class C, int kCount, class F>
__device__ inline void for_chunks_of(int lane, int lanes, int end, const F& f) {
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    if (const int d = (lane + j * lanes) * C::kSize; d < end) f(j, d);
}

/// The sum over a group of `lanes`, a power of two; each lane gets it.
__device__ inline float group_sum(float x, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

/// By all threads of a block, before what positions come from may have ended (ops_rows.cu).
__device__ inline void fill_angles(const RopeView& view, std::int64_t row, float sign,
                                   float2* angles) {
  const float position = static_cast<float>(view.positions[row]);
  for (int d = static_cast<int>(threadIdx.x); d < view.dim / 2; d += static_cast<int>(blockDim.x)) {
    angles[d] = rope_angle(position, view.inv_freq[d], view.factor);
    angles[d].y *= sign;
  }
  __syncthreads();
}

/// A value as storing it and reading it back leaves it.
template <class T>
__device__ inline float as_stored(float x) {
  return load_f32(store_as<T>(x));
}

/// One block a row; raw may be qkv.
template <class T, bool kVector>
__global__ void qk_norm_rope_kernel(const T* raw, T* qkv, const T* weights, float eps, int lanes,
                                    const RopeView view) {
  using C = Chunk<T, kVector>;
  constexpr int kCount = kChunks<kVector>;
  extern __shared__ float2 angles[];  // [half]
  launch_dependents();
  const std::int64_t row = blockIdx.x;
  const int normed = view.heads + view.kv_heads, dim = view.dim, half = dim / 2;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const std::int64_t begin = row * (normed + view.kv_heads) * dim;
  fill_angles(view, row, 1.0f, angles);
  const CachedRow cached = cached_row(view, static_cast<int>(row));
  wait_for_inputs();
  for (int base = 0; base < normed; base += threads / lanes) {
    const int h = base + thread / lanes;
    const auto for_chunks = [&](const auto& f) {
      for_chunks_of<C, kCount>(thread % lanes, lanes, h < normed ? half : 0, f);
    };
    C x[kCount], y[kCount];
    float sum = 0.0f;
    for_chunks([&](int j, int d) {
      x[j] = C::load(raw + begin + h * dim + d);
      y[j] = C::load(raw + begin + h * dim + d + half);
#pragma unroll
      for (int i = 0; i < C::kSize; ++i) {
        const float u = load_f32(x[j].at[i]), v = load_f32(y[j].at[i]);
        sum = fmaf(u, u, fmaf(v, v, sum));
      }
    });
    const float r = rsqrtf(group_sum(sum, lanes) / static_cast<float>(dim) + eps);
    const T* weight = weights + (h < view.heads ? 0 : dim);
    for_chunks([&](int j, int d) {
      const C low_w = C::load(weight + d), high_w = C::load(weight + d + half);
      C low, high;
#pragma unroll
      for (int i = 0; i < C::kSize; ++i) {
        const float u = as_stored<T>(load_f32(x[j].at[i]) * r * load_f32(low_w.at[i]));
        const float v = as_stored<T>(load_f32(y[j].at[i]) * r * load_f32(high_w.at[i]));
        low.at[i] = store_as<T>(rotated_low(u, v, angles[d + i]));
        high.at[i] = store_as<T>(rotated_high(u, v, angles[d + i]));
      }
      low.store(qkv + begin + h * dim + d);
      high.store(qkv + begin + h * dim + d + half);
      if (T* k = rope_cached<T>(view, cached, h, d); k != nullptr) {
        low.store(k);
        high.store(k + half);
      }
    });
  }
  const std::int64_t values = begin + normed * dim;
  for (int p = thread * C::kSize; p < view.kv_heads * dim; p += threads * C::kSize) {
    T* v = rope_cached<T>(view, cached, normed + p / dim, p % dim);
    if (v == nullptr && raw == qkv) continue;
    const C value = C::load(raw + values + p);
    if (raw != qkv) value.store(qkv + values + p);
    if (v != nullptr) value.store(v);
  }
}

/// With dy the gradient of a normed head, r its rstd: dx = r (w dy) - x r^3 / D sum(w dy x). Each
/// block goes over every gridDim.x-th row; `parts` (unless null): the sums of its dy * (x * r), of
/// q and of k, in its row.
template <class T, bool kVector>
__global__ void __launch_bounds__(kBackwardThreads)
    qk_norm_rope_backward_kernel(const T* raw, T* dqkv, const T* weights, float eps, int lanes,
                                 std::int64_t rows, const RopeView view, float* parts) {
  using C = Chunk<T, kVector>;
  constexpr int kCount = kChunks<kVector>;
  extern __shared__ float2 angles[];  // [half], then f32 [warps, 2 * dim]
  launch_dependents();
  wait_for_inputs();
  const int normed = view.heads + view.kv_heads, dim = view.dim, half = dim / 2;
  const int thread = static_cast<int>(threadIdx.x);
  float q_sums[kCount][2][C::kSize] = {}, k_sums[kCount][2][C::kSize] = {};
  for (std::int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const std::int64_t begin = row * (normed + view.kv_heads) * dim;
    __syncthreads();  // angles may still be read
    fill_angles(view, row, -1.0f, angles);
    for (int base = 0; base < normed; base += kBackwardThreads / lanes) {
      const int h = base + thread / lanes;
      const auto for_chunks = [&](const auto& f) {
        for_chunks_of<C, kCount>(thread % lanes, lanes, h < normed ? half : 0, f);
      };
      const T* weight = weights + (h < view.heads ? 0 : dim);
      C x[kCount], y[kCount], g[kCount], e[kCount];  // halves of the head, and of its gradient
      float squares = 0.0f, dot = 0.0f;
      for_chunks([&](int j, int d) {
        const std::int64_t at = begin + h * dim + d;
        x[j] = C::load(raw + at), y[j] = C::load(raw + at + half);
        const C low = C::load(dqkv + at), high = C::load(dqkv + at + half);
        const C low_w = C::load(weight + d), high_w = C::load(weight + d + half);
#pragma unroll
        for (int i = 0; i < C::kSize; ++i) {
          const float u = load_f32(low.at[i]), v = load_f32(high.at[i]);
          g[j].at[i] = store_as<T>(rotated_low(u, v, angles[d + i]));
          e[j].at[i] = store_as<T>(rotated_high(u, v, angles[d + i]));
          const float a = load_f32(x[j].at[i]), b = load_f32(y[j].at[i]);
          squares = fmaf(a, a, fmaf(b, b, squares));
          dot = fmaf(load_f32(g[j].at[i]) * load_f32(low_w.at[i]), a, dot);
          dot = fmaf(load_f32(e[j].at[i]) * load_f32(high_w.at[i]), b, dot);
        }
      });
      const float r = rsqrtf(group_sum(squares, lanes) / static_cast<float>(dim) + eps);
      const float k = r * r * r * group_sum(dot, lanes) / static_cast<float>(dim);
      for_chunks([&](int j, int d) {
        const C low_w = C::load(weight + d), high_w = C::load(weight + d + half);
        C low, high;
#pragma unroll
        for (int i = 0; i < C::kSize; ++i) {
          const float a = load_f32(x[j].at[i]), b = load_f32(y[j].at[i]);
          const float ga = load_f32(g[j].at[i]), gb = load_f32(e[j].at[i]);
          low.at[i] = store_as<T>(r * load_f32(low_w.at[i]) * ga - k * a);
          high.at[i] = store_as<T>(r * load_f32(high_w.at[i]) * gb - k * b);
          const bool of_q = h < view.heads;
          q_sums[j][0][i] = fmaf(of_q ? ga : 0.0f, a * r, q_sums[j][0][i]);
          q_sums[j][1][i] = fmaf(of_q ? gb : 0.0f, b * r, q_sums[j][1][i]);
          k_sums[j][0][i] = fmaf(of_q ? 0.0f : ga, a * r, k_sums[j][0][i]);
          k_sums[j][1][i] = fmaf(of_q ? 0.0f : gb, b * r, k_sums[j][1][i]);
        }
        low.store(dqkv + begin + h * dim + d);
        high.store(dqkv + begin + h * dim + d + half);
      });
    }
  }
  if (parts == nullptr) return;
  // Groups of a warp, then warps, in order.
  float* of_warps = reinterpret_cast<float*>(angles + half);
  float* mine = of_warps + thread / 32 * 2 * dim;
#pragma unroll
  for (int j = 0; j < kCount; ++j)
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
      for (int i = 0; i < C::kSize; ++i) {
        float q = q_sums[j][part][i], k = k_sums[j][part][i];
        for (int offset = lanes; offset < 32; offset *= 2) {
          q += __shfl_xor_sync(0xffffffffu, q, offset);
          k += __shfl_xor_sync(0xffffffffu, k, offset);
        }
        const int d = (thread % lanes + j * lanes) * C::kSize + i;
        if (thread % 32 >= lanes || d >= half) continue;
        mine[d + part * half] = q;
        mine[d + part * half + dim] = k;
      }
  __syncthreads();
  for (int c = thread; c < 2 * dim; c += kBackwardThreads) {
    float sum = 0.0f;
    for (int w = 0; w < kBackwardThreads / 32; ++w) sum += of_warps[w * 2 * dim + c];
    parts[static_cast<std::int64_t>(blockIdx.x) * 2 * dim + c] = sum;
  }
}

/// Whether halves of heads are whole 16-byte words, of which each lane has one at most.
template <class T>
bool in_vectors(std::initializer_list<const void*> pointers, int half) {
  return half / Vec<T>::kSize <= 32 && aligned(pointers, half * std::int64_t{sizeof(T)});
}

template <class T>
void forward(cudaStream_t stream, const RopeArgs& a) {
  const RopeView view = rope_view(a);
  const Tensor& raw = a.raw.defined() ? a.raw : a.qkv;
  const int half = view.dim / 2;
  const bool vector = in_vectors<T>({raw.data, a.qkv.data, a.qk_norm.data, view.k, view.v}, half);
  const int lanes = lanes_of(half / (vector ? Vec<T>::kSize : 1));
  const int wanted = (view.heads + view.kv_heads) * lanes;
  const auto kernel = vector ? qk_norm_rope_kernel<T, true> : qk_norm_rope_kernel<T, false>;
  launch_early("qk_norm_rope_kernel", kernel, dim3(static_cast<unsigned>(a.qkv.dim(0))),
               dim3(static_cast<unsigned>(std::clamp((wanted + 31) / 32 * 32, 64, 512))),
               static_cast<std::size_t>(half) * sizeof(float2), stream,
               static_cast<const T*>(raw.data), static_cast<T*>(a.qkv.data),
               static_cast<const T*>(a.qk_norm.data), a.norm_eps, lanes, view);
}

template <class T>
void backward(cudaStream_t stream, const RopeBackwardArgs& a, const RopeView& view,
              const Tensor& parts) {
  const int half = view.dim / 2;
  const bool vector = in_vectors<T>({a.raw.data, a.dqkv.data, a.qk_norm.data}, half);
  const int lanes = lanes_of(half / (vector ? Vec<T>::kSize : 1));
  const std::size_t sums = parts.defined() ? sizeof(float) * kBackwardThreads / 32 * 2 *
                                                 static_cast<std::size_t>(view.dim)
                                           : 0;
  const std::int64_t rows = a.dqkv.dim(0);
  const auto kernel =
      vector ? qk_norm_rope_backward_kernel<T, true> : qk_norm_rope_backward_kernel<T, false>;
  launch_early("qk_norm_rope_backward_kernel", kernel,
               dim3(static_cast<unsigned>(parts.defined() ? parts.dim(0) : rows)),
               dim3(kBackwardThreads), static_cast<std::size_t>(half) * sizeof(float2) + sums,
               stream, static_cast<const T*>(a.raw.data), static_cast<T*>(a.dqkv.data),
               static_cast<const T*>(a.qk_norm.data), a.norm_eps, lanes, rows, view,
               static_cast<float*>(parts.data));
}

}  // namespace

void CudaOps::qk_norm_rope_forward(Exec& exec, const RopeArgs& a) {
  TANDEM_CUDA_DISPATCH(a.qkv.dtype, forward, stream(exec), a);
}

void CudaOps::qk_norm_rope_backward(Exec& exec, const RopeBackwardArgs& a, const RopeArgs& view) {
  const QkNormBackwardLayout layout = qk_norm_backward_layout(a, profile_);
  const Scratch scratch(exec, layout.bytes);
  const Tensor parts = a.dqk_norm.defined() ? scratch.tensor(layout.parts, DType::kF32,
                                                             Shape{layout.blocks, 2 * a.head_dim})
                                            : Tensor{};
  TANDEM_CUDA_DISPATCH(a.dqkv.dtype, backward, stream(exec), a, rope_view(view), parts);
  if (parts.defined()) add_column_sums(exec, parts, a.dqk_norm);
}

}  // namespace tandem::kernels::cuda
