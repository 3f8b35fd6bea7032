// Runs one op on a backend that executes and holds its outputs against a reference in f64.
//
// A TestDevice lays every buffer between guard bytes, fills outputs with NaN, remembers inputs and
// afterwards checks that guards and inputs are as they were. run_op() runs a case on 1 and on 2
// threads and twice on the same, and demands equal bits; expect_close() compares by relative L2
// error (DESIGN section 9) against a tolerance computed from dtype and reduction length.
#pragma once

#include "kernels/ops.h"

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace tandem::kernels::testing {

/// Backends that execute on this machine ("cpu", and "cuda" where a GPU is found); a case is
/// parameterised on them. With TANDEM_TEST_GPU set, the GPU alone, and no GPU is an error.
std::vector<std::string> executing_backends();

/// Numbers of a tensor as the reference sees them: rounded to the tensor's dtype already.
using Values = std::vector<double>;

/// `count` normal numbers times `scale`, rounded to `dtype`; a function of the seed alone.
Values random_values(std::int64_t count, DType dtype, std::uint64_t seed, double scale = 1.0);
Values rounded(Values values, DType dtype);

/// What an op wrote, as bytes and as numbers.
struct Output {
  DType dtype = DType::kF32;
  Shape shape;
  std::vector<std::byte> bytes;
  [[nodiscard]] Values values() const;
  /// Rows [begin, begin + count) of the first dimension as bytes.
  [[nodiscard]] std::vector<std::byte> rows(std::int64_t begin, std::int64_t count) const;
};
using Outputs = std::map<std::string, Output>;

class TestDevice {
 public:
  TestDevice(const std::string& backend, int threads);
  ~TestDevice();

  [[nodiscard]] Ops& ops() { return *backend_->ops; }
  [[nodiscard]] Exec& exec() { return exec_; }
  [[nodiscard]] Arena& workspace() { return workspace_; }
  [[nodiscard]] MemoryLedger& ledger() { return *backend_->ledger; }

  /// An input: checked to be unchanged by check_memory().
  Tensor input(const Values& values, DType dtype, Shape shape);
  Tensor ints(const std::vector<std::int32_t>& values);
  Tensor longs(const std::vector<std::int64_t>& values);
  Tensor bytes(const void* data, std::int64_t count);
  /// A tensor that the op updates.
  Tensor in_out(const std::string& name, const Values& values, DType dtype, Shape shape);
  /// A tensor that the op overwrites: all NaN (integers: -1) before.
  Tensor output(const std::string& name, DType dtype, Shape shape);
  PackedWeight weight(const Values& values, DType dtype, std::int64_t n, std::int64_t i);

  /// Everything registered by output() and in_out(), after checking guards and inputs and that no
  /// floating output holds a NaN.
  Outputs collect();

 private:
  struct Buffer {
    std::string name;  ///< empty: an input
    Tensor tensor;
    char* guard_begin;
    std::int64_t span_bytes;
    std::vector<std::byte> before;  ///< inputs only
  };
  Tensor place(const std::string& name, const std::vector<std::byte>& content, DType dtype,
               Shape shape, bool keep);

  std::shared_ptr<Backend> backend_;
  Arena tensors_;
  Arena workspace_;
  Exec exec_;
  std::vector<Buffer> buffers_;
};

/// Runs `run` (it creates tensors on the device and calls the op) on 1 thread, on 2, and on 2
/// again; fails unless all bits agree. The outputs of the first.
Outputs run_op(const std::string& backend, const std::function<void(TestDevice&)>& run);

/// Unit roundoff: 2^-24 for f32, 2^-8 for bf16, 2^-11 for f16.
double unit_roundoff(DType dtype);

/// Relative L2 error allowed to a result of `dtype` that is rounded to it `roundings` times on its
/// way and sums chains of `reduction` terms in f32: roundings * u + 4 sqrt(reduction) 2^-24. The
/// second part is the root-mean-square growth of a random-sign sum (u sqrt(K / 2) relative), times
/// a margin of about six.
double tolerance(DType dtype, std::int64_t reduction, int roundings = 1);

double relative_error(const Values& got, const Values& want);
/// Fails with the error, the tolerance and the worst element.
void expect_close(const std::string& what, const Values& got, const Values& want, double tolerance);

/// Central differences of f at x in f64, element by element.
Values numeric_gradient(const std::function<double(const Values&)>& f, Values x);

}  // namespace tandem::kernels::testing
