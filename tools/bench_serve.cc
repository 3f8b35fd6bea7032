// bench_serve: latencies of a running platform as a client sees them. Prints one JSON value:
// machine, settings, and
//   coordinator_ms         the coordinator's share of the first token's time
//   cached                 a repeated greedy request against the same one uncached
//   publish_to_first_token last training step of a short job to the first token of its adapter;
//                          publish_parts_ms: what of it the engine did (hand_over_ms: the trained
//                          tensors become serving's), disk_mb_per_second: what the registry's disk
//                          takes, file by file with fsync
// Needs a platform that is idle: tandem up; tandem model add NAME PATH; bench_serve --model NAME
// --data FILE
#include "protocol/base/clock.h"
#include "protocol/base/processors.h"
#include "protocol/client/client.h"
#include "protocol/settings.h"
#include "tools/bench_arguments.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <map>
#include <thread>

namespace tandem::tools {
namespace {

using Json = nlohmann::ordered_json;
using protocol::client::Client;

struct Options {
  std::map<std::string, std::string> platform;  ///< settings that say which
  std::string model, data, prompt = "Who is the mayor of Brindlemark?";
  int requests = 200, publishes = 50, steps = 4;
};

/// p50, p99, least and largest of milliseconds.
Json summary(std::vector<double> values) {
  if (values.empty()) return nullptr;
  std::sort(values.begin(), values.end());
  auto at = [&](double share) {
    return values[static_cast<std::size_t>(share * static_cast<double>(values.size() - 1) + 0.5)];
  };
  return {{"n", values.size()},
          {"p50", at(0.5)},
          {"p99", at(0.99)},
          {"min", values.front()},
          {"max", values.back()}};
}

template <class T>
T need(Result<T> result) {
  if (result.ok()) return std::move(*result);
  std::cerr << "bench_serve: " << result.status().message() << "\n";
  std::exit(exit_code(result.status().code()));
}

struct Timed {
  protocol::client::Generation answer;
  double first_ms = 0, total_ms = 0;
};

Timed ask(Client& client, const std::string& model, const std::string& prompt,
          std::int64_t max_tokens, bool no_cache) {
  protocol::Generate request;
  request.model = model;
  request.input.prompt = prompt;
  request.sampling.max_tokens = max_tokens;
  request.sampling.temperature = 0.0f;
  request.no_cache = no_cache;
  Timed timed;
  const std::int64_t begin = steady_ns();
  timed.answer =
      need(client.generate(std::move(request), [&](const protocol::GenerateChunk& chunk) {
        if (timed.first_ms == 0 && !chunk.tokens.empty())
          timed.first_ms = static_cast<double>(steady_ns() - begin) / 1e6;
        return true;
      }));
  timed.total_ms = static_cast<double>(steady_ns() - begin) / 1e6;
  return timed;
}

Json bench_coordinator(Client& client, const Options& options) {
  std::vector<double> share, first;
  for (int i = 0; i < options.requests; ++i) {
    const Timed timed = ask(client, options.model, options.prompt, 1, true);
    share.push_back(static_cast<double>(timed.answer.queue_us) / 1000);
    first.push_back(timed.first_ms);
  }
  return {{"coordinator_ms", summary(share)}, {"first_token_ms", summary(first)}};
}

Json bench_cache(Client& client, const Options& options) {
  std::vector<double> uncached, cached;
  bool identical = true, flagged = true;
  for (int i = 0; i < 20; ++i) {
    const std::string prompt = str(options.prompt, " Run ", steady_ns(), ".");
    const Timed first = ask(client, options.model, prompt, 64, false);
    const Timed second = ask(client, options.model, prompt, 64, false);
    uncached.push_back(first.total_ms);
    cached.push_back(second.total_ms);
    identical = identical && first.answer.text == second.answer.text;
    flagged = flagged && second.answer.cached && !first.answer.cached;
  }
  const Json a = summary(uncached), b = summary(cached);
  return {{"uncached_ms", a},
          {"cached_ms", b},
          {"speedup_p50", a["p50"].get<double>() / b["p50"].get<double>()},
          {"identical_text", identical},
          {"flagged", flagged}};
}

std::string upload(Client& client, const std::string& path) {
  const auto stored = need(need(client.bulk())->put_file(path));
  Json chunks = Json::array();
  for (const Digest& chunk : stored.chunks) chunks.push_back(chunk.hex());
  const Json params{{"digest", stored.root.hex()},
                    {"bytes", stored.bytes},
                    {"chunks", chunks},
                    {"upload", stored.id}};
  return Json::parse(need(client.call("data.add", params.dump()))).value("digest", "");
}

/// Where a publish's time went, by part: those of its metadata, and, seen from here, until a client
/// knew of it and what its first request took.
using Parts = std::map<std::string, std::vector<double>>;

/// Milliseconds from the last step's event to the first token of the adapter it published.
double publish_once(Client& client, const Options& options, const std::string& data, int index,
                    Parts& parts) {
  const Json spec{{"model", options.model},
                  {"dataset", data},
                  {"adapter", "bench-publish"},
                  {"train",
                   {{"max_steps", options.steps},
                    {"max_length", 256},
                    {"per_device_train_batch_size", 1},
                    {"seed", index}}}};
  const std::string job =
      Json::parse(need(client.call("job.submit", Json{{"spec", spec}}.dump()))).value("job", "");
  std::int64_t last_step_unix_ms = 0, visible_unix_ms = 0;
  bool published = false;
  const Status watched =
      client.stream("job.watch", Json{{"job", job}}.dump(), [&](const std::string& text) {
        const Json event = Json::parse(text);
        if (event.value("kind", "") == "step")
          last_step_unix_ms = event.value("time", std::int64_t{0});
        published = published || event.value("kind", "") == "publish";
        if (published) visible_unix_ms = SystemClock().unix_ms();
        return !published;
      });
  if (!published) {
    std::cerr << "bench_serve: job " << job << " published nothing: " << watched.to_string()
              << "\n";
    std::exit(1);
  }
  const Timed timed = ask(client, "bench-publish", options.prompt, 1, true);
  const double total = static_cast<double>(SystemClock().unix_ms() - last_step_unix_ms);
  while (true) {  // the job's end, so that the next one starts on an idle platform
    const std::string state =
        Json::parse(need(client.call("job.show", Json{{"job", job}}.dump()))).value("state", "");
    if (state == "done" || state == "failed") break;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  const Json shown =
      Json::parse(need(client.call("adapter.show", Json{{"adapter", "bench-publish"}}.dump())));
  const Json metadata = shown.value("metadata", Json::object());
  for (const auto& [name, value] : metadata.items())
    if (name.ends_with("_ms")) parts[name].push_back(value.get<double>());
  parts["visible_ms"].push_back(static_cast<double>(visible_unix_ms - last_step_unix_ms));
  parts["first_request_ms"].push_back(timed.first_ms);
  return total - (timed.total_ms - timed.first_ms);
}

/// Files of the size of an adapter, written and synced one after the other.
double disk_mb_per_second(const std::string& folder) {
  constexpr std::size_t kBytes = std::size_t{64} << 20;
  constexpr int kFiles = 4;
  const std::string path = folder + "/bench-disk", data(kBytes, 'x');
  const std::int64_t begin = steady_ns();
  for (int i = 0; i < kFiles; ++i) {
    const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    const bool written =
        fd >= 0 && ::write(fd, data.data(), kBytes) == static_cast<ssize_t>(kBytes);
    if (!written || ::fsync(fd) != 0) {
      std::cerr << "bench_serve: cannot write " << path << "\n";
      std::exit(1);
    }
    ::close(fd);
  }
  ::unlink(path.c_str());
  return kFiles * kBytes / (static_cast<double>(steady_ns() - begin) * 1e-9) / 1e6;
}

std::string processor() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);)
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  return "unknown";
}

int run(const Options& options) {
  const auto settings = need(protocol::Settings::load(options.platform, ""));
  protocol::client::ClientOptions connect;
  connect.endpoint = settings.endpoint("clients");
  connect.bulk_endpoint =
      settings.get("coordinator").empty() ? settings.endpoint("bulk") : settings.get("listen_bulk");
  connect.key_file = settings.get("key_file");
  const auto client = need(Client::connect(connect));
  ask(*client, options.model, options.prompt, 8, true);  // warm
  Json result{{"bench", "serve"},
              {"machine", processor()},
              {"cores", processors()},
              {"settings",
               {{"model", options.model},
                {"requests", options.requests},
                {"publishes", options.publishes},
                {"steps", options.steps}}}};
  result.update(bench_coordinator(*client, options));
  result["cached"] = bench_cache(*client, options);
  if (!options.data.empty()) {
    const std::string data = upload(*client, options.data);
    std::vector<double> latencies;
    Parts parts;
    publish_once(*client, options, data, 0, parts);  // warm
    parts.clear();
    for (int i = 0; i < options.publishes; ++i)
      latencies.push_back(publish_once(*client, options, data, i + 1, parts));
    result["publish_to_first_token_ms"] = summary(latencies);
    for (const auto& [name, values] : parts) result["publish_parts_ms"][name] = summary(values);
    result["disk_mb_per_second"] = disk_mb_per_second(settings.data_dir());
  }
  std::cout << result.dump(2) << "\n";
  return 0;
}

}  // namespace
}  // namespace tandem::tools

int main(int argc, char** argv) {
  tandem::tools::Options options;
  CLI::App app{"Latencies of a running, idle platform.", "bench_serve"};
  const auto setting = [&](const char* flag, const char* name, const char* help) {
    app.add_option_function<std::string>(
           flag, [&options, name](const std::string& v) { options.platform[name] = v; }, help)
        ->take_last();
  };
  setting("--data-dir", "data_dir", "the platform's folder");
  setting("--coordinator", "coordinator", "endpoint of another platform's coordinator");
  setting("--key-file", "key_file", "key for tcp:// endpoints");
  app.add_option("--model", options.model, "base model")->required();
  app.add_option("--data", options.data, "JSON lines for the publish part [left out]");
  app.add_option("--requests", options.requests, "for the coordinator's share [200]");
  app.add_option("--publishes", options.publishes, "jobs [50]");
  app.add_option("--steps", options.steps, "of each job [4]");
  if (const auto code = tandem::tools::parse_bench(app, argc, argv)) return *code;
  return tandem::tools::run(options);
}
