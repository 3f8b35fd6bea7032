// Sampling and log-probabilities.
#include "kernels/cuda/cuda_ops.h"

namespace tandem::kernels::cuda {

void CudaOps::do_logprob(Exec&, const LogprobArgs&) {
  throw DeviceError("logprob: not written yet");
}

void CudaOps::do_sample(Exec&, const SampleArgs&) {
  throw DeviceError("sample: not written yet");
}

}  // namespace tandem::kernels::cuda
