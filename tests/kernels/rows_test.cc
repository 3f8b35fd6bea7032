// Copies, gathers, embedding, norms, rope and the gated activation against their f64 references.
#include "tests/kernels/op_param.h"
#include "tests/kernels/reference.h"

#include <cmath>

namespace tandem::kernels::testing {
namespace {

struct RowsShape {
  std::int64_t t, c;
};
// One, odd, not a multiple of any vector width, wide enough for a vector body, a real model's.
constexpr RowsShape kRows[] = {{0, 8}, {1, 1}, {1, 17}, {3, 31}, {2, 64}, {5, 100}, {4, 576}};

constexpr float kEps = 1e-5f;

class AddRmsNorm : public OpTest {};
TANDEM_OP_TEST(AddRmsNorm, kRows);

TEST_P(AddRmsNorm, MatchesTheReference) {
  const auto [t, c] = row(kRows);
  for (const bool with_delta : {true, false}) {
    const Values residual = random_values(t * c, dtype(), 1, 2.0);
    const Values delta = random_values(t * c, dtype(), 2);
    const Values weight = random_values(c, dtype(), 3);
    const Outputs got = run_op(backend(), [&](TestDevice& device) {
      const Tensor d = device.input(delta, dtype(), {t, c});
      device.ops().add_rms_norm_forward(
          device.exec(),
          {device.in_out("residual", residual, dtype(), {t, c}), with_delta ? d : Tensor{},
           device.input(weight, dtype(), {c}), kEps, device.output("y", dtype(), {t, c}),
           device.output("rstd", DType::kF32, {t})});
    });
    const RmsNormResult first =
        rms_norm(residual, with_delta ? delta : Values{}, weight, t, c, kEps);
    // The norm reads the residual as it was rounded.
    const Values sum = rounded(first.residual, dtype());
    const RmsNormResult want = rms_norm(sum, {}, weight, t, c, kEps);
    expect_close("residual", got.at("residual").values(), sum, 0.0);
    expect_close("y", got.at("y").values(), want.y, tolerance(dtype(), c));
    expect_close("rstd", got.at("rstd").values(), want.rstd, tolerance(DType::kF32, c));
  }
}

TEST_P(AddRmsNorm, BackwardMatchesTheReference) {
  const auto [t, c] = row(kRows);
  const Values residual = random_values(t * c, dtype(), 1, 2.0),
               dy = random_values(t * c, dtype(), 2);
  const Values weight = random_values(c, dtype(), 3), old = random_values(t * c, dtype(), 4);
  const Values rstd = rounded(rms_norm(residual, {}, weight, t, c, kEps).rstd, DType::kF32);
  const Outputs got = run_op(backend(), [&](TestDevice& device) {
    device.ops().rms_norm_backward(
        device.exec(), {device.input(dy, dtype(), {t, c}), device.input(residual, dtype(), {t, c}),
                        device.input(weight, dtype(), {c}), device.input(rstd, DType::kF32, {t}),
                        device.in_out("dresidual", old, dtype(), {t, c})});
  });
  Values want = rms_norm_backward(dy, residual, weight, t, c, kEps);
  // The two parts of the gradient nearly cancel in narrow rows: errors are relative to the parts.
  Values parts(want.size());
  for (std::size_t j = 0; j < want.size(); ++j) {
    const auto column = j % static_cast<std::size_t>(c), r = j / static_cast<std::size_t>(c);
    parts[j] = rstd[r] * dy[j] * weight[column];
    want[j] += old[j];
  }
  const double condition =
      t == 0 ? 1.0 : std::max(1.0, std::sqrt(dot(parts, parts) / dot(want, want)));
  // bf16 is rounded once, at the end; the parts are f32.
  expect_close("dresidual", got.at("dresidual").values(), want,
               tolerance(dtype(), 1) + condition * tolerance(DType::kF32, c));
}

TEST_P(AddRmsNorm, RowsDoNotDependOnTheirNeighbours) {
  const auto [t, c] = row(kRows);
  const Values residual = random_values(t * c, dtype(), 1), weight = random_values(c, dtype(), 3);
  const auto norm = [&](std::int64_t begin, std::int64_t rows) {
    const Values part(residual.begin() + begin * c, residual.begin() + (begin + rows) * c);
    return run_op(backend(), [&](TestDevice& device) {
      device.ops().add_rms_norm_forward(device.exec(),
                                        {device.in_out("residual", part, dtype(), {rows, c}),
                                         {},
                                         device.input(weight, dtype(), {c}),
                                         kEps,
                                         device.output("y", dtype(), {rows, c}),
                                         {}});
    });
  };
  const Outputs all = norm(0, t);
  for (std::int64_t r = 0; r < t; ++r)
    EXPECT_EQ(norm(r, 1).at("y").bytes, all.at("y").rows(r, 1)) << "row " << r;
}

class SiluMul : public OpTest {};
TANDEM_OP_TEST(SiluMul, kRows);

TEST_P(SiluMul, MatchesTheReference) {
  const auto [t, f] = row(kRows);
  Values gate_up = random_values(t * 2 * f, dtype(), 1, 4.0);
  // Where a naive sigmoid overflows or vanishes.
  if (!gate_up.empty()) gate_up.front() = -100.0, gate_up[static_cast<std::size_t>(f - 1)] = 100.0;
  const Outputs got = run_op(backend(), [&](TestDevice& device) {
    device.ops().silu_mul_forward(device.exec(), {device.input(gate_up, dtype(), {t, 2 * f}),
                                                  device.output("out", dtype(), {t, f})});
  });
  expect_close("out", got.at("out").values(), silu_mul(gate_up, t, f), tolerance(dtype(), 8));
}

TEST_P(SiluMul, BackwardMatchesTheReferenceInPlaceToo) {
  const auto [t, f] = row(kRows);
  const Values gate_up = random_values(t * 2 * f, dtype(), 1, 4.0);
  const Values dout = random_values(t * f, dtype(), 2);
  const Values want = silu_mul_backward(dout, gate_up, t, f);
  const Outputs apart = run_op(backend(), [&](TestDevice& device) {
    device.ops().silu_mul_backward(device.exec(), {device.input(dout, dtype(), {t, f}),
                                                   device.input(gate_up, dtype(), {t, 2 * f}),
                                                   device.output("dgate_up", dtype(), {t, 2 * f})});
  });
  const Outputs in_place = run_op(backend(), [&](TestDevice& device) {
    const Tensor both = device.in_out("dgate_up", gate_up, dtype(), {t, 2 * f});
    device.ops().silu_mul_backward(device.exec(),
                                   {device.input(dout, dtype(), {t, f}), both, both});
  });
  expect_close("dgate_up", apart.at("dgate_up").values(), want, tolerance(dtype(), 16));
  EXPECT_EQ(apart.at("dgate_up").bytes, in_place.at("dgate_up").bytes);
}

class GatherRows : public OpTest {};
TANDEM_OP_TEST(GatherRows, kRows);

TEST_P(GatherRows, CopiesRowsByIndex) {
  const auto [t, c] = row(kRows);
  const Values x = random_values(t * c, dtype(), 1);
  std::vector<std::int32_t> index;
  for (std::int64_t j = 0; j < 2 * t; ++j) index.push_back(static_cast<std::int32_t>(j * 7 % t));
  const auto s = static_cast<std::int64_t>(index.size());
  const Outputs got = run_op(backend(), [&](TestDevice& device) {
    device.ops().gather_rows(device.exec(), {device.input(x, dtype(), {t, c}), device.ints(index),
                                             device.output("out", dtype(), {s, c})});
  });
  Values want;
  for (std::int32_t r : index) want.insert(want.end(), x.begin() + r * c, x.begin() + (r + 1) * c);
  EXPECT_EQ(got.at("out").values(), want);
}

class PlaceColumns : public OpTest {};
TANDEM_OP_TEST(PlaceColumns, kRows);

TEST_P(PlaceColumns, OverwritesItsColumnsAndLeavesTheOthers) {
  const auto [t, c] = row(kRows);
  const std::int64_t first = 3, width = c + 5;
  const Values from = random_values(t * c, dtype(), 1),
               before = random_values(t * width, dtype(), 2);
  const Outputs got = run_op(backend(), [&](TestDevice& device) {
    device.ops().place_columns(device.exec(),
                               {device.input(from, dtype(), {t, c}),
                                device.in_out("to", before, dtype(), {t, width}), first});
  });
  Values want = before;
  for (std::int64_t r = 0; r < t; ++r)
    std::copy_n(from.begin() + r * c, c, want.begin() + r * width + first);
  EXPECT_EQ(got.at("to").values(), want);
}

class Embedding : public OpTest {};
TANDEM_OP_TEST(Embedding, kRows);

TEST_P(Embedding, LooksRowsOfThePackedTableUpExactly) {
  const auto [t, c] = row(kRows);
  const std::int64_t v = 45;
  const Values table = random_values(v * c, dtype(), 1);
  std::vector<std::int32_t> ids;
  for (std::int64_t j = 0; j < t; ++j) ids.push_back(static_cast<std::int32_t>((j * 13 + 44) % v));
  const Outputs got = run_op(backend(), [&](TestDevice& device) {
    const PackedWeight packed = device.weight(table, dtype(), v, c);
    device.ops().embedding_forward(
        device.exec(), {device.ints(ids), &packed, device.output("out", dtype(), {t, c})});
  });
  Values want;
  for (std::int32_t id : ids)
    want.insert(want.end(), table.begin() + id * c, table.begin() + (id + 1) * c);
  EXPECT_EQ(got.at("out").values(), want);
}

class Copy : public OpTest {};
TANDEM_OP_TEST(Copy, kRows);

TEST_P(Copy, RoundsToTheNearestOnce) {
  const auto [t, c] = row(kRows);
  for (const DType to : {DType::kF32, DType::kBF16, DType::kF16}) {
    const Values x = random_values(t * c, dtype(), 1);
    const Outputs got = run_op(backend(), [&](TestDevice& device) {
      device.ops().copy(device.exec(), device.input(x, dtype(), {t, c}),
                        device.output("to", to, {t, c}));
    });
    EXPECT_EQ(got.at("to").values(), rounded(x, to)) << dtype_name(to);
  }
}

TEST_P(Copy, FillZeroWritesZeros) {
  const auto [t, c] = row(kRows);
  const Outputs got = run_op(backend(), [&](TestDevice& device) {
    device.ops().fill_zero(device.exec(), device.output("x", dtype(), {t, c}));
  });
  EXPECT_EQ(got.at("x").values(), Values(static_cast<std::size_t>(t * c), 0.0));
}

struct RopeShape {
  std::int64_t t, heads, kv_heads, head_dim;
  std::int32_t first_position;
  float factor;
};
constexpr RopeShape kRope[] = {{0, 1, 1, 8, 0, 1.0f},     {1, 1, 1, 2, 0, 1.0f},
                               {3, 4, 2, 6, 5, 1.0f},     {7, 3, 1, 34, 1000, 1.25f},
                               {5, 9, 3, 64, 8190, 1.0f}, {2, 2, 2, 128, 131000, 1.0f}};

class Rope : public OpTest {
 protected:
  struct Inputs {
    Values qkv, inv_freq;
    std::vector<std::int32_t> positions;
    std::int64_t width = 0;
  };
  static Inputs inputs(const RopeShape& s, DType dtype) {
    Inputs in;
    in.width = (s.heads + 2 * s.kv_heads) * s.head_dim;
    in.qkv = random_values(s.t * in.width, dtype, 1);
    for (std::int64_t j = 0; j < s.head_dim / 2; ++j)
      in.inv_freq.push_back(static_cast<float>(
          std::pow(10000.0, -2.0 * static_cast<double>(j) / static_cast<double>(s.head_dim))));
    for (std::int64_t r = 0; r < s.t; ++r)
      in.positions.push_back(s.first_position + static_cast<std::int32_t>(r));
    return in;
  }
};
TANDEM_OP_TEST(Rope, kRope);

TEST_P(Rope, MatchesTheReferenceAndWritesTheCache) {
  const RopeShape& s = row(kRope);
  const Inputs in = inputs(s, dtype());
  const std::int64_t blocks = 3, block_size = 16, half = s.head_dim / 2;
  // Row 1 is inert; the others land in scattered slots.
  std::vector<std::int32_t> slots;
  for (std::int64_t r = 0; r < s.t; ++r)
    slots.push_back(r == 1 ? -1 : static_cast<std::int32_t>((r * 19 + 5) % (blocks * block_size)));
  const Shape cache_shape{blocks, s.kv_heads, block_size, s.head_dim};
  const Values empty(static_cast<std::size_t>(cache_shape.elements()), 0.0);
  const Outputs got = run_op(backend(), [&](TestDevice& device) {
    const KvCache cache{device.in_out("k", empty, dtype(), cache_shape),
                        device.in_out("v", empty, dtype(), cache_shape), block_size};
    device.ops().rope_forward(
        device.exec(), {device.in_out("qkv", in.qkv, dtype(), {s.t, in.width}),
                        device.ints(in.positions), device.input(in.inv_freq, DType::kF32, {half}),
                        s.factor, s.heads, s.kv_heads, s.head_dim, &cache, device.ints(slots)});
  });
  const Values want = rope(in.qkv, in.positions, in.inv_freq, s.factor, s.heads + s.kv_heads,
                           s.head_dim, in.width, 1.0);
  // f32 cos and sin within 2 ulp, two products and a sum.
  expect_close("qkv", got.at("qkv").values(), want, tolerance(dtype(), 8));
  const Values qkv = got.at("qkv").values();
  Values k = empty, v = empty;
  for (std::int64_t r = 0; r < s.t; ++r) {
    if (slots[static_cast<std::size_t>(r)] < 0) continue;
    const std::int64_t block = slots[static_cast<std::size_t>(r)] / block_size;
    const std::int64_t offset = slots[static_cast<std::size_t>(r)] % block_size;
    for (std::int64_t h = 0; h < s.kv_heads; ++h)
      for (std::int64_t d = 0; d < s.head_dim; ++d) {
        const auto to = static_cast<std::size_t>(
            ((block * s.kv_heads + h) * block_size + offset) * s.head_dim + d);
        const std::int64_t from = r * in.width + (s.heads + h) * s.head_dim + d;
        k[to] = qkv[static_cast<std::size_t>(from)];
        v[to] = qkv[static_cast<std::size_t>(from + s.kv_heads * s.head_dim)];
      }
  }
  EXPECT_EQ(got.at("k").values(), k);
  EXPECT_EQ(got.at("v").values(), v);
}

TEST_P(Rope, BackwardTurnsBack) {
  const RopeShape& s = row(kRope);
  const Inputs in = inputs(s, dtype());
  const Outputs got = run_op(backend(), [&](TestDevice& device) {
    device.ops().rope_backward(
        device.exec(),
        {device.in_out("dqkv", in.qkv, dtype(), {s.t, in.width}), device.ints(in.positions),
         device.input(in.inv_freq, DType::kF32, {s.head_dim / 2}), s.factor, s.heads, s.kv_heads,
         s.head_dim});
  });
  const Values want = rope(in.qkv, in.positions, in.inv_freq, s.factor, s.heads + s.kv_heads,
                           s.head_dim, in.width, -1.0);
  expect_close("dqkv", got.at("dqkv").values(), want, tolerance(dtype(), 8));
}

// Heads of one pair, of no vector's width, of 64, 128 and 256, the largest; more rows than one sum
// of the weights' gradient takes.
constexpr RopeShape kQkNorm[] = {
    {0, 1, 1, 8, 0, 1.0f},      {1, 1, 1, 2, 0, 1.0f},        {3, 4, 2, 6, 5, 1.0f},
    {7, 3, 1, 34, 1000, 1.25f}, {4, 2, 2, 80, 17, 1.0f},      {150, 9, 3, 64, 8000, 1.0f},
    {9, 16, 8, 128, 300, 1.0f}, {5, 2, 1, 256, 131000, 1.5f}, {2, 1, 1, 1024, 3, 1.0f}};

class RopeWithQkNorm : public Rope {
 protected:
  static QkvShape shape_of(const RopeShape& s) { return {s.t, s.heads, s.kv_heads, s.head_dim}; }
  /// Around 1, but for a head of zeros and one of minus signs where there is room for them.
  static Values weight_of(const RopeShape& s, DType dtype) {
    Values weight = random_values(2 * s.head_dim, dtype, 5);
    for (double& w : weight) w += w < 0.0 ? -0.5 : 0.5;
    if (s.head_dim > 2) weight.front() = weight.back() = 0.0;
    return rounded(weight, dtype);
  }
  /// The inputs with a row of zeros, as inert rows may have.
  static Inputs inputs_of(const RopeShape& s, DType dtype) {
    Inputs in = inputs(s, dtype);
    if (s.t > 2) std::fill_n(in.qkv.begin() + in.width, in.width, 0.0);
    return in;
  }
  static Values normed_and_turned(const RopeShape& s, const Inputs& in, const Values& weight,
                                  DType dtype) {
    return rope(rounded(qk_norm(shape_of(s), in.qkv, weight, kEps), dtype), in.positions,
                in.inv_freq, s.factor, s.heads + s.kv_heads, s.head_dim, in.width, 1.0);
  }
  RopeArgs args_of(TestDevice& device, const RopeShape& s, const Inputs& in) const {
    RopeArgs args{{},
                  device.ints(in.positions),
                  device.input(in.inv_freq, DType::kF32, {s.head_dim / 2}),
                  s.factor,
                  s.heads,
                  s.kv_heads,
                  s.head_dim,
                  nullptr,
                  {}};
    args.qk_norm = device.input(weight_of(s, dtype()), dtype(), {2 * s.head_dim});
    args.norm_eps = kEps;
    return args;
  }
  Outputs in_place(const RopeShape& s, const Inputs& in) const {
    return run_op(backend(), [&](TestDevice& device) {
      RopeArgs args = args_of(device, s, in);
      args.qkv = device.in_out("qkv", in.qkv, dtype(), {s.t, in.width});
      device.ops().rope_forward(device.exec(), args);
    });
  }
  /// How much larger the parts of a head's gradient are than what is left of them.
  static double condition_of(const QkvShape& s, const Values& dqkv, const Values& raw,
                             const Values& weight, const Values& want) {
    Values parts = dqkv;
    for (std::size_t j = 0; j < parts.size(); ++j) {
      const auto column = static_cast<std::int64_t>(j) % s.width(), h = column / s.head_dim;
      if (h >= s.heads + s.kv_heads) continue;
      const auto head = static_cast<std::ptrdiff_t>(j) - column % s.head_dim;
      const Values x(raw.begin() + head, raw.begin() + head + s.head_dim);
      parts[j] *=
          weight[static_cast<std::size_t>(column % s.head_dim + (h < s.heads ? 0 : s.head_dim))] *
          rms_norm(x, {}, Values(x.size(), 1.0), 1, s.head_dim, kEps).rstd[0];
    }
    return s.t == 0 ? 1.0 : std::max(1.0, std::sqrt(dot(parts, parts) / dot(want, want)));
  }
};
TANDEM_OP_TEST(RopeWithQkNorm, kQkNorm);

TEST_P(RopeWithQkNorm, MatchesTheReference) {
  const RopeShape& s = row(kQkNorm);
  const Inputs in = inputs_of(s, dtype());
  const Values want = normed_and_turned(s, in, weight_of(s, dtype()), dtype());
  expect_close("qkv", in_place(s, in).at("qkv").values(), want, tolerance(dtype(), s.head_dim, 2));
}

TEST_P(RopeWithQkNorm, FromRawHasTheBitsOfInPlaceAndTheCacheHoldsThem) {
  const RopeShape& s = row(kQkNorm);
  const Inputs in = inputs_of(s, dtype());
  const std::int64_t block_size = 16, blocks = s.t / block_size + 2;
  std::vector<std::int32_t> slots;  // row 1 is inert
  for (std::int64_t r = 0; r < s.t; ++r)
    slots.push_back(r == 1 ? -1 : static_cast<std::int32_t>(r + 5));
  const Shape cache_shape{blocks, s.kv_heads, block_size, s.head_dim};
  const Values empty(static_cast<std::size_t>(cache_shape.elements()), 0.0);
  const Outputs got = run_op(backend(), [&](TestDevice& device) {
    const KvCache cache{device.in_out("k", empty, dtype(), cache_shape),
                        device.in_out("v", empty, dtype(), cache_shape), block_size};
    RopeArgs args = args_of(device, s, in);
    args.raw = device.input(in.qkv, dtype(), {s.t, in.width});
    args.qkv = device.output("qkv", dtype(), {s.t, in.width});
    args.cache = &cache;
    args.cache_slots = device.ints(slots);
    device.ops().rope_forward(device.exec(), args);
  });
  EXPECT_EQ(got.at("qkv").bytes, in_place(s, in).at("qkv").bytes);
  const Values qkv = got.at("qkv").values();
  Values k = empty, v = empty;
  for (std::int64_t r = 0; r < s.t; ++r)
    for (std::int64_t h = 0; r != 1 && h < s.kv_heads; ++h)
      for (std::int64_t d = 0; d < s.head_dim; ++d) {
        const std::int64_t slot = r + 5, from = r * in.width + (s.heads + h) * s.head_dim + d;
        const auto to = static_cast<std::size_t>(
            ((slot / block_size * s.kv_heads + h) * block_size + slot % block_size) * s.head_dim +
            d);
        k[to] = qkv[static_cast<std::size_t>(from)];
        v[to] = qkv[static_cast<std::size_t>(from + s.kv_heads * s.head_dim)];
      }
  EXPECT_EQ(got.at("k").values(), k);
  EXPECT_EQ(got.at("v").values(), v);
}

TEST_P(RopeWithQkNorm, RowsDoNotDependOnTheirNeighbours) {
  const RopeShape& s = row(kQkNorm);
  const Inputs in = inputs_of(s, dtype());
  const Outputs all = in_place(s, in);
  for (std::int64_t r = 0; r < std::min<std::int64_t>(s.t, 5); ++r) {
    RopeShape one = s;
    one.t = 1;
    Inputs alone = in;
    alone.qkv.assign(in.qkv.begin() + r * in.width, in.qkv.begin() + (r + 1) * in.width);
    alone.positions = {in.positions[static_cast<std::size_t>(r)]};
    EXPECT_EQ(in_place(one, alone).at("qkv").bytes, all.at("qkv").rows(r, 1)) << "row " << r;
  }
}

TEST_P(RopeWithQkNorm, BackwardMatchesTheReference) {
  const RopeShape& s = row(kQkNorm);
  const Inputs in = inputs_of(s, dtype());
  const Values weight = weight_of(s, dtype());
  Values dy = random_values(s.t * in.width, dtype(), 6);
  if (s.t > 2) std::fill_n(dy.begin() + in.width, in.width, 0.0);
  const Values old = random_values(2 * s.head_dim, DType::kF32, 7);
  enum class Weights { kFrozen, kAdded, kWritten };
  const auto run = [&](Weights weights) {
    return run_op(backend(), [&](TestDevice& device) {
      const RopeArgs forward = args_of(device, s, in);
      RopeBackwardArgs args{device.in_out("dqkv", dy, dtype(), {s.t, in.width}),
                            forward.positions,
                            forward.inv_freq,
                            s.factor,
                            s.heads,
                            s.kv_heads,
                            s.head_dim};
      args.qk_norm = forward.qk_norm;
      args.norm_eps = kEps;
      args.raw = device.input(in.qkv, dtype(), {s.t, in.width});
      const Shape shape{2 * s.head_dim};
      if (weights == Weights::kAdded) args.dqk_norm = device.in_out("dw", old, DType::kF32, shape);
      if (weights == Weights::kWritten) args.dqk_norm = device.output("dw", DType::kF32, shape);
      args.overwrite = weights == Weights::kWritten;
      device.ops().rope_backward(device.exec(), args);
    });
  };
  const Values turned = rounded(rope(dy, in.positions, in.inv_freq, s.factor, s.heads + s.kv_heads,
                                     s.head_dim, in.width, -1.0),
                                dtype());
  const QkNormGrads want = qk_norm_backward(shape_of(s), turned, in.qkv, weight, kEps);
  const double condition = condition_of(shape_of(s), turned, in.qkv, weight, want.draw);
  const Outputs got = run(Weights::kWritten);
  expect_close("dqkv", got.at("dqkv").values(), want.draw,
               condition * tolerance(dtype(), s.head_dim, 2));
  const double close = tolerance(DType::kF32, s.t * s.heads) + unit_roundoff(dtype());
  expect_close("dw", got.at("dw").values(), want.dweight, close);
  const Outputs added = run(Weights::kAdded), frozen = run(Weights::kFrozen);
  Values sum = old;
  for (std::size_t j = 0; j < sum.size(); ++j) sum[j] += want.dweight[j];
  expect_close("dw, added", added.at("dw").values(), sum, close);
  EXPECT_EQ(added.at("dqkv").bytes, got.at("dqkv").bytes);
  EXPECT_EQ(frozen.at("dqkv").bytes, got.at("dqkv").bytes);
}

}  // namespace
}  // namespace tandem::kernels::testing
