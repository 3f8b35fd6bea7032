// Settings that the C library and other libraries read before main, from the environment alone.
#pragma once

#include <initializer_list>
#include <utility>

namespace tandem {

using EnvironmentVariable = std::pair<const char*, const char*>;  ///< name, value

/// glibc's malloc asks for huge pages and keeps up to 32 MiB that are free. Large buffers are
/// mostly fresh memory, and fresh memory is page faults: where one costs 2 us, 10 MB took 5 ms to
/// touch, in huge pages 0.5 ms; on a virtual machine the host may have to find the pages as well.
inline constexpr EnvironmentVariable kMallocLargeBuffers{
    "GLIBC_TUNABLES",
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:"
    "glibc.malloc.trim_threshold=33554432"};

/// Sets each variable that is not set yet, for this program and those that it starts; if that
/// changed something, this program starts anew (same process, same arguments). Returns where it
/// cannot. Call at the start of main, before any thread exists.
void start_with_environment(std::initializer_list<EnvironmentVariable> variables, char** argv);

}  // namespace tandem
