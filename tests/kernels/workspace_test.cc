// The promise of the estimator at its root: every op leaves the same peak in the ledger, byte for
// byte, on the meta backend as on the one that executes.
#include "kernels/workspace.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/meta/meta_backend.h"
#include "tests/support/op_harness.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

namespace tandem::kernels::testing {
namespace {

constexpr std::int64_t kArenaBytes = std::int64_t{1} << 34;

/// A backend with one arena of tensors and one of scratch.
struct Side {
  explicit Side(Backend b)
      : backend(std::move(b)),
        tensors(*backend.allocator, *backend.ledger, MemoryKind::kActivations, "tensors",
                kArenaBytes),
        workspace(*backend.allocator, *backend.ledger, MemoryKind::kWorkspace, "workspace",
                  kArenaBytes),
        exec{workspace} {}

  /// Filled with zeros, which every list and every number accepts.
  Tensor zeros(DType dtype, Shape shape) {
    const Tensor t = tensors.alloc(shape, dtype);
    backend.ops->fill_zero(exec, t);
    return t;
  }
  Tensor ints(const std::vector<std::int32_t>& values) {
    const Tensor t = tensors.alloc({static_cast<std::int64_t>(values.size())}, DType::kI32);
    backend.ops->upload(exec, std::as_bytes(std::span(values)), t);
    return t;
  }
  PackedWeight weight(DType dtype, std::int64_t n, std::int64_t i) {
    return backend.ops->pack_weight(
        exec, tensors, dtype, n, i,
        [i](std::int64_t, std::int64_t rows, float* out) { std::fill_n(out, rows * i, 0.0f); });
  }

  Backend backend;
  Arena tensors, workspace;
  Exec exec;
};

struct Case {
  std::string name;
  std::function<void(Side&, DType)> run;
};

struct Adapters {
  std::vector<LoraSite> sites;
  AdapterRows rows;
};

/// `slots` adapters of rank `rank` at `sites_count` equal sites, one segment of T / segments rows
/// each.
Adapters adapters(Side& side, DType cd, std::int64_t t, std::int64_t i, std::int64_t n,
                  std::int64_t sites_count, std::int64_t slots, std::int64_t rank,
                  std::int64_t segments, float dropout) {
  Adapters a;
  for (std::int64_t s = 0; s < sites_count; ++s) {
    std::vector<LoraEntry> entries;
    for (std::int64_t k = 0; k < slots; ++k) {
      LoraEntry e;
      e.rank = static_cast<std::int32_t>(rank);
      e.scale = 1.0f;
      e.a = side.zeros(cd, {rank, i}).data;
      e.b = side.zeros(cd, {n / sites_count, rank}).data;
      e.da = side.zeros(DType::kF32, {rank, i}).as<float>();
      e.db = side.zeros(DType::kF32, {n / sites_count, rank}).as<float>();
      entries.push_back(e);
    }
    const Tensor at = side.tensors.alloc(
        {static_cast<std::int64_t>(entries.size() * sizeof(LoraEntry))}, DType::kU8);
    side.backend.ops->upload(side.exec, std::as_bytes(std::span(entries)), at);
    a.sites.push_back({s * (n / sites_count), n / sites_count, at, static_cast<std::uint64_t>(s)});
  }
  std::vector<std::int32_t> offsets{0}, at;
  for (std::int64_t s = 0; s < segments; ++s) {
    offsets.push_back(static_cast<std::int32_t>((s + 1) * t / segments));
    at.push_back(static_cast<std::int32_t>(s % (slots + 1)) - 1);
  }
  a.rows = {side.ints(offsets), side.ints(at), segments, rank, dropout, 1};
  return a;
}

struct LinearShapes {
  std::int64_t t, i, n, sites, slots, rank, segments;
  float dropout;
  bool save_u;
};
/// What linear takes beside its inputs and outputs.
struct PlacedLinear {
  PlacedLinear(Side& side, DType cd, const LinearShapes& s) : weight(side.weight(cd, s.n, s.i)) {
    if (s.sites > 0) {
      adapters = testing::adapters(side, cd, s.t, s.i, s.n, s.sites, s.slots, s.rank, s.segments,
                                   s.dropout);
      rows = &adapters.rows;
    }
    if (s.save_u) u = side.zeros(cd, {s.t, s.sites * s.rank});
  }
  PlacedLinear(const PlacedLinear&) = delete;
  PlacedLinear& operator=(const PlacedLinear&) = delete;

  PackedWeight weight;
  Adapters adapters;
  const AdapterRows* rows = nullptr;
  Tensor u;
};

void add_linear_cases(std::vector<Case>& cases) {
  for (const LinearShapes& s : {LinearShapes{1, 64, 96, 0, 0, 0, 0, 0.0f, false},
                                {33, 70, 50, 0, 0, 0, 0, 0.0f, false},
                                {300, 576, 960, 3, 1, 16, 1, 0.0f, true},
                                {300, 576, 960, 3, 1, 16, 1, 0.1f, true},
                                {200, 264, 1056, 2, 1, 16, 1, 0.0f, true},
                                {16, 576, 576, 1, 4, 8, 5, 0.0f, false},
                                {64, 128, 256, 2, 3, 32, 7, 0.1f, false},
                                // short segments of a long batch: fewer rows may take more scratch
                                {700, 1536, 96, 1, 3, 16, 40, 0.0f, false}}) {
    const std::string shape =
        str("t", s.t, " i", s.i, " n", s.n, " sites", s.sites, " drop", s.dropout);
    for (const bool makes : {false, true})
      cases.push_back(
          {str("linear forward ", makes ? "of what it makes " : "", shape),
           [s, makes](Side& side, DType cd) {
             const PlacedLinear p(side, cd, s);
             const Tensor x = side.zeros(cd, {s.t, s.i});
             LinearArgs args{
                 x, &p.weight, {}, p.adapters.sites, p.rows, side.zeros(cd, {s.t, s.n}), p.u};
             if (makes) args.make_x = {side.zeros(cd, {s.t, 2 * s.i}), x};
             side.backend.ops->linear_forward(side.exec, args);
           }});
    cases.push_back({"linear backward " + shape, [s](Side& side, DType cd) {
                       const PlacedLinear p(side, cd, s);
                       side.backend.ops->linear_backward(
                           side.exec,
                           {side.zeros(cd, {s.t, s.n}), side.zeros(cd, {s.t, s.i}), &p.weight,
                            p.adapters.sites, p.rows, p.u, side.zeros(cd, {s.t, s.i})});
                     }});
    cases.push_back(
        {"linear backward of what it makes " + shape, [s](Side& side, DType cd) {
           const PlacedLinear p(side, cd, s);
           const Tensor dy = side.zeros(cd, {s.t, s.n});
           LinearBackwardArgs args{
               dy, {}, &p.weight, p.adapters.sites, p.rows, p.u, side.zeros(cd, {s.t, s.i})};
           args.make_dy = {side.zeros(cd, {s.t, s.n / 2}), dy, dy};
           args.make_x.silu_mul.gate_up = side.zeros(cd, {s.t, 2 * s.i});
           side.backend.ops->linear_backward(side.exec, args);
           args.make_x = {.norm = {side.zeros(cd, {s.t, s.i}),
                                   {},
                                   side.zeros(cd, {s.i}),
                                   1e-5f,
                                   {},
                                   side.zeros(DType::kF32, {s.t})}};
           side.backend.ops->linear_backward(side.exec, args);
         }});
    cases.push_back(
        {"mlp backward " + shape, [s](Side& side, DType cd) {
           const LinearShapes before{s.t,     s.n / 2, s.i,        s.sites > 0 ? 1 : 0,
                                     s.slots, s.rank,  s.segments, s.dropout,
                                     s.save_u};
           const PlacedLinear down(side, cd, before), gate_up(side, cd, s);
           const Tensor both = side.zeros(cd, {s.t, s.n}), dact = side.zeros(cd, {s.t, s.n / 2});
           MlpBackwardArgs args{
               {side.zeros(cd, {s.t, s.i}),
                {},
                &down.weight,
                down.adapters.sites,
                gate_up.rows,
                down.u,
                dact},
               {both, side.zeros(cd, {s.t, s.i}), &gate_up.weight, gate_up.adapters.sites,
                gate_up.rows, gate_up.u, side.zeros(cd, {s.t, s.i})}};
           args.down.make_x.silu_mul.gate_up = both;
           args.gate_up.make_dy = {dact, both, both};
           side.backend.ops->mlp_backward(side.exec, args);
         }});
  }
}

void add_attention_cases(std::vector<Case>& cases) {
  struct Shapes {
    std::int64_t t, heads, kv_heads, d, sequences;
  };
  for (const Shapes& s : {Shapes{1, 1, 1, 8, 1}, {130, 9, 3, 64, 2}, {64, 4, 4, 128, 4}}) {
    const std::string shape = str("t", s.t, " heads", s.heads, " d", s.d);
    const AttentionSpec spec{s.heads, s.kv_heads, s.d, 0.1f};
    const std::int64_t width = (s.heads + 2 * s.kv_heads) * s.d, narrow = s.heads * s.d;
    const auto offsets = [s](Side& side) {
      std::vector<std::int32_t> at;
      for (std::int64_t j = 0; j <= s.sequences; ++j)
        at.push_back(static_cast<std::int32_t>(j * s.t / s.sequences));
      return side.ints(at);
    };
    cases.push_back({"attention forward " + shape, [=](Side& side, DType cd) {
                       side.backend.ops->attention_forward(
                           side.exec, {spec, side.zeros(cd, {s.t, width}), offsets(side), s.t,
                                       side.zeros(cd, {s.t, narrow}),
                                       side.zeros(DType::kF32, {s.t, s.heads})});
                     }});
    cases.push_back({"attention backward " + shape, [=](Side& side, DType cd) {
                       side.backend.ops->attention_backward(
                           side.exec,
                           {spec, side.zeros(cd, {s.t, narrow}), side.zeros(cd, {s.t, width}),
                            side.zeros(cd, {s.t, narrow}), side.zeros(DType::kF32, {s.t, s.heads}),
                            offsets(side), s.t, side.zeros(cd, {s.t, width})});
                     }});
    cases.push_back(
        {"paged attention " + shape, [=](Side& side, DType cd) {
           const std::int64_t blocks = (s.t + 15) / 16;
           const Shape cache_shape{blocks, s.kv_heads, 16, s.d};
           const KvCache cache{side.zeros(cd, cache_shape), side.zeros(cd, cache_shape), 16};
           const auto lens = std::vector<std::int32_t>(
               static_cast<std::size_t>(s.sequences),
               static_cast<std::int32_t>((s.t + s.sequences - 1) / s.sequences));
           side.backend.ops->paged_attention_forward(
               side.exec, {spec, side.zeros(cd, {s.t, width}), offsets(side), side.ints(lens),
                           side.zeros(DType::kI32, {s.sequences, blocks}), &cache, s.t,
                           side.zeros(cd, {s.t, narrow})});
         }});
  }
}

void add_loss_cases(std::vector<Case>& cases) {
  for (const std::int64_t t : {1, 40, 700})
    for (const bool backward : {false, true})
      cases.push_back(
          {str("cross entropy t", t, backward ? " backward" : ""), [=](Side& side, DType cd) {
             const PackedWeight w = side.weight(cd, 49'152, 8);
             side.backend.ops->linear_cross_entropy(side.exec,
                                                    {side.zeros(cd, {t, 8}),
                                                     &w,
                                                     side.zeros(DType::kI32, {t}),
                                                     1.0f,
                                                     side.zeros(DType::kF32, {t}),
                                                     {},
                                                     backward ? side.zeros(cd, {t, 8}) : Tensor{}});
           }});
  cases.push_back({"weight gradient", [](Side& side, DType cd) {
                     for (const std::int64_t n : {1, 40, 600})
                       side.backend.ops->linear_weight_grad(side.exec,
                                                            {side.zeros(cd, {70, n}),
                                                             side.zeros(cd, {70, 96}),
                                                             side.zeros(DType::kF32, {n, 96}),
                                                             {}});
                   }});
  cases.push_back({"logprob", [](Side& side, DType) {
                     side.backend.ops->logprob(
                         side.exec, {side.zeros(DType::kF32, {3, 100}),
                                     side.zeros(DType::kI32, {3}), side.zeros(DType::kF32, {3})});
                   }});
  cases.push_back({"sample", [](Side& side, DType) {
                     SampleArgs a;
                     a.logits = side.zeros(DType::kF32, {3, 1000});
                     a.temperature = a.top_p = a.min_p = a.logprob = side.zeros(DType::kF32, {3});
                     a.top_k = a.ids = side.zeros(DType::kI32, {3});
                     a.seed = a.position = side.zeros(DType::kI64, {3});
                     a.logprob = side.zeros(DType::kF32, {3});
                     a.ids = side.zeros(DType::kI32, {3});
                     side.backend.ops->sample(side.exec, a);
                   }});
}

void add_row_cases(std::vector<Case>& cases) {
  cases.push_back(
      {"embedding and gather", [](Side& side, DType cd) {
         const PackedWeight table = side.weight(cd, 5000, 300);
         side.backend.ops->embedding_forward(
             side.exec, {side.zeros(DType::kI32, {7}), &table, side.zeros(cd, {7, 300})});
         side.backend.ops->gather_rows(
             side.exec,
             {side.zeros(cd, {7, 300}), side.zeros(DType::kI32, {2}), side.zeros(cd, {2, 300})});
       }});
  cases.push_back({"norms", [](Side& side, DType cd) {
                     const Tensor w = side.zeros(cd, {64}), rstd = side.zeros(DType::kF32, {9});
                     side.backend.ops->add_rms_norm_forward(
                         side.exec, {side.zeros(cd, {9, 64}), side.zeros(cd, {9, 64}), w, 1e-5f,
                                     side.zeros(cd, {9, 64}), rstd});
                     side.backend.ops->rms_norm_backward(
                         side.exec, {side.zeros(cd, {9, 64}), side.zeros(cd, {9, 64}), w, rstd,
                                     side.zeros(cd, {9, 64}), side.zeros(DType::kF32, {64})});
                   }});
  cases.push_back(
      {"rope", [](Side& side, DType cd) {
         const Tensor positions = side.zeros(DType::kI32, {9});
         const Tensor freq = side.zeros(DType::kF32, {8});
         const Tensor qkv = side.zeros(cd, {9, 64});
         side.backend.ops->rope_forward(side.exec,
                                        {qkv, positions, freq, 1.0f, 2, 1, 16, nullptr, {}});
         side.backend.ops->rope_backward(side.exec, {qkv, positions, freq, 1.0f, 2, 1, 16});
       }});
  for (const std::int64_t t : {1, 64, 700})
    for (const bool trains : {false, true})
      cases.push_back(
          {str("rope with a norm of q and k, ", t, trains ? " rows, trained" : " rows"),
           [=](Side& side, DType cd) {
             const Tensor positions = side.zeros(DType::kI32, {t});
             const Tensor freq = side.zeros(DType::kF32, {32}), weight = side.zeros(cd, {128});
             const Tensor qkv = side.zeros(cd, {t, 256}), raw = side.zeros(cd, {t, 256});
             side.backend.ops->rope_forward(
                 side.exec,
                 {qkv, positions, freq, 1.0f, 2, 1, 64, nullptr, {}, weight, 1e-6f, raw});
             side.backend.ops->rope_backward(
                 side.exec, {qkv, positions, freq, 1.0f, 2, 1, 64, weight, 1e-6f, raw,
                             trains ? side.zeros(DType::kF32, {128}) : Tensor{}});
           }});
  cases.push_back({"silu", [](Side& side, DType cd) {
                     const Tensor wide = side.zeros(cd, {9, 64}), narrow = side.zeros(cd, {9, 32});
                     side.backend.ops->silu_mul_forward(side.exec, {wide, narrow});
                     side.backend.ops->silu_mul_backward(side.exec, {narrow, wide, wide});
                   }});
  cases.push_back(
      {"optimizer", [](Side& side, DType cd) {
         const Shape shape{200'000};
         const Tensor p = side.zeros(DType::kF32, shape), g = side.zeros(DType::kF32, shape);
         const Tensor m = side.zeros(DType::kF32, shape), v = side.zeros(DType::kF32, shape);
         const Tensor norm = side.zeros(DType::kF32, {1});
         side.backend.ops->squared_norm(side.exec, {{g, p, norm}, side.zeros(DType::kF32, {1})});
         side.backend.ops->adamw(side.exec, {p, g, m, v, side.zeros(cd, shape), norm, 1.0f, 1e-3f,
                                             0.9f, 0.99f, 1e-8f, 0.0f, 1});
       }});
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  add_row_cases(cases);
  add_linear_cases(cases);
  add_attention_cases(cases);
  add_loss_cases(cases);
  return cases;
}

TEST(Workspace, MetaBooksWhatTheCpuTakesByteForByte) {
  std::int64_t scratch_seen = 0;
  for (const int threads : {1, 2, 5})
    for (const DType cd : {DType::kF32, DType::kBF16})
      for (const Case& c : all_cases()) {
        Side cpu(make_cpu_backend({.threads = threads}));
        Side meta(make_meta_backend(cpu.backend.ops->profile()));
        c.run(cpu, cd);
        c.run(meta, cd);
        const std::string what = str(c.name, " ", dtype_name(cd), " threads ", threads);
        EXPECT_EQ(cpu.tensors.peak_used(), meta.tensors.peak_used()) << what;
        EXPECT_EQ(cpu.workspace.peak_used(), meta.workspace.peak_used()) << what;
        EXPECT_EQ(cpu.workspace.used(), 0) << what;
        for (int kind = 0; kind < kMemoryKindCount; ++kind)
          EXPECT_EQ(cpu.backend.ledger->peak(static_cast<MemoryKind>(kind)),
                    meta.backend.ledger->peak(static_cast<MemoryKind>(kind)))
              << what << " " << memory_kind_name(static_cast<MemoryKind>(kind));
        EXPECT_EQ(cpu.backend.ledger->peak_total(), meta.backend.ledger->peak_total()) << what;
        scratch_seen += cpu.workspace.peak_used();
      }
  EXPECT_GT(scratch_seen, 0);
}

TEST(Workspace, LossNeverHoldsAllLogits) {
  // 4,096 rows over SmolLM2's vocabulary would be 805 MB of f32 logits.
  Side meta(make_meta_backend(cpu_profile({.threads = 2})));
  const PackedWeight w = meta.weight(DType::kBF16, 49'152, 576);
  const std::int64_t t = 4096;
  meta.backend.ops->linear_cross_entropy(meta.exec, {meta.zeros(DType::kBF16, {t, 576}),
                                                     &w,
                                                     meta.zeros(DType::kI32, {t}),
                                                     1.0f,
                                                     meta.zeros(DType::kF32, {t}),
                                                     {},
                                                     meta.zeros(DType::kBF16, {t, 576})});
  EXPECT_LT(meta.workspace.peak_used(), 4 * t * 49'152 / 4);
}

TEST(Workspace, AnInputMadeWhereItIsReadTakesNoScratch) {
  DeviceProfile hopper;
  hopper.type = DeviceType::kCuda;
  hopper.compute_capability = 90;
  const std::int64_t t = 512, i = 256, n = 384, rank = 16;
  const auto scratch = [&](bool keep_u, bool by_recipe) {
    Side meta(make_meta_backend(hopper));
    const DType cd = DType::kBF16;
    const PackedWeight w = meta.weight(cd, n, i);
    const Adapters a = adapters(meta, cd, t, i, n, 2, 1, rank, 1, 0.0f);
    LinearBackwardArgs args{meta.zeros(cd, {t, n}),
                            by_recipe ? Tensor{} : meta.zeros(cd, {t, i}),
                            &w,
                            a.sites,
                            &a.rows,
                            keep_u ? meta.zeros(cd, {t, 2 * rank}) : Tensor{},
                            meta.zeros(cd, {t, i})};
    if (by_recipe) args.make_x.silu_mul.gate_up = meta.zeros(cd, {t, 2 * i});
    meta.backend.ops->linear_backward(meta.exec, args);
    return meta.workspace.peak_used();
  };
  EXPECT_EQ(scratch(true, true), scratch(true, false));
  // u wants x in memory.
  EXPECT_EQ(scratch(false, true), scratch(false, false) + t * i * 2);
}

TEST(Workspace, AnInputMadeInForwardIsNoOpOfItsOwnWhereOnePassMakesIt) {
  DeviceProfile hopper;
  hopper.type = DeviceType::kCuda;
  hopper.compute_capability = 90;
  const std::int64_t t = 512, i = 256, n = 384, rank = 16;
  const DType cd = DType::kBF16;
  const auto costs = [&](const DeviceProfile& profile, std::int64_t sites, float dropout) {
    std::vector<OpCost> seen;
    Side meta(make_meta_backend(profile, [&](const OpCost& cost) { seen.push_back(cost); }));
    const PackedWeight w = meta.weight(cd, n, i);
    const Adapters a = adapters(meta, cd, t, i, n, sites, 1, rank, 1, dropout);
    const Tensor x = meta.zeros(cd, {t, i}), y = meta.zeros(cd, {t, n});
    const Tensor gate_up = meta.zeros(cd, {t, 2 * i}), u = meta.zeros(cd, {t, sites * rank});
    seen.clear();  // what zeros() noted
    meta.backend.ops->linear_forward(meta.exec, {x, &w, {}, a.sites, &a.rows, y, u, {gate_up, x}});
    return seen;
  };
  const double linear = (t * i + n * i + t * n) * 2.0, activation = t * 3 * i * 2.0;
  const std::vector<OpCost> made = costs(hopper, 1, 0.0f);
  ASSERT_EQ(made.size(), 1U);
  EXPECT_EQ(made[0].bytes, linear + t * 2 * i * 2.0 + t * rank * 2.0);
  EXPECT_EQ(costs(hopper, 1, 0.1f).size(), 1U);
  EXPECT_EQ(costs(hopper, 3, 0.0f).size(), 1U);
  EXPECT_EQ(costs(hopper, 3, 0.1f).size(), 2U) << "a mask of each site";
  const std::vector<OpCost> apart = costs(cpu_profile({.threads = 1}), 1, 0.0f);
  ASSERT_EQ(apart.size(), 2U);
  EXPECT_EQ(apart[0].row_bytes, activation);
  EXPECT_EQ(apart[1].bytes, linear + t * rank * 2.0);
}

/// A server plans with the bound on segments, and its batches may be one segment.
TEST(Workspace, WhoHasRoomForManySegmentsHasItForOne) {
  DeviceProfile amx = cpu_profile({.threads = 2});
  amx.has_avx2 = amx.has_avx512 = amx.has_avx512_bf16 = amx.has_amx_bf16 = true;
  DeviceProfile hopper;
  hopper.type = DeviceType::kCuda;
  hopper.sm_count = 132;
  hopper.compute_capability = 90;
  for (const DeviceProfile& profile : {cpu_profile({.threads = 1}), amx, hopper})
    for (const DType cd : {DType::kF32, DType::kBF16})
      for (const std::int64_t t : {16, 300, 2048})
        for (const std::int64_t rank : {4, 64}) {
          Side meta(make_meta_backend(profile));
          const PackedWeight w = meta.weight(cd, 1152, 576);
          const auto bytes = [&](std::int64_t segments) {
            const Adapters a = adapters(meta, cd, t, 576, 1152, 2, 3, rank, segments, 0.0f);
            return workspace_bytes(LinearArgs{meta.zeros(cd, {t, 576}),
                                              &w,
                                              {},
                                              a.sites,
                                              &a.rows,
                                              meta.zeros(cd, {t, 1152}),
                                              {}},
                                   profile);
          };
          EXPECT_GE(bytes(5), bytes(1)) << "T " << t << ", rank " << rank;
        }
}

TEST(MetaBackend, DownloadsZerosAndNeverCallsFill) {
  Side meta(make_meta_backend(cpu_profile({.threads = 1})));
  const Tensor x = meta.tensors.alloc({3}, DType::kF32);
  float host[3] = {1.0f, 2.0f, 3.0f};
  meta.backend.ops->download(meta.exec, x, std::as_writable_bytes(std::span(host)));
  EXPECT_EQ(host[0] + host[1] + host[2], 0.0f);
  const PackedWeight w = meta.backend.ops->pack_weight(
      meta.exec, meta.tensors, DType::kF32, 100, 100,
      [](std::int64_t, std::int64_t, float*) { FAIL() << "the meta backend read a weight"; });
  EXPECT_EQ(w.storage.bytes(), meta.backend.ops->packed_weight_bytes(DType::kF32, 100, 100));
}

}  // namespace
}  // namespace tandem::kernels::testing
