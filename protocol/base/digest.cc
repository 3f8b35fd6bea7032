#include "protocol/base/digest.h"

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

Digest content_root(std::span<const std::byte> bytes, int threads) {
  const std::size_t leaf = kDigestLeafBytes;
  std::vector<Digest> leaves((bytes.size() + leaf - 1) / leaf);
  std::atomic<std::size_t> next{0};
  auto work = [&] {
    for (std::size_t i; (i = next.fetch_add(1)) < leaves.size();)
      leaves[i] = sha256(bytes.subspan(i * leaf, std::min(leaf, bytes.size() - i * leaf)));
  };
  std::vector<std::thread> helpers;
  const auto wanted = std::min<std::size_t>(leaves.size(), threads > 1 ? threads : 1);
  for (std::size_t i = 1; i < wanted; ++i) helpers.emplace_back(work);
  work();
  for (auto& helper : helpers) helper.join();
  Hasher root;
  for (const Digest& d : leaves) root.update(std::as_bytes(std::span(d.bytes)));
  return root.finish();
}

}  // namespace tandem
