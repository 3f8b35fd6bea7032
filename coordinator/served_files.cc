#include "coordinator/served_files.h"

#include "protocol/base/str.h"
#include "storage/blob_store.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace tandem::coordinator {
namespace {

struct FileDescriptor {
  int fd = -1;
  ~FileDescriptor() {
    if (fd >= 0) ::close(fd);
  }
};

}  // namespace

void ServedFiles::add(const ModelRecord& model) {
  std::lock_guard lock(mutex_);  // over both: who reads meanwhile finds the old files or the new
  forget(model.name);
  for (const ModelFile& file : model.files)
    files_.emplace(
        file.root,
        File{model.name, file.path.empty() ? model.path : model.path + "/" + file.path, file});
}

void ServedFiles::remove(const std::string& model_name) {
  std::lock_guard lock(mutex_);
  forget(model_name);
}

void ServedFiles::forget(const std::string& model_name) {
  std::erase_if(files_, [&](const auto& entry) { return entry.second.model == model_name; });
}

Result<ServedFiles::Piece> ServedFiles::read(const Digest& root, std::int64_t offset,
                                             std::int64_t bytes) const {
  std::vector<File> files;
  {
    std::lock_guard lock(mutex_);
    const auto [first, last] = files_.equal_range(root);
    for (auto entry = first; entry != last; ++entry) files.push_back(entry->second);
  }
  Status failed = not_found_error(str("no chunk and no model file has the digest ", root));
  for (const File& file : files) {
    auto piece = file.described.chunks.empty() ? read_file(file, offset, bytes)
                                               : read_chunk(file, offset, bytes);
    if (piece.ok()) return piece;
    failed = piece.status();
  }
  return failed;
}

Result<ServedFiles::Piece> ServedFiles::read_file(const File& file, std::int64_t offset,
                                                  std::int64_t bytes) const {
  FileDescriptor opened{::open(file.path.c_str(), O_RDONLY | O_CLOEXEC)};
  struct stat info {};
  if (opened.fd < 0 || ::fstat(opened.fd, &info) != 0)
    return internal_error(str("cannot read ", file.path, ": ", std::strerror(errno)));
  const std::int64_t mtime_ns = info.st_mtim.tv_sec * 1'000'000'000ll + info.st_mtim.tv_nsec;
  if (info.st_size != file.described.bytes || mtime_ns != file.described.mtime_ns)
    return corrupt_error(str(file.path, " changed since model ", file.model,
                             " was added; remove the model and add it again"));
  if (offset < 0 || offset > info.st_size)
    return invalid_error(
        str("offset ", offset, " lies outside ", file.path, " of ", info.st_size, " bytes"));
  Piece piece;
  piece.total_bytes = info.st_size;
  const std::int64_t want =
      bytes <= 0 ? storage::kBlobChunkBytesMax : std::min(bytes, storage::kBlobChunkBytesMax);
  piece.bytes.resize(static_cast<std::size_t>(std::min(want, info.st_size - offset)));
  std::size_t done = 0;
  while (done < piece.bytes.size()) {
    const ssize_t got = ::pread(opened.fd, piece.bytes.data() + done, piece.bytes.size() - done,
                                offset + static_cast<off_t>(done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0)
      return internal_error(str("cannot read ", file.path, ": ",
                                got == 0 ? "it became shorter" : std::strerror(errno)));
    done += static_cast<std::size_t>(got);
  }
  return piece;
}

Result<ServedFiles::Piece> ServedFiles::read_chunk(const File& file, std::int64_t offset,
                                                   std::int64_t bytes) const {
  const std::int64_t total = file.described.bytes;
  if (blobs_ == nullptr || offset < 0 || offset > total)
    return invalid_error(str("offset ", offset, " lies outside ", file.described.path, " of ",
                             file.model, " of ", total, " bytes"));
  Piece piece;
  piece.total_bytes = total;
  if (offset == total) return piece;
  const auto index = static_cast<std::size_t>(offset / kDigestLeafBytes);
  TANDEM_ASSIGN_OR_RETURN(const auto chunk, blobs_->get(file.described.chunks.at(index)));
  const std::int64_t begin = offset % kDigestLeafBytes;
  const auto size = static_cast<std::int64_t>(chunk.size());
  const std::int64_t end = bytes <= 0 || bytes > size - begin ? size : begin + bytes;
  if (begin < end) piece.bytes.assign(chunk.begin() + begin, chunk.begin() + end);
  return piece;
}

}  // namespace tandem::coordinator
