// u = s A x and du = s dy B. A cluster takes 128 rows, its blocks equal parts of the inner size;
// a warp takes 16 rows and all columns.
#include "kernels/cuda/lora_thin.cuh"

namespace tandem::kernels::cuda {
namespace thin {
namespace {

namespace cg = cooperative_groups;

constexpr int kRows = 16 * kWarps, kStep = 64;
constexpr int kInnerPerBlock = 512;  ///< at least: the cluster's size depends on nothing else

/// Shared memory: stages of [kRows, kStep] of x or dy, each followed by the factor's tile: of A
/// [kColumns, kStep], of B [kStep, kColumns + kChunk]; then, in its place, sums
/// [kRows, kColumns + 4] f32.
template <int kColumns>
struct Tiles {
  static constexpr int kWide = kRows * kStep;
  static constexpr int kBRow = kColumns + kChunk;
  static constexpr int kStage = kWide + kStep * kBRow;
  static constexpr int kSumRow = kColumns + 4;
  static constexpr std::size_t kBytes =
      std::max<std::size_t>(sizeof(bf16_t) * kStages * kStage, sizeof(float) * kRows * kSumRow);
};

/// Chunk of eight ranks of one row of B, or of eight inputs of one row of A; zeros for a null row
/// and from element `valid` on.
__device__ inline void copy_chunk(bf16_t* to, const bf16_t* row, int at, int valid, bool aligned) {
  const bool present = row != nullptr && at < valid;
  if (!present || (aligned && at + kChunk <= valid))
    return copy_16_async(to, present ? row + at : to, present);
  for (int j = 0; j < kChunk; ++j) to[j] = at + j < valid ? row[at + j] : bf16_t{};
}
__device__ inline bool is_aligned(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
}

/// The factor's tile for one step. Columns of A are inputs, rows of B are outputs.
template <int kColumns, bool kIsU>
__device__ inline void load_factor(const SegmentsView& v, const Group& group,
                                   const LoraEntry* entries, int k, int end, int width,
                                   bf16_t* tile) {
  if constexpr (kIsU) {
    for (int e = static_cast<int>(threadIdx.x); e < kColumns * kStep / kChunk; e += kThreads) {
      const int column = e / (kStep / kChunk), chunk = e % (kStep / kChunk);
      const int s = column / v.rank_max, r = column % v.rank_max;
      const bf16_t* row = nullptr;
      if (s < group.count && r < entries[s].rank)
        row = static_cast<const bf16_t*>(entries[s].a) + static_cast<std::int64_t>(r) * width;
      copy_chunk(tile + column * kStep + swizzled(column, chunk), row, k + chunk * kChunk, end,
                 is_aligned(row));
    }
  } else {
    const LoraEntry& entry = entries[0];
    const int n_begin = v.site[group.first].n_begin;
    for (int e = static_cast<int>(threadIdx.x); e < kStep * kColumns / kChunk; e += kThreads) {
      const int inner = e / (kColumns / kChunk), r = e % (kColumns / kChunk) * kChunk;
      const bf16_t* row = nullptr;
      if (k + inner < end)
        row = static_cast<const bf16_t*>(entry.b) +
              static_cast<std::int64_t>(k + inner - n_begin) * entry.rank;
      copy_chunk(tile + inner * Tiles<kColumns>::kBRow + r, row, r, entry.rank, is_aligned(row));
    }
  }
}

/// B or A of all sites as one matrix, by all threads of `blocks` blocks.
template <bool kIsU>
__device__ void gather(const SegmentsView& v, const LoraEntry* entries, int size, int block,
                       int blocks, bf16_t* out) {
  const int per_row = (kIsU ? v.columns : size) / kChunk;
  const int rows = kIsU ? size : v.columns;
  for (int e = block * kThreads + static_cast<int>(threadIdx.x); e < rows * per_row;
       e += blocks * kThreads) {
    const int row = e / per_row, at = e % per_row * kChunk;
    const int column = kIsU ? at : row, s = column / v.rank_max, r = column % v.rank_max;
    const LoraEntry& entry = entries[s];
    const bf16_t* from = nullptr;
    int valid = 0;  // elements from `from`
    if constexpr (kIsU) {
      const int n = row - v.site[s].n_begin;
      if (n >= 0 && n < v.site[s].n && r < entry.rank) {
        from = static_cast<const bf16_t*>(entry.b) + static_cast<std::int64_t>(n) * entry.rank + r;
        valid = min(kChunk, entry.rank - r);
      }
    } else if (r < entry.rank) {
      from = static_cast<const bf16_t*>(entry.a) + static_cast<std::int64_t>(r) * size + at;
      valid = kChunk;
    }
    uint4 bits{0, 0, 0, 0};
    if (valid == kChunk && is_aligned(from)) {
      bits = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int j = 0; j < valid; ++j) reinterpret_cast<bf16_t*>(&bits)[j] = from[j];
    }
    *reinterpret_cast<uint4*>(out + static_cast<std::int64_t>(row) * (kIsU ? v.columns : size) +
                              at) = bits;
  }
}

/// Grid (cluster, tiles of rows, groups and one more that gathers).
template <int kColumns, bool kIsU>
__global__ void __launch_bounds__(kThreads, kColumns <= 64 ? 2 : 1)
    contract_kernel(const SegmentsView v, const bf16_t* wide, int width, bool by_site, bf16_t* out,
                    int gather_size, bf16_t* gathered) {
#if __CUDA_ARCH__ >= 900
  using T = Tiles<kColumns>;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ LoraEntry entries[kSitesMax];
  auto* tiles = reinterpret_cast<bf16_t*>(memory);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const bool gathers = gathered != nullptr && blockIdx.z == gridDim.z - 1;
  const Group group = find_group(v, by_site && !gathers, static_cast<int>(blockIdx.z));
  launch_dependents();
  if (tid < group.count) entries[tid] = find_entry(v, v.site[group.first + tid], v.slots[0]);
  __syncthreads();
  wait_for_inputs();
  if (gathers) {
    gather<kIsU>(v, entries, gather_size, static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x),
                 static_cast<int>(gridDim.x * gridDim.y), gathered);
    return;
  }
  const SiteView& site = v.site[group.first];
  const int k_begin = kIsU ? 0 : site.n_begin, k_end = kIsU ? width : site.n_begin + site.n;
  const int parts = static_cast<int>(gridDim.x), part = static_cast<int>(blockIdx.x);
  const int steps_all = (k_end - k_begin + kStep - 1) / kStep;
  const int steps_part = (steps_all + parts - 1) / parts;
  const int first_step = part * steps_part;
  const int steps = max(0, min(steps_part, steps_all - first_step));
  const int row0 = static_cast<int>(blockIdx.y) * kRows;
  const DropoutMask mask(v, site, width);
  const bool drops = kIsU && mask.drops();

  const auto load = [&](int step) {
    if (step < steps) {
      bf16_t* tile = tiles + step % kStages * T::kStage;
      const int k = k_begin + (first_step + step) * kStep;
#pragma unroll
      for (int e = tid; e < T::kWide / kChunk; e += kThreads) {
        const int row = e / (kStep / kChunk), chunk = e % (kStep / kChunk);
        const int at = k + chunk * kChunk;
        const bool inside = row0 + row < v.t && at < k_end;
        copy_16_async(tile + row * kStep + swizzled(row, chunk),
                      wide + (inside ? static_cast<std::int64_t>(row0 + row) * width + at : 0),
                      inside);
      }
      load_factor<kColumns, kIsU>(v, group, entries, k, k_end, width, tile + T::kWide);
    }
    commit();
  };
  const auto drop = [&](int step) {  // what this thread copied
    bf16_t* tile = tiles + step % kStages * T::kStage;
    const int k = k_begin + (first_step + step) * kStep;
    for (int e = tid; e < T::kWide / kChunk; e += kThreads) {
      const int row = e / (kStep / kChunk), chunk = e % (kStep / kChunk);
      drop_8(mask, row0 + row, k + chunk * kChunk, tile + row * kStep + swizzled(row, chunk));
    }
  };

  float sum[kColumns / 8][4] = {};
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    wait<kStages - 2>();
    if (drops) drop(step);
    __syncthreads();
    load(step + kStages - 1);
    const bf16_t* tile = tiles + step % kStages * T::kStage;
    const bf16_t* factor = tile + T::kWide;
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      std::uint32_t x[4];
      const int row = warp * 16 + lane % 16;
      load_matrices(x, tile + row * kStep + swizzled(row, k / kChunk + lane / 16));
#pragma unroll
      for (int c = 0; c < kColumns; c += 16) {
        std::uint32_t f[4];
        if constexpr (kIsU) {
          const int column = c + lane / 16 * 8 + lane % 8;
          load_matrices(f, factor + column * kStep + swizzled(column, k / kChunk + lane / 8 % 2));
        } else {
          load_matrices_transposed(f, factor + (k + lane % 16) * T::kBRow + c + lane / 16 * 8);
        }
        mma_bf16(sum[c / 8], x[0], x[1], x[2], x[3], f[0], f[1]);
        mma_bf16(sum[c / 8 + 1], x[0], x[1], x[2], x[3], f[2], f[3]);
      }
    }
  }
  wait<0>();
  __syncthreads();
  auto* sums = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int c = 0; c < kColumns; c += 8)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<float2*>(sums + (warp * 16 + lane / 4 + 8 * half) * T::kSumRow + c +
                                 lane % 4 * 2) =
          make_float2(sum[c / 8][2 * half], sum[c / 8][2 * half + 1]);
  const cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();
  const int rows = kRows / parts, pairs = group.columns / 2;
  for (int e = tid; e < rows * pairs; e += kThreads) {
    const int row = part * rows + e / pairs, column = e % pairs * 2;
    if (row0 + row >= v.t) break;
    float2 total = make_float2(0.0f, 0.0f);
    for (int p = 0; p < parts; ++p) {
      const float2 other = *reinterpret_cast<const float2*>(
          cluster.map_shared_rank(sums, static_cast<unsigned>(p)) + row * T::kSumRow + column);
      total.x += other.x;
      total.y += other.y;
    }
    const float scale = entries[column / v.rank_max].scale;
    *reinterpret_cast<std::uint32_t*>(out + static_cast<std::int64_t>(row0 + row) * v.columns +
                                      group.column + column) =
        pack_bf16(scale * total.x, scale * total.y);
  }
  cluster.sync();  // a block's memory lives until the others have read it
#endif
}

template <int kColumns, bool kIsU>
void contract(cudaStream_t stream, const SegmentsView& v, bool by_site, const Tensor& wide,
              const Tensor& out, const Tensor& gathered) {
  int inner = 0;
  for (int s = 0; s < v.sites; ++s) inner = std::max(inner, v.site[s].n);
  if (kIsU) inner = static_cast<int>(wide.dim(1));
  const unsigned cluster = cluster_size(inner / kInnerPerBlock);
  const auto groups = static_cast<unsigned>(by_site ? v.sites : 1);
  const bool gathers = gathered.defined();
  launch(
      stream, contract_kernel<kColumns, kIsU>,
      dim3(cluster, static_cast<unsigned>((v.t + kRows - 1) / kRows), groups + (gathers ? 1 : 0)),
      cluster, Tiles<kColumns>::kBytes, v, wide.as<const bf16_t>(), static_cast<int>(wide.dim(1)),
      by_site, out.as<bf16_t>(), gathers ? static_cast<int>(gathered.dim(kIsU ? 0 : 1)) : 0,
      gathers ? gathered.as<bf16_t>() : nullptr);
}

template <bool kIsU>
void run(cudaStream_t stream, const ThinSites& sites, bool by_site, const Tensor& wide,
         const Tensor& out, const Tensor& gathered) {
  if (wide.dim(0) == 0) return;
  const SegmentsView v = segments_view(sites.sites, 0, sites.rows, wide.dim(0));
  const int columns = by_site ? v.rank_max : v.columns;
  const auto pass = columns <= 16   ? contract<16, kIsU>
                    : columns <= 32 ? contract<32, kIsU>
                    : columns <= 48 ? contract<48, kIsU>
                    : columns <= 64 ? contract<64, kIsU>
                                    : contract<128, kIsU>;
  TANDEM_CHECK_LE(columns, kThinColumnsMax);
  pass(stream, v, by_site, wide, out, gathered);
}

}  // namespace
}  // namespace thin

void lora_thin_u(cudaStream_t stream, const ThinSites& sites, const Tensor& x, const Tensor& u,
                 const Tensor& b) {
  thin::run<true>(stream, sites, sites.rows.dropout > 0.0f || u.dim(1) > kThinColumnsMax, x, u, b);
}

void lora_thin_du(cudaStream_t stream, const ThinSites& sites, const Tensor& dy, const Tensor& du,
                  const Tensor& a) {
  thin::run<false>(stream, sites, true, dy, du, a);
}

}  // namespace tandem::kernels::cuda
