# tandem_cpu_gemm: matrix products and attention over raw pointers. One object file per instruction
# set, chosen at run time by cpu_features; off x86-64 only the generic ones are built.
tandem_library(cpu_gemm
  SOURCES attention.cc cpu_features.cc gemm.cc gemm_outer.cc gemm_pack.cc gemm_plain.cc
    gemm_f32_generic.cc gemm_f32_avx2.cc gemm_f32_avx512.cc gemm_bf16_avx512.cc gemm_bf16_amx.cc
    gemm_outer_amx.cc attention_f32_generic.cc attention_f32_avx2.cc attention_f32_avx512.cc
    attention_forward_amx.cc attention_backward_amx.cc
  PUBLIC tandem_base
  PRIVATE OpenMP::OpenMP_CXX)

# -O3 and no strict contraction rules beside: the kernels name every fused operation themselves.
set(TANDEM_KERNEL_FLAGS -ffp-contract=off -fno-math-errno -Wno-ignored-attributes)
if(NOT TANDEM_SANITIZE)  # see TANDEM_UNROLL
  list(PREPEND TANDEM_KERNEL_FLAGS -O3)
endif()
set(TANDEM_AVX512_FLAGS -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl
    -mprefer-vector-width=512
    -Wno-uninitialized -Wno-maybe-uninitialized)  # GCC 12's own headers trip them
set_source_files_properties(gemm_f32_generic.cc attention_f32_generic.cc PROPERTIES COMPILE_OPTIONS
  "${TANDEM_KERNEL_FLAGS}")
set_source_files_properties(gemm_f32_avx2.cc attention_f32_avx2.cc PROPERTIES COMPILE_OPTIONS
  "${TANDEM_KERNEL_FLAGS};-mavx2;-mfma")
set_source_files_properties(gemm_f32_avx512.cc attention_f32_avx512.cc PROPERTIES COMPILE_OPTIONS
  "${TANDEM_KERNEL_FLAGS};${TANDEM_AVX512_FLAGS}")
set_source_files_properties(gemm_bf16_avx512.cc PROPERTIES COMPILE_OPTIONS
  "${TANDEM_KERNEL_FLAGS};${TANDEM_AVX512_FLAGS};-mavx512bf16")
set_source_files_properties(gemm_bf16_amx.cc gemm_outer_amx.cc
  attention_forward_amx.cc attention_backward_amx.cc PROPERTIES COMPILE_OPTIONS
  "${TANDEM_KERNEL_FLAGS};${TANDEM_AVX512_FLAGS};-mavx512bf16;-mamx-tile;-mamx-bf16")

# Measured against, not used: see tools/bench_gemm.cc.
tandem_library(onednn SOURCES onednn.cc PUBLIC tandem_base PRIVATE ${DNNL_LIBRARY})
