// How deep JSON text nests, before a JSON library sees it: the one we use copies, writes and
// destroys values by recursion, so a text of some thousand levels would overflow the stack. Any
// thread.
#pragma once

#include <string_view>

namespace tandem {

/// Levels that JSON from outside may have.
inline constexpr int kJsonNestingMax = 64;

/// Whether more than kJsonNestingMax brackets are open at once. The text need not be valid JSON.
inline bool json_nests_too_deep(std::string_view json) {
  int depth = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < json.size(); ++i) {
    const char c = json[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kJsonNestingMax) return true;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return false;
}

}  // namespace tandem
