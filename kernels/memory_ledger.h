// Counts the bytes that live on one device, by what they are for. The estimator's promise is that a
// dry run on the meta backend and the real run leave the same peak here, byte for byte.
// One ledger per device; one thread (the device thread) writes, any thread may read a snapshot.
#pragma once

#include "protocol/base/check.h"

#include <array>
#include <atomic>
#include <cstdint>

namespace tandem::kernels {

enum class MemoryKind : int {
  kWeights,
  kAdapters,
  kGradients,
  kOptimizer,
  kActivations,
  kKv,
  kWorkspace,
  kComm
};
inline constexpr int kMemoryKindCount = 8;
/// "weights", "adapters", ...: used in estimates and metrics.
const char* memory_kind_name(MemoryKind kind);

class MemoryLedger {
 public:
  void add(MemoryKind kind, std::int64_t bytes);
  void sub(MemoryKind kind, std::int64_t bytes);
  [[nodiscard]] std::int64_t live(MemoryKind kind) const { return at(live_, kind); }
  [[nodiscard]] std::int64_t peak(MemoryKind kind) const { return at(peak_, kind); }
  [[nodiscard]] std::int64_t live_total() const { return live_total_; }
  /// The largest sum of all kinds at one moment (at most the sum of the kinds' peaks).
  [[nodiscard]] std::int64_t peak_total() const { return peak_total_; }

 private:
  using Counters = std::array<std::atomic<std::int64_t>, kMemoryKindCount>;
  static std::int64_t at(const Counters& c, MemoryKind kind) {
    return c[static_cast<std::size_t>(kind)];
  }
  Counters live_{}, peak_{};
  std::atomic<std::int64_t> live_total_{0}, peak_total_{0};
};

}  // namespace tandem::kernels
