// Builds strings from values; std::format is absent from the compilers we support.
#pragma once

#include <sstream>
#include <string>
#include <string_view>
#include <utility>

namespace tandem {

/// Concatenates everything that streams: str("rank ", r, " exceeds ", r_max).
template <class... Args>
[[nodiscard]] std::string str(Args&&... args) {
  std::ostringstream out;
  (out << ... << std::forward<Args>(args));
  return out.str();
}

/// The candidate nearest to `word` by edit distance, or "" when none is within a third of its
/// length (at least 2 edits). Used by every "unknown field X, did you mean Y" message.
template <class Range>
[[nodiscard]] std::string nearest_name(std::string_view word, const Range& candidates) {
  std::string best;
  std::size_t best_distance = word.size() / 3 < 2 ? 3 : word.size() / 3 + 1;
  for (std::string_view candidate : candidates) {
    std::basic_string<unsigned> previous, current;
    for (unsigned j = 0; j <= candidate.size(); ++j) previous.push_back(j);
    for (std::size_t i = 0; i < word.size(); ++i) {
      current.assign(1, static_cast<unsigned>(i + 1));
      for (std::size_t j = 0; j < candidate.size(); ++j) {
        unsigned substitute = previous[j] + (word[i] == candidate[j] ? 0u : 1u);
        unsigned edit = (previous[j + 1] < current[j] ? previous[j + 1] : current[j]) + 1;
        current.push_back(substitute < edit ? substitute : edit);
      }
      previous.swap(current);
    }
    if (previous.back() < best_distance) {
      best_distance = previous.back();
      best = std::string(candidate);
    }
  }
  return best;
}

}  // namespace tandem
