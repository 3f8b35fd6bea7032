// The kernels of peer_kernels.h that exchange addends and sums.
#include "worker/comm/nccl/peer_kernels.h"
#include "worker/comm/nccl/peer_turn.cuh"

#include <cooperative_groups.h>

#include <algorithm>
#include <type_traits>

namespace tandem::worker::comm {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 128;
/// Four of these are on every multiprocessor of an H100 at once, beside a block of a product.
constexpr int kBlocksMax = 512;
constexpr int kClusterMax = 8;
static_assert(kBlocksMax <= kTurnParts);

// -- plain sums
// -------------------------------------------------------------------------------------

/// A tensor as vectors; the last may be short, and any may lie across.
template <class T>
struct Vectors {
  T* x;
  std::int64_t elements;
  bool aligned;

  [[nodiscard]] __device__ bool has(std::int64_t v) const { return v * Vec<T>::kSize < elements; }
  [[nodiscard]] __device__ uint4 load(std::int64_t v) const {
    const std::int64_t e = v * Vec<T>::kSize;
    uint4 raw;
    if (aligned && e + Vec<T>::kSize <= elements) {
      raw = *reinterpret_cast<const uint4*>(x + e);
    } else {
      T at[Vec<T>::kSize];
#pragma unroll
      for (int i = 0; i < Vec<T>::kSize; ++i) at[i] = e + i < elements ? x[e + i] : T(0.0f);
      memcpy(&raw, at, sizeof raw);
    }
    return never_empty(raw);
  }
  __device__ void store(std::int64_t v, const uint4& raw) const {
    const std::int64_t e = v * Vec<T>::kSize;
    if (aligned && e + Vec<T>::kSize <= elements) {
      *reinterpret_cast<uint4*>(x + e) = raw;
      return;
    }
    T at[Vec<T>::kSize];
    memcpy(at, &raw, sizeof raw);
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i)
      if (e + i < elements) x[e + i] = at[i];
  }
};

/// In two shots rank r has vectors [r * part, (r + 1) * part); in one, part is all.
template <class T, int kRanks, bool kOneShot>
__global__ void __launch_bounds__(kThreads, kRanks <= 4 ? 8 : 4)
    sum_kernel(const __grid_constant__ SumRooms s, const __grid_constant__ PlainSum a,
               std::int64_t part) {
  launch_dependents();
  wait_for_inputs();
  const Turn turn(s, part);
  const Vectors<T> x{static_cast<T*>(a.x), a.elements,
                     reinterpret_cast<std::uintptr_t>(a.x) % 16 == 0};
  const auto each = [&](const auto& f) {
    for (std::int64_t v = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; v < part;
         v += static_cast<std::int64_t>(gridDim.x) * kThreads)
      f(v);
  };
  if constexpr (kOneShot) {
    each([&](std::int64_t v) {
      const uint4 mine = x.load(v);
      turn.template send_addend_to_all<kRanks>(mine, v);
      x.store(v, turn.template take_sum<T, kRanks>(mine, v));
    });
  } else {
    each([&](std::int64_t v) {
      uint4 mine[kRanks];
#pragma unroll
      for (int i = 1; i < kRanks; ++i) {
        const std::int64_t at = turn.other(i) * part + v;
        if (i < s.size && x.has(at)) mine[i] = x.load(at);
      }
#pragma unroll
      for (int i = 1; i < kRanks; ++i)
        if (i < s.size && x.has(turn.other(i) * part + v))
          write(turn.addend(turn.other(i), s.rank, v), mine[i]);
    });
    each([&](std::int64_t v) {
      const std::int64_t at = s.rank * part + v;
      if (!x.has(at)) return;
      const uint4 sum = turn.template take_sum<T, kRanks>(x.load(at), v);
      turn.template send_sum<kRanks>(sum, at);
      x.store(at, sum);
    });
    each([&](std::int64_t v) {
#pragma unroll
      for (int i = 1; i < kRanks; ++i) {
        const std::int64_t at = turn.other(i) * part + v;
        if (i < s.size && x.has(at)) x.store(at, turn.take(at));
      }
    });
  }
  turn.end();
}

// -- sums and norms
// ---------------------------------------------------------------------------------

/// The sum over a cluster, in the order of its blocks, warps and lanes; every thread gets it.
/// `parts`: of this call, not of the one before.
__device__ float cluster_sum(float x, float (&parts)[kClusterMax]) {
#if __CUDA_ARCH__ >= 900
  __shared__ float warps[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  __syncthreads();  // warps may still be read from the last call
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) sum += warps[w];
  cg::cluster_group cluster = cg::this_cluster();
  const unsigned blocks = cluster.num_blocks();
  if (blocks == 1) return sum;
  if (threadIdx.x < blocks)
    *cluster.map_shared_rank(&parts[cluster.block_rank()], threadIdx.x) = sum;
  cluster.sync();
  sum = 0.0f;
  for (unsigned b = 0; b < blocks; ++b) sum += parts[b];
  return sum;
#else
  return x;
#endif
}

/// A cluster has whole rows, a thread up to kPer vectors of each. In two shots rank r adds up rows
/// r, r + n, ...; a cluster's rows are all of one rank, so that none waits for another's turn.
template <class T, int kRanks, bool kOneShot, int kPer>
__global__ void __launch_bounds__(kThreads, kRanks <= 4 ? 8 : 4)
    norm_kernel(const __grid_constant__ SumRooms s, const __grid_constant__ NormSum a,
                std::int64_t per_rank) {
#if __CUDA_ARCH__ >= 900
  __shared__ float parts[2][kClusterMax];
  launch_dependents();
  cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();  // all blocks live: each will write to the others' memory
  wait_for_inputs();
  const Turn turn(s, per_rank);
  const auto vectors = static_cast<int>(a.columns) / Vec<T>::kSize;
  const int blocks = static_cast<int>(cluster.num_blocks()), step = blocks * kThreads;
  const int first = static_cast<int>(cluster.block_rank() * kThreads + threadIdx.x);
  const int clusters = static_cast<int>(gridDim.x) / blocks;
  const int begin = static_cast<int>(blockIdx.x) / blocks;
  const auto rows = static_cast<int>(a.rows);
  auto* const stream = static_cast<uint4*>(a.stream);
  const auto* const delta = static_cast<const uint4*>(a.delta);
  const auto* const weight = static_cast<const uint4*>(a.weight);
  const auto each = [&](const auto& f) {
#pragma unroll
    for (int p = 0; p < kPer; ++p)
      if (first + p * step < vectors) f(p, first + p * step);
  };
  const auto owner = [&](int row) { return kOneShot ? s.rank : row % s.size; };
  const auto place = [&](int row) {
    return static_cast<std::int64_t>(kOneShot ? row : row / s.size) * vectors;
  };
  const auto at = [&](int row) { return static_cast<std::int64_t>(row) * vectors; };

  for (int row = begin; row < rows; row += clusters) {
    if (!kOneShot && owner(row) == s.rank) continue;
    each([&](int, int v) {
      const uint4 mine = never_empty(stream[at(row) + v]);
      if constexpr (kOneShot)
        turn.template send_addend_to_all<kRanks>(mine, place(row) + v);
      else
        write(turn.addend(owner(row), s.rank, place(row) + v), mine);
    });
  }
  int side = 0;
  for (int row = begin; row < rows; row += clusters, side ^= 1) {
    Vec<T> x[kPer];
    uint4 before[kPer] = {}, scale[kPer];
    each([&](int p, int v) {
      if (delta != nullptr) before[p] = delta[at(row) + v];
      scale[p] = weight[v];
    });
    float squares = 0.0f;
    each([&](int p, int v) {
      uint4 sum;
      if (owner(row) == s.rank) {
        sum = turn.template take_sum<T, kRanks>(never_empty(stream[at(row) + v]), place(row) + v);
        if (!kOneShot) turn.template send_sum<kRanks>(sum, at(row) + v);
      } else {
        sum = turn.take(at(row) + v);
      }
      if (delta != nullptr) {
        Vec<T> whole;
        whole.add(sum);
        whole.add(before[p]);
        sum = whole.rounded();
      }
      stream[at(row) + v] = sum;
      x[p].add(sum);
#pragma unroll
      for (int i = 0; i < Vec<T>::kSize; ++i) squares = fmaf(x[p].v[i], x[p].v[i], squares);
    });
    squares = cluster_sum(squares, parts[side]);
    const float r = rsqrtf(squares / static_cast<float>(a.columns) + a.eps);
    if (a.rstd != nullptr && first == 0) a.rstd[row] = r;
    each([&](int p, int v) {
      Vec<T> w;
      w.add(scale[p]);
#pragma unroll
      for (int i = 0; i < Vec<T>::kSize; ++i) w.v[i] = x[p].v[i] * r * w.v[i];
      static_cast<uint4*>(a.y)[at(row) + v] = w.rounded();
    });
  }
  turn.end();
#endif
}

// -- columns
// -----------------------------------------------------------------------------------------

template <int kRanks>
__global__ void __launch_bounds__(kThreads, kRanks <= 4 ? 8 : 4)
    columns_kernel(const __grid_constant__ SumRooms s, const __grid_constant__ ColumnGather a) {
  launch_dependents();
  wait_for_inputs();
  const std::int64_t vectors = a.row_bytes / 16, all = a.rows * vectors;
  const Turn turn(s, all);
  const auto* const x = static_cast<const uint4*>(a.x);
  const auto each = [&](const auto& f) {
    for (std::int64_t v = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; v < all;
         v += static_cast<std::int64_t>(gridDim.x) * kThreads)
      f(v);
  };
  each([&](std::int64_t v) { turn.template send_addend_to_all<kRanks>(never_empty(x[v]), v); });
  each([&](std::int64_t v) {
    auto* const out = static_cast<uint4*>(a.out) + v / vectors * s.size * vectors + v % vectors;
    out[s.rank * vectors] = x[v];
    uint4 theirs[kRanks];
    turn.template take_addends<kRanks>(theirs, v);
#pragma unroll
    for (int r = 0; r < kRanks; ++r)
      if (r < s.size && r != s.rank) out[r * vectors] = theirs[r];
  });
  turn.end();
}

// -- choice
// -------------------------------------------------------------------------------------------

std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

int element_bytes(PeerType type) {
  return type == PeerType::kF32 ? 4 : 2;
}

bool is_hopper() {
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
cudaError_t launch_early(cudaStream_t stream, std::int64_t blocks, int cluster,
                         void (*kernel)(Parameters...), const Args&... args) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = kThreads;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = !is_hopper() ? 0 : cluster > 0 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

/// Calls f with how many ranks there are at most, as a constant.
template <class F>
cudaError_t with_ranks(const SumRooms& rooms, const F& f) {
  if (rooms.size <= 2) return f(std::integral_constant<int, 2>{});
  if (rooms.size <= 4) return f(std::integral_constant<int, 4>{});
  return f(std::integral_constant<int, kPeersMax>{});
}
/// And with the element's type, and whether one shot is taken.
template <class F>
cudaError_t with_choice(PeerType type, const SumRooms& rooms, const F& f) {
  return with_ranks(rooms, [&](auto ranks) {
    const auto with_shots = [&](auto element) {
      return rooms.one_shot ? f(element, ranks, std::true_type{})
                            : f(element, ranks, std::false_type{});
    };
    if (type == PeerType::kF32) return with_shots(float{});
    if (type == PeerType::kBF16) return with_shots(__nv_bfloat16{});
    return with_shots(__half{});
  });
}

std::int64_t part_vectors(const SumRooms& rooms, PeerType type, const PlainSum& sum) {
  const std::int64_t vectors = divide_up(sum.elements * element_bytes(type), 16);
  return rooms.one_shot ? vectors : divide_up(vectors, rooms.size);
}

struct RowShape {
  std::int64_t vectors;   ///< of a row
  std::int64_t per_rank;  ///< of what one rank adds up
  int cluster, per;
};
RowShape row_shape(const SumRooms& rooms, PeerType type, const NormSum& sum) {
  RowShape shape{sum.columns * element_bytes(type) / 16, 0, 1, 1};
  shape.per_rank = (rooms.one_shot ? sum.rows : divide_up(sum.rows, rooms.size)) * shape.vectors;
  while (shape.cluster < kClusterMax && shape.cluster * kThreads < shape.vectors)
    shape.cluster *= 2;
  shape.per = static_cast<int>(divide_up(shape.vectors, shape.cluster * kThreads));
  return shape;
}

}  // namespace

cudaError_t gather_columns(cudaStream_t stream, const SumRooms& rooms, const ColumnGather& gather) {
  const std::int64_t vectors = gather.rows * gather.row_bytes / 16;
  const std::int64_t blocks = std::min<std::int64_t>(divide_up(vectors, kThreads), kBlocksMax);
  return with_ranks(rooms, [&]<class Ranks>(Ranks) {
    return launch_early(stream, blocks, 0, columns_kernel<Ranks::value>, rooms, gather);
  });
}

bool sum_fits(const SumRooms& rooms, PeerType type, const PlainSum& sum) {
  return part_vectors(rooms, type, sum) * 16 * rooms.size <= kRoomBytes;
}

cudaError_t sum(cudaStream_t stream, PeerType type, const SumRooms& rooms, const PlainSum& sum) {
  const std::int64_t part = part_vectors(rooms, type, sum);
  const std::int64_t blocks = std::min<std::int64_t>(divide_up(part, kThreads), kBlocksMax);
  return with_choice(type, rooms, [&]<class T, class Ranks, class OneShot>(T, Ranks, OneShot) {
    return launch_early(stream, blocks, 0, sum_kernel<T, Ranks::value, OneShot::value>, rooms, sum,
                        part);
  });
}

bool norm_fits(const SumRooms& rooms, PeerType type, const NormSum& sum) {
  if (!is_hopper() || sum.columns * element_bytes(type) % 16 != 0 || sum.rows == 0) return false;
  const RowShape shape = row_shape(rooms, type, sum);
  return shape.per <= 2 && shape.per_rank * 16 * rooms.size <= kRoomBytes;
}

cudaError_t sum_and_norm(cudaStream_t stream, PeerType type, const SumRooms& rooms,
                         const NormSum& sum) {
  const RowShape shape = row_shape(rooms, type, sum);
  std::int64_t clusters = kBlocksMax / shape.cluster;
  clusters = std::min(clusters - clusters % rooms.size, sum.rows);
  return with_choice(type, rooms, [&]<class T, class Ranks, class OneShot>(T, Ranks, OneShot) {
    const auto kernel = shape.per == 1 ? norm_kernel<T, Ranks::value, OneShot::value, 1>
                                       : norm_kernel<T, Ranks::value, OneShot::value, 2>;
    return launch_early(stream, clusters * shape.cluster, shape.cluster, kernel, rooms, sum,
                        shape.per_rank);
  });
}

}  // namespace tandem::worker::comm
