// Loss over the vocabulary in chunks of rows, and log-probabilities.
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

char* row_of(const Tensor& t, std::int64_t row) {
  return static_cast<char*>(t.data) + row * t.dim(1) * dtype_bytes(t.dtype);
}

/// Writes loss and hit of every row without a label, lists the others; returns their number.
std::int64_t list_labelled(const LinearCrossEntropyArgs& a, std::int32_t* index) {
  const auto* labels = a.labels.as<std::int32_t>();
  std::int64_t count = 0;
  for (std::int64_t row = 0; row < a.x.dim(0); ++row) {
    TANDEM_CHECK(labels[row] < a.weight->n, "linear_cross_entropy: labels[", row,
                 "] = ", labels[row], ": vocabulary ", a.weight->n);
    if (labels[row] >= 0) {
      index[count++] = static_cast<std::int32_t>(row);
      continue;
    }
    a.loss.as<float>()[row] = 0.0f;
    if (a.correct.defined()) a.correct.as<float>()[row] = 0.0f;
    if (a.dx.defined())
      std::memset(row_of(a.dx, row), 0,
                  static_cast<std::size_t>(a.dx.dim(1) * dtype_bytes(a.dx.dtype)));
  }
  return count;
}

/// Loss of one row; the row's logits become gradient_scale * (softmax - one-hot) in T.
template <class T>
void row_loss(const LinearCrossEntropyArgs& a, std::int64_t row, float* logits) {
  const std::int64_t v = a.weight->n, label = a.labels.as<std::int32_t>()[row];
  const RowStatistics s = row_statistics(logits, v);
  const float loss = s.lse() - logits[label];
  a.loss.as<float>()[row] = loss;
  if (a.correct.defined()) a.correct.as<float>()[row] = s.argmax == label ? 1.0f : 0.0f;
  if (!a.dx.defined()) return;
  row_kernels_of<T>().softmax_gradient(logits, v, s.top, a.gradient_scale / s.sum);
  // exp(-loss) - 1 without cancellation: the label's own gradient is the small one in a trained
  // model.
  const T own = from_f32<T>(a.gradient_scale * std::expm1(-loss));
  std::memcpy(reinterpret_cast<char*>(logits) + label * static_cast<std::int64_t>(sizeof(T)), &own,
              sizeof own);
}

/// dx = dlogits W in f32, a block of the vocabulary at a time: blocks are fixed, so a row's bits
/// are too. In f32 each block is a chain of its own, through `block`; bf16 adds up in f32 anyway.
void input_grad(const PackedMatrix& w, std::int64_t rows, ConstRows dlogits, float* dx,
                float* block, std::span<std::byte> gemm, int threads) {
  const std::int64_t c = w.k;
  const bool chains = w.format == DType::kF32;
  for (std::int64_t begin = 0; begin < w.n; begin += kVocabularyBlock) {
    const std::int64_t n = std::min(kVocabularyBlock, w.n - begin);
    const auto* panels = static_cast<const char*>(w.data) + packed_bytes(w.format, begin, c);
    const auto* part = static_cast<const char*>(dlogits.data) + begin * dtype_bytes(dlogits.dtype);
    LinearOptions options;
    options.accumulate = begin > 0 && !chains;
    linear_input_grad({panels, w.format, n, c}, rows, {part, dlogits.ld, dlogits.dtype},
                      {begin > 0 && chains ? block : dx, c, DType::kF32}, options, gemm);
    if (begin == 0 || !chains) continue;
    parallel_for(threads, rows, c, [&](std::int64_t r) {
      for (std::int64_t j = r * c; j < (r + 1) * c; ++j) dx[j] += block[j];
    });
  }
}
static_assert(kVocabularyBlock % kPackRows == 0, "a block begins at a panel");

}  // namespace

void CpuOps::do_linear_cross_entropy(Exec& exec, const LinearCrossEntropyArgs& a) {
  use_threads(exec);
  const std::int64_t c = a.x.dim(1), v = a.weight->n;
  const DType cd = a.x.dtype;
  const auto row_bytes = static_cast<std::size_t>(c * dtype_bytes(cd));
  const LinearCrossEntropyWorkspace layout = linear_cross_entropy_workspace(a, profile_);
  const Scratch scratch(exec, layout.bytes);
  const auto gemm = scratch.span(layout.gemm, layout.gemm_bytes);
  const PackedMatrix w{a.weight->storage.data, a.weight->dtype, v, c};
  auto* index = scratch.at<std::int32_t>(layout.index);
  auto* logits = scratch.at<float>(layout.logits);
  const Tensor chunk = scratch.tensor(layout.x, cd, Shape{layout.chunk_rows, c});
  const std::int64_t labelled = list_labelled(a, index);
  for (std::int64_t begin = 0; begin < labelled; begin += layout.chunk_rows) {
    const std::int64_t rows = std::min(layout.chunk_rows, labelled - begin);
    const std::int32_t* at = index + begin;
    parallel_for(profile_.threads, rows, c, [&](std::int64_t r) {
      std::memcpy(row_of(chunk, r), row_of(a.x, at[r]), row_bytes);
    });
    cpu::linear_forward(w, rows, {chunk.data, c, cd}, {logits, v, DType::kF32}, {}, gemm);
    parallel_for(profile_.threads, rows, v, [&](std::int64_t r) {
      TANDEM_CPU_DISPATCH(cd, row_loss, a, at[r], logits + r * v);
    });
    if (!a.dx.defined()) continue;
    // A row of gradients begins where its logits began: in bf16 rows are 2 V elements apart.
    auto* dx = scratch.at<float>(layout.dx);
    input_grad(w, rows, {logits, v * 4 / dtype_bytes(cd), cd}, dx, scratch.at<float>(layout.x),
               gemm, profile_.threads);
    parallel_for(profile_.threads, rows, c, [&](std::int64_t r) {
      if (cd == DType::kF32)
        std::memcpy(row_of(a.dx, at[r]), dx + r * c, row_bytes);
      else
        row_kernels().round_bf16(dx + r * c, reinterpret_cast<bf16*>(row_of(a.dx, at[r])), c);
    });
  }
}

void CpuOps::do_logprob(Exec&, const LogprobArgs& a) {
  const std::int64_t v = a.logits.dim(1);
  parallel_for(profile_.threads, a.logits.dim(0), v, [&](std::int64_t row) {
    const std::int32_t id = a.ids.as<std::int32_t>()[row];
    TANDEM_CHECK(id >= 0 && id < v, "logprob: ids[", row, "] = ", id, ": vocabulary ", v);
    const float* logits = a.logits.as<float>() + row * v;
    // The negated loss of linear_cross_entropy, in its order of operations.
    a.logprob.as<float>()[row] = -(row_statistics(logits, v).lse() - logits[id]);
  });
}

}  // namespace tandem::kernels::cpu
