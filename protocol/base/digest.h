// SHA-256 identities. A model, an adapter, a checkpoint or a chunk is named by the digest of its
// content; names are only aliases.
#pragma once

#include "protocol/base/result.h"

#include <array>
#include <compare>
#include <cstdint>
#include <functional>
#include <memory>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tandem {

struct Digest {
  std::array<std::uint8_t, 32> bytes{};
  auto operator<=>(const Digest&) const = default;
  [[nodiscard]] bool empty() const { return *this == Digest{}; }
  [[nodiscard]] std::string hex() const;        ///< 64 lower-case digits
  [[nodiscard]] std::string short_hex() const;  ///< the first 12, for people
  /// Parses exactly 64 hex digits.
  static Result<Digest> parse(std::string_view hex);
};

inline std::ostream& operator<<(std::ostream& out, const Digest& d) {
  return out << d.short_hex();
}

/// Incremental SHA-256. One thread at a time.
class Hasher {
 public:
  Hasher();
  ~Hasher();
  Hasher(const Hasher&) = delete;
  Hasher& operator=(const Hasher&) = delete;
  Hasher& update(std::span<const std::byte> bytes);
  Hasher& update(std::string_view text);
  /// The digest of all updates; the hasher then starts anew.
  Digest finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

Digest sha256(std::span<const std::byte> bytes);
Digest sha256(std::string_view text);

/// SHA-256 of each of `parts`, by up to `threads` threads with the caller's. `on_digest` hears of
/// each on the caller's thread, in order, as soon as it and all before it are known.
std::vector<Digest> sha256_each(std::span<const std::span<const std::byte>> parts, int threads,
                                const std::function<void(std::size_t, Digest)>& on_digest = {});
/// How many threads hash so many bytes while others need the machine too: half of its cores, at
/// most 8, and none for less than half a MiB.
int hash_threads(std::size_t bytes);

/// Leaf size of a tensor's or a file's root.
inline constexpr std::int64_t kDigestLeafBytes = 16 << 20;

/// The leaves of a long byte string, in order; none of no bytes.
std::vector<std::span<const std::byte>> digest_leaves(std::span<const std::byte> bytes);

/// The root of a long byte string: SHA-256 over the concatenated SHA-256s of its 16 MiB leaves (of
/// the one leaf's digest too when there is one; no bytes: the digest of nothing). Leaves are
/// hashed by up to `threads` threads. Any thread.
Digest content_root(std::span<const std::byte> bytes, int threads = 1);

}  // namespace tandem

template <>
struct std::hash<tandem::Digest> {
  std::size_t operator()(const tandem::Digest& d) const noexcept {
    std::size_t h = 0;
    for (int i = 0; i < 8; ++i) h = (h << 8) | d.bytes[static_cast<std::size_t>(i)];
    return h;
  }
};
