// Private to kernels/cpu: the dropout of one adapter site, the same in forward and backward.
#pragma once

#include "kernels/op_args.h"
#include "protocol/base/random.h"

#include <algorithm>
#include <cstdint>

namespace tandem::kernels::cpu {

/// Element (row, column) is dropped when its 16 random bits are below p * 65536 and scaled by
/// 1/(1-p) otherwise; four columns share one draw.
class DropoutMask {
 public:
  DropoutMask(const AdapterRows& rows, const LoraSite& site, std::int64_t columns)
      : seed_(rows.dropout_seed),
        stream_(site.dropout_stream),
        columns_(columns),
        threshold_(static_cast<std::uint32_t>(rows.dropout * 65536.0f + 0.5f)),
        scale_(1.0f / (1.0f - static_cast<float>(threshold_) / 65536.0f)) {}

  /// out = dropout(x) for one row ([1, columns] each).
  void apply(const Tensor& x, std::int64_t row, const Tensor& out) const {
    if (x.dtype == DType::kF32) return run<false>(x.as<float>(), row, out.as<float>());
    run<false>(x.as<bf16>(), row, out.as<bf16>());
  }
  /// out += dropout(x).
  void add(const Tensor& x, std::int64_t row, const Tensor& out) const {
    if (x.dtype == DType::kF32) return run<true>(x.as<float>(), row, out.as<float>());
    run<true>(x.as<bf16>(), row, out.as<bf16>());
  }

 private:
  static constexpr std::int64_t kGroup = 4;

  template <bool kAdd, class T>
  void run(const T* x, std::int64_t row, T* out) const {
    const std::int64_t groups = (columns_ + kGroup - 1) / kGroup;
    for (std::int64_t g = 0; g < groups; ++g) {
      std::uint64_t bits =
          random_bits(seed_, stream_, static_cast<std::uint64_t>(row * groups + g));
      for (std::int64_t j = g * kGroup; j < std::min(columns_, (g + 1) * kGroup); ++j) {
        const float kept = (bits & 0xffff) < threshold_ ? 0.0f : scale_;
        bits >>= 16;
        out[j] = from_f32<T>((kAdd ? to_f32(out[j]) : 0.0f) + to_f32(x[j]) * kept);
      }
    }
  }

  const std::uint64_t seed_, stream_;
  const std::int64_t columns_;
  const std::uint32_t threshold_;
  const float scale_;
};

}  // namespace tandem::kernels::cpu
