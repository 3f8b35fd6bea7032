// One row's product in the order of skinny.cu and lora_gemm.h: the tensor cores add up sixteen
// inputs after sixteen, in ascending order, and mma.sync adds up as wgmma does. x is one of the
// sixteen rows of A, the others are zeros; a warp has eight outputs, whose weights come through a
// ring of its own that no other warp waits for.
#include "kernels/cuda/gemv.cuh"

#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/linear_then.cuh"

namespace tandem::kernels::cuda {
namespace {

constexpr int kWarps = 2, kThreads = 32 * kWarps;
constexpr int kOutputs = 8;            ///< of a warp
constexpr int kColumns = 128;          ///< inputs of a stage
constexpr int kChunks = kColumns / 8;  ///< of 16 bytes, of a row of a stage
constexpr int kStages = 12;            ///< 22 KiB of weights that a warp has asked for
constexpr int kStageBytes = kOutputs * kColumns * kElementBytes;
constexpr int kRingBytes = kStages * kStageBytes;

/// 16 bytes, or zeros.
__device__ inline void copy_16(std::uint32_t to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(present ? 16 : 0)
               : "memory");
}
__device__ inline void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Until at most kPending groups are on their way.
template <int kPending>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ inline void load_matrices(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
/// Chunk `chunk` of a stage's row: rows of one chunk lie in different banks.
__device__ inline int chunk_offset(int row, int chunk) {
  return (row * kChunks + (chunk ^ row)) * 16;
}

template <class E, class Out, Then kThen>
__global__ void __launch_bounds__(kThreads)
    ordered_kernel(const E* x, const E* w, const E* bias, std::int64_t n, int inputs, Out* y,
                   const ThenView then) {
  extern __shared__ __align__(128) unsigned char shared[];  // rings, then x
  launch_dependents();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  constexpr bool kPairs = kThen != Then::kNothing;
  const std::int64_t own = static_cast<std::int64_t>(blockIdx.x) * kWarps + warp;
  const std::int64_t first = kPairs ? then.first_of(own * (kOutputs / 2)) : own * kOutputs;
  // Output i of the warp: of pairs, the second halves after the first.
  const auto output = [&](int i) {
    return !kPairs ? first + i : first + i % (kOutputs / 2) + i / (kOutputs / 2) * then.distance;
  };
  const int steps = (inputs + kColumns - 1) / kColumns;
  const std::uint32_t ring = shared_address(shared) + warp * kRingBytes;
  int ahead = 0;
  const auto ask = [&] {
    if (ahead < steps) {
      const int chunk = lane % kChunks, column = ahead * kColumns + 8 * chunk;
#pragma unroll
      for (int row = lane / kChunks; row < kOutputs; row += 32 / kChunks) {
        const bool present = output(row) < n && column < inputs;
        copy_16(ring + ahead % kStages * kStageBytes + chunk_offset(row, chunk),
                present ? w + output(row) * inputs + column : w, present);
      }
    }
    ++ahead;
    copy_commit();
  };
  // Weights are asked for before the kernel that makes x has ended: they depend on nobody.
#pragma unroll 1
  for (int s = 0; s + 1 < kStages; ++s) ask();
  wait_for_inputs();
  // Of 32 inputs, lane q's vector has the pairs that it holds in two products: 2q, 8 + 2q, 16 + 2q
  // and 24 + 2q.
  auto* pairs = reinterpret_cast<std::uint32_t*>(shared + kWarps * kRingBytes);
  for (int c = static_cast<int>(threadIdx.x); c < steps * kChunks; c += kThreads) {
    const uint4 v = load_8(x, 8 * c, inputs, true);
    const std::uint32_t* word = &v.x;
#pragma unroll
    for (int q = 0; q < 4; ++q) pairs[(c / 4 * 4 + q) * 4 + c % 4] = word[q];
  }
  __syncthreads();
  const auto* vectors = reinterpret_cast<const uint4*>(pairs);
  float sum[4] = {};
  for (int step = 0; step < steps; ++step) {
    copy_wait<kStages - 2>();
    __syncwarp();  // others' copies are there, and all have read the stage that is filled next
    ask();
    const std::uint32_t stage = ring + step % kStages * kStageBytes;
#pragma unroll
    for (int s = 0; s < kColumns / 32; ++s) {
      uint4 a = vectors[(step * (kColumns / 32) + s) * 4 + lane % 4];
      if (lane >= 4) a = make_uint4(0, 0, 0, 0);
      std::uint32_t b[4];
      load_matrices(b, stage + chunk_offset(lane % 8, 4 * s + lane / 8));
      mma<E>(sum, a.x, 0, a.y, 0, b[0], b[1]);
      mma<E>(sum, a.z, 0, a.w, 0, b[2], b[3]);
    }
  }
  // Lane q of four has outputs 2q and 2q + 1.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::int64_t at = output(2 * (lane % 4) + i);
    sum[i] += bias == nullptr || at >= n ? 0.0f : load_f32(bias[at]);
    if constexpr (kPairs) {
      const float behind = __shfl_down_sync(0xffffffffu, sum[i], 2);
      if (lane < 2 && at + then.distance < n) store_pair<E, kThen>(then, y, at, sum[i], behind);
    } else {
      if (lane < 4 && at < n) y[at] = store_as<Out>(sum[i]);
    }
  }
}

template <class E, class Out, Then kThen>
void run(cudaStream_t stream, const LinearArgs& a) {
  constexpr auto kKernel = ordered_kernel<E, Out, kThen>;
  constexpr std::int64_t kBlock = kWarps * kOutputs;
  const PackedWeight& w = *a.weight;
  const auto blocks = static_cast<unsigned>((w.n + kBlock - 1) / kBlock);
  const std::int64_t steps = (w.i + kColumns - 1) / kColumns;
  const auto shared = [](std::int64_t columns) {
    return static_cast<std::size_t>(kWarps * kRingBytes + columns * kElementBytes);
  };
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(shared(kGemvColumnsMax)));
  check_cuda(allowed, "ordered_kernel: shared memory");
  launch_early("ordered_kernel", kKernel, dim3(blocks), dim3(kThreads), shared(steps * kColumns),
               stream, static_cast<const E*>(a.x.data), static_cast<const E*>(w.storage.data),
               static_cast<const E*>(a.bias.data), w.n, static_cast<int>(w.i),
               static_cast<Out*>(output_of(a)), then_view(a));
}

}  // namespace

void ordered_gemv(cudaStream_t stream, const LinearArgs& a) {
  with_outputs(a, [&]<class E, class Out, Then kThen>() { run<E, Out, kThen>(stream, a); });
}

}  // namespace tandem::kernels::cuda
