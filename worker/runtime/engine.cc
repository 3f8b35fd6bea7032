#include "worker/runtime/engine.h"

#include "protocol/base/log.h"
#include "protocol/base/units.h"
#include "worker/memory/estimator.h"
#include "worker/memory/layout_planner.h"
#include "worker/runtime/agent_watch.h"
#include "worker/runtime/device_arbiter.h"
#include "worker/runtime/job_host.h"
#include "worker/runtime/model_files.h"
#include "worker/runtime/process.h"
#include "worker/runtime/replica_plan.h"
#include "worker/runtime/serve_host.h"
#include "worker/runtime/supervisor.h"

#include <nlohmann/json.hpp>

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <mutex>

namespace tandem::worker::runtime {
namespace {

constexpr std::size_t kInboxMax = 65536, kTasksMax = 1024;
constexpr auto kIdleWait = std::chrono::milliseconds(50);
constexpr std::size_t kLayoutsShown = 10;  ///< of those that layout auto looked at

StopSignals g_stop_signals;
void on_signal(int) {
  g_stop_signals.note();
}

class Engine {
 public:
  Engine(const EngineOptions& options, const SlotPaths& paths, kernels::Backend& backend,
         EngineEndpoints endpoints, const Clock& clock)
      : options_(options),
        agent_(paths.agent_lock, clock),
        backend_(backend),
        clock_(clock),
        incarnation_(entropy64() | 1),
        bulk_(std::move(endpoints.bulk), clock),
        arbiter_(options.train_share_min),
        io_(std::move(endpoints.control), clock,
            {[this] { return hello(); }, [this](auto seq) { return heartbeat(seq); },
             [this](protocol::ControlMessage message) { receive(std::move(message)); }}),
        tasks_(kTasksMax),
        serve_(io_, tasks_, bulk_, [this](Task task) { post(serve_inbox_, std::move(task)); }) {
    beat();  // the I/O thread has something to say from the start
  }

  ~Engine() { bulk_.cancel(); }

  [[nodiscard]] Incarnation incarnation() const { return incarnation_; }

  int run() {
    while (exit_code_ < 0) {
      beat();
      handle_signals();
      drain_inbox(serve_inbox_);
      drain_inbox(control_inbox_);
      if (job_ && job_->over()) job_.reset();
      const bool training = job_ && job_->runnable();
      if (serve_.has_work() && arbiter_.serve_next(training))
        serve_step();
      else if (training)
        train_slice();
      else
        wait();
      if (agent_.gone()) g_stop_signals.at_least_one();
    }
    (void)io_.send(
        protocol::WorkerBye{options_.worker, protocol::WorkerRole::kEngine, incarnation_});
    ::usleep(kByeUs);  // lets the I/O thread hand it over
    return exit_code_;
  }

 private:
  static constexpr useconds_t kByeUs = 50000;
  using Inbox = BoundedQueue<Task>;

  void post(Inbox& inbox, Task task) {
    if (!inbox.try_push(std::move(task)))
      log_error("an engine queue is full (", kInboxMax, "): a message was dropped");
    (void)wake_.try_push(true);
  }

  static void drain_inbox(Inbox& inbox) {
    while (auto task = inbox.try_pop()) (*task)();
  }

  void wait() {
    idle_ = true;
    (void)wake_.pop_for(kIdleWait);
    idle_ = false;
  }

  void beat() {
    last_beat_ms_ = clock_.now_ms();
    if (last_beat_ms_ - snapshot_ms_ < kSnapshotMs) return;
    snapshot_ms_ = last_beat_ms_;
    protocol::Heartbeat beat;
    beat.worker = options_.worker;
    beat.role = protocol::WorkerRole::kEngine;
    beat.incarnation = incarnation_;
    if (model_) {
      describe_serving(model_->serve().stats(), *backend_.ledger, options_.model, beat);
    }
    if (job_) beat.jobs.push_back({job_->job(), job_->epoch(), job_->step()});
    std::lock_guard lock(snapshot_mutex_);
    snapshot_ = std::move(beat);
    snapshot_requests_ = serve_.live();
    snapshot_model_ = model_ ? model_->ref().digest : Digest{};
  }

  // -- I/O thread: reads snapshots only ----------------------------------------------------------
  /// A device thread that hangs must not look alive: it says neither hello nor heartbeat.
  [[nodiscard]] bool hung() const {
    return !idle_ && clock_.now_ms() - last_beat_ms_ > scaled_ms(options_.hung_after_ms);
  }

  std::optional<protocol::WorkerHello> hello() {
    if (hung()) return std::nullopt;
    std::lock_guard lock(snapshot_mutex_);
    protocol::WorkerHello hello;
    hello.role = protocol::WorkerRole::kEngine;
    hello.worker = options_.worker;
    hello.host = options_.host;
    hello.slot = options_.slot;
    hello.device = options_.device;
    hello.device_name = options_.device_name;
    hello.memory_bytes = options_.model.memory_bytes_max;
    hello.pid = ::getpid();
    hello.incarnation = incarnation_;
    hello.model = snapshot_model_;
    hello.jobs = snapshot_.jobs;
    hello.requests = snapshot_requests_;
    hello.adapters = snapshot_.adapters;
    hello.credits = options_.model.running_max + options_.model.waiting_max;
    return hello;
  }

  std::optional<protocol::Heartbeat> heartbeat(std::uint64_t seq) {
    if (hung()) return std::nullopt;
    std::lock_guard lock(snapshot_mutex_);
    protocol::Heartbeat beat = snapshot_;
    beat.seq = seq;
    return beat;
  }

  void receive(protocol::ControlMessage message) {
    const bool serving = std::holds_alternative<protocol::Infer>(message) ||
                         std::holds_alternative<protocol::InferCancel>(message) ||
                         std::holds_alternative<protocol::Announce>(message);
    auto shared = std::make_shared<protocol::ControlMessage>(std::move(message));
    post(serving ? serve_inbox_ : control_inbox_,
         [this, shared] { std::visit([this](auto& m) { on(m); }, *shared); });
  }

  // -- device thread: messages
  // -----------------------------------------------------------------------
  void on(protocol::Infer& infer) {
    if (draining_) return;  // the coordinator moves it when we say goodbye
    serve_.submit(infer);
  }
  void on(protocol::InferCancel& cancel) { serve_.cancel(cancel.id); }
  void on(protocol::Announce& announce) { serve_.prefetch(announce); }
  void on(protocol::HeartbeatReply&) {}
  void on(protocol::AgentCommand&) {}
  void on(protocol::LaunchDaemon&) {}  // agents alone get these two
  void on(protocol::DaemonLaunched&) {}

  void on(protocol::WorkerHelloReply& reply) {
    if (!reply.status.ok()) {
      log_error("the coordinator refuses this engine: ", reply.status.to_string());
      exit_code_ = 1;
      return;
    }
    for (const JobId& stopped : reply.stop_jobs)
      if (job_ && job_->job() == stopped) {
        io_.forget(stopped);
        job_.reset();
      }
    for (const RequestId& stopped : reply.stop_requests) serve_.cancel(stopped);
  }

  void on(protocol::LoadModel& load) {
    const Digest digest = load.model.digest;
    if (model_ && model_->ref().digest == digest) return report_loaded(digest, {}, 0);
    if (loading_ == digest) return;
    if (model_ && (job_ || serve_.live_count() > 0))
      return report_loaded(
          digest, busy_error(str("the engine is at work with model ", model_->ref().name)), 0);
    loading_ = digest;
    const std::int64_t begin = steady_ns();
    auto path = std::make_shared<Result<std::string>>(internal_error("not run"));
    auto task = [this, path, ref = load.model, begin] {
      *path = locate_model(ref, options_.data_directory, bulk_);
      post(control_inbox_, [this, path, ref, begin] { load_model(ref, *path, begin); });
    };
    if (!tasks_.post(task)) loading_ = {};
  }

  void load_model(const protocol::ModelRef& ref, const Result<std::string>& path,
                  std::int64_t begin) {
    loading_ = {};
    if (!path.ok()) return report_loaded(ref.digest, path.status(), 0);
    serve_.set_model(nullptr);
    model_.reset();
    auto loaded =
        ModelHost::load(backend_, clock_, ref, *path, options_.model, [this] { yield(); });
    if (!loaded.ok()) return report_loaded(ref.digest, loaded.status(), 0);
    model_ = std::move(*loaded);
    serve_.set_model(model_.get());
    const double seconds = static_cast<double>(steady_ns() - begin) / 1e9;
    log_info("model ", ref.name, " (", ref.digest, ") ready in ", seconds, " s, ",
             format_bytes(backend_.ledger->live_total()), " on the device");
    snapshot_ms_ = 0;
    beat();
    report_loaded(ref.digest, {}, seconds);
  }

  void report_loaded(const Digest& model, const Status& status, double seconds) {
    if (!status.ok()) log_warn("model ", model, " was not loaded: ", status.to_string());
    io_.send(protocol::ModelLoaded{model, status, seconds});
  }

  void on(protocol::EstimateRequest& request) {
    auto task = [this, request] {
      auto result = estimate(request);
      io_.send(
          protocol::EstimateReply{request.call_id, result.status(), result.ok() ? *result : ""});
    };
    if (!tasks_.post(task))
      io_.send(protocol::EstimateReply{
          request.call_id, busy_error("the engine's task queue is full; retry after 1000 ms"), ""});
  }

  /// The same objects on the meta backend; serving's share beside it. Task thread.
  Result<std::string> estimate(const protocol::EstimateRequest& request) {
    TANDEM_ASSIGN_OR_RETURN(const std::string path,
                            locate_model(request.model, options_.data_directory, bulk_));
    TANDEM_ASSIGN_OR_RETURN(const auto config, model::read_model_config(path));
    if (!request.serve_json.empty())
      return estimate_replica(backend_.ops->profile(), config, options_.model, request.serve_json);
    TANDEM_ASSIGN_OR_RETURN(const auto settings, protocol::TrainSettings::parse(request.spec_json));
    if (settings.max_length > config.context_max)
      return refused_error(str("max_length ", settings.max_length, " exceeds the context of model ",
                               request.model.name, " (", config.context_max, ")"));
    if (settings.layout == "auto") return estimate_auto(settings, config);
    return estimate_layout(settings, config);
  }

  Result<std::string> estimate_layout(const protocol::TrainSettings& settings,
                                      const model::ModelConfig& config) {
    if (settings.ranks() > 1 || settings.full()) return estimate_gang(settings, config);
    TANDEM_ASSIGN_OR_RETURN(
        const auto estimate,
        memory::estimate_training(backend_.ops->profile(), config, options_.model.dtype, settings,
                                  memory::worst_case_bounds(settings),
                                  {options_.model.adapter_slots + 1, true, true}));
    const std::int64_t total = estimate.peak_total + options_.model.kv_bytes_max;
    auto json = nlohmann::json::parse(estimate.to_json());
    json["kv_cache"] = options_.model.kv_bytes_max;
    return nlohmann::json{{"peak_bytes", total},
                          {"by_kind", json},
                          {"limit_bytes", options_.model.memory_bytes_max},
                          {"dtype", dtype_name(options_.model.dtype)},
                          {"fits", total <= options_.model.memory_bytes_max}}
        .dump();
  }

  /// The first of the planned layouts, fastest first, that fits beside the serving engine as well
  /// (a job of one rank runs in that engine).
  Result<std::string> estimate_auto(protocol::TrainSettings settings,
                                    const model::ModelConfig& config) {
    const auto& o = options_.model;
    const kernels::DeviceProfile& profile = backend_.ops->profile();
    settings.layout = "manual";
    auto costs = memory::read_cost_model(options_.data_directory + "/" + memory::kCostModelFile);
    if (costs.status().code() == StatusCode::kNotFound) costs = memory::default_cost_model(profile);
    TANDEM_RETURN_IF_ERROR(costs.status());
    const bool alone = options_.device != "cpu";  // GPUs have no gangs yet
    const memory::LayoutLimits limits{
        alone ? 1 : static_cast<int>(std::max<std::int64_t>(1, settings.ranks_max)),
        o.memory_bytes_max};
    TANDEM_ASSIGN_OR_RETURN(
        const auto planned,
        memory::plan_layouts(profile, config, o.dtype, settings,
                             memory::worst_case_bounds(settings), limits, *costs));
    std::string first;
    for (const memory::PlannedLayout& plan : planned) {
      TANDEM_ASSIGN_OR_RETURN(const std::string text,
                              estimate_layout(memory::with_layout(settings, plan.layout), config));
      auto json = nlohmann::json::parse(text);
      json["layout"] = {{"dp", plan.layout.dp},
                        {"tp", plan.layout.tp},
                        {"pp", plan.layout.pp},
                        {"zero", plan.layout.zero},
                        {"virtual_pipeline_size", plan.layout.virtual_pp}};
      json["layout_name"] = plan.layout.to_string();
      json["layouts"] = nlohmann::json::parse(memory::to_json(planned, kLayoutsShown));
      if (json.value("fits", false)) return json.dump();
      if (first.empty()) first = json.dump();
    }
    return first;
  }

  /// Each rank is a process beside the engine of its slot, which goes on serving: both must fit.
  Result<std::string> estimate_gang(const protocol::TrainSettings& settings,
                                    const model::ModelConfig& config) {
    if (options_.device != "cpu")
      return refused_error(
          str("a job ", settings.full() ? "of method full" : str("of ", settings.ranks(), " ranks"),
              " needs CPU workers so far; ", options_.worker, " is a GPU's"));
    const auto& o = options_.model;
    TANDEM_ASSIGN_OR_RETURN(
        auto ranks, memory::estimate_gang(backend_.ops->profile(), config, o.dtype, settings,
                                          memory::worst_case_bounds(settings)));
    if (const auto choices = settings.dp_choices(); choices.size() > 1) {
      // Fewer ranks have larger parts each: an elastic job must fit at its smallest too.
      auto fewest = settings;
      fewest.dp = choices.back();
      TANDEM_ASSIGN_OR_RETURN(
          const auto more, memory::estimate_gang(backend_.ops->profile(), config, o.dtype, fewest,
                                                 memory::worst_case_bounds(fewest)));
      ranks.insert(ranks.end(), more.begin(), more.end());
    }
    TANDEM_ASSIGN_OR_RETURN(const auto serving,
                            memory::estimate_serving(backend_.ops->profile(), config, o.dtype,
                                                     serve_options(o), o.adapter_slots + 1));
    const auto largest =
        std::max_element(ranks.begin(), ranks.end(),
                         [](const auto& a, const auto& b) { return a.peak_total < b.peak_total; });
    auto per_rank = nlohmann::json::array();
    for (const auto& rank : ranks) per_rank.push_back(nlohmann::json::parse(rank.to_json()));
    // The ranks' copies of the state while it is stored: masters and both moments, in f32.
    const std::int64_t copies = largest->of(kernels::MemoryKind::kOptimizer);
    const std::int64_t total = largest->peak_total + copies + serving.peak_total;
    auto kinds = nlohmann::json::parse(largest->to_json());
    kinds["checkpoint_copy"] = copies;
    kinds["serving_engine"] = serving.peak_total;
    return nlohmann::json{{"peak_bytes", total},
                          {"by_kind", kinds},
                          {"ranks", per_rank},
                          {"limit_bytes", o.memory_bytes_max},
                          {"dtype", dtype_name(o.dtype)},
                          {"fits", total <= o.memory_bytes_max}}
        .dump();
  }

  void on(protocol::StartJob& start) {
    if (job_ && job_->job() == start.job && job_->epoch() == start.epoch) return;  // repeated
    auto refuse = [&](const Status& status) {
      io_.send_reliably(start.job, "ended",
                        protocol::JobEnded{start.job, start.epoch, status, 0, "{}"});
    };
    if (draining_) return;
    if (job_ && job_->job() == start.job) {
      io_.forget(start.job);  // an older epoch of the same job
      job_.reset();
    }
    if (job_) return refuse(busy_error(str("the engine is training ", job_->job())));
    if (!model_ || model_->ref().digest != start.model.digest)
      return refuse(unavailable_error(str("this engine does not hold model ", start.model.name)));
    job_ = std::make_unique<JobHost>(
        JobParts{io_, tasks_, bulk_, [this](Task task) { post(control_inbox_, std::move(task)); },
                 options_.data_directory + "/runs", "",
                 [this](const Digest& adapter) { serve_.warm(adapter); }},
        *model_, start);
    snapshot_ms_ = 0;
  }

  void on(protocol::StopJob& stop) {
    if (job_ && job_->job() == stop.job && job_->epoch() == stop.epoch) job_->stop(stop.mode);
  }

  void on(protocol::JobAck& ack) {
    if (job_ && job_->job() == ack.job && job_->epoch() == ack.epoch)
      job_->on_ack(ack);
    else
      io_.acknowledge(ack.job, ack.of);
  }

  // -- device thread: work
  // ----------------------------------------------------------------------------
  void serve_step() {
    const std::int64_t begin = steady_ns();
    serve_.step();
    arbiter_.add_serve_ns(steady_ns() - begin);
  }

  void train_slice() {
    slice_mark_ns_ = steady_ns();
    job_->run_slice();
    arbiter_.add_train_ns(steady_ns() - slice_mark_ns_);
  }

  /// Between two blocks of a training pass: requests may arrive and run, jobs' messages wait.
  void yield() {
    beat();
    drain_inbox(serve_inbox_);
    if (!serve_.has_work()) return;
    const std::int64_t now = steady_ns();
    arbiter_.add_train_ns(now - slice_mark_ns_);
    while (serve_.has_work() && arbiter_.serve_next(true)) {
      serve_step();
      drain_inbox(serve_inbox_);
    }
    slice_mark_ns_ = steady_ns();
  }

  void handle_signals() {
    const int signals = g_stop_signals.count();
    if (signals >= 2) exit_code_ = 1;
    if (signals == 0) return;
    if (!draining_) {
      log_info("draining: ", serve_.live_count(), " requests, ", job_ ? 1 : 0, " jobs");
      draining_ = true;
      drain_until_ms_ = clock_.now_ms() + scaled_ms(options_.drain_timeout_ms);
      if (job_) job_->drain();
    }
    const bool done = serve_.live_count() == 0 && (!job_ || job_->drained());
    if (done || clock_.now_ms() >= drain_until_ms_) exit_code_ = kExitAsked;
  }

  static constexpr TimeMs kSnapshotMs = 100;
  const EngineOptions& options_;
  AgentWatch agent_;
  kernels::Backend& backend_;
  const Clock& clock_;
  const Incarnation incarnation_;
  BulkClient bulk_;
  DeviceArbiter arbiter_;
  std::unique_ptr<ModelHost> model_;
  std::unique_ptr<JobHost> job_;
  Digest loading_;
  int exit_code_ = -1;
  bool draining_ = false;
  TimeMs drain_until_ms_ = 0, snapshot_ms_ = 0;
  std::int64_t slice_mark_ns_ = 0;
  std::atomic<TimeMs> last_beat_ms_{0};
  std::atomic<bool> idle_{false};
  std::mutex snapshot_mutex_;
  protocol::Heartbeat snapshot_;
  std::vector<RequestId> snapshot_requests_;
  Digest snapshot_model_;
  Inbox serve_inbox_{kInboxMax}, control_inbox_{kInboxMax};
  BoundedQueue<bool> wake_{1};
  EngineIo io_;
  TaskThread tasks_;  // ends before what its tasks use
  ServeHost serve_;
};

}  // namespace

int run_engine(const EngineOptions& options, const SlotPaths& paths, kernels::Backend& backend,
               EngineEndpoints endpoints, const Clock& clock) {
  struct sigaction action {};
  action.sa_handler = on_signal;
  for (int signal : {SIGTERM, SIGINT, SIGHUP}) sigaction(signal, &action, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  auto lock = FileLock::acquire(paths.engine_lock, scaled_ms(AgentWatch::kCheckMs));
  if (!lock.ok()) {
    log_error(lock.status().message());
    return 1;
  }
  Engine engine(options, paths, backend, std::move(endpoints), clock);
  if (const Status status = write_engine_info(paths, {::getpid(), engine.incarnation()});
      !status.ok()) {
    log_error(status.message());
    return 1;
  }
  return engine.run();
}

}  // namespace tandem::worker::runtime
