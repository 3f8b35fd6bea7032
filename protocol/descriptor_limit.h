// What becomes of a process that many connect to when its file descriptors run out. libzmq aborts
// where it has none left for a new ipc connection, and the process's own files need some too: so
// the last kReservedDescriptors are never given to connections. Whoever comes then is turned away
// and, as every ZeroMQ peer does, comes again.
#pragma once

#include <cstdint>

namespace tandem::protocol {

inline constexpr std::int64_t kReservedDescriptors = 64;

/// Lets this process have as many as the system allows it, and returns how many that is. Not for
/// processes that start others: these inherit the limit.
std::int64_t raise_descriptor_limit();

/// Connections that were turned away so far, by any socket of this process.
std::uint64_t connections_turned_away();

}  // namespace tandem::protocol
