// Private to kernels/cuda: how the copy engine finds tiles of a matrix.
#pragma once

#include "protocol/base/dtype.h"

#include <cuda.h>

#include <cstdint>

namespace tandem::kernels::cuda {

/// Of row-major bf16 or f16 [rows, columns], whose base and rows are multiples of 16 bytes: boxes
/// of box_rows (at most 256) x 64 in the layout of hopper.cuh; what lies outside arrives as zeros.
CUtensorMap make_tensor_map(DType dtype, const void* data, std::int64_t rows, std::int64_t columns,
                            int box_rows);

}  // namespace tandem::kernels::cuda
