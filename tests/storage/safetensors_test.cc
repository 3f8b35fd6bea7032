#include "storage/safetensors.h"

#include "protocol/base/random.h"
#include "storage/file_io.h"
#include "tests/storage/scratch.h"

#include <gtest/gtest.h>

#include <cstring>

namespace tandem::storage {
namespace {

std::string file(const std::string& header, std::size_t data_bytes) {
  const std::uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + header +
         std::string(data_bytes, '\x2a');
}

Result<Safetensors> parse(const std::string& bytes) {
  std::vector<std::byte> copy(bytes.size());
  if (!bytes.empty()) std::memcpy(copy.data(), bytes.data(), bytes.size());
  return Safetensors::parse(MappedFile::of_bytes(std::move(copy), "test.safetensors"));
}

std::string tensor(const std::string& name, const std::string& dtype, const std::string& shape,
                   const std::string& offsets) {
  return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" +
         offsets + "}";
}
const std::string kGood = "{" + tensor("a", "F32", "[2,3]", "[0,24]") + "," +
                          tensor("b", "BF16", "[2]", "[24,28]") +
                          R"(,"__metadata__":{"format":"pt"}})";

TEST(Safetensors, ReadsTensorsAndMetadata) {
  const auto file_ = parse(file(kGood, 28));
  ASSERT_TRUE(file_.ok()) << file_.status().to_string();
  ASSERT_EQ(file_->tensors().size(), 2u);
  EXPECT_EQ(file_->find("a")->shape, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(file_->find("b")->dtype, DType::kBF16);
  EXPECT_EQ(file_->find("b")->bytes.size(), 4u);
  EXPECT_EQ(file_->find("c"), nullptr);
  EXPECT_EQ(file_->metadata().at("format"), "pt");
}

TEST(Safetensors, ReadsWhatTheReferenceWritesAndWritesTheSameBytes) {
  const std::string path =
      std::string(TANDEM_SOURCE_DIR) + "/tests/golden/storage_reference.safetensors";
  const auto reference = Safetensors::open(path);
  ASSERT_TRUE(reference.ok()) << reference.status().to_string();
  EXPECT_EQ(reference->tensors().size(), 6u);
  EXPECT_EQ(reference->find("empty")->shape, (std::vector<std::int64_t>{0, 4}));
  EXPECT_EQ(reference->find("scalar")->numel(), 1);
  double scalar = 0;
  std::memcpy(&scalar, reference->find("scalar")->bytes.data(), 8);
  EXPECT_EQ(scalar, 2.5);

  const auto encoded = encode_safetensors(reference->tensors(), reference->metadata());
  ASSERT_TRUE(encoded.ok()) << encoded.status().to_string();
  const std::string want = read_bytes(path);
  ASSERT_EQ(encoded->size(), want.size());
  EXPECT_EQ(std::memcmp(encoded->data(), want.data(), want.size()), 0);

  Scratch scratch;
  ASSERT_TRUE(
      write_safetensors(scratch / "out.safetensors", reference->tensors(), reference->metadata())
          .ok());
  EXPECT_EQ(read_bytes(scratch / "out.safetensors"), want);
}

TEST(Safetensors, TensorsOutliveTheReader) {
  std::span<const std::byte> bytes;
  Safetensors copy = [&] {
    const auto first = parse(file(kGood, 28)).value();
    bytes = first.find("a")->bytes;
    return first;
  }();
  EXPECT_EQ(std::to_integer<int>(bytes[23]), 0x2a);
}

TEST(Safetensors, RefusesEveryTruncationWithBothSizes) {
  const std::string whole = file(kGood, 28);
  for (std::size_t n = 0; n < whole.size(); ++n) {
    const auto cut = parse(whole.substr(0, n));
    ASSERT_EQ(cut.status().code(), StatusCode::kCorrupt) << n;
    EXPECT_NE(cut.status().message().find("truncated"), std::string::npos)
        << n << cut.status().message();
  }
  const auto cut = parse(whole.substr(0, whole.size() - 1)).status().message();
  EXPECT_NE(cut.find("tensor b: ends at byte 28 of the data, but the file has only 27"),
            std::string::npos)
      << cut;
}

TEST(Safetensors, RefusesBadHeaders) {
  struct Case {
    const char* what;
    std::string header;
    std::size_t data;
    const char* says;
  };
  const std::vector<Case> cases{
      {"not an object", "[]", 0, "does not begin with {"},
      {"leading space", " {}", 0, "does not begin with {"},
      {"empty", "", 0, "does not begin with {"},
      {"not JSON", "{\"a\"", 0, "not valid JSON"},
      {"two values", "{}{}", 0, "not valid JSON"},
      {"a number as tensor", R"({"a":1})", 0, "unexpected a number"},
      {"a string as tensor", R"({"a":"x"})", 0, "unexpected a string"},
      {"unknown field", R"({"a":{"dtype":"F32","shape":[],"data_offsets":[0,4],"x":1}})", 4,
       "unexpected a number at tensor a, x"},
      {"missing field", R"({"a":{"dtype":"F32","shape":[]}})", 0,
       "needs dtype, shape and two data_offsets"},
      {"field twice", R"({"a":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}})", 4,
       "unexpected a string"},
      {"shape twice", R"({"a":{"dtype":"F32","shape":[],"shape":[1],"data_offsets":[0,4]}})", 4,
       "unexpected a list"},
      {"name twice",
       "{" + tensor("a", "F32", "[1]", "[0,4]") + "," + tensor("a", "F32", "[1]", "[4,8]") + "}", 8,
       "tensor a appears twice"},
      {"metadata not strings", R"({"__metadata__":{"a":1}})", 0,
       "unexpected a number at __metadata__, a"},
      {"metadata twice", R"({"__metadata__":{},"__metadata__":{}})", 0, "__metadata__ twice"},
      {"nested", R"({"a":{"shape":[[1]]}})", 0, "unexpected a list"},
      {"three offsets", "{" + tensor("a", "F32", "[1]", "[0,4,8]") + "}", 8, "two data_offsets"},
      {"negative offset", "{" + tensor("a", "F32", "[1]", "[-4,0]") + "}", 8, "a negative number"},
      {"fraction", "{" + tensor("a", "F32", "[1.5]", "[0,4]") + "}", 8, "a fraction"},
      {"reversed", "{" + tensor("a", "F32", "[1]", "[4,0]") + "}", 8, "reversed offsets 4 > 0"},
      {"overlap",
       "{" + tensor("a", "F32", "[2]", "[0,8]") + "," + tensor("b", "F32", "[2]", "[4,12]") + "}",
       12, "inside the tensor before it"},
      {"hole",
       "{" + tensor("a", "F32", "[1]", "[0,4]") + "," + tensor("b", "F32", "[1]", "[8,12]") + "}",
       12, "after a hole"},
      {"hole at the start", "{" + tensor("a", "F32", "[1]", "[4,8]") + "}", 8, "after a hole"},
      {"bytes left over", "{" + tensor("a", "F32", "[1]", "[0,4]") + "}", 8,
       "end at byte 4 but the data has 8"},
      {"wrong size", "{" + tensor("a", "F32", "[2]", "[0,4]") + "}", 4,
       "need 8 bytes, offsets give 4"},
      {"overflow", "{" + tensor("a", "F32", "[4294967296,4294967296]", "[0,4]") + "}", 4,
       "overflows"},
      {"overflow to zero", "{" + tensor("a", "F32", "[4611686018427387904,4]", "[0,0]") + "}", 0,
       "overflows"},
      {"overflow hidden by zero",
       "{" + tensor("a", "F32", "[4611686018427387904,4,0]", "[0,0]") + "}", 0, "overflows"},
      {"64-bit number", "{" + tensor("a", "F32", "[18446744073709551615]", "[0,4]") + "}", 4,
       "leaves 63 bits"},
      {"nine dimensions", "{" + tensor("a", "F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]") + "}", 4,
       "more than 8 numbers"},
      {"bad UTF-8", "{\"\xff\":{}}", 0, "not valid JSON"},
  };
  for (const Case& c : cases) {
    const auto bad = parse(file(c.header, c.data));
    ASSERT_EQ(bad.status().code(), StatusCode::kCorrupt) << c.what;
    EXPECT_NE(bad.status().message().find(c.says), std::string::npos)
        << c.what << ": " << bad.status().message();
  }
  const auto unsupported = parse(file("{" + tensor("a", "F8_E4M3", "[1]", "[0,1]") + "}", 1));
  EXPECT_EQ(unsupported.status().code(), StatusCode::kRefused);
  std::string huge(16, '\0');
  huge[4] = 1;  // 4 GiB of header
  EXPECT_NE(parse(huge).status().message().find("the limit is 100000000"), std::string::npos);
}

TEST(Safetensors, MutationsNeverCrashAndNeverReadOutside) {
  const std::string whole = file(kGood, 28);
  Random random(2);
  int accepted = 0;
  for (int round = 0; round < 30000; ++round) {
    std::string mutated = whole;
    for (std::uint64_t n = random.below(3) + 1; n > 0; --n) {
      const std::size_t at = random.below(mutated.size());
      if (random.below(3) == 0)
        mutated.erase(at, 1);
      else if (random.below(2) == 0)
        mutated[at] = "0123456789{}[],:\"\\"[random.below(18)];
      else
        mutated[at] = static_cast<char>(random.next());
    }
    const auto parsed = parse(mutated);
    if (!parsed.ok()) continue;
    ++accepted;
    for (const TensorInfo& t : parsed->tensors()) {
      ASSERT_EQ(t.numel() * dtype_bytes(t.dtype), static_cast<std::int64_t>(t.bytes.size()));
      for (std::byte b : t.bytes) (void)std::to_integer<int>(b);
    }
  }
  EXPECT_GT(accepted, 100);
}

TEST(Safetensors, ReadsShardsByTheirIndex) {
  Scratch scratch;
  const std::vector<std::byte> four(4);
  const TensorInfo a{"a", DType::kF32, {1}, four}, b{"b", DType::kF32, {1}, four};
  ASSERT_TRUE(write_safetensors(scratch / "one.safetensors", std::vector{a}, {}).ok());
  ASSERT_TRUE(write_safetensors(scratch / "two.safetensors", std::vector{b}, {}).ok());
  auto index = [&](const std::string& map) {
    write_bytes(scratch / "model.safetensors.index.json", R"({"weight_map":)" + map + "}");
  };
  index(R"({"a":"one.safetensors","b":"two.safetensors"})");
  const auto both = Safetensors::open_folder(scratch.path());
  ASSERT_TRUE(both.ok()) << both.status().to_string();
  EXPECT_EQ(both->tensors().size(), 2u);
  EXPECT_EQ(both->paths().size(), 2u);

  for (const char* bad : {R"({"a":"one.safetensors","b":"one.safetensors"})",
                          R"({"a":"one.safetensors","b":"two.safetensors","c":"two.safetensors"})",
                          R"({"a":"../one.safetensors"})", R"({"a":1})", "{}", "[]",
                          R"({"a":"one.safetensors","a":"two.safetensors"})"}) {
    index(bad);
    EXPECT_EQ(Safetensors::open_folder(scratch.path()).status().code(), StatusCode::kCorrupt)
        << bad;
  }
  index(R"({"a":"three.safetensors"})");
  EXPECT_EQ(Safetensors::open_folder(scratch.path()).status().code(), StatusCode::kNotFound);
}

TEST(Safetensors, OpensAFoldersOnlyFile) {
  Scratch scratch;
  EXPECT_EQ(Safetensors::open_folder(scratch.path()).status().code(), StatusCode::kNotFound);
  const std::vector<std::byte> four(4);
  const TensorInfo a{"a", DType::kF32, {1}, four};
  ASSERT_TRUE(write_safetensors(scratch / "x.safetensors", std::vector{a}, {}).ok());
  EXPECT_TRUE(Safetensors::open_folder(scratch.path()).ok());
  ASSERT_TRUE(write_safetensors(scratch / "y.safetensors", std::vector{a}, {}).ok());
  EXPECT_EQ(Safetensors::open_folder(scratch.path()).status().code(), StatusCode::kInvalid);
}

TEST(Safetensors, TheWriterRefusesWhatTheReaderWould) {
  const std::vector<std::byte> four(4);
  const TensorInfo good{"a", DType::kF32, {1}, four};
  EXPECT_TRUE(encode_safetensors(std::vector{good}, {}).ok());
  EXPECT_FALSE(encode_safetensors(std::vector{good, good}, {}).ok());
  EXPECT_FALSE(encode_safetensors(std::vector{TensorInfo{"a", DType::kF32, {2}, four}}, {}).ok());
  EXPECT_FALSE(encode_safetensors(std::vector{TensorInfo{"a", DType::kF32, {-1}, four}}, {}).ok());
  EXPECT_FALSE(
      encode_safetensors(std::vector{TensorInfo{"\xff", DType::kF32, {1}, four}}, {}).ok());
  EXPECT_FALSE(
      encode_safetensors(std::vector{TensorInfo{"__metadata__", DType::kF32, {1}, four}}, {}).ok());
}

}  // namespace
}  // namespace tandem::storage
