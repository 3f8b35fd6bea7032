#include "kernels/cpu/gemm.h"

#include "kernels/cpu/cpu_features.h"
#include "tests/kernels/cpu/matrices.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <vector>

namespace tandem::kernels::cpu {
namespace {

struct Weight {
  Weight(const Matrix& w, DType format)
      : packed(packed_bytes(format, w.rows, w.columns)),
        view{packed.data(), format, w.rows, w.columns} {
    // In two blocks, as a loader that reads a file in pieces does.
    const std::int64_t half = w.rows / 2 / kPackRows * kPackRows;
    if (half > 0) pack_rows(packed.data(), format, w.rows, w.columns, 0, half, w.view());
    pack_rows(packed.data(), format, w.rows, w.columns, half, w.rows - half, w.view(half));
  }
  Buffer packed;
  PackedMatrix view;
};

struct Case {
  std::int64_t t, n, k;
};
const Case kCases[] = {{1, 32, 32},   {1, 96, 576},  {2, 33, 65},    {3, 7, 5},      {16, 64, 96},
                       {17, 96, 64},  {31, 40, 31},  {33, 100, 130}, {64, 64, 1600}, {65, 1, 1},
                       {256, 48, 64}, {300, 13, 70}, {70, 300, 1601}};

struct Setting {
  DType format, out;
};
const Setting kSettings[] = {
    {DType::kF32, DType::kF32}, {DType::kBF16, DType::kBF16}, {DType::kBF16, DType::kF32}};

std::string name_of(const Case& c, DType format) {
  return str("t=", c.t, " n=", c.n, " k=", c.k, " ", dtype_name(format), " on ", isa_name(isa()));
}

void forward(const Weight& w, std::int64_t t, ConstRows x, Rows y,
             const LinearOptions& options = {}) {
  std::int64_t rank_sum = 0, piece_rank = 0;
  for (const LowRankTerm& term : options.low_rank) rank_sum += term.rank;
  for (const LowRankPiece& piece : options.pieces) piece_rank = std::max(piece_rank, piece.rank);
  const Buffer scratch(linear_forward_scratch(w.view.format, t, w.view.n, w.view.k,
                                              static_cast<std::int64_t>(options.low_rank.size()),
                                              rank_sum, piece_rank, omp_get_max_threads()));
  linear_forward(w.view, t, x, y, options, scratch.span());
}

void input_grad(const Weight& w, std::int64_t t, ConstRows dy, Rows dx,
                const LinearOptions& options = {}) {
  std::int64_t rank_sum = 0;
  for (const LowRankTerm& term : options.low_rank) rank_sum += term.rank;
  const Buffer scratch(linear_input_grad_scratch(w.view.format, t, w.view.n, w.view.k,
                                                 static_cast<std::int64_t>(options.low_rank.size()),
                                                 rank_sum, omp_get_max_threads()));
  linear_input_grad(w.view, t, dy, dx, options, scratch.span());
}

void small(std::int64_t t, std::int64_t in, std::int64_t out, ConstRows x, ConstRows w,
           SmallLayout layout, float scale, bool accumulate, Rows y) {
  const Buffer scratch(small_product_scratch(w.dtype, t, in, out, omp_get_max_threads()));
  small_product(t, in, out, x, w, layout, scale, accumulate, y, scratch.span());
}

void check_forward(const Case& c, const Setting& setting, bool with_bias, bool accumulate) {
  const Matrix w = random_matrix(c.n, c.k, setting.format, 1);
  const Matrix x = random_matrix(c.t, c.k, setting.format, 2, 3);
  const Matrix bias = random_matrix(1, c.n, setting.format, 3);
  const Matrix old = random_matrix(c.t, c.n, setting.out, 4);
  const Matrix y(c.t, c.n, setting.out, 5);
  if (accumulate) y.copy_from(old);
  LinearOptions options;
  options.accumulate = accumulate;
  options.bias = with_bias ? bias.at(0) : nullptr;
  options.bias_dtype = setting.format;
  forward(Weight(w, setting.format), c.t, x.view(), y.out(), options);
  expect_sums(y, c.k + 2, name_of(c, setting.format), [&](std::int64_t i, std::int64_t j) {
    ExactSum exact;
    if (accumulate) exact.add(old.get(i, j));
    if (with_bias) exact.add(bias.get(0, j));
    for (std::int64_t k = 0; k < c.k; ++k) exact.add(x.get(i, k) * w.get(j, k));
    return exact;
  });
}

TEST(LinearForward, IsTheProductForOddShapes) {
  for (const Setting& setting : kSettings)
    for (const Case& c : kCases) check_forward(c, setting, false, false);
}

TEST(LinearForward, AddsBiasAndOldOutput) {
  for (const Setting& setting : kSettings)
    for (const Case& c : {Case{1, 33, 65}, Case{40, 100, 31}, Case{70, 40, 1700}})
      for (const bool with_bias : {false, true}) {
        check_forward(c, setting, with_bias, true);
        check_forward(c, setting, true, !with_bias);
      }
}

TEST(LinearForward, WritesNothingBetweenTheRowsOfItsOutput) {
  for (const Setting& setting : kSettings) {
    const Matrix w = random_matrix(40, 64, setting.format, 1);
    const Matrix x = random_matrix(50, 64, setting.format, 2);
    const Matrix y(50, 40, setting.out, 9);
    forward(Weight(w, setting.format), 50, x.view(), y.out());
    for (std::int64_t i = 0; i < 49; ++i)
      for (std::int64_t j = 40; j < 49; ++j) EXPECT_TRUE(std::isnan(y.get(i, j)));
  }
}

TEST(LinearForward, AddsLowRankTermsToTheirColumns) {
  for (const Setting& setting : kSettings)
    for (const Case& c :
         {Case{1, 96, 64}, Case{5, 100, 40}, Case{70, 192, 64}, Case{300, 64, 96}}) {
      const Matrix w = random_matrix(c.n, c.k, setting.format, 1);
      const Matrix x = random_matrix(c.t, c.k, setting.format, 2);
      const Matrix u = random_matrix(c.t, 48, setting.format, 3);
      const std::int64_t cut = c.n / 2 - 3;
      const Matrix v0 = random_matrix(cut, 16, setting.format, 4, 2);
      const Matrix v1 = random_matrix(c.n - cut, 7, setting.format, 5);
      const Matrix y(c.t, c.n, setting.out);
      const LowRankTerm terms[] = {{0, cut, 16, u.view(), v0.view()},
                                   {cut, c.n - cut, 7, u.view(0, 16), v1.view()}};
      LinearOptions options;
      options.low_rank = terms;
      forward(Weight(w, setting.format), c.t, x.view(), y.out(), options);
      expect_sums(y, c.k + 16, name_of(c, setting.format), [&](std::int64_t i, std::int64_t j) {
        ExactSum exact;
        for (std::int64_t k = 0; k < c.k; ++k) exact.add(x.get(i, k) * w.get(j, k));
        for (std::int64_t r = 0; j < cut && r < 16; ++r) exact.add(u.get(i, r) * v0.get(j, r));
        for (std::int64_t r = 0; j >= cut && r < 7; ++r)
          exact.add(u.get(i, 16 + r) * v1.get(j - cut, r));
        return exact;
      });
    }
}

TEST(LinearForward, AddsPiecesToTheirRowsAndColumns) {
  for (const Setting& setting : kSettings)
    for (const Case& c : {Case{3, 96, 64}, Case{17, 16, 40}, Case{40, 100, 40}, Case{70, 192, 1700},
                          Case{300, 64, 96}}) {
      const Matrix w = random_matrix(c.n, c.k, setting.format, 1);
      const Matrix x = random_matrix(c.t, c.k, setting.format, 2);
      const Matrix u = random_matrix(c.t, 48, setting.format, 3);
      const std::int64_t cut = c.n / 2 - 3, first = c.t / 3, last = c.t - 1;
      const Matrix v0 = random_matrix(cut, 16, setting.format, 4, 2);
      const Matrix v1 = random_matrix(c.n - cut, 7, setting.format, 5);
      const Matrix v2 = random_matrix(cut, 40, setting.format, 6);
      const Matrix y(c.t, c.n, setting.out);
      const LowRankPiece pieces[] = {{0, first, 0, cut, 16, u.view(), v0.view()},
                                     {first, last, 0, cut, 40, u.view(), v2.view()},
                                     {first, last, cut, c.n - cut, 7, u.view(0, 16), v1.view()}};
      LinearOptions options;
      options.pieces = pieces;
      forward(Weight(w, setting.format), c.t, x.view(), y.out(), options);
      expect_sums(y, c.k + 40, name_of(c, setting.format), [&](std::int64_t i, std::int64_t j) {
        ExactSum exact;
        for (std::int64_t k = 0; k < c.k; ++k) exact.add(x.get(i, k) * w.get(j, k));
        for (std::int64_t r = 0; i < first && j < cut && r < 16; ++r)
          exact.add(u.get(i, r) * v0.get(j, r));
        const bool middle = i >= first && i < last;
        for (std::int64_t r = 0; middle && j < cut && r < 40; ++r)
          exact.add(u.get(i, r) * v2.get(j, r));
        for (std::int64_t r = 0; middle && j >= cut && r < 7; ++r)
          exact.add(u.get(i, 16 + r) * v1.get(j - cut, r));
        return exact;
      });
    }
}

TEST(LinearForward, APieceReachesNoOtherRowEvenWhenItIsNotANumber) {
  for (const Setting& setting : kSettings)
    for (const std::int64_t t : {7, 30, 80}) {
      const Weight w(random_matrix(96, 64, setting.format, 1), setting.format);
      const Matrix x = random_matrix(t, 64, setting.format, 2);
      const Matrix u = random_matrix(t, 16, setting.format, 3);
      const Matrix v = random_matrix(96, 16, setting.format, 4);
      const Matrix bad(96, 16, setting.format);  // NaN until it is written
      const Matrix alone(t, 96, setting.out), beside(t, 96, setting.out);
      const LowRankPiece pieces[] = {{0, 3, 0, 96, 16, u.view(), v.view()},
                                     {3, 6, 0, 96, 16, u.view(), bad.view()}};
      LinearOptions options;
      options.pieces = std::span(pieces).first(1);
      forward(w, t, x.view(), alone.out(), options);
      options.pieces = pieces;
      forward(w, t, x.view(), beside.out(), options);
      for (std::int64_t i = 0; i < t; ++i)
        EXPECT_EQ(same_row(alone, i, beside, i), i < 3 || i >= 6) << "row " << i << " of " << t;
    }
}

TEST(LinearInputGrad, IsTheTransposedProductWithLowRankTerms) {
  for (const Setting& setting : kSettings)
    for (const Case& c : kCases)
      for (const bool extra : {false, true}) {
        const Matrix w = random_matrix(c.n, c.k, setting.format, 1);
        const Matrix dy = random_matrix(c.t, c.n, setting.format, 2, 1);
        const Matrix du = random_matrix(c.t, 16, setting.format, 3);
        const Matrix a = random_matrix(16, c.k, setting.format, 4);
        const Matrix dx(c.t, c.k, setting.out, 2);
        const LowRankTerm terms[] = {{0, c.k, 16, du.view(), a.view()}};
        LinearOptions options;
        if (extra) options.low_rank = terms;
        input_grad(Weight(w, setting.format), c.t, dy.view(), dx.out(), options);
        expect_sums(dx, c.n + 16, name_of(c, setting.format), [&](std::int64_t i, std::int64_t k) {
          ExactSum exact;
          for (std::int64_t n = 0; n < c.n; ++n) exact.add(dy.get(i, n) * w.get(n, k));
          for (std::int64_t r = 0; extra && r < 16; ++r) exact.add(du.get(i, r) * a.get(r, k));
          return exact;
        });
      }
}

TEST(SmallProduct, IsTheScaledProductInBothLayouts) {
  for (const Setting& setting : kSettings)
    for (const Case& c : {Case{1, 16, 576}, Case{9, 8, 100}, Case{70, 48, 64}, Case{300, 130, 16},
                          Case{33, 96, 5}, Case{257, 16, 1700}})
      for (const bool out_by_in : {false, true})
        for (const bool accumulate : {false, true}) {
          const Matrix w = out_by_in ? random_matrix(c.n, c.k, setting.format, 1, 2)
                                     : random_matrix(c.k, c.n, setting.format, 1, 2);
          const Matrix x = random_matrix(c.t, c.k, setting.format, 2, 4);
          const Matrix old = random_matrix(c.t, c.n, setting.out, 3);
          const Matrix y(c.t, c.n, setting.out);
          if (accumulate) y.copy_from(old);
          small(c.t, c.k, c.n, x.view(), w.view(),
                out_by_in ? SmallLayout::kOutByIn : SmallLayout::kInByOut, 1.75f, accumulate,
                y.out());
          expect_sums(y, c.k + 3, name_of(c, setting.format), [&](std::int64_t i, std::int64_t j) {
            ExactSum exact;
            if (accumulate) exact.add(old.get(i, j));
            for (std::int64_t k = 0; k < c.k; ++k)
              exact.add(1.75 * x.get(i, k) * (out_by_in ? w.get(j, k) : w.get(k, j)));
            return exact;
          });
        }
}

TEST(OuterAccumulate, AddsTheScaledProductOverRows) {
  for (const DType dtype : {DType::kF32, DType::kBF16})
    for (const Case& c : {Case{1, 16, 64}, Case{5, 96, 8}, Case{100, 16, 576}, Case{513, 70, 33},
                          Case{700, 8, 100}, Case{64, 100, 256}}) {
      const Matrix a = random_matrix(c.t, c.n, dtype, 1, 3);
      const Matrix b = random_matrix(c.t, c.k, dtype, 2, 1);
      const Matrix old = random_matrix(c.n, c.k, DType::kF32, 3);
      const Matrix sum(c.n, c.k, DType::kF32, 2);
      sum.copy_from(old);
      const Buffer scratch(outer_accumulate_scratch(dtype, c.t, c.n, c.k, omp_get_max_threads()));
      outer_accumulate(c.t, c.n, c.k, a.view(), b.view(), 0.75f, static_cast<float*>(sum.at(0)),
                       sum.ld, scratch.span());
      expect_sums(sum, c.t + 3, name_of(c, dtype), [&](std::int64_t i, std::int64_t j) {
        ExactSum exact;
        exact.add(old.get(i, j));
        for (std::int64_t t = 0; t < c.t; ++t) exact.add(0.75 * a.get(t, i) * b.get(t, j));
        return exact;
      });
    }
}

TEST(PackedWeights, GiveBackTheirRowsExactly) {
  for (const DType format : {DType::kF32, DType::kBF16}) {
    const Matrix w = random_matrix(70, 45, format, 1);
    const Weight packed(w, format);
    const std::int32_t ids[] = {0, 69, 31, 32, 5, 5, 64, 1, 2, 3};
    const Matrix out(10, 45, format, 3);
    read_rows(packed.view, ids, out.out());
    for (std::int64_t i = 0; i < 10; ++i)
      for (std::int64_t j = 0; j < 45; ++j) EXPECT_EQ(out.get(i, j), w.get(ids[i], j));
  }
}

TEST(PackedWeights, RoundToNearestFromF32AndWidenFromBf16) {
  const Matrix wide = random_matrix(70, 45, DType::kF32, 1, 3);
  const Matrix narrow = random_matrix(70, 45, DType::kBF16, 2, 1);
  const std::int32_t ids[] = {0, 17, 40, 69};
  const Matrix rounded(4, 45, DType::kBF16), widened(4, 45, DType::kF32);
  read_rows(Weight(wide, DType::kBF16).view, ids, rounded.out());
  read_rows(Weight(narrow, DType::kF32).view, ids, widened.out());
  for (std::int64_t i = 0; i < 4; ++i)
    for (std::int64_t j = 0; j < 45; ++j) {
      EXPECT_EQ(rounded.get(i, j), to_f32(to_bf16(static_cast<float>(wide.get(ids[i], j)))));
      EXPECT_EQ(widened.get(i, j), narrow.get(ids[i], j));
    }
}

// -- Invariant ------------------------------------------------------------------------------------

using RowProduct = std::function<void(std::int64_t t, ConstRows x, Rows y)>;

// All rows at once on one thread against every way of cutting them, bit for bit.
void expect_row_invariance(const Matrix& x, std::int64_t columns, const RowProduct& product) {
  const Matrix whole(x.rows, columns, DType::kF32);
  {
    const ThreadCount one(1);
    product(x.rows, x.view(), whole.out());
  }
  for (const int threads : {1, 2})
    for (const int chunk : {1, 2, 5, 16, 33, 200}) {
      const ThreadCount scope(threads);
      const Matrix parts(x.rows, columns, DType::kF32);
      for (std::int64_t row = 0; row < x.rows; row += chunk)
        product(std::min<std::int64_t>(chunk, x.rows - row), x.view(row), parts.out(row));
      for (std::int64_t i = 0; i < x.rows; ++i)
        ASSERT_TRUE(same_row(whole, i, parts, i))
            << "row " << i << ", chunks of " << chunk << ", " << threads << " threads";
    }
}

TEST(InvariantF32, ForwardRowsHaveTheSameBitsAloneAndInAnyBatch) {
  for (const Case& c : {Case{211, 100, 70}, Case{230, 160, 600}, Case{40, 33, 1700}}) {
    const Weight w(random_matrix(c.n, c.k, DType::kF32, 1), DType::kF32);
    const Matrix bias = random_matrix(1, c.n, DType::kF32, 3);
    LinearOptions options;
    options.bias = bias.at(0);
    expect_row_invariance(
        random_matrix(c.t, c.k, DType::kF32, 2), c.n,
        [&](std::int64_t t, ConstRows x, Rows y) { forward(w, t, x, y, options); });
  }
}

TEST(InvariantF32, InputGradientRowsHaveTheSameBitsAloneAndInAnyBatch) {
  const Weight w(random_matrix(300, 100, DType::kF32, 1), DType::kF32);
  expect_row_invariance(random_matrix(211, 300, DType::kF32, 2), 100,
                        [&](std::int64_t t, ConstRows x, Rows y) { input_grad(w, t, x, y); });
}

TEST(InvariantF32, SmallProductRowsHaveTheSameBitsAloneAndInAnyBatch) {
  const Matrix w = random_matrix(16, 300, DType::kF32, 1);
  expect_row_invariance(random_matrix(211, 300, DType::kF32, 2), 16,
                        [&](std::int64_t t, ConstRows x, Rows y) {
                          small(t, 300, 16, x, w.view(), SmallLayout::kOutByIn, 1.3f, false, y);
                        });
}

TEST(StackedProduct, HasTheSumsOfEachPartAndZerosBetween) {
  for (const Setting& setting : kSettings)
    for (const auto& [t, in] : {std::pair{1, 70}, {5, 576}, {39, 100}, {300, 64}}) {
      const Matrix x = random_matrix(t, in, setting.format, 2, 4);
      const Matrix a = random_matrix(16, in, setting.format, 5, 2);
      const Matrix b = random_matrix(7, in, setting.format, 6);
      const SmallPart parts[] = {{a.view(), 3, 16},
                                 {b.view(), 29, 7}};  // the second crosses panels
      constexpr std::int64_t kColumns = 40;
      const Matrix y(t, kColumns, setting.out);
      const Buffer scratch(
          small_product_scratch(setting.format, t, in, kColumns, omp_get_max_threads()));
      stacked_product(t, in, kColumns, x.view(), parts, 0.5f, y.out(), scratch.span());
      const Case c{t, kColumns, in};
      expect_sums(y, in + 1, name_of(c, setting.format), [&](std::int64_t i, std::int64_t j) {
        ExactSum exact;
        for (const auto& [w, column, out] : {std::tuple{&a, 3, 16}, {&b, 29, 7}})
          if (j >= column && j < column + out)
            for (std::int64_t k = 0; k < in; ++k)
              exact.add(0.5 * x.get(i, k) * w->get(j - column, k));
        return exact;
      });
    }
}

TEST(InvariantF32, AStackedProductHasTheBitsOfItsPartsAlone) {
  const Matrix x = random_matrix(50, 300, DType::kF32, 1);
  const Matrix a = random_matrix(16, 300, DType::kF32, 2),
               b = random_matrix(8, 300, DType::kF32, 3);
  const SmallPart parts[] = {{a.view(), 0, 16}, {b.view(), 20, 8}};
  const Matrix stacked(50, 28, DType::kF32), alone(50, 28, DType::kF32);
  const Buffer scratch(small_product_scratch(DType::kF32, 50, 300, 28, omp_get_max_threads()));
  stacked_product(50, 300, 28, x.view(), parts, 1.3f, stacked.out(), scratch.span());
  for (const SmallPart& part : parts)
    small(50, 300, part.out, x.view(), part.w, SmallLayout::kOutByIn, 1.3f, false,
          alone.out(0, part.column));
  for (std::int64_t i = 0; i < 50; ++i)
    for (std::int64_t j = 0; j < 28; ++j)
      EXPECT_EQ(stacked.get(i, j), j < 16 || j >= 20 ? alone.get(i, j) : 0.0f) << i << ", " << j;
}

TEST(InvariantF32, ALowRankTermHasTheBitsOfTheSeparateSmallProduct) {
  const Weight w(random_matrix(128, 96, DType::kF32, 1), DType::kF32);
  const Matrix x = random_matrix(50, 96, DType::kF32, 2);
  const Matrix u = random_matrix(50, 16, DType::kF32, 3), b = random_matrix(64, 16, DType::kF32, 4);
  const LowRankTerm terms[] = {{64, 64, 16, u.view(), b.view()}};
  LinearOptions options;
  options.low_rank = terms;
  const Matrix fused(50, 128, DType::kF32), apart(50, 128, DType::kF32);
  forward(w, 50, x.view(), fused.out(), options);
  forward(w, 50, x.view(), apart.out());
  for (std::int64_t row = 0; row < 50; row += 7)
    small(std::min<std::int64_t>(7, 50 - row), 16, 64, u.view(row), b.view(), SmallLayout::kOutByIn,
          1.0f, true, apart.out(row, 64));
  for (std::int64_t i = 0; i < 50; ++i) EXPECT_TRUE(same_row(fused, i, apart, i)) << "row " << i;
}

TEST(Products, RepeatTheirBitsForAnyThreadCount) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const Matrix a = random_matrix(600, 16, dtype, 1), b = random_matrix(600, 200, dtype, 2);
    const Weight w(random_matrix(200, 72, dtype, 3), dtype);
    std::vector<Matrix> gradients, dxs;
    for (const int threads : {1, 2, 3}) {
      const ThreadCount scope(threads);
      gradients.push_back(random_matrix(16, 200, DType::kF32, 4));
      const Buffer scratch(outer_accumulate_scratch(dtype, 600, 16, 200, threads));
      outer_accumulate(600, 16, 200, a.view(), b.view(), 2.0f,
                       static_cast<float*>(gradients.back().at(0)), 200, scratch.span());
      dxs.emplace_back(600, 72, dtype);
      input_grad(w, 600, b.view(), dxs.back().out());
    }
    for (std::size_t i = 1; i < gradients.size(); ++i) {
      for (int r = 0; r < 16; ++r) EXPECT_TRUE(same_row(gradients[0], r, gradients[i], r));
      for (int r = 0; r < 600; ++r) EXPECT_TRUE(same_row(dxs[0], r, dxs[i], r));
    }
  }
}

}  // namespace
}  // namespace tandem::kernels::cpu
