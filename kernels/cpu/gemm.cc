#include "kernels/cpu/gemm.h"

#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/gemm_kernels.h"
#include "kernels/cpu/gemm_layout.h"
#include "kernels/cpu/gemm_plain.h"
#include "protocol/base/check.h"

#include <omp.h>

#include <algorithm>

namespace tandem::kernels::cpu {
namespace {

static_assert(kLowRankTermsMax == kTermsMax);

// Takes pieces off the caller's scratch, each at a cache line.
class Scratch {
 public:
  explicit Scratch(std::span<std::byte> bytes)
      : at_(reinterpret_cast<char*>(bytes.data())), left_(static_cast<std::int64_t>(bytes.size())) {
    TANDEM_CHECK(reinterpret_cast<std::uintptr_t>(at_) % kCacheLine == 0, "scratch alignment");
  }
  char* take(std::int64_t bytes) {
    bytes = round_up(bytes, kCacheLine);
    TANDEM_CHECK_LE(bytes, left_, "scratch of a product");
    char* piece = at_;
    at_ += bytes;
    left_ -= bytes;
    return piece;
  }

 private:
  char* at_;
  std::int64_t left_;
};

void run_product(const Product& p, DType format) {
  if (p.t == 0 || p.columns == 0) return;
  const Isa level = isa();
  if (format == DType::kF32)
    return level >= Isa::kAvx512 ? product_f32_avx512(p)
           : level == Isa::kAvx2 ? product_f32_avx2(p)
                                 : product_f32_generic(p);
  switch (level) {
    case Isa::kAmx:
      return product_bf16_amx(p);
    case Isa::kAvx512Bf16Fma:
      return product_bf16_fma(p);
    case Isa::kAvx512Bf16:
      return product_bf16_avx512(p);
    case Isa::kAvx512:
      return product_widened_avx512(p);
    case Isa::kAvx2:
      return product_widened_avx2(p);
    case Isa::kGeneric:
      return product_widened_generic(p);
  }
}

// -- low-rank terms -------------------------------------------------------------------------------

// Panels that a w with `out` columns takes when its first column is moved by less than a panel.
std::int64_t term_panels_max(std::int64_t out) {
  return ceil_div(out, kPanel) + 1;
}

void pack_parts(DType format, std::span<const SmallPart> parts, std::int64_t columns,
                std::int64_t in, char* to) {
  const auto count = static_cast<std::int64_t>(parts.size());
  if (format == DType::kF32)
    pack_parts_f32(parts.data(), count, columns, in, reinterpret_cast<float*>(to));
  else if (isa() < Isa::kAvx512Bf16)
    pack_parts_bf16(parts.data(), count, columns, in, reinterpret_cast<bf16*>(to));
  else
    pack_parts_bf16_avx512(parts.data(), count, columns, in, to);
}

void pack_small(DType format, ConstRows w, SmallLayout layout, std::int64_t out, std::int64_t in,
                std::int64_t out_shift, char* to) {
  if (layout == SmallLayout::kOutByIn) {
    const SmallPart part{w, out_shift, out};
    return pack_parts(format, {&part, 1}, out_shift + out, in, to);
  }
  if (format == DType::kF32)
    pack_in_by_out_f32(w, in, out, out_shift, reinterpret_cast<float*>(to));
  else if (isa() < Isa::kAvx512Bf16)
    pack_in_by_out_bf16(w, in, out, out_shift, reinterpret_cast<bf16*>(to));
  else
    pack_bf16_in_by_out(w.data, w.ld, in, out, out_shift, to);
}

void add_term(Product& p, DType format, const LowRankTerm& term, SmallLayout layout,
              Scratch& scratch) {
  TANDEM_CHECK(term.begin >= 0 && term.count > 0 && term.begin + term.count <= p.columns,
               "low-rank columns ", term.begin, "+", term.count, " of ", p.columns);
  TANDEM_CHECK(term.rank > 0 && term.rank <= kLowRankMax, "rank ", term.rank);
  TANDEM_CHECK(term.u.dtype == format && term.v.dtype == format, "low-rank dtypes ",
               dtype_name(term.u.dtype), ", ", dtype_name(term.v.dtype));
  TANDEM_CHECK_LT(p.terms_count, kTermsMax, "low-rank terms of one product");
  PackedTerm& packed = p.terms[p.terms_count++];
  packed.panel_begin = term.begin / kPanel;
  packed.panel_end = ceil_div(term.begin + term.count, kPanel);
  packed.rank = term.rank;
  packed.u = term.u.data;
  packed.ldu = term.u.ld;
  char* panels =
      scratch.take((packed.panel_end - packed.panel_begin) * panel_bytes(format, term.rank));
  pack_small(format, term.v, layout, term.count, term.rank, term.begin % kPanel, panels);
  packed.panels = panels;
}

std::int64_t terms_bytes(DType format, std::int64_t out, std::int64_t terms,
                         std::int64_t rank_sum) {
  const std::int64_t per_column =
      format == DType::kF32 ? rank_sum * 4 : (rank_sum + 31 * terms) * 2;
  return term_panels_max(out) * kPanel * per_column + terms * kCacheLine;
}

std::int64_t thread_bytes(std::int64_t t, std::int64_t reduction, std::int64_t columns,
                          std::int64_t terms, std::int64_t rank_sum) {
  return product_scratch_per_thread(t, reduction, columns,
                                    terms == 0 ? 0 : rank_sum + (kTileK - 1) * terms);
}

// What the caller may have counted: all terms, though some may have rank 0. Pieces are one more,
// the largest.
struct TermSizes {
  std::int64_t terms = 0, rank_sum = 0;
};
TermSizes with_pieces(TermSizes sizes, std::int64_t piece_rank) {
  if (piece_rank > 0) sizes = {sizes.terms + 1, sizes.rank_sum + piece_rank};
  return sizes;
}
TermSizes sizes_of(const LinearOptions& options) {
  TermSizes sizes;
  for (const LowRankTerm& term : options.low_rank) {
    ++sizes.terms;
    sizes.rank_sum += term.rank;
  }
  std::int64_t piece_rank = 0;
  for (const LowRankPiece& piece : options.pieces) piece_rank = std::max(piece_rank, piece.rank);
  return with_pieces(sizes, piece_rank);
}

void take_pieces(Product& p, DType format, std::span<const LowRankPiece> pieces) {
  for (const LowRankPiece& piece : pieces) {
    TANDEM_CHECK(piece.begin >= 0 && piece.count > 0 && piece.begin + piece.count <= p.columns,
                 "low-rank columns ", piece.begin, "+", piece.count, " of ", p.columns);
    TANDEM_CHECK(piece.row_begin >= 0 && piece.row_begin < piece.row_end && piece.row_end <= p.t,
                 "low-rank rows ", piece.row_begin, "..", piece.row_end, " of ", p.t);
    TANDEM_CHECK(piece.rank > 0 && piece.rank <= kLowRankMax, "rank ", piece.rank);
    TANDEM_CHECK(piece.u.dtype == format && piece.v.dtype == format, "low-rank dtypes ",
                 dtype_name(piece.u.dtype), ", ", dtype_name(piece.v.dtype));
  }
  p.pieces = pieces.data();
  p.pieces_count = static_cast<std::int64_t>(pieces.size());
}

void check_rows(DType format, const ConstRows& x, const Rows& y) {
  TANDEM_CHECK(x.dtype == format, "x is ", dtype_name(x.dtype), ", weights ", dtype_name(format));
  TANDEM_CHECK(y.dtype == DType::kF32 || (y.dtype == DType::kBF16 && format == DType::kBF16),
               "y is ", dtype_name(y.dtype), ", weights ", dtype_name(format));
}

// An output this large has left the caches before anyone reads it; written past them, it costs no
// reads for ownership and evicts nothing. Measured at T=4096, N=3072: 10 ms against 30.
constexpr std::int64_t kStreamBytes = 12 << 20;

Product start_product(std::int64_t t, std::int64_t reduction, std::int64_t columns,
                      const ConstRows& x, const Rows& y) {
  Product p;
  p.t = t;
  p.reduction = reduction;
  p.columns = columns;
  p.x = x.data;
  p.ldx = x.ld;
  p.y = y.data;
  p.ldy = y.ld;
  p.y_bf16 = y.dtype == DType::kBF16;
  p.stream_y = p.y_bf16 && t * columns * 2 >= kStreamBytes && y.ld * 2 % kCacheLine == 0 &&
               reinterpret_cast<std::uintptr_t>(y.data) % kCacheLine == 0;
  return p;
}

void give_scratch(Product& p, Scratch& scratch, std::int64_t terms, std::int64_t rank_sum) {
  p.scratch_per_thread = thread_bytes(p.t, p.reduction, p.columns, terms, rank_sum);
  p.scratch = scratch.take(p.scratch_per_thread * omp_get_max_threads());
}

// -- input gradient -------------------------------------------------------------------------------

// Columns of dx whose weights are re-tiled at once.
std::int64_t strip_columns(DType format, std::int64_t n, std::int64_t k) {
  const std::int64_t panels = std::max<std::int64_t>(2, kRetileBytesMax / panel_bytes(format, n));
  return std::min(round_up(k, kPanel), panels * kPanel);
}

void retile(const PackedMatrix& w, std::int64_t k_begin, std::int64_t k_end, char* to) {
  const auto* from = static_cast<const char*>(w.data);
  if (w.format == DType::kBF16 && isa() >= Isa::kAvx512Bf16)
    retile_bf16_avx512(from, w.n, w.k, k_begin, k_end, to);
  else
    retile_plain(w, k_begin, k_end, to);
}

}  // namespace

std::int64_t linear_forward_scratch(DType format, std::int64_t t, std::int64_t n, std::int64_t k,
                                    std::int64_t terms, std::int64_t rank_sum,
                                    std::int64_t piece_rank, int threads) {
  const TermSizes all = with_pieces({terms, rank_sum}, piece_rank);
  return terms_bytes(format, n, terms, rank_sum) +
         threads * thread_bytes(t, k, n, all.terms, all.rank_sum);
}

void linear_forward(const PackedMatrix& w, std::int64_t t, ConstRows x, Rows y,
                    const LinearOptions& options, std::span<std::byte> scratch_bytes) {
  check_rows(w.format, x, y);
  Scratch scratch(scratch_bytes);
  Product p = start_product(t, w.k, w.n, x, y);
  p.panels = static_cast<const char*>(w.data);
  p.accumulate = options.accumulate;
  p.bias = options.bias;
  p.bias_bf16 = options.bias_dtype == DType::kBF16;
  for (const LowRankTerm& term : options.low_rank)
    if (term.rank > 0) add_term(p, w.format, term, SmallLayout::kOutByIn, scratch);
  take_pieces(p, w.format, options.pieces);
  const TermSizes sizes = sizes_of(options);
  give_scratch(p, scratch, sizes.terms, sizes.rank_sum);
  run_product(p, w.format);
}

std::int64_t linear_input_grad_scratch(DType format, std::int64_t t, std::int64_t n, std::int64_t k,
                                       std::int64_t terms, std::int64_t rank_sum, int threads) {
  return strip_columns(format, n, k) / kPanel * panel_bytes(format, n) +
         terms_bytes(format, k, terms, rank_sum) + threads * thread_bytes(t, n, k, terms, rank_sum);
}

void linear_input_grad(const PackedMatrix& w, std::int64_t t, ConstRows dy, Rows dx,
                       const LinearOptions& options, std::span<std::byte> scratch_bytes) {
  check_rows(w.format, dy, dx);
  TANDEM_CHECK(options.bias == nullptr && options.pieces.empty(),
               "an input gradient has no bias and no pieces");
  Scratch scratch(scratch_bytes);
  Product whole = start_product(t, w.n, w.k, dy, dx);
  whole.accumulate = options.accumulate;
  for (const LowRankTerm& term : options.low_rank)
    if (term.rank > 0) add_term(whole, w.format, term, SmallLayout::kInByOut, scratch);
  const TermSizes sizes = sizes_of(options);
  const std::int64_t strip = strip_columns(w.format, w.n, w.k);
  char* panels = scratch.take(strip / kPanel * panel_bytes(w.format, w.n));
  give_scratch(whole, scratch, sizes.terms, sizes.rank_sum);
  for (std::int64_t begin = 0; begin < w.k; begin += strip) {
    const std::int64_t end = std::min(w.k, begin + strip);
    retile(w, begin, end, panels);
    Product p = whole;
    p.columns = end - begin;
    p.panels = panels;
    p.y = static_cast<char*>(dx.data) + begin * dtype_bytes(dx.dtype);
    p.terms_count = 0;
    for (std::int64_t i = 0; i < whole.terms_count; ++i) {
      PackedTerm term = whole.terms[i];
      const std::int64_t first = begin / kPanel, last = ceil_div(end, kPanel);
      if (term.panel_end <= first || term.panel_begin >= last) continue;
      const std::int64_t cut = std::max<std::int64_t>(0, first - term.panel_begin);
      term.panels += cut * panel_bytes(w.format, term.rank);
      term.panel_begin = std::max(term.panel_begin, first) - first;
      term.panel_end = std::min(term.panel_end, last) - first;
      p.terms[p.terms_count++] = term;
    }
    run_product(p, w.format);
  }
}

std::int64_t small_product_scratch(DType dtype, std::int64_t t, std::int64_t in, std::int64_t out,
                                   int threads) {
  return round_up(ceil_div(out, kPanel) * panel_bytes(dtype, in), kCacheLine) +
         threads * thread_bytes(t, in, out, 0, 0);
}

void small_product(std::int64_t t, std::int64_t in, std::int64_t out, ConstRows x, ConstRows w,
                   SmallLayout layout, float scale, bool accumulate, Rows y,
                   std::span<std::byte> scratch_bytes) {
  check_rows(w.dtype, x, y);
  Scratch scratch(scratch_bytes);
  Product p = start_product(t, in, out, x, y);
  p.scale = scale;
  p.accumulate = accumulate;
  char* panels = scratch.take(ceil_div(out, kPanel) * panel_bytes(w.dtype, in));
  pack_small(w.dtype, w, layout, out, in, 0, panels);
  p.panels = panels;
  give_scratch(p, scratch, 0, 0);
  run_product(p, w.dtype);
}

void stacked_product(std::int64_t t, std::int64_t in, std::int64_t columns, ConstRows x,
                     std::span<const SmallPart> parts, float scale, Rows y,
                     std::span<std::byte> scratch_bytes) {
  check_rows(x.dtype, x, y);
  for (const SmallPart& part : parts) {
    TANDEM_CHECK(part.column >= 0 && part.out >= 0 && part.column + part.out <= columns, "rows ",
                 part.column, "+", part.out, " of ", columns);
    TANDEM_CHECK(part.w.dtype == x.dtype, "a part is ", dtype_name(part.w.dtype), ", x ",
                 dtype_name(x.dtype));
  }
  Scratch scratch(scratch_bytes);
  Product p = start_product(t, in, columns, x, y);
  p.scale = scale;
  char* panels = scratch.take(ceil_div(columns, kPanel) * panel_bytes(x.dtype, in));
  pack_parts(x.dtype, parts, columns, in, panels);
  p.panels = panels;
  give_scratch(p, scratch, 0, 0);
  run_product(p, x.dtype);
}

}  // namespace tandem::kernels::cpu
