// Private to kernels/cpu: reads the device lists of AdapterRows and LoraSite, checking each number
// (on a CPU "device" memory is ours to read).
#pragma once

#include "kernels/op_args.h"

#include <cstdint>

namespace tandem::kernels::cpu {

inline bool has_adapters(const std::vector<LoraSite>& sites, const AdapterRows* rows) {
  return rows != nullptr && rows->rank_max > 0 && !sites.empty();
}

inline const LoraEntry& lora_entry(const LoraSite& site, std::int64_t slot,
                                   const AdapterRows& rows) {
  const std::int64_t slots = site.entries.bytes() / static_cast<std::int64_t>(sizeof(LoraEntry));
  TANDEM_CHECK(slot < slots, "adapter slot ", slot, ": the site has ", slots);
  const LoraEntry& entry = static_cast<const LoraEntry*>(site.entries.data)[slot];
  TANDEM_CHECK(entry.rank >= 0 && entry.rank <= rows.rank_max, "adapter slot ", slot, ": rank ",
               entry.rank, ", rank_max ", rows.rank_max);
  return entry;
}

/// f(begin, end, slot) for each non-empty segment, ascending; slot -1: no adapter. Rows beyond the
/// last offset come as a last segment without adapter.
template <class F>
void for_each_segment(const AdapterRows& rows, std::int64_t t, const F& f) {
  const auto* offsets = rows.segment_offsets.as<std::int32_t>();
  const auto* slots = rows.segment_slots.as<std::int32_t>();
  TANDEM_CHECK_EQ(offsets[0], 0, "segment_offsets[0]");
  for (std::int64_t s = 0; s < rows.segments_max; ++s) {
    TANDEM_CHECK(offsets[s] <= offsets[s + 1] && offsets[s + 1] <= t, "segment_offsets[", s,
                 "] = ", offsets[s], ", next ", offsets[s + 1], ", rows ", t);
    if (offsets[s] < offsets[s + 1]) f(offsets[s], offsets[s + 1], slots[s]);
  }
  if (offsets[rows.segments_max] < t) f(offsets[rows.segments_max], t, -1);
}

}  // namespace tandem::kernels::cpu
