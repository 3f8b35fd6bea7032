// bf16 attention on AMX tiles, packed and paged, for head sizes that are multiples of 32. Called
// only where isa() is kAmx.
//
// A task carries up to kQueriesAmx queries (a row and a head of one key-value group each, so that
// one decode row still fills tile rows with its heads). It walks blocks of 256 keys: their keys and
// values become B tiles once per task, then each 32 queries do scores, softmax (online over the
// blocks) and the product with the values.
#include "kernels/cpu/attention_amx.h"

#include <immintrin.h>
#include <math.h>
#include <omp.h>

namespace tandem::kernels::cpu {
namespace {

constexpr std::int64_t kScoreStride = kKeysAmx + 16;   // floats; not a power of two apart
constexpr std::int64_t kWeightStride = kKeysAmx + 32;  // bf16

struct Queries {
  std::int64_t sequence, row, rows, position;  // of the first row
  std::int64_t kv_head, group;
};

struct Work {
  std::uint16_t* q;  // [queries padded to 32][dim]
  float* o;          // [queries][dim]
  float* m;          // largest score so far, in units of log2
  float* l;
  char* keys;              // per 16 keys dim / 32 tiles
  char* values;            // per 32 keys dim / 16 tiles
  float* scores;           // [32][kScoreStride]
  std::uint16_t* weights;  // [32][kWeightStride]
  float* product;          // [32][dim]
};

Work lay_out(const Attention& a, char* scratch) {
  Work w;
  w.q = reinterpret_cast<std::uint16_t*>(scratch);
  scratch += kQueriesAmx * a.dim * 2;
  w.o = reinterpret_cast<float*>(scratch);
  scratch += kQueriesAmx * a.dim * 4;
  w.m = reinterpret_cast<float*>(scratch);
  w.l = w.m + kQueriesAmx;
  scratch += kQueriesAmx * 8;
  w.keys = scratch;
  scratch += kKeysAmx * a.dim * 2;
  w.values = scratch;
  scratch += kKeysAmx * a.dim * 2;
  w.scores = reinterpret_cast<float*>(scratch);
  scratch += 32 * kScoreStride * 4;
  w.weights = reinterpret_cast<std::uint16_t*>(scratch);
  scratch += 32 * kWeightStride * 2;
  w.product = reinterpret_cast<float*>(scratch);
  return w;
}

struct KeyRows {
  const std::uint16_t* k;
  const std::uint16_t* v;
  std::int64_t stride;
};

// Rows of the 16 keys from `first` (a multiple of 16) on.
KeyRows key_rows(const Attention& a, const Queries& n, std::int64_t first) {
  if (a.paged) {
    const std::int64_t block = a.block_tables[n.sequence * a.blocks_max + first / a.block_size];
    const std::int64_t at =
        ((block * a.kv_heads + n.kv_head) * a.block_size + first % a.block_size) * a.dim;
    return {static_cast<const std::uint16_t*>(a.k_cache) + at,
            static_cast<const std::uint16_t*>(a.v_cache) + at, a.dim};
  }
  const auto* k = static_cast<const std::uint16_t*>(a.q) + (a.offsets[n.sequence] + first) * a.ldq +
                  (a.heads + n.kv_head) * a.dim;
  return {k, k + a.kv_heads * a.dim, a.ldq};
}

// Keys and values [first, end) to B tiles, zeros up to a multiple of 32.
void pack_keys(const Attention& a, const Queries& n, std::int64_t first, std::int64_t end,
               const Work& w) {
  const std::int64_t steps = a.dim / 32;
  for (std::int64_t j = first; j < first + round_up(end - first, 32); j += 16) {
    const std::int64_t count = max_of(0, min_of(16, end - j));
    const KeyRows rows = count > 0 ? key_rows(a, n, j) : KeyRows{nullptr, nullptr, 0};
    char* keys = w.keys + (j - first) / 16 * steps * 1024;
    char* values = w.values + (j - first) / 32 * steps * 2048;
    const std::int64_t half = (j - first) % 32 / 2;
    for (std::int64_t s = 0; s < steps; ++s) {
      tile_of_columns(rows.k + s * 32, rows.stride, count, keys + s * 1024);
      for (std::int64_t i = 0; i < 8; ++i) {
        const std::uint16_t* row = rows.v + 2 * i * rows.stride + s * 32;
        zip_into_tiles(2 * i < count ? row : nullptr,
                       2 * i + 1 < count ? row + rows.stride : nullptr, half + i,
                       values + s * 2048);
      }
    }
  }
}

void load_queries(const Attention& a, const Queries& n, const Work& w) {
  const std::int64_t count = n.rows * n.group, columns = n.group * a.dim;
  for (std::int64_t r = 0; r < n.rows; ++r)
    __builtin_memcpy(
        w.q + r * columns,
        static_cast<const std::uint16_t*>(a.q) + (n.row + r) * a.ldq + n.kv_head * columns,
        static_cast<std::size_t>(columns) * 2);
  __builtin_memset(w.q + count * a.dim, 0,
                   static_cast<std::size_t>((round_up(count, 32) - count) * a.dim) * 2);
  for (std::int64_t i = 0; i < count; ++i) {
    w.m[i] = -__builtin_huge_valf();
    w.l[i] = 0.0f;
  }
}

struct Lanes {
  std::int64_t lo, hi;  // of the block's keys, visible to a query
};

// One query's scores to weights (bf16), its m and l; returns the factor of what it summed before.
float weigh(const Attention& a, float* scores, std::uint16_t* weights, Lanes seen,
            std::int64_t padded, float& m, float& l) {
  if (seen.lo >= seen.hi) {
    for (std::int64_t j = 0; j < padded; j += 32)
      _mm512_storeu_si512(weights + j, _mm512_setzero_si512());
    return 1.0f;
  }
  const __m512 none = _mm512_set1_ps(-__builtin_huge_valf());
  const __m512 scale = _mm512_set1_ps(a.scale * kLog2E);
  const auto lanes_at = [&](std::int64_t j) {
    return static_cast<__mmask16>(lane_mask(seen.hi - j) & ~lane_mask(seen.lo - j));
  };
  if (a.soft_cap > 0.0f)
    for (std::int64_t j = 0; j < seen.hi; j += 16) {
      const __m512 t = tanh_lanes(
          _mm512_mul_ps(_mm512_loadu_ps(scores + j), _mm512_set1_ps(a.scale / a.soft_cap)));
      _mm512_storeu_ps(scores + j, _mm512_mul_ps(t, _mm512_set1_ps(a.soft_cap / a.scale)));
    }
  __m512 largest = none, largest_next = none;
  std::int64_t at = seen.lo / 16 * 16;
  if (at == seen.lo)
    for (; at + 32 <= seen.hi; at += 32) {
      largest = _mm512_max_ps(largest, _mm512_load_ps(scores + at));
      largest_next = _mm512_max_ps(largest_next, _mm512_load_ps(scores + at + 16));
    }
  for (; at < seen.hi; at += 16)
    largest = _mm512_mask_max_ps(largest, lanes_at(at), largest, _mm512_load_ps(scores + at));
  largest = _mm512_max_ps(largest, largest_next);
  const float block_m = _mm512_reduce_max_ps(largest) * (a.scale * kLog2E);
  const float m_new = m > block_m ? m : block_m;
  const __m512 shift = _mm512_set1_ps(-m_new);
  __m512 sum = _mm512_setzero_ps();
  for (std::int64_t j = 0; j < padded; j += 32) {
    __m512 p0 = exp2_lanes(_mm512_fmadd_ps(_mm512_load_ps(scores + j), scale, shift));
    __m512 p1 = exp2_lanes(_mm512_fmadd_ps(_mm512_load_ps(scores + j + 16), scale, shift));
    if (j < seen.lo || j + 32 > seen.hi) {
      p0 = _mm512_maskz_mov_ps(lanes_at(j), p0);
      p1 = _mm512_maskz_mov_ps(lanes_at(j + 16), p1);
    }
    sum = _mm512_add_ps(sum, _mm512_add_ps(p0, p1));
    _mm512_storeu_si512(weights + j, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(p1, p0)));
  }
  const float keep = _mm512_cvtss_f32(exp2_lanes(_mm512_set1_ps(m - m_new)));
  l = l * keep + _mm512_reduce_add_ps(sum);
  m = m_new;
  return keep;
}

// Queries [i, i + count) against keys [first, end), packed in w.
template <int MT>
void add_block(const Attention& a, const Queries& n, const Work& w, std::int64_t i,
               std::int64_t count, std::int64_t first, std::int64_t end, bool fresh) {
  const std::int64_t steps = a.dim / 32, row_bytes = a.dim * 2;
  // Keys past the last query's position are nobody's.
  const std::int64_t position_last = n.position + (i + count - 1) / n.group;
  const std::int64_t padded = round_up(min_of(end, position_last + 1) - first, 32);
  for (std::int64_t j = 0; j < padded; j += 32)
    multiply_tiles<MT>(reinterpret_cast<const char*>(w.q + i * a.dim), row_bytes, 16 * row_bytes,
                       64, w.keys + j / 16 * steps * 1024, steps * 1024, 1024, steps, false,
                       w.scores + j, kScoreStride * 4);
  float keep[32];
  for (std::int64_t r = 0; r < count; ++r) {
    const std::int64_t position = n.position + (i + r) / n.group;
    const Lanes seen{a.window > 0 ? max_of(0, position - a.window + 1 - first) : 0,
                     min_of(end, position + 1) - first};
    keep[r] = weigh(a, w.scores + r * kScoreStride, w.weights + r * kWeightStride, seen, padded,
                    w.m[i + r], w.l[i + r]);
  }
  for (std::int64_t d = 0; d < a.dim; d += 32)
    multiply_tiles<MT>(reinterpret_cast<const char*>(w.weights), kWeightStride * 2,
                       16 * kWeightStride * 2, 64, w.values + d / 16 * 1024, 1024, steps * 2048,
                       padded / 32, false, w.product + d, a.dim * 4);
  for (std::int64_t r = 0; r < count; ++r) {
    float* o = w.o + (i + r) * a.dim;
    const __m512 factor = _mm512_set1_ps(keep[r]);
    for (std::int64_t d = 0; d < a.dim; d += 16) {
      const __m512 p = _mm512_loadu_ps(w.product + r * a.dim + d);
      _mm512_storeu_ps(o + d, fresh ? p : _mm512_fmadd_ps(_mm512_loadu_ps(o + d), factor, p));
    }
  }
}

void store_outputs(const Attention& a, const Queries& n, const Work& w) {
  for (std::int64_t i = 0; i < n.rows * n.group; ++i) {
    const std::int64_t row = n.row + i / n.group, head = n.kv_head * n.group + i % n.group;
    auto* out = static_cast<std::uint16_t*>(a.out) + row * a.ldo + head * a.dim;
    const __m512 inverse = _mm512_set1_ps(1.0f / w.l[i]);
    for (std::int64_t d = 0; d < a.dim; d += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + d),
                          narrow(_mm512_mul_ps(_mm512_loadu_ps(w.o + i * a.dim + d), inverse)));
    if (a.lse != nullptr) a.lse[row * a.heads + head] = w.m[i] * kLn2 + logf(w.l[i]);
  }
}

void run_queries(const Attention& a, const Queries& n, const Work& w) {
  load_queries(a, n, w);
  const std::int64_t count = n.rows * n.group, end = n.position + n.rows;
  const std::int64_t begin =
      a.window > 0 ? max_of(0, n.position - a.window + 1) / kKeysAmx * kKeysAmx : 0;
  for (std::int64_t first = begin; first < end; first += kKeysAmx) {
    const std::int64_t block_end = min_of(end, first + kKeysAmx);
    pack_keys(a, n, first, block_end, w);
    for (std::int64_t i = 0; i < count; i += 32) {
      const std::int64_t some = min_of(32, count - i);
      if (n.position + (i + some - 1) / n.group < first) continue;  // all before these keys
      some > 16 ? add_block<2>(a, n, w, i, some, first, block_end, first == begin)
                : add_block<1>(a, n, w, i, some, first, block_end, first == begin);
    }
  }
  store_outputs(a, n, w);
}

}  // namespace

void attention_forward_amx(const Attention& a) {
  const std::int64_t group = a.heads / a.kv_heads;
  const std::int64_t rows = max_of(1, min_of(256, kQueriesAmx / group));
  std::int64_t chunks = 0;
  for (std::int64_t s = 0; s < a.sequences; ++s)
    chunks += ceil_div(a.offsets[s + 1] - a.offsets[s], rows);
#pragma omp parallel
  {
    load_tile_config(16, 16);
    const Work w = lay_out(a, a.scratch + omp_get_thread_num() * a.scratch_per_thread);
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < chunks * a.kv_heads; ++i) {
      std::int64_t chunk = i / a.kv_heads, s = 0;
      for (;; ++s) {
        const std::int64_t of_s = ceil_div(a.offsets[s + 1] - a.offsets[s], rows);
        if (chunk < of_s) break;
        chunk -= of_s;
      }
      const std::int64_t length = a.offsets[s + 1] - a.offsets[s], first = chunk * rows;
      const std::int64_t before = a.paged ? a.kv_lens[s] - length : 0;
      run_queries(a,
                  {s, a.offsets[s] + first, min_of(rows, length - first), before + first,
                   i % a.kv_heads, group},
                  w);
    }
    _tile_release();
  }
  for (std::int64_t i = a.offsets[a.sequences]; i < a.t; ++i)
    __builtin_memset(static_cast<std::uint16_t*>(a.out) + i * a.ldo, 0,
                     static_cast<std::size_t>(a.heads * a.dim) * 2);
}

}  // namespace tandem::kernels::cpu
