#include "worker/comm/nccl/peer_kernels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace tandem::worker::comm {
namespace {

constexpr int kThreads = 512;

/// The kernel before has ended, and what comes behind this one may be made ready.
__device__ void begin() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/// 16 bytes of T, added up in f32.
template <class T>
struct Vec;
template <>
struct Vec<float> {
  static constexpr int kSize = 4;
  float v[4] = {};
  __device__ void add(const uint4& raw) {
    v[0] += __uint_as_float(raw.x), v[1] += __uint_as_float(raw.y);
    v[2] += __uint_as_float(raw.z), v[3] += __uint_as_float(raw.w);
  }
  __device__ uint4 rounded() const {
    return {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
            __float_as_uint(v[3])};
  }
};
/// A pair of 16-bit elements, the first in the low half.
template <class T>
__device__ float2 widen(unsigned word);
template <>
__device__ float2 widen<__nv_bfloat16>(unsigned word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
template <>
__device__ float2 widen<__half>(unsigned word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
template <class T>
__device__ unsigned narrow(float low, float high);
template <>
__device__ unsigned narrow<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}
template <>
__device__ unsigned narrow<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}
template <class T>
struct Vec {
  static_assert(sizeof(T) == 2);
  static constexpr int kSize = 8;
  float v[8] = {};
  __device__ void add(const uint4& raw) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = widen<T>(words[i]);
      v[2 * i] += pair.x;
      v[2 * i + 1] += pair.y;
    }
  }
  __device__ uint4 rounded() const {
    return {narrow<T>(v[0], v[1]), narrow<T>(v[2], v[3]), narrow<T>(v[4], v[5]),
            narrow<T>(v[6], v[7])};
  }
};

__device__ void say(std::uint32_t* flag, std::uint32_t turn) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(turn) : "memory");
}
__device__ void await(const std::uint32_t* flag, std::uint32_t turn) {
  std::uint32_t seen;
  do {
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
  } while (static_cast<std::int32_t>(seen - turn) < 0);
}

/// Rank r adds up slice r. Each block has a stretch of every slice to itself: it sends its addends
/// to the slices' ranks, meets the same block of the others, adds up its own slice's stretch, and
/// sends that to all. Nothing is read from another GPU: what is written there need not come back.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_small_kernel(SmallSum s, std::int64_t per_slice, std::int64_t per_block) {
  begin();
  constexpr int kSize = Vec<T>::kSize;
  T* const x = static_cast<T*>(s.x);
  const bool aligned = reinterpret_cast<std::uintptr_t>(x) % 16 == 0;
  const std::int64_t room = kFlagBytes + (s.turn % 2) * 2 * kSumBytes;
  const auto addends = [&](int window, int of) {
    return reinterpret_cast<T*>(s.windows[window] + room) + of * per_slice;
  };
  const auto sums = [&](int window) {
    return reinterpret_cast<T*>(s.windows[window] + room + kSumBytes);
  };
  struct Stretch {
    std::int64_t begin, whole, end;  ///< vectors up to `whole`, elements from there
  };
  const auto stretch = [&](int slice) -> Stretch {
    const std::int64_t first = slice * per_slice, last = first + per_slice;
    const std::int64_t most = last < s.elements ? last : s.elements;
    const std::int64_t begin = first + blockIdx.x * per_block;
    const std::int64_t end = begin + per_block < most ? begin + per_block : most;
    if (begin >= end) return {0, 0, 0};
    return {begin, aligned ? begin + (end - begin) / kSize * kSize : begin, end};
  };
  const auto each = [&](const Stretch& at, const auto& vector, const auto& element) {
    for (std::int64_t e = at.begin + threadIdx.x * kSize; e < at.whole; e += kThreads * kSize)
      vector(e);
    for (std::int64_t e = at.whole + threadIdx.x; e < at.end; e += kThreads) element(e);
  };
  const auto vec = [](T* at) -> uint4& { return *reinterpret_cast<uint4*>(at); };
  const auto meet = [&](auto flags) {
    __syncthreads();
    if (threadIdx.x < s.size) {
      const auto at = [&](int window) {
        return (reinterpret_cast<PeerFlags*>(s.windows[window])->*flags)[blockIdx.x];
      };
      say(at(static_cast<int>(threadIdx.x)) + s.rank, s.turn);
      await(at(s.rank) + threadIdx.x, s.turn);
    }
    __syncthreads();
  };

  for (int i = 1; i < s.size; ++i) {
    const int r = (s.rank + i) % s.size;
    T* const to = addends(r, s.rank) - r * per_slice;
    each(
        stretch(r), [&](std::int64_t e) { vec(to + e) = vec(x + e); },
        [&](std::int64_t e) { to[e] = x[e]; });
  }
  meet(&PeerFlags::sent);
  const auto from = [&](int r) {
    return r == s.rank ? x : addends(s.rank, r) - s.rank * per_slice;
  };
  each(
      stretch(s.rank),
      [&](std::int64_t e) {
        Vec<T> sum;
        for (int r = 0; r < s.size; ++r) sum.add(vec(from(r) + e));
        const uint4 rounded = sum.rounded();
        vec(x + e) = rounded;
        for (int i = 1; i < s.size; ++i) vec(sums((s.rank + i) % s.size) + e) = rounded;
      },
      [&](std::int64_t e) {
        float sum = 0.0f;
        for (int r = 0; r < s.size; ++r) sum += static_cast<float>(from(r)[e]);
        x[e] = static_cast<T>(sum);
        for (int i = 1; i < s.size; ++i) sums((s.rank + i) % s.size)[e] = x[e];
      });
  meet(&PeerFlags::sum);
  for (int i = 1; i < s.size; ++i)
    each(
        stretch((s.rank + i) % s.size), [&](std::int64_t e) { vec(x + e) = vec(sums(s.rank) + e); },
        [&](std::int64_t e) { x[e] = sums(s.rank)[e]; });
}

__device__ void put_line(char* to, std::uint32_t a, std::uint32_t b, std::uint32_t turn) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};" ::"l"(to), "r"(a), "r"(turn),
               "r"(b)
               : "memory");
}
__device__ uint2 take_line(const char* from, std::uint32_t turn) {
  std::uint32_t a, b, first, second;
  do {
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(first), "=r"(b), "=r"(second)
                 : "l"(from)
                 : "memory");
  } while (first != turn || second != turn);
  return {a, b};
}

template <class T>
__device__ void add_pair(float (&sum)[4], const uint2& raw) {
  if constexpr (sizeof(T) == 4) {
    sum[0] += __uint_as_float(raw.x), sum[1] += __uint_as_float(raw.y);
  } else {
    const float2 low = widen<T>(raw.x), high = widen<T>(raw.y);
    sum[0] += low.x, sum[1] += low.y, sum[2] += high.x, sum[3] += high.y;
  }
}

/// Whoever is slow is waited for word by word: each eight bytes of an addend travel in a line of
/// sixteen with the sum's turn beside either half, for eight bytes are written at once.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_tiny_kernel(SmallSum s) {
  begin();
  constexpr int kSize = 8 / sizeof(T);
  T* const x = static_cast<T*>(s.x);
  const std::int64_t line = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t e = line * kSize;
  if (e >= s.elements) return;
  const std::int64_t side = (s.turn % 2) * kPeersMax;
  const auto place = [&](int window, int of) {
    return s.windows[window] + kTinySums + (side + of) * 2 * kTinySumBytes + line * 16;
  };
  T mine[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) mine[i] = e + i < s.elements ? x[e + i] : T(0.0f);
  uint2 own;
  memcpy(&own, mine, 8);
  for (int i = 1; i < s.size; ++i)
    put_line(place((s.rank + i) % s.size, s.rank), own.x, own.y, s.turn);
  float sum[4] = {};
  for (int r = 0; r < s.size; ++r)
    add_pair<T>(sum, r == s.rank ? own : take_line(place(s.rank, r), s.turn));
#pragma unroll
  for (int i = 0; i < kSize; ++i)
    if (e + i < s.elements) x[e + i] = static_cast<T>(sum[i]);
}

__global__ void __launch_bounds__(kThreads) sum_parts_kernel(PartSum s) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t whole = s.elements / 4;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (std::int64_t e = first; e < whole; e += stride) {
    Vec<float> sum;
#pragma unroll 4
    for (int r = 0; r < s.size; ++r) sum.add(reinterpret_cast<const uint4*>(s.parts[r])[e]);
    reinterpret_cast<uint4*>(s.out)[e] = sum.rounded();
  }
  for (std::int64_t e = 4 * whole + first; e < s.elements; e += stride) {
    float sum = 0.0f;
    for (int r = 0; r < s.size; ++r) sum += s.parts[r][e];
    s.out[e] = sum;
  }
}

bool starts_early() {
  static const bool hopper = [] {
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ==
               cudaSuccess &&
           major >= 9;
  }();
  return hopper;
}

/// Its blocks come to the multiprocessors while the kernel before ends (Hopper).
template <class... Parameters, class... Args>
void launch_early(cudaStream_t stream, unsigned blocks, void (*kernel)(Parameters...),
                  Args... args) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = kThreads;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = starts_early() ? 1 : 0;
  (void)cudaLaunchKernelEx(&config, kernel, args...);
}

template <class T>
void launch_small(cudaStream_t stream, const SmallSum& sum) {
  if (sum.elements * static_cast<std::int64_t>(sizeof(T)) <= kTinySumBytes) {
    constexpr std::int64_t kOfBlock = kThreads * 8 / sizeof(T);
    const auto blocks = static_cast<unsigned>((sum.elements + kOfBlock - 1) / kOfBlock);
    launch_early(stream, blocks, sum_tiny_kernel<T>, sum);
    return;
  }
  // At least one vector of a slice a thread; slices and stretches are whole vectors.
  const auto whole = [](std::int64_t n) {
    return (n + Vec<T>::kSize - 1) / Vec<T>::kSize * Vec<T>::kSize;
  };
  constexpr std::int64_t kLeast = kThreads * Vec<T>::kSize;
  const std::int64_t per_slice = whole((sum.elements + sum.size - 1) / sum.size);
  const std::int64_t wanted = (per_slice + kLeast - 1) / kLeast;
  const std::int64_t blocks = wanted < kSumBlocks ? wanted : kSumBlocks;
  const std::int64_t per_block = whole((per_slice + blocks - 1) / blocks);
  launch_early(stream, static_cast<unsigned>(blocks), sum_small_kernel<T>, sum, per_slice,
               per_block);
}

}  // namespace

cudaError_t sum_small(cudaStream_t stream, PeerType type, const SmallSum& sum) {
  if (type == PeerType::kF32)
    launch_small<float>(stream, sum);
  else if (type == PeerType::kBF16)
    launch_small<__nv_bfloat16>(stream, sum);
  else
    launch_small<__half>(stream, sum);
  return cudaGetLastError();
}

cudaError_t sum_parts(cudaStream_t stream, const PartSum& sum) {
  constexpr std::int64_t kMost = 132 * 2;  // enough to reach the memory's rate
  const std::int64_t wanted = (sum.elements / 4 + kThreads) / kThreads;
  const auto blocks = static_cast<unsigned>(wanted < kMost ? wanted : kMost);
  sum_parts_kernel<<<blocks, kThreads, 0, stream>>>(sum);
  return cudaGetLastError();
}

}  // namespace tandem::worker::comm
