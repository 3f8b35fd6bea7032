// Element types and the 16-bit floats' conversions (round to nearest, ties to even).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace tandem {

/// Wire and registry carry these numbers: only append.
enum class DType : std::uint8_t {
  kF32 = 0,
  kBF16 = 1,
  kF16 = 2,
  kI32 = 3,
  kI64 = 4,
  kU8 = 5,
  kI8 = 6,
  kF64 = 7
};

constexpr std::int64_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kF64:
    case DType::kI64:
      return 8;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kU8:
    case DType::kI8:
      return 1;
  }
  return 0;
}

constexpr bool is_16_bit(DType dtype) {
  return dtype == DType::kBF16 || dtype == DType::kF16;
}
/// What weights and adapters are stored in: f32, bf16, f16.
constexpr bool is_stored_float(DType dtype) {
  return dtype == DType::kF32 || is_16_bit(dtype);
}

/// What an engine that computes in `compute` sums in and keeps optimizer state in: f32, but f64 in
/// the exact engine that tests hold layouts against.
constexpr DType sum_dtype(DType compute) {
  return compute == DType::kF64 ? DType::kF64 : DType::kF32;
}

/// "f32", "bf16", "f16", "i32", "i64", "u8", "i8", "f64": used in manifests, settings and messages.
const char* dtype_name(DType dtype);
std::optional<DType> parse_dtype(std::string_view name);
/// The name that somebody meant who wrote "fp16", "half" or "bfloat16", for messages; "" when no
/// floating type is near.
std::string meant_dtype(std::string_view word);

/// A bfloat16 as stored: the upper half of a binary32.
struct bf16 {
  std::uint16_t bits;
};
/// An IEEE binary16 as stored.
struct f16 {
  std::uint16_t bits;
};

inline float to_f32(float x) {
  return x;
}
inline float to_f32(bf16 x) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}
float to_f32(f16 x);

inline bf16 to_bf16(float x) {
  const auto u = std::bit_cast<std::uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u)
    return {static_cast<std::uint16_t>((u >> 16) | 0x40u)};  // NaN
  return {static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
f16 to_f16(float x);

template <class T>
T from_f32(float x);
template <>
inline float from_f32<float>(float x) {
  return x;
}
template <>
inline bf16 from_f32<bf16>(float x) {
  return to_bf16(x);
}
template <>
inline f16 from_f32<f16>(float x) {
  return to_f16(x);
}

// -- of a dtype that is known at run time; is_stored_float
/// x as `dtype` keeps it.
float rounded(float x, DType dtype);
/// `from`, rounded to `dtype`, one behind another from `to` on, aligned or not.
void store_floats(std::span<const float> from, DType dtype, std::byte* to);
/// The other way round.
void load_floats(const std::byte* from, DType dtype, std::span<float> to);

}  // namespace tandem
