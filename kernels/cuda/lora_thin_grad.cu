// dA += du^T x and dB += dy^T u: sums over all rows. A cluster takes a block of columns of x or dy,
// its blocks equal parts of the rows; the blocks' sums go straight to the gradients. A warp takes
// 32 columns; narrow matrices have fewer warps beside one another and more below. An x that nobody
// kept is made on the way, of what passes instead.
#include "kernels/cuda/lora_thin.cuh"

namespace tandem::kernels::cuda {
namespace thin {
namespace {

namespace cg = cooperative_groups;

constexpr int kWarpColumns = 32, kWarpRows = 32;  ///< of one step
constexpr int kRowsPerBlock = 128;                ///< at least: the cluster's size

/// What passes: x or dy; the residual stream, times `rstd` of its row and `weight` of its column;
/// or gate_up [T, 2 width].
enum class Made { kGiven, kNorm, kSiluMul };
template <class E>
struct Wide {
  const E* at;
  int width;  ///< of x or dy
  const E* weight = nullptr;
  const float* rstd = nullptr;
};

/// Shared memory: stages of [kRows, kWidth] of x or dy, or two of gate and up, each followed by
/// [kRows, kCoefRow] of du or u; then, in their place, sums [kBelow][kColumns, kWidth + 1] f32.
template <int kColumns, int kBeside, Made kMade>
struct Tiles {
  static constexpr bool kPair = kMade == Made::kSiluMul;
  static constexpr int kStages = kPair ? 3 : thin::kStages;  ///< two blocks a multiprocessor
  static constexpr int kBelow = kWarps / kBeside;
  static constexpr int kWidth = kWarpColumns * kBeside, kRows = kWarpRows * kBelow;
  static constexpr int kWide = kRows * kWidth;
  static constexpr int kCoefRow = kColumns + kChunk;
  static constexpr int kFactorAt = kPair ? 2 * kWide : kWide;
  static constexpr int kStage = kFactorAt + kRows * kCoefRow;
  static constexpr int kSumRow = kWidth + 1, kSums = kColumns * kSumRow;
  static constexpr std::size_t kBytes =
      std::max<std::size_t>(kElementBytes * kStages * kStage, sizeof(float) * kBelow * kSums);
};

/// Eight columns of x, rounded as the op rounds them.
template <class E>
__device__ inline uint4 norm_8(const uint4& residual, float rstd, const uint4& weight) {
  const auto one = [&](std::uint32_t x, std::uint32_t w) {
    return pack<E>(low_f32<E>(x) * rstd * low_f32<E>(w), high_f32<E>(x) * rstd * high_f32<E>(w));
  };
  return {one(residual.x, weight.x), one(residual.y, weight.y), one(residual.z, weight.z),
          one(residual.w, weight.w)};
}

/// Grid (cluster, blocks of columns, groups).
template <class E, int kColumns, int kBeside, Made kMade>
__global__ void __launch_bounds__(kThreads, kColumns <= 64 ? 2 : 1)
    outer_kernel(const SegmentsView v, bool is_a, const Wide<E> wide, bool by_site,
                 const E* coefficients) {
#if __CUDA_ARCH__ >= 900
  using T = Tiles<kColumns, kBeside, kMade>;
  constexpr int kStages = T::kStages, kRowChunks = T::kWidth / kChunk;
  constexpr int kCopies = T::kWide / kChunk / kThreads;  // of a step, by each thread
  static_assert(kThreads % kRowChunks == 0);             // in one column
  const int width = wide.width;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ LoraEntry entries[kSitesMax];
  auto* tiles = reinterpret_cast<E*>(memory);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const Group group = find_group(v, by_site, static_cast<int>(blockIdx.z));
  const SiteView& site = v.site[group.first];
  const int column_end = is_a ? width : site.n_begin + site.n;
  const int column0 = (is_a ? 0 : site.n_begin) + static_cast<int>(blockIdx.y) * T::kWidth;
  launch_dependents();
  if (tid < group.count) entries[tid] = find_entry(v, v.site[group.first + tid], v.slots[0]);
  __syncthreads();
  wait_for_inputs();
  if (column0 >= column_end) return;
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

  // What this thread copies of a step: one chunk of rows my_row + k * kRowStep.
  constexpr int kRowStep = kThreads / kRowChunks;
  const int my_chunk = tid % kRowChunks, my_row = tid / kRowChunks;
  const int my_column = column0 + my_chunk * kChunk;
  uint4 weight{};
  if (kMade == Made::kNorm && my_column < column_end)
    weight = load_8(wide.weight, my_column, width,
                    reinterpret_cast<std::uintptr_t>(wide.weight) % 16 == 0);

  const auto load = [&](int step) {
    if (step < steps) {
      E* tile = tiles + step % kStages * T::kStage;
      const int t0 = (first_step + step) * T::kRows;
#pragma unroll
      for (int k = 0; k < kCopies; ++k) {
        const int row = my_row + k * kRowStep;
        const bool inside = t0 + row < v.t && my_column < column_end;
        const std::int64_t before = inside ? static_cast<std::int64_t>(t0 + row) * width : 0;
        const E* from = wide.at + (T::kPair ? 2 * before : before) + (inside ? my_column : 0);
        E* to = tile + row * T::kWidth + swizzled(row, my_chunk);
        copy_16_async(to, from, inside);
        if (T::kPair) copy_16_async(to + T::kWide, from + (inside ? width : 0), inside);
      }
      for (int e = tid; e < T::kRows * kColumns / kChunk; e += kThreads) {
        const int row = e / (kColumns / kChunk), at = e % (kColumns / kChunk) * kChunk;
        const bool inside = t0 + row < v.t && at < group.columns;
        copy_16_async(
            tile + T::kFactorAt + row * T::kCoefRow + at,
            coefficients +
                (inside ? static_cast<std::int64_t>(t0 + row) * v.columns + group.column + at : 0),
            inside);
      }
    }
    commit();
  };
  const auto each_copied = [&](int step, const auto& f) {  // f(k, row of x, its chunk)
    E* tile = tiles + step % kStages * T::kStage;
#pragma unroll
    for (int k = 0; k < kCopies; ++k) {
      const int row = my_row + k * kRowStep;
      f(k, (first_step + step) * T::kRows + row, tile + row * T::kWidth + swizzled(row, my_chunk));
    }
  };

  const int beside = warp % kBeside, below = warp / kBeside;
  float sum[kColumns / 16][kWarpColumns / 8][4] = {};
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    float rstd[kCopies];  // on its way beside the tile
    if constexpr (kMade == Made::kNorm)
      each_copied(step, [&](int k, int t, E*) { rstd[k] = t < v.t ? wide.rstd[t] : 0.0f; });
    wait<kStages - 2>();
    if constexpr (kMade != Made::kGiven)
      each_copied(step, [&](int k, int, E* to) {
        uint4& x = *reinterpret_cast<uint4*>(to);
        if constexpr (kMade == Made::kNorm)
          x = norm_8<E>(x, rstd[k], weight);
        else
          x = silu_mul_8<E>(x, *reinterpret_cast<const uint4*>(to + T::kWide));
      });
    if (drops) each_copied(step, [&](int, int t, E* x) { drop_8(mask, t, my_column, x); });
    __syncthreads();
    load(step + kStages - 1);
    const E* tile = tiles + step % kStages * T::kStage;
    const E* factor = tile + T::kFactorAt;
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
          mma<E>(sum[c / 16][n], f[0], f[1], f[2], f[3], x[n / 2][n % 2 * 2],
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

template <class E, int kColumns, Made kMade>
void outer(cudaStream_t stream, const SegmentsView& v, bool is_a, bool by_site, const Wide<E>& wide,
           const Tensor& coefficients) {
  int columns = 0;
  for (int s = 0; s < v.sites; ++s) columns = std::max(columns, v.site[s].n);
  if (is_a) columns = wide.width;
  const unsigned cluster = cluster_size(v.t / kRowsPerBlock);
  const auto groups = static_cast<unsigned>(by_site ? v.sites : 1);
  const auto start = [&](auto kernel, int width, std::size_t bytes) {
    launch(stream, kernel,
           dim3(cluster, static_cast<unsigned>((columns + width - 1) / width), groups), cluster,
           bytes, v, is_a, wide, by_site, coefficients.as<const E>());
  };
  using Broad = Tiles<kColumns, 8, kMade>;
  using Narrow = Tiles<kColumns, 2, kMade>;
  if (columns >= 2048)
    return start(outer_kernel<E, kColumns, 8, kMade>, Broad::kWidth, Broad::kBytes);
  start(outer_kernel<E, kColumns, 2, kMade>, Narrow::kWidth, Narrow::kBytes);
}

template <Made kMade, class E>
void run(cudaStream_t stream, const ThinSites& sites, bool is_a, bool by_site, const Wide<E>& wide,
         const Tensor& coefficients) {
  if (coefficients.dim(0) == 0) return;
  const SegmentsView v = segments_view(sites.sites, 0, sites.rows, coefficients.dim(0));
  const int columns = by_site ? v.rank_max : v.columns;
  const auto pass = columns <= 16   ? outer<E, 16, kMade>
                    : columns <= 32 ? outer<E, 32, kMade>
                    : columns <= 48 ? outer<E, 48, kMade>
                    : columns <= 64 ? outer<E, 64, kMade>
                                    : outer<E, 128, kMade>;
  TANDEM_CHECK_LE(columns, kThinColumnsMax);
  pass(stream, v, is_a, by_site, wide, coefficients);
}

}  // namespace
}  // namespace thin

void lora_thin_da(cudaStream_t stream, const ThinSites& sites, const Tensor& x,
                  const LinearInputRecipe& make_x, const Tensor& du) {
  const bool by_site = sites.rows.dropout > 0.0f || du.dim(1) > kThinColumnsMax;
  const AddRmsNormArgs& norm = make_x.norm;
  with_element(du.dtype, [&]<class E>(E) {
    thin::Wide<E> wide{static_cast<const E*>(x.data), static_cast<int>(x.dim(1))};
    if (x.defined()) return thin::run<thin::Made::kGiven>(stream, sites, true, by_site, wide, du);
    if (norm.residual.defined()) {
      wide.at = norm.residual.as<const E>();
      wide.weight = norm.weight.as<const E>();
      wide.rstd = norm.rstd.as<const float>();
      return thin::run<thin::Made::kNorm>(stream, sites, true, by_site, wide, du);
    }
    wide.at = make_x.silu_mul.gate_up.as<const E>();
    thin::run<thin::Made::kSiluMul>(stream, sites, true, by_site, wide, du);
  });
}

void lora_thin_db(cudaStream_t stream, const ThinSites& sites, const Tensor& dy, const Tensor& u) {
  with_element(dy.dtype, [&]<class E>(E) {
    const thin::Wide<E> wide{dy.as<const E>(), static_cast<int>(dy.dim(1))};
    thin::run<thin::Made::kGiven>(stream, sites, false, true, wide, u);
  });
}

}  // namespace tandem::kernels::cuda
