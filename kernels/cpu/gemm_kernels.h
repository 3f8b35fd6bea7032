// Private to kernels/cpu: one product over packed panels, as the drivers in gemm.cc state it and
// the per-instruction-set files run it. Plain data only (see gemm_layout.h about inline functions).
#pragma once

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

inline constexpr std::int64_t kTermsMax = 16;

/// y[t, columns] (+)= scale * x[t, reduction] * panels, + bias, + terms.
struct Product {
  std::int64_t t = 0, reduction = 0, columns = 0;
  const void* x = nullptr;  ///< f32 or bf16 like the panels
  std::int64_t ldx = 0;
  const char* panels = nullptr;  ///< panel_bytes(format, reduction) apart
  void* y = nullptr;
  std::int64_t ldy = 0;
  bool y_bf16 = false;
  bool accumulate = false;
  float scale = 1.0f;
  const void* bias = nullptr;
  bool bias_bf16 = false;
  PackedTerm terms[kTermsMax];
  std::int64_t terms_count = 0;
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
/// (as f32), one panel as f32, parked sums. `rank_padded` is the sum of the terms' ranks, each
/// rounded up to kTileK.
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
void product_bf16_avx512(const Product& p);  ///< AVX512-BF16
/// Panels from `from` (panels of 32 n over k) to `to` (panels of 32 k over n), for k in
/// [k_begin, k_end), multiples of 32 but for the end.
void retile_bf16_avx512(const char* from, std::int64_t n, std::int64_t k, std::int64_t k_begin,
                        std::int64_t k_end, char* to);
/// bf16 w to panels in which `out` is the column and `in` the reduction; column o of w becomes
/// column out_shift + o (0 <= out_shift < 32), the others are zero.
void pack_bf16_out_by_in(const void* w, std::int64_t ld, std::int64_t out, std::int64_t in,
                         std::int64_t out_shift, char* to);  ///< w [out, in]
void pack_bf16_in_by_out(const void* w, std::int64_t ld, std::int64_t in, std::int64_t out,
                         std::int64_t out_shift, char* to);  ///< w [in, out]

}  // namespace tandem::kernels::cpu
