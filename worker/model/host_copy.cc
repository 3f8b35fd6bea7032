#include "worker/model/host_copy.h"

#include <algorithm>

namespace tandem::worker::model {

void store_values(std::span<const float> from, DType dtype, std::byte* to) {
  if (dtype != DType::kF64) return store_floats(from, dtype, to);
  std::copy(from.begin(), from.end(), reinterpret_cast<double*>(to));
}

void upload_floats(kernels::Ops& ops, kernels::Exec& exec, std::span<const float> host,
                   const kernels::Tensor& to) {
  if (to.dtype == DType::kF32) return ops.upload(exec, std::as_bytes(host), to);
  std::vector<std::byte> stored(static_cast<std::size_t>(to.bytes()));
  store_values(host, to.dtype, stored.data());
  ops.upload(exec, stored, to);
}

std::vector<float> download_floats(kernels::Ops& ops, kernels::Exec& exec,
                                   const kernels::Tensor& from) {
  std::vector<float> host(static_cast<std::size_t>(from.elements()));
  if (from.dtype == DType::kF32) {
    ops.download(exec, from, std::as_writable_bytes(std::span(host)));
  } else if (from.dtype == DType::kF64) {
    std::vector<double> wide(host.size());
    ops.download(exec, from, std::as_writable_bytes(std::span(wide)));
    for (std::size_t e = 0; e < host.size(); ++e) host[e] = static_cast<float>(wide[e]);
  } else {
    std::vector<std::byte> narrow(static_cast<std::size_t>(from.bytes()));
    ops.download(exec, from, narrow);
    load_floats(narrow.data(), from.dtype, host);
  }
  return host;
}

}  // namespace tandem::worker::model
