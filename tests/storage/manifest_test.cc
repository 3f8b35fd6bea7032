#include "storage/manifest.h"

#include "protocol/base/random.h"

#include <gtest/gtest.h>

#include <cstring>

namespace tandem::storage {
namespace {

Manifest example() {
  const std::vector<std::byte> bytes(24, std::byte{7});
  Manifest manifest;
  manifest.settings_json = R"({ "r": 16, "base_model": "x", "alpha": 0.1 })";
  manifest.tensors = {describe_tensor("b", "f32", {2, 3}, bytes),
                      describe_tensor("a", "bf16", {12}, bytes)};
  return manifest;
}

TEST(Manifest, HasOneCanonicalText) {
  const std::string text = encode_manifest(example()).value();
  Manifest other = example();
  std::swap(other.tensors[0], other.tensors[1]);
  other.settings_json = R"({"alpha":0.1,"base_model":"x","r":16})";
  EXPECT_EQ(encode_manifest(other).value(), text);
  const std::string digest = sha256(std::string(24, '\x07')).hex();
  const std::string root = content_root(std::vector<std::byte>(24, std::byte{7})).hex();
  const std::string tail = R"(],"dtype":"bf16","name":"a","root":")" + root + R"(","shape":[12]},)";
  EXPECT_TRUE(text.starts_with(
      R"({"format":1,"kind":"adapter","settings":{"alpha":0.1,"base_model":"x","r":16},)"
      R"("tensors":[{"bytes":24,"chunks":[")" +
      digest + "\"" + tail))
      << text;
}

TEST(Manifest, IdentityChangesWithEverythingThatMatters) {
  const Digest digest = manifest_digest(encode_manifest(example()).value());
  auto changed = [&](auto change) {
    Manifest m = example();
    change(m);
    return manifest_digest(encode_manifest(m).value());
  };
  EXPECT_NE(changed([](Manifest& m) { m.kind = ManifestKind::kCheckpoint; }), digest);
  EXPECT_NE(changed([](Manifest& m) { m.settings_json = R"({"r":17})"; }), digest);
  EXPECT_NE(changed([](Manifest& m) { m.tensors[0].name = "c"; }), digest);
  EXPECT_NE(changed([](Manifest& m) { m.tensors[0].dtype = "i32"; }), digest);
  EXPECT_NE(changed([](Manifest& m) { m.tensors[0].shape = {3, 2}; }), digest);
  EXPECT_NE(changed([](Manifest& m) {
              m.tensors[0] = describe_tensor("b", "f32", {2, 3}, std::vector<std::byte>(24));
            }),
            digest);
}

TEST(Manifest, RoundTrips) {
  const std::string text = encode_manifest(example()).value();
  const auto manifest = parse_manifest(text);
  ASSERT_TRUE(manifest.ok()) << manifest.status().to_string();
  EXPECT_EQ(encode_manifest(*manifest).value(), text);
  EXPECT_EQ(manifest->find("b")->shape, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(manifest->bytes(), 48);
}

TEST(Manifest, NamesItsChunksWithoutBeingParsed) {
  Manifest manifest;
  manifest.settings_json = R"({"chunks":["no digest"],"r":1})";
  std::vector<Digest> expected;
  for (const int count : {0, 1, 3}) {
    std::vector<Digest> chunks;
    for (int i = 0; i < count; ++i) chunks.push_back(sha256(str(count, "/", i)));
    expected.insert(expected.end(), chunks.begin(), chunks.end());
    manifest.tensors.push_back(
        describe_hashed(str(count, R"("chunks":["x)"), "u8",
                        {std::max(0, count - 1) * kDigestLeafBytes + (count > 0)},
                        std::max(0, count - 1) * kDigestLeafBytes + (count > 0), chunks));
  }
  for (const char* settings : {R"({"chunks":["no digest"],"r":1})", "{}"}) {
    manifest.settings_json = settings;
    const std::string text = encode_manifest(manifest).value();
    EXPECT_EQ(manifest_chunks(text).value(), expected) << text;
    for (std::size_t cut = 0; cut < text.size(); ++cut)
      (void)manifest_chunks(text.substr(0, cut));  // reads nothing beyond it
  }
  EXPECT_FALSE(manifest_chunks("").ok());
}

TEST(Manifest, LeavesMatchTheContentRootAtAnyThreadCount) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(2 * kDigestLeafBytes) + 3);
  for (std::size_t i = 0; i < bytes.size(); i += 4097) bytes[i] = static_cast<std::byte>(i >> 12);
  const auto shape = std::vector<std::int64_t>{static_cast<std::int64_t>(bytes.size())};
  const ManifestTensor one = describe_tensor("t", "u8", shape, bytes, 1),
                       three = describe_tensor("t", "u8", shape, bytes, 3);
  EXPECT_EQ(one.chunks.size(), 3u);
  EXPECT_EQ(one.root, content_root(bytes));
  EXPECT_EQ(one.chunks, three.chunks);
  EXPECT_TRUE(describe_tensor("t", "u8", {0}, {}).chunks.empty());
}

TEST(Manifest, RefusesContradictions) {
  auto refused = [](auto change) {
    Manifest m = example();
    change(m);
    return encode_manifest(m).status().code() == StatusCode::kInvalid;
  };
  EXPECT_TRUE(refused([](Manifest& m) { m.tensors[0].bytes = 23; }));
  EXPECT_TRUE(refused([](Manifest& m) { m.tensors[0].shape = {7}; }));
  EXPECT_TRUE(refused([](Manifest& m) { m.tensors[0].shape = {-2, -3}; }));
  EXPECT_TRUE(refused([](Manifest& m) { m.tensors[0].dtype = "f33"; }));
  EXPECT_TRUE(refused([](Manifest& m) { m.tensors[0].chunks.clear(); }));
  EXPECT_TRUE(refused([](Manifest& m) { m.tensors[0].root.bytes[0] ^= 1; }));
  EXPECT_TRUE(refused([](Manifest& m) { m.tensors[0].name = "a"; }));
  EXPECT_TRUE(refused([](Manifest& m) { m.tensors[0].name = ""; }));
  EXPECT_TRUE(refused([](Manifest& m) { m.settings_json = "[]"; }));
  EXPECT_TRUE(refused([](Manifest& m) { m.settings_json = "{"; }));
  EXPECT_TRUE(refused([](Manifest& m) { m.settings_json = R"({"a":1,"a":2})"; }));
}

TEST(Manifest, RefusesNumbersThatAreNotWhole) {
  const std::string text = encode_manifest(example()).value();
  for (const char* field : {"\"format\":", "\"bytes\":", "\"shape\":["})
    for (const char* number : {"5e70", "1.5", "-1e300", "18446744073709551615"}) {
      std::string other = text;
      const std::size_t begin = other.find(field) + std::strlen(field);
      other.replace(begin, other.find_first_not_of("0123456789", begin) - begin, number);
      const Status status = parse_manifest(other).status();
      EXPECT_EQ(status.code(), StatusCode::kCorrupt) << other;
      EXPECT_NE(status.message().find("is no whole number"), std::string::npos) << status.message();
    }
}

TEST(Manifest, ParsesOnlyTheCanonicalText) {
  const std::string text = encode_manifest(example()).value();
  for (const std::string& other :
       {" " + text, text + "\n", std::string("{}"), std::string("null"), std::string()})
    EXPECT_EQ(parse_manifest(other).status().code(), StatusCode::kCorrupt) << other;
  Random random(3);
  for (int round = 0; round < 5000; ++round) {
    std::string mutated = text;
    mutated[random.below(mutated.size())] = static_cast<char>(random.next());
    if (mutated == text) continue;
    const auto parsed = parse_manifest(mutated);
    if (parsed.ok()) {
      ASSERT_EQ(encode_manifest(*parsed).value(),
                mutated);  // another manifest, not another text of this one
    }
  }
}

}  // namespace
}  // namespace tandem::storage
