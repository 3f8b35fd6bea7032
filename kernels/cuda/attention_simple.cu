// Attention for any head dim, window and soft cap, in any dtype: tiles in shared memory as f32,
// one element of a product per thread. A row's bits depend on its own sequence alone: keys are
// taken in tiles from key 0 on, whatever rows share the row's block.
#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/device.cuh"

#include <algorithm>

namespace tandem::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct Shapes {
  int heads, kv_heads, dim;
  int ld;    ///< floats from row to row of a tile: odd, so that a column's rows are in all banks
  int rows;  ///< of a tile, of queries and of keys; at most 32
  std::int64_t width;  ///< of qkv
  float scale, soft_cap;
  int window;

  __device__ std::int64_t q_at(std::int64_t row, int head) const {
    return row * width + static_cast<std::int64_t>(head) * dim;
  }
  __device__ std::int64_t k_at(std::int64_t row, int kv_head) const {
    return row * width + static_cast<std::int64_t>(heads + kv_head) * dim;
  }
  __device__ std::int64_t v_at(std::int64_t row, int kv_head) const {
    return row * width + static_cast<std::int64_t>(heads + kv_heads + kv_head) * dim;
  }
  __device__ std::int64_t out_at(std::int64_t row, int head) const {
    return (row * heads + head) * dim;
  }
  __device__ bool sees(int query, int key) const {
    return key <= query && (window == 0 || query - key < window);
  }
};

/// A [rows, dim] tile of x as f32: row r starts at `at` + r * stride; rows from `count` on are 0.
template <class T>
__device__ void load_tile(const Shapes& a, const T* x, std::int64_t at, std::int64_t stride,
                          int count, float* tile) {
  for (int i = static_cast<int>(threadIdx.x); i < a.rows * a.dim; i += kThreads) {
    const int r = i / a.dim, d = i % a.dim;
    tile[r * a.ld + d] = r < count ? load_f32(x[at + r * stride + d]) : 0.0f;
  }
}
template <class T>
__device__ void store_tile(const Shapes& a, const float* tile, int count, float factor, T* x,
                           std::int64_t at, std::int64_t stride) {
  for (int i = static_cast<int>(threadIdx.x); i < count * a.dim; i += kThreads) {
    const int r = i / a.dim, d = i % a.dim;
    x[at + r * stride + d] = store_as<T>(tile[r * a.ld + d] * factor);
  }
}
__device__ inline float dot(const float* x, const float* y, int count) {
  float sum = 0.0f;
  for (int d = 0; d < count; ++d) sum = fmaf(x[d], y[d], sum);
  return sum;
}
__device__ inline float capped(const Shapes& a, float score) {
  score *= a.scale;
  return a.soft_cap > 0.0f ? a.soft_cap * tanhf(score / a.soft_cap) : score;
}
/// x[r][d] += sum over j of w(r, j) y[j][d].
template <class F>
__device__ void accumulate(const Shapes& a, float* x, const float* y, const F& w) {
  for (int i = static_cast<int>(threadIdx.x); i < a.rows * a.dim; i += kThreads) {
    const int r = i / a.dim, d = i % a.dim;
    float sum = x[r * a.ld + d];
    for (int j = 0; j < a.rows; ++j) sum = fmaf(w(r, j), y[j * a.ld + d], sum);
    x[r * a.ld + d] = sum;
  }
}
__device__ inline void zero_tile(const Shapes& a, float* tile) {
  for (int i = static_cast<int>(threadIdx.x); i < a.rows * a.ld; i += kThreads) tile[i] = 0.0f;
}
/// The first tile of keys that the tile's first query sees, and one past the last.
__device__ inline int first_key(const Shapes& a, const RowTile& q) {
  return a.window == 0 ? 0 : max(0, q.begin - a.window + 1) / a.rows * a.rows;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    simple_forward_kernel(const T* qkv, const std::int32_t* offsets, int sequences, Shapes a,
                          T* out, float* lse) {
  const RowTile tile = find_tile(offsets, sequences, a.rows, static_cast<int>(blockIdx.x));
  if (tile.rows == 0) return;
  const int head = static_cast<int>(blockIdx.y), kv_head = head / (a.heads / a.kv_heads);
  extern __shared__ float shared[];
  float *q = shared, *k = q + a.rows * a.ld, *v = k + a.rows * a.ld, *o = v + a.rows * a.ld;
  float* p = o + a.rows * a.ld;  // [rows, rows + 1]
  __shared__ float top[32], sum[32], shrink[32];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const std::int64_t row0 = tile.sequence + tile.begin;
  load_tile(a, qkv, a.q_at(row0, head), a.width, tile.rows, q);
  zero_tile(a, o);
  if (threadIdx.x < 32) {
    top[threadIdx.x] = -INFINITY;
    sum[threadIdx.x] = 0.0f;
  }
  for (int key0 = first_key(a, tile); key0 < tile.begin + tile.rows; key0 += a.rows) {
    const int keys = min(a.rows, tile.length - key0);
    __syncthreads();
    load_tile(a, qkv, a.k_at(tile.sequence + key0, kv_head), a.width, keys, k);
    load_tile(a, qkv, a.v_at(tile.sequence + key0, kv_head), a.width, keys, v);
    __syncthreads();
    for (int r = warp; r < tile.rows; r += kWarps) {
      const bool seen = lane < keys && a.sees(tile.begin + r, key0 + lane);
      const float s = seen ? capped(a, dot(q + r * a.ld, k + lane * a.ld, a.dim)) : -INFINITY;
      const float most = fmaxf(top[r], warp_max(s));
      const float e = seen ? expf(s - most) : 0.0f;
      const float added = warp_sum(e);
      if (lane < a.rows) p[r * (a.rows + 1) + lane] = e;
      __syncwarp();
      if (lane == 0) {
        const float c = most == -INFINITY ? 1.0f : expf(top[r] - most);
        shrink[r] = c;
        sum[r] = sum[r] * c + added;
        top[r] = most;
      }
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < tile.rows * a.dim; i += kThreads) {
      const int r = i / a.dim, d = i % a.dim;
      float x = o[r * a.ld + d] * shrink[r];
      for (int j = 0; j < a.rows; ++j) x = fmaf(p[r * (a.rows + 1) + j], v[j * a.ld + d], x);
      o[r * a.ld + d] = x;
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < tile.rows * a.dim; i += kThreads) {
    const int r = i / a.dim, d = i % a.dim;
    out[a.out_at(row0 + r, head) + d] = store_as<T>(o[r * a.ld + d] / sum[r]);
  }
  if (lse != nullptr && static_cast<int>(threadIdx.x) < tile.rows)
    lse[(row0 + threadIdx.x) * a.heads + head] = top[threadIdx.x] + logf(sum[threadIdx.x]);
}

/// Probabilities p and their gradients ds (both [query, key]) of one pair of tiles; ds is that of
/// the raw product q k^T, without the last factor `scale`.
__device__ void tile_gradients(const Shapes& a, int query0, int queries, int key0, int keys,
                               const float* q, const float* k, const float* v, const float* dout,
                               const float* lse, const float* delta, float* p, float* ds) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  for (int r = warp; r < a.rows; r += kWarps) {
    const bool seen = r < queries && lane < keys && a.sees(query0 + r, key0 + lane);
    float probability = 0.0f, gradient = 0.0f;
    if (seen) {
      const float s = capped(a, dot(q + r * a.ld, k + lane * a.ld, a.dim));
      probability = expf(s - lse[r]);
      gradient = probability * (dot(dout + r * a.ld, v + lane * a.ld, a.dim) - delta[r]);
      if (a.soft_cap > 0.0f) gradient *= 1.0f - (s / a.soft_cap) * (s / a.soft_cap);
    }
    if (lane < a.rows) {
      p[r * (a.rows + 1) + lane] = probability;
      ds[r * (a.rows + 1) + lane] = gradient;
    }
  }
}

template <class T>
struct BackwardInputs {
  const T *dout, *qkv;
  const float *lse, *delta;  ///< [T, H]
  const std::int32_t* offsets;
  int sequences;
};

__device__ inline void load_statistics(const Shapes& a, const float* lse, const float* delta,
                                       std::int64_t row0, int head, int count, float* lse_to,
                                       float* delta_to) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= count) return;
  lse_to[r] = lse[(row0 + r) * a.heads + head];
  delta_to[r] = delta[(row0 + r) * a.heads + head];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    simple_dq_kernel(BackwardInputs<T> in, Shapes a, T* dqkv) {
  const RowTile tile = find_tile(in.offsets, in.sequences, a.rows, static_cast<int>(blockIdx.x));
  if (tile.rows == 0) return;
  const int head = static_cast<int>(blockIdx.y), kv_head = head / (a.heads / a.kv_heads);
  extern __shared__ float shared[];
  const int size = a.rows * a.ld;
  float *q = shared, *dout = q + size, *k = dout + size, *v = k + size, *dq = v + size;
  float *p = dq + size, *ds = p + a.rows * (a.rows + 1);
  __shared__ float lse[32], delta[32];
  const std::int64_t row0 = tile.sequence + tile.begin;
  load_tile(a, in.qkv, a.q_at(row0, head), a.width, tile.rows, q);
  load_tile(a, in.dout, a.out_at(row0, head), std::int64_t{a.heads} * a.dim, tile.rows, dout);
  load_statistics(a, in.lse, in.delta, row0, head, tile.rows, lse, delta);
  zero_tile(a, dq);
  for (int key0 = first_key(a, tile); key0 < tile.begin + tile.rows; key0 += a.rows) {
    const int keys = min(a.rows, tile.length - key0);
    __syncthreads();
    load_tile(a, in.qkv, a.k_at(tile.sequence + key0, kv_head), a.width, keys, k);
    load_tile(a, in.qkv, a.v_at(tile.sequence + key0, kv_head), a.width, keys, v);
    __syncthreads();
    tile_gradients(a, tile.begin, tile.rows, key0, keys, q, k, v, dout, lse, delta, p, ds);
    __syncthreads();
    accumulate(a, dq, k, [&](int r, int j) { return ds[r * (a.rows + 1) + j]; });
  }
  __syncthreads();
  store_tile(a, dq, tile.rows, a.scale, dqkv, a.q_at(row0, head), a.width);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    simple_dkv_kernel(BackwardInputs<T> in, Shapes a, T* dqkv) {
  const RowTile tile = find_tile(in.offsets, in.sequences, a.rows, static_cast<int>(blockIdx.x));
  if (tile.rows == 0) return;
  const int kv_head = static_cast<int>(blockIdx.y), group = a.heads / a.kv_heads;
  extern __shared__ float shared[];
  const int size = a.rows * a.ld;
  float *q = shared, *dout = q + size, *k = dout + size, *v = k + size, *dk = v + size,
        *dv = dk + size;
  float *p = dv + size, *ds = p + a.rows * (a.rows + 1);
  __shared__ float lse[32], delta[32];
  const std::int64_t row0 = tile.sequence + tile.begin;
  load_tile(a, in.qkv, a.k_at(row0, kv_head), a.width, tile.rows, k);
  load_tile(a, in.qkv, a.v_at(row0, kv_head), a.width, tile.rows, v);
  zero_tile(a, dk);
  zero_tile(a, dv);
  const int last =
      a.window == 0 ? tile.length : min(tile.length, tile.begin + tile.rows - 1 + a.window);
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (int query0 = tile.begin; query0 < last; query0 += a.rows) {
      const int queries = min(a.rows, tile.length - query0);
      const std::int64_t at = tile.sequence + query0;
      __syncthreads();
      load_tile(a, in.qkv, a.q_at(at, head), a.width, queries, q);
      load_tile(a, in.dout, a.out_at(at, head), std::int64_t{a.heads} * a.dim, queries, dout);
      load_statistics(a, in.lse, in.delta, at, head, queries, lse, delta);
      __syncthreads();
      tile_gradients(a, query0, queries, tile.begin, tile.rows, q, k, v, dout, lse, delta, p, ds);
      __syncthreads();
      accumulate(a, dv, dout, [&](int r, int j) { return p[j * (a.rows + 1) + r]; });
      accumulate(a, dk, q, [&](int r, int j) { return ds[j * (a.rows + 1) + r]; });
    }
  __syncthreads();
  store_tile(a, dk, tile.rows, a.scale, dqkv, a.k_at(row0, kv_head), a.width);
  store_tile(a, dv, tile.rows, 1.0f, dqkv, a.v_at(row0, kv_head), a.width);
}

template <class T>
__global__ void delta_kernel(const T* dout, const T* out, std::int64_t rows, int dim,
                             float* delta) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t row = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (row >= rows) return;
  float sum = 0.0f;
  for (int d = lane; d < dim; d += 32)
    sum = fmaf(load_f32(dout[row * dim + d]), load_f32(out[row * dim + d]), sum);
  sum = warp_sum(sum);
  if (lane == 0) delta[row] = sum;
}

__global__ void zero_inert_rows_kernel(const std::int32_t* last, std::int64_t rows,
                                       std::int64_t row_bytes, char* x) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i =
           *last * row_bytes / 4 + static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < rows * row_bytes / 4; i += stride)
    reinterpret_cast<std::uint32_t*>(x)[i] = 0;
}

/// Tiles of [rows, dim] and of [rows, rows] that a kernel keeps in shared memory.
std::int64_t shared_bytes(const Shapes& a, int wide, int square) {
  return 4 * (wide * std::int64_t{a.rows} * a.ld + square * std::int64_t{a.rows} * (a.rows + 1));
}

Shapes make_shapes(const AttentionSpec& spec, int wide, int square) {
  int device = 0, limit = 0;
  TANDEM_CUDA(cudaGetDevice(&device));
  TANDEM_CUDA(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  Shapes a{};
  a.heads = static_cast<int>(spec.heads);
  a.kv_heads = static_cast<int>(spec.kv_heads);
  a.dim = static_cast<int>(spec.head_dim);
  a.ld = a.dim | 1;
  a.width = (spec.heads + 2 * spec.kv_heads) * spec.head_dim;
  a.scale = spec.scale;
  a.soft_cap = spec.soft_cap;
  a.window = static_cast<int>(std::min<std::int64_t>(spec.window, 1 << 30));
  for (a.rows = 32; a.rows > 1 && shared_bytes(a, wide, square) + 1024 > limit;) a.rows /= 2;
  return a;
}

template <class Kernel, class... Args>
void launch(Kernel* kernel, dim3 grid, std::int64_t bytes, cudaStream_t stream, Args... args) {
  TANDEM_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(bytes)));
  kernel<<<grid, kThreads, static_cast<std::size_t>(bytes), stream>>>(args...);
  TANDEM_LAUNCHED("simple attention");
}

dim3 tile_grid(const Shapes& a, std::int64_t tokens, std::int64_t sequences, int heads) {
  return {static_cast<unsigned>(tokens / a.rows + sequences), static_cast<unsigned>(heads)};
}

template <class T>
void forward(cudaStream_t stream, const AttentionArgs& x) {
  const Shapes a = make_shapes(x.spec, 4, 1);
  const std::int64_t sequences = x.seq_offsets.dim(0) - 1;
  launch(simple_forward_kernel<T>, tile_grid(a, x.qkv.dim(0), sequences, a.heads),
         shared_bytes(a, 4, 1), stream, static_cast<const T*>(x.qkv.data),
         static_cast<const std::int32_t*>(x.seq_offsets.data), static_cast<int>(sequences), a,
         static_cast<T*>(x.out.data), static_cast<float*>(x.lse.data));
}

template <class T>
void backward(cudaStream_t stream, const AttentionBackwardArgs& x, const float* delta) {
  const std::int64_t sequences = x.seq_offsets.dim(0) - 1, tokens = x.qkv.dim(0);
  const BackwardInputs<T> in{static_cast<const T*>(x.dout.data),
                             static_cast<const T*>(x.qkv.data),
                             static_cast<const float*>(x.lse.data),
                             delta,
                             static_cast<const std::int32_t*>(x.seq_offsets.data),
                             static_cast<int>(sequences)};
  const Shapes a = make_shapes(x.spec, 6, 2);
  auto* dqkv = static_cast<T*>(x.dqkv.data);
  launch(simple_dq_kernel<T>, tile_grid(a, tokens, sequences, a.heads), shared_bytes(a, 5, 2),
         stream, in, a, dqkv);
  launch(simple_dkv_kernel<T>, tile_grid(a, tokens, sequences, a.kv_heads), shared_bytes(a, 6, 2),
         stream, in, a, dqkv);
}

template <class T>
void delta_of(cudaStream_t stream, const AttentionBackwardArgs& x, float* delta) {
  const std::int64_t rows = x.qkv.dim(0) * x.spec.heads;
  delta_kernel<<<static_cast<unsigned>((rows + kWarps - 1) / kWarps), kThreads, 0, stream>>>(
      static_cast<const T*>(x.dout.data), static_cast<const T*>(x.out.data), rows,
      static_cast<int>(x.spec.head_dim), delta);
  TANDEM_LAUNCHED("delta_kernel");
}

}  // namespace

void attention_delta(cudaStream_t stream, const AttentionBackwardArgs& args, float* delta) {
  TANDEM_CUDA_DISPATCH(args.dout.dtype, delta_of, stream, args, delta);
}

void zero_inert_rows(cudaStream_t stream, const Tensor& seq_offsets, const Tensor& x) {
  const std::int64_t row_bytes = x.dim(1) * dtype_bytes(x.dtype);
  TANDEM_CHECK(row_bytes % 4 == 0, "rows of ", row_bytes, " bytes");
  const auto* last = static_cast<const std::int32_t*>(seq_offsets.data) + (seq_offsets.dim(0) - 1);
  zero_inert_rows_kernel<<<64, 256, 0, stream>>>(last, x.dim(0), row_bytes,
                                                 static_cast<char*>(x.data));
  TANDEM_LAUNCHED("zero_inert_rows_kernel");
}

void simple_attention_forward(cudaStream_t stream, const AttentionArgs& x) {
  zero_inert_rows(stream, x.seq_offsets, x.out);
  if (x.lse.defined()) zero_inert_rows(stream, x.seq_offsets, x.lse);
  if (x.seq_offsets.dim(0) < 2) return;
  TANDEM_CUDA_DISPATCH(x.qkv.dtype, forward, stream, x);
}

void simple_attention_backward(cudaStream_t stream, const AttentionBackwardArgs& x, float* delta) {
  zero_inert_rows(stream, x.seq_offsets, x.dqkv);
  if (x.seq_offsets.dim(0) < 2) return;
  attention_delta(stream, x, delta);
  TANDEM_CUDA_DISPATCH(x.qkv.dtype, backward, stream, x, delta);
}

}  // namespace tandem::kernels::cuda
