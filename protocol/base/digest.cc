#include "protocol/base/digest.h"

#include "protocol/base/processors.h"

#include <openssl/evp.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace tandem {

std::string Digest::hex() const {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  text.reserve(64);
  for (std::uint8_t b : bytes) {
    text.push_back(kDigits[b >> 4]);
    text.push_back(kDigits[b & 15]);
  }
  return text;
}

std::string Digest::short_hex() const {
  return hex().substr(0, 12);
}

Result<Digest> Digest::parse(std::string_view hex) {
  if (hex.size() != 64) return invalid_error(str("a digest has 64 hex digits, not ", hex.size()));
  Digest digest;
  for (std::size_t i = 0; i < 64; ++i) {
    const char c = hex[i];
    int v = -1;
    if (c >= '0' && c <= '9') v = c - '0';
    if (c >= 'a' && c <= 'f') v = c - 'a' + 10;
    if (v < 0) return invalid_error(str("not a lower-case hex digit at ", i, " of a digest"));
    digest.bytes[i / 2] = static_cast<std::uint8_t>(digest.bytes[i / 2] << 4 | v);
  }
  return digest;
}

struct Hasher::State {
  EVP_MD_CTX* context = EVP_MD_CTX_new();
  State() { restart(); }
  ~State() { EVP_MD_CTX_free(context); }
  void restart() { TANDEM_CHECK(EVP_DigestInit_ex(context, EVP_sha256(), nullptr) == 1); }
};

Hasher::Hasher() : state_(std::make_unique<State>()) {}
Hasher::~Hasher() = default;

Hasher& Hasher::update(std::span<const std::byte> bytes) {
  TANDEM_CHECK(EVP_DigestUpdate(state_->context, bytes.data(), bytes.size()) == 1);
  return *this;
}

Hasher& Hasher::update(std::string_view text) {
  return update(std::as_bytes(std::span(text.data(), text.size())));
}

Digest Hasher::finish() {
  Digest digest;
  unsigned size = 0;
  TANDEM_CHECK(EVP_DigestFinal_ex(state_->context, digest.bytes.data(), &size) == 1);
  TANDEM_CHECK_EQ(size, 32u);
  state_->restart();
  return digest;
}

Digest sha256(std::span<const std::byte> bytes) {
  return Hasher().update(bytes).finish();
}
Digest sha256(std::string_view text) {
  return Hasher().update(text).finish();
}

std::vector<Digest> sha256_each(std::span<const std::span<const std::byte>> parts, int threads,
                                const std::function<void(std::size_t, Digest)>& on_digest) {
  std::vector<Digest> digests(parts.size());
  std::vector<std::atomic<bool>> known(parts.size());
  std::atomic<std::size_t> next{0};
  auto hash_next = [&] {
    const std::size_t i = next.fetch_add(1);
    if (i >= parts.size()) return false;
    digests[i] = sha256(parts[i]);
    known[i].store(true, std::memory_order_release);
    known[i].notify_one();
    return true;
  };
  std::vector<std::jthread> helpers;
  const auto wanted = std::min<std::size_t>(parts.size(), threads > 1 ? threads : 1);
  for (std::size_t i = 1; i < wanted; ++i)
    helpers.emplace_back([&] {
      while (hash_next()) {
      }
    });
  for (std::size_t i = 0; i < parts.size(); ++i) {
    while (!known[i].load(std::memory_order_acquire))
      if (!hash_next()) known[i].wait(false, std::memory_order_acquire);
    if (on_digest) on_digest(i, digests[i]);
  }
  return digests;
}

int hash_threads(std::size_t bytes) {
  constexpr std::size_t kThreadsMax = 8, kThreadBytesMin = std::size_t{512} << 10;
  const auto cores = static_cast<std::size_t>(processors());
  return static_cast<int>(
      std::clamp<std::size_t>(std::min(cores / 2, bytes / kThreadBytesMin), 1, kThreadsMax));
}

std::vector<std::span<const std::byte>> digest_leaves(std::span<const std::byte> bytes) {
  std::vector<std::span<const std::byte>> leaves;
  for (std::size_t at = 0; at < bytes.size(); at += kDigestLeafBytes)
    leaves.push_back(bytes.subspan(at, std::min<std::size_t>(kDigestLeafBytes, bytes.size() - at)));
  return leaves;
}

Digest content_root(std::span<const std::byte> bytes, int threads) {
  Hasher root;
  for (const Digest& d : sha256_each(digest_leaves(bytes), threads))
    root.update(std::as_bytes(std::span(d.bytes)));
  return root.finish();
}

}  // namespace tandem
