// bench_layout: what `layout: auto` would choose, against all layouts tried. Run as
//   mpirun -np N bench_layout --shape NAME [...]
// It measures this machine's rates and links, fits the cost model, predicts every layout of at most
// N ranks, runs each of them (or, with --first, the fastest by prediction), and prints both as one
// JSON object, with the share of the best layout's speed that the chosen one has. --write FILE
// keeps the fitted model for workers (cost_model).
#include "kernels/cpu/openmp_spin.h"
#include "protocol/base/clock.h"
#include "protocol/base/random.h"
#include "tools/bench_gang.h"
#include "tools/bench_options.h"
#include "tools/bench_training.h"
#include "worker/memory/layout_planner.h"
#include "worker/model/host_copy.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <fstream>
#include <functional>
#include <iostream>
#include <numeric>

namespace {

using namespace tandem;
using Json = nlohmann::ordered_json;
namespace memory = worker::memory;

struct Options : tools::TrainingCase {
  std::string model, shape, write;
  std::string device = "cpu";
  int threads = 1;
  int first = 0;  // 0: all
  bool run = true;
};

struct Machine {
  kernels::Backend& backend;
  kernels::Exec& exec;
  kernels::Arena& arena;
  worker::comm::Communicator& comm;
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

/// Seconds on the slowest rank with all of them at it, median of trials.
double time_of(Machine& m, const std::function<void()>& body) {
  constexpr int kTrials = 7;
  std::vector<double> seconds;
  for (int trial = 0; trial <= kTrials; ++trial) {
    m.backend.ops->synchronize(m.exec);
    m.comm.barrier(m.exec);
    const std::int64_t begin = steady_ns();
    body();
    m.backend.ops->synchronize(m.exec);
    const auto spent = static_cast<double>(steady_ns() - begin) * 1e-9;
    // The largest over ranks: one of them is rank 0's to report.
    kernels::ArenaScope scope(m.arena);
    const auto mine = m.arena.alloc({1}, DType::kF64);
    const auto all = m.arena.alloc({m.comm.size()}, DType::kF64);
    std::vector<double> host(static_cast<std::size_t>(m.comm.size()));
    m.backend.ops->upload(m.exec, std::as_bytes(std::span(&spent, 1)), mine);
    m.comm.all_gather(m.exec, mine, all);
    m.backend.ops->download(m.exec, all, std::as_writable_bytes(std::span(host)));
    if (trial > 0) seconds.push_back(*std::max_element(host.begin(), host.end()));
  }
  return median(seconds);
}

/// Two sizes give a line: what each hop costs and what each byte does.
memory::LinkCost fit_link(double hops, double small_bytes, double small_seconds, double large_bytes,
                          double large_seconds) {
  const double rate = (large_bytes - small_bytes) / std::max(1e-9, large_seconds - small_seconds);
  return {std::max(0.0, small_seconds - small_bytes / rate) / hops, rate};
}

void fit_links(Machine& m, memory::CostModel& model) {
  const int n = m.comm.size();
  if (n == 1) return;
  const double hops = n - 1.0, share = hops / n;
  const auto time = [&](std::int64_t elements, int kind) {
    kernels::ArenaScope scope(m.arena);
    const auto x = m.arena.alloc({elements * n}, DType::kF32);
    const auto y = m.arena.alloc({elements * n}, DType::kF32);
    m.backend.ops->fill_zero(m.exec, x);
    m.backend.ops->fill_zero(m.exec, y);
    const auto part = y.rows(0, elements);
    const int next = (m.comm.rank() + 1) % n, before = (m.comm.rank() + n - 1) % n;
    return time_of(m, [&] {
      if (kind == 0) m.comm.all_reduce_sum(m.exec, x);
      if (kind == 1) m.comm.all_gather(m.exec, part, x);
      if (kind == 2) m.comm.reduce_scatter_sum(m.exec, x, part);
      if (kind == 3) m.comm.exchange(m.exec, x, next, y, before);
    });
  };
  const bool gpu = m.backend.ops->profile().type == kernels::DeviceType::kCuda;
  const std::int64_t small = 1024, large = gpu ? 8 << 20 : 1 << 19;
  const auto bytes = [&](std::int64_t elements) { return 4.0 * static_cast<double>(elements * n); };
  const auto fit = [&](int kind, double kind_hops, double moved) {
    return fit_link(kind_hops, moved * bytes(small), time(small, kind), moved * bytes(large),
                    time(large, kind));
  };
  model.all_reduce = fit(0, 2.0 * hops, 2.0 * share);
  model.all_gather = fit(1, hops, share);
  model.reduce_scatter = fit(2, hops, share);
  model.exchange = fit(3, 1.0, 1.0);
}

/// The rates of one rank with all ranks at work, from ops of the model's own shapes.
void fit_rates(Machine& m, const Options& options, const worker::model::ModelConfig& c,
               memory::CostModel& model) {
  kernels::Ops& ops = *m.backend.ops;
  const DType dtype = options.compute_dtype();
  kernels::ArenaScope scope(m.arena);
  const std::int64_t t = options.rows * options.length;
  // As random as what a step multiplies: a GPU is faster on zeros, by power that they do not take.
  std::vector<float> noise(1 << 16);
  Random random(1);
  for (float& value : noise) value = static_cast<float>(random.normal());
  const auto alloc = [&](kernels::Shape shape, DType type) {
    const auto x = m.arena.alloc(shape, type);
    std::vector<float> values(static_cast<std::size_t>(x.elements()));
    for (std::size_t e = 0; e < values.size(); ++e) values[e] = noise[e * 7 % noise.size()];
    worker::model::upload_floats(ops, m.exec, values, x);
    return x;
  };
  // op_seconds and memory: the same op, small and large.
  const auto rate_of = [&](double work, double seconds) {
    return work / std::max(1e-9, seconds - model.op_seconds);
  };
  const auto tiny = alloc({8, 16}, dtype), tiny_out = alloc({8, 8}, dtype);
  model.op_seconds = time_of(m,
                             [&] {
                               for (int i = 0; i < 64; ++i)
                                 ops.silu_mul_forward(m.exec, {tiny, tiny_out});
                             }) /
                     64.0;
  const auto gate_up = alloc({t, 2 * c.mlp_width}, dtype), out = alloc({t, c.mlp_width}, dtype);
  const kernels::SiluMulArgs silu{gate_up, out};
  model.memory_bytes_per_second = rate_of(kernels::op_cost(silu).bytes,
                                          time_of(m, [&] { ops.silu_mul_forward(m.exec, silu); }));

  const std::int64_t n = 2 * c.mlp_width, i = c.width;
  kernels::Arena weights(*m.backend.allocator, *m.backend.ledger, kernels::MemoryKind::kWeights,
                         "rate", std::int64_t{1} << 34);
  const auto weight = ops.pack_weight(
      m.exec, weights, dtype, n, i, [&](std::int64_t row, std::int64_t rows, float* to) {
        for (std::int64_t e = 0; e < rows * i; ++e)
          to[e] = noise[static_cast<std::size_t>(row * i + e) * 5 % noise.size()] * 0.02f;
      });
  const auto x = alloc({t, i}, dtype), dx = alloc({t, i}, dtype);
  const kernels::LinearArgs forward{x, &weight, {}, {}, nullptr, gate_up, {}};
  const kernels::LinearBackwardArgs backward{gate_up, x, &weight, {}, nullptr, {}, dx};
  const double flops =
      kernels::op_cost(forward).product_flops + kernels::op_cost(backward).product_flops;
  const double products = time_of(m, [&] {
    ops.linear_forward(m.exec, forward);
    ops.linear_backward(m.exec, backward);
  });
  model.product_flops_bf16 = model.product_flops_f32 = rate_of(flops, products - model.op_seconds);

  const kernels::AttentionSpec spec{c.heads, c.kv_heads, c.head_dim, 1.0f};
  const auto qkv = alloc({t, (c.heads + 2 * c.kv_heads) * c.head_dim}, dtype);
  const auto mixed = alloc({t, c.heads * c.head_dim}, dtype);
  const auto lse = alloc({t, c.heads}, DType::kF32), dqkv = alloc(qkv.shape, dtype);
  std::vector<std::int32_t> offsets;
  for (std::int64_t row = 0; row <= options.rows; ++row)
    offsets.push_back(static_cast<std::int32_t>(row * options.length));
  const auto seq = m.arena.alloc({options.rows + 1}, DType::kI32);
  ops.upload(m.exec, std::as_bytes(std::span(offsets)), seq);
  const kernels::AttentionArgs attend{spec, qkv, seq, options.length, mixed, lse};
  const kernels::AttentionBackwardArgs attend_back{spec, mixed,          qkv, mixed, lse,
                                                   seq,  options.length, dqkv};
  const double pairs =
      kernels::op_cost(attend).attention_flops + kernels::op_cost(attend_back).attention_flops;
  const double attention = time_of(m, [&] {
    ops.attention_forward(m.exec, attend);
    ops.attention_backward(m.exec, attend_back);
  });
  model.attention_flops = rate_of(pairs, attention - model.op_seconds);
}

/// Median seconds of a step on that layout, on the gang's first ranks; 0 on the others.
Result<double> measure(Machine& m, const Options& options, const worker::comm::Layout& layout) {
  const int ranks = layout.ranks();
  const bool mine = m.comm.rank() < ranks;
  std::vector<int> members(static_cast<std::size_t>(mine ? ranks : m.comm.size() - ranks));
  std::iota(members.begin(), members.end(), mine ? 0 : ranks);
  const auto gang = m.comm.sub(members);
  std::vector<double> seconds;
  if (mine) {
    TANDEM_ASSIGN_OR_RETURN(auto loaded, tools::load_bench_model(options.model, options.shape));
    TANDEM_ASSIGN_OR_RETURN(const auto rig, tools::TrainingRig::create(m.backend, m.exec, *gang,
                                                                       layout, loaded, options));
    while (!rig->session().finished()) {
      TANDEM_ASSIGN_OR_RETURN(const auto event, rig->session().run_slice());
      if (const auto* done = std::get_if<worker::train::StepDone>(&event))
        if (done->step > options.warmup) seconds.push_back(done->seconds);
    }
  }
  m.comm.barrier(m.exec);
  return seconds.empty() ? 0.0 : median(seconds);
}

Status run(const Options& options) {
  TANDEM_ASSIGN_OR_RETURN(kernels::Backend backend,
                          tools::open_bench_device(options.device, options.threads,
                                                   tools::local_rank(), options.dtype));
  kernels::Arena workspace(*backend.allocator, *backend.ledger, kernels::MemoryKind::kWorkspace,
                           "workspace", std::int64_t{1} << 38);
  kernels::Arena arena(*backend.allocator, *backend.ledger, kernels::MemoryKind::kActivations,
                       "measured", std::int64_t{1} << 38);
  kernels::Exec exec{workspace};
  TANDEM_ASSIGN_OR_RETURN(
      auto gang, tools::make_bench_gang(tools::started_ranks(), false, *backend.ops, exec));
  Machine machine{backend, exec, arena, gang.comm()};
  const int ranks = machine.comm.size();
  TANDEM_ASSIGN_OR_RETURN(const auto loaded, tools::load_bench_model(options.model, options.shape));

  memory::CostModel model = memory::default_cost_model(backend.ops->profile());
  fit_rates(machine, options, loaded.config, model);
  fit_links(machine, model);
  const worker::train::BatchBounds bounds{options.rows * options.length, options.rows,
                                          options.length};
  const std::int64_t planning = steady_ns();
  const auto& device = backend.ops->profile();
  const bool own_memory = device.type == kernels::DeviceType::kCuda;  // else ranks share the host's
  TANDEM_ASSIGN_OR_RETURN(
      const auto planned,
      memory::plan_layouts(device, loaded.config, options.compute_dtype(), options.settings({}),
                           bounds, {ranks, device.memory_bytes / (own_memory ? 1 : ranks)}, model));
  const double planning_seconds = static_cast<double>(steady_ns() - planning) * 1e-9;

  Json rows = Json::parse(memory::to_json(planned, planned.size()));
  std::vector<double> speeds;
  const std::size_t tried =
      options.first == 0 ? planned.size() : static_cast<std::size_t>(options.first);
  for (std::size_t i = 0; options.run && i < std::min(tried, planned.size()); ++i) {
    // Every rank plans with rates of its own measurement; rank 0's order is everybody's.
    auto wanted = planned[i].layout;
    kernels::ArenaScope scope(arena);
    std::array<std::int32_t, 5> numbers{wanted.dp, wanted.tp, wanted.pp, wanted.zero,
                                        wanted.virtual_pp};
    const auto shared = arena.alloc({5}, DType::kI32);
    backend.ops->upload(exec, std::as_bytes(std::span(numbers)), shared);
    machine.comm.broadcast(exec, shared, 0);
    backend.ops->download(exec, shared, std::as_writable_bytes(std::span(numbers)));
    wanted = {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
    TANDEM_ASSIGN_OR_RETURN(const double seconds, measure(machine, options, wanted));
    if (machine.comm.rank() != 0) continue;
    speeds.push_back(options.tokens() / seconds);
    rows[i]["measured_step_seconds"] = seconds;
    rows[i]["measured_tokens_per_second"] = speeds.back();
    std::cerr << wanted.to_string() << ": " << speeds.back() << " tokens/s, predicted "
              << planned[i].tokens_per_second << std::endl;
  }
  if (machine.comm.rank() != 0) return {};
  Json report{{"bench", "layout"},
              {"model", options.model.empty() ? options.shape : options.model},
              {"device", device.name},
              {"ranks", ranks},
              {"threads", options.threads},
              {"dtype", options.dtype},
              {"method", options.method},
              {"rows", options.rows},
              {"length", options.length},
              {"micro_batches", options.micro_batches},
              {"cost_model", Json::parse(model.to_json())},
              {"planning_seconds", planning_seconds},
              {"layouts", rows}};
  if (!speeds.empty())
    report["chosen_share_of_best"] = speeds[0] / *std::max_element(speeds.begin(), speeds.end());
  std::cout << report.dump(2) << std::endl;
  if (options.write.empty()) return {};
  std::ofstream file(options.write);
  file << model.to_json() << '\n';
  return file.flush() ? Status() : internal_error(str("cannot write ", options.write));
}

}  // namespace

int main(int argc, char** argv) {
  tandem::start_with_environment({tandem::kMallocLargeBuffers, tandem::kernels::cpu::kOpenmpSpin},
                                 argv);
  Options options;
  options.steps = 3;
  CLI::App app("The layout that is chosen, against all layouts tried; run under mpirun");
  tools::add_model_options(app, options.model, options.shape, options.device);
  app.add_option("--dtype", options.dtype)->check(CLI::IsMember({"f32", "bf16", "f16"}));
  app.add_option("--recompute", options.recompute)
      ->check(CLI::IsMember({"none", "elementwise", "mlp", "block"}));
  app.add_option("--threads", options.threads, "of a rank")->check(CLI::Range(1, 1024));
  app.add_option("--rank", options.rank)->check(CLI::Range(1, 512));
  app.add_option("--rows", options.rows, "documents of a micro-batch")->check(CLI::Range(1, 4096));
  app.add_option("--length", options.length, "tokens of a document")->check(CLI::Range(2, 65536));
  app.add_option("--micro-batches", options.micro_batches, "of a step, over all ranks")
      ->check(CLI::Range(1, 4096));
  app.add_option("--method", options.method)->check(CLI::IsMember({"lora", "full"}));
  app.add_option("--steps", options.steps, "measured steps of each layout")
      ->check(CLI::Range(1, 1000));
  app.add_option("--write", options.write, "keep the fitted cost model in this file");
  app.add_option("--first", options.first, "run only so many, the fastest by prediction (0: all)")
      ->check(CLI::Range(0, 1000));
  app.add_flag("--run,!--no-run", options.run, "run the layouts (or predict only)");
  CLI11_PARSE(app, argc, argv);
  const Status status = run(options);
  if (status.ok()) return 0;
  std::cerr << "bench_layout: " << status.to_string() << std::endl;
  return exit_code(status.code());
}
