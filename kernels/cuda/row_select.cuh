// Private to kernels/cuda: exact selection in one row of logits, without sorting it, by a team: one
// block, or the blocks of a cluster. Sums are integers, so neither the order of threads, nor that
// of atomics, nor the size of the team shows in a result. All threads of a team call what is here.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/row_statistics.cuh"

#include <cooperative_groups.h>

namespace tandem::kernels::cuda {

inline constexpr int kSelectThreads = kStatisticsThreads;
inline constexpr int kSelectWarps = kSelectThreads / 32;
inline constexpr int kSelectBuckets = 2048;
inline constexpr int kTeamMax = 8;

/// Shared memory of one block's selections.
struct SelectMemory {
  std::uint32_t low[kSelectBuckets], high[kSelectBuckets];  ///< halves of each bucket's sum
  std::uint64_t parts[kSelectWarps];                        ///< this block's, for the team
  std::uint64_t all[kTeamMax * kSelectWarps];               ///< the team's
  std::uint64_t above, here;
  std::int32_t found;
};

struct Team {
  int rank = 0, size = 1;
  __device__ Team() {
#if __CUDA_ARCH__ >= 900
    rank = static_cast<int>(cooperative_groups::this_cluster().block_rank());
    size = static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#endif
  }
  __device__ void sync() const {
#if __CUDA_ARCH__ >= 900
    if (size > 1) return cooperative_groups::this_cluster().sync();
#endif
    __syncthreads();
  }
  /// The same shared object of another block.
  __device__ SelectMemory& of(SelectMemory& m, int block) const {
#if __CUDA_ARCH__ >= 900
    return *cooperative_groups::this_cluster().map_shared_rank(&m, static_cast<unsigned>(block));
#else
    return m;
#endif
  }
  /// m.all = the parts of all blocks, in order.
  __device__ void gather_parts(SelectMemory& m) const {
    sync();
    const int e = static_cast<int>(threadIdx.x);
    if (e < size * kSelectWarps) m.all[e] = of(m, e / kSelectWarps).parts[e % kSelectWarps];
    sync();
  }
};

/// f(j, x[j]) for all j of this thread, one of `blocks` blocks of them, several loads at once.
template <class F>
__device__ inline void for_each_value(const float* x, int n, int block, int blocks, const F& f) {
  constexpr int kUnroll = 8;
  const int stride = blocks * kSelectThreads;
  int j = block * kSelectThreads + static_cast<int>(threadIdx.x);
  for (; j + (kUnroll - 1) * stride < n; j += kUnroll * stride) {
    float v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = x[j + u * stride];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) f(j + u * stride, v[u]);
  }
  for (; j < n; j += stride) f(j, x[j]);
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

/// The highest bucket at which the team's sum of it and all higher ones reaches `limit`: m.found,
/// with m.above the sum of the higher ones and m.here its own.
__device__ inline void find_bucket(const Team& team, SelectMemory& m, std::uint64_t limit) {
  constexpr int kEach = kSelectBuckets / kSelectThreads;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int first = kSelectBuckets - 1 - kEach * static_cast<int>(threadIdx.x);
  std::uint64_t own[kEach] = {}, sum = 0;
  for (int r = 0; r < team.size; ++r) {
    const SelectMemory& other = team.of(m, r);
#pragma unroll
    for (int b = 0; b < kEach; ++b)
      own[b] += (static_cast<std::uint64_t>(other.high[first - b]) << 32) | other.low[first - b];
  }
#pragma unroll
  for (int b = 0; b < kEach; ++b) sum += own[b];
  const std::uint64_t running = warp_running_sum(sum);
  if (threadIdx.x % 32 == 31) m.all[warp] = running;
  if (threadIdx.x == 0) m.found = 0, m.above = 0, m.here = 0;
  __syncthreads();
  std::uint64_t above = running - sum;
  for (int w = 0; w < warp; ++w) above += m.all[w];
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
  team.sync();
}

/// The fewest elements with the highest keys whose amounts reach `limit` (1 .. their sum).
/// key(value) is what orders them, amount(key) what each counts.
template <class Key, class Amount>
__device__ inline Selection select_highest(const Team& team, const float* x, int n,
                                           std::uint64_t limit, SelectMemory& m, const Key& key,
                                           const Amount& amount) {
  std::uint32_t prefix = 0, mask = 0;
  for (int level = 0; level < 3; ++level) {
    const int shift = level == 0 ? 21 : level == 1 ? 10 : 0;
    const std::uint32_t digits = level == 2 ? 1023 : 2047;
    for (int b = static_cast<int>(threadIdx.x); b < kSelectBuckets; b += kSelectThreads)
      m.low[b] = m.high[b] = 0;
    __syncthreads();
    for_each_value(x, n, team.rank, team.size, [&](int, float value) {
      const std::uint32_t k = key(value);
      if ((k & mask) != prefix) return;
      const std::uint64_t a = amount(k);
      if (a != 0) add_to_bucket(m, (k >> shift) & digits, a);
    });
    team.sync();
    find_bucket(team, m, limit);
    prefix |= static_cast<std::uint32_t>(m.found) << shift;
    mask |= digits << shift;
    limit -= m.above;
  }
  const std::uint64_t each = max(amount(prefix), std::uint64_t{1});
  const Selection selected{prefix, (limit + each - 1) / each, m.here / each};
  __syncthreads();
  return selected;
}

/// The sum of amount(j, x[j]) over this lane's share of [from, to).
template <class Amount>
__device__ inline std::uint64_t lane_sum(const float* x, int from, int to, const Amount& amount) {
  constexpr int kUnroll = 8;
  std::uint64_t sum = 0;
  int j = from + static_cast<int>(threadIdx.x) % 32;
  for (; j + (kUnroll - 1) * 32 < to; j += kUnroll * 32) {
    float v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = x[j + u * 32];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) sum += amount(j + u * 32, v[u]);
  }
  for (; j < to; j += 32) sum += amount(j, x[j]);
  return sum;
}

/// The lowest j at which the running sum of amount(j, x[j]) exceeds target(sum over all); n - 1
/// when it never does. Each round finds the part that it falls in: of all warps of the team, then,
/// in every block alike, of a block's.
template <class Amount, class Target>
__device__ inline int first_exceeding(const Team& team, const float* x, int n, SelectMemory& m,
                                      const Amount& amount, const Target& target) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  constexpr int kScanned = 512;
  int begin = 0, end = n;
  std::uint64_t left = 0;
  for (bool whole = true; whole || end - begin > kScanned; whole = false) {
    const int parts = whole ? team.size * kSelectWarps : kSelectWarps;
    const int own = whole ? team.rank * kSelectWarps + warp : warp;
    const int each = (end - begin + parts - 1) / parts;
    const int from = min(end, begin + own * each), to = min(end, from + each);
    const std::uint64_t sum = warp_sum(lane_sum(x, from, to, amount));
    if (lane == 0) (whole ? m.parts : m.all)[warp] = sum;
    if (whole) {
      team.gather_parts(m);
      std::uint64_t total = 0;
      for (int w = 0; w < parts; ++w) total += m.all[w];
      left = target(total);
    } else {
      __syncthreads();
    }
    int w = 0;
    for (; w < parts - 1 && m.all[w] <= left; ++w) left -= m.all[w];
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
