// Attention in f32 arithmetic, included by one file per instruction set (see gemm_f32_body.h).
//
// A task is a run of rows of one sequence under one key-value head (or under one query head where
// tasks would be too few). It walks key blocks of 16, aligned at position 0, upwards. What is done
// for one query (a row and a head) per block: 16 scores, each one chain over d; the block's largest
// score; the old sums scaled by exp(m_old - m_new); the block's probabilities added; each output
// element one chain over the block's visible keys. None of it depends on the other queries.
#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/simd16.h"

#include <omp.h>

#include <math.h>

namespace tandem::kernels::cpu {
namespace {

constexpr float kNone = -__builtin_huge_valf();

TANDEM_V float widen_one(const void* data, bool is_bf16, std::int64_t at) {
  if (!is_bf16) return static_cast<const float*>(data)[at];
  return __builtin_bit_cast(
      float, static_cast<std::uint32_t>(static_cast<const bf16*>(data)[at].bits) << 16);
}

TANDEM_V std::uint16_t round_one(float x) {
  const auto u = __builtin_bit_cast(std::uint32_t, x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((u >> 16) | 0x40u);
  return static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// `count` elements from `at` on as f32, zeros up to `padded`.
TANDEM_V void load_row(const void* data, bool is_bf16, std::int64_t at, std::int64_t count,
                       std::int64_t padded, float* to) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    vstore(to + i, is_bf16 ? vload_bf16(static_cast<const bf16*>(data) + at + i)
                           : vload(static_cast<const float*>(data) + at + i));
  for (; i < count; ++i) to[i] = widen_one(data, is_bf16, at + i);
  for (; i < padded; ++i) to[i] = 0.0f;
}

TANDEM_V void store_row(void* data, bool is_bf16, std::int64_t at, std::int64_t count,
                        const float* from) {
  if (is_bf16) {
    for (std::int64_t i = 0; i < count; ++i)
      static_cast<bf16*>(data)[at + i].bits = round_one(from[i]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) static_cast<float*>(data)[at + i] = from[i];
  }
}

// Rows of keys and of values of one block: element d of key j is at k_at + j * stride + d.
struct KeyRows {
  const void* k;
  const void* v;
  std::int64_t k_at, v_at, stride;
};

KeyRows key_rows(const Attention& a, std::int64_t sequence, std::int64_t kv_head,
                 std::int64_t first) {
  if (a.paged) {
    const std::int64_t block = a.block_tables[sequence * a.blocks_max + first / a.block_size];
    const std::int64_t at =
        ((block * a.kv_heads + kv_head) * a.block_size + first % a.block_size) * a.dim;
    return {a.k_cache, a.v_cache, at, at, a.dim};
  }
  const std::int64_t row = a.offsets[sequence] + first;
  const std::int64_t at = row * a.ldq + (a.heads + kv_head) * a.dim;
  return {a.q, a.q, at, at + a.kv_heads * a.dim, a.ldq};
}

// Keys [first, first + count) of a block transposed: to[d][16], absent keys 0.
void transpose_keys(const void* data, bool is_bf16, std::int64_t at, std::int64_t stride,
                    std::int64_t count, std::int64_t dim, float* to) {
  for (std::int64_t d = 0; d < dim; ++d)
    for (std::int64_t j = 0; j < kKeyBlock; ++j)
      to[d * kKeyBlock + j] = j < count ? widen_one(data, is_bf16, at + j * stride + d) : 0.0f;
}

// dots[r][16] = q_r . keys, one chain over d each.
template <int R>
void dot_keys(const float* q, std::int64_t ldq, const float* keys, std::int64_t dim, float* dots) {
  V sums[R];
  for (int r = 0; r < R; ++r) sums[r] = vset(0.0f);
  for (std::int64_t d = 0; d < dim; ++d) {
    const V k = vload(keys + d * kKeyBlock);
    TANDEM_UNROLL(8)
    for (int r = 0; r < R; ++r) sums[r] = vfma(vset(q[r * ldq + d]), k, sums[r]);
  }
  for (int r = 0; r < R; ++r) vstore(dots + r * kKeyBlock, sums[r]);
}

void dot_keys_all(const float* q, std::int64_t ldq, const float* keys, std::int64_t dim,
                  std::int64_t queries, float* dots) {
  std::int64_t i = 0;
  for (; i + 8 <= queries; i += 8) dot_keys<8>(q + i * ldq, ldq, keys, dim, dots + i * kKeyBlock);
  for (; i + 2 <= queries; i += 2) dot_keys<2>(q + i * ldq, ldq, keys, dim, dots + i * kKeyBlock);
  for (; i < queries; ++i) dot_keys<1>(q + i * ldq, ldq, keys, dim, dots + i * kKeyBlock);
}

// cap * tanh(s / cap), tanh(x) = 1 - 2 / (e^2x + 1).
TANDEM_V V soft_capped(V s, float cap) {
  const V e = vexp(vmul(s, vset(2.0f / cap)));
  const V t = vsub(vset(1.0f), vdiv(vset(2.0f), vadd(e, vset(1.0f))));
  return vmul(t, vset(cap));
}

TANDEM_V V score_of(const Attention& a, V dot) {
  const V s = vmul(dot, vset(a.scale));
  return a.soft_cap > 0.0f ? soft_capped(s, a.soft_cap) : s;
}

// The queries of a task: `rows` consecutive rows times `group` heads, in that order.
struct Queries {
  std::int64_t sequence, row, rows, position;  // of the first row
  std::int64_t head, group, kv_head;
  [[nodiscard]] std::int64_t count() const { return rows * group; }
};

// Keys query `i` sees inside the block at `first`: lanes [lo, hi).
struct Lanes {
  std::int64_t lo, hi;
};
TANDEM_V Lanes visible(const Attention& a, std::int64_t position, std::int64_t first) {
  const std::int64_t from = a.window > 0 ? position - a.window + 1 : 0;
  return {max_of(0, from - first), min_of(kKeyBlock, position + 1 - first)};
}

void add_block(const Attention& a, Lanes lanes, const float* dots, const float* values,
               std::int64_t d, float* m, float* l, float* o) {
  const V none = vset(kNone);
  const V s = vkeep(score_of(a, vload(dots)), lanes.lo, lanes.hi, none);
  const float block_max = vlargest(s);
  const float m_new = *m > block_max ? *m : block_max;
  alignas(64) float p[kKeyBlock], keep_lane[kKeyBlock];
  const V probabilities = vexp(vsub(s, vset(m_new)));
  vstore(p, probabilities);
  vstore(keep_lane, vexp(vset(*m - m_new)));
  const float keep = keep_lane[0];
  *l = *l * keep + vsum(probabilities);
  *m = m_new;
  const V keep_all = vset(keep);
  for (std::int64_t c = 0; c < d; c += 4 * kLanes) {
    const std::int64_t vectors = min_of(4, (d - c) / kLanes);
    V sums[4];
    for (std::int64_t v = 0; v < vectors; ++v) sums[v] = vmul(vload(o + c + v * kLanes), keep_all);
    for (std::int64_t j = lanes.lo; j < lanes.hi; ++j) {
      const V pj = vset(p[j]);
      for (std::int64_t v = 0; v < vectors; ++v)
        sums[v] = vfma(pj, vload(values + j * d + c + v * kLanes), sums[v]);
    }
    for (std::int64_t v = 0; v < vectors; ++v) vstore(o + c + v * kLanes, sums[v]);
  }
}

void run_queries(const Attention& a, const Queries& n, float* scratch) {
  const std::int64_t d = padded_dim(a.dim), count = n.count();
  float* q = scratch;
  float* o = q + kQueriesMax * d;
  float* m = o + kQueriesMax * d;
  float* l = m + kQueriesMax;
  float* dots = l + kQueriesMax;
  float* keys = dots + kQueriesMax * kKeyBlock;
  float* values = keys + kKeyBlock * d;
  for (std::int64_t i = 0; i < count; ++i) {
    load_row(a.q, a.bf16_rows, (n.row + i / n.group) * a.ldq + (n.head + i % n.group) * a.dim,
             a.dim, d, q + i * d);
    for (std::int64_t c = 0; c < d; ++c) o[i * d + c] = 0.0f;
    m[i] = kNone;
    l[i] = 0.0f;
  }
  const std::int64_t end = n.position + n.rows;  // keys that the last row sees
  const std::int64_t begin = a.window > 0 ? max_of(0, n.position - a.window + 1) : 0;
  for (std::int64_t first = begin / kKeyBlock * kKeyBlock; first < end; first += kKeyBlock) {
    const std::int64_t present = min_of(kKeyBlock, end - first);
    const KeyRows rows = key_rows(a, n.sequence, n.kv_head, first);
    transpose_keys(rows.k, a.bf16_rows, rows.k_at, rows.stride, present, a.dim, keys);
    for (std::int64_t j = 0; j < present; ++j)
      load_row(rows.v, a.bf16_rows, rows.v_at + j * rows.stride, a.dim, d, values + j * d);
    const std::int64_t from = max_of(0, first - n.position) * n.group;
    dot_keys_all(q + from * d, d, keys, a.dim, count - from, dots);
    for (std::int64_t i = from; i < count; ++i) {
      const Lanes lanes = visible(a, n.position + i / n.group, first);
      if (lanes.lo < lanes.hi)
        add_block(a, lanes, dots + (i - from) * kKeyBlock, values, d, m + i, l + i, o + i * d);
    }
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t row = n.row + i / n.group, head = n.head + i % n.group;
    for (std::int64_t c = 0; c < d; ++c) o[i * d + c] /= l[i];
    store_row(a.out, a.bf16_rows, row * a.ldo + head * a.dim, a.dim, o + i * d);
    if (a.lse != nullptr) a.lse[row * a.heads + head] = m[i] + logf(l[i]);
  }
}

void zero_rows(void* data, bool is_bf16, std::int64_t ld, std::int64_t begin, std::int64_t end,
               std::int64_t columns) {
  for (std::int64_t i = begin; i < end; ++i)
    __builtin_memset(static_cast<char*>(data) + i * ld * (is_bf16 ? 2 : 4), 0,
                     static_cast<std::size_t>(columns * (is_bf16 ? 2 : 4)));
}

// Task `index` of tasks numbered sequence by sequence, `rows` rows each, heads innermost.
bool find_queries(const Attention& a, std::int64_t index, std::int64_t rows, std::int64_t group,
                  Queries& n) {
  const std::int64_t head_tasks = a.heads / group, per_kv = a.heads / a.kv_heads;
  const std::int64_t head = index % head_tasks;
  std::int64_t chunk = index / head_tasks;
  for (std::int64_t s = 0; s < a.sequences; ++s) {
    const std::int64_t length = a.offsets[s + 1] - a.offsets[s], chunks = ceil_div(length, rows);
    if (chunk >= chunks) {
      chunk -= chunks;
      continue;
    }
    const std::int64_t first = chunk * rows;
    const std::int64_t before = a.paged ? a.kv_lens[s] - length : 0;
    n = {s,     a.offsets[s] + first, min_of(rows, length - first), before + first, head * group,
         group, head * group / per_kv};
    return true;
  }
  return false;
}

std::int64_t count_chunks(const Attention& a, std::int64_t rows) {
  std::int64_t chunks = 0;
  for (std::int64_t s = 0; s < a.sequences; ++s)
    chunks += ceil_div(a.offsets[s + 1] - a.offsets[s], rows);
  return chunks;
}

}  // namespace

void TANDEM_ISA_NAME(attention_forward)(const Attention& a) {
  std::int64_t group = a.heads / a.kv_heads;
  const std::int64_t rows = max_of(1, min_of(64, kQueriesMax / group));
  const std::int64_t chunks = count_chunks(a, rows);
  if (chunks * a.kv_heads < 2 * omp_get_max_threads()) group = 1;
  const std::int64_t tasks = chunks * (a.heads / group);
#pragma omp parallel
  {
    auto* scratch =
        reinterpret_cast<float*>(a.scratch + omp_get_thread_num() * a.scratch_per_thread);
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < tasks; ++i) {
      Queries n;
      if (find_queries(a, i, rows, group, n)) run_queries(a, n, scratch);
    }
  }
  zero_rows(a.out, a.bf16_rows, a.ldo, a.offsets[a.sequences], a.t, a.heads * a.dim);
}

// -- backward -------------------------------------------------------------------------------------

namespace {

// dst[j][d] += sum over R queries of w[r][j] * x[r][d], for j in [0, count).
template <int R>
void add_outer_rows(const float* w, std::int64_t ldw, const float* x, std::int64_t ldx,
                    std::int64_t count, std::int64_t d, float* dst) {
  for (std::int64_t j = 0; j < count; ++j) {
    V weights[R];
    for (int r = 0; r < R; ++r) weights[r] = vset(w[r * ldw + j]);
    for (std::int64_t c = 0; c < d; c += kLanes) {
      V sum = vload(dst + j * d + c);
      for (int r = 0; r < R; ++r) sum = vfma(weights[r], vload(x + r * ldx + c), sum);
      vstore(dst + j * d + c, sum);
    }
  }
}

void add_outer_all(const float* w, const float* x, std::int64_t d, std::int64_t queries,
                   std::int64_t count, float* dst) {
  std::int64_t i = 0;
  for (; i + 4 <= queries; i += 4)
    add_outer_rows<4>(w + i * kKeyBlock, kKeyBlock, x + i * d, d, count, d, dst);
  for (; i < queries; ++i)
    add_outer_rows<1>(w + i * kKeyBlock, kKeyBlock, x + i * d, d, count, d, dst);
}

// What one thread holds while it owns a sequence under a key-value head.
struct Gradients {
  float *q, *dout, *dq, *lse, *delta;  // per query of the chunk
  float *dk, *dv;                      // per key of the sequence
  float *keys, *keys_t, *values_t, *spare;
};

Gradients lay_out(const Attention& a, float* scratch) {
  const std::int64_t d = padded_dim(a.dim), keys = round_up(a.length_max, kKeyBlock);
  Gradients g;
  g.q = scratch;
  g.dout = g.q + kQueriesMax * d;
  g.dq = g.dout + kQueriesMax * d;
  g.lse = g.dq + kQueriesMax * d;
  g.delta = g.lse + kQueriesMax;
  g.dk = g.delta + kQueriesMax;
  g.dv = g.dk + keys * d;
  g.keys = g.dv + keys * d;
  g.keys_t = g.keys + kKeyBlock * d;
  g.values_t = g.keys_t + kKeyBlock * d;
  g.spare = g.values_t + kKeyBlock * d;
  return g;
}

void load_queries(const Attention& a, const Queries& n, const Gradients& g) {
  const std::int64_t d = padded_dim(a.dim);
  for (std::int64_t i = 0; i < n.count(); ++i) {
    const std::int64_t row = n.row + i / n.group, head = n.head + i % n.group;
    load_row(a.q, a.bf16_rows, row * a.ldq + head * a.dim, a.dim, d, g.q + i * d);
    load_row(a.dout, a.bf16_rows, row * a.lddo + head * a.dim, a.dim, d, g.dout + i * d);
    load_row(a.out_saved, a.bf16_rows, row * a.ldo + head * a.dim, a.dim, d, g.dq + i * d);
    V delta = vset(0.0f);
    for (std::int64_t c = 0; c < d; c += kLanes)
      delta = vfma(vload(g.dout + i * d + c), vload(g.dq + i * d + c), delta);
    g.delta[i] = vsum(delta);
    g.lse[i] = a.lse_saved[row * a.heads + head];
    for (std::int64_t c = 0; c < d; ++c) g.dq[i * d + c] = 0.0f;
  }
}

// Probabilities p and score gradients ds of up to kSome queries against one block.
constexpr std::int64_t kSome = 8;
void block_gradients(const Attention& a, const Queries& n, const Gradients& g, std::int64_t from,
                     std::int64_t count, std::int64_t first, float* p, float* ds) {
  const std::int64_t d = padded_dim(a.dim);
  dot_keys_all(g.q + from * d, d, g.keys_t, a.dim, count, p);
  dot_keys_all(g.dout + from * d, d, g.values_t, a.dim, count, ds);
  const V zero = vset(0.0f);
  for (std::int64_t i = 0; i < count; ++i) {
    const Lanes lanes = visible(a, n.position + (from + i) / n.group, first);
    const V s = score_of(a, vload(p + i * kKeyBlock));
    const V probability =
        vkeep(vexp(vsub(s, vset(g.lse[from + i]))), lanes.lo, max_of(lanes.lo, lanes.hi), zero);
    V slope = vset(a.scale);
    if (a.soft_cap > 0.0f) {
      const V t = vmul(s, vset(1.0f / a.soft_cap));
      slope = vmul(slope, vsub(vset(1.0f), vmul(t, t)));
    }
    const V dp = vsub(vload(ds + i * kKeyBlock), vset(g.delta[from + i]));
    vstore(p + i * kKeyBlock, probability);
    vstore(ds + i * kKeyBlock,
           vkeep(vmul(vmul(probability, dp), slope), lanes.lo, max_of(lanes.lo, lanes.hi), zero));
  }
}

void run_gradients(const Attention& a, const Queries& n, const Gradients& g) {
  const std::int64_t d = padded_dim(a.dim), count = n.count(), end = n.position + n.rows;
  load_queries(a, n, g);
  const std::int64_t begin = a.window > 0 ? max_of(0, n.position - a.window + 1) : 0;
  alignas(64) float p[kSome * kKeyBlock], ds[kSome * kKeyBlock];
  for (std::int64_t first = begin / kKeyBlock * kKeyBlock; first < end; first += kKeyBlock) {
    const std::int64_t present = min_of(kKeyBlock, end - first);
    const KeyRows rows = key_rows(a, n.sequence, n.kv_head, first);
    transpose_keys(rows.k, a.bf16_rows, rows.k_at, rows.stride, present, a.dim, g.keys_t);
    transpose_keys(rows.v, a.bf16_rows, rows.v_at, rows.stride, present, a.dim, g.values_t);
    for (std::int64_t j = 0; j < present; ++j)
      load_row(rows.k, a.bf16_rows, rows.k_at + j * rows.stride, a.dim, d, g.keys + j * d);
    for (std::int64_t i = max_of(0, first - n.position) * n.group; i < count; i += kSome) {
      const std::int64_t some = min_of(kSome, count - i);
      block_gradients(a, n, g, i, some, first, p, ds);
      add_outer_all(p, g.dout + i * d, d, some, present, g.dv + first * d);
      add_outer_all(ds, g.q + i * d, d, some, present, g.dk + first * d);
      for (std::int64_t r = 0; r < some; ++r)
        for (std::int64_t c = 0; c < d; c += kLanes) {
          V sum = vload(g.dq + (i + r) * d + c);
          for (std::int64_t j = 0; j < present; ++j)
            sum = vfma(vset(ds[r * kKeyBlock + j]), vload(g.keys + j * d + c), sum);
          vstore(g.dq + (i + r) * d + c, sum);
        }
    }
  }
  for (std::int64_t i = 0; i < count; ++i)
    store_row(a.dqkv, a.bf16_rows,
              (n.row + i / n.group) * a.lddqkv + (n.head + i % n.group) * a.dim, a.dim,
              g.dq + i * d);
}

}  // namespace

void TANDEM_ISA_NAME(attention_backward)(const Attention& a) {
  const std::int64_t d = padded_dim(a.dim), group = a.heads / a.kv_heads;
  const std::int64_t rows_max = max_of(1, min_of(64, kQueriesMax / group));
#pragma omp parallel
  {
    const Gradients g = lay_out(
        a, reinterpret_cast<float*>(a.scratch + omp_get_thread_num() * a.scratch_per_thread));
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < a.sequences * a.kv_heads; ++i) {
      const std::int64_t s = i / a.kv_heads, kv_head = i % a.kv_heads;
      const std::int64_t row = a.offsets[s], length = a.offsets[s + 1] - row;
      for (std::int64_t c = 0; c < length * d; ++c) g.dk[c] = g.dv[c] = 0.0f;
      for (std::int64_t first = 0; first < length; first += rows_max)
        run_gradients(a,
                      {s, row + first, min_of(rows_max, length - first), first, kv_head * group,
                       group, kv_head},
                      g);
      for (std::int64_t j = 0; j < length; ++j) {
        const std::int64_t at = (row + j) * a.lddqkv + (a.heads + kv_head) * a.dim;
        store_row(a.dqkv, a.bf16_rows, at, a.dim, g.dk + j * d);
        store_row(a.dqkv, a.bf16_rows, at + a.kv_heads * a.dim, a.dim, g.dv + j * d);
      }
    }
  }
  zero_rows(a.dqkv, a.bf16_rows, a.lddqkv, a.offsets[a.sequences], a.t,
            (a.heads + 2 * a.kv_heads) * a.dim);
}

}  // namespace tandem::kernels::cpu
