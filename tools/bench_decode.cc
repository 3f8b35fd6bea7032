// bench_decode: serving throughput of one engine on this machine, as one JSON object: decode tokens
// per second at several batch sizes, prefill tokens per second, and the host's own share of a step
// (the same steps on the shape-only backend, where ops cost nothing but their checks). Over several
// ranks: mpirun -np N bench_decode --tp .. --pp ..; rank 0 prints.
#include "kernels/cpu/openmp_spin.h"
#include "kernels/meta/meta_backend.h"
#include "protocol/base/clock.h"
#include "protocol/base/random.h"
#include "tools/bench_gang.h"
#include "tools/bench_options.h"
#include "worker/comm/layout.h"
#include "worker/model/model_loader.h"
#include "worker/serve/serve_engine.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <iostream>

namespace {

using namespace tandem;
namespace model = tandem::worker::model;
namespace serve = tandem::worker::serve;

struct Options {
  std::string model, shape;
  std::string device = "cpu";
  std::string dtype = "bf16";
  std::string numerics = "replay";
  int threads = 2;
  std::vector<std::int64_t> batches{1, 4, 16};
  std::int64_t prompt = 128, tokens = 64, prefill = 512, chunk = 512, adapters = 0, rank = 16,
               repeats = 3, kv_gib = 0;
  worker::comm::Layout layout;
};

/// An engine and everything under it: one rank's of `layout`.
struct Rig {
  Rig(kernels::Backend device, const model::LoadedModel& loaded, const Options& o,
      const worker::comm::Layout& layout)
      : backend(std::move(device)),
        dtype(*parse_dtype(o.dtype)),
        weights_arena(arena(kernels::MemoryKind::kWeights, "weights")),
        table_arena(arena(kernels::MemoryKind::kAdapters, "slots")),
        activations(arena(kernels::MemoryKind::kActivations, "activations")),
        workspace(arena(kernels::MemoryKind::kWorkspace, "workspace")),
        exec{
            *workspace,
            {},
            o.numerics == "invariant" ? kernels::Numerics::kInvariant : kernels::Numerics::kReplay},
        gang(tools::make_bench_gang(layout.ranks(), false, *backend.ops, exec).value()),
        groups(worker::comm::make_groups(gang.comm(), layout)),
        base(model::BaseWeights::load(*backend.ops, exec, *weights_arena, loaded.config, dtype,
                                      *loaded.source,
                                      {layout.tp_rank(gang.comm().rank()),
                                       layout.tp,
                                       {model::stage_at(loaded.config.layers, layout.pp,
                                                        layout.pp_rank(gang.comm().rank()))}})
                 .value()),
        weights(model::make_resident_weights(base)),
        slots(std::max<std::int64_t>(1, o.adapters)),
        table(*backend.ops, exec, *table_arena, base->config(), slots),
        context{*backend.ops, exec, *groups.tp, *activations, dtype},
        link(serve::make_comm_link(gang.wire(), exec)),
        ranks{*groups.model, *groups.pp, *link} {
    serve::ServeOptions options;
    options.max_running = *std::max_element(o.batches.begin(), o.batches.end());
    options.max_batch_tokens = std::max(o.chunk, options.max_running + 1);
    options.prefix_cache = false;
    if (o.kv_gib > 0) options.kv_bytes_max = o.kv_gib << 30;
    engine = serve::ServeEngine::create({.allocator = *backend.allocator,
                                         .ledger = *backend.ledger,
                                         .context = context,
                                         .weights = *weights,
                                         .adapters = &table,
                                         .slot_begin = 0,
                                         .slot_count = slots,
                                         .tokenizer = std::nullopt,
                                         .clock = clock,
                                         .ranks = layout.ranks() > 1 ? &ranks : nullptr},
                                        options)
                 .value();
    if (leads()) engine->reserve_worst_case();
  }
  [[nodiscard]] bool leads() const { return groups.model->rank() == 0; }
  std::unique_ptr<kernels::Arena> arena(kernels::MemoryKind kind, const char* name) {
    constexpr std::int64_t kReserve = std::int64_t{1} << 38;  // address space
    return std::make_unique<kernels::Arena>(*backend.allocator, *backend.ledger, kind, name,
                                            kReserve);
  }
  static Digest adapter_name(std::int64_t index) { return sha256(str("bench adapter ", index)); }

  kernels::Backend backend;
  const DType dtype;
  std::unique_ptr<kernels::Arena> weights_arena, table_arena, activations, workspace;
  kernels::Exec exec;
  tools::BenchGang gang;
  worker::comm::Groups groups;
  std::shared_ptr<const model::BaseWeights> base;
  std::unique_ptr<model::WeightSource> weights;
  const std::int64_t slots;
  model::AdapterTable table;
  model::Context context;
  std::unique_ptr<serve::CallLink> link;
  serve::ReplicaRanks ranks;
  SystemClock clock;
  std::unique_ptr<serve::ServeEngine> engine;
};

/// Random numbers; many of them repeat a block whose length is prime, so that rows differ.
void fill_random(Random& random, std::vector<float>& x) {
  constexpr std::size_t kBlock = 65537;
  for (std::size_t e = 0; e < x.size(); ++e)
    x[e] = e < kBlock ? 0.01f * random.normal() : x[e - kBlock];
}

/// Adapters on every linear site: the same numbers, each in memory of its own.
Status install_adapters(Rig& rig, const Options& o) {
  if (o.adapters == 0) return {};
  Random random(1);
  std::vector<model::HostAdapterTensor> tensors;
  const model::ModelConfig& config = rig.base->whole_config();
  for (std::int64_t layer = 0; layer < config.layers; ++layer)
    for (int s = 0; s < model::kSiteCount; ++s) {
      const auto shape = model::site_shape(config, model::Site{s});
      model::HostAdapterTensor t{layer, model::Site{s}, o.rank, 2.0f, {}, {}};
      t.a.resize(static_cast<std::size_t>(o.rank * shape.i));
      t.b.resize(static_cast<std::size_t>(o.rank * shape.n));
      fill_random(random, t.a);
      fill_random(random, t.b);
      tensors.push_back(std::move(t));
    }
  for (std::int64_t a = 0; a < o.adapters; ++a)
    TANDEM_RETURN_IF_ERROR(rig.engine->install_adapter(Rig::adapter_name(a), tensors));
  return {};
}

serve::GenerateRequest bench_request(const Options& o, std::int64_t index, std::int64_t prompt,
                                     std::int64_t tokens, std::int64_t vocab) {
  Random random(static_cast<std::uint64_t>(index), 3);
  serve::GenerateRequest r;
  r.id = RequestId(random_id("", 32));
  for (std::int64_t t = 0; t < prompt; ++t)
    r.prompt.push_back(static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(vocab))));
  r.sampling.max_tokens = tokens;
  r.sampling.temperature = 0.0f;
  r.sampling.ignore_eos = true;
  if (o.adapters > 0) r.adapter = Rig::adapter_name(index % o.adapters);
  return r;
}

struct Measured {
  double prefill_seconds = 0, decode_seconds = 0, best_step_seconds = 0;
  std::int64_t decode_tokens = 0;
};

/// `batch` requests at once: prefill, then steps in which all of them decode.
Measured measure(Rig& rig, const Options& o, std::int64_t batch, std::int64_t prompt,
                 std::int64_t tokens) {
  for (std::int64_t i = 0; i < batch; ++i) {
    const Status status =
        rig.engine->submit(bench_request(o, i, prompt, tokens, rig.base->whole_config().vocab));
    TANDEM_CHECK(status.ok(), status.to_string());
  }
  Measured m;
  m.best_step_seconds = 1e30;
  while (rig.engine->has_work()) {
    const std::int64_t begin = steady_ns();
    const serve::StepOutput out = rig.engine->step();
    const double seconds = static_cast<double>(steady_ns() - begin) * 1e-9;
    if (out.prefill_tokens > 0) {
      m.prefill_seconds += seconds;
    } else if (out.decode_tokens == batch) {
      m.decode_seconds += seconds;
      m.decode_tokens += batch;
      m.best_step_seconds = std::min(m.best_step_seconds, seconds);
    }
  }
  return m;
}

nlohmann::ordered_json measure_all(Rig& rig, Rig& meta, const Options& o) {
  nlohmann::ordered_json decode = nlohmann::ordered_json::array();
  for (const std::int64_t batch : o.batches) {
    measure(rig, o, batch, o.prompt, 4);  // warm-up
    std::vector<double> rates;
    double best_step = 1e30;
    for (std::int64_t repeat = 0; repeat < o.repeats; ++repeat) {
      const Measured m = measure(rig, o, batch, o.prompt, o.tokens);
      rates.push_back(static_cast<double>(m.decode_tokens) / m.decode_seconds);
      best_step = std::min(best_step, m.best_step_seconds);
    }
    std::sort(rates.begin(), rates.end());
    const Measured host = measure(meta, o, batch, o.prompt, o.tokens);
    const double host_step = host.decode_seconds / static_cast<double>(host.decode_tokens / batch);
    decode.push_back({{"batch", batch},
                      {"tokens_per_second", rates[rates.size() / 2]},
                      {"tokens_per_second_best", rates.back()},
                      {"step_ms_best", best_step * 1e3},
                      {"host_us_per_step", host_step * 1e6},
                      {"host_share", host_step / best_step}});
  }
  double prefill = 0;
  for (std::int64_t repeat = 0; repeat < o.repeats; ++repeat) {
    const Measured m = measure(rig, o, 1, o.prefill, 1);
    prefill = std::max(prefill, static_cast<double>(o.prefill) / m.prefill_seconds);
  }
  return {{"decode", decode}, {"prefill_tokens_per_second", prefill}};
}

Status run(const Options& o) {
  TANDEM_ASSIGN_OR_RETURN(auto loaded, tools::load_bench_model(o.model, o.shape));
  TANDEM_RETURN_IF_ERROR(o.layout.validate());
  TANDEM_RETURN_IF_ERROR(model::check_shard(loaded.config, o.layout.tp, o.layout.pp));
  if (tools::started_ranks() != o.layout.ranks())
    return invalid_error(str("tp ", o.layout.tp, " x pp ", o.layout.pp, " are ", o.layout.ranks(),
                             " ranks; mpirun started ", tools::started_ranks()));
  TANDEM_ASSIGN_OR_RETURN(
      kernels::Backend device,
      tools::open_bench_device(o.device, o.threads, tools::local_rank(), o.dtype));
  const std::int64_t begin = steady_ns();
  Rig rig(std::move(device), loaded, o, o.layout);
  const double ready = static_cast<double>(steady_ns() - begin) * 1e-9;
  if (!rig.leads()) {
    while (rig.engine->follow()) {
    }
    return {};
  }
  Rig meta(kernels::make_meta_backend(rig.backend.ops->profile()), loaded, o, {});
  TANDEM_RETURN_IF_ERROR(install_adapters(rig, o));
  TANDEM_RETURN_IF_ERROR(install_adapters(meta, o));
  nlohmann::ordered_json out = {{"bench", "decode"},
                                {"machine", rig.backend.ops->profile().name},
                                {"model", o.model.empty() ? o.shape : o.model},
                                {"dtype", o.dtype},
                                {"numerics", o.numerics},
                                {"threads", o.threads},
                                {"prompt_tokens", o.prompt},
                                {"new_tokens", o.tokens},
                                {"adapters", o.adapters},
                                {"tp", o.layout.tp},
                                {"pp", o.layout.pp},
                                {"ready_seconds", ready}};
  out.update(measure_all(rig, meta, o));
  rig.engine->end();
  std::cout << out.dump(2) << std::endl;
  return {};
}

}  // namespace

int main(int argc, char** argv) {
  tandem::start_with_environment({tandem::kMallocLargeBuffers, tandem::kernels::cpu::kOpenmpSpin},
                                 argv);
  Options o;
  CLI::App app("Decode and prefill throughput of the serving engine");
  tools::add_model_options(app, o.model, o.shape, o.device);
  app.add_option("--dtype", o.dtype, "bf16, f16 (on a GPU) or f32")
      ->check(CLI::IsMember({"bf16", "f16", "f32"}));
  app.add_option("--numerics", o.numerics)->check(CLI::IsMember({"replay", "invariant"}));
  app.add_option("--threads", o.threads, "OpenMP threads of the ops");
  app.add_option("--batch", o.batches, "decoding sequences, one run each")->delimiter(',');
  app.add_option("--prompt-tokens", o.prompt, "prompt of the decode runs");
  app.add_option("--new-tokens", o.tokens);
  app.add_option("--prefill-tokens", o.prefill, "prompt of the prefill run");
  app.add_option("--chunk", o.chunk, "rows of one step at most");
  app.add_option("--adapters", o.adapters, "sequences carry so many adapters in turn; 0: base");
  app.add_option("--rank", o.rank, "of each adapter");
  app.add_option("--repeats", o.repeats);
  app.add_option("--tp", o.layout.tp, "tensor-parallel ranks")->check(CLI::Range(1, 1024));
  app.add_option("--pp", o.layout.pp, "stages")->check(CLI::Range(1, 1024));
  app.add_option("--kv-gib", o.kv_gib, "memory of the KV cache; 0: the engine's default")
      ->check(CLI::Range(0, 1024));
  CLI11_PARSE(app, argc, argv);
  const Status status = run(o);
  if (!status.ok()) {
    std::cerr << status.to_string() << std::endl;
    return exit_code(status.code());
  }
  return 0;
}
