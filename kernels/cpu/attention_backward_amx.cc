// bf16 attention backward on AMX tiles, for head sizes that are multiples of 32. Called only where
// isa() is kAmx.
//
// A task owns one sequence under one key-value head, with dk and dv of the whole sequence in f32;
// the group's query heads follow each other, so no sum is shared between tasks. Scores and their
// gradients are made transposed (rows keys, columns queries):
//   s^T = K q^T, dp^T = V dout^T, p^T = 2^(s^T - lse), ds^T = p^T (dp^T - delta) slope
// because then lse and delta run along lanes (no reductions), p^T and ds^T are at once the A
// operands of dv += p^T dout and dk += ds^T q, and ds^T zipped by pairs is the B operand of dq^T +=
// K^T ds^T.
#include "kernels/cpu/attention_amx.h"

#include <immintrin.h>
#include <omp.h>

namespace tandem::kernels::cpu {
namespace {

constexpr std::int64_t kBlock = kBackwardBlock;        // keys and queries of one block
constexpr std::int64_t kStride = kBackwardBlock + 32;  // bf16 of one row of p^T and ds^T

struct Work {
  // Of the sequence under this key-value head; length padded to 32.
  std::uint16_t *k, *v;  // [length][dim], zero-padded
  char* k_t;             // A tiles of K^T: per 32 keys dim / 16 tiles
  float *dk, *dv;        // [length][dim]
  // Of one query head.
  char *q_columns, *dout_columns;  // B tiles, columns rows: per 16 rows dim / 32 tiles
  char *q_rows, *dout_rows;        // B tiles, reduction over rows: per 32 rows dim / 16 tiles
  float *lse, *delta;              // [length]; lse in log2, +inf where there is no row
  float* dq_t;                     // [dim][length]
  // Of one block.
  std::uint16_t *p, *ds;  // [kBlock keys][kStride]
  char* ds_rows;          // per 32 keys kBlock / 16 tiles
  float *s, *dp;          // [32][32]
};

Work lay_out(const Attention& a, char* scratch) {
  const std::int64_t length = round_up(a.length_max, 32), rows = length * a.dim;
  Work w;
  const auto take = [&](std::int64_t bytes) {
    char* piece = scratch;
    scratch += round_up(bytes, kCacheLine);
    return piece;
  };
  w.k = reinterpret_cast<std::uint16_t*>(take(rows * 2));
  w.v = reinterpret_cast<std::uint16_t*>(take(rows * 2));
  w.k_t = take(rows * 2);
  w.dk = reinterpret_cast<float*>(take(rows * 4));
  w.dv = reinterpret_cast<float*>(take(rows * 4));
  w.q_columns = take(rows * 2);
  w.dout_columns = take(rows * 2);
  w.q_rows = take(rows * 2);
  w.dout_rows = take(rows * 2);
  w.lse = reinterpret_cast<float*>(take(length * 4));
  w.delta = reinterpret_cast<float*>(take(length * 4));
  w.dq_t = reinterpret_cast<float*>(take(rows * 4));
  w.p = reinterpret_cast<std::uint16_t*>(take(kBlock * kStride * 2));
  w.ds = reinterpret_cast<std::uint16_t*>(take(kBlock * kStride * 2));
  w.ds_rows = take(kBlock * kBlock * 2);
  w.s = reinterpret_cast<float*>(take(32 * 32 * 4));
  w.dp = reinterpret_cast<float*>(take(32 * 32 * 4));
  return w;
}

struct Owner {
  std::int64_t row, length, padded, kv_head;
};

void copy_rows(const std::uint16_t* from, std::int64_t ld, const Owner& n, std::int64_t dim,
               std::uint16_t* to) {
  for (std::int64_t i = 0; i < n.length; ++i)
    __builtin_memcpy(to + i * dim, from + i * ld, static_cast<std::size_t>(dim) * 2);
  __builtin_memset(to + n.length * dim, 0,
                   static_cast<std::size_t>((n.padded - n.length) * dim) * 2);
}

void begin_keys(const Attention& a, const Owner& n, const Work& w) {
  const auto* k =
      static_cast<const std::uint16_t*>(a.q) + n.row * a.ldq + (a.heads + n.kv_head) * a.dim;
  copy_rows(k, a.ldq, n, a.dim, w.k);
  copy_rows(k + a.kv_heads * a.dim, a.ldq, n, a.dim, w.v);
  for (std::int64_t j = 0; j < n.padded; j += 32)
    for (std::int64_t d = 0; d < a.dim; d += 32) {
      __m512i lo[16], hi[16];  // pairs of keys, of 16 elements each
      for (int i = 0; i < 16; ++i)
        zip_words(_mm512_loadu_si512(w.k + (j + 2 * i) * a.dim + d),
                  _mm512_loadu_si512(w.k + (j + 2 * i + 1) * a.dim + d), lo[i], hi[i]);
      transpose_16x16(lo);
      transpose_16x16(hi);
      char* tile = w.k_t + j / 32 * (a.dim / 16) * 1024 + d / 16 * 1024;
      for (int i = 0; i < 16; ++i) {
        _mm512_store_si512(tile + i * 64, lo[i]);
        _mm512_store_si512(tile + 1024 + i * 64, hi[i]);
      }
    }
  __builtin_memset(w.dk, 0, static_cast<std::size_t>(n.padded * a.dim) * 4);
  __builtin_memset(w.dv, 0, static_cast<std::size_t>(n.padded * a.dim) * 4);
}

// Rows of q or dout as both kinds of B tiles.
void pack_rows_twice(const std::uint16_t* from, std::int64_t ld, const Owner& n, std::int64_t dim,
                     char* columns, char* rows) {
  const std::int64_t steps = dim / 32;
  for (std::int64_t i = 0; i < n.padded; i += 16)
    for (std::int64_t s = 0; s < steps; ++s) {
      tile_of_columns(from + i * ld + s * 32, ld, n.length - i,
                      columns + (i / 16 * steps + s) * 1024);
      char* tiles = rows + (i / 32 * steps + s) * 2048;
      for (std::int64_t r = 0; r < 16; r += 2) {
        const std::uint16_t* row = from + (i + r) * ld + s * 32;
        zip_into_tiles(i + r < n.length ? row : nullptr, i + r + 1 < n.length ? row + ld : nullptr,
                       (i % 32 + r) / 2, tiles);
      }
    }
}

void begin_head(const Attention& a, const Owner& n, std::int64_t head, const Work& w) {
  const auto* q = static_cast<const std::uint16_t*>(a.q) + n.row * a.ldq + head * a.dim;
  const auto* dout = static_cast<const std::uint16_t*>(a.dout) + n.row * a.lddo + head * a.dim;
  const auto* out = static_cast<const std::uint16_t*>(a.out_saved) + n.row * a.ldo + head * a.dim;
  pack_rows_twice(q, a.ldq, n, a.dim, w.q_columns, w.q_rows);
  pack_rows_twice(dout, a.lddo, n, a.dim, w.dout_columns, w.dout_rows);
  for (std::int64_t i = 0; i < n.length; ++i) {
    __m512 sum = _mm512_setzero_ps();
    for (std::int64_t d = 0; d < a.dim; d += 16)
      sum = _mm512_fmadd_ps(load_lanes(dout + i * a.lddo, true, d, 0xffff),
                            load_lanes(out + i * a.ldo, true, d, 0xffff), sum);
    w.delta[i] = _mm512_reduce_add_ps(sum);
    w.lse[i] = a.lse_saved[(n.row + i) * a.heads + head] * kLog2E;
  }
  for (std::int64_t i = n.length; i < n.padded; ++i) {
    w.delta[i] = 0.0f;
    w.lse[i] = __builtin_huge_valf();
  }
  __builtin_memset(w.dq_t, 0, static_cast<std::size_t>(n.padded * a.dim) * 4);
}

// p and ds of one key against 16 queries from position `i`; m: the queries that see it.
struct Lane {
  __m512 p, ds;
};
template <bool kCapped, bool kMasked>
TANDEM_LANES Lane gradients_of(const Attention& a, const Work& w, const float* s, const float* dp,
                               std::int64_t i, std::int64_t key) {
  __m512 slope = _mm512_set1_ps(a.scale);
  __m512 exponent;
  if constexpr (kCapped) {
    const __m512 t =
        tanh_lanes(_mm512_mul_ps(_mm512_load_ps(s), _mm512_set1_ps(a.scale / a.soft_cap)));
    exponent = _mm512_fmsub_ps(t, _mm512_set1_ps(a.soft_cap * kLog2E), _mm512_loadu_ps(w.lse + i));
    slope = _mm512_mul_ps(slope, _mm512_fnmadd_ps(t, t, _mm512_set1_ps(1.0f)));
  } else {
    exponent = _mm512_fmsub_ps(_mm512_load_ps(s), _mm512_set1_ps(a.scale * kLog2E),
                               _mm512_loadu_ps(w.lse + i));
  }
  const __m512 over = _mm512_sub_ps(_mm512_load_ps(dp), _mm512_loadu_ps(w.delta + i));
  const __m512 p = exp2_lanes(exponent);
  if constexpr (!kMasked) return {p, _mm512_mul_ps(_mm512_mul_ps(p, over), slope)};
  __mmask16 m = static_cast<__mmask16>(~lane_mask(key - i));
  if (a.window > 0) m = static_cast<__mmask16>(m & lane_mask(key + a.window - i));
  return {_mm512_maskz_mov_ps(m, p), _mm512_maskz_mul_ps(m, _mm512_mul_ps(p, over), slope)};
}

// The 32 x 32 products in w.s and w.dp to p^T, ds^T and the zipped ds^T at (jb, ib) of the block.
template <bool kCapped, bool kMasked>
void differentiate(const Attention& a, const Work& w, std::int64_t key, std::int64_t query,
                   std::int64_t jb, std::int64_t ib) {
  char* zipped = w.ds_rows + (jb / 32 * (kBlock / 16) + ib / 16) * 1024;
  for (std::int64_t j = 0; j < 32; j += 2) {
    __m512i ds_rows[2];
    for (std::int64_t r = 0; r < 2; ++r) {
      const float* s = w.s + (j + r) * 32;
      const float* dp = w.dp + (j + r) * 32;
      const Lane lo = gradients_of<kCapped, kMasked>(a, w, s, dp, query, key + j + r);
      const Lane hi =
          gradients_of<kCapped, kMasked>(a, w, s + 16, dp + 16, query + 16, key + j + r);
      const std::int64_t at = (jb + j + r) * kStride + ib;
      ds_rows[r] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(hi.ds, lo.ds));
      _mm512_storeu_si512(w.p + at, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(hi.p, lo.p)));
      _mm512_storeu_si512(w.ds + at, ds_rows[r]);
    }
    __m512i zip_lo, zip_hi;
    zip_words(ds_rows[0], ds_rows[1], zip_lo, zip_hi);
    _mm512_store_si512(zipped + j * 32, zip_lo);
    _mm512_store_si512(zipped + 1024 + j * 32, zip_hi);
  }
}

// p^T, ds^T and its zipped form for 32 keys from `key` and 32 queries from `query`, at (jb, ib) of
// the block.
void make_sub_block(const Attention& a, const Work& w, std::int64_t key, std::int64_t query,
                    std::int64_t jb, std::int64_t ib) {
  const std::int64_t steps = a.dim / 32, row = a.dim * 2;
  multiply_tiles<2>(reinterpret_cast<const char*>(w.k + key * a.dim), row, 16 * row, 64,
                    w.q_columns + query / 16 * steps * 1024, steps * 1024, 1024, steps, false, w.s,
                    128);
  multiply_tiles<2>(reinterpret_cast<const char*>(w.v + key * a.dim), row, 16 * row, 64,
                    w.dout_columns + query / 16 * steps * 1024, steps * 1024, 1024, steps, false,
                    w.dp, 128);
  const bool masked = query < key + 31 || (a.window > 0 && query + 31 - key >= a.window);
  if (a.soft_cap > 0.0f)
    masked ? differentiate<true, true>(a, w, key, query, jb, ib)
           : differentiate<true, false>(a, w, key, query, jb, ib);
  else
    masked ? differentiate<false, true>(a, w, key, query, jb, ib)
           : differentiate<false, false>(a, w, key, query, jb, ib);
}

void run_block(const Attention& a, const Owner& n, const Work& w, std::int64_t key,
               std::int64_t query) {
  const std::int64_t keys = min_of(kBlock, n.padded - key);
  const std::int64_t queries = min_of(kBlock, n.padded - query);
  const std::int64_t tiles = a.dim / 16;
  for (std::int64_t j = 0; j < keys; j += 32)
    for (std::int64_t i = max_of(0, key + j - query); i < queries; i += 32)
      make_sub_block(a, w, key + j, query + i, j, i);
  for (std::int64_t j = 0; j < keys; j += 32) {
    const std::int64_t i = max_of(0, key + j - query);  // earlier queries do not see these keys
    if (i >= queries) continue;
    for (std::int64_t d = 0; d < a.dim; d += 32) {
      const std::int64_t rows = ((query + i) / 32 * tiles + d / 16) * 1024;
      multiply_tiles<2>(reinterpret_cast<const char*>(w.p + j * kStride + i), kStride * 2,
                        16 * kStride * 2, 64, w.dout_rows + rows, 1024, tiles * 1024,
                        (queries - i) / 32, true, w.dv + (key + j) * a.dim + d, a.dim * 4);
      multiply_tiles<2>(reinterpret_cast<const char*>(w.ds + j * kStride + i), kStride * 2,
                        16 * kStride * 2, 64, w.q_rows + rows, 1024, tiles * 1024,
                        (queries - i) / 32, true, w.dk + (key + j) * a.dim + d, a.dim * 4);
    }
  }
  for (std::int64_t i = 0; i < queries; i += 32) {
    const std::int64_t seen = min_of(keys, query + i + 32 - key);
    if (seen <= 0) continue;
    for (std::int64_t d = 0; d < a.dim; d += 32)
      multiply_tiles<2>(w.k_t + (key / 32 * tiles + d / 16) * 1024, 64, 1024, tiles * 1024,
                        w.ds_rows + i / 16 * 1024, 1024, kBlock / 16 * 1024, seen / 32, true,
                        w.dq_t + d * n.padded + query + i, n.padded * 4);
  }
}

// dq_t [dim][length] to rows of the output.
void store_dq(const Attention& a, const Owner& n, std::int64_t head, const Work& w) {
  auto* to = static_cast<std::uint16_t*>(a.dqkv) + n.row * a.lddqkv + head * a.dim;
  for (std::int64_t i = 0; i < n.length; i += 16)
    for (std::int64_t d = 0; d < a.dim; d += 16) {
      __m512i r[16];
      for (int c = 0; c < 16; ++c) r[c] = _mm512_loadu_si512(w.dq_t + (d + c) * n.padded + i);
      transpose_16x16(r);
      for (std::int64_t c = 0; c < min_of(16, n.length - i); ++c)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (i + c) * a.lddqkv + d),
                            narrow(_mm512_castsi512_ps(r[c])));
    }
}

void store_rows(const float* from, const Owner& n, std::int64_t dim, std::uint16_t* to,
                std::int64_t ld) {
  for (std::int64_t i = 0; i < n.length; ++i)
    for (std::int64_t d = 0; d < dim; d += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * ld + d),
                          narrow(_mm512_loadu_ps(from + i * dim + d)));
}

void run_owner(const Attention& a, const Owner& n, const Work& w) {
  const std::int64_t group = a.heads / a.kv_heads;
  begin_keys(a, n, w);
  for (std::int64_t head = n.kv_head * group; head < (n.kv_head + 1) * group; ++head) {
    begin_head(a, n, head, w);
    for (std::int64_t key = 0; key < n.padded; key += kBlock)
      for (std::int64_t query = key; query < n.padded; query += kBlock) {
        if (a.window > 0 && query - (key + kBlock - 1) >= a.window) break;
        run_block(a, n, w, key, query);
      }
    store_dq(a, n, head, w);
  }
  auto* dk = static_cast<std::uint16_t*>(a.dqkv) + n.row * a.lddqkv + (a.heads + n.kv_head) * a.dim;
  store_rows(w.dk, n, a.dim, dk, a.lddqkv);
  store_rows(w.dv, n, a.dim, dk + a.kv_heads * a.dim, a.lddqkv);
}

}  // namespace

void attention_backward_amx(const Attention& a) {
#pragma omp parallel
  {
    load_tile_config(16, 16);
    const Work w = lay_out(a, a.scratch + omp_get_thread_num() * a.scratch_per_thread);
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < a.sequences * a.kv_heads; ++i) {
      const std::int64_t s = i / a.kv_heads, length = a.offsets[s + 1] - a.offsets[s];
      if (length > 0) run_owner(a, {a.offsets[s], length, round_up(length, 32), i % a.kv_heads}, w);
    }
    _tile_release();
  }
  for (std::int64_t i = a.offsets[a.sequences]; i < a.t; ++i)
    __builtin_memset(static_cast<std::uint16_t*>(a.dqkv) + i * a.lddqkv, 0,
                     static_cast<std::size_t>((a.heads + 2 * a.kv_heads) * a.dim) * 2);
}

}  // namespace tandem::kernels::cpu
