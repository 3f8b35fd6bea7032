// JSON from strangers: bounded depth, no name twice in one object, valid UTF-8, errors as Status.
// Included by .cc files only (it pulls in the JSON library).
#pragma once

#include "protocol/base/result.h"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace tandem::storage {

using Json = nlohmann::json;

inline constexpr int kJsonDepthMax = 64;

/// Parses one JSON value that takes up the whole text. `what` names it in messages ("config.json of
/// m"). Errors: corrupt.
Result<Json> parse_json_strict(std::string_view text, const std::string& what);

/// A whole number. Throws std::range_error where it is another value, or none that std::int64_t
/// holds, which the library would convert all the same.
std::int64_t whole_number(const Json& value);

/// The canonical text: keys sorted by bytes, no spaces, shortest numbers. Errors: invalid (not
/// UTF-8, NaN).
Result<std::string> canonical_json(const Json& value);

}  // namespace tandem::storage
