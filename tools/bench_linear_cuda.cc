// bench_linear_cuda [check] [time] [more]: a training linear with one adapter on GPU 0. check: held
// against the CPU backend in f32 on the same bf16 inputs, two runs compared bit for bit. time:
// forward and backward at model shapes, with the adapter and without it; the difference is what the
// adapter costs; of `down` also forward behind the silu * up that makes its x, apart and in one op.
// One line a case; `layer` sums the linears of one layer. TANDEM_CUDA_PROFILE=1 prints every
// product and pass; TANDEM_LORA_GEMM=off takes cuBLASLt's products for the low-rank part.
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_backend.h"
#include "protocol/base/random.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace tandem::kernels {
namespace {

constexpr std::int64_t kArenaBytes = std::int64_t{1} << 36;

struct Case {
  std::string name;
  std::int64_t t, i;
  std::vector<std::int64_t> outputs;  ///< of each site
  std::int64_t rank = 16;
  float dropout = 0.0f;
  [[nodiscard]] std::int64_t n() const {
    std::int64_t sum = 0;
    for (std::int64_t o : outputs) sum += o;
    return sum;
  }
  [[nodiscard]] std::int64_t columns() const {
    return rank * static_cast<std::int64_t>(outputs.size());
  }
};

/// A block of random numbers again and again: its length is prime, so that rows differ.
std::vector<float> values(std::int64_t count, std::uint64_t seed, double scale) {
  constexpr std::int64_t kBlock = 1048583;
  std::vector<float> x(static_cast<std::size_t>(count));
  for (std::int64_t e = 0; e < count; ++e)
    x[static_cast<std::size_t>(e)] =
        e >= kBlock
            ? x[static_cast<std::size_t>(e - kBlock)]
            : to_f32(to_bf16(static_cast<float>(
                  scale * 3.46 * (random_uniform(seed, 0, static_cast<std::uint64_t>(e)) - 0.5))));
  return x;
}

/// One case on one backend.
class Device {
 public:
  Device(Backend backend, const Case& c, DType cd)
      : backend_(std::move(backend)),
        tensors_(*backend_.allocator, *backend_.ledger, MemoryKind::kActivations, "bench",
                 kArenaBytes),
        workspace_(*backend_.allocator, *backend_.ledger, MemoryKind::kWorkspace, "workspace",
                   kArenaBytes),
        exec_{workspace_},
        case_(c) {
    const std::int64_t n = c.n();
    const double scale = 1.0 / std::sqrt(static_cast<double>(c.i));
    const std::vector<float> w = values(n * c.i, 1, scale);
    weight_ = ops().pack_weight(exec_, tensors_, cd, n, c.i,
                                [&](std::int64_t row, std::int64_t rows, float* out) {
                                  std::copy_n(w.begin() + row * c.i, rows * c.i, out);
                                });
    x = put(values(c.t * c.i, 2, 1.0), Shape{c.t, c.i}, cd);
    dy = put(values(c.t * n, 3, 1.0), Shape{c.t, n}, cd);
    y = tensors_.alloc(Shape{c.t, n}, cd);
    dx = tensors_.alloc(Shape{c.t, c.i}, cd);
    u = tensors_.alloc(Shape{c.t, c.columns()}, cd);
    std::int64_t begin = 0;
    for (std::size_t s = 0; s < c.outputs.size(); ++s) {
      const std::int64_t outputs = c.outputs[s];
      LoraEntry entry;
      entry.rank = static_cast<std::int32_t>(c.rank);
      entry.scale = 2.0f;
      entry.a = put(values(c.rank * c.i, 10 + s, scale), Shape{c.rank, c.i}, cd).data;
      entry.b = put(values(outputs * c.rank, 20 + s, 1.0), Shape{outputs, c.rank}, cd).data;
      da.push_back(tensors_.alloc(Shape{c.rank, c.i}, DType::kF32));
      db.push_back(tensors_.alloc(Shape{outputs, c.rank}, DType::kF32));
      entry.da = da.back().as<float>();
      entry.db = db.back().as<float>();
      Tensor entries = tensors_.alloc(Shape{sizeof entry}, DType::kU8);
      ops().upload(exec_, std::as_bytes(std::span(&entry, 1)), entries);
      sites_.push_back({begin, outputs, entries, 70 + s});
      begin += outputs;
    }
    rows_.segment_offsets = ints({0, static_cast<std::int32_t>(c.t)});
    rows_.segment_slots = ints({0});
    rows_.segments_max = 1;
    rows_.rank_max = c.rank;
    rows_.dropout = c.dropout;
    rows_.dropout_seed = 5;
  }
  [[nodiscard]] Ops& ops() { return *backend_.ops; }
  void clear() {
    for (const Tensor& t : da) ops().fill_zero(exec_, t);
    for (const Tensor& t : db) ops().fill_zero(exec_, t);
    for (const Tensor& t : {y, dx, u})
      ops().upload(exec_,
                   std::vector<std::byte>(static_cast<std::size_t>(t.bytes()), std::byte{0xff}), t);
  }
  void forward(bool adapter) {
    ops().linear_forward(exec_, {x,
                                 &weight_,
                                 {},
                                 adapter ? sites_ : std::vector<LoraSite>{},
                                 adapter ? &rows_ : nullptr,
                                 y,
                                 adapter ? u : Tensor{}});
  }
  /// Forward of an x that is silu * up of gate_up [T, 2 I]: made by the linear, or before.
  void gated_forward(const Tensor& gate_up, bool made) {
    const SiluMulArgs make_x{gate_up, x};
    if (!made) ops().silu_mul_forward(exec_, make_x);
    ops().linear_forward(exec_,
                         {x, &weight_, {}, sites_, &rows_, y, u, made ? make_x : SiluMulArgs{}});
  }
  Tensor gate_up() {
    return put(values(case_.t * 2 * case_.i, 4, 1.0), Shape{case_.t, 2 * case_.i}, x.dtype);
  }
  void backward(bool adapter) {
    ops().linear_backward(exec_, {dy, x, &weight_, adapter ? sites_ : std::vector<LoraSite>{},
                                  adapter ? &rows_ : nullptr, adapter ? u : Tensor{}, dx});
  }
  std::vector<std::byte> bytes(const Tensor& from) {
    std::vector<std::byte> raw(static_cast<std::size_t>(from.bytes()));
    ops().download(exec_, from, raw);
    return raw;
  }
  std::vector<float> get(const Tensor& from) {
    const std::vector<std::byte> raw = bytes(from);
    std::vector<float> out(static_cast<std::size_t>(from.elements()));
    if (from.dtype == DType::kF32) {
      std::memcpy(out.data(), raw.data(), raw.size());
      return out;
    }
    for (std::size_t e = 0; e < out.size(); ++e) {
      bf16 v;
      std::memcpy(&v, raw.data() + e * sizeof v, sizeof v);
      out[e] = to_f32(v);
    }
    return out;
  }
  double microseconds(const std::function<void()>& run) {
    using Clock = std::chrono::steady_clock;
    const auto timed = [&](int count) {
      ops().synchronize(exec_);
      const auto start = Clock::now();
      for (int k = 0; k < count; ++k) run();
      ops().synchronize(exec_);
      return std::chrono::duration<double>(Clock::now() - start).count() / count * 1e6;
    };
    timed(3);
    return std::min(timed(20), timed(20));
  }
  /// What forward and backward leave, by name.
  std::vector<std::pair<std::string, Tensor>> results() const {
    std::vector<std::pair<std::string, Tensor>> all{{"y", y}, {"u", u}, {"dx", dx}};
    for (std::size_t s = 0; s < da.size(); ++s) {
      all.emplace_back("da" + std::to_string(s), da[s]);
      all.emplace_back("db" + std::to_string(s), db[s]);
    }
    return all;
  }

  Tensor x, dy, y, dx, u;
  std::vector<Tensor> da, db;

 private:
  Tensor put(const std::vector<float>& from, const Shape& shape, DType dtype) {
    Tensor to = tensors_.alloc(shape, dtype);
    std::vector<bf16> narrow;
    narrow.reserve(from.size());
    if (dtype == DType::kBF16)
      for (float v : from) narrow.push_back(to_bf16(v));
    ops().upload(
        exec_,
        dtype == DType::kBF16 ? std::as_bytes(std::span(narrow)) : std::as_bytes(std::span(from)),
        to);
    return to;
  }
  Tensor ints(const std::vector<std::int32_t>& from) {
    Tensor to = tensors_.alloc(Shape{static_cast<std::int64_t>(from.size())}, DType::kI32);
    ops().upload(exec_, std::as_bytes(std::span(from)), to);
    return to;
  }

  Backend backend_;
  Arena tensors_, workspace_;
  Exec exec_;
  const Case case_;
  PackedWeight weight_;
  std::vector<LoraSite> sites_;
  AdapterRows rows_;
};

Backend open_cuda() {
  Result<Backend> backend = make_cuda_backend({});
  TANDEM_CHECK(backend.ok(), backend.status().message());
  return std::move(backend).value();
}

double relative_error(const std::vector<float>& got, const std::vector<float>& want) {
  double difference = 0, norm = 0;
  for (std::size_t e = 0; e < got.size(); ++e) {
    const double d = static_cast<double>(got[e]) - want[e];
    difference += d * d;
    norm += static_cast<double>(want[e]) * want[e];
  }
  return std::sqrt(difference / std::max(norm, 1e-30));
}

void check(const Case& c) {
  Device cpu(make_cpu_backend({}), c, DType::kF32), gpu(open_cuda(), c, DType::kBF16);
  cpu.clear();
  cpu.forward(true);
  cpu.backward(true);
  std::vector<std::vector<std::byte>> first;
  bool repeats = true;
  for (int run = 0; run < 3; ++run) {
    gpu.clear();
    gpu.forward(true);
    gpu.backward(true);
    std::size_t at = 0;
    for (const auto& [name, tensor] : gpu.results()) {
      std::vector<std::byte> now = gpu.bytes(tensor);
      if (run == 0) first.push_back(now);
      repeats = repeats && first[at++] == now;
    }
  }
  std::string line;
  bool good = repeats;
  const auto want = cpu.results(), got = gpu.results();
  for (std::size_t e = 0; e < got.size(); ++e) {
    const double error = relative_error(gpu.get(got[e].second), cpu.get(want[e].second));
    good = good && error < 8e-3;  // each result is rounded to bf16 (2^-9) a few times
    char text[64];
    std::snprintf(text, sizeof text, " %s %.1e", got[e].first.c_str(), error);
    line += text;
  }
  std::printf("check %-14s T %lld I %lld N %lld r %lld p %.1f %s%s%s\n", c.name.c_str(),
              static_cast<long long>(c.t), static_cast<long long>(c.i),
              static_cast<long long>(c.n()), static_cast<long long>(c.rank), c.dropout,
              good ? "ok" : "BAD", repeats ? "" : " DIFFERS", line.c_str());
  std::fflush(stdout);
}

struct Times {
  double forward = 0, forward_plain = 0, backward = 0, backward_plain = 0;
};

void print_times(const std::string& name, const Times& t) {
  std::printf(
      "time  %-22s fwd %7.1f plain %7.1f | bwd %7.1f plain %7.1f | adapter %6.1f + %6.1f us\n",
      name.c_str(), t.forward, t.forward_plain, t.backward, t.backward_plain,
      t.forward - t.forward_plain, t.backward - t.backward_plain);
  std::fflush(stdout);
}

void time_layer(const std::string& name, const std::vector<Case>& cases) {
  Times sum;
  for (const Case& c : cases) {
    Device gpu(open_cuda(), c, DType::kBF16);
    const Times t{gpu.microseconds([&] { gpu.forward(true); }),
                  gpu.microseconds([&] { gpu.forward(false); }),
                  gpu.microseconds([&] { gpu.backward(true); }),
                  gpu.microseconds([&] { gpu.backward(false); })};
    print_times(name + " " + c.name, t);
    if (c.name == "down") {
      const Tensor gate_up = gpu.gate_up();
      const double apart = gpu.microseconds([&] { gpu.gated_forward(gate_up, false); });
      const double made = gpu.microseconds([&] { gpu.gated_forward(gate_up, true); });
      std::printf("time  %-22s silu and fwd %7.1f made by fwd %7.1f us\n",
                  (name + " " + c.name).c_str(), apart, made);
    }
    sum.forward += t.forward;
    sum.forward_plain += t.forward_plain;
    sum.backward += t.backward;
    sum.backward_plain += t.backward_plain;
  }
  print_times(name + " layer", sum);
}

std::vector<Case> layer(std::int64_t t, std::int64_t c, std::int64_t kv, std::int64_t f,
                        std::int64_t rank, float dropout) {
  return {{"qkv", t, c, {c, kv, kv}, rank, dropout},
          {"o", t, c, {c}, rank, dropout},
          {"gate_up", t, c, {f, f}, rank, dropout},
          {"down", t, f, {c}, rank, dropout}};
}

void run(bool checks, bool times, bool more) {
  if (checks) {
    for (const Case& c : std::vector<Case>{{"odd", 131, 200, {96, 8, 40}},
                                           {"row", 1, 64, {64}},
                                           {"rank 8", 300, 136, {200, 64}, 8},
                                           {"rank 4", 150, 64, {64, 32}, 4},
                                           {"rank 64", 700, 512, {512, 256}, 64},
                                           {"rank 128", 500, 384, {640}, 128},
                                           {"rank 256", 200, 256, {256}, 256},
                                           {"dropout", 515, 576, {576, 192, 192}, 16, 0.1f},
                                           {"S qkv", 5000, 576, {576, 192, 192}},
                                           {"S gate_up", 5000, 576, {1536, 1536}},
                                           {"S down", 5000, 1536, {576}},
                                           {"qkv", 1030, 4096, {4096, 1024, 1024}},
                                           {"gate_up", 700, 4096, {14336, 14336}},
                                           {"down", 1100, 14336, {4096}}})
      check(c);
  }
  if (times) {
    time_layer("8B r16 4096", layer(4096, 4096, 1024, 14336, 16, 0.0f));
    time_layer("SmolLM2 r16 16384", layer(16384, 576, 192, 1536, 16, 0.0f));
  }
  if (more) {
    time_layer("8B r16 4096 drop", layer(4096, 4096, 1024, 14336, 16, 0.1f));
    time_layer("8B r64 4096", layer(4096, 4096, 1024, 14336, 64, 0.0f));
    time_layer("8B r16 16384", layer(16384, 4096, 1024, 14336, 16, 0.0f));
  }
}

}  // namespace
}  // namespace tandem::kernels

int main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  const auto has = [&](const char* word) {
    return words.empty() || std::find(words.begin(), words.end(), word) != words.end();
  };
  tandem::kernels::run(has("check"), has("time"), has("more"));
  return 0;
}
