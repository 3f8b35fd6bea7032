// Attention of packed batches and of paged caches.
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/naive_products.h"
#include "kernels/cpu/parallel.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace tandem::kernels::cpu {
namespace {

float capped(float score, float cap) {
  return cap > 0.0f ? cap * std::tanh(score / cap) : score;
}

/// First key a query at `position` sees.
std::int64_t first_key(const AttentionSpec& spec, std::int64_t position) {
  return spec.window > 0 ? std::max<std::int64_t>(0, position - spec.window + 1) : 0;
}

/// One row of one head; key(j) and value(j) point at the j-th key and value. Returns the log of the
/// sum of exp(score).
template <class T, class Key, class Value>
float attend(const AttentionSpec& spec, std::int64_t position, const T* q, const Key& key,
             const Value& value, float* scores, T* out) {
  const std::int64_t d = spec.head_dim, begin = first_key(spec, position);
  float top = -INFINITY;
  for (std::int64_t j = begin; j <= position; ++j) {
    scores[j] = capped(spec.scale * dot(q, key(j), d), spec.soft_cap);
    top = std::max(top, scores[j]);
  }
  float sum = 0.0f;
  for (std::int64_t j = begin; j <= position; ++j) sum += scores[j] = std::exp(scores[j] - top);
  constexpr std::int64_t kBlock = 64;
  for (std::int64_t at = 0; at < d; at += kBlock) {
    const std::int64_t count = std::min(kBlock, d - at);
    float acc[kBlock] = {};
    for (std::int64_t j = begin; j <= position; ++j) {
      const T* v = value(j) + at;
      for (std::int64_t c = 0; c < count; ++c) acc[c] += scores[j] * to_f32(v[c]);
    }
    for (std::int64_t c = 0; c < count; ++c) out[at + c] = from_f32<T>(acc[c] / sum);
  }
  return top + std::log(sum);
}

/// Index of the sequence that owns `row`, or -1 beyond the last.
std::int64_t sequence_of(const std::int32_t* offsets, std::int64_t s, std::int64_t row) {
  const auto* end = offsets + s + 1;
  const auto* next = std::upper_bound(offsets, end, static_cast<std::int32_t>(row));
  return next == end ? -1 : next - offsets - 1;
}

void check_offsets(const Tensor& offsets, std::int64_t t, std::int64_t length_max,
                   const char* name) {
  const auto* p = offsets.as<std::int32_t>();
  TANDEM_CHECK_EQ(p[0], 0, name);
  for (std::int64_t s = 0; s + 1 < offsets.dim(0); ++s)
    TANDEM_CHECK(p[s] <= p[s + 1] && p[s + 1] <= t && p[s + 1] - p[s] <= length_max, name, "[", s,
                 "] = ", p[s], ", next ", p[s + 1], ", rows ", t, ", longest ", length_max);
}

template <class T>
void packed(Exec& exec, const AttentionArgs& a, const DeviceProfile& profile) {
  const AttentionSpec& spec = a.spec;
  const std::int64_t t = a.qkv.dim(0), width = a.qkv.dim(1), d = spec.head_dim;
  check_offsets(a.seq_offsets, t, a.seq_len_max, "attention_forward: seq_offsets");
  const Scratch scratch(exec, attention_forward_scratch(a, profile).bytes);
  const auto* offsets = a.seq_offsets.as<std::int32_t>();
  const std::int64_t s = a.seq_offsets.dim(0) - 1, group = spec.heads / spec.kv_heads;
  parallel_for_dynamic(profile.threads, t, [&](std::int64_t row, int thread) {
    T* out = a.out.as<T>() + row * spec.heads * d;
    const std::int64_t sequence = sequence_of(offsets, s, row);
    if (sequence < 0) {
      std::memset(out, 0, static_cast<std::size_t>(spec.heads * d) * sizeof(T));
      if (a.lse.defined()) std::fill_n(a.lse.as<float>() + row * spec.heads, spec.heads, 0.0f);
      return;
    }
    const T* first = a.qkv.as<T>() + offsets[sequence] * width;
    for (std::int64_t h = 0; h < spec.heads; ++h) {
      const T* k = first + (spec.heads + h / group) * d;
      const T* v = k + spec.kv_heads * d;
      const float lse = attend(
          spec, row - offsets[sequence], a.qkv.as<T>() + row * width + h * d,
          [&](std::int64_t j) { return k + j * width; },
          [&](std::int64_t j) { return v + j * width; },
          scratch.at<float>(thread * a.seq_len_max * 4), out + h * d);
      if (a.lse.defined()) a.lse.as<float>()[row * spec.heads + h] = lse;
    }
  });
}

template <class T>
void paged(Exec& exec, const PagedAttentionArgs& a, const DeviceProfile& profile) {
  const AttentionSpec& spec = a.spec;
  const KvCache& cache = *a.cache;
  const std::int64_t t = a.qkv.dim(0), width = a.qkv.dim(1), d = spec.head_dim;
  check_offsets(a.q_offsets, t, t, "paged_attention_forward: q_offsets");
  const Scratch scratch(exec, paged_attention_forward_scratch(a, profile).bytes);
  const auto* offsets = a.q_offsets.as<std::int32_t>();
  const auto* lens = a.kv_lens.as<std::int32_t>();
  const std::int64_t s = a.kv_lens.dim(0), group = spec.heads / spec.kv_heads;
  parallel_for_dynamic(profile.threads, t, [&](std::int64_t row, int thread) {
    T* out = a.out.as<T>() + row * spec.heads * d;
    const std::int64_t sequence = sequence_of(offsets, s, row);
    if (sequence < 0) {
      std::memset(out, 0, static_cast<std::size_t>(spec.heads * d) * sizeof(T));
      return;
    }
    const std::int64_t len = lens[sequence];
    const std::int64_t position = len - (offsets[sequence + 1] - row);
    TANDEM_CHECK(position >= 0 && len <= a.kv_len_max, "paged_attention_forward: kv_lens[",
                 sequence, "] = ", len, ": rows ", offsets[sequence + 1] - offsets[sequence],
                 ", kv_len_max ", a.kv_len_max);
    const auto* table = a.block_tables.as<std::int32_t>() + sequence * a.block_tables.dim(1);
    for (std::int64_t h = 0; h < spec.heads; ++h) {
      const auto at = [&](std::int64_t j) {
        return ((table[j / cache.block_size] * spec.kv_heads + h / group) * cache.block_size +
                j % cache.block_size) *
               d;
      };
      attend(
          spec, position, a.qkv.as<T>() + row * width + h * d,
          [&](std::int64_t j) { return cache.k.as<T>() + at(j); },
          [&](std::int64_t j) { return cache.v.as<T>() + at(j); },
          scratch.at<float>(thread * a.kv_len_max * 4), out + h * d);
    }
  });
}

/// Gradients of one sequence and one kv head: dq of its group's heads, dk and dv summed over them.
template <class T>
void sequence_grad(const AttentionBackwardArgs& a, std::int64_t begin, std::int64_t end,
                   std::int64_t kv_head, float* dk, float* dv, float* dq) {
  const AttentionSpec& spec = a.spec;
  const std::int64_t width = a.qkv.dim(1), d = spec.head_dim, n = end - begin;
  const std::int64_t group = spec.heads / spec.kv_heads, wide = spec.heads * d;
  const std::int64_t k_at = (spec.heads + kv_head) * d, v_at = k_at + spec.kv_heads * d;
  const T* qkv = a.qkv.as<T>() + begin * width;
  T* dqkv = a.dqkv.as<T>() + begin * width;
  std::fill_n(dk, n * d, 0.0f);
  std::fill_n(dv, n * d, 0.0f);
  for (std::int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h)
    for (std::int64_t i = 0; i < n; ++i) {
      const T* q = qkv + i * width + h * d;
      const T* dout = a.dout.as<T>() + (begin + i) * wide + h * d;
      const float lse = a.lse.as<float>()[(begin + i) * spec.heads + h];
      const float delta = dot(dout, a.out.as<T>() + (begin + i) * wide + h * d, d);
      std::fill_n(dq, d, 0.0f);
      for (std::int64_t j = first_key(spec, i); j <= i; ++j) {
        const T* k = qkv + j * width + k_at;
        const float score = capped(spec.scale * dot(q, k, d), spec.soft_cap);
        const float p = std::exp(score - lse);
        float ds = p * (dot(dout, qkv + j * width + v_at, d) - delta) * spec.scale;
        if (spec.soft_cap > 0.0f) ds *= 1.0f - score / spec.soft_cap * (score / spec.soft_cap);
        for (std::int64_t c = 0; c < d; ++c) {
          dq[c] += ds * to_f32(k[c]);
          dk[j * d + c] += ds * to_f32(q[c]);
          dv[j * d + c] += p * to_f32(dout[c]);
        }
      }
      for (std::int64_t c = 0; c < d; ++c) dqkv[i * width + h * d + c] = from_f32<T>(dq[c]);
    }
  for (std::int64_t j = 0; j < n; ++j)
    for (std::int64_t c = 0; c < d; ++c) {
      dqkv[j * width + k_at + c] = from_f32<T>(dk[j * d + c]);
      dqkv[j * width + v_at + c] = from_f32<T>(dv[j * d + c]);
    }
}

template <class T>
void packed_grad(Exec& exec, const AttentionBackwardArgs& a, const DeviceProfile& profile) {
  const std::int64_t t = a.qkv.dim(0), s = a.seq_offsets.dim(0) - 1, d = a.spec.head_dim;
  check_offsets(a.seq_offsets, t, a.seq_len_max, "attention_backward: seq_offsets");
  const auto* offsets = a.seq_offsets.as<std::int32_t>();
  const Scratch scratch(exec, attention_backward_scratch(a, profile).bytes);
  const std::int64_t per_thread = (2 * a.seq_len_max + 1) * d * 4;
  parallel_for_dynamic(profile.threads, s * a.spec.kv_heads, [&](std::int64_t task, int thread) {
    const std::int64_t sequence = task / a.spec.kv_heads;
    float* dk = scratch.at<float>(thread * per_thread);
    float* dv = dk + a.seq_len_max * d;
    sequence_grad<T>(a, offsets[sequence], offsets[sequence + 1], task % a.spec.kv_heads, dk, dv,
                     dv + a.seq_len_max * d);
  });
  const std::int64_t width = a.qkv.dim(1);
  std::memset(a.dqkv.as<T>() + offsets[s] * width, 0,
              static_cast<std::size_t>((t - offsets[s]) * width) * sizeof(T));
}

}  // namespace

void CpuOps::do_attention_forward(Exec& exec, const AttentionArgs& a) {
  TANDEM_CPU_DISPATCH(a.qkv.dtype, packed, exec, a, profile_);
}
void CpuOps::do_attention_backward(Exec& exec, const AttentionBackwardArgs& a) {
  TANDEM_CPU_DISPATCH(a.qkv.dtype, packed_grad, exec, a, profile_);
}
void CpuOps::do_paged_attention_forward(Exec& exec, const PagedAttentionArgs& a) {
  TANDEM_CPU_DISPATCH(a.qkv.dtype, paged, exec, a, profile_);
}

}  // namespace tandem::kernels::cpu
