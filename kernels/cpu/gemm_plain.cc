#include "kernels/cpu/gemm_plain.h"

#include "kernels/cpu/gemm_layout.h"

#include <cstring>

namespace tandem::kernels::cpu {
namespace {

// Element (out o, in i) of a small operand, as stored.
template <class T>
T small_element(const ConstRows& w, SmallLayout layout, std::int64_t o, std::int64_t i) {
  return static_cast<const T*>(
      w.data)[layout == SmallLayout::kOutByIn ? o * w.ld + i : i * w.ld + o];
}

void retile_panel_f32(const PackedMatrix& w, std::int64_t k_begin, std::int64_t k_end, float* to) {
  const auto* from = static_cast<const float*>(w.data);
  const std::int64_t count = min_of(kPanel, k_end - k_begin);
  for (std::int64_t n = 0; n < w.n; ++n) {
    const float* row = from + (n / kPanel * w.k + k_begin) * kPanel + n % kPanel;
    for (std::int64_t k = 0; k < kPanel; ++k)
      to[n * kPanel + k] = k < count ? row[k * kPanel] : 0.0f;
  }
}

void retile_panel_bf16(const PackedMatrix& w, std::int64_t k_begin, std::int64_t k_end, bf16* to) {
  const auto* from = static_cast<const bf16*>(w.data);
  const std::int64_t stride = panel_bytes(DType::kBF16, w.k) / 2;
  std::memset(to, 0, static_cast<std::size_t>(panel_bytes(DType::kBF16, w.n)));
  for (std::int64_t n = 0; n < w.n; ++n)
    for (std::int64_t k = k_begin; k < min_of(k_end, k_begin + kPanel); ++k)
      to[bf16_panel_index(k - k_begin, n)] =
          from[n / kPanel * stride + bf16_panel_index(n % kPanel, k)];
}

}  // namespace

void pack_small_f32(ConstRows w, SmallLayout layout, std::int64_t out, std::int64_t in,
                    std::int64_t out_shift, float* to) {
  const std::int64_t panels = ceil_div(out_shift + out, kPanel);
#pragma omp parallel for schedule(static) if (panels * in > 256)
  for (std::int64_t panel = 0; panel < panels; ++panel)
    for (std::int64_t i = 0; i < in; ++i)
      for (std::int64_t j = 0; j < kPanel; ++j) {
        const std::int64_t o = panel * kPanel + j - out_shift;
        to[(panel * in + i) * kPanel + j] =
            o >= 0 && o < out ? small_element<float>(w, layout, o, i) : 0.0f;
      }
}

void pack_small_bf16(ConstRows w, SmallLayout layout, std::int64_t out, std::int64_t in,
                     std::int64_t out_shift, bf16* to) {
  const std::int64_t panels = ceil_div(out_shift + out, kPanel);
  const std::int64_t stride = panel_bytes(DType::kBF16, in) / 2;
  std::memset(to, 0, static_cast<std::size_t>(panels * stride * 2));
#pragma omp parallel for schedule(static) if (out * in > 4096)
  for (std::int64_t o = 0; o < out; ++o) {
    const std::int64_t column = out_shift + o;
    for (std::int64_t i = 0; i < in; ++i)
      to[column / kPanel * stride + bf16_panel_index(column % kPanel, i)] =
          small_element<bf16>(w, layout, o, i);
  }
}

void retile_plain(const PackedMatrix& w, std::int64_t k_begin, std::int64_t k_end, char* to) {
  const std::int64_t panels = ceil_div(k_end - k_begin, kPanel);
  const std::int64_t bytes = panel_bytes(w.format, w.n);
#pragma omp parallel for schedule(static)
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    const std::int64_t begin = k_begin + panel * kPanel;
    if (w.format == DType::kF32)
      retile_panel_f32(w, begin, k_end, reinterpret_cast<float*>(to + panel * bytes));
    else
      retile_panel_bf16(w, begin, k_end, reinterpret_cast<bf16*>(to + panel * bytes));
  }
}

}  // namespace tandem::kernels::cpu
