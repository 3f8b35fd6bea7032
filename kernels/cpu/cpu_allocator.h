// Address ranges by mmap: reserved without access, opened and closed by page.
#pragma once

#include "kernels/allocator.h"

#include <map>

namespace tandem::kernels::cpu {

/// One thread.
class CpuAllocator final : public Allocator {
 public:
  explicit CpuAllocator(std::int64_t memory_bytes_max) : memory_bytes_max_(memory_bytes_max) {}
  Result<void*> reserve(std::int64_t bytes) override;
  Status map(void* base, std::int64_t from, std::int64_t to) override;
  void unmap(void* base, std::int64_t from, std::int64_t to) override;
  void release(void* base, std::int64_t bytes) override;

 private:
  struct Range {
    void* mapping;  ///< where mmap put it; base is the first huge-page boundary inside
    std::int64_t mapping_bytes;
    std::int64_t mapped;  ///< bytes now usable
  };
  const std::int64_t memory_bytes_max_;
  std::int64_t mapped_total_ = 0;
  std::map<void*, Range> ranges_;
};

}  // namespace tandem::kernels::cpu
