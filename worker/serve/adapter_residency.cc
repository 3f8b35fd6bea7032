#include "worker/serve/adapter_residency.h"

#include "kernels/arena.h"
#include "protocol/base/units.h"

#include <algorithm>

namespace tandem::worker::serve {

AdapterResidency::AdapterResidency(std::int64_t slot_begin, std::int64_t slot_count,
                                   std::int64_t installed_max, SetSlot set_slot)
    : slot_begin_(slot_begin),
      installed_max_(installed_max),
      set_slot_(std::move(set_slot)),
      slots_(static_cast<std::size_t>(slot_count)) {}

Status AdapterResidency::install(const Digest& digest, Weights weights, std::int64_t bytes) {
  if (const auto known = adapters_.find(digest); known != adapters_.end()) {
    known->second.dropped = false;
    return {};
  }
  if (slots_.empty())
    return refused_error(str("adapter ", digest, " cannot be served: no adapter slots"));
  if (static_cast<std::int64_t>(adapters_.size()) >= installed_max_) {
    const auto oldest = oldest_idle();
    if (!oldest)
      return busy_error(str("adapter ", digest, " cannot be installed: all ", installed_max_,
                            " installed adapters are in use; retry later"));
    erase(*oldest);
  }
  Adapter adapter;
  adapter.weights = std::move(weights);
  adapter.bytes = round_up(bytes, kernels::kMapGranularity);
  adapter.used_at = ++clock_;
  adapters_.emplace(digest, std::move(adapter));
  return {};
}

void AdapterResidency::acquire(const Digest& digest) {
  Adapter& adapter = adapters_.at(digest);
  ++adapter.users;
  adapter.used_at = ++clock_;
}

void AdapterResidency::release(const Digest& digest) {
  Adapter& adapter = adapters_.at(digest);
  TANDEM_CHECK_GT(adapter.users, 0, digest);
  adapter.used_at = ++clock_;
  if (--adapter.users == 0 && adapter.dropped) erase(digest);
}

void AdapterResidency::drop(const Digest& digest) {
  const auto at = adapters_.find(digest);
  if (at == adapters_.end()) return;
  if (at->second.users == 0)
    erase(digest);
  else
    at->second.dropped = true;
}

void AdapterResidency::erase(const Digest& digest) {
  const auto at = adapters_.find(digest);
  if (const std::int32_t index = at->second.slot; index >= 0) {
    slots_[static_cast<std::size_t>(index)] = {};
    set_slot_(slot_begin_ + index, nullptr);
  }
  adapters_.erase(at);
}

void AdapterResidency::begin_step(std::span<const Digest> adapters) {
  TANDEM_CHECK_LE(adapters.size(), slots_.size());
  ++step_;
  for (const Digest& digest : adapters)
    if (const std::int32_t slot = adapters_.at(digest).slot; slot >= 0)
      slots_[static_cast<std::size_t>(slot)].step = step_;
}

std::int32_t AdapterResidency::bind(const Digest& digest) {
  Adapter& adapter = adapters_.at(digest);
  if (adapter.slot < 0) {
    const auto victim = std::min_element(
        slots_.begin(), slots_.end(), [](const Slot& a, const Slot& b) { return a.step < b.step; });
    TANDEM_CHECK_LT(victim->step, step_, "more adapters in a step than ", slots_.size(), " slots");
    if (!victim->adapter.empty()) adapters_.at(victim->adapter).slot = -1;
    adapter.slot = static_cast<std::int32_t>(victim - slots_.begin());
    victim->adapter = digest;
    set_slot_(slot_begin_ + adapter.slot, adapter.weights);
    ++binds_;
  }
  slots_[static_cast<std::size_t>(adapter.slot)].step = step_;
  return static_cast<std::int32_t>(slot_begin_) + adapter.slot;
}

std::int64_t AdapterResidency::rank_max(const Digest& digest) const {
  return adapters_.at(digest).weights->rank_max;
}

std::int64_t AdapterResidency::bytes() const {
  std::int64_t bytes = 0;
  for (const auto& [digest, adapter] : adapters_) bytes += adapter.bytes;
  return bytes;
}

std::optional<Digest> AdapterResidency::oldest_idle() const {
  const std::pair<const Digest, Adapter>* oldest = nullptr;
  for (const auto& entry : adapters_)
    if (entry.second.users == 0 &&
        (oldest == nullptr || entry.second.used_at < oldest->second.used_at))
      oldest = &entry;
  return oldest == nullptr ? std::nullopt : std::optional(oldest->first);
}

std::vector<Digest> AdapterResidency::resident() const {
  std::vector<std::pair<std::int64_t, Digest>> order;
  for (const auto& [digest, adapter] : adapters_) order.emplace_back(-adapter.used_at, digest);
  std::sort(order.begin(), order.end());
  std::vector<Digest> digests;
  for (const auto& [used, digest] : order) digests.push_back(digest);
  return digests;
}

}  // namespace tandem::worker::serve
