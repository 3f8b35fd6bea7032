#include "protocol/base/ids.h"

namespace tandem {

std::string random_id(const std::string& prefix, int digits) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text = prefix;
  std::uint64_t bits = 0;
  for (int i = 0; i < digits; ++i) {
    if (i % 16 == 0) bits = entropy64();
    text.push_back(kDigits[bits & 15]);
    bits >>= 4;
  }
  return text;
}

}  // namespace tandem
