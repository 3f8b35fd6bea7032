// The mathematics of each op in f64, written for reading, not for speed. Backward functions are
// themselves held against central differences of the forward ones in reference_test.cc.
#pragma once

#include "kernels/op_args.h"
#include "tests/support/op_harness.h"

#include <cstdint>
#include <vector>

namespace tandem::kernels::testing {

/// y[t, n] = x[t, k] w[n, k]^T.
Values matmul_nt(const Values& x, const Values& w, std::int64_t t, std::int64_t n, std::int64_t k);
/// y[t, n] = x[t, k] w[k, n].
Values matmul_nn(const Values& x, const Values& w, std::int64_t t, std::int64_t n, std::int64_t k);
/// y[m, n] = x[t, m]^T w[t, n].
Values matmul_tn(const Values& x, const Values& w, std::int64_t t, std::int64_t m, std::int64_t n);
double dot(const Values& a, const Values& b);

struct RmsNormResult {
  Values residual, y, rstd;
};
RmsNormResult rms_norm(const Values& residual, const Values& delta, const Values& weight,
                       std::int64_t t, std::int64_t c, double eps);
/// d(sum dy y)/d residual, of the norm alone.
Values rms_norm_backward(const Values& dy, const Values& residual, const Values& weight,
                         std::int64_t t, std::int64_t c, double eps);

/// Rotates the first `heads` heads of each row of [t, width]; sign -1 turns back.
Values rope(Values qkv, const std::vector<std::int32_t>& positions, const Values& inv_freq,
            double factor, std::int64_t heads, std::int64_t head_dim, std::int64_t width,
            double sign);

/// Rows of q, k and v: H heads, then twice K, of D each.
struct QkvShape {
  std::int64_t t = 0, heads = 0, kv_heads = 0, head_dim = 0;
  [[nodiscard]] std::int64_t width() const { return (heads + 2 * kv_heads) * head_dim; }
};
/// Norms each head of q and of k, by the first and the second half of weight [2 D]; v as it is.
Values qk_norm(const QkvShape& shape, const Values& raw, const Values& weight, double eps);
struct QkNormGrads {
  Values draw, dweight;
};
/// d(sum dqkv qk_norm)/d raw and d weight.
QkNormGrads qk_norm_backward(const QkvShape& shape, const Values& dqkv, const Values& raw,
                             const Values& weight, double eps);

Values silu_mul(const Values& gate_up, std::int64_t t, std::int64_t f);
Values silu_mul_backward(const Values& dout, const Values& gate_up, std::int64_t t, std::int64_t f);

struct AttentionResult {
  Values out, lse;
};
AttentionResult attention(const AttentionSpec& spec, const Values& qkv,
                          const std::vector<std::int32_t>& offsets, std::int64_t t);
Values attention_backward(const AttentionSpec& spec, const Values& dout, const Values& qkv,
                          const std::vector<std::int32_t>& offsets, std::int64_t t);

/// Linear with adapters.
struct Adapter {
  std::int64_t rank = 0;
  double scale = 0.0;
  Values a, b;  ///< [rank, i], [site n, rank]
};
struct Site {
  std::int64_t n_begin = 0, n = 0;
  std::vector<Adapter> slots;
  Values mask;  ///< [t, i] multipliers of dropout; empty: none
};
struct LinearCase {
  std::int64_t t = 0, i = 0, n = 0;
  Values w, bias;  ///< [n, i]; [n] or empty
  std::vector<Site> sites;
  std::vector<std::int32_t> segment_offsets, segment_slots;
  /// The slot of each row, -1 beyond the last segment.
  [[nodiscard]] std::int64_t slot_of(std::int64_t row) const;
};
Values linear(const LinearCase& c, const Values& x);
struct LinearGrads {
  Values dx;
  std::vector<std::vector<Values>> da, db;  ///< [site][slot]
};
LinearGrads linear_backward(const LinearCase& c, const Values& x, const Values& dy);

struct CrossEntropyResult {
  Values loss, correct, dx;
};
/// dx = scale * d(sum of losses)/dx.
CrossEntropyResult cross_entropy(const Values& x, const Values& w,
                                 const std::vector<std::int32_t>& labels, std::int64_t c,
                                 std::int64_t v, double scale);

}  // namespace tandem::kernels::testing
