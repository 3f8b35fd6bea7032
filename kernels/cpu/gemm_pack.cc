// The packed layouts and what is done once per weight or per row of an embedding.
#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/gemm_kernels.h"
#include "kernels/cpu/gemm_layout.h"
#include "protocol/base/check.h"

#include <algorithm>

namespace tandem::kernels::cpu {
namespace {

template <class From>
const From* row_of(const ConstRows& src, std::int64_t i) {
  return static_cast<const From*>(src.data) + i * src.ld;
}

template <class From>
void pack_panel_f32(float* panel, std::int64_t k, std::int64_t row, std::int64_t rows,
                    const ConstRows& src) {
  constexpr std::int64_t kColumns = 64;  // a piece of the panel that stays in L1
  for (std::int64_t j = 0; j < k; j += kColumns)
    for (std::int64_t i = 0; i < kPanel; ++i) {
      const From* from = i < rows ? row_of<From>(src, row + i) : nullptr;
      for (std::int64_t c = j; c < std::min(k, j + kColumns); ++c)
        panel[c * kPanel + i] = from != nullptr ? to_f32(from[c]) : 0.0f;
    }
}

bf16 rounded(float x) {
  return to_bf16(x);
}
bf16 rounded(bf16 x) {
  return x;
}

template <class From>
void pack_panel_bf16(bf16* panel, std::int64_t k, std::int64_t row, std::int64_t rows,
                     const ConstRows& src) {
  const bf16 zero{0};
  for (std::int64_t j = 0; j < round_up(k, kTileK); j += kTileK)
    for (std::int64_t i = 0; i < kPanel; ++i) {
      const From* from = i < rows ? row_of<From>(src, row + i) : nullptr;
      bf16* to = panel + bf16_panel_index(i, j);
      for (std::int64_t c = 0; c < kTileK; ++c)
        to[c / 2 * 2 * kTileRows + c % 2] =
            from != nullptr && j + c < k ? rounded(from[j + c]) : zero;
    }
}

void pack_panel(char* panel, DType format, std::int64_t k, std::int64_t row, std::int64_t rows,
                const ConstRows& src) {
  const bool from_f32 = src.dtype == DType::kF32;
  if (format == DType::kF32) {
    auto* to = reinterpret_cast<float*>(panel);
    from_f32 ? pack_panel_f32<float>(to, k, row, rows, src)
             : pack_panel_f32<bf16>(to, k, row, rows, src);
  } else if (isa() >= Isa::kAvx512Bf16) {
    const char* from = static_cast<const char*>(src.data) + row * src.ld * dtype_bytes(src.dtype);
    pack_panel_bf16_avx512(from, from_f32, src.ld, rows, k, panel);
  } else {
    auto* to = reinterpret_cast<bf16*>(panel);
    from_f32 ? pack_panel_bf16<float>(to, k, row, rows, src)
             : pack_panel_bf16<bf16>(to, k, row, rows, src);
  }
}

template <class To>
void read_row(const PackedMatrix& w, std::int64_t row, To* out) {
  const std::int64_t panel = row / kPanel, i = row % kPanel;
  const auto* data = static_cast<const char*>(w.data) + panel * panel_bytes(w.format, w.k);
  if (w.format == DType::kF32) {
    const auto* from = reinterpret_cast<const float*>(data);
    for (std::int64_t j = 0; j < w.k; ++j) out[j] = from_f32<To>(from[j * kPanel + i]);
  } else {
    const auto* from = reinterpret_cast<const bf16*>(data);
    for (std::int64_t j = 0; j < w.k; ++j) {
      const bf16 x = from[bf16_panel_index(i, j)];
      if constexpr (sizeof(To) == sizeof(bf16))
        out[j] = x;
      else
        out[j] = to_f32(x);
    }
  }
}

}  // namespace

std::int64_t packed_bytes(DType format, std::int64_t n, std::int64_t k) {
  TANDEM_CHECK(format == DType::kF32 || format == DType::kBF16, "packed format ",
               dtype_name(format));
  return round_up(n, kPanel) / kPanel * panel_bytes(format, k);
}

void pack_rows(void* packed, DType format, std::int64_t n, std::int64_t k, std::int64_t row,
               std::int64_t count, ConstRows src) {
  TANDEM_CHECK(row % kPackRows == 0 && row >= 0 && row + count <= n, "rows ", row, "+", count,
               " of ", n);
  TANDEM_CHECK(count % kPackRows == 0 || row + count == n, "rows ", row, "+", count, " of ", n);
  for (std::int64_t i = 0; i < count; i += kPanel) {
    auto* panel = static_cast<char*>(packed) + (row + i) / kPanel * panel_bytes(format, k);
    const std::int64_t rows = std::min(kPanel, count - i);
    pack_panel(panel, format, k, i, rows, src);
  }
}

void read_rows(const PackedMatrix& w, std::span<const std::int32_t> ids, Rows out) {
  const auto count = static_cast<std::int64_t>(ids.size());
#pragma omp parallel for schedule(static) if (count > 8)
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int32_t id = ids[static_cast<std::size_t>(i)];
    TANDEM_CHECK(id >= 0 && id < w.n, "row ", id, " of ", w.n);
    if (out.dtype == DType::kF32)
      read_row(w, id, static_cast<float*>(out.data) + i * out.ld);
    else
      read_row(w, id, static_cast<bf16*>(out.data) + i * out.ld);
  }
}

}  // namespace tandem::kernels::cpu
