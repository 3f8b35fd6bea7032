#include "kernels/cpu/cpu_backend.h"

#include "kernels/cpu/cpu_allocator.h"
#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/cpu_ops.h"

#include <omp.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>

namespace tandem::kernels {
namespace {

int allowed_processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

std::string processor_name() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);)
    if (line.rfind("model name", 0) == 0)
      if (const auto colon = line.find(": "); colon != std::string::npos)
        return line.substr(colon + 2);
  return "cpu";
}

}  // namespace

void cpu::CpuOps::use_threads(const Exec& exec) const {
  omp_set_num_threads(exec.background ? std::max(1, profile_.threads / 2) : profile_.threads);
}

DeviceProfile cpu_profile(const CpuOptions& options) {
  DeviceProfile p;
  p.type = DeviceType::kCpu;
  p.name = processor_name();
  p.threads = options.threads > 0 ? options.threads : allowed_processors();
  const cpu::Isa level = cpu::isa();
  p.has_avx2 = level >= cpu::Isa::kAvx2;
  p.has_avx512 = level >= cpu::Isa::kAvx512;
  p.has_avx512_bf16 = level >= cpu::Isa::kAvx512Bf16;
  p.has_amx_bf16 = level >= cpu::Isa::kAmx;
  p.memory_bytes = static_cast<std::int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  return p;
}

namespace {
std::int64_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  std::int64_t pages = 0, resident = 0;
  statm >> pages >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
}
}  // namespace

Backend make_cpu_backend(const CpuOptions& options) {
  const DeviceProfile profile = cpu_profile(options);
  const std::int64_t limit =
      options.memory_bytes_max > 0 ? options.memory_bytes_max : profile.memory_bytes;
  return {resident_bytes, std::make_unique<cpu::CpuAllocator>(limit),
          std::make_unique<MemoryLedger>(), std::make_unique<cpu::CpuOps>(profile)};
}

}  // namespace tandem::kernels
