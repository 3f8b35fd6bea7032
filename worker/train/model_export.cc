#include "worker/train/model_export.h"

#include "storage/file_io.h"
#include "storage/safetensors.h"
#include "worker/model/base_weights.h"
#include "worker/model/model_loader.h"
#include "worker/train/state_pieces.h"

#include <nlohmann/json.hpp>

#include <filesystem>
#include <list>
#include <map>

namespace tandem::worker::train {

namespace {

namespace fs = std::filesystem;

/// Everything but weights.
Status copy_side_files(const fs::path& base, const fs::path& to) {
  std::error_code error;
  fs::create_directories(to, error);
  if (error) return refused_error(str("cannot make ", to.string(), ": ", error.message()));
  for (const fs::directory_entry& entry : fs::directory_iterator(base, error)) {
    const std::string name = entry.path().filename().string();
    if (!entry.is_regular_file() || name.find(".safetensors") != std::string::npos ||
        name == "config.json")
      continue;
    fs::copy_file(entry.path(), to / name, fs::copy_options::overwrite_existing, error);
    if (error)
      return refused_error(str("cannot copy ", entry.path().string(), ": ", error.message()));
  }
  if (error) return not_found_error(str("cannot read ", base.string(), ": ", error.message()));
  return {};
}

Status write_config(const fs::path& base, const fs::path& to, DType dtype) {
  TANDEM_ASSIGN_OR_RETURN(
      const std::string text,
      storage::read_file((base / "config.json").string(), model::kConfigBytesMax));
  auto json = nlohmann::ordered_json::parse(text, nullptr, false);
  if (!json.is_object()) return corrupt_error(str(base.string(), "/config.json is no JSON object"));
  const char* name = dtype == DType::kF32 ? "float32" : "bfloat16";
  for (const char* key : {"torch_dtype", "dtype"})
    if (json.contains(key)) json[key] = name;
  return storage::write_file_durably((to / "config.json").string(), json.dump(2));
}

}  // namespace

Status export_model(const std::string& base, const std::string& to,
                    const model::ModelConfig& config, const TrainState& state, DType dtype) {
  TANDEM_CHECK(dtype == DType::kF32 || dtype == DType::kBF16, dtype_name(dtype));
  std::map<std::string, const StateTensor*> by_name;
  for (const StateTensor& tensor : state.tensors) by_name.emplace(tensor.name, &tensor);
  std::vector<storage::TensorInfo> infos;
  std::list<std::vector<bf16>> narrow;
  for (const model::TensorSpec& spec : expected_tensors(config)) {
    const auto it = by_name.find(spec.name + ".param");
    if (it == by_name.end()) return corrupt_error(str("the state has no tensor ", spec.name));
    const std::vector<float>& values = it->second->values;
    storage::TensorInfo info;
    info.name = spec.name;
    info.dtype = dtype;
    info.shape = spec.i == 0 ? std::vector{spec.n} : std::vector{spec.n, spec.i};
    if (it->second->shape != info.shape || it->second->slice.rows != 0 ||
        static_cast<std::int64_t>(values.size()) != info.numel())
      return corrupt_error(str("the state's ", spec.name, " is not the whole tensor"));
    info.bytes = std::as_bytes(std::span(values));
    if (dtype == DType::kBF16) {
      auto& rounded = narrow.emplace_back(values.size());
      for (std::size_t e = 0; e < values.size(); ++e) rounded[e] = to_bf16(values[e]);
      info.bytes = std::as_bytes(std::span(rounded));
    }
    infos.push_back(std::move(info));
  }
  TANDEM_RETURN_IF_ERROR(copy_side_files(base, to));
  TANDEM_RETURN_IF_ERROR(write_config(base, to, dtype));
  return storage::write_safetensors((fs::path(to) / "model.safetensors").string(), infos,
                                    {{"format", "pt"}});
}

}  // namespace tandem::worker::train
