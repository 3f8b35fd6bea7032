// The goldens that tests/golden/model_goldens.py wrote: one folder per tiny model.
#pragma once

#include "protocol/base/str.h"
#include "storage/file_io.h"
#include "storage/safetensors.h"
#include "worker/data/packing.h"
#include "worker/model/adapter.h"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

namespace tandem::test {

class ModelGolden {
 public:
  explicit ModelGolden(const std::string& name)
      : folder_(std::string(TANDEM_SOURCE_DIR) + "/tests/golden/model/" + name),
        values_(storage::Safetensors::open(folder_ + "/golden.safetensors").value()),
        config_(worker::model::ModelConfig::from_hf_json(
                    storage::read_file(folder_ + "/config.json", 1 << 20).value())
                    .value()) {}

  [[nodiscard]] const std::string& folder() const { return folder_; }
  [[nodiscard]] const worker::model::ModelConfig& config() const { return config_; }
  [[nodiscard]] storage::Safetensors weights() const {
    return storage::Safetensors::open(folder_ + "/model.safetensors").value();
  }
  [[nodiscard]] bool has(const std::string& name) const { return values_.find(name) != nullptr; }
  template <class T = float>
  [[nodiscard]] std::vector<T> get(const std::string& name) const {
    const storage::TensorInfo* tensor = values_.find(name);
    TANDEM_CHECK(tensor != nullptr, name);
    std::vector<T> out(tensor->bytes.size() / sizeof(T));
    std::memcpy(out.data(), tensor->bytes.data(), tensor->bytes.size());
    return out;
  }

  /// The adapter whose tensors are called PREFIX.SITE.lora_A and lora_B.
  [[nodiscard]] std::vector<worker::model::HostAdapterTensor> adapter(const std::string& prefix,
                                                                      std::int64_t rank,
                                                                      float scale) const {
    std::vector<worker::model::HostAdapterTensor> tensors;
    for (std::int64_t layer = 0; layer < config_.layers; ++layer)
      for (int s = 0; s < worker::model::kSiteCount; ++s) {
        const worker::model::Site site{s};
        const std::string path = str(prefix, ".", worker::model::site_path(layer, site));
        tensors.push_back({layer, site, rank, scale, get(path + ".lora_A"), get(path + ".lora_B")});
      }
    return tensors;
  }

  /// Documents [first, last) of the tensors PREFIXids, PREFIXlabels, PREFIXoffsets, packed.
  [[nodiscard]] worker::data::MicroBatch pack(const std::string& prefix, std::int64_t first,
                                              std::int64_t last) const {
    const auto ids = get<std::int32_t>(prefix + "ids");
    const auto labels = get<std::int32_t>(prefix + "labels");
    const auto offsets = get<std::int32_t>(prefix + "offsets");
    worker::data::MicroBatch batch;
    batch.cu_seqlens.push_back(0);
    for (std::int64_t d = first; d < last; ++d) {
      const std::int32_t begin = offsets[static_cast<std::size_t>(d)];
      const std::int32_t end = offsets[static_cast<std::size_t>(d) + 1];
      for (std::int32_t t = begin; t < end; ++t) {
        batch.tokens.push_back(ids[static_cast<std::size_t>(t)]);
        batch.labels.push_back(labels[static_cast<std::size_t>(t)]);
        batch.positions.push_back(t - begin);
        batch.trained_tokens += batch.labels.back() >= 0;
      }
      batch.cu_seqlens.push_back(static_cast<std::int32_t>(batch.tokens.size()));
    }
    return batch;
  }

 private:
  const std::string folder_;
  const storage::Safetensors values_;
  const worker::model::ModelConfig config_;
};

/// ||value - reference|| / ||reference||.
inline double relative_error(const std::vector<float>& value, const std::vector<float>& reference) {
  TANDEM_CHECK_EQ(value.size(), reference.size());
  double difference = 0.0, norm = 0.0;
  for (std::size_t e = 0; e < value.size(); ++e) {
    const double d = static_cast<double>(value[e]) - static_cast<double>(reference[e]);
    difference += d * d;
    norm += static_cast<double>(reference[e]) * static_cast<double>(reference[e]);
  }
  return std::sqrt(difference) / std::sqrt(norm);
}

}  // namespace tandem::test
