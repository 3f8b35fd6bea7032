// The packed layouts and what is done once per weight or per row of an embedding.
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/gemm_layout.h"
#include "protocol/base/check.h"

#include <algorithm>
#include <cstring>

namespace tandem::kernels::cpu {
namespace {

float element(const ConstRows& src, std::int64_t i, std::int64_t j) {
  const std::int64_t at = i * src.ld + j;
  return src.dtype == DType::kF32 ? static_cast<const float*>(src.data)[at]
                                  : to_f32(static_cast<const bf16*>(src.data)[at]);
}

void pack_panel_f32(float* panel, std::int64_t k, std::int64_t row, std::int64_t rows,
                    const ConstRows& src) {
  for (std::int64_t j = 0; j < k; ++j)
    for (std::int64_t i = 0; i < kPanel; ++i)
      panel[j * kPanel + i] = i < rows ? element(src, row + i, j) : 0.0f;
}

void pack_panel_bf16(bf16* panel, std::int64_t k, std::int64_t row, std::int64_t rows,
                     const ConstRows& src) {
  const std::int64_t k_padded = round_up(k, kTileK);
  std::memset(panel, 0, static_cast<std::size_t>(k_padded * kPanel) * sizeof(bf16));
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < k; ++j)
      panel[bf16_panel_index(i, j)] =
          src.dtype == DType::kBF16 ? static_cast<const bf16*>(src.data)[(row + i) * src.ld + j]
                                    : to_bf16(element(src, row + i, j));
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
    if (format == DType::kF32)
      pack_panel_f32(reinterpret_cast<float*>(panel), k, i, rows, src);
    else
      pack_panel_bf16(reinterpret_cast<bf16*>(panel), k, i, rows, src);
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
