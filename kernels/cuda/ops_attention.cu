// Packed causal attention: which implementation runs.
#include "kernels/cuda/attention.h"
#include "kernels/cuda/cuda_ops.h"

#include <cstdlib>
#include <string_view>

namespace tandem::kernels::cuda {

AttentionPath choose_path(const AttentionSpec& spec, DType dtype, const DeviceProfile& profile) {
  const char* wanted = std::getenv("TANDEM_CUDA_ATTENTION");
  if (wanted != nullptr && std::string_view(wanted) == "simple") return AttentionPath::kSimple;
  return attention_is_fast(spec, dtype, profile) ? AttentionPath::kOwn : AttentionPath::kSimple;
}

void CudaOps::do_attention_forward(Exec& exec, const AttentionArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "attention_forward", static_cast<double>(0));
  const AttentionForwardLayout layout = attention_forward_layout(a, profile_);
  const Scratch scratch(exec, layout.bytes);
  if (choose_path(a.spec, a.qkv.dtype, profile_) == AttentionPath::kOwn)
    own_attention_forward({stream(exec), multiprocessors(exec)}, exec.numerics, a, layout,
                          scratch.at<char>(0));
  else
    simple_attention_forward(stream(exec), a);
}

void CudaOps::do_attention_backward(Exec& exec, const AttentionBackwardArgs& a) {
  const Profiler::Scope scope(profiler_, stream(exec), "attention_backward",
                              static_cast<double>(0));
  const AttentionBackwardLayout layout = attention_backward_layout(a, profile_);
  const Scratch scratch(exec, layout.bytes);
  if (choose_path(a.spec, a.qkv.dtype, profile_) == AttentionPath::kOwn)
    own_attention_backward({stream(exec), multiprocessors(exec)}, a, layout, scratch.at<char>(0));
  else
    simple_attention_backward(stream(exec), a, scratch.at<float>(layout.delta));
}

}  // namespace tandem::kernels::cuda
