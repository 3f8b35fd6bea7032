#include "worker/train/rank_params.h"

#include "kernels/workspace.h"
#include "protocol/base/random.h"
#include "worker/model/host_copy.h"
#include "worker/train/state_pieces.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace tandem::worker::train {

namespace {

using kernels::MemoryKind;
using kernels::Sharing;
using kernels::Tensor;
using model::download_floats;
using model::FlatLayout;
using model::FlatTensor;
using model::Site;
using model::upload_floats;

constexpr std::int64_t kReserveBytes = std::int64_t{1} << 40;  ///< address space of an arena
/// Random stream of a site's initial A, as lora_params.cc has it.
constexpr std::uint64_t kInitStream = 0x6c6f7261'00000000;
constexpr std::array<const char*, 3> kSuffixes{"param", "exp_avg", "exp_avg_sq"};

std::unique_ptr<kernels::Arena> make_arena(const SessionParts& parts, MemoryKind kind,
                                           const char* name, Sharing sharing) {
  return std::make_unique<kernels::Arena>(parts.allocator, parts.ledger, kind, name, kReserveBytes,
                                          sharing);
}

/// What of a tensor lies in [begin, begin + count) of the buffer, as elements of the buffer.
struct Overlap {
  std::int64_t begin = 0, end = 0;
  [[nodiscard]] bool empty() const { return begin >= end; }
};
Overlap overlap(const FlatTensor& t, std::int64_t begin, std::int64_t count) {
  return {std::max(begin, t.begin), std::min(begin + count, t.begin + t.slice.elements())};
}

}  // namespace

kernels::AdamWArgs adamw_args(const protocol::TrainSettings& settings, double learning_rate,
                              std::int64_t step, double grad_factor, const Tensor& squared_norm) {
  kernels::AdamWArgs args{};
  if (settings.max_grad_norm > 0.0) args.squared_norm = squared_norm;
  args.max_norm = static_cast<float>(settings.max_grad_norm);
  args.lr = static_cast<float>(learning_rate);
  args.beta1 = static_cast<float>(settings.adam_beta1);
  args.beta2 = static_cast<float>(settings.adam_beta2);
  args.eps = static_cast<float>(settings.adam_epsilon);
  args.weight_decay = static_cast<float>(settings.weight_decay);
  args.step = step;
  args.grad_factor = static_cast<float>(grad_factor);
  return args;
}

// -- building
// --------------------------------------------------------------------------------------

Result<std::unique_ptr<RankParams>> RankParams::create(const SessionParts& parts,
                                                       std::optional<model::LoraConfig> lora) {
  if (!lora && parts.source == nullptr)
    return refused_error("method \"full\" is not supported by this engine; lora is");
  auto params = std::unique_ptr<RankParams>(new RankParams(parts, std::move(lora)));
  if (params->full()) TANDEM_RETURN_IF_ERROR(params->open_weights());
  params->allocate();
  return params;
}

RankParams::RankParams(const SessionParts& parts, std::optional<model::LoraConfig> lora)
    : parts_(parts),
      lora_(std::move(lora)),
      cd_(parts.context.compute_dtype),
      sums_(sum_dtype(cd_)),
      whole_config_(parts.weights.base().whole_config()),
      shard_(parts.weights.base().shard()),
      compute_arena_(make_arena(parts, MemoryKind::kAdapters, "trained adapter", Sharing::kNone)),
      // What other ranks read: gradients, and parts of weights, which are the masters in f32.
      gradient_arena_(make_arena(parts, MemoryKind::kGradients, "gradients",
                                 zero() >= 2 ? Sharing::kPeers : Sharing::kNone)),
      optimizer_arena_(make_arena(parts, MemoryKind::kOptimizer, "optimizer",
                                  zero() == 3 && cd_ == sums_ ? Sharing::kPeers : Sharing::kNone)),
      weights_(&parts.weights) {
  plan_units();
}

/// The job's own copy of the weights: what the engine serves never changes.
Status RankParams::open_weights() {
  weight_arena_ = make_arena(parts_, MemoryKind::kWeights, "trained weights",
                             zero() == 3 ? Sharing::kPeers : Sharing::kNone);
  model::Context& ctx = parts_.context;
  comm::Communicator& dp = parts_.ranks ? *parts_.ranks->groups.dp : ctx.comm;
  TANDEM_ASSIGN_OR_RETURN(
      auto held,
      model::hold_weights(ctx, dp, *weight_arena_, whole_config_, *parts_.source, shard_,
                          zero() == 3 ? model::Holding::kOwnParts : model::Holding::kWhole));
  gathered_ = held.gathered;
  own_weights_ = std::move(held.door);
  if (parts_.on_block != nullptr)
    own_weights_ = model::make_watched_weights(std::move(own_weights_), *parts_.on_block);
  weights_ = own_weights_.get();
  return {};
}

FlatLayout RankParams::lora_layout(std::int64_t layer) const {
  FlatLayout layout;
  for (Site site : lora_->target_modules) {
    const model::SiteShape shape = site_shape(whole_config_, site);
    const std::string path = model::site_path(layer, site);
    const bool outputs = model::cut_by_outputs(site), cut = shard_.tp_size > 1;
    FlatTensor& a = layout.add(path + ".lora_A", {lora_->r, shape.i},
                               lora_a_slice(whole_config_, site, lora_->r, shard_));
    a.partial = cut && outputs;
    a.counted = !outputs || shard_.tp_rank == 0;
    FlatTensor& b = layout.add(path + ".lora_B", {shape.n, lora_->r},
                               lora_b_slice(whole_config_, site, lora_->r, shard_));
    b.partial = cut && !outputs;
    b.counted = outputs || shard_.tp_rank == 0;
  }
  layout.elements =
      (layout.elements + model::kFlatAlignment - 1) / model::kFlatAlignment * model::kFlatAlignment;
  return layout;
}

void RankParams::plan_units() {
  const auto add = [&](std::int64_t layer, FlatLayout layout) {
    if (layout.elements == 0) return;
    // Of a stream of which each rank has some rows, norms see a part of the sum.
    if (shard_.tp_size > 1 && parts_.ranks->layout.sequence_parallel)
      for (FlatTensor& tensor : layout.tensors) tensor.partial |= tensor.is_whole();
    Unit unit;
    unit.layer = layer;
    unit.part = zero() == 0 ? layout.elements : model::flat_part(layout.elements, dp_size());
    unit.begin = zero() == 0 ? 0 : parts_.ranks->dp_rank() * unit.part;
    unit.layout = std::move(layout);
    units_.push_back(std::move(unit));
  };
  for (const std::int64_t layer : shard_.blocks(whole_config_))
    add(layer, full() ? block_layout(whole_config_, shard_, layer) : lora_layout(layer));
  if (!full()) return;
  const FlatLayout ends = ends_layout(whole_config_, shard_);
  const bool split = zero() >= 2 && !whole_config_.tied_embedding;
  FlatLayout head, embedding, rest;
  for (const FlatTensor& tensor : ends.tensors) {
    FlatLayout& to = !split                                 ? rest
                     : tensor.name == model::kHeadName      ? head
                     : tensor.name == model::kEmbeddingName ? embedding
                                                            : rest;
    to.add(tensor.name, tensor.shape, tensor.slice).counted = tensor.counted;
  }
  for (FlatLayout* layout : {&head, &embedding, &rest})
    layout->elements = (layout->elements + model::kFlatAlignment - 1) / model::kFlatAlignment *
                       model::kFlatAlignment;
  add(kHead, std::move(head));
  add(kEmbedding, std::move(embedding));
  add(kEnds, std::move(rest));
}

void RankParams::allocate() {
  std::int64_t block = 0, end = 0;
  std::size_t blocks = 0;
  for (Unit& unit : units_) {
    allocate_unit(unit);
    if (!at_once(unit)) continue;
    if (unit.layer >= 0) unit.turn = blocks++;
    std::int64_t& largest = unit.layer >= 0 ? block : end;
    largest = std::max(largest, padded(unit));
  }
  squared_norm_ = optimizer_arena_->alloc({1}, sums_);
  // Padding is cleared as well, which nobody writes.
  if (blocks > 0 || end > 0) {
    comm::Communicator& dp = *parts_.ranks->groups.dp;
    const std::int64_t buffers = dp.has_background() ? 2 : 1;
    const Tensor room = gradient_arena_->alloc({std::max(buffers * block, end)}, sums_);
    dp.share(parts_.context.exec, room);
    parts_.context.ops.fill_zero(parts_.context.exec, room);
    shared_by_ends_.whole = room;
    for (std::int64_t b = 0; b < buffers; ++b)
      shared_.push_back({room.rows(b * block, block), nullptr});
    for (Unit& unit : units_) unit.turn %= shared_.size();
  }
  for (const Unit& unit : units_)
    parts_.context.ops.fill_zero(parts_.context.exec,
                                 at_once(unit) ? unit.part_gradient : unit.gradient);
}

void RankParams::allocate_unit(Unit& unit) {
  const kernels::Shape part{unit.part};
  if (at_once(unit)) {
    unit.part_gradient = gradient_arena_->alloc(part, sums_);
  } else {
    unit.gradient = gradient_arena_->alloc({padded(unit)}, sums_);
    unit.part_gradient = unit.gradient.rows(unit.begin, unit.part);
  }
  if (!full()) {
    unit.compute = compute_arena_->alloc({padded(unit)}, cd_);
    parts_.context.ops.fill_zero(parts_.context.exec, unit.compute);
    unit.compute_part = unit.compute.rows(unit.begin, unit.part);
  }
  // Where the engine computes in the masters' own precision they are what is read.
  const bool shared = cd_ == sums_ && !full();
  unit.master = shared ? unit.compute_part : optimizer_arena_->alloc(part, sums_);
  unit.m = optimizer_arena_->alloc(part, sums_);
  unit.v = optimizer_arena_->alloc(part, sums_);
  if (kept_in_parts(unit)) gathered_->set_part(unit.layer, unit.master);
  for (const FlatTensor& tensor : unit.layout.tensors) {
    const Overlap piece = overlap(tensor, unit.begin, unit.part);
    if (piece.empty()) continue;
    const Tensor view = unit.part_gradient.rows(piece.begin - unit.begin, piece.end - piece.begin);
    if (tensor.counted) unit.counted.push_back(view);
    // The ends' are added up while they are whole: vocabularies may not divide, and then parts of
    // two ranks are not alike.
    if (tensor.partial && unit.layer >= 0) unit.partial.push_back(view);
  }
  unit.spans = decay_spans(unit);
}

/// As Hugging Face's trainer has it: norms and biases do not decay. Padding goes with the tensor
/// before it.
std::vector<RankParams::Span> RankParams::decay_spans(const Unit& unit) {
  std::vector<Span> spans;
  const auto& tensors = unit.layout.tensors;
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    const std::int64_t begin = std::max<std::int64_t>(tensors[t].begin - unit.begin, 0);
    const std::int64_t end =
        t + 1 < tensors.size() ? std::min(tensors[t + 1].begin - unit.begin, unit.part) : unit.part;
    if (begin >= end) continue;
    if (!spans.empty() && spans.back().decays == tensors[t].decays())
      spans.back().end = end;
    else
      spans.push_back({begin, end, tensors[t].decays()});
  }
  return spans;
}

// -- values
// ----------------------------------------------------------------------------------------

void RankParams::set_values(Unit& unit, const std::vector<float>& whole) {
  std::vector<float> part(static_cast<std::size_t>(unit.part), 0.0f);
  const auto size = static_cast<std::int64_t>(whole.size());
  const std::int64_t end = std::min(size, unit.begin + unit.part);
  if (unit.begin < end) std::copy(whole.begin() + unit.begin, whole.begin() + end, part.begin());
  upload_floats(parts_.context.ops, parts_.context.exec, part, unit.master);
}

void RankParams::set_weights(Unit& unit, const model::TensorSource& source) {
  if (source.has_values())
    upload_flat(parts_.context.ops, parts_.context.exec, source, unit.layout, unit.begin,
                unit.master);
}

void RankParams::initialise(std::uint64_t seed) {
  for (Unit& unit : units_) {
    if (full()) {
      set_weights(unit, *parts_.source);
    } else {
      std::vector<float> host(static_cast<std::size_t>(unit.layout.elements), 0.0f);
      for (std::size_t s = 0; s < lora_->target_modules.size(); ++s) {
        const FlatTensor& a = unit.layout.tensors[2 * s];  // B is zero
        const std::int64_t i = a.shape[1];
        const std::uint64_t stream =
            kInitStream +
            static_cast<std::uint64_t>(unit.layer * model::kSiteCount +
                                       static_cast<std::int64_t>(lora_->target_modules[s]));
        const float bound = 1.0f / std::sqrt(static_cast<float>(i));
        for (std::int64_t e = 0; e < a.slice.elements(); ++e) {
          const std::int64_t row = a.slice.row + e / a.slice.columns;
          const std::int64_t column = a.slice.column + e % a.slice.columns;
          host[static_cast<std::size_t>(a.begin + e)] =
              (2.0f * random_uniform(seed, stream, static_cast<std::uint64_t>(row * i + column)) -
               1.0f) *
              bound;
        }
      }
      set_values(unit, host);
    }
    parts_.context.ops.fill_zero(parts_.context.exec, unit.m);
    parts_.context.ops.fill_zero(parts_.context.exec, unit.v);
    publish(unit);
  }
}

Status RankParams::initialise_from(const std::vector<model::HostAdapterTensor>&) {
  return refused_error("an initial adapter over several ranks is not supported yet");
}

void RankParams::publish(Unit& unit, const kernels::AdamWArgs* step) {
  model::Context& ctx = parts_.context;
  const bool gather = zero() > 0;
  if (kept_in_parts(unit)) {
    publish_part(unit, step, unit.master);
    return gathered_->forget();
  }
  if (!full()) {
    publish_part(unit, step, unit.compute_part);
    if (gather) parts_.ranks->groups.dp->all_gather(ctx.exec, unit.compute_part, unit.compute);
    return;
  }
  if (!gather) {
    if (step != nullptr && kernels::packs_rows(ctx.ops.profile())) return update_plain(unit, *step);
    publish_part(unit, step, unit.master);
    return unpack(unit, unit.master);
  }
  kernels::ArenaScope scope(ctx.activations);
  const Tensor whole = ctx.activations.alloc({padded(unit)}, cd_);
  const Tensor part = whole.rows(unit.begin, unit.part);
  publish_part(unit, step, part);
  parts_.ranks->groups.dp->all_gather(ctx.exec, part, whole);
  unpack(unit, whole);
}

/// Rounds the masters to `to`, which may be the masters.
void RankParams::publish_part(Unit& unit, const kernels::AdamWArgs* step, const Tensor& to) {
  model::Context& ctx = parts_.context;
  const bool elsewhere = to.data != unit.master.data;
  if (step == nullptr) {
    if (elsewhere) ctx.ops.copy(ctx.exec, unit.master, to);
    return;
  }
  for (const Span& span : step->weight_decay > 0.0f ? unit.spans : std::vector{Span{0, unit.part}})
    update_piece(unit, span, *step,
                 elsewhere ? to.rows(span.begin, span.end - span.begin) : Tensor{});
}

void RankParams::update_piece(const Unit& unit, const Span& span, const kernels::AdamWArgs& step,
                              const Tensor& to) {
  const auto piece = [&](const Tensor& part) {
    return part.rows(span.begin, span.end - span.begin);
  };
  kernels::AdamWArgs args = step;
  args.param = piece(unit.master);
  args.grad = piece(unit.part_gradient);
  args.m = piece(unit.m);
  args.v = piece(unit.v);
  args.param_cd = to;
  if (!span.decays) args.weight_decay = 0.0f;
  parts_.context.ops.adamw(parts_.context.exec, args);
}

/// Stack by stack. The padding between them stays as it is, which is zero.
void RankParams::update_plain(Unit& unit, const kernels::AdamWArgs& step) {
  const model::BaseWeights& base = weights_->base();
  for (const model::PlainRows& stack : unit.layer < 0
                                           ? plain_ends(unit.layout, base)
                                           : plain_block(unit.layout, base.block(unit.layer)))
    update_piece(unit, {stack.begin, stack.begin + stack.values.elements(), stack.decays}, step,
                 stack.values);
}

void RankParams::unpack(Unit& unit, const Tensor& whole) {
  model::Context& ctx = parts_.context;
  const model::BaseWeights& base = weights_->base();
  if (unit.layer < 0)
    unpack_ends(ctx.ops, ctx.exec, unit.layout, whole, base);
  else
    unpack_block(ctx.ops, ctx.exec, unit.layout, whole, base.block(unit.layer));
}

void RankParams::attach(model::AdapterTable& table, std::int64_t slot) {
  if (full()) return;
  std::vector<std::array<std::optional<model::AdapterTable::TrainablePair>, model::kSiteCount>>
      pairs(static_cast<std::size_t>(whole_config_.layers));
  for (const Unit& unit : units_) {
    const Tensor gradient = at_once(unit) ? shared_[unit.turn].whole : unit.gradient;
    for (std::size_t s = 0; s < lora_->target_modules.size(); ++s) {
      const FlatTensor &a = unit.layout.tensors[2 * s], &b = unit.layout.tensors[2 * s + 1];
      pairs[static_cast<std::size_t>(unit.layer)]
           [static_cast<std::size_t>(lora_->target_modules[s])] =
               model::AdapterTable::TrainablePair{
                   {tensor_view(a, unit.compute), tensor_view(b, unit.compute), lora_->scale(),
                    static_cast<std::int32_t>(lora_->r)},
                   tensor_view(a, gradient),
                   tensor_view(b, gradient)};
    }
  }
  table.set_trainable(parts_.context.exec, slot, pairs);
}

// -- state
// -----------------------------------------------------------------------------------------

std::vector<StateTensor> RankParams::export_tensors(bool weights_alone) const {
  std::vector<StateTensor> tensors;
  if (zero() == 0 && parts_.ranks != nullptr && parts_.ranks->dp_rank() != 0) return tensors;
  for (const Unit& unit : units_) {
    const std::array<Tensor, 3> flats{unit.master, unit.m, unit.v};
    for (std::size_t f = 0; f < (weights_alone ? 1 : flats.size()); ++f) {
      const std::vector<float> host =
          download_floats(parts_.context.ops, parts_.context.exec, flats[f]);
      for (const FlatTensor& tensor : unit.layout.tensors) {
        const Overlap piece = overlap(tensor, unit.begin, unit.part);
        if (piece.empty() || !tensor.counted) continue;
        tensors.push_back(
            {str(tensor.name, ".", kSuffixes[f]),
             tensor.shape,
             {host.begin() + (piece.begin - unit.begin), host.begin() + (piece.end - unit.begin)},
             tensor.slice,
             piece.begin - tensor.begin});
        const std::int64_t width = tensor.shape.size() > 1 ? tensor.shape[1] : 1;
        if (piece.end - piece.begin == tensor.shape[0] * width) tensors.back().slice = {};  // whole
      }
    }
  }
  return tensors;
}

Status RankParams::read_tensors(const StateSource& state) {
  read_.assign(units_.size(), {});
  for (std::size_t u = 0; u < units_.size(); ++u) {
    const Unit& unit = units_[u];
    for (std::size_t f = 0; f < kSuffixes.size(); ++f) {
      std::vector<float>& part = read_[u][f];
      part.assign(static_cast<std::size_t>(unit.part), 0.0f);
      for (const FlatTensor& tensor : unit.layout.tensors) {
        const Overlap piece = overlap(tensor, unit.begin, unit.part);
        if (piece.empty()) continue;
        TANDEM_RETURN_IF_ERROR(
            state.read(str(tensor.name, ".", kSuffixes[f]), tensor.shape,
                       {tensor.slice, piece.begin - tensor.begin, piece.end - piece.begin},
                       part.data() + (piece.begin - unit.begin)));
      }
    }
  }
  return {};
}

void RankParams::take_tensors() {
  for (std::size_t u = 0; u < units_.size(); ++u) {
    Unit& unit = units_[u];
    const std::array<Tensor, 3> flats{unit.master, unit.m, unit.v};
    for (std::size_t f = 0; f < flats.size(); ++f)
      upload_floats(parts_.context.ops, parts_.context.exec, read_[u][f], flats[f]);
    read_[u] = {};
    publish(unit);
  }
}

void RankParams::load_weights(const model::TensorSource& source) {
  TANDEM_CHECK(full(), "an adapter is not read from a model");
  for (Unit& unit : units_) {
    set_weights(unit, source);
    publish(unit);
  }
}

std::shared_ptr<const model::AdapterWeights> RankParams::snapshot() const {
  TANDEM_CHECK(false, "a snapshot of several ranks' parts is not made here: merge_states");
  return nullptr;
}

std::vector<model::HostAdapterTensor> RankParams::host_adapter(DType) const {
  TANDEM_CHECK(false, "an adapter of several ranks' parts is not made here: merge_states");
  return {};
}

model::FlatAdapter RankParams::flat_adapter(DType) const {
  TANDEM_CHECK(false, "an adapter of several ranks' parts is not made here: merge_states");
  return {};
}

}  // namespace tandem::worker::train
