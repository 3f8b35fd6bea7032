// Sampling and log-probabilities: a block a row, or several where rows are few; everything decided
// on the device.
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/row_select.cuh"
#include "kernels/cuda/row_statistics.cuh"
#include "kernels/cuda_workspace.h"
#include "protocol/base/random.h"

#include <algorithm>
#include <climits>

namespace tandem::kernels::cuda {
namespace {

constexpr int kThreads = kSelectThreads;

__global__ void __launch_bounds__(kThreads)
    logprob_kernel(const float* logits, std::int64_t v, const std::int32_t* ids, float* logprob) {
  const std::int64_t row = blockIdx.x;
  const float* x = logits + row * v;
  const std::int32_t id = ids[row];
  if (id < 0 || id >= v) __trap();
  const RowStatistics s = row_statistics<kThreads>(x, v);
  // The negated loss of linear_cross_entropy, in its order of operations.
  if (threadIdx.x == 0) logprob[row] = -(s.lse() - x[id]);
}

/// SampleArgs as the kernel sees them.
struct SampleCall {
  float* logits;
  int v;
  std::int64_t first_row;  ///< of the launch: blockIdx.y 0
  const float *temperature, *top_p, *min_p;
  const std::int32_t* top_k;
  const std::int64_t *seed, *position;
  const float *repetition, *presence, *frequency;
  const std::int32_t *history_offsets, *history_ids, *prompt_counts, *output_counts;
  std::int64_t history;  ///< entries of all rows
  float* originals;      ///< [history]: logits before penalties
  std::int32_t* ids;
  float* logprob;
  int top;
  std::int32_t* candidates;  ///< [S, top]
  std::int32_t* top_ids;
  float* top_logprob;
};

/// The highest logit gets the highest key; -0 is 0.
__device__ std::uint32_t key_of_logit(float logit) {
  const std::uint32_t bits = __float_as_uint(logit + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

struct CountEach {
  __device__ std::uint64_t operator()(std::uint32_t) const { return 1; }
};

/// Those of a selection's equals that stay are the ones with the lowest ids: the last such id.
template <class Key>
__device__ int last_kept(const Team& team, const float* x, int v, const Selection& s,
                         SelectMemory& m, const Key& key) {
  if (s.kept >= s.ties) return INT_MAX;
  return first_exceeding(
      team, x, v, m, [&](int, float value) { return std::uint64_t{key(value) == s.key}; },
      [&](std::uint64_t) { return s.kept - 1; });
}

__device__ void write_top_logprobs(const Team& team, const SampleCall& c, std::int64_t row,
                                   const float* x, float lse, SelectMemory& m) {
  const auto key = [](float value) { return key_of_logit(value); };
  const auto n = static_cast<std::uint64_t>(c.top);
  const Selection s = select_highest(team, x, c.v, n, m, key, CountEach{});
  const int last = last_kept(team, x, c.v, s, m, key);
  if (team.rank != 0) return;
  std::int32_t* candidates = c.candidates + row * c.top;
  if (threadIdx.x == 0) m.found = 0;
  __syncthreads();
  for_each_value(x, c.v, 0, 1, [&](int j, float value) {
    const std::uint32_t k = key(value);
    if (k > s.key || (k == s.key && j <= last)) candidates[atomicAdd(&m.found, 1)] = j;
  });
  __syncthreads();
  // They came in any order; each finds its place.
  for (int i = static_cast<int>(threadIdx.x); i < c.top; i += kThreads) {
    const std::int32_t id = candidates[i];
    const std::uint32_t own = key(x[id]);
    int place = 0;
    for (int j = 0; j < c.top; ++j) {
      const std::uint32_t other = key(x[candidates[j]]);
      place += other > own || (other == own && candidates[j] < id) ? 1 : 0;
    }
    c.top_ids[row * c.top + place] = id;
    c.top_logprob[row * c.top + place] = -(lse - x[id]);
  }
  __syncthreads();
}

/// Repetition (Keskar et al. 2019) over prompt and output, presence and frequency (OpenAI) over
/// output only. Ids of a row are distinct.
__device__ void apply_penalties(const SampleCall& c, std::int64_t row, float* x, int begin,
                                int end) {
  if (begin < 0 || end < begin || end > c.history) __trap();
  for (int e = begin + static_cast<int>(threadIdx.x); e < end; e += kThreads) {
    const std::int32_t id = c.history_ids[e];
    if (id < 0 || id >= c.v) __trap();
    const std::int32_t prompt = c.prompt_counts[e], output = c.output_counts[e];
    float logit = x[id];
    c.originals[e] = logit;
    const float repetition = c.repetition[row];
    if (prompt + output > 0) logit = logit > 0.0f ? logit / repetition : logit * repetition;
    if (output > 0) logit -= c.presence[row] + c.frequency[row] * static_cast<float>(output);
    x[id] = logit;
  }
  __syncthreads();
}

/// exp((logit - top) / temperature), in [0, 1]. Its bits order weights; as an integer it adds up
/// exactly: 2^44 is 1, so 2^19 tokens fit and what a weight loses is below 2^-45 of the heaviest.
struct WeightKey {
  float top, inverse;
  __device__ std::uint32_t operator()(float logit) const {
    const float w = expf((logit - top) * inverse);
    return __float_as_uint(w <= 1.0f ? w : 1.0f);  // a NaN, of a broken model, with the heaviest
  }
};
struct WeightAmount {
  __device__ std::uint64_t operator()(std::uint32_t key) const {
    return __float2ull_rn(__uint_as_float(key) * 0x1p44f);
  }
};

__device__ std::uint64_t share_of(float p, std::uint64_t total) {
  const double limit = ceil(static_cast<double>(p) * static_cast<double>(total));
  // The heaviest token stays whatever p is.
  return limit < 1.0 ? 1 : min(static_cast<std::uint64_t>(limit), total);
}

/// The sum over what a selection keeps; all of it where nothing was selected yet.
__device__ std::uint64_t selected_weight(const Team& team, const float* x, int v,
                                         const WeightKey& key, const Selection& s,
                                         SelectMemory& m) {
  std::uint64_t sum = 0;
  for_each_value(x, v, team.rank, team.size, [&](int, float value) {
    const std::uint32_t k = key(value);
    if (k > s.key) sum += WeightAmount{}(k);
  });
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) m.parts[threadIdx.x / 32] = sum;
  team.gather_parts(m);
  std::uint64_t total = s.kept * WeightAmount{}(s.key);
  for (int w = 0; w < team.size * kSelectWarps; ++w) total += m.all[w];
  __syncthreads();
  return total;
}

/// Top-k, then top-p of what it leaves, then min-p, then the draw, by id.
__device__ int draw(const Team& team, const SampleCall& c, std::int64_t row, const float* x,
                    const WeightKey& key, SelectMemory& m) {
  const int v = c.v, top_k = c.top_k[row];
  const float p = c.top_p[row], min_p = c.min_p[row];
  const bool by_k = top_k > 0 && top_k < v, by_p = p < 1.0f;
  std::uint32_t lightest = 0;
  int last = INT_MAX;
  if (by_k || by_p) {
    Selection s{};
    if (by_k)
      s = select_highest(team, x, v, static_cast<std::uint64_t>(top_k), m, key, CountEach{});
    if (by_p) {
      const std::uint64_t limit = share_of(p, selected_weight(team, x, v, key, s, m));
      s = select_highest(team, x, v, limit, m, key, WeightAmount{});
    }
    lightest = s.key;
    last = last_kept(team, x, v, s, m, key);
  }
  // The heaviest weighs 1: min-p never removes everything.
  const std::uint32_t least = __float_as_uint(fminf(fmaxf(min_p, 0.0f), 1.0f));
  const std::uint64_t u = random_bits(static_cast<std::uint64_t>(c.seed[row]), 0,
                                      static_cast<std::uint64_t>(c.position[row])) >>
                          40;
  return first_exceeding(
      team, x, v, m,
      [&](int j, float value) {
        const std::uint32_t k = key(value);
        const bool kept = k >= least && (k > lightest || (k == lightest && j <= last));
        return kept ? WeightAmount{}(k) : std::uint64_t{0};
      },
      [&](std::uint64_t total) { return __umul64hi(u << 40, total); });
}

__global__ void __launch_bounds__(kThreads) sample_kernel(const SampleCall c) {
  __shared__ SelectMemory m;
  __shared__ float original;
  const Team team;
  const std::int64_t row = c.first_row + blockIdx.y;
  float* x = c.logits + row * c.v;
  int begin = 0, end = 0;
  if (c.history_offsets != nullptr) {
    begin = c.history_offsets[row];
    end = c.history_offsets[row + 1];
  }
  const float temperature = c.temperature[row];
  if (team.rank != 0 && temperature <= 0.0f && c.top == 0 && begin == end) return;  // one is enough
  RowStatistics s = row_statistics<kThreads>(x, c.v);
  const float lse = s.lse();
  if (c.top > 0) write_top_logprobs(team, c, row, x, lse, m);
  if (begin != end) {
    team.sync();
    if (team.rank == 0) apply_penalties(c, row, x, begin, end);
    team.sync();
    s = row_statistics<kThreads>(x, c.v);
  }
  int id = s.argmax < c.v ? static_cast<int>(s.argmax) : 0;  // all NaN: any token
  // Bounded, so that 0 times it stays 0 at the tiniest temperature.
  if (temperature > 0.0f) id = draw(team, c, row, x, {s.top, fminf(1.0f / temperature, 1e30f)}, m);
  if (team.rank != 0) return;
  if (threadIdx.x == 0) original = x[id];
  __syncthreads();
  for (int e = begin + static_cast<int>(threadIdx.x); e < end; e += kThreads)
    if (c.history_ids[e] == id) original = c.originals[e];
  __syncthreads();
  if (threadIdx.x != 0) return;
  c.ids[row] = id;
  c.logprob[row] = -(lse - original);
}

/// Blocks of a row: as many as one round over the device holds. The result does not depend on it.
unsigned team_size(std::int64_t rows, const DeviceProfile& profile) {
  if (profile.compute_capability < 90) return 1;
  unsigned size = 1;
  while (size < kTeamMax && 2 * size * rows <= profile.sm_count) size *= 2;
  return size;
}

void launch_sample(cudaStream_t stream, const SampleCall& c, std::int64_t rows, unsigned team) {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster{};
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = team > 1 ? 1 : 0;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = team;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  constexpr std::int64_t kGridMax = 65535;
  for (std::int64_t first = 0; first < rows; first += kGridMax) {
    SampleCall part = c;
    part.first_row = first;
    config.gridDim = dim3(team, static_cast<unsigned>(std::min(kGridMax, rows - first)));
    TANDEM_CUDA(cudaLaunchKernelEx(&config, sample_kernel, part));
  }
}

template <class T>
T* pointer(const Tensor& t) {
  return t.defined() ? t.as<T>() : nullptr;
}

}  // namespace

void CudaOps::do_logprob(Exec& exec, const LogprobArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "logprob",
                              static_cast<double>(a.logits.bytes()));
  logprob_kernel<<<static_cast<unsigned>(a.logits.dim(0)), kThreads, 0, stream(exec)>>>(
      a.logits.as<float>(), a.logits.dim(1), a.ids.as<std::int32_t>(), a.logprob.as<float>());
  TANDEM_LAUNCHED("logprob_kernel");
}

void CudaOps::do_sample(Exec& exec, const SampleArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "sample",
                              static_cast<double>(a.logits.bytes()));
  const SampleLayout layout = sample_layout(a);
  const Scratch scratch(exec, layout.bytes);
  SampleCall c{};
  c.logits = a.logits.as<float>();
  c.v = static_cast<int>(a.logits.dim(1));
  c.temperature = a.temperature.as<float>();
  c.top_p = a.top_p.as<float>();
  c.min_p = a.min_p.as<float>();
  c.top_k = a.top_k.as<std::int32_t>();
  c.seed = a.seed.as<std::int64_t>();
  c.position = a.position.as<std::int64_t>();
  if (a.history_offsets.defined()) {
    c.repetition = a.repetition_penalty.as<float>();
    c.presence = a.presence_penalty.as<float>();
    c.frequency = a.frequency_penalty.as<float>();
    c.history_offsets = a.history_offsets.as<std::int32_t>();
    c.history_ids = pointer<std::int32_t>(a.history_ids);
    c.prompt_counts = pointer<std::int32_t>(a.history_prompt_counts);
    c.output_counts = pointer<std::int32_t>(a.history_output_counts);
    c.history = a.history_ids.dim(0);
    c.originals = scratch.at<float>(layout.originals);
  }
  c.ids = a.ids.as<std::int32_t>();
  c.logprob = a.logprob.as<float>();
  c.top = static_cast<int>(a.top_logprobs);
  if (c.top > 0) {
    c.candidates = scratch.at<std::int32_t>(layout.candidates);
    c.top_ids = a.top_ids.as<std::int32_t>();
    c.top_logprob = a.top_logprob.as<float>();
  }
  launch_sample(stream(exec), c, a.logits.dim(0), team_size(a.logits.dim(0), profile_));
}

}  // namespace tandem::kernels::cuda
