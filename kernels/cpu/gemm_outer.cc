#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/gemm_kernels.h"
#include "protocol/base/check.h"

#include <omp.h>

namespace tandem::kernels::cpu {
namespace {

// The short side (a rank) runs along the sums' rows, the long one along their columns.
struct Sides {
  std::int64_t few, many;
};
Sides sides_of(std::int64_t m, std::int64_t n) {
  return m <= n ? Sides{m, n} : Sides{n, m};
}

}  // namespace

std::int64_t outer_accumulate_scratch(DType, std::int64_t t, std::int64_t m, std::int64_t n,
                                      int threads) {
  const Sides s = sides_of(m, n);
  return outer_few_bytes(t, s.few) + outer_sums_bytes(s.few, s.many) +
         threads * kOuterBytesPerThread;
}

void outer_accumulate(std::int64_t t, std::int64_t m, std::int64_t n, ConstRows a, ConstRows b,
                      float alpha, float* c, std::int64_t ldc, std::span<std::byte> scratch) {
  TANDEM_CHECK(a.dtype == b.dtype, "a is ", dtype_name(a.dtype), ", b ", dtype_name(b.dtype));
  TANDEM_CHECK_GE(static_cast<std::int64_t>(scratch.size()),
                  outer_accumulate_scratch(a.dtype, t, m, n, omp_get_max_threads()), "scratch");
  if (t == 0 || m == 0 || n == 0) return;
  const Sides s = sides_of(m, n);
  const ConstRows& few = m <= n ? a : b;
  const ConstRows& many = m <= n ? b : a;
  Outer o;
  o.t = t;
  o.few = s.few;
  o.many = s.many;
  o.x = few.data;
  o.ldx = few.ld;
  o.y = many.data;
  o.ldy = many.ld;
  o.bf16_rows = a.dtype == DType::kBF16;
  o.alpha = alpha;
  o.c = c;
  o.ldc = ldc;
  o.transposed = m > n;
  o.few_packed = reinterpret_cast<char*>(scratch.data());
  o.sums = reinterpret_cast<float*>(o.few_packed + outer_few_bytes(t, s.few));
  o.per_thread = reinterpret_cast<char*>(o.sums) + outer_sums_bytes(s.few, s.many);
  const Isa level = isa();
  if (level == Isa::kAmx && o.bf16_rows) return outer_bf16_amx(o);
  level >= Isa::kAvx512 ? outer_avx512(o) : level == Isa::kAvx2 ? outer_avx2(o) : outer_generic(o);
}

}  // namespace tandem::kernels::cpu
