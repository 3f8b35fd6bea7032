#include "worker/model/adapter.h"

#include "worker/model/adapter_layout.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

namespace tandem::worker::model {

namespace {

std::string site_names() {
  std::string names;
  for (int s = 0; s < kSiteCount; ++s) names += str(s ? ", " : "", site_name(Site{s}));
  return names;
}

/// Fused group of a site and its place in it: {q,k,v}, {o}, {gate,up}, {down}.
constexpr std::array<std::array<int, 2>, 4> kFusedSites{{{0, 3}, {3, 1}, {4, 2}, {6, 1}}};

/// An arena that lives exactly as long as one adapter.
struct OwnArena {
  kernels::Arena arena;
  OwnArena(kernels::Allocator& allocator, kernels::MemoryLedger& ledger, std::int64_t bytes)
      : arena(allocator, ledger, kernels::MemoryKind::kAdapters, "adapter", bytes) {}
};

kernels::Tensor flat_view(const kernels::Tensor& flat, std::int64_t begin, kernels::Shape shape) {
  return {static_cast<char*>(flat.data) + begin * dtype_bytes(flat.dtype), flat.dtype, shape};
}

}  // namespace

float LoraConfig::scale() const {
  const auto rank = static_cast<double>(r);
  return static_cast<float>(lora_alpha / (use_rslora ? std::sqrt(rank) : rank));
}

Result<std::vector<Site>> LoraConfig::resolve_targets(const ModelConfig&,
                                                      const std::vector<std::string>& names) {
  std::set<Site> sites;
  std::vector<std::string> known{"all-linear"};
  for (int s = 0; s < kSiteCount; ++s) known.emplace_back(site_name(Site{s}));
  for (const std::string& name : names) {
    const auto it = std::find(known.begin(), known.end(), name);
    if (it == known.end()) {
      const std::string near = nearest_name(name, known);
      return invalid_error(str("target_modules: the model has no linear layer named \"", name, "\"",
                               near.empty() ? "" : str(" (did you mean ", near, "?)"), "; it has ",
                               site_names(), ", or all-linear"));
    }
    for (int s = 0; s < kSiteCount; ++s)
      if (it == known.begin() || it - known.begin() == s + 1) sites.insert(Site{s});
  }
  if (sites.empty())
    return invalid_error(str("target_modules is empty: nothing would be trained; name some of ",
                             site_names(), ", or all-linear"));
  return std::vector<Site>(sites.begin(), sites.end());
}

// -- layout --------------------------------------------------------------------------------------

void AdapterLayout::add(const ModelConfig& config, std::int64_t layer, Site site, std::int64_t rank,
                        float scale) {
  const SiteShape shape = site_shape(config, site);
  Pair pair{layer, site, rank, shape.n, shape.i, scale, elements, 0};
  const auto aligned = [](std::int64_t count) {
    return (count + kAdapterAlignment - 1) / kAdapterAlignment * kAdapterAlignment;
  };
  pair.b_begin = elements + aligned(rank * shape.i);
  elements = pair.b_begin + aligned(shape.n * rank);
  rank_max = std::max(rank_max, rank);
  pairs.push_back(pair);
}

std::shared_ptr<const AdapterWeights> AdapterLayout::view(const ModelConfig& config,
                                                          kernels::Tensor flat,
                                                          std::shared_ptr<void> storage) const {
  TANDEM_CHECK_EQ(flat.elements(), elements);
  auto weights = std::make_shared<AdapterWeights>();
  weights->pairs.resize(static_cast<std::size_t>(config.layers));
  for (const Pair& pair : pairs)
    weights->pairs[static_cast<std::size_t>(pair.layer)][static_cast<std::size_t>(pair.site)] =
        AdapterPair{pair_a(pair, flat), pair_b(pair, flat), pair.scale,
                    static_cast<std::int32_t>(pair.rank)};
  weights->rank_max = rank_max;
  weights->bytes = flat.bytes();
  weights->storage = std::move(storage);
  return weights;
}

kernels::Tensor pair_a(const AdapterLayout::Pair& pair, const kernels::Tensor& flat) {
  return flat_view(flat, pair.a_begin, {pair.rank, pair.i});
}
kernels::Tensor pair_b(const AdapterLayout::Pair& pair, const kernels::Tensor& flat) {
  return flat_view(flat, pair.b_begin, {pair.n, pair.rank});
}

FlatAdapter FlatAdapter::in(DType other) const {
  const auto count = static_cast<std::size_t>(layout.elements);
  FlatAdapter to{layout, other, std::vector<std::byte>(count * dtype_bytes(other))};
  constexpr std::size_t kBlock = 4096;  // stays in the first cache
  std::array<float, kBlock> wide;
  for (std::size_t begin = 0; begin < count; begin += kBlock) {
    const std::span<float> some = std::span(wide).first(std::min(kBlock, count - begin));
    load_floats(bytes.data() + begin * dtype_bytes(dtype), dtype, some);
    store_floats(some, other, to.bytes.data() + begin * dtype_bytes(other));
  }
  return to;
}

// -- building
// --------------------------------------------------------------------------------------

Status check_adapter(const ModelConfig& config, const std::vector<HostAdapterTensor>& tensors) {
  if (tensors.empty()) return invalid_error("the adapter has no tensors");
  std::set<std::pair<std::int64_t, Site>> seen;
  for (const HostAdapterTensor& tensor : tensors) {
    if (tensor.layer < 0 || tensor.layer >= config.layers)
      return invalid_error(str("the adapter has a tensor for layer ", tensor.layer,
                               "; the model has layers 0..", config.layers - 1));
    const std::string path = site_path(tensor.layer, tensor.site);
    if (!seen.emplace(tensor.layer, tensor.site).second)
      return invalid_error(str("the adapter has ", path, " twice"));
    const SiteShape shape = site_shape(config, tensor.site);
    if (tensor.rank < 1 || tensor.rank > std::numeric_limits<std::int32_t>::max() / 2)
      return invalid_error(str("the adapter's rank at ", path, " is ", tensor.rank));
    const auto a = static_cast<std::int64_t>(tensor.a.size());
    const auto b = static_cast<std::int64_t>(tensor.b.size());
    if (a != tensor.rank * shape.i || b != shape.n * tensor.rank)
      return invalid_error(str("the adapter does not fit the base model at ", path, ": A holds ", a,
                               " values and B ", b, ", the model needs [", tensor.rank, ", ",
                               shape.i, "] and [", shape.n, ", ", tensor.rank, "]"));
    if (!std::isfinite(tensor.scale))
      return invalid_error(str("the adapter's scale at ", path, " is ", tensor.scale));
  }
  return {};
}

std::vector<HostAdapterTensor> shard_adapter(const ModelConfig& config, const ModelShard& shard,
                                             const std::vector<HostAdapterTensor>& tensors) {
  const auto cut = [](const std::vector<float>& from, std::int64_t width, const TensorSlice& s) {
    std::vector<float> to;
    to.reserve(static_cast<std::size_t>(s.elements()));
    for (std::int64_t row = s.row; row < s.row + s.rows; ++row) {
      const auto begin = from.begin() + row * width + s.column;
      to.insert(to.end(), begin, begin + s.columns);
    }
    return to;
  };
  const std::vector<std::int64_t> blocks = shard.blocks(config);
  std::vector<HostAdapterTensor> local;
  for (const HostAdapterTensor& t : tensors) {
    if (!std::binary_search(blocks.begin(), blocks.end(), t.layer)) continue;
    const SiteShape shape = site_shape(config, t.site);
    local.push_back({t.layer, t.site, t.rank, t.scale,
                     cut(t.a, shape.i, lora_a_slice(config, t.site, t.rank, shard)),
                     cut(t.b, t.rank, lora_b_slice(config, t.site, t.rank, shard))});
  }
  return local;
}

namespace {

AdapterLayout layout_of(const ModelConfig& config, const std::vector<HostAdapterTensor>& tensors) {
  AdapterLayout layout;
  for (const HostAdapterTensor& tensor : tensors)
    layout.add(config, tensor.layer, tensor.site, tensor.rank, tensor.scale);
  return layout;
}

}  // namespace

std::int64_t adapter_bytes(const ModelConfig& config, DType dtype,
                           const std::vector<HostAdapterTensor>& tensors) {
  return layout_of(config, tensors).elements * dtype_bytes(dtype);
}

Result<std::shared_ptr<const AdapterWeights>> build_adapter(
    kernels::Ops& ops, kernels::Exec& exec, kernels::Allocator& allocator,
    kernels::MemoryLedger& ledger, const ModelConfig& config, DType dtype,
    const std::vector<HostAdapterTensor>& tensors) {
  TANDEM_RETURN_IF_ERROR(check_adapter(config, tensors));
  const AdapterLayout layout = layout_of(config, tensors);
  std::vector<std::byte> host(static_cast<std::size_t>(layout.elements * dtype_bytes(dtype)));
  const auto put = [&](std::int64_t begin, const std::vector<float>& values) {
    store_floats(values, dtype, host.data() + begin * dtype_bytes(dtype));
  };
  for (std::size_t p = 0; p < tensors.size(); ++p) {
    put(layout.pairs[p].a_begin, tensors[p].a);
    put(layout.pairs[p].b_begin, tensors[p].b);
  }
  auto own = std::make_shared<OwnArena>(allocator, ledger, static_cast<std::int64_t>(host.size()));
  const kernels::Tensor flat = own->arena.alloc({layout.elements}, dtype);
  ops.upload(exec, host, flat);
  ops.synchronize(exec);  // training, which probes it, and serving have queues of their own
  return layout.view(config, flat, std::move(own));
}

std::shared_ptr<const AdapterWeights> build_adapter(kernels::Ops& ops, kernels::Exec& exec,
                                                    kernels::Allocator& allocator,
                                                    kernels::MemoryLedger& ledger,
                                                    const ModelConfig& config, DType dtype,
                                                    const FlatAdapter& adapter) {
  return AdapterRoom(ops, exec, allocator, ledger, adapter.layout.elements, dtype)
      .fill(ops, exec, config, adapter);
}

AdapterRoom::AdapterRoom(kernels::Ops& ops, kernels::Exec& exec, kernels::Allocator& allocator,
                         kernels::MemoryLedger& ledger, std::int64_t elements, DType dtype) {
  auto own = std::make_shared<OwnArena>(allocator, ledger, elements * dtype_bytes(dtype));
  flat_ = own->arena.alloc({elements}, dtype);
  storage_ = std::move(own);
  ops.fill_zero(exec, flat_);
}

std::shared_ptr<const AdapterWeights> AdapterRoom::fill(kernels::Ops& ops, kernels::Exec& exec,
                                                        const ModelConfig& config,
                                                        const FlatAdapter& adapter) {
  TANDEM_CHECK(storage_ != nullptr, "an adapter's room is filled once");
  TANDEM_CHECK_EQ(adapter.layout.elements, flat_.elements());
  if (adapter.dtype == flat_.dtype)
    ops.upload(exec, adapter.bytes, flat_);
  else
    ops.upload(exec, adapter.in(flat_.dtype).bytes, flat_);
  return adapter.layout.view(config, flat_, std::move(storage_));
}

// -- table
// -----------------------------------------------------------------------------------------

AdapterTable::AdapterTable(kernels::Ops& ops, kernels::Exec& exec, kernels::Arena& arena,
                           const ModelConfig& config, std::int64_t slots)
    : ops_(ops), config_(config), slots_(slots) {
  TANDEM_CHECK_GE(slots, 1);
  const std::int64_t site_bytes = slots * static_cast<std::int64_t>(sizeof(kernels::LoraEntry));
  entries_.resize(static_cast<std::size_t>(config.layers * kSiteCount * slots));
  held_.resize(static_cast<std::size_t>(slots));
  table_ = arena.alloc({config.layers * kSiteCount * site_bytes}, DType::kU8);
  sites_.resize(static_cast<std::size_t>(config.layers));
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    for (std::size_t fused = 0; fused < kFusedSites.size(); ++fused) {
      const auto [first, count] = kFusedSites[fused];
      std::int64_t n_begin = 0;
      for (int s = first; s < first + count; ++s) {
        const std::int64_t index = layer * kSiteCount + s;
        const std::int64_t n = site_shape(config, Site{s}).n;
        sites_[static_cast<std::size_t>(layer)][fused].push_back(
            {n_begin, n, table_.rows(index * site_bytes, site_bytes),
             static_cast<std::uint64_t>(index) + 1});
        n_begin += n;
      }
    }
  }
  upload(exec);
}

kernels::LoraEntry& AdapterTable::entry(std::int64_t layer, Site site, std::int64_t slot) {
  return entries_[static_cast<std::size_t>(
      (layer * kSiteCount + static_cast<std::int64_t>(site)) * slots_ + slot)];
}

void AdapterTable::erase(std::int64_t slot) {
  TANDEM_CHECK(slot >= 0 && slot < slots_, "slot ", slot, " of ", slots_);
  for (std::int64_t layer = 0; layer < config_.layers; ++layer)
    for (int s = 0; s < kSiteCount; ++s) entry(layer, Site{s}, slot) = {};
}

void AdapterTable::upload(kernels::Exec& exec) {
  ops_.upload(exec, std::as_bytes(std::span(entries_)), table_);
}

void AdapterTable::set(kernels::Exec& exec, std::int64_t slot,
                       std::shared_ptr<const AdapterWeights> weights) {
  erase(slot);
  TANDEM_CHECK_EQ(static_cast<std::int64_t>(weights->pairs.size()), config_.layers);
  for (std::int64_t layer = 0; layer < config_.layers; ++layer)
    for (int s = 0; s < kSiteCount; ++s)
      if (const auto& pair =
              weights->pairs[static_cast<std::size_t>(layer)][static_cast<std::size_t>(s)])
        entry(layer, Site{s}, slot) = {pair->a.data, pair->b.data, nullptr,
                                       nullptr,      pair->rank,   pair->scale};
  upload(exec);
  held_[static_cast<std::size_t>(slot)] = std::move(weights);
}

void AdapterTable::set_trainable(
    kernels::Exec& exec, std::int64_t slot,
    const std::vector<std::array<std::optional<TrainablePair>, kSiteCount>>& pairs) {
  erase(slot);
  TANDEM_CHECK_EQ(static_cast<std::int64_t>(pairs.size()), config_.layers);
  for (std::int64_t layer = 0; layer < config_.layers; ++layer)
    for (int s = 0; s < kSiteCount; ++s)
      if (const auto& t = pairs[static_cast<std::size_t>(layer)][static_cast<std::size_t>(s)])
        // (f64 on the exact backend, which knows)
        entry(layer, Site{s}, slot) = {t->pair.a.data,
                                       t->pair.b.data,
                                       static_cast<float*>(t->da.data),
                                       static_cast<float*>(t->db.data),
                                       t->pair.rank,
                                       t->pair.scale};
  upload(exec);
  held_[static_cast<std::size_t>(slot)] = nullptr;
}

void AdapterTable::clear(kernels::Exec& exec, std::int64_t slot) {
  erase(slot);
  upload(exec);
  held_[static_cast<std::size_t>(slot)] = nullptr;
}

const std::vector<kernels::LoraSite>& AdapterTable::sites(std::int64_t layer, Fused fused) const {
  return sites_.at(static_cast<std::size_t>(layer)).at(static_cast<std::size_t>(fused));
}

}  // namespace tandem::worker::model
