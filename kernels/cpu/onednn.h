// oneDNN's matrix product, the alternative that tools/bench_gemm measures our kernels against. The
// only file that knows oneDNN.
#pragma once

#include "kernels/cpu/gemm.h"

#include <memory>

namespace tandem::kernels::cpu {

/// y[t, out] = x[t, in] W for one fixed shape, with W re-ordered once into the layout oneDNN
/// prefers for it. x and W in `dtype`, y too. Runs on the caller's OpenMP threads.
class OneDnnProduct {
 public:
  /// `w` is row-major [out, in] (a forward product) or, with w_in_by_out, [in, out].
  OneDnnProduct(DType dtype, std::int64_t t, std::int64_t in, std::int64_t out, const void* w,
                bool w_in_by_out);
  ~OneDnnProduct();
  OneDnnProduct(const OneDnnProduct&) = delete;
  OneDnnProduct& operator=(const OneDnnProduct&) = delete;

  /// x [t, in] and y [t, out], contiguous.
  void run(const void* x, void* y);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tandem::kernels::cpu
