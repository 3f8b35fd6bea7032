// Private to kernels/cpu: one product over packed panels, as the drivers in gemm.cc state it and
// the per-instruction-set files run it. Plain data only (see gemm_layout.h about inline functions).
#pragma once

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/gemm_layout.h"

namespace tandem::kernels::cpu {

/// Low-rank terms that share a range of columns, packed as panels [panel_begin, panel_end) of the
/// output with the concatenated ranks as their reduction.
struct PackedTerm {
  std::int64_t panel_begin = 0, panel_end = 0;
  std::int64_t rank = 0;         ///< reduction length, not padded
  const char* panels = nullptr;  ///< of panel_begin; panel_bytes(format, rank) apart
  const void* u = nullptr;       ///< [T, rank]
  std::int64_t ldu = 0;
};

inline constexpr std::int64_t kTermsMax = 16;  ///< kLowRankTermsMax of gemm.h

/// The rows of [row, row + rows) that a piece has, if it has columns of `panel`.
struct PieceRows {
  std::int64_t begin = 0, end = 0;
};
TANDEM_ALWAYS_INLINE PieceRows piece_rows(const LowRankPiece& piece, std::int64_t panel,
                                          std::int64_t row, std::int64_t rows) {
  if (piece.begin >= (panel + 1) * kPanel || piece.begin + piece.count <= panel * kPanel)
    return {0, 0};
  return {max_of(piece.row_begin, row), min_of(piece.row_end, row + rows)};
}

/// Where row `row` of the parts' matrix lies; null: it is zero. `size`: bytes of an element.
TANDEM_ALWAYS_INLINE const char* part_row(const SmallPart* parts, std::int64_t count,
                                          std::int64_t row, std::int64_t size) {
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t at = row - parts[i].column;
    if (at >= 0 && at < parts[i].out)
      return static_cast<const char*>(parts[i].w.data) + at * parts[i].w.ld * size;
  }
  return nullptr;
}

/// y[t, columns] (+)= scale * x[t, reduction] * panels, + bias, + terms, + pieces.
struct Product {
  std::int64_t t = 0, reduction = 0, columns = 0;
  const void* x = nullptr;  ///< f32 or bf16 like the panels
  std::int64_t ldx = 0;
  const char* panels = nullptr;  ///< panel_bytes(format, reduction) apart
  void* y = nullptr;
  std::int64_t ldy = 0;
  bool y_bf16 = false;
  bool stream_y = false;  ///< bf16 rows of whole, aligned cache lines go past the caches
  bool accumulate = false;
  float scale = 1.0f;
  const void* bias = nullptr;
  bool bias_bf16 = false;
  PackedTerm terms[kTermsMax];
  std::int64_t terms_count = 0;
  const LowRankPiece* pieces = nullptr;
  std::int64_t pieces_count = 0;
  char* scratch = nullptr;  ///< threads * product_scratch_per_thread bytes
  std::int64_t scratch_per_thread = 0;
};

/// Up to this many rows a product is bound by reading the weights: no blocking over the reduction.
inline constexpr std::int64_t kStreamRows = 32;

/// Reduction elements walked before sums are parked: even pieces of at most kReductionBlock.
TANDEM_ALWAYS_INLINE constexpr std::int64_t reduction_block(std::int64_t t,
                                                            std::int64_t reduction) {
  if (t <= kStreamRows) return round_up(reduction, kTileK);
  return round_up(ceil_div(reduction, max_of(1, ceil_div(reduction, kReductionBlock))), kTileK);
}

/// Bytes each thread needs to run a product, whichever file runs it: rows of x and of the terms' u
/// (as f32), one panel as f32, sums of one panel, parked sums. `rank_padded` is the sum of the
/// terms' ranks and the largest of the pieces', each rounded up to kTileK.
TANDEM_ALWAYS_INLINE constexpr std::int64_t product_scratch_per_thread(std::int64_t t,
                                                                       std::int64_t reduction,
                                                                       std::int64_t columns,
                                                                       std::int64_t rank_padded) {
  const std::int64_t rows = min_of(kRowBlock, round_up(t, 32));
  const std::int64_t block = reduction_block(t, reduction);
  const std::int64_t parked =
      reduction > block ? rows * min_of(round_up(columns, kPanel), kParkedColumns) * 4 : 0;
  return round_up(((rows + kPanel) * (block + rank_padded) + rows * kPanel) * 4 + parked,
                  kCacheLine);
}

// Each runs on omp_get_max_threads() threads. product_widened_*: bf16 operands in f32 arithmetic.
void product_f32_avx512(const Product& p);
void product_f32_avx2(const Product& p);
void product_f32_generic(const Product& p);
void product_widened_avx512(const Product& p);
void product_widened_avx2(const Product& p);
void product_widened_generic(const Product& p);
void product_bf16_amx(const Product& p);
void product_bf16_avx512(const Product& p);  ///< AVX512-BF16, dot products of pairs
void product_bf16_fma(const Product& p);     ///< AVX512-BF16, f32 multiply-adds
/// Panels from `from` (panels of 32 n over k) to `to` (panels of 32 k over n), for k in
/// [k_begin, k_end), multiples of 32 but for the end.
void retile_bf16_avx512(const char* from, std::int64_t n, std::int64_t k, std::int64_t k_begin,
                        std::int64_t k_end, char* to);
/// `rows` (at most 32) rows of k elements, f32 (rounded; denormals to zero) or bf16, to one panel.
void pack_panel_bf16_avx512(const void* from, bool from_f32, std::int64_t ld, std::int64_t rows,
                            std::int64_t k, char* panel);
/// The rows of bf16 parts to panels over `in`, panels of `columns` columns in all; zero where no
/// part is.
void pack_parts_bf16_avx512(const SmallPart* parts, std::int64_t count, std::int64_t columns,
                            std::int64_t in, char* to);
/// bf16 w [in, out] to panels in which `out` is the column and `in` the reduction; column o of w
/// becomes column out_shift + o (0 <= out_shift < 32), the others are zero.
void pack_bf16_in_by_out(const void* w, std::int64_t ld, std::int64_t in, std::int64_t out,
                         std::int64_t out_shift, char* to);
/// What of a bf16 piece's v meets one panel of the output: a panel of panel_bytes(kBF16, rank).
void pack_piece_bf16_avx512(const LowRankPiece& piece, std::int64_t panel, char* to);

// -- weight gradients -----------------------------------------------------------------------------

/// c += alpha * x^T y over t rows, x [t, few], y [t, many]; c [few, many], or [many, few] when
/// transposed. A task owns columns of y and walks all rows in ascending order: no partial sums, so
/// the bits do not depend on who does what.
struct Outer {
  std::int64_t t = 0, few = 0, many = 0;
  const void* x = nullptr;
  std::int64_t ldx = 0;
  const void* y = nullptr;
  std::int64_t ldy = 0;
  bool bf16_rows = false;
  float alpha = 1.0f;
  float* c = nullptr;
  std::int64_t ldc = 0;
  bool transposed = false;
  char* few_packed = nullptr;  ///< outer_few_bytes
  float* sums = nullptr;       ///< outer_sums_bytes: [few padded to 32, many padded to 32]
  char* per_thread = nullptr;  ///< kOuterBytesPerThread each
};

inline constexpr std::int64_t kOuterRows = 64;     ///< rows of y turned into tiles at a time
inline constexpr std::int64_t kOuterColumns = 32;  ///< columns of y per task step
inline constexpr std::int64_t kOuterBytesPerThread = kOuterRows * kOuterColumns * 4;

TANDEM_ALWAYS_INLINE constexpr std::int64_t outer_few_bytes(std::int64_t t, std::int64_t few) {
  return round_up(t, 32) * round_up(few, 32) * 4;
}
TANDEM_ALWAYS_INLINE constexpr std::int64_t outer_sums_bytes(std::int64_t few, std::int64_t many) {
  return round_up(few, 32) * round_up(many, 32) * 4;
}

void outer_bf16_amx(const Outer& o);
void outer_avx512(const Outer& o);
void outer_avx2(const Outer& o);
void outer_generic(const Outer& o);

}  // namespace tandem::kernels::cpu
