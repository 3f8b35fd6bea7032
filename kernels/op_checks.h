// Helpers of the public wrappers in ops*.cc: each prints the op, the tensor, what was expected and
// what came. Private to kernels/.
#pragma once

#include "kernels/op_args.h"
#include "protocol/base/check.h"

#include <initializer_list>
#include <string>

namespace tandem::kernels {

/// One public call being checked. All checks abort: a failure is a bug of the caller.
class OpCheck {
 public:
  explicit OpCheck(const char* op) : op_(op) {}

  void tensor(const char* name, const Tensor& t, DType dtype, const Shape& shape) const {
    TANDEM_CHECK(t.defined() || shape.elements() == 0, op_, ": ", name, ": undefined, expected ",
                 dtype_name(dtype), " ", shape);
    TANDEM_CHECK(t.dtype == dtype && t.shape == shape, op_, ": ", name, ": expected ",
                 dtype_name(dtype), " ", shape, ", got ", dtype_name(t.dtype), " ", t.shape);
  }
  void optional(const char* name, const Tensor& t, DType dtype, const Shape& shape) const {
    if (t.defined()) tensor(name, t, dtype, shape);
  }
  void rank(const char* name, const Tensor& t, int rank) const {
    TANDEM_CHECK(t.shape.rank() == rank, op_, ": ", name, ": expected rank ", rank, ", got ",
                 dtype_name(t.dtype), " ", t.shape);
  }
  /// The dtype the rest of the op computes in.
  DType compute_dtype(const char* name, const Tensor& t) const {
    TANDEM_CHECK(is_stored_float(t.dtype) || t.dtype == DType::kF64, op_, ": ", name,
                 ": expected f32, bf16 or f16, got ", dtype_name(t.dtype));
    return t.dtype;
  }
  /// f32, or f64 on the exact backend of tests: logits, statistics, optimizer state.
  DType sum_dtype(const char* name, const Tensor& t) const {
    TANDEM_CHECK(t.dtype == DType::kF32 || t.dtype == DType::kF64, op_, ": ", name,
                 ": expected f32, got ", dtype_name(t.dtype));
    return t.dtype;
  }
  template <class T>
  void in_range(const char* name, T value, T low, T high) const {
    TANDEM_CHECK(value >= low && value <= high, op_, ": ", name, ": expected ", low, " .. ", high,
                 ", got ", value);
  }
  void weight(const char* name, const PackedWeight* w, DType dtype, std::int64_t n,
              std::int64_t i) const {
    TANDEM_CHECK(w != nullptr, op_, ": ", name, ": null");
    TANDEM_CHECK(w->dtype == dtype && w->n == n && w->i == i, op_, ": ", name, ": expected ",
                 dtype_name(dtype), " [", n, ", ", i, "], got ", dtype_name(w->dtype), " [", w->n,
                 ", ", w->i, "]");
    TANDEM_CHECK(w->storage.defined(), op_, ": ", name, ": storage undefined");
  }
  /// Entries [first, first + n) of a vocabulary; `vocab` 0: it is whole.
  void shard(std::int64_t first, std::int64_t n, std::int64_t vocab) const {
    TANDEM_CHECK(vocab == 0 ? first == 0 : first >= 0 && first + n <= vocab, op_, ": entries [",
                 first, ", ", first + n, ") of a vocabulary of ", vocab);
  }
  /// Two tensors of which one is written must not share bytes.
  void disjoint(const char* name_a, const Tensor& a, const char* name_b, const Tensor& b) const {
    if (!a.defined() || !b.defined() || a.bytes() == 0 || b.bytes() == 0) return;
    const auto* pa = static_cast<const char*>(a.data);
    const auto* pb = static_cast<const char*>(b.data);
    TANDEM_CHECK(pa + a.bytes() <= pb || pb + b.bytes() <= pa, op_, ": ", name_a, " (",
                 dtype_name(a.dtype), " ", a.shape, " at ", a.data, ") overlaps ", name_b, " (",
                 dtype_name(b.dtype), " ", b.shape, " at ", b.data, ")");
  }
  void that(bool holds, const std::string& what) const { TANDEM_CHECK(holds, op_, ": ", what); }
  [[nodiscard]] const char* op() const { return op_; }

 private:
  const char* op_;
};

/// ops_attention.cc
void check_rope(const RopeArgs& args);

}  // namespace tandem::kernels
