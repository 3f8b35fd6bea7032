#include "worker/model/base_weights.h"

#include "worker/model/flat_layout.h"
#include "worker/model/host_copy.h"

#include <array>

namespace tandem::worker::model {

namespace {

constexpr std::array<const char*, kSiteCount> kSiteNames{
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"};

/// Packs and uploads with the same few arguments.
class Loader {
 public:
  Loader(kernels::Ops& ops, kernels::Exec& exec, kernels::Arena& arena, const ModelConfig& config,
         DType dtype, const TensorSource& source)
      : ops_(ops), exec_(exec), arena_(arena), config_(config), dtype_(dtype), source_(source) {}

  kernels::PackedWeight matrix(const std::string& name, std::int64_t n, std::int64_t i) {
    return ops_.pack_weight(exec_, arena_, dtype_, n, i,
                            [&](std::int64_t row, std::int64_t rows, float* out) {
                              source_.read_rows(name, row, rows, out);
                            });
  }

  /// Sites stacked in order into one matrix; a block of rows may cross from one to the next.
  kernels::PackedWeight stacked(std::int64_t layer, std::initializer_list<Site> sites) {
    std::int64_t n = 0;
    for (Site site : sites) n += site_shape(config_, site).n;
    const std::int64_t i = site_shape(config_, *sites.begin()).i;
    return ops_.pack_weight(
        exec_, arena_, dtype_, n, i, [&](std::int64_t row, std::int64_t rows, float* out) {
          std::int64_t begin = 0;
          for (Site site : sites) {
            const std::int64_t end = begin + site_shape(config_, site).n;
            const std::int64_t from = std::max(row, begin), to = std::min(row + rows, end);
            if (from < to)
              source_.read_rows(weight_name(layer, site), from - begin, to - from,
                                out + (from - row) * i);
            begin = end;
          }
        });
  }

  kernels::Tensor vector(const std::vector<std::string>& names,
                         const std::vector<std::int64_t>& sizes) {
    std::vector<float> values;
    for (std::size_t part = 0; part < names.size(); ++part) {
      const std::size_t at = values.size();
      values.resize(at + static_cast<std::size_t>(sizes[part]));
      source_.read_rows(names[part], 0, sizes[part], values.data() + at);
    }
    return upload(values, dtype_);
  }

  kernels::Tensor upload(const std::vector<float>& values, DType dtype) {
    kernels::Tensor tensor = arena_.alloc({static_cast<std::int64_t>(values.size())}, dtype);
    upload_floats(ops_, exec_, values, tensor);
    return tensor;
  }

  BlockWeights block(std::int64_t layer) {
    BlockWeights block;
    block.attention_norm = vector({attention_norm_name(layer)}, {config_.width});
    block.mlp_norm = vector({mlp_norm_name(layer)}, {config_.width});
    block.qkv = stacked(layer, {Site::kQ, Site::kK, Site::kV});
    if (config_.qkv_bias)
      block.qkv_bias = vector(
          {bias_name(layer, Site::kQ), bias_name(layer, Site::kK), bias_name(layer, Site::kV)},
          {config_.heads * config_.head_dim, config_.kv_heads * config_.head_dim,
           config_.kv_heads * config_.head_dim});
    if (config_.qk_norm)
      block.qk_norm =
          vector({q_norm_name(layer), k_norm_name(layer)}, {config_.head_dim, config_.head_dim});
    block.o = stacked(layer, {Site::kO});
    block.gate_up = stacked(layer, {Site::kGate, Site::kUp});
    block.down = stacked(layer, {Site::kDown});
    return block;
  }

 private:
  kernels::Ops& ops_;
  kernels::Exec& exec_;
  kernels::Arena& arena_;
  const ModelConfig& config_;
  const DType dtype_;
  const TensorSource& source_;
};

class ResidentWeights final : public WeightSource {
 public:
  explicit ResidentWeights(std::shared_ptr<const BaseWeights> base) : base_(std::move(base)) {}
  const BlockWeights& acquire(std::int64_t layer, Phase) override { return base_->block(layer); }
  void release(std::int64_t, Phase) override {}
  [[nodiscard]] const BaseWeights& base() const override { return *base_; }

 private:
  const std::shared_ptr<const BaseWeights> base_;
};

}  // namespace

const char* site_name(Site site) {
  return kSiteNames.at(static_cast<std::size_t>(site));
}

std::string site_path(std::int64_t layer, Site site) {
  const char* module = site >= Site::kGate ? ".mlp." : ".self_attn.";
  return str("model.layers.", layer, module, site_name(site));
}

std::string weight_name(std::int64_t layer, Site site) {
  return site_path(layer, site) + ".weight";
}
std::string bias_name(std::int64_t layer, Site site) {
  return site_path(layer, site) + ".bias";
}
std::string attention_norm_name(std::int64_t layer) {
  return str("model.layers.", layer, ".input_layernorm.weight");
}
std::string mlp_norm_name(std::int64_t layer) {
  return str("model.layers.", layer, ".post_attention_layernorm.weight");
}

std::string q_norm_name(std::int64_t layer) {
  return str("model.layers.", layer, ".self_attn.q_norm.weight");
}
std::string k_norm_name(std::int64_t layer) {
  return str("model.layers.", layer, ".self_attn.k_norm.weight");
}

SiteShape site_shape(const ModelConfig& config, Site site) {
  const std::int64_t q = config.heads * config.head_dim, kv = config.kv_heads * config.head_dim;
  switch (site) {
    case Site::kQ:
      return {q, config.width};
    case Site::kK:
    case Site::kV:
      return {kv, config.width};
    case Site::kO:
      return {config.width, q};
    case Site::kGate:
    case Site::kUp:
      return {config.mlp_width, config.width};
    case Site::kDown:
      return {config.width, config.mlp_width};
  }
  return {};
}

std::vector<TensorSpec> expected_tensors(const ModelConfig& config) {
  std::vector<TensorSpec> specs{{kEmbeddingName, config.vocab, config.width},
                                {kFinalNormName, config.width, 0}};
  if (!config.tied_embedding) specs.push_back({kHeadName, config.vocab, config.width});
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    specs.push_back({attention_norm_name(layer), config.width, 0});
    specs.push_back({mlp_norm_name(layer), config.width, 0});
    if (config.qk_norm)
      for (const std::string& name : {q_norm_name(layer), k_norm_name(layer)})
        specs.push_back({name, config.head_dim, 0});
    for (int s = 0; s < kSiteCount; ++s) {
      const Site site{s};
      const SiteShape shape = site_shape(config, site);
      specs.push_back({weight_name(layer, site), shape.n, shape.i});
      if (config.qkv_bias && site <= Site::kV)
        specs.push_back({bias_name(layer, site), shape.n, 0});
    }
  }
  return specs;
}

Result<std::shared_ptr<BaseWeights>> BaseWeights::describe(const ModelConfig& whole, DType dtype,
                                                           const TensorSource& source,
                                                           const ModelShard& shard) {
  TANDEM_CHECK(is_stored_float(dtype) || dtype == DType::kF64, dtype_name(dtype));
  TANDEM_RETURN_IF_ERROR(whole.validate());
  for (const TensorSpec& spec : expected_tensors(whole))
    TANDEM_RETURN_IF_ERROR(source.has(spec.name, spec.n, spec.i));
  auto weights = std::make_shared<BaseWeights>();
  weights->config_ = local_config(whole, shard);
  weights->whole_config_ = whole;
  weights->shard_ = shard;
  weights->shard_.stages = shard.stages_of(whole);
  weights->dtype_ = dtype;
  return weights;
}

Result<std::shared_ptr<const BaseWeights>> BaseWeights::sizes_alone(const ModelConfig& config,
                                                                    DType dtype,
                                                                    const TensorSource& source,
                                                                    const ModelShard& shard) {
  TANDEM_ASSIGN_OR_RETURN(auto weights, describe(config, dtype, source, shard));
  return std::shared_ptr<const BaseWeights>(std::move(weights));
}

Result<std::shared_ptr<const BaseWeights>> BaseWeights::load(
    kernels::Ops& ops, kernels::Exec& exec, kernels::Arena& arena, const ModelConfig& whole,
    DType dtype, const TensorSource& whole_source, const ModelShard& shard, bool with_blocks) {
  TANDEM_ASSIGN_OR_RETURN(auto weights, describe(whole, dtype, whole_source, shard));
  const ModelConfig& config = weights->config_;
  const std::unique_ptr<TensorSource> part = make_shard_source(whole_source, whole, shard);
  const TensorSource& source = shard.tp_size == 1 ? whole_source : *part;
  Loader loader(ops, exec, arena, config, dtype, source);
  if (weights->embeds() || (config.tied_embedding && weights->has_head()))
    weights->embedding_ = loader.matrix(kEmbeddingName, config.vocab, config.width);
  if (!config.tied_embedding && weights->has_head())
    weights->lm_head_ = loader.matrix(kHeadName, config.vocab, config.width);
  weights->final_norm_ = loader.vector({kFinalNormName}, {config.width});
  const RopeTable rope = make_rope_table(config);
  weights->inv_freq_ = loader.upload(rope.inv_freq, DType::kF32);
  weights->rope_attention_factor_ = rope.attention_factor;
  weights->blocks_.resize(static_cast<std::size_t>(config.layers));
  if (with_blocks)
    for (const std::int64_t layer : shard.blocks(whole))
      weights->blocks_[static_cast<std::size_t>(layer)] = loader.block(layer);
  return std::shared_ptr<const BaseWeights>(std::move(weights));
}

std::unique_ptr<WeightSource> make_resident_weights(std::shared_ptr<const BaseWeights> base) {
  return std::make_unique<ResidentWeights>(std::move(base));
}

}  // namespace tandem::worker::model
