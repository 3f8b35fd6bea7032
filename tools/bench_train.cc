// bench_train: training throughput of a model on this machine, as one JSON object: tokens per
// second of whole optimizer steps, the time of each phase, and the floor that the arithmetic
// alone would take at a product rate measured in the same run. Over several ranks: mpirun -np N
// bench_train --dp .. --tp .. --pp .. --zero ..; rank 0 prints, with every rank's peak bytes.
#include "kernels/cpu/openmp_spin.h"
#include "protocol/base/clock.h"
#include "tools/bench_arguments.h"
#include "tools/bench_gang.h"
#include "tools/bench_options.h"
#include "tools/bench_training.h"
#include "worker/train/pipeline_schedule.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <sys/resource.h>

#include <algorithm>
#include <ctime>
#include <iostream>

namespace {

using namespace tandem;

struct Options : tools::TrainingCase {
  std::string model, shape;
  std::string device = "cpu";
  int threads = 2;
  std::string balance = "compute", sequence_parallel = "on", layout_text;
  worker::comm::Layout layout;
};

/// Floating-point operations of one step: forward and input gradient of every matrix (4 per weight
/// and token, the head included; 6 where it is trained), attention (causal: half of T * L),
/// adapters (three products forward and backward).
double step_flops(const worker::model::ModelConfig& c, const Options& options) {
  const double tokens = options.tokens();
  double weights = static_cast<double>(c.vocab) * static_cast<double>(c.width), lora = 0.0;
  for (int s = 0; s < worker::model::kSiteCount; ++s) {
    const auto shape = worker::model::site_shape(c, worker::model::Site{s});
    weights += static_cast<double>(c.layers * shape.n * shape.i);
    lora += static_cast<double>(c.layers * options.rank * (shape.n + shape.i));
  }
  const double attention = static_cast<double>(c.layers * c.heads * c.head_dim) * tokens *
                           static_cast<double>(options.length) / 2.0;
  // Scores and values forward (2 products), five backward.
  const double linear = options.method == "full" ? 6.0 * weights : 4.0 * weights + 6.0 * lora;
  return tokens * linear + 2.0 * 7.0 * attention;
}

/// Every rank's number, in rank order.
std::vector<double> of_all_ranks(worker::comm::Communicator& comm, worker::model::Context& ctx,
                                 double mine) {
  std::vector<double> all(static_cast<std::size_t>(comm.size()));
  kernels::ArenaScope scope(ctx.activations);
  const auto x = ctx.activations.alloc({1}, DType::kF64);
  const auto out = ctx.activations.alloc({comm.size()}, DType::kF64);
  ctx.ops.upload(ctx.exec, std::as_bytes(std::span(&mine, 1)), x);
  comm.all_gather(ctx.exec, x, out);
  ctx.ops.download(ctx.exec, out, std::as_writable_bytes(std::span(all)));
  return all;
}

/// Processor time of all threads so far: what a step costs on a machine that others use as well.
double processor_seconds() {
  return static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
}

/// The most memory this process has had resident.
std::int64_t resident_bytes_max() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::int64_t>(usage.ru_maxrss) * 1024;
}

double seconds(std::int64_t ns) {
  return static_cast<double>(ns) * 1e-9;
}

/// --layout, over all ranks that were started.
Result<worker::comm::Layout> chosen_layout(const Options& options,
                                           const kernels::DeviceProfile& profile,
                                           const worker::model::ModelConfig& config) {
  if (options.layout_text.empty()) return options.layout;
  if (options.layout_text == "auto")
    return tools::fastest_layout(options, profile, config, tools::started_ranks());
  TANDEM_ASSIGN_OR_RETURN(auto layout, worker::comm::Layout::parse(options.layout_text));
  layout.sequence_parallel = options.layout.sequence_parallel;
  layout.balance = options.layout.balance;
  return layout;
}

Status run(Options options) {
  TANDEM_ASSIGN_OR_RETURN(auto loaded, tools::load_bench_model(options.model, options.shape));
  TANDEM_ASSIGN_OR_RETURN(kernels::Backend backend,
                          tools::open_bench_device(options.device, options.threads,
                                                   tools::local_rank(), options.dtype));
  TANDEM_ASSIGN_OR_RETURN(options.layout,
                          chosen_layout(options, backend.ops->profile(), loaded.config));
  TANDEM_RETURN_IF_ERROR(options.layout.validate());
  const std::int64_t context_bytes = backend.bytes_in_use();
  kernels::Arena workspace(*backend.allocator, *backend.ledger, kernels::MemoryKind::kWorkspace,
                           "workspace", std::int64_t{1} << 38);
  kernels::Exec exec{workspace};
  TANDEM_ASSIGN_OR_RETURN(
      auto gang,
      tools::make_bench_gang(options.layout.ranks(), options.layout.zero == 3, *backend.ops, exec));
  worker::comm::Communicator& comm = gang.comm();
  tools::CommunicationNs inside;
  TANDEM_ASSIGN_OR_RETURN(
      const auto rig,
      tools::TrainingRig::create(backend, exec, comm, options.layout, loaded, options, &inside));
  // The file's pages are not the engine's memory.
  if (options.method != "full") loaded.source.reset();
  worker::train::TrainSession& session = rig->session();
  worker::model::Context& context = rig->context();

  worker::train::TrainSession::PhaseTimes before;
  tools::CommunicationNs inside_before;
  std::vector<double> step_seconds;
  double loss = 0.0, processor_begin = 0.0;
  while (!session.finished()) {
    TANDEM_ASSIGN_OR_RETURN(const auto event, session.run_slice());
    if (const auto* done = std::get_if<worker::train::StepDone>(&event)) {
      if (done->step > options.warmup) {
        step_seconds.push_back(done->seconds);
      } else {
        before = session.phase_times();
        inside_before = inside;
        processor_begin = processor_seconds();
      }
      loss = done->loss;
    }
  }
  const auto after = session.phase_times();
  const double processor =
      (processor_seconds() - processor_begin) / static_cast<double>(step_seconds.size());
  const auto phase = [&](std::int64_t from, std::int64_t to) {
    return seconds(to - from) / static_cast<double>(step_seconds.size());
  };
  std::sort(step_seconds.begin(), step_seconds.end());
  const double median = step_seconds[step_seconds.size() / 2];
  const double tokens = options.tokens();
  const std::int64_t peak = backend.ledger->peak_total(), resident = resident_bytes_max();
  // Arenas keep what they have mapped: what is in use at the end is the peak.
  const std::int64_t driver = backend.bytes_in_use() - context_bytes;
  const auto peaks = of_all_ranks(comm, context, static_cast<double>(peak));
  // On a GPU calls return at once: what they take says nothing.
  const auto exposed = [&](std::int64_t from, std::int64_t to) -> nlohmann::ordered_json {
    if (options.device == "cuda") return nullptr;
    return of_all_ranks(comm, context, phase(from, to));
  };
  const auto local_micro_batches =
      static_cast<int>((options.micro_batches + options.layout.dp - 1) / options.layout.dp);
  const double rate = tools::product_rate(context, backend),
               flops = step_flops(loaded.config, options);
  std::vector<std::string> stages;
  for (const worker::model::Stage& stage : rig->ranks().shard(loaded.config).stages)
    stages.push_back(str("[", stage.first, ", ", stage.last, ")"));
  const nlohmann::ordered_json report{
      {"bench", "train"},
      {"model", options.model.empty() ? options.shape : options.model},
      {"recompute", options.recompute},
      {"ragged", options.ragged},
      {"device", backend.ops->profile().name},
      {"threads", options.threads},
      {"dtype", options.dtype},
      {"method", options.method},
      {"layout", options.layout.to_string()},
      {"micro_batches", options.micro_batches},
      {"lora_r", options.rank},
      {"rows", options.rows},
      {"length", options.length},
      {"steps", step_seconds.size()},
      {"tokens_per_second", tokens / median},
      {"tokens_per_second_per_rank", tokens / median / options.layout.ranks()},
      {"step_seconds_median", median},
      {"step_seconds_best", step_seconds.front()},
      {"step_processor_seconds", processor},
      {"phase_seconds",
       {{"data", phase(before.data, after.data)},
        {"forward", phase(before.forward, after.forward)},
        {"loss", phase(before.loss, after.loss)},
        {"backward", phase(before.backward, after.backward)},
        {"optimizer", phase(before.optimizer, after.optimizer)}}},
      {"step_tflop", flops * 1e-12},
      {"product_tflops", rate * 1e-12},
      {"floor_seconds", flops / rate},
      {"floor_tokens_per_second", tokens / (flops / rate)},
      {"estimate_bytes", rig->estimate().peak_total},
      {"ledger_peak_bytes", peak},
      {"context_bytes", context_bytes},
      {"driver_peak_bytes", driver},
      {"beside_ledger_bytes", driver - peak},
      {"resident_peak_bytes", resident},
      {"peak_bytes_of_ranks", peaks},
      {"stages_of_rank_0", stages},
      {"bubble_of_equal_stages",
       worker::train::pipeline_bubble(options.layout.pp, options.layout.virtual_pp,
                                      local_micro_batches)},
      {"exposed_communication_seconds_of_ranks",
       {{"tp", exposed(inside_before.tp, inside.tp)},
        {"dp", exposed(inside_before.dp, inside.dp)},
        {"pp_with_bubble", exposed(inside_before.pp, inside.pp)}}},
      {"last_loss", loss}};
  if (comm.rank() == 0) std::cout << report.dump(2) << std::endl;
  return {};
}

}  // namespace

int main(int argc, char** argv) {
  tandem::start_with_environment({tandem::kMallocLargeBuffers, tandem::kernels::cpu::kOpenmpSpin},
                                 argv);
  Options options;
  CLI::App app("Training throughput, as JSON");
  tools::add_model_options(app, options.model, options.shape, options.device);
  app.add_option("--dtype", options.dtype)->check(CLI::IsMember({"f32", "bf16", "f16"}));
  app.add_option("--recompute", options.recompute)
      ->check(CLI::IsMember({"none", "elementwise", "mlp", "block"}));
  app.add_option("--threads", options.threads)->check(CLI::Range(1, 1024));
  app.add_option("--rank", options.rank)->check(CLI::Range(1, 512));
  app.add_option("--rows", options.rows, "documents of a packed step")->check(CLI::Range(1, 4096));
  app.add_option("--length", options.length, "tokens of a document")->check(CLI::Range(2, 65536));
  app.add_option("--ragged", options.ragged, "shortest document; lengths vary up to --length")
      ->check(CLI::Range(0, 65536));
  app.add_option("--micro-batches", options.micro_batches, "of a step, over all ranks")
      ->check(CLI::Range(1, 4096));
  app.add_option("--method", options.method)->check(CLI::IsMember({"lora", "full"}));
  auto* layout = app.add_option("--layout", options.layout_text,
                                "all of it at once: tp2xpp2, dp2xzero3, pp2xvirtual2, or auto");
  const auto axis = [&](const char* flag, int& size, const char* what, int least, int most) {
    app.add_option(flag, size, what)->check(CLI::Range(least, most))->excludes(layout);
  };
  axis("--dp", options.layout.dp, "data-parallel ranks", 1, 1024);
  axis("--tp", options.layout.tp, "tensor-parallel ranks", 1, 1024);
  axis("--pp", options.layout.pp, "pipeline stages", 1, 1024);
  axis("--virtual-pp", options.layout.virtual_pp, "stages on each pipeline rank", 1, 1024);
  axis("--zero", options.layout.zero, "0 to 3", 0, 3);
  app.add_option("--pipeline-balance", options.balance, "what stages share evenly")
      ->check(CLI::IsMember({"compute", "memory", "blocks"}));
  app.add_option("--sequence-parallel", options.sequence_parallel, "over tensor-parallel ranks")
      ->check(CLI::IsMember({"on", "off"}));
  app.add_option("--steps", options.steps, "measured steps")->check(CLI::Range(1, 1000));
  app.add_option("--warmup", options.warmup, "steps before them")->check(CLI::Range(1, 100));
  if (const auto code = tools::parse_bench(app, argc, argv)) return *code;
  options.layout.sequence_parallel = options.sequence_parallel == "on";
  using Balance = worker::comm::StageBalance;
  options.layout.balance = options.balance == "memory"   ? Balance::kMemory
                           : options.balance == "blocks" ? Balance::kBlocks
                                                         : Balance::kCompute;
  const Status status = run(options);
  if (status.ok()) return 0;
  std::cerr << "bench_train: " << status.to_string() << std::endl;
  return exit_code(status.code());
}
