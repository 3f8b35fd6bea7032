#include "kernels/cpu/attention.h"

#include "kernels/cpu/cpu_features.h"
#include "tests/kernels/cpu/matrices.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace tandem::kernels::cpu {
namespace {

// One packed batch: lengths, shape, and the rows.
struct Batch {
  AttentionShape shape;
  std::vector<std::int32_t> offsets;
  std::int64_t t = 0, length_max = 0, width = 0;
  Matrix qkv;

  Batch(const AttentionShape& s, const std::vector<int>& lengths, std::int64_t inert,
        std::uint64_t seed)
      : shape(s), offsets{0}, qkv(1, 1, s.dtype) {
    for (const int length : lengths) {
      offsets.push_back(offsets.back() + length);
      length_max = std::max<std::int64_t>(length_max, length);
    }
    t = offsets.back() + inert;
    width = (s.heads + 2 * s.kv_heads) * s.head_dim;
    qkv = random_matrix(t, width, s.dtype, seed, 16);
    for (std::int64_t i = offsets.back(); i < t; ++i)
      for (std::int64_t j = 0; j < width; ++j) qkv.set(i, j, NAN);  // inert rows may hold anything
  }
  [[nodiscard]] std::int64_t rows() const { return offsets.back(); }
};

AttentionShape shape_of(std::int64_t heads, std::int64_t kv_heads, std::int64_t dim, DType dtype) {
  AttentionShape s;
  s.heads = heads;
  s.kv_heads = kv_heads;
  s.head_dim = dim;
  s.scale = 1.0f / std::sqrt(static_cast<float>(dim)) * 3;  // sharper than flat
  s.dtype = dtype;
  return s;
}

struct Outputs {
  Matrix out, lse;
};

Outputs run_forward(const Batch& b) {
  Outputs o{Matrix(b.t, b.shape.heads * b.shape.head_dim, b.shape.dtype, 8),
            Matrix(b.t, b.shape.heads, DType::kF32)};
  const Buffer scratch(
      attention_forward_scratch(b.shape, b.t, b.length_max, omp_get_max_threads()));
  attention_forward(b.shape, b.t, b.qkv.view(), b.offsets, b.length_max, o.out.out(),
                    static_cast<float*>(o.lse.at(0)), scratch.span());
  return o;
}

Matrix run_backward(const Batch& b, const Outputs& o, const Matrix& dout) {
  Matrix dqkv(b.t, b.width, b.shape.dtype, 4);
  const Buffer scratch(
      attention_backward_scratch(b.shape, b.t, b.length_max, omp_get_max_threads()));
  attention_backward(b.shape, b.t, dout.view(), b.qkv.view(), o.out.view(),
                     static_cast<const float*>(o.lse.at(0)), b.offsets, b.length_max, dqkv.out(),
                     scratch.span());
  return dqkv;
}

// -- the reference, in f64, with bounds on the error a kernel may make ---------------------------

// Rounding of the operands of the second products: bf16 kernels round p and ds to bf16.
double operand_unit(DType dtype) {
  return dtype == DType::kBF16 ? std::ldexp(1.0, -8) : 0.0;
}

struct RowReference {
  std::vector<double> p;                       ///< by key position
  std::vector<double> out, bound;              ///< by d
  double lse = 0, lse_bound = 0, p_error = 0;  ///< p_error: relative, of every p
  std::vector<double> slope;                   ///< d score / d dot, by key
};

RowReference reference_row(const Batch& b, std::int64_t begin, std::int64_t row, std::int64_t h) {
  const AttentionShape& s = b.shape;
  const std::int64_t dim = s.head_dim, position = row - begin;
  const std::int64_t kc = (s.heads + h / (s.heads / s.kv_heads)) * dim;
  const std::int64_t vc = kc + s.kv_heads * dim;
  const double eps = std::ldexp(1.0, -24);
  RowReference r;
  r.p.assign(static_cast<std::size_t>(position + 1), 0.0);
  r.slope = r.p;
  double largest = -INFINITY, score_error = 0;
  std::vector<double> scores(r.p.size(), -INFINITY);
  for (std::int64_t j = 0; j <= position; ++j) {
    if (s.window > 0 && position - j >= s.window) continue;
    ExactSum dot;
    for (std::int64_t d = 0; d < dim; ++d)
      dot.add(b.qkv.get(row, h * dim + d) * b.qkv.get(begin + j, kc + d));
    const auto k = static_cast<std::size_t>(j);
    scores[k] = dot.sum * s.scale;
    r.slope[k] = s.scale;
    double error = static_cast<double>(dim + 4) * eps * dot.magnitude * s.scale;
    if (s.soft_cap > 0) {
      const double x = std::tanh(scores[k] / s.soft_cap);
      scores[k] = s.soft_cap * x;
      r.slope[k] *= 1 - x * x;
      error += s.soft_cap * 8 * eps;
    }
    score_error = std::max(score_error, error);
    largest = std::max(largest, scores[k]);
  }
  double sum = 0;
  for (std::size_t j = 0; j < r.p.size(); ++j) sum += r.p[j] = std::exp(scores[j] - largest);
  for (double& p : r.p) p /= sum;
  r.lse = largest + std::log(sum);
  const double length = static_cast<double>(position + 1);
  r.p_error = 2 * score_error + (length + 32 + 2 * std::abs(largest)) * eps;
  r.lse_bound = r.p_error + 4 * eps * std::abs(r.lse);
  for (std::int64_t d = 0; d < dim; ++d) {
    ExactSum o;
    for (std::int64_t j = 0; j <= position; ++j)
      o.add(r.p[static_cast<std::size_t>(j)] * b.qkv.get(begin + j, vc + d));
    r.out.push_back(o.sum);
    r.bound.push_back((2 * r.p_error + (length + 8) * eps + operand_unit(s.dtype)) * o.magnitude +
                      (s.dtype == DType::kBF16 ? std::ldexp(1.0, -8) : eps) * std::abs(o.sum) +
                      1e-30);
  }
  return r;
}

void expect_forward(const Batch& b, const Outputs& o, const std::string& name) {
  const std::int64_t dim = b.shape.head_dim;
  int reported = 0;
  for (std::size_t s = 0; s + 1 < b.offsets.size(); ++s)
    for (std::int64_t i = b.offsets[s]; i < b.offsets[s + 1]; ++i)
      for (std::int64_t h = 0; h < b.shape.heads; ++h) {
        const RowReference r = reference_row(b, b.offsets[s], i, h);
        if (!(std::abs(o.lse.get(i, h) - r.lse) <= r.lse_bound) && reported++ < 3)
          ADD_FAILURE() << name << " lse " << i << ", " << h << ": " << o.lse.get(i, h) << " for "
                        << r.lse;
        for (std::int64_t d = 0; d < dim; ++d) {
          const auto k = static_cast<std::size_t>(d);
          if (!(std::abs(o.out.get(i, h * dim + d) - r.out[k]) <= r.bound[k]) && reported++ < 3)
            ADD_FAILURE() << name << " out " << i << ", " << h << ", " << d << ": "
                          << o.out.get(i, h * dim + d) << " for " << r.out[k] << " +- "
                          << r.bound[k];
        }
      }
  for (std::int64_t i = b.rows(); i < b.t; ++i)
    for (std::int64_t j = 0; j < b.shape.heads * dim; ++j) EXPECT_EQ(o.out.get(i, j), 0.0);
}

std::vector<Batch> batches(DType dtype) {
  std::vector<Batch> all;
  all.emplace_back(shape_of(1, 1, 16, dtype), std::vector<int>{1}, 0, 1);
  all.emplace_back(shape_of(9, 3, 64, dtype), std::vector<int>{37, 1, 64, 150}, 3, 2);
  all.emplace_back(shape_of(4, 4, 32, dtype), std::vector<int>{16, 17, 0, 33}, 0, 3);
  all.emplace_back(shape_of(3, 1, 20, dtype), std::vector<int>{50, 5}, 1, 4);
  all.emplace_back(shape_of(2, 2, 128, dtype), std::vector<int>{140}, 0, 5);
  AttentionShape windowed = shape_of(4, 2, 64, dtype);
  windowed.window = 23;
  all.emplace_back(windowed, std::vector<int>{60, 170}, 0, 6);
  AttentionShape capped = shape_of(2, 1, 32, dtype);
  capped.soft_cap = 1.5f;
  all.emplace_back(capped, std::vector<int>{70}, 0, 7);
  return all;
}

std::string name_of(const Batch& b) {
  return str(dtype_name(b.shape.dtype), " D=", b.shape.head_dim, " H=", b.shape.heads, " T=", b.t,
             " window=", b.shape.window, " cap=", b.shape.soft_cap, " on ", isa_name(isa()));
}

TEST(AttentionForward, MatchesF64ForMixedLengthsWindowsAndCaps) {
  for (const DType dtype : {DType::kF32, DType::kBF16})
    for (const Batch& b : batches(dtype)) expect_forward(b, run_forward(b), name_of(b));
}

// Elementwise: |got - exact| <= bound, both accumulated over keys or queries in f64.
struct GradientReference {
  std::vector<ExactSum> sums;         ///< [t][width]
  std::vector<double> operand_error;  ///< from errors of p and ds
};

GradientReference reference_gradients(const Batch& b, const Matrix& dout) {
  const AttentionShape& s = b.shape;
  const std::int64_t dim = s.head_dim;
  const double eps = std::ldexp(1.0, -24), unit = operand_unit(s.dtype);
  const double saved = s.dtype == DType::kBF16 ? std::ldexp(1.0, -8) : eps;  // rounding of out
  GradientReference g;
  g.sums.resize(static_cast<std::size_t>(b.t * b.width));
  g.operand_error.resize(g.sums.size());
  const auto add = [&](std::int64_t row, std::int64_t column, double x, double w, double w_error) {
    const auto at = static_cast<std::size_t>(row * b.width + column);
    g.sums[at].add(w * x);
    g.operand_error[at] += w_error * std::abs(x);
  };
  for (std::size_t q = 0; q + 1 < b.offsets.size(); ++q)
    for (std::int64_t i = b.offsets[q]; i < b.offsets[q + 1]; ++i)
      for (std::int64_t h = 0; h < s.heads; ++h) {
        const std::int64_t begin = b.offsets[q];
        const std::int64_t kc = (s.heads + h / (s.heads / s.kv_heads)) * dim;
        const std::int64_t vc = kc + s.kv_heads * dim;
        const RowReference r = reference_row(b, begin, i, h);
        ExactSum delta;
        double delta_error = 0;
        for (std::int64_t d = 0; d < dim; ++d) {
          const auto k = static_cast<std::size_t>(d);
          delta.add(dout.get(i, h * dim + d) * r.out[k]);
          delta_error +=
              std::abs(dout.get(i, h * dim + d)) * (r.bound[k] + saved * std::abs(r.out[k]));
        }
        delta_error += static_cast<double>(dim + 4) * eps * delta.magnitude;
        for (std::size_t j = 0; j < r.p.size(); ++j) {
          if (r.p[j] == 0) continue;
          const std::int64_t key = begin + static_cast<std::int64_t>(j);
          ExactSum dp;
          for (std::int64_t d = 0; d < dim; ++d)
            dp.add(dout.get(i, h * dim + d) * b.qkv.get(key, vc + d));
          const double dp_error = static_cast<double>(dim + 4) * eps * dp.magnitude;
          const double slope_error = s.soft_cap > 0 ? 64 * eps : 0;
          const double p_error = r.p[j] * (2 * r.p_error + unit);
          const double ds = r.p[j] * (dp.sum - delta.sum) * r.slope[j];
          const double ds_error =
              std::abs(r.slope[j]) * (r.p[j] * (dp_error + delta_error) +
                                      2 * r.p_error * r.p[j] * std::abs(dp.sum - delta.sum)) +
              s.scale * slope_error * r.p[j] * std::abs(dp.sum - delta.sum) +
              (unit + 8 * eps) * std::abs(ds);
          for (std::int64_t d = 0; d < dim; ++d) {
            add(key, vc + d, dout.get(i, h * dim + d), r.p[j], p_error);
            add(key, kc + d, b.qkv.get(i, h * dim + d), ds, ds_error);
            add(i, h * dim + d, b.qkv.get(key, kc + d), ds, ds_error);
          }
        }
      }
  return g;
}

TEST(AttentionBackward, MatchesF64ForMixedLengthsWindowsAndCaps) {
  for (const DType dtype : {DType::kF32, DType::kBF16})
    for (const Batch& b : batches(dtype)) {
      const Matrix dout = random_matrix(b.t, b.shape.heads * b.shape.head_dim, dtype, 77, 2);
      const Matrix dqkv = run_backward(b, run_forward(b), dout);
      const GradientReference g = reference_gradients(b, dout);
      int reported = 0;
      for (std::int64_t i = 0; i < b.t; ++i)
        for (std::int64_t j = 0; j < b.width; ++j) {
          const auto at = static_cast<std::size_t>(i * b.width + j);
          const double bound =
              g.operand_error[at] + sum_tolerance(dtype, g.sums[at].magnitude, 3 * b.length_max);
          if (!(std::abs(dqkv.get(i, j) - g.sums[at].sum) <= bound) && reported++ < 3)
            ADD_FAILURE() << name_of(b) << " at " << i << ", " << j << ": " << dqkv.get(i, j)
                          << " for " << g.sums[at].sum << " +- " << bound;
        }
    }
}

// Loss sum(dout * out) of the f64 reference.
double reference_loss(const Batch& b, const Matrix& dout) {
  double loss = 0;
  for (std::size_t s = 0; s + 1 < b.offsets.size(); ++s)
    for (std::int64_t i = b.offsets[s]; i < b.offsets[s + 1]; ++i)
      for (std::int64_t h = 0; h < b.shape.heads; ++h) {
        const RowReference r = reference_row(b, b.offsets[s], i, h);
        for (std::int64_t d = 0; d < b.shape.head_dim; ++d)
          loss += dout.get(i, h * b.shape.head_dim + d) * r.out[static_cast<std::size_t>(d)];
      }
  return loss;
}

TEST(AttentionBackward, IsTheFiniteDifferenceOfTheForward) {
  AttentionShape shape = shape_of(4, 2, 16, DType::kF32);
  shape.soft_cap = 2.0f;
  shape.window = 9;
  const Batch b(shape, {11, 18}, 0, 5);
  const Matrix dout = random_matrix(b.t, 64, DType::kF32, 6);
  const Matrix dqkv = run_backward(b, run_forward(b), dout);
  for (int trial = 0; trial < 60; ++trial) {
    const std::int64_t i = trial * 7 % b.t, j = trial * 29 % b.width;
    const auto x = static_cast<float>(b.qkv.get(i, j));
    const float h = 0x1p-10f;  // x +- h is exact enough: the realised step is used below
    b.qkv.set(i, j, x + h);
    const double above = reference_loss(b, dout), hi = b.qkv.get(i, j);
    b.qkv.set(i, j, x - h);
    const double below = reference_loss(b, dout), lo = b.qkv.get(i, j);
    b.qkv.set(i, j, x);
    // Truncation is h^2 / 6 times a third derivative of order 10; the kernel's f32 is well below.
    EXPECT_NEAR(dqkv.get(i, j), (above - below) / (hi - lo), 2e-5) << i << ", " << j;
  }
}

TEST(Attention, RepeatsItsBitsForAnyThreadCount) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const Batch b(shape_of(6, 2, 64, dtype), {70, 1, 130}, 0, 8);
    const Matrix dout = random_matrix(b.t, 6 * 64, dtype, 9);
    std::vector<Matrix> outs, grads;
    for (const int threads : {1, 2, 3}) {
      const ThreadCount scope(threads);
      const Outputs o = run_forward(b);
      outs.push_back(o.out);
      grads.push_back(run_backward(b, o, dout));
    }
    for (std::size_t n = 1; n < outs.size(); ++n)
      for (std::int64_t i = 0; i < b.t; ++i) {
        EXPECT_TRUE(same_row(outs[0], i, outs[n], i));
        EXPECT_TRUE(same_row(grads[0], i, grads[n], i));
      }
  }
}

// -- paged ----------------------------------------------------------------------------------------

// The keys and values of a batch in blocks from the last to the first; what belongs to nobody is
// NaN.
struct Pages {
  Pages(const Batch& b, std::int64_t size) : block_size(size) {
    const AttentionShape& s = b.shape;
    const auto sequences = static_cast<std::int64_t>(b.offsets.size()) - 1;
    blocks_max = (b.length_max + size - 1) / size;
    const std::int64_t blocks = sequences * blocks_max + 1;
    tables.assign(static_cast<std::size_t>(sequences * blocks_max), -1);
    k = Matrix(blocks, s.kv_heads * size * s.head_dim, s.dtype);
    v = Matrix(blocks, s.kv_heads * size * s.head_dim, s.dtype);
    for (std::int64_t n = 0; n < sequences; ++n)
      for (std::int64_t j = 0; j < b.offsets[n + 1] - b.offsets[n]; ++j) {
        auto& block = tables[static_cast<std::size_t>(n * blocks_max + j / size)];
        if (block < 0) block = static_cast<std::int32_t>(blocks - 1 - next_++);
        for (std::int64_t h = 0; h < s.kv_heads; ++h)
          for (std::int64_t d = 0; d < s.head_dim; ++d) {
            const std::int64_t to = (h * size + j % size) * s.head_dim + d;
            const std::int64_t from = (s.heads + h) * s.head_dim + d;
            k.set(block, to, static_cast<float>(b.qkv.get(b.offsets[n] + j, from)));
            v.set(block, to,
                  static_cast<float>(b.qkv.get(b.offsets[n] + j, from + s.kv_heads * s.head_dim)));
          }
      }
  }
  std::int64_t block_size, blocks_max = 0;
  std::vector<std::int32_t> tables;
  Matrix k{1, 1, DType::kF32}, v{1, 1, DType::kF32};

 private:
  std::int64_t next_ = 0;
};

// Rows [done[s], done[s] + chunk) of every sequence in one call, until all are through.
Matrix run_paged(const Batch& b, const Pages& pages, std::int64_t chunk) {
  const AttentionShape& s = b.shape;
  const std::size_t sequences = b.offsets.size() - 1;
  const Matrix all(b.t, s.heads * s.head_dim, s.dtype, 8);
  std::vector<std::int32_t> done(sequences, 0);
  for (bool more = true; more;) {
    more = false;
    std::vector<std::int32_t> q_offsets{0}, kv_lens, tables;
    std::vector<std::int64_t> rows;
    for (std::size_t n = 0; n < sequences; ++n) {
      const std::int32_t length = b.offsets[n + 1] - b.offsets[n];
      const auto now = static_cast<std::int32_t>(std::min<std::int64_t>(chunk, length - done[n]));
      if (now == 0) continue;
      for (std::int32_t i = 0; i < now; ++i) rows.push_back(b.offsets[n] + done[n] + i);
      done[n] += now;
      more = more || done[n] < length;
      q_offsets.push_back(q_offsets.back() + now);
      kv_lens.push_back(done[n]);
      const auto table = pages.tables.begin() + static_cast<std::int64_t>(n) * pages.blocks_max;
      tables.insert(tables.end(), table, table + pages.blocks_max);
    }
    const auto t = static_cast<std::int64_t>(rows.size());
    if (t == 0) break;
    const Matrix q(t, s.heads * s.head_dim, s.dtype, 3);
    for (std::int64_t i = 0; i < t; ++i)
      for (std::int64_t j = 0; j < q.columns; ++j)
        q.set(i, j, static_cast<float>(b.qkv.get(rows[static_cast<std::size_t>(i)], j)));
    const Matrix out(t, q.columns, s.dtype);
    PagedKeys keys;
    keys.k = pages.k.at(0);
    keys.v = pages.v.at(0);
    keys.block_size = pages.block_size;
    keys.blocks_max = pages.blocks_max;
    keys.block_tables = tables.data();
    keys.kv_lens = kv_lens;
    const Buffer scratch(paged_attention_scratch(s, t, static_cast<std::int64_t>(kv_lens.size()),
                                                 b.length_max, omp_get_max_threads()));
    paged_attention(s, t, q.view(), q_offsets, keys, b.length_max, out.out(), scratch.span());
    for (std::int64_t i = 0; i < t; ++i)
      for (std::int64_t j = 0; j < q.columns; ++j)
        all.set(rows[static_cast<std::size_t>(i)], j, static_cast<float>(out.get(i, j)));
  }
  return all;
}

TEST(InvariantF32, PagedAttentionHasThePackedBitsAtAnyChunking) {
  for (const Batch& b : batches(DType::kF32)) {
    Matrix whole(1, 1, DType::kF32);
    {
      const ThreadCount one(1);
      whole = run_forward(b).out;
    }
    for (const std::int64_t block_size : {16, 32})
      for (const std::int64_t chunk : {1, 19, 1000}) {
        const Matrix paged = run_paged(b, Pages(b, block_size), chunk);
        for (std::int64_t i = 0; i < b.rows(); ++i)
          ASSERT_TRUE(same_row(whole, i, paged, i))
              << name_of(b) << " row " << i << ", chunks of " << chunk;
      }
  }
}

TEST(PagedAttention, MatchesF64InBf16) {
  for (const Batch& b : batches(DType::kBF16))
    for (const std::int64_t chunk : {1, 40, 1000}) {
      Outputs o = run_forward(b);  // for lse, which serving does not ask for
      const Matrix paged = run_paged(b, Pages(b, 16), chunk);
      for (std::int64_t i = b.rows(); i < b.t; ++i)
        for (std::int64_t j = 0; j < paged.columns; ++j) paged.set(i, j, 0.0f);
      o.out = paged;
      expect_forward(b, o, str("paged by ", chunk, " ", name_of(b)));
    }
}

TEST(PagedAttention, ZeroesInertRows) {
  const Batch b(shape_of(2, 1, 32, DType::kF32), {5}, 0, 3);
  const Pages pages(b, 16);
  const Matrix q = random_matrix(4, 64, DType::kF32, 1), out(4, 64, DType::kF32);
  const std::int32_t q_offsets[] = {0, 2}, kv_lens[] = {5};
  PagedKeys keys{pages.k.at(0), pages.v.at(0), 16, pages.blocks_max, pages.tables.data(), kv_lens};
  const Buffer scratch(paged_attention_scratch(b.shape, 4, 1, 5, omp_get_max_threads()));
  paged_attention(b.shape, 4, q.view(), q_offsets, keys, 5, out.out(), scratch.span());
  for (std::int64_t j = 0; j < 64; ++j) {
    EXPECT_FALSE(std::isnan(out.get(1, j)));
    EXPECT_EQ(out.get(2, j), 0.0);
    EXPECT_EQ(out.get(3, j), 0.0);
  }
}

}  // namespace
}  // namespace tandem::kernels::cpu
