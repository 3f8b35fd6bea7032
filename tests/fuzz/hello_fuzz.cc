// What a peer's first message leads to: a version within the range, or a refusal that names it.
#include "protocol/base/check.h"
#include "protocol/codec.h"
#include "protocol/version.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace {

using namespace tandem::protocol;

void agree(const Version& version, const std::string& who) {
  const auto agreed = agree_version(version, who);
  if (agreed.ok()) {
    TANDEM_CHECK_EQ(agreed->major, kVersionMajor);
    TANDEM_CHECK(agreed->minor >= kVersionMinorMin && agreed->minor <= kVersionMinor);
  } else {
    TANDEM_CHECK(agreed.status().message().find(version_range()) != std::string::npos);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::byte> frame(reinterpret_cast<const std::byte*>(data), size);
  if (const auto message = decode_client(frame); message.ok())
    if (const auto* hello = std::get_if<ClientHello>(&message.value()))
      agree(hello->version, hello->client);
  if (const auto message = decode_worker(frame); message.ok())
    if (const auto* hello = std::get_if<WorkerHello>(&message.value()))
      agree(hello->version, hello->worker.value);
  if (const auto message = decode_server(frame); message.ok())
    if (const auto* hello = std::get_if<ServerHello>(&message.value()))
      agree(hello->version, hello->server);
  return 0;
}
