#include "kernels/op_checks.h"
#include "kernels/ops.h"

namespace tandem::kernels {

void Ops::linear_cross_entropy(Exec& exec, const LinearCrossEntropyArgs& a) {
  const OpCheck check("linear_cross_entropy");
  check.rank("x", a.x, 2);
  const DType cd = check.compute_dtype("x", a.x);
  const std::int64_t t = a.x.dim(0), c = a.x.dim(1);
  check.that(a.weight != nullptr, "weight: null");
  check.weight("weight", a.weight, cd, a.weight->n, c);
  check.tensor("labels", a.labels, DType::kI32, Shape{t});
  check.tensor("loss", a.loss, sum_dtype(cd), Shape{t});
  check.optional("correct", a.correct, sum_dtype(cd), Shape{t});
  check.optional("dx", a.dx, cd, Shape{t, c});
  check.disjoint("dx", a.dx, "x", a.x);
  if (t == 0) return;
  do_linear_cross_entropy(exec, a);
}

void Ops::logprob(Exec& exec, const LogprobArgs& a) {
  const OpCheck check("logprob");
  check.rank("logits", a.logits, 2);
  const std::int64_t s = a.logits.dim(0);
  check.tensor("logits", a.logits, DType::kF32, a.logits.shape);
  check.that(a.logits.dim(1) > 0, str("logits: ", a.logits.shape, ": no vocabulary"));
  check.tensor("ids", a.ids, DType::kI32, Shape{s});
  check.tensor("logprob", a.logprob, DType::kF32, Shape{s});
  if (s == 0) return;
  do_logprob(exec, a);
}

void Ops::sample(Exec& exec, const SampleArgs& a) {
  const OpCheck check("sample");
  check.rank("logits", a.logits, 2);
  const std::int64_t s = a.logits.dim(0), v = a.logits.dim(1);
  check.tensor("logits", a.logits, DType::kF32, a.logits.shape);
  check.that(v > 0, str("logits: ", a.logits.shape, ": no vocabulary"));
  const Shape rows{s};
  check.tensor("temperature", a.temperature, DType::kF32, rows);
  check.tensor("top_k", a.top_k, DType::kI32, rows);
  check.tensor("top_p", a.top_p, DType::kF32, rows);
  check.tensor("min_p", a.min_p, DType::kF32, rows);
  check.tensor("seed", a.seed, DType::kI64, rows);
  check.tensor("position", a.position, DType::kI64, rows);
  if (a.history_offsets.defined()) {
    check.tensor("repetition_penalty", a.repetition_penalty, DType::kF32, rows);
    check.tensor("presence_penalty", a.presence_penalty, DType::kF32, rows);
    check.tensor("frequency_penalty", a.frequency_penalty, DType::kF32, rows);
    check.tensor("history_offsets", a.history_offsets, DType::kI32, Shape{s + 1});
    check.rank("history_ids", a.history_ids, 1);
    const Shape history = a.history_ids.shape;
    check.tensor("history_ids", a.history_ids, DType::kI32, history);
    check.tensor("history_prompt_counts", a.history_prompt_counts, DType::kI32, history);
    check.tensor("history_output_counts", a.history_output_counts, DType::kI32, history);
  }
  check.tensor("ids", a.ids, DType::kI32, rows);
  check.tensor("logprob", a.logprob, DType::kF32, rows);
  check.in_range<std::int64_t>("top_logprobs", a.top_logprobs, 0, v);
  if (a.top_logprobs > 0) {
    check.tensor("top_ids", a.top_ids, DType::kI32, Shape{s, a.top_logprobs});
    check.tensor("top_logprob", a.top_logprob, DType::kF32, Shape{s, a.top_logprobs});
  }
  if (s == 0) return;
  do_sample(exec, a);
}

}  // namespace tandem::kernels
