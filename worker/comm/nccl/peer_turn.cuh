// Private to libtandem_nccl.so: how the kernels of peer_sums.cu exchange vectors of 16 bytes; why
// it is right stands in peer_kernels.h.
#pragma once

#include "worker/comm/nccl/peer_kernels.h"
#include "worker/comm/nccl/peer_vectors.cuh"

namespace tandem::worker::comm {

inline constexpr std::uint32_t kEmpty = 0xffffffffu, kOtherNan = 0x7fffffffu;
/// What one turn adds to PeerFlags::turns.
inline constexpr std::uint32_t kTurnParts = 4096;

/// What comes behind this kernel may take its place now: it waits for this one's end by itself.
__device__ inline void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
/// The kernel before has ended.
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void write(char* to, const uint4& v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ inline uint4 read(const char* from) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}
__device__ inline uint4 never_empty(const uint4& v) {
  const auto other = [](std::uint32_t word) { return word == kEmpty ? kOtherNan : word; };
  return {other(v.x), other(v.y), other(v.z), other(v.w)};
}
__device__ inline bool lacks_words(const uint4& v) {
  return v.x == kEmpty || v.y == kEmpty || v.z == kEmpty || v.w == kEmpty;
}

/// One turn of a gang's sums. Places count vectors of 16 bytes.
struct Turn {
  const SumRooms& s;
  std::int64_t per_rank;  ///< vectors of one rank's addend in a room
  std::int64_t side;      ///< where this turn's rooms begin

  __device__ Turn(const SumRooms& rooms, std::int64_t vectors) : s(rooms), per_rank(vectors) {
    std::uint32_t parts;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(parts) : "l"(counter()) : "memory");
    side = kFlagBytes + parts / kTurnParts % 2 * (2 * kRoomBytes);
  }
  [[nodiscard]] __device__ std::uint32_t* counter() const {
    return &reinterpret_cast<PeerFlags*>(s.windows[s.rank])->turns;
  }
  [[nodiscard]] __device__ char* addend(int window, int from, std::int64_t place) const {
    return s.windows[window] + side + (from * per_rank + place) * 16;
  }
  [[nodiscard]] __device__ char* sum(int window, std::int64_t place) const {
    return s.windows[window] + side + kRoomBytes + place * 16;
  }
  /// The rank `i` places behind this one, so that no two send to the same one at a time.
  [[nodiscard]] __device__ int other(int i) const {
    const int r = s.rank + i;
    return r < s.size ? r : r - s.size;
  }

  /// What all others have sent to `place`, by rank; v[this rank] is left as it is.
  template <int kRanks>
  __device__ void take_addends(uint4 (&v)[kRanks], std::int64_t place) const {
    bool lacking;
    do {
#pragma unroll
      for (int r = 0; r < kRanks; ++r)
        if (r < s.size && r != s.rank) v[r] = read(addend(s.rank, r, place));
      lacking = false;
#pragma unroll
      for (int r = 0; r < kRanks; ++r)
        if (r < s.size && r != s.rank) lacking |= lacks_words(v[r]);
    } while (lacking);
#pragma unroll
    for (int r = 0; r < kRanks; ++r)
      if (r < s.size && r != s.rank)
        write(addend(s.rank, r, place), {kEmpty, kEmpty, kEmpty, kEmpty});
  }
  /// The sum over ranks of `own` and of what comes to `place`, rounded to T.
  template <class T, int kRanks>
  __device__ uint4 take_sum(const uint4& own, std::int64_t place) const {
    uint4 v[kRanks];
    take_addends<kRanks>(v, place);
    Vec<T> sum;
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      // By words: what is chosen as a whole, or by rank, would lie in memory.
      const bool is_own = r == s.rank;
      if (r < s.size)
        sum.add({is_own ? own.x : v[r].x, is_own ? own.y : v[r].y, is_own ? own.z : v[r].z,
                 is_own ? own.w : v[r].w});
    }
    return never_empty(sum.rounded());
  }
  /// What comes to `place` of the sums.
  [[nodiscard]] __device__ uint4 take(std::int64_t place) const {
    char* const from = sum(s.rank, place);
    uint4 v;
    do v = read(from);
    while (lacks_words(v));
    write(from, {kEmpty, kEmpty, kEmpty, kEmpty});
    return v;
  }
  template <int kRanks>
  __device__ void send_sum(const uint4& v, std::int64_t place) const {
#pragma unroll
    for (int i = 1; i < kRanks; ++i)
      if (i < s.size) write(sum(other(i), place), v);
  }
  template <int kRanks>
  __device__ void send_addend_to_all(const uint4& v, std::int64_t place) const {
#pragma unroll
    for (int i = 1; i < kRanks; ++i)
      if (i < s.size) write(addend(other(i), s.rank, place), v);
  }
  /// The block's last act.
  __device__ void end() const {
    __syncthreads();
    if (threadIdx.x != 0) return;
    const std::uint32_t parts =
        kTurnParts / gridDim.x + (blockIdx.x == 0 ? kTurnParts % gridDim.x : 0);
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(counter()), "r"(parts)
                 : "memory");
  }
};

}  // namespace tandem::worker::comm
