// Row-wise ops: copies, embedding, norms, rope, the gated activation.
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/row_kernels.h"
#include "kernels/workspace.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace tandem::kernels::cpu {
namespace {

/// Elements one task copies.
constexpr std::int64_t kCopyBlock = 1 << 16;

template <class From, class To>
void convert(const Tensor& from, const Tensor& to, int threads) {
  const From* a = from.as<From>();
  To* b = to.as<To>();
  const std::int64_t n = from.elements();
  parallel_for(threads, (n + kCopyBlock - 1) / kCopyBlock, kCopyBlock, [&](std::int64_t block) {
    const std::int64_t end = std::min(n, (block + 1) * kCopyBlock);
    if constexpr (std::is_same_v<From, float> && std::is_same_v<To, bf16>)
      return row_kernels().round_bf16(a + block * kCopyBlock, b + block * kCopyBlock,
                                      end - block * kCopyBlock);
    for (std::int64_t i = block * kCopyBlock; i < end; ++i) b[i] = from_f32<To>(to_f32(a[i]));
  });
}

template <class From>
void convert_from(const Tensor& from, const Tensor& to, int threads) {
  if (to.dtype == DType::kF32) return convert<From, float>(from, to, threads);
  if (to.dtype == DType::kBF16) return convert<From, bf16>(from, to, threads);
  convert<From, f16>(from, to, threads);
}

void copy_bytes(const void* from, void* to, std::int64_t bytes, int threads) {
  constexpr std::int64_t kBytes = kCopyBlock * 4;
  parallel_for(threads, (bytes + kBytes - 1) / kBytes, kCopyBlock, [&](std::int64_t block) {
    const std::int64_t begin = block * kBytes;
    std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin,
                static_cast<std::size_t>(std::min(kBytes, bytes - begin)));
  });
}

template <class T>
void add_rms_norm(const AddRmsNormArgs& a, int threads) {
  const std::int64_t c = a.residual.dim(1);
  const auto run = row_kernels_of<T>().add_rms_norm;
  parallel_for(threads, a.residual.dim(0), c, [&](std::int64_t row) {
    const T* delta = a.delta.defined() ? a.delta.as<T>() + row * c : nullptr;
    const float rstd =
        run(a.residual.as<T>() + row * c, delta, a.weight.as<T>(), a.eps, a.y.as<T>() + row * c, c);
    if (a.rstd.defined()) a.rstd.as<float>()[row] = rstd;
  });
}

template <class T>
void rms_norm_grad(const RmsNormBackwardArgs& a, int threads) {
  const std::int64_t c = a.dy.dim(1);
  const auto run = row_kernels_of<T>().rms_norm_grad;
  parallel_for(threads, a.dy.dim(0), c, [&](std::int64_t row) {
    run(a.dy.as<T>() + row * c, a.residual.as<T>() + row * c, a.weight.as<T>(),
        a.rstd.as<float>()[row], a.dresidual.as<T>() + row * c, c);
  });
}

constexpr std::int64_t kHalfHeadMax = 512;

template <class T>
void write_cache(const RopeArgs& a, std::int64_t row, const T* k, const T* v) {
  const std::int32_t slot = a.cache_slots.as<std::int32_t>()[row];
  if (slot < 0) return;
  const KvCache& cache = *a.cache;
  const std::int64_t block = slot / cache.block_size, offset = slot % cache.block_size;
  TANDEM_CHECK(block < cache.k.dim(0), "rope_forward: cache_slots[", row, "] = ", slot,
               ": expected below ", cache.k.dim(0) * cache.block_size);
  for (std::int64_t h = 0; h < a.kv_heads; ++h) {
    const std::int64_t to = ((block * a.kv_heads + h) * cache.block_size + offset) * a.head_dim;
    const auto bytes = static_cast<std::size_t>(a.head_dim) * sizeof(T);
    std::memcpy(cache.k.as<T>() + to, k + h * a.head_dim, bytes);
    std::memcpy(cache.v.as<T>() + to, v + h * a.head_dim, bytes);
  }
}

/// The weight of a head's norm.
template <class T, class Args>
const T* head_weight(const Args& a, std::int64_t head) {
  return a.qk_norm.template as<T>() + (head < a.heads ? 0 : a.head_dim);
}

/// One row of q, k and v from `raw`, which may be `qkv`: q and k normed.
template <class T>
void norm_heads(const RopeArgs& a, T* raw, T* qkv) {
  const auto norm = row_kernels_of<T>().add_rms_norm;
  const std::int64_t normed = a.heads + a.kv_heads, d = a.head_dim;
  for (std::int64_t h = 0; h < normed; ++h)
    norm(raw + h * d, nullptr, head_weight<T>(a, h), a.norm_eps, qkv + h * d, d);
  if (raw != qkv)
    std::memcpy(qkv + normed * d, raw + normed * d,
                static_cast<std::size_t>(a.kv_heads * d) * sizeof(T));
}

/// Backward of norm_heads on one row. `sums`, f64 [2 * D] or null: what it adds to dqk_norm.
template <class T>
void norm_heads_grad(const RopeBackwardArgs& a, T* raw, T* dqkv, double* sums) {
  const auto& kernels = row_kernels_of<T>();
  const std::int64_t d = a.head_dim;
  T dy[kQkNormDimMax], unused[kQkNormDimMax];
  for (std::int64_t h = 0; h < a.heads + a.kv_heads; ++h) {
    T *x = raw + h * d, *dx = dqkv + h * d;
    const T* weight = head_weight<T>(a, h);
    const float rstd = kernels.add_rms_norm(x, nullptr, weight, a.norm_eps, unused, d);
    std::copy_n(dx, d, dy);
    std::fill_n(dx, d, T{});
    kernels.rms_norm_grad(dy, x, weight, rstd, dx, d);
    if (sums == nullptr) continue;
    double* to = sums + (h < a.heads ? 0 : d);
    for (std::int64_t j = 0; j < d; ++j)
      to[j] += static_cast<double>(to_f32(dy[j])) * static_cast<double>(to_f32(x[j]) * rstd);
  }
}

template <class T>
void rope(const RopeArgs& a, int threads) {
  const std::int64_t width = a.qkv.dim(1), half = a.head_dim / 2;
  TANDEM_CHECK_LE(half, kHalfHeadMax, "rope_forward: head_dim ", a.head_dim);
  const auto turn = row_kernels_of<T>().rotate;
  const auto angles = row_kernels().angles;
  parallel_for(threads, a.qkv.dim(0), width, [&](std::int64_t row) {
    float cosines[kHalfHeadMax], sines[kHalfHeadMax];
    angles(static_cast<float>(a.positions.as<std::int32_t>()[row]), a.inv_freq.as<float>(), half,
           a.attention_factor, 1.0f, cosines, sines);
    T* q = a.qkv.as<T>() + row * width;
    T* k = q + a.heads * a.head_dim;
    if (a.qk_norm.defined()) norm_heads(a, a.raw.defined() ? a.raw.as<T>() + row * width : q, q);
    turn(q, a.heads + a.kv_heads, half, cosines, sines);
    if (a.cache != nullptr) write_cache(a, row, k, k + a.kv_heads * a.head_dim);
  });
}

/// `parts`, f64 [blocks, 2 * D] or null: each kQkNormRows rows' part of dqk_norm.
template <class T>
void rope_grad(const RopeBackwardArgs& a, double* parts, int threads) {
  const std::int64_t t = a.dqkv.dim(0), width = a.dqkv.dim(1), half = a.head_dim / 2;
  TANDEM_CHECK_LE(half, kHalfHeadMax, "rope_backward: head_dim ", a.head_dim);
  const auto turn = row_kernels_of<T>().rotate;
  const auto angles = row_kernels().angles;
  const auto one = [&](std::int64_t row, double* sums) {
    float cosines[kHalfHeadMax], sines[kHalfHeadMax];
    angles(static_cast<float>(a.positions.as<std::int32_t>()[row]), a.inv_freq.as<float>(), half,
           a.attention_factor, -1.0f, cosines, sines);
    T* dqkv = a.dqkv.as<T>() + row * width;
    turn(dqkv, a.heads + a.kv_heads, half, cosines, sines);
    if (a.qk_norm.defined()) norm_heads_grad<T>(a, a.raw.as<T>() + row * width, dqkv, sums);
  };
  if (parts == nullptr)
    return parallel_for(threads, t, width, [&](std::int64_t row) { one(row, nullptr); });
  const std::int64_t columns = 2 * a.head_dim, blocks = (t + kQkNormRows - 1) / kQkNormRows;
  parallel_for(threads, blocks, kQkNormRows * width, [&](std::int64_t block) {
    double* sums = parts + block * columns;
    std::fill_n(sums, columns, 0.0);
    const std::int64_t end = std::min(t, (block + 1) * kQkNormRows);
    for (std::int64_t row = block * kQkNormRows; row < end; ++row) one(row, sums);
  });
  float* out = a.dqk_norm.as<float>();
  for (std::int64_t j = 0; j < columns; ++j) {
    double sum = static_cast<double>(out[j]);
    for (std::int64_t block = 0; block < blocks; ++block) sum += parts[block * columns + j];
    out[j] = static_cast<float>(sum);
  }
}

template <class T>
void silu_mul(const SiluMulArgs& a, int threads) {
  const std::int64_t f = a.out.dim(1);
  const auto run = row_kernels_of<T>().silu_mul;
  parallel_for(threads, a.out.dim(0), f, [&](std::int64_t row) {
    const T* gate = a.gate_up.as<T>() + row * 2 * f;
    run(gate, gate + f, a.out.as<T>() + row * f, f);
  });
}

template <class T>
void silu_mul_grad(const SiluMulBackwardArgs& a, int threads) {
  const std::int64_t f = a.dout.dim(1);
  const auto run = row_kernels_of<T>().silu_mul_grad;
  parallel_for(threads, a.dout.dim(0), f, [&](std::int64_t row) {
    const T* gate = a.gate_up.as<T>() + row * 2 * f;
    T* dgate = a.dgate_up.as<T>() + row * 2 * f;
    run(a.dout.as<T>() + row * f, gate, gate + f, dgate, dgate + f, f);
  });
}

}  // namespace

void CpuOps::do_upload(Exec&, std::span<const std::byte> host, Tensor to) {
  copy_bytes(host.data(), to.data, to.bytes(), profile_.threads);
}

void CpuOps::do_download(Exec&, Tensor from, std::span<std::byte> host) {
  copy_bytes(from.data, host.data(), from.bytes(), profile_.threads);
}

void CpuOps::do_copy(Exec&, Tensor from, Tensor to) {
  if (from.dtype == to.dtype) return copy_bytes(from.data, to.data, to.bytes(), profile_.threads);
  if (from.dtype == DType::kF32) return convert_from<float>(from, to, profile_.threads);
  if (from.dtype == DType::kBF16) return convert_from<bf16>(from, to, profile_.threads);
  convert_from<f16>(from, to, profile_.threads);
}

void CpuOps::do_fill_zero(Exec&, Tensor x) {
  std::memset(x.data, 0, static_cast<std::size_t>(x.bytes()));
}

void CpuOps::do_gather_rows(Exec&, const GatherRowsArgs& a) {
  const std::int64_t bytes = a.x.dim(1) * dtype_bytes(a.x.dtype);
  const auto* index = a.index.as<std::int32_t>();
  parallel_for(profile_.threads, a.index.dim(0), a.x.dim(1), [&](std::int64_t j) {
    TANDEM_CHECK(index[j] >= 0 && index[j] < a.x.dim(0), "gather_rows: index[", j, "] = ", index[j],
                 ": expected 0 .. ", a.x.dim(0) - 1);
    std::memcpy(static_cast<char*>(a.out.data) + j * bytes,
                static_cast<const char*>(a.x.data) + index[j] * bytes,
                static_cast<std::size_t>(bytes));
  });
}

void CpuOps::do_place_columns(Exec&, const PlaceColumnsArgs& a) {
  const std::int64_t width = dtype_bytes(a.from.dtype), bytes = a.from.dim(1) * width;
  parallel_for(profile_.threads, a.from.dim(0), a.from.dim(1), [&](std::int64_t row) {
    std::memcpy(static_cast<char*>(a.to.data) + (row * a.to.dim(1) + a.first) * width,
                static_cast<const char*>(a.from.data) + row * bytes,
                static_cast<std::size_t>(bytes));
  });
}

void CpuOps::do_add_rms_norm_forward(Exec&, const AddRmsNormArgs& a) {
  TANDEM_CPU_DISPATCH(a.y.dtype, add_rms_norm, a, profile_.threads);
}
void CpuOps::do_rms_norm_backward(Exec&, const RmsNormBackwardArgs& a) {
  if (a.dweight.defined()) rms_norm_weight_grad(a);
  TANDEM_CPU_DISPATCH(a.dy.dtype, rms_norm_grad, a, profile_.threads);
}
void CpuOps::do_rope_forward(Exec&, const RopeArgs& a) {
  TANDEM_CPU_DISPATCH(a.qkv.dtype, rope, a, profile_.threads);
}
void CpuOps::do_rope_backward(Exec& exec, const RopeBackwardArgs& a) {
  const Scratch scratch(exec, rope_backward_workspace(a));
  TANDEM_CPU_DISPATCH(a.dqkv.dtype, rope_grad, a, scratch.at<double>(0), profile_.threads);
}
void CpuOps::do_silu_mul_forward(Exec&, const SiluMulArgs& a) {
  TANDEM_CPU_DISPATCH(a.out.dtype, silu_mul, a, profile_.threads);
}
void CpuOps::do_silu_mul_backward(Exec&, const SiluMulBackwardArgs& a) {
  TANDEM_CPU_DISPATCH(a.dout.dtype, silu_mul_grad, a, profile_.threads);
}

}  // namespace tandem::kernels::cpu
