#include "worker/model/peft.h"

#include <charconv>
#include <set>

namespace tandem::worker::model {

namespace {

Result<std::vector<float>> to_floats(const storage::TensorInfo& tensor) {
  std::vector<float> values(static_cast<std::size_t>(tensor.numel()));
  if (!is_stored_float(tensor.dtype))
    return invalid_error(str("adapter tensor ", tensor.name, " is ", dtype_name(tensor.dtype),
                             "; it must be f32, bf16 or f16"));
  load_floats(tensor.bytes.data(), tensor.dtype, values);
  return values;
}

Status check_shape(const storage::TensorInfo& tensor, std::int64_t rows, std::int64_t columns) {
  if (tensor.shape == std::vector<std::int64_t>{rows, columns}) return {};
  std::string have;
  for (std::int64_t d : tensor.shape) have += str(have.empty() ? "" : ", ", d);
  return invalid_error(str("the adapter does not fit the base model: ", tensor.name, " has shape [",
                           have, "], the base model needs [", rows, ", ", columns, "]"));
}

storage::TensorInfo append(std::string name, std::vector<std::int64_t> shape,
                           const std::vector<float>& values, DType dtype, std::byte*& at) {
  std::byte* const begin = at;
  store_floats(values, dtype, begin);
  at += values.size() * static_cast<std::size_t>(dtype_bytes(dtype));
  return {std::move(name), dtype, std::move(shape),
          std::span<const std::byte>(begin, static_cast<std::size_t>(at - begin))};
}

}  // namespace

std::optional<std::pair<std::int64_t, Site>> parse_site_path(std::string_view path) {
  constexpr std::string_view kPrefix = "model.layers.";
  if (!path.starts_with(kPrefix)) return {};
  const std::string_view rest = path.substr(kPrefix.size());
  std::int64_t layer = 0;
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), layer);
  if (error != std::errc() || layer < 0) return {};
  for (int s = 0; s < kSiteCount; ++s)
    if (site_path(layer, Site{s}) == path) return std::pair(layer, Site{s});
  return {};
}

std::vector<std::string> sites_without_tensors(const storage::PeftAdapter& adapter) {
  std::set<std::int64_t> layers;
  std::set<std::string> paths;
  for (const storage::AdapterTensors& site : adapter.sites) {
    paths.insert(site.site);
    if (const auto place = parse_site_path(site.site)) layers.insert(place->first);
  }
  std::vector<std::string> without;
  for (const std::int64_t layer : layers)
    for (const std::string& target : adapter.config.target_modules)
      for (int s = 0; s < kSiteCount; ++s) {
        const std::string path = site_path(layer, Site{s});
        if (target == site_name(Site{s}) && !paths.contains(path)) without.push_back(path);
      }
  return without;
}

Result<std::vector<HostAdapterTensor>> from_peft(const ModelConfig& config,
                                                 std::span<const storage::AdapterTensors> sites) {
  std::vector<HostAdapterTensor> tensors;
  for (const storage::AdapterTensors& from : sites) {
    const auto place = parse_site_path(from.site);
    if (!place || place->first >= config.layers)
      return invalid_error(str("the adapter has tensors for ", from.site,
                               ", which the base model does not have as a trainable linear layer "
                               "(its layers are 0..",
                               config.layers - 1, ")"));
    const SiteShape shape = site_shape(config, place->second);
    const std::int64_t rank = from.a.shape.empty() ? 0 : from.a.shape[0];
    TANDEM_RETURN_IF_ERROR(check_shape(from.a, rank, shape.i));
    TANDEM_RETURN_IF_ERROR(check_shape(from.b, shape.n, rank));
    HostAdapterTensor tensor{
        place->first, place->second, rank, static_cast<float>(from.scale), {}, {}};
    TANDEM_ASSIGN_OR_RETURN(tensor.a, to_floats(from.a));
    TANDEM_ASSIGN_OR_RETURN(tensor.b, to_floats(from.b));
    tensors.push_back(std::move(tensor));
  }
  TANDEM_RETURN_IF_ERROR(check_adapter(config, tensors));
  return tensors;
}

std::unique_ptr<const PeftImage> to_peft(const ModelConfig& config, const LoraConfig& lora,
                                         const std::vector<HostAdapterTensor>& tensors, DType dtype,
                                         const std::string& base_model_name) {
  TANDEM_CHECK(is_stored_float(dtype), dtype_name(dtype));
  auto image = std::make_unique<PeftImage>();
  image->config.r = lora.r;
  image->config.lora_alpha = lora.lora_alpha;
  image->config.lora_dropout = lora.lora_dropout;
  image->config.use_rslora = lora.use_rslora;
  for (Site site : lora.target_modules) image->config.target_modules.emplace_back(site_name(site));
  image->config.base_model_name_or_path = base_model_name;
  std::size_t values = 0;
  for (const HostAdapterTensor& tensor : tensors) values += tensor.a.size() + tensor.b.size();
  image->bytes.resize(values * static_cast<std::size_t>(dtype_bytes(dtype)));
  std::byte* at = image->bytes.data();
  for (const HostAdapterTensor& tensor : tensors) {
    const SiteShape shape = site_shape(config, tensor.site);
    storage::AdapterTensors site;
    site.site = site_path(tensor.layer, tensor.site);
    // The file's scale follows from its configuration in f64; ours is that, rounded to f32.
    site.scale = image->config.scale(site.site, tensor.rank);
    TANDEM_CHECK_EQ(static_cast<float>(site.scale), tensor.scale, site.site);
    site.a = append(site.site + ".lora_A.weight", {tensor.rank, shape.i}, tensor.a, dtype, at);
    site.b = append(site.site + ".lora_B.weight", {shape.n, tensor.rank}, tensor.b, dtype, at);
    image->sites.push_back(std::move(site));
  }
  return image;
}

}  // namespace tandem::worker::model
