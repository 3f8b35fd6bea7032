// u = s A x and du = s dy B. A cluster takes 128 rows, its blocks equal parts of the inner size; a
// warp takes 16 rows and all columns, of 64 columns and more a warpgroup 64 rows. Where x is
// silu(gate) * up, the pass for u can make it: of gate and up, which pass instead; it is written
// before it is multiplied. Some blocks take two parts of half the rows side by side: of such
// clusters, half as large, a Hopper GPU holds as many as 4,096 rows make, and no sum is cut
// otherwise.
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/lora_thin.cuh"

namespace tandem::kernels::cuda {
namespace thin {
namespace {

namespace cg = cooperative_groups;

constexpr int kRows = 16 * kWarps, kStep = 64;
constexpr int kInnerPerPart = 512;  ///< at least: their number depends on nothing else

/// What passes: x; gate and up, of which x is made; or dy.
enum class Pass { kX, kMadeX, kDy };

/// Shared memory: stages of [kParts][kTileRows, kStep] of x or dy, or two of gate and up, each
/// followed by the factor's tiles: of A [kParts][kColumns, kStep], of B [kStep, kColumns + kChunk],
/// for warpgroups panels of [kStep, 64]; then, in its place, sums [kParts][kTileRows, kColumns + 4]
/// f32.
template <int kColumns, Pass kPass>
struct Tiles {
  static constexpr bool kMakes = kPass == Pass::kMadeX;
  static constexpr bool kWarpgroups = kColumns >= 64;  ///< warpgroups multiply, 64 rows each
  static constexpr int kBlocks = kColumns <= (kMakes ? 32 : 128) ? 2 : 1;  ///< a multiprocessor
  static constexpr int kStages = kColumns > 64 || (kMakes && kBlocks == 2) ? 3 : 4;
  /// Of the inner size.
  static constexpr int kParts =
      (kMakes && (kColumns <= 16 || kWarpgroups)) || kColumns > 128 ? 2 : 1;
  /// Of all blocks; the same whether x is made or given, whose bits are then the same.
  static constexpr unsigned kPartsMost = kWarpgroups ? 4 : kClusterMax;
  static constexpr int kTileRows = kRows / kParts;
  static constexpr int kWide = kRows * kStep;
  static constexpr int kBRow = kColumns + kChunk;
  static constexpr int kFactorAt = kMakes ? 2 * kWide : kWide;
  static constexpr int kStage =
      kFactorAt + kStep * (kPass == Pass::kDy && !kWarpgroups ? kBRow : kParts * kColumns);
  static constexpr int kSumRow = kColumns + 4;
  static constexpr std::size_t kBytes =
      std::max<std::size_t>(kElementBytes * kStages * kStage, sizeof(float) * kRows * kSumRow) +
      (kWarpgroups ? 1024 : 0);  ///< panels start on it
};

/// Chunk of eight ranks of one row of B, or of eight inputs of one row of A; zeros for a null row
/// and from element `valid` on.
template <class E>
__device__ inline void copy_chunk(E* to, const E* row, int at, int valid, bool aligned) {
  const bool present = row != nullptr && at < valid;
  if (!present || (aligned && at + kChunk <= valid))
    return copy_16_async(to, present ? row + at : to, present);
  for (int j = 0; j < kChunk; ++j) to[j] = at + j < valid ? row[at + j] : E{};
}
__device__ inline bool is_aligned(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
}

/// The factor's tile for one step, `part` further on for each further part. Columns of A are
/// inputs, rows of B are outputs.
template <int kColumns, Pass kPass, class E>
__device__ inline void load_factor(const SegmentsView& v, const Group& group,
                                   const LoraEntry* entries, int first, int part, int end,
                                   int width, E* tiles) {
  using T = Tiles<kColumns, kPass>;
  constexpr int kTile = kColumns * kStep;
  if constexpr (kPass != Pass::kDy) {
    for (int all = static_cast<int>(threadIdx.x); all < T::kParts * kTile / kChunk;
         all += kThreads) {
      const int e = all % (kTile / kChunk), k = first + all / (kTile / kChunk) * part;
      E* tile = tiles + all / (kTile / kChunk) * kTile;
      const int column = e / (kStep / kChunk), chunk = e % (kStep / kChunk);
      const int s = column / v.rank_max, r = column % v.rank_max;
      const E* row = nullptr;
      if (s < group.count && r < entries[s].rank)
        row = static_cast<const E*>(entries[s].a) + static_cast<std::int64_t>(r) * width;
      copy_chunk(tile + column * kStep + swizzled(column, chunk), row, k + chunk * kChunk, end,
                 is_aligned(row));
    }
  } else {
    const LoraEntry& entry = entries[0];
    const int n_begin = v.site[group.first].n_begin;
    for (int e = static_cast<int>(threadIdx.x); e < kTile / kChunk; e += kThreads) {
      const int inner = e / (kColumns / kChunk), r = e % (kColumns / kChunk) * kChunk;
      const E* row = nullptr;
      if (first + inner < end)
        row = static_cast<const E*>(entry.b) +
              static_cast<std::int64_t>(first + inner - n_begin) * entry.rank;
      E* to = T::kWarpgroups
                  ? tiles + r / 64 * kStep * 64 + inner * 64 + swizzled(inner, r % 64 / kChunk)
                  : tiles + inner * T::kBRow + r;
      copy_chunk(to, row, r, entry.rank, is_aligned(row));
    }
  }
}

/// B or A of all sites as one matrix, by all threads of `blocks` blocks.
template <bool kIsU, class E>
__device__ void gather(const SegmentsView& v, const LoraEntry* entries, int size, int block,
                       int blocks, E* out) {
  const int per_row = (kIsU ? v.columns : size) / kChunk;
  const int rows = kIsU ? size : v.columns;
  for (int e = block * kThreads + static_cast<int>(threadIdx.x); e < rows * per_row;
       e += blocks * kThreads) {
    const int row = e / per_row, at = e % per_row * kChunk;
    const int column = kIsU ? at : row, s = column / v.rank_max, r = column % v.rank_max;
    const LoraEntry& entry = entries[s];
    const E* from = nullptr;
    int valid = 0;  // elements from `from`
    if constexpr (kIsU) {
      const int n = row - v.site[s].n_begin;
      if (n >= 0 && n < v.site[s].n && r < entry.rank) {
        from = static_cast<const E*>(entry.b) + static_cast<std::int64_t>(n) * entry.rank + r;
        valid = min(kChunk, entry.rank - r);
      }
    } else if (r < entry.rank) {
      from = static_cast<const E*>(entry.a) + static_cast<std::int64_t>(r) * size + at;
      valid = kChunk;
    }
    uint4 bits{0, 0, 0, 0};
    if (valid == kChunk && is_aligned(from)) {
      bits = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int j = 0; j < valid; ++j) reinterpret_cast<E*>(&bits)[j] = from[j];
    }
    *reinterpret_cast<uint4*>(out + static_cast<std::int64_t>(row) * (kIsU ? v.columns : size) +
                              at) = bits;
  }
}

#ifdef TANDEM_HOPPER
/// sum [64, kColumns] += a warpgroup's 64 rows of `tile` times the factor's tile.
template <class E, int kColumns, Pass kPass>
__device__ inline void multiply_step(float (&sum)[kColumns / 64][32], std::uint32_t rows,
                                     std::uint32_t factor) {
  constexpr bool kIsB = kPass == Pass::kDy;
  constexpr int kPanel = kStep * 64 * kElementBytes;  // of the factor: 64 ranks
  const std::uint32_t a = rows_operand(rows);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kStep / 16; ++k)
#pragma unroll
    for (int c = 0; c < kColumns / 64; ++c) {
      const std::uint32_t panel = factor + c * kPanel;
      const std::uint32_t b =
          kIsB ? columns_operand(panel, kPanel) + k * 2048 / 16 : rows_operand(panel) + k * 2;
      wgmma<E, kIsB>(sum[c], descriptor(a + k * 2), descriptor(b), 1);
    }
  wgmma_commit();
}
#endif

/// x or dy [T, width]; or gate_up [T, 2 width], and where the x goes that is made of it.
template <class E>
struct Wide {
  const E* at;
  int width;
  E* made = nullptr;
};

/// Grid (cluster, tiles of rows, groups and one more that gathers); an x is made in one group.
/// `parts` of the inner size over a cluster.
template <class E, int kColumns, Pass kPass>
__global__ void __launch_bounds__(kThreads, Tiles<kColumns, kPass>::kBlocks)
    contract_kernel(const SegmentsView v, const Wide<E> wide, int parts, bool by_site, E* out,
                    int gather_size, E* gathered) {
#ifdef TANDEM_HOPPER
  using T = Tiles<kColumns, kPass>;
  constexpr bool kIsU = kPass != Pass::kDy;
  constexpr int kStages = T::kStages;
  const int width = wide.width;
  extern __shared__ __align__(128) unsigned char raw[];
  __shared__ LoraEntry entries[kSitesMax];
  unsigned char* memory = raw;
  if constexpr (T::kWarpgroups) memory += (1024 - shared_address(raw) % 1024) % 1024;
  auto* tiles = reinterpret_cast<E*>(memory);
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
  const int steps_all = (k_end - k_begin + kStep - 1) / kStep;
  const int steps_part = (steps_all + parts - 1) / parts;
  // Of this block's first part; the second one's end, where they are fewer, is zeros.
  const int first_step = static_cast<int>(blockIdx.x) * T::kParts * steps_part;
  const int steps = max(0, min(steps_part, steps_all - first_step));
  const int row0 = static_cast<int>(blockIdx.y) * T::kTileRows;
  const DropoutMask mask(v, site, width);
  const bool drops = kIsU && mask.drops();

  /// f(row, column, place in its tile) of a chunk that this thread copies: one of every kRowStep-th
  /// row.
  constexpr int kRowStep = kThreads / (kStep / kChunk);
  const int my_row = tid / (kStep / kChunk), my_chunk = tid % (kStep / kChunk);
  const auto chunk = [&](int step, int k, const auto& f) {
    const int row = my_row + k * kRowStep, part = row / T::kTileRows;
    const int first = k_begin + (first_step + part * steps_part + step) * kStep;
    f(row0 + row % T::kTileRows, first + my_chunk * kChunk,
      tiles + step % kStages * T::kStage + row * kStep + swizzled(row, my_chunk));
  };
  const auto each_chunk = [&](int step, const auto& f) {
#pragma unroll
    for (int k = 0; k < kRows / kRowStep; ++k) chunk(step, k, f);
  };
  const auto load = [&](int step) {
    if (step < steps) {
      each_chunk(step, [&](int row, int at, E* to) {
        const bool inside = row < v.t && at < k_end;
        const std::int64_t before = inside ? static_cast<std::int64_t>(row) * width : 0;
        const E* from = wide.at + (T::kMakes ? 2 * before : before) + (inside ? at : 0);
        copy_16_async(to, from, inside);
        if constexpr (T::kMakes) copy_16_async(to + T::kWide, from + (inside ? width : 0), inside);
      });
      load_factor<kColumns, kPass>(v, group, entries, k_begin + (first_step + step) * kStep,
                                   steps_part * kStep, k_end, width,
                                   tiles + step % kStages * T::kStage + T::kFactorAt);
    }
    commit();
  };
  /// x of a step, in gate's tile and in memory.
  const auto make = [&](int step) {
    each_chunk(step, [&](int row, int at, E* tile) {
      uint4& x = *reinterpret_cast<uint4*>(tile);
      x = silu_mul_8<E>(x, *reinterpret_cast<const uint4*>(tile + T::kWide));
      if (row < v.t && at < k_end)
        *reinterpret_cast<uint4*>(wide.made + static_cast<std::int64_t>(row) * width + at) = x;
    });
  };
  const auto drop = [&](int step) {
#pragma unroll 1  // few registers
    for (int k = 0; k < kRows / kRowStep; ++k)
      chunk(step, k, [&](int row, int at, E* x) { drop_8(mask, row, at, x); });
  };

  constexpr int kTogether = T::kWarpgroups ? 64 : 8;  // columns
  float sum[kColumns / kTogether][kTogether / 2] = {};
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    wait<kStages - 2>();
    if constexpr (T::kMakes) make(step);
    if (drops) drop(step);
    if constexpr (T::kWarpgroups) fence_async();
    __syncthreads();
    const E* tile = tiles + step % kStages * T::kStage;
    const E* factor =
        tile + T::kFactorAt + warp * 16 / T::kTileRows * (kColumns * kStep);  // of the warp's part
    if constexpr (T::kWarpgroups) {
      multiply_step<E, kColumns, kPass>(sum, shared_address(tile + warp / 4 * 64 * kStep),
                                        shared_address(factor));
      load(step + kStages - 1);
      wgmma_wait<0>();
      for (auto& of_columns : sum) pin(of_columns);
    } else {
      load(step + kStages - 1);
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
          mma<E>(sum[c / 8], x[0], x[1], x[2], x[3], f[0], f[1]);
          mma<E>(sum[c / 8 + 1], x[0], x[1], x[2], x[3], f[2], f[3]);
        }
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
          make_float2(sum[c / kTogether][c % kTogether / 2 + 2 * half],
                      sum[c / kTogether][c % kTogether / 2 + 2 * half + 1]);
  const cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();
  const int rows = T::kTileRows / static_cast<int>(gridDim.x), pairs = group.columns / 2;
  for (int e = tid; e < rows * pairs; e += kThreads) {
    const int row = static_cast<int>(blockIdx.x) * rows + e / pairs, column = e % pairs * 2;
    if (row0 + row >= v.t) break;
    float2 total = make_float2(0.0f, 0.0f);
    float2 other[kClusterMax];
#pragma unroll
    for (int p = 0; p < kClusterMax; ++p)
      if (p < parts)
        other[p] = *reinterpret_cast<const float2*>(
            cluster.map_shared_rank(sums, static_cast<unsigned>(p / T::kParts)) +
            (p % T::kParts * T::kTileRows + row) * T::kSumRow + column);
#pragma unroll
    for (int p = 0; p < kClusterMax; ++p)
      if (p < parts) total.x += other[p].x, total.y += other[p].y;
    const float scale = entries[column / v.rank_max].scale;
    *reinterpret_cast<std::uint32_t*>(out + static_cast<std::int64_t>(row0 + row) * v.columns +
                                      group.column + column) =
        pack<E>(scale * total.x, scale * total.y);
  }
  cluster.sync();  // a block's memory lives until the others have read it
#endif
}

template <class E, int kColumns, Pass kPass>
void contract(cudaStream_t stream, const SegmentsView& v, bool by_site, const Wide<E>& wide,
              const Tensor& out, const Tensor& gathered) {
  constexpr bool kIsU = kPass != Pass::kDy;
  int inner = 0;
  for (int s = 0; s < v.sites; ++s) inner = std::max(inner, v.site[s].n);
  if (kIsU) inner = wide.width;
  using T = Tiles<kColumns, kPass>;
  const unsigned parts = std::min(cluster_size(inner / kInnerPerPart), T::kPartsMost);
  const unsigned cluster = std::max(1U, parts / T::kParts);
  const auto groups = static_cast<unsigned>(by_site ? v.sites : 1);
  TANDEM_CHECK(kPass != Pass::kMadeX || groups == 1, groups, " passes would make x");
  const bool gathers = gathered.defined();
  launch(stream, contract_kernel<E, kColumns, kPass>,
         dim3(cluster, static_cast<unsigned>((v.t + T::kTileRows - 1) / T::kTileRows),
              groups + (gathers ? 1 : 0)),
         cluster, T::kBytes, kThreads, v, wide, static_cast<int>(parts), by_site, out.as<E>(),
         gathers ? static_cast<int>(gathered.dim(kIsU ? 0 : 1)) : 0,
         gathers ? gathered.as<E>() : nullptr);
}

template <Pass kPass, class E>
void run(cudaStream_t stream, const ThinSites& sites, bool by_site, const Wide<E>& wide,
         const Tensor& out, const Tensor& gathered) {
  if (out.dim(0) == 0) return;
  const SegmentsView v = segments_view(sites.sites, 0, sites.rows, out.dim(0));
  const int columns = by_site ? v.rank_max : v.columns;
  with_columns<kPass == Pass::kX ? kThinColumnsMax : kThinMadeColumnsMax>(
      columns, [&]<int kColumns>() {
        contract<E, kColumns, kPass>(stream, v, by_site, wide, out, gathered);
      });
}

template <class E>
Wide<E> given(const Tensor& x) {
  return {x.as<const E>(), static_cast<int>(x.dim(1))};
}

}  // namespace
}  // namespace thin

void lora_thin_u(cudaStream_t stream, const ThinSites& sites, const SiluMulArgs& make_x,
                 const Tensor& x, const Tensor& u, const Tensor& b) {
  const bool by_site = sites.rows.dropout > 0.0f || u.dim(1) > kThinColumnsMax;
  with_element(u.dtype, [&]<class E>(E) {
    thin::Wide<E> wide = thin::given<E>(x);
    if (!make_x.gate_up.defined())
      return thin::run<thin::Pass::kX>(stream, sites, by_site, wide, u, b);
    wide.at = make_x.gate_up.as<const E>();
    wide.made = x.as<E>();
    thin::run<thin::Pass::kMadeX>(stream, sites, by_site, wide, u, b);
  });
}

void lora_thin_du(cudaStream_t stream, const ThinSites& sites, const Tensor& dy, const Tensor& du,
                  const Tensor& a) {
  with_element(dy.dtype, [&]<class E>(E) {
    thin::run<thin::Pass::kDy>(stream, sites, true, thin::given<E>(dy), du, a);
  });
}

}  // namespace tandem::kernels::cuda
