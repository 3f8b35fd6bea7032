// Dry runs: asks an engine for a job's bytes and waits for the answer, from another engine when the
// first one dies. Owned by the core, one thread.
#pragma once

#include "coordinator/context.h"
#include "coordinator/workers.h"
#include "protocol/job_spec.h"

#include <map>
#include <string>
#include <vector>

namespace tandem::coordinator {

struct EstimateOutcome {
  std::string id;  ///< as given to ask()
  Status status;
  std::string result_json;
};

class Estimates {
 public:
  Estimates(Context& context, WorkerTable& workers) : context_(context), workers_(workers) {}

  /// `id` must be unique among those in flight. `patient`: waits for an engine for ever; otherwise
  /// kUnavailable after estimate_timeout_ms.
  void ask(const std::string& id, const protocol::ModelRef& model,
           const protocol::TrainSettings& settings, bool evaluates, bool patient);
  /// Of a replica over several ranks; kUnavailable after estimate_timeout_ms.
  void ask_serving(const std::string& id, const protocol::ModelRef& model, std::int64_t ranks,
                   const std::string& serve_json);
  void forget(const std::string& id) { asked_.erase(id); }
  /// An engine's answer; nothing when nobody waits for it any more.
  std::vector<EstimateOutcome> reply(const protocol::EstimateReply& reply);
  /// Sends what is due and returns what timed out.
  std::vector<EstimateOutcome> tick();
  [[nodiscard]] bool asks(const std::string& id) const { return asked_.contains(id); }

 private:
  struct Asked {
    protocol::ModelRef model;
    protocol::TrainSettings settings;
    std::int64_t ranks = 1;  ///< the fewest that it can do with
    bool gang = false;       ///< asks an engine with the device of the gang that it will be
    bool patient = false;
    TimeMs asked_ms = 0, sent_ms = 0;
    WorkerId worker;  ///< empty: not sent
    int sends = 0;
    std::string serve_json = {};  ///< of a replica; "": a job
    bool evaluates = false;
  };
  Worker* choose(const Asked& asked);
  /// The settings as an engine with that device sees them; layout auto is told how many such ranks
  /// the pool has.
  [[nodiscard]] std::string train_json(const Asked& asked, const std::string& device) const;

  Context& context_;
  WorkerTable& workers_;
  std::map<std::string, Asked> asked_;
};

}  // namespace tandem::coordinator
