// Packed and paged attention against the f64 reference, and against each other.
#include "tests/kernels/op_param.h"
#include "tests/kernels/reference.h"

#include <algorithm>
#include <cmath>

namespace tandem::kernels::testing {
namespace {

struct AttentionRow {
  std::int64_t heads, kv_heads, head_dim;
  std::vector<std::int32_t> offsets;
  std::int64_t inert;  ///< rows behind the last offset
  std::int64_t window;
  float soft_cap;
};
const AttentionRow kAttention[] = {
    {1, 1, 2, {0}, 0, 0, 0.0f},                      // no rows
    {1, 1, 8, {0}, 3, 0, 0.0f},                      // inert rows only
    {1, 1, 4, {0, 1}, 0, 0, 0.0f},                   // one token
    {3, 1, 12, {0, 5, 5, 12}, 2, 0, 0.0f},           // an empty sequence, odd sizes
    {9, 3, 64, {0, 33, 50}, 1, 0, 0.0f},             // SmolLM2's heads
    {4, 2, 32, {0, 70}, 0, 17, 0.0f},                // a window
    {4, 4, 16, {0, 20, 37}, 0, 0, 3.0f},             // a soft cap
    {2, 1, 128, {0, 150}, 0, 0, 0.0f},               // several blocks of keys
    {4, 2, 80, {0, 67, 131}, 5, 40, 5.0f},           // everything
    {16, 2, 64, {0, 1, 90, 300, 303}, 3, 70, 4.0f},  // the same in a head dim with fast kernels
    {12, 1, 128, {0, 40, 333}, 0, 0, 0.0f},          // a group wider than a tile of columns
};

class Attention : public OpTest {
 protected:
  static AttentionSpec spec(const AttentionRow& s) {
    return {s.heads,    s.kv_heads,
            s.head_dim, static_cast<float>(1.0 / std::sqrt(static_cast<double>(s.head_dim))),
            s.window,   s.soft_cap};
  }
  static std::int64_t tokens(const AttentionRow& s) { return s.offsets.back() + s.inert; }
  static std::int64_t width(const AttentionRow& s) {
    return (s.heads + 2 * s.kv_heads) * s.head_dim;
  }
  static std::int64_t longest(const std::vector<std::int32_t>& offsets) {
    std::int64_t n = 0;
    for (std::size_t j = 0; j + 1 < offsets.size(); ++j)
      n = std::max<std::int64_t>(n, offsets[j + 1] - offsets[j]);
    return n;
  }
  /// Larger than 1 so that probabilities are far from equal.
  static Values qkv(const AttentionRow& s, DType dtype) {
    return random_values(tokens(s) * width(s), dtype, 1, 1.5);
  }
  static Outputs packed(const AttentionRow& s, const Values& x,
                        Numerics numerics = Numerics::kInvariant) {
    const std::int64_t t = tokens(s);
    return run_op(backend(), [&](TestDevice& device) {
      device.exec().numerics = numerics;
      device.ops().attention_forward(
          device.exec(),
          {spec(s), device.input(x, dtype(), {t, width(s)}), device.ints(s.offsets),
           longest(s.offsets), device.output("out", dtype(), {t, s.heads * s.head_dim}),
           device.output("lse", DType::kF32, {t, s.heads})});
    });
  }
  /// In bf16 probabilities are rounded before they meet the values.
  static double out_tolerance(const AttentionRow& s) {
    return tolerance(dtype(), s.head_dim + longest(s.offsets), is_16_bit(dtype()) ? 2 : 4);
  }
};
TANDEM_OP_TEST(Attention, kAttention);

TEST_P(Attention, ForwardMatchesTheReferenceAndZeroesInertRows) {
  const AttentionRow& s = row(kAttention);
  const Values x = qkv(s, dtype());
  const AttentionResult want = attention(spec(s), x, s.offsets, tokens(s));
  for (const Numerics numerics : {Numerics::kInvariant, Numerics::kReplay}) {
    const Outputs got = packed(s, x, numerics);
    expect_close("out", got.at("out").values(), want.out, out_tolerance(s));
    const std::int64_t live = s.offsets.back();
    const Values lse = got.at("lse").values();
    expect_close("lse", Values(lse.begin(), lse.begin() + live * s.heads),
                 Values(want.lse.begin(), want.lse.begin() + live * s.heads),
                 tolerance(DType::kF32, s.head_dim, 8));
    const Values out = got.at("out").values();
    for (auto j = static_cast<std::size_t>(live * s.heads * s.head_dim); j < out.size(); ++j)
      ASSERT_EQ(out[j], 0.0);
  }
}

TEST_P(Attention, BackwardMatchesTheReferenceAndZeroesInertRows) {
  const AttentionRow& s = row(kAttention);
  const std::int64_t t = tokens(s);
  const Shape narrow{t, s.heads * s.head_dim};
  const Values x = qkv(s, dtype()), dout = random_values(narrow.elements(), dtype(), 2);
  const Outputs got = run_op(backend(), [&](TestDevice& device) {
    const Tensor in = device.input(x, dtype(), {t, width(s)});
    const Tensor offsets = device.ints(s.offsets);
    const Tensor out = device.output("out", dtype(), narrow);
    const Tensor lse = device.output("lse", DType::kF32, {t, s.heads});
    device.ops().attention_forward(device.exec(),
                                   {spec(s), in, offsets, longest(s.offsets), out, lse});
    device.ops().attention_backward(
        device.exec(), {spec(s), device.input(dout, dtype(), narrow), in, out, lse, offsets,
                        longest(s.offsets), device.output("dqkv", dtype(), {t, width(s)})});
  });
  const Values want = attention_backward(spec(s), dout, x, s.offsets, t);
  const Values dqkv = got.at("dqkv").values();
  // q, k and v gradients apart: one must not hide behind another. In bf16 probabilities, their
  // gradients and the forward's out were rounded on the way; in f32 exp amplifies its argument's
  // error by the size of the scores (about 8 here), and p (dp - mean) cancels.
  const double allowed =
      tolerance(dtype(), 4 * (s.head_dim + longest(s.offsets)), is_16_bit(dtype()) ? 5 : 64);
  const std::int64_t cuts[] = {0, s.heads * s.head_dim, (s.heads + s.kv_heads) * s.head_dim,
                               width(s)};
  const char* names[] = {"dq", "dk", "dv"};
  for (int part = 0; part < 3; ++part) {
    Values g, w;
    for (std::int64_t r = 0; r < t; ++r)
      for (std::int64_t j = cuts[part]; j < cuts[part + 1]; ++j) {
        g.push_back(dqkv[static_cast<std::size_t>(r * width(s) + j)]);
        w.push_back(want[static_cast<std::size_t>(r * width(s) + j)]);
      }
    // One token attends to itself alone: its dq and dk are 0, and rounding must not be judged
    // relative to that.
    if (longest(s.offsets) <= 1 && part < 2) continue;
    expect_close(names[part], g, w, allowed);
  }
  for (auto j = static_cast<std::size_t>(s.offsets.back() * width(s)); j < dqkv.size(); ++j)
    ASSERT_EQ(dqkv[j], 0.0) << "inert";
}

constexpr std::int64_t kBlockSize = 16;

/// Rows [q_begin[s], end) of every sequence as new rows over a cache that holds all of it, with
/// blocks in scattered order.
Outputs paged(const std::string& backend, DType dtype, const AttentionSpec& spec, const Values& qkv,
              const std::vector<std::int32_t>& offsets, const std::vector<std::int32_t>& first_new,
              std::int64_t inert, Numerics numerics = Numerics::kInvariant,
              std::int64_t block_size = kBlockSize) {
  const std::int64_t d = spec.head_dim, width = (spec.heads + 2 * spec.kv_heads) * d;
  const std::size_t sequences = offsets.size() - 1;
  std::vector<std::int32_t> q_offsets{0}, lens, table;
  std::int64_t longest = 0;
  for (std::size_t s = 0; s < sequences; ++s) {
    lens.push_back(offsets[s + 1] - offsets[s]);
    q_offsets.push_back(q_offsets.back() + lens.back() - first_new[s]);
    longest = std::max<std::int64_t>(longest, lens.back());
  }
  const std::int64_t blocks_max =
      std::max<std::int64_t>(1, (longest + block_size - 1) / block_size);
  const std::int64_t blocks = static_cast<std::int64_t>(sequences) * blocks_max + 1;
  const Shape cache_shape{blocks, spec.kv_heads, block_size, d};
  Values k(static_cast<std::size_t>(cache_shape.elements()), 1e30), v = k, q;
  for (std::size_t s = 0; s < sequences; ++s) {
    for (std::int64_t b = 0; b < blocks_max; ++b)  // from the end on: never block = index
      table.push_back(static_cast<std::int32_t>(
          blocks - 1 - (b * static_cast<std::int64_t>(sequences) + static_cast<std::int64_t>(s))));
    for (std::int64_t j = 0; j < lens[s]; ++j) {
      const std::int64_t block = table[s * static_cast<std::size_t>(blocks_max) +
                                       static_cast<std::size_t>(j / block_size)];
      for (std::int64_t h = 0; h < spec.kv_heads; ++h)
        for (std::int64_t e = 0; e < d; ++e) {
          const auto to = static_cast<std::size_t>(
              ((block * spec.kv_heads + h) * block_size + j % block_size) * d + e);
          const std::int64_t from = (offsets[s] + j) * width + (spec.heads + h) * d + e;
          k[to] = qkv[static_cast<std::size_t>(from)];
          v[to] = qkv[static_cast<std::size_t>(from + spec.kv_heads * d)];
        }
    }
    q.insert(q.end(), qkv.begin() + (offsets[s] + first_new[s]) * width,
             qkv.begin() + offsets[s + 1] * width);
  }
  const std::int64_t t = q_offsets.back() + inert;
  q.resize(static_cast<std::size_t>(t * width), 1.0);
  const Shape table_shape{static_cast<std::int64_t>(sequences), blocks_max};
  return run_op(backend, [&](TestDevice& device) {
    device.exec().numerics = numerics;
    const KvCache cache{device.input(k, dtype, cache_shape), device.input(v, dtype, cache_shape),
                        block_size};
    device.ops().paged_attention_forward(
        device.exec(), {spec, device.input(q, dtype, {t, width}), device.ints(q_offsets),
                        device.ints(lens), device.ints(table).reshaped(table_shape), &cache,
                        longest, device.output("out", dtype, {t, spec.heads * d})});
  });
}

TEST_P(Attention, PagedMatchesTheReferenceWhateverTheChunk) {
  const AttentionRow& s = row(kAttention);
  const Values x = qkv(s, dtype());
  const AttentionResult want = attention(spec(s), x, s.offsets, tokens(s));
  const Outputs whole = packed(s, x);
  const std::int64_t columns = s.heads * s.head_dim;
  for (const int chunk : {0, 1, 2}) {  // everything new, one row new, about a third new
    std::vector<std::int32_t> first_new;
    Values expected;
    std::vector<std::byte> bits;
    for (std::size_t q = 0; q + 1 < s.offsets.size(); ++q) {
      const std::int32_t len = s.offsets[q + 1] - s.offsets[q];
      first_new.push_back(chunk == 0 ? 0 : chunk == 1 ? std::max(0, len - 1) : len - (len + 2) / 3);
      const std::int64_t begin = s.offsets[q] + first_new.back(), end = s.offsets[q + 1];
      expected.insert(expected.end(), want.out.begin() + begin * columns,
                      want.out.begin() + end * columns);
      if (begin == end) continue;
      const auto part = whole.at("out").rows(begin, end - begin);
      bits.insert(bits.end(), part.begin(), part.end());
    }
    const Outputs got = paged(backend(), dtype(), spec(s), x, s.offsets, first_new, s.inert);
    Values out = got.at("out").values();
    for (std::size_t j = expected.size(); j < out.size(); ++j) ASSERT_EQ(out[j], 0.0) << "inert";
    out.resize(expected.size());
    expect_close("paged out", out, expected, out_tolerance(s));
    const Outputs replay =
        paged(backend(), dtype(), spec(s), x, s.offsets, first_new, s.inert, Numerics::kReplay);
    Values replayed = replay.at("out").values();
    for (std::size_t j = expected.size(); j < replayed.size(); ++j)
      ASSERT_EQ(replayed[j], 0.0) << "inert";
    replayed.resize(expected.size());
    expect_close("paged out, replay", replayed, expected, out_tolerance(s));
    if (dtype() != DType::kF32) continue;  // Invariant is promised in f32
    std::vector<std::byte> got_bits = got.at("out").bytes;
    got_bits.resize(bits.size());
    EXPECT_EQ(got_bits, bits) << "chunk " << chunk;
  }
}

TEST_P(Attention, SequencesInF32DoNotDependOnTheirNeighbours) {
  const AttentionRow& s = row(kAttention);
  if (dtype() != DType::kF32) return;
  const Values x = qkv(s, dtype());
  const Outputs all = packed(s, x);
  for (std::size_t q = 0; q + 1 < s.offsets.size(); ++q) {
    const std::int32_t begin = s.offsets[q], count = s.offsets[q + 1] - begin;
    if (count == 0) continue;
    AttentionRow one = s;
    one.offsets = {0, count};
    one.inert = 0;
    const Values part(x.begin() + begin * width(s), x.begin() + (begin + count) * width(s));
    EXPECT_EQ(packed(one, part).at("out").bytes, all.at("out").rows(begin, count)) << q;
  }
}

struct InvariantRow {
  std::int64_t heads, kv_heads, head_dim, window, block_size;
  float soft_cap;
};
const InvariantRow kInvariantRows[] = {
    {4, 1, 128, 0, 16, 0.0f},   // Llama 3's group
    {6, 2, 64, 0, 32, 0.0f},    // SmolLM2's
    {1, 1, 128, 0, 128, 0.0f},  // a block of the cache as large as a softmax step
    {20, 1, 64, 0, 64, 0.0f},   // a group wider than a tile of pairs
    {8, 1, 128, 200, 16, 0.0f}, {4, 1, 64, 0, 16, 5.0f}, {4, 2, 32, 0, 16, 0.0f},
};

class InvariantAttention : public Attention {};
TANDEM_OP_TEST(InvariantAttention, kInvariantRows);

/// Chunks of one sequence, as many sequences of one batch: whatever a chunk's size is and wherever
/// it ends, in whatever company, each row has the bits that the whole prompt in one piece gives it,
/// and (where training's kernel is what reads the cache) those that training gives it.
TEST_P(InvariantAttention, RowsDoNotDependOnTheirChunkOrTheirNeighbours) {
  if (backend() == "cpu") GTEST_SKIP() << "the cases above hold f32; bf16 promises Replay only";
  const InvariantRow& s = row(kInvariantRows);
  const AttentionSpec spec{s.heads,    s.kv_heads,
                           s.head_dim, static_cast<float>(1.0 / std::sqrt(double(s.head_dim))),
                           s.window,   s.soft_cap};
  constexpr std::int32_t kLength = 1130;
  const std::int64_t width = (s.heads + 2 * s.kv_heads) * s.head_dim;
  const Values x = random_values(kLength * width, dtype(), 1, 1.5);
  const auto run = [&](const std::vector<std::pair<std::int32_t, std::int32_t>>& chunks,
                       Numerics numerics = Numerics::kInvariant) {
    Values all;
    std::vector<std::int32_t> offsets{0}, first_new;
    for (const auto& [end, rows] : chunks) {
      all.insert(all.end(), x.begin(), x.begin() + end * width);
      offsets.push_back(offsets.back() + end);
      first_new.push_back(end - rows);
    }
    return paged(backend(), dtype(), spec, all, offsets, first_new, 3, numerics, s.block_size)
        .at("out");
  };
  const Output whole = run({{kLength, kLength}});
  expect_close("replay's", whole.values(), run({{kLength, kLength}}, Numerics::kReplay).values(),
               2 * tolerance(dtype(), s.head_dim + kLength, dtype() == DType::kBF16 ? 2 : 4));
  std::vector<std::pair<std::int32_t, std::int32_t>> chunks;
  for (const std::int32_t rows : {1, 2, 4, 5, 7, 17, 64, 65, 127, 128, 129, 1000})
    for (const std::int32_t end : {rows, 128, 129, 700, kLength})
      if (end >= rows && (end == rows || end == kLength || rows < 129))
        chunks.push_back({end, rows});
  const Output mixed = run(chunks);
  std::int64_t at = 0;
  for (const auto& [end, rows] : chunks) {
    EXPECT_EQ(mixed.rows(at, rows), whole.rows(end - rows, rows)) << rows << " rows to " << end;
    at += rows;
  }
  for (const std::int32_t end : {1, 700, kLength})  // alone: as a batch of decoding rows
    EXPECT_EQ(run({{end, 1}}).rows(0, 1), whole.rows(end - 1, 1)) << "row " << end - 1 << " alone";
  if (dtype() != DType::kBF16 || s.soft_cap != 0.0f || s.head_dim % 64 != 0) return;
  const AttentionRow train{s.heads, s.kv_heads, s.head_dim, {0, kLength}, 0, s.window, 0.0f};
  EXPECT_EQ(packed(train, x).at("out").bytes, whole.rows(0, kLength)) << "training's bits";
}

}  // namespace
}  // namespace tandem::kernels::testing
