// Matrix products of the CPU backend over weights packed once. One packed copy serves the forward
// product, the input gradient and row lookup, so a weight is never resident twice.
//
// Threads: each call runs on the OpenMP threads of the caller's setting (omp_get_max_threads) and
// returns when all is done; concurrent calls are safe as long as their outputs and scratch are
// distinct. Memory: nothing is allocated; scratch is the caller's, 64-byte aligned, its size a pure
// function of shapes, dtypes and the thread count (not of the processor), contents undefined before
// and after. Results never depend on the thread count.
//
// Numerics.
//   f32: Invariant. An output element is one chain of fused multiply-adds over the reduction index
//     in ascending order, starting from 0, the bias, or the old value (accumulate), then continued
//     by the low-rank terms in their order. So its bits depend on its own row and the weights, not
//     on T, neighbours, chunking or threads; AVX2 and AVX-512 give the same bits.
//   bf16: inputs bf16, accumulation in f32 (order free), one rounding to the output's dtype. bf16
//     denormals may be flushed to zero (as AMX and AVX512-BF16 do).
#pragma once

#include "kernels/cpu_scratch.h"
#include "protocol/base/dtype.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace tandem::kernels::cpu {

/// Element (i, j) of a row-major matrix is data[i * ld + j]; ld counts elements, ld >= columns.
struct ConstRows {
  const void* data = nullptr;
  std::int64_t ld = 0;
  DType dtype = DType::kF32;
};
struct Rows {
  void* data = nullptr;
  std::int64_t ld = 0;
  DType dtype = DType::kF32;
};

// -- packed weights -------------------------------------------------------------------------------

/// W [n, k] in format kF32 or kBF16. `data` is 64-byte aligned and holds packed_bytes(format, n,
/// k).
struct PackedMatrix {
  const void* data = nullptr;
  DType format = DType::kF32;
  std::int64_t n = 0, k = 0;
};

/// Rows per pack_rows block: every block but the last must start and end at a multiple of this.
inline constexpr std::int64_t kPackRows = 32;

/// Writes rows [row, row + count) of W from `src` [count, k] (f32 or bf16, rounded or widened to
/// the format) into `packed`, the start of the whole matrix. `row` is a multiple of kPackRows, and
/// so is `count` unless row + count = n. Padding is zeroed. Single-threaded; disjoint blocks may be
/// packed concurrently.
void pack_rows(void* packed, DType format, std::int64_t n, std::int64_t k, std::int64_t row,
               std::int64_t count, ConstRows src);

/// out[i, :] = W[ids[i], :] for i < count; out [count, k] f32 or bf16. The elements are the packed
/// ones, exactly (rounded only where out is bf16 and the format f32). ids must be in [0, n).
void read_rows(const PackedMatrix& w, std::span<const std::int32_t> ids, Rows out);

// -- the linear layer -----------------------------------------------------------------------------

/// A product of small inner dimension added to a column range of the output:
/// forward:    y[:, begin + j] += sum_r u[:, r] * v[j, r]   (v [count, rank]: LoRA's B)
/// input_grad: dx[:, begin + j] += sum_r u[:, r] * v[r, j]  (v [rank, count]: LoRA's A)
/// u [T, rank] and v in the weight's format. Scales belong into u (LoRA's s is small_product's
/// `scale`). At most kLowRankTermsMax terms per call, each of rank <= kLowRankMax; rank 0 is
/// skipped.
inline constexpr std::int64_t kLowRankTermsMax = 16;
inline constexpr std::int64_t kLowRankMax = 1024;
struct LowRankTerm {
  std::int64_t begin = 0, count = 0, rank = 0;
  ConstRows u, v;
};

/// A term of some rows and of a forward product alone:
/// y[t, begin + j] += sum_r u[t, r] * v[j, r] for t in [row_begin, row_end).
/// u and v as a term's. Of pieces that share a column each row has at most one. There may be any
/// number: v is brought into order panel by panel, as it is needed, so no scratch grows with them.
struct LowRankPiece {
  std::int64_t row_begin = 0, row_end = 0;
  std::int64_t begin = 0, count = 0, rank = 0;
  ConstRows u, v;
};

struct LinearOptions {
  const void* bias = nullptr;      ///< [N] added to every row (forward only)
  DType bias_dtype = DType::kF32;  ///< f32 or bf16
  bool accumulate = false;         ///< add to the output instead of overwriting it
  std::span<const LowRankTerm> low_rank;
  std::span<const LowRankPiece> pieces;  ///< forward only; added after the terms
};

/// y[T, n] = x[T, k] W^T. x in the format's dtype; y f32, or bf16 when the format is bf16.
void linear_forward(const PackedMatrix& w, std::int64_t t, ConstRows x, Rows y,
                    const LinearOptions& options, std::span<std::byte> scratch);

/// dx[T, k] = dy[T, n] W. dy in the format's dtype; dx f32, or bf16 when the format is bf16.
void linear_input_grad(const PackedMatrix& w, std::int64_t t, ConstRows dy, Rows dx,
                       const LinearOptions& options, std::span<std::byte> scratch);

// -- small products of LoRA -----------------------------------------------------------------------

/// How the small operand of small_product lies in memory.
enum class SmallLayout : std::uint8_t {
  kOutByIn,  ///< w [out, in]: y = x w^T (u = x A^T; y += u B^T)
  kInByOut,  ///< w [in, out]: y = x w   (dU = dy B; dx += dU A)
};

/// y[T, out] = scale * (x[T, in] times w), or += with accumulate. x and w have one dtype; y is of
/// that dtype or f32. One of `in`, `out` is expected to be small (a rank). In f32 the chain over
/// `in` starts from 0 and its end is multiplied by scale; with accumulate it starts from the old y
/// and each x is multiplied by scale first. So u = s x A^T followed by y += u B^T (scale 1) has the
/// bits of the low-rank term inside linear_forward, and likewise backward.
void small_product(std::int64_t t, std::int64_t in, std::int64_t out, ConstRows x, ConstRows w,
                   SmallLayout layout, float scale, bool accumulate, Rows y,
                   std::span<std::byte> scratch);

/// Rows [column, column + out) of a matrix that is put together from several: w [out, in].
struct SmallPart {
  ConstRows w;
  std::int64_t column = 0, out = 0;
};
/// y[T, columns] = scale * x[T, in] W^T, W's rows those of the parts and zero between them: the u
/// of all sites that read one x, in one product. Every column has the bits of its part's own
/// small_product. Takes small_product's scratch for `columns` outputs.
void stacked_product(std::int64_t t, std::int64_t in, std::int64_t columns, ConstRows x,
                     std::span<const SmallPart> parts, float scale, Rows y,
                     std::span<std::byte> scratch);

/// c[m, n] += alpha * a[T, m]^T b[T, n]: weight gradients. a, b of one dtype (f32 or bf16), c f32
/// with row stride ldc. The sum over T is taken in blocks of fixed size in ascending order, so the
/// bits do not depend on the thread count. m or n is expected to be small (a rank).
void outer_accumulate(std::int64_t t, std::int64_t m, std::int64_t n, ConstRows a, ConstRows b,
                      float alpha, float* c, std::int64_t ldc, std::span<std::byte> scratch);

}  // namespace tandem::kernels::cpu
