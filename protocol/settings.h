// The platform's settings and where each value came from: flag, then TANDEM_NAME, then --config
// FILE, then
// ~/.config/tandem/config.yaml, then /etc/tandem/config.yaml, then the default. Unknown keys in any
// file are refused with the nearest name. Every process reads the same table.
#pragma once

#include "protocol/base/log.h"
#include "protocol/base/result.h"

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace tandem::protocol {

/// One known setting. `name` is the YAML key; the environment variable is TANDEM_ + upper case.
struct SettingInfo {
  std::string name, default_value, help;
  std::vector<std::string> words{};  ///< that its value may be, where it is no number
  /// Of a whole number, both ends included. Sizes (NAME_bytes_max) and shares (NAME_share_min, a
  /// fraction of 1) have none.
  std::optional<std::pair<std::int64_t, std::int64_t>> range{};
};

struct SettingValue {
  std::string value;
  std::string origin;  ///< "flag", "TANDEM_DATA_DIR", "/etc/tandem/config.yaml", "default"
};

class Settings {
 public:
  /// All known settings, in the order that help shows them.
  static const std::vector<SettingInfo>& known();

  /// Resolves every setting. `flags`: what the command line gave (names as in known());
  /// `config_file`: --config or "". invalid_error names file, line and key; not_found_error when
  /// --config names no file.
  static Result<Settings> load(const std::map<std::string, std::string>& flags,
                               const std::string& config_file);

  [[nodiscard]] const std::string& get(const std::string& name) const;
  /// The value as a whole number / a size ("512MiB", "2GiB", plain bytes); invalid_error names the
  /// setting.
  [[nodiscard]] Result<std::int64_t> get_int(const std::string& name) const;
  [[nodiscard]] Result<std::int64_t> get_bytes(const std::string& name) const;
  /// A share: 0 to 1.
  [[nodiscard]] double get_share(const std::string& name) const;
  [[nodiscard]] LogLevel log_level() const;
  [[nodiscard]] const std::map<std::string, SettingValue>& all() const { return values_; }

  // -- derived paths: all below data_dir
  [[nodiscard]] std::string data_dir() const { return get("data_dir"); }
  [[nodiscard]] std::string run_dir() const { return data_dir() + "/run"; }
  [[nodiscard]] std::string log_dir() const { return data_dir() + "/log"; }
  /// Where ipc sockets lie: run_dir(), or, where that would exceed a socket address (107 bytes), a
  /// directory in /tmp named after it. Its creator makes it with mode 0700.
  [[nodiscard]] std::string socket_dir() const;
  /// The endpoint of one of the coordinator's sockets: the setting, or ipc under run_dir() when
  /// empty. `socket`: "clients", "workers" or "bulk".
  [[nodiscard]] std::string endpoint(const std::string& socket) const;

 private:
  std::map<std::string, SettingValue> values_;
};

/// A daemon's command line: settings as --data-dir X or --data-dir=X, --config FILE, and everything
/// else in order. invalid_error: a setting without a value.
struct CommandLine {
  std::map<std::string, std::string> flags;
  std::string config_file;
  std::vector<std::string> rest;
  [[nodiscard]] bool has(const std::string& flag) const;
  /// The given settings again, as arguments for a child process.
  [[nodiscard]] std::vector<std::string> to_arguments() const;
};
Result<CommandLine> split_command_line(int argc, const char* const* argv);

/// "  --data-dir X    registry, logs ... [default]" for every setting: the end of each daemon's
/// --help.
std::string settings_help();

/// "512MiB", "2 GiB", "1024" -> bytes.
Result<std::int64_t> parse_bytes(const std::string& text);

}  // namespace tandem::protocol
