#include "worker/runtime/replica_rank.h"

#include "protocol/base/log.h"
#include "protocol/base/units.h"
#include "worker/model/shard.h"
#include "worker/runtime/encoder.h"

namespace tandem::worker::runtime {
namespace {

constexpr std::int64_t kAdapterTableBytesMax = kGiB;

}  // namespace

/// Address space only; what is used is mapped and booked as it is used.
struct ReplicaRank::Memory {
  Memory(kernels::Backend& b, const ModelHostOptions& o)
      : weights(*b.allocator, *b.ledger, kernels::MemoryKind::kWeights, "weights",
                o.memory_bytes_max),
        table(*b.allocator, *b.ledger, kernels::MemoryKind::kAdapters, "adapter table",
              kAdapterTableBytesMax),
        activations(*b.allocator, *b.ledger, kernels::MemoryKind::kActivations,
                    "serving activations", o.memory_bytes_max),
        workspace(*b.allocator, *b.ledger, kernels::MemoryKind::kWorkspace, "serving workspace",
                  o.memory_bytes_max),
        exec{workspace, b.ops->make_stream(true), o.numerics} {}
  kernels::Arena weights, table, activations, workspace;
  kernels::Exec exec;
};

ReplicaRank::ReplicaRank(kernels::Backend& backend, const GangRank::Options& device,
                         const ModelHostOptions& options, comm::Communicator& gang,
                         GangPatience& patience, const Clock& clock)
    : backend_(backend),
      device_(device),
      options_(options),
      gang_(gang),
      patience_(patience),
      clock_(clock),
      memory_(std::make_unique<Memory>(backend, options)),
      wire_(gang, memory_->exec) {}

ReplicaRank::~ReplicaRank() = default;

Status ReplicaRank::open(const ReplicaPlan& plan) {
  // One step after another: a rank that fails in one must not leave the others in a collective of
  // the next.
  TANDEM_RETURN_IF_ERROR(wire_.agree(load(plan)));
  return wire_.agree(build(plan));
}

Status ReplicaRank::load(const ReplicaPlan& plan) {
  if (plan.layout.ranks() != gang_.size())
    return internal_error(
        str("layout ", plan.layout.to_string(), " on a gang of ", gang_.size(), " ranks"));
  TANDEM_ASSIGN_OR_RETURN(loaded_, model::load_model(plan.model_path));
  const model::ModelConfig& config = loaded_.config;
  TANDEM_RETURN_IF_ERROR(model::check_shard(config, plan.layout.tp, plan.layout.pp));
  TANDEM_ASSIGN_OR_RETURN(encoder_, make_encoder(loaded_, plan.model_path));
  const int rank = gang_.rank();
  const model::ModelShard shard{
      plan.layout.tp_rank(rank),
      plan.layout.tp,
      {model::stage_at(config.layers, plan.layout.pp, plan.layout.pp_rank(rank))}};
  TANDEM_ASSIGN_OR_RETURN(
      auto base, model::BaseWeights::load(*backend_.ops, memory_->exec, memory_->weights, config,
                                          options_.dtype, *loaded_.source, shard));
  loaded_.source.reset();
  weights_ = model::make_resident_weights(std::move(base));
  const std::int64_t weights = memory_->weights.used();
  if (weights + options_.kv_bytes_max > options_.memory_bytes_max)
    return refused_error(str("a rank of layout ", plan.layout.to_string(), " needs ",
                             format_bytes(weights), " for weights and ",
                             format_bytes(options_.kv_bytes_max), " for the KV cache; it may use ",
                             format_bytes(options_.memory_bytes_max), " (memory_bytes_max)"));
  return {};
}

Status ReplicaRank::build(const ReplicaPlan& plan) {
  TANDEM_ASSIGN_OR_RETURN(
      devices_, join_devices(gang_, *backend_.ops, memory_->exec, device_, patience_, false));
  groups_ = comm::make_groups(devices_ ? *devices_ : gang_, plan.layout);
  adapters_ =
      std::make_unique<model::AdapterTable>(*backend_.ops, memory_->exec, memory_->table,
                                            weights_->base().config(), options_.adapter_slots);
  context_.emplace(model::Context{*backend_.ops, memory_->exec, *groups_.tp, memory_->activations,
                                  options_.dtype});
  link_ = serve::make_comm_link(gang_, memory_->exec);
  ranks_.emplace(serve::ReplicaRanks{*groups_.model, *groups_.pp, *link_});
  serve::ServeOptions serve = serve_options(options_);
  serve.base_digest = plan.base;
  serve.eos_ids = loaded_.config.eos_ids;
  TANDEM_ASSIGN_OR_RETURN(
      serve_, serve::ServeEngine::create(
                  {*backend_.allocator, *backend_.ledger, *context_, *weights_, adapters_.get(), 0,
                   options_.adapter_slots, encoder_->tokenizer, clock_, &*ranks_},
                  serve));
  if (plan.adapter_bytes >= 0) serve_->set_adapter_bytes_max(plan.adapter_bytes);
  return {};
}

void follow(ReplicaRank& rank) {
  while (true) {
    const GangWire::Heard heard = rank.wire().hear();
    if (heard.op == GangOp::kEnd) return;
    if (heard.op != GangOp::kOpen) continue;
    if (const Status status = rank.open(ReplicaPlan::decode(heard.payload)); !status.ok()) {
      log_warn("the replica was not opened: ", status.to_string());
      continue;
    }
    bool more = true;
    while (more) {
      const std::int64_t begin = steady_ns();
      more = rank.serve().follow();
      rank.patience().add_slice(static_cast<double>(steady_ns() - begin) * 1e-9);
    }
    return;
  }
}

}  // namespace tandem::worker::runtime
