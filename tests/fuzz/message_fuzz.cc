// One decoder (TANDEM_FUZZ_DECODE): any bytes are refused with a reason and counted, or decode to a
// message that survives being sent again.
#include "protocol/base/check.h"
#include "protocol/codec.h"

#include <cstddef>
#include <cstdint>
#include <span>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace tandem::protocol;
  DecodeCounters counters;
  const std::span<const std::byte> frame(reinterpret_cast<const std::byte*>(data), size);
  const auto message = TANDEM_FUZZ_DECODE(frame, &counters);
  TANDEM_CHECK_EQ(counters.accepted + counters.refused(), 1u);
  TANDEM_CHECK_EQ(counters.accepted, message.ok() ? 1u : 0u);
  if (!message.ok()) {
    TANDEM_CHECK(!message.status().message().empty());
    return 0;
  }
  const Bytes again = encode(*message);
  const auto second = TANDEM_FUZZ_DECODE(again, nullptr);
  TANDEM_CHECK(second.ok(), second.status().to_string());
  TANDEM_CHECK(encode(*second) == again, "the message changed on its way");
  return 0;
}
