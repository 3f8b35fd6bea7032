// Any text is refused with a reason or is a job whose canonical form parses to itself.
#include "protocol/base/check.h"
#include "protocol/job_spec.h"

#include <cstddef>
#include <cstdint>
#include <string>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using tandem::protocol::JobSpec;
  const std::string text(reinterpret_cast<const char*>(data), size);
  const auto spec = JobSpec::parse(text);
  if (!spec.ok()) {
    TANDEM_CHECK(!spec.status().message().empty());
    return 0;
  }
  const std::string canonical = spec->to_json();
  const auto again = JobSpec::parse(canonical);
  TANDEM_CHECK(again.ok(), again.status().to_string());
  TANDEM_CHECK_EQ(again->to_json(), canonical);
  return 0;
}
