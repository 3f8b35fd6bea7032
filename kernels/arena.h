// Bump allocation in one reserved address range, booked in the ledger under one kind. All tensors
// of the engine come from arenas; a step allocates by bumping and frees by resetting to a mark, so
// no step ever calls the system allocator. One thread.
//
// The ledger counts what the device has lost: the mapped pages, which stay mapped after reset()
// until trim(). It therefore moves in steps of kMapGranularity; peak_used() is the exact number.
#pragma once

#include "kernels/allocator.h"
#include "kernels/memory_ledger.h"
#include "kernels/tensor.h"

#include <string>

namespace tandem::kernels {

/// Arenas map and unmap in multiples of this: a huge page of a CPU, a page of a GPU.
inline constexpr std::int64_t kMapGranularity = 2 << 20;

class Arena {
 public:
  /// Reserves `capacity_bytes` of address space; memory is mapped as it is first used and kept
  /// until trim(). `name` appears in errors. Where address space is short, a large arena has less
  /// (capacity() says how much); fails (CHECK) only when it is exhausted.
  Arena(Allocator& allocator, MemoryLedger& ledger, MemoryKind kind, std::string name,
        std::int64_t capacity_bytes, Sharing sharing = Sharing::kNone);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  /// `bytes` rounded up to kDeviceAlignment, uninitialised. Throws DeviceError when the capacity or
  /// the device's memory is exhausted: admission should have refused the job before.
  void* alloc_bytes(std::int64_t bytes);
  Tensor alloc(Shape shape, DType dtype);

  /// Everything allocated after mark() is freed by reset(mark).
  [[nodiscard]] std::int64_t mark() const { return used_; }
  void reset(std::int64_t mark);
  [[nodiscard]] std::int64_t used() const { return used_; }
  /// The largest used() since construction.
  [[nodiscard]] std::int64_t peak_used() const { return peak_used_; }
  [[nodiscard]] std::int64_t capacity() const { return capacity_; }
  /// Gives pages beyond what is in use back to the device.
  void trim();

 private:
  Allocator& allocator_;
  MemoryLedger& ledger_;
  const MemoryKind kind_;
  const std::string name_;
  std::int64_t capacity_;  ///< these two stay as the constructor left them
  std::int64_t reserved_;
  void* base_ = nullptr;
  std::int64_t used_ = 0;
  std::int64_t peak_used_ = 0;
  std::int64_t mapped_ = 0;
};

/// Frees what was allocated during its life.
class ArenaScope {
 public:
  explicit ArenaScope(Arena& arena) : arena_(arena), mark_(arena.mark()) {}
  ~ArenaScope() { arena_.reset(mark_); }
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena& arena_;
  const std::int64_t mark_;
};

}  // namespace tandem::kernels
