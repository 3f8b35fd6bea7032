// Private to kernels/cuda: exact selection in one row of logits by one block, without sorting it.
// Sums are integers, so neither the order of threads nor that of atomics shows in a result.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/row_statistics.cuh"

namespace tandem::kernels::cuda {

inline constexpr int kSelectThreads = kStatisticsThreads;
inline constexpr int kSelectWarps = kSelectThreads / 32;
inline constexpr int kSelectBuckets = 2048;

/// Shared memory of one block's selections.
struct SelectMemory {
  std::uint32_t low[kSelectBuckets], high[kSelectBuckets];  ///< halves of each bucket's sum
  std::uint64_t parts[kSelectWarps];
  std::uint64_t above, here;
  std::int32_t found;
};

/// f(j, x[j]) for all j of this thread, several loads at once.
template <class F>
__device__ inline void for_each_value(const float* x, int n, const F& f) {
  constexpr int kUnroll = 8;
  int j = static_cast<int>(threadIdx.x);
  for (; j + (kUnroll - 1) * kSelectThreads < n; j += kUnroll * kSelectThreads) {
    float v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = x[j + u * kSelectThreads];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) f(j + u * kSelectThreads, v[u]);
  }
  for (; j < n; j += kSelectThreads) f(j, x[j]);
}

__device__ inline std::uint64_t warp_sum(std::uint64_t x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
/// The sum of x over this and all lower lanes.
template <class T>
__device__ inline T warp_running_sum(T x) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const T below = __shfl_up_sync(0xffffffffu, x, offset);
    if (lane >= offset) x += below;
  }
  return x;
}

/// Keys above `key` stay, and of its `ties` equals `kept`.
struct Selection {
  std::uint32_t key;
  std::uint64_t kept, ties;
};

__device__ inline void add_to_bucket(SelectMemory& m, std::uint32_t bucket, std::uint64_t amount) {
  const auto low = static_cast<std::uint32_t>(amount);
  const auto high = static_cast<std::uint32_t>(amount >> 32);
  const std::uint32_t before = atomicAdd(&m.low[bucket], low);
  const std::uint32_t carry = before + low < before ? 1 : 0;
  if (high + carry != 0) atomicAdd(&m.high[bucket], high + carry);
}

/// The highest bucket at which the sum of it and all higher ones reaches `limit`: m.found, with
/// m.above the sum of the higher ones and m.here its own.
__device__ inline void find_bucket(SelectMemory& m, std::uint64_t limit) {
  constexpr int kEach = kSelectBuckets / kSelectThreads;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int first = kSelectBuckets - 1 - kEach * static_cast<int>(threadIdx.x);
  std::uint64_t own[kEach], sum = 0;
#pragma unroll
  for (int b = 0; b < kEach; ++b) {
    own[b] = (static_cast<std::uint64_t>(m.high[first - b]) << 32) | m.low[first - b];
    sum += own[b];
  }
  const std::uint64_t running = warp_running_sum(sum);
  if (threadIdx.x % 32 == 31) m.parts[warp] = running;
  if (threadIdx.x == 0) m.found = 0, m.above = 0, m.here = 0;
  __syncthreads();
  std::uint64_t above = running - sum;
  for (int w = 0; w < warp; ++w) above += m.parts[w];
  if (above < limit && above + sum >= limit) {  // one thread of all
#pragma unroll
    for (int b = 0; b < kEach; ++b) {
      if (above + own[b] >= limit) {
        m.found = first - b;
        m.above = above;
        m.here = own[b];
        break;
      }
      above += own[b];
    }
  }
  __syncthreads();
}

/// The fewest elements with the highest keys whose amounts reach `limit` (1 .. their sum).
/// key(value) is what orders them, amount(key) what each counts.
template <class Key, class Amount>
__device__ inline Selection select_highest(const float* x, int n, std::uint64_t limit,
                                           SelectMemory& m, const Key& key, const Amount& amount) {
  std::uint32_t prefix = 0, mask = 0;
  for (int level = 0; level < 3; ++level) {
    const int shift = level == 0 ? 21 : level == 1 ? 10 : 0;
    const std::uint32_t digits = level == 2 ? 1023 : 2047;
    for (int b = static_cast<int>(threadIdx.x); b < kSelectBuckets; b += kSelectThreads)
      m.low[b] = m.high[b] = 0;
    __syncthreads();
    for_each_value(x, n, [&](int, float value) {
      const std::uint32_t k = key(value);
      if ((k & mask) != prefix) return;
      const std::uint64_t a = amount(k);
      if (a != 0) add_to_bucket(m, (k >> shift) & digits, a);
    });
    __syncthreads();
    find_bucket(m, limit);
    prefix |= static_cast<std::uint32_t>(m.found) << shift;
    mask |= digits << shift;
    limit -= m.above;
  }
  const std::uint64_t each = max(amount(prefix), std::uint64_t{1});
  const Selection selected{prefix, (limit + each - 1) / each, m.here / each};
  __syncthreads();
  return selected;
}

/// The lowest j at which the running sum of amount(j, x[j]) exceeds target(sum over all); n - 1
/// when it never does.
template <class Amount, class Target>
__device__ inline int first_exceeding(const float* x, int n, SelectMemory& m, const Amount& amount,
                                      const Target& target) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  constexpr int kScanned = 512;
  int begin = 0, end = n;
  std::uint64_t left = 0;
  for (bool whole = true; whole || end - begin > kScanned; whole = false) {
    const int each = (end - begin + kSelectWarps - 1) / kSelectWarps;
    const int from = min(end, begin + warp * each), to = min(end, from + each);
    std::uint64_t sum = 0;
    int j = from + lane;
    for (; j + 7 * 32 < to; j += 8 * 32) {
      float v[8];
#pragma unroll
      for (int u = 0; u < 8; ++u) v[u] = x[j + u * 32];
#pragma unroll
      for (int u = 0; u < 8; ++u) sum += amount(j + u * 32, v[u]);
    }
    for (; j < to; j += 32) sum += amount(j, x[j]);
    sum = warp_sum(sum);
    if (lane == 0) m.parts[warp] = sum;
    __syncthreads();
    if (whole) {
      std::uint64_t total = 0;
      for (int w = 0; w < kSelectWarps; ++w) total += m.parts[w];
      left = target(total);
    }
    int w = 0;
    for (; w < kSelectWarps - 1 && m.parts[w] <= left; ++w) left -= m.parts[w];
    begin = min(end, begin + w * each);
    end = min(end, begin + each);
    __syncthreads();
  }
  if (warp == 0) {
    if (lane == 0) m.found = n - 1;
    __syncwarp();
    for (; begin < end; begin += 32) {
      const int j = begin + lane;
      const std::uint64_t running = warp_running_sum(j < end ? amount(j, x[j]) : 0);
      const unsigned exceeding = __ballot_sync(0xffffffffu, running > left);
      if (exceeding != 0) {
        if (lane == 0) m.found = begin + __ffs(static_cast<int>(exceeding)) - 1;
        break;
      }
      left -= __shfl_sync(0xffffffffu, running, 31);
    }
  }
  __syncthreads();
  const int found = m.found;
  __syncthreads();
  return found;
}

}  // namespace tandem::kernels::cuda
