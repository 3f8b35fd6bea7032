#include "worker/runtime/job_estimate.h"

#include "worker/memory/layout_planner.h"
#include "worker/train/ranks.h"

#include <nlohmann/json.hpp>

#include <algorithm>

namespace tandem::worker::runtime {
namespace {

constexpr std::size_t kLayoutsShown = 10;  ///< of those that layout auto looked at

using nlohmann::json;

/// A worker computes in one dtype, that of the base it holds.
Status check_dtype(const kernels::DeviceProfile& profile, const ModelHostOptions& o,
                   const protocol::TrainSettings& settings) {
  if (settings.dtype == "auto") return {};
  TANDEM_ASSIGN_OR_RETURN(const DType asked, kernels::parse_compute_dtype(profile, settings.dtype));
  if (asked == o.dtype) return {};
  return refused_error(str("the job asks for dtype ", settings.dtype, ", this worker computes in ",
                           dtype_name(o.dtype), ": leave dtype out, or start workers with --dtype ",
                           settings.dtype));
}

/// Each rank is a process beside the engine of its slot, which goes on serving: both must fit.
Result<std::string> estimate_gang(const kernels::DeviceProfile& profile,
                                  const model::ModelConfig& config, const ModelHostOptions& o,
                                  const protocol::TrainSettings& settings, bool evaluates) {
  TANDEM_ASSIGN_OR_RETURN(auto ranks,
                          memory::estimate_gang(profile, config, o.dtype, settings,
                                                memory::worst_case_bounds(settings), evaluates));
  if (const auto choices = settings.dp_choices(); choices.size() > 1) {
    // Fewer ranks have larger parts each: an elastic job must fit at its smallest too.
    auto fewest = settings;
    fewest.dp = choices.back();
    TANDEM_ASSIGN_OR_RETURN(const auto more,
                            memory::estimate_gang(profile, config, o.dtype, fewest,
                                                  memory::worst_case_bounds(fewest), evaluates));
    ranks.insert(ranks.end(), more.begin(), more.end());
  }
  return gang_reply(profile, config, o, train::layout_of(settings), ranks);
}

Result<std::string> estimate_layout(const kernels::DeviceProfile& profile,
                                    const model::ModelConfig& config, const ModelHostOptions& o,
                                    const protocol::TrainSettings& settings, bool evaluates) {
  if (settings.ranks() > 1 || settings.full())
    return estimate_gang(profile, config, o, settings, evaluates);
  TANDEM_ASSIGN_OR_RETURN(const auto engine,
                          estimate_engine_with_job(profile, config, o, settings, evaluates));
  auto kinds = json::parse(engine.job.to_json());
  kinds["serving_engine"] = engine.serving;
  return json{{"peak_bytes", engine.total()},
              {"by_kind", kinds},
              {"limit_bytes", o.memory_bytes_max},
              {"dtype", dtype_name(o.dtype)},
              {"fits", engine.total() <= o.memory_bytes_max}}
      .dump();
}

/// The first of the planned layouts, fastest first, that fits beside the serving engine as well
/// (a job of one rank runs in that engine).
Result<std::string> estimate_auto(const kernels::DeviceProfile& profile,
                                  const model::ModelConfig& config, const ModelHostOptions& o,
                                  protocol::TrainSettings settings, bool evaluates,
                                  const std::string& data_directory) {
  settings.layout = "manual";
  auto costs = memory::read_cost_model(data_directory + "/" + memory::kCostModelFile);
  if (costs.status().code() == StatusCode::kNotFound) costs = memory::default_cost_model(profile);
  TANDEM_RETURN_IF_ERROR(costs.status());
  const memory::LayoutLimits limits{static_cast<int>(std::max<std::int64_t>(1, settings.ranks_max)),
                                    o.memory_bytes_max};
  TANDEM_ASSIGN_OR_RETURN(
      const auto planned,
      memory::plan_layouts(profile, config, o.dtype, settings, memory::worst_case_bounds(settings),
                           limits, *costs, evaluates));
  std::string first;
  for (const memory::PlannedLayout& plan : planned) {
    TANDEM_ASSIGN_OR_RETURN(
        const std::string text,
        estimate_layout(profile, config, o, memory::with_layout(settings, plan.layout), evaluates));
    auto reply = json::parse(text);
    reply["layout"] = {{"dp", plan.layout.dp},
                       {"tp", plan.layout.tp},
                       {"pp", plan.layout.pp},
                       {"zero", plan.layout.zero},
                       {"virtual_pipeline_size", plan.layout.virtual_pp}};
    reply["layout_name"] = plan.layout.to_string();
    reply["layouts"] = json::parse(memory::to_json(planned, kLayoutsShown));
    if (reply.value("fits", false)) return reply.dump();
    if (first.empty()) first = reply.dump();
  }
  return first;
}

}  // namespace

Result<EngineWithJob> estimate_engine_with_job(const kernels::DeviceProfile& profile,
                                               const model::ModelConfig& config,
                                               const ModelHostOptions& options,
                                               const protocol::TrainSettings& settings,
                                               bool evaluates) {
  EngineWithJob engine;
  TANDEM_ASSIGN_OR_RETURN(engine.job,
                          memory::estimate_training(profile, config, options.dtype, settings,
                                                    memory::worst_case_bounds(settings),
                                                    {options.adapter_slots + 1, evaluates, true}));
  TANDEM_ASSIGN_OR_RETURN(
      const auto serving,
      memory::estimate_serving(profile, config, options.dtype, serve_options(options),
                               options.adapter_slots + 1));
  // Base and adapter table are there once.
  engine.serving = serving.peak_total - serving.of(kernels::MemoryKind::kWeights) -
                   serving.of(kernels::MemoryKind::kAdapters);
  return engine;
}

Result<std::string> gang_reply(const kernels::DeviceProfile& profile,
                               const model::ModelConfig& config, const ModelHostOptions& options,
                               const comm::Layout& layout,
                               const std::vector<memory::Estimate>& ranks) {
  TANDEM_ASSIGN_OR_RETURN(
      const auto engine,
      memory::estimate_serving(profile, config, options.dtype, serve_options(options),
                               options.adapter_slots + 1));
  const auto largest =
      std::max_element(ranks.begin(), ranks.end(),
                       [](const auto& a, const auto& b) { return a.peak_total < b.peak_total; });
  const memory::BesideLedger beside = memory::beside_ledger(profile, layout, *largest);
  const std::int64_t total = largest->peak_total + beside.total() + engine.peak_total;
  auto per_rank = json::array();
  for (const auto& rank : ranks) per_rank.push_back(json::parse(rank.to_json()));
  auto kinds = json::parse(largest->to_json());
  kinds["checkpoint_copy"] = beside.checkpoint_copy;
  kinds["context"] = beside.context;
  kinds["nccl"] = beside.nccl;
  kinds["serving_engine"] = engine.peak_total;
  return json{{"peak_bytes", total},
              {"by_kind", kinds},
              {"ranks", per_rank},
              {"limit_bytes", options.memory_bytes_max},
              {"dtype", dtype_name(options.dtype)},
              {"fits", total <= options.memory_bytes_max}}
      .dump();
}

Result<std::string> estimate_job(const kernels::DeviceProfile& profile,
                                 const model::ModelConfig& config, const ModelHostOptions& options,
                                 const protocol::TrainSettings& settings, bool evaluates,
                                 const std::string& data_directory) {
  TANDEM_RETURN_IF_ERROR(check_dtype(profile, options, settings));
  if (settings.layout == "auto")
    return estimate_auto(profile, config, options, settings, evaluates, data_directory);
  return estimate_layout(profile, config, options, settings, evaluates);
}

}  // namespace tandem::worker::runtime
