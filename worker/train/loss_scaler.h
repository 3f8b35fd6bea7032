// The dynamic loss scale of training in f16. A gradient at the loss is about 1 / (tokens of the
// step), and below 2^-24 a half is zero: so gradients are computed scale times as large, and f32
// takes the scale out again where they enter the norm and the optimizer. Where one overflowed, the
// step is skipped and the scale halved; after growth_interval good steps in a row it is doubled
// (Micikevicius et al., Mixed Precision Training, 2018). The scale is a power of two, so it changes
// no bit but where values under- or overflow. A pure state machine, on every rank the same, because
// the norm that it looks at is. Other dtypes need none: scale 1, no step skipped.
#pragma once

#include "protocol/base/dtype.h"
#include "protocol/base/result.h"

#include <cstdint>
#include <string>

namespace tandem::worker::train {

struct LossScaling {
  double initial = 65536.0;             ///< a power of two
  std::int64_t growth_interval = 2000;  ///< good steps in a row before it doubles
  /// It never grows beyond: sums of squares of gradients are f32.
  double most = 0x1p24;
};

class LossScaler {
 public:
  LossScaler() = default;  ///< of a dtype that needs none
  explicit LossScaler(const LossScaling& scaling) : active_(true), scaling_(scaling) {
    scale_ = scaling.initial;
  }
  static LossScaler of(DType compute) {
    return compute == DType::kF16 ? LossScaler(LossScaling{}) : LossScaler();
  }

  [[nodiscard]] bool active() const { return active_; }
  [[nodiscard]] double scale() const { return scale_; }
  [[nodiscard]] std::int64_t skipped() const { return skipped_; }  ///< steps since the job began

  /// Whether a gradient whose norm is not finite may be the scale's fault.
  [[nodiscard]] bool can_lower() const { return active_ && scale_ > 1.0; }
  /// After an optimizer step was taken, or was skipped because can_lower().
  void took();
  void skip();

  /// For a checkpoint's JSON: "" when inactive.
  [[nodiscard]] std::string to_json() const;
  /// Of the same dtype and settings; corrupt_error.
  Status read(const std::string& json);

 private:
  bool active_ = false;
  LossScaling scaling_;
  double scale_ = 1.0;
  std::int64_t good_ = 0;  ///< steps in a row
  std::int64_t skipped_ = 0;
};

}  // namespace tandem::worker::train
