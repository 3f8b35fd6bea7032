// f32 products, compiled for avx2.
#define TANDEM_ISA_NAME(x) x##_avx2
namespace {
constexpr int kRowsMax = 3;    // rows of 32 sums in the registers
constexpr int kPanelsFew = 2;  // panels at once for one or two rows
}  // namespace
#include "kernels/cpu/gemm_f32_body.h"
#include "kernels/cpu/gemm_outer_body.h"
