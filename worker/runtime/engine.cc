#include "worker/runtime/engine.h"

#include "kernels/device_error.h"
#include "protocol/base/log.h"
#include "protocol/base/units.h"
#include "worker/runtime/agent_watch.h"
#include "worker/runtime/job_estimate.h"
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
#include <cstdlib>
#include <mutex>

namespace tandem::worker::runtime {
namespace {

constexpr std::size_t kInboxMax = 65536, kTasksMax = 1024;
constexpr auto kIdleWait = std::chrono::milliseconds(50);

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
        io_(std::move(endpoints.control), clock,
            {[this] { return hello(); }, [this](auto seq) { return heartbeat(seq); },
             [this](protocol::ControlMessage message) { receive(std::move(message)); },
             [this] { return hung(); }}),
        tasks_(kTasksMax),
        serve_(io_, tasks_, bulk_, [this](Task task) { post(serve_inbox_, std::move(task)); }),
        turns_(options.turns, serve_, [this] { drain_inbox(serve_inbox_); }) {
    beat();  // the I/O thread has something to say from the start
  }

  ~Engine() { bulk_.cancel(); }

  [[nodiscard]] Incarnation incarnation() const { return incarnation_; }

  int run() {
    try {
      return loop();
    } catch (const kernels::DeviceError& error) {
      device_failed(error);
    }
  }

 private:
  static constexpr useconds_t kByeUs = 50000;
  using Inbox = BoundedQueue<Task>;

  int loop() {
    while (exit_code_ < 0) {
      beat();
      handle_signals();
      if (!turns_.step_under_way()) drain_inbox(serve_inbox_);
      drain_inbox(control_inbox_);
      if (job_ && job_->over()) job_.reset();
      if (job_) job_->poll();
      set_budget();
      if (job_ && job_->runnable()) {
        (void)yield();
        turns_.train([this] { job_->run_slice(); });
      } else if (turns_.step_under_way() || serve_.has_work()) {
        turns_.serve();
      } else {
        wait();
      }
      if (agent_.gone()) g_stop_signals.at_least_one();
    }
    say_goodbye();
    return exit_code_;
  }

  void say_goodbye() {
    io_.send(protocol::WorkerBye{options_.worker, protocol::WorkerRole::kEngine, incarnation_});
    ::usleep(kByeUs);  // lets the I/O thread hand it over
  }

  /// A failure outside of serving's steps is the job's, whose next failures in a row end it: what
  /// it asks of a device may be what breaks it. Requests go to other workers, or wait for the next
  /// engine.
  [[noreturn]] void device_failed(const kernels::DeviceError& error) {
    log_error("device failure, the engine ends: ", error.what());
    if (job_ && !job_->over() && !turns_.step_under_way())
      io_.send(protocol::JobEnded{
          job_->job(), job_->epoch(),
          internal_error(str("device failure on ", options_.worker, ": ", error.what())),
          job_->step(), "{}"});
    say_goodbye();
    std::_Exit(1);  // threads may hold the device
  }

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
    snapshot_base_bytes_ = model_ ? model_->serving_bytes() : 0;
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
    hello.base_bytes = snapshot_base_bytes_;
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
  void on(protocol::HeartbeatReply& reply) { leave_to_gang(reply.gang_bytes); }
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
    leave_to_gang(reply.gang_bytes);
  }

  void leave_to_gang(std::int64_t bytes) {
    gang_bytes_ = bytes;
    if (model_) model_->leave_to_gang(bytes);
  }

  void on(protocol::LoadModel& load) {
    const Digest digest = load.model.digest;
    if (load.gang_bytes >= 0) leave_to_gang(load.gang_bytes);
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
    turns_.finish();
    if (!path.ok()) return report_loaded(ref.digest, path.status(), 0);
    auto opened = ModelHost::open(backend_, ref, *path, options_.model, gang_bytes_);
    if (!opened.ok()) return report_loaded(ref.digest, opened.status(), 0);  // what is here stays
    const Digest before = model_ ? model_->ref().digest : Digest();
    serve_.set_model(nullptr);
    model_.reset();
    if (const Status status = (*opened)->start(clock_, [this] { return yield(); }); !status.ok()) {
      if (!before.empty())
        report_loaded(before, unavailable_error(str("it made room for ", ref.name)), 0);
      return report_loaded(ref.digest, status, 0);
    }
    model_ = std::move(*opened);
    short_steps_ = false;
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
    io_.send(
        protocol::ModelLoaded{model, status, seconds, status.ok() ? model_->serving_bytes() : 0});
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
    const kernels::DeviceProfile& profile = backend_.ops->profile();
    auto reply = nlohmann::json::object();
    if (!request.serve_json.empty()) {
      TANDEM_ASSIGN_OR_RETURN(
          const auto text, estimate_replica(profile, config, options_.model, request.serve_json));
      reply = nlohmann::json::parse(text);
    } else {
      TANDEM_ASSIGN_OR_RETURN(const auto settings,
                              protocol::TrainSettings::parse(request.spec_json));
      if (settings.max_length > config.context_max)
        return refused_error(str("max_length ", settings.max_length,
                                 " exceeds the context of model ", request.model.name, " (",
                                 config.context_max, ")"));
      TANDEM_ASSIGN_OR_RETURN(const auto text,
                              estimate_job(profile, config, options_.model, settings,
                                           request.evaluates, options_.data_directory));
      reply = nlohmann::json::parse(text);
    }
    reply["device"] = options_.device;
    return reply.dump();
  }

  void on(protocol::StartJob& start) {
    if (job_ && job_->job() == start.job && job_->epoch() == start.epoch) return;  // repeated
    auto refuse = [&](const Status& status) {
      io_.send_reliably(start.job, "ended",
                        protocol::JobEnded{start.job, start.epoch, status, 0, "{}"});
    };
    if (draining_) return;
    if (job_ && job_->over()) job_.reset();  // its end and this start came together
    if (job_ && job_->job() == start.job) {
      io_.forget(start.job);  // an older epoch of the same job
      job_.reset();
    }
    if (job_) return refuse(busy_error(str("the engine is training ", job_->job())));
    if (!model_ || model_->ref().digest != start.model.digest)
      return refuse(unavailable_error(str("this engine does not hold model ", start.model.name)));
    job_ = std::make_unique<JobHost>(
        JobParts{io_, tasks_, bulk_, [this](Task task) { post(control_inbox_, std::move(task)); },
                 options_.data_directory + "/runs", ""},
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
  /// Between two blocks of a training pass: requests may arrive and run, jobs' messages wait. True:
  /// a step is due soon.
  bool yield() {
    beat();
    turns_.between();
    const bool serving = turns_.step_under_way() || serve_.has_work();
    model_->spare_multiprocessors(serving ? options_.spare_multiprocessors : 0);
    return turns_.soon();
  }

  /// Steps are shorter while a job trains: one that is long makes all its answers wait.
  void set_budget() {
    if (!model_ || options_.batch_tokens_beside == 0) return;
    const bool beside = job_ && job_->runnable();
    if (beside == short_steps_) return;
    short_steps_ = beside;
    model_->serve().set_token_budget(beside ? options_.batch_tokens_beside
                                            : options_.model.batch_tokens_max);
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
  std::unique_ptr<ModelHost> model_;
  std::unique_ptr<JobHost> job_;
  Digest loading_;
  std::int64_t gang_bytes_ = 0;  ///< of this slot's memory, a gang's
  int exit_code_ = -1;
  bool draining_ = false;
  TimeMs drain_until_ms_ = 0, snapshot_ms_ = 0;
  bool short_steps_ = false;
  std::atomic<TimeMs> last_beat_ms_{0};
  std::atomic<bool> idle_{false};
  std::mutex snapshot_mutex_;
  protocol::Heartbeat snapshot_;
  std::vector<RequestId> snapshot_requests_;
  Digest snapshot_model_;
  std::int64_t snapshot_base_bytes_ = 0;
  Inbox serve_inbox_{kInboxMax}, control_inbox_{kInboxMax};
  BoundedQueue<bool> wake_{1};
  EngineIo io_;
  TaskThread tasks_;  // ends before what its tasks use
  ServeHost serve_;
  DeviceTurns turns_;
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
  if (const Status status =
          write_engine_info(paths, {::getpid(), engine.incarnation(), options.gpu});
      !status.ok()) {
    log_error(status.message());
    return 1;
  }
  return engine.run();
}

}  // namespace tandem::worker::runtime
