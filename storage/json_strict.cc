#include "storage/json_strict.h"

#include <cmath>
#include <stdexcept>

namespace tandem::storage {
namespace {

// Thrown out of the parser's callback, caught in this file: the library offers no other way to
// stop.
struct StrictError {
  std::string message;
};

bool has_non_finite(const Json& value) {
  if (value.is_number_float()) return !std::isfinite(value.get<double>());
  if (value.is_structured())
    for (const auto& item : value)
      if (has_non_finite(item)) return true;
  return false;
}

}  // namespace

Result<Json> parse_json_strict(std::string_view text, const std::string& what) {
  std::vector<std::set<std::string>> open_objects;
  auto callback = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > kJsonDepthMax) throw StrictError{str("nesting over ", kJsonDepthMax)};
    if (event == Json::parse_event_t::object_start) open_objects.emplace_back();
    if (event == Json::parse_event_t::object_end) open_objects.pop_back();
    if (event == Json::parse_event_t::key &&
        !open_objects.back().insert(parsed.get<std::string>()).second)
      throw StrictError{str("the name \"", parsed.get<std::string>(), "\" appears twice")};
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), callback);
  } catch (const StrictError& error) {
    return corrupt_error(str(what, " is not acceptable JSON: ", error.message));
  } catch (const std::exception& error) {
    return corrupt_error(str(what, " is not valid JSON: ", error.what()));
  }
}

std::int64_t whole_number(const Json& value) {
  const bool fits = value.is_number_unsigned() ? value.get<std::uint64_t>() <= INT64_MAX
                                               : value.is_number_integer();
  if (!fits) throw std::range_error(value.dump() + " is no whole number of 63 bits");
  return value.get<std::int64_t>();
}

Result<std::string> canonical_json(const Json& value) {
  if (has_non_finite(value)) return invalid_error("JSON cannot hold NaN or infinity");
  try {
    return value.dump();
  } catch (const std::exception& error) {
    return invalid_error(str("cannot be written as JSON: ", error.what()));
  }
}

}  // namespace tandem::storage
