// Packed causal attention: which implementation runs, and the small kernels around cuDNN's.
#include "kernels/cuda/attention.h"
#include "kernels/cuda/cuda_ops.h"

#include <cstdlib>
#include <string_view>

namespace tandem::kernels::cuda {
namespace {

__global__ void ragged_offsets_kernel(const std::int32_t* offsets, int sequences, int heads,
                                      int kv_heads, int dim, RaggedOffsets to) {
  for (auto s = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); s <= to.sequences;
       s += static_cast<int>(gridDim.x * blockDim.x)) {
    const int row = offsets[min(s, sequences)];
    if (s < to.sequences) to.lengths[s] = s < sequences ? offsets[s + 1] - row : 0;
    to.qkv[s] = row * (heads + 2 * kv_heads) * dim;
    to.out[s] = row * heads * dim;
    to.kv[s] = row * kv_heads * dim;
    to.stats[s] = row * heads;
  }
}

/// In 16-byte words; a head is a multiple of them.
__global__ void scatter_kv_kernel(const uint4* dk, const uint4* dv, std::int64_t rows, int words,
                                  std::int64_t row_words, int before, uint4* dqkv) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < rows * words; i += stride) {
    const std::int64_t row = i / words, at = row * row_words + before + i % words;
    dqkv[at] = dk[i];
    dqkv[at + words] = dv[i];
  }
}

/// cuDNN's offsets are i32.
bool fits_cudnn(const AttentionSpec& spec, const Tensor& qkv) {
  return (spec.head_dim == 64 || spec.head_dim == 128) && qkv.dtype == DType::kBF16 &&
         spec.window == 0 && spec.soft_cap == 0.0f && qkv.elements() < INT32_MAX;
}

}  // namespace

AttentionPath choose_path(const AttentionSpec& spec, const Tensor& qkv,
                          const DeviceProfile& profile, bool deterministic, Numerics numerics) {
  const bool own = attention_is_fast(spec, qkv.dtype, profile);
  const char* wanted = std::getenv("TANDEM_CUDA_ATTENTION");
  const std::string_view name = wanted != nullptr ? wanted : "";
  if (name == "cudnn" && fits_cudnn(spec, qkv)) return AttentionPath::kCudnn;
  if (name == "own" && own) return AttentionPath::kOwn;
  (void)deterministic;
  (void)numerics;
  return own && name != "simple" ? AttentionPath::kOwn : AttentionPath::kSimple;
}

void ragged_offsets(cudaStream_t stream, const Tensor& seq_offsets, const AttentionSpec& spec,
                    const RaggedOffsets& to) {
  const auto blocks = static_cast<unsigned>(to.sequences / 256 + 1);
  ragged_offsets_kernel<<<blocks, 256, 0, stream>>>(
      static_cast<const std::int32_t*>(seq_offsets.data), static_cast<int>(seq_offsets.dim(0) - 1),
      static_cast<int>(spec.heads), static_cast<int>(spec.kv_heads),
      static_cast<int>(spec.head_dim), to);
  TANDEM_LAUNCHED("ragged_offsets_kernel");
}

void scatter_kv_gradients(cudaStream_t stream, const AttentionSpec& spec, const void* dk,
                          const void* dv, const Tensor& dqkv) {
  const std::int64_t size = dtype_bytes(dqkv.dtype), row = spec.kv_heads * spec.head_dim * size;
  scatter_kv_kernel<<<1024, 256, 0, stream>>>(
      static_cast<const uint4*>(dk), static_cast<const uint4*>(dv), dqkv.dim(0),
      static_cast<int>(row / 16), dqkv.dim(1) * size / 16,
      static_cast<int>(spec.heads * spec.head_dim * size / 16), static_cast<uint4*>(dqkv.data));
  TANDEM_LAUNCHED("scatter_kv_kernel");
}

void CudaOps::do_attention_forward(Exec& exec, const AttentionArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "attention_forward", static_cast<double>(0));
  const AttentionPath path =
      choose_path(a.spec, a.qkv, profile_, options_.deterministic, exec.numerics);
  if (!attention_) attention_ = std::make_shared<AttentionPlans>();
  if (path == AttentionPath::kCudnn) {
    const Scratch scratch(exec, cudnn_attention_layout(a).bytes);
    if (!attention_->cudnn().forward(stream(exec), a, scratch.at<char>(0)))
      throw DeviceError(attention_->cudnn().refusal());
    zero_inert_rows(stream(exec), a.seq_offsets, a.out);
    if (a.lse.defined()) zero_inert_rows(stream(exec), a.seq_offsets, a.lse);
    return;
  }
  const AttentionForwardLayout layout = attention_forward_layout(a, profile_);
  const Scratch scratch(exec, layout.bytes);
  if (path == AttentionPath::kOwn)
    own_attention_forward(stream(exec), a, layout, scratch.at<char>(0));
  else
    simple_attention_forward(stream(exec), a);
}

void CudaOps::do_attention_backward(Exec& exec, const AttentionBackwardArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "attention_backward",
                              static_cast<double>(0));
  const AttentionPath path =
      choose_path(a.spec, a.qkv, profile_, options_.deterministic, exec.numerics);
  if (!attention_) attention_ = std::make_shared<AttentionPlans>();
  if (path == AttentionPath::kCudnn) {
    const Scratch scratch(exec, cudnn_attention_layout(a).bytes);
    if (!attention_->cudnn().backward(stream(exec), a, scratch.at<char>(0)))
      throw DeviceError(attention_->cudnn().refusal());
    zero_inert_rows(stream(exec), a.seq_offsets, a.dqkv);
    return;
  }
  const AttentionBackwardLayout layout = attention_backward_layout(a, profile_);
  const Scratch scratch(exec, layout.bytes);
  if (path == AttentionPath::kOwn)
    own_attention_backward(stream(exec), a, layout, scratch.at<char>(0));
  else
    simple_attention_backward(stream(exec), a, scratch.at<float>(layout.delta));
}

}  // namespace tandem::kernels::cuda
