// Distinct types for the identities that travel between processes.
#pragma once

#include "protocol/base/random.h"

#include <compare>
#include <cstdint>
#include <functional>
#include <ostream>
#include <string>
#include <utility>

namespace tandem {

/// A string with a tag, so that a JobId is never passed where a WorkerId belongs.
template <class Tag>
struct Id {
  std::string value;
  Id() = default;
  explicit Id(std::string v) : value(std::move(v)) {}
  auto operator<=>(const Id&) const = default;
  [[nodiscard]] bool empty() const { return value.empty(); }
};
template <class Tag>
std::ostream& operator<<(std::ostream& out, const Id<Tag>& id) {
  return out << id.value;
}

using JobId = Id<struct JobTag>;  ///< "job-" + 12 hex digits; made by the coordinator
using WorkerId =
    Id<struct WorkerTag>;  ///< HOST + "/" + GPU UUID or "cpu" + slot; stable over restarts
using RequestId =
    Id<struct RequestTag>;  ///< made by the client library, 32 hex digits; unique for ever

/// One start of one process; a restarted process has a new one. Random, never 0.
using Incarnation = std::uint64_t;
/// Counts the gangs of one job, from 1. A message of an older epoch is refused.
using Epoch = std::uint64_t;

/// `prefix` + `digits` random hex digits.
std::string random_id(const std::string& prefix, int digits);

}  // namespace tandem

template <class Tag>
struct std::hash<tandem::Id<Tag>> {
  std::size_t operator()(const tandem::Id<Tag>& id) const noexcept {
    return std::hash<std::string>()(id.value);
  }
};
