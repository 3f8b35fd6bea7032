#include "storage/file_io.h"

#include "protocol/base/ids.h"
#include "protocol/base/units.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>

namespace tandem::storage {
namespace {

namespace fs = std::filesystem;

struct Fd {
  int value;
  explicit Fd(int fd) : value(fd) {}
  ~Fd() {
    if (value >= 0) ::close(value);
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
};

Status io_error(const std::string& what, const std::string& path, int error) {
  if (error == ENOENT) return not_found_error(str("no file ", path));
  if (error == ENOSPC || error == EDQUOT)
    return internal_error(
        str("disk full: cannot ", what, " ", path, "; free some space and repeat"));
  return internal_error(str("cannot ", what, " ", path, ": ", std::strerror(error)));
}

Status write_all(int fd, std::span<const std::byte> bytes, const std::string& path) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return io_error("write", path, errno);
    bytes = bytes.subspan(static_cast<std::size_t>(n));
  }
  return {};
}

}  // namespace

Result<std::string> read_file(const std::string& path, std::int64_t bytes_max) {
  Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (fd.value < 0) return io_error("open", path, errno);
  struct stat info {};
  if (::fstat(fd.value, &info) != 0) return io_error("stat", path, errno);
  if (!S_ISREG(info.st_mode)) return invalid_error(str(path, " is not a regular file"));
  if (info.st_size > bytes_max)
    return refused_error(str(path, " has ", info.st_size, " bytes; the limit here is ", bytes_max));
  std::string text(static_cast<std::size_t>(info.st_size), '\0');
  std::size_t done = 0;
  while (done < text.size()) {
    const ssize_t n = ::read(fd.value, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return io_error("read", path, errno);
    if (n == 0) break;  // cut short meanwhile: what is there is what the caller gets
    done += static_cast<std::size_t>(n);
  }
  text.resize(done);
  return text;
}

Status write_file_durably(const std::string& path,
                          std::span<const std::span<const std::byte>> parts) {
  const std::string temporary = path + "." + random_id("tmp-", 8);
  Status status = [&]() -> Status {
    Fd fd(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    if (fd.value < 0) return io_error("create", temporary, errno);
    for (auto part : parts) TANDEM_RETURN_IF_ERROR(write_all(fd.value, part, path));
    if (::fsync(fd.value) != 0) return io_error("sync", path, errno);
    return {};
  }();
  if (status.ok() && ::rename(temporary.c_str(), path.c_str()) != 0)
    status = io_error("rename to", path, errno);
  if (!status.ok()) {
    ::unlink(temporary.c_str());
    return status;
  }
  return sync_directory(fs::path(path).parent_path().string());
}

Status write_file_durably(const std::string& path, std::string_view text) {
  const std::array<std::span<const std::byte>, 1> parts{as_bytes(text)};
  return write_file_durably(path, parts);
}

Status sync_directory(const std::string& directory) {
  const std::string path = directory.empty() ? "." : directory;
  Fd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (fd.value < 0) return io_error("open the folder", path, errno);
  if (::fsync(fd.value) != 0) return io_error("sync the folder", path, errno);
  return {};
}

Status make_directories(const std::string& path) {
  std::error_code error;
  const bool existed = fs::is_directory(path, error);
  if (existed) return {};
  fs::create_directories(path, error);
  if (error) return io_error("make the folder", path, error.value());
  ::chmod(path.c_str(), 0700);
  return sync_directory(fs::path(path).parent_path().string());
}

Status copy_file_durably(const std::string& from, const std::string& to) {
  Fd in(::open(from.c_str(), O_RDONLY | O_CLOEXEC));
  if (in.value < 0) return io_error("open", from, errno);
  Fd out(::open(to.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (out.value < 0) return io_error("create", to, errno);
  std::vector<std::byte> buffer(static_cast<std::size_t>(4 * kMiB));
  for (;;) {
    const ssize_t n = ::read(in.value, buffer.data(), buffer.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return io_error("read", from, errno);
    if (n == 0) break;
    TANDEM_RETURN_IF_ERROR(
        write_all(out.value, std::span(buffer).first(static_cast<std::size_t>(n)), to));
  }
  if (::fsync(out.value) != 0) return io_error("sync", to, errno);
  return {};
}

Status require_free_space(const std::string& directory, std::int64_t bytes) {
  struct statvfs info {};
  if (::statvfs(directory.c_str(), &info) != 0) return io_error("look at", directory, errno);
  const auto free_bytes =
      static_cast<std::int64_t>(info.f_bavail) * static_cast<std::int64_t>(info.f_frsize);
  if (free_bytes < bytes)
    return internal_error(str("disk full: ", directory, " has ", format_bytes(free_bytes),
                              " free and ", format_bytes(bytes),
                              " are needed; free some space or choose another --data-dir"));
  return {};
}

Status refuse_network_file_system(long magic, const std::string& path) {
  struct Known {
    std::uint32_t magic;
    const char* name;
  };
  static constexpr std::array<Known, 9> kNetwork{{{0x6969u, "NFS"},
                                                  {0x517Bu, "SMB"},
                                                  {0xFF534D42u, "CIFS"},
                                                  {0xFE534D42u, "SMB2"},
                                                  {0x00C36400u, "Ceph"},
                                                  {0x0BD00BD0u, "Lustre"},
                                                  {0x47504653u, "GPFS"},
                                                  {0x5346414Fu, "AFS"},
                                                  {0x01021997u, "9P"}}};
  for (const Known& known : kNetwork)
    if (static_cast<std::uint32_t>(magic) == known.magic)
      return refused_error(str(path, " is on ", known.name,
                               ", a network file system; memory maps and locks are not safe there: "
                               "choose a --data-dir on a local disk"));
  return {};
}

Status refuse_network_file_system(const std::string& path) {
  struct statfs info {};
  if (::statfs(path.c_str(), &info) != 0) return io_error("look at", path, errno);
  return refuse_network_file_system(static_cast<long>(info.f_type), path);
}

}  // namespace tandem::storage
