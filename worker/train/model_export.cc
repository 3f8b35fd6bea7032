#include "worker/train/model_export.h"

#include "storage/file_io.h"
#include "storage/safetensors.h"
#include "worker/model/base_weights.h"
#include "worker/model/merge.h"
#include "worker/model/model_loader.h"
#include "worker/train/state_pieces.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
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
  const char* name = model::torch_dtype_name(dtype);
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
  TANDEM_CHECK(is_stored_float(dtype), dtype_name(dtype));
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
      store_floats({values, static_cast<std::size_t>(count)}, tensor->dtype,
                   room.data() + at * dtype_bytes(tensor->dtype));
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
        const float mine = rounded(piece.values[static_cast<std::size_t>(from + e)], dtype);
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
  TANDEM_CHECK(is_stored_float(dtype), dtype_name(dtype));
  std::map<std::string, const StateTensor*> by_name;
  for (const StateTensor& tensor : state.tensors) by_name.emplace(tensor.name, &tensor);
  std::vector<storage::TensorInfo> infos;
  std::list<std::vector<std::byte>> narrow;
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
    if (dtype != DType::kF32) {
      auto& bytes =
          narrow.emplace_back(values.size() * static_cast<std::size_t>(dtype_bytes(dtype)));
      store_floats(values, dtype, bytes.data());
      info.bytes = bytes;
    }
    infos.push_back(std::move(info));
  }
  TANDEM_RETURN_IF_ERROR(copy_side_files(base, to));
  TANDEM_RETURN_IF_ERROR(write_config(base, to, dtype));
  return storage::write_safetensors((fs::path(to) / "model.safetensors").string(), infos,
                                    {{"format", "pt"}});
}

}  // namespace tandem::worker::train
