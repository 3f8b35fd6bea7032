// bench_ops: times every op of the CPU backend at the shapes of SmolLM2-135M and prints one JSON
// value: the machine, then per op milliseconds, GFLOP/s, GB/s and calls per step, for a training
// step of LoRA (rank 16 on all linears, packed 8 x 512 tokens by default) and for decoding; and the
// sum over a training step, products and the rest apart.
//   bench_ops [--threads N] [--dtype bf16|f32] [--tokens T] [--ms M]
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/openmp_spin.h"
#include "protocol/base/clock.h"
#include "protocol/base/random.h"
#include "tools/bench_arguments.h"

#include <nlohmann/json.hpp>

#include <time.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

namespace tandem::kernels {
namespace {

using nlohmann::json;

/// SmolLM2-135M.
constexpr std::int64_t kLayers = 30, kC = 576, kHeads = 9, kKvHeads = 3, kD = 64, kF = 1536,
                       kV = 49'152, kQkv = (kHeads + 2 * kKvHeads) * kD, kNarrow = kHeads * kD;
constexpr std::int64_t kRank = 16, kSequence = 512, kBlockSize = 16;
constexpr std::int64_t kArenaBytes = std::int64_t{1} << 36;
constexpr int kRepeatsMin = 3;

struct Settings {
  int threads = 0;
  DType dtype = DType::kBF16;
  std::int64_t tokens = 8 * kSequence;
  std::int64_t budget_ms = 300;  ///< per op
};

class Bench {
 public:
  explicit Bench(const Settings& settings)
      : settings_(settings),
        cd_(settings.dtype),
        backend_(make_cpu_backend({.threads = settings.threads})),
        tensors_(*backend_.allocator, *backend_.ledger, MemoryKind::kActivations, "bench",
                 kArenaBytes),
        workspace_(*backend_.allocator, *backend_.ledger, MemoryKind::kWorkspace, "workspace",
                   kArenaBytes),
        exec_{workspace_} {}

  json run();

 private:
  struct Lora {
    std::vector<LoraSite> sites;
    AdapterRows rows;
    Tensor u;
  };
  /// What one call computes and moves at least.
  struct Work {
    double flops = 0.0, bytes = 0.0;
    std::int64_t per_step = 1;
    bool product = false;
  };

  Tensor random(DType dtype, Shape shape, float scale = 1.0f);
  Tensor ints(const std::vector<std::int32_t>& values);
  PackedWeight weight(std::int64_t n, std::int64_t i);
  Lora lora(std::int64_t t, std::int64_t i, const std::vector<std::int64_t>& outputs);
  json time(const std::string& name, const Work& work, const std::function<void()>& call);
  void training_linear(const std::string& name, std::int64_t i,
                       const std::vector<std::int64_t>& outputs);
  void training_rows();
  void training_attention();
  void training_ends();
  void decode(std::int64_t sequences);
  [[nodiscard]] double size() const { return static_cast<double>(dtype_bytes(cd_)); }

  const Settings settings_;
  const DType cd_;
  Backend backend_;
  Arena tensors_, workspace_;
  Exec exec_;
  json training_ = json::array(), decode_ = json::array();
};

Tensor Bench::random(DType dtype, Shape shape, float scale) {
  const Tensor t = tensors_.alloc(shape, dtype);
  Random random(static_cast<std::uint64_t>(shape.elements()));
  for (std::int64_t j = 0; j < shape.elements(); ++j) {
    const float x = (random.uniform() - 0.5f) * 3.4f * scale;
    if (dtype == DType::kF32)
      t.as<float>()[j] = x;
    else
      t.as<bf16>()[j] = to_bf16(x);
  }
  return t;
}

Tensor Bench::ints(const std::vector<std::int32_t>& values) {
  const Tensor t = tensors_.alloc({static_cast<std::int64_t>(values.size())}, DType::kI32);
  backend_.ops->upload(exec_, std::as_bytes(std::span(values)), t);
  return t;
}

PackedWeight Bench::weight(std::int64_t n, std::int64_t i) {
  Random random(static_cast<std::uint64_t>(n * i));
  return backend_.ops->pack_weight(exec_, tensors_, cd_, n, i,
                                   [&](std::int64_t, std::int64_t rows, float* out) {
                                     for (std::int64_t j = 0; j < rows * i; ++j)
                                       out[j] = (random.uniform() - 0.5f) * 0.1f;
                                   });
}

Bench::Lora Bench::lora(std::int64_t t, std::int64_t i, const std::vector<std::int64_t>& outputs) {
  Lora l;
  std::int64_t begin = 0;
  for (const std::int64_t n : outputs) {
    const LoraEntry entry{random(cd_, {kRank, i}).data,
                          random(cd_, {n, kRank}).data,
                          random(DType::kF32, {kRank, i}).as<float>(),
                          random(DType::kF32, {n, kRank}).as<float>(),
                          static_cast<std::int32_t>(kRank),
                          2.0f};
    const Tensor at = tensors_.alloc({static_cast<std::int64_t>(sizeof entry)}, DType::kU8);
    std::memcpy(at.data, &entry, sizeof entry);
    l.sites.push_back({begin, n, at, 0});
    begin += n;
  }
  l.rows = {ints({0, static_cast<std::int32_t>(t)}), ints({0}), 1, kRank, 0.0f, 0};
  l.u = random(cd_, {t, static_cast<std::int64_t>(outputs.size()) * kRank});
  return l;
}

/// Processor time of all threads: what a call costs whoever else uses the machine.
std::int64_t processor_ns() {
  timespec t{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return t.tv_sec * 1'000'000'000 + t.tv_nsec;
}

json Bench::time(const std::string& name, const Work& work, const std::function<void()>& call) {
  call();
  std::vector<double> ms;
  const std::int64_t begin = steady_ns(), cpu_begin = processor_ns();
  while (static_cast<int>(ms.size()) < kRepeatsMin ||
         steady_ns() - begin < settings_.budget_ms * 1'000'000) {
    const std::int64_t at = steady_ns();
    call();
    ms.push_back(static_cast<double>(steady_ns() - at) * 1e-6);
  }
  const double cpu_ms = static_cast<double>(processor_ns() - cpu_begin) * 1e-6 /
                        static_cast<double>(ms.size()) / backend_.ops->profile().threads;
  std::sort(ms.begin(), ms.end());
  const double median = ms[ms.size() / 2];
  return {{"op", name},
          {"ms", median},
          {"ms_min", ms.front()},
          {"cpu_ms_per_thread", cpu_ms},
          {"gflops_per_s", work.flops / median * 1e-6},
          {"gbytes_per_s", work.bytes / median * 1e-6},
          {"calls_per_step", work.per_step},
          {"ms_per_step", median * static_cast<double>(work.per_step)},
          {"cpu_ms_per_step", cpu_ms * static_cast<double>(work.per_step)},
          {"product", work.product},
          {"repeats", ms.size()}};
}

void Bench::training_linear(const std::string& name, std::int64_t i,
                            const std::vector<std::int64_t>& outputs) {
  const ArenaScope scope(tensors_);
  const std::int64_t t = settings_.tokens;
  std::int64_t n = 0;
  for (const std::int64_t o : outputs) n += o;
  const PackedWeight w = weight(n, i);
  const Lora l = lora(t, i, outputs);
  const Tensor x = random(cd_, {t, i}), y = random(cd_, {t, n}), dx = random(cd_, {t, i});
  const auto sites = static_cast<double>(outputs.size());
  const double low_rank = 2.0 * static_cast<double>(t) * kRank *
                          (sites * static_cast<double>(i) + static_cast<double>(n));
  const double base = 2.0 * static_cast<double>(t * n * i);
  const double moved = size() * static_cast<double>(t * (n + i) + n * i);
  training_.push_back(time(name + "_forward", {base + low_rank, moved, kLayers, true}, [&] {
    backend_.ops->linear_forward(exec_, {x, &w, {}, l.sites, &l.rows, y, l.u});
  }));
  training_.push_back(time(name + "_backward", {base + 2 * low_rank, moved, kLayers, true}, [&] {
    backend_.ops->linear_backward(exec_, {y, x, &w, l.sites, &l.rows, l.u, dx});
  }));
}

void Bench::training_rows() {
  const ArenaScope scope(tensors_);
  const std::int64_t t = settings_.tokens;
  const auto elements = [&](std::int64_t columns) {
    return size() * static_cast<double>(t * columns);
  };
  const Tensor a = random(cd_, {t, kC}), b = random(cd_, {t, kC}, 0.001f), y = random(cd_, {t, kC});
  const Tensor w = random(cd_, {kC}), rstd = random(DType::kF32, {t});
  const Tensor gate_up = random(cd_, {t, 2 * kF}), out = random(cd_, {t, kF});
  const Tensor dgate_up = random(cd_, {t, 2 * kF});
  training_.push_back(time("add_rms_norm_forward", {0, elements(4 * kC), 2 * kLayers + 1}, [&] {
    backend_.ops->add_rms_norm_forward(exec_, {a, b, w, 1e-5f, y, rstd});
  }));
  training_.push_back(time("rms_norm_backward", {0, elements(4 * kC), 2 * kLayers + 1}, [&] {
    backend_.ops->rms_norm_backward(exec_, {y, b, w, rstd, a});
  }));
  training_.push_back(time("silu_mul_forward", {0, elements(3 * kF), kLayers}, [&] {
    backend_.ops->silu_mul_forward(exec_, {gate_up, out});
  }));
  training_.push_back(time("silu_mul_backward", {0, elements(5 * kF), kLayers}, [&] {
    backend_.ops->silu_mul_backward(exec_, {out, gate_up, dgate_up});
  }));
}

void Bench::training_attention() {
  const ArenaScope scope(tensors_);
  const std::int64_t t = settings_.tokens;
  std::vector<std::int32_t> offsets{0}, at;
  for (std::int64_t r = 0; r < t; ++r) at.push_back(static_cast<std::int32_t>(r % kSequence));
  while (offsets.back() < t)
    offsets.push_back(static_cast<std::int32_t>(std::min(t, offsets.back() + kSequence)));
  const Tensor positions = ints(at), seq = ints(offsets);
  const Tensor freq = random(DType::kF32, {kD / 2});
  const AttentionSpec spec{kHeads, kKvHeads, kD, 0.125f};
  const Tensor qkv = random(cd_, {t, kQkv}), dqkv = random(cd_, {t, kQkv});
  const Tensor out = random(cd_, {t, kNarrow}), dout = random(cd_, {t, kNarrow});
  const Tensor lse = random(DType::kF32, {t, kHeads});
  const double rotated = size() * 2.0 * static_cast<double>(t * (kHeads + kKvHeads) * kD);
  training_.push_back(time("rope_forward", {0, rotated, kLayers}, [&] {
    backend_.ops->rope_forward(exec_,
                               {qkv, positions, freq, 1.0f, kHeads, kKvHeads, kD, nullptr, {}});
  }));
  training_.push_back(time("rope_backward", {0, rotated, kLayers}, [&] {
    backend_.ops->rope_backward(exec_, {dqkv, positions, freq, 1.0f, kHeads, kKvHeads, kD});
  }));
  const double pairs = static_cast<double>(t) * (kSequence + 1) / 2.0 * kHeads;
  const double moved = size() * static_cast<double>(t * (kQkv + kNarrow));
  training_.push_back(time("attention_forward", {4.0 * pairs * kD, moved, kLayers, true}, [&] {
    backend_.ops->attention_forward(exec_, {spec, qkv, seq, kSequence, out, lse});
  }));
  training_.push_back(
      time("attention_backward", {10.0 * pairs * kD, 2.0 * moved, kLayers, true}, [&] {
        backend_.ops->attention_backward(exec_, {spec, dout, qkv, out, lse, seq, kSequence, dqkv});
      }));
}

void Bench::training_ends() {
  const ArenaScope scope(tensors_);
  const std::int64_t t = settings_.tokens;
  const PackedWeight w = weight(kV, kC);
  const Tensor x = random(cd_, {t, kC}), dx = random(cd_, {t, kC});
  std::vector<std::int32_t> ids;
  for (std::int64_t r = 0; r < t; ++r) ids.push_back(static_cast<std::int32_t>(r * 7919 % kV));
  const Tensor labels = ints(ids), loss = random(DType::kF32, {t});
  training_.push_back(
      time("embedding_forward", {0, 2.0 * size() * static_cast<double>(t * kC), 1}, [&] {
        backend_.ops->embedding_forward(exec_, {labels, &w, x});
      }));
  training_.push_back(
      time("linear_cross_entropy",
           {4.0 * static_cast<double>(t * kV * kC), size() * static_cast<double>(kV * kC), 1, true},
           [&] {
             backend_.ops->linear_cross_entropy(exec_, {x, &w, labels, 1e-4f, loss, {}, dx});
           }));
  // All adapters' masters: rank x (inputs + outputs) of seven sites.
  const std::int64_t n = kLayers * kRank * (4 * kC + 2 * kC + kC + (kQkv - kC) + 3 * (kC + kF));
  const Tensor p = random(DType::kF32, {n}), g = random(DType::kF32, {n});
  const Tensor m = random(DType::kF32, {n}), v = random(DType::kF32, {n}, 0.0f);
  const Tensor half = random(cd_, {n}), norm = random(DType::kF32, {1});
  training_.push_back(time("squared_norm", {0, 4.0 * static_cast<double>(n), 1}, [&] {
    backend_.ops->squared_norm(exec_, {{g}, norm});
  }));
  training_.push_back(time("adamw", {0, (28.0 + size()) * static_cast<double>(n), 1}, [&] {
    backend_.ops->adamw(exec_, {p, g, m, v, half, norm, 1.0f, 1e-4f, 0.9f, 0.999f, 1e-8f, 0.0f, 1});
  }));
}

/// One new token of each of `sequences`, 512 keys each.
void Bench::decode(std::int64_t sequences) {
  const ArenaScope scope(tensors_);
  const std::int64_t t = sequences, blocks = t * kSequence / kBlockSize;
  const auto record = [&](const std::string& name, const Work& work,
                          const std::function<void()>& call) {
    json row = time(name, work, call);
    row["sequences"] = sequences;
    decode_.push_back(row);
  };
  const auto linear = [&](const std::string& name, std::int64_t n, std::int64_t i, DType y_dtype,
                          std::int64_t calls) {
    const PackedWeight w = weight(n, i);
    const Tensor x = random(cd_, {t, i}), y = random(y_dtype, {t, n});
    record(name,
           {2.0 * static_cast<double>(t * n * i), size() * static_cast<double>(n * i), calls, true},
           [&] {
             backend_.ops->linear_forward(exec_, {x, &w, {}, {}, nullptr, y, {}});
           });
  };
  linear("qkv", kQkv, kC, cd_, kLayers);
  linear("o", kC, kNarrow, cd_, kLayers);
  linear("gate_up", 2 * kF, kC, cd_, kLayers);
  linear("down", kC, kF, cd_, kLayers);
  linear("logits", kV, kC, DType::kF32, 1);
  const Shape cache_shape{blocks, kKvHeads, kBlockSize, kD};
  const KvCache cache{random(cd_, cache_shape), random(cd_, cache_shape), kBlockSize};
  std::vector<std::int32_t> offsets, lens, table, slots, positions;
  for (std::int64_t s = 0; s <= t; ++s) offsets.push_back(static_cast<std::int32_t>(s));
  for (std::int64_t s = 0; s < t; ++s) {
    lens.push_back(kSequence);
    positions.push_back(kSequence - 1);
    slots.push_back(static_cast<std::int32_t>((s + 1) * kSequence - 1));
  }
  for (std::int64_t b = 0; b < blocks; ++b) table.push_back(static_cast<std::int32_t>(b));
  const Tensor qkv = random(cd_, {t, kQkv}), out = random(cd_, {t, kNarrow});
  const Tensor tables = ints(table).reshaped({t, kSequence / kBlockSize}), seq = ints(offsets);
  const Tensor len = ints(lens), position = ints(positions), slot = ints(slots);
  const Tensor freq = random(DType::kF32, {kD / 2});
  record("rope_forward", {0, size() * 2.0 * static_cast<double>(t * kQkv), kLayers}, [&] {
    backend_.ops->rope_forward(exec_,
                               {qkv, position, freq, 1.0f, kHeads, kKvHeads, kD, &cache, slot});
  });
  record("paged_attention_forward",
         {4.0 * static_cast<double>(t * kSequence * kNarrow),
          2.0 * size() * static_cast<double>(t * kSequence * kKvHeads * kD), kLayers, true},
         [&] {
           backend_.ops->paged_attention_forward(
               exec_,
               {{kHeads, kKvHeads, kD, 0.125f}, qkv, seq, len, tables, &cache, kSequence, out});
         });
  const Tensor a = random(cd_, {t, kC}), b = random(cd_, {t, kC}), y = random(cd_, {t, kC});
  const Tensor w = random(cd_, {kC}), gate_up = random(cd_, {t, 2 * kF}), f = random(cd_, {t, kF});
  record("add_rms_norm_forward", {0, size() * static_cast<double>(4 * t * kC), 2 * kLayers + 1},
         [&] {
           backend_.ops->add_rms_norm_forward(exec_, {a, b, w, 1e-5f, y, {}});
         });
  record("silu_mul_forward", {0, size() * static_cast<double>(3 * t * kF), kLayers}, [&] {
    backend_.ops->silu_mul_forward(exec_, {gate_up, f});
  });
  SampleArgs s;
  s.logits = random(DType::kF32, {t, kV}, 4.0f);
  s.temperature = random(DType::kF32, {t}, 0.0f);
  s.min_p = random(DType::kF32, {t}, 0.0f);
  s.top_p = random(DType::kF32, {t});
  for (std::int64_t r = 0; r < t; ++r)
    s.temperature.as<float>()[r] = 1.0f, s.top_p.as<float>()[r] = 0.9f;
  s.top_k = ints(std::vector<std::int32_t>(static_cast<std::size_t>(t), 0));
  s.seed = tensors_.alloc({t}, DType::kI64);
  s.position = tensors_.alloc({t}, DType::kI64);
  backend_.ops->fill_zero(exec_, s.seed);
  backend_.ops->fill_zero(exec_, s.position);
  s.ids = tensors_.alloc({t}, DType::kI32);
  s.logprob = tensors_.alloc({t}, DType::kF32);
  record("sample_top_p", {0, 4.0 * static_cast<double>(t * kV), 1},
         [&] { backend_.ops->sample(exec_, s); });
  for (std::int64_t r = 0; r < t; ++r) s.temperature.as<float>()[r] = 0.0f;
  record("sample_greedy", {0, 4.0 * static_cast<double>(t * kV), 0},
         [&] { backend_.ops->sample(exec_, s); });
}

double sum_of(const json& rows, const char* what, const std::function<bool(const json&)>& wanted) {
  double sum = 0.0;
  for (const json& row : rows)
    if (wanted(row)) sum += row[what].get<double>();
  return sum;
}

json Bench::run() {
  training_linear("qkv", kC, {kNarrow, kKvHeads * kD, kKvHeads * kD});
  training_linear("o", kNarrow, {kC});
  training_linear("gate_up", kC, {kF, kF});
  training_linear("down", kF, {kC});
  training_rows();
  training_attention();
  training_ends();
  decode(1);
  decode(16);
  const auto& p = backend_.ops->profile();
  const auto product = [](const json& r) { return r["product"] == true; };
  const auto other = [](const json& r) { return r["product"] == false; };
  const auto step_of = [&](const char* what) {
    const double products = sum_of(training_, what, product),
                 others = sum_of(training_, what, other);
    return json{
        {"products_and_attention_ms", products},
        {"other_ops_ms", others},
        {"other_ops_share", others / (products + others)},
        {"step_ms", products + others},
        {"tokens_per_s", 1e3 * static_cast<double>(settings_.tokens) / (products + others)}};
  };
  json steps = json::array();
  for (const std::int64_t s : {1, 16}) {
    const double ms =
        sum_of(decode_, "ms_per_step", [&](const json& r) { return r["sequences"] == s; });
    steps.push_back({{"sequences", s}, {"ms", ms}, {"tokens_per_s", 1e3 * double(s) / ms}});
  }
  return {{"machine", p.name},
          {"threads", p.threads},
          {"dtype", dtype_name(cd_)},
          {"tokens", settings_.tokens},
          {"training", training_},
          {"decode", decode_},
          {"decode_steps", steps},
          {"training_step", step_of("ms_per_step")},
          // Processor time over threads: the prediction for an idle machine.
          {"training_step_cpu", step_of("cpu_ms_per_step")}};
}

}  // namespace

int bench_main(int argc, char** argv) {
  Settings settings;
  std::string dtype = dtype_name(settings.dtype);
  CLI::App app{"Every op of the CPU backend at the shapes of SmolLM2-135M.", "bench_ops"};
  app.add_option("--threads", settings.threads)->check(CLI::Range(0, 1024));
  app.add_option("--dtype", dtype)->check(CLI::IsMember({"f32", "bf16"}));
  app.add_option("--tokens", settings.tokens)->check(CLI::PositiveNumber);
  app.add_option("--ms", settings.budget_ms, "of each op")->check(CLI::PositiveNumber);
  if (const auto code = tools::parse_bench(app, argc, argv)) return *code;
  settings.dtype = *parse_dtype(dtype);
  std::cout << Bench(settings).run().dump(1) << std::endl;
  return 0;
}

}  // namespace tandem::kernels

int main(int argc, char** argv) {
  tandem::start_with_environment({tandem::kMallocLargeBuffers, tandem::kernels::cpu::kOpenmpSpin},
                                 argv);
  try {
    return tandem::kernels::bench_main(argc, argv);
  } catch (const std::exception& e) {
    std::cerr << "bench_ops: " << e.what() << "\n";
    return 1;
  }
}
