#include "protocol/base/processors.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <thread>

namespace tandem {
namespace {

/// Of one group, "max 100000" or "250000 100000" (microseconds of each period); `most` where it has
/// none.
int quota(const std::string& group, int most) {
  std::ifstream file("/sys/fs/cgroup" + group + "/cpu.max");
  double allowed = 0, period = 0;
  if (!(file >> allowed >> period) || allowed <= 0 || period <= 0) return most;
  const double processors = allowed / period;
  return processors < most ? static_cast<int>(processors + 0.999) : most;
}

/// This process's group in the one hierarchy of version 2, of "0::/a/b" "/a/b"; "": the root.
std::string own_group() {
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with("0::/") && line.size() > 4) return line.substr(3);
  return "";
}

}  // namespace

int processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int count = static_cast<int>(std::thread::hardware_concurrency());
  if (sched_getaffinity(0, sizeof set, &set) == 0) count = CPU_COUNT(&set);
  for (std::string group = own_group();; group.resize(group.rfind('/'))) {
    count = quota(group, count);
    if (group.empty()) return std::max(1, count);
  }
}

}  // namespace tandem
