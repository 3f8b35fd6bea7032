#include "worker/model/tensor_source.h"

#include "protocol/base/random.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <string_view>

namespace tandem::worker::model {

namespace {

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t d = 0; d < shape.size(); ++d) text += str(d ? ", " : "", shape[d]);
  return text + "]";
}

Status check_shape(const std::string& name, const std::vector<std::int64_t>& shape, std::int64_t n,
                   std::int64_t i) {
  const std::vector<std::int64_t> want =
      i == 0 ? std::vector<std::int64_t>{n} : std::vector<std::int64_t>{n, i};
  if (shape == want) return {};
  return invalid_error(str("tensor ", name, " has shape ", shape_text(shape),
                           "; the model's "
                           "configuration asks for ",
                           shape_text(want)));
}

class SafetensorsSource final : public TensorSource {
 public:
  explicit SafetensorsSource(storage::Safetensors tensors) : tensors_(std::move(tensors)) {}

  [[nodiscard]] Status has(const std::string& name, std::int64_t n, std::int64_t i) const override {
    const storage::TensorInfo* tensor = tensors_.find(name);
    if (tensor == nullptr) return not_found_error(str("the model has no tensor ", name));
    if (!is_stored_float(tensor->dtype))
      return refused_error(str("tensor ", name, " is ", dtype_name(tensor->dtype),
                               "; weights must be f32, bf16 or f16"));
    return check_shape(name, tensor->shape, n, i);
  }
  void read_rows(const std::string& name, std::int64_t row, std::int64_t rows,
                 float* out) const override {
    const storage::TensorInfo* tensor = tensors_.find(name);
    TANDEM_CHECK(tensor != nullptr, name);
    const std::int64_t width = tensor->shape.size() == 2 ? tensor->shape[1] : 1;
    const std::byte* from = tensor->bytes.data() + row * width * dtype_bytes(tensor->dtype);
    load_floats(from, tensor->dtype, {out, static_cast<std::size_t>(rows * width)});
  }

 private:
  const storage::Safetensors tensors_;
};

class GgufSource final : public TensorSource {
 public:
  static Result<std::unique_ptr<TensorSource>> create(storage::Gguf file,
                                                      const ModelConfig& config) {
    auto source = std::unique_ptr<GgufSource>(new GgufSource(std::move(file)));
    TANDEM_ASSIGN_OR_RETURN(const std::string arch, source->file_.architecture());
    for (const storage::GgufTensor& tensor : source->file_.tensors()) {
      const std::optional<std::string> name = storage::gguf_to_hf_name(tensor.name);
      if (!name) continue;
      Entry entry{&tensor, {}};
      const bool q = tensor.name.ends_with("attn_q.weight");
      const bool k = tensor.name.ends_with("attn_k.weight");
      if ((q || k) && storage::gguf_permutes_rope(arch)) {
        TANDEM_ASSIGN_OR_RETURN(
            entry.order,
            storage::rope_row_order(tensor.shape[0], q ? config.heads : config.kv_heads));
      }
      source->entries_.emplace(*name, std::move(entry));
    }
    return std::unique_ptr<TensorSource>(std::move(source));
  }

  [[nodiscard]] Status has(const std::string& name, std::int64_t n, std::int64_t i) const override {
    const auto it = entries_.find(name);
    if (it == entries_.end())
      return not_found_error(str(file_.path(), " has no tensor for ", name));
    return check_shape(it->second.tensor->name, it->second.tensor->shape, n, i);
  }
  void read_rows(const std::string& name, std::int64_t row, std::int64_t rows,
                 float* out) const override {
    const Entry& entry = entries_.at(name);
    if (entry.order.empty()) return read_in_order(*entry.tensor, row, rows, out);
    const std::int64_t width = entry.tensor->shape[1];
    for (std::int64_t r = 0; r < rows; ++r)
      read_in_order(*entry.tensor, entry.order[static_cast<std::size_t>(row + r)], 1,
                    out + r * width);
  }

 private:
  struct Entry {
    const storage::GgufTensor* tensor = nullptr;
    std::vector<std::int64_t> order;  ///< file row of each row; empty: as they come
  };
  explicit GgufSource(storage::Gguf file) : file_(std::move(file)) {}

  static void read_in_order(const storage::GgufTensor& tensor, std::int64_t row, std::int64_t rows,
                            float* out) {
    const std::int64_t all = tensor.shape[0];
    const std::int64_t width = tensor.numel() / all;
    // A vector's blocks run along it, so only whole ones can be read.
    if (tensor.shape.size() == 1) TANDEM_CHECK(row == 0 && rows == all, tensor.name);
    const std::int64_t row_bytes = static_cast<std::int64_t>(tensor.bytes.size()) / all;
    const Status status = storage::dequantize(
        tensor.type,
        tensor.bytes.subspan(static_cast<std::size_t>(row * row_bytes),
                             tensor.shape.size() == 1 ? tensor.bytes.size()
                                                      : static_cast<std::size_t>(rows * row_bytes)),
        std::span<float>(out, static_cast<std::size_t>(rows * width)));
    TANDEM_CHECK(status.ok(), tensor.name, " ", status.to_string());
  }

  const storage::Gguf file_;
  std::map<std::string, Entry> entries_;
};

/// FNV-1a: a stable number for a name.
std::uint64_t name_hash(std::string_view name) {
  std::uint64_t hash = 14695981039346656037ull;
  for (unsigned char c : name) hash = (hash ^ c) * 1099511628211ull;
  return hash;
}

class RandomSource final : public TensorSource {
 public:
  RandomSource(const ModelConfig& config, std::uint64_t seed) : seed_(seed) {
    for (TensorSpec& spec : expected_tensors(config)) specs_.emplace(spec.name, spec);
  }
  [[nodiscard]] Status has(const std::string& name, std::int64_t n, std::int64_t i) const override {
    const auto it = specs_.find(name);
    if (it == specs_.end()) return not_found_error(str("the model has no tensor ", name));
    return check_shape(name, shape_of(it->second), n, i);
  }
  void read_rows(const std::string& name, std::int64_t row, std::int64_t rows,
                 float* out) const override {
    const std::int64_t i = specs_.at(name).i;
    const std::int64_t width = std::max<std::int64_t>(i, 1);
    const bool norm = name.ends_with("norm.weight");
    const float scale = i == 0 ? 0.05f : 1.0f / std::sqrt(static_cast<float>(i));
    const std::uint64_t stream = name_hash(name);
    for (std::int64_t e = 0; e < rows * width; ++e) {
      // Irwin-Hall with four terms: normal enough, and a pure function of the element's index.
      const auto index = static_cast<std::uint64_t>(row * width + e);
      float sum = -2.0f;
      for (std::uint64_t k = 0; k < 4; ++k) sum += random_uniform(seed_, stream, index * 4 + k);
      out[e] = sum * 1.7320508f * scale + (norm ? 1.0f : 0.0f);
    }
  }

 private:
  static std::vector<std::int64_t> shape_of(const TensorSpec& spec) {
    return spec.i == 0 ? std::vector<std::int64_t>{spec.n}
                       : std::vector<std::int64_t>{spec.n, spec.i};
  }
  const std::uint64_t seed_;
  std::map<std::string, TensorSpec> specs_;
};

class ZeroSource final : public TensorSource {
 public:
  [[nodiscard]] bool has_values() const override { return false; }
  [[nodiscard]] Status has(const std::string&, std::int64_t, std::int64_t) const override {
    return {};
  }
  void read_rows(const std::string& name, std::int64_t, std::int64_t rows,
                 float* out) const override {
    // Only vectors are read on the meta backend (a value each); matrices are never asked for.
    TANDEM_CHECK(name.ends_with("norm.weight") || name.ends_with(".bias"), name);
    std::fill_n(out, rows, 0.0f);
  }
};

}  // namespace

std::unique_ptr<TensorSource> make_safetensors_source(storage::Safetensors tensors) {
  return std::make_unique<SafetensorsSource>(std::move(tensors));
}
Result<std::unique_ptr<TensorSource>> make_gguf_source(storage::Gguf file,
                                                       const ModelConfig& config) {
  return GgufSource::create(std::move(file), config);
}
std::unique_ptr<TensorSource> make_random_source(const ModelConfig& config, std::uint64_t seed) {
  return std::make_unique<RandomSource>(config, seed);
}
std::unique_ptr<TensorSource> make_zero_source() {
  return std::make_unique<ZeroSource>();
}

}  // namespace tandem::worker::model
