#include "worker/memory/layout_planner.h"

#include "worker/model/shard.h"
#include "worker/train/ranks.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <tuple>

namespace tandem::worker::memory {

namespace {

/// Speeds within this share of each other are taken as equal.
constexpr double kEqual = 0.01;

Result<PlannedLayout> plan(const kernels::DeviceProfile& profile, const model::ModelConfig& config,
                           DType dtype, const protocol::TrainSettings& settings,
                           const train::BatchBounds& bounds, const LayoutLimits& limits,
                           const CostModel& model, bool evaluates) {
  PlannedLayout planned;
  planned.layout = train::layout_of(settings);
  // The ranks of a stage do the same at the same time: one stands for all of them.
  std::vector<StepTrace> traces;
  std::vector<int> trace_of;
  for (int rank = 0; rank < planned.layout.ranks(); ++rank)
    trace_of.push_back(planned.layout.pp_rank(rank));
  for (int stage = 0; stage < planned.layout.pp; ++stage) {
    const int rank = planned.layout.rank_of(0, 0, stage);
    TANDEM_ASSIGN_OR_RETURN(
        auto step, trace_training(profile, config, dtype, settings, bounds,
                                  {1, evaluates, settings.full(), planned.layout, rank}, model));
    planned.peak_bytes = std::max(planned.peak_bytes, step.estimate.peak_total);
    traces.push_back(std::move(step.trace));
  }
  planned.fits = planned.peak_bytes <= limits.bytes_max;
  planned.step = simulate(traces, model, trace_of);
  planned.tokens_per_second =
      static_cast<double>(bounds.micro_batch_tokens * settings.gradient_accumulation_steps) /
      planned.step.seconds;
  return planned;
}

}  // namespace

protocol::TrainSettings with_layout(protocol::TrainSettings settings, const comm::Layout& layout) {
  settings.dp = layout.dp;
  settings.tp = layout.tp;
  settings.pp = layout.pp;
  settings.zero = layout.zero;
  settings.virtual_pipeline_size = layout.virtual_pp;
  settings.sequence_parallel = layout.sequence_parallel;
  settings.pipeline_balance = layout.balance == comm::StageBalance::kMemory ? "memory" : "compute";
  return settings;
}

std::vector<comm::Layout> possible_layouts(const model::ModelConfig& config,
                                           const protocol::TrainSettings& settings, int ranks_max) {
  std::vector<comm::Layout> layouts;
  for (int ranks = 1; ranks <= ranks_max; ++ranks)
    for (int tp = 1; tp <= ranks; ++tp)
      for (int pp = 1; tp * pp <= ranks; ++pp) {
        if (ranks % (tp * pp) != 0) continue;
        for (const int virtual_pp : {1, 2, 4})
          for (int zero = 0; zero <= 3; ++zero) {
            comm::Layout layout = train::layout_of(settings);
            layout.dp = ranks / (tp * pp);
            layout.tp = tp;
            layout.pp = pp;
            layout.zero = zero;
            layout.virtual_pp = virtual_pp;
            if (layout.validate().ok() && model::check_shard(config, tp, pp, virtual_pp).ok() &&
                with_layout(settings, layout).check_layout().ok())
              layouts.push_back(layout);
          }
      }
  return layouts;
}

Result<std::vector<PlannedLayout>> plan_layouts(const kernels::DeviceProfile& profile,
                                                const model::ModelConfig& config, DType dtype,
                                                const protocol::TrainSettings& settings,
                                                const train::BatchBounds& bounds,
                                                const LayoutLimits& limits, const CostModel& model,
                                                bool evaluates) {
  std::vector<PlannedLayout> all;
  for (const comm::Layout& layout : possible_layouts(config, settings, limits.ranks_max)) {
    TANDEM_ASSIGN_OR_RETURN(all.emplace_back(),
                            plan(profile, config, dtype, with_layout(settings, layout), bounds,
                                 limits, model, evaluates));
  }
  std::stable_sort(all.begin(), all.end(), [](const PlannedLayout& a, const PlannedLayout& b) {
    if (a.fits != b.fits) return a.fits;
    return a.tokens_per_second > b.tokens_per_second;
  });
  // Nearly as fast with fewer ranks is better: the others are free for somebody else. So is waiting
  // for one another less often, which costs more than predicted wherever ranks are disturbed.
  const auto simplicity = [](const PlannedLayout& p) {
    return std::tuple(p.layout.ranks(), p.layout.tp, p.layout.pp, p.layout.zero);
  };
  std::size_t best = 0;
  for (std::size_t i = 1; i < all.size(); ++i)
    if (all[i].fits == all[0].fits &&
        all[i].tokens_per_second >= (1.0 - kEqual) * all[0].tokens_per_second &&
        simplicity(all[i]) < simplicity(all[best]))
      best = i;
  if (!all.empty())
    std::rotate(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(best),
                all.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  return all;
}

std::string to_json(const std::vector<PlannedLayout>& layouts, std::size_t most) {
  auto list = nlohmann::ordered_json::array();
  for (const PlannedLayout& planned : layouts) {
    if (list.size() == most) break;
    list.push_back({{"name", planned.layout.to_string()},
                    {"dp", planned.layout.dp},
                    {"tp", planned.layout.tp},
                    {"pp", planned.layout.pp},
                    {"zero", planned.layout.zero},
                    {"virtual_pipeline_size", planned.layout.virtual_pp},
                    {"tokens_per_second", planned.tokens_per_second},
                    {"step_seconds", planned.step.seconds},
                    {"compute_seconds", planned.step.compute_seconds},
                    {"collective_seconds", planned.step.collective_seconds},
                    {"bubble_seconds", planned.step.bubble_seconds},
                    {"peak_bytes", planned.peak_bytes},
                    {"fits", planned.fits}});
  }
  return list.dump();
}

}  // namespace tandem::worker::memory
