#include "kernels/cpu/row_kernels_body.h"

namespace tandem::kernels::cpu {

const RowKernels kRowKernelsAvx2 = kKernels;

}  // namespace tandem::kernels::cpu
