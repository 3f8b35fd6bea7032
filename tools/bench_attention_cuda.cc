// bench_attention_cuda [--check-only] [PATH...]: packed attention on GPU 0, each implementation
// (simple, own; both by default) held against the CPU backend in f32 on the same bf16 inputs,
// then timed. One JSON line each. Relative errors are L2 norms; "repeats" says whether two runs
// gave the same bits.
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/device_error.h"
#include "protocol/base/random.h"
#include "protocol/base/str.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

namespace tandem::kernels {
namespace {

using nlohmann::json;

constexpr std::int64_t kArenaBytes = std::int64_t{1} << 36;
constexpr double kSecondsPerFigure = 0.15;

struct Case {
  std::string name;
  AttentionSpec spec;
  std::vector<std::int32_t> offsets;
  std::int64_t inert = 0;
  [[nodiscard]] std::int64_t tokens() const { return offsets.back() + inert; }
  [[nodiscard]] std::int64_t longest() const {
    std::int64_t n = 0;
    for (std::size_t i = 0; i + 1 < offsets.size(); ++i)
      n = std::max<std::int64_t>(n, offsets[i + 1] - offsets[i]);
    return n;
  }
  [[nodiscard]] std::int64_t width() const {
    return (spec.heads + 2 * spec.kv_heads) * spec.head_dim;
  }
  [[nodiscard]] std::int64_t narrow() const { return spec.heads * spec.head_dim; }
  /// Multiply-adds of the causal half, 2 FLOP each, of one product over all heads.
  [[nodiscard]] double product_flop() const {
    double pairs = 0;
    for (std::size_t i = 0; i + 1 < offsets.size(); ++i) {
      const double n = offsets[i + 1] - offsets[i];
      const double w = spec.window == 0 ? n : std::min(n, static_cast<double>(spec.window));
      pairs += w * (w + 1) / 2 + (n - w) * w;
    }
    return pairs * static_cast<double>(spec.heads * spec.head_dim) * 2;
  }
};

AttentionSpec make_spec(std::int64_t heads, std::int64_t kv_heads, std::int64_t dim,
                        std::int64_t window = 0) {
  return {heads,  kv_heads, dim, static_cast<float>(1 / std::sqrt(static_cast<double>(dim))),
          window, 0.0f};
}

std::vector<std::int32_t> offsets_of(const std::vector<int>& lengths) {
  std::vector<std::int32_t> offsets{0};
  for (int n : lengths) offsets.push_back(offsets.back() + n);
  return offsets;
}

std::vector<float> normals(std::int64_t count, std::uint64_t seed, double scale) {
  Random random(seed);
  std::vector<float> x(static_cast<std::size_t>(count));
  for (float& v : x) v = to_f32(to_bf16(static_cast<float>(scale * random.normal())));
  return x;
}

/// Tensors of one backend for one case.
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
    const std::int64_t t = c.tokens();
    qkv = tensors_.alloc(Shape{t, c.width()}, cd);
    dqkv = tensors_.alloc(Shape{t, c.width()}, cd);
    out = tensors_.alloc(Shape{t, c.narrow()}, cd);
    dout = tensors_.alloc(Shape{t, c.narrow()}, cd);
    lse = tensors_.alloc(Shape{t, c.spec.heads}, DType::kF32);
    offsets = tensors_.alloc(Shape{static_cast<std::int64_t>(c.offsets.size())}, DType::kI32);
    ops().upload(exec_, std::as_bytes(std::span(c.offsets)), offsets);
    positions = tensors_.alloc(Shape{t}, DType::kI32);
    inv_freq = tensors_.alloc(Shape{c.spec.head_dim / 2}, DType::kF32);
    ops().fill_zero(exec_, positions);
    ops().fill_zero(exec_, inv_freq);
  }
  [[nodiscard]] Ops& ops() { return *backend_.ops; }
  [[nodiscard]] Exec& exec() { return exec_; }
  void put(const std::vector<float>& values, Tensor to) {
    std::vector<bf16> narrow;
    if (to.dtype == DType::kBF16)
      for (float v : values) narrow.push_back(to_bf16(v));
    ops().upload(exec_,
                 to.dtype == DType::kBF16 ? std::as_bytes(std::span(narrow))
                                          : std::as_bytes(std::span(values)),
                 to);
  }
  std::vector<std::byte> bytes(Tensor from) {
    std::vector<std::byte> raw(static_cast<std::size_t>(from.bytes()));
    ops().download(exec_, from, raw);
    return raw;
  }
  std::vector<float> get(Tensor from) {
    const std::vector<std::byte> raw = bytes(from);
    std::vector<float> values(static_cast<std::size_t>(from.elements()));
    if (from.dtype == DType::kF32) {
      std::memcpy(values.data(), raw.data(), raw.size());
      return values;
    }
    for (std::size_t i = 0; i < values.size(); ++i) {
      bf16 x;
      std::memcpy(&x, raw.data() + i * sizeof x, sizeof x);
      values[i] = to_f32(x);
    }
    return values;
  }
  void poison() {
    for (const Tensor& t : {out, dqkv, lse}) {
      const std::vector<std::byte> ones(static_cast<std::size_t>(t.bytes()), std::byte{0xff});
      ops().upload(exec_, ones, t);
    }
  }
  void forward() {
    ops().attention_forward(exec_, {case_.spec, qkv, offsets, case_.longest(), out, lse});
  }
  void backward() {
    ops().attention_backward(exec_,
                             {case_.spec, dout, qkv, out, lse, offsets, case_.longest(), dqkv});
  }
  void rope(bool back) {
    const AttentionSpec& a = case_.spec;
    if (back)
      ops().rope_backward(exec_,
                          {dqkv, positions, inv_freq, 1.0f, a.heads, a.kv_heads, a.head_dim});
    else
      ops().rope_forward(
          exec_, {qkv, positions, inv_freq, 1.0f, a.heads, a.kv_heads, a.head_dim, nullptr, {}});
  }
  double milliseconds(const std::function<void()>& run) {
    using Clock = std::chrono::steady_clock;
    const auto timed = [&](int count) {
      ops().synchronize(exec_);
      const auto start = Clock::now();
      for (int i = 0; i < count; ++i) run();
      ops().synchronize(exec_);
      return std::chrono::duration<double>(Clock::now() - start).count() / count;
    };
    timed(2);
    const int count = std::clamp(static_cast<int>(kSecondsPerFigure / timed(2)), 2, 200);
    double best = timed(count);
    best = std::min(best, timed(count));
    return best * 1e3;
  }
  std::int64_t workspace_peak() const { return workspace_.peak_used(); }

  Tensor qkv, dqkv, out, dout, lse, offsets, positions, inv_freq;

 private:
  Backend backend_;
  Arena tensors_, workspace_;
  Exec exec_;
  const Case case_;
};

/// Relative L2 error over live rows and columns [from, to), and the largest value of inert rows.
double error_of(const std::vector<float>& got, const std::vector<float>& want, std::int64_t live,
                std::int64_t width, std::int64_t from, std::int64_t to) {
  double difference = 0, norm = 0;
  for (std::int64_t r = 0; r < live; ++r)
    for (std::int64_t c = from; c < to; ++c) {
      const auto i = static_cast<std::size_t>(r * width + c);
      const double d = static_cast<double>(got[i]) - want[i];
      difference += d * d;
      norm += static_cast<double>(want[i]) * want[i];
    }
  return std::sqrt(difference / std::max(norm, 1e-30));
}
bool all_zero(const std::vector<float>& x, std::int64_t begin) {
  return std::all_of(x.begin() + begin, x.end(), [](float v) { return v == 0.0f; });
}

Backend open(const std::string& path) {
  if (path == "cpu") return make_cpu_backend({});
  ::setenv("TANDEM_CUDA_ATTENTION", path.c_str(), 1);
  Result<Backend> backend = make_cuda_backend({});
  TANDEM_CHECK(backend.ok(), backend.status().message());
  return std::move(backend).value();
}

struct Reference {
  std::vector<float> out, lse, dqkv;
};
struct Inputs {
  std::vector<float> qkv, dout;
};
Inputs inputs_of(const Case& c) {
  return {normals(c.tokens() * c.width(), 1, 1.2), normals(c.tokens() * c.narrow(), 2, 1.0)};
}

Reference reference_of(const Case& c, const Inputs& in) {
  Device cpu(open("cpu"), c, DType::kF32);
  cpu.put(in.qkv, cpu.qkv);
  cpu.put(in.dout, cpu.dout);
  cpu.forward();
  cpu.backward();
  return {cpu.get(cpu.out), cpu.get(cpu.lse), cpu.get(cpu.dqkv)};
}

json check(const Case& c, const std::string& path, const Inputs& in, const Reference& want) {
  Device gpu(open(path), c, DType::kBF16);
  gpu.put(in.qkv, gpu.qkv);
  gpu.put(in.dout, gpu.dout);
  std::vector<std::vector<std::byte>> first;
  bool repeats_out = true, repeats_dqkv = true;
  for (int run = 0; run < 3; ++run) {
    gpu.poison();
    gpu.forward();
    gpu.backward();
    std::vector<std::vector<std::byte>> now{gpu.bytes(gpu.out), gpu.bytes(gpu.dqkv)};
    if (run == 0) first = now;
    repeats_out = repeats_out && now[0] == first[0];
    repeats_dqkv = repeats_dqkv && now[1] == first[1];
  }
  const std::vector<float> out = gpu.get(gpu.out), lse = gpu.get(gpu.lse), d = gpu.get(gpu.dqkv);
  const std::int64_t live = c.offsets.back(), w = c.width(), n = c.narrow();
  const std::int64_t kv = c.spec.kv_heads * c.spec.head_dim;
  double worst_lse = 0;
  for (std::size_t i = 0; i < static_cast<std::size_t>(live * c.spec.heads); ++i) {
    const double e = std::abs(static_cast<double>(lse[i]) - want.lse[i]);
    worst_lse = e <= worst_lse ? worst_lse : e;  // a NaN stays
  }
  const double errors[] = {
      error_of(out, want.out, live, n, 0, n), error_of(d, want.dqkv, live, w, 0, n),
      error_of(d, want.dqkv, live, w, n, n + kv), error_of(d, want.dqkv, live, w, n + kv, w)};
  const bool inert =
      all_zero(out, live * n) && all_zero(d, live * w) && all_zero(lse, live * c.spec.heads);
  bool good = inert && worst_lse < 1e-2;
  for (double e : errors) good = good && e < 1e-2;
  const auto rounded = [](double x) { return str(static_cast<float>(x)); };
  return {{"ok", good},
          {"out", rounded(errors[0])},
          {"dq", rounded(errors[1])},
          {"dk", rounded(errors[2])},
          {"dv", rounded(errors[3])},
          {"lse_max", rounded(worst_lse)},
          {"inert", inert},
          {"rep_f", repeats_out},
          {"rep_b", repeats_dqkv}};
}

json time(const Case& c, const std::string& path) {
  Device gpu(open(path), c, DType::kBF16);
  gpu.put(normals(c.tokens() * c.width(), 1, 1.0), gpu.qkv);
  gpu.put(normals(c.tokens() * c.narrow(), 2, 1.0), gpu.dout);
  const double forward = gpu.milliseconds([&] { gpu.forward(); });
  const double backward = gpu.milliseconds([&] { gpu.backward(); });
  const double flop = c.product_flop() * 1e-9;
  const auto rounded = [](double x, double to) { return std::round(x * to) / to; };
  return {{"fwd_ms", rounded(forward, 1e4)},
          {"bwd_ms", rounded(backward, 1e4)},
          {"sum_ms", rounded(forward + backward, 1e4)},
          {"fwd_tflops", rounded(2 * flop / forward, 1)},
          {"bwd_tflops", rounded(5 * flop / backward, 1)},
          {"rope_us", rounded(1e3 * gpu.milliseconds([&] { gpu.rope(false); }), 10)},
          {"rope_bwd_us", rounded(1e3 * gpu.milliseconds([&] { gpu.rope(true); }), 10)},
          {"ws_mib", gpu.workspace_peak() >> 20}};
}

void print(const Case& c, const std::string& path, json figures) {
  figures["case"] = c.name;
  figures["path"] = path;
  std::cout << figures.dump() << std::endl;
}

const Case kChecks[] = {
    {"d128_odd", make_spec(8, 2, 128), offsets_of({1000, 37, 0, 2048, 129, 64, 1}), 5},
    {"d64_odd", make_spec(9, 3, 64), offsets_of({1, 700, 64, 0, 1025, 255}), 130},
    {"d128_even", make_spec(4, 4, 128), offsets_of({512, 512}), 0},
    {"d128_window", make_spec(4, 1, 128, 200), offsets_of({1500, 90}), 0},
};

std::vector<Case> timed_cases() {
  std::vector<int> ragged;
  Random random(7);
  for (int left = 4096; left > 0;) {
    const int n = std::min(left, 64 + static_cast<int>(random.uniform() * 1985));
    ragged.push_back(n);
    left -= n;
  }
  return {{"llama8b_2x2048", make_spec(32, 8, 128), offsets_of({2048, 2048})},
          {"llama8b_ragged4096", make_spec(32, 8, 128), offsets_of(ragged)},
          {"llama8b_8x2048", make_spec(32, 8, 128), offsets_of(std::vector<int>(8, 2048))},
          {"llama8b_4x4096", make_spec(32, 8, 128), offsets_of(std::vector<int>(4, 4096))},
          {"llama8b_1x8192", make_spec(32, 8, 128), offsets_of({8192})},
          {"llama8b_1x32768", make_spec(32, 8, 128), offsets_of({32768})},
          {"llama1b_4x4096", make_spec(32, 8, 64), offsets_of(std::vector<int>(4, 4096))},
          {"smollm_16x1024", make_spec(9, 3, 64), offsets_of(std::vector<int>(16, 1024))}};
}

void guarded(const Case& c, const std::string& path, const std::function<json()>& run) {
  try {
    print(c, path, run());
  } catch (const DeviceError& e) {
    print(c, path, {{"error", std::string(e.what()).substr(0, 300)}});
  }
}

int run(const std::vector<std::string>& paths, bool check_only) {
  for (const Case& c : kChecks) {
    const Inputs in = inputs_of(c);
    const Reference want = reference_of(c, in);
    for (const std::string& path : paths) {
      guarded(c, path, [&] { return check(c, path, in, want); });
    }
  }
  if (check_only) return 0;
  for (const Case& c : timed_cases())
    for (const std::string& path : paths) {
      if (path == "simple" && c.name != "smollm_16x1024") continue;
      guarded(c, path, [&] { return time(c, path); });
    }
  return 0;
}

}  // namespace
}  // namespace tandem::kernels

int main(int argc, char** argv) {
  std::vector<std::string> paths(argv + 1, argv + argc);
  const bool check_only = std::erase(paths, "--check-only") > 0;
  if (paths.empty()) paths = {"simple", "own"};
  return tandem::kernels::run(paths, check_only);
}
