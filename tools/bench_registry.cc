// bench_registry: what durable registry work costs on this disk. Prints one JSON value: commits of
// one small record, publishes (manifest, version, alias in one transaction), blobs in 16 MiB
// chunks, and the 10 MB of an adapter in 400 chunks, a pause before each; with --write-ahead as a
// coordinator opens its registry.
#include "protocol/base/clock.h"
#include "protocol/base/processors.h"
#include "protocol/base/random.h"
#include "storage/registry.h"
#include "tools/bench_arguments.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iostream>
#include <numeric>
#include <thread>

namespace tandem::tools {
namespace {

using Json = nlohmann::ordered_json;

void need(const Status& status) {
  if (status.ok()) return;
  std::cerr << "bench_registry: " << status.message() << "\n";
  std::exit(exit_code(status.code()));
}

/// Runs `work` `count` times, each after a pause; rate and latencies without the pauses.
template <class Work>
Json measure(int count, Work work, std::chrono::milliseconds pause = {}) {
  std::vector<double> ms;
  for (int i = 0; i < count; ++i) {
    if (pause.count() > 0) std::this_thread::sleep_for(pause);
    const std::int64_t start = steady_ns();
    work(i);
    ms.push_back(static_cast<double>(steady_ns() - start) / 1e6);
  }
  const double seconds = std::accumulate(ms.begin(), ms.end(), 0.0) / 1e3;
  std::sort(ms.begin(), ms.end());
  return {{"n", count},
          {"per_second", count / seconds},
          {"p50_ms", ms[ms.size() / 2]},
          {"p99_ms", ms[ms.size() * 99 / 100]},
          {"max_ms", ms.back()}};
}

std::vector<std::byte> noise(std::size_t bytes, std::uint64_t seed) {
  std::vector<std::byte> data(bytes);
  Random random(seed);
  for (std::size_t i = 0; i + 8 <= bytes; i += 8) {
    const std::uint64_t bits = random.next();
    std::memcpy(data.data() + i, &bits, 8);
  }
  return data;
}

/// What a publish stores, one commit after the platform has been still.
Json measure_adapters(storage::Registry& registry) {
  constexpr int kAdapters = 15, kChunks = 400;
  constexpr std::size_t kChunkBytes = 25'000;
  std::vector<std::vector<std::byte>> data;
  for (int i = 0; i < kAdapters * kChunks; ++i)
    data.push_back(noise(kChunkBytes, 100'000 + static_cast<std::uint64_t>(i)));
  std::vector<storage::BlobChunk> chunks;
  for (const auto& bytes : data) chunks.push_back({sha256(bytes), bytes});
  return measure(
      kAdapters,
      [&](int i) {
        need(registry.blobs().put_verified(
            std::span(chunks).subspan(static_cast<std::size_t>(i) * kChunks, kChunks)));
      },
      std::chrono::milliseconds(1500));
}

int run(const std::string& directory, int count, bool write_ahead) {
  SystemClock clock;
  storage::RegistryOptions options;
  options.directory = directory;
  options.write_ahead = write_ahead;
  auto opened = storage::Registry::open(options, clock);
  need(opened.status());
  storage::Registry& registry = **opened;
  Json result{{"bench", "registry"},
              {"directory", directory},
              {"write_ahead", write_ahead},
              {"cores", processors()}};

  result["commit"] = measure(count, [&](int i) {
    auto txn = registry.begin_write();
    need(txn.status());
    need(txn->put(storage::SettingRecord{"bench", str(i)}));
    need(txn->commit());
  });
  const Digest base = sha256("bench base");
  result["publish"] = measure(count, [&](int i) {
    const auto bytes = noise(4096, static_cast<std::uint64_t>(i) + 1);
    storage::Manifest manifest;
    manifest.settings_json = Json{{"base_model", base.hex()}, {"n", i}}.dump();
    manifest.tensors.push_back(storage::describe_tensor("t", "u8", {4096}, bytes));
    const storage::BlobChunk chunk{manifest.tensors[0].chunks[0], bytes};
    need(registry.blobs().put_chunks(std::span(&chunk, 1)));
    auto text = storage::encode_manifest(manifest);
    need(text.status());
    auto txn = registry.begin_write();
    need(txn.status());
    const Digest digest = storage::manifest_digest(*text);
    const auto version = static_cast<std::uint32_t>(i) + 1;
    need(
        txn->put(storage::ManifestRecord{digest, storage::ManifestKind::kAdapter, *text, base, 0}));
    need(txn->put(storage::AdapterVersionRecord{"bench", version, digest, base, "", 0, "{}"}));
    need(txn->put(storage::AliasRecord{"bench", "bench", version, digest, false, version, {}}));
    need(txn->commit());
  });
  const int chunks = 8;
  std::vector<std::vector<std::byte>> data;
  for (int i = 0; i < chunks; ++i)
    data.push_back(noise(16 << 20, 1000 + static_cast<std::uint64_t>(i)));
  result["chunk_16mib"] = measure(chunks, [&](int i) {
    const auto& bytes = data[static_cast<std::size_t>(i)];
    need(registry.blobs().put_chunk(sha256(bytes), bytes));
  });
  result["chunk_16mib"]["mib_per_second"] = result["chunk_16mib"]["per_second"].get<double>() * 16;
  result["adapter_10mb"] = measure_adapters(registry);
  std::cout << result.dump(2) << "\n";
  return 0;
}

}  // namespace
}  // namespace tandem::tools

int main(int argc, char** argv) {
  std::string directory;
  int count = 1000;
  bool write_ahead = false;
  CLI::App app{"Durable registry work on this disk.", "bench_registry"};
  app.add_option("--dir", directory, "an empty folder on the disk to measure")->required();
  app.add_option("--count", count, "commits and publishes [1000]")->check(CLI::Range(10, 1000000));
  app.add_flag("--write-ahead", write_ahead, "as a coordinator does");
  if (const auto code = tandem::tools::parse_bench(app, argc, argv)) return *code;
  return tandem::tools::run(directory, count, write_ahead);
}
