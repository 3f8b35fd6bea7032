// A device that runs nothing: shapes are checked, scratch and tensors are booked in the ledger, and
// no byte is touched. The estimator drives the real objects on it to learn what a job would take on
// the device that `profile` describes.
#pragma once

#include "kernels/op_cost.h"
#include "kernels/ops.h"

namespace tandem::kernels {

/// Addresses handed out are distinct and aligned but belong to no memory. Never refuses memory, so
/// that a plan that does not fit still yields its number. `watcher`, where given, hears of every
/// op's cost. One thread.
Backend make_meta_backend(const DeviceProfile& profile, OpWatcher watcher = {});

}  // namespace tandem::kernels
