#include "kernels/cpu/row_kernels_body.h"

namespace tandem::kernels::cpu {

const RowKernels kRowKernelsGeneric = kKernels;

}  // namespace tandem::kernels::cpu
