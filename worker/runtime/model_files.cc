#include "worker/runtime/model_files.h"

#include "protocol/base/file_lock.h"
#include "protocol/base/log.h"
#include "protocol/base/processors.h"
#include "storage/mapped_file.h"

#include <nlohmann/json.hpp>

#include <fcntl.h>
#include <sys/stat.h>

#include <ctime>
#include <filesystem>
#include <fstream>
#include <map>

namespace tandem::worker::runtime {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

/// What hashing once proved: "path" -> {"inode","bytes","mtime_ns","root"}. A lost or torn file
/// costs a rehash; without a path nothing is remembered.
class VerifiedFiles {
 public:
  explicit VerifiedFiles(std::string path) : path_(std::move(path)) {
    std::ifstream in(path_);
    entries_ = Json::parse(in, nullptr, false);
    if (!entries_.is_object()) entries_ = Json::object();
  }

  Result<Digest> root(const std::string& file) {
    struct stat info {};
    if (::stat(file.c_str(), &info) != 0 || !S_ISREG(info.st_mode))
      return not_found_error(str("no file ", file));
    const Json now{{"inode", info.st_ino},
                   {"bytes", info.st_size},
                   {"mtime_ns", info.st_mtim.tv_sec * 1'000'000'000ll + info.st_mtim.tv_nsec}};
    if (auto known = entries_.find(file); known != entries_.end() && known->is_object()) {
      Json stamp = *known;
      const std::string root = stamp.value("root", "");
      stamp.erase("root");
      if (stamp == now)
        if (auto digest = Digest::parse(root); digest.ok()) return digest;
    }
    TANDEM_ASSIGN_OR_RETURN(const auto mapping, storage::MappedFile::open(file));
    const Digest digest = content_root(mapping->bytes(), processors());
    Json entry = now;
    entry["root"] = digest.hex();
    entries_[file] = std::move(entry);
    save();
    return digest;
  }

 private:
  void save() const {
    if (path_.empty()) return;
    std::error_code error;
    fs::create_directories(fs::path(path_).parent_path(), error);
    const std::string temporary = str(path_, ".", ::getpid());
    if (!(std::ofstream(temporary) << entries_.dump()).flush()) return;
    fs::rename(temporary, path_, error);
  }
  const std::string path_;
  Json entries_;
};

std::string join(const std::string& directory, const std::string& relative) {
  return relative.empty() ? directory : directory + "/" + relative;
}

/// True when every file below `path` has its root; corrupt_error when one exists with another.
Result<bool> matches(const protocol::ModelRef& model, const std::string& path,
                     VerifiedFiles& verified) {
  for (const auto& [relative, root] : model.files) {
    auto actual = verified.root(join(path, relative));
    if (actual.status().code() == StatusCode::kNotFound) return false;
    if (!actual.ok()) return actual.status();
    if (*actual != root)
      return corrupt_error(str(join(path, relative), " has content ", *actual, ", but model ",
                               model.name, " was added with ", root,
                               "; restore the file or add the model again"));
  }
  return true;
}

/// When it was used last is its access time: reading a file may set it too, and no other stamp that
/// VerifiedFiles looks at changes.
void mark_used(const std::string& path) {
  const timespec times[] = {{0, UTIME_NOW}, {0, UTIME_OMIT}};
  (void)::utimensat(AT_FDCWD, path.c_str(), times, 0);
}

/// Only one process of a host fetches a model: the next one finds it. Two would write over each
/// other, and the first to be through would load what the second has not written again.
Result<FileLock> wait_for_turn(const protocol::ModelRef& model, const std::string& data_directory,
                               const BulkClient& bulk) {
  std::error_code error;
  fs::create_directories(data_directory + "/cache", error);
  const std::string path = str(data_directory, "/cache/fetch-", model.digest.hex(), ".lock");
  while (true) {
    auto lock = FileLock::acquire(path);
    if (lock.ok() || lock.status().code() != StatusCode::kConflict) return lock;
    if (bulk.cancelled()) return cancelled_error("the transfer was cancelled");
  }
}

}  // namespace

void trim_model_cache(const std::string& models, const Digest& kept, std::int64_t free_bytes) {
  std::multimap<std::int64_t, fs::path> by_use;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(models, error)) {
    const auto digest = Digest::parse(entry.path().stem().string());  // else a job's draft
    struct stat info {};
    if (digest.ok() && *digest != kept && ::stat(entry.path().c_str(), &info) == 0 &&
        info.st_atim.tv_sec + kModelSpareS < ::time(nullptr))
      by_use.emplace(info.st_atim.tv_sec, entry.path());
  }
  for (const auto& [used, path] : by_use) {
    const fs::space_info disk = fs::space(models, error);
    if (error || disk.available >= static_cast<std::uintmax_t>(free_bytes)) return;
    log_info("the disk is short of space: removing the copy of a model that was used longest ago, ",
             path.string());
    fs::remove_all(path, error);
  }
}

void trim_model_cache(const std::string& models, const Digest& kept) {
  std::error_code error;
  const fs::space_info disk = fs::space(models, error);
  if (!error) trim_model_cache(models, kept, static_cast<std::int64_t>(disk.capacity / 10));
}

Result<bool> model_is_at(const protocol::ModelRef& model, const std::string& path) {
  VerifiedFiles hashed("");
  return matches(model, path, hashed);
}

Result<std::string> locate_model(const protocol::ModelRef& model, const std::string& data_directory,
                                 BulkClient& bulk) {
  VerifiedFiles verified(data_directory + "/cache/verified_files.json");
  if (!model.path.empty()) {  // else it lies in the coordinator's blob store
    TANDEM_ASSIGN_OR_RETURN(const bool in_place, matches(model, model.path, verified));
    if (in_place) return model.path;
  }
  if (model.shared)
    return not_found_error(str("model ", model.name, " was added as shared, but ", model.path,
                               " is not on this host"));
  const bool one_file = model.files.size() == 1 && model.files[0].first.empty();
  const std::string cached =
      str(data_directory, "/cache/models/", model.digest.hex(), one_file ? ".gguf" : "");
  const auto is_cached = [&] {
    const auto have = matches(model, cached, verified);
    if (have.ok() && *have) mark_used(cached);
    return have.ok() && *have;
  };
  if (is_cached()) return cached;
  TANDEM_ASSIGN_OR_RETURN(const FileLock turn, wait_for_turn(model, data_directory, bulk));
  if (is_cached()) return cached;
  trim_model_cache(data_directory + "/cache/models", model.digest);
  log_info("fetching model ", model.name, " (", model.files.size(), " files)");
  for (const auto& [relative, root] : model.files)
    TANDEM_RETURN_IF_ERROR(bulk.fetch_file(root, join(cached, relative)));
  return cached;
}

}  // namespace tandem::worker::runtime
