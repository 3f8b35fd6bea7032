// Values of a flat buffer, whole and in parts that begin and end anywhere.
#include "worker/model/flat_layout.h"

#include "kernels/cpu/cpu_backend.h"
#include "worker/model/host_copy.h"

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>

namespace tandem::worker::model {
namespace {

/// Each value tells its tensor, row and column; exact in f32.
float value_of(const std::string& name, std::int64_t row, std::int64_t column) {
  return static_cast<float>(std::hash<std::string>()(name) % 97 * 10'000 +
                            static_cast<std::size_t>(row * 100 + column));
}

class Source final : public TensorSource {
 public:
  explicit Source(const FlatLayout& layout) {
    for (const FlatTensor& t : layout.tensors)
      columns_[t.name] = t.shape.size() == 1 ? 1 : t.shape[1];
  }
  void read_rows(const std::string& name, std::int64_t row, std::int64_t rows,
                 float* out) const override {
    const std::int64_t columns = columns_.at(name);
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < columns; ++c) out[r * columns + c] = value_of(name, row + r, c);
    const std::lock_guard lock(mutex_);
    names_.insert(name);
    if (fails_ == name) throw std::runtime_error(name);
  }
  [[nodiscard]] Status has(const std::string&, std::int64_t, std::int64_t) const override {
    return {};
  }
  [[nodiscard]] std::set<std::string> take_names() const { return std::exchange(names_, {}); }
  void fail_at(const std::string& name) { fails_ = name; }

 private:
  std::map<std::string, std::int64_t> columns_;
  std::string fails_;
  mutable std::mutex mutex_;
  mutable std::set<std::string> names_;
};

ModelConfig some_config() {
  ModelConfig c;
  c.vocab = 40, c.width = 24, c.layers = 2, c.heads = 4, c.kv_heads = 2, c.head_dim = 6;
  c.mlp_width = 20, c.qkv_bias = true, c.qk_norm = true;
  return c;
}

class UploadFlat : public testing::Test {
 protected:
  std::vector<float> read(const Source& source, const FlatLayout& layout, std::int64_t begin,
                          std::int64_t count, DType dtype) {
    const kernels::ArenaScope scope(arena_);
    const auto to = arena_.alloc({count}, dtype);
    upload_flat(*backend_.ops, exec_, source, layout, begin, to);
    return download_floats(*backend_.ops, exec_, to);
  }

  kernels::Backend backend_ = kernels::make_cpu_backend({2, 0});
  kernels::Arena arena_{*backend_.allocator, *backend_.ledger, kernels::MemoryKind::kActivations,
                        "flat", std::int64_t{1} << 24};
  kernels::Exec exec_{arena_};
};

TEST_F(UploadFlat, PartsHaveWhatTheWholeHasThere) {
  for (int rank = 0; rank < 2; ++rank) {
    const FlatLayout layout = block_layout(some_config(), {rank, 2}, 1);
    const Source source(layout);
    std::vector<float> want(static_cast<std::size_t>(layout.elements), 0.0f);
    for (const FlatTensor& t : layout.tensors)
      for (std::int64_t e = 0; e < t.slice.elements(); ++e)
        want[static_cast<std::size_t>(t.begin + e)] =
            value_of(t.name, t.slice.row + e / t.slice.columns,
                     t.shape.size() == 1 ? 0 : t.slice.column + e % t.slice.columns);
    EXPECT_EQ(read(source, layout, 0, layout.elements, DType::kF32), want);
    for (const std::int64_t part : {std::int64_t{1}, std::int64_t{7}, std::int64_t{333}})
      for (std::int64_t begin = 0; begin < layout.elements; begin += 5 * part + 11) {
        std::vector<float> there(want.begin() + begin,
                                 want.begin() + std::min(begin + part, layout.elements));
        there.resize(static_cast<std::size_t>(part), 0.0f);  // behind the end: zeros
        ASSERT_EQ(read(source, layout, begin, part, DType::kF32), there) << begin << " " << part;
        ASSERT_EQ(read(source, layout, begin, part, DType::kF64), there) << begin << " " << part;
        for (float& value : there) value = rounded(value, DType::kBF16);
        ASSERT_EQ(read(source, layout, begin, part, DType::kBF16), there) << begin << " " << part;
      }
  }
}

TEST(BlockViews, FindEveryStackWhateverTheModelHas) {
  for (const bool bias : {false, true})
    for (const bool norms : {false, true}) {
      ModelConfig c = some_config();
      c.qkv_bias = bias, c.qk_norm = norms;
      for (int rank = 0; rank < 2; ++rank) {
        const FlatLayout layout = block_layout(c, {rank, 2}, 1);
        std::vector<float> memory(static_cast<std::size_t>(layout.elements));
        const kernels::Tensor flat{memory.data(), DType::kF32, {layout.elements}};
        const BlockGrads views = block_views(layout, flat);
        const auto at = [&](const std::string& name) {
          const FlatTensor* tensor = layout.find(name);
          return tensor == nullptr ? nullptr : memory.data() + tensor->begin;
        };
        EXPECT_EQ(views.qkv.data, at(weight_name(1, Site::kQ)));
        EXPECT_EQ(views.qkv_bias.data, at(bias_name(1, Site::kQ)));
        EXPECT_EQ(views.qk_norm.data, at(q_norm_name(1)));
        EXPECT_EQ(views.o.data, at(weight_name(1, Site::kO)));
        EXPECT_EQ(views.gate_up.data, at(weight_name(1, Site::kGate)));
        EXPECT_EQ(views.down.data, at(weight_name(1, Site::kDown)));
        if (!norms) continue;
        // Both whole on each rank, one stack, addends of a sum that one rank counts.
        EXPECT_EQ(views.qk_norm.shape, (kernels::Shape{2 * c.head_dim}));
        EXPECT_EQ(at(k_norm_name(1)), at(q_norm_name(1)) + c.head_dim);
        for (const std::string& name : {q_norm_name(1), k_norm_name(1)}) {
          EXPECT_TRUE(layout.find(name)->is_whole()) << name;
          EXPECT_TRUE(layout.find(name)->partial) << name;
          EXPECT_EQ(layout.find(name)->counted, rank == 0) << name;
          EXPECT_FALSE(block_layout(c, {}, 1).find(name)->partial) << name;
        }
      }
    }
}

TEST_F(UploadFlat, ReadsNoTensorThatHasNoPartInIt) {
  const FlatLayout layout = block_layout(some_config(), {}, 0);
  const Source source(layout);
  const FlatTensor& gate = *layout.find(weight_name(0, Site::kGate));
  (void)read(source, layout, gate.begin + 3, 2, DType::kF32);
  EXPECT_EQ(source.take_names(), std::set{gate.name});
}

TEST_F(UploadFlat, WhatASourceThrowsComesOut) {
  const FlatLayout layout = block_layout(some_config(), {}, 0);
  Source source(layout);
  source.fail_at(weight_name(0, Site::kUp));
  EXPECT_THROW((void)read(source, layout, 0, layout.elements, DType::kF32), std::runtime_error);
}

}  // namespace
}  // namespace tandem::worker::model
