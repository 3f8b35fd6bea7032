// Shapes of at most four dimensions, 64-bit always.
#pragma once

#include "protocol/base/check.h"

#include <array>
#include <cstdint>
#include <initializer_list>
#include <ostream>

namespace tandem::kernels {

class Shape {
 public:
  static constexpr int kRankMax = 4;

  Shape() = default;
  Shape(std::initializer_list<std::int64_t> dims) {
    TANDEM_CHECK_LE(dims.size(), static_cast<std::size_t>(kRankMax));
    for (std::int64_t d : dims) {
      TANDEM_CHECK_GE(d, 0);
      dims_[static_cast<std::size_t>(rank_++)] = d;
    }
  }

  [[nodiscard]] int rank() const { return rank_; }
  [[nodiscard]] std::int64_t operator[](int i) const {
    TANDEM_CHECK(i >= 0 && i < rank_, "dimension ", i, " of a rank-", rank_, " shape");
    return dims_[static_cast<std::size_t>(i)];
  }
  [[nodiscard]] std::int64_t elements() const {
    std::int64_t n = 1;
    for (int i = 0; i < rank_; ++i) n *= dims_[static_cast<std::size_t>(i)];
    return n;
  }
  bool operator==(const Shape&) const = default;

 private:
  std::array<std::int64_t, kRankMax> dims_{};
  int rank_ = 0;
};

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << "[";
  for (int i = 0; i < shape.rank(); ++i) out << (i ? ", " : "") << shape[i];
  return out << "]";
}

}  // namespace tandem::kernels
