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

// Rows of x from some reduction element on, as a Math reads them: whole steps of kTileK.
template <class Element>
struct XRows {
  const Element* data;
  std::int64_t ld;
};

// Two ways to the same sums over a bf16 panel. Each has
//   Element      what it reads rows of x as
//   kRows        rows whose sums fit the registers
//   prepare()    rows as it reads them, in `to` where the matrix itself does not do
//   sum<R, H>()  R rows times H halves of one panel, from some step on and over `count` elements;
//                c has row stride kPanel

// AVX512-BF16's dot products of pairs.
struct DotPairs {
  using Element = std::uint16_t;
  static constexpr int kRows = 8;

  static XRows<Element> prepare(const void* x, std::int64_t ld, std::int64_t row, std::int64_t rows,
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

  // Two chains per sum where rows are few, to hide the latency.
  template <int R, int>
  static void sum(const Element* x, std::int64_t ld, std::int64_t count, const char* b, bool load,
                  float* c) {
    constexpr int kChains = R <= 4 ? 2 : 1;
    const std::int64_t steps = ceil_div(count, kTileK);
    __m512 sums[kChains][R][2];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < 2; ++j) {
        sums[0][r][j] = load ? _mm512_load_ps(c + r * kPanel + j * 16) : _mm512_setzero_ps();
        if constexpr (kChains > 1) sums[1][r][j] = _mm512_setzero_ps();
      }
    for (std::int64_t s = 0; s < steps; ++s) {
      TANDEM_UNROLL(16)
      for (int pair = 0; pair < 16; ++pair) {
        const __m512i b0 = _mm512_load_si512(b + pair * 64);
        const __m512i b1 = _mm512_load_si512(b + 1024 + pair * 64);
        TANDEM_UNROLL(8)
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
};

// f32 multiply-adds: x is widened once per task, the panel in registers, four shifts and masks for
// 4 R multiply-adds. The faster way where a dot product of pairs starts every other cycle while two
// multiply-adds start in each. A sum is one chain in ascending order, so its bits depend on its own
// row alone.
struct MultiplyAdds {
  using Element = float;
  static constexpr int kRows = 12;

  static XRows<Element> prepare(const void* x, std::int64_t ld, std::int64_t row, std::int64_t rows,
                                std::int64_t begin, std::int64_t end, char* to) {
    auto* out = reinterpret_cast<float*>(to);
    const std::int64_t padded = round_up(end - begin, kTileK);
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < padded; j += 16)
        _mm512_storeu_ps(out + i * padded + j, load_lanes(x, true, (row + i) * ld + begin + j,
                                                          lane_mask(end - begin - j)));
    return {out, padded};
  }

  template <int R, int Halves>
  TANDEM_ALWAYS_INLINE static void add_pair(const float* x, std::int64_t ld, const char* b,
                                            __m512 (&sums)[R][Halves]) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    __m512 even[Halves], odd[Halves];
    for (int j = 0; j < Halves; ++j) {
      const __m512i pairs = _mm512_load_si512(b + j * 1024);
      even[j] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
      odd[j] = _mm512_castsi512_ps(_mm512_and_si512(pairs, high));
    }
    TANDEM_UNROLL(24)
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < Halves; ++j)
        sums[r][j] = _mm512_fmadd_ps(_mm512_set1_ps(x[r * ld]), even[j], sums[r][j]);
    TANDEM_UNROLL(24)
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < Halves; ++j)
        sums[r][j] = _mm512_fmadd_ps(_mm512_set1_ps(x[r * ld + 1]), odd[j], sums[r][j]);
  }

  template <int R, int Halves>
  static void sum(const float* x, std::int64_t ld, std::int64_t count, const char* b, bool load,
                  float* c) {
    __m512 sums[R][Halves];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < Halves; ++j)
        sums[r][j] = load ? _mm512_load_ps(c + r * kPanel + j * 16) : _mm512_setzero_ps();
    const std::int64_t steps = count / kTileK, last = ceil_div(count % kTileK, 2);
    for (std::int64_t s = 0; s < steps; ++s, b += 2048, x += kTileK) {
      TANDEM_UNROLL(16)
      for (int pair = 0; pair < 16; ++pair)
        add_pair<R, Halves>(x + pair * 2, ld, b + pair * 64, sums);
    }
    for (std::int64_t pair = 0; pair < last; ++pair)
      add_pair<R, Halves>(x + pair * 2, ld, b + pair * 64, sums);
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < Halves; ++j) _mm512_store_ps(c + r * kPanel + j * 16, sums[r][j]);
  }
};

template <class Math, int H, int R = Math::kRows>
void sum_rows(std::int64_t rows, const typename Math::Element* x, std::int64_t ld,
              std::int64_t count, const char* b, bool load, float* c) {
  if constexpr (R > 1) {
    if (rows < R) return sum_rows<Math, H, R - 1>(rows, x, ld, count, b, load, c);
  }
  Math::template sum<R, H>(x, ld, count, b, load, c);
}

struct Task {
  std::int64_t row, rows, panel_begin, panel_end;
};

// Adds the pieces to the sums c of one panel, all rows of the task.
template <class Math, int H>
void add_pieces(const Product& p, const Task& task, std::int64_t panel, float* c, char* scratch) {
  for (std::int64_t i = 0; i < p.pieces_count; ++i) {
    const LowRankPiece& piece = p.pieces[i];
    const PieceRows rows = piece_rows(piece, panel, task.row, task.rows);
    if (rows.begin >= rows.end) continue;
    pack_piece_bf16_avx512(piece, panel, scratch);
    const auto u = Math::prepare(piece.u.data, piece.u.ld, rows.begin, rows.end - rows.begin, 0,
                                 piece.rank, scratch + panel_bytes(DType::kBF16, piece.rank));
    for (std::int64_t row = rows.begin; row < rows.end; row += Math::kRows)
      sum_rows<Math, H>(min_of(Math::kRows, rows.end - row), u.data + (row - rows.begin) * u.ld,
                        u.ld, piece.rank, scratch, true, c + (row - task.row) * kPanel);
  }
}

template <class Math, int H>
void run_task(const Product& p, const Task& task, char* scratch) {
  using Element = typename Math::Element;
  const std::int64_t stretch = reduction_block(p.t, p.reduction);
  char* x_block = scratch;
  scratch += task.rows * stretch * static_cast<std::int64_t>(sizeof(Element));
  XRows<Element> u[kTermsMax];
  for (std::int64_t i = 0; i < p.terms_count; ++i) {
    const PackedTerm& term = p.terms[i];
    u[i] = Math::prepare(term.u, term.ldu, task.row, task.rows, 0, term.rank, scratch);
    scratch += task.rows * round_up(term.rank, kTileK) * static_cast<std::int64_t>(sizeof(Element));
  }
  auto* parked = reinterpret_cast<float*>(round_up(reinterpret_cast<std::int64_t>(scratch), 64));
  alignas(64) float local[Math::kRows * kPanel];
  // With pieces, a panel's sums of all rows wait for them, where they are not parked anyway.
  const bool pieces = p.pieces_count > 0, park = p.reduction > stretch;
  const std::int64_t padded_rows = round_up(task.rows, 32);
  const std::int64_t parked_panels = park ? task.panel_end - task.panel_begin : pieces ? 1 : 0;
  auto* piece_scratch = reinterpret_cast<char*>(parked + parked_panels * padded_rows * kPanel);
  // Groups of rows as even as they come: a last group of few would waste what a panel's walk costs.
  const std::int64_t group = ceil_div(task.rows, ceil_div(task.rows, Math::kRows));
  for (std::int64_t begin = 0; begin < p.reduction; begin += stretch) {
    const std::int64_t end = min_of(p.reduction, begin + stretch);
    const XRows<Element> x = Math::prepare(p.x, p.ldx, task.row, task.rows, begin, end, x_block);
    for (std::int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
      const char* b =
          p.panels + panel * panel_bytes(DType::kBF16, p.reduction) + begin * kPanel * 2;
      for (std::int64_t row = 0; row < task.rows; row += group) {
        const std::int64_t rows = min_of(group, task.rows - row);
        float* c = park     ? parked + ((panel - task.panel_begin) * padded_rows + row) * kPanel
                   : pieces ? parked + row * kPanel
                            : local;
        sum_rows<Math, H>(rows, x.data + row * x.ld, x.ld, end - begin, b, begin > 0, c);
        if (end < p.reduction) continue;
        for (std::int64_t i = 0; i < p.terms_count; ++i) {
          const PackedTerm& term = p.terms[i];
          if (panel < term.panel_begin || panel >= term.panel_end) continue;
          sum_rows<Math, H>(
              rows, u[i].data + row * u[i].ld, u[i].ld, term.rank,
              term.panels + (panel - term.panel_begin) * panel_bytes(DType::kBF16, term.rank), true,
              c);
        }
        if (pieces) continue;
        Finished finished{c, task.row + row, rows, panel * kPanel};
        write_rows(p, finished, rows);
      }
      if (!pieces || end < p.reduction) continue;
      float* c = parked + (park ? (panel - task.panel_begin) * padded_rows * kPanel : 0);
      add_pieces<Math, H>(p, task, panel, c, piece_scratch);
      Finished finished{c, task.row, task.rows, panel * kPanel};
      write_rows(p, finished, task.rows);
    }
  }
}

// Rows of a task where the output is so narrow that its panels are no work for several threads.
constexpr std::int64_t kNarrowPanels = 2, kNarrowRows = 24;

template <class Math, int H>
void run_product(const Product& p) {
  const std::int64_t panels = ceil_div(p.columns, kPanel);
  const bool narrow = panels <= kNarrowPanels;
  const std::int64_t row_block = narrow ? kNarrowRows : kRowBlock;
  const std::int64_t row_blocks = ceil_div(p.t, row_block);
#pragma omp parallel if (p.t * p.reduction * p.columns > kParallelMin)
  {
    const std::int64_t threads = omp_get_num_threads(), id = omp_get_thread_num();
    char* scratch = p.scratch + id * p.scratch_per_thread;
    if (p.t <= kStreamRows && !narrow) {
      const std::int64_t begin = panels * id / threads, end = panels * (id + 1) / threads;
      if (begin < end) run_task<Math, H>(p, {0, p.t, begin, end}, scratch);
    } else {
      constexpr std::int64_t kWidth = kParkedColumns / kPanel;
      const std::int64_t splits = ceil_div(panels, kWidth);
#pragma omp for schedule(dynamic)
      for (std::int64_t i = 0; i < row_blocks * splits; ++i) {
        const std::int64_t row = i / splits * row_block, panel = i % splits * kWidth;
        run_task<Math, H>(
            p, {row, min_of(row_block, p.t - row), panel, min_of(panels, panel + kWidth)}, scratch);
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
  run_product<DotPairs, 2>(p);
}
void product_bf16_fma(const Product& p) {
  p.columns <= kPanel / 2 ? run_product<MultiplyAdds, 1>(p) : run_product<MultiplyAdds, 2>(p);
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

void pack_parts_bf16_avx512(const SmallPart* parts, std::int64_t count, std::int64_t columns,
                            std::int64_t in, char* to) {
  const std::int64_t stride = panel_bytes(DType::kBF16, in);
  const std::int64_t tiles = ceil_div(columns, kPanel) * 2, steps = ceil_div(in, kTileK);
#pragma omp parallel for schedule(static) if (tiles * in > 4096)
  for (std::int64_t step = 0; step < tiles * steps; ++step) {
    const std::int64_t tile = step / steps, j = step % steps * kTileK;
    const std::int64_t valid = min_of(kTileK, in - j);
    const __mmask32 m = valid >= 32 ? ~__mmask32{0} : ((__mmask32{1} << valid) - 1);
    __m512i r[16];
    for (int i = 0; i < 16; ++i) {
      const char* row = part_row(parts, count, tile * 16 + i, 2);
      r[i] = row != nullptr ? _mm512_maskz_loadu_epi16(m, row + j * 2) : _mm512_setzero_si512();
    }
    transpose_16x16(r);
    char* block = to + tile / 2 * stride + j * kPanel * 2 + tile % 2 * 1024;
    for (int i = 0; i < 16; ++i) _mm512_store_si512(block + i * 64, r[i]);
  }
}

void pack_piece_bf16_avx512(const LowRankPiece& piece, std::int64_t panel, char* to) {
  const auto* from = static_cast<const std::uint16_t*>(piece.v.data);
  const std::int64_t first = panel * kPanel - piece.begin;
  for (std::int64_t j = 0; j < piece.rank; j += kTileK)
    for (std::int64_t half = 0; half < 2; ++half) {
      const std::int64_t valid = min_of(kTileK, piece.rank - j);
      const __mmask32 m = valid >= 32 ? ~__mmask32{0} : ((__mmask32{1} << valid) - 1);
      __m512i r[16];
      for (std::int64_t i = 0; i < 16; ++i) {
        const std::int64_t row = first + half * 16 + i;
        r[i] = row >= 0 && row < piece.count
                   ? _mm512_maskz_loadu_epi16(m, from + row * piece.v.ld + j)
                   : _mm512_setzero_si512();
      }
      transpose_16x16(r);
      for (int i = 0; i < 16; ++i)
        _mm512_store_si512(to + j * kPanel * 2 + half * 1024 + i * 64, r[i]);
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
