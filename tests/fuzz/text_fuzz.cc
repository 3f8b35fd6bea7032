// The small parsers of text that comes from outside: UTF-8, endpoints, "retry after N ms".
#include "protocol/base/check.h"
#include "protocol/endpoint_address.h"
#include "protocol/utf8.h"
#include "protocol/version.h"

#include <cstddef>
#include <cstdint>
#include <string>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace tandem::protocol;
  const std::string text(reinterpret_cast<const char*>(data), size);
  TANDEM_CHECK(is_utf8(text.substr(0, utf8_valid_prefix(text))));
  TANDEM_CHECK(is_utf8(to_utf8(text)));
  if (is_utf8(text)) TANDEM_CHECK_EQ(to_utf8(text), text);
  TANDEM_CHECK(retry_after_from_text(text) >= 0);
  if (const auto address = parse_endpoint(text); address.ok())
    TANDEM_CHECK(address->port >= 0 && address->port <= 65535);
  return 0;
}
