// Private to libtandem_nccl.so: memory of the GPUs of one gang on one host, mapped into each of its
// processes. Every rank has a window, which all may write: flags, and room for small sums. What
// tensors lie in (Sharing::kPeers) is mapped when it is shared, for reading.
//
// Calls that all members make at once leave it to the caller to agree on whether all succeeded. One
// thread. The mapped memory lives until the last process that maps it gives it up: a peer that
// dies takes nothing away.
#pragma once

#include "worker/comm/nccl/peer_sockets.h"

#include <cuda.h>

#include <memory>

namespace tandem::worker::comm {

/// Ranks that a window has flags for.
inline constexpr int kPeersMax = 16;
/// What a sum over peers moves at once.
inline constexpr std::int64_t kSumAtOnceBytes = 4 << 20;
/// It goes through rooms of this size, for parts are rounded up to whole vectors; two on either
/// side of each window: one for addends, by rank, and one for sums (peer_kernels.h).
inline constexpr std::int64_t kRoomBytes = kSumAtOnceBytes + 4096;

/// What lies at the begin of a window; counters that only grow (and wrap).
struct PeerFlags {
  std::uint32_t ready[kPeersMax];  ///< by rank: how many copies its data is ready for
  std::uint32_t read[kPeersMax];   ///< by rank: how many copies it has read
  std::uint32_t turns;             ///< of this rank's sums, counted by its own kernels
};
inline constexpr std::int64_t kFlagBytes = 64 << 10;
static_assert(sizeof(PeerFlags) <= kFlagBytes);
inline constexpr std::int64_t kWindowBytes = 18 << 20;  ///< whole pages of 2 MiB
static_assert(kFlagBytes + 4 * kRoomBytes <= kWindowBytes);

/// The driver's functions that this takes, found at run time.
struct PeerDriver {
  CUresult (*address_reserve)(CUdeviceptr*, size_t, size_t, CUdeviceptr, unsigned long long);
  CUresult (*address_free)(CUdeviceptr, size_t);
  CUresult (*create)(CUmemGenericAllocationHandle*, size_t, const CUmemAllocationProp*,
                     unsigned long long);
  CUresult (*release)(CUmemGenericAllocationHandle);
  CUresult (*map)(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long);
  CUresult (*unmap)(CUdeviceptr, size_t);
  CUresult (*set_access)(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t);
  CUresult (*retain)(CUmemGenericAllocationHandle*, void*);
  CUresult (*export_handle)(void*, CUmemGenericAllocationHandle, CUmemAllocationHandleType,
                            unsigned long long);
  CUresult (*import_handle)(CUmemGenericAllocationHandle*, void*, CUmemAllocationHandleType);
  CUresult (*batch)(CUstream, unsigned, CUstreamBatchMemOpParams*, unsigned);
  CUresult (*error_string)(CUresult, const char**);
  static Result<PeerDriver> load();
};

class PeerMemory {
 public:
  /// Every member's memory that `bytes` of this one's lie in, as this process addresses it.
  struct Region {
    const char* mine = nullptr;
    std::int64_t bytes = 0;
    std::vector<char*> ranks;  ///< this one's too
  };

  /// All members at once. unavailable_error: another process could not be reached, or its GPU's
  /// memory cannot be mapped here.
  static Result<std::unique_ptr<PeerMemory>> create(std::vector<OwnedFd> sockets, int device,
                                                    int rank, int size);
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  /// All members at once, each with as many bytes: maps the others' here. The region counts from
  /// keep() on, and never after drop(). unavailable_error: the memory is not Sharing::kPeers.
  Status share(const void* begin, std::int64_t bytes);
  void keep();
  void drop();
  /// The region that these bytes lie in; null: they are not shared.
  [[nodiscard]] const Region* find(const void* begin, std::int64_t bytes) const;

  [[nodiscard]] const PeerDriver& driver() const { return driver_; }
  [[nodiscard]] int rank() const { return rank_; }
  [[nodiscard]] int size() const { return size_; }
  /// Begins with PeerFlags, all 0 at first; rooms lie at kFlagBytes, all ones at first.
  [[nodiscard]] char* window(int rank) const {
    return windows_.ranks[static_cast<std::size_t>(rank)];
  }
  [[nodiscard]] PeerFlags* flags(int rank) const {
    return reinterpret_cast<PeerFlags*>(window(rank));
  }

 private:
  PeerMemory(const PeerDriver& driver, std::vector<OwnedFd> sockets, int device, int rank,
             int size);
  struct Mapping {
    CUdeviceptr base = 0;
    std::int64_t bytes = 0;
    std::int64_t piece = 0;
    std::int64_t mapped = 0;
  };
  Status make_window();
  /// Tells the others of `fds`, maps what they tell, and fills `region` but for this rank.
  Status meet(PeerMessage mine, std::int64_t piece, CUmemAccess_flags access, Region& region);
  Result<char*> map(const std::vector<OwnedFd>& fds, std::int64_t piece, CUmemAccess_flags access);
  [[nodiscard]] std::string text(CUresult code, const char* what) const;

  const PeerDriver driver_;
  const PeerSockets sockets_;
  const int device_, rank_, size_;
  CUdeviceptr window_ = 0;
  CUmemGenericAllocationHandle window_handle_ = 0;
  Region windows_, candidate_;
  std::vector<Region> regions_;
  std::vector<Mapping> mappings_;  ///< of others' memory
};

}  // namespace tandem::worker::comm
