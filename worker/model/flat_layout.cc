#include "worker/model/flat_layout.h"

#include "protocol/base/processors.h"
#include "worker/model/host_copy.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <map>
#include <mutex>
#include <thread>

namespace tandem::worker::model {

namespace {

using kernels::Tensor;

std::int64_t aligned_up(std::int64_t elements) {
  return (elements + kFlatAlignment - 1) / kFlatAlignment * kFlatAlignment;
}

/// [begin of first, end of last) of neighbours in the layout as one matrix.
Tensor stack(const FlatLayout& layout, std::size_t first, std::size_t count, const Tensor& flat) {
  const FlatTensor& head = layout.tensors[first];
  std::int64_t rows = 0;
  for (std::size_t k = first; k < first + count; ++k) rows += layout.tensors[k].slice.rows;
  Tensor view = flat.rows(head.begin, rows * head.slice.columns);
  return head.shape.size() == 1 ? view : view.reshaped({rows, head.slice.columns});
}

/// Slice rows [row, row + rows) of a tensor of the source.
void read_slice(const TensorSource& source, const FlatTensor& t, std::int64_t row,
                std::int64_t rows, float* out) {
  const TensorSlice& slice = t.slice;
  if (t.shape.size() == 1) {  // a vector: some formats read only whole ones
    std::vector<float> all(static_cast<std::size_t>(t.shape[0]));
    source.read_rows(t.name, 0, t.shape[0], all.data());
    std::copy_n(all.begin() + slice.row + row, rows, out);
    return;
  }
  if (slice.columns == t.shape[1]) return source.read_rows(t.name, slice.row + row, rows, out);
  std::vector<float> whole(static_cast<std::size_t>(t.shape[1]));
  for (std::int64_t r = 0; r < rows; ++r) {
    source.read_rows(t.name, slice.row + row + r, 1, whole.data());
    std::copy_n(whole.begin() + slice.column, slice.columns, out + r * slice.columns);
  }
}

constexpr std::int64_t kReadElements = 4 << 20;  ///< at a time, by one thread
constexpr std::size_t kReadThreadsMax = 8;

/// Rows [row, row + rows) of a tensor's slice.
struct RowsToRead {
  const FlatTensor* tensor;
  std::int64_t row, rows;
};
/// Those that have elements [begin, end) of the buffer.
std::vector<RowsToRead> rows_to_read(const FlatLayout& layout, std::int64_t begin,
                                     std::int64_t end) {
  std::vector<RowsToRead> all;
  for (const FlatTensor& t : layout.tensors) {
    const std::int64_t columns = t.slice.columns;
    const std::int64_t from = std::max(begin, t.begin) - t.begin;
    const std::int64_t until = std::min(end, t.begin + t.slice.elements()) - t.begin;
    if (from >= until) continue;
    // A vector is one piece: some formats read only whole ones.
    const std::int64_t last = (until + columns - 1) / columns;
    const std::int64_t step =
        t.shape.size() == 1 ? last : std::max<std::int64_t>(1, kReadElements / columns);
    for (std::int64_t row = from / columns; row < last; row += step)
      all.push_back({&t, row, std::min(step, last - row)});
  }
  return all;
}

class ShardSource final : public TensorSource {
 public:
  ShardSource(const TensorSource& source, const ModelConfig& config, const ModelShard& shard)
      : source_(source) {
    const auto add = [&](const FlatLayout& layout) {
      for (const FlatTensor& tensor : layout.tensors) tensors_.emplace(tensor.name, tensor);
    };
    add(ends_layout(config, {shard.tp_rank, shard.tp_size, {}}));
    for (std::int64_t layer = 0; layer < config.layers; ++layer)
      add(block_layout(config, shard, layer));
  }
  void read_rows(const std::string& name, std::int64_t row, std::int64_t rows,
                 float* out) const override {
    read_slice(source_, tensors_.at(name), row, rows, out);
  }
  [[nodiscard]] Status has(const std::string& name, std::int64_t n, std::int64_t i) const override {
    const FlatTensor& t = tensors_.at(name);
    TANDEM_CHECK(t.slice.rows == n && t.slice.columns == std::max<std::int64_t>(1, i), name);
    return source_.has(name, t.shape[0], t.shape.size() == 1 ? 0 : t.shape[1]);
  }

 private:
  const TensorSource& source_;
  std::map<std::string, FlatTensor> tensors_;
};

/// The elements of a weight that is plain rows.
Tensor plain(const kernels::PackedWeight& weight) {
  return {weight.storage.data, weight.dtype, {weight.n * weight.i}};
}

void repack(kernels::Ops& ops, kernels::Exec& exec, const Tensor& from,
            const kernels::PackedWeight& to) {
  kernels::PackedWeight weight = to;  // the same memory: its owner lets it change
  ops.repack_weight(exec, {from, &weight});
}

}  // namespace

FlatTensor& FlatLayout::add(std::string name, std::vector<std::int64_t> shape,
                            const TensorSlice& slice, bool aligned) {
  if (aligned) elements = aligned_up(elements);
  tensors.push_back({std::move(name), std::move(shape), slice, elements});
  elements += slice.elements();
  return tensors.back();
}

const FlatTensor* FlatLayout::find(const std::string& name) const {
  const auto it = std::find_if(tensors.begin(), tensors.end(),
                               [&](const FlatTensor& t) { return t.name == name; });
  return it == tensors.end() ? nullptr : &*it;
}

FlatLayout block_layout(const ModelConfig& config, const ModelShard& shard, std::int64_t layer) {
  FlatLayout layout;
  const bool first_rank = shard.tp_rank == 0;
  const TensorSlice whole{0, config.width, 0, 1};
  layout.add(attention_norm_name(layer), {config.width}, whole).counted = first_rank;
  layout.add(mlp_norm_name(layer), {config.width}, whole).counted = first_rank;
  const auto matrix = [&](Site site, bool aligned) {
    const SiteShape shape = site_shape(config, site);
    layout.add(weight_name(layer, site), {shape.n, shape.i}, weight_slice(config, site, shard),
               aligned);
  };
  for (Site site : {Site::kQ, Site::kK, Site::kV}) matrix(site, site == Site::kQ);
  if (config.qkv_bias)
    for (Site site : {Site::kQ, Site::kK, Site::kV})
      layout.add(bias_name(layer, site), {site_shape(config, site).n},
                 bias_slice(config, site, shard), site == Site::kQ);
  if (config.qk_norm)
    for (const std::string& name : {q_norm_name(layer), k_norm_name(layer)}) {
      FlatTensor& norm = layout.add(name, {config.head_dim}, {0, config.head_dim, 0, 1},
                                    name == q_norm_name(layer));
      norm.partial = shard.tp_size > 1;  // each rank has heads of its own
      norm.counted = first_rank;
    }
  matrix(Site::kO, true);
  matrix(Site::kGate, true);
  matrix(Site::kUp, false);
  matrix(Site::kDown, true);
  layout.elements = aligned_up(layout.elements);
  return layout;
}

FlatLayout ends_layout(const ModelConfig& config, const ModelShard& shard) {
  FlatLayout layout;
  const bool first = shard.embeds(config), last = shard.has_head(config);
  const TensorSlice entries = vocab_slice(config, shard);
  if (first || (last && config.tied_embedding))
    layout.add(kEmbeddingName, {config.vocab, config.width}, entries).counted = first;
  if (last && !config.tied_embedding) layout.add(kHeadName, {config.vocab, config.width}, entries);
  if (last)
    layout.add(kFinalNormName, {config.width}, {0, config.width, 0, 1}).counted =
        shard.tp_rank == 0;
  layout.elements = aligned_up(layout.elements);
  return layout;
}

BlockGrads block_views(const FlatLayout& layout, const Tensor& flat) {
  std::size_t next = 0;
  const auto take = [&](std::size_t count) {
    TANDEM_CHECK_LE(next + count, layout.tensors.size(), " tensors of a block");
    const Tensor view = stack(layout, next, count, flat);
    next += count;
    return view;
  };
  const auto follows = [&](const char* ending) {
    return next < layout.tensors.size() && layout.tensors[next].name.ends_with(ending);
  };
  BlockGrads views;
  views.attention_norm = take(1);
  views.mlp_norm = take(1);
  views.qkv = take(3);
  if (follows(".bias")) views.qkv_bias = take(3);
  if (follows(".q_norm.weight")) views.qk_norm = take(2);
  views.o = take(1);
  views.gate_up = take(2);
  views.down = take(1);
  TANDEM_CHECK_EQ(next, layout.tensors.size(), " tensors of a block");
  return views;
}

BlockWeights block_weights(const FlatLayout& layout, const Tensor& flat) {
  const BlockGrads views = block_views(layout, flat);
  const auto weight = [](const Tensor& x) {
    return kernels::PackedWeight{{x.data, DType::kU8, {x.bytes()}}, x.dtype, x.dim(0), x.dim(1)};
  };
  return {views.attention_norm, views.mlp_norm,        weight(views.qkv),  views.qkv_bias,
          weight(views.o),      weight(views.gate_up), weight(views.down), views.qk_norm};
}

EndGrads end_views(const FlatLayout& layout, const Tensor& flat) {
  EndGrads views;
  const auto view = [&](const char* name) {
    const FlatTensor* tensor = layout.find(name);
    return tensor == nullptr ? Tensor{} : tensor_view(*tensor, flat);
  };
  views.embedding = view(kEmbeddingName);
  views.head = view(kHeadName);
  views.final_norm = view(kFinalNormName);
  if (!views.head.defined() && views.final_norm.defined()) views.head = views.embedding;  // tied
  return views;
}

Tensor tensor_view(const FlatTensor& tensor, const Tensor& flat) {
  const Tensor view = flat.rows(tensor.begin, tensor.slice.elements());
  return tensor.shape.size() == 1 ? view : view.reshaped({tensor.slice.rows, tensor.slice.columns});
}

void upload_flat(kernels::Ops& ops, kernels::Exec& exec, const TensorSource& source,
                 const FlatLayout& layout, std::int64_t begin, const Tensor& to) {
  const std::int64_t end = begin + to.elements();
  std::vector<std::byte> host(static_cast<std::size_t>(to.bytes()));
  const std::vector<RowsToRead> all = rows_to_read(layout, begin, end);
  std::atomic<std::size_t> next{0};
  std::exception_ptr failure;
  std::mutex mutex;
  const auto read = [&] {
    try {
      std::vector<float> rows;
      for (std::size_t k = next++; k < all.size(); k = next++) {
        const auto& [t, row, count] = all[k];
        const std::int64_t columns = t->slice.columns, first = t->begin + row * columns;
        rows.resize(static_cast<std::size_t>(count * columns));
        read_slice(source, *t, row, count, rows.data());
        const std::int64_t from = std::max(first, begin);
        const std::int64_t size = std::min(first + count * columns, end) - from;
        store_values(std::span(rows).subspan(static_cast<std::size_t>(from - first),
                                             static_cast<std::size_t>(size)),
                     to.dtype, host.data() + (from - begin) * dtype_bytes(to.dtype));
      }
    } catch (...) {
      const std::lock_guard lock(mutex);
      failure = std::current_exception();
      next = all.size();
    }
  };
  {
    const auto threads = std::min<std::size_t>(
        {all.size(), kReadThreadsMax, static_cast<std::size_t>(processors())});
    std::vector<std::jthread> others;
    for (std::size_t t = 1; t < threads; ++t) others.emplace_back(read);
    read();
  }
  if (failure) std::rethrow_exception(failure);
  ops.upload(exec, host, to);
}

void unpack_block(kernels::Ops& ops, kernels::Exec& exec, const FlatLayout& layout,
                  const Tensor& flat, const BlockWeights& to) {
  const BlockGrads from = block_views(layout, flat);
  ops.copy(exec, from.attention_norm, to.attention_norm);
  ops.copy(exec, from.mlp_norm, to.mlp_norm);
  if (from.qkv_bias.defined()) ops.copy(exec, from.qkv_bias, to.qkv_bias);
  if (from.qk_norm.defined()) ops.copy(exec, from.qk_norm, to.qk_norm);
  repack(ops, exec, from.qkv, to.qkv);
  repack(ops, exec, from.o, to.o);
  repack(ops, exec, from.gate_up, to.gate_up);
  repack(ops, exec, from.down, to.down);
}

std::vector<PlainRows> plain_block(const FlatLayout& layout, const BlockWeights& block) {
  std::vector<PlainRows> all;
  std::size_t tensor = 0;
  const auto add = [&](const Tensor& values, std::size_t stacked) {
    all.push_back({layout.tensors.at(tensor).begin, values, layout.tensors.at(tensor).decays()});
    tensor += stacked;
  };
  add(block.attention_norm, 1);
  add(block.mlp_norm, 1);
  add(plain(block.qkv), 3);
  if (block.qkv_bias.defined()) add(block.qkv_bias, 3);
  if (block.qk_norm.defined()) add(block.qk_norm, 2);
  add(plain(block.o), 1);
  add(plain(block.gate_up), 2);
  add(plain(block.down), 1);
  TANDEM_CHECK_EQ(tensor, layout.tensors.size());
  return all;
}

std::vector<PlainRows> plain_ends(const FlatLayout& layout, const BaseWeights& ends) {
  std::vector<PlainRows> all;
  for (const FlatTensor& tensor : layout.tensors)
    all.push_back({tensor.begin,
                   tensor.name == kEmbeddingName ? plain(ends.embedding())
                   : tensor.name == kHeadName    ? plain(ends.lm_head())
                                                 : ends.final_norm(),
                   tensor.decays()});
  return all;
}

void unpack_ends(kernels::Ops& ops, kernels::Exec& exec, const FlatLayout& layout,
                 const Tensor& flat, const BaseWeights& to) {
  const EndGrads from = end_views(layout, flat);
  if (from.embedding.defined()) repack(ops, exec, from.embedding, to.embedding());
  if (from.head.defined() && from.head.data != from.embedding.data)
    repack(ops, exec, from.head, to.lm_head());
  if (from.final_norm.defined()) ops.copy(exec, from.final_norm, to.final_norm());
}

BlockWeights allocate_block(kernels::Ops& ops, kernels::Arena& arena, const ModelConfig& local,
                            DType dtype) {
  const std::int64_t q = local.heads * local.head_dim, kv = local.kv_heads * local.head_dim;
  const auto matrix = [&](std::int64_t n, std::int64_t i) {
    kernels::PackedWeight weight{{}, dtype, n, i};
    weight.storage = arena.alloc({ops.packed_weight_bytes(dtype, n, i)}, DType::kU8);
    return weight;
  };
  BlockWeights block;
  block.attention_norm = arena.alloc({local.width}, dtype);
  block.mlp_norm = arena.alloc({local.width}, dtype);
  block.qkv = matrix(q + 2 * kv, local.width);
  if (local.qkv_bias) block.qkv_bias = arena.alloc({q + 2 * kv}, dtype);
  if (local.qk_norm) block.qk_norm = arena.alloc({2 * local.head_dim}, dtype);
  block.o = matrix(local.width, q);
  block.gate_up = matrix(2 * local.mlp_width, local.width);
  block.down = matrix(local.width, local.mlp_width);
  return block;
}

std::unique_ptr<TensorSource> make_shard_source(const TensorSource& source,
                                                const ModelConfig& config,
                                                const ModelShard& shard) {
  return std::make_unique<ShardSource>(source, config, shard);
}

}  // namespace tandem::worker::model
