#include "kernels/memory_ledger.h"

namespace tandem::kernels {

const char* memory_kind_name(MemoryKind kind) {
  switch (kind) {
    case MemoryKind::kWeights:
      return "weights";
    case MemoryKind::kAdapters:
      return "adapters";
    case MemoryKind::kGradients:
      return "gradients";
    case MemoryKind::kOptimizer:
      return "optimizer";
    case MemoryKind::kActivations:
      return "activations";
    case MemoryKind::kKv:
      return "kv";
    case MemoryKind::kWorkspace:
      return "workspace";
    case MemoryKind::kComm:
      return "comm";
  }
  return "unknown";
}

void MemoryLedger::add(MemoryKind kind, std::int64_t bytes) {
  TANDEM_CHECK_GE(bytes, 0);
  const auto k = static_cast<std::size_t>(kind);
  live_[k] += bytes;
  live_total_ += bytes;
  if (live_[k] > peak_[k]) peak_[k] = live_[k].load();
  if (live_total_ > peak_total_) peak_total_ = live_total_.load();
}

void MemoryLedger::sub(MemoryKind kind, std::int64_t bytes) {
  const auto k = static_cast<std::size_t>(kind);
  TANDEM_CHECK(bytes >= 0 && bytes <= live_[k], "ledger of ", memory_kind_name(kind), ": giving ",
               bytes, " B back while ", live_[k].load(), " B live");
  live_[k] -= bytes;
  live_total_ -= bytes;
}

}  // namespace tandem::kernels
