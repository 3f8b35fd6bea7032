// How many processors this program may use, which is less than the machine has under taskset, in a
// batch system's cpuset or in a container with a quota. std::thread::hardware_concurrency counts
// those of the machine, and so many threads on fewer processors wait for each other.
#pragma once

namespace tandem {

/// Processors in the calling thread's affinity mask, and no more than the quotas of its control
/// groups (version 2) allow, rounded up; at least 1. Any thread.
int processors();

}  // namespace tandem
