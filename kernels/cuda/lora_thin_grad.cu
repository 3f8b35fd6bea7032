// dA += du^T x and dB += dy^T u: sums over all rows. A cluster takes a block of columns of x or dy,
// its blocks equal parts of the rows; the blocks' sums go straight to the gradients. A warp takes
// 32 columns; narrow matrices have fewer warps beside one another and more below.
#include "kernels/cuda/lora_thin.cuh"

namespace tandem::kernels::cuda {
namespace thin {
namespace {

namespace cg = cooperative_groups;

constexpr int kWarpColumns = 32, kWarpRows = 32;  ///< of one step
constexpr int kRowsPerBlock = 128;                ///< at least: the cluster's size

/// Shared memory: stages of [kRows, kWidth] of x or dy, each followed by [kRows, kCoefRow] of du
/// or u; then, in their place, sums [kBelow][kColumns, kWidth + 1] f32.
template <int kColumns, int kBeside>
struct Tiles {
  static constexpr int kBelow = kWarps / kBeside;
  static constexpr int kWidth = kWarpColumns * kBeside, kRows = kWarpRows * kBelow;
  static constexpr int kWide = kRows * kWidth;
  static constexpr int kCoefRow = kColumns + kChunk;
  static constexpr int kStage = kWide + kRows * kCoefRow;
  static constexpr int kSumRow = kWidth + 1, kSums = kColumns * kSumRow;
  static constexpr std::size_t kBytes =
      std::max<std::size_t>(sizeof(bf16_t) * kStages * kStage, sizeof(float) * kBelow * kSums);
};

/// Grid (cluster, blocks of columns, groups).
template <int kColumns, int kBeside>
__global__ void __launch_bounds__(kThreads, kColumns <= 64 ? 2 : 1)
    outer_kernel(const SegmentsView v, bool is_a, const bf16_t* wide, int width, bool by_site,
                 const bf16_t* coefficients) {
#if __CUDA_ARCH__ >= 900
  using T = Tiles<kColumns, kBeside>;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ LoraEntry entries[kSitesMax];
  auto* tiles = reinterpret_cast<bf16_t*>(memory);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const Group group = find_group(v, by_site, static_cast<int>(blockIdx.z));
  const SiteView& site = v.site[group.first];
  const int column_end = is_a ? width : site.n_begin + site.n;
  const int column0 = (is_a ? 0 : site.n_begin) + static_cast<int>(blockIdx.y) * T::kWidth;
  if (column0 >= column_end) return;
  if (tid < group.count) entries[tid] = find_entry(v, v.site[group.first + tid], v.slots[0]);
  __syncthreads();
  bool wanted = false;
  for (int s = 0; s < group.count; ++s)
    wanted = wanted || (entries[s].rank > 0 && (is_a ? entries[s].da : entries[s].db) != nullptr);
  if (!wanted) return;
  const int parts = static_cast<int>(gridDim.x), part = static_cast<int>(blockIdx.x);
  const int steps_all = (v.t + T::kRows - 1) / T::kRows;
  const int steps_part = (steps_all + parts - 1) / parts;
  const int first_step = part * steps_part;
  const int steps = max(0, min(steps_part, steps_all - first_step));
  const DropoutMask mask(v, site, width);
  const bool drops = is_a && mask.drops();

  const auto load = [&](int step) {
    if (step < steps) {
      bf16_t* tile = tiles + step % kStages * T::kStage;
      const int t0 = (first_step + step) * T::kRows;
#pragma unroll
      for (int e = tid; e < T::kWide / kChunk; e += kThreads) {
        const int row = e / (T::kWidth / kChunk), chunk = e % (T::kWidth / kChunk);
        const int at = column0 + chunk * kChunk;
        const bool inside = t0 + row < v.t && at < column_end;
        copy_16_async(tile + row * T::kWidth + swizzled(row, chunk),
                      wide + (inside ? static_cast<std::int64_t>(t0 + row) * width + at : 0),
                      inside);
      }
      for (int e = tid; e < T::kRows * kColumns / kChunk; e += kThreads) {
        const int row = e / (kColumns / kChunk), at = e % (kColumns / kChunk) * kChunk;
        const bool inside = t0 + row < v.t && at < group.columns;
        copy_16_async(
            tile + T::kWide + row * T::kCoefRow + at,
            coefficients +
                (inside ? static_cast<std::int64_t>(t0 + row) * v.columns + group.column + at : 0),
            inside);
      }
    }
    commit();
  };
  const auto drop = [&](int step) {  // what this thread copied
    bf16_t* tile = tiles + step % kStages * T::kStage;
    const int t0 = (first_step + step) * T::kRows;
    for (int e = tid; e < T::kWide / kChunk; e += kThreads) {
      const int row = e / (T::kWidth / kChunk), chunk = e % (T::kWidth / kChunk);
      drop_8(mask, t0 + row, column0 + chunk * kChunk,
             tile + row * T::kWidth + swizzled(row, chunk));
    }
  };

  const int beside = warp % kBeside, below = warp / kBeside;
  float sum[kColumns / 16][kWarpColumns / 8][4] = {};
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    wait<kStages - 2>();
    if (drops) drop(step);
    __syncthreads();
    load(step + kStages - 1);
    const bf16_t* tile = tiles + step % kStages * T::kStage;
    const bf16_t* factor = tile + T::kWide;
#pragma unroll
    for (int k = 0; k < kWarpRows; k += 16) {
      const int t = below * kWarpRows + k;
      std::uint32_t x[kWarpColumns / 16][4];
#pragma unroll
      for (int n = 0; n < kWarpColumns; n += 16) {
        const int row = t + lane % 16, chunk = (beside * kWarpColumns + n) / kChunk + lane / 16;
        load_matrices_transposed(x[n / 16], tile + row * T::kWidth + swizzled(row, chunk));
      }
#pragma unroll
      for (int c = 0; c < kColumns; c += 16) {
        std::uint32_t f[4];
        load_matrices_transposed(
            f, factor + (t + lane / 16 * 8 + lane % 8) * T::kCoefRow + c + lane / 8 % 2 * 8);
#pragma unroll
        for (int n = 0; n < kWarpColumns / 8; ++n)
          mma_bf16(sum[c / 16][n], f[0], f[1], f[2], f[3], x[n / 2][n % 2 * 2],
                   x[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
  wait<0>();
  __syncthreads();
  auto* sums = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int c = 0; c < kColumns; c += 8)
#pragma unroll
    for (int n = 0; n < kWarpColumns / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        sums[below * T::kSums + (c + lane / 4) * T::kSumRow + beside * kWarpColumns + 8 * n +
             lane % 4 * 2 + j] = sum[c / 16][n][c / 8 % 2 * 2 + j];
  const cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();
  const int share = T::kWidth / parts;
  for (int e = tid; e < share * group.columns; e += kThreads) {
    // Neighbouring threads write neighbouring elements: of dA along a row, of dB along the ranks.
    const int c = is_a ? e / share : e % group.columns;
    const int at = part * share + (is_a ? e % share : e / group.columns);
    const LoraEntry& entry = entries[c / v.rank_max];
    const int r = c % v.rank_max;
    float* grad = is_a ? entry.da : entry.db;
    if (column0 + at >= column_end || r >= entry.rank || grad == nullptr) continue;
    float total = 0.0f;
    for (int p = 0; p < parts; ++p) {
      const float* other = cluster.map_shared_rank(sums, static_cast<unsigned>(p));
#pragma unroll
      for (int b = 0; b < T::kBelow; ++b) total += other[b * T::kSums + c * T::kSumRow + at];
    }
    const std::int64_t n = column0 + at - (is_a ? 0 : site.n_begin);
    grad[is_a ? static_cast<std::int64_t>(r) * width + n : n * entry.rank + r] += total;
  }
  cluster.sync();  // a block's memory lives until the others have read it
#endif
}

template <int kColumns>
void outer(cudaStream_t stream, const SegmentsView& v, bool is_a, bool by_site, const Tensor& wide,
           const Tensor& coefficients) {
  int columns = 0;
  for (int s = 0; s < v.sites; ++s) columns = std::max(columns, v.site[s].n);
  if (is_a) columns = static_cast<int>(wide.dim(1));
  const unsigned cluster = cluster_size(v.t / kRowsPerBlock);
  const auto groups = static_cast<unsigned>(by_site ? v.sites : 1);
  const auto start = [&](auto kernel, int width, std::size_t bytes) {
    launch(stream, kernel,
           dim3(cluster, static_cast<unsigned>((columns + width - 1) / width), groups), cluster,
           bytes, v, is_a, wide.as<const bf16_t>(), static_cast<int>(wide.dim(1)), by_site,
           coefficients.as<const bf16_t>());
  };
  using Broad = Tiles<kColumns, 8>;
  using Narrow = Tiles<kColumns, 2>;
  if (columns >= 2048) return start(outer_kernel<kColumns, 8>, Broad::kWidth, Broad::kBytes);
  start(outer_kernel<kColumns, 2>, Narrow::kWidth, Narrow::kBytes);
}

void run(cudaStream_t stream, const ThinSites& sites, bool is_a, bool by_site, const Tensor& wide,
         const Tensor& coefficients) {
  if (wide.dim(0) == 0) return;
  const SegmentsView v = segments_view(sites.sites, 0, sites.rows, wide.dim(0));
  const int columns = by_site ? v.rank_max : v.columns;
  const auto pass = columns <= 16   ? outer<16>
                    : columns <= 32 ? outer<32>
                    : columns <= 48 ? outer<48>
                    : columns <= 64 ? outer<64>
                                    : outer<128>;
  TANDEM_CHECK_LE(columns, kThinColumnsMax);
  pass(stream, v, is_a, by_site, wide, coefficients);
}

}  // namespace
}  // namespace thin

void lora_thin_da(cudaStream_t stream, const ThinSites& sites, const Tensor& x, const Tensor& du) {
  thin::run(stream, sites, true, sites.rows.dropout > 0.0f || du.dim(1) > kThinColumnsMax, x, du);
}

void lora_thin_db(cudaStream_t stream, const ThinSites& sites, const Tensor& dy, const Tensor& u) {
  thin::run(stream, sites, false, true, dy, u);
}

}  // namespace tandem::kernels::cuda
