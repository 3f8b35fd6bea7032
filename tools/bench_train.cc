// bench_train: training throughput of a model on this machine, as one JSON object: tokens per
// second of whole optimizer steps, the time of each phase, and the floor that the arithmetic
// alone would take at a product rate measured in the same run. Over several ranks: mpirun -np N
// bench_train --dp .. --tp .. --pp .. --zero ..; rank 0 prints, with every rank's peak bytes.
#include "kernels/cpu/openmp_spin.h"
#include "protocol/base/clock.h"
#include "protocol/base/random.h"
#include "tools/bench_device.h"
#include "tools/bench_gang.h"
#include "worker/memory/estimator.h"
#include "worker/model/model_loader.h"
#include "worker/model/weight_door.h"
#include "worker/train/ranks.h"
#include "worker/train/train_session.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <sys/resource.h>

#include <algorithm>
#include <ctime>
#include <iostream>

namespace {

using namespace tandem;

struct Options {
  std::string model, shape;
  std::string device = "cpu";
  std::string dtype = "bf16";
  std::string recompute = "none";
  int threads = 2;
  std::int64_t rank = 16, rows = 8, length = 512, steps = 4, warmup = 1, micro_batches = 1;
  std::int64_t ragged = 0;  ///< documents of ragged to length tokens; 0: of length tokens each
  std::string method = "lora";
  worker::comm::Layout layout;
};

/// Random tokens, all trained, in micro-batches of rows * length: `rows` documents of `length`, or
/// as many of ragged lengths as fill it.
std::vector<worker::data::OptimizerStep> random_steps(const Options& options, std::int64_t vocab) {
  std::vector<worker::data::OptimizerStep> steps;
  Random random(1234);
  for (std::int64_t s = 0; s < options.steps + options.warmup; ++s) {
    worker::data::MicroBatch batch;
    batch.cu_seqlens.push_back(0);
    const std::int64_t total = options.rows * options.length;
    while (static_cast<std::int64_t>(batch.tokens.size()) < total) {
      const std::int64_t left = total - static_cast<std::int64_t>(batch.tokens.size());
      std::int64_t length = options.length;
      if (options.ragged > 0)
        length = options.ragged + static_cast<std::int64_t>(random.below(
                                      static_cast<std::uint64_t>(length - options.ragged + 1)));
      for (std::int64_t t = 0; t < std::min(length, left); ++t) {
        batch.tokens.push_back(
            static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(vocab))));
        batch.positions.push_back(static_cast<std::int32_t>(t));
      }
      batch.cu_seqlens.push_back(static_cast<std::int32_t>(batch.tokens.size()));
    }
    batch.labels.assign(batch.tokens.begin() + 1, batch.tokens.end());
    batch.labels.push_back(worker::data::kIgnore);
    batch.trained_tokens = static_cast<std::int64_t>(batch.tokens.size()) - 1;
    worker::data::OptimizerStep step;
    step.micro_batches.assign(static_cast<std::size_t>(options.micro_batches), batch);
    step.trained_tokens = options.micro_batches * batch.trained_tokens;
    steps.push_back(std::move(step));
  }
  return steps;
}

/// Floating-point operations of one step: forward and input gradient of every matrix (4 per weight
/// and token, the head included; 6 where it is trained), attention (causal: half of T * L),
/// adapters (three products forward and backward).
double step_flops(const worker::model::ModelConfig& c, const Options& options) {
  const double tokens = static_cast<double>(options.rows * options.length * options.micro_batches);
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

/// Operations per second of one large product through the engine's own linear op.
double product_rate(worker::model::Context& ctx, kernels::Backend& backend) {
  // Large enough for the device at hand.
  const bool gpu = backend.ops->profile().type == kernels::DeviceType::kCuda;
  const std::int64_t t = gpu ? 8192 : 4096, i = gpu ? 8192 : 1536, n = i;
  kernels::Arena arena(*backend.allocator, *backend.ledger, kernels::MemoryKind::kWeights, "rate",
                       std::int64_t{1} << 28);
  const auto weight = ctx.ops.pack_weight(ctx.exec, arena, ctx.compute_dtype, n, i,
                                          [i](std::int64_t row, std::int64_t rows, float* out) {
                                            Random random(static_cast<std::uint64_t>(row));
                                            for (std::int64_t e = 0; e < rows * i; ++e)
                                              out[e] = random.uniform() - 0.5f;
                                          });
  kernels::ArenaScope scope(ctx.activations);
  const auto x = ctx.activations.alloc({t, i}, ctx.compute_dtype);
  const auto y = ctx.activations.alloc({t, n}, ctx.compute_dtype);
  const auto numbers = ctx.activations.alloc({t, i}, DType::kF32);
  std::vector<float> host(static_cast<std::size_t>(t * i));
  Random random(5);
  for (float& value : host) value = random.uniform() - 0.5f;
  ctx.ops.upload(ctx.exec, std::as_bytes(std::span(host)), numbers);
  ctx.ops.copy(ctx.exec, numbers, x);
  double best = 0.0;
  for (int trial = 0; trial < 5; ++trial) {
    ctx.ops.synchronize(ctx.exec);
    const std::int64_t begin = steady_ns();
    ctx.ops.linear_forward(ctx.exec, {x, &weight, {}, {}, nullptr, y, {}});
    ctx.ops.synchronize(ctx.exec);
    best = std::max(best, 2.0 * static_cast<double>(t * i * n) /
                              static_cast<double>(steady_ns() - begin) * 1e9);
  }
  return best;
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

Status run(const Options& options) {
  TANDEM_ASSIGN_OR_RETURN(auto loaded, tools::load_bench_model(options.model, options.shape));
  const DType dtype = options.dtype == "f32" ? DType::kF32 : DType::kBF16;
  TANDEM_ASSIGN_OR_RETURN(
      kernels::Backend backend,
      tools::open_bench_device(options.device, options.threads, tools::local_rank()));
  const std::int64_t context_bytes = backend.bytes_in_use();
  constexpr std::int64_t kReserve = std::int64_t{1} << 38;  // address space
  const auto arena = [&](kernels::MemoryKind kind, const char* name) {
    return std::make_unique<kernels::Arena>(*backend.allocator, *backend.ledger, kind, name,
                                            kReserve);
  };
  const auto weight_arena = arena(kernels::MemoryKind::kWeights, "weights");
  const auto table_arena = arena(kernels::MemoryKind::kAdapters, "slots");
  const auto activations = arena(kernels::MemoryKind::kActivations, "activations");
  const auto workspace = arena(kernels::MemoryKind::kWorkspace, "workspace");
  kernels::Exec exec{*workspace};
  TANDEM_RETURN_IF_ERROR(options.layout.validate());
  TANDEM_ASSIGN_OR_RETURN(
      auto gang,
      tools::make_bench_gang(options.layout.ranks(), options.layout.zero == 3, *backend.ops, exec));
  worker::comm::Communicator& comm = gang.comm();
  const worker::train::Ranks ranks = worker::train::make_ranks(comm, options.layout);
  const bool full = options.method == "full";
  TANDEM_RETURN_IF_ERROR(
      worker::model::check_shard(loaded.config, options.layout.tp, options.layout.pp));
  worker::model::Context context{*backend.ops, exec, *ranks.groups.tp, *activations, dtype};
  TANDEM_ASSIGN_OR_RETURN(
      const auto held,
      worker::model::hold_weights(context, *ranks.groups.dp, *weight_arena, loaded.config,
                                  *loaded.source, ranks.shard(loaded.config),
                                  worker::model::holding_beside(full, options.layout.zero)));
  if (!full) loaded.source.reset();  // the file's pages are not the engine's memory
  worker::model::AdapterTable adapters(*backend.ops, exec, *table_arena, held.base->config(), 1);

  worker::train::SessionOptions session_options;
  protocol::TrainSettings& settings = session_options.settings;
  settings.method = options.method;
  settings.gradient_accumulation_steps = options.micro_batches;
  settings.lora_r = options.rank;
  settings.lora_alpha = 2.0 * static_cast<double>(options.rank);
  settings.save_steps = 0;
  settings.recompute = options.recompute;
  auto batches = worker::train::make_fixed_batches(random_steps(options, loaded.config.vocab), {});
  worker::memory::TrainingPlan plan;
  plan.layout = options.layout;
  plan.rank = comm.rank();
  TANDEM_ASSIGN_OR_RETURN(const auto estimate, worker::memory::estimate_training(
                                                   backend.ops->profile(), loaded.config, dtype,
                                                   settings, batches->bounds(), plan));
  TANDEM_ASSIGN_OR_RETURN(auto session, worker::train::TrainSession::create(
                                            {*backend.allocator, *backend.ledger, context,
                                             *held.door, adapters, 0, &ranks, loaded.source.get()},
                                            session_options, std::move(batches)));

  worker::train::TrainSession::PhaseTimes before;
  std::vector<double> step_seconds;
  double loss = 0.0, processor_begin = 0.0;
  while (!session->finished()) {
    TANDEM_ASSIGN_OR_RETURN(const auto event, session->run_slice());
    if (const auto* done = std::get_if<worker::train::StepDone>(&event)) {
      if (done->step > options.warmup) {
        step_seconds.push_back(done->seconds);
      } else {
        before = session->phase_times();
        processor_begin = processor_seconds();
      }
      loss = done->loss;
    }
  }
  const auto after = session->phase_times();
  const double processor =
      (processor_seconds() - processor_begin) / static_cast<double>(step_seconds.size());
  const auto phase = [&](std::int64_t from, std::int64_t to) {
    return seconds(to - from) / static_cast<double>(step_seconds.size());
  };
  std::sort(step_seconds.begin(), step_seconds.end());
  const double median = step_seconds[step_seconds.size() / 2];
  const double tokens = static_cast<double>(options.rows * options.length * options.micro_batches);
  const std::int64_t peak = backend.ledger->peak_total(), resident = resident_bytes_max();
  // Arenas keep what they have mapped: what is in use at the end is the peak.
  const std::int64_t driver = backend.bytes_in_use() - context_bytes;
  const auto peaks = of_all_ranks(comm, context, static_cast<double>(peak));
  const double rate = product_rate(context, backend), flops = step_flops(loaded.config, options);
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
      {"estimate_bytes", estimate.peak_total},
      {"ledger_peak_bytes", peak},
      {"context_bytes", context_bytes},
      {"driver_peak_bytes", driver},
      {"resident_peak_bytes", resident},
      {"peak_bytes_of_ranks", peaks},
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
  app.add_option("--model", options.model, "Hugging Face folder or GGUF file");
  app.add_option("--shape", options.shape, "random weights of this shape instead")
      ->check(CLI::IsMember(tools::bench_shapes()));
  app.add_option("--device", options.device)->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_option("--dtype", options.dtype)->check(CLI::IsMember({"f32", "bf16"}));
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
  app.add_option("--dp", options.layout.dp, "data-parallel ranks")->check(CLI::Range(1, 1024));
  app.add_option("--tp", options.layout.tp, "tensor-parallel ranks")->check(CLI::Range(1, 1024));
  app.add_option("--pp", options.layout.pp, "pipeline stages")->check(CLI::Range(1, 1024));
  app.add_option("--zero", options.layout.zero, "0 to 3")->check(CLI::Range(0, 3));
  app.add_option("--steps", options.steps, "measured steps")->check(CLI::Range(1, 1000));
  app.add_option("--warmup", options.warmup, "steps before them")->check(CLI::Range(1, 100));
  CLI11_PARSE(app, argc, argv);
  const Status status = run(options);
  if (status.ok()) return 0;
  std::cerr << "bench_train: " << status.to_string() << std::endl;
  return exit_code(status.code());
}
