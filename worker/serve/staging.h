// Small host arrays that a step needs on the device, packed into one buffer that is uploaded at
// once. The same sizes in the same order give the same device addresses. One device thread.
#pragma once

#include "kernels/ops.h"
#include "protocol/base/units.h"

#include <cstring>
#include <span>
#include <vector>

namespace tandem::worker::serve {

template <class T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<std::int32_t>() {
  return DType::kI32;
}
template <>
constexpr DType dtype_of<std::int64_t>() {
  return DType::kI64;
}
template <>
constexpr DType dtype_of<float>() {
  return DType::kF32;
}

class Staging {
 public:
  /// Bytes that an array of `elements` takes.
  template <class T>
  static constexpr std::int64_t bytes(std::int64_t elements) {
    return round_up(elements * static_cast<std::int64_t>(sizeof(T)), kernels::kDeviceAlignment);
  }
  Staging(kernels::Arena& arena, std::int64_t capacity)
      : device_(arena.alloc(kernels::Shape{capacity}, DType::kU8)),
        host_(static_cast<std::size_t>(capacity)) {}

  void clear() { used_ = 0; }
  /// Host memory of a [shape] tensor and its device view, which is valid after upload(). The
  /// contents are what was left there.
  template <class T>
  std::span<T> take(kernels::Shape shape, kernels::Tensor& view) {
    const std::int64_t at = used_;
    used_ += bytes<T>(shape.elements());
    TANDEM_CHECK_LE(used_, device_.bytes(), "staging buffer too small");
    view = {static_cast<char*>(device_.data) + at, dtype_of<T>(), shape};
    return {reinterpret_cast<T*>(host_.data() + at), static_cast<std::size_t>(shape.elements())};
  }
  void upload(kernels::Ops& ops, kernels::Exec& exec) const {
    ops.upload(exec, std::span(host_).first(static_cast<std::size_t>(used_)),
               device_.rows(0, used_));
  }
  /// What was taken so far, on the device: u8.
  [[nodiscard]] kernels::Tensor device() const { return device_.rows(0, used_); }
  /// Device to host; the spans that take() returned hold the results.
  void download(kernels::Ops& ops, kernels::Exec& exec) {
    ops.download(exec, device_.rows(0, used_),
                 std::span(host_).first(static_cast<std::size_t>(used_)));
  }

 private:
  kernels::Tensor device_;
  std::vector<std::byte> host_;
  std::int64_t used_ = 0;
};

}  // namespace tandem::worker::serve
