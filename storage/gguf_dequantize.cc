// The formulas are ggml's dequantize_row_* (ggml-quants.c), written so that every intermediate is
// the same f32. Contraction to fused multiply-add could not change a bit: wherever a sum follows,
// the product before it is exact in f32 (a scale of 11 + 6 bits times 5 bits).
#include "storage/gguf.h"

#include <array>
#include <cstring>

namespace tandem::storage {
namespace {

constexpr int kSmall = 32;  // elements of a q4_0 ... q8_0 block
constexpr int kSuper = 256;

float half_at(const std::uint8_t* at) {
  std::uint16_t bits;
  std::memcpy(&bits, at, 2);
  return to_f32(f16{bits});
}

void q4_0(const std::uint8_t* in, float* out) {
  const float d = half_at(in);
  for (int j = 0; j < kSmall / 2; ++j) {
    out[j] = static_cast<float>((in[2 + j] & 15) - 8) * d;
    out[j + kSmall / 2] = static_cast<float>((in[2 + j] >> 4) - 8) * d;
  }
}

void q4_1(const std::uint8_t* in, float* out) {
  const float d = half_at(in), m = half_at(in + 2);
  for (int j = 0; j < kSmall / 2; ++j) {
    out[j] = static_cast<float>(in[4 + j] & 15) * d + m;
    out[j + kSmall / 2] = static_cast<float>(in[4 + j] >> 4) * d + m;
  }
}

/// The fifth bits of a block: bit j belongs to element j.
std::uint32_t fifth_bits(const std::uint8_t* at) {
  std::uint32_t bits;
  std::memcpy(&bits, at, 4);
  return bits;
}

void q5_0(const std::uint8_t* in, float* out) {
  const float d = half_at(in);
  const std::uint32_t high = fifth_bits(in + 2);
  for (int j = 0; j < kSmall / 2; ++j) {
    const int low = (in[6 + j] & 15) | static_cast<int>((high >> j & 1) << 4);
    const int upper = (in[6 + j] >> 4) | static_cast<int>((high >> (j + 16) & 1) << 4);
    out[j] = static_cast<float>(low - 16) * d;
    out[j + kSmall / 2] = static_cast<float>(upper - 16) * d;
  }
}

void q5_1(const std::uint8_t* in, float* out) {
  const float d = half_at(in), m = half_at(in + 2);
  const std::uint32_t high = fifth_bits(in + 4);
  for (int j = 0; j < kSmall / 2; ++j) {
    const int low = (in[8 + j] & 15) | static_cast<int>((high >> j & 1) << 4);
    const int upper = (in[8 + j] >> 4) | static_cast<int>((high >> (j + 16) & 1) << 4);
    out[j] = static_cast<float>(low) * d + m;
    out[j + kSmall / 2] = static_cast<float>(upper) * d + m;
  }
}

void q8_0(const std::uint8_t* in, float* out) {
  const float d = half_at(in);
  for (int j = 0; j < kSmall; ++j)
    out[j] = static_cast<float>(static_cast<std::int8_t>(in[2 + j])) * d;
}

struct ScaleMin {
  int scale, minimum;
};

/// The 6-bit scale and minimum of sub-block j (0..7) out of 12 packed bytes.
ScaleMin scale_min(int j, const std::uint8_t* q) {
  if (j < 4) return {q[j] & 63, q[j + 4] & 63};
  return {(q[j + 4] & 15) | ((q[j - 4] >> 6) << 4), (q[j + 4] >> 4) | ((q[j] >> 6) << 4)};
}

/// q4_k, and q5_k where `high` holds the fifth bits (bit j of byte l: element l of sub-block j).
void k4_or_k5(const std::uint8_t* in, const std::uint8_t* high, const std::uint8_t* low,
              float* out) {
  const float d = half_at(in), dmin = half_at(in + 2);
  for (int j = 0; j < 8; ++j) {
    const ScaleMin s = scale_min(j, in + 4);
    const float scale = d * static_cast<float>(s.scale),
                minimum = dmin * static_cast<float>(s.minimum);
    for (int l = 0; l < 32; ++l) {
      const int nibble = j % 2 == 0 ? low[32 * (j / 2) + l] & 15 : low[32 * (j / 2) + l] >> 4;
      const int fifth = high == nullptr ? 0 : (high[l] >> j & 1) << 4;
      out[32 * j + l] = scale * static_cast<float>(nibble | fifth) - minimum;
    }
  }
}

void q4_k(const std::uint8_t* in, float* out) {
  k4_or_k5(in, nullptr, in + 16, out);
}
void q5_k(const std::uint8_t* in, float* out) {
  k4_or_k5(in, in + 16, in + 48, out);
}

void q6_k(const std::uint8_t* in, float* out) {
  const std::uint8_t *ql = in, *qh = in + 128, *sc = in + 192;
  const float d = half_at(in + 208);
  for (int n = 0; n < kSuper; n += 128, out += 128, ql += 64, qh += 32, sc += 8)
    for (int l = 0; l < 32; ++l)
      for (int part = 0; part < 4; ++part) {
        const std::uint8_t byte = ql[l + 32 * (part % 2)];
        const int q = ((part < 2 ? byte & 15 : byte >> 4) | ((qh[l] >> (2 * part) & 3) << 4)) - 32;
        const auto scale = static_cast<std::int8_t>(sc[l / 16 + 2 * part]);
        out[l + 32 * part] = d * static_cast<float>(scale) * static_cast<float>(q);
      }
}

using BlockFunction = void (*)(const std::uint8_t*, float*);

BlockFunction block_function(GgufType type) {
  switch (type) {
    case GgufType::kQ4_0:
      return q4_0;
    case GgufType::kQ4_1:
      return q4_1;
    case GgufType::kQ5_0:
      return q5_0;
    case GgufType::kQ5_1:
      return q5_1;
    case GgufType::kQ8_0:
      return q8_0;
    case GgufType::kQ4_K:
      return q4_k;
    case GgufType::kQ5_K:
      return q5_k;
    case GgufType::kQ6_K:
      return q6_k;
    default:
      return nullptr;
  }
}

float float_at(GgufType type, const std::uint8_t* at) {
  if (type == GgufType::kF16) return half_at(at);
  if (type == GgufType::kBF16) {
    std::uint16_t bits;
    std::memcpy(&bits, at, 2);
    return to_f32(bf16{bits});
  }
  float value;
  std::memcpy(&value, at, 4);
  return value;
}

Status check_sizes(GgufType type, std::size_t in_bytes, std::size_t out_elements) {
  const auto block_bytes = static_cast<std::size_t>(gguf_block_bytes(type));
  const auto block_elements = static_cast<std::size_t>(gguf_block_elements(type));
  if (block_bytes == 0 || in_bytes % block_bytes != 0 ||
      in_bytes / block_bytes * block_elements != out_elements)
    return invalid_error(
        str(in_bytes, " bytes of ", gguf_type_name(type), " are not ", out_elements, " elements"));
  return {};
}

}  // namespace

Status dequantize(GgufType type, std::span<const std::byte> bytes, std::span<float> out) {
  TANDEM_RETURN_IF_ERROR(check_sizes(type, bytes.size(), out.size()));
  const auto* in = reinterpret_cast<const std::uint8_t*>(bytes.data());
  const auto step_in = static_cast<std::size_t>(gguf_block_bytes(type));
  const auto step_out = static_cast<std::size_t>(gguf_block_elements(type));
  if (const BlockFunction function = block_function(type)) {
    for (std::size_t at = 0; at < out.size(); at += step_out, in += step_in)
      function(in, out.data() + at);
  } else {
    for (std::size_t i = 0; i < out.size(); ++i, in += step_in) out[i] = float_at(type, in);
  }
  return {};
}

Status dequantize(GgufType type, std::span<const std::byte> bytes, std::span<bf16> out) {
  TANDEM_RETURN_IF_ERROR(check_sizes(type, bytes.size(), out.size()));
  const auto* in = reinterpret_cast<const std::uint8_t*>(bytes.data());
  const auto step_in = static_cast<std::size_t>(gguf_block_bytes(type));
  const auto step_out = static_cast<std::size_t>(gguf_block_elements(type));
  std::array<float, kSuper> block{};
  const BlockFunction function = block_function(type);
  for (std::size_t at = 0; at < out.size(); at += step_out, in += step_in) {
    if (function != nullptr)
      function(in, block.data());
    else
      block[0] = float_at(type, in);
    for (std::size_t i = 0; i < step_out; ++i) out[at + i] = to_bf16(block[i]);
  }
  return {};
}

const char* gguf_type_name(GgufType type) {
  switch (type) {
    case GgufType::kF32:
      return "f32";
    case GgufType::kF16:
      return "f16";
    case GgufType::kQ4_0:
      return "q4_0";
    case GgufType::kQ4_1:
      return "q4_1";
    case GgufType::kQ5_0:
      return "q5_0";
    case GgufType::kQ5_1:
      return "q5_1";
    case GgufType::kQ8_0:
      return "q8_0";
    case GgufType::kQ4_K:
      return "q4_k";
    case GgufType::kQ5_K:
      return "q5_k";
    case GgufType::kQ6_K:
      return "q6_k";
    case GgufType::kBF16:
      return "bf16";
  }
  return "unknown";
}

std::int64_t gguf_block_elements(GgufType type) {
  switch (type) {
    case GgufType::kF32:
    case GgufType::kF16:
    case GgufType::kBF16:
      return 1;
    case GgufType::kQ4_K:
    case GgufType::kQ5_K:
    case GgufType::kQ6_K:
      return kSuper;
    default:
      return kSmall;
  }
}

std::int64_t gguf_block_bytes(GgufType type) {
  switch (type) {
    case GgufType::kF32:
      return 4;
    case GgufType::kF16:
    case GgufType::kBF16:
      return 2;
    case GgufType::kQ4_0:
      return 18;
    case GgufType::kQ4_1:
      return 20;
    case GgufType::kQ5_0:
      return 22;
    case GgufType::kQ5_1:
      return 24;
    case GgufType::kQ8_0:
      return 34;
    case GgufType::kQ4_K:
      return 144;
    case GgufType::kQ5_K:
      return 176;
    case GgufType::kQ6_K:
      return 210;
  }
  return 0;
}

}  // namespace tandem::storage
