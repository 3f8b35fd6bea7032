// f32 products, compiled for generic.
#define TANDEM_ISA_NAME(x) x##_generic
namespace {
constexpr int kRowsMax = 2;    // rows of 32 sums in the registers
constexpr int kPanelsFew = 1;  // panels at once for one or two rows
}  // namespace
#include "kernels/cpu/gemm_f32_body.h"
#include "kernels/cpu/gemm_outer_body.h"
