#include "worker/train/lora_params.h"

#include "protocol/base/random.h"
#include "protocol/base/units.h"
#include "worker/model/host_copy.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>

namespace tandem::worker::train {

namespace {

using kernels::MemoryKind;
using kernels::Tensor;
using model::AdapterLayout;

/// Random stream of a site's initial A: "lora" and the site's index.
constexpr std::uint64_t kInitStream = 0x6c6f7261'00000000;

AdapterLayout make_layout(const model::ModelConfig& config, const model::LoraConfig& lora) {
  AdapterLayout layout;
  for (std::int64_t layer = 0; layer < config.layers; ++layer)
    for (model::Site site : lora.target_modules)
      layout.add(config, layer, site, lora.r, lora.scale());
  return layout;
}

std::int64_t flat_bytes(std::int64_t elements, DType dtype) {
  return round_up(elements * dtype_bytes(dtype), kernels::kDeviceAlignment);
}

/// One of the three flat tensors, as names and shapes of what lies in it.
struct Part {
  std::string name;
  std::vector<std::int64_t> shape;
  std::int64_t begin = 0;
  [[nodiscard]] std::int64_t elements() const { return shape[0] * shape[1]; }
};

std::vector<Part> parts_of(const AdapterLayout& layout, const char* suffix) {
  std::vector<Part> parts;
  for (const AdapterLayout::Pair& pair : layout.pairs) {
    const std::string path = model::site_path(pair.layer, pair.site);
    parts.push_back({path + ".lora_A." + suffix, {pair.rank, pair.i}, pair.a_begin});
    parts.push_back({path + ".lora_B." + suffix, {pair.n, pair.rank}, pair.b_begin});
  }
  return parts;
}

constexpr std::array<const char*, 3> kSuffixes{"param", "exp_avg", "exp_avg_sq"};

}  // namespace

LoraParams::LoraParams(const SessionParts& parts, const model::LoraConfig& lora)
    : parts_(parts),
      layout_(make_layout(parts.weights.base().config(), lora)),
      adapter_arena_(parts.allocator, parts.ledger, MemoryKind::kAdapters, "trained adapter",
                     flat_bytes(layout_.elements, parts.context.compute_dtype)),
      gradient_arena_(parts.allocator, parts.ledger, MemoryKind::kGradients, "gradients",
                      flat_bytes(layout_.elements, sum_dtype(parts.context.compute_dtype))),
      optimizer_arena_(parts.allocator, parts.ledger, MemoryKind::kOptimizer, "optimizer",
                       3 * flat_bytes(layout_.elements, sum_dtype(parts.context.compute_dtype)) +
                           kernels::kDeviceAlignment) {
  const DType sums = sum_dtype(parts.context.compute_dtype);
  const kernels::Shape flat{layout_.elements};
  compute_ = adapter_arena_.alloc(flat, parts.context.compute_dtype);
  gradient_ = gradient_arena_.alloc(flat, sums);
  master_ = parts.context.compute_dtype == sums ? compute_ : optimizer_arena_.alloc(flat, sums);
  m_ = optimizer_arena_.alloc(flat, sums);
  v_ = optimizer_arena_.alloc(flat, sums);
  squared_norm_ = optimizer_arena_.alloc({1}, sums);
  room_.resize(static_cast<std::size_t>(compute_.bytes()));
  zero_gradients();
}

void LoraParams::initialise(std::uint64_t seed) {
  std::vector<float> host(static_cast<std::size_t>(layout_.elements), 0.0f);
  for (const AdapterLayout::Pair& pair : layout_.pairs) {
    const std::uint64_t stream =
        kInitStream + static_cast<std::uint64_t>(pair.layer * model::kSiteCount +
                                                 static_cast<std::int64_t>(pair.site));
    const float bound = 1.0f / std::sqrt(static_cast<float>(pair.i));
    for (std::int64_t e = 0; e < pair.rank * pair.i; ++e)
      host[static_cast<std::size_t>(pair.a_begin + e)] =
          (2.0f * random_uniform(seed, stream, static_cast<std::uint64_t>(e)) - 1.0f) * bound;
  }
  upload(host, master_);
  parts_.context.ops.fill_zero(parts_.context.exec, m_);
  parts_.context.ops.fill_zero(parts_.context.exec, v_);
  refresh_compute_copy();
}

Status LoraParams::initialise_from(const std::vector<model::HostAdapterTensor>& tensors) {
  TANDEM_RETURN_IF_ERROR(model::check_adapter(parts_.weights.base().config(), tensors));
  std::vector<float> host(static_cast<std::size_t>(layout_.elements), 0.0f);
  for (const AdapterLayout::Pair& pair : layout_.pairs) {
    const std::string path = model::site_path(pair.layer, pair.site);
    const auto it = std::find_if(tensors.begin(), tensors.end(), [&](const auto& t) {
      return t.layer == pair.layer && t.site == pair.site;
    });
    if (it == tensors.end())
      return invalid_error(
          str("the initial adapter has nothing at ", path, ", which target_modules trains"));
    if (it->rank != pair.rank)
      return invalid_error(str("the initial adapter has rank ", it->rank, " at ", path,
                               "; the job's lora_r is ", pair.rank));
    if (std::fabs(it->scale - pair.scale) > 1e-6f * std::fabs(pair.scale))
      return invalid_error(str("the initial adapter has scale ", it->scale, " at ", path,
                               "; lora_alpha and lora_r of the job give ", pair.scale));
    std::copy(it->a.begin(), it->a.end(), host.begin() + pair.a_begin);
    std::copy(it->b.begin(), it->b.end(), host.begin() + pair.b_begin);
  }
  if (tensors.size() != layout_.pairs.size())
    return invalid_error(str("the initial adapter has ", tensors.size(), " sites, target_modules ",
                             layout_.pairs.size(), ": what is not trained would be lost"));
  upload(host, master_);
  parts_.context.ops.fill_zero(parts_.context.exec, m_);
  parts_.context.ops.fill_zero(parts_.context.exec, v_);
  refresh_compute_copy();
  return {};
}

void LoraParams::refresh_compute_copy() {
  if (compute_.data != master_.data)
    parts_.context.ops.copy(parts_.context.exec, master_, compute_);
}

void LoraParams::zero_gradients() {
  parts_.context.ops.fill_zero(parts_.context.exec, gradient_);
}

void LoraParams::measure_gradients() {
  parts_.context.ops.squared_norm(parts_.context.exec, {{gradient_}, squared_norm_});
}

void LoraParams::update(const protocol::TrainSettings& settings, double learning_rate,
                        std::int64_t step, double grad_factor) {
  kernels::AdamWArgs args = adamw_args(settings, learning_rate, step, grad_factor, squared_norm_);
  args.param = master_;
  args.grad = gradient_;
  args.m = m_;
  args.v = v_;
  if (compute_.data != master_.data) args.param_cd = compute_;
  parts_.context.ops.adamw(parts_.context.exec, args);
}

void LoraParams::attach(model::AdapterTable& table, std::int64_t slot) {
  const auto layers = static_cast<std::size_t>(parts_.weights.base().config().layers);
  std::vector<std::array<std::optional<model::AdapterTable::TrainablePair>, model::kSiteCount>>
      pairs(layers);
  for (const AdapterLayout::Pair& pair : layout_.pairs)
    pairs[static_cast<std::size_t>(pair.layer)][static_cast<std::size_t>(pair.site)] =
        model::AdapterTable::TrainablePair{
            {model::pair_a(pair, compute_), model::pair_b(pair, compute_), pair.scale,
             static_cast<std::int32_t>(pair.rank)},
            model::pair_a(pair, gradient_),
            model::pair_b(pair, gradient_)};
  table.set_trainable(parts_.context.exec, slot, pairs);
}

// -- host copies
// -----------------------------------------------------------------------------------

std::vector<float> LoraParams::download(const Tensor& flat) const {
  return model::download_floats(parts_.context.ops, parts_.context.exec, flat);
}

void LoraParams::upload(const std::vector<float>& host, const Tensor& flat) {
  model::upload_floats(parts_.context.ops, parts_.context.exec, host, flat);
}

void LoraParams::load_weights(const model::TensorSource&) {
  TANDEM_CHECK(false, "an adapter is not read from a model");
}

std::vector<StateTensor> LoraParams::export_tensors(bool weights_alone) const {
  std::vector<StateTensor> tensors;
  const std::array<Tensor, 3> flats{master_, m_, v_};
  for (std::size_t f = 0; f < (weights_alone ? 1 : flats.size()); ++f) {
    const std::vector<float> host = download(flats[f]);
    for (Part& part : parts_of(layout_, kSuffixes[f])) {
      const auto begin = host.begin() + part.begin;
      tensors.push_back({std::move(part.name), part.shape,
                         std::vector<float>(begin, begin + part.shape[0] * part.shape[1])});
    }
  }
  return tensors;
}

Status LoraParams::read_tensors(const StateSource& state) {
  for (std::size_t f = 0; f < read_.size(); ++f) {
    read_[f].assign(static_cast<std::size_t>(layout_.elements), 0.0f);
    for (const Part& part : parts_of(layout_, kSuffixes[f]))
      TANDEM_RETURN_IF_ERROR(state.read(part.name, part.shape,
                                        {{0, part.shape[0], 0, part.shape[1]}, 0, part.elements()},
                                        read_[f].data() + part.begin));
  }
  const std::size_t expected = 3 * 2 * layout_.pairs.size();
  if (state.tensors() != expected)
    return corrupt_error(
        str("the checkpoint has ", state.tensors(), " tensors; the job has ", expected));
  return {};
}

void LoraParams::take_tensors() {
  upload(read_[0], master_);
  upload(read_[1], m_);
  upload(read_[2], v_);
  read_ = {};
  refresh_compute_copy();
}

std::shared_ptr<const model::AdapterWeights> LoraParams::snapshot() const {
  auto arena = std::make_shared<kernels::Arena>(parts_.allocator, parts_.ledger,
                                                MemoryKind::kAdapters, "adapter snapshot",
                                                flat_bytes(layout_.elements, compute_.dtype));
  const Tensor flat = arena->alloc(compute_.shape, compute_.dtype);
  parts_.context.ops.copy(parts_.context.exec, compute_, flat);
  parts_.context.ops.synchronize(parts_.context.exec);  // whoever serves it has a queue of its own
  return layout_.view(parts_.weights.base().config(), flat, std::move(arena));
}

std::vector<model::HostAdapterTensor> LoraParams::host_adapter(DType dtype) const {
  TANDEM_CHECK(is_stored_float(dtype), dtype_name(dtype));
  std::vector<float> host = download(master_);
  for (float& value : host) value = rounded(value, dtype);
  std::vector<model::HostAdapterTensor> tensors;
  for (const AdapterLayout::Pair& pair : layout_.pairs) {
    const auto a = host.begin() + pair.a_begin, b = host.begin() + pair.b_begin;
    tensors.push_back({pair.layer, pair.site, pair.rank, pair.scale,
                       std::vector<float>(a, a + pair.rank * pair.i),
                       std::vector<float>(b, b + pair.n * pair.rank)});
  }
  return tensors;
}

model::FlatAdapter LoraParams::flat_adapter(DType dtype) const {
  TANDEM_CHECK(is_stored_float(dtype), dtype_name(dtype));
  // The compute copy is the masters rounded, so it can be taken as it is; the probe holds it to
  // that.
  const Tensor& from = dtype == compute_.dtype ? compute_ : master_;
  model::FlatAdapter adapter{layout_, from.dtype, {}};
  const auto bytes = static_cast<std::size_t>(from.bytes());
  if (room_.size() == bytes) adapter.bytes = std::move(room_);
  adapter.bytes.resize(bytes);
  parts_.context.ops.download(parts_.context.exec, from, adapter.bytes);
  if (from.dtype != dtype) return adapter.in(dtype);
  return adapter;
}

}  // namespace tandem::worker::train
