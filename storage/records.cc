#include "storage/records.h"

namespace tandem::storage {

std::string big_endian(std::uint64_t value) {
  std::string text(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) text[i] = static_cast<char>(value >> (56 - 8 * i));
  return text;
}

std::string digest_key(const Digest& digest) {
  return {reinterpret_cast<const char*>(digest.bytes.data()), digest.bytes.size()};
}

std::string name_prefix(std::string_view name) {
  std::string prefix(name);
  prefix.push_back('\0');
  return prefix;
}

std::string adapter_key(std::string_view name, std::uint32_t version) {
  return name_prefix(name) + big_endian(version);
}
std::string checkpoint_key(std::string_view job, std::int64_t step) {
  return name_prefix(job) + big_endian(static_cast<std::uint64_t>(step));
}
std::string event_key(std::string_view job, std::uint64_t seq) {
  return name_prefix(job) + big_endian(seq);
}
std::string idempotency_key(std::string_view tenant, std::string_view key) {
  // A hash, because a client's key may be longer than a table's key.
  return digest_key(sha256(name_prefix(tenant) + std::string(key)));
}

std::vector<std::string> registry_tables() {
  return {"models",     "adapters", "aliases",  "manifests", "checkpoints", "jobs",
          "job_events", "results",  "datasets", "settings",  "idempotency"};
}

}  // namespace tandem::storage
