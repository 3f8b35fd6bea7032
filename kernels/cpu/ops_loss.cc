// Loss over the vocabulary in chunks of rows, and log-probabilities.
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/log_sum_exp.h"
#include "kernels/cpu/naive_products.h"
#include "kernels/cpu/parallel.h"

#include <algorithm>

namespace tandem::kernels::cpu {

RowStatistics row_statistics(const float* logits, std::int64_t n) {
  RowStatistics s;
  for (std::int64_t j = 0; j < n; ++j)
    if (logits[j] > s.top) s.top = logits[j], s.argmax = j;
  constexpr std::int64_t kLanes = 16;
  float lanes[kLanes] = {};
  for (std::int64_t j = 0; j < n; ++j) lanes[j % kLanes] += std::exp(logits[j] - s.top);
  for (float lane : lanes) s.sum += lane;
  return s;
}

namespace {

/// Loss and gradient of one row of logits; dlogits null: no gradient.
template <class T>
void row_loss(const LinearCrossEntropyArgs& a, std::int64_t row, const float* logits, T* dlogits) {
  const std::int64_t v = a.weight->n, label = a.labels.as<std::int32_t>()[row];
  TANDEM_CHECK(label < v, "linear_cross_entropy: labels[", row, "] = ", label, ": vocabulary ", v);
  if (label < 0) {
    a.loss.as<float>()[row] = 0.0f;
    if (a.correct.defined()) a.correct.as<float>()[row] = 0.0f;
    if (dlogits != nullptr) std::fill_n(dlogits, v, from_f32<T>(0.0f));
    return;
  }
  const RowStatistics s = row_statistics(logits, v);
  a.loss.as<float>()[row] = s.lse() - logits[label];
  if (a.correct.defined()) a.correct.as<float>()[row] = s.argmax == label ? 1.0f : 0.0f;
  if (dlogits == nullptr) return;
  const float scale = a.gradient_scale / s.sum;
  for (std::int64_t j = 0; j < v; ++j)
    dlogits[j] =
        from_f32<T>(scale * std::exp(logits[j] - s.top) - (j == label ? a.gradient_scale : 0.0f));
}

template <class T>
void cross_entropy(Exec& exec, const LinearCrossEntropyArgs& a, const DeviceProfile& profile) {
  const std::int64_t t = a.x.dim(0), c = a.x.dim(1), v = a.weight->n;
  const LinearCrossEntropyScratch layout = linear_cross_entropy_scratch(a, profile);
  const Scratch scratch(exec, layout.bytes);
  const T* w = static_cast<const T*>(a.weight->storage.data);
  float* logits = scratch.at<float>(layout.logits);
  T* dlogits = a.dx.defined() ? scratch.at<T>(layout.dlogits) : nullptr;
  for (std::int64_t begin = 0; begin < t; begin += layout.chunk_rows) {
    const std::int64_t rows = std::min(layout.chunk_rows, t - begin);
    product<T, float>(a.x.as<T>() + begin * c, w, nullptr, logits, rows, v, c, profile.threads);
    parallel_for(profile.threads, rows, [&](std::int64_t r) {
      row_loss(a, begin + r, logits + r * v, dlogits == nullptr ? nullptr : dlogits + r * v);
    });
    if (dlogits != nullptr)
      product_grad(dlogits, w, a.dx.as<T>() + begin * c, rows, v, c, profile.threads);
  }
}

}  // namespace

void CpuOps::do_linear_cross_entropy(Exec& exec, const LinearCrossEntropyArgs& a) {
  TANDEM_CPU_DISPATCH(a.x.dtype, cross_entropy, exec, a, profile_);
}

void CpuOps::do_logprob(Exec&, const LogprobArgs& a) {
  const std::int64_t v = a.logits.dim(1);
  parallel_for(profile_.threads, a.logits.dim(0), [&](std::int64_t row) {
    const std::int32_t id = a.ids.as<std::int32_t>()[row];
    TANDEM_CHECK(id >= 0 && id < v, "logprob: ids[", row, "] = ", id, ": vocabulary ", v);
    const float* logits = a.logits.as<float>() + row * v;
    // The negated loss of linear_cross_entropy, in its order of operations.
    a.logprob.as<float>()[row] = -(row_statistics(logits, v).lse() - logits[id]);
  });
}

}  // namespace tandem::kernels::cpu
