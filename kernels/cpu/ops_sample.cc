// Sampling: penalties, temperature, top-k, top-p, min-p and the draw, one row at a time.
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/log_sum_exp.h"
#include "kernels/cpu/parallel.h"
#include "protocol/base/random.h"

#include <algorithm>
#include <cmath>

namespace tandem::kernels::cpu {
namespace {

struct Candidate {
  float weight;
  std::int32_t id;
};
static_assert(sizeof(Candidate) == 8, "sample_workspace counts 8 bytes per candidate");

/// Most likely first; ties by the lower id.
bool more_likely(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
}

bool lower_id(const Candidate& a, const Candidate& b) {
  return a.id < b.id;
}

void write_top_logprobs(const SampleArgs& a, std::int64_t row, const float* logits,
                        const RowStatistics& statistics, Candidate* candidates) {
  const std::int64_t v = a.logits.dim(1), n = a.top_logprobs;
  if (n == 0) return;
  for (std::int64_t j = 0; j < v; ++j) candidates[j] = {logits[j], static_cast<std::int32_t>(j)};
  std::partial_sort(candidates, candidates + n, candidates + v, more_likely);
  for (std::int64_t j = 0; j < n; ++j) {
    a.top_ids.as<std::int32_t>()[row * n + j] = candidates[j].id;
    a.top_logprob.as<float>()[row * n + j] = -(statistics.lse() - candidates[j].weight);
  }
}

/// Repetition (Keskar et al. 2019) over prompt and output, presence and frequency (OpenAI) over
/// output only.
void apply_penalties(const SampleArgs& a, std::int64_t row, float* logits) {
  if (!a.history_offsets.defined()) return;
  const auto* offsets = a.history_offsets.as<std::int32_t>();
  TANDEM_CHECK(offsets[row] >= 0 && offsets[row] <= offsets[row + 1] &&
                   offsets[row + 1] <= a.history_ids.dim(0),
               "sample: history_offsets[", row, "] = ", offsets[row], ", next ", offsets[row + 1],
               ", entries ", a.history_ids.dim(0));
  const float repetition = a.repetition_penalty.as<float>()[row];
  const float presence = a.presence_penalty.as<float>()[row];
  const float frequency = a.frequency_penalty.as<float>()[row];
  for (std::int32_t e = offsets[row]; e < offsets[row + 1]; ++e) {
    const std::int32_t id = a.history_ids.as<std::int32_t>()[e];
    TANDEM_CHECK(id >= 0 && id < a.logits.dim(1), "sample: history_ids[", e, "] = ", id);
    const std::int32_t prompt = a.history_prompt_counts.as<std::int32_t>()[e];
    const std::int32_t output = a.history_output_counts.as<std::int32_t>()[e];
    float& logit = logits[id];
    if (prompt + output > 0) logit = logit > 0.0f ? logit / repetition : logit * repetition;
    if (output > 0) logit -= presence + frequency * static_cast<float>(output);
  }
}

/// Keeps the k heaviest.
std::int64_t keep_top_k(Candidate* candidates, std::int64_t n, std::int64_t k) {
  if (k <= 0 || k >= n) return n;
  std::nth_element(candidates, candidates + k - 1, candidates + n, more_likely);
  return k;
}

/// Keeps the fewest heaviest whose share reaches p; at least one.
std::int64_t keep_top_p(Candidate* candidates, std::int64_t n, float p) {
  if (p >= 1.0f) return n;
  double total = 0.0;
  for (std::int64_t j = 0; j < n; ++j) total += candidates[j].weight;
  // All candidates lighter than this share together weigh less than (1 - p) of the total, so the
  // nucleus ends before them and only the rest needs sorting.
  const double light = (1.0 - static_cast<double>(p)) * total / static_cast<double>(n);
  Candidate* heavy_end = std::partition(candidates, candidates + n, [&](const Candidate& c) {
    return static_cast<double>(c.weight) >= light;
  });
  std::sort(candidates, heavy_end, more_likely);
  double sum = 0.0;
  for (std::int64_t j = 0; candidates + j < heavy_end; ++j) {
    sum += candidates[j].weight;
    if (sum >= static_cast<double>(p) * total) return j + 1;
  }
  return std::max<std::int64_t>(1, heavy_end - candidates);
}

std::int64_t keep_min_p(Candidate* candidates, std::int64_t n, float min_p) {
  if (min_p <= 0.0f) return n;
  // The heaviest weighs exp(0) = 1 and no earlier filter removes it.
  return std::partition(candidates, candidates + n,
                        [&](const Candidate& c) { return c.weight >= min_p; }) -
         candidates;
}

/// The first candidate, by id, at which the running weight exceeds u of the total.
std::int32_t draw(const Candidate* candidates, std::int64_t n, float u) {
  double total = 0.0;
  for (std::int64_t j = 0; j < n; ++j) total += candidates[j].weight;
  const double target = static_cast<double>(u) * total;
  double sum = 0.0;
  std::int32_t last = candidates[0].id;
  for (std::int64_t j = 0; j < n; ++j) {
    if (candidates[j].weight <= 0.0f) continue;
    sum += candidates[j].weight;
    last = candidates[j].id;
    if (sum > target) break;
  }
  return last;
}

std::int32_t choose(const SampleArgs& a, std::int64_t row, const float* logits,
                    Candidate* candidates) {
  const std::int64_t v = a.logits.dim(1);
  const auto top = static_cast<std::int64_t>(std::max_element(logits, logits + v) - logits);
  const float temperature = a.temperature.as<float>()[row];
  if (temperature <= 0.0f) return static_cast<std::int32_t>(top);
  for (std::int64_t j = 0; j < v; ++j)
    candidates[j] = {std::exp((logits[j] - logits[top]) / temperature),
                     static_cast<std::int32_t>(j)};
  std::int64_t n = keep_top_k(candidates, v, a.top_k.as<std::int32_t>()[row]);
  n = keep_top_p(candidates, n, a.top_p.as<float>()[row]);
  n = keep_min_p(candidates, n, a.min_p.as<float>()[row]);
  // Filters reorder even where they remove nothing.
  if (n < v || a.top_p.as<float>()[row] < 1.0f) std::sort(candidates, candidates + n, lower_id);
  const float u = random_uniform(static_cast<std::uint64_t>(a.seed.as<std::int64_t>()[row]), 0,
                                 static_cast<std::uint64_t>(a.position.as<std::int64_t>()[row]));
  return draw(candidates, n, u);
}

}  // namespace

void CpuOps::do_sample(Exec& exec, const SampleArgs& a) {
  const SampleWorkspace layout = sample_workspace(a, profile_);
  const Scratch scratch(exec, layout.bytes);
  const std::int64_t v = a.logits.dim(1);
  parallel_for_dynamic(profile_.threads, a.logits.dim(0), [&](std::int64_t row, int thread) {
    float* logits = a.logits.as<float>() + row * v;
    float* unmodified = scratch.at<float>(layout.logits + thread * v * 4);
    auto* candidates = scratch.at<Candidate>(layout.candidates + thread * v * 8);
    const RowStatistics statistics = row_statistics(logits, v);
    write_top_logprobs(a, row, logits, statistics, candidates);
    std::copy(logits, logits + v, unmodified);
    apply_penalties(a, row, logits);
    const std::int32_t id = choose(a, row, logits, candidates);
    a.ids.as<std::int32_t>()[row] = id;
    a.logprob.as<float>()[row] = -(statistics.lse() - unmodified[id]);
  });
}

}  // namespace tandem::kernels::cpu
