#include "storage/safetensors.h"

#include "storage/file_io.h"
#include "storage/json_strict.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <limits>
#include <optional>
#include <set>

namespace tandem::storage {
namespace {

constexpr std::int64_t kIndexBytesMax = 64 << 20;

std::optional<DType> parse_safetensors_dtype(std::string_view name) {
  if (name == "F64") return DType::kF64;
  if (name == "F32") return DType::kF32;
  if (name == "F16") return DType::kF16;
  if (name == "BF16") return DType::kBF16;
  if (name == "I64") return DType::kI64;
  if (name == "I32") return DType::kI32;
  if (name == "I8") return DType::kI8;
  if (name == "U8") return DType::kU8;
  return std::nullopt;
}

struct HeaderEntry {
  std::string name;
  std::optional<std::string> dtype;
  std::optional<std::vector<std::int64_t>> shape;
  std::optional<std::vector<std::int64_t>> offsets;
};

// Walks the header without building a tree, so that memory stays near the header's own size, and
// accepts exactly the format's shape: {"name": {"dtype": s, "shape": [n...], "data_offsets": [b,
// e]}, ...} and
// {"__metadata__": {s: s}}.
class HeaderReader final : public nlohmann::json_sax<Json> {
 public:
  std::vector<HeaderEntry> entries;
  std::map<std::string, std::string> metadata;
  std::string error;

  bool null() override { return refuse("null"); }
  bool boolean(bool) override { return refuse("a boolean"); }
  bool number_float(number_float_t, const string_t&) override { return refuse("a fraction"); }
  bool number_integer(number_integer_t) override { return refuse("a negative number"); }
  bool binary(binary_t&) override { return refuse("binary"); }
  bool number_unsigned(number_unsigned_t value) override {
    if (level_ != kList) return refuse("a number");
    if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
      return fail(str("number ", value, " of ", where(), " leaves 63 bits"));
    if (list_->size() >= kTensorRankMax)
      return fail(str("more than ", kTensorRankMax, " numbers in ", where()));
    list_->push_back(static_cast<std::int64_t>(value));
    return true;
  }
  bool string(string_t& value) override {
    if (level_ == kMetadata) {
      if (!metadata.emplace(key_, value).second)
        return fail("__metadata__ names " + key_ + " twice");
      return true;
    }
    if (level_ == kEntry && key_ == "dtype" && !entries.back().dtype) {
      entries.back().dtype = value;
      return true;
    }
    return refuse("a string");
  }
  bool start_object(std::size_t) override {
    if (level_ == kStart) return enter(kTop);
    if (level_ != kTop) return refuse("an object");
    if (key_ == "__metadata__")
      return seen_metadata_ ? fail("__metadata__ twice")
                            : (seen_metadata_ = true, enter(kMetadata));
    if (!names_.insert(key_).second) return fail("the tensor " + key_ + " appears twice");
    if (key_.size() > kTensorNameBytesMax)
      return fail(
          str("a tensor name of ", key_.size(), " bytes; the limit is ", kTensorNameBytesMax));
    entries.push_back({key_, {}, {}, {}});
    return enter(kEntry);
  }
  bool end_object() override {
    level_ = level_ == kTop ? kStart : kTop;
    return true;
  }
  bool start_array(std::size_t) override {
    if (level_ != kEntry) return refuse("a list");
    auto& entry = entries.back();
    auto* target = key_ == "shape"          ? &entry.shape
                   : key_ == "data_offsets" ? &entry.offsets
                                            : nullptr;
    if (target == nullptr || target->has_value()) return refuse("a list");
    list_ = &target->emplace();
    return enter(kList);
  }
  bool end_array() override { return enter(kEntry); }
  bool key(string_t& value) override {
    key_ = value;
    return true;
  }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& e) override {
    return fail(str("not valid JSON near byte ", position, ": ", e.what()));
  }

 private:
  enum Level { kStart, kTop, kMetadata, kEntry, kList };
  bool enter(Level level) {
    level_ = level;
    return true;
  }
  bool fail(std::string message) {
    if (error.empty()) error = std::move(message);
    return false;
  }
  bool refuse(const char* what) {
    if (level_ == kStart) return fail("not a JSON object");
    return fail(str("unexpected ", what, " at ", where()));
  }
  [[nodiscard]] std::string where() const {
    if (level_ >= kEntry && !entries.empty())
      return str("tensor ", entries.back().name, ", ", key_);
    return level_ == kMetadata ? "__metadata__, " + key_ : "\"" + key_ + "\"";
  }

  Level level_ = kStart;
  std::string key_;
  bool seen_metadata_ = false;
  std::set<std::string> names_;
  std::vector<std::int64_t>* list_ = nullptr;
};

using Placed = SafetensorsHead::Placed;

Result<Placed> place(const HeaderEntry& entry, std::int64_t data_bytes, const std::string& path) {
  const std::string where = str(path, ", tensor ", entry.name, ": ");
  if (!entry.dtype || !entry.shape || !entry.offsets || entry.offsets->size() != 2)
    return corrupt_error(where + "needs dtype, shape and two data_offsets");
  const auto dtype = parse_safetensors_dtype(*entry.dtype);
  if (!dtype) return refused_error(where + "element type " + *entry.dtype + " is not supported");
  auto numel = checked_numel(*entry.shape, dtype_bytes(*dtype));
  if (!numel.ok()) return corrupt_error(where + numel.status().message());
  const std::int64_t begin = (*entry.offsets)[0], end = (*entry.offsets)[1];
  if (begin > end) return corrupt_error(str(where, "reversed offsets ", begin, " > ", end));
  if (end > data_bytes)
    return corrupt_error(str(where, "ends at byte ", end, " of the data, but the file has only ",
                             data_bytes, "; it is truncated or damaged"));
  const std::int64_t bytes = *numel * dtype_bytes(*dtype);
  if (end - begin != bytes)
    return corrupt_error(
        str(where, "shape and dtype need ", bytes, " bytes, offsets give ", end - begin));
  return Placed{{entry.name, *dtype, *entry.shape, {}}, begin, end};
}

Status check_coverage(std::vector<Placed>& placed, std::int64_t data_bytes,
                      const std::string& path) {
  std::sort(placed.begin(), placed.end(), [](const Placed& a, const Placed& b) {
    return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
  });
  std::int64_t at = 0;
  for (const Placed& p : placed) {
    if (p.begin != at)
      return corrupt_error(str(path, ", tensor ", p.info.name, ": begins at byte ", p.begin,
                               p.begin < at ? " inside the tensor before it, which ends at "
                                            : " after a hole that begins at ",
                               at));
    at = p.end;
  }
  if (at != data_bytes)
    return corrupt_error(
        str(path, ": the tensors end at byte ", at, " but the data has ", data_bytes));
  return {};
}

}  // namespace

Result<std::int64_t> checked_numel(std::span<const std::int64_t> shape,
                                   std::int64_t element_bytes) {
  std::int64_t bytes = element_bytes;
  bool zero = false;
  for (std::int64_t dimension : shape) {
    if (dimension < 0) return invalid_error(str("negative dimension ", dimension));
    zero = zero || dimension == 0;
    // A zero elsewhere does not excuse the rest: another reader may multiply in another order.
    if (dimension != 0 && __builtin_mul_overflow(bytes, dimension, &bytes))
      return invalid_error("the product of the shape overflows");
  }
  return zero ? 0 : bytes / element_bytes;
}

std::int64_t TensorInfo::numel() const {
  std::int64_t n = 1;
  for (std::int64_t d : shape) n *= d;
  return n;
}

Result<std::int64_t> SafetensorsHead::size(std::span<const std::byte> bytes,
                                           std::int64_t file_bytes, const std::string& path) {
  if (bytes.size() < 8)
    return corrupt_error(
        str(path, ": truncated: a safetensors file has at least 8 bytes, this one ", bytes.size()));
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), 8);
  if (header_bytes > static_cast<std::uint64_t>(kSafetensorsHeaderBytesMax))
    return corrupt_error(str(path, ": a header of ", header_bytes, " bytes; the limit is ",
                             kSafetensorsHeaderBytesMax, " (is this a safetensors file?)"));
  const auto head = static_cast<std::int64_t>(8 + header_bytes);
  if (head > file_bytes)
    return corrupt_error(str(path, ": truncated: the header alone needs ", head,
                             " bytes, the file has ", file_bytes));
  return head;
}

Result<SafetensorsHead> SafetensorsHead::parse(std::span<const std::byte> bytes,
                                               std::int64_t file_bytes, const std::string& path) {
  TANDEM_ASSIGN_OR_RETURN(const std::int64_t head, size(bytes, file_bytes, path));
  TANDEM_CHECK(static_cast<std::int64_t>(bytes.size()) >= head, bytes.size(), " of ", head);
  const auto header_bytes = static_cast<std::size_t>(head - 8);
  const std::string_view header(reinterpret_cast<const char*>(bytes.data()) + 8, header_bytes);
  HeaderReader reader;
  bool parsed = false;
  try {
    parsed = Json::sax_parse(header.begin(), header.end(), &reader);
  } catch (const std::exception& error) {
    reader.error = error.what();
  }
  if (header.empty() || header.front() != '{') reader.error = "does not begin with {";
  if (!parsed || !reader.error.empty())
    return corrupt_error(str(path, ": bad safetensors header: ", reader.error));

  SafetensorsHead result;
  const std::int64_t data_bytes = file_bytes - head;
  for (const HeaderEntry& entry : reader.entries) {
    TANDEM_ASSIGN_OR_RETURN(Placed p, place(entry, data_bytes, path));
    result.tensors.push_back(std::move(p));
  }
  TANDEM_RETURN_IF_ERROR(check_coverage(result.tensors, data_bytes, path));
  for (Placed& p : result.tensors) {
    p.begin += head;
    p.end += head;
  }
  result.metadata = std::move(reader.metadata);
  return result;
}

Result<Safetensors> Safetensors::parse(std::shared_ptr<const MappedFile> file) {
  const auto bytes = file->bytes();
  TANDEM_ASSIGN_OR_RETURN(
      SafetensorsHead head,
      SafetensorsHead::parse(bytes, static_cast<std::int64_t>(bytes.size()), file->path()));
  Safetensors result;
  for (Placed& p : head.tensors) {
    p.info.bytes =
        bytes.subspan(static_cast<std::size_t>(p.begin), static_cast<std::size_t>(p.end - p.begin));
    result.tensors_.push_back(std::move(p.info));
  }
  std::sort(result.tensors_.begin(), result.tensors_.end(),
            [](const TensorInfo& a, const TensorInfo& b) { return a.name < b.name; });
  result.metadata_ = std::move(head.metadata);
  result.files_.push_back(std::move(file));
  return result;
}

Result<Safetensors> Safetensors::open(const std::string& path) {
  TANDEM_ASSIGN_OR_RETURN(auto file, MappedFile::open(path));
  return parse(std::move(file));
}

const TensorInfo* Safetensors::find(std::string_view name) const {
  const auto at =
      std::lower_bound(tensors_.begin(), tensors_.end(), name,
                       [](const TensorInfo& t, std::string_view n) { return t.name < n; });
  return at != tensors_.end() && at->name == name ? &*at : nullptr;
}

std::vector<std::string> Safetensors::paths() const {
  std::vector<std::string> paths;
  for (const auto& file : files_) paths.push_back(file->path());
  return paths;
}

namespace {

/// tensor name -> shard file name, as the index says.
Result<std::map<std::string, std::string>> read_weight_map(const std::string& path) {
  TANDEM_ASSIGN_OR_RETURN(const std::string text, read_file(path, kIndexBytesMax));
  TANDEM_ASSIGN_OR_RETURN(const Json index, parse_json_strict(text, path));
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object())
    return corrupt_error(path + ": no weight_map");
  std::map<std::string, std::string> weight_map;
  for (const auto& [tensor, file] : index["weight_map"].items()) {
    if (!file.is_string())
      return corrupt_error(path + ": the shard of " + tensor + " is not a string");
    const std::string name = file.get<std::string>();
    if (name.empty() || name.find('/') != std::string::npos || name.front() == '.')
      return corrupt_error(path + ": the shard of " + tensor +
                           " is not a plain file name: " + name);
    weight_map[tensor] = name;
  }
  if (weight_map.empty()) return corrupt_error(path + ": an empty weight_map");
  return weight_map;
}

Result<std::string> only_safetensors_file(const std::string& folder) {
  std::vector<std::string> found;
  std::error_code error;
  for (std::filesystem::directory_iterator it(folder, error), end; !error && it != end;
       it.increment(error))
    if (it->path().extension() == ".safetensors") found.push_back(it->path().string());
  if (error) return not_found_error(str("cannot list the folder ", folder, ": ", error.message()));
  if (found.empty()) return not_found_error("no *.safetensors in " + folder);
  if (found.size() > 1)
    return invalid_error(
        str(folder, " has ", found.size(),
            " *.safetensors files but neither model.safetensors nor model.safetensors.index.json"));
  return found.front();
}

}  // namespace

Result<Safetensors> Safetensors::open_folder(const std::string& folder) {
  namespace fs = std::filesystem;
  const std::string index_path = (fs::path(folder) / "model.safetensors.index.json").string();
  std::error_code ignored;
  if (!fs::exists(index_path, ignored)) {
    const std::string single = (fs::path(folder) / "model.safetensors").string();
    if (fs::exists(single, ignored)) return open(single);
    TANDEM_ASSIGN_OR_RETURN(const std::string only, only_safetensors_file(folder));
    return open(only);
  }
  TANDEM_ASSIGN_OR_RETURN(const auto weight_map, read_weight_map(index_path));
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : weight_map) shards.insert(shard);
  Safetensors result;
  for (const std::string& shard : shards) {
    TANDEM_ASSIGN_OR_RETURN(Safetensors one, open((fs::path(folder) / shard).string()));
    for (TensorInfo& tensor : one.tensors_) {
      const auto named = weight_map.find(tensor.name);
      if (named == weight_map.end() || named->second != shard)
        return corrupt_error(str(index_path, ": tensor ", tensor.name, " is in ", shard,
                                 ", where the index does not name it"));
      result.tensors_.push_back(std::move(tensor));
    }
    if (result.files_.empty()) result.metadata_ = std::move(one.metadata_);
    result.files_.push_back(one.files_.front());
  }
  std::sort(result.tensors_.begin(), result.tensors_.end(),
            [](const TensorInfo& a, const TensorInfo& b) { return a.name < b.name; });
  for (const auto& [tensor, shard] : weight_map)
    if (result.find(tensor) == nullptr)
      return corrupt_error(str(index_path, ": tensor ", tensor, " is missing from ", shard));
  return result;
}

}  // namespace tandem::storage
