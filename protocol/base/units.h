// Sizes in bytes and the one way to print them.
#pragma once

#include <cstdint>
#include <string>

namespace tandem {

inline constexpr std::int64_t kKiB = 1024;
inline constexpr std::int64_t kMiB = 1024 * kKiB;
inline constexpr std::int64_t kGiB = 1024 * kMiB;

/// "1.50 GiB", "12.0 MiB", "512 B".
std::string format_bytes(std::int64_t bytes);

/// "3.2 s", "2 m 05 s", "1 h 02 m".
std::string format_duration_s(double seconds);

/// Rounds up to a multiple of `multiple` (> 0).
constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace tandem
