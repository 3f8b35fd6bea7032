// Attention in f32 arithmetic, compiled for avx2.
#define TANDEM_ISA_NAME(x) x##_avx2
#include "kernels/cpu/attention_f32_body.h"
