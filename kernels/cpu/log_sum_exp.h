// Private to kernels/cpu: the one reduction over a row of logits that loss, log-probability and
// sampling share, so that the same logits give the same bits everywhere.
#pragma once

#include <cmath>
#include <cstdint>

namespace tandem::kernels::cpu {

struct RowStatistics {
  float top = -INFINITY;    ///< largest logit
  std::int64_t argmax = 0;  ///< its lowest index
  float sum = 0.0f;         ///< of exp(logit - top)
  [[nodiscard]] float lse() const { return top + std::log(sum); }
};

RowStatistics row_statistics(const float* logits, std::int64_t n);

}  // namespace tandem::kernels::cpu
