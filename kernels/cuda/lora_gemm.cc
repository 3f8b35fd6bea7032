#include "kernels/cuda/lora_gemm.h"

#include <climits>
#include <cstdlib>
#include <string>

namespace tandem::kernels::cuda::lora_gemm {
namespace {

/// What TMA asks of a matrix: base and rows of 16 bytes, sizes and strides of 32 bits.
bool has_descriptor(const Matrix& m) {
  return m.dtype == DType::kBF16 && reinterpret_cast<std::uintptr_t>(m.data) % 16 == 0 &&
         m.ld % 8 == 0 && m.rows <= INT_MAX && m.columns <= INT_MAX;
}

/// Read once: for measurements.
[[maybe_unused]] std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

}  // namespace

bool fits(const Product& p, int compute_capability) {
#ifdef TANDEM_HAS_CUTLASS
  static const bool off = environment("TANDEM_LORA_GEMM") == "off";
  if (off) return false;
  if (compute_capability != 90 || p.a.transposed || p.out.transposed || p.u.transposed)
    return false;
  for (const Matrix* m : {&p.a, &p.b, &p.out})
    if (!has_descriptor(*m)) return false;
  if (p.out.rows == 0 || p.out.columns == 0 || p.a.columns == 0) return false;
  return p.u.columns == 0 ||
         (has_descriptor(p.u) && has_descriptor(p.c) && p.c.transposed == p.b.transposed);
#else
  (void)p, (void)compute_capability;
  return false;
#endif
}

Tiling choose_tiling(const Product& p) {
  static const std::string chosen = environment("TANDEM_LORA_GEMM_TILING");
  if (!chosen.empty())
    return {chosen.starts_with("wide"), chosen.find(",m") != std::string::npos,
            std::max(1, std::atoi(chosen.substr(chosen.rfind(',') + 1).c_str()))};
  return {p.out.columns >= 4096, true, 4};
}

void run(cudaStream_t stream, const Product& p) {
#ifdef TANDEM_HAS_CUTLASS
  return (p.b.transposed ? run_forward : run_backward)(stream, p, choose_tiling(p));
#else
  (void)stream, (void)p;
#endif
}

}  // namespace tandem::kernels::cuda::lora_gemm
