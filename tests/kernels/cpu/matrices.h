// What the kernel tests share: guarded buffers, strided matrices of either dtype, error bounds.
#pragma once

#include "kernels/cpu/gemm.h"
#include "protocol/base/random.h"
#include "protocol/base/str.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>

namespace tandem::kernels::cpu {

/// 64-byte aligned bytes between guards, filled with NaN (every byte 0xff).
class Buffer {
 public:
  explicit Buffer(std::int64_t bytes) : bytes_(bytes) {
    const auto total = static_cast<std::size_t>((bytes + 63) / 64 * 64 + 2 * kGuard);
    memory_.reset(static_cast<unsigned char*>(std::aligned_alloc(64, total)));
    std::memset(memory_.get(), kGuardByte, total);
    std::memset(data(), 0xff, static_cast<std::size_t>(bytes));
  }
  ~Buffer() {
    bool intact = true;
    for (int i = 0; i < kGuard; ++i)
      intact = intact && memory_.get()[i] == kGuardByte &&
               memory_.get()[kGuard + bytes_ + i] == kGuardByte;
    EXPECT_TRUE(intact) << "guard bytes were written";
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  [[nodiscard]] void* data() const { return memory_.get() + kGuard; }
  [[nodiscard]] std::int64_t bytes() const { return bytes_; }
  [[nodiscard]] std::span<std::byte> span() const {
    return {static_cast<std::byte*>(data()), static_cast<std::size_t>(bytes_)};
  }

 private:
  static constexpr int kGuard = 64;
  static constexpr unsigned char kGuardByte = 0xa5;
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  std::int64_t bytes_;
  std::unique_ptr<unsigned char, Free> memory_;
};

/// rows x columns with `gap` elements between rows; everything starts as NaN.
struct Matrix {
  Matrix(std::int64_t r, std::int64_t c, DType t, std::int64_t gap = 0)
      : rows(r),
        columns(c),
        ld(c + gap),
        dtype(t),
        buffer(std::make_shared<Buffer>(((r - 1) * ld + c) * dtype_bytes(t))) {}
  std::int64_t rows, columns, ld;
  DType dtype;
  std::shared_ptr<Buffer> buffer;

  void set(std::int64_t i, std::int64_t j, float x) const {
    if (dtype == DType::kF32)
      static_cast<float*>(buffer->data())[i * ld + j] = x;
    else
      static_cast<bf16*>(buffer->data())[i * ld + j] = to_bf16(x);
  }
  [[nodiscard]] double get(std::int64_t i, std::int64_t j) const {
    return dtype == DType::kF32 ? static_cast<float*>(buffer->data())[i * ld + j]
                                : to_f32(static_cast<bf16*>(buffer->data())[i * ld + j]);
  }
  [[nodiscard]] void* at(std::int64_t row, std::int64_t column = 0) const {
    return static_cast<char*>(buffer->data()) + (row * ld + column) * dtype_bytes(dtype);
  }
  [[nodiscard]] ConstRows view(std::int64_t row = 0, std::int64_t column = 0) const {
    return {at(row, column), ld, dtype};
  }
  [[nodiscard]] Rows out(std::int64_t row = 0, std::int64_t column = 0) const {
    return {at(row, column), ld, dtype};
  }
  void copy_from(const Matrix& other) const {
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < columns; ++j) set(i, j, static_cast<float>(other.get(i, j)));
  }
};

inline Matrix random_matrix(std::int64_t r, std::int64_t c, DType t, std::uint64_t seed,
                            std::int64_t gap = 0) {
  Matrix m(r, c, t, gap);
  for (std::int64_t i = 0; i < r; ++i)
    for (std::int64_t j = 0; j < c; ++j)
      m.set(i, j, 2 * random_uniform(seed, 1, static_cast<std::uint64_t>(i * c + j)) - 1);
  return m;
}

inline bool same_row(const Matrix& a, std::int64_t i, const Matrix& b, std::int64_t j) {
  return std::memcmp(a.at(i), b.at(j),
                     static_cast<std::size_t>(a.columns * dtype_bytes(a.dtype))) == 0;
}

/// Sets the OpenMP thread count for a scope.
class ThreadCount {
 public:
  explicit ThreadCount(int n) : before_(omp_get_max_threads()) { omp_set_num_threads(n); }
  ~ThreadCount() { omp_set_num_threads(before_); }
  ThreadCount(const ThreadCount&) = delete;
  ThreadCount& operator=(const ThreadCount&) = delete;

 private:
  int before_;
};

/// A sum and the sum of its terms' magnitudes, in f64.
struct ExactSum {
  double sum = 0, magnitude = 0;
  void add(double x) {
    sum += x;
    magnitude += std::abs(x);
  }
};

/// Bound on the error of a sum of `length` terms: f32 accumulation in any order (Higham 2002,
/// section 3.1: gamma_n = n u / (1 - n u), times the sum of magnitudes), then the output's own
/// rounding.
inline double sum_tolerance(DType out, double magnitude, std::int64_t length) {
  const double u = std::ldexp(1.0, -24), n = static_cast<double>(length + 2);
  const double error = n * u / (1 - n * u) * magnitude;
  return error + (out == DType::kBF16 ? std::ldexp(1.0, -8) * (magnitude + error) : 0.0) + 1e-30;
}

/// Checks every element of `got` against reference(i, j).
inline void expect_sums(const Matrix& got, std::int64_t length, const std::string& name,
                        const std::function<ExactSum(std::int64_t, std::int64_t)>& reference) {
  int reported = 0;
  for (std::int64_t i = 0; i < got.rows; ++i)
    for (std::int64_t j = 0; j < got.columns; ++j) {
      const ExactSum exact = reference(i, j);
      const double error = std::abs(got.get(i, j) - exact.sum);
      if (!(error <= sum_tolerance(got.dtype, exact.magnitude, length)) && reported++ < 3)
        ADD_FAILURE() << name << " at " << i << ", " << j << ": " << got.get(i, j) << " for "
                      << exact.sum;
    }
}

}  // namespace tandem::kernels::cpu
