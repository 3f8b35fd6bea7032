// What a reviewer should not have to say: line and file lengths, leftovers, file names, and
// documents that name files which do not exist.
#include "tests/style/source_tree.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <regex>

namespace tandem::style {
namespace {

const std::vector<std::string> kCode{".h", ".cc", ".cu", ".cuh"};
constexpr std::size_t kLineMax = 100, kFileMax = 800;

/// Length in characters, not bytes.
std::size_t characters(const std::string& line) {
  return static_cast<std::size_t>(std::count_if(line.begin(), line.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xc0) != 0x80;
  }));
}

TEST(Tidy, LinesHaveAtMostAHundredColumns) {
  for (const auto& file : read_tree(kCode))
    for (std::size_t i = 0; i < file.lines.size(); ++i)
      EXPECT_LE(characters(file.lines[i]), kLineMax) << file.path << ":" << i + 1;
}

TEST(Tidy, FilesHaveAtMostEightHundredLines) {
  for (const auto& file : read_tree({".h", ".cc", ".cu", ".cuh", ".py", ".capnp"}))
    EXPECT_LE(file.lines.size(), kFileMax) << file.path << " wants to be two files";
}

TEST(Tidy, NoLeftovers) {
  const std::regex leftover(R"(\b(FIXME|XXX|HACK)\b|TODO\(now\)|std::cerr << "DEBUG|#if 0)");
  for (const auto& file : read_tree(kCode)) {
    if (file.path.starts_with("tests/style/")) continue;
    for (std::size_t i = 0; i < file.lines.size(); ++i)
      EXPECT_FALSE(std::regex_search(file.lines[i], leftover)) << file.path << ":" << i + 1;
  }
}

TEST(Tidy, HeadersHaveAGuardAndBeginWithTheirPurpose) {
  for (const auto& file : read_tree({".h", ".cuh"})) {
    if (file.path.ends_with("_body.h")) continue;  // included once per instruction set
    ASSERT_FALSE(file.lines.empty()) << file.path;
    EXPECT_TRUE(file.lines.front().starts_with("//"))
        << file.path << " does not say what it is for";
    EXPECT_NE(std::find(file.lines.begin(), file.lines.end(), "#pragma once"), file.lines.end())
        << file.path;
  }
}

TEST(Tidy, NoNamespaceIsOpenedWholesale) {
  for (const auto& file : read_tree({".h", ".cuh"}))
    for (std::size_t i = 0; i < file.lines.size(); ++i)
      EXPECT_FALSE(file.lines[i].starts_with("using namespace")) << file.path << ":" << i + 1;
}

TEST(Tidy, FileNamesAreSnakeCase) {
  const std::regex snake(R"([a-z0-9_]+(\.[a-z]+)+)");
  for (const auto& file : read_tree(kCode)) {
    const std::string name = file.path.substr(file.path.rfind('/') + 1);
    EXPECT_TRUE(std::regex_match(name, snake) || file.path.starts_with("tests/")) << file.path;
  }
}

TEST(Tidy, DocumentsNameOnlyFilesThatExist) {
  const std::regex path(
      R"(`((?:protocol|kernels|storage|worker|coordinator|tools|tests|deploy)/[A-Za-z0-9_./-]+)`)");
  for (const auto& file : read_tree({".md"}))
    for (std::size_t i = 0; i < file.lines.size(); ++i)
      for (std::sregex_iterator it(file.lines[i].begin(), file.lines[i].end(), path), end;
           it != end; ++it) {
        const std::string named = std::string(TANDEM_SOURCE_DIR) + "/" + (*it)[1].str();
        EXPECT_TRUE(std::filesystem::exists(named))
            << file.path << ":" << i + 1 << " names " << (*it)[1].str();
      }
}

}  // namespace
}  // namespace tandem::style
