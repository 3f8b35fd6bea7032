#include "kernels/cpu/gemm_plain.h"

#include "kernels/cpu/gemm_kernels.h"
#include "kernels/cpu/gemm_layout.h"

#include <cstring>

namespace tandem::kernels::cpu {
namespace {

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

void pack_parts_f32(const SmallPart* parts, std::int64_t count, std::int64_t columns,
                    std::int64_t in, float* to) {
  // A step is so short that its part of a panel stays in L1 while the columns are filled in.
  constexpr std::int64_t kStep = 64;
  const std::int64_t panels = ceil_div(columns, kPanel), steps = ceil_div(in, kStep);
#pragma omp parallel for schedule(static) if (panels * in > 256)
  for (std::int64_t at = 0; at < panels * steps; ++at) {
    const std::int64_t panel = at / steps, begin = at % steps * kStep;
    const std::int64_t end = min_of(in, begin + kStep);
    float* block = to + panel * in * kPanel;
    for (std::int64_t j = 0; j < kPanel; ++j) {
      const auto* row =
          reinterpret_cast<const float*>(part_row(parts, count, panel * kPanel + j, sizeof(float)));
      for (std::int64_t i = begin; i < end; ++i)
        block[i * kPanel + j] = row != nullptr ? row[i] : 0.0f;
    }
  }
}

void pack_parts_bf16(const SmallPart* parts, std::int64_t count, std::int64_t columns,
                     std::int64_t in, bf16* to) {
  const std::int64_t panels = ceil_div(columns, kPanel);
  const std::int64_t stride = panel_bytes(DType::kBF16, in) / 2;
  std::memset(to, 0, static_cast<std::size_t>(panels * stride * 2));
#pragma omp parallel for schedule(static) if (columns * in > 4096)
  for (std::int64_t column = 0; column < columns; ++column) {
    const auto* row = reinterpret_cast<const bf16*>(part_row(parts, count, column, sizeof(bf16)));
    for (std::int64_t i = 0; row != nullptr && i < in; ++i)
      to[column / kPanel * stride + bf16_panel_index(column % kPanel, i)] = row[i];
  }
}

void pack_in_by_out_f32(ConstRows w, std::int64_t in, std::int64_t out, std::int64_t out_shift,
                        float* to) {
  const std::int64_t panels = ceil_div(out_shift + out, kPanel);
#pragma omp parallel for schedule(static) if (panels * in > 256)
  for (std::int64_t panel = 0; panel < panels; ++panel)
    for (std::int64_t i = 0; i < in; ++i)
      for (std::int64_t j = 0; j < kPanel; ++j) {
        const std::int64_t o = panel * kPanel + j - out_shift;
        to[(panel * in + i) * kPanel + j] =
            o >= 0 && o < out ? static_cast<const float*>(w.data)[i * w.ld + o] : 0.0f;
      }
}

void pack_in_by_out_bf16(ConstRows w, std::int64_t in, std::int64_t out, std::int64_t out_shift,
                         bf16* to) {
  const std::int64_t panels = ceil_div(out_shift + out, kPanel);
  const std::int64_t stride = panel_bytes(DType::kBF16, in) / 2;
  std::memset(to, 0, static_cast<std::size_t>(panels * stride * 2));
#pragma omp parallel for schedule(static) if (out * in > 4096)
  for (std::int64_t o = 0; o < out; ++o) {
    const std::int64_t column = out_shift + o;
    for (std::int64_t i = 0; i < in; ++i)
      to[column / kPanel * stride + bf16_panel_index(column % kPanel, i)] =
          static_cast<const bf16*>(w.data)[i * w.ld + o];
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
