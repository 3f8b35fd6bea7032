// Attention in f32 arithmetic, compiled for avx512.
#define TANDEM_ISA_NAME(x) x##_avx512
#include "kernels/cpu/attention_f32_body.h"
