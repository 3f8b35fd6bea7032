#include "protocol/base/random.h"

#include <cmath>
#include <random>

namespace tandem {

float Random::normal() {
  const float u = uniform() + 0x1.0p-25f;  // keeps the logarithm finite
  const float v = uniform();
  return std::sqrt(-2.0f * std::log(u)) * std::cos(6.283185307179586f * v);
}

std::uint64_t entropy64() {
  std::random_device device;
  return (static_cast<std::uint64_t>(device()) << 32) | device();
}

}  // namespace tandem
