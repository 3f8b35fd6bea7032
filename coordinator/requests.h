// Inference: from a client's Generate to the last token it gets. Each client request is a
// subscriber of an execution; equal deterministic requests share one. An execution runs on one
// engine at a time, attempt by attempt; every token reaches every subscriber once and in order,
// whatever engines die. Owned by the core, one thread.
//
// Bounded: executions wait in one queue of limits().queue_max (then kBusy with retry_after_ms);
// what is sent to an engine is within its credits.
#pragma once

#include "coordinator/context.h"
#include "coordinator/prefix_table.h"
#include "coordinator/resolve.h"
#include "coordinator/result_cache.h"
#include "coordinator/workers.h"

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace tandem::coordinator {

struct RequestStats {
  std::uint64_t accepted = 0, finished = 0, failed = 0, cancelled = 0, refused_busy = 0;
  std::uint64_t rerouted = 0, shared = 0, tokens = 0;
  std::size_t waiting = 0, running = 0;
};

class Requests {
 public:
  Requests(Context& context, WorkerTable& workers);

  void load(const std::vector<ResultRecord>& results);

  // -- from clients
  /// `received_us`: when it came in, on the clock of Now::us.
  void generate(const std::string& peer, const std::string& user, const protocol::Generate& request,
                std::int64_t received_us);
  /// Of another user's request: nothing happens.
  void cancel(const std::string& user, const protocol::Cancel& cancel);
  /// The connection broke; what is not asked for again within orphan_ms is cancelled.
  void client_gone(const std::string& peer);

  // -- from engines
  void chunk(Engine& engine, const protocol::InferChunk& message);
  /// A hello of a known engine or replica: what it still answers and we do not know is to be
  /// stopped (the return value); what we sent it and it does not name goes elsewhere.
  std::vector<RequestId> adopt(Engine& engine, const std::vector<RequestId>& running);
  /// Everything sent to the engine or replica of this name goes elsewhere.
  void engine_lost(const WorkerId& name, const std::string& reason);

  /// Sends waiting executions to engines that can take them.
  void dispatch();
  /// Deadlines, orphans, engines that forgot.
  void tick();

  /// Bases that waiting requests need, by number of requests, for the assignment of engines.
  [[nodiscard]] std::map<Digest, std::size_t> demand() const;
  /// Whether a request that waits or runs uses this base or adapter (then it cannot be removed).
  [[nodiscard]] bool uses(const Digest& digest) const;
  [[nodiscard]] RequestStats stats() const;
  /// Who waits for something.
  [[nodiscard]] std::set<std::string> peers() const;
  [[nodiscard]] ResultCacheStats cache_stats() const { return cache_.stats(); }
  /// Removes all cached results and returns how many there were.
  std::size_t clear_cache();

 private:
  struct Subscriber {
    RequestId id;
    std::string peer, user;
    std::int64_t next_index = 0;  ///< tokens it had when it (re)joined
    std::size_t position = 0;     ///< chunks of the execution that it has
    bool stream = true;
    TimeMs orphan_since_ms = -1, deadline_ms = 0;
    std::int64_t arrival_us = 0;
  };
  struct Execution {
    RequestId id;
    std::uint64_t order = 0;
    Target target;
    protocol::Generate request;
    Digest key;        ///< empty: neither shared nor kept
    Digest signature;  ///< of the request's content, to recognise a repeat
    std::vector<Digest> prefixes;
    std::vector<protocol::GenerateChunk> chunks;  ///< all that arrived, in order
    std::int64_t start_index = 0, next_index = 0;
    std::vector<Subscriber> subscribers;
    WorkerId engine;  ///< its name, or a replica's; empty: waiting
    std::uint32_t attempt = 0;
    int tries = 0;
    TimeMs queued_ms = 0, not_before_ms = 0, dispatched_ms = 0, heard_ms = 0;
    std::int64_t dispatched_us = 0;
    Status last_error;
    WorkerId last_engine;
    std::set<WorkerId> refused_by;  ///< engines that it does not fit
  };

  bool rejoin(const std::string& peer, const std::string& user, const protocol::Generate& request);
  /// The rest of an answer that ended a short while ago.
  bool repeat_finished(const std::string& peer, const std::string& user,
                       const protocol::Generate& request);
  void keep_finished(Execution& execution);
  bool answer_from_cache(const Subscriber& subscriber, const Execution& execution);
  bool share(const Subscriber& subscriber, const Execution& asked);
  void subscribe(Execution& execution, Subscriber subscriber);
  Status admit(const std::string& user) const;
  /// Ok while the queue has a place for one more request of this user.
  Status may_queue(const std::string& user) const;
  void enqueue(Execution execution);
  void forget(const RequestId& execution);
  void unsubscribe(const Subscriber& subscriber);
  void refuse(const std::string& peer, const RequestId& id, const Status& status,
              std::int64_t retry_after_ms = 0);
  void deliver(Execution& execution, Subscriber& subscriber);
  void send_whole(const Execution& execution, const Subscriber& subscriber);
  void decorate(const Execution& execution, const Subscriber& subscriber, bool first,
                protocol::GenerateChunk& chunk);
  void finish(Execution& execution);
  void fail(Execution& execution, const Status& status, std::int64_t retry_after_ms = 0);
  void keep_result(const Execution& execution);
  /// Ends one client's part; the execution is withdrawn when nobody is left. `tell` may be null.
  void drop_subscriber(const RequestId& id, const Status* tell);
  /// Back to the queue; fails it when it was tried too often.
  void reroute(Execution& execution, const Status& why);
  void release_engine(Execution& execution, bool tell_engine);
  /// An engine or replica that has not refused it serves its base, or will again in a moment.
  [[nodiscard]] bool may_fit_elsewhere(const Execution& execution);
  Engine* choose_engine(const Execution& execution);
  void send_to(Engine& engine, Execution& execution);
  [[nodiscard]] std::int64_t retry_after() const;
  /// Ok while the execution may go on waiting.
  [[nodiscard]] Status may_wait(const Execution& execution) const;

  Context& context_;
  WorkerTable& workers_;
  ResultCache cache_;
  PrefixTable prefixes_;
  std::map<RequestId, Execution> executions_;
  std::map<RequestId, RequestId> subscriptions_;  // request -> execution
  std::map<Digest, RequestId> flights_;           // result key -> execution
  std::map<std::uint64_t, RequestId> queue_;      // order -> execution that waits
  std::map<std::string, std::size_t> per_user_;
  std::map<RequestId, std::shared_ptr<Execution>> finished_;
  std::deque<std::pair<TimeMs, RequestId>> finished_order_;
  std::uint64_t orders_ = 0;
  std::uint32_t attempts_ = 0;
  double service_ms_ = 1000;  // moving average of an execution's time on an engine
  RequestStats stats_;
};

/// What the engine cannot refuse sensibly later: exactly one input, ranges that need no model.
Status validate_request(const protocol::Generate& request);

}  // namespace tandem::coordinator
