// Private to kernels/cpu: layout changes without special instructions.
#pragma once

#include "kernels/cpu/gemm.h"

namespace tandem::kernels::cpu {

/// The rows of the parts to panels over `in`, panels of `columns` columns in all; zero where no
/// part is.
void pack_parts_f32(const SmallPart* parts, std::int64_t count, std::int64_t columns,
                    std::int64_t in, float* to);
void pack_parts_bf16(const SmallPart* parts, std::int64_t count, std::int64_t columns,
                     std::int64_t in, bf16* to);

/// w [in, out] to panels in which `out` is the column and `in` the reduction; column o of w becomes
/// column out_shift + o (0 <= out_shift < 32), the others are zero.
void pack_in_by_out_f32(ConstRows w, std::int64_t in, std::int64_t out, std::int64_t out_shift,
                        float* to);
void pack_in_by_out_bf16(ConstRows w, std::int64_t in, std::int64_t out, std::int64_t out_shift,
                         bf16* to);

/// Panels of 32 n over k to panels of 32 k over n, for k in [k_begin, k_end).
void retile_plain(const PackedMatrix& w, std::int64_t k_begin, std::int64_t k_end, char* to);

}  // namespace tandem::kernels::cpu
