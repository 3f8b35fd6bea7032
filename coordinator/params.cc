#include "coordinator/params.h"

#include "protocol/base/json_nesting.h"
#include "protocol/base/str.h"

namespace tandem::coordinator {

std::string dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

Params::Params(const std::string& method, const std::string& json) : method_(method) {
  if (json_nests_too_deep(json)) {
    json_ = Json::object();
    status_ = invalid_error(
        str(method, ": the parameters nest deeper than ", kJsonNestingMax, " levels"));
    return;
  }
  json_ = Json::parse(json.empty() ? "{}" : json, nullptr, false);
  if (json_.is_object()) return;
  json_ = Json::object();
  status_ = invalid_error(str(method, ": the parameters are not a JSON object"));
}

void Params::fail(Status status) {
  if (status_.ok()) status_ = std::move(status);
}

const Json* Params::find(const std::string& name, bool required, const char* type) {
  known_.insert(name);
  const auto found = json_.find(name);
  if (found != json_.end() && !found->is_null()) return &*found;
  if (required) fail(invalid_error(str(method_, " needs \"", name, "\" (", type, ")")));
  return nullptr;
}

std::string Params::text(const std::string& name, bool required) {
  const Json* value = find(name, required, "text");
  if (value == nullptr) return "";
  if (!value->is_string()) {
    fail(invalid_error(str(method_, ": \"", name, "\" must be text, not ", dump(*value))));
    return "";
  }
  auto text = value->get<std::string>();
  if (required && text.empty())
    fail(invalid_error(str(method_, ": \"", name, "\" must not be empty")));
  return text;
}

std::int64_t Params::integer(const std::string& name, std::int64_t fallback, std::int64_t low,
                             std::int64_t high) {
  const Json* value = find(name, false, "a whole number");
  if (value == nullptr) return fallback;
  if (!value->is_number_integer() || value->get<std::int64_t>() < low ||
      value->get<std::int64_t>() > high) {
    fail(invalid_error(str(method_, ": \"", name, "\" must be a whole number in ", low, "..", high,
                           ", not ", dump(*value))));
    return fallback;
  }
  return value->get<std::int64_t>();
}

bool Params::boolean(const std::string& name, bool fallback) {
  const Json* value = find(name, false, "true or false");
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) {
    fail(invalid_error(str(method_, ": \"", name, "\" must be true or false, not ", dump(*value))));
    return fallback;
  }
  return value->get<bool>();
}

Digest Params::digest(const std::string& name) {
  const std::string hex = text(name);
  if (hex.empty()) return {};
  auto digest = Digest::parse(hex);
  if (!digest.ok()) {
    fail(invalid_error(str(method_, ": \"", name, "\": ", digest.status().message())));
    return {};
  }
  return *digest;
}

std::vector<Digest> Params::digests(const std::string& name) {
  const Json* value = find(name, true, "a list of digests");
  std::vector<Digest> digests;
  if (value == nullptr) return digests;
  if (!value->is_array()) {
    fail(invalid_error(str(method_, ": \"", name, "\" must be a list of digests")));
    return digests;
  }
  for (const Json& item : *value) {
    auto digest = Digest::parse(item.is_string() ? item.get<std::string>() : "");
    if (!digest.ok()) {
      fail(invalid_error(
          str(method_, ": \"", name, "\"[", digests.size(), "]: ", digest.status().message())));
      return digests;
    }
    digests.push_back(*digest);
  }
  return digests;
}

std::string Params::object(const std::string& name, bool required) {
  const Json* value = find(name, required, "an object");
  if (value == nullptr) return "";
  if (!value->is_object()) {
    fail(invalid_error(str(method_, ": \"", name, "\" must be an object, not ", dump(*value))));
    return "";
  }
  return dump(*value);
}

Status Params::finish() {
  if (!status_.ok()) return status_;
  for (const auto& [name, value] : json_.items()) {
    if (known_.contains(name)) continue;
    const std::string nearest = nearest_name(name, known_);
    return invalid_error(str(method_, " does not know the parameter \"", name, "\"",
                             nearest.empty() ? "" : str("; did you mean \"", nearest, "\"?")));
  }
  return {};
}

}  // namespace tandem::coordinator
