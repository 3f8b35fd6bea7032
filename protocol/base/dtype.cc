#include "protocol/base/dtype.h"

#include "protocol/base/check.h"
#include "protocol/base/str.h"

#include <array>
#include <cstring>
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

template <class T>
void store_each(std::span<const float> from, std::byte* to) {
  for (std::size_t e = 0; e < from.size(); ++e) {
    const T value = from_f32<T>(from[e]);
    std::memcpy(to + e * sizeof(T), &value, sizeof(T));
  }
}
template <class T>
void load_each(const std::byte* from, std::span<float> to) {
  for (std::size_t e = 0; e < to.size(); ++e) {
    T value;
    std::memcpy(&value, from + e * sizeof(T), sizeof(T));
    to[e] = to_f32(value);
  }
}
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

std::string meant_dtype(std::string_view word) {
  constexpr std::array<std::pair<std::string_view, const char*>, 7> kOthers{{{"fp16", "f16"},
                                                                             {"float16", "f16"},
                                                                             {"half", "f16"},
                                                                             {"bfloat16", "bf16"},
                                                                             {"fp32", "f32"},
                                                                             {"float32", "f32"},
                                                                             {"float", "f32"}}};
  for (const auto& [other, name] : kOthers)
    if (word == other) return name;
  return nearest_name(word, std::array<std::string_view, 3>{"f32", "bf16", "f16"});
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

float rounded(float x, DType dtype) {
  TANDEM_CHECK(is_stored_float(dtype), dtype_name(dtype));
  return dtype == DType::kBF16 ? to_f32(to_bf16(x)) : dtype == DType::kF16 ? to_f32(to_f16(x)) : x;
}

void store_floats(std::span<const float> from, DType dtype, std::byte* to) {
  TANDEM_CHECK(is_stored_float(dtype), dtype_name(dtype));
  if (dtype == DType::kBF16) return store_each<bf16>(from, to);
  if (dtype == DType::kF16) return store_each<f16>(from, to);
  store_each<float>(from, to);
}

void load_floats(const std::byte* from, DType dtype, std::span<float> to) {
  TANDEM_CHECK(is_stored_float(dtype), dtype_name(dtype));
  if (dtype == DType::kBF16) return load_each<bf16>(from, to);
  if (dtype == DType::kF16) return load_each<f16>(from, to);
  load_each<float>(from, to);
}

}  // namespace tandem
