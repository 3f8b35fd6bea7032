// A warpgroup multiplies, one warp drives the copy engine, and one lists the adapters: rows of x
// are the tensor cores' rows, outputs their columns. Blocks of a cluster share the inner size of
// one tile of outputs, add their parts in the order of the blocks through one another's memory, and
// each finishes its own share of the outputs: bias, adapters, rounding, and what is made of them.
#include "kernels/cuda/skinny.h"

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/linear_then.cuh"
#include "kernels/cuda/silu.cuh"
#include "kernels/cuda/skinny_makers.cuh"
#include "kernels/cuda/tensor_map.h"

#include <cooperative_groups.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>

namespace tandem::kernels::cuda {
namespace skinny_product {

namespace cg = cooperative_groups;
constexpr int kSharedMax = 227 * 1024;

/// What a block with adapters leaves of its multiprocessor's memory, and where the kernel before
/// makes its u the threads for which it leaves registers, each as many as its own have: blocks of a
/// kernel that makes u, its own or the next product's, run beside it.
constexpr int kSharedBeside = 10 * 1024, kThreadsBeside = 96;

/// Who makes u: nobody, there being no adapters; the kernel before; blocks beside the product.
enum class Makes { kNone, kBefore, kBeside };

/// Tiles of kN outputs, a cluster of kSplits blocks for each. kPairs: of gate and up, silu * up is
/// made, by one block a tile, whose second half lies n / 2 behind its first.
template <int kN, int kSplits, bool kPairs, Makes kMakes>
struct Tile {
  static_assert(!kPairs || kSplits == 1);
  static constexpr int kHalves = kPairs ? 2 : 1, kHalf = kN / kHalves;  ///< of neighbouring outputs
  static constexpr int kHalfGroups = kHalf / 8;                         ///< of eight outputs
  static constexpr int kOwn = (kHalfGroups + kSplits - 1) / kSplits;    ///< the last may have fewer
  static constexpr int kGroups = kHalves * kOwn;
  static constexpr int kWeightBytes = kN * kStep * 2,
                       kStageBytes = kWeightBytes + kRows * kStep * 2;
  static constexpr int kPartRow = kN + 8;  // f32: rows of a fragment in different banks
  static constexpr int kPartBytes = kSplits > 1 ? kRows* kPartRow * 4 : 0;
  static constexpr bool kAdapts = kMakes != Makes::kNone;
  static constexpr int kControlBytes =
      static_cast<int>(sizeof(Control) + (kAdapts ? kHalves * sizeof(StagedInputs) : 0));
  static constexpr int kStages = std::min<int>(
      kN < 64 ? kStagesMax : 8,
      (kSharedMax - (kAdapts ? kSharedBeside : 0) - kPartBytes - kControlBytes) / kStageBytes);
  static constexpr int kBytes = kStages * kStageBytes + kPartBytes + kControlBytes;
};

/// acc [64, kN] += x [64, 16] w [kN, 16]^T.
template <class E, int kN>
__device__ inline void multiply(float (&acc)[kN / 2], std::uint32_t x, std::uint32_t w) {
#pragma unroll
  for (int c = 0; c < kN / 64; ++c)
    wgmma<E, 0>(*reinterpret_cast<float(*)[32]>(acc + 32 * c), descriptor(x),
                descriptor(w + c * 64 * 128 / 16), 1);
  if constexpr (kN % 64 != 0) {
    static_assert(kN % 64 == 32);
    wgmma<E, 0>(*reinterpret_cast<float(*)[16]>(acc + kN / 64 * 32), descriptor(x),
                descriptor(w + kN / 64 * 64 * 128 / 16), 1);
  }
}

__device__ inline void store_2(float* to, float a, float b) {
  *reinterpret_cast<float2*>(to) = make_float2(a, b);
}
template <class E>
__device__ inline void store_2(E* to, float a, float b) {
  *reinterpret_cast<std::uint32_t*>(to) = pack<E>(a, b);
}

namespace {  // from here: what is above is used on Hopper alone

template <class E, int kN, int kSplits, bool kPairs, Makes kMakes, class Y>
__global__ void __launch_bounds__(kThreads + (kMakes == Makes::kBefore ? kThreadsBeside : 0), 1)
    skinny_kernel(const __grid_constant__ CUtensorMap x_map,
                  const __grid_constant__ CUtensorMap w_map, const __grid_constant__ Params p,
                  Y* y) {
#ifdef TANDEM_HOPPER
  using T = Tile<kN, kSplits, kPairs, kMakes>;
  constexpr bool kAdapts = T::kAdapts, kBeside = kMakes == Makes::kBeside;
  extern __shared__ __align__(1024) unsigned char stages[];
  if (shared_address(stages) % 1024 != 0) __trap();
  auto* parts = reinterpret_cast<float*>(stages + T::kStages * T::kStageBytes);
  auto& c = *reinterpret_cast<Control*>(stages + T::kStages * T::kStageBytes + T::kPartBytes);
  [[maybe_unused]] auto* staged = reinterpret_cast<StagedInputs*>(&c + 1);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const cg::cluster_group cluster = cg::this_cluster();
  // After pairs the next kernel begins when this one's loads are through.
  if constexpr (!kPairs) launch_dependents();
  const int makers = kBeside ? p.makers : 0;
  const int block = static_cast<int>(blockIdx.x) - makers;
  const int blocks = static_cast<int>(gridDim.x) - makers;
  if constexpr (kBeside) {
    if (block < 0) return make_u<E>(p, stages, T::kBytes);
  }
  if (warp == kProducer && lane == 0) {
    prefetch_map(&w_map);
    prefetch_map(&x_map);
  }
  if (threadIdx.x == 0) {
    for (int s = 0; s < T::kStages; ++s) {
      barrier_init(&c.full[s], 1);
      barrier_init(&c.empty[s], kConsumerWarps);
    }
    barrier_init(&c.list_full, 32);
    barrier_init(&c.list_empty, kConsumers + (kAdapts ? 32 : 0));
    barrier_init(&c.parts_full, kSplits);
    barrier_init(&c.u_full, 32);
    barrier_init_done();
  }
  kSplits > 1 ? cluster.sync() : __syncthreads();
  const int part = kSplits > 1 ? block % kSplits : 0;
  const int steps_part = (p.steps + kSplits - 1) / kSplits, first = part * steps_part;
  const int steps = max(0, min(steps_part, p.steps - first));
  const int first_tile = block / kSplits, tile_step = blocks / kSplits;
  const auto begin_of = [](int tile) { return tile * T::kHalf; };
  // The outputs of a half that this block finishes.
  const auto own_of = [&](int tile, int half) {
    const int from = begin_of(tile) + half * p.distance, begin = from + part * 8 * T::kOwn;
    const int end = min(kPairs ? (half + 1) * p.distance : p.n, from + T::kHalf);
    return Range{begin, min(begin + 8 * T::kOwn, end)};
  };
  Ring<T::kStages> ring;
  std::uint32_t list_phase = 0;

  if (warp == kProducer) {
    const std::uint64_t once = read_once();
    const auto address = [&](int stage) { return shared_address(stages + stage * T::kStageBytes); };
    const auto copy_weight = [&](int stage, int step, int tile) {
      barrier_expect(&c.full[stage], T::kWeightBytes + p.x_rows * kStep * 2);
#pragma unroll
      for (int half = 0; half < T::kHalves; ++half)
        copy_box_once(address(stage) + half * T::kHalf * kStep * 2, &w_map, &c.full[stage],
                      (first + step) * kStep, begin_of(tile) + half * p.distance, once);
    };
    const auto copy_x = [&](int stage, int step) {
      copy_box(address(stage) + T::kWeightBytes, &x_map, &c.full[stage], (first + step) * kStep, 0);
    };
    for (int tile = first_tile; tile < p.tiles; tile += tile_step) {
      if (lane == 0) {
        int step = 0;
        if (tile == first_tile && kMakes != Makes::kBefore) {
          // Weights depend on nobody: they are asked for before what makes x has ended.
          const int ahead = min(T::kStages, steps);
          for (int s = 0; s < ahead; ++s) copy_weight(s, s, tile);
          wait_for_inputs();
          for (; step < ahead; ++step, ring.next()) copy_x(step, step);
        }
        for (; step < steps; ++step, ring.next()) {
          barrier_wait(&c.empty[ring.stage], ring.phase ^ 1);
          copy_weight(ring.stage, step, tile);
          copy_x(ring.stage, step);
        }
      }
      if (!kAdapts) continue;
      ring.stage = __shfl_sync(0xffffffffu, ring.stage, 0);
      ring.phase = __shfl_sync(0xffffffffu, ring.phase, 0);
      barrier_wait(&c.list_full, list_phase);
      list_phase ^= 1;
      copy_pieces(c, stages, T::kStageBytes, c.full, c.empty, ring, lane);
      barrier_arrive(&c.list_empty);
    }
  } else if (warp == kLister) {
    unsigned read = 0;
    const Leads leads = kAdapts ? find_slots(p.adapters, c, lane) : Leads{};
    for (int tile = first_tile; kAdapts && tile < p.tiles; tile += tile_step) {
      barrier_wait(&c.list_empty, list_phase ^ 1);
      list_phase ^= 1;
      Listed listed;
      for (int half = 0; half < T::kHalves; ++half) {
        const auto [begin, end] = own_of(tile, half);
        list_pieces(p.adapters, begin, end, half * T::kOwn, T::kStageBytes, leads, c, lane, listed);
      }
      end_list(listed, c, lane);
      barrier_arrive(&c.list_full);
      wait_for_inputs();
      if (kBeside && tile == first_tile) read = wait_for_u(p, lane, blocks);
      for (int half = 0; half < T::kHalves; ++half)
        if (const int site = find_site(p.adapters, own_of(tile, half)); site >= 0)
          stage_inputs<E>(p, site, staged[half], lane);
      barrier_arrive(&c.u_full);
    }
    if (kBeside) end_of_u(p, lane, blocks, read);
  } else {
    for (int tile = first_tile; tile < p.tiles; tile += tile_step) {
      float acc[kN / 2] = {};
      const auto release = [&](int stage) {
        __syncwarp();
        if (lane == 0) barrier_arrive(&c.empty[stage]);
      };
      int last = 0;
      for (int step = 0; step < steps; ++step) {
        barrier_wait(&c.full[ring.stage], ring.phase);
        const std::uint32_t at = shared_address(stages + ring.stage * T::kStageBytes);
        const std::uint32_t w = rows_operand(at), x = rows_operand(at + T::kWeightBytes);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kStep / 16; ++k) multiply<E, kN>(acc, x + k * 2, w + k * 2);
        wgmma_commit();
        if (step > 0) {  // what is begun now goes on while the stage before is given back
          wgmma_wait<1>();
          release(last);
        }
        last = ring.stage;
        ring.next();
      }
      wgmma_wait<0>();
      pin(acc);
      if (steps > 0) release(last);
      const int g = lane / 4, q = lane % 4, row = warp * 16 + g;
      float sum[4 * T::kGroups];
      if constexpr (kSplits == 1) {
#pragma unroll
        for (int e = 0; e < 4 * T::kGroups; ++e) sum[e] = acc[e];
      } else {
#pragma unroll
        for (int e = 0; e < kN / 2; e += 2)
          store_2(parts + (row + e % 4 / 2 * 8) * T::kPartRow + e / 4 * 8 + 2 * q, acc[e],
                  acc[e + 1]);
        named_sync(1, kConsumers);
        if (threadIdx.x < kSplits) barrier_arrive_at(&c.parts_full, threadIdx.x);
        barrier_wait_cluster(&c.parts_full, 0);
#pragma unroll
        for (int e = 0; e < 4 * T::kGroups; ++e) sum[e] = 0.0f;
#pragma unroll
        for (int s = 0; s < kSplits; ++s) {
          const float* from = cluster.map_shared_rank(parts, static_cast<unsigned>(s));
#pragma unroll
          for (int e = 0; e < 4 * T::kGroups; e += 2) {
            const int group = min(part * T::kOwn + e / 4, T::kHalfGroups - 1);
            const float2 x = *reinterpret_cast<const float2*>(
                from + (row + e % 4 / 2 * 8) * T::kPartRow + group * 8 + 2 * q);
            sum[e] += x.x;
            sum[e + 1] += x.y;
          }
        }
      }
      if constexpr (kPairs) launch_dependents();
      wait_for_inputs();  // nobody reads y's last contents any more
      if constexpr (kAdapts) {
        barrier_wait(&c.list_full, list_phase);
        barrier_wait(&c.u_full, list_phase);
        list_phase ^= 1;
        SiteInputs inputs[T::kHalves];
#pragma unroll
        for (int half = 0; half < T::kHalves; ++half)
          inputs[half] = {staged_inputs(staged[half]), find_site(p.adapters, own_of(tile, half))};
        add_pieces<E, T::kGroups, T::kHalves>(p, c, stages, T::kStageBytes, ring, inputs, sum);
      }
      if (const auto* bias = static_cast<const E*>(p.bias); bias != nullptr) {
#pragma unroll
        for (int e = 0; e < 4 * T::kGroups; ++e) {
          const auto [begin, end] = own_of(tile, e / 4 / T::kOwn);
          const int n = begin + e / 4 % T::kOwn * 8 + 2 * q + e % 2;
          if (n < end) sum[e] += load_f32(bias[n]);
        }
      }
      const auto [begin, end] = own_of(tile, 0);
      const auto rounded = [](float v) { return load_f32(store_as<E>(v)); };
      const int width = kPairs ? p.distance : p.n;
#pragma unroll
      for (int e = 0; e < 4 * T::kOwn; e += 2) {
        const int n = begin + e / 4 * 8 + 2 * q, t = row + e % 4 / 2 * 8;
        float2 out = {sum[e], sum[e + 1]};
        if constexpr (kPairs) {
          const float* up = sum + 4 * T::kOwn + e;
          out = {silu_mul(rounded(out.x), rounded(up[0])),
                 silu_mul(rounded(out.y), rounded(up[1]))};
        }
        if (n < end && t < p.t) store_2(y + static_cast<std::int64_t>(t) * width + n, out.x, out.y);
      }
      if (kAdapts) barrier_arrive(&c.list_empty);
    }
  }
  if (kSplits > 1) cluster.sync();  // a block's memory lives until the others have read it
#endif
}

/// One for each queue that ever needed it; zeros from the module's load on.
__device__ Handover handovers[256];

// -- choice
// -------------------------------------------------------------------------------------------

struct Launch {
  cudaStream_t stream;
  const LinearArgs& args;
  Params params;
  int multiprocessors;
};

template <class E, int kN, int kSplits, bool kPairs, Makes kMakes, class Y>
void launch(Launch& l) {
  using T = Tile<kN, kSplits, kPairs, kMakes>;
  const LinearArgs& a = l.args;
  Params& p = l.params;
  p.tiles = ((kPairs ? p.distance : p.n) + T::kHalf - 1) / T::kHalf;
  constexpr auto kKernel = skinny_kernel<E, kN, kSplits, kPairs, kMakes, Y>;
  static_assert(maker_memory(1 << 30, T::kBytes).factor_stages >= 2);
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kBytes);
  check_cuda(allowed, "skinny_kernel: shared memory");
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {kSplits, 1, 1};
  cudaLaunchConfig_t config{};
  const int blocks = kSplits > 1 ? p.tiles * kSplits : std::min(p.tiles, l.multiprocessors);
  config.gridDim = dim3(static_cast<unsigned>(blocks + p.makers));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = T::kBytes;
  config.stream = l.stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  check_cuda(
      cudaLaunchKernelEx(
          &config, kKernel, make_tensor_map(a.x.dtype, a.x.data, a.x.dim(0), a.x.dim(1), p.x_rows),
          make_tensor_map(a.x.dtype, a.weight->storage.data, a.weight->n, a.weight->i, T::kHalf), p,
          static_cast<Y*>(output_of(a))),
      "skinny_kernel");
}

struct Choice {
  int outputs, splits;
  // Null: not with these tiles.
  void (*narrow)(Launch&) = nullptr;  ///< y of x's dtype
  void (*f32)(Launch&) = nullptr;
  void (*silu_mul)(Launch&) = nullptr;
  void (*adapters)(Launch&) = nullptr;         ///< u made before
  void (*adapters_beside)(Launch&) = nullptr;  ///< u made beside
  void (*silu_mul_adapters)(Launch&) = nullptr;
};
template <class E, int kN, int kSplits>
constexpr Choice make_choice() {
  Choice c{kN, kSplits};
  if constexpr (kN != 128) {
    c.narrow = launch<E, kN, kSplits, false, Makes::kNone, E>;
    c.f32 = launch<E, kN, kSplits, false, Makes::kNone, float>;
    c.adapters = launch<E, kN, kSplits, false, Makes::kBefore, E>;
    c.adapters_beside = launch<E, kN, kSplits, false, Makes::kBeside, E>;
  }
  if constexpr (kSplits == 1 && kN >= 64) {
    c.silu_mul = launch<E, kN, kSplits, true, Makes::kNone, E>;
    if constexpr (kN < 256) c.silu_mul_adapters = launch<E, kN, kSplits, true, Makes::kBefore, E>;
  }
  return c;
}

/// What a product of `rows` takes with these tiles, in what a multiprocessor needs to load 128
/// bytes, about 1.7 ns. Of each round of blocks no less than memory needs for its weights, the
/// second-level cache for all that its blocks load, and a block for its own; of the last one the
/// end is not hidden. Adding up in a cluster takes longer than kSum, but then twice as many blocks
/// have weights on their way before x is there: alone a product takes up to a microsecond less
/// without, in a layer as much longer. Clusters are pairs: a group of multiprocessors does not
/// always hold a multiple of four, and the last cluster would run alone.
std::int64_t time_of(const Choice& c, std::int64_t n, std::int64_t steps, int rows,
                     int multiprocessors) {
  constexpr std::int64_t kMemory = 41, kCache = 87, kHidden = 8, kRound = 20, kSum = 500;
  const std::int64_t tiles = (n + c.outputs - 1) / c.outputs;
  const std::int64_t part = (steps + c.splits - 1) / c.splits;
  const std::int64_t at_once = multiprocessors / c.splits;
  const auto round = [&](std::int64_t count) {
    return std::max({count * c.outputs * steps / kMemory,
                     count * c.splits * part * (c.outputs + rows) / kCache,
                     part * (c.outputs + rows * 5 / 8)});
  };
  const std::int64_t full = tiles / at_once, rest = tiles % at_once;
  const std::int64_t each = kRound + (c.splits - 1) * kSum;
  return full * (round(at_once) + each) + (rest > 0 ? round(rest) + each : 0) +
         part * c.outputs / kHidden;
}

/// Whether a tile has outputs of two sites: a block then adds every adapter twice, and all wait for
/// it.
bool crosses(const std::vector<LoraSite>& sites, int outputs) {
  return std::any_of(sites.begin(), sites.end(),
                     [&](const LoraSite& s) { return s.n_begin % outputs != 0; });
}

using Run = void (*Choice::*)(Launch&);

/// The tiles that take the least time, of those that can run this.
struct Fastest {
  const Choice* choice = nullptr;
  std::int64_t time = 0;
};
template <class E>
Fastest find_fastest(const Launch& l, int rows, bool splits, Run run) {
  // What adapters take, which no stream of weights hides: across two sites, an output 7 with 8 of
  // them and 50 to 90 with 64; of pairs, whose halves have a site each, an output 8 and 27 to 50, a
  // further round 1,200 and 4,000 to 6,000.
  constexpr std::int64_t kCrossing = 50, kPair = 15, kPairsRound = 1000;
  static constexpr Choice kChoices[] = {make_choice<E, 256, 1>(), make_choice<E, 224, 1>(),
                                        make_choice<E, 128, 1>(), make_choice<E, 96, 1>(),
                                        make_choice<E, 64, 1>(),  make_choice<E, 64, 2>(),
                                        make_choice<E, 32, 1>()};
  Fastest best;
  for (const Choice& c : kChoices) {
    // Narrow tiles fill the device where the inner size may not be split.
    const bool narrow = c.outputs == 32, rounds = l.params.n > c.outputs * l.multiprocessors;
    if (c.*run == nullptr || (splits ? narrow : c.splits > 1 || (narrow && rounds))) continue;
    std::int64_t time = time_of(c, l.params.n, l.params.steps, rows, l.multiprocessors);
    if (run == &Choice::adapters && crosses(l.args.sites, c.outputs)) time += kCrossing * c.outputs;
    if (run == &Choice::silu_mul_adapters) {
      const std::int64_t each = std::int64_t{c.outputs} * l.multiprocessors;
      time += (l.params.n + each - 1) / each * (kPairsRound + kPair * c.outputs);
    }
    if (best.choice == nullptr || time < best.time) best = {&c, time};
  }
  return best;
}

/// Blocks that make u on the multiprocessors which a product leaves; 0: they take longer than it,
/// or are so few that in a layer the kernel before was faster (4 and 8 were, 24 and 36 not).
int makers_beside(const Launch& l, const Fastest& product) {
  // Beside the stream a block gets a hundredth of the memory's rate (estimated from products with
  // two items a block), so many bytes in a unit of time_of(); what its first item waits for.
  constexpr std::int64_t kBytes = 40, kBegin = 1500;
  constexpr int kMakersMin = 16;
  const SegmentsView& v = l.params.adapters;
  const Choice& c = *product.choice;
  const int tiles = (l.params.n + c.outputs - 1) / c.outputs;
  const int of_tile = v.sites * ((v.rank_max + kMadeRanks - 1) / kMadeRanks);
  const int bound = static_cast<int>(tiles_max(v, kMadeRows)) * of_tile;
  // Whole clusters.
  const int left = (l.multiprocessors - tiles * c.splits) / c.splits * c.splits;
  if (left < kMakersMin) return 0;
  const int makers = std::min((bound + c.splits - 1) / c.splits * c.splits, left);
  if ((bound + makers - 1) / makers > kMadeItemsMax) return 0;
  // Lists are on the device: as many tiles as a full batch has whose rows lie side by side.
  const int expected = std::min(v.t, std::max((v.t + kMadeRows - 1) / kMadeRows, v.segments - 2));
  const int rows = (v.t + expected - 1) / expected;
  const std::int64_t item = std::int64_t{l.params.inputs} * (kMadeRanks + rows) * 2 / kBytes;
  const int each = (expected * of_tile + makers - 1) / makers;
  return kBegin + each * item <= product.time ? makers : 0;
}

/// The handover of this queue's kernels, which run one after another; a later queue of the same
/// handle has the same. Null: there are too many queues. Threads: any.
Handover* handover_of(cudaStream_t stream) {
  constexpr std::size_t kStreams = sizeof(handovers) / sizeof(Handover);
  static std::mutex mutex;
  static std::unordered_map<cudaStream_t, Handover*> of;
  static Handover* const all = [] {
    void* address = nullptr;
    TANDEM_CUDA(cudaGetSymbolAddress(&address, handovers));
    return static_cast<Handover*>(address);
  }();
  const std::lock_guard lock(mutex);
  const auto found = of.find(stream);
  if (found != of.end()) return found->second;
  if (of.size() == kStreams) return nullptr;
  return of[stream] = all + of.size();
}

bool is_whole(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
}

}  // namespace
}  // namespace skinny_product

bool skinny_fits(const LinearArgs& a, const DeviceProfile& profile) {
  using namespace skinny_product;
  const auto eights = [](std::int64_t size) { return size > 0 && size % 8 == 0; };
  if (profile.compute_capability != 90 || !is_16_bit(a.x.dtype) || a.weight->dtype != a.x.dtype)
    return false;
  if (a.x.dim(0) < 1 || !eights(a.weight->i) || !eights(a.weight->n)) return false;
  if (!is_whole(a.x.data) || !is_whole(a.weight->storage.data) || !is_whole(a.y.data)) return false;
  if (a.adapters == nullptr || a.adapters->rank_max == 0 || a.sites.empty()) return true;
  return a.adapters->rank_max <= kRankMax && a.adapters->dropout == 0.0f &&
         a.sites.size() <= kSitesMax && a.y.dtype == a.x.dtype &&
         std::all_of(a.sites.begin(), a.sites.end(),
                     [&](const LoraSite& s) { return s.n_begin % 8 == 0 && eights(s.n); });
}

void skinny(cudaStream_t stream, Numerics numerics, const LinearArgs& a, const Tensor& u,
            int multiprocessors) {
  using namespace skinny_product;
  Params p{static_cast<int>(a.x.dim(0)),
           static_cast<int>(a.weight->n),
           static_cast<int>((a.weight->i + kStep - 1) / kStep),
           0,
           static_cast<int>((a.x.dim(0) + 7) / 8 * 8),
           a.bias.data,
           u.data,
           {},
           static_cast<int>(a.weight->n / 2),
           0,
           a.x.data,
           static_cast<int>(a.weight->i),
           nullptr};
  if (u.defined()) p.adapters = segments_view(a.sites, 0, *a.adapters, a.x.dim(0));
  const bool adapts = u.defined(), pairs = a.then.silu_mul.out.defined();
  const Run run = pairs    ? adapts ? &Choice::silu_mul_adapters : &Choice::silu_mul
                  : adapts ? &Choice::adapters
                  : a.y.dtype == DType::kF32 ? &Choice::f32
                                             : &Choice::narrow;
  Launch l{stream, a, p, multiprocessors};
  with_element(a.x.dtype, [&]<class E>(E) {
    const bool splits = numerics != Numerics::kInvariant;
    const Fastest product = find_fastest<E>(l, splits ? kRows : p.x_rows, splits, run);
    // Gate and up, the widest, leave none.
    if (run == &Choice::adapters && (l.params.handover = handover_of(stream)) != nullptr &&
        (l.params.makers = makers_beside(l, product)) > 0)
      return product.choice->adapters_beside(l);
    if (adapts) lora_segments_shrink(stream, a.sites, *a.adapters, a.x, u, true);
    (product.choice->*run)(l);
  });
}

}  // namespace tandem::kernels::cuda
