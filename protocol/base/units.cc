#include "protocol/base/units.h"

#include <cmath>
#include <cstdio>

namespace tandem {

std::string format_bytes(std::int64_t bytes) {
  char text[48];
  const double value = static_cast<double>(bytes);
  if (std::llabs(bytes) >= kGiB)
    std::snprintf(text, sizeof text, "%.2f GiB", value / kGiB);
  else if (std::llabs(bytes) >= kMiB)
    std::snprintf(text, sizeof text, "%.1f MiB", value / kMiB);
  else if (std::llabs(bytes) >= kKiB)
    std::snprintf(text, sizeof text, "%.1f KiB", value / kKiB);
  else
    std::snprintf(text, sizeof text, "%lld B", static_cast<long long>(bytes));
  return text;
}

std::string format_duration_s(double seconds) {
  char text[48];
  const auto whole = static_cast<long long>(std::llround(seconds));
  if (seconds < 60)
    std::snprintf(text, sizeof text, "%.1f s", seconds);
  else if (whole < 3600)
    std::snprintf(text, sizeof text, "%lld m %02lld s", whole / 60, whole % 60);
  else
    std::snprintf(text, sizeof text, "%lld h %02lld m", whole / 3600, whole % 3600 / 60);
  return text;
}

}  // namespace tandem
