#include "worker/runtime/adapter_codec.h"

#include "protocol/base/random.h"

#include <gtest/gtest.h>

namespace tandem::worker::runtime {
namespace {

model::ModelConfig config() {
  model::ModelConfig config;
  config.family = "llama";
  config.vocab = 32;
  config.width = 16;
  config.layers = 2;
  config.heads = 4;
  config.kv_heads = 2;
  config.head_dim = 4;
  config.mlp_width = 24;
  config.context_max = 64;
  return config;
}

std::vector<model::HostAdapterTensor> tensors(std::int64_t rank) {
  Random random(3);
  std::vector<model::HostAdapterTensor> list;
  for (std::int64_t layer = 0; layer < 2; ++layer)
    for (const model::Site site : {model::Site::kQ, model::Site::kDown}) {
      const auto shape = model::site_shape(config(), site);
      model::HostAdapterTensor t;
      t.layer = layer;
      t.site = site;
      t.rank = rank;
      t.scale = 2.0f;
      t.a.resize(static_cast<std::size_t>(rank * shape.i));
      t.b.resize(static_cast<std::size_t>(shape.n * rank));
      for (float& x : t.a) x = to_f32(to_bf16(random.normal()));
      for (float& x : t.b) x = to_f32(to_bf16(random.normal()));
      list.push_back(std::move(t));
    }
  return list;
}

/// Host tensors as one buffer of `dtype`.
std::shared_ptr<const model::FlatAdapter> flat(const std::vector<model::HostAdapterTensor>& list,
                                               DType dtype) {
  model::FlatAdapter adapter;
  for (const auto& t : list) adapter.layout.add(config(), t.layer, t.site, t.rank, t.scale);
  adapter.bytes.resize(static_cast<std::size_t>(adapter.layout.elements) * sizeof(float));
  auto* values = reinterpret_cast<float*>(adapter.bytes.data());
  for (std::size_t i = 0; i < list.size(); ++i) {
    std::copy(list[i].a.begin(), list[i].a.end(), values + adapter.layout.pairs[i].a_begin);
    std::copy(list[i].b.begin(), list[i].b.end(), values + adapter.layout.pairs[i].b_begin);
  }
  if (dtype != DType::kF32) adapter = adapter.in(dtype);
  return std::make_shared<const model::FlatAdapter>(std::move(adapter));
}

storage::PeftConfig peft(std::int64_t rank) {
  storage::PeftConfig config;
  config.r = rank;
  config.lora_alpha = 2.0 * static_cast<double>(rank);
  config.target_modules = {"down_proj", "q_proj"};
  return config;
}

const Digest kBase = sha256("base");

TEST(AdapterCodec, ARoundTripKeepsEveryBitThatTheDtypeHolds) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    const auto original = tensors(4);
    const auto packed = pack_adapter(kBase, peft(4), flat(original, dtype));
    ASSERT_TRUE(packed.ok()) << packed.status().to_string();
    const auto again = unpack_adapter(packed->manifest, kBase, config(), packed->fetch());
    ASSERT_TRUE(again.ok()) << again.status().to_string();
    ASSERT_EQ(again->size(), original.size());
    for (std::size_t i = 0; i < original.size(); ++i) {
      EXPECT_EQ((*again)[i].a, original[i].a);
      EXPECT_EQ((*again)[i].b, original[i].b);
      EXPECT_EQ((*again)[i].scale, 2.0f);
      EXPECT_EQ((*again)[i].rank, 4);
    }
  }
}

TEST(AdapterCodec, IdentityIsContent) {
  const auto one = pack_adapter(kBase, peft(4), flat(tensors(4), DType::kF32));
  const auto two = pack_adapter(kBase, peft(4), flat(tensors(4), DType::kF32));
  auto changed = tensors(4);
  changed.back().b.back() += 1.0f;
  const auto three = pack_adapter(kBase, peft(4), flat(changed, DType::kF32));
  EXPECT_EQ(one->digest, two->digest);
  EXPECT_NE(one->digest, three->digest);
}

TEST(AdapterCodec, RefusesValuesThatAreNotFinite) {
  auto bad = tensors(4);
  bad.back().b.back() = std::numeric_limits<float>::infinity();
  const auto packed = pack_adapter(kBase, peft(4), flat(bad, DType::kF32));
  const auto again = unpack_adapter(packed->manifest, kBase, config(), packed->fetch());
  ASSERT_FALSE(again.ok());
  EXPECT_NE(again.status().message().find("holds 1 values"), std::string::npos)
      << again.status().message();
}

TEST(AdapterCodec, RefusesAnotherBaseAndAnotherShape) {
  const auto packed = pack_adapter(kBase, peft(4), flat(tensors(4), DType::kF32));
  const auto other = unpack_adapter(packed->manifest, sha256("other"), config(), packed->fetch());
  ASSERT_FALSE(other.ok());
  EXPECT_EQ(other.status().code(), StatusCode::kConflict);
  auto wider = config();
  wider.width = 32;
  const auto shape = unpack_adapter(packed->manifest, kBase, wider, packed->fetch());
  ASSERT_FALSE(shape.ok());
  EXPECT_NE(shape.status().message().find("[16, 4]"), std::string::npos)
      << shape.status().message();
  auto shallow = config();
  shallow.layers = 1;
  const auto layers = unpack_adapter(packed->manifest, kBase, shallow, packed->fetch());
  ASSERT_FALSE(layers.ok());
  EXPECT_NE(layers.status().message().find("model.layers.1"), std::string::npos);
}

TEST(AdapterCodec, ACheckpointGivesBackItsStateAndItsAdapter) {
  auto packing = std::make_shared<train::TrainState>();
  train::TrainState& state = *packing;
  state.json = R"({"step":7})";
  for (const auto& t : tensors(4)) {
    const auto shape = model::site_shape(config(), t.site);
    const std::string path = model::site_path(t.layer, t.site);
    state.tensors.push_back({path + ".lora_A.param", {t.rank, shape.i}, t.a});
    state.tensors.push_back({path + ".lora_A.exp_avg", {t.rank, shape.i}, t.a});
    state.tensors.push_back({path + ".lora_B.param", {shape.n, t.rank}, t.b});
  }
  const auto config_of_job = peft(4);
  const auto packed = pack_checkpoint(kBase, &config_of_job, packing);
  ASSERT_TRUE(packed.ok()) << packed.status().to_string();
  const auto again = unpack_checkpoint(packed->manifest, kBase, packed->fetch());
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again->json, state.json);
  EXPECT_EQ(again->tensors.size(), state.tensors.size());
  const auto adapter = unpack_adapter(packed->manifest, kBase, config(), packed->fetch());
  ASSERT_TRUE(adapter.ok()) << adapter.status().to_string();
  EXPECT_EQ(adapter->size(), 4u);
}

}  // namespace
}  // namespace tandem::worker::runtime
