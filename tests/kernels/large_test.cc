// Tensors of more than 2^31 elements, where an index of 32 bits would wrap, on ops that can meet
// them. Most of a tensor is zeros; windows of its rows (the first, those around element 2^31, the
// last) hold numbers, and what an op makes of them must be what it makes of the same rows alone,
// which the other op tests hold against f64. On a GPU only; TANDEM_TEST_LARGE_ELEMENTS puts another
// number in the place of 2^31, and then a CPU will do.
#include "protocol/base/random.h"
#include "protocol/base/units.h"
#include "tests/support/test_device.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace tandem::kernels {
namespace {

std::int64_t boundary() {
  const char* set = std::getenv("TANDEM_TEST_LARGE_ELEMENTS");
  return set != nullptr ? std::strtoll(set, nullptr, 10) : std::int64_t{1} << 31;
}

class Large : public testing::Test {
 protected:
  void SetUp() override {
    if (!test::on_gpu() && std::getenv("TANDEM_TEST_LARGE_ELEMENTS") == nullptr)
      GTEST_SKIP() << "needs a GPU (TANDEM_TEST_GPU=1)";
    backend_ = test::make_test_backend(2);
    constexpr std::int64_t kReserve = std::int64_t{1} << 38;  // address space
    large_.emplace(*backend_.allocator, *backend_.ledger, MemoryKind::kActivations, "large",
                   kReserve);
    small_.emplace(*backend_.allocator, *backend_.ledger, MemoryKind::kActivations, "small",
                   kReserve);
    workspace_.emplace(*backend_.allocator, *backend_.ledger, MemoryKind::kWorkspace, "workspace",
                       kReserve);
    exec_.emplace(Exec{*workspace_});
  }
  Ops& ops() { return *backend_.ops; }
  Exec& exec() { return *exec_; }

  /// Rows of a test whose narrowest large tensor has so many columns: it passes the boundary.
  std::int64_t rows_of(std::int64_t columns) {
    columns_ = columns;
    return middle() + 2 * window_;
  }
  /// First row of the window that the boundary lies in.
  [[nodiscard]] std::int64_t middle() const {
    return std::max(window_, boundary() / columns_ / window_ * window_);
  }
  /// Whether the device has room for so many bytes and some scratch.
  [[nodiscard]] bool has_room(std::int64_t bytes) {
    const std::int64_t free = ops().profile().memory_bytes - backend_.bytes_in_use();
    if (bytes + (std::int64_t{3} << 30) <= free) return true;
    return !test::on_gpu();
  }
  /// First rows of the windows of a tensor of so many rows.
  [[nodiscard]] std::vector<std::int64_t> windows(std::int64_t rows) const {
    return {0, middle(), rows - window_};
  }

  Tensor zeros(Shape shape, DType dtype = DType::kBF16) {
    const Tensor t = large_->alloc(shape, dtype);
    ops().fill_zero(exec(), t);
    return t;
  }
  /// The windows one behind the other.
  Tensor small(const Tensor& like) {
    const std::int64_t rows = 3 * window_;
    const Tensor t = small_->alloc(
        like.shape.rank() == 1 ? Shape{rows} : Shape{rows, like.shape[1]}, like.dtype);
    ops().fill_zero(exec(), t);
    return t;
  }
  void upload(const std::vector<float>& values, const Tensor& to) {
    if (to.dtype == DType::kF32) return ops().upload(exec(), std::as_bytes(std::span(values)), to);
    std::vector<bf16> rounded(values.size());
    std::transform(values.begin(), values.end(), rounded.begin(), to_bf16);
    ops().upload(exec(), std::as_bytes(std::span(rounded)), to);
  }
  /// Random numbers in the windows of `x` and in `same`, which has only these.
  void randomize(const Tensor& x, const Tensor& same, std::uint64_t seed, float least = -1.0f) {
    Random random(seed);
    std::vector<float> table(65537);
    for (float& value : table) value = least + (1.0f - least) * random.uniform();
    const auto begins = windows(x.shape[0]);
    for (std::size_t w = 0; w < begins.size(); ++w) {
      const Tensor part = x.rows(begins[w], window_);
      std::vector<float> values(static_cast<std::size_t>(part.elements()));
      for (std::size_t e = 0; e < values.size(); ++e)
        values[e] = table[(e + 7919 * w) % table.size()];
      upload(values, part);
      upload(values, same.rows(static_cast<std::int64_t>(w) * window_, window_));
    }
  }
  Tensor indices(const std::vector<std::int32_t>& values) {
    const Tensor t = large_->alloc({std::ssize(values)}, DType::kI32);
    ops().upload(exec(), std::as_bytes(std::span(values)), t);
    return t;
  }
  std::vector<std::int32_t> in_windows(const std::vector<std::int32_t>& all) const {
    std::vector<std::int32_t> part;
    for (const std::int64_t begin : windows(std::ssize(all)))
      part.insert(part.end(), all.begin() + begin, all.begin() + begin + window_);
    return part;
  }
  std::vector<float> download(const Tensor& x) {
    std::vector<float> values(static_cast<std::size_t>(x.elements()));
    if (x.dtype == DType::kF32) {
      ops().download(exec(), x, std::as_writable_bytes(std::span(values)));
      return values;
    }
    std::vector<bf16> raw(values.size());
    ops().download(exec(), x, std::as_writable_bytes(std::span(raw)));
    std::transform(raw.begin(), raw.end(), values.begin(),
                   [](bf16 value) { return to_f32(value); });
    return values;
  }
  /// Both were computed in f32 and rounded once: they differ by at most two roundings of the
  /// dtype, and by the order of a sum (at most 2^12 terms here) of parts that may cancel.
  void expect_same(const char* what, const std::vector<float>& got, const std::vector<float>& want,
                   DType dtype) {
    ASSERT_EQ(got.size(), want.size()) << what;
    float largest = 0.0f;
    for (float value : want) largest = std::max(largest, std::abs(value));
    EXPECT_GT(largest, 0.0f) << what << ": nothing was compared";
    const float rounding = dtype == DType::kF32 ? 0x1p-22f : 0x1p-7f;
    for (std::size_t e = 0; e < got.size(); ++e)
      ASSERT_LE(std::abs(got[e] - want[e]), rounding * std::abs(want[e]) + 0x1p-12f * largest)
          << what << " differs at " << e << ": " << got[e] << " instead of " << want[e];
  }
  /// The windows of `large` against `alone`.
  void expect_windows(const char* what, const Tensor& large, const Tensor& alone) {
    const auto begins = windows(large.shape[0]);
    for (std::size_t w = 0; w < begins.size(); ++w)
      expect_same(what, download(large.rows(begins[w], window_)),
                  download(alone.rows(static_cast<std::int64_t>(w) * window_, window_)),
                  large.dtype);
  }
  PackedWeight weight(std::int64_t n, std::int64_t i) {
    return ops().pack_weight(
        exec(), *small_, DType::kBF16, n, i, [i](std::int64_t row, std::int64_t rows, float* out) {
          for (std::int64_t e = 0; e < rows * i; ++e)
            out[e] = random_uniform(9, 0, static_cast<std::uint64_t>(row * i + e)) - 0.5f;
        });
  }

  std::int64_t window_ = 512, columns_ = 1;
  Backend backend_;
  std::optional<Arena> large_, small_, workspace_;
  std::optional<Exec> exec_;
};

#define TANDEM_NEED_ROOM(bytes)                                                           \
  if (!has_room(bytes))                                                                   \
  GTEST_SKIP() << "needs " << format_bytes(bytes) << " and some scratch; the device has " \
               << format_bytes(ops().profile().memory_bytes - backend_.bytes_in_use())

constexpr std::int64_t kWidth = 4096;

TEST_F(Large, CopiesAndZeros) {
  const std::int64_t t = rows_of(kWidth);
  TANDEM_NEED_ROOM(t * kWidth * 8);
  const Tensor x = zeros({t, kWidth}, DType::kF32), y = zeros({t, kWidth});
  const Tensor sx = small(x), sy = small(y);
  randomize(x, sx, 1);
  ops().copy(exec(), x, y);
  ops().copy(exec(), sx, sy);
  expect_windows("copy", y, sy);
  ops().fill_zero(exec(), x);
  for (const std::int64_t begin : windows(t))
    for (const float value : download(x.rows(begin, window_))) ASSERT_EQ(value, 0.0f);
}

TEST_F(Large, LooksUpAndGathersRows) {
  const std::int64_t t = rows_of(kWidth);
  TANDEM_NEED_ROOM(t * kWidth * 2);
  const PackedWeight table = weight(1000, kWidth);
  Random random(3);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(t));
  for (auto& id : ids) id = static_cast<std::int32_t>(random.below(1000));
  const Tensor out = zeros({t, kWidth}), alone = small(out), gathered = small(out);
  ops().embedding_forward(exec(), {indices(ids), &table, out});
  ops().embedding_forward(exec(), {indices(in_windows(ids)), &table, alone});
  expect_windows("embedding", out, alone);
  std::vector<std::int32_t> rows(static_cast<std::size_t>(t));
  for (std::size_t r = 0; r < rows.size(); ++r) rows[r] = static_cast<std::int32_t>(r);
  ops().gather_rows(exec(), {out, indices(in_windows(rows)), gathered});
  expect_same("gather", download(gathered), download(alone), DType::kBF16);
}

TEST_F(Large, PlacesColumns) {
  const std::int64_t t = rows_of(kWidth);
  TANDEM_NEED_ROOM(t * kWidth * 3);
  const Tensor from = zeros({t, kWidth / 2}), to = zeros({t, kWidth});
  const Tensor small_from = small(from), small_to = small(to);
  randomize(to, small_to, 4);
  ops().place_columns(exec(), {from, to, kWidth / 2});
  ops().place_columns(exec(), {small_from, small_to, kWidth / 2});
  expect_windows("columns", to, small_to);
}

TEST_F(Large, Norms) {
  const std::int64_t t = rows_of(kWidth);
  TANDEM_NEED_ROOM(t * kWidth * 8);
  const Tensor residual = zeros({t, kWidth}), delta = zeros({t, kWidth}), y = zeros({t, kWidth}),
               rstd = zeros({t}, DType::kF32), w = zeros({kWidth});
  const Tensor sresidual = small(residual), sdelta = small(delta), sy = small(y),
               srstd = small(rstd);
  randomize(residual, sresidual, 1);
  randomize(delta, sdelta, 2);
  upload(std::vector<float>(kWidth, 1.25f), w);
  ops().add_rms_norm_forward(exec(), {residual, delta, w, 1e-5f, y, rstd});
  ops().add_rms_norm_forward(exec(), {sresidual, sdelta, w, 1e-5f, sy, srstd});
  expect_windows("residual", residual, sresidual);
  expect_windows("y", y, sy);
  expect_windows("rstd", rstd, srstd);
  const Tensor dresidual = zeros({t, kWidth}), sdresidual = small(dresidual);
  const Tensor dw = zeros({kWidth}, DType::kF32), sdw = zeros({kWidth}, DType::kF32);
  ops().rms_norm_backward(exec(), {y, residual, w, rstd, dresidual, dw});
  ops().rms_norm_backward(exec(), {sy, sresidual, w, srstd, sdresidual, sdw});
  expect_windows("dresidual", dresidual, sdresidual);
  expect_same("dweight", download(dw), download(sdw), DType::kF32);
}

TEST_F(Large, Products) {
  constexpr std::int64_t kOut = 131072, kIn = 128;
  const std::int64_t t = rows_of(kOut);
  TANDEM_NEED_ROOM(t * kOut * 4 + kOut * kIn * 20);
  const PackedWeight w = weight(kOut, kIn);
  const Tensor x = zeros({t, kIn}), y = zeros({t, kOut});
  const Tensor sx = small(x), sy = small(y);
  randomize(x, sx, 1);
  ops().linear_forward(exec(), {x, &w, {}, {}, nullptr, y, {}});
  ops().linear_forward(exec(), {sx, &w, {}, {}, nullptr, sy, {}});
  expect_windows("y", y, sy);
  // y is zero outside of the windows, as x is.
  const Tensor dx = zeros({t, kIn}), sdx = small(dx);
  ops().linear_backward(exec(), {y, x, &w, {}, nullptr, {}, dx});
  ops().linear_backward(exec(), {sy, sx, &w, {}, nullptr, {}, sdx});
  expect_windows("dx", dx, sdx);
  const Tensor dw = zeros({kOut, kIn}, DType::kF32), sdw = zeros({kOut, kIn}, DType::kF32);
  ops().linear_weight_grad(exec(), {y, x, dw, {}});
  ops().linear_weight_grad(exec(), {sy, sx, sdw, {}});
  expect_same("dweight", download(dw), download(sdw), DType::kF32);
}

TEST_F(Large, SiluMul) {
  constexpr std::int64_t kMlp = 14336;
  const std::int64_t t = rows_of(kMlp);
  TANDEM_NEED_ROOM(t * kMlp * 10);
  const Tensor gate_up = zeros({t, 2 * kMlp}), out = zeros({t, kMlp}), dout = zeros({t, kMlp});
  const Tensor sgate_up = small(gate_up), sout = small(out), sdout = small(dout);
  randomize(gate_up, sgate_up, 1);
  randomize(dout, sdout, 2);
  ops().silu_mul_forward(exec(), {gate_up, out});
  ops().silu_mul_forward(exec(), {sgate_up, sout});
  expect_windows("out", out, sout);
  ops().silu_mul_backward(exec(), {dout, gate_up, gate_up});
  ops().silu_mul_backward(exec(), {sdout, sgate_up, sgate_up});
  expect_windows("dgate_up", gate_up, sgate_up);
}

TEST_F(Large, CrossEntropy) {
  constexpr std::int64_t kVocab = 128256;
  window_ = 64;
  const std::int64_t t = rows_of(kVocab);
  TANDEM_NEED_ROOM(t * kVocab * 6);
  const Tensor logits = zeros({t, kVocab}, DType::kF32), dlogits = zeros({t, kVocab}),
               stats = zeros({t, 4}, DType::kF32), loss = zeros({t}, DType::kF32);
  const Tensor slogits = small(logits), sdlogits = small(dlogits), sstats = small(stats),
               sloss = small(loss);
  randomize(logits, slogits, 1, -8.0f);
  std::vector<std::int32_t> labels(static_cast<std::size_t>(t));
  Random random(2);
  for (auto& label : labels) label = static_cast<std::int32_t>(random.below(kVocab));
  const auto run = [&](const Tensor& x, const Tensor& of, const Tensor& s, const Tensor& l,
                       const Tensor& d) {
    ops().cross_entropy_stats(exec(), {x, of, 0, s});
    ops().cross_entropy(exec(), {x, of, 0, s.reshaped({1, s.shape[0], 4}), 1.0f, l, {}, d});
  };
  run(logits, indices(labels), stats, loss, dlogits);
  run(slogits, indices(in_windows(labels)), sstats, sloss, sdlogits);
  expect_windows("stats", stats, sstats);
  expect_windows("loss", loss, sloss);
  expect_windows("dlogits", dlogits, sdlogits);
}

TEST_F(Large, RopeAndAttention) {
  constexpr std::int64_t kHeads = 32, kKv = 8, kDim = 128, kQkv = (kHeads + 2 * kKv) * kDim,
                         kDocument = 128;
  const std::int64_t t = rows_of(kHeads * kDim);
  TANDEM_NEED_ROOM(t * (kQkv * 4 + kHeads * kDim * 4));
  const Tensor qkv = zeros({t, kQkv}), out = zeros({t, kHeads * kDim}), dqkv = zeros({t, kQkv}),
               lse = zeros({t, kHeads}, DType::kF32);
  const Tensor sqkv = small(qkv), sout = small(out), sdqkv = small(dqkv), slse = small(lse);
  randomize(qkv, sqkv, 1);
  std::vector<std::int32_t> positions(static_cast<std::size_t>(t));
  for (std::size_t r = 0; r < positions.size(); ++r)
    positions[r] = static_cast<std::int32_t>(r % kDocument);
  std::vector<float> frequencies(kDim / 2);
  for (std::size_t d = 0; d < frequencies.size(); ++d)
    frequencies[d] = std::pow(10000.0f, -static_cast<float>(d) / (kDim / 2));
  const Tensor inv_freq = zeros({kDim / 2}, DType::kF32);
  upload(frequencies, inv_freq);
  const auto run = [&](const Tensor& x, const Tensor& y, const Tensor& l, const Tensor& dx) {
    const std::int64_t rows = x.shape[0];
    const Tensor at = indices({positions.begin(), positions.begin() + rows});
    std::vector<std::int32_t> ends;
    for (std::int64_t row = 0; row <= rows; row += kDocument)
      ends.push_back(static_cast<std::int32_t>(row));
    const Tensor offsets = indices(ends);
    const AttentionSpec spec{kHeads, kKv, kDim, 0.088f};
    ops().rope_forward(exec(), {x, at, inv_freq, 1.0f, kHeads, kKv, kDim, nullptr, {}});
    ops().attention_forward(exec(), {spec, x, offsets, kDocument, y, l});
    ops().attention_backward(exec(), {spec, y, x, y, l, offsets, kDocument, dx});
    ops().rope_backward(exec(), {dx, at, inv_freq, 1.0f, kHeads, kKv, kDim});
  };
  run(qkv, out, lse, dqkv);
  run(sqkv, sout, slse, sdqkv);
  expect_windows("qkv", qkv, sqkv);
  expect_windows("out", out, sout);
  expect_windows("lse", lse, slse);
  expect_windows("dqkv", dqkv, sdqkv);
}

TEST_F(Large, NormsOfQAndK) {
  constexpr std::int64_t kHeads = 32, kKv = 8, kDim = 128, kQkv = (kHeads + 2 * kKv) * kDim;
  const std::int64_t t = rows_of(kQkv);
  TANDEM_NEED_ROOM(t * kQkv * 6);
  const Tensor raw = zeros({t, kQkv}), qkv = zeros({t, kQkv}), dqkv = zeros({t, kQkv});
  const Tensor sraw = small(raw), sqkv = small(qkv), sdqkv = small(dqkv);
  randomize(raw, sraw, 1);
  randomize(dqkv, sdqkv, 2);
  const Tensor weight = zeros({2 * kDim}), inv_freq = zeros({kDim / 2}, DType::kF32),
               dweight = zeros({2 * kDim}, DType::kF32);
  upload(std::vector<float>(2 * kDim, 0.75f), weight);
  upload(std::vector<float>(kDim / 2, 0.01f), inv_freq);
  const auto run = [&](const Tensor& x, const Tensor& y, const Tensor& dx) {
    const Tensor at = indices(std::vector<std::int32_t>(static_cast<std::size_t>(x.shape[0]), 7));
    ops().rope_forward(exec(),
                       {y, at, inv_freq, 1.0f, kHeads, kKv, kDim, nullptr, {}, weight, 1e-6f, x});
    ops().rope_backward(exec(),
                        {dx, at, inv_freq, 1.0f, kHeads, kKv, kDim, weight, 1e-6f, x, dweight});
  };
  run(raw, qkv, dqkv);
  run(sraw, sqkv, sdqkv);
  expect_windows("qkv", qkv, sqkv);
  expect_windows("dqkv", dqkv, sdqkv);
}

TEST_F(Large, NormAndOptimizer) {
  const std::int64_t t = rows_of(kWidth);
  TANDEM_NEED_ROOM(t * kWidth * 18);
  const auto f32 = [&] { return zeros({t, kWidth}, DType::kF32); };
  const Tensor param = f32(), grad = f32(), m = f32(), v = f32(), copy = zeros({t, kWidth});
  const Tensor sparam = small(param), sgrad = small(grad), sm = small(m), sv = small(v),
               scopy = small(copy);
  randomize(param, sparam, 1);
  randomize(grad, sgrad, 2);
  const Tensor norm = zeros({1}, DType::kF32), snorm = zeros({1}, DType::kF32);
  const auto run = [&](const Tensor& p, const Tensor& g, const Tensor& a, const Tensor& b,
                       const Tensor& c, const Tensor& n) {
    ops().squared_norm(exec(), {{g}, n});
    ops().adamw(exec(), {p, g, a, b, c, n, 1.0f, 1e-2f, 0.9f, 0.999f, 1e-8f, 0.1f, 1});
  };
  run(param, grad, m, v, copy, norm);
  run(sparam, sgrad, sm, sv, scopy, snorm);
  expect_same("norm", download(norm), download(snorm), DType::kF32);
  expect_windows("param", param, sparam);
  expect_windows("m", m, sm);
  expect_windows("v", v, sv);
  expect_windows("copy", copy, scopy);
}

}  // namespace
}  // namespace tandem::kernels
