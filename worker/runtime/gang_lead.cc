#include "worker/runtime/gang_lead.h"

#include "protocol/base/bounded_queue.h"
#include "protocol/base/log.h"
#include "worker/runtime/agent_watch.h"
#include "worker/runtime/encoder.h"
#include "worker/runtime/gang_model.h"
#include "worker/runtime/job_host.h"
#include "worker/runtime/model_files.h"
#include "worker/runtime/supervisor.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <mutex>

namespace tandem::worker::runtime {
namespace {

constexpr std::size_t kInboxMax = 65536, kTasksMax = 1024;
constexpr auto kIdleWait = std::chrono::milliseconds(20);
constexpr useconds_t kByeUs = 50000;

std::atomic<bool> g_drain{false};
void on_drain(int) {
  g_drain = true;
}

class Lead {
 public:
  Lead(const GangLeadOptions& options, GangRank& rank, EngineEndpoints endpoints,
       const GangPatience& patience, const Clock& clock)
      : options_(options),
        rank_(rank),
        patience_(patience),
        clock_(clock),
        agent_(options.agent_lock, clock),
        last_beat_ms_(clock.now_ms()),
        bulk_(std::move(endpoints.bulk), clock),
        io_(std::move(endpoints.control), clock,
            {[this] { return hello(); }, [this](auto seq) { return heartbeat(seq); },
             [this](protocol::ControlMessage message) { receive(std::move(message)); },
             [this] { return hung(); }}),
        tasks_(kTasksMax) {
    rank_.store_with(bulk_, tasks_, checkpoint_pin(options_.start));
    beat();
    rank_.on_block([this] { last_beat_ms_ = clock_.now_ms(); });
    locate();
  }
  ~Lead() {
    bulk_.cancel();
    rank_.on_block({});
  }
  Lead(const Lead&) = delete;
  Lead& operator=(const Lead&) = delete;

  int run() {
    while (!over_) {
      beat();
      drain_inbox();
      handle_drain();
      if (agent_.gone()) g_drain = true;
      if (job_ && job_->over()) break;
      if (job_) job_->poll();
      if (job_ && job_->runnable()) {
        job_->run_slice();
      } else {
        rank_.wire().tell(GangOp::kIdle);  // the others wait for a word, and not for ever
        (void)wake_.pop_for(kIdleWait);
      }
    }
    rank_.wire().tell(GangOp::kEnd);
    (void)io_.send(
        protocol::WorkerBye{options_.worker, protocol::WorkerRole::kGang, options_.start.gang});
    ::usleep(kByeUs);  // lets the I/O thread hand it over
    return kExitAsked;
  }

 private:
  void post(Task task) {
    if (!inbox_.try_push(std::move(task)))
      log_error("the gang's queue is full (", kInboxMax, "): a message was dropped");
    (void)wake_.try_push(true);
  }
  void drain_inbox() {
    while (auto task = inbox_.try_pop()) (*task)();
  }

  /// The base on this host and its tokenizer, on the task thread; then the job begins.
  void locate() {
    struct Found {
      Status status;
      std::string path;
      std::optional<data::Encoder> encoder;
    };
    auto found = std::make_shared<Found>();
    const bool posted = tasks_.post([this, found] {
      const auto look = [&]() -> Status {
        TANDEM_ASSIGN_OR_RETURN(found->path,
                                locate_model(options_.start.model, options_.data_directory, bulk_));
        TANDEM_ASSIGN_OR_RETURN(const auto loaded, model::load_model(found->path));
        TANDEM_ASSIGN_OR_RETURN(found->encoder, make_encoder(loaded, found->path));
        return {};
      };
      found->status = look();
      post([this, found] {
        if (!found->status.ok()) return refuse(found->status);
        model_ = std::make_unique<GangModel>(rank_, found->path, std::move(*found->encoder));
        job_ = std::make_unique<JobHost>(
            JobParts{io_, tasks_, bulk_, [this](Task task) { post(std::move(task)); },
                     options_.data_directory + "/runs", options_.model_folder},
            *model_, options_.start);
      });
    });
    TANDEM_CHECK(posted, "the task queue is new");
  }

  void refuse(const Status& status) {
    log_warn("job ", options_.start.job, " cannot begin: ", status.to_string());
    io_.send_reliably(
        options_.start.job, "ended",
        protocol::JobEnded{options_.start.job, options_.start.epoch, status, 0, "{}"});
  }

  // -- I/O thread: reads snapshots only ----------------------------------------------------------
  /// Loading takes as long as it takes: there the other ranks' patience is the limit.
  [[nodiscard]] bool hung() const {
    const TimeMs patience = cancelled_ ? patience_.stop_ms() : patience_.timeout_ms()->load();
    return training_ && clock_.now_ms() - last_beat_ms_ > scaled_ms(patience);
  }
  [[nodiscard]] protocol::RunningJob claim() const {
    return {options_.start.job, options_.start.epoch, step_};
  }
  std::optional<protocol::WorkerHello> hello() {
    if (hung()) return std::nullopt;
    protocol::WorkerHello hello;
    hello.role = protocol::WorkerRole::kGang;
    hello.worker = options_.worker;
    hello.host = options_.host;
    hello.device = options_.device;
    hello.pid = ::getpid();
    hello.incarnation = options_.start.gang;
    hello.jobs = {claim()};
    return hello;
  }
  std::optional<protocol::Heartbeat> heartbeat(std::uint64_t seq) {
    if (hung()) return std::nullopt;
    protocol::Heartbeat beat;
    beat.worker = options_.worker;
    beat.role = protocol::WorkerRole::kGang;
    beat.incarnation = options_.start.gang;
    beat.seq = seq;
    beat.jobs = {claim()};
    return beat;
  }
  void receive(protocol::ControlMessage message) {
    if (const auto* stop = std::get_if<protocol::StopJob>(&message))
      cancelled_ =
          cancelled_ || (stop->job == options_.start.job && stop->epoch == options_.start.epoch &&
                         stop->mode == protocol::StopMode::kCancel);
    auto shared = std::make_shared<protocol::ControlMessage>(std::move(message));
    post([this, shared] { handle(*shared); });
  }

  // -- device thread -----------------------------------------------------------------------------
  void beat() {
    last_beat_ms_ = clock_.now_ms();
    if (!job_) return;
    step_ = job_->step();
    training_ = training_ || job_->runnable();
  }

  void handle(const protocol::ControlMessage& message) {
    const JobId& mine = options_.start.job;
    if (const auto* reply = std::get_if<protocol::WorkerHelloReply>(&message)) {
      const bool stopped = std::find(reply->stop_jobs.begin(), reply->stop_jobs.end(), mine) !=
                           reply->stop_jobs.end();
      if (reply->status.ok() && !stopped) return;
      log_warn("the coordinator refuses this gang: ",
               stopped ? "the job is not its any more" : reply->status.message());
      over_ = true;
    } else if (const auto* stop = std::get_if<protocol::StopJob>(&message)) {
      if (stop->job != mine || stop->epoch != options_.start.epoch) return;
      if (job_)
        job_->stop(stop->mode);
      else
        refuse(cancelled_error("cancelled"));
    } else if (const auto* ack = std::get_if<protocol::JobAck>(&message)) {
      if (ack->job != mine || ack->epoch != options_.start.epoch) return;
      if (job_) return job_->on_ack(*ack);
      io_.acknowledge(ack->job, ack->of);
      over_ = ack->of == "ended" || ack->status.code() == StatusCode::kConflict;
    }
  }

  void handle_drain() {
    if (!g_drain) return;
    if (drain_until_ms_ == 0) {
      log_info("draining");
      drain_until_ms_ = clock_.now_ms() + scaled_ms(options_.drain_timeout_ms);
      if (job_) job_->drain();
    }
    over_ = over_ || !job_ || job_->drained() || clock_.now_ms() >= drain_until_ms_;
  }

  const GangLeadOptions& options_;
  GangRank& rank_;
  const GangPatience& patience_;
  const Clock& clock_;
  AgentWatch agent_;
  std::atomic<TimeMs> last_beat_ms_;
  std::atomic<std::int64_t> step_{0};
  std::atomic<bool> training_{false}, cancelled_{false};
  BulkClient bulk_;
  BoundedQueue<Task> inbox_{kInboxMax};
  BoundedQueue<bool> wake_{1};
  std::unique_ptr<GangModel> model_;
  std::unique_ptr<JobHost> job_;
  bool over_ = false;
  TimeMs drain_until_ms_ = 0;
  EngineIo io_;
  TaskThread tasks_;  // ends before what its tasks use
};

}  // namespace

std::string checkpoint_pin(const protocol::StartJob& start) {
  return str(start.job, "/", start.epoch);
}

void install_rank_signals() {
  struct sigaction action {};
  action.sa_handler = on_drain;
  sigaction(SIGUSR1, &action, nullptr);
  for (int signal : {SIGTERM, SIGINT, SIGHUP, SIGPIPE}) std::signal(signal, SIG_IGN);
}

bool drain_asked() {
  return g_drain;
}

int lead_gang(const GangLeadOptions& options, GangRank& rank, EngineEndpoints endpoints,
              const GangPatience& patience, const Clock& clock) {
  return Lead(options, rank, std::move(endpoints), patience, clock).run();
}

}  // namespace tandem::worker::runtime
