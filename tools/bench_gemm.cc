// bench_gemm [SHAPE] [--f32] [--t=ROWS] [--n=N --k=K]: the linear layer's products against
// oneDNN's, one JSON line each.
//
// Shapes are SmolLM2-135M's fused weights and the row counts of decode, prefill and training. Each
// figure is the least time over alternating repeats, so that other load on the machine costs both
// sides alike. For few rows the weights come from memory, not from cache: copies are used in turn.
#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/onednn.h"
#include "protocol/base/random.h"

#include <nlohmann/json.hpp>

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

namespace {

using namespace tandem;
using namespace tandem::kernels::cpu;

constexpr std::int64_t kColdBytes = 256 << 20;  // more than the caches keep for one process
constexpr double kSecondsPerFigure = 0.25;
constexpr int kRepeatsMin = 5;

class Bytes {
 public:
  explicit Bytes(std::int64_t bytes)
      : data_(std::aligned_alloc(64, static_cast<std::size_t>((bytes + 63) / 64 * 64))),
        bytes_(bytes) {
    std::memset(data_, 0, static_cast<std::size_t>(bytes));
  }
  Bytes(Bytes&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
    other.data_ = nullptr;
  }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  ~Bytes() { std::free(data_); }
  [[nodiscard]] void* data() const { return data_; }
  [[nodiscard]] std::span<std::byte> span() const {
    return {static_cast<std::byte*>(data_), static_cast<std::size_t>(bytes_)};
  }

 private:
  void* data_;
  std::int64_t bytes_;
};

Bytes random_values(std::int64_t count, DType dtype, std::uint64_t seed) {
  Bytes values(count * dtype_bytes(dtype));
  for (std::int64_t i = 0; i < count; ++i) {
    const float x = random_uniform(seed, 0, static_cast<std::uint64_t>(i)) - 0.5f;
    if (dtype == DType::kF32)
      static_cast<float*>(values.data())[i] = x;
    else
      static_cast<bf16*>(values.data())[i] = to_bf16(x);
  }
  return values;
}

// Wall time, or with one OpenMP thread its processor time: that is what a busy machine leaves
// comparable.
double now_seconds() {
  timespec t{};
  clock_gettime(omp_get_max_threads() == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

double seconds_of(const std::function<void()>& run) {
  const double start = now_seconds();
  run();
  return now_seconds() - start;
}

struct Times {
  double ours = 1e30, other = 1e30;
};
Times measure(const std::function<void()>& ours, const std::function<void()>& other) {
  Times best;
  ours();
  other();
  double spent = 0;
  for (int i = 0; i < kRepeatsMin || (spent < kSecondsPerFigure && i < 3000); ++i) {
    const double a = seconds_of(ours), b = seconds_of(other);
    best.ours = std::min(best.ours, a);
    best.other = std::min(best.other, b);
    spent += a + b;
  }
  return best;
}

struct Shape {
  const char* name;
  std::int64_t n, k;
};

void bench(const Shape& shape, DType dtype, std::int64_t t, bool gradient) {
  const std::int64_t in = gradient ? shape.n : shape.k, out = gradient ? shape.k : shape.n;
  const std::int64_t weight_bytes = packed_bytes(dtype, shape.n, shape.k);
  const int copies = t <= 64 && !gradient ? static_cast<int>(kColdBytes / weight_bytes) + 1 : 1;
  const int threads = omp_get_max_threads();
  const Bytes w = random_values(shape.n * shape.k, dtype, 1), x = random_values(t * in, dtype, 2);
  std::vector<Bytes> packed;
  std::vector<std::unique_ptr<OneDnnProduct>> others;
  for (int i = 0; i < copies; ++i) {
    packed.emplace_back(weight_bytes);
    pack_rows(packed.back().data(), dtype, shape.n, shape.k, 0, shape.n,
              {w.data(), shape.k, dtype});
    others.push_back(std::make_unique<OneDnnProduct>(dtype, t, in, out, w.data(), gradient));
  }
  const Bytes y(t * out * dtype_bytes(dtype));
  const Bytes scratch(gradient
                          ? linear_input_grad_scratch(dtype, t, shape.n, shape.k, 0, 0, threads)
                          : linear_forward_scratch(dtype, t, shape.n, shape.k, 0, 0, 0, threads));
  std::size_t turn = 0, other_turn = 0;
  const auto ours = [&] {
    const PackedMatrix m{packed[turn++ % packed.size()].data(), dtype, shape.n, shape.k};
    (gradient ? linear_input_grad : linear_forward)(m, t, {x.data(), in, dtype},
                                                    {y.data(), out, dtype}, {}, scratch.span());
  };
  const Times best =
      measure(ours, [&] { others[other_turn++ % others.size()]->run(x.data(), y.data()); });
  const double flop = 2.0 * static_cast<double>(t * shape.n * shape.k);
  const double bytes = static_cast<double>(weight_bytes + t * (in + out) * dtype_bytes(dtype));
  std::cout << nlohmann::json{{"bench", "gemm"},
                              {"isa", isa_name(isa())},
                              {"threads", threads},
                              {"dtype", dtype_name(dtype)},
                              {"shape", shape.name},
                              {"n", shape.n},
                              {"k", shape.k},
                              {"t", t},
                              {"direction", gradient ? "input_grad" : "forward"},
                              {"us", best.ours * 1e6},
                              {"gflops", flop / best.ours * 1e-9},
                              {"gbytes_per_s", bytes / best.ours * 1e-9},
                              {"onednn_us", best.other * 1e6},
                              {"onednn_gflops", flop / best.other * 1e-9},
                              {"speedup", best.other / best.ours}}
            << std::endl;
}

}  // namespace

int main(int argc, char** argv) {
  std::string filter;
  DType dtype = DType::kBF16;
  std::int64_t n = 0, k = 0;
  std::vector<std::int64_t> rows = {1, 2, 4, 8, 16, 64, 512, 4096};
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--f32")
      dtype = DType::kF32;
    else if (argument.starts_with("--t="))
      rows = {std::stoll(argument.substr(4))};
    else if (argument.starts_with("--n="))
      n = std::stoll(argument.substr(4));
    else if (argument.starts_with("--k="))
      k = std::stoll(argument.substr(4));
    else
      filter = argument;
  }
  std::vector<Shape> shapes = {{"qkv", 960, 576},
                               {"o", 576, 576},
                               {"gate_up", 3072, 576},
                               {"down", 576, 1536},
                               {"lm_head", 49152, 576}};
  if (n > 0 && k > 0) shapes = {{"custom", n, k}};
  for (const Shape& shape : shapes)
    for (const std::int64_t t : rows)
      for (const bool gradient : {false, true}) {
        if (!filter.empty() && std::string(shape.name) != filter) continue;
        if (gradient && t < 64) continue;
        if (shape.n > 8192 && t > 512) continue;  // the loss walks this one in chunks
        bench(shape, dtype, t, gradient);
      }
  return 0;
}
