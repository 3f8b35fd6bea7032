// Host floats to and from device tensors of any floating dtype. Waits for the device.
#pragma once

#include "kernels/ops.h"

#include <span>
#include <vector>

namespace tandem::worker::model {

/// `to` f32, bf16, f16 or f64 of as many elements.
void upload_floats(kernels::Ops& ops, kernels::Exec& exec, std::span<const float> host,
                   const kernels::Tensor& to);
std::vector<float> download_floats(kernels::Ops& ops, kernels::Exec& exec,
                                   const kernels::Tensor& from);

}  // namespace tandem::worker::model
