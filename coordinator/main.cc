// tandem-coordinator: settings, registry, sockets, loop.
#include "coordinator/bulk_server.h"
#include "coordinator/coordinator_loop.h"
#include "protocol/base/environment.h"
#include "protocol/base/log.h"
#include "protocol/base/processors.h"
#include "protocol/base/units.h"
#include "protocol/descriptor_limit.h"
#include "protocol/key_file.h"
#include "protocol/settings.h"
#include "protocol/zmq_transport.h"
#include "storage/file_io.h"

#include <nlohmann/json.hpp>

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <map>

namespace tandem::coordinator {
namespace {

using Json = nlohmann::ordered_json;
using protocol::Settings;

constexpr const char* kVersion = "0.1.0";

std::atomic<bool> g_stop{false};
std::atomic<int> g_signals{0};

void on_signal(int) {
  // The second one does not wait for anything.
  if (g_signals.fetch_add(1) > 0) ::_exit(1);
  g_stop = true;
}

const char* const kUsage =
    "usage: tandem-coordinator [--data-dir DIR] [--listen-clients ENDPOINT]\n"
    "           [--listen-workers ENDPOINT] [--listen-bulk ENDPOINT] [--config FILE]\n"
    "           [--SETTING VALUE]...\n"
    "Schedules jobs, routes requests and owns the registry. Endpoints are ipc:///PATH (default:\n"
    "below DATA_DIR/run) or tcp://HOST:PORT, which needs key_file and keys_dir.\n"
    "Every setting is also read from TANDEM_NAME and from the configuration files:\n";

void print_usage() {
  std::cout << kUsage;
  for (const auto& setting : Settings::known())
    std::cout << "  --" << setting.name << "  " << setting.help
              << " (default: " << (setting.default_value.empty() ? "none" : setting.default_value)
              << ")\n";
}

struct Arguments {
  std::map<std::string, std::string> flags;
  std::string config_file, log_file;
  bool help = false, version = false;
};

Result<Arguments> parse_arguments(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    std::string name = argv[i];
    if (name == "--help" || name == "-h") {
      arguments.help = true;
      continue;
    }
    if (name == "--version") {
      arguments.version = true;
      continue;
    }
    if (name.rfind("--", 0) != 0)
      return invalid_error(str("unexpected argument ", name, "; see --help"));
    name = name.substr(2);
    std::string value;
    if (const auto equals = name.find('='); equals != std::string::npos) {
      value = name.substr(equals + 1);
      name = name.substr(0, equals);
    } else if (i + 1 < argc) {
      value = argv[++i];
    } else {
      return invalid_error(str("--", name, " needs a value; see --help"));
    }
    std::replace(name.begin(), name.end(), '-', '_');
    if (name == "config")
      arguments.config_file = value;
    else if (name == "log_file")
      arguments.log_file = value;
    else
      arguments.flags[name] = value;
  }
  return arguments;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::string part;
  for (const char c : text + separator) {
    if (c != separator) {
      part.push_back(c);
    } else if (!part.empty()) {
      parts.push_back(std::exchange(part, {}));
    }
  }
  return parts;
}

/// Times stretched by TANDEM_TIME_SCALE, once.
void scale(Limits& l) {
  for (TimeMs Limits::*time :
       {&Limits::heartbeat_ms, &Limits::lease_ms, &Limits::adoption_ms, &Limits::missing_job_ms,
        &Limits::engine_silent_ms, &Limits::load_resend_ms, &Limits::load_backoff_ms,
        &Limits::load_backoff_max_ms, &Limits::resend_ms, &Limits::estimate_resend_ms,
        &Limits::estimate_timeout_ms, &Limits::start_timeout_ms, &Limits::no_engine_wait_ms,
        &Limits::probe_ms, &Limits::orphan_ms, &Limits::idle_engine_ms})
    l.*time = scaled_ms(l.*time);
}

Result<Limits> make_limits(const Settings& settings) {
  Limits limits;
  TANDEM_ASSIGN_OR_RETURN(limits.heartbeat_ms, settings.get_int("heartbeat_ms"));
  TANDEM_ASSIGN_OR_RETURN(limits.lease_ms, settings.get_int("lease_ms"));
  TANDEM_ASSIGN_OR_RETURN(const auto queue, settings.get_int("queue_requests_max"));
  TANDEM_ASSIGN_OR_RETURN(const auto jobs, settings.get_int("queue_jobs_max"));
  TANDEM_ASSIGN_OR_RETURN(const auto kept, settings.get_int("jobs_kept"));
  TANDEM_ASSIGN_OR_RETURN(const auto registry_bytes, settings.get_bytes("registry_bytes_max"));
  TANDEM_ASSIGN_OR_RETURN(const auto attempts, settings.get_int("job_attempts_max"));
  TANDEM_ASSIGN_OR_RETURN(const auto cache_bytes, settings.get_bytes("cache_bytes_max"));
  TANDEM_ASSIGN_OR_RETURN(const auto cache_ttl_s, settings.get_int("cache_ttl_s"));
  if (limits.heartbeat_ms < 10 || limits.lease_ms < 2 * limits.heartbeat_ms)
    return invalid_error(str("lease_ms (", limits.lease_ms,
                             ") must be at least twice heartbeat_ms (", limits.heartbeat_ms,
                             "), and that at least 10"));
  if (queue < 1 || jobs < 1 || attempts < 1 || cache_bytes < 0 || cache_ttl_s < 0)
    return invalid_error(
        "queue_requests_max, queue_jobs_max and job_attempts_max must be at least "
        "1, cache_bytes_max and cache_ttl_s at least 0");
  limits.queue_max = static_cast<std::size_t>(queue);
  limits.queue_per_user_max = std::max<std::size_t>(1, limits.queue_max / 2);
  limits.jobs_live_max = static_cast<std::size_t>(jobs);
  limits.jobs_kept = static_cast<std::size_t>(kept);
  limits.history_bytes_max = registry_bytes / 4;
  limits.attempts_max = static_cast<int>(attempts);
  limits.results_bytes_max = static_cast<std::size_t>(cache_bytes);
  limits.result_ttl_ms = cache_ttl_s * 1000;
  limits.adoption_ms = 2 * limits.lease_ms;
  scale(limits);
  return limits;
}

void print_limits(const Limits& l) {
  log_info("limits: heartbeat ", l.heartbeat_ms, " ms, lease ", l.lease_ms, " ms, adoption ",
           l.adoption_ms, " ms; queue ", l.queue_max, " requests (", l.queue_per_user_max,
           " of one user, ", l.requests_per_user_max, " with those that run), ", l.jobs_live_max,
           " jobs (and ", l.jobs_kept, " ended ones, with ", format_bytes(l.history_bytes_max),
           " of events and checkpoints' manifests), ", l.attempts_max,
           " attempts without progress; ", l.replicas_max, " replicas; ", l.workers_max,
           " workers, ", l.sessions_max, " client sessions, ", l.streams_max, " streams");
  log_info("limits: result cache ", format_bytes(static_cast<std::int64_t>(l.results_bytes_max)),
           ", ttl ", l.result_ttl_ms / 1000, " s; idempotency keys ", l.idempotency_max, ", ",
           l.idempotency_ttl_ms / 3'600'000, " h; outbox ", kOutboxMessagesMax, " messages, ",
           format_bytes(kOutboxBytesMax), " per peer; frames ",
           format_bytes(protocol::kFrameBytesMax), ", workers' ",
           format_bytes(protocol::kWorkerFrameBytesMax), ", bulk ",
           format_bytes(protocol::kBulkFrameBytesMax));
}

std::string config_json(const Settings& settings) {
  Json list = Json::array();
  for (const auto& known : Settings::known()) {
    const auto value = settings.all().find(known.name);
    if (value == settings.all().end()) continue;
    list.push_back({{"name", known.name},
                    {"value", value->second.value},
                    {"origin", value->second.origin},
                    {"default", known.default_value}});
  }
  return Json{{"settings", std::move(list)}}.dump();
}

/// The three sockets and what guards them.
struct Sockets {
  std::unique_ptr<protocol::ZmqContext> context;
  std::unique_ptr<protocol::ServerEndpoint> clients, workers, bulk;
  std::unique_ptr<protocol::Poller> poller;
  std::string public_key;
};

Result<Sockets> open_sockets(const Settings& settings) {
  Sockets sockets;
  TANDEM_ASSIGN_OR_RETURN(sockets.context, protocol::ZmqContext::create());
  std::optional<protocol::CurveKeyPair> keys;
  if (!settings.get("key_file").empty()) {
    TANDEM_ASSIGN_OR_RETURN(const auto file, protocol::read_key_file(settings.get("key_file")));
    keys = protocol::CurveKeyPair{file.public_key, file.secret_key};
    sockets.public_key = file.public_key;
  }
  const auto listen = [&](const char* name, protocol::SocketLimits limits,
                          std::vector<protocol::KeyRole> roles) {
    protocol::ZmqServerOptions options;
    options.endpoint = settings.endpoint(name);
    options.limits = limits;
    if (options.endpoint.rfind("tcp://", 0) == 0) options.keys = keys;
    options.allowed_keys_dir = settings.get("keys_dir");
    options.allowed_roles = std::move(roles);
    return sockets.context->listen(options);
  };
  using protocol::KeyRole;
  TANDEM_ASSIGN_OR_RETURN(sockets.clients, listen("clients", protocol::SocketLimits::control(),
                                                  {KeyRole::kClient, KeyRole::kAdmin}));
  TANDEM_ASSIGN_OR_RETURN(sockets.workers,
                          listen("workers", protocol::SocketLimits::workers(), {KeyRole::kWorker}));
  TANDEM_ASSIGN_OR_RETURN(sockets.bulk, listen("bulk", protocol::SocketLimits::bulk(), {}));
  TANDEM_ASSIGN_OR_RETURN(sockets.poller, sockets.context->make_poller());
  sockets.poller->add(*sockets.workers);
  sockets.poller->add(*sockets.clients);
  return sockets;
}

Status make_private_directory(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) return internal_error(str("cannot make ", path, ": ", error.message()));
  if (::chmod(path.c_str(), 0700) != 0)
    return internal_error(str("cannot close ", path, " to others"));
  return {};
}

Status run(const Settings& settings) {
  log_info("limits: ", protocol::raise_descriptor_limit(), " open files, ",
           protocol::kReservedDescriptors, " of them for the registry alone");
  TANDEM_ASSIGN_OR_RETURN(Limits limits, make_limits(settings));
  TANDEM_RETURN_IF_ERROR(make_private_directory(settings.data_dir()));
  TANDEM_RETURN_IF_ERROR(make_private_directory(settings.run_dir()));
  TANDEM_RETURN_IF_ERROR(make_private_directory(settings.log_dir()));
  SystemClock clock;
  storage::RegistryOptions registry_options;
  registry_options.directory = settings.data_dir();
  TANDEM_ASSIGN_OR_RETURN(registry_options.registry_map_bytes,
                          settings.get_bytes("registry_bytes_max"));
  TANDEM_ASSIGN_OR_RETURN(registry_options.blob_budget_bytes,
                          settings.get_bytes("blobs_bytes_max"));
  registry_options.write_ahead = true;
  TANDEM_ASSIGN_OR_RETURN(auto registry, storage::Registry::open(registry_options, clock));
  TANDEM_ASSIGN_OR_RETURN(Sockets sockets, open_sockets(settings));

  Options options;
  options.limits = limits;
  options.incarnation = entropy64() | 1;
  options.seed = entropy64();
  options.version = kVersion;
  options.config_json = config_json(settings);
  const Json paths{{"endpoints",
                    {{"client", sockets.clients->address()},
                     {"worker", sockets.workers->address()},
                     {"bulk", sockets.bulk->address()}}},
                   {"pid", ::getpid()},
                   {"data_dir", settings.data_dir()},
                   {"log_path", settings.log_dir()},
                   {"tensorboard_dir", settings.data_dir() + "/runs"}};
  options.paths_json = paths.dump();

  BackgroundOptions background;
  background.model_roots = split(settings.get("model_roots"), ':');
  background.keys_dir = settings.get("keys_dir");
  background.server_public_key = sockets.public_key;
  background.hash_threads = processors();

  ServedFiles files(&registry->blobs());
  const char* failpoint = std::getenv("TANDEM_FAILPOINT");
  TANDEM_ASSIGN_OR_RETURN(
      auto loop, CoordinatorLoop::create(
                     {*sockets.clients, *sockets.workers, *sockets.poller, *registry, files, clock},
                     options, background, failpoint ? failpoint : ""));
  BulkServer bulk(std::move(sockets.bulk), *registry, files);

  print_limits(limits);
  Json ready = paths;
  ready["version"] = kVersion;
  ready["incarnation"] = str(options.incarnation);
  const std::string ready_path = settings.run_dir() + "/coordinator.json";
  TANDEM_RETURN_IF_ERROR(storage::write_file_durably(ready_path, ready.dump(2) + "\n"));
  log_info("ready: pid ", ::getpid(), ", clients ", sockets.clients->address(), ", workers ",
           sockets.workers->address(), ", bulk ", paths["endpoints"]["bulk"].get<std::string>());
  loop->run(g_stop);
  const LoopCounters& counters = loop->counters();
  log_info("ending: ", counters.steps, " steps, ", counters.commits, " commits, ",
           counters.malformed, " malformed frames");
  (void)::unlink(ready_path.c_str());
  return {};
}

int run_main(int argc, char** argv) {
  auto arguments = parse_arguments(argc, argv);
  const auto fail = [](const Status& status) {
    std::cerr << "tandem-coordinator: " << status.message() << std::endl;
    return exit_code(status.code());
  };
  if (!arguments.ok()) return fail(arguments.status());
  if (arguments->help) {
    print_usage();
    return 0;
  }
  if (arguments->version) {
    std::cout << "tandem-coordinator " << kVersion << "\n";
    return 0;
  }
  auto settings = Settings::load(arguments->flags, arguments->config_file);
  if (!settings.ok()) return fail(settings.status());
  set_log_component("coordinator");
  set_log_level(settings->log_level());
  if (!arguments->log_file.empty() && !set_log_file(arguments->log_file))
    return fail(internal_error(str("cannot write the log ", arguments->log_file)));
  struct sigaction action {};
  action.sa_handler = on_signal;
  for (const int signal : {SIGTERM, SIGINT}) sigaction(signal, &action, nullptr);
  (void)std::signal(SIGPIPE, SIG_IGN);
  const Status status = run(*settings);
  if (!status.ok() && !arguments->log_file.empty()) log_error(status.message());
  return status.ok() ? 0 : fail(status);
}

}  // namespace
}  // namespace tandem::coordinator

int main(int argc, char** argv) {
  tandem::start_with_environment({tandem::kMallocLargeBuffers}, argv);
  return tandem::coordinator::run_main(argc, argv);
}
