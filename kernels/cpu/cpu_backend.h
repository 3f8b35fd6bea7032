// The CPU backend: f32 and bf16 on OpenMP threads. f32 is Invariant always (a row's bits depend on
// its own sequence and adapter alone, not on batch, chunking or threads).
#pragma once

#include "kernels/ops.h"

#include <cstdint>

namespace tandem::kernels {

struct CpuOptions {
  int threads = 0;  ///< OpenMP threads of the ops; 0: one per processor this process may run on
  /// map() refuses beyond this many bytes; 0: the machine's physical memory.
  std::int64_t memory_bytes_max = 0;
};

/// This machine as workspace arithmetic sees it. Any thread.
DeviceProfile cpu_profile(const CpuOptions& options);

/// Ops are called by one thread (any one); they use `threads` OpenMP threads each.
Backend make_cpu_backend(const CpuOptions& options);

}  // namespace tandem::kernels
