// Host floats to and from device tensors of any floating dtype. Waits for the device.
#pragma once

#include "kernels/ops.h"

#include <span>
#include <vector>

namespace tandem::worker::model {

/// `from` as `dtype` keeps it: f32, bf16, f16 or f64, whose elements lie where they may.
void store_values(std::span<const float> from, DType dtype, std::byte* to);
/// `to` of one of these dtypes, of as many elements.
void upload_floats(kernels::Ops& ops, kernels::Exec& exec, std::span<const float> host,
                   const kernels::Tensor& to);
std::vector<float> download_floats(kernels::Ops& ops, kernels::Exec& exec,
                                   const kernels::Tensor& from);

}  // namespace tandem::worker::model
