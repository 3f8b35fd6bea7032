// Attention in f32 arithmetic, compiled for generic.
#define TANDEM_ISA_NAME(x) x##_generic
#include "kernels/cpu/attention_f32_body.h"
