#include "kernels/cpu/cpu_allocator.h"

#include "kernels/arena.h"
#include "protocol/base/units.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

namespace tandem::kernels::cpu {

Result<void*> CpuAllocator::reserve(std::int64_t bytes) {
  const std::int64_t whole = round_up(bytes, kMapGranularity) + kMapGranularity;
  void* mapping = mmap(nullptr, static_cast<std::size_t>(whole), PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED)
    return refused_error(str("reserving ", format_bytes(bytes),
                             " of address space: ", std::strerror(errno), " (see ulimit -v)"));
  const auto at = reinterpret_cast<std::uintptr_t>(mapping);
  const auto base =
      reinterpret_cast<void*>(round_up(static_cast<std::int64_t>(at), kMapGranularity));
  // Weights and activations are streamed: huge pages keep the TLB out of it. Best effort.
  (void)madvise(mapping, static_cast<std::size_t>(whole), MADV_HUGEPAGE);
  ranges_[base] = {mapping, whole, 0};
  return base;
}

Status CpuAllocator::map(void* base, std::int64_t from, std::int64_t to) {
  auto range = ranges_.find(base);
  TANDEM_CHECK(range != ranges_.end(), "map of unknown range ", base);
  const std::int64_t bytes = to - from;
  if (mapped_total_ + bytes > memory_bytes_max_)
    return refused_error(str("out of memory: ", format_bytes(bytes), " asked, ",
                             format_bytes(mapped_total_), " in use, limit ",
                             format_bytes(memory_bytes_max_)));
  if (mprotect(static_cast<char*>(base) + from, static_cast<std::size_t>(bytes),
               PROT_READ | PROT_WRITE) != 0)
    return refused_error(str("mapping ", format_bytes(bytes), ": ", std::strerror(errno)));
  range->second.mapped += bytes;
  mapped_total_ += bytes;
  return {};
}

void CpuAllocator::unmap(void* base, std::int64_t from, std::int64_t to) {
  auto range = ranges_.find(base);
  TANDEM_CHECK(range != ranges_.end(), "unmap of unknown range ", base);
  char* p = static_cast<char*>(base) + from;
  const auto bytes = static_cast<std::size_t>(to - from);
  TANDEM_CHECK_EQ(madvise(p, bytes, MADV_DONTNEED), 0, std::strerror(errno));
  TANDEM_CHECK_EQ(mprotect(p, bytes, PROT_NONE), 0, std::strerror(errno));
  range->second.mapped -= to - from;
  mapped_total_ -= to - from;
}

void CpuAllocator::release(void* base, std::int64_t) {
  auto range = ranges_.find(base);
  TANDEM_CHECK(range != ranges_.end(), "release of unknown range ", base);
  munmap(range->second.mapping, static_cast<std::size_t>(range->second.mapping_bytes));
  mapped_total_ -= range->second.mapped;
  ranges_.erase(range);
}

}  // namespace tandem::kernels::cpu
