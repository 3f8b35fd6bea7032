// What the tests of gpu_gang_test share: one rank's GPU and the gang of all.
#pragma once

#include "kernels/cuda/cuda_backend.h"
#include "protocol/base/dtype.h"
#include "tools/bench_gang.h"

#include <cstdint>
#include <span>
#include <vector>

namespace tandem::test {

struct GpuGangDevice {
  kernels::Backend backend = kernels::make_cuda_backend({tools::local_rank(), 0}).value();
  kernels::Arena workspace{*backend.allocator, *backend.ledger, kernels::MemoryKind::kWorkspace,
                           "workspace", std::int64_t{1} << 30};
  kernels::Arena tensors{*backend.allocator, *backend.ledger, kernels::MemoryKind::kActivations,
                         "tensors", std::int64_t{1} << 32};
  kernels::Exec exec{workspace};
  tools::BenchGang gang;

  template <class T>
  void upload(const std::vector<T>& values, const kernels::Tensor& to) {
    backend.ops->upload(exec, std::as_bytes(std::span(values)), to);
  }
  template <class T>
  kernels::Tensor put(const std::vector<T>& values, DType dtype) {
    const auto x = tensors.alloc({static_cast<std::int64_t>(values.size())}, dtype);
    upload(values, x);
    return x;
  }
  template <class T>
  std::vector<T> get(const kernels::Tensor& x) {
    std::vector<T> values(static_cast<std::size_t>(x.elements()));
    backend.ops->download(exec, x, std::as_writable_bytes(std::span(values)));
    return values;
  }
};
extern GpuGangDevice* device;
inline worker::comm::Communicator& gang() {
  return *device->gang.device;
}

/// Element e of rank r: small whole numbers, whose sums are exact in every order.
template <class T>
std::vector<T> numbers(int r, std::int64_t n) {
  std::vector<T> x;
  for (std::int64_t e = 0; e < n; ++e) x.push_back(from_f32<T>(static_cast<float>(e % 7 + 3 * r)));
  return x;
}

}  // namespace tandem::test
