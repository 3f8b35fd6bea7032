// Sampling: penalties, temperature, top-k, top-p, min-p and the draw, one row at a time.
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/log_sum_exp.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/row_kernels.h"
#include "protocol/base/random.h"

#include <algorithm>
#include <array>
#include <bit>

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

/// Weights lie in [0, 1]: their upper bits order them and cut that range into narrow buckets, eight
/// to a doubling, so that a limit is found without sorting the vocabulary.
constexpr int kBucketShift = 20;
constexpr std::size_t kBuckets = (0x3f800000u >> kBucketShift) + 1;

/// A NaN, which only a broken model yields, goes with the heaviest.
std::size_t bucket_of(float weight) {
  const std::size_t bucket = std::bit_cast<std::uint32_t>(weight) >> kBucketShift;
  return std::min(bucket, kBuckets - 1);
}

/// The lightest candidate that stays when the heaviest are kept until their measure reaches
/// `limit`; measure(weight) is 1 to count and the weight to add up. Everything stays when it never
/// does. `spare` holds one bucket.
template <class Measure>
Candidate lightest_kept(const float* weights, std::int64_t v, double limit, const Measure& measure,
                        Candidate* spare) {
  std::array<double, kBuckets> sums{};
  for (std::int64_t j = 0; j < v; ++j) sums[bucket_of(weights[j])] += measure(weights[j]);
  double above = 0.0;
  std::size_t bucket = kBuckets - 1;
  for (; bucket > 0 && above + sums[bucket] < limit; --bucket) above += sums[bucket];
  std::int64_t n = 0;
  for (std::int64_t j = 0; j < v; ++j)
    if (bucket_of(weights[j]) == bucket) spare[n++] = {weights[j], static_cast<std::int32_t>(j)};
  std::sort(spare, spare + n, more_likely);
  for (std::int64_t j = 0; j < n; ++j) {
    above += measure(spare[j].weight);
    if (above >= limit) return spare[j];
  }
  return {0.0f, static_cast<std::int32_t>(v)};
}

/// Lists, by id, what weighs at least as much as `lightest`.
std::int64_t list_kept(const float* weights, std::int64_t v, const Candidate& lightest,
                       Candidate* candidates) {
  std::int64_t n = 0;
  for (std::int64_t j = 0; j < v; ++j)
    if (weights[j] > lightest.weight || (weights[j] == lightest.weight && j <= lightest.id))
      candidates[n++] = {weights[j], static_cast<std::int32_t>(j)};
  return n;
}

/// Of candidates in any order, the fewest heaviest whose share reaches p, by id.
std::int64_t keep_top_p(Candidate* candidates, std::int64_t n, float p) {
  std::sort(candidates, candidates + n, more_likely);
  double total = 0.0, sum = 0.0;
  for (std::int64_t j = 0; j < n; ++j) total += candidates[j].weight;
  std::int64_t kept = 0;
  while (kept < n && (kept == 0 || sum < static_cast<double>(p) * total))
    sum += candidates[kept++].weight;
  std::sort(candidates, candidates + kept, lower_id);
  return kept;
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

/// As draw() over the whole vocabulary, by blocks.
std::int32_t draw_any(const float* weights, std::int64_t v, float u) {
  const auto block_sum = [&](std::int64_t begin) -> double {
    return row_kernels().sum(weights + begin, std::min(kSumBlock, v - begin));
  };
  double total = 0.0, sum = 0.0;
  for (std::int64_t begin = 0; begin < v; begin += kSumBlock) total += block_sum(begin);
  const double target = static_cast<double>(u) * total;
  std::int64_t begin = 0, last = 0;
  for (; begin + kSumBlock < v; begin += kSumBlock) {
    const double here = block_sum(begin);
    if (sum + here > target) break;
    sum += here;
  }
  for (std::int64_t j = begin; j < std::min(v, begin + kSumBlock); ++j) {
    if (weights[j] <= 0.0f) continue;
    sum += weights[j];
    last = j;
    if (sum > target) break;
  }
  return static_cast<std::int32_t>(last);
}

std::int32_t choose(const SampleArgs& a, std::int64_t row, const float* logits, float* weights,
                    Candidate* candidates) {
  const std::int64_t v = a.logits.dim(1);
  const float temperature = a.temperature.as<float>()[row];
  const RowStatistics statistics = row_statistics(logits, v);
  if (temperature <= 0.0f) return static_cast<std::int32_t>(statistics.argmax);
  // Bounded, so that 0 times it stays 0 at the tiniest temperature.
  const float inverse = std::min(1.0f / temperature, 1e30f);
  row_kernels().weights(logits, v, statistics.top, inverse, weights);
  const std::int64_t k = a.top_k.as<std::int32_t>()[row];
  const float p = a.top_p.as<float>()[row], min_p = a.min_p.as<float>()[row];
  const float u = random_uniform(static_cast<std::uint64_t>(a.seed.as<std::int64_t>()[row]), 0,
                                 static_cast<std::uint64_t>(a.position.as<std::int64_t>()[row]));
  const bool by_k = k > 0 && k < v, by_p = p < 1.0f;
  if (!by_k && !by_p && min_p <= 0.0f) return draw_any(weights, v, u);
  Candidate lightest{min_p, static_cast<std::int32_t>(v)};
  if (by_k) {
    lightest = lightest_kept(
        weights, v, static_cast<double>(k), [](float) { return 1.0; }, candidates);
  } else if (by_p) {
    double total = 0.0;
    for (std::int64_t begin = 0; begin < v; begin += kSumBlock)
      total += row_kernels().sum(weights + begin, std::min(kSumBlock, v - begin));
    // The smallest positive number: the heaviest token stays whatever p is.
    const double limit = std::max(static_cast<double>(p) * total, 1e-300);
    lightest = lightest_kept(
        weights, v, limit, [](float weight) { return static_cast<double>(weight); }, candidates);
  }
  std::int64_t n = list_kept(weights, v, lightest, candidates);
  if (by_k && by_p) n = keep_top_p(candidates, n, p);
  // The heaviest weighs exp(0) = 1: min-p never removes everything, and keeps the order.
  n = std::remove_if(candidates, candidates + n,
                     [&](const Candidate& c) { return c.weight < min_p; }) -
      candidates;
  return draw(candidates, n, u);
}

}  // namespace

void CpuOps::do_sample(Exec& exec, const SampleArgs& a) {
  const SampleWorkspace layout = sample_workspace(a, profile_);
  const Scratch scratch(exec, layout.bytes);
  const std::int64_t v = a.logits.dim(1);
  parallel_for_dynamic(profile_.threads, a.logits.dim(0), v, [&](std::int64_t row, int thread) {
    float* logits = a.logits.as<float>() + row * v;
    auto* candidates = scratch.at<Candidate>(layout.candidates + thread * v * 8);
    const RowStatistics statistics = row_statistics(logits, v);
    write_top_logprobs(a, row, logits, statistics, candidates);
    const float* unmodified = logits;
    if (a.history_offsets.defined()) {
      auto* copy = scratch.at<float>(layout.logits + thread * v * 4);
      std::copy(logits, logits + v, copy);
      unmodified = copy;
      apply_penalties(a, row, logits);
    }
    const std::int32_t id =
        choose(a, row, logits, scratch.at<float>(layout.weights + thread * v * 4), candidates);
    a.ids.as<std::int32_t>()[row] = id;
    a.logprob.as<float>()[row] = -(statistics.lse() - unmodified[id]);
  });
}

}  // namespace tandem::kernels::cpu
