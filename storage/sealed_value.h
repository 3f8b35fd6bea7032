// The envelope of every stored value: because LMDB has no checksums, a flipped bit would otherwise
// come back as a silently wrong value.
//
//   u64 checksum   XXH64 of all that follows, seeded with XXH64 of the table's name
//   u32 key bytes
//   u32 format     1
//   key, payload
//
// Little-endian. So a value that was damaged, or that lies under another key or in another table,
// is told from the right one.
#pragma once

#include "protocol/base/result.h"

#include <cstdint>
#include <string>
#include <string_view>

namespace tandem::storage {

/// XXH64 (Yann Collet's xxHash specification, version 0.8): 64 bits, several GB/s, not
/// cryptographic.
std::uint64_t xxh64(std::string_view bytes, std::uint64_t seed);

/// Bytes of the envelope of a value.
std::size_t sealed_bytes(std::string_view key, std::size_t payload_bytes);
/// Writes the envelope into `out` (sealed_bytes long).
void seal_into(char* out, std::string_view table, std::string_view key, std::string_view payload);
std::string seal(std::string_view table, std::string_view key, std::string_view payload);
/// The payload inside `sealed`, verified. Errors: corrupt, naming table and key.
Result<std::string_view> unseal(std::string_view table, std::string_view key,
                                std::string_view sealed);

/// A key as messages show it: a digest's digits, NAME@NUMBER, else printable characters and others
/// as \xNN, at most 80.
std::string printable_key(std::string_view key);

}  // namespace tandem::storage
