// Where device memory comes from. Only arenas and packed weights call it, never a step.
#pragma once

#include "protocol/base/result.h"

#include <cstdint>

namespace tandem::kernels {

/// Every allocation and every arena slice starts on this boundary, on all backends: the meta
/// backend's arithmetic is exact only because of it.
inline constexpr std::int64_t kDeviceAlignment = 256;

/// Who else may map a range's memory. kPeers: processes on other GPUs of this host, by handles that
/// the driver gives (worker/comm makes use of it); memory is then taken in pieces of kPeerPiece.
enum class Sharing : int { kNone = 0, kPeers = 1 };

/// A GPU's kPeers range begins at an address that this divides, and grows by as much at a time.
inline constexpr std::int64_t kPeerPiece = 32 << 20;

/// An address range of one device. `map` makes a prefix of it usable; `unmap_beyond` gives pages
/// back without giving up the range.
class Allocator {
 public:
  virtual ~Allocator() = default;
  /// Reserves `bytes` of address space (no memory yet), aligned to kDeviceAlignment.
  /// refused_error when the address space is exhausted.
  virtual Result<void*> reserve(std::int64_t bytes) = 0;
  /// The same, of Sharing::kPeers; where nobody else could map it, reserve().
  virtual Result<void*> reserve_for_peers(std::int64_t bytes) { return reserve(bytes); }
  /// Makes [base + from, base + to) usable. refused_error with the numbers when memory is out.
  virtual Status map(void* base, std::int64_t from, std::int64_t to) = 0;
  /// Returns the memory of [base + from, base + to) to the device; the range stays reserved.
  virtual void unmap(void* base, std::int64_t from, std::int64_t to) = 0;
  /// Ends a reservation and what is mapped in it.
  virtual void release(void* base, std::int64_t bytes) = 0;
};

}  // namespace tandem::kernels
