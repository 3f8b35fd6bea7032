// Private to kernels/cuda: dense products through cuBLASLt, row-major as the rest of the engine
// sees them. blas.cc is the only file that calls cuBLASLt.
//
// The algorithm of a product is chosen once per shape by cuBLASLt's heuristic and kept, so the same
// shapes give the same bits. Under Numerics::kInvariant it is chosen for kInvariantRows rows
// whatever the number is, without splitting the inner size: every element is then summed in the
// same order whichever rows stand beside it (a transposed `a` sums over rows: no such claim). f32
// is computed in f32, never in TF32.
#pragma once

#include "kernels/cuda/profiler.h"
#include "kernels/exec.h"

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>

namespace tandem::kernels::cuda {

/// A row-major matrix: `ld` elements from row to row. The transposed view of W [n, k] is the same
/// memory with `transposed`.
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::kBF16;
  std::int64_t rows = 0, columns = 0, ld = 0;  ///< as stored
  bool transposed = false;
};
inline Matrix matrix(const Tensor& t) {
  return {t.data, t.dtype, t.dim(0), t.dim(1), t.dim(1), false};
}
inline Matrix transpose(Matrix m) {
  m.transposed = !m.transposed;
  return m;
}

inline constexpr std::int64_t kInvariantRows = 512;

class Blas {
 public:
  explicit Blas(Profiler& profiler);
  ~Blas();
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;

  /// out = a b + (accumulate ? out : 0) + bias of each column. a and b have one dtype (f32, bf16
  /// or f16), out that or f32, all summed in f32. `bias` [columns] of a's dtype, or null.
  /// `workspace`: kGemmWorkspaceBytes of scratch. Nothing happens when `out` is empty.
  void product(cudaStream_t stream, Numerics numerics, const Matrix& a, const Matrix& b,
               const Matrix& out, bool accumulate, const void* bias, void* workspace);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
  Profiler& profiler_;
};

}  // namespace tandem::kernels::cuda
