// Reads the JSON parameters of a call: types, ranges, and unknown names, which are refused with the
// nearest known one. Use: read every parameter, then finish(). The first error wins.
#pragma once

#include "protocol/base/digest.h"
#include "protocol/base/result.h"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <set>
#include <string>
#include <vector>

namespace tandem::coordinator {

using Json = nlohmann::ordered_json;

/// Text of a JSON value; bytes that are not UTF-8 are replaced, never thrown at.
std::string dump(const Json& json);

class Params {
 public:
  Params(const std::string& method, const std::string& json);

  std::string text(const std::string& name, bool required = true);
  std::int64_t integer(const std::string& name, std::int64_t fallback, std::int64_t low,
                       std::int64_t high);
  bool boolean(const std::string& name, bool fallback);
  Digest digest(const std::string& name);
  std::vector<Digest> digests(const std::string& name);
  /// An object's text, or "" when it is absent and not required.
  std::string object(const std::string& name, bool required);
  [[nodiscard]] bool has(const std::string& name) const { return json_.contains(name); }
  /// Ok when all that was read is well and nothing else stands there.
  Status finish();

 private:
  const Json* find(const std::string& name, bool required, const char* type);
  void fail(Status status);

  std::string method_;
  Json json_;
  std::set<std::string> known_;
  Status status_;
};

}  // namespace tandem::coordinator
