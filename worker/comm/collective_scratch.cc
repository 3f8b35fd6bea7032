#include "worker/comm/collective_scratch.h"

#include "protocol/base/units.h"

#include <algorithm>

namespace tandem::worker::comm {

namespace {

float widen(float x) {
  return x;
}
float widen(bf16 x) {
  return to_f32(x);
}
float widen(f16 x) {
  return to_f32(x);
}
double widen(double x) {
  return x;
}
template <class T, class Sum>
T narrow(Sum sum) {
  if constexpr (std::is_same_v<T, double>)
    return sum;
  else
    return from_f32<T>(sum);
}

template <class T>
void sum_parts(std::span<const void* const> parts, std::int64_t count, void* out) {
  using Sum = decltype(widen(T{}));
  constexpr std::int64_t kBlock = 1024;  // sums of a block stay in the first cache
  Sum sums[kBlock];
  for (std::int64_t begin = 0; begin < count; begin += kBlock) {
    const std::int64_t n = std::min(kBlock, count - begin);
    std::fill_n(sums, n, Sum{0});
    for (const void* part : parts) {
      const T* x = static_cast<const T*>(part) + begin;
      for (std::int64_t e = 0; e < n; ++e) sums[e] += widen(x[e]);
    }
    T* to = static_cast<T*>(out) + begin;
    for (std::int64_t e = 0; e < n; ++e) to[e] = narrow<T>(sums[e]);
  }
}

}  // namespace

SumPlan all_reduce_plan(std::int64_t elements, DType dtype, int size) {
  if (size == 1 || elements == 0) return {};
  SumPlan plan;
  plan.piece = std::min(elements, kPieceBytes / dtype_bytes(dtype));
  plan.slice = (plan.piece + size - 1) / size;
  plan.bytes = round_up(plan.slice * size * dtype_bytes(dtype), kernels::kDeviceAlignment);
  return plan;
}

SumPlan reduce_scatter_plan(std::int64_t elements, DType dtype, int size) {
  if (size == 1 || elements == 0) return {};
  SumPlan plan;
  plan.piece =
      std::min(elements, std::max<std::int64_t>(1, kPieceBytes / dtype_bytes(dtype) / size));
  plan.slice = plan.piece;
  plan.bytes = round_up(plan.piece * size * dtype_bytes(dtype), kernels::kDeviceAlignment);
  return plan;
}

void sum_in_rank_order(std::span<const void* const> parts, DType dtype, std::int64_t count,
                       void* out) {
  switch (dtype) {
    case DType::kF32:
      return sum_parts<float>(parts, count, out);
    case DType::kBF16:
      return sum_parts<bf16>(parts, count, out);
    case DType::kF16:
      return sum_parts<f16>(parts, count, out);
    case DType::kF64:
      return sum_parts<double>(parts, count, out);
    default:
      TANDEM_CHECK(false, "no sum over ranks of ", dtype_name(dtype));
  }
}

}  // namespace tandem::worker::comm
