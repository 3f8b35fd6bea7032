// The walls: who may include whom, no cycles, one file per foreign library, no file that CMake
// forgot.
#include "tests/style/source_tree.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <set>

namespace tandem::style {
namespace {

const std::vector<std::string> kCode{".h", ".cc", ".cu", ".cuh"};

std::string place(const SourceFile& file, const Include& include) {
  return file.path + ":" + std::to_string(include.line) + ": " + include.target;
}

bool generated(const std::string& target) {
  return target.ends_with(".capnp.h");
}

TEST(Layers, EveryIncludeStaysInsideItsLayersRow) {
  for (const auto& file : read_tree(kCode)) {
    const std::string from = layer_of(file.path);
    ASSERT_FALSE(from.empty()) << file.path << " lies in no folder of the table";
    for (const auto& include : includes_of(file)) {
      if (!include.quoted || generated(include.target)) continue;
      const std::string to = layer_of(include.target);
      EXPECT_FALSE(to.empty()) << place(file, include) << " is not a path from the root";
      const auto& allowed = allowed_layers().at(from);
      EXPECT_TRUE(to == from || std::find(allowed.begin(), allowed.end(), to) != allowed.end())
          << place(file, include) << ": " << from << " may not include " << to;
    }
  }
}

TEST(Layers, IncludesHaveNoCycle) {
  std::map<std::string, std::vector<std::string>> edges;
  for (const auto& file : read_tree({".h", ".cuh"}))
    for (const auto& include : includes_of(file))
      if (include.quoted) edges[file.path].push_back(include.target);
  std::set<std::string> done;
  std::vector<std::string> path;
  std::function<void(const std::string&)> visit = [&](const std::string& node) {
    if (done.contains(node)) return;
    const auto again = std::find(path.begin(), path.end(), node);
    ASSERT_EQ(again, path.end()) << "cycle through " << node;
    path.push_back(node);
    for (const auto& next : edges[node]) visit(next);
    path.pop_back();
    done.insert(node);
  };
  const auto copy = edges;
  for (const auto& [node, targets] : copy) visit(node);
}

/// Foreign headers and the files that may know them; a header in no row is the C or C++ library's.
struct Foreign {
  std::string prefix;
  std::vector<std::string> files;  ///< paths or folders (ending in '/'); empty: any host file
};

const std::vector<Foreign>& foreign_libraries() {
  static const std::vector<Foreign> table{
      {"nlohmann/", {}},
      {"omp.h", {"kernels/cpu/", "tools/", "tests/"}},
      {"immintrin.h", {"kernels/cpu/", "tests/"}},
      {"openssl/", {"protocol/base/digest.cc"}},
      {"capnp/", {"protocol/codec/", "tests/"}},
      {"kj/", {"protocol/codec/", "tests/"}},
      {"zmq.h",
       {"protocol/zmq_transport.cc", "protocol/zmq_poller.cc", "protocol/zap.cc", "tests/"}},
      {"sodium", {"protocol/zap.cc"}},
      {"lmdb.h", {"storage/lmdb_store.cc", "tests/"}},
      {"pcre2.h", {"worker/text/regex.cc"}},
      {"utf8proc.h", {"worker/text/"}},
      {"yaml-cpp/", {"protocol/settings.cc", "tools/", "tests/"}},
      {"CLI/", {"tools/"}},
      {"oneapi/dnnl", {"kernels/cpu/", "tools/"}},
      {"dnnl", {"kernels/cpu/", "tools/"}},
      {"mpi.h", {"worker/comm/mpi_communicator.cc"}},
      {"nccl.h", {"worker/comm/nccl/"}},
      {"cuda", {"kernels/cuda/", "worker/comm/nccl/"}},
      {"gtest/", {"tests/"}},
      {"gmock/", {"tests/"}},
  };
  return table;
}

TEST(Layers, AForeignHeaderStaysInItsFile) {
  for (const auto& file : read_tree(kCode))
    for (const auto& include : includes_of(file)) {
      if (include.quoted) continue;
      for (const auto& foreign : foreign_libraries()) {
        if (!include.target.starts_with(foreign.prefix) || foreign.files.empty()) continue;
        const bool allowed =
            std::any_of(foreign.files.begin(), foreign.files.end(), [&](const std::string& where) {
              return where.ends_with("/") ? file.path.starts_with(where) : file.path == where;
            });
        EXPECT_TRUE(allowed) << place(file, include) << " belongs in " << foreign.files.front();
      }
      EXPECT_FALSE(include.target.find("boost/") == 0 && !file.path.starts_with("tools/"))
          << place(file, include);
    }
}

TEST(Layers, BaseKnowsOnlyTheStandardLibrary) {
  for (const auto& file : read_tree(kCode)) {
    if (layer_of(file.path) != "protocol/base") continue;
    for (const auto& include : includes_of(file)) {
      if (include.quoted) continue;
      EXPECT_TRUE(include.target.find('/') == std::string::npos ||
                  include.target.starts_with("sys/") || file.path == "protocol/base/digest.cc")
          << place(file, include);
    }
  }
}

TEST(Layers, CMakeNamesEverySource) {
  std::string lists;
  for (const auto& file : read_tree({"CMakeLists.txt", ".cmake"}))
    for (const auto& line : file.lines) lists += line + "\n";
  for (const auto& file : read_tree({".cc", ".cu"})) {
    const auto slash = file.path.rfind('/');
    EXPECT_NE(lists.find(file.path.substr(slash + 1)), std::string::npos)
        << file.path << " is in no CMakeLists.txt";
  }
}

TEST(Layers, ModelCodeDoesNotAskWhichDeviceItRunsOn) {
  for (const auto& file : read_tree(kCode)) {
    const std::string layer = layer_of(file.path);
    if (layer != "worker/model" && layer != "worker/train" && layer != "worker/serve") continue;
    for (std::size_t i = 0; i < file.lines.size(); ++i)
      for (const char* word :
           {"DeviceType::", "kernels/cpu", "kernels/cuda", "kernels/meta", "cudaMalloc"})
        EXPECT_EQ(file.lines[i].find(word), std::string::npos) << file.path << ":" << i + 1;
  }
}

}  // namespace
}  // namespace tandem::style
