// The f32 products, included by one file per instruction set, which defines TANDEM_ISA_NAME(x) and
// kRowsMax (rows whose sums fit the registers) before. A sum is one chain over the reduction in
// ascending order, whatever rows or panels are computed beside it: chains are hidden behind each
// other, never split. Chains longer than kStretch are parked in y between stretches, which is
// exact.
#include "kernels/cpu/gemm_kernels.h"
#include "kernels/cpu/simd16.h"

#include <omp.h>

namespace tandem::kernels::cpu {
namespace {

constexpr std::int64_t kStretch = 256;  // one stretch of a panel is 32 KiB: it stays in L1
constexpr std::int64_t kRowsF32 = 192;
constexpr std::int64_t kPanelsF32 = 8;

// Sums of R rows and P panels; y starts at the first panel's column. `valid` columns of the last
// panel exist.
template <int R, int P>
void sum_rows(const float* x, std::int64_t ldx, std::int64_t count, const float* panel,
              std::int64_t panel_stride, bool load, float* y, std::int64_t ldy,
              std::int64_t valid) {
  V sums[R][P * 2];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < P * 2; ++j) {
      const std::int64_t lanes = min_of(16, max_of(0, valid + (P - 1) * kPanel - j * 16));
      sums[r][j] =
          load ? (lanes == 16 ? vload(y + r * ldy + j * 16) : vload_n(y + r * ldy + j * 16, lanes))
               : vset(0.0f);
    }
  for (std::int64_t k = 0; k < count; ++k) {
    V b[P * 2];
    TANDEM_UNROLL(8)
    for (int j = 0; j < P * 2; ++j)
      b[j] = vload(panel + (j / 2) * panel_stride + k * kPanel + (j % 2) * 16);
    TANDEM_UNROLL(16)
    for (int r = 0; r < R; ++r) {
      const V a = vset(x[r * ldx + k]);
      TANDEM_UNROLL(8)
      for (int j = 0; j < P * 2; ++j) sums[r][j] = vfma(a, b[j], sums[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < P * 2; ++j) {
      const std::int64_t lanes = min_of(16, max_of(0, valid + (P - 1) * kPanel - j * 16));
      if (lanes == 16)
        vstore(y + r * ldy + j * 16, sums[r][j]);
      else
        vstore_n(y + r * ldy + j * 16, lanes, sums[r][j]);
    }
}

template <int R>
void sum_upto(std::int64_t rows, const float* x, std::int64_t ldx, std::int64_t count,
              const float* panel, bool load, float* y, std::int64_t ldy, std::int64_t valid) {
  if constexpr (R > 1) {
    if (rows < R) return sum_upto<R - 1>(rows, x, ldx, count, panel, load, y, ldy, valid);
  }
  sum_rows<R, 1>(x, ldx, count, panel, 0, load, y, ldy, valid);
}

// Adds one stretch of the reduction to rows x valid columns of y.
void add_stretch(std::int64_t rows, const float* x, std::int64_t ldx, std::int64_t count,
                 const float* panel, bool load, float* y, std::int64_t ldy, std::int64_t valid) {
  while (rows > 0) {
    const std::int64_t now = min_of(rows, kRowsMax);
    sum_upto<kRowsMax>(now, x, ldx, count, panel, load, y, ldy, valid);
    rows -= now;
    x += now * ldx;
    y += now * ldy;
  }
}

float widened(bf16 x) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(x.bits) << 16);
}

float bias_at(const Product& p, std::int64_t j) {
  return p.bias_bf16 ? widened(static_cast<const bf16*>(p.bias)[j])
                     : static_cast<const float*>(p.bias)[j];
}

struct Task {
  std::int64_t row, rows, panel_begin, panel_end;
};

// y starts as 0 (nothing to load), the bias, the old y, or old y + bias. True: load it.
bool start_sums(const Product& p, const Task& task) {
  if (p.bias == nullptr) return p.accumulate;
  const std::int64_t end = min_of(p.columns, task.panel_end * kPanel);
  for (std::int64_t i = task.row; i < task.row + task.rows; ++i) {
    float* y = static_cast<float*>(p.y) + i * p.ldy;
    for (std::int64_t j = task.panel_begin * kPanel; j < end; ++j)
      y[j] = p.accumulate ? y[j] + bias_at(p, j) : bias_at(p, j);
  }
  return true;
}

void add_terms(const Product& p, const Task& task) {
  for (std::int64_t i = 0; i < p.terms_count; ++i) {
    const PackedTerm& term = p.terms[i];
    const std::int64_t end = min_of(task.panel_end, term.panel_end);
    for (std::int64_t panel = max_of(task.panel_begin, term.panel_begin); panel < end; ++panel)
      add_stretch(task.rows, static_cast<const float*>(term.u) + task.row * term.ldu, term.ldu,
                  term.rank,
                  reinterpret_cast<const float*>(term.panels) +
                      (panel - term.panel_begin) * term.rank * kPanel,
                  true, static_cast<float*>(p.y) + task.row * p.ldy + panel * kPanel, p.ldy,
                  min_of(kPanel, p.columns - panel * kPanel));
  }
}

// v of a piece, as far as it meets one panel: panel[rank][32] in f32.
void pack_piece(const LowRankPiece& piece, std::int64_t panel, float* to) {
  const std::int64_t first = panel * kPanel - piece.begin;
  for (std::int64_t i = 0; i < kPanel; ++i) {
    const bool exists = first + i >= 0 && first + i < piece.count;
    const std::int64_t from = (first + i) * piece.v.ld;
    for (std::int64_t r = 0; r < piece.rank; ++r)
      to[r * kPanel + i] = !exists ? 0.0f
                           : piece.v.dtype == DType::kF32
                               ? static_cast<const float*>(piece.v.data)[from + r]
                               : widened(static_cast<const bf16*>(piece.v.data)[from + r]);
  }
}

void add_pieces(const Product& p, const Task& task, float* scratch) {
  for (std::int64_t i = 0; i < p.pieces_count; ++i) {
    const LowRankPiece& piece = p.pieces[i];
    for (std::int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
      const PieceRows rows = piece_rows(piece, panel, task.row, task.rows);
      if (rows.begin >= rows.end) continue;
      pack_piece(piece, panel, scratch);
      add_stretch(rows.end - rows.begin,
                  static_cast<const float*>(piece.u.data) + rows.begin * piece.u.ld, piece.u.ld,
                  piece.rank, scratch, true,
                  static_cast<float*>(p.y) + rows.begin * p.ldy + panel * kPanel, p.ldy,
                  min_of(kPanel, p.columns - panel * kPanel));
    }
  }
}

// Where the chains start from an old y (small_product), x is scaled on its way, into scratch.
struct Source {
  const float* x;
  std::int64_t ldx;
};
Source scaled_source(const Product& p, const Task& task, std::int64_t begin, std::int64_t count,
                     float* scratch) {
  const float* x = static_cast<const float*>(p.x) + task.row * p.ldx + begin;
  if (p.scale == 1.0f || !p.accumulate) return {x, p.ldx};
  for (std::int64_t i = 0; i < task.rows; ++i)
    for (std::int64_t k = 0; k < count; ++k) scratch[i * count + k] = x[i * p.ldx + k] * p.scale;
  return {scratch, count};
}

void scale_rows(const Product& p, const Task& task) {
  if (p.scale == 1.0f || p.accumulate) return;
  const std::int64_t end = min_of(p.columns, task.panel_end * kPanel);
  for (std::int64_t i = task.row; i < task.row + task.rows; ++i)
    for (std::int64_t j = task.panel_begin * kPanel; j < end; ++j)
      static_cast<float*>(p.y)[i * p.ldy + j] *= p.scale;
}

// Few rows: several panels at once, so that enough chains are in flight.
template <int R, int P>
void run_few(const Product& p, const Task& task, bool load) {
  const auto* panels = reinterpret_cast<const float*>(p.panels);
  const std::int64_t stride = p.reduction * kPanel;
  const auto* x = static_cast<const float*>(p.x) + task.row * p.ldx;
  float* y = static_cast<float*>(p.y) + task.row * p.ldy;
  std::int64_t panel = task.panel_begin;
  for (; panel + P <= task.panel_end; panel += P)
    sum_rows<R, P>(x, p.ldx, p.reduction, panels + panel * stride, stride, load, y + panel * kPanel,
                   p.ldy, min_of(kPanel, p.columns - (panel + P - 1) * kPanel));
  for (; panel < task.panel_end; ++panel)
    sum_rows<R, 1>(x, p.ldx, p.reduction, panels + panel * stride, stride, load, y + panel * kPanel,
                   p.ldy, min_of(kPanel, p.columns - panel * kPanel));
}

void run_task(const Product& p, const Task& task, float* scratch) {
  const bool load = start_sums(p, task);
  const auto* panels = reinterpret_cast<const float*>(p.panels);
  if (p.scale == 1.0f && task.rows <= 2) {
    task.rows == 1 ? run_few<1, kPanelsFew>(p, task, load) : run_few<2, kPanelsFew>(p, task, load);
  } else {
    for (std::int64_t begin = 0; begin < p.reduction; begin += kStretch) {
      const std::int64_t count = min_of(kStretch, p.reduction - begin);
      const Source source = scaled_source(p, task, begin, count, scratch);
      for (std::int64_t panel = task.panel_begin; panel < task.panel_end; ++panel)
        add_stretch(task.rows, source.x, source.ldx, count,
                    panels + (panel * p.reduction + begin) * kPanel, load || begin > 0,
                    static_cast<float*>(p.y) + task.row * p.ldy + panel * kPanel, p.ldy,
                    min_of(kPanel, p.columns - panel * kPanel));
    }
  }
  scale_rows(p, task);
  add_terms(p, task);
  add_pieces(p, task, scratch);
}

// -- bf16 operands on processors without bf16 instructions ----------------------------------------

// A bf16 panel's stretch to the f32 layout.
void widen_panel(const char* from, std::int64_t begin, std::int64_t count, float* to) {
  const auto* panel = reinterpret_cast<const bf16*>(from);
  for (std::int64_t k = 0; k < count; ++k)
    for (std::int64_t i = 0; i < kPanel; ++i)
      to[k * kPanel + i] = widened(panel[bf16_panel_index(i, begin + k)]);
}

void widen_rows(const void* x, std::int64_t ld, std::int64_t row, std::int64_t rows,
                std::int64_t begin, std::int64_t count, float* to) {
  const auto* from = static_cast<const bf16*>(x) + row * ld + begin;
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t k = 0; k < count; ++k) to[i * count + k] = widened(from[i * ld + k]);
}

bf16 round_bf16(float x) {
  const auto u = __builtin_bit_cast(std::uint32_t, x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

void write_sums(const Product& p, const Task& task, std::int64_t panel, const float* sums) {
  const std::int64_t columns = min_of(kPanel, p.columns - panel * kPanel);
  for (std::int64_t i = 0; i < task.rows; ++i)
    for (std::int64_t j = 0; j < columns; ++j) {
      const std::int64_t at = (task.row + i) * p.ldy + panel * kPanel + j;
      float s = sums[i * kPanel + j] * p.scale;
      if (p.bias != nullptr) s += bias_at(p, panel * kPanel + j);
      if (p.y_bf16) {
        auto* y = static_cast<bf16*>(p.y) + at;
        if (p.accumulate) s += widened(*y);
        *y = round_bf16(s);
      } else {
        auto* y = static_cast<float*>(p.y) + at;
        *y = p.accumulate ? *y + s : s;
      }
    }
}

// Scratch: the rows' stretch, one panel's stretch, the sums of one panel.
void run_widened(const Product& p, const Task& task, float* scratch) {
  const std::int64_t stretch = reduction_block(p.t, p.reduction);
  float* sums = scratch;
  float* panel_block = sums + task.rows * kPanel;
  float* rows_block = panel_block + stretch * kPanel;
  const auto add = [&](const void* x, std::int64_t ld, const char* panel, std::int64_t reduction,
                       std::int64_t begin, bool load, bool fresh) {
    const std::int64_t count = min_of(stretch, reduction - begin);
    if (fresh) widen_rows(x, ld, task.row, task.rows, begin, count, rows_block);
    widen_panel(panel, begin, count, panel_block);
    add_stretch(task.rows, rows_block, count, count, panel_block, load, sums, kPanel, kPanel);
  };
  for (std::int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
    for (std::int64_t begin = 0; begin < p.reduction; begin += stretch)
      add(p.x, p.ldx, p.panels + panel * panel_bytes(DType::kBF16, p.reduction), p.reduction, begin,
          begin > 0, true);
    for (std::int64_t i = 0; i < p.terms_count; ++i) {
      const PackedTerm& term = p.terms[i];
      if (panel < term.panel_begin || panel >= term.panel_end) continue;
      const char* at =
          term.panels + (panel - term.panel_begin) * panel_bytes(DType::kBF16, term.rank);
      for (std::int64_t begin = 0; begin < term.rank; begin += stretch)
        add(term.u, term.ldu, at, term.rank, begin, true, true);
    }
    for (std::int64_t i = 0; i < p.pieces_count; ++i) {
      const LowRankPiece& piece = p.pieces[i];
      const PieceRows rows = piece_rows(piece, panel, task.row, task.rows);
      if (rows.begin >= rows.end) continue;
      float* u = rows_block + task.rows * stretch;
      float* v = u + task.rows * round_up(piece.rank, kTileK);
      widen_rows(piece.u.data, piece.u.ld, rows.begin, rows.end - rows.begin, 0, piece.rank, u);
      pack_piece(piece, panel, v);
      add_stretch(rows.end - rows.begin, u, piece.rank, piece.rank, v, true,
                  sums + (rows.begin - task.row) * kPanel, kPanel, kPanel);
    }
    write_sums(p, task, panel, sums);
  }
}

template <class Run>
void run_all(const Product& p, std::int64_t row_block, std::int64_t width, Run run) {
  const std::int64_t panels = ceil_div(p.columns, kPanel), splits = ceil_div(panels, width);
  const std::int64_t threads_max = omp_get_max_threads();
  // An output too narrow for all threads is shared out by rows.
  if (ceil_div(p.t, row_block) * splits < threads_max)
    row_block = max_of(kRowsMax, ceil_div(p.t * splits, threads_max));
  const std::int64_t row_blocks = ceil_div(p.t, row_block);
#pragma omp parallel if (p.t * p.reduction * p.columns > kParallelMin)
  {
    const std::int64_t threads = omp_get_num_threads(), id = omp_get_thread_num();
    auto* scratch = reinterpret_cast<float*>(p.scratch + id * p.scratch_per_thread);
    if (p.t <= kStreamRows && panels >= threads) {
      const std::int64_t begin = panels * id / threads, end = panels * (id + 1) / threads;
      run(p, Task{0, p.t, begin, end}, scratch);
    } else {
#pragma omp for schedule(dynamic)
      for (std::int64_t i = 0; i < row_blocks * splits; ++i) {
        const std::int64_t row = i / splits * row_block, panel = i % splits * width;
        run(p, Task{row, min_of(row_block, p.t - row), panel, min_of(panels, panel + width)},
            scratch);
      }
    }
  }
}

}  // namespace

void TANDEM_ISA_NAME(product_f32)(const Product& p) {
  run_all(p, kRowsF32, kPanelsF32,
          [](const Product& q, const Task& task, float* s) { run_task(q, task, s); });
}

void TANDEM_ISA_NAME(product_widened)(const Product& p) {
  run_all(p, kRowsF32, kPanelsF32,
          [](const Product& q, const Task& task, float* s) { run_widened(q, task, s); });
}

}  // namespace tandem::kernels::cpu
