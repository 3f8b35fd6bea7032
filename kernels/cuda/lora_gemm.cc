#include "kernels/cuda/lora_gemm.h"

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <string>

namespace tandem::kernels::cuda::lora_gemm {
namespace {

constexpr std::int64_t kTileRows = 128, kWide = 256, kNarrow = 192;
/// Up to here the stores of a wide tile cost more than its better use of what it loads gives.
constexpr std::int64_t kShortInner = 2048;
constexpr int kSwizzleMax = 8;

#ifdef TANDEM_HAS_CUTLASS
/// What TMA asks of a matrix: base and rows of 16 bytes, sizes and strides of 32 bits.
bool has_descriptor(const Matrix& m, DType dtype) {
  return m.dtype == dtype && reinterpret_cast<std::uintptr_t>(m.data) % 16 == 0 && m.ld % 8 == 0 &&
         m.rows <= INT_MAX && m.columns <= INT_MAX;
}
#endif

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
  const DType dtype = p.a.dtype;
  if (!is_16_bit(dtype)) return false;
  for (const Matrix* m : {&p.a, &p.b, &p.out})
    if (!has_descriptor(*m, dtype)) return false;
  if (p.out.rows == 0 || p.out.columns == 0 || p.a.columns == 0) return false;
  return p.u.columns == 0 || (has_descriptor(p.u, dtype) && has_descriptor(p.c, dtype) &&
                              p.c.transposed == p.b.transposed);
#else
  (void)p, (void)compute_capability;
  return false;
#endif
}

Tiling choose_tiling(const Product& p) {
  static const std::string chosen = environment("TANDEM_LORA_GEMM_TILING");
  if (!chosen.empty())
    return {chosen.starts_with("wide"),
            std::max(1, std::atoi(chosen.substr(chosen.rfind(',') + 1).c_str()))};
  const auto tiles = [&](std::int64_t width) { return (p.out.columns + width - 1) / width; };
  const bool wasteful = tiles(kWide) * kWide > p.out.columns * 6 / 5;
  Tiling t;
  t.wide = p.a.columns > kShortInner && !wasteful;
  // The library rounds tiles up to a multiple of the swizzle, across, and down in twos; those
  // beyond the output cost as much as others.
  const std::int64_t across = tiles(t.wide ? kWide : kNarrow);
  const std::int64_t down = (p.out.rows + 2 * kTileRows - 1) / (2 * kTileRows);
  const auto fits_down = [&](int swizzle) {
    return (down + swizzle - 1) / swizzle * swizzle - down <= down / 32;
  };
  while (t.swizzle < kSwizzleMax && across % (2 * t.swizzle) == 0 && fits_down(2 * t.swizzle))
    t.swizzle *= 2;
  return t;
}

void run(cudaStream_t stream, const Product& p) {
#ifdef TANDEM_HAS_CUTLASS
  const bool half = p.a.dtype == DType::kF16;
  const auto forward = half ? run_forward_f16 : run_forward_bf16;
  const auto backward = half ? run_backward_f16 : run_backward_bf16;
  (p.b.transposed ? forward : backward)(stream, p, choose_tiling(p));
#else
  (void)stream, (void)p;
#endif
}

}  // namespace tandem::kernels::cuda::lora_gemm
