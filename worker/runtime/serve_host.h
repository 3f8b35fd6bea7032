// Requests of the coordinator on one engine: turns Infer into the serving engine's terms, fetches
// adapters that are not resident, and turns each step's outputs into chunks. Device thread only.
#pragma once

#include "worker/runtime/adapter_codec.h"
#include "worker/runtime/bulk_client.h"
#include "worker/runtime/device_turns.h"
#include "worker/runtime/engine_io.h"
#include "worker/runtime/model_host.h"
#include "worker/runtime/served_model.h"
#include "worker/runtime/task_thread.h"

#include <functional>
#include <map>
#include <set>
#include <unordered_map>

namespace tandem::worker::runtime {

/// What a process that serves says of itself with every heartbeat.
void describe_serving(const serve::ServeStats& stats, const kernels::MemoryLedger& ledger,
                      const ModelHostOptions& options, protocol::Heartbeat& beat);

/// A request's own settings, else the model's, else the engine's. As transformers has it, a model
/// that says do_sample false is greedy, unless the request says how to draw. The model's
/// max_new_tokens is a default length: no more than `room`, no less than the request's min_tokens.
serve::SamplingParams resolve_sampling(const protocol::SamplingParams& asked,
                                       const model::GenerationDefaults& defaults,
                                       std::int64_t vocab, std::int64_t room);

class ServeHost final : public StepServer {
 public:
  /// `to_device` runs a closure on the device thread soon, between blocks of a training pass too.
  ServeHost(EngineIo& io, TaskThread& tasks, BulkClient& bulk, std::function<void(Task)> to_device)
      : io_(io), tasks_(tasks), bulk_(bulk), to_device_(std::move(to_device)) {}
  ~ServeHost() override { *alive_ = false; }
  ServeHost(const ServeHost&) = delete;
  ServeHost& operator=(const ServeHost&) = delete;

  /// Null: no model, every request is answered kUnavailable. Requests of the former model end with
  /// an error.
  void set_model(ServedModel* model);
  void submit(const protocol::Infer& infer);
  void cancel(const RequestId& id);
  /// Loads an announced adapter ahead of its first request.
  void prefetch(const protocol::Announce& announce);
  /// One iteration; sends what came out. Call while has_work().
  void step();
  /// The same in two halves (serve::ServeEngine::start_step). The model stays between them.
  std::int64_t start_step() override { return model_->serve().start_step(); }
  [[nodiscard]] bool step_ready() const override { return model_->serve().step_ready(); }
  void finish_step() override;
  [[nodiscard]] bool has_work() const override { return model_ && model_->serve().has_work(); }
  [[nodiscard]] std::vector<RequestId> live() const;
  [[nodiscard]] std::size_t live_count() const { return requests_.size(); }

 private:
  struct Request {
    std::uint32_t attempt = 0;
    Digest adapter;
    std::int64_t arrived_ns = 0, first_token_ns = 0;
    bool stream = true;
    protocol::GenerateChunk collected;  ///< without streaming
    bool first = true;
  };
  Result<serve::GenerateRequest> translate(const protocol::Infer& infer) const;
  void load_adapter(const Digest& adapter, const std::string& manifest);
  void request_missing();
  void deliver(const serve::SequenceOutput& output);
  void fail(const RequestId& id, std::uint32_t attempt, const Status& status);

  EngineIo& io_;
  TaskThread& tasks_;
  BulkClient& bulk_;
  std::function<void(Task)> to_device_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
  ServedModel* model_ = nullptr;
  std::unordered_map<RequestId, Request> requests_;
  std::map<Digest, std::string> manifests_;  ///< of adapters that live requests name
  std::set<Digest> loading_;
};

}  // namespace tandem::worker::runtime
