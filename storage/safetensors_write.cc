#include "storage/file_io.h"
#include "storage/json_strict.h"
#include "storage/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace tandem::storage {
namespace {

const char* safetensors_dtype(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return "F64";
    case DType::kI64:
      return "I64";
    case DType::kF32:
      return "F32";
    case DType::kI32:
      return "I32";
    case DType::kBF16:
      return "BF16";
    case DType::kF16:
      return "F16";
    case DType::kI8:
      return "I8";
    case DType::kU8:
      return "U8";
  }
  return "";
}

// The reference writer's order of element types: wider first, so that every tensor is aligned.
int type_rank(DType dtype) {
  switch (dtype) {
    case DType::kI64:
      return 0;
    case DType::kF64:
      return 1;
    case DType::kF32:
      return 2;
    case DType::kI32:
      return 3;
    case DType::kBF16:
      return 4;
    case DType::kF16:
      return 5;
    case DType::kI8:
      return 6;
    case DType::kU8:
      return 7;
  }
  return 8;
}

struct Layout {
  std::string head;  ///< length and header
  std::vector<const TensorInfo*> order;
  std::int64_t bytes = 0;  ///< of all tensors
};

/// Bytes of a tensor in the file; `sized`: its bytes are at hand and must be as many.
Result<std::int64_t> check_tensor(const TensorInfo& tensor, bool sized) {
  if (tensor.name.empty() || tensor.name == "__metadata__" ||
      tensor.name.size() > kTensorNameBytesMax)
    return invalid_error(str("not a tensor name: \"", tensor.name.substr(0, 80), "\""));
  if (tensor.shape.size() > kTensorRankMax)
    return invalid_error(str("tensor ", tensor.name, " has ", tensor.shape.size(),
                             " dimensions; the limit is ", kTensorRankMax));
  auto numel = checked_numel(tensor.shape, dtype_bytes(tensor.dtype));
  if (!numel.ok())
    return invalid_error(str("tensor ", tensor.name, ": ", numel.status().message()));
  const std::int64_t bytes = *numel * dtype_bytes(tensor.dtype);
  if (sized && bytes != static_cast<std::int64_t>(tensor.bytes.size()))
    return invalid_error(str("tensor ", tensor.name, ": shape and dtype need ", bytes,
                             " bytes, got ", tensor.bytes.size()));
  return bytes;
}

Result<Layout> make_layout(std::span<const TensorInfo> tensors,
                           const std::map<std::string, std::string>& metadata, bool sized = true) {
  Layout layout;
  std::map<const TensorInfo*, std::int64_t> sizes;
  for (const TensorInfo& tensor : tensors) {
    TANDEM_ASSIGN_OR_RETURN(sizes[&tensor], check_tensor(tensor, sized));
    layout.order.push_back(&tensor);
  }
  std::sort(layout.order.begin(), layout.order.end(), [](const TensorInfo* a, const TensorInfo* b) {
    return std::pair(type_rank(a->dtype), std::string_view(a->name)) <
           std::pair(type_rank(b->dtype), std::string_view(b->name));
  });
  std::vector<std::string_view> names;
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::int64_t at = 0;
  for (const TensorInfo* tensor : layout.order) {
    const std::int64_t end = at + sizes[tensor];
    names.push_back(tensor->name);
    header.get_ref<nlohmann::ordered_json::object_t&>().emplace_back(
        tensor->name, nlohmann::ordered_json{{"dtype", safetensors_dtype(tensor->dtype)},
                                             {"shape", tensor->shape},
                                             {"data_offsets", {at, end}}});
    at = end;
  }
  layout.bytes = at;
  std::sort(names.begin(), names.end());
  if (const auto twice = std::adjacent_find(names.begin(), names.end()); twice != names.end())
    return invalid_error(str("the tensor ", *twice, " is given twice"));
  std::string text;
  try {
    text = header.dump();
  } catch (const std::exception& error) {
    return invalid_error(str("a tensor name or metadata is not UTF-8: ", error.what()));
  }
  text.resize((text.size() + 7) / 8 * 8, ' ');
  if (static_cast<std::int64_t>(text.size()) > kSafetensorsHeaderBytesMax)
    return invalid_error(
        str("a header of ", text.size(), " bytes; the limit is ", kSafetensorsHeaderBytesMax));
  const std::uint64_t length = text.size();
  layout.head.resize(8);
  std::memcpy(layout.head.data(), &length, 8);
  layout.head += text;
  return layout;
}

}  // namespace

Result<std::vector<std::byte>> encode_safetensors(
    std::span<const TensorInfo> tensors, const std::map<std::string, std::string>& metadata) {
  TANDEM_ASSIGN_OR_RETURN(const Layout layout, make_layout(tensors, metadata));
  std::vector<std::byte> bytes(as_bytes(layout.head).begin(), as_bytes(layout.head).end());
  for (const TensorInfo* tensor : layout.order)
    bytes.insert(bytes.end(), tensor->bytes.begin(), tensor->bytes.end());
  return bytes;
}

Status write_safetensors(const std::string& path, std::span<const TensorInfo> tensors,
                         const std::map<std::string, std::string>& metadata) {
  TANDEM_ASSIGN_OR_RETURN(const Layout layout, make_layout(tensors, metadata));
  std::vector<std::span<const std::byte>> parts{as_bytes(layout.head)};
  for (const TensorInfo* tensor : layout.order) parts.push_back(tensor->bytes);
  return write_file_durably(path, parts);
}

Status SafetensorsDraft::create(const std::string& path, std::span<const TensorInfo> tensors,
                                const std::map<std::string, std::string>& metadata) {
  TANDEM_ASSIGN_OR_RETURN(const Layout layout, make_layout(tensors, metadata, false));
  TANDEM_RETURN_IF_ERROR(write_file_durably(path, layout.head));
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return internal_error(str("cannot open ", path, ": ", std::strerror(errno)));
  // Room now: a page that finds none later ends the process.
  const int error = ::posix_fallocate(fd, 0, static_cast<off_t>(layout.head.size()) + layout.bytes);
  ::close(fd);
  if (error != 0)
    return internal_error(
        str("cannot make ", path, " of ", layout.bytes, " bytes: ", std::strerror(error)));
  return {};
}

Result<SafetensorsDraft> SafetensorsDraft::open(const std::string& path) {
  TANDEM_ASSIGN_OR_RETURN(const auto mapped, MappedFile::open(path));
  SafetensorsDraft draft;
  TANDEM_ASSIGN_OR_RETURN(draft.file_, Safetensors::parse(mapped));
  draft.path_ = path;
  draft.read_ = mapped->bytes();
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  void* pages =
      fd < 0 ? MAP_FAILED
             : ::mmap(nullptr, draft.read_.size(), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  const int map_errno = errno;
  if (fd >= 0) ::close(fd);
  if (pages == MAP_FAILED)
    return internal_error(str("cannot map ", path, ": ", std::strerror(map_errno)));
  draft.pages_ = {static_cast<std::byte*>(pages),
                  [size = draft.read_.size()](std::byte* at) { ::munmap(at, size); }};
  return draft;
}

std::span<std::byte> SafetensorsDraft::room(std::string_view name) const {
  const TensorInfo* tensor = file_.find(name);
  if (tensor == nullptr) return {};
  return {pages_.get() + (tensor->bytes.data() - read_.data()), tensor->bytes.size()};
}

Status SafetensorsDraft::sync() const {
  if (::msync(pages_.get(), read_.size(), MS_SYNC) == 0) return {};
  return internal_error(str("cannot write ", path_, ": ", std::strerror(errno)));
}

}  // namespace tandem::storage
