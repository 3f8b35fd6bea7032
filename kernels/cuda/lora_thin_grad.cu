// dA += du^T x and dB += dy^T u: sums over all rows. A cluster takes neighbouring columns of x or
// dy, its blocks equal parts of the rows; the blocks' sums go straight to the gradients. Warpgroups
// multiply: their rows are ranks, sixteen a warp, from registers, times what passes, from shared
// memory. An x that nobody kept is made on the way, of what passes instead. So is the gradient of
// gate and up: a block takes the same columns of both, writes what it makes, and has at hand what
// gate and up made in forward, so that dA of the linear that read it costs no pass.
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/lora_thin.cuh"

namespace tandem::kernels::cuda {
namespace thin {
namespace {

namespace cg = cooperative_groups;

/// Of a block, at least, and of a part of them a multiple. Parts depend on nothing but rows and
/// columns, so that what is made on the way gives the bits of what is given.
constexpr int kRowsPerBlock = 128, kPartStep = 64;
constexpr unsigned kBlocksMost = 4;  ///< of a cluster; half as many where columns fill the device
constexpr int kManyColumns = 8192;

/// What passes: x or dy; the residual stream, times `rstd` of its row and `weight` of its column;
/// gate_up [T, 2 width]; or both and dout, of which dy is made, with or without the dA left to it.
enum class Made { kGiven, kNorm, kSiluMul, kGrad, kGradWithLeft };
template <class E>
struct Wide {
  const E* at;
  int width;  ///< of x or dy; of kGrad, of gate
  const E* weight = nullptr;
  const float* rstd = nullptr;
  const E* dout = nullptr;  ///< [T, width]
  E* dy = nullptr;          ///< [T, 2 width], which may be `at`'s memory
};

/// Shared memory: stages of wide tiles (x or dy; gate and up; and dout) as panels of [kRows, 64],
/// followed by each product's [kRows, kCoefRow] of du or u; then, in their place, each product's
/// sums [kColumns, kWidth + 1] f32.
template <int kColumns, Made kMade>
struct Tiles {
  static constexpr bool kLeft = kMade == Made::kGradWithLeft,
                        kGrads = kMade == Made::kGrad || kLeft;
  static constexpr int kProducts = kGrads ? 2 + kLeft : 1;
  static constexpr int kWarpgroups =
      std::max(2, kProducts);  ///< halves of the columns, or products
  static constexpr int kThreads = 128 * kWarpgroups;
  static constexpr int kWidth = kGrads && kColumns <= 64 ? 256 : 128;  ///< columns of a block
  static constexpr int kOwnPanels = kGrads ? kWidth / 64 : 1;          ///< of a warpgroup
  static constexpr int kRankTiles = (kColumns + 63) / 64;
  static constexpr int kWideTiles = kGrads ? 3 : kMade == Made::kSiluMul ? 2 : 1;
  static constexpr int kRows = kGrads ? 32 : 64;
  static constexpr int kPanel = kRows * 64, kTile = kRows * kWidth;
  static constexpr int kCoefRow = kColumns + kChunk, kCoef = kRows * kCoefRow;
  static constexpr int kCoefAt = kWideTiles * kTile;
  static constexpr int kStage = (kCoefAt + kProducts * kCoef + 511) / 512 * 512;
  static constexpr int kBlocks = kGrads || kColumns > 128 ? 1 : 2;  ///< a multiprocessor
  static constexpr int kStages = std::min(4, ((kBlocks == 1 ? 224 : 110) << 10) / (2 * kStage));
  static constexpr int kSumRow = kWidth + 1, kSums = kColumns * kSumRow;
  static constexpr std::size_t kBytes =
      1024 +
      std::max<std::size_t>(kElementBytes * kStages * kStage, sizeof(float) * kProducts * kSums);
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

/// Grid (cluster, blocks of columns, groups). kGrads: v has the sites of gate and up.
template <class E, int kColumns, Made kMade>
__global__ void __launch_bounds__(Tiles<kColumns, kMade>::kThreads, Tiles<kColumns, kMade>::kBlocks)
    outer_kernel(const SegmentsView v, bool is_a, const Wide<E> wide, bool by_site,
                 const E* coefficients, const Left<E> left) {
#ifdef TANDEM_HOPPER
  using T = Tiles<kColumns, kMade>;
  constexpr int kStages = T::kStages, kThreads = T::kThreads, kWidth = T::kWidth,
                kRowChunks = kWidth / kChunk;
  static_assert(kStages >= 2 && kThreads % kRowChunks == 0);  // a thread copies in one column
  const int width = wide.width;
  extern __shared__ __align__(128) unsigned char raw[];
  __shared__ LoraEntry entries[kSitesMax];
  unsigned char* memory = raw + (1024 - shared_address(raw) % 1024) % 1024;
  auto* tiles = reinterpret_cast<E*>(memory);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const Group group = find_group(v, by_site && !T::kGrads, static_cast<int>(blockIdx.z));
  const SiteView& site = v.site[group.first];
  const int begin = is_a || T::kGrads ? 0 : site.n_begin;  // of the columns in the wide rows
  const int columns = is_a || T::kGrads ? width : site.n;
  const int column0 = static_cast<int>(blockIdx.y) * kWidth;
  launch_dependents();
  if (tid < (T::kGrads ? T::kProducts : group.count))
    entries[tid] =
        find_entry(v, T::kLeft && tid == 2 ? left.site : v.site[group.first + tid], v.slots[0]);
  __syncthreads();
  wait_for_inputs();
  if (column0 >= columns) return;
  bool wanted = T::kGrads;
  for (int s = 0; !T::kGrads && s < group.count; ++s)
    wanted = wanted || (entries[s].rank > 0 && (is_a ? entries[s].da : entries[s].db) != nullptr);
  if (!wanted) return;
  const int parts = static_cast<int>(gridDim.x), part = static_cast<int>(blockIdx.x);
  const int steps_all = (v.t + T::kRows - 1) / T::kRows;
  const int steps_part =
      ((v.t + kPartStep - 1) / kPartStep + parts - 1) / parts * kPartStep / T::kRows;
  const int first_step = part * steps_part;
  const int steps = max(0, min(steps_part, steps_all - first_step));
  const DropoutMask mask(v, site, width);
  const bool drops = is_a && mask.drops();

  // What this thread copies of a step: one chunk of rows my_row + k * kRowStep.
  constexpr int kRowStep = kThreads / kRowChunks, kCopies = (T::kRows + kRowStep - 1) / kRowStep;
  const int my_chunk = tid % kRowChunks, my_row = tid / kRowChunks;
  const int my_column = column0 + my_chunk * kChunk;
  uint4 weight{};
  if (kMade == Made::kNorm && my_column < columns)
    weight = load_8(wide.weight, my_column, width,
                    reinterpret_cast<std::uintptr_t>(wide.weight) % 16 == 0);

  /// f(k, row of x, its chunk in the first tile) of what this thread copies.
  const auto each_copied = [&](int step, const auto& f) {
    E* tile = tiles + step % kStages * T::kStage + my_chunk / 8 * T::kPanel;
#pragma unroll
    for (int k = 0; k < kCopies; ++k) {
      const int row = my_row + k * kRowStep;
      if (T::kRows % kRowStep == 0 || row < T::kRows)
        f(k, (first_step + step) * T::kRows + row, tile + row * 64 + swizzled(row, my_chunk % 8));
    }
  };
  const auto load = [&](int step) {
    if (step < steps) {
      each_copied(step, [&](int, int t, E* to) {
        const bool inside = t < v.t && my_column < columns;
        const std::int64_t row = inside ? t : 0, at = begin + (inside ? my_column : 0);
        const E* from = wide.at + (T::kWideTiles > 1 ? 2 : 1) * row * width + at;
        copy_16_async(to, from, inside);
        if constexpr (T::kWideTiles > 1) copy_16_async(to + T::kTile, from + width, inside);
        if constexpr (T::kGrads)
          copy_16_async(to + 2 * T::kTile, wide.dout + row * width + at, inside);
      });
      E* coefs = tiles + step % kStages * T::kStage + T::kCoefAt;
      constexpr int kCoefChunks = kColumns / kChunk;
      for (int e = tid; e < T::kProducts * T::kRows * kCoefChunks; e += kThreads) {
        const int product = e / (T::kRows * kCoefChunks), row = e / kCoefChunks % T::kRows;
        const int c = e % kCoefChunks * kChunk, t = (first_step + step) * T::kRows + row;
        const bool of_left = T::kLeft && product == 2;
        const bool inside = t < v.t && c < (T::kGrads ? v.rank_max : group.columns);
        const int column = T::kGrads ? v.site[of_left ? 0 : product].column : group.column;
        const E* from =
            of_left ? left.du + (inside ? static_cast<std::int64_t>(t) * v.rank_max + c : 0)
                    : coefficients +
                          (inside ? static_cast<std::int64_t>(t) * v.columns + column + c : 0);
        copy_16_async(coefs + product * T::kCoef + row * T::kCoefRow + c, from, inside);
      }
    }
    commit();
  };
  const auto make_grad = [&](int t, E* tile) {
    uint4& gate = *reinterpret_cast<uint4*>(tile);
    uint4& up = *reinterpret_cast<uint4*>(tile + T::kTile);
    silu_mul_grad_8<E, T::kLeft>(*reinterpret_cast<uint4*>(tile + 2 * T::kTile), gate, up);
    if (t >= v.t || my_column >= columns) return;
    E* to = wide.dy + static_cast<std::int64_t>(t) * 2 * width + my_column;
    *reinterpret_cast<uint4*>(to) = gate;
    *reinterpret_cast<uint4*>(to + width) = up;
  };

  const int warpgroup = warp / 4, product = T::kGrads ? warpgroup : 0;
  const int first_panel = T::kGrads ? 0 : warpgroup, first_rank = warp % 4 * 16;
  float sum[T::kRankTiles][T::kOwnPanels][32] = {};
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    float rstd[kCopies];  // on its way beside the tile
    if constexpr (kMade == Made::kNorm)
      each_copied(step, [&](int k, int t, E*) { rstd[k] = t < v.t ? wide.rstd[t] : 0.0f; });
    wait<kStages - 2>();
    if constexpr (kMade != Made::kGiven)
      each_copied(step, [&](int k, int t, E* to) {
        uint4& x = *reinterpret_cast<uint4*>(to);
        if constexpr (kMade == Made::kNorm)
          x = norm_8<E>(x, rstd[k], weight);
        else if constexpr (T::kGrads)
          make_grad(t, to);
        else
          x = silu_mul_8<E>(x, *reinterpret_cast<const uint4*>(to + T::kTile));
      });
    if (drops) each_copied(step, [&](int, int t, E* x) { drop_8(mask, t, my_column, x); });
    fence_async();
    __syncthreads();
    const E* stage = tiles + step % kStages * T::kStage;
    const E* coef = stage + T::kCoefAt + product * T::kCoef;
    const std::uint32_t b = columns_operand(
        shared_address(stage + product * T::kTile + first_panel * T::kPanel), 2 * T::kPanel);
    std::uint32_t a[T::kRows / 16][T::kRankTiles][4] = {};
#pragma unroll
    for (int k = 0; k < T::kRows / 16; ++k)
#pragma unroll
      for (int m = 0; m < T::kRankTiles; ++m)
        if (const int c = 64 * m + first_rank; kColumns % 64 == 0 || c < kColumns)
          load_matrices_transposed(
              a[k][m],
              coef + (16 * k + lane / 16 * 8 + lane % 8) * T::kCoefRow + c + lane / 8 % 2 * 8);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < T::kRows / 16; ++k)
#pragma unroll
      for (int m = 0; m < T::kRankTiles; ++m)
#pragma unroll
        for (int p = 0; p < T::kOwnPanels; ++p)
          wgmma<E, 1>(sum[m][p], a[k][m], descriptor(b + (p * 2 * T::kPanel + k * 2048) / 16), 1);
    wgmma_commit();
    load(step + kStages - 1);
    wgmma_wait<0>();
#pragma unroll
    for (auto& of_tile : sum)
#pragma unroll
      for (auto& of_panel : of_tile) pin(of_panel);
  }
  wait<0>();
  __syncthreads();
  auto* sums = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int m = 0; m < T::kRankTiles; ++m)
#pragma unroll
    for (int p = 0; p < T::kOwnPanels; ++p)
#pragma unroll
      for (int e = 0; e < 32; ++e) {
        const int c = 64 * m + first_rank + lane / 4 + e % 4 / 2 * 8;
        const int at = (first_panel + p) * 64 + e / 4 * 8 + lane % 4 * 2 + e % 2;
        if (kColumns % 64 == 0 || c < kColumns)
          sums[product * T::kSums + c * T::kSumRow + at] = sum[m][p][e];
      }
  const cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();
  const int share = kWidth / parts, ranks = T::kGrads ? v.rank_max : group.columns;
  for (int all = tid; all < T::kProducts * share * ranks; all += kThreads) {
    const int of = all / (share * ranks), e = all % (share * ranks);
    const bool to_a = T::kGrads ? of == 2 : is_a;
    // Neighbouring threads write neighbouring elements: of dA along a row, of dB along the ranks.
    const int c = to_a ? e / share : e % ranks;
    const int at = part * share + (to_a ? e % share : e / ranks);
    const LoraEntry& entry = entries[T::kGrads ? of : c / v.rank_max];
    const int r = T::kGrads ? c : c % v.rank_max;
    float* grad = to_a ? entry.da : entry.db;
    if (column0 + at >= columns || r >= entry.rank || grad == nullptr) continue;
    float total = 0.0f;
    float other[kClusterMax];
#pragma unroll
    for (int p = 0; p < kClusterMax; ++p)
      if (p < parts)
        other[p] = cluster.map_shared_rank(
            sums, static_cast<unsigned>(p))[of * T::kSums + c * T::kSumRow + at];
#pragma unroll
    for (int p = 0; p < kClusterMax; ++p)
      if (p < parts) total += other[p];
    const std::int64_t n = column0 + at;
    grad[to_a ? static_cast<std::int64_t>(r) * width + n : n * entry.rank + r] += total;
  }
  cluster.sync();  // a block's memory lives until the others have read it
#endif
}

template <class E, int kColumns, Made kMade>
void outer(cudaStream_t stream, const SegmentsView& v, bool is_a, bool by_site, const Wide<E>& wide,
           const Tensor& coefficients, const Left<E>& left) {
  using T = Tiles<kColumns, kMade>;
  int columns = 0;
  for (int s = 0; s < v.sites; ++s) columns = std::max(columns, v.site[s].n);
  if (is_a || T::kGrads) columns = wide.width;
  const auto groups = static_cast<unsigned>(by_site && !T::kGrads ? v.sites : 1);
  const auto blocks = static_cast<unsigned>((columns + T::kWidth - 1) / T::kWidth);
  const unsigned most = columns >= kManyColumns ? kBlocksMost / 2 : kBlocksMost;
  const unsigned cluster = std::min(most, cluster_size(v.t / kRowsPerBlock));
  launch(stream, outer_kernel<E, kColumns, kMade>, dim3(cluster, blocks, groups), cluster,
         T::kBytes, static_cast<unsigned>(T::kThreads), v, is_a, wide, by_site,
         coefficients.as<const E>(), left);
}

template <Made kMade, class E>
void run(cudaStream_t stream, const ThinSites& sites, bool is_a, bool by_site, const Wide<E>& wide,
         const Tensor& coefficients, const Left<E>& left = {}) {
  if (coefficients.dim(0) == 0) return;
  constexpr bool kGrads = kMade == Made::kGrad || kMade == Made::kGradWithLeft;
  const SegmentsView v = segments_view(sites.sites, 0, sites.rows, coefficients.dim(0));
  const int columns = by_site || kGrads ? v.rank_max : v.columns;
  constexpr bool kWhole = kMade == Made::kGiven || kMade == Made::kNorm;
  with_columns<kWhole ? kThinColumnsMax : kThinMadeColumnsMax>(columns, [&]<int kColumns>() {
    outer<E, kColumns, kMade>(stream, v, is_a, by_site, wide, coefficients, left);
  });
}

}  // namespace
}  // namespace thin

void lora_thin_da(cudaStream_t stream, const ThinSites& sites, const Tensor& x,
                  const LinearInputRecipe& make_x, const Tensor& du) {
  const int most =
      x.defined() || make_x.norm.residual.defined() ? kThinColumnsMax : kThinMadeColumnsMax;
  const bool by_site = sites.rows.dropout > 0.0f || du.dim(1) > most;
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

void lora_thin_made_db(cudaStream_t stream, const ThinSites& sites,
                       const SiluMulBackwardArgs& make_dy, const LeftFactorGrad& left,
                       const Tensor& dy, const Tensor& u) {
  with_element(dy.dtype, [&]<class E>(E) {
    thin::Wide<E> wide{make_dy.gate_up.as<const E>(), static_cast<int>(dy.dim(1) / 2)};
    wide.dout = make_dy.dout.as<const E>();
    wide.dy = dy.as<E>();
    if (!left.du.defined())
      return thin::run<thin::Made::kGrad>(stream, sites, false, true, wide, u);
    thin::run<thin::Made::kGradWithLeft>(
        stream, sites, false, true, wide, u,
        thin::Left<E>{segments_view(left.sites, 0, sites.rows, dy.dim(0)).site[0],
                      left.du.as<const E>()});
  });
}

}  // namespace tandem::kernels::cuda
