// What full fine-tuning and shards of the vocabulary need beside the ops of LoRA: gradients of
// weights, new values into packed weights, and the loss over logits that already exist.
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/log_sum_exp.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/row_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace tandem::kernels::cpu {

namespace {

/// Columns that one task walks down: their sums stay in the first cache.
constexpr std::int64_t kColumns = 256;

/// sums[c] += weight of row * x[row][c] for a block of columns, rows ascending, in f64; f(row) is
/// null where a row adds nothing. `value(row, column)` is one addend.
template <class Value>
void add_columns(int threads, std::int64_t t, std::int64_t c, float* out, const Value& value) {
  parallel_for(threads, (c + kColumns - 1) / kColumns, t * kColumns, [&](std::int64_t block) {
    const std::int64_t begin = block * kColumns, count = std::min(kColumns, c - begin);
    double sums[kColumns] = {};
    for (std::int64_t row = 0; row < t; ++row)
      for (std::int64_t j = 0; j < count; ++j) sums[j] += value(row, begin + j);
    for (std::int64_t j = 0; j < count; ++j)
      out[begin + j] = static_cast<float>(static_cast<double>(out[begin + j]) + sums[j]);
  });
}

template <class T>
void embedding_grad(const EmbeddingBackwardArgs& a, int threads) {
  const auto* ids = a.ids.as<std::int32_t>();
  const std::int64_t t = a.dout.dim(0), c = a.dout.dim(1), n = a.dtable.dim(0);
  const T* dout = a.dout.as<T>();
  float* table = a.dtable.as<float>();
  parallel_for(threads, (c + kColumns - 1) / kColumns, t * kColumns, [&](std::int64_t block) {
    const std::int64_t begin = block * kColumns, end = std::min(c, begin + kColumns);
    for (std::int64_t row = 0; row < t; ++row) {
      const std::int64_t id = ids[row] - a.first;
      if (id < 0 || id >= n) continue;
      for (std::int64_t j = begin; j < end; ++j) table[id * c + j] += to_f32(dout[row * c + j]);
    }
  });
}

template <class T>
void norm_weight_grad(const RmsNormBackwardArgs& a, int threads) {
  const std::int64_t t = a.dy.dim(0), c = a.dy.dim(1);
  const T *dy = a.dy.as<T>(), *x = a.residual.as<T>();
  const float* rstd = a.rstd.as<float>();
  add_columns(threads, t, c, a.dweight.as<float>(), [&](std::int64_t row, std::int64_t j) {
    return static_cast<double>(to_f32(dy[row * c + j])) *
           static_cast<double>(to_f32(x[row * c + j]) * rstd[row]);
  });
}

template <class T>
void bias_grad(const LinearWeightGradArgs& a, int threads) {
  const std::int64_t t = a.dy.dim(0), n = a.dy.dim(1);
  const T* dy = a.dy.as<T>();
  add_columns(threads, t, n, a.dbias.as<float>(), [&](std::int64_t row, std::int64_t j) {
    return static_cast<double>(to_f32(dy[row * n + j]));
  });
}

/// What all shards' statistics say about one row.
struct RowLoss {
  float top = -INFINITY, sum = 0.0f, label = 0.0f, argmax = 0.0f;
};
RowLoss combine(const float* stats, std::int64_t shards, std::int64_t t, std::int64_t row) {
  RowLoss all;
  for (std::int64_t s = 0; s < shards; ++s) {
    const float* one = stats + (s * t + row) * 4;
    if (one[0] > all.top) {
      all.top = one[0];
      all.argmax = one[3];
    }
    all.label += one[2];  // zero but in one shard
  }
  for (std::int64_t s = 0; s < shards; ++s) {
    const float* one = stats + (s * t + row) * 4;
    all.sum += one[1] * std::exp(one[0] - all.top);
  }
  return all;
}

template <class T>
void row_gradient(const CrossEntropyArgs& a, std::int64_t row, const RowLoss& all, float loss) {
  const std::int64_t v = a.logits.dim(1), label = a.labels.as<std::int32_t>()[row] - a.first;
  T* out = a.dlogits.as<T>() + row * v;
  float* logits = a.logits.as<float>() + row * v;
  row_kernels_of<T>().softmax_gradient(logits, v, all.top, a.gradient_scale / all.sum);
  std::memcpy(out, logits, static_cast<std::size_t>(v) * sizeof(T));
  if (label >= 0 && label < v)
    out[label] = from_f32<T>(a.gradient_scale * std::expm1(-loss));  // as linear_cross_entropy
}

template <class T>
void zero_gradient(const CrossEntropyArgs& a, std::int64_t row) {
  const std::int64_t v = a.logits.dim(1);
  std::fill_n(a.dlogits.as<T>() + row * v, v, from_f32<T>(0.0f));
}

}  // namespace

void CpuOps::do_embedding_backward(Exec&, const EmbeddingBackwardArgs& a) {
  const auto* ids = a.ids.as<std::int32_t>();
  const std::int64_t vocab = a.vocab > 0 ? a.vocab : a.dtable.dim(0);
  for (std::int64_t row = 0; row < a.dout.dim(0); ++row)
    TANDEM_CHECK(ids[row] >= 0 && ids[row] < vocab, "embedding_backward: ids[", row,
                 "] = ", ids[row], ": expected 0 .. ", vocab - 1);
  TANDEM_CPU_DISPATCH(a.dout.dtype, embedding_grad, a, profile_.threads);
}

void CpuOps::rms_norm_weight_grad(const RmsNormBackwardArgs& a) {
  TANDEM_CPU_DISPATCH(a.dy.dtype, norm_weight_grad, a, profile_.threads);
}

void CpuOps::do_linear_weight_grad(Exec& exec, const LinearWeightGradArgs& a) {
  use_threads(exec);
  const LinearWeightGradWorkspace layout = linear_weight_grad_workspace(a, profile_);
  const Scratch scratch(exec, layout.bytes);
  const std::int64_t t = a.dy.dim(0), n = a.dy.dim(1), i = a.x.dim(1);
  const DType cd = a.dy.dtype;
  for (std::int64_t row = 0; row < n; row += kWeightGradRows) {
    const auto* dy = static_cast<const char*>(a.dy.data) + row * dtype_bytes(cd);
    outer_accumulate(t, std::min(kWeightGradRows, n - row), i, {dy, n, cd}, {a.x.data, i, cd}, 1.0f,
                     a.dweight.as<float>() + row * i, i, scratch.span(0, layout.gemm_bytes));
  }
  if (a.dbias.defined()) TANDEM_CPU_DISPATCH(cd, bias_grad, a, profile_.threads);
}

void CpuOps::do_repack_weight(Exec&, const RepackWeightArgs& a) {
  const PackedWeight& w = *a.weight;
  parallel_for(profile_.threads, (w.n + kPackRows - 1) / kPackRows, kPackRows * w.i,
               [&](std::int64_t block) {
                 const std::int64_t row = block * kPackRows;
                 const auto* from =
                     static_cast<const char*>(a.rows.data) + row * w.i * dtype_bytes(a.rows.dtype);
                 pack_rows(w.storage.data, w.dtype, w.n, w.i, row, std::min(kPackRows, w.n - row),
                           {from, w.i, a.rows.dtype});
               });
}

void CpuOps::do_cross_entropy_stats(Exec&, const CrossEntropyStatsArgs& a) {
  const std::int64_t v = a.logits.dim(1);
  parallel_for(profile_.threads, a.logits.dim(0), v, [&](std::int64_t row) {
    const float* logits = a.logits.as<float>() + row * v;
    const std::int64_t label = a.labels.as<std::int32_t>()[row] - a.first;
    float* stats = a.stats.as<float>() + row * 4;
    const RowStatistics s = row_statistics(logits, v);
    stats[0] = s.top;
    stats[1] = s.sum;
    stats[2] = label >= 0 && label < v ? logits[label] : 0.0f;
    stats[3] = static_cast<float>(a.first + s.argmax);
  });
}

void CpuOps::do_cross_entropy(Exec&, const CrossEntropyArgs& a) {
  const std::int64_t t = a.logits.dim(0), v = a.logits.dim(1);
  parallel_for(profile_.threads, t, v, [&](std::int64_t row) {
    const std::int32_t label = a.labels.as<std::int32_t>()[row];
    float &loss = a.loss.as<float>()[row], hit = 0.0f;
    if (label < 0) {
      loss = 0.0f;
      if (a.dlogits.defined()) TANDEM_CPU_DISPATCH(a.dlogits.dtype, zero_gradient, a, row);
    } else {
      const RowLoss all = combine(a.stats.as<float>(), a.stats.dim(0), t, row);
      loss = all.top + std::log(all.sum) - all.label;
      hit = all.argmax == static_cast<float>(label) ? 1.0f : 0.0f;
      if (a.dlogits.defined())
        TANDEM_CPU_DISPATCH(a.dlogits.dtype, row_gradient, a, row, all, loss);
    }
    if (a.correct.defined()) a.correct.as<float>()[row] = hit;
  });
}

}  // namespace tandem::kernels::cpu
