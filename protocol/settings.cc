#include "protocol/settings.h"

#include "protocol/base/digest.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <set>
#include <utility>

#include <unistd.h>

namespace tandem::protocol {
namespace {

std::string environment(const std::string& name) {
  const char* value = std::getenv(name.c_str());
  return value ? value : "";
}

std::string default_data_dir() {
  const std::string xdg = environment("XDG_DATA_HOME");
  if (!xdg.empty()) return xdg + "/tandem";
  const std::string home = environment("HOME");
  return home.empty() ? "/var/lib/tandem" : home + "/.local/share/tandem";
}

std::string variable_name(const std::string& setting) {
  std::string name = "TANDEM_" + setting;
  for (char& c : name) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return name;
}

/// "data_dir" -> "--data-dir".
std::string flag_name(const std::string& setting) {
  std::string name = "--" + setting;
  std::replace(name.begin(), name.end(), '_', '-');
  return name;
}

std::vector<std::string> known_names() {
  std::vector<std::string> names;
  for (const auto& info : Settings::known()) names.push_back(info.name);
  return names;
}

Status unknown_setting(const std::string& where, const std::string& name) {
  const std::string nearest = nearest_name(name, known_names());
  return invalid_error(str(where, ": unknown setting \"", name, "\"",
                           nearest.empty() ? "" : str("; did you mean \"", nearest, "\"?")));
}

Status read_file(const std::string& path, std::map<std::string, SettingValue>& values) {
  std::ifstream in(path, std::ios::binary);  // YAML's own reader throws where it is a directory
  std::string text;
  if (!std::getline(in, text, '\0').eof())
    return refused_error(str("cannot read the configuration file ", path));
  YAML::Node root;
  try {
    root = YAML::Load(text);
  } catch (const YAML::Exception& error) {
    return invalid_error(str(path, ":", error.mark.line + 1, ": ", error.msg));
  }
  if (root.IsNull()) return {};
  if (!root.IsMap()) return invalid_error(str(path, ": expected \"name: value\" lines"));
  std::set<std::string> seen;
  for (const auto& entry : root) {
    const auto name = entry.first.as<std::string>("");
    const auto names = known_names();
    if (std::find(names.begin(), names.end(), name) == names.end())
      return unknown_setting(str(path, ":", entry.first.Mark().line + 1), name);
    if (!entry.second.IsScalar())
      return invalid_error(
          str(path, ":", entry.second.Mark().line + 1, ": ", name, " must be one value"));
    if (!seen.insert(name).second)
      return invalid_error(
          str(path, ":", entry.first.Mark().line + 1, ": ", name, " stands there twice"));
    values[name] = {entry.second.Scalar(), path};
  }
  return {};
}

/// What is wrong is said where it was set, not by a daemon that then does not start.
Status check_value(const SettingInfo& info, const SettingValue& setting) {
  const auto origin = str(" (", setting.origin, ")");
  if (std::find(info.words.begin(), info.words.end(), setting.value) != info.words.end()) return {};
  if (!info.words.empty() && !info.range) {
    std::string list;
    for (const std::string& word : info.words)
      list += (list.empty() ? "" : word == info.words.back() ? " or " : ", ") + word;
    return invalid_error(
        str(info.name, " must be ", list, ", not \"", setting.value, "\"", origin));
  }
  if (info.name.ends_with("_bytes_max")) {
    const Status size = parse_bytes(setting.value).status();
    return size.ok() ? size : invalid_error(str(info.name, ": ", size.message(), origin));
  }
  const char* const end = setting.value.data() + setting.value.size();
  if (info.name.ends_with("_share_min")) {
    double share = -1;
    const auto read = std::from_chars(setting.value.data(), end, share);
    if (read.ec == std::errc() && read.ptr == end && share >= 0 && share <= 1) return {};
    return invalid_error(
        str(info.name, " must be a number from 0 to 1, not \"", setting.value, "\"", origin));
  }
  if (!info.range) return {};
  std::int64_t number = 0;
  const auto read = std::from_chars(setting.value.data(), end, number);
  const auto [low, high] = *info.range;
  if (read.ec == std::errc() && read.ptr == end && number >= low && number <= high) return {};
  return invalid_error(str(info.name, " must be ", info.words.empty() ? "" : info.words[0] + " or ",
                           "a whole number in ", low, "..", high, ", not \"", setting.value, "\"",
                           origin));
}

}  // namespace

const std::vector<SettingInfo>& Settings::known() {
  constexpr std::int64_t kMany = 1'000'000, kDayMs = 86'400'000, kYearS = 366 * 86'400;
  static const std::vector<SettingInfo> table{
      {"data_dir", default_data_dir(), "registry, logs, sockets and caches live below it"},
      {"coordinator", "", "endpoint of the coordinator's client socket; empty: ipc below data_dir"},
      {"listen_clients", "",
       "where the coordinator listens for clients; empty: ipc below data_dir"},
      {"listen_workers", "", "where it listens for workers; empty: ipc below data_dir"},
      {"listen_bulk", "", "where it listens for blob traffic; empty: ipc below data_dir"},
      {"key_file", "", "this process's CURVE key file (0600); needed for tcp:// endpoints"},
      {"keys_dir", "",
       "coordinator: directory of accepted public keys; needed for tcp:// endpoints"},
      {"server_key", "", "public key of the coordinator, for tcp:// endpoints"},
      {"model_roots", "", "colon-separated directories that model add may name; empty: any"},
      {"registry_bytes_max", "1GiB", "map size of the registry"},
      {"blobs_bytes_max", "16GiB", "map size of the blob store; larger objects become files"},
      {"cache_bytes_max", "256MiB", "result cache"},
      {"cache_ttl_s", "86400", "seconds a cached result lives", {}, {{0, 100 * kYearS}}},
      {"queue_requests_max",
       "1024",
       "requests waiting in the coordinator; more are answered busy",
       {},
       {{1, kMany}}},
      {"queue_jobs_max", "1024", "jobs waiting; more are refused", {}, {{1, kMany}}},
      {"jobs_kept", "10000", "jobs that have ended; older ones are forgotten", {}, {{1, kMany}}},
      {"lease_ms", "5000", "a worker that is silent this long is dead", {}, {{20, kDayMs}}},
      {"heartbeat_ms", "1000", "how often workers report", {}, {{10, kDayMs}}},
      {"job_attempts_max",
       "10",
       "starts of one job after worker deaths before it fails",
       {},
       {{1, kMany}}},
      {"device", "auto", "auto, cpu or cuda", {"auto", "cpu", "cuda"}},
      {"threads",
       "0",
       "OpenMP threads per engine; 0: the machine's cores divided by the local workers, and no "
       "more "
       "than affinity and the control groups' quotas allow",
       {},
       {{0, 4096}}},
      {"dtype",
       "auto",
       "compute dtype: auto, f32, bf16 or (on a GPU) f16",
       {"auto", "f32", "bf16", "f16"}},
      {"numerics",
       "auto",
       "auto, replay or invariant (auto: invariant for f32 on CPU)",
       {"auto", "replay", "invariant"}},
      {"memory_bytes_max", "0",
       "device memory an engine may use; 0: three quarters of what is there"},
      {"kv_bytes_max", "0",
       "key-value cache; 0: an eighth of memory_bytes_max, at most 1 GiB on CPU"},
      {"adapter_slots", "32", "adapters that may share a batch", {}, {{1, kMany}}},
      {"batch_tokens_max",
       "512",
       "tokens of one serving iteration (prefill is chunked to fit)",
       {},
       {{1, kMany}}},
      {"running_requests_max", "64", "requests decoding at once in one engine", {}, {{1, kMany}}},
      {"train_share_min", "0.25", "share of device time a training job keeps while requests run"},
      {"serve_interval_ms",
       "auto",
       "while a job trains, from the end of one serving step to that of the next; auto: 22 on a "
       "GPU, 0 on CPU",
       {"auto"},
       {{0, kDayMs}}},
      {"batch_tokens_beside",
       "auto",
       "batch_tokens_max while a job trains; auto: 256 on a GPU, unchanged on CPU",
       {"auto"},
       {{0, kMany}}},
      {"serve_multiprocessors",
       "0",
       "of a GPU, that training leaves to small serving steps, which then run beside it",
       {},
       {{0, kMany}}},
      {"drain_timeout_s", "25", "seconds SIGTERM waits for running work", {}, {{0, kYearS}}},
      {"gang_timeout_s",
       "120",
       "a rank that is silent this long (and 5 of its longest recent steps) ends its job's gang",
       {},
       {{1, kYearS}}},
      {"workers", "1", "tandem up: workers to launch", {}, {{1, 1024}}},
      {"log_level", "info", "debug, info, warn or error", {"debug", "info", "warn", "error"}},
  };
  return table;
}

Result<Settings> Settings::load(const std::map<std::string, std::string>& flags,
                                const std::string& config_file) {
  Settings settings;
  for (const auto& info : known()) settings.values_[info.name] = {info.default_value, "default"};
  std::vector<std::string> files{"/etc/tandem/config.yaml"};
  const std::string home = environment("HOME");
  const std::string xdg = environment("XDG_CONFIG_HOME");
  if (!xdg.empty())
    files.push_back(xdg + "/tandem/config.yaml");
  else if (!home.empty())
    files.push_back(home + "/.config/tandem/config.yaml");
  if (!config_file.empty()) {
    if (!std::filesystem::exists(config_file))
      return not_found_error(str("no configuration file ", config_file));
    files.push_back(config_file);
  }
  for (const auto& file : files)
    if (std::error_code error; std::filesystem::exists(file, error))
      TANDEM_RETURN_IF_ERROR(read_file(file, settings.values_));
  for (const auto& info : known()) {
    const std::string variable = variable_name(info.name);
    if (const char* value = std::getenv(variable.c_str()))
      settings.values_[info.name] = {value, variable};
  }
  for (const auto& [name, value] : flags) {
    if (!settings.values_.contains(name)) return unknown_setting("command line", name);
    settings.values_[name] = {value, "flag"};
  }
  for (const SettingInfo& info : known())
    TANDEM_RETURN_IF_ERROR(check_value(info, settings.values_.at(info.name)));
  std::error_code error;
  auto& data_dir = settings.values_["data_dir"].value;
  data_dir = std::filesystem::absolute(data_dir, error).lexically_normal().string();
  return settings;
}

const std::string& Settings::get(const std::string& name) const {
  const auto found = values_.find(name);
  TANDEM_CHECK(found != values_.end(), "unknown setting ", name);
  return found->second.value;
}

Result<std::int64_t> Settings::get_int(const std::string& name) const {
  const std::string& text = get(name);
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end)
    return invalid_error(str(name, " must be a whole number, not \"", text, "\""));
  return static_cast<std::int64_t>(value);
}

double Settings::get_share(const std::string& name) const {
  return std::strtod(get(name).c_str(), nullptr);
}

LogLevel Settings::log_level() const {
  const auto& table = known();
  const auto info = std::find_if(table.begin(), table.end(),
                                 [](const SettingInfo& i) { return i.name == "log_level"; });
  const auto word = std::find(info->words.begin(), info->words.end(), get("log_level"));
  return static_cast<LogLevel>(word - info->words.begin());  // listed in the order of LogLevel
}

Result<std::int64_t> Settings::get_bytes(const std::string& name) const {
  auto bytes = parse_bytes(get(name));
  if (!bytes.ok()) return invalid_error(str(name, ": ", bytes.status().message()));
  return bytes;
}

std::string Settings::socket_dir() const {
  constexpr std::size_t kDirectoryBytesMax =
      90;  // sockaddr_un holds 107 and the names need the rest
  if (run_dir().size() <= kDirectoryBytesMax) return run_dir();
  return str("/tmp/tandem-", getuid(), "-", sha256(run_dir()).short_hex());
}

std::string Settings::endpoint(const std::string& socket) const {
  const std::string& listen = get("listen_" + socket);
  if (!listen.empty()) return listen;
  if (socket == "clients" && !get("coordinator").empty()) return get("coordinator");
  return "ipc://" + socket_dir() + "/" + socket + ".sock";
}

bool CommandLine::has(const std::string& flag) const {
  return std::find(rest.begin(), rest.end(), flag) != rest.end();
}

std::vector<std::string> CommandLine::to_arguments() const {
  std::vector<std::string> arguments;
  for (const auto& [name, value] : flags) {
    arguments.push_back(flag_name(name));
    arguments.push_back(value);
  }
  if (!config_file.empty()) arguments.insert(arguments.end(), {"--config", config_file});
  return arguments;
}

Result<CommandLine> split_command_line(int argc, const char* const* argv) {
  CommandLine line;
  for (int i = 1; i < argc; ++i) {
    std::string word = argv[i], value;
    const auto equals = word.find('=');
    const std::string flag = word.substr(0, equals);
    std::string* target = flag == "--config" ? &line.config_file : nullptr;
    for (const auto& info : Settings::known())
      if (flag == flag_name(info.name)) target = &line.flags[info.name];
    if (!target) {
      line.rest.push_back(std::move(word));
    } else if (equals != std::string::npos) {
      *target = word.substr(equals + 1);
    } else if (++i < argc) {
      *target = argv[i];
    } else {
      return invalid_error(str(flag, " needs a value"));
    }
  }
  return line;
}

std::string settings_help() {
  std::string help;
  for (const auto& info : Settings::known()) {
    std::string flag = "  " + flag_name(info.name) + " X";
    flag.resize(std::max<std::size_t>(flag.size() + 2, 30), ' ');
    help += flag + info.help + (info.default_value.empty() ? "" : " [" + info.default_value + "]") +
            "\n";
  }
  return help;
}

Result<std::int64_t> parse_bytes(const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  std::string unit(end);
  unit.erase(std::remove(unit.begin(), unit.end(), ' '), unit.end());
  double factor = 0;
  if (unit.empty() || unit == "B")
    factor = 1;
  else if (unit == "KiB")
    factor = 1024.0;
  else if (unit == "MiB")
    factor = 1024.0 * 1024;
  else if (unit == "GiB")
    factor = 1024.0 * 1024 * 1024;
  if (end == text.c_str() || factor == 0 || value < 0 || value * factor > 9e18)
    return invalid_error(str("not a size: \"", text, "\" (examples: 1048576, 512MiB, 2GiB)"));
  return static_cast<std::int64_t>(value * factor);
}

}  // namespace tandem::protocol
