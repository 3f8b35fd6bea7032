#include "worker/runtime/replica_lead.h"

#include "protocol/base/bounded_queue.h"
#include "protocol/base/log.h"
#include "worker/runtime/agent_watch.h"
#include "worker/runtime/encoder.h"
#include "worker/runtime/model_files.h"
#include "worker/runtime/serve_host.h"
#include "worker/runtime/supervisor.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>

namespace tandem::worker::runtime {
namespace {

constexpr std::size_t kInboxMax = 65536, kTasksMax = 1024;
constexpr auto kIdleWait = std::chrono::milliseconds(20);
constexpr TimeMs kSnapshotMs = 100;
constexpr useconds_t kByeUs = 50000;

/// The ranks as one model.
class ReplicaModel final : public ServedModel {
 public:
  ReplicaModel(ReplicaRank& rank, const protocol::ModelRef& ref) : rank_(rank), ref_(ref) {}
  [[nodiscard]] const protocol::ModelRef& ref() const override { return ref_; }
  [[nodiscard]] const model::ModelConfig& config() const override { return rank_.loaded().config; }
  [[nodiscard]] const model::GenerationDefaults& generation() const override {
    return rank_.loaded().generation;
  }
  serve::ServeEngine& serve() override { return rank_.serve(); }
  Status load_adapter(const Digest& digest,
                      const std::vector<model::HostAdapterTensor>& tensors) override {
    return rank_.serve().install_adapter(digest, tensors);
  }
  [[nodiscard]] Result<std::vector<std::int32_t>> tokenize(
      const protocol::PromptInput& input) const override {
    return encode_input(rank_.encoder(), ref_.name, input);
  }

 private:
  ReplicaRank& rank_;
  const protocol::ModelRef ref_;
};

class ReplicaLead {
 public:
  ReplicaLead(const GangLeadOptions& options, ReplicaRank& rank, EngineEndpoints endpoints,
              const Clock& clock)
      : options_(options),
        rank_(rank),
        clock_(clock),
        agent_(options.agent_lock, clock),
        last_beat_ms_(clock.now_ms()),
        bulk_(std::move(endpoints.bulk), clock),
        io_(std::move(endpoints.control), clock,
            {[this] { return hello(); }, [this](auto seq) { return heartbeat(seq); },
             [this](protocol::ControlMessage message) { receive(std::move(message)); },
             [this] { return hung(); }}),
        tasks_(kTasksMax),
        serve_(io_, tasks_, bulk_, [this](Task task) { post(std::move(task)); }) {
    beat();
    locate();
  }
  ~ReplicaLead() { bulk_.cancel(); }
  ReplicaLead(const ReplicaLead&) = delete;
  ReplicaLead& operator=(const ReplicaLead&) = delete;

  int run() {
    while (!over_) {
      beat();
      while (auto task = inbox_.try_pop()) (*task)();
      if (agent_.gone()) begin_drain();
      handle_drain();
      if (serve_.has_work())
        step();
      else
        wait();
    }
    if (model_)
      rank_.serve().end();
    else
      rank_.wire().tell(GangOp::kEnd);
    (void)io_.send(
        protocol::WorkerBye{options_.worker, protocol::WorkerRole::kGang, options_.start.gang});
    ::usleep(kByeUs);  // lets the I/O thread hand it over
    return kExitAsked;
  }

 private:
  void post(Task task) {
    if (!inbox_.try_push(std::move(task)))
      log_error("the replica's queue is full (", kInboxMax, "): a message was dropped");
    (void)wake_.try_push(true);
  }

  void step() {
    const std::int64_t begin = steady_ns();
    serve_.step();
    rank_.patience().add_slice(static_cast<double>(steady_ns() - begin) * 1e-9);
  }

  /// The others wait for a word, and not for ever.
  void wait() {
    if (model_)
      rank_.serve().keep_alive();
    else
      rank_.wire().tell(GangOp::kIdle);
    (void)wake_.pop_for(kIdleWait);
  }

  /// The base on this host, on the task thread; then all ranks load their parts.
  void locate() {
    auto path = std::make_shared<Result<std::string>>(internal_error("not run"));
    const bool posted = tasks_.post([this, path] {
      *path = locate_model(options_.start.model, options_.data_directory, bulk_);
      post([this, path] { open(*path); });
    });
    TANDEM_CHECK(posted, "the task queue is new");
  }

  void open(const Result<std::string>& path) {
    if (ending_) return;
    const protocol::ModelRef& ref = options_.start.model;
    const auto begin = [&]() -> Status {
      TANDEM_RETURN_IF_ERROR(path.status());
      ReplicaPlan plan{*path, ref.digest, {}, options_.start.adapter_bytes};
      TANDEM_ASSIGN_OR_RETURN(plan.layout, parse_replica(options_.start.serve_json));
      rank_.wire().tell(GangOp::kOpen, plan.encode());
      return rank_.open(plan);
    };
    const std::int64_t start_ns = steady_ns();
    if (const Status status = begin(); !status.ok()) return end(status);
    model_.emplace(rank_, ref);
    rank_.serve().reserve_worst_case();
    serve_.set_model(&*model_);
    log_info("replica ", options_.start.job, " serves ", ref.name, " after ",
             static_cast<double>(steady_ns() - start_ns) * 1e-9, " s");
    snapshot_ms_ = 0;
    beat();
    io_.rehello();  // now with the model
  }

  /// Says once how it ended, and goes when that is acknowledged.
  void end(const Status& status) {
    if (std::exchange(ending_, true)) return;
    const auto& start = options_.start;
    log_info("replica ", start.job, " epoch ", start.epoch, " ends: ", status.to_string());
    io_.send_reliably(start.job, "ended",
                      protocol::JobEnded{start.job, start.epoch, status, 0, "{}"});
  }

  // -- I/O thread: reads snapshots only ----------------------------------------------------------
  /// Loading takes as long as it takes: there the other ranks' patience is the limit.
  [[nodiscard]] bool hung() const {
    const GangPatience& patience = rank_.patience();
    const TimeMs limit = stopped_ ? patience.stop_ms() : patience.timeout_ms()->load();
    return serving_ && clock_.now_ms() - last_beat_ms_ > scaled_ms(limit);
  }
  [[nodiscard]] protocol::RunningJob claim() const {
    return {options_.start.job, options_.start.epoch, 0};
  }
  std::optional<protocol::WorkerHello> hello() {
    if (hung()) return std::nullopt;
    std::lock_guard lock(snapshot_mutex_);
    protocol::WorkerHello hello;
    hello.role = protocol::WorkerRole::kGang;
    hello.worker = options_.worker;
    hello.host = options_.host;
    hello.device = options_.device;
    hello.pid = ::getpid();
    hello.incarnation = options_.start.gang;
    hello.jobs = {claim()};
    if (!serving_) return hello;
    hello.model = options_.start.model.digest;
    hello.requests = snapshot_requests_;
    hello.adapters = snapshot_.adapters;
    hello.credits = rank_.options().running_max + rank_.options().waiting_max;
    return hello;
  }
  std::optional<protocol::Heartbeat> heartbeat(std::uint64_t seq) {
    if (hung()) return std::nullopt;
    std::lock_guard lock(snapshot_mutex_);
    if (snapshot_.jobs.empty()) return std::nullopt;  // nothing was looked at yet
    protocol::Heartbeat beat = snapshot_;
    beat.seq = seq;
    return beat;
  }
  void receive(protocol::ControlMessage message) {
    if (const auto* stop = std::get_if<protocol::StopJob>(&message))
      stopped_ =
          stopped_ || (stop->job == options_.start.job && stop->epoch == options_.start.epoch);
    auto shared = std::make_shared<protocol::ControlMessage>(std::move(message));
    post([this, shared] { handle(*shared); });
  }

  // -- device thread -----------------------------------------------------------------------------
  void beat() {
    last_beat_ms_ = clock_.now_ms();
    if (last_beat_ms_ - snapshot_ms_ < kSnapshotMs && snapshot_ms_ != 0) return;
    snapshot_ms_ = last_beat_ms_;
    protocol::Heartbeat beat;
    beat.worker = options_.worker;
    beat.role = protocol::WorkerRole::kGang;
    beat.incarnation = options_.start.gang;
    beat.jobs = {claim()};
    if (model_) describe_serving(rank_.serve().stats(), rank_.ledger(), rank_.options(), beat);
    std::lock_guard lock(snapshot_mutex_);
    snapshot_ = std::move(beat);
    snapshot_requests_ = serve_.live();
    serving_ = model_.has_value();
  }

  void handle(const protocol::ControlMessage& message) {
    const auto& start = options_.start;
    if (const auto* infer = std::get_if<protocol::Infer>(&message)) {
      if (draining_ || ending_) return;  // the coordinator moves it when this replica has ended
      serve_.submit(*infer);
    } else if (const auto* cancel = std::get_if<protocol::InferCancel>(&message)) {
      serve_.cancel(cancel->id);
    } else if (const auto* announce = std::get_if<protocol::Announce>(&message)) {
      serve_.prefetch(*announce);
    } else if (const auto* reply = std::get_if<protocol::WorkerHelloReply>(&message)) {
      on(*reply);
    } else if (const auto* stop = std::get_if<protocol::StopJob>(&message)) {
      if (stop->job != start.job || stop->epoch != start.epoch) return;
      if (stop->mode == protocol::StopMode::kPause)
        begin_drain();
      else
        end(cancelled_error("stopped as asked"));
    } else if (const auto* ack = std::get_if<protocol::JobAck>(&message)) {
      if (ack->job != start.job || ack->epoch != start.epoch) return;
      io_.acknowledge(ack->job, ack->of);
      over_ = over_ || ack->of == "ended" || ack->status.code() == StatusCode::kConflict;
    }
  }

  void on(const protocol::WorkerHelloReply& reply) {
    const bool stopped = std::find(reply.stop_jobs.begin(), reply.stop_jobs.end(),
                                   options_.start.job) != reply.stop_jobs.end();
    if (!reply.status.ok() || stopped) {
      log_warn("the coordinator refuses this replica: ",
               stopped ? "it is not wanted any more" : reply.status.message());
      over_ = true;
    }
    for (const RequestId& id : reply.stop_requests) serve_.cancel(id);
  }

  void begin_drain() {
    if (std::exchange(draining_, true)) return;
    log_info("draining: ", serve_.live_count(), " requests");
    drain_until_ms_ = clock_.now_ms() + scaled_ms(options_.drain_timeout_ms);
  }

  void handle_drain() {
    if (drain_asked()) begin_drain();
    if (!draining_) return;
    const TimeMs now = clock_.now_ms();
    if (serve_.live_count() == 0 || now >= drain_until_ms_) end(cancelled_error("drained"));
    // Without a coordinator nobody acknowledges that.
    over_ = over_ || now >= drain_until_ms_ || (ending_ && !io_.connected());
  }

  const GangLeadOptions& options_;
  ReplicaRank& rank_;
  const Clock& clock_;
  AgentWatch agent_;
  std::atomic<TimeMs> last_beat_ms_;
  std::atomic<bool> serving_{false}, stopped_{false};
  BulkClient bulk_;
  BoundedQueue<Task> inbox_{kInboxMax};
  BoundedQueue<bool> wake_{1};
  std::optional<ReplicaModel> model_;
  bool over_ = false, draining_ = false, ending_ = false;
  TimeMs drain_until_ms_ = 0, snapshot_ms_ = 0;
  std::mutex snapshot_mutex_;
  protocol::Heartbeat snapshot_;
  std::vector<RequestId> snapshot_requests_;
  EngineIo io_;
  TaskThread tasks_;  // ends before what its tasks use
  ServeHost serve_;
};

}  // namespace

int lead_replica(const GangLeadOptions& options, ReplicaRank& rank, EngineEndpoints endpoints,
                 const Clock& clock) {
  return ReplicaLead(options, rank, std::move(endpoints), clock).run();
}

}  // namespace tandem::worker::runtime
