// Products with packed weights and their adapters; row lookup in a packed table.
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/dropout.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/lora_rows.h"
#include "kernels/cpu/parallel.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace tandem::kernels::cpu {
namespace {

/// The same matrix, from another row and column on.
ConstRows part(const Tensor& t, std::int64_t row, std::int64_t column) {
  const std::int64_t ld = t.dim(1);
  return {static_cast<const char*>(t.data) + (row * ld + column) * dtype_bytes(t.dtype), ld,
          t.dtype};
}
Rows part_of(const Tensor& t, std::int64_t row, std::int64_t column) {
  const std::int64_t ld = t.dim(1);
  return {static_cast<char*>(t.data) + (row * ld + column) * dtype_bytes(t.dtype), ld, t.dtype};
}

/// What every step of one linear op with adapters needs.
struct LoraCall {
  const std::vector<LoraSite>& sites;
  const AdapterRows& rows;
  Tensor u;        ///< [T, sites * rank_max]
  Tensor dropped;  ///< [T, I] scratch, undefined without dropout
  std::span<std::byte> gemm;
  int threads;

  [[nodiscard]] std::int64_t column(std::size_t site) const {
    return static_cast<std::int64_t>(site) * rows.rank_max;
  }
  [[nodiscard]] bool drops() const { return rows.dropout > 0.0f; }
};

/// x with one site's dropout applied to the rows that carry an adapter, or x itself.
Tensor dropped_input(const LoraCall& call, const LoraSite& site, const Tensor& x) {
  if (!call.drops()) return x;
  const DropoutMask mask(call.rows, site, x.dim(1));
  for_each_segment(call.rows, x.dim(0), [&](std::int64_t begin, std::int64_t end, auto slot) {
    if (slot < 0) return;
    parallel_for(call.threads, end - begin, x.dim(1), [&](std::int64_t r) {
      mask.apply(x.rows(begin + r, 1), begin + r, call.dropped.rows(begin + r, 1));
    });
  });
  return call.dropped;
}

void zero_columns(const Tensor& t, std::int64_t begin, std::int64_t end, std::int64_t column,
                  std::int64_t count) {
  const Rows at = part_of(t, begin, column);
  const std::int64_t size = dtype_bytes(t.dtype);
  for (std::int64_t r = 0; r < end - begin; ++r)
    std::fill_n(static_cast<char*>(at.data) + r * at.ld * size, count * size, char{0});
}

/// u of the sites [first, last), which read one x: s A x of each row's adapter, zeros where there
/// is none. Sites that follow each other and have one scale are one product.
void make_u(const LoraCall& call, std::size_t first, std::size_t last, const Tensor& x) {
  const std::int64_t i = x.dim(1);
  std::vector<SmallPart> parts;
  for_each_segment(call.rows, x.dim(0), [&](std::int64_t begin, std::int64_t end, auto slot) {
    const auto rank_of = [&](std::size_t s) -> std::int64_t {
      return slot < 0 ? 0 : lora_entry(call.sites[s], slot, call.rows).rank;
    };
    for (std::size_t s = first; s < last;) {
      if (rank_of(s) == 0) {
        ++s;
        continue;
      }
      const std::int64_t column = call.column(s);
      const float scale = lora_entry(call.sites[s], slot, call.rows).scale;
      parts.clear();
      for (; s < last && rank_of(s) > 0; ++s) {
        const LoraEntry& entry = lora_entry(call.sites[s], slot, call.rows);
        if (entry.scale != scale) break;
        parts.push_back({{entry.a, i, x.dtype}, call.column(s) - column, entry.rank});
      }
      stacked_product(end - begin, i, parts.back().column + parts.back().out, part(x, begin, 0),
                      parts, scale, part_of(call.u, begin, column), call.gemm);
    }
    for (std::size_t s = first; s < last; ++s)
      zero_columns(call.u, begin, end, call.column(s) + rank_of(s),
                   call.rows.rank_max - rank_of(s));
  });
}

/// The only adapter a batch can carry, or null when no row carries it.
const LoraEntry* single_entry(const LoraCall& call, const LoraSite& site, std::int64_t t) {
  const LoraEntry* found = nullptr;
  for_each_segment(call.rows, t, [&](std::int64_t, std::int64_t, auto slot) {
    if (slot >= 0) found = &lora_entry(site, slot, call.rows);
  });
  return found != nullptr && found->rank > 0 ? found : nullptr;
}

PackedMatrix packed(const PackedWeight& w) {
  return {w.storage.data, w.dtype, w.n, w.i};
}

LinearOptions with_bias(const Tensor& bias) {
  LinearOptions options;
  options.bias = bias.defined() ? bias.data : nullptr;
  options.bias_dtype = bias.dtype;
  return options;
}

/// y = x W^T + bias and every low-rank part, in one product: as a term of all rows where one
/// adapter at most can appear, else as pieces of each segment's rows.
void forward_with_adapters(const LinearArgs& a, const LoraCall& call, std::span<std::byte> gemm) {
  const std::int64_t t = a.x.dim(0);
  const bool single = fuses_adapters(a.sites, a.adapters);
  LinearOptions options = with_bias(a.bias);
  std::vector<LowRankTerm> terms;
  std::vector<LowRankPiece> pieces;
  if (!call.drops()) make_u(call, 0, a.sites.size(), a.x);
  for (std::size_t s = 0; s < a.sites.size(); ++s) {
    const LoraSite& site = a.sites[s];
    if (call.drops()) make_u(call, s, s + 1, dropped_input(call, site, a.x));
    const ConstRows u = part(call.u, 0, call.column(s));
    if (const LoraEntry* entry = single ? single_entry(call, site, t) : nullptr)
      terms.push_back({site.n_begin, site.n, entry->rank, u, {entry->b, entry->rank, a.x.dtype}});
    for_each_segment(call.rows, t, [&](std::int64_t begin, std::int64_t end, auto slot) {
      if (single || slot < 0) return;
      const LoraEntry& entry = lora_entry(site, slot, call.rows);
      if (entry.rank > 0)
        pieces.push_back(
            {begin, end, site.n_begin, site.n, entry.rank, u, {entry.b, entry.rank, a.x.dtype}});
    });
  }
  options.low_rank = terms;
  options.pieces = pieces;
  linear_forward(packed(*a.weight), t, part(a.x, 0, 0), part_of(a.y, 0, 0), options, gemm);
}

/// du = s dy B of each segment, then dA += du^T dropout(x) and dB += dy^T u where wanted.
void adapter_grads(const LinearBackwardArgs& a, const LoraCall& call, std::size_t s,
                   const Tensor& x, const Tensor& du) {
  const LoraSite& site = a.sites[s];
  const std::int64_t i = x.dim(1), column = call.column(s);
  const DType cd = x.dtype;
  for_each_segment(call.rows, x.dim(0), [&](std::int64_t begin, std::int64_t end, auto slot) {
    const std::int64_t rank = slot < 0 ? 0 : lora_entry(site, slot, call.rows).rank;
    zero_columns(du, begin, end, column + rank, call.rows.rank_max - rank);
    if (rank == 0) return;
    const LoraEntry& entry = lora_entry(site, slot, call.rows);
    const ConstRows dy = part(a.dy, begin, site.n_begin);
    small_product(end - begin, site.n, rank, dy, {entry.b, rank, cd}, SmallLayout::kInByOut,
                  entry.scale, false, part_of(du, begin, column), call.gemm);
    if (entry.da != nullptr)
      outer_accumulate(end - begin, rank, i, part(du, begin, column), part(x, begin, 0), 1.0f,
                       entry.da, i, call.gemm);
    if (entry.db != nullptr)
      outer_accumulate(end - begin, site.n, rank, dy, part(call.u, begin, column), 1.0f, entry.db,
                       rank, call.gemm);
  });
}

/// dx += dropout'(du A) of one site, segment by segment.
void add_adapter_dx(const LinearBackwardArgs& a, const LoraCall& call, std::size_t s,
                    const Tensor& du) {
  const LoraSite& site = a.sites[s];
  const std::int64_t i = a.x.dim(1);
  const DropoutMask mask(call.rows, site, i);
  for_each_segment(call.rows, a.x.dim(0), [&](std::int64_t begin, std::int64_t end, auto slot) {
    if (slot < 0) return;
    const LoraEntry& entry = lora_entry(site, slot, call.rows);
    if (entry.rank == 0) return;
    const Tensor& to = call.drops() ? call.dropped : a.dx;
    small_product(end - begin, entry.rank, i, part(du, begin, call.column(s)),
                  {entry.a, i, a.x.dtype}, SmallLayout::kInByOut, 1.0f, !call.drops(),
                  part_of(to, begin, 0), call.gemm);
    if (call.drops())
      parallel_for(call.threads, end - begin, i, [&](std::int64_t r) {
        mask.add(call.dropped.rows(begin + r, 1), begin + r, a.dx.rows(begin + r, 1));
      });
  });
}

void backward_with_adapters(const LinearBackwardArgs& a, const LoraCall& call, const Tensor& du) {
  const std::int64_t t = a.x.dim(0);
  const bool fused = fuses_adapters(a.sites, a.adapters) && !call.drops();
  std::vector<LowRankTerm> terms;
  if (!a.u.defined() && !call.drops()) make_u(call, 0, a.sites.size(), a.x);
  for (std::size_t s = 0; s < a.sites.size(); ++s) {
    const Tensor x = dropped_input(call, a.sites[s], a.x);
    if (!a.u.defined() && call.drops()) make_u(call, s, s + 1, x);
    adapter_grads(a, call, s, x, du);
    if (const LoraEntry* entry = fused ? single_entry(call, a.sites[s], t) : nullptr)
      terms.push_back({0,
                       a.x.dim(1),
                       entry->rank,
                       part(du, 0, call.column(s)),
                       {entry->a, a.x.dim(1), a.x.dtype}});
  }
  if (!a.dx.defined()) return;
  LinearOptions options;
  options.low_rank = terms;
  linear_input_grad(packed(*a.weight), t, part(a.dy, 0, 0), part_of(a.dx, 0, 0), options,
                    call.gemm);
  if (fused) return;
  for (std::size_t s = 0; s < a.sites.size(); ++s) add_adapter_dx(a, call, s, du);
}

/// Rows of ids inside the shard are looked up, the others are zero.
void embed_shard(const PackedMatrix& table, const EmbeddingArgs& a, std::int64_t t) {
  const auto* ids = a.ids.as<std::int32_t>();
  const std::int64_t row_bytes = a.out.dim(1) * dtype_bytes(a.out.dtype);
  for (std::int64_t row = 0; row < t; ++row) {
    const std::int64_t local = ids[row] - a.first;
    const auto id = static_cast<std::int32_t>(local);
    if (local >= 0 && local < table.n)
      read_rows(table, {&id, 1}, part_of(a.out, row, 0));
    else
      std::memset(static_cast<char*>(a.out.data) + row * row_bytes, 0,
                  static_cast<std::size_t>(row_bytes));
  }
}

}  // namespace

void CpuOps::do_pack_weight(Exec& exec, PackedWeight& w, const FillRows& fill) {
  const PackWeightWorkspace layout = pack_weight_workspace(w.n, w.i);
  const Scratch scratch(exec, layout.bytes);
  float* block = scratch.at<float>(0);
  for (std::int64_t row = 0; row < w.n; row += layout.block_rows) {
    const std::int64_t rows = std::min(layout.block_rows, w.n - row);
    fill(row, rows, block);
    parallel_for(
        profile_.threads, (rows + kPackRows - 1) / kPackRows, kPackRows * w.i, [&](std::int64_t b) {
          const std::int64_t begin = b * kPackRows;
          pack_rows(w.storage.data, w.dtype, w.n, w.i, row + begin,
                    std::min(kPackRows, rows - begin), {block + begin * w.i, w.i, DType::kF32});
        });
  }
}

void CpuOps::do_embedding_forward(Exec& exec, const EmbeddingArgs& a) {
  const auto* ids = a.ids.as<std::int32_t>();
  const std::int64_t t = a.out.dim(0), vocab = a.vocab > 0 ? a.vocab : a.table->n;
  for (std::int64_t row = 0; row < t; ++row)
    TANDEM_CHECK(ids[row] >= 0 && ids[row] < vocab, "embedding_forward: ids[", row,
                 "] = ", ids[row], ": expected 0 .. ", vocab - 1);
  use_threads(exec);
  if (a.vocab > 0) return embed_shard(packed(*a.table), a, t);
  read_rows(packed(*a.table), {ids, static_cast<std::size_t>(t)}, part_of(a.out, 0, 0));
}

void CpuOps::do_linear_forward(Exec& exec, const LinearArgs& a) {
  use_threads(exec);
  const LinearForwardWorkspace layout = linear_forward_workspace(a, profile_);
  const Scratch scratch(exec, layout.bytes);
  const auto gemm = scratch.span(layout.gemm, layout.gemm_bytes);
  if (!has_adapters(a.sites, a.adapters))
    return cpu::linear_forward(packed(*a.weight), a.x.dim(0), part(a.x, 0, 0), part_of(a.y, 0, 0),
                               with_bias(a.bias), gemm);
  const Shape wide{a.x.dim(0), static_cast<std::int64_t>(a.sites.size()) * a.adapters->rank_max};
  const Tensor u = a.u.defined() ? a.u : scratch.tensor(layout.u, a.x.dtype, wide);
  const Tensor dropped = scratch.tensor(layout.x, a.x.dtype, a.x.shape);
  forward_with_adapters(a, {a.sites, *a.adapters, u, dropped, gemm, profile_.threads}, gemm);
}

void CpuOps::do_linear_backward(Exec& exec, const LinearBackwardArgs& a) {
  use_threads(exec);
  const LinearBackwardWorkspace layout = linear_backward_workspace(a, profile_);
  const Scratch scratch(exec, layout.bytes);
  const auto gemm = scratch.span(layout.gemm, layout.gemm_bytes);
  if (!has_adapters(a.sites, a.adapters)) {
    if (a.dx.defined())
      linear_input_grad(packed(*a.weight), a.x.dim(0), part(a.dy, 0, 0), part_of(a.dx, 0, 0), {},
                        gemm);
    return;
  }
  const Shape wide{a.x.dim(0), static_cast<std::int64_t>(a.sites.size()) * a.adapters->rank_max};
  const Tensor u = a.u.defined() ? a.u : scratch.tensor(layout.u, a.x.dtype, wide);
  const Tensor dropped = scratch.tensor(layout.x, a.x.dtype, a.x.shape);
  backward_with_adapters(a, {a.sites, *a.adapters, u, dropped, gemm, profile_.threads},
                         scratch.tensor(layout.du, a.x.dtype, wide));
}

}  // namespace tandem::kernels::cpu
