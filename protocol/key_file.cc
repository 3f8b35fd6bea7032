#include "protocol/key_file.h"

#include "protocol/base/clock.h"
#include "protocol/base/ids.h"
#include "protocol/base/log.h"
#include "protocol/base/str.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <sstream>
#include <system_error>

namespace tandem::protocol {
namespace {

constexpr std::array<const char*, 3> kRoleNames{"client", "worker", "admin"};
constexpr const char* kFirstLine = "tandem-key 1";
constexpr std::size_t kZ85Bytes = 40;

bool good_name(const std::string& name) {
  return !name.empty() && name.size() <= kKeyNameBytesMax &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) {
           return std::isalnum(c) != 0 || c == '.' || c == '_' || c == '-';
         });
}

bool good_z85(const std::string& key) {
  static constexpr std::string_view kAlphabet =
      "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#";
  return key.size() == kZ85Bytes && key.find_first_not_of(kAlphabet) == std::string::npos;
}

/// Closes on every way out.
class Fd {
 public:
  explicit Fd(int fd) : fd_(fd) {}
  ~Fd() {
    if (fd_ >= 0) ::close(fd_);
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  [[nodiscard]] int get() const { return fd_; }

 private:
  int fd_;
};

/// This process, or the machine, has none left; it says nothing about the file.
bool is_shortage(int error) {
  return error == EMFILE || error == ENFILE || error == ENOMEM;
}

Result<std::string> read_private(const std::string& path) {
  const Fd file(::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (file.get() < 0) {
    const int error = errno;
    const std::string why = str("key file ", path, ": ", std::strerror(error));
    if (error == ENOENT) return not_found_error(str("key file ", path, ": there is none"));
    return is_shortage(error) ? unavailable_error(why) : refused_error(why);
  }
  struct stat info {};
  if (::fstat(file.get(), &info) != 0 || !S_ISREG(info.st_mode))
    return refused_error(str("key file ", path, ": not a plain file"));
  if ((info.st_mode & 077) != 0)
    return refused_error(str("key file ", path, ": others may read or write it (mode ", std::oct,
                             info.st_mode & 0777,
                             "): chmod 600 it, and make a new key if others "
                             "could have read it"));
  if (info.st_uid != ::geteuid() && ::geteuid() != 0)
    return refused_error(str("key file ", path, ": it belongs to user ", info.st_uid));
  if (info.st_size > kKeyFileBytesMax)
    return invalid_error(str("key file ", path, ": ", info.st_size, " bytes exceed the limit of ",
                             kKeyFileBytesMax));
  std::string content(static_cast<std::size_t>(info.st_size), '\0');
  const ssize_t got = ::read(file.get(), content.data(), content.size());
  if (got != static_cast<ssize_t>(content.size()))
    return internal_error(str("key file ", path, ": could not be read"));
  return content;
}

/// Takes one "field value" line into `key`; what is wrong with it, or "".
std::string take_line(const std::string& line, KeyFile& key) {
  const std::size_t space = line.find(' ');
  const std::string field = line.substr(0, space);
  const std::string value = space == std::string::npos ? "" : line.substr(space + 1);
  if (field == "name") {
    if (!good_name(value)) return "a name has 1..64 of letters, digits and . _ -";
    key.name = value;
  } else if (field == "role") {
    const auto role = parse_key_role(value);
    if (!role.ok()) return role.status().message();
    key.role = *role;
  } else if (field == "public" || field == "secret" || field == "server") {
    if (!good_z85(value)) return "a key has 40 characters of Z85";
    (field == "public"   ? key.public_key
     : field == "secret" ? key.secret_key
                         : key.server_key) = value;
  } else {
    return "unknown field (name, role, public, secret and server are known)";
  }
  return "";
}

}  // namespace

const char* key_role_name(KeyRole role) {
  return kRoleNames.at(static_cast<std::size_t>(role));
}

Result<KeyRole> parse_key_role(const std::string& name) {
  for (std::size_t i = 0; i < kRoleNames.size(); ++i)
    if (name == kRoleNames[i]) return static_cast<KeyRole>(i);
  return invalid_error(str("unknown role \"", name, "\" (client, worker or admin)"));
}

Result<KeyFile> read_key_file(const std::string& path) {
  TANDEM_ASSIGN_OR_RETURN(const std::string content, read_private(path));
  std::istringstream lines(content);
  std::string line;
  KeyFile key;
  bool role_seen = false;
  for (int number = 1; std::getline(lines, line); ++number) {
    // The line itself is never quoted: it may be a secret.
    if (number == 1 && line != kFirstLine)
      return invalid_error(str("key file ", path, ": line 1 must be \"", kFirstLine, "\""));
    if (number == 1 || line.empty()) continue;
    if (const std::string why = take_line(line, key); !why.empty())
      return invalid_error(str("key file ", path, ": line ", number, ": ", why));
    role_seen = role_seen || line.rfind("role ", 0) == 0;
  }
  if (key.name.empty() || key.public_key.empty() || !role_seen)
    return invalid_error(str("key file ", path, ": name, role and public must all be there"));
  return key;
}

Status write_key_file(const std::string& path, const KeyFile& key, bool replace) {
  if (!good_name(key.name))
    return invalid_error(
        str("key name \"", key.name, "\": a name has 1..64 of letters, digits and . _ -"));
  const auto good_if_there = [](const std::string& z85) { return z85.empty() || good_z85(z85); };
  if (!good_z85(key.public_key) || !good_if_there(key.secret_key) || !good_if_there(key.server_key))
    return invalid_error(str("key ", key.name, ": a key has 40 characters of Z85"));
  std::string content = str(kFirstLine, "\nname ", key.name, "\nrole ", key_role_name(key.role),
                            "\npublic ", key.public_key, "\n");
  if (!key.secret_key.empty()) content += "secret " + key.secret_key + "\n";
  if (!key.server_key.empty()) content += "server " + key.server_key + "\n";
  const std::string temporary = path + random_id(".new-", 12);
  const auto fail = [&](const char* what) {
    const int error = errno;
    ::unlink(temporary.c_str());
    return internal_error(str("key file ", path, ": ", what, ": ", std::strerror(error)));
  };
  {
    const Fd file(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    if (file.get() < 0) return fail("cannot be made");
    if (::write(file.get(), content.data(), content.size()) != static_cast<ssize_t>(content.size()))
      return fail("cannot be written");
    if (::fsync(file.get()) != 0) return fail("cannot be made durable");
  }
  if (replace) return ::rename(temporary.c_str(), path.c_str()) == 0 ? Status() : fail("rename");
  // link() fails when the name is taken, which rename() would not.
  if (::link(temporary.c_str(), path.c_str()) != 0) {
    if (errno != EEXIST) return fail("cannot be put in place");
    ::unlink(temporary.c_str());
    return conflict_error(str("key file ", path, " exists already"));
  }
  ::unlink(temporary.c_str());
  return {};
}

KeyRing::KeyRing(std::string directory) : directory_(std::move(directory)) {}

void KeyRing::refresh() {
  const std::int64_t now = steady_ns();
  if (looked_ns_ != 0 && now - looked_ns_ < kKeyLookMs * 1'000'000LL) return;
  looked_ns_ = now;
  std::error_code error;
  std::vector<std::string> paths;
  std::filesystem::directory_iterator entries(directory_, error), end;
  for (; !error && entries != end && paths.size() < kKeyFilesMax; entries.increment(error))
    if (entries->path().extension() == ".key") paths.push_back(entries->path().string());
  if (is_shortage(error.value())) return;
  std::sort(paths.begin(), paths.end());
  std::string seen;
  for (const std::string& path : paths) {
    struct stat info {};
    if (::lstat(path.c_str(), &info) == 0)
      seen += str(path, ' ', info.st_ino, ' ', info.st_mode, ' ', info.st_size, ' ',
                  info.st_mtim.tv_sec, '.', info.st_mtim.tv_nsec, '\n');
  }
  if (seen == seen_) return;
  std::map<std::string, KeyFile> keys;
  for (const std::string& path : paths) {
    auto key = read_key_file(path);
    if (key.status().code() == StatusCode::kUnavailable) return;
    if (!key.ok())
      log_warn("key skipped: ", key.status().message());
    else
      keys[key->public_key] = std::move(*key);
  }
  seen_ = seen;
  by_public_key_ = std::move(keys);
}

Result<KeyFile> KeyRing::find(const std::string& public_key) {
  std::lock_guard lock(mutex_);
  refresh();
  const auto it = by_public_key_.find(public_key);
  if (it == by_public_key_.end())
    return not_found_error(str("no key in ", directory_, " has this public half"));
  return it->second;
}

Result<KeyFile> KeyRing::find_name(const std::string& name) {
  std::lock_guard lock(mutex_);
  refresh();
  for (const auto& [public_key, key] : by_public_key_)
    if (key.name == name) return key;
  return not_found_error(str("no key ", name, " in ", directory_));
}

std::vector<KeyFile> KeyRing::list() {
  std::lock_guard lock(mutex_);
  refresh();
  std::vector<KeyFile> keys;
  for (const auto& [public_key, key] : by_public_key_) keys.push_back(key);
  std::sort(keys.begin(), keys.end(),
            [](const KeyFile& a, const KeyFile& b) { return a.name < b.name; });
  return keys;
}

}  // namespace tandem::protocol
