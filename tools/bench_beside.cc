// bench_beside: what training and serving cost each other on one device, as one JSON object. One
// base model, a LoRA job and an open-loop stream of requests (Poisson arrivals), through the
// engine's own classes: ModelHost with its two queues, the serving engine, and DeviceTurns, which
// lets them take turns as it does in a worker. Training is measured alone (no server at all),
// beside an idle server, and under load; serving under load and alone.
#include "kernels/cpu/openmp_spin.h"
#include "protocol/base/clock.h"
#include "protocol/base/random.h"
#include "protocol/base/units.h"
#include "tools/bench_options.h"
#include "tools/bench_training.h"
#include "tools/random_model.h"
#include "worker/comm/communicator.h"
#include "worker/runtime/device_turns.h"
#include "worker/runtime/model_host.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <iostream>
#include <unordered_map>

namespace {

using namespace tandem;
using Json = nlohmann::ordered_json;

struct Options {
  tools::TrainingCase training{.recompute = "elementwise", .rows = 2, .length = 2048};
  std::string model, shape, device = "cpu";
  int threads = 2;
  std::int64_t kv_gib = 4, running_max = 64, batch_tokens = 512, batch_tokens_beside = 256;
  double rate = 8.0, seconds = 30.0, warmup_seconds = 5.0;
  std::int64_t prompt = 512, new_tokens = 128, seed = 1, idle_steps = 12;
  double interval_ms = 22.0, soon_ms = 8.0, share_min = 0.25;
  std::int64_t beside_rows = 0;
  int spare = 0;
  bool skip_alone = false, skip_serving_alone = false;
};

double to_ms(std::int64_t ns) {
  return static_cast<double>(ns) * 1e-6;
}

Json percentiles(std::vector<double> values) {
  if (values.empty()) return nullptr;
  std::sort(values.begin(), values.end());
  const auto at = [&](double share) {
    return values[static_cast<std::size_t>(share * static_cast<double>(values.size() - 1))];
  };
  return {{"p50", at(0.5)}, {"p90", at(0.9)}, {"p99", at(0.99)}, {"max", values.back()}};
}

/// Requests that arrive whether or not the ones before them were answered, and when each of their
/// tokens came.
class Load final : public worker::runtime::StepServer {
 public:
  Load(worker::serve::ServeEngine& engine, const Options& options, std::int64_t vocab)
      : engine_(engine), o_(options), vocab_(vocab) {}

  /// Arrivals from now on, for so long; what was measured before is forgotten.
  void start(double seconds) {
    random_ = Random(static_cast<std::uint64_t>(o_.seed));
    next_ns_ = steady_ns();
    end_ns_ = next_ns_ + static_cast<std::int64_t>(seconds * 1e9);
    wait_for_next();
  }
  /// Only what happens from now on is reported.
  void measure() {
    ttft_.clear();
    itl_.clear();
    tokens_ = refused_ = steps_ = 0;
    measured_ns_ = steady_ns();
  }
  void arrivals() {
    for (const std::int64_t now = steady_ns(); next_ns_ <= now && next_ns_ < end_ns_;) {
      submit();
      wait_for_next();
    }
  }

  [[nodiscard]] bool has_work() const override { return engine_.has_work(); }
  std::int64_t start_step() override { return engine_.start_step(); }
  [[nodiscard]] bool step_ready() const override { return engine_.step_ready(); }
  void finish_step() override {
    const auto out = engine_.finish_step();
    const std::int64_t now = steady_ns();
    ++steps_;
    for (const auto& output : out.outputs) {
      const auto found = live_.find(output.id);
      if (found == live_.end()) continue;
      Times& times = found->second;
      tokens_ += std::ssize(output.token_ids);
      if (!output.token_ids.empty()) {
        (times.last == 0 ? ttft_ : itl_)
            .push_back(to_ms(now - (times.last == 0 ? times.arrived : times.last)));
        times.last = now;
      }
      if (output.finish != worker::serve::FinishReason::kNone) live_.erase(found);
    }
  }

  [[nodiscard]] Json report() const {
    const double seconds = static_cast<double>(steady_ns() - measured_ns_) * 1e-9;
    return {{"seconds", seconds},
            {"tokens_per_second", static_cast<double>(tokens_) / seconds},
            {"steps_per_second", static_cast<double>(steps_) / seconds},
            {"first_tokens", ttft_.size()},
            {"refused", refused_},
            {"live_at_end", live_.size()},
            {"ttft_ms", percentiles(ttft_)},
            {"itl_ms", percentiles(itl_)}};
  }

 private:
  struct Times {
    std::int64_t arrived = 0, last = 0;
  };
  void wait_for_next() {
    const double u = std::max(1e-9, 1.0 - static_cast<double>(random_.uniform()));
    next_ns_ += static_cast<std::int64_t>(-std::log(u) / o_.rate * 1e9);
  }
  void submit() {
    worker::serve::GenerateRequest request;
    request.id = RequestId(random_id("", 32));
    for (std::int64_t t = 0; t < o_.prompt; ++t)
      request.prompt.push_back(
          static_cast<std::int32_t>(random_.below(static_cast<std::uint64_t>(vocab_))));
    request.sampling.max_tokens = o_.new_tokens;
    request.sampling.temperature = 0.0f;
    request.sampling.ignore_eos = true;
    const RequestId id = request.id;
    if (const Status status = engine_.submit(std::move(request)); !status.ok()) {
      ++refused_;
      return;
    }
    live_[id] = {next_ns_, 0};
  }

  worker::serve::ServeEngine& engine_;
  const Options& o_;
  const std::int64_t vocab_;
  Random random_{0};
  std::int64_t next_ns_ = 0, end_ns_ = 0, measured_ns_ = 0;
  std::unordered_map<RequestId, Times> live_;
  std::vector<double> ttft_, itl_;
  std::int64_t tokens_ = 0, refused_ = 0, steps_ = 0;
};

/// Rows of random tokens, all of the same length.
std::shared_ptr<const worker::data::Dataset> random_rows(const Options& o, std::int64_t vocab) {
  auto data = std::make_shared<worker::data::Dataset>();
  Random random(7);
  for (std::int64_t row = 0; row < 16 * o.training.rows; ++row) {
    worker::data::Example& example = data->examples.emplace_back();
    for (std::int64_t t = 0; t < o.training.length; ++t)
      example.tokens.push_back(
          static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(vocab))));
    example.labels.assign(example.tokens.begin() + 1, example.tokens.end());
    example.labels.push_back(worker::data::kIgnore);
  }
  return data;
}

/// Median tokens per second of optimizer steps in a process without a server.
Result<double> train_alone(kernels::Backend& backend, const worker::model::LoadedModel& loaded,
                           const Options& o) {
  kernels::Arena workspace(*backend.allocator, *backend.ledger, kernels::MemoryKind::kWorkspace,
                           "workspace", std::int64_t{1} << 38);
  kernels::Exec exec{workspace};
  auto comm = worker::comm::make_single_communicator(
      [&](kernels::Exec& e, kernels::Tensor from, kernels::Tensor to) {
        backend.ops->copy(e, from, to);
      });
  tools::TrainingCase training = o.training;
  training.steps = o.idle_steps;
  training.warmup = 2;
  TANDEM_ASSIGN_OR_RETURN(const auto rig,
                          tools::TrainingRig::create(backend, exec, *comm, {}, loaded, training));
  std::vector<double> rates;
  while (!rig->session().finished()) {
    TANDEM_ASSIGN_OR_RETURN(const auto event, rig->session().run_slice());
    const auto* done = std::get_if<worker::train::StepDone>(&event);
    if (done != nullptr && done->step > training.warmup)
      rates.push_back(training.tokens() / done->seconds);
  }
  std::sort(rates.begin(), rates.end());
  return rates[rates.size() / 2];
}

/// The engine's device thread without its sockets.
class Engine {
 public:
  Engine(kernels::Backend& backend, const Options& o) : backend_(backend), o_(o) {}

  Status open(worker::model::LoadedModel loaded) {
    worker::runtime::ModelHostOptions options;
    options.dtype = o_.training.compute_dtype();
    options.memory_bytes_max = std::int64_t{1} << 38;
    options.kv_bytes_max = o_.kv_gib << 30;
    options.adapter_slots = 8;
    options.batch_tokens_max = o_.batch_tokens;
    options.running_max = o_.running_max;
    loaded.tokenizer = tools::byte_tokenizer();
    protocol::ModelRef ref;
    ref.name = "bench";
    ref.digest = sha256("bench");
    TANDEM_ASSIGN_OR_RETURN(host_, worker::runtime::ModelHost::adopt(
                                       backend_, ref, std::move(loaded), "bench", options));
    TANDEM_RETURN_IF_ERROR(host_->start(clock_, [this] { return yield(); }));
    load_.emplace(host_->serve(), o_, host_->config().vocab);
    turns_.emplace(
        worker::runtime::DeviceTurnsOptions{
            .train_share_min = o_.share_min,
            .step_interval_ns = static_cast<std::int64_t>(o_.interval_ms * 1e6),
            .soon_ns = static_cast<std::int64_t>(o_.soon_ms * 1e6),
            .beside_rows_max = o_.beside_rows},
        *load_, [this] { load_->arrivals(); });
    protocol::TrainSettings settings = o_.training.settings({});
    settings.per_device_train_batch_size = o_.training.rows;
    settings.max_length = o_.training.length;
    settings.max_steps = 100000;
    TANDEM_ASSIGN_OR_RETURN(
        session_,
        host_->open_session(settings, random_rows(o_, host_->config().vocab), nullptr, {}));
    return {};
  }

  [[nodiscard]] Load& load() { return *load_; }

  /// Trains for so many steps or seconds; returns tokens per second from the first step's end to
  /// the last one's.
  Result<double> train(std::int64_t steps, double seconds, bool median) {
    const auto end = steady_ns() + static_cast<std::int64_t>(seconds * 1e9);
    std::vector<double> rates;
    std::int64_t first = 0, last = 0, count = 0;
    while (count <= steps && steady_ns() < end) {
      (void)yield();
      Status status;
      turns_->train([&] {
        auto event = session_->run_slice();
        if (!event.ok()) {
          status = event.status();
        } else if (const auto* done = std::get_if<worker::train::StepDone>(&*event)) {
          last = steady_ns();
          if (count++ == 0) first = last;
          rates.push_back(o_.training.tokens() / done->seconds);
        }
      });
      TANDEM_RETURN_IF_ERROR(status);
    }
    if (count < 2) return invalid_error("too few training steps were measured; raise --seconds");
    std::sort(rates.begin(), rates.end());
    if (median) return rates[rates.size() / 2];
    return o_.training.tokens() * static_cast<double>(count - 1) /
           (static_cast<double>(last - first) * 1e-9);
  }

  void serve(double seconds) {
    const auto end = steady_ns() + static_cast<std::int64_t>(seconds * 1e9);
    while (steady_ns() < end) {
      if (!turns_->step_under_way()) load_->arrivals();
      if (turns_->step_under_way() || load_->has_work()) turns_->serve();
    }
  }

  void set_budget(std::int64_t tokens) { host_->serve().set_token_budget(tokens); }

 private:
  bool yield() {
    turns_->between();
    host_->spare_multiprocessors(turns_->step_under_way() || load_->has_work() ? o_.spare : 0);
    return turns_->soon();
  }

  kernels::Backend& backend_;
  const Options& o_;
  SystemClock clock_;
  std::unique_ptr<worker::runtime::ModelHost> host_;
  std::optional<Load> load_;
  std::optional<worker::runtime::DeviceTurns> turns_;
  std::unique_ptr<worker::runtime::JobSession> session_;
};

Status run(const Options& o) {
  TANDEM_ASSIGN_OR_RETURN(kernels::Backend backend,
                          tools::open_bench_device(o.device, o.threads, 0, o.training.dtype));
  Json out{{"bench", "beside"},
           {"device", backend.ops->profile().name},
           {"model", o.model.empty() ? o.shape : o.model},
           {"dtype", o.training.dtype},
           {"recompute", o.training.recompute},
           {"rows", o.training.rows},
           {"length", o.training.length},
           {"lora_r", o.training.rank},
           {"requests_per_second", o.rate},
           {"prompt_tokens", o.prompt},
           {"new_tokens", o.new_tokens},
           {"seed", o.seed},
           {"serve_interval_ms", o.interval_ms},
           {"soon_ms", o.soon_ms},
           {"train_share_min", o.share_min},
           {"batch_tokens_beside", o.batch_tokens_beside},
           {"beside_rows_max", o.beside_rows},
           {"spare_multiprocessors", o.spare}};
  double alone = 0;
  TANDEM_ASSIGN_OR_RETURN(auto loaded, tools::load_bench_model(o.model, o.shape));
  if (!o.skip_alone) {
    TANDEM_ASSIGN_OR_RETURN(alone, train_alone(backend, loaded, o));
    out["train_alone_tokens_per_second"] = alone;
  }
  Engine engine(backend, o);
  const std::int64_t begin = steady_ns();
  TANDEM_RETURN_IF_ERROR(engine.open(std::move(loaded)));
  out["open_seconds"] = to_ms(steady_ns() - begin) * 1e-3;
  TANDEM_RETURN_IF_ERROR(engine.train(2, 1e6, true).status());
  TANDEM_ASSIGN_OR_RETURN(const double idle, engine.train(o.idle_steps, 1e6, true));
  out["train_idle_server_tokens_per_second"] = idle;
  if (alone > 0) out["idle_server_cost"] = 1.0 - idle / alone;
  if (!o.skip_serving_alone) {
    engine.load().start(o.warmup_seconds + o.seconds);
    engine.serve(o.warmup_seconds);
    engine.load().measure();
    engine.serve(o.seconds);
    out["serving_alone"] = engine.load().report();
    engine.serve(o.warmup_seconds);  // the last answers
  }
  engine.set_budget(o.batch_tokens_beside);
  engine.load().start(2 * o.warmup_seconds + o.seconds);
  TANDEM_RETURN_IF_ERROR(engine.train(1 << 30, o.warmup_seconds, false).status());
  engine.load().measure();
  TANDEM_ASSIGN_OR_RETURN(const double beside, engine.train(1 << 30, o.seconds, false));
  out["serving_beside"] = engine.load().report();
  out["train_beside_tokens_per_second"] = beside;
  out["train_share"] = beside / (alone > 0 ? alone : idle);
  out["ledger_peak_bytes"] = backend.ledger->peak_total();
  std::cout << out.dump(2) << std::endl;
  return {};
}

}  // namespace

int main(int argc, char** argv) {
  tandem::start_with_environment({tandem::kMallocLargeBuffers, tandem::kernels::cpu::kOpenmpSpin},
                                 argv);
  Options o;
  CLI::App app("Training beside serving on one device, as JSON");
  tools::add_model_options(app, o.model, o.shape, o.device);
  app.add_option("--threads", o.threads)->check(CLI::Range(1, 1024));
  app.add_option("--dtype", o.training.dtype)->check(CLI::IsMember({"f32", "bf16", "f16"}));
  app.add_option("--recompute", o.training.recompute)
      ->check(CLI::IsMember({"none", "elementwise", "mlp", "block"}));
  app.add_option("--rank", o.training.rank)->check(CLI::Range(1, 512));
  app.add_option("--rows", o.training.rows, "documents of a training step");
  app.add_option("--length", o.training.length, "tokens of a document");
  app.add_option("--idle-steps", o.idle_steps,
                 "training steps without requests; of few, a cold GPU makes the first ones fast");
  app.add_option("--rate", o.rate, "requests a second");
  app.add_option("--prompt-tokens", o.prompt);
  app.add_option("--new-tokens", o.new_tokens);
  app.add_option("--seed", o.seed);
  app.add_option("--seconds", o.seconds, "measured, under load");
  app.add_option("--warmup-seconds", o.warmup_seconds, "of load, before");
  app.add_option("--kv-gib", o.kv_gib);
  app.add_option("--running", o.running_max, "sequences decoding at once");
  app.add_option("--batch-tokens", o.batch_tokens, "rows of a step that serves alone");
  app.add_option("--batch-tokens-beside", o.batch_tokens_beside, "while a job trains");
  app.add_option("--interval-ms", o.interval_ms, "from one serving step's end to the next one's");
  app.add_option("--soon-ms", o.soon_ms, "before a step is due, training issues nothing ahead");
  app.add_option("--share-min", o.share_min, "of device time, that training keeps");
  app.add_option("--beside-rows", o.beside_rows, "steps of so many rows run beside training's");
  app.add_option("--spare", o.spare, "multiprocessors that training leaves to serving");
  app.add_flag("--skip-alone", o.skip_alone, "no training without a server");
  app.add_flag("--skip-serving-alone", o.skip_serving_alone);
  CLI11_PARSE(app, argc, argv);
  const Status status = run(o);
  if (status.ok()) return 0;
  std::cerr << "bench_beside: " << status.to_string() << std::endl;
  return exit_code(status.code());
}
