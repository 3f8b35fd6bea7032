// Private to kernels/cuda: address ranges whose pages are mapped as arenas grow (CUDA's virtual
// memory management), so that the KV cache can shrink for a job without moving.
#pragma once

#include "kernels/allocator.h"

#include <cuda.h>

#include <cstdint>
#include <map>

namespace tandem::kernels::cuda {

/// The driver's functions, found at run time: the module does not link the driver, so that it loads
/// (and says what is missing) where there is none.
struct Driver {
  CUresult (*address_reserve)(CUdeviceptr*, size_t, size_t, CUdeviceptr, unsigned long long);
  CUresult (*address_free)(CUdeviceptr, size_t);
  CUresult (*create)(CUmemGenericAllocationHandle*, size_t, const CUmemAllocationProp*,
                     unsigned long long);
  CUresult (*release)(CUmemGenericAllocationHandle);
  CUresult (*map)(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long);
  CUresult (*unmap)(CUdeviceptr, size_t);
  CUresult (*set_access)(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t);
  CUresult (*error_string)(CUresult, const char**);
  /// Throws DeviceError when the driver lacks one.
  static const Driver& get();
};

class CudaAllocator final : public Allocator {
 public:
  CudaAllocator(int device, std::int64_t memory_bytes_max);
  ~CudaAllocator() override;
  CudaAllocator(const CudaAllocator&) = delete;
  CudaAllocator& operator=(const CudaAllocator&) = delete;

  Result<void*> reserve(std::int64_t bytes) override { return reserve(bytes, Sharing::kNone); }
  Result<void*> reserve_for_peers(std::int64_t bytes) override {
    return reserve(bytes, Sharing::kPeers);
  }
  Status map(void* base, std::int64_t from, std::int64_t to) override;
  void unmap(void* base, std::int64_t from, std::int64_t to) override;
  void release(void* base, std::int64_t bytes) override;

 private:
  struct Range {
    std::int64_t bytes = 0;
    Sharing sharing = Sharing::kNone;
    /// Pieces of physical memory, by offset: a piece cannot be split, so only the smallest,
    /// kMapGranularity, can be given back exactly. Of a kPeers range kPeerPiece each.
    std::map<std::int64_t, CUmemGenericAllocationHandle> pieces;
  };
  Result<void*> reserve(std::int64_t bytes, Sharing sharing);
  Status map_piece(void* base, Range& range, std::int64_t offset);
  void unmap_piece(void* base, Range& range, std::int64_t offset);

  const int device_;
  const std::int64_t memory_bytes_max_;
  std::int64_t mapped_total_ = 0;
  std::map<void*, Range> ranges_;
};

}  // namespace tandem::kernels::cuda
