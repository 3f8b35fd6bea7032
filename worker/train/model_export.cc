#include "worker/train/model_export.h"

#include "storage/safetensors.h"
#include "worker/model/base_weights.h"
#include "worker/train/state_pieces.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace tandem::worker::train {

namespace {

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

}  // namespace tandem::worker::train
