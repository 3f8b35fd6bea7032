#include "worker/runtime/model_host.h"

#include "protocol/base/log.h"
#include "protocol/base/units.h"
#include "protocol/job_spec.h"
#include "worker/memory/estimator.h"
#include "worker/runtime/encoder.h"
#include "worker/runtime/job_estimate.h"

#include <algorithm>
#include <chrono>
#include <thread>

namespace tandem::worker::runtime {
namespace {

constexpr std::int64_t kAdapterTableBytesMax = kGiB;

/// Training's view of the weights: between two blocks of a pass it lets requests run, and it issues
/// no block before the device has finished the one before the last (or, when requests are due soon,
/// the last). A device that works behind this thread's back is thereby hardly ever idle, and a
/// request never waits for more than a block or two.
class YieldingWeights final : public model::WeightSource {
 public:
  YieldingWeights(model::WeightSource& weights, model::Context& context,
                  std::function<bool()> yield)
      : weights_(weights), context_(context), yield_(std::move(yield)) {}
  const model::BlockWeights& acquire(std::int64_t layer, model::Phase phase) override {
    yield();
    return weights_.acquire(layer, phase);
  }
  void yield() override {
    const std::uint64_t here = context_.ops.mark(context_.exec);
    while (!context_.ops.passed(yield_() ? here : before_)) std::this_thread::sleep_for(kPoll);
    before_ = here;
  }
  void settle() override {
    const std::uint64_t here = context_.ops.mark(context_.exec);
    for ((void)yield_(); !context_.ops.passed(here); (void)yield_())
      std::this_thread::sleep_for(kPoll);
  }
  void release(std::int64_t layer, model::Phase phase) override { weights_.release(layer, phase); }
  [[nodiscard]] const model::BaseWeights& base() const override { return weights_.base(); }

 private:
  static constexpr std::chrono::microseconds kPoll{20};
  model::WeightSource& weights_;
  model::Context& context_;
  std::function<bool()> yield_;
  std::uint64_t before_ = 0;
};

/// A session of this one rank.
class LocalSession final : public JobSession {
 public:
  using Snapshot = std::shared_ptr<const model::AdapterWeights>;
  /// `while_open` goes last; `made` is told of each snapshot.
  LocalSession(std::shared_ptr<void> while_open, std::function<void(const Snapshot&)> made,
               std::unique_ptr<train::TrainSession> session, serve::ServeEngine& serve,
               kernels::Backend& backend, kernels::Exec& exec, const model::ModelConfig& config,
               DType dtype)
      : while_open_(std::move(while_open)),
        made_(std::move(made)),
        session_(std::move(session)),
        serve_(serve),
        dtype_(dtype),
        ops_(*backend.ops),
        exec_(exec),
        config_(config) {
    if (session_->flat_elements() > 0)
      room_.emplace(ops_, exec, *backend.allocator, *backend.ledger, session_->flat_elements(),
                    dtype);
  }
  Result<train::SliceEvent> run_slice() override { return session_->run_slice(); }
  [[nodiscard]] std::int64_t step() const override { return session_->step(); }
  [[nodiscard]] std::int64_t total_steps() const override { return session_->total_steps(); }
  [[nodiscard]] const model::LoraConfig& lora() const override { return session_->lora(); }
  Result<train::TrainState> export_state() override { return session_->export_state(); }
  Snapshot snapshot_adapter() override {
    // The one before goes first. One that a request uses stays, and where it leaves no room the
    // next is loaded from the checkpoint when it is asked for.
    const auto room = serve_.make_adapter_room({}, session_->flat_elements() * dtype_bytes(dtype_));
    if (!room.ok()) return nullptr;
    Snapshot snapshot = session_->snapshot_adapter();
    made_(snapshot);
    return snapshot;
  }
  Result<model::FlatAdapter> flat_adapter(DType dtype) override {
    return session_->flat_adapter(dtype);
  }
  std::shared_ptr<const model::AdapterWeights> build_adapter(
      const model::FlatAdapter& adapter) override {
    TANDEM_CHECK(room_.has_value(), "no room was made for an adapter");
    return room_->fill(ops_, exec_, config_, adapter);
  }
  double probe(const std::vector<std::int32_t>& prompt, const model::FlatAdapter&,
               std::shared_ptr<const model::AdapterWeights> served) override {
    return session_->probe(prompt, std::move(served));
  }
  void begin_checkpoint() override { TANDEM_CHECK(false, "the job stores it whole"); }
  std::optional<Result<std::string>> stored_checkpoint(const Digest&,
                                                       const storage::PeftConfig*) override {
    return std::nullopt;
  }
  Status write_model(const std::string&, DType) override { return no_model(); }
  Result<double> probe_model(const std::vector<std::int32_t>&, const std::string&, DType) override {
    return no_model();
  }

 private:
  static Status no_model() {
    return refused_error("an engine trains adapters: its base is everybody's and never changes");
  }
  const std::shared_ptr<void> while_open_;
  const std::function<void(const Snapshot&)> made_;
  const std::unique_ptr<train::TrainSession> session_;
  serve::ServeEngine& serve_;
  const DType dtype_;
  kernels::Ops& ops_;
  kernels::Exec& exec_;  ///< serving's
  const model::ModelConfig& config_;
  std::optional<model::AdapterRoom> room_;
};

}  // namespace

/// Address space only; what is used is mapped and booked as it is used. Training and serving have
/// their own activations and scratch because serving runs in the middle of a training pass.
struct ModelHost::Memory {
  Memory(kernels::Backend& b, DType dtype, kernels::Numerics numerics, std::int64_t limit,
         comm::Communicator& comm)
      : weights(*b.allocator, *b.ledger, kernels::MemoryKind::kWeights, "weights", limit),
        adapters(*b.allocator, *b.ledger, kernels::MemoryKind::kAdapters, "adapter table",
                 kAdapterTableBytesMax),
        serve_activations(*b.allocator, *b.ledger, kernels::MemoryKind::kActivations,
                          "serving activations", limit),
        serve_workspace(*b.allocator, *b.ledger, kernels::MemoryKind::kWorkspace,
                        "serving workspace", limit),
        train_activations(*b.allocator, *b.ledger, kernels::MemoryKind::kActivations,
                          "training activations", limit),
        train_workspace(*b.allocator, *b.ledger, kernels::MemoryKind::kWorkspace,
                        "training workspace", limit),
        serve_exec{serve_workspace, b.ops->make_stream(true), numerics},
        train_exec{train_workspace, b.ops->make_stream(false), numerics},
        serve{*b.ops, serve_exec, comm, serve_activations, dtype},
        train{*b.ops, train_exec, comm, train_activations, dtype} {}
  kernels::Arena weights, adapters, serve_activations, serve_workspace, train_activations,
      train_workspace;
  kernels::Exec serve_exec, train_exec;
  model::Context serve, train;
};

serve::ServeOptions serve_options(const ModelHostOptions& options) {
  serve::ServeOptions serve;
  serve.kv_bytes_max = options.kv_bytes_max;
  serve.max_batch_tokens = options.batch_tokens_max;
  serve.max_running = options.running_max;
  serve.max_waiting = options.waiting_max;
  serve.adapter_rank_max = protocol::kLoraRankMax;
  return serve;
}

ModelHost::ModelHost(kernels::Backend& backend, const ModelHostOptions& options)
    : backend_(backend), options_(options) {}
ModelHost::~ModelHost() = default;

Result<std::unique_ptr<ModelHost>> ModelHost::open(kernels::Backend& backend,
                                                   const protocol::ModelRef& model,
                                                   const std::string& path,
                                                   const ModelHostOptions& options,
                                                   std::int64_t gang_bytes) {
  TANDEM_ASSIGN_OR_RETURN(auto loaded, model::load_model(path));
  return adopt(backend, model, std::move(loaded), path, options, gang_bytes);
}

Result<std::unique_ptr<ModelHost>> ModelHost::adopt(
    kernels::Backend& backend, const protocol::ModelRef& model, model::LoadedModel loaded,
    const std::string& path, const ModelHostOptions& options, std::int64_t gang_bytes) {
  std::unique_ptr<ModelHost> host(new ModelHost(backend, options));
  host->gang_bytes_ = gang_bytes;
  host->ref_ = model;
  TANDEM_ASSIGN_OR_RETURN(auto encoder, make_encoder(loaded, path));
  host->encoder_ = std::make_unique<data::Encoder>(std::move(encoder));
  host->loaded_ = std::move(loaded);
  TANDEM_RETURN_IF_ERROR(host->check_fit());
  return host;
}

/// By the dry run, before a byte is read.
Status ModelHost::check_fit() {
  using kernels::MemoryKind;
  TANDEM_ASSIGN_OR_RETURN(
      const auto need,
      memory::estimate_serving(backend_.ops->profile(), loaded_.config, options_.dtype,
                               serve_options(options_), options_.adapter_slots + 1));
  serving_bytes_ = taken_bytes_ = need.peak_total;
  if (need.peak_total <= options_.memory_bytes_max - gang_bytes_) return {};
  const std::int64_t weights = need.of(MemoryKind::kWeights), kv = need.of(MemoryKind::kKv);
  return refused_error(str(
      "model ", ref_.name, " needs ", format_bytes(need.peak_total), " to be served: ",
      format_bytes(weights), " for weights, ", format_bytes(kv), " for the KV cache, ",
      format_bytes(need.peak_total - weights - kv), " for batches; this engine may use ",
      format_bytes(options_.memory_bytes_max - gang_bytes_), " (memory_bytes_max",
      gang_bytes_ > 0 ? str(", less ", format_bytes(gang_bytes_), " of the gang's rank beside it")
                      : std::string(),
      "); lower kv_bytes_max or batch_tokens_max, or shard the model"));
}

Status ModelHost::start(const Clock& clock, std::function<bool()> yield) {
  auto& ops = *backend_.ops;
  comm_ = comm::make_single_communicator([&ops](kernels::Exec& exec, kernels::Tensor from,
                                                kernels::Tensor to) { ops.copy(exec, from, to); });
  memory_ = std::make_unique<Memory>(backend_, options_.dtype, options_.numerics,
                                     options_.memory_bytes_max, *comm_);
  TANDEM_ASSIGN_OR_RETURN(
      base_, model::BaseWeights::load(ops, memory_->serve_exec, memory_->weights, loaded_.config,
                                      options_.dtype, *loaded_.source));
  loaded_.source.reset();
  weights_ = model::make_resident_weights(base_);
  ops.synchronize(memory_->serve_exec);  // training reads the weights in another queue
  yielding_weights_ =
      std::make_unique<YieldingWeights>(*weights_, memory_->train, std::move(yield));
  adapters_ = std::make_unique<model::AdapterTable>(ops, memory_->serve_exec, memory_->adapters,
                                                    loaded_.config, options_.adapter_slots + 1);
  serve::ServeOptions serve = serve_options(options_);
  serve.base_digest = ref_.digest;
  serve.eos_ids = loaded_.config.eos_ids;
  TANDEM_ASSIGN_OR_RETURN(
      serve_, serve::ServeEngine::create(
                  {*backend_.allocator, *backend_.ledger, memory_->serve, *weights_,
                   adapters_.get(), 0, options_.adapter_slots, encoder_->tokenizer, clock},
                  serve));
  serve_->reserve_worst_case();
  limit_adapters();
  return {};
}

void ModelHost::limit_adapters() {
  std::int64_t unnamed_bytes = 0;
  std::erase_if(unnamed_, [](const auto& snapshot) { return snapshot.expired(); });
  for (const auto& snapshot : unnamed_)
    if (const auto held = snapshot.lock())
      unnamed_bytes += round_up(held->bytes, kernels::kMapGranularity);
  serve_->set_adapter_bytes_max(options_.memory_bytes_max - gang_bytes_ - taken_bytes_ -
                                unnamed_bytes);
}

void ModelHost::leave_to_gang(std::int64_t bytes) {
  if (bytes == gang_bytes_) return;
  gang_bytes_ = bytes;
  limit_adapters();
}

Result<std::unique_ptr<JobSession>> ModelHost::open_session(
    const protocol::TrainSettings& settings, std::shared_ptr<const data::Dataset> train,
    std::shared_ptr<const data::Dataset> eval, const ResumeFrom& from) {
  const bool evaluates = eval != nullptr;
  TANDEM_ASSIGN_OR_RETURN(auto batches,
                          train::make_packed_batches(std::move(train), std::move(eval), settings));
  // Adapters that nobody uses make room for it.
  TANDEM_ASSIGN_OR_RETURN(
      const auto need, estimate_engine_with_job(backend_.ops->profile(), loaded_.config, options_,
                                                settings, evaluates));
  const auto room_for_adapters = [this](std::int64_t taken) {
    taken_bytes_ = taken;
    limit_adapters();
  };
  std::shared_ptr<void> while_open(nullptr,
                                   [=, this](void*) { room_for_adapters(serving_bytes_); });
  room_for_adapters(need.total());
  train::SessionOptions options;
  options.settings = settings;
  TANDEM_ASSIGN_OR_RETURN(
      auto session,
      train::TrainSession::create({*backend_.allocator, *backend_.ledger, memory_->train,
                                   *yielding_weights_, *adapters_, options_.adapter_slots},
                                  options, std::move(batches)));
  // The snapshot that serving holds of it is part of its need.
  room_for_adapters(need.total() - round_up(session->flat_elements() * dtype_bytes(options_.dtype),
                                            kernels::kMapGranularity));
  if (from.state != nullptr) TANDEM_RETURN_IF_ERROR(session->import_state(*from.state));
  return std::unique_ptr<JobSession>(std::make_unique<LocalSession>(
      std::move(while_open),
      [this](const auto& snapshot) {
        unnamed_.push_back(snapshot);
        limit_adapters();
      },
      std::move(session), *serve_, backend_, memory_->serve_exec, loaded_.config, options_.dtype));
}

void ModelHost::spare_multiprocessors(int count) {
  memory_->train_exec.spare_multiprocessors = count;
}

Status ModelHost::install_adapter(const Digest& digest,
                                  std::shared_ptr<const model::AdapterWeights> weights) {
  std::erase_if(unnamed_, [&](const auto& snapshot) { return snapshot.lock() == weights; });
  limit_adapters();
  // Its memory is the session's already: others that are idle go, but it is never refused for it.
  (void)serve_->make_adapter_room(digest, weights->bytes);
  return serve_->install_adapter(digest, std::move(weights));
}

Status ModelHost::load_adapter(const Digest& digest,
                               const std::vector<model::HostAdapterTensor>& tensors) {
  TANDEM_RETURN_IF_ERROR(model::check_adapter(loaded_.config, tensors));
  limit_adapters();
  const Status room = serve_->make_adapter_room(
      digest, model::adapter_bytes(loaded_.config, options_.dtype, tensors));
  if (!room.ok() && gang_bytes_ > 0)
    return {room.code(), str(room.message(), "; ", format_bytes(gang_bytes_),
                             " of it are a gang's, whose rank runs beside")};
  TANDEM_RETURN_IF_ERROR(room);
  TANDEM_ASSIGN_OR_RETURN(
      auto weights,
      model::build_adapter(*backend_.ops, memory_->serve_exec, *backend_.allocator,
                           *backend_.ledger, loaded_.config, options_.dtype, tensors));
  return serve_->install_adapter(digest, std::move(weights));
}

Result<std::vector<std::int32_t>> ModelHost::tokenize(const protocol::PromptInput& input) const {
  return encode_input(*encoder_, ref_.name, input);
}

}  // namespace tandem::worker::runtime
