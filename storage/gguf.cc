#include "storage/gguf.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace tandem::storage {
namespace {

// GGUF value types.
enum ValueType : std::uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

/// Bytes of one value; 0 for strings, arrays and unknown types.
std::uint64_t value_bytes(std::uint32_t type) {
  switch (type) {
    case kUint8:
    case kInt8:
    case kBool:
      return 1;
    case kUint16:
    case kInt16:
      return 2;
    case kUint32:
    case kInt32:
    case kFloat32:
      return 4;
    case kUint64:
    case kInt64:
    case kFloat64:
      return 8;
    default:
      return 0;
  }
}

template <class T>
T load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

std::string to_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::optional<std::int64_t> as_integer(std::uint32_t type, const std::byte* at) {
  switch (type) {
    case kUint8:
      return load<std::uint8_t>(at);
    case kInt8:
      return load<std::int8_t>(at);
    case kUint16:
      return load<std::uint16_t>(at);
    case kInt16:
      return load<std::int16_t>(at);
    case kUint32:
      return load<std::uint32_t>(at);
    case kInt32:
      return load<std::int32_t>(at);
    case kInt64:
      return load<std::int64_t>(at);
    case kUint64: {
      const auto v = load<std::uint64_t>(at);
      if (v > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) return {};
      return static_cast<std::int64_t>(v);
    }
    default:
      return {};
  }
}

std::optional<double> as_number(std::uint32_t type, const std::byte* at) {
  if (type == kFloat32) return load<float>(at);
  if (type == kFloat64) return load<double>(at);
  if (type == kUint64) return static_cast<double>(load<std::uint64_t>(at));
  if (const auto integer = as_integer(type, at)) return static_cast<double>(*integer);
  return {};
}

std::optional<GgufType> known_type(std::uint32_t number) {
  for (GgufType type : {GgufType::kF32, GgufType::kF16, GgufType::kQ4_0, GgufType::kQ4_1,
                        GgufType::kQ5_0, GgufType::kQ5_1, GgufType::kQ8_0, GgufType::kQ4_K,
                        GgufType::kQ5_K, GgufType::kQ6_K, GgufType::kBF16})
    if (static_cast<std::uint32_t>(type) == number) return type;
  return {};
}

const char* unsupported_type_name(std::uint32_t number) {
  switch (number) {
    case 9:
      return "q8_1";
    case 10:
      return "q2_k";
    case 11:
      return "q3_k";
    case 15:
      return "q8_k";
    case 16:
      return "iq2_xxs";
    case 17:
      return "iq2_xs";
    case 18:
      return "iq3_xxs";
    case 19:
      return "iq1_s";
    case 20:
      return "iq4_nl";
    case 21:
      return "iq3_s";
    case 22:
      return "iq2_s";
    case 23:
      return "iq4_xs";
    case 39:
      return "mxfp4";
    default:
      return "unknown";
  }
}

}  // namespace

std::int64_t GgufTensor::numel() const {
  std::int64_t n = 1;
  for (std::int64_t d : shape) n *= d;
  return n;
}

// One pass over the head of the file; every read is checked against what is left.
class GgufParser {
 public:
  explicit GgufParser(std::shared_ptr<const MappedFile> file)
      : bytes_(file->bytes()), path_(file->path()) {
    gguf_.file_ = std::move(file);
  }

  Result<Gguf> run() {
    TANDEM_RETURN_IF_ERROR(read_head());
    for (std::uint64_t i = 0; i < metadata_count_; ++i) TANDEM_RETURN_IF_ERROR(read_metadata());
    TANDEM_RETURN_IF_ERROR(read_alignment());
    for (std::uint64_t i = 0; i < tensor_count_; ++i) TANDEM_RETURN_IF_ERROR(read_tensor());
    TANDEM_RETURN_IF_ERROR(place_tensors());
    return std::move(gguf_);
  }

 private:
  struct Pending {
    GgufTensor tensor;
    std::uint64_t offset = 0, bytes = 0;
  };

  [[nodiscard]] Status corrupt(const std::string& what) const {
    return corrupt_error(str(path_, ", byte ", at_, ": ", what));
  }
  [[nodiscard]] std::uint64_t left() const { return bytes_.size() - at_; }

  Result<std::span<const std::byte>> take(std::uint64_t n, const char* what) {
    if (n > left())
      return corrupt(str("truncated: ", what, " needs ", n, " bytes, the file has ", left(),
                         " left of ", bytes_.size()));
    const auto taken = bytes_.subspan(at_, static_cast<std::size_t>(n));
    at_ += static_cast<std::size_t>(n);
    return taken;
  }
  template <class T>
  Result<T> number(const char* what) {
    TANDEM_ASSIGN_OR_RETURN(const auto taken, take(sizeof(T), what));
    return load<T>(taken.data());
  }
  Result<std::span<const std::byte>> string(const char* what, std::uint64_t bytes_max) {
    TANDEM_ASSIGN_OR_RETURN(const auto size, number<std::uint64_t>(what));
    if (size > bytes_max)
      return corrupt(str(what, " of ", size, " bytes; the limit is ", bytes_max));
    return take(size, what);
  }

  Status read_head() {
    TANDEM_ASSIGN_OR_RETURN(const auto magic, take(4, "the magic"));
    if (std::memcmp(magic.data(), "GGUF", 4) != 0)
      return corrupt_error(path_ + ": not a GGUF file");
    TANDEM_ASSIGN_OR_RETURN(gguf_.version_, number<std::uint32_t>("the version"));
    if (gguf_.version_ != 2 && gguf_.version_ != 3)
      return refused_error(str(path_, ": GGUF version ", gguf_.version_,
                               gguf_.version_ >= 1 << 24 ? " (a big-endian file)" : "",
                               "; versions 2 and 3 are supported"));
    TANDEM_ASSIGN_OR_RETURN(tensor_count_, number<std::uint64_t>("the tensor count"));
    TANDEM_ASSIGN_OR_RETURN(metadata_count_, number<std::uint64_t>("the metadata count"));
    if (tensor_count_ > kGgufTensorsMax)
      return corrupt(str(tensor_count_, " tensors; the limit is ", kGgufTensorsMax));
    if (metadata_count_ > kGgufMetadataMax)
      return corrupt(str(metadata_count_, " metadata keys; the limit is ", kGgufMetadataMax));
    return {};
  }

  Status read_metadata() {
    TANDEM_ASSIGN_OR_RETURN(const auto key_bytes, string("a metadata key", kGgufKeyBytesMax));
    const std::string key = to_text(key_bytes);
    const std::size_t begin = at_;
    Gguf::Value value;
    TANDEM_ASSIGN_OR_RETURN(value.type, number<std::uint32_t>("a value type"));
    value.element = value.type;
    value.count = 1;
    if (value.type == kArray) {
      TANDEM_ASSIGN_OR_RETURN(value.element, number<std::uint32_t>("an element type"));
      TANDEM_ASSIGN_OR_RETURN(value.count, number<std::uint64_t>("an array length"));
    }
    TANDEM_RETURN_IF_ERROR(read_payload(key, value));
    value.raw = bytes_.subspan(begin, at_ - begin);
    if (!gguf_.metadata_.emplace(key, std::move(value)).second)
      return corrupt("the key " + key + " appears twice");
    return {};
  }

  Status read_payload(const std::string& key, Gguf::Value& value) {
    if (value.element == kString) {
      if (value.count > left() / 8)
        return corrupt(
            str(key, ": ", value.count, " strings cannot fit the ", left(), " bytes left"));
      for (std::uint64_t i = 0; i < value.count; ++i) {
        TANDEM_ASSIGN_OR_RETURN(const auto text, string(key.c_str(), left()));
        value.texts.push_back(text);
      }
      return {};
    }
    const std::uint64_t element_bytes = value_bytes(value.element);
    if (element_bytes == 0)
      return corrupt(str(key, ": ",
                         value.element == kArray ? "an array of arrays" : "an unknown value type ",
                         value.element == kArray ? "" : std::to_string(value.element)));
    if (value.count > left() / element_bytes)
      return corrupt(str("truncated: ", key, " needs ", value.count, " values of ", element_bytes,
                         " bytes, the file has ", left(), " bytes left of ", bytes_.size()));
    TANDEM_ASSIGN_OR_RETURN(value.bytes, take(value.count * element_bytes, key.c_str()));
    if (value.element == kBool)
      for (std::byte b : value.bytes)
        if (std::to_integer<int>(b) > 1)
          return corrupt(key + ": a boolean that is neither 0 nor 1");
    return {};
  }

  Status read_alignment() {
    if (!gguf_.has("general.alignment")) return {};
    TANDEM_ASSIGN_OR_RETURN(const std::int64_t value, gguf_.integer("general.alignment"));
    if (value < 1 || value > static_cast<std::int64_t>(kGgufAlignmentMax) ||
        (value & (value - 1)) != 0)
      return corrupt(
          str("general.alignment ", value, " is not a power of two up to ", kGgufAlignmentMax));
    alignment_ = static_cast<std::uint64_t>(value);
    return {};
  }

  Status read_tensor() {
    Pending pending;
    TANDEM_ASSIGN_OR_RETURN(const auto name, string("a tensor name", kGgufTensorNameBytesMax));
    pending.tensor.name = to_text(name);
    TANDEM_ASSIGN_OR_RETURN(const auto rank, number<std::uint32_t>("a tensor's rank"));
    if (rank > kGgufRankMax)
      return corrupt(str("tensor ", pending.tensor.name, " has ", rank,
                         " dimensions; the limit is ", kGgufRankMax));
    for (std::uint32_t i = 0; i < rank; ++i) {
      TANDEM_ASSIGN_OR_RETURN(const auto dimension, number<std::uint64_t>("a dimension"));
      if (dimension == 0 ||
          dimension > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
        return corrupt(str("tensor ", pending.tensor.name, " has a dimension of ", dimension));
      pending.tensor.shape.insert(pending.tensor.shape.begin(),
                                  static_cast<std::int64_t>(dimension));
    }
    TANDEM_ASSIGN_OR_RETURN(const auto type_number, number<std::uint32_t>("a tensor type"));
    TANDEM_ASSIGN_OR_RETURN(pending.offset, number<std::uint64_t>("a tensor offset"));
    const auto type = known_type(type_number);
    if (!type)
      return refused_error(
          str(path_, ": tensor ", pending.tensor.name, " has type ", type_number, " (",
              unsupported_type_name(type_number),
              "), which is not supported; f32, f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, "
              "q5_k and q6_k are"));
    pending.tensor.type = *type;
    TANDEM_RETURN_IF_ERROR(measure(pending));
    pending_.push_back(std::move(pending));
    return {};
  }

  Status measure(Pending& pending) {
    const GgufTensor& tensor = pending.tensor;
    std::int64_t numel = 1;
    for (std::int64_t d : tensor.shape)
      if (__builtin_mul_overflow(numel, d, &numel))
        return corrupt("tensor " + tensor.name + ": the product of the shape overflows");
    const std::int64_t row = tensor.shape.empty() ? 1 : tensor.shape.back();
    if (row % gguf_block_elements(tensor.type) != 0)
      return corrupt(str("tensor ", tensor.name, ": a row of ", row, " is not a whole number of ",
                         gguf_type_name(tensor.type), " blocks of ",
                         gguf_block_elements(tensor.type)));
    std::int64_t bytes = 0;
    if (__builtin_mul_overflow(numel / gguf_block_elements(tensor.type),
                               gguf_block_bytes(tensor.type), &bytes))
      return corrupt("tensor " + tensor.name + ": its size overflows");
    pending.bytes = static_cast<std::uint64_t>(bytes);
    if (pending.offset % alignment_ != 0)
      return corrupt(str("tensor ", tensor.name, ": offset ", pending.offset,
                         " is not a multiple of ", alignment_));
    return {};
  }

  Status place_tensors() {
    const std::uint64_t begin = (at_ + alignment_ - 1) / alignment_ * alignment_;
    if (!pending_.empty() && begin > bytes_.size())
      return corrupt(
          str("truncated: tensor data begins at byte ", begin, ", the file has ", bytes_.size()));
    const std::uint64_t data_bytes = begin > bytes_.size() ? 0 : bytes_.size() - begin;
    std::sort(pending_.begin(), pending_.end(),
              [](const Pending& a, const Pending& b) { return a.offset < b.offset; });
    std::uint64_t end = 0;
    for (Pending& p : pending_) {
      if (p.offset < end)
        return corrupt_error(str(path_, ": tensor ", p.tensor.name, " overlaps the one before it"));
      if (p.offset > data_bytes || p.bytes > data_bytes - p.offset)
        return corrupt_error(str(path_, ": truncated: tensor ", p.tensor.name, " needs bytes ",
                                 begin + p.offset, " to ", begin + p.offset + p.bytes,
                                 ", the file has ", bytes_.size()));
      end = p.offset + p.bytes;
      p.tensor.bytes = bytes_.subspan(static_cast<std::size_t>(begin + p.offset),
                                      static_cast<std::size_t>(p.bytes));
      gguf_.tensors_.push_back(std::move(p.tensor));
    }
    auto& tensors = gguf_.tensors_;
    std::sort(tensors.begin(), tensors.end(),
              [](const GgufTensor& a, const GgufTensor& b) { return a.name < b.name; });
    const auto twice = std::adjacent_find(
        tensors.begin(), tensors.end(),
        [](const GgufTensor& a, const GgufTensor& b) { return a.name == b.name; });
    if (twice != tensors.end())
      return corrupt_error(str(path_, ": tensor ", twice->name, " appears twice"));
    return {};
  }

  std::span<const std::byte> bytes_;
  std::string path_;
  Gguf gguf_;
  std::size_t at_ = 0;
  std::uint64_t tensor_count_ = 0, metadata_count_ = 0;
  std::uint64_t alignment_ = 32;
  std::vector<Pending> pending_;
};

Result<Gguf> Gguf::parse(std::shared_ptr<const MappedFile> file) {
  return GgufParser(std::move(file)).run();
}

Result<Gguf> Gguf::open(const std::string& path) {
  TANDEM_ASSIGN_OR_RETURN(auto file, MappedFile::open(path));
  return parse(std::move(file));
}

const GgufTensor* Gguf::find(std::string_view name) const {
  const auto at =
      std::lower_bound(tensors_.begin(), tensors_.end(), name,
                       [](const GgufTensor& t, std::string_view n) { return t.name < n; });
  return at != tensors_.end() && at->name == name ? &*at : nullptr;
}

bool Gguf::has(std::string_view key) const {
  return metadata_.find(key) != metadata_.end();
}

std::vector<std::string> Gguf::keys() const {
  std::vector<std::string> keys;
  for (const auto& [key, value] : metadata_) keys.push_back(key);
  return keys;
}

Result<const Gguf::Value*> Gguf::value(std::string_view key) const {
  const auto at = metadata_.find(key);
  if (at == metadata_.end()) return not_found_error(str(path(), " has no metadata key ", key));
  return &at->second;
}

Result<std::int64_t> Gguf::integer(std::string_view key) const {
  TANDEM_ASSIGN_OR_RETURN(const Value* v, value(key));
  const auto integer =
      v->type == kArray || v->bytes.empty() ? std::nullopt : as_integer(v->type, v->bytes.data());
  if (!integer) return invalid_error(str(path(), ": ", key, " is not an integer"));
  return *integer;
}

Result<double> Gguf::number(std::string_view key) const {
  TANDEM_ASSIGN_OR_RETURN(const Value* v, value(key));
  const auto number =
      v->type == kArray || v->bytes.empty() ? std::nullopt : as_number(v->type, v->bytes.data());
  if (!number) return invalid_error(str(path(), ": ", key, " is not a number"));
  return *number;
}

Result<bool> Gguf::boolean(std::string_view key) const {
  TANDEM_ASSIGN_OR_RETURN(const Value* v, value(key));
  if (v->type != kBool) return invalid_error(str(path(), ": ", key, " is not a boolean"));
  return std::to_integer<int>(v->bytes[0]) == 1;
}

Result<std::string> Gguf::text(std::string_view key) const {
  TANDEM_ASSIGN_OR_RETURN(const Value* v, value(key));
  if (v->type != kString) return invalid_error(str(path(), ": ", key, " is not a string"));
  return to_text(v->texts[0]);
}

Result<std::vector<std::int64_t>> Gguf::integers(std::string_view key) const {
  TANDEM_ASSIGN_OR_RETURN(const Value* v, value(key));
  std::vector<std::int64_t> list;
  const std::uint64_t step = value_bytes(v->element);
  for (std::uint64_t i = 0; v->type == kArray && step != 0 && i < v->count; ++i) {
    const auto integer = as_integer(v->element, v->bytes.data() + i * step);
    if (!integer) break;
    list.push_back(*integer);
  }
  if (v->type != kArray || list.size() != v->count)
    return invalid_error(str(path(), ": ", key, " is not a list of integers"));
  return list;
}

Result<std::vector<double>> Gguf::numbers(std::string_view key) const {
  TANDEM_ASSIGN_OR_RETURN(const Value* v, value(key));
  std::vector<double> list;
  const std::uint64_t step = value_bytes(v->element);
  for (std::uint64_t i = 0; v->type == kArray && step != 0 && i < v->count; ++i) {
    const auto number = as_number(v->element, v->bytes.data() + i * step);
    if (!number) break;
    list.push_back(*number);
  }
  if (v->type != kArray || list.size() != v->count)
    return invalid_error(str(path(), ": ", key, " is not a list of numbers"));
  return list;
}

Result<std::vector<std::string>> Gguf::texts(std::string_view key) const {
  TANDEM_ASSIGN_OR_RETURN(const Value* v, value(key));
  if (v->type != kArray || v->element != kString)
    return invalid_error(str(path(), ": ", key, " is not a list of strings"));
  std::vector<std::string> list;
  list.reserve(v->texts.size());
  for (const auto& text : v->texts) list.push_back(to_text(text));
  return list;
}

Result<std::span<const std::byte>> Gguf::raw(std::string_view key) const {
  TANDEM_ASSIGN_OR_RETURN(const Value* v, value(key));
  return v->raw;
}

}  // namespace tandem::storage
