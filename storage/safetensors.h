// safetensors files: https://github.com/huggingface/safetensors#format, read strictly.
//
// A file is 8 bytes (little-endian header length N), N bytes of JSON, then the tensors' bytes. The
// reader maps the file and refuses, with a message that names file and tensor: a header over 100 MB
// or not a JSON object, unknown or missing fields, a name that appears twice, offsets that are
// reversed, overlap, leave holes or leave the file, a shape whose product overflows or does not
// match dtype and offsets, and a truncated file (expected and actual bytes are named). Element
// types outside DType are refused.
#pragma once

#include "protocol/base/dtype.h"
#include "protocol/base/result.h"
#include "storage/mapped_file.h"

#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tandem::storage {

inline constexpr std::int64_t kSafetensorsHeaderBytesMax = 100'000'000;
inline constexpr std::size_t kTensorRankMax = 8;
inline constexpr std::size_t kTensorNameBytesMax = 1024;

/// One tensor, row-major, little-endian. `bytes` points into memory that the reader (or the caller,
/// for the writer) keeps alive, and may be unaligned for its dtype: copy it, or check before
/// casting.
struct TensorInfo {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> bytes;

  /// The product of the shape (1 for a scalar).
  [[nodiscard]] std::int64_t numel() const;
};

/// What the beginning of a file says: for whoever has the rest in pieces.
struct SafetensorsHead {
  struct Placed {
    TensorInfo info;                  ///< without bytes
    std::int64_t begin = 0, end = 0;  ///< in the file
  };
  std::vector<Placed> tensors;  ///< in the file's order, without holes
  std::map<std::string, std::string> metadata;

  /// Bytes of the head, by the file's first 8.
  static Result<std::int64_t> size(std::span<const std::byte> bytes, std::int64_t file_bytes,
                                   const std::string& path);
  /// `bytes` begin with the whole head. As strict as the reader of files.
  static Result<SafetensorsHead> parse(std::span<const std::byte> bytes, std::int64_t file_bytes,
                                       const std::string& path);
};

/// The tensors of one file, or of all shards of a model, sorted by name. A cheap handle: copies
/// share the mappings, which live as long as any copy does. Any thread may read.
class Safetensors {
 public:
  /// One .safetensors file.
  static Result<Safetensors> open(const std::string& path);
  /// A Hugging Face folder: model.safetensors.index.json with its shards, else model.safetensors,
  /// else the folder's only *.safetensors. Every tensor that the index names must be in the shard
  /// it names, and no tensor may appear in two shards. Errors: not_found (no safetensors here),
  /// corrupt, refused.
  static Result<Safetensors> open_folder(const std::string& folder);
  /// The same reader over bytes already at hand.
  static Result<Safetensors> parse(std::shared_ptr<const MappedFile> file);

  [[nodiscard]] const std::vector<TensorInfo>& tensors() const { return tensors_; }
  /// nullptr when there is no such tensor.
  [[nodiscard]] const TensorInfo* find(std::string_view name) const;
  /// __metadata__ of the file (of the first shard, for several).
  [[nodiscard]] const std::map<std::string, std::string>& metadata() const { return metadata_; }
  /// Paths of the files behind this, in the order they were opened.
  [[nodiscard]] std::vector<std::string> paths() const;

 private:
  std::vector<std::shared_ptr<const MappedFile>> files_;
  std::vector<TensorInfo> tensors_;
  std::map<std::string, std::string> metadata_;
};

/// The file's bytes as the reference implementation writes them: tensors by falling element type
/// (so that each is aligned), then by name; header padded with spaces to 8 bytes. Errors: invalid
/// (a name twice, too long or not UTF-8, bytes that do not match dtype and shape).
Result<std::vector<std::byte>> encode_safetensors(
    std::span<const TensorInfo> tensors, const std::map<std::string, std::string>& metadata);
/// The same to a file, durably (temporary name, fsync, rename), without a copy of the tensors.
Status write_safetensors(const std::string& path, std::span<const TensorInfo> tensors,
                         const std::map<std::string, std::string>& metadata);

/// A file that several processes fill: header and room for all tensors first, by one of them
/// (`bytes` of the tensors is ignored; a full disk shows here), then each maps it and writes what
/// it has. Not durable before sync().
class SafetensorsDraft {
 public:
  static Status create(const std::string& path, std::span<const TensorInfo> tensors,
                       const std::map<std::string, std::string>& metadata);
  /// Of a file that create() made. Errors as Safetensors::open.
  static Result<SafetensorsDraft> open(const std::string& path);
  /// A tensor's room; empty when there is no such tensor.
  [[nodiscard]] std::span<std::byte> room(std::string_view name) const;
  [[nodiscard]] const std::vector<TensorInfo>& tensors() const { return file_.tensors(); }
  Status sync() const;

 private:
  Safetensors file_;  ///< the same pages, read only
  std::string path_;
  std::shared_ptr<std::byte> pages_;
  std::span<const std::byte> read_;
};

/// shape's product, or an invalid Status when a dimension is negative or the product (times
/// `element_bytes`) leaves int64.
Result<std::int64_t> checked_numel(std::span<const std::int64_t> shape, std::int64_t element_bytes);

}  // namespace tandem::storage
