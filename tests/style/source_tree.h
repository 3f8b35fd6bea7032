// The project's files as style tests read them: every text file below the root that is ours.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace tandem::style {

struct SourceFile {
  std::string path;  ///< relative to the root, with '/'
  std::vector<std::string> lines;
};

/// All files below the root with one of these endings, sorted; build folders and dot-folders left
/// out.
std::vector<SourceFile> read_tree(const std::vector<std::string>& endings);

/// The target a file belongs to: the longest folder of the layer table that contains it ("" for
/// none).
std::string layer_of(const std::string& path);

/// Which layers each layer may include, from DESIGN's table; transitive folders are named in full.
const std::map<std::string, std::vector<std::string>>& allowed_layers();

/// "#include" lines of a file: the text between quotes or angle brackets, and which of both.
struct Include {
  std::string target;
  bool quoted = false;
  int line = 0;
};
std::vector<Include> includes_of(const SourceFile& file);

}  // namespace tandem::style
