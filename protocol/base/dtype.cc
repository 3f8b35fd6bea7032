#include "protocol/base/dtype.h"

#include <array>
#include <utility>

namespace tandem {
namespace {
constexpr std::array<std::pair<DType, const char*>, 8> kNames{{{DType::kF32, "f32"},
                                                               {DType::kBF16, "bf16"},
                                                               {DType::kF16, "f16"},
                                                               {DType::kI32, "i32"},
                                                               {DType::kI64, "i64"},
                                                               {DType::kU8, "u8"},
                                                               {DType::kI8, "i8"},
                                                               {DType::kF64, "f64"}}};
}  // namespace

const char* dtype_name(DType dtype) {
  for (const auto& [value, name] : kNames)
    if (value == dtype) return name;
  return "unknown";
}

std::optional<DType> parse_dtype(std::string_view name) {
  for (const auto& [value, candidate] : kNames)
    if (name == candidate) return value;
  return std::nullopt;
}

float to_f32(f16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  std::uint32_t exponent = (x.bits >> 10) & 0x1fu;
  std::uint32_t mantissa = x.bits & 0x3ffu;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    if (mantissa == 0) return std::bit_cast<float>(sign);
    exponent = 1;
    while ((mantissa & 0x400u) == 0) {  // a subnormal half is a normal float
      mantissa <<= 1;
      --exponent;
    }
    mantissa &= 0x3ffu;
  }
  return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

f16 to_f16(float x) {
  const auto u = std::bit_cast<std::uint32_t>(x);
  const auto sign = static_cast<std::uint16_t>((u >> 16) & 0x8000u);
  const std::uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // overflow
  if (magnitude < 0x33000001u) return {sign};                                         // underflow
  std::uint32_t exponent = magnitude >> 23;
  std::uint32_t mantissa = magnitude & 0x7fffffu;
  std::uint32_t shift = 13;
  if (exponent < 113) {  // subnormal half
    mantissa |= 0x800000u;
    shift += 113 - exponent;
    exponent = 112;
  }
  std::uint32_t rounded = ((exponent - 112) << 10) + (mantissa >> shift);
  const std::uint32_t rest = mantissa & ((1u << shift) - 1);
  const std::uint32_t half = 1u << (shift - 1);
  if (rest > half || (rest == half && (rounded & 1u))) ++rounded;
  return {static_cast<std::uint16_t>(sign | rounded)};
}

}  // namespace tandem
