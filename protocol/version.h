// Which versions of the wire understand each other. A process understands the minor versions from
// kVersionMinorMin to its own (at least the one before), of the same major; everything else is
// refused in the hello's answer, with a message that names the range. What a newer minor added is
// used only when both sides have it.
#pragma once

#include "protocol/base/result.h"
#include "protocol/messages.h"

#include <string>

namespace tandem::protocol {

inline constexpr std::uint16_t kVersionMinorMin = 0;  ///< the oldest that is understood
static_assert(kVersionMinor == 0 || kVersionMinorMin < kVersionMinor);

/// "1.0 to 1.9".
std::string version_range();

/// The version to speak with a peer that says `peer` in its hello: the lower of both. kRefused,
/// with the range and who must be upgraded, when there is none. `who` names the peer ("client
/// x/0.1").
Result<Version> agree_version(const Version& peer, const std::string& who);

/// True when a peer of that version knows gangs: role kGang, StartJob to an agent (since 1.2).
constexpr bool has_gangs(const Version& version) {
  return version.minor >= 2;
}

/// True when a peer of that version knows replicas: serve_json of StartJob and EstimateRequest, a
/// gang that is given requests (since 1.3).
constexpr bool has_replicas(const Version& version) {
  return version.minor >= 3;
}

/// True when a peer of that version knows gangs over several hosts: LaunchDaemon and DaemonLaunched
/// (since 1.4).
constexpr bool has_far_ranks(const Version& version) {
  return version.minor >= 4;
}

/// "retry after N ms" as kBusy messages carry it, or 0: all a 1.0 peer says.
std::int64_t retry_after_from_text(const std::string& message);

}  // namespace tandem::protocol
