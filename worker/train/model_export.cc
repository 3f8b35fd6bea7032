#include "worker/train/model_export.h"

#include "storage/file_io.h"
#include "storage/safetensors.h"
#include "worker/model/base_weights.h"
#include "worker/model/model_loader.h"
#include "worker/train/state_pieces.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
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

std::vector<std::int64_t> shape_of(const model::TensorSpec& spec) {
  return spec.i == 0 ? std::vector{spec.n} : std::vector{spec.n, spec.i};
}

/// Of a state's ".param".
std::string weight_name(const StateTensor& piece) {
  return piece.name.substr(0, piece.name.rfind('.'));
}

}  // namespace

Status create_weights(const std::string& path, const model::ModelConfig& config, DType dtype) {
  TANDEM_CHECK(dtype == DType::kF32 || dtype == DType::kBF16, dtype_name(dtype));
  std::vector<storage::TensorInfo> infos;
  for (const model::TensorSpec& spec : expected_tensors(config)) {
    storage::TensorInfo info;
    info.name = spec.name;
    info.dtype = dtype;
    info.shape = shape_of(spec);
    infos.push_back(std::move(info));
  }
  return storage::SafetensorsDraft::create(path, infos, {{"format", "pt"}});
}

Status write_pieces(const std::string& path, const std::vector<StateTensor>& pieces,
                    const Beat& beat) {
  TANDEM_ASSIGN_OR_RETURN(const auto file, storage::SafetensorsDraft::open(path));
  for (const StateTensor& piece : pieces) {
    if (beat) beat();
    const std::string name = weight_name(piece);
    const std::span<std::byte> room = file.room(name);
    const auto tensor = std::find_if(file.tensors().begin(), file.tensors().end(),
                                     [&](const auto& t) { return t.name == name; });
    if (room.empty() || tensor->shape != piece.shape)
      return corrupt_error(str(path, " has no room for ", name));
    for_each_run(piece, [&](std::int64_t from, std::int64_t at, std::int64_t count) {
      const float* values = piece.values.data() + from;
      if (tensor->dtype == DType::kF32) {
        std::memcpy(room.data() + at * 4, values, static_cast<std::size_t>(count) * 4);
        return;
      }
      for (std::int64_t e = 0; e < count; ++e) {
        const bf16 rounded = to_bf16(values[e]);
        std::memcpy(room.data() + (at + e) * 2, &rounded, 2);
      }
    });
  }
  return file.sync();
}

double largest_difference(const std::vector<StateTensor>& pieces,
                          const model::TensorSource& published, DType dtype, const Beat& beat) {
  double worst = 0.0;
  for (const StateTensor& piece : pieces) {
    if (beat) beat();
    const std::int64_t n = piece.shape.at(0), width = piece.shape.size() > 1 ? piece.shape[1] : 1;
    if (!published.has(weight_name(piece), n, piece.shape.size() > 1 ? width : 0).ok())
      return std::numeric_limits<double>::infinity();
    std::vector<float> row(static_cast<std::size_t>(width));
    std::int64_t read = -1;
    for_each_run(piece, [&](std::int64_t from, std::int64_t at, std::int64_t count) {
      for (std::int64_t e = 0; e < count; ++e) {
        if ((at + e) / width != read) {
          read = (at + e) / width;
          published.read_rows(weight_name(piece), read, 1, row.data());
        }
        float mine = piece.values[static_cast<std::size_t>(from + e)];
        if (dtype == DType::kBF16) mine = to_f32(to_bf16(mine));
        const double difference =
            std::fabs(static_cast<double>(mine) - row[static_cast<std::size_t>((at + e) % width)]);
        if (!(difference <= worst)) worst = difference;  // NaN too
      }
    });
  }
  return worst;
}

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
    info.shape = shape_of(spec);
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
