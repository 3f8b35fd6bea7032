// Products with packed weights and their adapters; row lookup in a packed table.
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/lora_rows.h"
#include "kernels/cpu/naive_products.h"
#include "kernels/cpu/parallel.h"
#include "protocol/base/random.h"

#include <algorithm>
#include <cstring>

namespace tandem::kernels::cpu {
namespace {

/// Zero or 1/(1-p) for (row, column): 16 bits of one hash per column.
struct DropoutMask {
  std::uint64_t seed, stream;
  std::uint32_t threshold;  ///< of 65536: dropped below it
  float scale;

  DropoutMask(const AdapterRows& rows, const LoraSite& site)
      : seed(rows.dropout_seed),
        stream(site.dropout_stream),
        threshold(static_cast<std::uint32_t>(rows.dropout * 65536.0f + 0.5f)),
        scale(1.0f / (1.0f - static_cast<float>(threshold) / 65536.0f)) {}

  [[nodiscard]] float at(std::int64_t row, std::int64_t column, std::int64_t columns) const {
    const auto group = static_cast<std::uint64_t>(row * ((columns + 3) / 4) + column / 4);
    const std::uint64_t bits = random_bits(seed, stream, group);
    return ((bits >> (16 * (column % 4))) & 0xffff) < threshold ? 0.0f : scale;
  }
};

template <class T>
void drop(const T* x, T* out, std::int64_t t, std::int64_t i, const DropoutMask& mask,
          int threads) {
  parallel_for(threads, t, [&](std::int64_t row) {
    for (std::int64_t j = 0; j < i; ++j)
      out[row * i + j] = from_f32<T>(to_f32(x[row * i + j]) * mask.at(row, j, i));
  });
}

/// u of one site: s A dropout(x) of each row's adapter, zeros where there is none.
template <class T>
void make_u(const T* x, T* dropped, std::int64_t t, std::int64_t i, const LoraSite& site,
            const AdapterRows& rows, T* u, std::int64_t ldu, int threads) {
  if (rows.dropout > 0.0f) {
    drop(x, dropped, t, i, DropoutMask(rows, site), threads);
    x = dropped;
  }
  for_each_segment(rows, t, [&](std::int64_t begin, std::int64_t end, std::int64_t slot) {
    const LoraEntry none;
    const LoraEntry& entry = slot < 0 ? none : lora_entry(site, slot, rows);
    const T* a = static_cast<const T*>(entry.a);
    parallel_for(threads, end - begin, [&](std::int64_t r) {
      T* out = u + (begin + r) * ldu;
      for (std::int64_t k = 0; k < entry.rank; ++k)
        out[k] = from_f32<T>(entry.scale * dot(x + (begin + r) * i, a + k * i, i));
      for (std::int64_t k = entry.rank; k < rows.rank_max; ++k) out[k] = from_f32<T>(0.0f);
    });
  });
}

template <class T, class Y>
void add_lora(const T* u, std::int64_t ldu, Y* y, std::int64_t n, std::int64_t t,
              const LoraSite& site, const AdapterRows& rows, int threads) {
  for_each_segment(rows, t, [&](std::int64_t begin, std::int64_t end, std::int64_t slot) {
    if (slot < 0) return;
    const LoraEntry& entry = lora_entry(site, slot, rows);
    const T* b = static_cast<const T*>(entry.b);
    parallel_for(threads, end - begin, [&](std::int64_t r) {
      Y* out = y + (begin + r) * n + site.n_begin;
      for (std::int64_t j = 0; j < site.n; ++j)
        out[j] = from_f32<Y>(to_f32(out[j]) +
                             dot(u + (begin + r) * ldu, b + j * entry.rank, entry.rank));
    });
  });
}

template <class T, class Y>
void forward_typed(Exec& exec, const LinearArgs& a, const DeviceProfile& profile) {
  const int threads = profile.threads;
  const std::int64_t t = a.x.dim(0), i = a.x.dim(1), n = a.weight->n;
  const T* x = a.x.as<T>();
  product(x, static_cast<const T*>(a.weight->storage.data),
          a.bias.defined() ? a.bias.as<T>() : nullptr, a.y.as<Y>(), t, n, i, threads);
  if (!has_adapters(a.sites, a.adapters)) return;
  const LinearForwardScratch layout = linear_forward_scratch(a, profile);
  const Scratch scratch(exec, layout.bytes);
  const std::int64_t rank_max = a.adapters->rank_max;
  const std::int64_t ldu = static_cast<std::int64_t>(a.sites.size()) * rank_max;
  T* u = a.u.defined() ? a.u.as<T>() : scratch.at<T>(layout.u);
  for (std::size_t s = 0; s < a.sites.size(); ++s) {
    T* site_u = u + static_cast<std::int64_t>(s) * rank_max;
    make_u(x, scratch.at<T>(layout.x), t, i, a.sites[s], *a.adapters, site_u, ldu, threads);
    add_lora(site_u, ldu, a.y.as<Y>(), n, t, a.sites[s], *a.adapters, threads);
  }
}

template <class T>
void forward(Exec& exec, const LinearArgs& a, const DeviceProfile& profile) {
  if (a.y.dtype == DType::kF32) return forward_typed<T, float>(exec, a, profile);
  forward_typed<T, T>(exec, a, profile);
}

/// du = s dy B, then dA += du^T dropout(x) and dB += dy^T u, where the entries want them.
template <class T>
void adapter_grads(const LinearBackwardArgs& a, const LoraSite& site, const T* x, const T* u, T* du,
                   std::int64_t ldu, int threads) {
  const std::int64_t t = a.x.dim(0), i = a.x.dim(1), n = a.dy.dim(1);
  const T* dy = a.dy.as<T>() + site.n_begin;
  const AdapterRows& rows = *a.adapters;
  for_each_segment(rows, t, [&](std::int64_t begin, std::int64_t end, std::int64_t slot) {
    const LoraEntry none;
    const LoraEntry& entry = slot < 0 ? none : lora_entry(site, slot, rows);
    const T* b = static_cast<const T*>(entry.b);
    parallel_for(threads, end - begin, [&](std::int64_t r) {
      T* out = du + (begin + r) * ldu;
      for (std::int64_t k = 0; k < rows.rank_max; ++k) {
        float sum = 0.0f;
        if (k < entry.rank)
          for (std::int64_t j = 0; j < site.n; ++j)
            sum += to_f32(dy[(begin + r) * n + j]) * to_f32(b[j * entry.rank + k]);
        out[k] = from_f32<T>(entry.scale * sum);
      }
    });
    if (entry.da != nullptr)
      parallel_for(threads, entry.rank, [&](std::int64_t k) {
        for (std::int64_t row = begin; row < end; ++row)
          for (std::int64_t j = 0; j < i; ++j)
            entry.da[k * i + j] += to_f32(du[row * ldu + k]) * to_f32(x[row * i + j]);
      });
    if (entry.db != nullptr)
      parallel_for(threads, site.n, [&](std::int64_t j) {
        for (std::int64_t row = begin; row < end; ++row)
          for (std::int64_t k = 0; k < entry.rank; ++k)
            entry.db[j * entry.rank + k] += to_f32(dy[row * n + j]) * to_f32(u[row * ldu + k]);
      });
  });
}

/// dx += dropout'(du A).
template <class T>
void add_lora_dx(const LinearBackwardArgs& a, const LoraSite& site, const T* du, std::int64_t ldu,
                 int threads) {
  const std::int64_t t = a.x.dim(0), i = a.x.dim(1);
  const AdapterRows& rows = *a.adapters;
  const DropoutMask mask(rows, site);
  for_each_segment(rows, t, [&](std::int64_t begin, std::int64_t end, std::int64_t slot) {
    if (slot < 0) return;
    const LoraEntry& entry = lora_entry(site, slot, rows);
    const T* w = static_cast<const T*>(entry.a);
    parallel_for(threads, end - begin, [&](std::int64_t r) {
      const std::int64_t row = begin + r;
      T* dx = a.dx.as<T>() + row * i;
      for (std::int64_t j = 0; j < i; ++j) {
        float sum = 0.0f;
        for (std::int64_t k = 0; k < entry.rank; ++k)
          sum += to_f32(du[row * ldu + k]) * to_f32(w[k * i + j]);
        if (rows.dropout > 0.0f) sum *= mask.at(row, j, i);
        dx[j] = from_f32<T>(to_f32(dx[j]) + sum);
      }
    });
  });
}

template <class T>
void backward(Exec& exec, const LinearBackwardArgs& a, const DeviceProfile& profile) {
  const int threads = profile.threads;
  const std::int64_t t = a.x.dim(0), i = a.x.dim(1);
  if (a.dx.defined())
    product_grad(a.dy.as<T>(), static_cast<const T*>(a.weight->storage.data), a.dx.as<T>(), t,
                 a.weight->n, i, threads);
  if (!has_adapters(a.sites, a.adapters)) return;
  const LinearBackwardScratch layout = linear_backward_scratch(a, profile);
  const Scratch scratch(exec, layout.bytes);
  const std::int64_t rank_max = a.adapters->rank_max;
  const std::int64_t ldu = static_cast<std::int64_t>(a.sites.size()) * rank_max;
  for (std::size_t s = 0; s < a.sites.size(); ++s) {
    const LoraSite& site = a.sites[s];
    const std::int64_t column = static_cast<std::int64_t>(s) * rank_max;
    const T* x = a.x.as<T>();
    if (!a.u.defined()) {
      make_u(x, scratch.at<T>(layout.x), t, i, site, *a.adapters, scratch.at<T>(layout.u) + column,
             ldu, threads);
    } else if (a.adapters->dropout > 0.0f) {
      drop(x, scratch.at<T>(layout.x), t, i, DropoutMask(*a.adapters, site), threads);
    }
    if (a.adapters->dropout > 0.0f) x = scratch.at<T>(layout.x);
    const T* u = (a.u.defined() ? a.u.as<T>() : scratch.at<T>(layout.u)) + column;
    T* du = scratch.at<T>(layout.du) + column;
    adapter_grads(a, site, x, u, du, ldu, threads);
    if (a.dx.defined()) add_lora_dx(a, site, du, ldu, threads);
  }
}

template <class T>
void embedding(const EmbeddingArgs& a, int threads) {
  const std::int64_t c = a.out.dim(1);
  const auto* ids = a.ids.as<std::int32_t>();
  const T* table = static_cast<const T*>(a.table->storage.data);
  parallel_for(threads, a.out.dim(0), [&](std::int64_t row) {
    TANDEM_CHECK(ids[row] >= 0 && ids[row] < a.table->n, "embedding_forward: ids[", row,
                 "] = ", ids[row], ": expected 0 .. ", a.table->n - 1);
    std::memcpy(a.out.as<T>() + row * c, table + ids[row] * c,
                static_cast<std::size_t>(c) * sizeof(T));
  });
}

}  // namespace

void CpuOps::do_pack_weight(Exec& exec, PackedWeight& w, const FillRows& fill) {
  const PackWeightScratch layout = pack_weight_scratch(w.n, w.i);
  const Scratch scratch(exec, layout.bytes);
  float* block = scratch.at<float>(0);
  for (std::int64_t row = 0; row < w.n; row += layout.block_rows) {
    const std::int64_t rows = std::min(layout.block_rows, w.n - row);
    fill(row, rows, block);
    for (std::int64_t j = 0; j < rows * w.i; ++j) {
      if (w.dtype == DType::kF32)
        static_cast<float*>(w.storage.data)[row * w.i + j] = block[j];
      else
        static_cast<bf16*>(w.storage.data)[row * w.i + j] = to_bf16(block[j]);
    }
  }
}

void CpuOps::do_embedding_forward(Exec&, const EmbeddingArgs& a) {
  TANDEM_CPU_DISPATCH(a.out.dtype, embedding, a, profile_.threads);
}
void CpuOps::do_linear_forward(Exec& exec, const LinearArgs& a) {
  TANDEM_CPU_DISPATCH(a.x.dtype, forward, exec, a, profile_);
}
void CpuOps::do_linear_backward(Exec& exec, const LinearBackwardArgs& a) {
  TANDEM_CPU_DISPATCH(a.x.dtype, backward, exec, a, profile_);
}

}  // namespace tandem::kernels::cpu
