// f32 products, compiled for avx512.
#define TANDEM_ISA_NAME(x) x##_avx512
namespace {
constexpr int kRowsMax = 12;   // rows of 32 sums in the registers
constexpr int kPanelsFew = 4;  // panels at once for one or two rows
}  // namespace
#include "kernels/cpu/gemm_f32_body.h"
#include "kernels/cpu/gemm_outer_body.h"
