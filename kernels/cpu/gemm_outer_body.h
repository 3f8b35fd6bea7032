// Weight gradients without AMX, included by one file per instruction set (see gemm_f32_body.h).
#include "kernels/cpu/gemm_kernels.h"
#include "kernels/cpu/simd16.h"

#include <omp.h>

namespace tandem::kernels::cpu {
namespace {

float outer_value(const Outer& o, std::int64_t row, std::int64_t column) {
  const std::int64_t at = row * o.ldx + column;
  if (!o.bf16_rows) return static_cast<const float*>(o.x)[at];
  return __builtin_bit_cast(
      float, static_cast<std::uint32_t>(static_cast<const bf16*>(o.x)[at].bits) << 16);
}

// 32 columns of rows [row, end) of y as f32, zero beyond the last column.
void widen_columns(const Outer& o, std::int64_t row, std::int64_t end, std::int64_t column,
                   float* to) {
  const std::int64_t columns = min_of(kOuterColumns, o.many - column);
  for (std::int64_t i = row; i < end; ++i)
    for (std::int64_t j = 0; j < kOuterColumns; ++j) {
      const std::int64_t at = i * o.ldy + column + j;
      to[(i - row) * kOuterColumns + j] =
          j >= columns ? 0.0f
          : o.bf16_rows
              ? __builtin_bit_cast(
                    float, static_cast<std::uint32_t>(static_cast<const bf16*>(o.y)[at].bits) << 16)
              : static_cast<const float*>(o.y)[at];
    }
}

// R rows of the sums, 32 columns; x packed [t][few padded to 32].
template <int R>
void add_outer(const float* x, std::int64_t ldx, const float* y, std::int64_t rows, bool load,
               float* sums, std::int64_t stride) {
  V s[R][2];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 2; ++j) s[r][j] = load ? vload(sums + r * stride + j * 16) : vset(0.0f);
  for (std::int64_t i = 0; i < rows; ++i) {
    const V y0 = vload(y + i * kOuterColumns), y1 = vload(y + i * kOuterColumns + 16);
    TANDEM_UNROLL(8)
    for (int r = 0; r < R; ++r) {
      const V a = vset(x[i * ldx + r]);
      s[r][0] = vfma(a, y0, s[r][0]);
      s[r][1] = vfma(a, y1, s[r][1]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 2; ++j) vstore(sums + r * stride + j * 16, s[r][j]);
}

void add_group(const Outer& o, std::int64_t column, std::int64_t stride) {
  const std::int64_t columns = min_of(kOuterColumns, o.many - column);
  for (std::int64_t i = 0; i < o.few; ++i)
    for (std::int64_t j = 0; j < columns; ++j) {
      float* c = o.transposed ? o.c + (column + j) * o.ldc + i : o.c + i * o.ldc + column + j;
      *c += o.alpha * o.sums[i * stride + column + j];
    }
}

}  // namespace

void TANDEM_ISA_NAME(outer)(const Outer& o) {
  constexpr int kRows = 4;
  const std::int64_t few = round_up(o.few, 32), groups = ceil_div(o.many, kOuterColumns);
  const std::int64_t stride = groups * kOuterColumns;
  auto* packed = reinterpret_cast<float*>(o.few_packed);
#pragma omp parallel
  {
    auto* block =
        reinterpret_cast<float*>(o.per_thread + omp_get_thread_num() * kOuterBytesPerThread);
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < o.t; ++i)
      for (std::int64_t j = 0; j < few; ++j)
        packed[i * few + j] = j < o.few ? outer_value(o, i, j) : 0.0f;
#pragma omp for schedule(static)
    for (std::int64_t group = 0; group < groups; ++group) {
      const std::int64_t column = group * kOuterColumns;
      for (std::int64_t row = 0; row < o.t; row += kOuterRows) {
        const std::int64_t end = min_of(o.t, row + kOuterRows);
        widen_columns(o, row, end, column, block);
        for (std::int64_t j = 0; j < o.few; j += kRows)
          add_outer<kRows>(packed + row * few + j, few, block, end - row, row > 0,
                           o.sums + j * stride + column, stride);
      }
      add_group(o, column, stride);
    }
  }
}

}  // namespace tandem::kernels::cpu
