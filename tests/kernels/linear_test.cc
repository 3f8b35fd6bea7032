// The linear layer with its adapters against the f64 reference; mixed batches and dropout.
#include "tests/kernels/op_param.h"
#include "tests/kernels/reference.h"

#include <algorithm>
#include <cmath>

namespace tandem::kernels::testing {
namespace {

struct LinearShape {
  std::int64_t t, i, n;
  /// Sites cut the outputs evenly; slot k of every site has ranks[k] (0: no adapter there).
  std::int64_t sites;
  std::vector<std::int64_t> ranks;
  std::vector<std::int32_t> offsets, slots;  ///< segments
  bool bias;
};
const LinearShape kLinear[] = {
    {0, 4, 3, 0, {}, {}, {}, false},                          // no rows
    {1, 1, 1, 0, {}, {}, {}, true},                           // one of each
    {1, 7, 5, 1, {1}, {0, 1}, {0}, false},                    // decode, rank 1
    {5, 33, 31, 0, {}, {}, {}, true},                         // odd everywhere
    {17, 64, 96, 3, {16}, {0, 17}, {0}, false},               // training: one adapter
    {19, 40, 50, 2, {8}, {0, 4, 15, 15}, {-1, 0, -1}, true},  // inert tail, empty segment
    {23, 96, 70, 2, {4, 0, 9, 16}, {0, 3, 4, 9, 14, 20}, {2, 0, -1, 1, 3}, false},  // mixed ranks
    {70, 128, 160, 3, {8, 16}, {0, 33, 64}, {1, 0}, false},          // over one tile of rows
    {200, 64, 96, 3, {16, 8}, {0, 60, 170, 200}, {1, 0, 1}, false},  // a large decode step
    // Prefill: rows without an adapter, odd outputs, outputs that are no site's.
    {300, 64, 96, 3, {16, 8}, {0, 60, 170, 290}, {1, -1, 0}, true},
    {2100, 64, 96, 3, {16, 8}, {0, 60, 1700, 2090}, {1, -1, 0}, true},
    {2070, 40, 50, 2, {4, 0, 9}, {0, 1000, 2000, 2070}, {2, 1, 0}, false},
    {2090, 33, 31, 2, {5}, {0, 100, 2090}, {0, -1}, true},
};
/// Training with outputs, or inputs, wide enough for kernels that only large shapes are given to.
const LinearShape kWide[] = {
    {1030, 64, 3264, 3, {16}, {0, 1030}, {0}, false},
    {1030, 3264, 96, 3, {16}, {0, 1030}, {0}, false},
};

/// Decode steps of sizes that a GPU cuts into tiles in different ways: several tiles a block, tiles
/// that blocks share, sites that end inside of one, an adapter a row.
std::vector<LinearShape> decode_shapes() {
  std::vector<LinearShape> shapes{
      {13, 320, 28672, 2, {16, 5, 64}, {0, 4, 5, 9}, {1, 0, 2}, true},
      {21, 4096, 4096, 1, {16, 8}, {0, 10, 21}, {0, 1}, false},
      {9, 4096, 6144, 3, {16, 16}, {0, 3, 9}, {1, 0}, true},
      {3, 64, 40960, 2, {16, 3}, {0, 1, 3}, {1, 0}, false},
      {5, 72, 67584, 2, {8, 64}, {0, 1, 4}, {0, 1}, false},
      {64, 512, 96, 3, {16}, {0, 60}, {0}, true},
      {10, 896, 9728, 1, {16, 8}, {0, 4, 10}, {1, 0}, true},
      {33, 128, 16896, 1, {8, 16, 24, 32}, {0, 8, 16, 24, 33}, {3, 2, 1, 0}, false},
      {11, 9000, 3072, 1, {16, 20}, {0, 4, 9}, {1, 0}, false},
      {64,
       2056,
       6144,
       2,
       {16, 4, 0, 16},
       {0, 3, 9, 10, 29, 45, 46, 60},
       {1, 0, 2, 3, 1, -1, 0},
       true},
  };
  LinearShape each{64, 256, 4096, 1, {}, {0}, {}, false};
  for (std::int32_t k = 0; k < 64; ++k) {
    each.ranks.push_back(16);
    each.offsets.push_back(k + 1);
    each.slots.push_back(63 - k);
  }
  shapes.push_back(each);
  return shapes;
}
const std::vector<LinearShape> kDecode = decode_shapes();
/// Of inputs that backward makes: x and dy narrow and wide, whole tiles and parts of them.
const LinearShape kMade[] = {
    {5, 33, 62, 0, {}, {}, {}, false},                        // no adapter: x is not needed
    {19, 40, 50, 2, {8}, {0, 4, 15, 15}, {-1, 0, -1}, true},  // several segments
    {23, 96, 70, 2, {4, 0, 9}, {0, 3, 9, 14, 23}, {2, 0, -1, 1}, false},
    {70, 64, 96, 2, {8}, {0, 70}, {0}, false},
    {301, 2056, 144, 3, {16}, {0, 301}, {0}, false},
    {301, 136, 4640, 2, {16}, {0, 301}, {0}, false},
    {200, 72, 2064, 2, {24}, {0, 200}, {0}, false},
    {150, 64, 2064, 2, {16}, {0, 150}, {0}, false},
    {150, 64, 528, 2, {32}, {0, 150}, {0}, false},
    {200, 264, 528, 2, {64}, {0, 200}, {0}, false},
    {90, 104, 48, 3, {48}, {0, 90}, {0}, false},
    {517, 1032, 144, 3, {64, 40}, {0, 517}, {1}, false},  // all columns in one pass
    {517, 1032, 192, 3, {64}, {0, 517}, {0}, false},
    {530, 136, 1040, 2, {128}, {0, 530}, {0}, false},
};

/// Gate and up whose gradient backward makes, and a down of the same adapters before it: no
/// adapter, several segments, tiles and parts of them at every count of ranks, slots without one.
const LinearShape kMlp[] = {
    {5, 33, 62, 2, {}, {}, {}, false},
    {19, 40, 96, 2, {8}, {0, 4, 15, 15}, {-1, 0, -1}, true},
    {70, 64, 96, 2, {8}, {0, 70}, {0}, false},
    {70, 64, 96, 2, {8, 0}, {0, 70}, {1}, false},
    {90, 64, 96, 2, {8}, {0, 90}, {-1}, false},
    {301, 136, 4640, 2, {16}, {0, 301}, {0}, false},
    {200, 72, 2064, 2, {24}, {0, 200}, {0}, true},
    {150, 64, 2064, 2, {16, 8}, {0, 150}, {1}, false},
    {150, 64, 528, 2, {32}, {0, 150}, {0}, false},
    {200, 264, 528, 2, {64}, {0, 200}, {0}, false},
    {90, 104, 96, 2, {72}, {0, 90}, {0}, false},
    {517, 72, 2064, 2, {64, 40}, {0, 517}, {1}, false},
    {517, 136, 4640, 2, {64}, {0, 517}, {0}, false},
    {530, 72, 1040, 2, {128}, {0, 530}, {0}, false},
};

/// Of an x that forward makes: clusters of 1, 2, 4 and 8 blocks, parts of tiles of rows and of
/// columns, ranks that fill the columns of each kernel and do not, rows without an adapter.
const LinearShape kMadeForward[] = {
    {5, 33, 31, 1, {4}, {0, 5}, {0}, true},                   // odd everywhere
    {19, 40, 50, 2, {8}, {0, 4, 15, 15}, {-1, 0, -1}, true},  // several segments
    {30, 64, 96, 1, {16}, {0, 30}, {0}, false},               // a decode step
    {200, 72, 96, 1, {16}, {0, 200}, {0}, false},             // a large one
    {300, 200, 96, 0, {}, {}, {}, false},                     // no adapter
    {257, 8, 64, 1, {8}, {0, 257}, {0}, false},
    {384, 256, 64, 1, {16}, {0, 384}, {0}, true},
    {301, 264, 64, 1, {16}, {0, 301}, {-1}, false},
    {261, 1096, 128, 2, {16}, {0, 261}, {0}, false},
    {515, 2120, 72, 1, {16}, {0, 515}, {0}, false},
    {300, 4360, 64, 1, {16, 8}, {0, 300}, {1}, false},
    {270, 520, 48, 3, {16}, {0, 270}, {0}, false},
    {270, 520, 64, 1, {64}, {0, 270}, {0}, false},
    {300, 328, 64, 1, {128}, {0, 300}, {0}, false},
    {300, 328, 64, 2, {96}, {0, 300}, {0}, false},  // more columns than one pass has
    {517, 2120, 192, 3, {64}, {0, 517}, {0}, false},
    {261, 4168, 72, 1, {64, 48}, {0, 261}, {1}, false},
    {517, 2120, 64, 1, {128}, {0, 517}, {0}, true},
};

/// A case in f64 and what it takes on a device.
class LinearSetup {
 public:
  LinearSetup(const LinearShape& s, DType dtype) : dtype_(dtype) {
    c_.t = s.t, c_.i = s.i, c_.n = s.n;
    // Products of about 1, so that no part drowns.
    c_.w = random_values(s.n * s.i, dtype, 1, 1.0 / std::sqrt(static_cast<double>(s.i)));
    if (s.bias) c_.bias = random_values(s.n, dtype, 2);
    for (std::int64_t j = 0; j < s.sites; ++j) {
      Site site;
      site.n_begin = j * (s.n / s.sites);
      site.n = s.n / s.sites;
      for (std::size_t k = 0; k < s.ranks.size(); ++k) {
        const auto seed = static_cast<std::uint64_t>(100 + 10 * j) + k;
        const double scale = 1.0 / std::sqrt(static_cast<double>(s.i));
        site.slots.push_back({s.ranks[k], 0.25 * static_cast<double>(k + 1),
                              random_values(s.ranks[k] * s.i, dtype, seed, scale),
                              random_values(site.n * s.ranks[k], dtype, seed + 50)});
        rank_max_ = std::max(rank_max_, s.ranks[k]);
      }
      c_.sites.push_back(site);
    }
    c_.segment_offsets = s.offsets;
    c_.segment_slots = s.slots;
    x = random_values(s.t * s.i, dtype, 3);
    dy = random_values(s.t * s.n, dtype, 4);
    for (const Site& site : c_.sites) {
      old_da.emplace_back();
      old_db.emplace_back();
      for (const Adapter& a : site.slots) {
        old_da.back().push_back(random_values(a.rank * s.i, DType::kF32, 5));
        old_db.back().push_back(random_values(site.n * a.rank, DType::kF32, 6));
      }
    }
  }

  /// Adapter tensors on the device; gradients are named da<site>.<slot> and db<site>.<slot>, behind
  /// `of`.
  void place(TestDevice& device, bool gradients, float dropout, const std::string& of = {}) {
    weight = device.weight(c_.w, dtype_, c_.n, c_.i);
    bias = c_.bias.empty() ? Tensor{} : device.input(c_.bias, dtype_, {c_.n});
    sites.clear();
    for (std::size_t s = 0; s < c_.sites.size(); ++s) {
      const Site& site = c_.sites[s];
      std::vector<LoraEntry> entries;
      for (std::size_t k = 0; k < site.slots.size(); ++k) {
        const Adapter& a = site.slots[k];
        LoraEntry entry;
        entry.rank = static_cast<std::int32_t>(a.rank);
        entry.scale = static_cast<float>(a.scale);
        entry.a = place_factor(device, a.a);
        entry.b = place_factor(device, a.b);
        const std::string name = std::to_string(s) + "." + std::to_string(k);
        if (gradients) {
          entry.da = device.in_out(of + "da" + name, old_da[s][k], DType::kF32, {a.rank, c_.i})
                         .as<float>();
          entry.db = device.in_out(of + "db" + name, old_db[s][k], DType::kF32, {site.n, a.rank})
                         .as<float>();
        }
        entries.push_back(entry);
      }
      const auto bytes = static_cast<std::int64_t>(entries.size() * sizeof(LoraEntry));
      sites.push_back({site.n_begin, site.n, device.bytes(entries.data(), bytes), 77 + s});
    }
    rows = {};
    if (c_.sites.empty()) return;
    rows.segments_max = static_cast<std::int64_t>(c_.segment_slots.size());
    rows.segment_offsets = device.ints(c_.segment_offsets);
    rows.segment_slots = device.ints(c_.segment_slots);
    rows.rank_max = rank_max_;
    rows.dropout = dropout;
    rows.dropout_seed = 9;
  }
  [[nodiscard]] const AdapterRows* adapters() const { return c_.sites.empty() ? nullptr : &rows; }
  [[nodiscard]] Shape u_shape() const {
    return {c_.t, static_cast<std::int64_t>(c_.sites.size()) * rows.rank_max};
  }
  LinearCase& reference() { return c_; }

  Values x, dy;
  std::int64_t shift = 0;  ///< elements by which factors lie behind their tensors' begin
  std::vector<std::vector<Values>> old_da, old_db;
  PackedWeight weight;
  Tensor bias;
  std::vector<LoraSite> sites;
  AdapterRows rows;

 private:
  [[nodiscard]] const void* place_factor(TestDevice& device, Values values) const {
    values.insert(values.begin(), static_cast<std::size_t>(shift), 0.0);
    const auto count = static_cast<std::int64_t>(values.size());
    return static_cast<const char*>(device.input(values, dtype_, {count}).data) +
           shift * dtype_bytes(dtype_);
  }

  const DType dtype_;
  LinearCase c_;
  std::int64_t rank_max_ = 0;
};

/// What an f64 sum of absolute values would be relative to the result is near 1 for random signs;
/// the low-rank part is rounded twice more in the compute dtype (u, and y before it is added).
double linear_tolerance(DType dtype, const LinearShape& s) {
  const std::int64_t rank = s.ranks.empty() ? 0 : *std::max_element(s.ranks.begin(), s.ranks.end());
  return tolerance(dtype, s.i + rank, s.sites > 0 ? 3 : 1);
}

class Linear : public OpTest {
 protected:
  void check_forward(const LinearShape& s) const;
  void check_alone(const LinearShape& s) const;
  void check_infinite(const LinearShape& s) const;
  void check_backward(const LinearShape& s) const;
  /// `multiprocessors` of a GPU's; 0: all.
  Outputs forward(LinearSetup& setup, bool save_u, float dropout = 0.0f, DType y_dtype = dtype(),
                  int multiprocessors = 0) const {
    const LinearCase& c = setup.reference();
    return run_op(backend(), [&](TestDevice& device) {
      if (multiprocessors > 0)
        device.exec().spare_multiprocessors = device.ops().profile().sm_count - multiprocessors;
      setup.place(device, false, dropout);
      LinearArgs args{device.input(setup.x, dtype(), {c.t, c.i}),
                      &setup.weight,
                      setup.bias,
                      setup.sites,
                      setup.adapters(),
                      device.output("y", y_dtype, {c.t, c.n}),
                      {}};
      if (save_u) args.u = device.output("u", dtype(), setup.u_shape());
      device.ops().linear_forward(device.exec(), args);
    });
  }
};
TANDEM_OP_TEST(Linear, kLinear);
class LinearWide : public Linear {};
TANDEM_OP_TEST(LinearWide, kWide);
class LinearDecode : public Linear {};
TANDEM_OP_TEST(LinearDecode, kDecode);

void Linear::check_forward(const LinearShape& s) const {
  LinearSetup setup(s, dtype());
  const Values want = linear(setup.reference(), setup.x);
  for (const bool save_u : {false, true})
    expect_close("y", forward(setup, save_u).at("y").values(), want, linear_tolerance(dtype(), s));
  expect_close("y in f32", forward(setup, false, 0.0f, DType::kF32).at("y").values(), want,
               s.sites > 0 ? linear_tolerance(dtype(), s) : tolerance(DType::kF32, s.i));
}

TEST_P(Linear, ForwardMatchesTheReference) {
  check_forward(row(kLinear));
}
TEST_P(LinearWide, ForwardMatchesTheReference) {
  if (backend() == "cpu") GTEST_SKIP() << "one path for all sizes";
  check_forward(row(kWide));
}

TEST_P(LinearDecode, ForwardMatchesTheReference) {
  if (backend() == "cpu" || dtype() == DType::kF32) GTEST_SKIP() << "one path for all sizes";
  check_forward(row(kDecode));
}

TEST_P(LinearDecode, TakesFactorsAtAnyAddress) {
  if (dtype() == DType::kF32) GTEST_SKIP() << "one path for all addresses";
  const LinearShape& s = row(kDecode);
  if (s.sites == 0) return;
  LinearSetup setup(s, dtype());
  setup.shift = 1;
  const Values want = linear(setup.reference(), setup.x);
  expect_close("y", forward(setup, false).at("y").values(), want, linear_tolerance(dtype(), s));
}

/// Where few rows leave multiprocessors idle, as five of these shapes do on an H100, the
/// product's own blocks make u; of sixteen, none is left for that. The bits are the same.
TEST_P(LinearDecode, UDoesNotDependOnWhoMakesIt) {
  if (backend() == "cpu" || dtype() == DType::kF32) GTEST_SKIP() << "one path";
  LinearSetup setup(row(kDecode), dtype());
  const auto bytes = [&](int multiprocessors) {
    return forward(setup, true, 0.0f, dtype(), multiprocessors).at("u").bytes;
  };
  EXPECT_EQ(bytes(0), bytes(16));
}

TEST_P(Linear, SavedUIsZeroWhereNoAdapterIs) {
  const LinearShape& s = row(kLinear);
  if (s.sites == 0) return;
  LinearSetup setup(s, dtype());
  const Values u = forward(setup, true).at("u").values();
  const LinearCase& c = setup.reference();
  const std::int64_t rank_max = setup.rows.rank_max, columns = s.sites * rank_max;
  for (std::int64_t r = 0; r < s.t; ++r)
    for (std::int64_t j = 0; j < columns; ++j) {
      const std::int64_t slot = c.slot_of(r);
      const std::int64_t rank = slot < 0 ? 0
                                         : c.sites[static_cast<std::size_t>(j / rank_max)]
                                               .slots[static_cast<std::size_t>(slot)]
                                               .rank;
      if (j % rank_max < rank) continue;
      ASSERT_EQ(u[static_cast<std::size_t>(r * columns + j)], 0.0) << "row " << r << " " << j;
    }
}

void Linear::check_backward(const LinearShape& s) const {
  LinearSetup setup(s, dtype());
  const LinearCase& c = setup.reference();
  const LinearGrads want = linear_backward(c, setup.x, setup.dy);
  for (const bool save_u : {true, false}) {
    const Outputs got = run_op(backend(), [&](TestDevice& device) {
      setup.place(device, true, 0.0f);
      const Tensor x = device.input(setup.x, dtype(), {c.t, c.i});
      Tensor u;
      if (save_u) {
        u = device.output("u", dtype(), setup.u_shape());
        device.ops().linear_forward(device.exec(),
                                    {x, &setup.weight, setup.bias, setup.sites, setup.adapters(),
                                     device.output("y", dtype(), {c.t, c.n}), u});
      }
      device.ops().linear_backward(device.exec(), {device.input(setup.dy, dtype(), {c.t, c.n}), x,
                                                   &setup.weight, setup.sites, setup.adapters(), u,
                                                   device.output("dx", dtype(), {c.t, c.i})});
    });
    const double dx_tolerance = tolerance(dtype(), s.n, s.sites > 0 ? 1 + 2 * int(s.sites) : 1);
    expect_close("dx", got.at("dx").values(), want.dx, dx_tolerance);
    for (std::size_t j = 0; j < c.sites.size(); ++j)
      for (std::size_t k = 0; k < c.sites[j].slots.size(); ++k) {
        const std::string name = std::to_string(j) + "." + std::to_string(k);
        Values da = want.da[j][k], db = want.db[j][k];
        for (std::size_t e = 0; e < da.size(); ++e) da[e] += setup.old_da[j][k][e];
        for (std::size_t e = 0; e < db.size(); ++e) db[e] += setup.old_db[j][k][e];
        // One factor (du or u) was rounded to the compute dtype; sums run over rows and columns.
        const double allowed = tolerance(dtype(), s.t + s.n + s.i);
        expect_close("da" + name, got.at("da" + name).values(), da, allowed);
        expect_close("db" + name, got.at("db" + name).values(), db, allowed);
      }
  }
}

TEST_P(Linear, BackwardMatchesTheReference) {
  check_backward(row(kLinear));
}
TEST_P(LinearWide, BackwardMatchesTheReference) {
  if (backend() == "cpu") GTEST_SKIP() << "one path for all sizes";
  check_backward(row(kWide));
}

enum class Made { kNorm, kSiluMul, kGradient };

/// A backward whose x, or dy, the op makes itself, or is given as the op of its recipe makes it.
class LinearMade : public OpTest {
 protected:
  static constexpr float kEps = 1e-5f;

  static Outputs backward(LinearSetup& setup, Made made, bool by_recipe, bool keep_u,
                          float dropout) {
    const LinearCase& c = setup.reference();
    return run_op(backend(), [&](TestDevice& device) {
      setup.place(device, true, dropout);
      const auto random = [&](std::int64_t columns, std::uint64_t seed) {
        return random_values(c.t * columns, dtype(), seed);
      };
      const Tensor x = device.output("x", dtype(), {c.t, c.i});
      LinearInputRecipe make_x;
      if (made == Made::kSiluMul) {
        make_x.silu_mul.gate_up = device.input(random(2 * c.i, 21), dtype(), {c.t, 2 * c.i});
        device.ops().silu_mul_forward(device.exec(), {make_x.silu_mul.gate_up, x});
      } else {
        make_x.norm = {device.input(random(c.i, 22), dtype(), {c.t, c.i}),
                       {},
                       device.input(random_values(c.i, dtype(), 23), dtype(), {c.i}),
                       kEps,
                       {},
                       device.output("rstd", DType::kF32, {c.t})};
        AddRmsNormArgs norm = make_x.norm;
        norm.y = x;
        device.ops().add_rms_norm_forward(device.exec(), norm);
      }
      Tensor u;
      if (keep_u) {
        u = device.output("u", dtype(), setup.u_shape());
        device.ops().linear_forward(device.exec(),
                                    {x, &setup.weight, setup.bias, setup.sites, setup.adapters(),
                                     device.output("y", dtype(), {c.t, c.n}), u});
      }
      const bool makes_dy = made == Made::kGradient;
      // In place, as a block has it.
      const Tensor dy = device.in_out("dy", random(c.n, 24), dtype(), {c.t, c.n});
      const SiluMulBackwardArgs make_dy{device.input(random(c.n / 2, 25), dtype(), {c.t, c.n / 2}),
                                        dy, dy};
      if (makes_dy && !by_recipe) device.ops().silu_mul_backward(device.exec(), make_dy);
      LinearBackwardArgs args{dy,
                              x,
                              &setup.weight,
                              setup.sites,
                              setup.adapters(),
                              u,
                              device.output("dx", dtype(), {c.t, c.i})};
      if (by_recipe && makes_dy) args.make_dy = make_dy;
      if (by_recipe && !makes_dy) {
        args.x = {};
        args.make_x = make_x;
      }
      device.ops().linear_backward(device.exec(), args);
    });
  }

  static void expect_same_bits(Made made) {
    const LinearShape& s = row(kMade);
    if (backend() == "cpu" && s.t * (s.i + s.n) > 1 << 18) GTEST_SKIP() << "one path for all sizes";
    for (const float dropout : {0.0f, 0.25f})
      for (const bool keep_u : {true, false}) {
        LinearSetup setup(s, dtype());
        const Outputs given = backward(setup, made, false, keep_u, dropout);
        const Outputs by_recipe = backward(setup, made, true, keep_u, dropout);
        for (const auto& [name, output] : given) {
          const std::string what = str(name, ", dropout ", dropout, keep_u ? "" : ", u not kept");
          // A pass that makes dy cuts the sums of du and dB otherwise: du is then rounded from
          // other last bits.
          if (made == Made::kGradient && backend() != "cpu" && name[0] == 'd' && name != "dy")
            expect_close(what, by_recipe.at(name).values(), output.values(),
                         tolerance(dtype(), s.t + s.n + s.i));
          else
            EXPECT_EQ(by_recipe.at(name).bytes, output.bytes) << what;
        }
      }
  }
};
TANDEM_OP_TEST(LinearMade, kMade);

TEST_P(LinearMade, ANormMadeByBackwardGivesTheBitsOfOneGiven) {
  expect_same_bits(Made::kNorm);
}
TEST_P(LinearMade, ASiluMulMadeByBackwardGivesTheBitsOfOneGiven) {
  expect_same_bits(Made::kSiluMul);
}
TEST_P(LinearMade, AGradientMadeByBackwardGivesTheBitsOfOneGiven) {
  expect_same_bits(Made::kGradient);
}

/// Both linears of an MLP in one op, or one after the other.
class LinearMlp : public OpTest {
 protected:
  static Outputs backward(LinearSetup& down, LinearSetup& gate_up, bool joint, bool keep_u,
                          float dropout) {
    const std::int64_t t = gate_up.reference().t, c = gate_up.reference().i, f = down.reference().i;
    return run_op(backend(), [&](TestDevice& device) {
      down.place(device, true, dropout, "down ");
      gate_up.place(device, true, dropout);
      if (down.adapters() != nullptr) down.rows = gate_up.rows;
      const auto random = [&](std::int64_t columns, std::uint64_t seed) {
        return random_values(t * columns, dtype(), seed);
      };
      const Tensor both = device.in_out("gate_up", random(2 * f, 31), dtype(), {t, 2 * f});
      const Tensor dact = device.output("dact", dtype(), {t, f});
      const Tensor x = device.input(random(c, 32), dtype(), {t, c});
      const auto kept = [&](const LinearSetup& of, std::uint64_t seed) {
        if (!keep_u || of.adapters() == nullptr) return Tensor{};
        return device.input(random_values(of.u_shape().elements(), dtype(), seed), dtype(),
                            of.u_shape());
      };
      LinearBackwardArgs first{device.input(random(c, 33), dtype(), {t, c}),
                               {},
                               &down.weight,
                               down.sites,
                               down.adapters(),
                               kept(down, 34),
                               dact};
      first.make_x.silu_mul = {both, {}};
      LinearBackwardArgs second{both,
                                x,
                                &gate_up.weight,
                                gate_up.sites,
                                gate_up.adapters(),
                                kept(gate_up, 35),
                                device.output("dx", dtype(), {t, c})};
      second.make_dy = {dact, both, both};
      if (joint) return device.ops().mlp_backward(device.exec(), {first, second});
      device.ops().linear_backward(device.exec(), first);
      device.ops().linear_backward(device.exec(), second);
    });
  }
};
TANDEM_OP_TEST(LinearMlp, kMlp);

TEST_P(LinearMlp, OneBackwardGivesWhatTwoGive) {
  const LinearShape& s = row(kMlp);
  if (backend() == "cpu" && s.t * (s.i + s.n) > 1 << 18) GTEST_SKIP() << "one path for all sizes";
  for (const float dropout : {0.0f, 0.25f})
    for (const bool keep_u : {true, false}) {
      LinearShape of_down = s;
      of_down.i = s.n / 2, of_down.n = s.i, of_down.sites = s.ranks.empty() ? 0 : 1;
      LinearShape of_gate_up = s;
      if (s.ranks.empty()) of_gate_up.sites = 0;
      LinearSetup down(of_down, dtype()), gate_up(of_gate_up, dtype());
      const Outputs apart = backward(down, gate_up, false, keep_u, dropout);
      const Outputs joint = backward(down, gate_up, true, keep_u, dropout);
      for (const auto& [name, output] : apart) {
        const std::string what = str(name, ", dropout ", dropout, keep_u ? "" : ", u not kept");
        if (name.starts_with("down da"))  // the pass cuts its sums otherwise
          expect_close(what, joint.at(name).values(), output.values(), tolerance(DType::kF32, s.t));
        else
          EXPECT_EQ(joint.at(name).bytes, output.bytes) << what;
      }
    }
}

/// A forward whose x the op makes itself, or is given as the op of its recipe makes it.
class LinearMadeForward : public OpTest {
 protected:
  static Outputs forward(LinearSetup& setup, bool by_recipe, bool keep_u, float dropout,
                         Numerics numerics) {
    const LinearCase& c = setup.reference();
    return run_op(backend(), [&](TestDevice& device) {
      setup.place(device, false, dropout);
      device.exec().numerics = numerics;
      const SiluMulArgs make_x{
          device.input(random_values(c.t * 2 * c.i, dtype(), 21), dtype(), {c.t, 2 * c.i}),
          device.output("x", dtype(), {c.t, c.i})};
      LinearArgs args{make_x.out,  &setup.weight,    setup.bias,
                      setup.sites, setup.adapters(), device.output("y", dtype(), {c.t, c.n}),
                      {}};
      if (keep_u) args.u = device.output("u", dtype(), setup.u_shape());
      if (by_recipe)
        args.make_x = make_x;
      else
        device.ops().silu_mul_forward(device.exec(), make_x);
      device.ops().linear_forward(device.exec(), args);
    });
  }
};
TANDEM_OP_TEST(LinearMadeForward, kMadeForward);

TEST_P(LinearMadeForward, ASiluMulMadeByForwardGivesTheBitsOfOneGiven) {
  const LinearShape& s = row(kMadeForward);
  if (backend() == "cpu" && s.t * (s.i + s.n) > 1 << 17) GTEST_SKIP() << "one path for all sizes";
  for (const Numerics numerics : {Numerics::kReplay, Numerics::kInvariant})
    for (const float dropout : {0.0f, 0.25f})
      for (const bool keep_u : {true, false}) {
        LinearSetup setup(s, dtype());
        const Outputs given = forward(setup, false, keep_u, dropout, numerics);
        const Outputs by_recipe = forward(setup, true, keep_u, dropout, numerics);
        for (const auto& [name, output] : given)
          EXPECT_EQ(by_recipe.at(name).bytes, output.bytes)
              << name << ", dropout " << dropout << (keep_u ? "" : ", u not kept")
              << (numerics == Numerics::kInvariant ? ", invariant" : "");
      }
}

TEST_P(LinearMadeForward, ASiluMulMadeByForwardMatchesTheReference) {
  const LinearShape& s = row(kMadeForward);
  if (backend() == "cpu" && s.t * (s.i + s.n) > 1 << 17) GTEST_SKIP() << "one path for all sizes";
  LinearSetup setup(s, dtype());
  const Outputs got = forward(setup, true, true, 0.0f, Numerics::kReplay);
  const Values x = silu_mul(random_values(s.t * 2 * s.i, dtype(), 21), s.t, s.i);
  expect_close("x", got.at("x").values(), x, tolerance(dtype(), 8));
  expect_close("y", got.at("y").values(), linear(setup.reference(), got.at("x").values()),
               linear_tolerance(dtype(), s));
}

void Linear::check_alone(const LinearShape& s) const {
  if (s.sites == 0) return;
  LinearSetup setup(s, dtype());
  const Outputs mixed = forward(setup, false);
  for (std::size_t keep = 0; keep < s.slots.size(); ++keep) {
    LinearShape alone = s;
    for (std::size_t other = 0; other < s.slots.size(); ++other)
      if (other != keep) alone.slots[other] = -1;
    LinearSetup alone_setup(alone, dtype());
    const Outputs got = forward(alone_setup, false);
    const std::int64_t begin = s.offsets[keep], count = s.offsets[keep + 1] - begin;
    EXPECT_EQ(got.at("y").rows(begin, count), mixed.at("y").rows(begin, count))
        << "segment " << keep;
  }
}

TEST_P(Linear, TakingOtherRowsAdaptersAwayChangesNoBits) {
  check_alone(row(kLinear));
}
TEST_P(LinearDecode, TakingOtherRowsAdaptersAwayChangesNoBits) {
  if (backend() == "cpu" || dtype() == DType::kF32) GTEST_SKIP() << "one path for all sizes";
  if (row(kDecode).slots.size() <= 4) check_alone(row(kDecode));
}

/// Its first column of B: outputs are infinite, never NaN.
void infinite_rank(Adapter& a) {
  for (std::size_t e = 0; e < a.b.size(); e += static_cast<std::size_t>(a.rank)) a.b[e] = INFINITY;
}

/// Segment 1 beside a segment 0 whose adapter has an infinite rank.
void Linear::check_infinite(const LinearShape& s) const {
  if (s.slots.size() < 2 || s.slots[0] < 0 || s.slots[0] == s.slots[1]) return;
  LinearSetup setup(s, dtype()), infinite(s, dtype());
  for (Site& site : infinite.reference().sites)
    infinite_rank(site.slots[static_cast<std::size_t>(s.slots[0])]);
  const std::int64_t begin = s.offsets[1], count = s.offsets[2] - begin;
  EXPECT_EQ(forward(infinite, false).at("y").rows(begin, count),
            forward(setup, false).at("y").rows(begin, count));
}

TEST_P(Linear, InfiniteAdaptersOfOtherRowsChangeNoBits) {
  check_infinite(row(kLinear));
}
TEST_P(LinearDecode, InfiniteAdaptersOfOtherRowsChangeNoBits) {
  if (backend() == "cpu" || dtype() == DType::kF32) GTEST_SKIP() << "one path for all sizes";
  if (row(kDecode).i < 4096) check_infinite(row(kDecode));
}

TEST_P(Linear, RowsInF32DoNotDependOnTheBatch) {
  const LinearShape& s = row(kLinear);
  if (dtype() != DType::kF32) return;  // bf16 promises Replay only
  LinearSetup setup(s, dtype());
  const Outputs all = forward(setup, false);
  const Outputs all_saving = forward(setup, true);
  EXPECT_EQ(all.at("y").bytes, all_saving.at("y").bytes);
  for (std::int64_t r = 0; r < s.t; r += std::max<std::int64_t>(1, s.t / 5)) {
    const std::int64_t slot = setup.reference().slot_of(r);
    LinearShape one = s;
    one.t = 1;
    one.offsets = {0, 1};
    one.slots = {static_cast<std::int32_t>(slot)};
    LinearSetup alone(one, dtype());
    alone.x.assign(setup.x.begin() + r * s.i, setup.x.begin() + (r + 1) * s.i);
    EXPECT_EQ(forward(alone, false).at("y").bytes, all.at("y").rows(r, 1)) << "row " << r;
    if (slot >= 0) continue;
    one.sites = 0;  // and a plain linear gives an adapter-free row the same bits
    LinearSetup plain(one, dtype());
    plain.x = alone.x;
    EXPECT_EQ(forward(plain, false).at("y").bytes, all.at("y").rows(r, 1)) << "row " << r;
  }
}

/// On a Hopper GPU kInvariant is for bf16 too: kernels of few and of many rows add up alike.
TEST_P(LinearDecode, InvariantRowsDoNotDependOnTheBatch) {
  if (backend() == "cpu" || dtype() == DType::kF32) GTEST_SKIP() << "one path for all sizes";
  const LinearShape& like = row(kDecode);
  const auto forward_rows = [&](std::int64_t t, DType y_dtype) {
    LinearShape s = like;
    s.t = t;
    s.ranks = {16};
    s.offsets = {0, static_cast<std::int32_t>(t)};
    s.slots = {0};
    LinearSetup setup(s, dtype());  // the same first rows whatever t is
    return run_op(backend(), [&](TestDevice& device) {
      setup.place(device, false, 0.0f);
      device.exec().numerics = Numerics::kInvariant;
      device.ops().linear_forward(device.exec(), {device.input(setup.x, dtype(), {t, s.i}),
                                                  &setup.weight,
                                                  setup.bias,
                                                  setup.sites,
                                                  setup.adapters(),
                                                  device.output("y", y_dtype, {t, s.n}),
                                                  {}});
    });
  };
  if (like.n * like.i > (1 << 23)) return;  // the same kernels once more
  for (const DType y_dtype : {dtype(), DType::kF32}) {
    // A whole prompt's rows where they do not take long.
    const std::int64_t most = like.n + like.i <= 4608 ? 4100 : 300;
    const auto want = forward_rows(most, y_dtype);
    for (const std::int64_t t : {1, 7, 64, 65, 127, 129, 300, 1000, 2500}) {
      if (t >= most) continue;
      EXPECT_EQ(forward_rows(t, y_dtype).at("y").bytes, want.at("y").rows(0, t)) << t << " rows";
    }
  }
}

/// The masks of each site as an adapter with A = 1, s = 1 shows them: u = dropout(1).
std::vector<Values> probe_masks(const std::string& backend, const LinearShape& s, float dropout) {
  LinearShape probe = s;
  probe.ranks = {s.i};
  probe.offsets = {0, static_cast<std::int32_t>(s.t)};
  probe.slots = {0};
  LinearSetup setup(probe, DType::kF32);
  LinearCase& c = setup.reference();
  std::fill(setup.x.begin(), setup.x.end(), 1.0);
  for (Site& site : c.sites) {
    Adapter& a = site.slots[0];
    a.scale = 1.0;
    std::fill(a.a.begin(), a.a.end(), 0.0);
    for (std::int64_t j = 0; j < s.i; ++j) a.a[static_cast<std::size_t>(j * s.i + j)] = 1.0;
  }
  const Outputs got = run_op(backend, [&](TestDevice& device) {
    setup.place(device, false, dropout);
    device.ops().linear_forward(
        device.exec(), {device.input(setup.x, DType::kF32, {c.t, c.i}), &setup.weight, setup.bias,
                        setup.sites, setup.adapters(), device.output("y", DType::kF32, {c.t, c.n}),
                        device.output("u", DType::kF32, setup.u_shape())});
  });
  const Values u = got.at("u").values();
  std::vector<Values> masks(c.sites.size());
  for (std::int64_t r = 0; r < s.t; ++r)
    for (std::size_t j = 0; j < masks.size(); ++j) {
      const auto begin = u.begin() + (r * s.sites + static_cast<std::int64_t>(j)) * s.i;
      masks[j].insert(masks[j].end(), begin, begin + s.i);
    }
  return masks;
}

TEST_P(Linear, BackwardRepeatsTheMasksOfDropout) {
  const LinearShape& s = row(kLinear);
  if (s.sites == 0 || s.t < 2) return;
  const float dropout = 0.25f;
  const std::vector<Values> masks = probe_masks(backend(), s, dropout);
  double kept = 0.0, count = 0.0;
  for (const Values& mask : masks)
    for (double m : mask) {
      ASSERT_TRUE(m == 0.0 || std::abs(m - 1.0 / 0.75) < 1e-6) << m;
      kept += m != 0.0 ? 1.0 : 0.0;
      count += 1.0;
    }
  // Six standard deviations of a binomial.
  EXPECT_NEAR(kept / count, 0.75, 6.0 * std::sqrt(0.75 * 0.25 / count));
  for (std::size_t j = 1; j < masks.size(); ++j)
    EXPECT_NE(masks[0], masks[j]) << "two sites share a mask";

  LinearSetup setup(s, dtype());
  LinearCase& c = setup.reference();
  for (std::size_t j = 0; j < masks.size(); ++j) c.sites[j].mask = masks[j];
  const LinearGrads want = linear_backward(c, setup.x, setup.dy);
  const Outputs got = run_op(backend(), [&](TestDevice& device) {
    setup.place(device, true, dropout);
    const Tensor x = device.input(setup.x, dtype(), {c.t, c.i});
    const Tensor u = device.output("u", dtype(), setup.u_shape());
    device.ops().linear_forward(device.exec(),
                                {x, &setup.weight, setup.bias, setup.sites, setup.adapters(),
                                 device.output("y", dtype(), {c.t, c.n}), u});
    device.ops().linear_backward(
        device.exec(), {device.input(setup.dy, dtype(), {c.t, c.n}), x, &setup.weight, setup.sites,
                        setup.adapters(), u, device.output("dx", dtype(), {c.t, c.i})});
  });
  expect_close("y", got.at("y").values(), linear(c, setup.x),
               tolerance(dtype(), s.i + 16, 4));  // dropout(x) is rounded too
  expect_close("dx", got.at("dx").values(), want.dx,
               tolerance(dtype(), s.n, 1 + 3 * static_cast<int>(s.sites)));
  for (std::size_t j = 0; j < c.sites.size(); ++j)
    for (std::size_t k = 0; k < c.sites[j].slots.size(); ++k) {
      const std::string name = std::to_string(j) + "." + std::to_string(k);
      Values da = want.da[j][k], db = want.db[j][k];
      for (std::size_t e = 0; e < da.size(); ++e) da[e] += setup.old_da[j][k][e];
      for (std::size_t e = 0; e < db.size(); ++e) db[e] += setup.old_db[j][k][e];
      expect_close("da" + name, got.at("da" + name).values(), da, tolerance(dtype(), s.t + s.n, 2));
      expect_close("db" + name, got.at("db" + name).values(), db, tolerance(dtype(), s.t + s.i, 2));
    }
}

}  // namespace
}  // namespace tandem::kernels::testing
