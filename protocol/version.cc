#include "protocol/version.h"

#include "protocol/base/str.h"

#include <algorithm>
#include <cctype>

namespace tandem::protocol {
namespace {

constexpr std::int64_t kRetryAfterMsMax = 3'600'000;

}  // namespace

std::string version_range() {
  return str(kVersionMajor, ".", kVersionMinorMin, " to ", kVersionMajor, ".", kVersionMinor);
}

Result<Version> agree_version(const Version& peer, const std::string& who) {
  const bool newer =
      peer.major > kVersionMajor || (peer.major == kVersionMajor && peer.minor > kVersionMinor);
  if (newer)
    return refused_error(str(who, " speaks version ", peer.major, ".", peer.minor,
                             " of the protocol; this side understands ", version_range(),
                             ": upgrade this side, or use an older ", who));
  if (peer.major < kVersionMajor || peer.minor < kVersionMinorMin)
    return refused_error(str(who, " speaks version ", peer.major, ".", peer.minor,
                             " of the protocol; this side understands ", version_range(),
                             ": upgrade ", who));
  return peer;
}

std::int64_t retry_after_from_text(const std::string& message) {
  static constexpr std::string_view kMark = "retry after ";
  const std::size_t at = message.find(kMark);
  if (at == std::string::npos) return 0;
  std::int64_t ms = 0;
  std::size_t i = at + kMark.size();
  while (i < message.size() && std::isdigit(static_cast<unsigned char>(message[i])) != 0 &&
         ms < kRetryAfterMsMax)
    ms = ms * 10 + (message[i++] - '0');
  return message.compare(i, 3, " ms") == 0 ? std::min(ms, kRetryAfterMsMax) : 0;
}

}  // namespace tandem::protocol
