#include "kernels/cpu/row_kernels_body.h"

namespace tandem::kernels::cpu {

const RowKernels kRowKernelsAvx512 = kKernels;

}  // namespace tandem::kernels::cpu
