// Attention of new rows against the paged cache: which kernel runs, and the simple one.
#include "kernels/cuda/attention.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/paged_attention.cuh"

namespace tandem::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kKeys = 32;
/// Sequences with more new rows than this share tiles of keys among their rows.
constexpr int kDecodeRowsMax = 4;

/// One block a row and head. Keys in tiles of 32 from key 0 on (fewer where 32 rows of a head do
/// not fit the packed kernel's memory); sums in the order of attention_simple.cu.
template <class T>
__global__ void __launch_bounds__(kThreads) simple_kernel(const PagedView v, int keys_per_tile) {
  extern __shared__ float shared[];
  float *q = shared, *o = q + v.dim;
  __shared__ float p[kKeys];
  __shared__ float shrink;
  const int head = static_cast<int>(blockIdx.y), kv_head = head / v.group;
  if (head % v.group == 0)
    zero_inert_rows<T>(v, kv_head, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
  const QueryTile tile = find_query_tile(v, 1, static_cast<int>(blockIdx.x));
  if (tile.rows == 0) return;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const std::int32_t* table = v.tables + static_cast<std::int64_t>(tile.sequence) * v.blocks_max;
  const T *k = static_cast<const T*>(v.k), *values = static_cast<const T*>(v.v);
  for (int d = static_cast<int>(threadIdx.x); d < v.dim; d += kThreads) {
    q[d] = load_f32(static_cast<const T*>(v.q)[v.q_at(tile.row, head) + d]);
    o[d] = 0.0f;
  }
  float top = -INFINITY, sum = 0.0f;  // of warp 0
  const int begin = max(0, tile.position - v.window + 1) / keys_per_tile * keys_per_tile;
  for (int key0 = begin; key0 <= tile.position; key0 += keys_per_tile) {
    __syncthreads();
    if (warp == 0) {
      const int key = key0 + lane;
      const bool seen =
          lane < keys_per_tile && key <= tile.position && tile.position - key < v.window;
      float s = -INFINITY;
      if (seen) {
        const T* row = k + v.key_at(table, key, kv_head);
        float dot = 0.0f;
        for (int d = 0; d < v.dim; ++d) dot = fmaf(q[d], load_f32(row[d]), dot);
        dot *= v.scale;
        s = v.soft_cap > 0.0f ? v.soft_cap * tanhf(dot / v.soft_cap) : dot;
      }
      const float most = fmaxf(top, warp_max(s));
      const float e = seen ? expf(s - most) : 0.0f;
      const float added = warp_sum(e);
      const float c = most == -INFINITY ? 1.0f : expf(top - most);
      p[lane] = e;
      if (lane == 0) shrink = c;
      sum = sum * c + added;
      top = most;
    }
    __syncthreads();
    const int keys = min(keys_per_tile, tile.position + 1 - key0);
    for (int d = static_cast<int>(threadIdx.x); d < v.dim; d += kThreads) {
      float x = o[d] * shrink;
      for (int j = 0; j < keys; ++j)
        x = fmaf(p[j], load_f32(values[v.key_at(table, key0 + j, kv_head) + d]), x);
      o[d] = x;
    }
  }
  __syncthreads();  // all are done with p
  if (warp == 0 && lane == 0) p[0] = sum;
  __syncthreads();
  T* out = static_cast<T*>(v.out) + v.out_at(tile.row, head);
  for (int d = static_cast<int>(threadIdx.x); d < v.dim; d += kThreads)
    out[d] = store_as<T>(o[d] / p[0]);
}

/// As the packed kernel chooses it: four tiles of keys and one of scores in its shared memory.
int simple_keys_per_tile(int dim) {
  int device = 0, limit = 0, keys = kKeys;
  TANDEM_CUDA(cudaGetDevice(&device));
  TANDEM_CUDA(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  while (keys > 1 && 4 * (4 * keys * (dim | 1) + keys * (keys + 1)) + 1024 > limit) keys /= 2;
  return keys;
}

template <class T>
void launch_simple(cudaStream_t stream, const PagedView& v) {
  const dim3 grid(static_cast<unsigned>(v.t), static_cast<unsigned>(v.heads));
  const int bytes = 2 * v.dim * 4;
  TANDEM_CUDA(
      cudaFuncSetAttribute(simple_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  simple_kernel<T>
      <<<grid, kThreads, static_cast<std::size_t>(bytes), stream>>>(v, simple_keys_per_tile(v.dim));
  TANDEM_LAUNCHED("paged simple_kernel");
}

bool is_fast(const PagedView& v, DType dtype) {
  return is_16_bit(dtype) && (v.dim == 64 || v.dim == 128) && v.block_size % 16 == 0 &&
         v.group <= 128;
}

}  // namespace

void paged_simple(cudaStream_t stream, const PagedView& v, DType dtype) {
  TANDEM_CUDA_DISPATCH(dtype, launch_simple, stream, v);
}

void CudaOps::do_paged_attention_forward(Exec& exec, const PagedAttentionArgs& a) {
  const cudaStream_t s = stream(exec);
  const Profiler::Scope scope(profiler_, s, "paged_attention",
                              static_cast<double>(a.qkv.bytes() + a.out.bytes()));
  const PagedAttentionLayout layout = paged_attention_layout(a, profile_);
  const Scratch scratch(exec, layout.bytes);
  PagedView v = paged_view(a);
  const DType dtype = a.qkv.dtype;
  if (!is_fast(v, dtype)) return paged_simple(s, v, dtype);
  if (exec.numerics == Numerics::kInvariant) {
    // One kernel for all rows, or two that give a row the same bits: they do not depend on what
    // else a chunk holds.
    if (!layout.trains) return paged_tiles(s, v, dtype);
    if (layout.fast) {
      v.rows_max = paged_ordered_rows(v);
      own_paged_forward({s, multiprocessors(exec)}, exec.numerics, a, layout, scratch.at<char>(0),
                        v.rows_max + 1);
    }
    return paged_ordered(s, v, dtype, paged_ordered_splits(v, a.kv_len_max, profile_));
  }
  const int splits = paged_decode_splits(v, a.kv_len_max, profile_);
  if (v.t <= v.sequences) return paged_decode(s, v, dtype, splits);
  if (layout.fast) {
    own_paged_forward({s, multiprocessors(exec)}, exec.numerics, a, layout, scratch.at<char>(0),
                      kDecodeRowsMax + 1);
  } else {
    v.rows_min = kDecodeRowsMax + 1;
    paged_tiles(s, v, dtype);
  }
  v.rows_min = 1;
  v.rows_max = kDecodeRowsMax;
  paged_decode(s, v, dtype, splits);
}

}  // namespace tandem::kernels::cuda
