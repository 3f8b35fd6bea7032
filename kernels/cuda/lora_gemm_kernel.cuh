// Private to lora_gemm*.cu: the kernel of lora_gemm.h as CUTLASS builds it for Hopper, one template
// for every tile. The low-rank columns are further k-tiles of the same mainloop, read through
// descriptors of their own; what TMA reads beyond their end is zero.
#pragma once

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/lora_gemm.h"

#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

namespace tandem::kernels::cuda::lora_gemm {

constexpr int kTileK = 64;
inline int k_tiles(std::int64_t k) {
  return static_cast<int>((k + kTileK - 1) / kTileK);
}

/// The library's mainloop run twice into one accumulator: over a and b, then over u and c. The
/// kernel is told an inner size of kTileK times the tiles of both.
template <class Base>
struct ExtendedMainloop : Base {
  struct Arguments {
    typename Base::Arguments main, extension;
    int k, r;
  };
  struct Params : Base::Params {
    typename Base::Params extension;
    int main_tiles;
  };

  template <class Problem>
  static Params to_underlying_arguments(Problem problem, const Arguments& args, void*) {
    cute::get<2>(problem) = args.k;
    const auto main = Base::to_underlying_arguments(problem, args.main, nullptr);
    if (args.r == 0) return {main, main, k_tiles(args.k)};
    cute::get<2>(problem) = args.r;
    return {main, Base::to_underlying_arguments(problem, args.extension, nullptr), k_tiles(args.k)};
  }
  template <class Problem>
  static bool can_implement(Problem problem, const Arguments& args) {
    cute::get<2>(problem) = args.k;
    if (!Base::can_implement(problem, args.main)) return false;
    if (args.r == 0) return true;
    cute::get<2>(problem) = args.r;
    return Base::can_implement(problem, args.extension);
  }
  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    Base::prefetch_tma_descriptors(params);
    Base::prefetch_tma_descriptors(params.extension);
  }
  template <class Pipeline, class State, class Inputs, class Block, class Iterator, class Storage>
  CUTLASS_DEVICE void load(const Params& params, Pipeline pipeline, State state,
                           const Inputs& inputs, const Block& block, Iterator iterator, int count,
                           int thread, std::uint32_t block_rank, Storage& storage) {
    Base::load(params, pipeline, state, inputs, block, iterator, params.main_tiles, thread,
               block_rank, storage);
    state.advance(static_cast<std::uint32_t>(params.main_tiles));
    Base::load(params.extension, pipeline, state, inputs, block, iterator,
               count - params.main_tiles, thread, block_rank, storage);
  }
};

/// kBRows: b [K, N] as stored (input gradient); else b is the transposed view of [N, K].
template <class Element, int kTileM, int kTileN, bool kPingpong, bool kBRows>
struct Kernel {
  using LayoutA = cutlass::layout::RowMajor;
  using LayoutB =
      cute::conditional_t<kBRows, cutlass::layout::RowMajor, cutlass::layout::ColumnMajor>;
  using Tile = cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>, cute::Int<kTileK>>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using EpilogueSchedule = cute::conditional_t<kPingpong, cutlass::epilogue::TmaWarpSpecialized,
                                               cutlass::epilogue::TmaWarpSpecializedCooperative>;
  using MainloopSchedule =
      cute::conditional_t<kPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                          cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
  using Bias = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, Element, float>;
  using Plus = cutlass::epilogue::fusion::Sm90Compute<cutlass::plus, Element, float,
                                                      cutlass::FloatRoundStyle::round_to_nearest>;
  using Fusion =
      cutlass::epilogue::fusion::Sm90EVT<Plus, Bias, cutlass::epilogue::fusion::Sm90AccFetch>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void,
      cutlass::layout::RowMajor, 8, Element, cutlass::layout::RowMajor, 8, EpilogueSchedule,
      Fusion>::CollectiveOp;
  using Mainloop = ExtendedMainloop<typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA, 8, Element, LayoutB, 8,
      float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      MainloopSchedule>::CollectiveOp>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>>;

  static typename Gemm::Arguments arguments(const Product& p, const Tiling& tiling) {
    const auto stride_b = [](std::int64_t ld) {
      if constexpr (kBRows)
        return cute::make_stride(cute::_1{}, ld, std::int64_t{0});
      else
        return cute::make_stride(ld, cute::_1{}, std::int64_t{0});
    };
    const auto stride_rows = [](std::int64_t ld) {
      return cute::make_stride(ld, cute::_1{}, std::int64_t{0});
    };
    const auto pointer = [](const Matrix& m) { return static_cast<const Element*>(m.data); };
    const int k = static_cast<int>(p.a.columns), r = static_cast<int>(p.u.columns);
    typename Gemm::Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = {static_cast<int>(p.out.rows), static_cast<int>(p.out.columns),
                          kTileK * (k_tiles(k) + k_tiles(r)), 1};
    args.mainloop = {{pointer(p.a), stride_rows(p.a.ld), pointer(p.b), stride_b(p.b.ld)},
                     {pointer(p.u), stride_rows(p.u.ld), pointer(p.c), stride_b(p.c.ld)},
                     k,
                     r};
    args.epilogue.thread = {{static_cast<const Element*>(p.bias)}, {}, {}};
    args.epilogue.ptr_D = static_cast<Element*>(const_cast<void*>(p.out.data));
    args.epilogue.dD = stride_rows(p.out.ld);
    args.hw_info.sm_count = p.sm_count;
    args.scheduler.max_swizzle_size = tiling.swizzle;
    using Raster = decltype(args.scheduler.raster_order);
    args.scheduler.raster_order = Raster::AlongN;
    return args;
  }
  static void launch(cudaStream_t stream, const Product& p, const Tiling& tiling) {
    const auto args = arguments(p, tiling);
    Gemm gemm;
    const cutlass::Status status = gemm.run(args, nullptr, stream);
    TANDEM_CHECK(status == cutlass::Status::kSuccess, cutlassGetStatusString(status), ": [",
                 p.out.rows, ", ", p.out.columns, "] of ", p.a.columns, " + ", p.u.columns);
    TANDEM_LAUNCHED("lora_gemm");
  }
};

template <class Element, bool kBRows>
void run_kernel(cudaStream_t stream, const Product& product, const Tiling& tiling) {
  if (tiling.wide) return Kernel<Element, 128, 256, false, kBRows>::launch(stream, product, tiling);
  Kernel<Element, 128, 192, true, kBRows>::launch(stream, product, tiling);
}

}  // namespace tandem::kernels::cuda::lora_gemm
