#include "kernels/cpu/attention.h"

#include "protocol/base/check.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace tandem::kernels::cpu {
namespace {

float get(const ConstRows& m, std::int64_t i, std::int64_t j) {
  const std::int64_t at = i * m.ld + j;
  return m.dtype == DType::kF32 ? static_cast<const float*>(m.data)[at]
                                : to_f32(static_cast<const bf16*>(m.data)[at]);
}
void set(const Rows& m, std::int64_t i, std::int64_t j, float x) {
  const std::int64_t at = i * m.ld + j;
  if (m.dtype == DType::kF32)
    static_cast<float*>(m.data)[at] = x;
  else
    static_cast<bf16*>(m.data)[at] = to_bf16(x);
}
void add(const Rows& m, std::int64_t i, std::int64_t j, float x) {
  set(m, i, j, get({m.data, m.ld, m.dtype}, i, j) + x);
}

// Element d of key or value j.
using KeyElement = std::function<float(std::int64_t j, std::int64_t d)>;

float score(const AttentionShape& shape, const ConstRows& q, std::int64_t row, std::int64_t h,
            std::int64_t j, const KeyElement& k) {
  float sum = 0.0f;
  for (std::int64_t d = 0; d < shape.head_dim; ++d)
    sum = std::fma(get(q, row, h * shape.head_dim + d), k(j, d), sum);
  sum *= shape.scale;
  return shape.soft_cap > 0 ? shape.soft_cap * std::tanh(sum / shape.soft_cap) : sum;
}

// One query row at `position`; returns the log of the sum of exp(score).
float row_forward(const AttentionShape& shape, const ConstRows& q, std::int64_t row, std::int64_t h,
                  std::int64_t position, const KeyElement& k, const KeyElement& v, Rows out) {
  const std::int64_t first =
      shape.window > 0 ? std::max<std::int64_t>(0, position - shape.window + 1) : 0;
  float m = -INFINITY, sum = 0.0f;
  float o[kHeadDimMax] = {};
  for (std::int64_t j = first; j <= position; ++j) {
    const float s = score(shape, q, row, h, j, k);
    const float m_new = std::max(m, s);
    const float keep = std::exp(m - m_new), p = std::exp(s - m_new);
    sum = sum * keep + p;
    for (std::int64_t d = 0; d < shape.head_dim; ++d) o[d] = o[d] * keep + p * v(j, d);
    m = m_new;
  }
  for (std::int64_t d = 0; d < shape.head_dim; ++d)
    set(out, row, h * shape.head_dim + d, o[d] / sum);
  return m + std::log(sum);
}

void zero_rows(const Rows& out, std::int64_t begin, std::int64_t end, std::int64_t columns) {
  for (std::int64_t i = begin; i < end; ++i)
    for (std::int64_t j = 0; j < columns; ++j) set(out, i, j, 0.0f);
}

}  // namespace

std::int64_t attention_forward_scratch(const AttentionShape&, std::int64_t, std::int64_t, int) {
  return 0;
}
void attention_forward(const AttentionShape& shape, std::int64_t t, ConstRows qkv,
                       std::span<const std::int32_t> seq_offsets, std::int64_t, Rows out,
                       float* lse, std::span<std::byte>) {
  const std::int64_t dim = shape.head_dim, group = shape.heads / shape.kv_heads;
#pragma omp parallel for schedule(dynamic)
  for (std::int64_t h = 0; h < shape.heads; ++h)
    for (std::size_t s = 0; s + 1 < seq_offsets.size(); ++s) {
      const std::int64_t begin = seq_offsets[s];
      const std::int64_t kc = (shape.heads + h / group) * dim, vc = kc + shape.kv_heads * dim;
      for (std::int64_t i = begin; i < seq_offsets[s + 1]; ++i) {
        const float l = row_forward(
            shape, qkv, i, h, i - begin,
            [&](std::int64_t j, std::int64_t d) { return get(qkv, begin + j, kc + d); },
            [&](std::int64_t j, std::int64_t d) { return get(qkv, begin + j, vc + d); }, out);
        if (lse != nullptr) lse[i * shape.heads + h] = l;
      }
    }
  zero_rows(out, seq_offsets.back(), t, shape.heads * dim);
}

std::int64_t attention_backward_scratch(const AttentionShape&, std::int64_t, std::int64_t, int) {
  return 0;
}
void attention_backward(const AttentionShape& shape, std::int64_t t, ConstRows dout, ConstRows qkv,
                        ConstRows out, const float* lse, std::span<const std::int32_t> seq_offsets,
                        std::int64_t, Rows dqkv, std::span<std::byte>) {
  const std::int64_t dim = shape.head_dim, group = shape.heads / shape.kv_heads;
  zero_rows(dqkv, 0, t, (shape.heads + 2 * shape.kv_heads) * dim);
  for (std::int64_t h = 0; h < shape.heads; ++h)
    for (std::size_t s = 0; s + 1 < seq_offsets.size(); ++s) {
      const std::int64_t begin = seq_offsets[s];
      const std::int64_t qc = h * dim, kc = (shape.heads + h / group) * dim;
      const std::int64_t vc = kc + shape.kv_heads * dim;
      const KeyElement k = [&](std::int64_t j, std::int64_t d) {
        return get(qkv, begin + j, kc + d);
      };
      for (std::int64_t i = begin; i < seq_offsets[s + 1]; ++i) {
        float delta = 0.0f;
        for (std::int64_t d = 0; d < dim; ++d) delta += get(dout, i, qc + d) * get(out, i, qc + d);
        const std::int64_t position = i - begin;
        for (std::int64_t j = 0; j <= position; ++j) {
          if (shape.window > 0 && position - j >= shape.window) continue;
          const float sc = score(shape, qkv, i, h, j, k);
          const float p = std::exp(sc - lse[i * shape.heads + h]);
          float dp = 0.0f;
          for (std::int64_t d = 0; d < dim; ++d)
            dp += get(dout, i, qc + d) * get(qkv, begin + j, vc + d);
          float ds = p * (dp - delta) * shape.scale;
          if (shape.soft_cap > 0) ds *= 1.0f - (sc / shape.soft_cap) * (sc / shape.soft_cap);
          for (std::int64_t d = 0; d < dim; ++d) {
            add(dqkv, i, qc + d, ds * get(qkv, begin + j, kc + d));
            add(dqkv, begin + j, kc + d, ds * get(qkv, i, qc + d));
            add(dqkv, begin + j, vc + d, p * get(dout, i, qc + d));
          }
        }
      }
    }
}

std::int64_t paged_attention_scratch(const AttentionShape&, std::int64_t, std::int64_t,
                                     std::int64_t, int) {
  return 0;
}
void paged_attention(const AttentionShape& shape, std::int64_t t, ConstRows q,
                     std::span<const std::int32_t> q_offsets, const PagedKeys& keys, std::int64_t,
                     Rows out, std::span<std::byte>) {
  const std::int64_t dim = shape.head_dim, group = shape.heads / shape.kv_heads;
#pragma omp parallel for schedule(dynamic)
  for (std::int64_t h = 0; h < shape.heads; ++h)
    for (std::size_t s = 0; s + 1 < q_offsets.size(); ++s) {
      const std::int32_t* table =
          keys.block_tables + static_cast<std::int64_t>(s) * keys.blocks_max;
      const auto element = [&](const void* cache) {
        return [&, cache](std::int64_t j, std::int64_t d) {
          const std::int64_t block = table[j / keys.block_size];
          const std::int64_t at =
              ((block * shape.kv_heads + h / group) * keys.block_size + j % keys.block_size) * dim;
          return get({cache, 0, shape.dtype}, 0, at + d);
        };
      };
      for (std::int64_t i = q_offsets[s]; i < q_offsets[s + 1]; ++i)
        row_forward(shape, q, i, h, keys.kv_lens[s] - (q_offsets[s + 1] - i), element(keys.k),
                    element(keys.v), out);
    }
  zero_rows(out, q_offsets.back(), t, shape.heads * dim);
}

}  // namespace tandem::kernels::cpu
