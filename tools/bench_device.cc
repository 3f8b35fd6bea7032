#include "tools/bench_device.h"

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_backend.h"
#include "protocol/base/random.h"
#include "storage/file_io.h"
#include "worker/model/base_weights.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>

namespace tandem::tools {
namespace {

using worker::model::ModelConfig;

ModelConfig shape(std::int64_t layers, std::int64_t width, std::int64_t mlp, std::int64_t heads,
                  std::int64_t kv_heads, std::int64_t head_dim, std::int64_t vocab, bool tied) {
  ModelConfig c;
  c.family = "llama";
  c.vocab = vocab;
  c.width = width;
  c.layers = layers;
  c.heads = heads;
  c.kv_heads = kv_heads;
  c.head_dim = head_dim;
  c.mlp_width = mlp;
  c.context_max = 131072;
  c.tied_embedding = tied;
  return c;
}

const std::map<std::string, ModelConfig>& shapes() {
  static const std::map<std::string, ModelConfig> table{
      {"smollm2-135m", shape(30, 576, 1536, 9, 3, 64, 49152, true)},
      {"llama3.2-1b", shape(16, 2048, 8192, 32, 8, 64, 128256, true)},
      {"llama3-8b", shape(32, 4096, 14336, 32, 8, 128, 128256, false)},
      {"llama3-70b", shape(80, 8192, 28672, 64, 8, 128, 128256, false)},
      // What two and one of four tensor-parallel ranks have of it: a step with the sums of two, and
      // without sums.
      {"llama3-70b-half", shape(80, 8192, 14336, 32, 4, 128, 64128, false)},
      {"llama3-70b-quarter", shape(80, 8192, 7168, 16, 2, 128, 32064, false)},
      {"small", shape(8, 512, 1408, 8, 4, 64, 16384, true)},
      {"tiny", shape(2, 256, 640, 4, 2, 64, 4096, true)}};
  return table;
}

/// Numbers from one table of random ones, begun at another place for every row: billions of them
/// cost no more than a copy.
class TableSource final : public worker::model::TensorSource {
 public:
  explicit TableSource(const ModelConfig& config) : table_(kTable) {
    for (const auto& spec : worker::model::expected_tensors(config)) widths_[spec.name] = spec.i;
    Random random(99);
    for (float& x : table_) x = random.normal();
  }
  [[nodiscard]] Status has(const std::string&, std::int64_t, std::int64_t) const override {
    return {};
  }
  void read_rows(const std::string& name, std::int64_t row, std::int64_t rows,
                 float* out) const override {
    const std::int64_t width = widths_.at(name);
    if (width == 0) {  // a norm's weights or a bias
      std::fill_n(out, rows, name.ends_with(".bias") ? 0.0f : 1.0f);
      return;
    }
    const float scale = 1.0f / std::sqrt(static_cast<float>(width));
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::uint64_t begin =
          mix64(std::hash<std::string>{}(name) + static_cast<std::uint64_t>(row + r));
      for (std::int64_t c = 0; c < width; ++c)
        out[r * width + c] = scale * table_[(begin + static_cast<std::uint64_t>(c)) % kTable];
    }
  }

 private:
  static constexpr std::size_t kTable = 1 << 20;
  std::vector<float> table_;
  std::map<std::string, std::int64_t> widths_;
};

}  // namespace

Result<kernels::Backend> open_bench_device(const std::string& device, int threads, int index,
                                           const std::string& dtype) {
  const auto open = [&]() -> Result<kernels::Backend> {
    if (device == "cuda") return kernels::make_cuda_backend({index, 0});
    kernels::CpuOptions options;
    options.threads = threads;
    return kernels::make_cpu_backend(options);
  };
  TANDEM_ASSIGN_OR_RETURN(kernels::Backend backend, open());
  TANDEM_RETURN_IF_ERROR(kernels::parse_compute_dtype(backend.ops->profile(), dtype).status());
  return backend;
}

std::vector<std::string> bench_shapes() {
  std::vector<std::string> names;
  for (const auto& [name, config] : shapes()) names.push_back(name);
  return names;
}

Result<worker::model::LoadedModel> load_bench_model(const std::string& path,
                                                    const std::string& shape) {
  if (!path.empty()) return worker::model::load_model(path);
  if (shape.empty()) return invalid_error("give --model PATH or --shape NAME");
  worker::model::LoadedModel loaded;
  if (const auto found = shapes().find(shape); found != shapes().end()) {
    loaded.config = found->second;
  } else {
    TANDEM_ASSIGN_OR_RETURN(const std::string json, storage::read_file(shape, 1 << 20));
    TANDEM_ASSIGN_OR_RETURN(loaded.config, ModelConfig::from_hf_json(json));
  }
  loaded.source = std::make_unique<TableSource>(loaded.config);
  return loaded;
}

}  // namespace tandem::tools
