// Private to kernels/cuda: where a run's device time goes, op by op. Off unless TANDEM_CUDA_PROFILE
// is set; then every op records two events, and a table goes to standard error when the backend is
// destroyed. Ops nest (a product inside a linear op counts in both).
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

namespace tandem::kernels::cuda {

class Profiler {
 public:
  Profiler();
  ~Profiler();
  Profiler(const Profiler&) = delete;
  Profiler& operator=(const Profiler&) = delete;
  [[nodiscard]] bool on() const { return on_; }

  /// From construction to destruction on one stream. `bytes` and `flops`: what the op must move and
  /// compute at least, for the rates in the table; 0: not shown.
  class Scope {
   public:
    Scope(Profiler& profiler, cudaStream_t stream, const std::string& name, double bytes = 0.0,
          double flops = 0.0)
        : profiler_(profiler.on() ? &profiler : nullptr), stream_(stream) {
      if (profiler_ != nullptr) index_ = profiler_->begin(stream, name, bytes, flops);
    }
    ~Scope() {
      if (profiler_ != nullptr) profiler_->end(stream_, index_);
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Profiler* profiler_;
    cudaStream_t stream_;
    std::size_t index_ = 0;
  };

 private:
  struct Span {
    std::string name;
    double bytes, flops;
    cudaEvent_t begin, end;
  };
  std::size_t begin(cudaStream_t stream, const std::string& name, double bytes, double flops);
  void end(cudaStream_t stream, std::size_t index);

  bool on_;
  std::vector<Span> spans_;
};

}  // namespace tandem::kernels::cuda
