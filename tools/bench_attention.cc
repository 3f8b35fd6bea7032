// bench_attention [--f32]: the CPU attention kernels and what LoRA adds to a linear, one JSON line
// each.
//
// Attention: SmolLM2-135M's heads (9 over 3 of 64), 8 sequences of 512 forward and backward, and
// paged decode steps. LoRA: rank 16 on the fused qkv (three sites) at 4096 rows against the same
// linear alone. Least time of the repeats.
#include "kernels/cpu/attention.h"
#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/gemm.h"
#include "protocol/base/random.h"
#include "protocol/base/str.h"

#include <nlohmann/json.hpp>

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

namespace {

using namespace tandem;
using namespace tandem::kernels::cpu;

constexpr double kSecondsPerFigure = 0.5;
constexpr int kRepeatsMin = 5;
constexpr std::int64_t kHeads = 9, kKvHeads = 3, kDim = 64, kWidth = (kHeads + 2 * kKvHeads) * kDim;

class Bytes {
 public:
  explicit Bytes(std::int64_t bytes)
      : bytes_(bytes), memory_(static_cast<std::size_t>(bytes) + 64) {}
  [[nodiscard]] void* data() {
    const auto at = reinterpret_cast<std::uintptr_t>(memory_.data());
    return memory_.data() + (64 - at % 64) % 64;
  }
  [[nodiscard]] std::span<std::byte> span() {
    return {static_cast<std::byte*>(data()), static_cast<std::size_t>(bytes_)};
  }

 private:
  std::int64_t bytes_;
  std::vector<std::byte> memory_;
};

// rows x columns of uniform values in (-1/2, 1/2).
struct Values : Bytes {
  Values(std::int64_t rows, std::int64_t columns, DType t, std::uint64_t seed)
      : Bytes(rows * columns * dtype_bytes(t)), ld(columns), dtype(t) {
    for (std::int64_t i = 0; i < rows * columns; ++i) {
      const float x = random_uniform(seed, 0, static_cast<std::uint64_t>(i)) - 0.5f;
      if (t == DType::kF32)
        static_cast<float*>(data())[i] = x;
      else
        static_cast<bf16*>(data())[i] = to_bf16(x);
    }
  }
  [[nodiscard]] Rows rows(std::int64_t column = 0) {
    return {static_cast<char*>(data()) + column * dtype_bytes(dtype), ld, dtype};
  }
  [[nodiscard]] ConstRows view(std::int64_t column = 0) {
    const Rows r = rows(column);
    return {r.data, r.ld, r.dtype};
  }
  std::int64_t ld;
  DType dtype;
};

// Wall time, or with one OpenMP thread its processor time: that is what a busy machine leaves
// comparable.
double now_seconds() {
  timespec t{};
  clock_gettime(omp_get_max_threads() == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

double least_seconds(const std::function<void()>& run) {
  double best = 1e30, spent = 0;
  run();
  for (int i = 0; i < kRepeatsMin || spent < kSecondsPerFigure; ++i) {
    const double start = now_seconds();
    run();
    const double seconds = now_seconds() - start;
    best = std::min(best, seconds);
    spent += seconds;
  }
  return best;
}

void print(const std::string& what, DType dtype, double seconds, double flop, double bytes) {
  std::cout << nlohmann::json{{"bench", what},
                              {"isa", isa_name(isa())},
                              {"threads", omp_get_max_threads()},
                              {"dtype", dtype_name(dtype)},
                              {"us", seconds * 1e6},
                              {"gflops", flop / seconds * 1e-9},
                              {"gbytes_per_s", bytes / seconds * 1e-9}}
            << std::endl;
}

AttentionShape smollm(DType dtype) {
  AttentionShape s;
  s.heads = kHeads;
  s.kv_heads = kKvHeads;
  s.head_dim = kDim;
  s.scale = 0.125f;
  s.dtype = dtype;
  return s;
}

void bench_packed(DType dtype, std::int64_t sequences, std::int64_t length) {
  const AttentionShape shape = smollm(dtype);
  const std::int64_t t = sequences * length;
  const int threads = omp_get_max_threads();
  Values qkv(t, kWidth, dtype, 1), out(t, kHeads * kDim, dtype, 2),
      dout(t, kHeads * kDim, dtype, 3);
  Values dqkv(t, kWidth, dtype, 4), lse(t, kHeads, DType::kF32, 5);
  std::vector<std::int32_t> offsets;
  for (std::int64_t i = 0; i <= sequences; ++i)
    offsets.push_back(static_cast<std::int32_t>(i * length));
  Bytes scratch(std::max(attention_forward_scratch(shape, t, length, threads),
                         attention_backward_scratch(shape, t, length, threads)));
  auto* l = static_cast<float*>(lse.data());
  const double pairs = static_cast<double>(sequences * kHeads * length * (length + 1) / 2);
  const std::string name = str("_", sequences, "x", length);
  print("attention_forward" + name, dtype, least_seconds([&] {
          attention_forward(shape, t, qkv.view(), offsets, length, out.rows(), l, scratch.span());
        }),
        pairs * 4 * kDim, 0);
  print("attention_backward" + name, dtype, least_seconds([&] {
          attention_backward(shape, t, dout.view(), qkv.view(), out.view(), l, offsets, length,
                             dqkv.rows(), scratch.span());
        }),
        pairs * 10 * kDim, 0);
}

void bench_decode(DType dtype, std::int64_t sequences, std::int64_t length) {
  const AttentionShape shape = smollm(dtype);
  constexpr std::int64_t kBlockSize = 16;
  const std::int64_t blocks = (length + kBlockSize - 1) / kBlockSize;
  Values k(sequences * blocks, kKvHeads * kBlockSize * kDim, dtype, 1);
  Values v(sequences * blocks, kKvHeads * kBlockSize * kDim, dtype, 2);
  Values q(sequences, kWidth, dtype, 3), out(sequences, kHeads * kDim, dtype, 4);
  std::vector<std::int32_t> tables, q_offsets{0},
      kv_lens(static_cast<std::size_t>(sequences), static_cast<std::int32_t>(length));
  for (std::int64_t i = 0; i < sequences * blocks; ++i)
    tables.push_back(static_cast<std::int32_t>((i * 37) % (sequences * blocks)));
  for (std::int64_t i = 1; i <= sequences; ++i) q_offsets.push_back(static_cast<std::int32_t>(i));
  PagedKeys keys{k.data(), v.data(), kBlockSize, blocks, tables.data(), kv_lens};
  Bytes scratch(
      paged_attention_scratch(shape, sequences, sequences, length, omp_get_max_threads()));
  const auto pairs = static_cast<double>(sequences * kHeads * length);
  print(str("paged_decode_", sequences, "x", length), dtype, least_seconds([&] {
          paged_attention(shape, sequences, q.view(), q_offsets, keys, length, out.rows(),
                          scratch.span());
        }),
        pairs * 4 * kDim,
        static_cast<double>(2 * sequences * kKvHeads * length * kDim * dtype_bytes(dtype)));
}

// One fused qkv linear, forward and backward, with and without its three adapters.
void bench_lora(DType dtype, std::int64_t t, std::int64_t n, std::int64_t k,
                const std::vector<std::int64_t>& sites) {
  constexpr std::int64_t kRank = 16;
  const int threads = omp_get_max_threads();
  const auto count = static_cast<std::int64_t>(sites.size());
  const std::int64_t ranks = kRank * count;
  Values w(n, k, dtype, 1), x(t, k, dtype, 2), y(t, n, dtype, 3), dy(t, n, dtype, 4),
      dx(t, k, dtype, 5);
  Values a(ranks, k, dtype, 6), b(n, kRank, dtype, 7), u(t, ranks, dtype, 8),
      du(t, ranks, dtype, 9);
  Values da(ranks, k, DType::kF32, 10), db(n, kRank, DType::kF32, 11);
  Bytes packed(packed_bytes(dtype, n, k));
  pack_rows(packed.data(), dtype, n, k, 0, n, w.view());
  const PackedMatrix weight{packed.data(), dtype, n, k};
  Bytes scratch(std::max({linear_forward_scratch(dtype, t, n, k, count, ranks, 0, threads),
                          linear_input_grad_scratch(dtype, t, n, k, 1, ranks, threads),
                          small_product_scratch(dtype, t, std::max(n, k), ranks, threads),
                          outer_accumulate_scratch(dtype, t, n, ranks, threads),
                          outer_accumulate_scratch(dtype, t, ranks, k, threads)}));
  const double flop = 4.0 * static_cast<double>(t * n * k);
  const std::string name = str("_", t, "x", n, "x", k);
  const double base = least_seconds([&] {
    linear_forward(weight, t, x.view(), y.rows(), {}, scratch.span());
    linear_input_grad(weight, t, dy.view(), dx.rows(), {}, scratch.span());
  });
  print("linear" + name, dtype, base, flop, 0);
  std::vector<LowRankTerm> terms;
  std::int64_t begin = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    terms.push_back(
        {begin,
         sites[static_cast<std::size_t>(i)],
         kRank,
         u.view(i * kRank),
         {static_cast<char*>(b.data()) + begin * kRank * dtype_bytes(dtype), kRank, dtype}});
    begin += sites[static_cast<std::size_t>(i)];
  }
  const LowRankTerm back[] = {{0, k, ranks, du.view(), a.view()}};
  LinearOptions forward_options, backward_options;
  forward_options.low_rank = terms;
  backward_options.low_rank = back;
  const double with = least_seconds([&] {
    small_product(t, k, ranks, x.view(), a.view(), SmallLayout::kOutByIn, 2.0f, false, u.rows(),
                  scratch.span());
    linear_forward(weight, t, x.view(), y.rows(), forward_options, scratch.span());
    for (const LowRankTerm& term : terms) {
      const std::int64_t rank_at = (&term - terms.data()) * kRank;
      small_product(t, term.count, kRank, dy.view(term.begin), term.v, SmallLayout::kInByOut, 2.0f,
                    false, du.rows(rank_at), scratch.span());
      outer_accumulate(t, term.count, kRank, dy.view(term.begin), u.view(rank_at), 1.0f,
                       static_cast<float*>(db.data()) + term.begin * kRank, kRank, scratch.span());
    }
    outer_accumulate(t, ranks, k, du.view(), x.view(), 1.0f, static_cast<float*>(da.data()), k,
                     scratch.span());
    linear_input_grad(weight, t, dy.view(), dx.rows(), backward_options, scratch.span());
  });
  print("linear_with_lora" + name, dtype, with, flop, 0);
  std::cerr << name << " lora adds " << (with / base - 1) * 100 << " %\n";
}

}  // namespace

int main(int argc, char** argv) {
  const DType dtype = argc > 1 && std::strcmp(argv[1], "--f32") == 0 ? DType::kF32 : DType::kBF16;
  bench_packed(dtype, 8, 512);
  bench_packed(dtype, 1, 4096);
  for (const std::int64_t sequences : {1, 4, 16})
    for (const std::int64_t length : {128, 512, 4096}) bench_decode(dtype, sequences, length);
  bench_lora(dtype, 4096, 960, 576, {576, 192, 192});
  bench_lora(dtype, 4096, 576, 576, {576});
  bench_lora(dtype, 4096, 3072, 576, {1536, 1536});
  bench_lora(dtype, 4096, 576, 1536, {576});
  return 0;
}
