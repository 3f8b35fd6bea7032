// A non-owning view of contiguous device memory: pointer, dtype, shape. No mathematics, no
// autograd, no ownership: arenas own, tensors point. On the meta backend the pointer is never
// dereferenced.
#pragma once

#include "kernels/shape.h"
#include "protocol/base/dtype.h"

namespace tandem::kernels {

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kF32;
  Shape shape;

  [[nodiscard]] bool defined() const { return data != nullptr; }
  [[nodiscard]] std::int64_t elements() const { return shape.elements(); }
  [[nodiscard]] std::int64_t bytes() const { return elements() * dtype_bytes(dtype); }
  [[nodiscard]] std::int64_t dim(int i) const { return shape[i]; }

  /// Typed pointer; T must have the dtype's size. Backends only.
  template <class T>
  [[nodiscard]] T* as() const {
    TANDEM_CHECK_EQ(static_cast<std::int64_t>(sizeof(T)), dtype_bytes(dtype));
    return static_cast<T*>(data);
  }

  /// Rows [begin, begin + count) of the first dimension.
  [[nodiscard]] Tensor rows(std::int64_t begin, std::int64_t count) const {
    TANDEM_CHECK(begin >= 0 && count >= 0 && begin + count <= shape[0], "rows ", begin, "+", count,
                 " of ", shape[0]);
    Tensor view = *this;
    std::int64_t row = dtype_bytes(dtype);
    for (int i = 1; i < shape.rank(); ++i) row *= shape[i];
    view.data = static_cast<char*>(data) + begin * row;
    view.shape = shape.rank() == 1   ? Shape{count}
                 : shape.rank() == 2 ? Shape{count, shape[1]}
                 : shape.rank() == 3 ? Shape{count, shape[1], shape[2]}
                                     : Shape{count, shape[1], shape[2], shape[3]};
    return view;
  }
  /// The same bytes with another shape of as many elements.
  [[nodiscard]] Tensor reshaped(Shape to) const {
    TANDEM_CHECK_EQ(to.elements(), elements());
    return {data, dtype, to};
  }
};

}  // namespace tandem::kernels
