#include "protocol/base/status.h"

namespace tandem {

const char* status_code_name(StatusCode code) {
  switch (code) {
    case StatusCode::kOk:
      return "ok";
    case StatusCode::kInvalid:
      return "invalid";
    case StatusCode::kNotFound:
      return "not_found";
    case StatusCode::kRefused:
      return "refused";
    case StatusCode::kUnavailable:
      return "unavailable";
    case StatusCode::kBusy:
      return "busy";
    case StatusCode::kTimeout:
      return "timeout";
    case StatusCode::kCorrupt:
      return "corrupt";
    case StatusCode::kCancelled:
      return "cancelled";
    case StatusCode::kInternal:
      return "internal";
    case StatusCode::kConflict:
      return "conflict";
  }
  return "unknown";  // a newer peer's code arrives as a number we do not know
}

int exit_code(StatusCode code) {
  switch (code) {
    case StatusCode::kOk:
      return 0;
    case StatusCode::kInvalid:
      return 2;
    case StatusCode::kNotFound:
      return 3;
    case StatusCode::kRefused:
    case StatusCode::kConflict:
      return 4;
    case StatusCode::kUnavailable:
    case StatusCode::kBusy:
    case StatusCode::kTimeout:
      return 5;
    default:
      return 1;
  }
}

std::string Status::to_string() const {
  if (ok()) return "ok";
  return std::string(status_code_name(code_)) + ": " + message_;
}

Status invalid_error(std::string message) {
  return {StatusCode::kInvalid, std::move(message)};
}
Status not_found_error(std::string message) {
  return {StatusCode::kNotFound, std::move(message)};
}
Status refused_error(std::string message) {
  return {StatusCode::kRefused, std::move(message)};
}
Status unavailable_error(std::string message) {
  return {StatusCode::kUnavailable, std::move(message)};
}
Status busy_error(std::string message) {
  return {StatusCode::kBusy, std::move(message)};
}
Status timeout_error(std::string message) {
  return {StatusCode::kTimeout, std::move(message)};
}
Status corrupt_error(std::string message) {
  return {StatusCode::kCorrupt, std::move(message)};
}
Status cancelled_error(std::string message) {
  return {StatusCode::kCancelled, std::move(message)};
}
Status internal_error(std::string message) {
  return {StatusCode::kInternal, std::move(message)};
}
Status conflict_error(std::string message) {
  return {StatusCode::kConflict, std::move(message)};
}

}  // namespace tandem
