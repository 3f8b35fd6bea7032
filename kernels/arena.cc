#include "kernels/arena.h"

#include "kernels/device_error.h"
#include "protocol/base/units.h"

#include <utility>

namespace tandem::kernels {

/// Where address space is short (ulimit -v, a sanitizer's own layout), an arena of more than this
/// has less than it asked for.
constexpr std::int64_t kReservedBytesEnough = std::int64_t{1} << 30;

Arena::Arena(Allocator& allocator, MemoryLedger& ledger, MemoryKind kind, std::string name,
             std::int64_t capacity_bytes, Sharing sharing)
    : allocator_(allocator),
      ledger_(ledger),
      kind_(kind),
      name_(std::move(name)),
      capacity_(capacity_bytes),
      reserved_(round_up(capacity_bytes > 0 ? capacity_bytes : 1, kMapGranularity)) {
  TANDEM_CHECK_GE(capacity_bytes, 0, "arena ", name_);
  const auto reserve = [&] {
    return sharing == Sharing::kPeers ? allocator_.reserve_for_peers(reserved_)
                                      : allocator_.reserve(reserved_);
  };
  auto base = reserve();
  while (!base.ok() && reserved_ > kReservedBytesEnough) {
    capacity_ = reserved_ = round_up(reserved_ / 4, kMapGranularity);
    base = reserve();
  }
  TANDEM_CHECK(base.ok(), "arena ", name_, ": ", base.status().to_string());
  base_ = *base;
}

Arena::~Arena() {
  allocator_.release(base_, reserved_);
  ledger_.sub(kind_, mapped_);
}

void* Arena::alloc_bytes(std::int64_t bytes) {
  TANDEM_CHECK_GE(bytes, 0, "arena ", name_);
  const std::int64_t rounded = round_up(bytes, kDeviceAlignment);
  // Zero bytes still need a place inside the range, so that the pointer names nobody else's memory.
  const std::int64_t end = used_ + rounded;
  if (end > round_up(capacity_, kDeviceAlignment))
    throw DeviceError(str("arena ", name_, ": ", bytes, " B asked, ", used_, " B in use, capacity ",
                          capacity_, " B (", format_bytes(capacity_), ")"));
  if (end > mapped_) {
    const std::int64_t to = round_up(end, kMapGranularity);
    if (Status status = allocator_.map(base_, mapped_, to); !status.ok())
      throw DeviceError(str("arena ", name_, ": ", status.to_string()));
    ledger_.add(kind_, to - mapped_);
    mapped_ = to;
  }
  void* p = static_cast<char*>(base_) + used_;
  used_ = end;
  if (used_ > peak_used_) peak_used_ = used_;
  return p;
}

Tensor Arena::alloc(Shape shape, DType dtype) {
  return {alloc_bytes(shape.elements() * dtype_bytes(dtype)), dtype, shape};
}

void Arena::reset(std::int64_t mark) {
  TANDEM_CHECK(mark >= 0 && mark <= used_, "arena ", name_, ": mark ", mark, " of ", used_,
               " used");
  used_ = mark;
}

void Arena::trim() {
  const std::int64_t keep = round_up(used_, kMapGranularity);
  if (keep >= mapped_) return;
  allocator_.unmap(base_, keep, mapped_);
  ledger_.sub(kind_, mapped_ - keep);
  mapped_ = keep;
}

}  // namespace tandem::kernels
