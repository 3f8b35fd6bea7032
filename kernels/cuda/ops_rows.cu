// Everything between two products: row lookup, norms, rotation, silu * up, copies. All are bound by
// memory traffic; each reads its inputs once, in 16-byte accesses where rows allow it.
#include "kernels/cuda/chunk.cuh"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/rotation.cuh"
#include "kernels/cuda/silu.cuh"

#include <algorithm>

namespace tandem::kernels::cuda {
namespace {

constexpr int kThreads = 256;
/// Grids are at most this large in x; kernels over elements stride.
constexpr std::int64_t kBlocksMax = 1 << 16;

int blocks_for(std::int64_t items, std::int64_t per_block) {
  return static_cast<int>(
      std::clamp<std::int64_t>((items + per_block - 1) / per_block, 1, kBlocksMax));
}

// -- lookup
// ---------------------------------------------------------------------------------------

/// out[j] = table[index[j]], rows of `words` words of 16 bytes or of 2.
template <class Word>
__global__ void lookup_kernel(const Word* table, const std::int32_t* index, std::int64_t first,
                              std::int64_t whole, std::int64_t rows, std::int64_t words,
                              Word* out) {
  const std::int64_t row = blockIdx.x;
  const std::int64_t from = index[row] - first;
  // A bug of the caller, as a failed check on the host.
  if (index[row] < 0 || index[row] >= whole) __trap();
  if (from < 0 || from >= rows) {  // another shard's
    for (std::int64_t w = threadIdx.x; w < words; w += blockDim.x) out[row * words + w] = Word{};
    return;
  }
  for (std::int64_t w = threadIdx.x; w < words; w += blockDim.x)
    out[row * words + w] = table[from * words + w];
}

/// Rows [first, first + rows) of a table of `whole`; others give zeros.
void lookup(cudaStream_t stream, const void* table, std::int64_t first, std::int64_t whole,
            std::int64_t rows, std::int64_t row_bytes, const Tensor& index, void* out) {
  const auto count = static_cast<unsigned>(index.dim(0));
  const auto* at = index.as<std::int32_t>();
  if (aligned({table, out}, row_bytes))
    lookup_kernel<<<count, 128, 0, stream>>>(static_cast<const uint4*>(table), at, first, whole,
                                             rows, row_bytes / 16, static_cast<uint4*>(out));
  else
    lookup_kernel<<<count, 128, 0, stream>>>(static_cast<const std::uint16_t*>(table), at, first,
                                             whole, rows, row_bytes / 2,
                                             static_cast<std::uint16_t*>(out));
  TANDEM_LAUNCHED("lookup_kernel");
}

// -- norm
// -----------------------------------------------------------------------------------------

/// Calls f(column, count) for the columns of this thread: 16 bytes at a time with kVector, else
/// one by one.
template <class T, bool kVector, class F>
__device__ inline void for_columns(std::int64_t columns, const F& f) {
  constexpr int kStep = kVector ? Vec<T>::kSize : 1;
  for (std::int64_t c = static_cast<std::int64_t>(threadIdx.x) * kStep; c < columns;
       c += static_cast<std::int64_t>(blockDim.x) * kStep)
    f(c);
}
/// Rows of up to kChunks chunks a thread stay in registers, and the weight is near before the row
/// is there; 0: of any length.
template <class T, bool kVector, int kChunks>
__global__ void __launch_bounds__(kThreads)
    add_rms_norm_kernel(T* residual, const T* delta, const T* weight, std::int64_t columns,
                        float eps, T* y, float* rstd) {
  launch_dependents();
  using C = Chunk<T, kVector>;
  constexpr bool kHolds = kChunks > 0;
  C row_x[kHolds ? kChunks : 1], row_weight[kHolds ? kChunks : 1];
  const std::int64_t row = blockIdx.x, base = row * columns;
  // Of every chunk of this thread: f(chunk, column).
  const auto for_row = [&](const auto& f) {
    if constexpr (kHolds) {
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const std::int64_t c = (static_cast<std::int64_t>(threadIdx.x) + j * kThreads) * C::kSize;
        if (c < columns) f(j, c);
      }
    } else {
      for_columns<T, kVector>(columns, [&](std::int64_t c) { f(0, c); });
    }
  };
  if constexpr (kHolds) for_row([&](int, std::int64_t c) { prefetch(weight + c); });
  wait_for_inputs();
  if constexpr (kHolds)
    for_row([&](int j, std::int64_t c) {
      row_x[j] = C::load(residual + base + c);
      row_weight[j] = C::load(weight + c);
    });
  float sum = 0.0f;
  for_row([&](int j, std::int64_t c) {
    C& x = row_x[j];
    if constexpr (!kHolds) x = C::load(residual + base + c);
    if (delta != nullptr) {
      const C d = C::load(delta + base + c);
#pragma unroll
      for (int i = 0; i < C::kSize; ++i)
        x.at[i] = store_as<T>(load_f32(x.at[i]) + load_f32(d.at[i]));
      x.store(residual + base + c);
    }
#pragma unroll
    for (int i = 0; i < C::kSize; ++i) {
      const float v = load_f32(x.at[i]);
      sum = fmaf(v, v, sum);
    }
  });
  sum = block_sum<kThreads>(sum);
  const float r = rsqrtf(sum / static_cast<float>(columns) + eps);
  if (rstd != nullptr && threadIdx.x == 0) rstd[row] = r;
  for_row([&](int j, std::int64_t c) {
    if constexpr (!kHolds)
      row_x[j] = C::load(residual + base + c), row_weight[j] = C::load(weight + c);
    const C &x = row_x[j], &w = row_weight[j];
    C out;
#pragma unroll
    for (int i = 0; i < C::kSize; ++i)
      out.at[i] = store_as<T>(load_f32(x.at[i]) * r * load_f32(w.at[i]));
    out.store(y + base + c);
  });
}

/// dx = r (w dy) - x r^3 / C sum(w dy x), added to dresidual.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    rms_norm_backward_kernel(const T* dy, const T* residual, const T* weight, const float* rstd,
                             std::int64_t columns, T* dresidual) {
  launch_dependents();
  wait_for_inputs();
  const std::int64_t row = blockIdx.x, base = row * columns;
  using C = Chunk<T, kVector>;
  float dot = 0.0f;
  for_columns<T, kVector>(columns, [&](std::int64_t c) {
    const C g = C::load(dy + base + c), x = C::load(residual + base + c), w = C::load(weight + c);
#pragma unroll
    for (int i = 0; i < C::kSize; ++i)
      dot = fmaf(load_f32(g.at[i]) * load_f32(w.at[i]), load_f32(x.at[i]), dot);
  });
  dot = block_sum<kThreads>(dot);
  const float r = rstd[row], k = r * r * r * dot / static_cast<float>(columns);
  for_columns<T, kVector>(columns, [&](std::int64_t c) {
    const C g = C::load(dy + base + c), x = C::load(residual + base + c), w = C::load(weight + c);
    C out = C::load(dresidual + base + c);
#pragma unroll
    for (int i = 0; i < C::kSize; ++i)
      out.at[i] = store_as<T>(load_f32(out.at[i]) + r * load_f32(w.at[i]) * load_f32(g.at[i]) -
                              k * load_f32(x.at[i]));
    out.store(dresidual + base + c);
  });
}

template <class T>
void add_rms_norm(cudaStream_t stream, const AddRmsNormArgs& a) {
  const std::int64_t columns = a.y.dim(1);
  const bool vector = aligned({a.residual.data, a.delta.data, a.weight.data, a.y.data},
                              columns * static_cast<std::int64_t>(sizeof(T)));
  constexpr std::int64_t kRow = kThreads * Chunk<T, true>::kSize;
  const auto kernel = !vector               ? add_rms_norm_kernel<T, false, 0>
                      : columns <= kRow     ? add_rms_norm_kernel<T, true, 1>
                      : columns <= 2 * kRow ? add_rms_norm_kernel<T, true, 2>
                      : columns <= 4 * kRow ? add_rms_norm_kernel<T, true, 4>
                                            : add_rms_norm_kernel<T, true, 0>;
  launch_early("add_rms_norm_kernel", kernel, dim3(static_cast<unsigned>(a.y.dim(0))),
               dim3(kThreads), 0, stream, static_cast<T*>(a.residual.data),
               static_cast<const T*>(a.delta.data), static_cast<const T*>(a.weight.data), columns,
               a.eps, static_cast<T*>(a.y.data), static_cast<float*>(a.rstd.data));
}

template <class T>
void run_rms_norm_backward(cudaStream_t stream, const RmsNormBackwardArgs& a) {
  const std::int64_t columns = a.dy.dim(1);
  const bool vector = aligned({a.dy.data, a.residual.data, a.weight.data, a.dresidual.data},
                              columns * static_cast<std::int64_t>(sizeof(T)));
  const auto kernel =
      vector ? rms_norm_backward_kernel<T, true> : rms_norm_backward_kernel<T, false>;
  launch_early("rms_norm_backward_kernel", kernel, dim3(static_cast<unsigned>(a.dy.dim(0))),
               dim3(kThreads), 0, stream, static_cast<const T*>(a.dy.data),
               static_cast<const T*>(a.residual.data), static_cast<const T*>(a.weight.data),
               a.rstd.as<const float>(), columns, static_cast<T*>(a.dresidual.data));
}

// -- rotation
// -------------------------------------------------------------------------------------

/// One block a row, each thread a chunk of both halves of a head, or of values on their way to the
/// cache; `sign` -1 turns back. Positions and slots come by an upload, behind which no kernel
/// starts early: the angles of a row, which serve all its heads, are there before its elements.
template <class T, bool kVector>
__global__ void rope_kernel(T* qkv, float sign, const RopeView view) {
  using C = Chunk<T, kVector>;
  extern __shared__ float2 angles[];  // [half]
  launch_dependents();
  const std::int64_t row = blockIdx.x;
  const int heads = view.heads, kv_heads = view.kv_heads, dim = view.dim, half = dim / 2;
  const int per_head = half / C::kSize, pairs = (heads + kv_heads) * per_head;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const float position = static_cast<float>(view.positions[row]);
  for (int d = thread; d < half; d += threads) {
    angles[d] = rope_angle(position, view.inv_freq[d], view.factor);
    angles[d].y *= sign;
  }
  const CachedRow cached = cached_row(view, static_cast<int>(row));
  const int values = cached.offset < 0 ? 0 : kv_heads * dim / C::kSize;
  T* q = qkv + row * (heads + 2 * kv_heads) * dim;
  wait_for_inputs();
  C x{}, y{};
  const auto load = [&](int p) {
    const T* at =
        q + (p < pairs ? p / per_head * dim + p % per_head * C::kSize : (pairs + p) * C::kSize);
    x = C::load(at);
    if (p < pairs) y = C::load(at + half);
  };
  if (thread < pairs + values) load(thread);
  __syncthreads();
  for (int p = thread; p < pairs + values; p += threads) {
    if (p != thread) load(p);
    if (p >= pairs) {
      const int at = (p - pairs) * C::kSize;
      x.store(rope_cached<T>(view, cached, heads + kv_heads + at / dim, at % dim));
      continue;
    }
    const int h = p / per_head, d = p % per_head * C::kSize;
    C low, high;
#pragma unroll
    for (int i = 0; i < C::kSize; ++i) {
      const float u = load_f32(x.at[i]), v = load_f32(y.at[i]);
      low.at[i] = store_as<T>(rotated_low(u, v, angles[d + i]));
      high.at[i] = store_as<T>(rotated_high(u, v, angles[d + i]));
    }
    low.store(q + h * dim + d);
    high.store(q + h * dim + d + half);
    if (T* k = rope_cached<T>(view, cached, h, d); k != nullptr) {
      low.store(k);
      high.store(k + half);
    }
  }
}

template <class T>
void rope(cudaStream_t stream, const Tensor& qkv, float sign, const RopeView& view) {
  const int half = view.dim / 2;
  const bool vector = aligned({qkv.data, view.k, view.v}, half * std::int64_t{sizeof(T)});
  const int heads =
      view.heads + view.kv_heads * (view.k == nullptr ? 1 : 3);  // values: both halves
  const int chunks = heads * half / (vector ? Vec<T>::kSize : 1);
  const int threads = std::clamp((chunks + 31) / 32 * 32, 64, 512);
  const auto kernel = vector ? rope_kernel<T, true> : rope_kernel<T, false>;
  launch_early("rope_kernel", kernel, dim3(static_cast<unsigned>(qkv.dim(0))),
               dim3(static_cast<unsigned>(threads)),
               static_cast<std::size_t>(half) * sizeof(float2), stream, static_cast<T*>(qkv.data),
               sign, view);
}

// -- silu
// -----------------------------------------------------------------------------------------

template <class T, bool kVector>
__global__ void silu_mul_kernel(const T* gate_up, std::int64_t rows, std::int64_t width, T* out) {
  launch_dependents();
  wait_for_inputs();
  using C = Chunk<T, kVector>;
  const std::int64_t per_row = width / C::kSize;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < rows * per_row; i += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    const std::int64_t row = i / per_row, c = i % per_row * C::kSize;
    const C gate = C::load(gate_up + row * 2 * width + c);
    const C up = C::load(gate_up + (row * 2 + 1) * width + c);
    C y;
#pragma unroll
    for (int j = 0; j < C::kSize; ++j)
      y.at[j] = store_as<T>(silu_mul(load_f32(gate.at[j]), load_f32(up.at[j])));
    y.store(out + row * width + c);
  }
}

template <class T, bool kVector>
__global__ void silu_mul_backward_kernel(const T* dout, const T* gate_up, std::int64_t rows,
                                         std::int64_t width, T* dgate_up) {
  launch_dependents();
  wait_for_inputs();
  using C = Chunk<T, kVector>;
  const std::int64_t per_row = width / C::kSize;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < rows * per_row; i += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    const std::int64_t row = i / per_row, c = i % per_row * C::kSize;
    const std::int64_t at = row * 2 * width + c;
    const C d = C::load(dout + row * width + c);
    const C gate = C::load(gate_up + at), up = C::load(gate_up + at + width);
    C dgate, dup;
#pragma unroll
    for (int j = 0; j < C::kSize; ++j) {
      const SiluMulGrad grad =
          silu_mul_grad(load_f32(d.at[j]), load_f32(gate.at[j]), load_f32(up.at[j]));
      dgate.at[j] = store_as<T>(grad.gate);
      dup.at[j] = store_as<T>(grad.up);
    }
    dgate.store(dgate_up + at);
    dup.store(dgate_up + at + width);
  }
}

template <class T>
void run_silu_mul(cudaStream_t stream, const SiluMulArgs& a) {
  const std::int64_t rows = a.out.dim(0), width = a.out.dim(1);
  const bool vector =
      aligned({a.gate_up.data, a.out.data}, width * static_cast<std::int64_t>(sizeof(T)));
  const auto kernel = vector ? silu_mul_kernel<T, true> : silu_mul_kernel<T, false>;
  launch_early("silu_mul_kernel", kernel,
               dim3(static_cast<unsigned>(
                   blocks_for(rows * width / (vector ? Vec<T>::kSize : 1), kThreads))),
               dim3(kThreads), 0, stream, static_cast<const T*>(a.gate_up.data), rows, width,
               static_cast<T*>(a.out.data));
}

template <class T>
void run_silu_mul_backward(cudaStream_t stream, const SiluMulBackwardArgs& a) {
  const std::int64_t rows = a.dout.dim(0), width = a.dout.dim(1);
  const bool vector = aligned({a.dout.data, a.gate_up.data, a.dgate_up.data},
                              width * static_cast<std::int64_t>(sizeof(T)));
  const auto kernel =
      vector ? silu_mul_backward_kernel<T, true> : silu_mul_backward_kernel<T, false>;
  launch_early(
      "silu_mul_backward_kernel", kernel,
      dim3(
          static_cast<unsigned>(blocks_for(rows * width / (vector ? Vec<T>::kSize : 1), kThreads))),
      dim3(kThreads), 0, stream, static_cast<const T*>(a.dout.data),
      static_cast<const T*>(a.gate_up.data), rows, width, static_cast<T*>(a.dgate_up.data));
}

// -- copies
// ---------------------------------------------------------------------------------------

template <class From, class To>
__global__ void convert_kernel(const From* from, To* to, std::int64_t n) {
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  const std::int64_t quads = is_quad(from) && is_quad(to) ? n / 4 : 0;
  for (std::int64_t i = first; i < quads; i += stride) {
    const Quad<From> four = reinterpret_cast<const Quad<From>*>(from)[i];
    Quad<To> out;
#pragma unroll
    for (int e = 0; e < 4; ++e) out.at[e] = store_as<To>(load_f32(four.at[e]));
    reinterpret_cast<Quad<To>*>(to)[i] = out;
  }
  for (std::int64_t i = 4 * quads + first; i < n; i += stride)
    to[i] = store_as<To>(load_f32(from[i]));
}

template <class From>
void convert(cudaStream_t stream, const Tensor& from, const Tensor& to) {
  const std::int64_t n = from.elements();
  const int blocks = blocks_for(n, 4 * kThreads);
  const auto* source = static_cast<const From*>(from.data);
  if (to.dtype == DType::kF32)
    convert_kernel<<<blocks, kThreads, 0, stream>>>(source, static_cast<float*>(to.data), n);
  else if (to.dtype == DType::kBF16)
    convert_kernel<<<blocks, kThreads, 0, stream>>>(source, static_cast<__nv_bfloat16*>(to.data),
                                                    n);
  else
    convert_kernel<<<blocks, kThreads, 0, stream>>>(source, static_cast<__half*>(to.data), n);
  TANDEM_LAUNCHED("convert_kernel");
}

}  // namespace

void CudaOps::do_copy(Exec& exec, Tensor from, Tensor to) {
  const cudaStream_t s = stream(exec);
  if (from.dtype == to.dtype) {
    TANDEM_CUDA(cudaMemcpyAsync(to.data, from.data, static_cast<std::size_t>(from.bytes()),
                                cudaMemcpyDeviceToDevice, s));
    return;
  }
  if (from.dtype == DType::kF32) return convert<float>(s, from, to);
  if (from.dtype == DType::kBF16) return convert<__nv_bfloat16>(s, from, to);
  convert<__half>(s, from, to);
}

void CudaOps::do_embedding_forward(Exec& exec, const EmbeddingArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "embedding",
                              static_cast<double>(2 * a.out.bytes()));
  lookup(stream(exec), a.table->storage.data, a.first, a.vocab > 0 ? a.vocab : a.table->n,
         a.table->n, a.table->i * dtype_bytes(a.table->dtype), a.ids, a.out.data);
}

void CudaOps::do_gather_rows(Exec& exec, const GatherRowsArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "gather_rows",
                              static_cast<double>(2 * a.out.bytes()));
  lookup(stream(exec), a.x.data, 0, a.x.dim(0), a.x.dim(0), a.x.dim(1) * dtype_bytes(a.x.dtype),
         a.index, a.out.data);
}

void CudaOps::do_place_columns(Exec& exec, const PlaceColumnsArgs& a) {
  const std::int64_t width = dtype_bytes(a.from.dtype);
  const auto row = static_cast<std::size_t>(a.from.dim(1) * width);
  TANDEM_CUDA(cudaMemcpy2DAsync(static_cast<char*>(a.to.data) + a.first * width,
                                static_cast<std::size_t>(a.to.dim(1) * width), a.from.data, row,
                                row, static_cast<std::size_t>(a.from.dim(0)),
                                cudaMemcpyDeviceToDevice, stream(exec)));
}

void CudaOps::do_add_rms_norm_forward(Exec& exec, const AddRmsNormArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "add_rms_norm",
                              static_cast<double>((a.delta.defined() ? 4 : 2) * a.y.bytes()));
  TANDEM_CUDA_DISPATCH(a.y.dtype, add_rms_norm, stream(exec), a);
}

void CudaOps::do_rms_norm_backward(Exec& exec, const RmsNormBackwardArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "rms_norm_backward",
                              static_cast<double>(4 * a.dy.bytes()));
  if (a.dweight.defined() && add_norm_weight_grad(exec, a)) return;
  TANDEM_CUDA_DISPATCH(a.dy.dtype, run_rms_norm_backward, stream(exec), a);
}

void CudaOps::do_rope_forward(Exec& exec, const RopeArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "rope",
                              static_cast<double>(2 * a.qkv.bytes()));
  if (a.qk_norm.defined()) return qk_norm_rope_forward(exec, a);
  TANDEM_CUDA_DISPATCH(a.qkv.dtype, rope, stream(exec), a.qkv, 1.0f, rope_view(a));
}

void CudaOps::do_rope_backward(Exec& exec, const RopeBackwardArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "rope_backward",
                              static_cast<double>((a.raw.defined() ? 3 : 2) * a.dqkv.bytes()));
  const RopeArgs forward{a.dqkv,  a.positions, a.inv_freq, a.attention_factor,
                         a.heads, a.kv_heads,  a.head_dim, nullptr,
                         Tensor{}};
  if (a.qk_norm.defined()) return qk_norm_rope_backward(exec, a, forward);
  TANDEM_CUDA_DISPATCH(a.dqkv.dtype, rope, stream(exec), a.dqkv, -1.0f, rope_view(forward));
}

void CudaOps::do_silu_mul_forward(Exec& exec, const SiluMulArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "silu_mul",
                              static_cast<double>(3 * a.out.bytes()));
  TANDEM_CUDA_DISPATCH(a.out.dtype, run_silu_mul, stream(exec), a);
}

void CudaOps::do_silu_mul_backward(Exec& exec, const SiluMulBackwardArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "silu_mul_backward",
                              static_cast<double>(5 * a.dout.bytes()));
  TANDEM_CUDA_DISPATCH(a.dout.dtype, run_silu_mul_backward, stream(exec), a);
}

}  // namespace tandem::kernels::cuda
