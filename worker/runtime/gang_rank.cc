#include "worker/runtime/gang_rank.h"

#include "protocol/base/log.h"
#include "protocol/base/units.h"
#include "storage/file_io.h"
#include "worker/comm/device_gang.h"
#include "worker/model/weight_door.h"
#include "worker/runtime/model_folder.h"
#include "worker/train/model_export.h"
#include "worker/train/state_pieces.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <future>
#include <mutex>

namespace tandem::worker::runtime {
void GangPatience::add_slice(double seconds) {
  slices_.push_back(static_cast<TimeMs>(seconds * 1000.0));
  if (slices_.size() > kSlicesKept) slices_.pop_front();
  longest_ms_ = *std::max_element(slices_.begin(), slices_.end());
  *now_ms_ = std::max(least_ms_, 5 * longest_ms_);
}

Result<std::unique_ptr<comm::Communicator>> join_devices(comm::Communicator& gang,
                                                         kernels::Ops& ops, kernels::Exec& exec,
                                                         const GangRank::Options& rank,
                                                         const GangPatience& patience,
                                                         bool gathers) {
  comm::NcclOptions options;
  options.device = rank.device;
  options.current_timeout_ms = patience.timeout_ms();
  options.on_failure = rank.device_failed;
  if (gathers) options.multiprocessors_max = comm::kGatherMultiprocessors;
  return comm::join_devices(gang, ops, exec, options);
}

/// Address space only; what is used is mapped and booked as it is used.
struct GangRank::Memory {
  Memory(kernels::Backend& b, const Options& o)
      : weights(*b.allocator, *b.ledger, kernels::MemoryKind::kWeights, "weights",
                o.memory_bytes_max, kernels::Sharing::kPeers),
        table(*b.allocator, *b.ledger, kernels::MemoryKind::kAdapters, "adapter table",
              o.memory_bytes_max),
        activations(*b.allocator, *b.ledger, kernels::MemoryKind::kActivations,
                    "training activations", o.memory_bytes_max),
        workspace(*b.allocator, *b.ledger, kernels::MemoryKind::kWorkspace, "training workspace",
                  o.memory_bytes_max),
        exec{workspace, b.ops->make_stream(false), o.numerics} {}
  kernels::Arena weights, table, activations, workspace;
  kernels::Exec exec;
};

GangRank::GangRank(kernels::Backend& backend, const Options& options, comm::Communicator& gang,
                   GangPatience& patience)
    : backend_(backend),
      options_(options),
      gang_(gang),
      patience_(patience),
      memory_(std::make_unique<Memory>(backend, options)),
      wire_(gang, memory_->exec) {}

GangRank::~GangRank() = default;

Status GangRank::open(const GangPlan& plan) {
  // One step after another: a rank that fails in one must not leave the others in a collective of
  // the next.
  TANDEM_RETURN_IF_ERROR(wire_.agree(load(plan)));
  TANDEM_RETURN_IF_ERROR(wire_.agree(begin(plan)));
  if (plan.checkpoint.empty()) return {};
  TANDEM_RETURN_IF_ERROR(wire_.agree(read_checkpoint(plan)));
  session_->take_state();
  return {};
}

/// Each rank reads what it holds, whoever saved it. On the task thread, which alone uses the bulk
/// connection; this one has nothing else to do.
Status GangRank::read_checkpoint(const GangPlan& plan) {
  if (bulk_ == nullptr) return internal_error("this rank was given no place for checkpoints");
  std::promise<Status> done;
  const auto read = [&]() -> Status {
    TANDEM_ASSIGN_OR_RETURN(
        const auto source,
        CheckpointSource::open(plan.checkpoint, plan.base_model,
                               [&](auto digests) { return bulk_->get(digests); }));
    return session_->read_state(source->state_json(), *source);
  };
  if (!tasks_->post([&] { done.set_value(read()); }))
    return internal_error("the task queue is full");
  return done.get_future().get();
}

Status GangRank::load(const GangPlan& plan) {
  const comm::Layout layout = train::layout_of(plan.settings);
  if (layout.ranks() != gang_.size())
    return internal_error(
        str("layout ", layout.to_string(), " on a gang of ", gang_.size(), " ranks"));
  TANDEM_ASSIGN_OR_RETURN(auto loaded, model::load_model(plan.model_path));
  config_ = loaded.config;
  model_path_ = plan.model_path;
  TANDEM_RETURN_IF_ERROR(model::check_shard(config_, layout.tp, layout.pp, layout.virtual_pp));
  TANDEM_ASSIGN_OR_RETURN(devices_, join_devices(gang_, *backend_.ops, memory_->exec, options_,
                                                 patience_, layout.zero == 3));
  ranks_.emplace(train::make_ranks(devices_ ? *devices_ : gang_, layout));
  context_.emplace(model::Context{*backend_.ops, memory_->exec, *ranks_->groups.tp,
                                  memory_->activations, options_.dtype});
  const bool full = plan.settings.full();
  TANDEM_ASSIGN_OR_RETURN(
      auto held,
      model::hold_weights(*context_, *ranks_->groups.dp, memory_->weights, config_, *loaded.source,
                          ranks_->shard(config_), model::holding_beside(full, layout.zero)));
  weights_ = model::make_watched_weights(std::move(held.door), on_block_);
  if (full) source_ = std::move(loaded.source);
  adapters_ = std::make_unique<model::AdapterTable>(*backend_.ops, memory_->exec, memory_->table,
                                                    held.base->config(), 1);
  return {};
}

Status GangRank::begin(const GangPlan& plan) {
  TANDEM_ASSIGN_OR_RETURN(auto batches,
                          train::make_packed_batches(plan.train, plan.eval, plan.settings));
  train::SessionOptions options;
  options.settings = plan.settings;
  TANDEM_ASSIGN_OR_RETURN(
      session_,
      train::TrainSession::create({*backend_.allocator, *backend_.ledger, *context_, *weights_,
                                   *adapters_, 0, &*ranks_, source_.get(), &on_block_},
                                  options, std::move(batches)));
  return {};
}

Result<train::SliceEvent> GangRank::run_slice() {
  const std::int64_t begin = steady_ns();
  auto event = session_->run_slice();
  patience_.add_slice(static_cast<double>(steady_ns() - begin) * 1e-9);
  if (event.ok() && std::holds_alternative<train::Finished>(*event)) {
    const std::int64_t peak = backend_.ledger->peak_total();
    log_info("memory peak ", peak, " bytes (", format_bytes(peak), ")");
  }
  return event;
}

Result<train::TrainState> GangRank::export_state() {
  ByteWriter mine;
  encode_state(session_->export_state(), mine);
  const auto all = wire_.gather(mine.bytes());
  if (all.empty()) return train::TrainState{};
  std::vector<train::TrainState> states;
  for (const ByteVector& bytes : all) {
    ByteReader reader(bytes);
    states.push_back(decode_state(reader));
  }
  return train::merge_states(states);
}

struct GangRank::Storing {
  std::mutex mutex;
  std::optional<Result<StoredPieces>> outcome;
};

void GangRank::store_with(BulkClient& bulk, TaskThread& tasks, std::string pin) {
  bulk_ = &bulk;
  tasks_ = &tasks;
  pin_ = std::move(pin);
}

void GangRank::begin_checkpoint() {
  storing_ = std::make_shared<Storing>();
  const auto state = std::make_shared<const train::TrainState>(session_->export_state());
  const bool posted =
      tasks_ != nullptr && tasks_->post([state, storing = storing_, bulk = bulk_, pin = pin_] {
        BulkClient::Upload upload(*bulk, pin);
        StoredPieces pieces =
            describe_pieces(*state, [&](const BlobView& blob) { upload.add(blob); });
        const Status status = upload.finish();
        const std::lock_guard lock(storing->mutex);
        if (status.ok())
          storing->outcome = std::move(pieces);
        else
          storing->outcome = status;
      });
  if (!posted) storing_->outcome = internal_error("this rank has no place for checkpoints");
}

std::optional<Result<std::vector<StoredPieces>>> GangRank::stored_checkpoint() {
  std::optional<Result<StoredPieces>> mine;
  if (storing_) {
    const std::lock_guard lock(storing_->mutex);
    mine = storing_->outcome;
  } else {
    mine = internal_error("no checkpoint was begun");
  }
  if (wire_.largest(mine ? 0.0 : 1.0) > 0.0) return std::nullopt;
  storing_.reset();
  if (const Status all = wire_.agree(mine->status()); !all.ok())
    return Result<std::vector<StoredPieces>>(all);
  std::vector<StoredPieces> ranks;
  for (const ByteVector& bytes : wire_.gather((*mine)->encode()))
    ranks.push_back(StoredPieces::decode(bytes));
  return Result<std::vector<StoredPieces>>(std::move(ranks));
}

double GangRank::compare(const model::FlatAdapter& published) {
  return wire_.largest(largest_difference(session_->export_state(), published));
}

Status GangRank::write_model(const ModelPlace& place) {
  const std::string weights = place.folder + "/model.safetensors";
  const auto prepare = [&]() -> Status {
    std::error_code error;
    std::filesystem::remove_all(place.folder, error);
    TANDEM_RETURN_IF_ERROR(storage::make_directories(place.folder));
    TANDEM_ASSIGN_OR_RETURN(const auto base, model::load_model(model_path_));
    TANDEM_RETURN_IF_ERROR(write_model_texts(base, model_path_, place.folder, place.dtype));
    return train::create_weights(weights, config_, place.dtype);
  };
  TANDEM_RETURN_IF_ERROR(wire_.agree(wire_.rank() == 0 ? prepare() : Status()));
  return wire_.agree(train::write_pieces(weights, session_->export_weights(), on_block_));
}

Result<double> GangRank::probe_model(const ModelPlace& place) {
  double worst = 0.0;
  const auto compare = [&]() -> Status {
    TANDEM_ASSIGN_OR_RETURN(const auto published, model::load_model(place.folder));
    worst = train::largest_difference(session_->export_weights(), *published.source, place.dtype,
                                      on_block_);
    if (wire_.size() == 1)
      worst = std::max(worst, session_->probe_published(place.prompt, *published.source));
    return {};
  };
  TANDEM_RETURN_IF_ERROR(wire_.agree(compare()));
  return wire_.largest(worst);
}

void follow(GangRank& rank) {
  while (true) {
    const GangWire::Heard heard = rank.wire().hear();
    switch (heard.op) {
      case GangOp::kIdle:
        break;
      case GangOp::kOpen:
        if (const Status status = rank.open(GangPlan::decode(heard.payload)); !status.ok())
          log_warn("the session was not opened: ", status.to_string());
        break;
      case GangOp::kSlice:
        // What fails here fails on the first rank too, which reports it and ends the gang.
        if (auto event = rank.run_slice(); !event.ok())
          log_warn("the session ends: ", event.status().to_string());
        break;
      case GangOp::kExport:
        (void)rank.export_state();
        break;
      case GangOp::kCompare:
        (void)rank.compare(decode_adapter(rank.config(), rank.session().lora(), heard.payload));
        break;
      case GangOp::kSnapshot:
        rank.begin_checkpoint();
        break;
      case GangOp::kStored:
        (void)rank.stored_checkpoint();
        break;
      case GangOp::kWriteModel:
        if (const Status s = rank.write_model(ModelPlace::decode(heard.payload)); !s.ok())
          log_warn("the model was not written: ", s.to_string());
        break;
      case GangOp::kProbeModel:
        (void)rank.probe_model(ModelPlace::decode(heard.payload));
        break;
      case GangOp::kEnd:
        return;
    }
  }
}

}  // namespace tandem::worker::runtime
