#include "tests/style/source_tree.h"

#include <algorithm>
#include <filesystem>
#include <fstream>

namespace tandem::style {
namespace {

namespace fs = std::filesystem;

bool skipped(const fs::path& path) {
  const std::string name = path.filename().string();
  return name.starts_with(".") || name.starts_with("build") || name == "bundle" ||
         name == "__pycache__" || name == "venv";
}

}  // namespace

std::vector<SourceFile> read_tree(const std::vector<std::string>& endings) {
  const fs::path root = TANDEM_SOURCE_DIR;
  std::vector<SourceFile> files;
  for (auto it = fs::recursive_directory_iterator(root); it != fs::recursive_directory_iterator();
       ++it) {
    if (it->is_directory() && skipped(it->path())) {
      it.disable_recursion_pending();
      continue;
    }
    const std::string name = it->path().filename().string();
    const bool wanted = std::any_of(endings.begin(), endings.end(),
                                    [&](const auto& e) { return name.ends_with(e); });
    if (!it->is_regular_file() || !wanted) continue;
    SourceFile file{fs::relative(it->path(), root).generic_string(), {}};
    std::ifstream in(it->path());
    for (std::string line; std::getline(in, line);) file.lines.push_back(line);
    files.push_back(std::move(file));
  }
  std::sort(files.begin(), files.end(),
            [](const auto& a, const auto& b) { return a.path < b.path; });
  return files;
}

const std::map<std::string, std::vector<std::string>>& allowed_layers() {
  static const std::map<std::string, std::vector<std::string>> table = [] {
    std::map<std::string, std::vector<std::string>> t{
        {"protocol/base", {}},
        {"protocol", {"protocol/base"}},
        {"kernels", {"protocol/base"}},
        {"kernels/cpu", {"kernels", "protocol/base"}},
        {"kernels/cuda", {"kernels", "protocol/base"}},
        {"kernels/meta", {"kernels", "protocol/base"}},
        {"storage", {"protocol", "protocol/base"}},
        {"worker/comm", {"kernels", "protocol/base"}},
        {"worker/text", {"storage", "protocol/base"}},
        {"worker/model", {"worker/comm", "worker/text", "kernels", "storage", "protocol/base"}},
        {"worker/data", {"worker/text", "storage", "protocol/base"}},
        {"worker/train",
         {"worker/model", "worker/data", "worker/comm", "kernels", "storage", "protocol",
          "protocol/base"}},
        {"worker/serve",
         {"worker/model", "worker/text", "worker/comm", "kernels", "protocol/base"}},
        {"worker/memory",
         {"worker/train", "worker/serve", "worker/model", "worker/comm", "kernels", "kernels/meta",
          "protocol", "protocol/base"}},
        {"worker/runtime",
         {"worker/comm", "worker/text", "worker/model", "worker/data", "worker/train",
          "worker/serve", "worker/memory", "kernels", "storage", "protocol", "protocol/base"}},
        {"worker",
         {"worker/runtime", "worker/comm", "kernels", "kernels/cpu", "kernels/cuda", "protocol",
          "protocol/base"}},
        {"coordinator", {"storage", "protocol", "protocol/base"}},
    };
    std::vector<std::string> everything{"tools"};
    for (const auto& [layer, allowed] : t) everything.push_back(layer);
    t["tools"] = everything;
    everything.push_back("tests");
    t["tests"] = everything;
    return t;
  }();
  return table;
}

std::string layer_of(const std::string& path) {
  std::string best;
  for (const auto& [layer, allowed] : allowed_layers())
    if (path.starts_with(layer + "/") && layer.size() > best.size()) best = layer;
  return best;
}

std::vector<Include> includes_of(const SourceFile& file) {
  std::vector<Include> includes;
  for (std::size_t i = 0; i < file.lines.size(); ++i) {
    const std::string& line = file.lines[i];
    const auto hash = line.find_first_not_of(" \t");
    if (hash == std::string::npos || line.compare(hash, 8, "#include") != 0) continue;
    const auto open = line.find_first_of("\"<", hash + 8);
    if (open == std::string::npos) continue;
    const auto close = line.find_first_of("\">", open + 1);
    if (close == std::string::npos) continue;
    includes.push_back(
        {line.substr(open + 1, close - open - 1), line[open] == '"', static_cast<int>(i + 1)});
  }
  return includes;
}

}  // namespace tandem::style
