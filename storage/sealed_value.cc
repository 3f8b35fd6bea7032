#include "storage/sealed_value.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace tandem::storage {
namespace {

constexpr std::uint64_t kPrime1 = 0x9E3779B185EBCA87ull;
constexpr std::uint64_t kPrime2 = 0xC2B2AE3D27D4EB4Full;
constexpr std::uint64_t kPrime3 = 0x165667B19E3779F9ull;
constexpr std::uint64_t kPrime4 = 0x85EBCA77C2B2AE63ull;
constexpr std::uint64_t kPrime5 = 0x27D4EB2F165667C5ull;

constexpr std::size_t kHeaderBytes = 16;
constexpr std::uint32_t kFormat = 1;

template <class T>
T load(const char* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

std::uint64_t round64(std::uint64_t accumulator, std::uint64_t lane) {
  return std::rotl(accumulator + lane * kPrime2, 31) * kPrime1;
}
std::uint64_t merge64(std::uint64_t hash, std::uint64_t accumulator) {
  return (hash ^ round64(0, accumulator)) * kPrime1 + kPrime4;
}

std::uint64_t finish64(std::uint64_t hash, const char* at, std::size_t left) {
  for (; left >= 8; at += 8, left -= 8)
    hash = std::rotl(hash ^ round64(0, load<std::uint64_t>(at)), 27) * kPrime1 + kPrime4;
  if (left >= 4) {
    hash = std::rotl(hash ^ (load<std::uint32_t>(at) * kPrime1), 23) * kPrime2 + kPrime3;
    at += 4;
    left -= 4;
  }
  for (; left > 0; ++at, --left)
    hash = std::rotl(hash ^ (static_cast<std::uint8_t>(*at) * kPrime5), 11) * kPrime1;
  hash = (hash ^ (hash >> 33)) * kPrime2;
  hash = (hash ^ (hash >> 29)) * kPrime3;
  return hash ^ (hash >> 32);
}

}  // namespace

std::uint64_t xxh64(std::string_view bytes, std::uint64_t seed) {
  const char* at = bytes.data();
  std::size_t left = bytes.size();
  std::uint64_t hash = seed + kPrime5;
  if (left >= 32) {
    std::uint64_t a = seed + kPrime1 + kPrime2, b = seed + kPrime2, c = seed, d = seed - kPrime1;
    for (; left >= 32; at += 32, left -= 32) {
      a = round64(a, load<std::uint64_t>(at));
      b = round64(b, load<std::uint64_t>(at + 8));
      c = round64(c, load<std::uint64_t>(at + 16));
      d = round64(d, load<std::uint64_t>(at + 24));
    }
    hash = std::rotl(a, 1) + std::rotl(b, 7) + std::rotl(c, 12) + std::rotl(d, 18);
    for (std::uint64_t accumulator : {a, b, c, d}) hash = merge64(hash, accumulator);
  }
  return finish64(hash + bytes.size(), at, left);
}

std::size_t sealed_bytes(std::string_view key, std::size_t payload_bytes) {
  return kHeaderBytes + key.size() + payload_bytes;
}

void seal_into(char* out, std::string_view table, std::string_view key, std::string_view payload) {
  const auto key_bytes = static_cast<std::uint32_t>(key.size());
  std::memcpy(out + 8, &key_bytes, 4);
  std::memcpy(out + 12, &kFormat, 4);
  std::memcpy(out + kHeaderBytes, key.data(), key.size());
  if (!payload.empty())
    std::memcpy(out + kHeaderBytes + key.size(), payload.data(), payload.size());
  const std::uint64_t checksum =
      xxh64({out + 8, sealed_bytes(key, payload.size()) - 8}, xxh64(table, 0));
  std::memcpy(out, &checksum, 8);
}

std::string seal(std::string_view table, std::string_view key, std::string_view payload) {
  std::string sealed(sealed_bytes(key, payload.size()), '\0');
  seal_into(sealed.data(), table, key, payload);
  return sealed;
}

Result<std::string_view> unseal(std::string_view table, std::string_view key,
                                std::string_view sealed) {
  auto corrupt = [&](const char* what) {
    return corrupt_error(str("table ", table, ", key ", printable_key(key), ": ", what,
                             "; restore a backup (tandem registry restore)"));
  };
  if (sealed.size() < kHeaderBytes) return corrupt("the value is cut short");
  if (load<std::uint64_t>(sealed.data()) != xxh64(sealed.substr(8), xxh64(table, 0)))
    return corrupt("the value does not match its checksum");
  const auto key_bytes = load<std::uint32_t>(sealed.data() + 8);
  if (load<std::uint32_t>(sealed.data() + 12) != kFormat)
    return corrupt("the value has an unknown format");
  if (key_bytes > sealed.size() - kHeaderBytes || sealed.substr(kHeaderBytes, key_bytes) != key)
    return corrupt("the value belongs to another key");
  return sealed.substr(kHeaderBytes + key_bytes);
}

std::string printable_key(std::string_view key) {
  static constexpr char kDigits[] = "0123456789abcdef";
  constexpr std::size_t kDigestBytes = 32;
  std::string text;
  const auto is_text = [](char c) { return c >= 0x20 && c < 0x7f; };
  if (key.size() == kDigestBytes && !std::all_of(key.begin(), key.end(), is_text)) {
    for (const char c : key) text += {kDigits[static_cast<unsigned char>(c) >> 4], kDigits[c & 15]};
    return text;
  }
  const std::size_t end = key.find('\0');  // then a number, of a version, a step or an event
  if (const std::size_t size = key.size() - std::min(end, key.size());
      end != std::string_view::npos && end > 0 && (size == 5 || size == 9)) {
    std::uint64_t number = 0;
    for (const char c : key.substr(end + 1)) number = number << 8 | static_cast<unsigned char>(c);
    return printable_key(key.substr(0, end)) + "@" + std::to_string(number);
  }
  for (char c : key.substr(0, 80)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f)
      text += c;
    else
      text += {'\\', 'x', kDigits[byte >> 4], kDigits[byte & 15]};
  }
  return text;
}

}  // namespace tandem::storage
