#include "storage/gguf.h"

#include "protocol/base/random.h"
#include "tests/storage/scratch.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <sstream>

namespace tandem::storage {
namespace {

// -- a small writer, so that every field can be made wrong --------------------

template <class T>
std::string number(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}
std::string text(const std::string& value) {
  return number<std::uint64_t>(value.size()) + value;
}
std::string key(const std::string& name, std::uint32_t type, const std::string& payload) {
  return text(name) + number(type) + payload;
}
std::string tensor(const std::string& name, const std::vector<std::uint64_t>& dimensions,
                   std::uint32_t type, std::uint64_t offset) {
  std::string out = text(name) + number(static_cast<std::uint32_t>(dimensions.size()));
  for (auto d : dimensions) out += number(d);
  return out + number(type) + number(offset);
}
std::string file(const std::vector<std::string>& keys, const std::vector<std::string>& tensors,
                 std::size_t data_bytes, std::uint32_t version = 3) {
  std::string out = "GGUF" + number(version) + number<std::uint64_t>(tensors.size()) +
                    number<std::uint64_t>(keys.size());
  for (const auto& k : keys) out += k;
  for (const auto& t : tensors) out += t;
  out.resize((out.size() + 31) / 32 * 32);
  return out + std::string(data_bytes, '\x01');
}

Result<Gguf> parse(const std::string& bytes) {
  std::vector<std::byte> copy(bytes.size());
  if (!bytes.empty()) std::memcpy(copy.data(), bytes.data(), bytes.size());
  return Gguf::parse(MappedFile::of_bytes(std::move(copy), "test.gguf"));
}

std::vector<std::string> tokenizer_keys() {
  return {
      key("general.architecture", 8, text("llama")),
      key("llama.block_count", 4, number<std::uint32_t>(30)),
      key("llama.rope.freq_base", 6, number(1e5f)),
      key("signed", 5, number<std::int32_t>(-3)),
      key("large", 10, number<std::uint64_t>(~0ull)),
      key("flag", 7, std::string(1, '\x01')),
      key("tokenizer.ggml.model", 8, text("gpt2")),
      key("tokenizer.ggml.tokens", 9,
          number<std::uint32_t>(8) + number<std::uint64_t>(3) + text("a") + text("b") + text("")),
      key("tokenizer.ggml.token_type", 9,
          number<std::uint32_t>(5) + number<std::uint64_t>(3) + number<std::int32_t>(1) +
              number<std::int32_t>(3) + number<std::int32_t>(1)),
      key("tokenizer.ggml.eos_token_id", 4, number<std::uint32_t>(2))};
}
const std::vector<std::string> kTensors{tensor("w", {32, 2}, 8, 0), tensor("v", {4}, 0, 96)};
std::string good() {
  return file(tokenizer_keys(), kTensors, 96 + 16);
}

TEST(Gguf, ReadsMetadataOfEveryKind) {
  const auto gguf = parse(good());
  ASSERT_TRUE(gguf.ok()) << gguf.status().to_string();
  EXPECT_EQ(gguf->architecture().value(), "llama");
  EXPECT_EQ(gguf->integer("llama.block_count").value(), 30);
  EXPECT_EQ(gguf->integer("signed").value(), -3);
  EXPECT_EQ(gguf->integer("large").status().code(), StatusCode::kInvalid);  // leaves 63 bits
  EXPECT_EQ(gguf->number("llama.rope.freq_base").value(), 1e5);
  EXPECT_EQ(gguf->number("signed").value(), -3.0);
  EXPECT_TRUE(gguf->boolean("flag").value());
  EXPECT_EQ(gguf->text("flag").status().code(), StatusCode::kInvalid);
  EXPECT_EQ(gguf->text("absent").status().code(), StatusCode::kNotFound);
  EXPECT_EQ(gguf->texts("tokenizer.ggml.tokens").value(), (std::vector<std::string>{"a", "b", ""}));
  EXPECT_EQ(gguf->integers("tokenizer.ggml.token_type").value(),
            (std::vector<std::int64_t>{1, 3, 1}));
}

TEST(Gguf, GivesShapesRowMajorAndTheRightBytes) {
  const auto gguf = parse(good()).value();
  ASSERT_EQ(gguf.tensors().size(), 2u);
  const GgufTensor* w = gguf.find("w");
  ASSERT_NE(w, nullptr);
  EXPECT_EQ(w->shape, (std::vector<std::int64_t>{2, 32}));
  EXPECT_EQ(w->bytes.size(), 68u);
  EXPECT_EQ(gguf.find("v")->bytes.size(), 16u);
  EXPECT_EQ(gguf.find("x"), nullptr);
}

TEST(Gguf, ReadsTheTokenizer) {
  const auto tokenizer = parse(good())->tokenizer();
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().to_string();
  EXPECT_EQ(tokenizer->tokens.size(), 3u);
  EXPECT_EQ(tokenizer->eos_id, 2u);
  EXPECT_EQ(tokenizer->bos_id, std::nullopt);
  auto keys = tokenizer_keys();
  keys.back() = key("tokenizer.ggml.eos_token_id", 4, number<std::uint32_t>(3));
  EXPECT_EQ(parse(file(keys, {}, 0))->tokenizer().status().code(), StatusCode::kInvalid);
}

TEST(Gguf, RefusesEveryTruncation) {
  const std::string whole = good();
  ASSERT_TRUE(parse(whole).ok());
  for (std::size_t n = 0; n < whole.size(); ++n) {
    const auto cut = parse(whole.substr(0, n));
    ASSERT_FALSE(cut.ok()) << n;
    ASSERT_EQ(cut.status().code(), StatusCode::kCorrupt) << n << cut.status().to_string();
  }
  EXPECT_NE(
      parse(whole.substr(0, whole.size() - 1)).status().message().find("tensor v needs bytes"),
      std::string::npos);
}

TEST(Gguf, RefusesWhatDoesNotFit) {
  const auto none = std::vector<std::string>{};
  struct Case {
    const char* what;
    std::string bytes;
    StatusCode code;
  };
  const std::vector<Case> cases{
      {"magic", "GGML" + good().substr(4), StatusCode::kCorrupt},
      {"version 1", file({}, {}, 0, 1), StatusCode::kRefused},
      {"big endian", file({}, {}, 0, 3u << 24), StatusCode::kRefused},
      {"type iq4_nl", file({}, {tensor("w", {32}, 20, 0)}, 64), StatusCode::kRefused},
      {"type 4, removed from ggml", file({}, {tensor("w", {32}, 4, 0)}, 64), StatusCode::kRefused},
      {"five dimensions", file({}, {tensor("w", {1, 1, 1, 1, 1}, 0, 0)}, 64), StatusCode::kCorrupt},
      {"a zero dimension", file({}, {tensor("w", {0}, 0, 0)}, 64), StatusCode::kCorrupt},
      {"overflowing shape", file({}, {tensor("w", {1ull << 32, 1ull << 32}, 0, 0)}, 64),
       StatusCode::kCorrupt},
      {"overflowing bytes", file({}, {tensor("w", {1ull << 61, 2}, 0, 0)}, 64),
       StatusCode::kCorrupt},
      {"a dimension over 63 bits", file({}, {tensor("w", {1ull << 63}, 0, 0)}, 64),
       StatusCode::kCorrupt},
      {"half a block", file({}, {tensor("w", {16}, 8, 0)}, 64), StatusCode::kCorrupt},
      {"a row that is no whole block", file({}, {tensor("w", {16, 2}, 8, 0)}, 64),
       StatusCode::kCorrupt},
      {"unaligned offset", file({}, {tensor("w", {4}, 0, 4)}, 64), StatusCode::kCorrupt},
      {"offset beyond the file", file({}, {tensor("w", {4}, 0, 1ull << 40)}, 64),
       StatusCode::kCorrupt},
      {"offset that wraps", file({}, {tensor("w", {4}, 0, ~0ull - 31)}, 64), StatusCode::kCorrupt},
      {"overlap", file({}, {tensor("w", {16}, 0, 0), tensor("v", {4}, 0, 32)}, 64),
       StatusCode::kCorrupt},
      {"the same tensor twice", file({}, {tensor("w", {4}, 0, 0), tensor("w", {4}, 0, 32)}, 64),
       StatusCode::kCorrupt},
      {"the same key twice", file({key("k", 4, number(1u)), key("k", 4, number(1u))}, {}, 0),
       StatusCode::kCorrupt},
      {"a huge string", file({text("k") + number(8u) + number<std::uint64_t>(1ull << 60)}, {}, 0),
       StatusCode::kCorrupt},
      {"a huge array", file({key("k", 9, number(4u) + number<std::uint64_t>(1ull << 61))}, {}, 0),
       StatusCode::kCorrupt},
      {"a huge array of strings",
       file({key("k", 9, number(8u) + number<std::uint64_t>(1ull << 61))}, {}, 0),
       StatusCode::kCorrupt},
      {"an array of arrays", file({key("k", 9, number(9u) + number<std::uint64_t>(1))}, {}, 64),
       StatusCode::kCorrupt},
      {"an unknown value type", file({key("k", 13, number(1u))}, {}, 64), StatusCode::kCorrupt},
      {"a boolean of 2", file({key("k", 7, "\x02")}, {}, 64), StatusCode::kCorrupt},
      {"alignment 3", file({key("general.alignment", 4, number(3u))}, {}, 64),
       StatusCode::kCorrupt},
      {"alignment 0", file({key("general.alignment", 4, number(0u))}, {}, 64),
       StatusCode::kCorrupt},
      {"too many tensors",
       "GGUF" + number(3u) + number<std::uint64_t>(1ull << 40) + number<std::uint64_t>(0),
       StatusCode::kCorrupt},
  };
  for (const Case& c : cases) {
    const auto gguf = parse(c.bytes);
    ASSERT_FALSE(gguf.ok()) << c.what;
    EXPECT_EQ(gguf.status().code(), c.code) << c.what << ": " << gguf.status().to_string();
  }
  EXPECT_NE(parse(cases[3].bytes).status().message().find("tensor w has type 20 (iq4_nl)"),
            std::string::npos);
}

TEST(Gguf, MutationsNeverCrashAndNeverReadOutside) {
  const std::string whole = good();
  Random random(1);
  int accepted = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string mutated = whole;
    for (std::uint64_t n = random.below(4) + 1; n > 0; --n) {
      const std::size_t at = random.below(mutated.size());
      switch (random.below(4)) {
        case 0:
          mutated[at] = static_cast<char>(random.next());
          break;
        case 1:
          mutated[at] = static_cast<char>(mutated[at] ^ (1 << random.below(8)));
          break;
        case 2:
          mutated.erase(at, random.below(9));
          break;
        default:
          for (std::size_t i = at; i < std::min(at + 8, mutated.size()); ++i)
            mutated[i] = random.below(2) ? '\xff' : '\0';
      }
      if (mutated.empty()) mutated = "G";
    }
    const auto gguf = parse(mutated);
    if (!gguf.ok()) continue;
    ++accepted;
    (void)gguf->tokenizer();
    for (const GgufTensor& t : gguf->tensors()) {
      std::vector<float> values(static_cast<std::size_t>(t.numel()));
      ASSERT_TRUE(dequantize(t.type, t.bytes, std::span<float>(values)).ok());
    }
  }
  EXPECT_GT(accepted, 100);  // otherwise nothing behind the checks was reached
}

// -- dequantization -----------------------------------------------------------

TEST(Gguf, DequantizesEveryTypeAsTheReferenceDoesBitForBit) {
  std::istringstream golden(
      read_bytes(std::string(TANDEM_SOURCE_DIR) + "/tests/golden/storage_gguf.bin"));
  int types = 0;
  for (std::string line; std::getline(golden, line); ++types) {
    std::istringstream words(line);
    std::string name;
    std::size_t blocks = 0;
    words >> name >> blocks;
    GgufType type = GgufType::kF32;
    bool known = false;
    for (std::uint32_t i = 0; i <= 30 && !known; ++i) {
      type = static_cast<GgufType>(i);
      known = name == gguf_type_name(type);
    }
    ASSERT_TRUE(known) << name;
    std::string in(blocks * static_cast<std::size_t>(gguf_block_bytes(type)), '\0');
    std::vector<float> want(blocks * static_cast<std::size_t>(gguf_block_elements(type)));
    golden.read(in.data(), static_cast<std::streamsize>(in.size()));
    golden.read(reinterpret_cast<char*>(want.data()),
                static_cast<std::streamsize>(want.size() * sizeof(float)));
    ASSERT_TRUE(golden.good());
    std::vector<float> got(want.size(), std::nanf(""));
    std::vector<bf16> got_bf16(want.size());
    const auto bytes = std::as_bytes(std::span(in));
    ASSERT_TRUE(dequantize(type, bytes, std::span<float>(got)).ok());
    ASSERT_TRUE(dequantize(type, bytes, std::span<bf16>(got_bf16)).ok());
    for (std::size_t i = 0; i < want.size(); ++i) {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(got[i]), std::bit_cast<std::uint32_t>(want[i]))
          << name << " element " << i;
      ASSERT_EQ(got_bf16[i].bits, to_bf16(want[i]).bits) << name << " element " << i;
    }
    EXPECT_FALSE(dequantize(type, bytes, std::span(got).first(got.size() - 1)).ok());
  }
  EXPECT_EQ(types, 11);
}

TEST(Gguf, UndoesTheConvertersPermutation) {
  // convert_hf_to_gguf.py: reshape(heads, 2, rows/heads/2, columns).swapaxes(1, 2), here rows named
  // by numbers.
  const std::int64_t heads = 3, rows = 24, half = 4;
  std::vector<float> hf(static_cast<std::size_t>(rows * 2)), gguf(hf.size());
  for (std::size_t i = 0; i < hf.size(); ++i) hf[i] = static_cast<float>(i);
  for (std::int64_t h = 0; h < heads; ++h)
    for (std::int64_t part = 0; part < 2; ++part)
      for (std::int64_t i = 0; i < half; ++i)
        for (std::int64_t c = 0; c < 2; ++c)
          gguf[static_cast<std::size_t>(((h * half + i) * 2 + part) * 2 + c)] =
              hf[static_cast<std::size_t>(((h * 2 + part) * half + i) * 2 + c)];
  ASSERT_NE(gguf, hf);
  ASSERT_TRUE(unpermute_rope_rows(std::span<float>(gguf), rows, heads).ok());
  EXPECT_EQ(gguf, hf);
  EXPECT_FALSE(rope_row_order(9, 3).ok());
  EXPECT_FALSE(rope_row_order(8, 0).ok());
}

TEST(Gguf, TranslatesTensorNames) {
  EXPECT_EQ(gguf_to_hf_name("blk.12.attn_q.weight"), "model.layers.12.self_attn.q_proj.weight");
  EXPECT_EQ(gguf_to_hf_name("blk.0.attn_k.bias"), "model.layers.0.self_attn.k_proj.bias");
  EXPECT_EQ(gguf_to_hf_name("blk.3.ffn_norm.weight"),
            "model.layers.3.post_attention_layernorm.weight");
  EXPECT_EQ(gguf_to_hf_name("token_embd.weight"), "model.embed_tokens.weight");
  EXPECT_EQ(gguf_to_hf_name("output.weight"), "lm_head.weight");
  for (const char* other : {"rope_freqs.weight", "blk.x.attn_q.weight", "blk..attn_q.weight",
                            "blk.1.weight", "attn_q", ""})
    EXPECT_EQ(gguf_to_hf_name(other), std::nullopt) << other;
}

}  // namespace
}  // namespace tandem::storage
