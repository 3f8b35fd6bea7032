// Status: the outcome of anything that can fail for a reason other than a bug.
// Messages say what failed, which object, the limit, the actual value, and what to do next.
#pragma once

#include <string>
#include <utility>

namespace tandem {

/// The wire and the registry carry these numbers: only append.
enum class StatusCode : int {
  kOk = 0,
  kInvalid = 1,      ///< the caller's input is wrong; repeating it cannot help       (CLI exit 2)
  kNotFound = 2,     ///< no such model, adapter, job, file                           (CLI exit 3)
  kRefused = 3,      ///< does not fit, quota, conflict, unsupported                  (CLI exit 4)
  kUnavailable = 4,  ///< peer gone or not there yet; try again later                 (CLI exit 5)
  kBusy = 5,         ///< a bounded queue is full; message carries "retry after N ms" (CLI exit 5)
  kTimeout = 6,      ///< a deadline passed                                           (CLI exit 5)
  kCorrupt = 7,      ///< bytes on disk or wire do not match their checksum or format (CLI exit 1)
  kCancelled = 8,    ///< the caller asked for it                                     (CLI exit 1)
  kInternal = 9,     ///< a failure of ours or of the machine (disk full, I/O)        (CLI exit 1)
  kConflict = 10,    ///< an old epoch, a second writer, a name already taken         (CLI exit 4)
};

/// "not_found" and so on: stable names for JSON.
const char* status_code_name(StatusCode code);

/// The CLI's exit code for a status (DESIGN: 0 done, 1 failed, 2 usage, 3 not found, 4 refused,
/// 5 unreachable).
int exit_code(StatusCode code);

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  static Status ok_status() { return {}; }
  [[nodiscard]] bool ok() const { return code_ == StatusCode::kOk; }
  [[nodiscard]] StatusCode code() const { return code_; }
  [[nodiscard]] const std::string& message() const { return message_; }
  /// "not_found: no adapter named x".
  [[nodiscard]] std::string to_string() const;
  bool operator==(const Status&) const = default;

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

Status invalid_error(std::string message);
Status not_found_error(std::string message);
Status refused_error(std::string message);
Status unavailable_error(std::string message);
Status busy_error(std::string message);
Status timeout_error(std::string message);
Status corrupt_error(std::string message);
Status cancelled_error(std::string message);
Status internal_error(std::string message);
Status conflict_error(std::string message);

}  // namespace tandem

/// Returns the Status of `expression` to the caller unless it is ok.
#define TANDEM_RETURN_IF_ERROR(expression)                                                        \
  do {                                                                                            \
    if (::tandem::Status tandem_status = (expression); !tandem_status.ok()) return tandem_status; \
  } while (false)
