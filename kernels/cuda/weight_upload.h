// Private to kernels/cuda: a base model's way to the device. Filling rows (dequantizing, widening)
// takes a processor longer than the bus takes to carry them, so several threads fill, each block
// through pinned memory of its own thread, from where the device fetches it while the thread fills
// the next. Called by the device thread.
#pragma once

#include "kernels/ops.h"

#include <cuda_runtime.h>

#include <memory>

namespace tandem::kernels::cuda {

class UploadThreads {
 public:
  explicit UploadThreads(int device);
  ~UploadThreads();
  UploadThreads(const UploadThreads&) = delete;
  UploadThreads& operator=(const UploadThreads&) = delete;

  /// Fills `to` (f32, bf16 or f16, row-major). The last copies may still be under way on `stream`;
  /// what is issued there is behind them. Keeps its threads' pinned memory: making it takes the
  /// driver longer than filling it.
  void upload(cudaStream_t stream, const PackedWeight& to, const Ops::FillRows& fill);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tandem::kernels::cuda
