// Result<T>: a value or the Status that says why there is none. (std::expected needs C++23.)
#pragma once

#include "protocol/base/check.h"
#include "protocol/base/status.h"

#include <optional>
#include <utility>

namespace tandem {

template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}         // NOLINT: `return value;` is the point
  Result(Status status) : status_(std::move(status)) {  // NOLINT: `return not_found_error(..)`
    TANDEM_CHECK(!status_.ok(), "a Result without a value needs an error");
  }

  [[nodiscard]] bool ok() const { return value_.has_value(); }
  [[nodiscard]] const Status& status() const { return status_; }

  /// The value; calling this without one is a bug.
  T& value() & {
    TANDEM_CHECK(ok(), status_.to_string());
    return *value_;
  }
  const T& value() const& {
    TANDEM_CHECK(ok(), status_.to_string());
    return *value_;
  }
  T&& value() && {
    TANDEM_CHECK(ok(), status_.to_string());
    return std::move(*value_);
  }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

 private:
  std::optional<T> value_;
  Status status_;
};

}  // namespace tandem

#define TANDEM_CONCAT_INNER(a, b) a##b
#define TANDEM_CONCAT(a, b) TANDEM_CONCAT_INNER(a, b)

/// TANDEM_ASSIGN_OR_RETURN(auto file, open(path)): assigns the value or returns the Status.
#define TANDEM_ASSIGN_OR_RETURN(declaration, expression)       \
  auto TANDEM_CONCAT(tandem_result_, __LINE__) = (expression); \
  if (!TANDEM_CONCAT(tandem_result_, __LINE__).ok())           \
    return TANDEM_CONCAT(tandem_result_, __LINE__).status();   \
  declaration = std::move(TANDEM_CONCAT(tandem_result_, __LINE__)).value()
