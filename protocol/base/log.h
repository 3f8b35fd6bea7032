// One line per event: "2026-01-02T03:04:05.678Z INFO component message key=value". To stderr, or to
// a file that is rotated at 16 MiB with three old ones kept. Any thread. Never log keys or secrets.
#pragma once

#include "protocol/base/str.h"

#include <string>

namespace tandem {

enum class LogLevel { kDebug = 0, kInfo = 1, kWarn = 2, kError = 3 };

/// Lines below `level` are dropped; default kInfo, or TANDEM_LOG_LEVEL (debug|info|warn|error).
void set_log_level(LogLevel level);
/// Sends lines to `path` (created, appended, rotated) instead of stderr; "" returns to stderr.
/// False when the file cannot be opened; the log then stays where it was.
bool set_log_file(const std::string& path);
/// The name that stands in each line after the level, such as "engine/0".
void set_log_component(const std::string& name);
void log_line(LogLevel level, const std::string& message);

template <class... Args>
void log_debug(Args&&... args) {
  log_line(LogLevel::kDebug, str(std::forward<Args>(args)...));
}
template <class... Args>
void log_info(Args&&... args) {
  log_line(LogLevel::kInfo, str(std::forward<Args>(args)...));
}
template <class... Args>
void log_warn(Args&&... args) {
  log_line(LogLevel::kWarn, str(std::forward<Args>(args)...));
}
template <class... Args>
void log_error(Args&&... args) {
  log_line(LogLevel::kError, str(std::forward<Args>(args)...));
}

}  // namespace tandem
