// bf16 products on AVX512-BF16 and the layout changes that want AVX-512. Called where isa() is at
// least kAvx512Bf16.
#include "kernels/cpu/gemm_kernels.h"
#include "kernels/cpu/gemm_write_avx512.h"
#include "kernels/cpu/simd_bf16.h"

#include <immintrin.h>
#include <omp.h>

#include <cstring>

namespace tandem::kernels::cpu {
namespace {

TANDEM_ALWAYS_INLINE __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// Rows of x, row-major with `ld` elements, `pairs` pairs each; b: the panel from that element on.
// Two chains per sum where rows are few, to hide the latency.
template <int R>
void sum_rows(const std::uint16_t* x, std::int64_t ld, std::int64_t steps, const char* b, bool load,
              float* c) {
  constexpr int kChains = R <= 4 ? 2 : 1;
  __m512 sums[kChains][R][2];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 2; ++j) {
      sums[0][r][j] = load ? _mm512_load_ps(c + r * kPanel + j * 16) : _mm512_setzero_ps();
      if constexpr (kChains > 1) sums[1][r][j] = _mm512_setzero_ps();
    }
  for (std::int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 16
    for (int pair = 0; pair < 16; ++pair) {
      const __m512i b0 = _mm512_load_si512(b + pair * 64);
      const __m512i b1 = _mm512_load_si512(b + 1024 + pair * 64);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        std::int32_t two;
        std::memcpy(&two, x + r * ld + s * kTileK + pair * 2, 4);
        const __m512i a = _mm512_set1_epi32(two);
        sums[pair % kChains][r][0] = dot_pairs(sums[pair % kChains][r][0], a, b0);
        sums[pair % kChains][r][1] = dot_pairs(sums[pair % kChains][r][1], a, b1);
      }
    }
    b += 2048;
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 2; ++j) {
      __m512 sum = sums[0][r][j];
      if constexpr (kChains > 1) sum = _mm512_add_ps(sum, sums[1][r][j]);
      _mm512_store_ps(c + r * kPanel + j * 16, sum);
    }
}

void sum_any_rows(std::int64_t rows, const std::uint16_t* x, std::int64_t ld, std::int64_t steps,
                  const char* b, bool load, float* c) {
  switch (rows) {
    case 1:
      return sum_rows<1>(x, ld, steps, b, load, c);
    case 2:
      return sum_rows<2>(x, ld, steps, b, load, c);
    case 3:
      return sum_rows<3>(x, ld, steps, b, load, c);
    case 4:
      return sum_rows<4>(x, ld, steps, b, load, c);
    case 5:
      return sum_rows<5>(x, ld, steps, b, load, c);
    case 6:
      return sum_rows<6>(x, ld, steps, b, load, c);
    case 7:
      return sum_rows<7>(x, ld, steps, b, load, c);
    default:
      return sum_rows<8>(x, ld, steps, b, load, c);
  }
}

// Rows padded to whole steps with zeros, when the matrix itself cannot be read in whole steps.
struct PaddedRows {
  const std::uint16_t* data;
  std::int64_t ld;
};
PaddedRows pad_rows(const void* x, std::int64_t ld, std::int64_t row, std::int64_t rows,
                    std::int64_t begin, std::int64_t end, char* to) {
  const auto* from = static_cast<const std::uint16_t*>(x) + row * ld + begin;
  if ((end - begin) % kTileK == 0) return {from, ld};
  auto* out = reinterpret_cast<std::uint16_t*>(to);
  const std::int64_t padded = round_up(end - begin, kTileK);
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < padded; j += kTileK) {
      const std::int64_t valid = min_of(kTileK, end - begin - j);
      const __mmask32 m = valid >= 32 ? ~__mmask32{0} : ((__mmask32{1} << valid) - 1);
      _mm512_storeu_si512(out + i * padded + j, _mm512_maskz_loadu_epi16(m, from + i * ld + j));
    }
  return {out, padded};
}

struct Task {
  std::int64_t row, rows, panel_begin, panel_end;
};

void run_task(const Product& p, const Task& task, char* scratch) {
  const std::int64_t stretch = reduction_block(p.t, p.reduction);
  char* x_block = scratch;
  scratch += task.rows * stretch * 2;
  PaddedRows u[kTermsMax];
  for (std::int64_t i = 0; i < p.terms_count; ++i) {
    const PackedTerm& term = p.terms[i];
    u[i] = pad_rows(term.u, term.ldu, task.row, task.rows, 0, term.rank, scratch);
    scratch += task.rows * round_up(term.rank, kTileK) * 2;
  }
  auto* parked = reinterpret_cast<float*>(round_up(reinterpret_cast<std::int64_t>(scratch), 64));
  alignas(64) float local[8 * kPanel];
  for (std::int64_t begin = 0; begin < p.reduction; begin += stretch) {
    const std::int64_t end = min_of(p.reduction, begin + stretch);
    const std::int64_t steps = ceil_div(end - begin, kTileK);
    const PaddedRows x = pad_rows(p.x, p.ldx, task.row, task.rows, begin, end, x_block);
    for (std::int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
      const char* b =
          p.panels + panel * panel_bytes(DType::kBF16, p.reduction) + begin * kPanel * 2;
      for (std::int64_t row = 0; row < task.rows; row += 8) {
        const std::int64_t rows = min_of(8, task.rows - row);
        float* c =
            p.reduction > stretch
                ? parked + ((panel - task.panel_begin) * round_up(task.rows, 32) + row) * kPanel
                : local;
        sum_any_rows(rows, x.data + row * x.ld, x.ld, steps, b, begin > 0, c);
        if (end < p.reduction) continue;
        for (std::int64_t i = 0; i < p.terms_count; ++i) {
          const PackedTerm& term = p.terms[i];
          if (panel < term.panel_begin || panel >= term.panel_end) continue;
          sum_any_rows(
              rows, u[i].data + row * u[i].ld, u[i].ld, ceil_div(term.rank, kTileK),
              term.panels + (panel - term.panel_begin) * panel_bytes(DType::kBF16, term.rank), true,
              c);
        }
        Finished finished{c, task.row + row, rows, panel * kPanel};
        write_rows(p, finished, rows);
      }
    }
  }
}

// One 32 x 32 block: W[n, k] as two tiles over n to two tiles over k.
void retile_block(const char* from, char* to) {
  for (int half = 0; half < 2; ++half) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(from + half * 1024 + i * 64);
    transpose_16x16(r);  // r[i] is now row i of W: 32 consecutive k
    for (int i = 0; i < 8; ++i) {
      __m512i lo, hi;
      zip_words(r[2 * i], r[2 * i + 1], lo, hi);
      _mm512_store_si512(to + (half * 8 + i) * 64, lo);
      _mm512_store_si512(to + 1024 + (half * 8 + i) * 64, hi);
    }
  }
}

}  // namespace

void product_bf16_avx512(const Product& p) {
  const std::int64_t panels = ceil_div(p.columns, kPanel);
  const std::int64_t row_blocks = ceil_div(p.t, kRowBlock);
#pragma omp parallel if (p.t * p.reduction * p.columns > kParallelMin)
  {
    const std::int64_t threads = omp_get_num_threads(), id = omp_get_thread_num();
    char* scratch = p.scratch + id * p.scratch_per_thread;
    if (p.t <= kStreamRows) {
      const std::int64_t begin = panels * id / threads, end = panels * (id + 1) / threads;
      if (begin < end) run_task(p, {0, p.t, begin, end}, scratch);
    } else {
      constexpr std::int64_t kWidth = kParkedColumns / kPanel;
      const std::int64_t splits = ceil_div(panels, kWidth);
#pragma omp for schedule(dynamic)
      for (std::int64_t i = 0; i < row_blocks * splits; ++i) {
        const std::int64_t row = i / splits * kRowBlock, panel = i % splits * kWidth;
        run_task(p, {row, min_of(kRowBlock, p.t - row), panel, min_of(panels, panel + kWidth)},
                 scratch);
      }
    }
  }
}

void retile_bf16_avx512(const char* from, std::int64_t n, std::int64_t k, std::int64_t k_begin,
                        std::int64_t k_end, char* to) {
  const std::int64_t from_panel = panel_bytes(DType::kBF16, k),
                     to_panel = panel_bytes(DType::kBF16, n);
  const std::int64_t n_panels = ceil_div(n, kPanel);
#pragma omp parallel for schedule(static)
  for (std::int64_t i = 0; i < n_panels; ++i)
    for (std::int64_t j = k_begin; j < k_end; j += kPanel)
      retile_block(from + i * from_panel + j * kPanel * 2,
                   to + (j - k_begin) / kPanel * to_panel + i * 2048);
}

void pack_panel_bf16_avx512(const void* from, bool from_f32, std::int64_t ld, std::int64_t rows,
                            std::int64_t k, char* panel) {
  for (std::int64_t j = 0; j < k; j += kTileK)
    for (std::int64_t half = 0; half < 2; ++half) {
      const std::int64_t valid = min_of(kTileK, k - j);
      const __mmask32 m = valid >= 32 ? ~__mmask32{0} : ((__mmask32{1} << valid) - 1);
      __m512i r[16];
      for (std::int64_t i = 0; i < 16; ++i) {
        const std::int64_t row = half * 16 + i, at = row * ld + j;
        if (row >= rows) {
          r[i] = _mm512_setzero_si512();
        } else if (from_f32) {
          const auto* x = static_cast<const float*>(from) + at;
          r[i] = reinterpret_cast<__m512i>(
              _mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(static_cast<__mmask16>(m >> 16), x + 16),
                                  _mm512_maskz_loadu_ps(static_cast<__mmask16>(m), x)));
        } else {
          r[i] = _mm512_maskz_loadu_epi16(m, static_cast<const std::uint16_t*>(from) + at);
        }
      }
      transpose_16x16(r);
      for (int i = 0; i < 16; ++i)
        _mm512_store_si512(panel + j * kPanel * 2 + half * 1024 + i * 64, r[i]);
    }
}

// Row-major rows (the out index) to panels; `count` columns of reduction.
void pack_bf16_out_by_in(const void* w, std::int64_t ld, std::int64_t out, std::int64_t in,
                         std::int64_t out_shift, char* to) {
  const auto* from = static_cast<const std::uint16_t*>(w);
  const std::int64_t stride = panel_bytes(DType::kBF16, in);
  const std::int64_t tiles = ceil_div(out_shift + out, kPanel) * 2;
#pragma omp parallel for schedule(static) if (tiles * in > 4096)
  for (std::int64_t tile = 0; tile < tiles; ++tile)
    for (std::int64_t j = 0; j < in; j += kTileK) {
      const std::int64_t valid = min_of(kTileK, in - j);
      const __mmask32 m = valid >= 32 ? ~__mmask32{0} : ((__mmask32{1} << valid) - 1);
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        const std::int64_t row = tile * 16 + i - out_shift;
        r[i] = row >= 0 && row < out ? _mm512_maskz_loadu_epi16(m, from + row * ld + j)
                                     : _mm512_setzero_si512();
      }
      transpose_16x16(r);
      char* block = to + tile / 2 * stride + j * kPanel * 2 + tile % 2 * 1024;
      for (int i = 0; i < 16; ++i) _mm512_store_si512(block + i * 64, r[i]);
    }
}

// Row-major rows (the reduction index) to panels.
void pack_bf16_in_by_out(const void* w, std::int64_t ld, std::int64_t in, std::int64_t out,
                         std::int64_t out_shift, char* to) {
  const auto* from = static_cast<const std::uint16_t*>(w);
  const std::int64_t stride = panel_bytes(DType::kBF16, in);
  const std::int64_t panels = ceil_div(out_shift + out, kPanel);
#pragma omp parallel for schedule(static) if (panels * in > 256)
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    const std::int64_t column = panel * kPanel - out_shift;
    const std::int64_t skip = max_of(0, -column), valid = min_of(kPanel, out - column);
    const __mmask32 m =
        (valid >= 32 ? ~__mmask32{0} : ((__mmask32{1} << valid) - 1)) & (~__mmask32{0} << skip);
    for (std::int64_t i = 0; i < round_up(in, kTileK); i += 2) {
      const __m512i a =
          i < in ? _mm512_maskz_loadu_epi16(m, from + i * ld + column) : _mm512_setzero_si512();
      const __m512i b = i + 1 < in ? _mm512_maskz_loadu_epi16(m, from + (i + 1) * ld + column)
                                   : _mm512_setzero_si512();
      __m512i lo, hi;
      zip_words(a, b, lo, hi);
      char* row = to + panel * stride + i / kTileK * 2048 + i % kTileK / 2 * 64;
      _mm512_store_si512(row, lo);
      _mm512_store_si512(row + 1024, hi);
    }
  }
}

}  // namespace tandem::kernels::cpu
