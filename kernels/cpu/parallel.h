// Private to kernels/cpu: work over rows on the backend's threads. What one index computes never
// depends on the split, so any thread count gives the same bits.
#pragma once

#include <omp.h>

#include <cstdint>

namespace tandem::kernels::cpu {

/// Work of fewer elements than this stays on the caller: waking threads costs some microseconds.
inline constexpr std::int64_t kParallelElements = 1 << 15;

/// f(index) for every index in [0, n), in contiguous shares; `elements`: how many one index
/// touches.
template <class F>
void parallel_for(int threads, std::int64_t n, std::int64_t elements, const F& f) {
  if (threads <= 1 || n <= 1 || n * elements < kParallelElements) {
    for (std::int64_t i = 0; i < n; ++i) f(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t i = 0; i < n; ++i) f(i);
}

/// As above for uneven work: f(index, thread), indices handed out as threads become free.
template <class F>
void parallel_for_dynamic(int threads, std::int64_t n, std::int64_t elements, const F& f) {
  if (threads <= 1 || n <= 1 || n * elements < kParallelElements) {
    for (std::int64_t i = 0; i < n; ++i) f(i, 0);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (std::int64_t i = 0; i < n; ++i) f(i, omp_get_thread_num());
}

/// Calls f<float>() or f<bf16>() by dtype.
#define TANDEM_CPU_DISPATCH(dtype, function, ...) \
  ((dtype) == DType::kF32 ? function<float>(__VA_ARGS__) : function<bf16>(__VA_ARGS__))

}  // namespace tandem::kernels::cpu
