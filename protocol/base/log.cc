#include "protocol/base/log.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <mutex>
#include <string_view>

namespace tandem {
namespace {

constexpr long kRotateBytes = 16 << 20;
constexpr int kOldFiles = 3;

LogLevel level_from_environment() {
  const char* text = std::getenv("TANDEM_LOG_LEVEL");
  const std::string_view name = text ? text : "";
  if (name == "debug") return LogLevel::kDebug;
  if (name == "warn") return LogLevel::kWarn;
  if (name == "error") return LogLevel::kError;
  return LogLevel::kInfo;
}

struct Sink {
  std::mutex mutex;
  LogLevel level = level_from_environment();
  std::string component = "tandem", path;
  std::FILE* file = nullptr;

  void rotate() {
    std::fclose(file);
    for (int i = kOldFiles - 1; i >= 1; --i)
      std::rename(str(path, ".", i).c_str(), str(path, ".", i + 1).c_str());
    std::rename(path.c_str(), str(path, ".1").c_str());
    file = std::fopen(path.c_str(), "ae");
  }
};

Sink& sink() {
  static Sink* instance = new Sink;  // outlives every static that logs in its destructor
  return *instance;
}

}  // namespace

void set_log_level(LogLevel level) {
  std::lock_guard lock(sink().mutex);
  sink().level = level;
}

bool set_log_file(const std::string& path) {
  std::lock_guard lock(sink().mutex);
  std::FILE* file = nullptr;
  if (!path.empty() && !(file = std::fopen(path.c_str(), "ae"))) return false;
  if (sink().file) std::fclose(sink().file);
  sink().file = file;
  sink().path = path;
  return true;
}

void set_log_component(const std::string& name) {
  std::lock_guard lock(sink().mutex);
  sink().component = name;
}

void log_line(LogLevel level, const std::string& message) {
  static constexpr const char* kNames[] = {"DEBUG", "INFO", "WARN", "ERROR"};
  Sink& s = sink();
  std::lock_guard lock(s.mutex);
  if (level < s.level) return;
  const auto now = std::chrono::system_clock::now();
  const std::time_t seconds = std::chrono::system_clock::to_time_t(now);
  const auto ms =
      std::chrono::duration_cast<std::chrono::milliseconds>(now.time_since_epoch()).count() % 1000;
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  char when[32];
  std::strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%S", &utc);
  std::FILE* out = s.file ? s.file : stderr;
  std::fprintf(out, "%s.%03dZ %s %s %s\n", when, static_cast<int>(ms),
               kNames[static_cast<int>(level)], s.component.c_str(), message.c_str());
  std::fflush(out);
  if (s.file && std::ftell(s.file) > kRotateBytes) s.rotate();
}

}  // namespace tandem
