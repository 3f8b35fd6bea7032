// Random numbers as pure functions of (seed, stream, counter): any draw can be repeated without
// repeating those before it, so resume and retry need no generator state.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace tandem {

/// SplitMix64's finalizer (Steele, Lea, Flood 2014): a bijection with good avalanche.
constexpr std::uint64_t mix64(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

/// 64 random bits for (seed, stream, counter).
constexpr std::uint64_t random_bits(std::uint64_t seed, std::uint64_t stream,
                                    std::uint64_t counter) {
  return mix64(mix64(mix64(seed) ^ stream) ^ counter);
}

/// A float in [0, 1) with 24 random bits.
constexpr float random_uniform(std::uint64_t seed, std::uint64_t stream, std::uint64_t counter) {
  return static_cast<float>(random_bits(seed, stream, counter) >> 40) * 0x1.0p-24f;
}

// (128-bit multiply for unbiased ranges)
/// A sequential generator over one stream; its whole state is (seed, stream, counter).
__extension__ using uint128 = unsigned __int128;

class Random {
 public:
  explicit Random(std::uint64_t seed, std::uint64_t stream = 0) : seed_(seed), stream_(stream) {}
  std::uint64_t next() { return random_bits(seed_, stream_, counter_++); }
  float uniform() { return static_cast<float>(next() >> 40) * 0x1.0p-24f; }
  /// An integer in [0, bound); bound > 0. Unbiased enough for shuffles (64-bit multiply-shift).
  std::uint64_t below(std::uint64_t bound) {
    return static_cast<std::uint64_t>((static_cast<uint128>(next()) * bound) >> 64);
  }
  /// A standard normal (Box-Muller, one of the pair).
  float normal();
  template <class T>
  void shuffle(std::vector<T>& values) {
    for (std::size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[below(i)]);
  }

 private:
  std::uint64_t seed_, stream_, counter_ = 0;
};

/// 64 bits from the operating system; ids and seeds only, never inside a step.
std::uint64_t entropy64();

}  // namespace tandem
