// bf16 products on AMX tiles. Compiled with AMX and AVX-512; called only where isa() is kAmx.
//
// A task owns a block of rows and a range of columns. Its rows stay in L2 while panels stream past;
// a 2x2 block of tiles (32 rows, 32 columns) does 4 TDPBF16PS for 4 tile loads, which L2 can feed.
#include "kernels/cpu/amx_tiles.h"
#include "kernels/cpu/gemm_kernels.h"
#include "kernels/cpu/gemm_write_avx512.h"
#include "kernels/cpu/simd_bf16.h"

#include <immintrin.h>
#include <omp.h>

#include <cstring>

namespace tandem::kernels::cpu {
namespace {

// One stretch of the reduction: A rows at a (16 rows) and a + a_next (the next 16), B tiles at b.
struct Stretch {
  const char* a;
  std::int64_t a_next, a_stride, a_step;
  const char* b;
  std::int64_t steps;
};

// What is done beside the tile instructions, a little per step: the panel after this one is fetched
// into L2 and the strip before this one is rounded and written.
struct Aside {
  const char* ahead = nullptr;
  const char* ahead_end = nullptr;
  Finished finished;
  std::int64_t rows_per_step = 0;
  alignas(64) float sums[2][32 * kPanel];  ///< one is being summed while the other is written
  int turn = 0;
};

TANDEM_ALWAYS_INLINE void do_aside(const Product& p, Aside& aside) {
  if (aside.ahead < aside.ahead_end) {
    for (int line = 0; line < 4; ++line) _mm_prefetch(aside.ahead + line * 64, _MM_HINT_T1);
    aside.ahead += 256;
  }
  if (aside.finished.rows > 0) write_rows(p, aside.finished, aside.rows_per_step);
}

// c [16 * MT, 32] f32, row stride 32: tiles of the sums. Rows of x are read once per panel, so they
// are loaded past L1 (the stream form), which leaves it to the panel.
template <int MT, int NT>
TANDEM_ALWAYS_INLINE void sum_tiles(const Product& p, const Stretch* stretches, int count,
                                    bool load, float* c, Aside& aside) {
  constexpr int kRow = kPanel * 4;
  if (load) {
    _tile_loadd(0, c, kRow);
    if constexpr (NT > 1) _tile_loadd(1, c + 16, kRow);
    if constexpr (MT > 1) _tile_loadd(2, c + 16 * kPanel, kRow);
    if constexpr (MT > 1 && NT > 1) _tile_loadd(3, c + 16 * kPanel + 16, kRow);
  } else {
    _tile_zero(0);
    if constexpr (NT > 1) _tile_zero(1);
    if constexpr (MT > 1) _tile_zero(2);
    if constexpr (MT > 1 && NT > 1) _tile_zero(3);
  }
  for (int s = 0; s < count; ++s) {
    const char* a = stretches[s].a;
    const char* b = stretches[s].b;
    const std::int64_t a_next = stretches[s].a_next, a_stride = stretches[s].a_stride;
    const std::int64_t a_step = stretches[s].a_step;
    for (std::int64_t i = stretches[s].steps; i > 0; --i) {
      _tile_stream_loadd(4, a, a_stride);
      _tile_loadd(6, b, 64);
      if constexpr (NT > 1) _tile_loadd(7, b + 1024, 64);
      if constexpr (MT > 1) _tile_stream_loadd(5, a + a_next, a_stride);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (NT > 1) _tile_dpbf16ps(1, 4, 7);
      if constexpr (MT > 1) {
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (NT > 1) _tile_dpbf16ps(3, 5, 7);
      }
      do_aside(p, aside);
      a += a_step;
      b += 2048;
    }
  }
  _tile_stored(0, c, kRow);
  if constexpr (NT > 1) _tile_stored(1, c + 16, kRow);
  if constexpr (MT > 1) _tile_stored(2, c + 16 * kPanel, kRow);
  if constexpr (MT > 1 && NT > 1) _tile_stored(3, c + 16 * kPanel + 16, kRow);
}

// Copies columns [begin, end) of rows rows into A tiles: strips of 32 rows, per 32 columns two
// tiles; rows and columns beyond the end are zero.
void pack_rows_to_tiles(const bf16* x, std::int64_t ld, std::int64_t rows, std::int64_t begin,
                        std::int64_t end, char* to) {
  const std::int64_t steps = ceil_div(end - begin, kTileK);
  for (std::int64_t strip = 0; strip < rows; strip += 32)
    for (std::int64_t i = 0; i < 32; ++i) {
      char* tile = to + strip * steps * 64 + (i / 16) * 1024 + (i % 16) * 64;
      const bf16* from = x + (strip + i) * ld + begin;
      for (std::int64_t s = 0; s < steps; ++s) {
        const std::int64_t valid = strip + i < rows ? min_of(kTileK, end - begin - s * kTileK) : 0;
        const __mmask32 m = valid >= 32 ? ~__mmask32{0} : ((__mmask32{1} << valid) - 1);
        _mm512_store_si512(tile + s * 2048, _mm512_maskz_loadu_epi16(m, from + s * kTileK));
      }
    }
}

// What a thread keeps while it runs one row block.
struct RowBlock {
  std::int64_t row = 0, rows = 0;
  char* x_tiles = nullptr;  ///< packed rows of the current stretch, when `packed`
  char* u_tiles[kTermsMax] = {};
  char* piece = nullptr;  ///< one piece's rows and panel as tiles
  bool packed = false;
};

void pack_terms(const Product& p, RowBlock& block, char* to) {
  for (std::int64_t i = 0; i < p.terms_count; ++i) {
    const PackedTerm& term = p.terms[i];
    block.u_tiles[i] = to;
    pack_rows_to_tiles(static_cast<const bf16*>(term.u) + block.row * term.ldu, term.ldu,
                       block.rows, 0, term.rank, to);
    to += round_up(block.rows, 32) * round_up(term.rank, kTileK) * 2;
  }
}

// Adds the pieces to the sums c of one strip. A piece's rows are summed in a place of their own, so
// that nothing of it, not even a NaN times zero, meets the other rows.
void add_pieces(const Product& p, const RowBlock& block, std::int64_t strip, std::int64_t rows,
                std::int64_t panel, float* c, Aside& aside) {
  alignas(64) float sums[32 * kPanel];
  for (std::int64_t i = 0; i < p.pieces_count; ++i) {
    const LowRankPiece& piece = p.pieces[i];
    const PieceRows part = piece_rows(piece, panel, block.row + strip, rows);
    const std::int64_t count = part.end - part.begin;
    if (count <= 0) continue;
    const std::int64_t padded = round_up(piece.rank, kTileK);
    char* v = block.piece + 32 * padded * 2;
    pack_rows_to_tiles(static_cast<const bf16*>(piece.u.data) + part.begin * piece.u.ld, piece.u.ld,
                       count, 0, piece.rank, block.piece);
    pack_piece_bf16_avx512(piece, panel, v);
    float* mine = c + (part.begin - block.row - strip) * kPanel;
    const auto bytes = static_cast<std::size_t>(count * kPanel * 4);
    std::memcpy(sums, mine, bytes);
    std::memset(reinterpret_cast<char*>(sums) + bytes, 0, sizeof sums - bytes);
    const Stretch stretch{block.piece, 1024, 64, 2048, v, padded / kTileK};
    count > 16 ? sum_tiles<2, 2>(p, &stretch, 1, true, sums, aside)
               : sum_tiles<1, 2>(p, &stretch, 1, true, sums, aside);
    std::memcpy(mine, sums, bytes);
  }
}

struct Task {
  std::int64_t row, rows, panel_begin, panel_end;
};

void run_panel(const Product& p, const RowBlock& block, std::int64_t panel, std::int64_t begin,
               std::int64_t end, float* parked, Aside& aside) {
  const bool first = begin == 0, last = end == p.reduction;
  const std::int64_t steps = ceil_div(end - begin, kTileK);
  const bool narrow = p.columns - panel * kPanel <= 16;
  for (std::int64_t strip = 0; strip < block.rows; strip += 32) {
    const std::int64_t rows = min_of(32, block.rows - strip);
    Stretch stretches[1 + kTermsMax];
    int count = 1;
    stretches[0] = {block.packed
                        ? block.x_tiles + strip * steps * 64
                        : static_cast<const char*>(p.x) + ((block.row + strip) * p.ldx + begin) * 2,
                    block.packed ? 1024 : 16 * p.ldx * 2,
                    block.packed ? 64 : p.ldx * 2,
                    block.packed ? 2048 : 64,
                    p.panels + panel * panel_bytes(DType::kBF16, p.reduction) + begin * kPanel * 2,
                    steps};
    if (last)
      for (std::int64_t i = 0; i < p.terms_count; ++i) {
        const PackedTerm& term = p.terms[i];
        if (panel < term.panel_begin || panel >= term.panel_end) continue;
        const std::int64_t padded = round_up(term.rank, kTileK);
        stretches[count++] = {block.u_tiles[i] + strip * padded * 2,
                              1024,
                              64,
                              2048,
                              term.panels + (panel - term.panel_begin) * padded * kPanel * 2,
                              padded / kTileK};
      }
    float* c = parked != nullptr ? parked + strip * kPanel : aside.sums[aside.turn ^= 1];
    aside.rows_per_step = ceil_div(aside.finished.rows, steps);
    if (rows > 16)
      narrow ? sum_tiles<2, 1>(p, stretches, count, !first, c, aside)
             : sum_tiles<2, 2>(p, stretches, count, !first, c, aside);
    else
      narrow ? sum_tiles<1, 1>(p, stretches, count, !first, c, aside)
             : sum_tiles<1, 2>(p, stretches, count, !first, c, aside);
    if (last) add_pieces(p, block, strip, rows, panel, c, aside);
    if (last) aside.finished = {c, block.row + strip, rows, panel * kPanel};
  }
}

// Packs what is needed of one row block; returns the scratch that is left.
char* begin_rows(const Product& p, RowBlock& block, std::int64_t stretch, char* scratch) {
  const std::int64_t padded_rows = round_up(block.rows, 32);
  block.x_tiles = scratch;
  scratch += padded_rows * stretch * 2;
  pack_terms(p, block, scratch);
  for (std::int64_t i = 0; i < p.terms_count; ++i)
    scratch += padded_rows * round_up(p.terms[i].rank, kTileK) * 2;
  std::int64_t piece_rank = 0;
  for (std::int64_t i = 0; i < p.pieces_count; ++i)
    piece_rank = max_of(piece_rank, p.pieces[i].rank);
  block.piece = scratch;
  return scratch + (32 + kPanel) * round_up(piece_rank, kTileK) * 2;
}

void run_task(const Product& p, const Task& task, char* scratch) {
  RowBlock block;
  block.row = task.row;
  block.rows = task.rows;
  block.packed = p.reduction % kTileK != 0 || task.rows % 16 != 0;
  const std::int64_t stretch = reduction_block(p.t, p.reduction);
  scratch = begin_rows(p, block, stretch, scratch);
  Aside aside;
  auto* parked = p.reduction > stretch ? reinterpret_cast<float*>(scratch) : nullptr;
  for (std::int64_t begin = 0; begin < p.reduction; begin += stretch) {
    const std::int64_t end = min_of(p.reduction, begin + stretch);
    if (block.packed)
      pack_rows_to_tiles(static_cast<const bf16*>(p.x) + block.row * p.ldx, p.ldx, block.rows,
                         begin, end, block.x_tiles);
    const std::int64_t bytes = round_up(end - begin, kTileK) * kPanel * 2;
    for (std::int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
      aside.ahead =
          p.panels + (panel + 1) * panel_bytes(DType::kBF16, p.reduction) + begin * kPanel * 2;
      aside.ahead_end = panel + 1 < task.panel_end ? aside.ahead + bytes : aside.ahead;
      run_panel(p, block, panel, begin, end,
                parked == nullptr
                    ? nullptr
                    : parked + (panel - task.panel_begin) * round_up(task.rows, 32) * kPanel,
                aside);
    }
  }
  write_rows(p, aside.finished, aside.finished.rows);
}

void run_blocks(const Product& p) {
  const std::int64_t panels = ceil_div(p.columns, kPanel);
  const std::int64_t row_blocks = ceil_div(p.t, kRowBlock);
  const std::int64_t threads = omp_get_max_threads();
  // Enough tasks to level the threads, none wider than its parked sums.
  std::int64_t splits = row_blocks >= 4 * threads ? 1 : ceil_div(4 * threads, row_blocks);
  std::int64_t width = max_of(1, ceil_div(panels, splits));
  if (p.reduction > reduction_block(p.t, p.reduction))
    width = min_of(width, kParkedColumns / kPanel);
  splits = ceil_div(panels, width);
#pragma omp parallel
  {
    load_tile_config(16, 16);
    char* scratch = p.scratch + omp_get_thread_num() * p.scratch_per_thread;
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < row_blocks * splits; ++i) {
      const std::int64_t row = i / splits * kRowBlock, panel = i % splits * width;
      run_task(p, {row, min_of(kRowBlock, p.t - row), panel, min_of(panels, panel + width)},
               scratch);
    }
    if (p.stream_y) _mm_sfence();  // streamed rows must be visible at the barrier
    _tile_release();
  }
}

// Few rows: the weights' bytes are the time. Each thread walks one contiguous range of panels with
// all rows at once; tiles have just the rows that exist.
void run_stream(const Product& p) {
  const std::int64_t panels = ceil_div(p.columns, kPanel);
#pragma omp parallel if (p.reduction * p.columns > kParallelMin)
  {
    const std::int64_t threads = omp_get_num_threads(), id = omp_get_thread_num();
    RowBlock block;
    block.rows = p.t;
    block.packed = p.reduction % kTileK != 0;
    load_tile_config(static_cast<int>(min_of(16, p.t)), static_cast<int>(p.t > 16 ? p.t - 16 : 16));
    begin_rows(p, block, round_up(p.reduction, kTileK), p.scratch + id * p.scratch_per_thread);
    if (block.packed)
      pack_rows_to_tiles(static_cast<const bf16*>(p.x), p.ldx, p.t, 0, p.reduction, block.x_tiles);
    Aside aside;
    for (std::int64_t panel = panels * id / threads; panel < panels * (id + 1) / threads; ++panel)
      run_panel(p, block, panel, 0, p.reduction, nullptr, aside);
    write_rows(p, aside.finished, aside.finished.rows);
    _tile_release();
  }
}

}  // namespace

void product_bf16_amx(const Product& p) {
  if (p.t <= kStreamRows)
    run_stream(p);
  else
    run_blocks(p);
}

}  // namespace tandem::kernels::cpu
