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
  int first = 0, rounds = 1;  // first 0: all
  std::int64_t layers = 0;    // 0: all
  bool run = true;
};

Result<worker::model::LoadedModel> load(const Options& options) {
  TANDEM_ASSIGN_OR_RETURN(auto loaded, tools::load_bench_model(options.model, options.shape));
  if (options.layers > 0) loaded.config.layers = std::min(loaded.config.layers, options.layers);
  return loaded;
}

struct Machine {
  kernels::Backend& backend;
  kernels::Exec& exec;
  kernels::Arena& arena;
  worker::comm::Communicator& comm;
};

/// The largest of a number over ranks, on all of them.
double largest(Machine& m, double mine) {
  kernels::ArenaScope scope(m.arena);
  const auto one = m.arena.alloc({1}, DType::kF64);
  const auto all = m.arena.alloc({m.comm.size()}, DType::kF64);
  std::vector<double> host(static_cast<std::size_t>(m.comm.size()));
  m.backend.ops->upload(m.exec, std::as_bytes(std::span(&mine, 1)), one);
  m.comm.all_gather(m.exec, one, all);
  m.backend.ops->download(m.exec, all, std::as_writable_bytes(std::span(host)));
  return *std::max_element(host.begin(), host.end());
}

/// Seconds on the slowest rank with all of them at it. The least of several trials, for another
/// program's work only adds to them; each is long enough to hide what beginning and end take, and
/// the first ones bring a GPU's clock to what it is in training.
double time_of(Machine& m, const std::function<void()>& body) {
  constexpr int kTrials = 6, kWarmups = 2, kRepeatsMax = 256;
  constexpr double kTrialSeconds = 10e-3;
  const auto trial = [&](int repeats) {
    m.backend.ops->synchronize(m.exec);
    m.comm.barrier(m.exec);
    const std::int64_t begin = steady_ns();
    for (int i = 0; i < repeats; ++i) body();
    m.backend.ops->synchronize(m.exec);
    return largest(m, static_cast<double>(steady_ns() - begin) * 1e-9 / repeats);
  };
  trial(1);
  const double about = std::max(1e-9, trial(1));
  const int repeats = std::clamp(static_cast<int>(kTrialSeconds / about), 1, kRepeatsMax);
  for (int i = 0; i < kWarmups; ++i) trial(repeats);
  double least = trial(repeats);
  for (int i = 1; i < kTrials; ++i) least = std::min(least, trial(repeats));
  return least;
}

/// Two sizes give a line: what each hop costs and what each byte does.
memory::LinkCost fit_link(double hops, double small_bytes, double small_seconds, double large_bytes,
                          double large_seconds) {
  const double rate = (large_bytes - small_bytes) / std::max(1e-9, large_seconds - small_seconds);
  return {std::max(0.0, small_seconds - small_bytes / rate) / hops, rate};
}

void fit_links(Machine& m, DType dtype, memory::CostModel& model) {
  const int n = m.comm.size();
  if (n == 1) return;
  const double hops = n - 1.0, share = hops / n;
  const auto time = [&](std::int64_t elements, int kind, DType type) {
    kernels::ArenaScope scope(m.arena);
    const auto x = m.arena.alloc({elements * n}, type);
    const auto y = m.arena.alloc({elements * n}, type);
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
    return fit_link(kind_hops, moved * bytes(small), time(small, kind, DType::kF32),
                    moved * bytes(large), time(large, kind, DType::kF32));
  };
  model.all_reduce = fit(0, 2.0 * hops, 2.0 * share);
  model.all_gather = fit(1, hops, share);
  model.reduce_scatter = fit(2, hops, share);
  model.exchange = fit(3, 1.0, 1.0);
  if (is_16_bit(dtype))  // a byte has twice as much to add
    model.sum_16_bit_slowdown =
        std::clamp(time(2 * large, 0, dtype) / time(large, 0, DType::kF32), 1.0, 2.0);
}

/// What goes on in the background, from shared memory, and what it costs a product beside it.
void fit_background(Machine& m, DType dtype, const std::function<void()>& product,
                    memory::CostModel& model) {
  const int n = m.comm.size();
  if (!m.comm.has_background() || n == 1) return;
  const double hops = n - 1.0, share = hops / n;
  constexpr std::int64_t kSmall = 1 << 20, kLarge = 256 << 20;
  kernels::ArenaScope scope(m.arena);
  kernels::Arena shared(*m.backend.allocator, *m.backend.ledger, kernels::MemoryKind::kActivations,
                        "shared", std::int64_t{1} << 34, kernels::Sharing::kPeers);
  const std::int64_t elements = kLarge / dtype_bytes(dtype);
  const auto room = shared.alloc({elements}, dtype), out = m.arena.alloc({elements}, dtype);
  m.comm.share(m.exec, room);
  m.backend.ops->fill_zero(m.exec, room);
  const auto gather = [&](std::int64_t bytes) {
    const std::int64_t e = bytes / dtype_bytes(dtype);
    return m.comm.start_all_gather(m.exec, room.rows(0, e / n), out.rows(0, e / n * n));
  };
  const auto reduce = [&](std::int64_t bytes) {
    const std::int64_t e = bytes / dtype_bytes(dtype) / n;
    return m.comm.start_reduce_scatter_sum(m.exec, room.rows(0, e * n), out.rows(0, e));
  };
  const auto fit = [&](const auto& begin) {
    const auto time = [&](std::int64_t bytes) {
      return time_of(m, [&] { begin(bytes)->wait(m.exec); });
    };
    return fit_link(hops, share * kSmall, time(kSmall), share * kLarge, time(kLarge));
  };
  model.background_gather = fit(gather);
  model.background_reduce = fit(reduce);
  // Long enough that what a product's time varies by is small beside it.
  constexpr int kGathers = 4;
  const auto gathers = [&] {
    std::vector<std::unique_ptr<worker::comm::Pending>> pending;
    for (int g = 0; g < kGathers; ++g) pending.push_back(gather(kLarge));
    return pending;
  };
  const double alone = time_of(m, [&] {
    for (const auto& pending : gathers()) pending->wait(m.exec);
  });
  const int count = 1 + static_cast<int>(1.5 * alone / time_of(m, product));
  const auto products = [&] {
    for (int p = 0; p < count; ++p) product();
  };
  const double beside = time_of(m, [&] {
    const auto begun = gathers();
    products();
    for (const auto& pending : begun) pending->wait(m.exec);
  });
  model.background_slowdown = std::max(1.0, 1.0 + (beside - time_of(m, products)) / alone);
}

/// Tensors for ops that are timed.
class Rates {
 public:
  Rates(Machine& m, DType dtype)
      : m_(m),
        dtype_(dtype),
        weights_(*m.backend.allocator, *m.backend.ledger, kernels::MemoryKind::kWeights, "rate",
                 std::int64_t{1} << 34),
        noise_(1 << 16) {
    // As random as what a step multiplies: a GPU is faster on zeros, by power that they do not
    // take.
    Random random(1);
    for (float& value : noise_) value = static_cast<float>(random.normal());
  }
  [[nodiscard]] kernels::Tensor noise(kernels::Shape shape) { return noise(shape, dtype_); }
  [[nodiscard]] kernels::Tensor noise(kernels::Shape shape, DType type) {
    const auto x = m_.arena.alloc(shape, type);
    std::vector<float> values(static_cast<std::size_t>(x.elements()));
    for (std::size_t e = 0; e < values.size(); ++e) values[e] = noise_[e * 7 % noise_.size()];
    worker::model::upload_floats(*m_.backend.ops, m_.exec, values, x);
    return x;
  }
  [[nodiscard]] kernels::Tensor zeros(kernels::Shape shape, DType type) {
    const auto x = m_.arena.alloc(shape, type);
    m_.backend.ops->fill_zero(m_.exec, x);
    return x;
  }
  template <class T>
  [[nodiscard]] kernels::Tensor words(std::span<const T> values, DType type) {
    const auto bytes = static_cast<std::int64_t>(values.size_bytes());
    const auto x = m_.arena.alloc({bytes / dtype_bytes(type)}, type);
    m_.backend.ops->upload(m_.exec, std::as_bytes(values), x);
    return x;
  }
  [[nodiscard]] kernels::Tensor words(std::vector<std::int32_t> values) {
    return words(std::span<const std::int32_t>(values), DType::kI32);
  }
  [[nodiscard]] kernels::PackedWeight weight(std::int64_t n, std::int64_t i) {
    return m_.backend.ops->pack_weight(
        m_.exec, weights_, dtype_, n, i, [this, i](std::int64_t row, std::int64_t rows, float* to) {
          for (std::int64_t e = 0; e < rows * i; ++e)
            to[e] = noise_[static_cast<std::size_t>(row * i + e) * 5 % noise_.size()] * 0.02f;
        });
  }
  /// A trainable pair of that rank for outputs [begin, begin + n) of a linear with i inputs.
  [[nodiscard]] kernels::LoraSite site(std::int64_t begin, std::int64_t n, std::int64_t i,
                                       std::int64_t rank) {
    const kernels::LoraEntry entry{noise({rank, i}).data,
                                   noise({n, rank}).data,
                                   zeros({rank, i}, DType::kF32).as<float>(),
                                   zeros({n, rank}, DType::kF32).as<float>(),
                                   static_cast<std::int32_t>(rank),
                                   1.0f};
    return {begin, n, words(std::span(&entry, 1), DType::kU8), static_cast<std::uint64_t>(begin)};
  }

 private:
  Machine& m_;
  const DType dtype_;
  kernels::Arena weights_;
  std::vector<float> noise_;
};

/// The rates of one rank with all ranks at work, from ops of the model's own shapes.
void fit_rates(Machine& m, const Options& options, const worker::model::ModelConfig& c,
               memory::CostModel& model) {
  kernels::Ops& ops = *m.backend.ops;
  const DType dtype = options.compute_dtype();
  kernels::ArenaScope scope(m.arena);
  Rates make(m, dtype);
  const std::int64_t t = options.rows * options.length;
  // Of ops that take so many seconds: what bytes and starting them take is known before.
  const auto rate_of = [&](double work, double seconds,
                           std::initializer_list<kernels::OpCost> ops_timed) {
    for (const kernels::OpCost& cost : ops_timed)
      seconds -= model.op_seconds + cost.bytes / model.memory_bytes_per_second;
    return work / std::max(1e-9, seconds);
  };
  const auto tiny = make.noise({8, 16}), tiny_out = make.noise({8, 8});
  model.op_seconds = time_of(m, [&] { ops.silu_mul_forward(m.exec, {tiny, tiny_out}); });

  const std::int64_t n = 2 * c.mlp_width, i = c.width;
  const auto gate_up = make.noise({t, n}), out = make.noise({t, c.mlp_width});
  const auto x = make.noise({t, i}), dx = make.noise({t, i}), y = make.noise({t, i});
  const kernels::SiluMulArgs silu{gate_up, out};
  const kernels::AddRmsNormArgs norm{x,     dx, make.noise({i}),
                                     1e-5f, y,  make.zeros({t}, DType::kF32)};
  model.row_bytes_per_second =
      rate_of(kernels::op_cost(silu).row_bytes + kernels::op_cost(norm).row_bytes,
              time_of(m,
                      [&] {
                        ops.silu_mul_forward(m.exec, silu);
                        ops.add_rms_norm_forward(m.exec, norm);
                      }),
              {kernels::op_cost(silu), kernels::op_cost(norm)});
  constexpr std::int64_t kMasters = 1 << 22;
  kernels::AdamWArgs adamw{};
  for (kernels::Tensor* state : {&adamw.param, &adamw.grad, &adamw.m, &adamw.v})
    *state = make.zeros({kMasters}, DType::kF32);
  adamw.param_cd = make.zeros({kMasters}, dtype);
  adamw.lr = adamw.eps = 1e-5f;
  adamw.step = 1;
  model.memory_bytes_per_second =
      kernels::op_cost(adamw).bytes /
      std::max(1e-9, time_of(m, [&] { ops.adamw(m.exec, adamw); }) - model.op_seconds);

  const auto weight = make.weight(n, i);
  const kernels::LinearArgs forward{x, &weight, {}, {}, nullptr, gate_up, {}};
  const kernels::LinearBackwardArgs backward{gate_up, dx, &weight, {}, nullptr, {}, y};
  const auto time_of_linear = [&](const kernels::LinearArgs& f,
                                  const kernels::LinearBackwardArgs& b) {
    return time_of(m, [&] {
      ops.linear_forward(m.exec, f);
      ops.linear_backward(m.exec, b);
    });
  };
  const double flops =
      kernels::op_cost(forward).product_flops + kernels::op_cost(backward).product_flops;
  const double products = rate_of(flops, time_of_linear(forward, backward),
                                  {kernels::op_cost(forward), kernels::op_cost(backward)});
  model.product_flops_bf16 = model.product_flops_f32 = products;

  const kernels::LinearWeightGradArgs grad{gate_up, x, make.zeros({n, i}, DType::kF32), {}, true};
  model.weight_grad_share =
      rate_of(kernels::op_cost(grad).weight_grad_flops,
              time_of(m, [&] { ops.linear_weight_grad(m.exec, grad); }), {kernels::op_cost(grad)}) /
      products;

  // What adapters add to a wide linear and to a narrow one gives a line.
  const std::int64_t rank = options.rank;
  const kernels::AdapterRows rows_of_one{make.words({0, static_cast<std::int32_t>(t)}),
                                         make.words({0}), 1, rank};
  const auto u = make.zeros({t, 2 * rank}, dtype);
  struct Added {
    kernels::OpCost cost;
    double seconds = 0.0;
  };
  const auto added = [&](const kernels::PackedWeight& w, const kernels::Tensor& to) {
    kernels::LinearArgs f{x, &w, {}, {}, nullptr, to, {}};
    kernels::LinearBackwardArgs b{to, dx, &w, {}, nullptr, {}, y};
    const double without = time_of_linear(f, b);
    f.sites = b.sites = {make.site(0, w.n / 2, i, rank), make.site(w.n / 2, w.n / 2, i, rank)};
    f.adapters = b.adapters = &rows_of_one;
    f.u = b.u = u;
    kernels::OpCost cost = kernels::op_cost(f);
    cost.low_rank_flops += kernels::op_cost(b).low_rank_flops;
    cost.low_rank_products += kernels::op_cost(b).low_rank_products;
    return Added{cost, time_of_linear(f, b) - without};
  };
  const auto square = make.weight(i, i);
  const Added narrow = added(square, make.noise({t, i})), wide = added(weight, gate_up);
  const auto line = fit_link(wide.cost.low_rank_products, narrow.cost.low_rank_flops,
                             narrow.seconds, wide.cost.low_rank_flops, wide.seconds);
  model.low_rank_seconds = line.hop_seconds;
  model.low_rank_share = line.bytes_per_second / products;

  const kernels::AttentionSpec spec{c.heads, c.kv_heads, c.head_dim, 1.0f};
  const auto qkv = make.noise({t, (c.heads + 2 * c.kv_heads) * c.head_dim});
  const auto mixed = make.noise({t, c.heads * c.head_dim});
  const auto lse = make.noise({t, c.heads}, DType::kF32), dqkv = make.noise(qkv.shape);
  std::vector<std::int32_t> offsets;
  for (std::int64_t row = 0; row <= options.rows; ++row)
    offsets.push_back(static_cast<std::int32_t>(row * options.length));
  const auto seq = make.words(offsets);
  const kernels::AttentionArgs attend{spec, qkv, seq, options.length, mixed, lse};
  const kernels::AttentionBackwardArgs attend_back{spec, mixed,          qkv, mixed, lse,
                                                   seq,  options.length, dqkv};
  const double pairs =
      kernels::op_cost(attend).attention_flops + kernels::op_cost(attend_back).attention_flops;
  model.attention_flops = rate_of(pairs,
                                  time_of(m,
                                          [&] {
                                            ops.attention_forward(m.exec, attend);
                                            ops.attention_backward(m.exec, attend_back);
                                          }),
                                  {kernels::op_cost(attend), kernels::op_cost(attend_back)});

  // As much of the vocabulary as is made quickly.
  constexpr std::int64_t kHeadElements = 64 << 20, kHeadRows = 1024;
  const std::int64_t rows = std::min(t, kHeadRows);
  const auto head = make.weight(std::min(c.vocab, kHeadElements / c.width), c.width);
  const kernels::LinearCrossEntropyArgs loss{x.rows(0, rows),
                                             &head,
                                             make.zeros({rows}, DType::kI32),
                                             1.0f,
                                             make.zeros({rows}, DType::kF32),
                                             {},
                                             dx.rows(0, rows)};
  const kernels::OpCost cost = kernels::op_cost(loss);
  model.logits_per_second = rate_of(
      cost.logits,
      time_of(m, [&] { ops.linear_cross_entropy(m.exec, loss); }) - cost.product_flops / products,
      {cost});
  fit_background(
      m, dtype, [&] { ops.linear_forward(m.exec, forward); }, model);
}

/// A job on one layout, on the gang's first ranks; the others have no rig.
struct Trial {
  std::unique_ptr<worker::comm::Communicator> gang;
  worker::model::LoadedModel loaded;
  std::unique_ptr<tools::TrainingRig> rig;
};

Result<Trial> start(Machine& m, const Options& options, const worker::comm::Layout& layout) {
  const int ranks = layout.ranks();
  const bool mine = m.comm.rank() < ranks;
  std::vector<int> members(static_cast<std::size_t>(mine ? ranks : m.comm.size() - ranks));
  std::iota(members.begin(), members.end(), mine ? 0 : ranks);
  Trial trial;
  trial.gang = m.comm.sub(members);
  if (!mine) return trial;
  TANDEM_ASSIGN_OR_RETURN(trial.loaded, load(options));
  tools::TrainingCase all = options;
  all.steps = options.steps * options.rounds;
  TANDEM_ASSIGN_OR_RETURN(trial.rig, tools::TrainingRig::create(m.backend, m.exec, *trial.gang,
                                                                layout, trial.loaded, all));
  return trial;
}

/// Seconds of the fastest of a round's steps; 0 on ranks that have no part in them.
Result<double> run_round(Machine& m, const Options& options, Trial& trial) {
  double fastest = 0.0;
  for (std::int64_t steps = 0; trial.rig != nullptr && steps < options.steps;) {
    TANDEM_ASSIGN_OR_RETURN(const auto event, trial.rig->session().run_slice());
    const auto* done = std::get_if<worker::train::StepDone>(&event);
    if (done == nullptr || done->step <= options.warmup) continue;
    fastest = steps++ == 0 ? done->seconds : std::min(fastest, done->seconds);
  }
  m.comm.barrier(m.exec);
  return fastest;
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
  TANDEM_ASSIGN_OR_RETURN(const auto loaded, load(options));

  memory::CostModel model = memory::default_cost_model(backend.ops->profile());
  fit_rates(machine, options, loaded.config, model);
  fit_links(machine, options.compute_dtype(), model);
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
  const std::size_t tried =
      std::min(planned.size(),
               options.first == 0 ? planned.size() : static_cast<std::size_t>(options.first));
  // Layouts take turns, and of each the fastest step counts: another program's work passes.
  std::vector<double> speeds(tried);
  std::vector<Trial> trials(tried);
  for (int round = 0; options.run && round < options.rounds; ++round)
    for (std::size_t i = 0; i < tried; ++i) {
      if (round == 0) {
        TANDEM_ASSIGN_OR_RETURN(trials[i], start(machine, options, planned[i].layout));
      }
      TANDEM_ASSIGN_OR_RETURN(const double seconds, run_round(machine, options, trials[i]));
      if (options.rounds == 1) trials[i] = {};
      if (machine.comm.rank() != 0) continue;
      speeds[i] = std::max(speeds[i], options.tokens() / seconds);
      rows[i]["measured_tokens_per_second"] = speeds[i];
      rows[i]["measured_step_seconds"] = options.tokens() / speeds[i];
      std::cerr << planned[i].layout.to_string() << ": " << options.tokens() / seconds
                << " tokens/s, predicted " << planned[i].tokens_per_second << std::endl;
    }
  if (machine.comm.rank() != 0) return {};
  Json report{{"bench", "layout"},
              {"model", options.model.empty() ? options.shape : options.model},
              {"device", device.name},
              {"ranks", ranks},
              {"threads", options.threads},
              {"dtype", options.dtype},
              {"method", options.method},
              {"recompute", options.recompute},
              {"rows", options.rows},
              {"length", options.length},
              {"micro_batches", options.micro_batches},
              {"cost_model", Json::parse(model.to_json())},
              {"planning_seconds", planning_seconds},
              {"layouts", rows}};
  if (options.run)
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
  app.add_option("--layers", options.layers, "only so many of the model's blocks (0: all)")
      ->check(CLI::Range(0, 1000));
  app.add_option("--rounds", options.rounds,
                 "layouts take turns, --steps at a time (more than one: all are in memory)")
      ->check(CLI::Range(1, 100));
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
