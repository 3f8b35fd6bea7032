#include "protocol/client/bulk_transfer.h"

#include "protocol/base/ids.h"
#include "protocol/base/random.h"
#include "protocol/base/str.h"
#include "protocol/codec.h"
#include "protocol/version.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

namespace tandem::protocol::client {
namespace {

constexpr TimeMs kReceiveMs = 50;
constexpr TimeMs kBusyMs = 50;

/// The content root (base/digest.h) of bytes whose leaves are these.
Digest root_of(const std::vector<Digest>& leaves) {
  Hasher hasher;
  for (const Digest& leaf : leaves) hasher.update(std::as_bytes(std::span(leaf.bytes)));
  return hasher.finish();
}

/// Reads up to `size` bytes at the stream's place.
Result<Bytes> read_chunk(std::ifstream& file, std::int64_t size, const std::string& path) {
  Bytes bytes(static_cast<std::size_t>(size));
  file.read(reinterpret_cast<char*>(bytes.data()), size);
  if (file.gcount() != size)
    return invalid_error(str(path, ": became shorter or unreadable while it was sent"));
  return bytes;
}

/// Ends a file that was written under a temporary name and gives it its own.
Status put_in_place(std::ofstream& file, const std::string& temporary, const std::string& path) {
  file.close();
  std::error_code error, ignored;
  if (!file) {
    const Status status = internal_error(str(path, ": cannot be written: ", std::strerror(errno)));
    std::filesystem::remove(temporary, ignored);
    return status;
  }
  std::filesystem::rename(temporary, path, error);
  if (!error) return {};
  std::filesystem::remove(temporary, ignored);
  return internal_error(str(path, ": cannot be put in place: ", error.message()));
}

}  // namespace

BulkTransfer::BulkTransfer(std::unique_ptr<ClientEndpoint> endpoint, BulkOptions options)
    : endpoint_(std::move(endpoint)), options_(std::move(options)), next_call_(entropy64() >> 1) {}

Result<BulkTransfer::Answer> BulkTransfer::ask(BulkRequest request,
                                               std::span<const std::byte> payload) {
  std::lock_guard lock(mutex_);
  const std::uint64_t call = next_call_++;
  std::visit([&](auto& r) { r.call = call; }, request);
  const Bytes frame = encode(request);
  const Bytes bytes(payload.begin(), payload.end());
  const SystemClock clock;
  TimeMs heard_ms = clock.now_ms(), send_ms = heard_ms;
  std::uint64_t connection = 0;
  std::string reason;
  while (clock.now_ms() - heard_ms < scaled_ms(options_.give_up_ms)) {
    // On a new connection at once: what was under way on the old one is lost.
    if (clock.now_ms() >= send_ms || endpoint_->connections() != connection) {
      connection = endpoint_->connections();
      const Status sent = endpoint_->send(frame, bytes);
      if (sent.code() == StatusCode::kInvalid) return sent;
      if (!sent.ok()) reason = sent.message();
      send_ms = clock.now_ms() + (sent.ok() ? scaled_ms(options_.repeat_ms) : kReceiveMs);
    }
    auto envelope = endpoint_->receive(kReceiveMs);
    if (!envelope.has_value()) continue;
    auto reply = decode_blob_reply(envelope->frame);
    if (!reply.ok() || reply->call != call) continue;  // of a call that is over
    if (reply->status.code() == StatusCode::kBusy) {
      heard_ms = clock.now_ms();
      const std::int64_t asked = retry_after_from_text(reply->status.message());
      send_ms = heard_ms + (asked > 0 ? asked : kBusyMs);
      continue;
    }
    TANDEM_RETURN_IF_ERROR(reply->status);
    return Answer{std::move(*reply), std::move(envelope->payload)};
  }
  return unavailable_error(str("no coordinator answers at ", options_.endpoint_name,
                               " (bulk): is it running? Start one with: tandem up",
                               reason.empty() ? "" : " (" + reason + ")"));
}

Result<std::vector<bool>> BulkTransfer::has(const std::vector<Digest>& digests) {
  std::vector<bool> all;
  for (std::size_t at = 0; at < digests.size(); at += kBlobHasMax) {
    const std::size_t end = std::min<std::size_t>(digests.size(), at + kBlobHasMax);
    const std::vector<Digest> part(digests.begin() + static_cast<std::ptrdiff_t>(at),
                                   digests.begin() + static_cast<std::ptrdiff_t>(end));
    TANDEM_ASSIGN_OR_RETURN(const Answer answer, ask(BlobHas{0, part}, {}));
    if (answer.reply.has.size() != part.size())
      return corrupt_error(
          str("asked about ", part.size(), " chunks, answered about ", answer.reply.has.size()));
    all.insert(all.end(), answer.reply.has.begin(), answer.reply.has.end());
  }
  return all;
}

Status BulkTransfer::put_known(const Digest& digest, std::span<const std::byte> chunk,
                               const std::string& pin) {
  return ask(BlobPut{0, digest, pin, {}}, chunk).status();
}

Status BulkTransfer::put(std::span<const std::byte> chunk, const std::string& pin) {
  if (chunk.empty() || static_cast<std::int64_t>(chunk.size()) > kChunkBytes)
    return invalid_error(str("a chunk has 1..", kChunkBytes, " bytes, not ", chunk.size()));
  return put_known(sha256(chunk), chunk, pin);
}

Result<Bytes> BulkTransfer::get(const Digest& digest) {
  TANDEM_ASSIGN_OR_RETURN(Answer answer, ask(BlobGet{0, digest, 0, 0}, {}));
  if (sha256(answer.payload) != digest)
    return corrupt_error(
        str("chunk ", digest, ": the bytes that came have the digest ", sha256(answer.payload)));
  return std::move(answer.payload);
}

Result<Upload> BulkTransfer::put_file(const std::string& path, const OnProgress& on_progress) {
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  if (error) return invalid_error(str(path, ": cannot be read: ", error.message()));
  if (size == 0) return invalid_error(str(path, ": is empty"));
  std::ifstream file(path, std::ios::binary);
  if (!file) return invalid_error(str(path, ": cannot be read: ", std::strerror(errno)));
  Upload upload{random_id("up-", 16), {}, static_cast<std::int64_t>(size), {}};
  for (std::int64_t at = 0; at < upload.bytes; at += kChunkBytes) {
    TANDEM_ASSIGN_OR_RETURN(const Bytes chunk,
                            read_chunk(file, std::min(kChunkBytes, upload.bytes - at), path));
    const Digest digest = sha256(chunk);
    TANDEM_ASSIGN_OR_RETURN(const auto there, has({digest}));
    if (!there[0]) TANDEM_RETURN_IF_ERROR(put_known(digest, chunk, upload.id));
    upload.chunks.push_back(digest);
    if (on_progress) on_progress(at + static_cast<std::int64_t>(chunk.size()), upload.bytes);
  }
  upload.root = root_of(upload.chunks);
  return upload;
}

Result<Upload> BulkTransfer::put_bytes(std::span<const std::byte> bytes,
                                       const OnProgress& on_progress) {
  if (bytes.empty()) return invalid_error("nothing to upload: no bytes");
  Upload upload{random_id("up-", 16), {}, static_cast<std::int64_t>(bytes.size()), {}};
  for (std::int64_t at = 0; at < upload.bytes; at += kChunkBytes) {
    const auto chunk =
        bytes.subspan(static_cast<std::size_t>(at),
                      static_cast<std::size_t>(std::min(kChunkBytes, upload.bytes - at)));
    const Digest digest = sha256(chunk);
    TANDEM_ASSIGN_OR_RETURN(const auto there, has({digest}));
    if (!there[0]) TANDEM_RETURN_IF_ERROR(put_known(digest, chunk, upload.id));
    upload.chunks.push_back(digest);
    if (on_progress) on_progress(at + static_cast<std::int64_t>(chunk.size()), upload.bytes);
  }
  upload.root = root_of(upload.chunks);
  return upload;
}

Status BulkTransfer::get_content(const Digest& root, const std::string& path) {
  const std::string temporary = path + random_id(".part-", 12);
  std::ofstream file(temporary, std::ios::binary | std::ios::trunc);
  std::vector<Digest> leaves;
  const auto copy = [&]() -> Status {
    for (std::int64_t at = 0, total = 1; at < total; at += kChunkBytes) {
      TANDEM_ASSIGN_OR_RETURN(const Answer answer, ask(BlobGet{0, root, at, kChunkBytes}, {}));
      total = answer.reply.total_bytes;
      const auto bytes = static_cast<std::int64_t>(answer.payload.size());
      if (bytes != std::min(kChunkBytes, total - at))
        return corrupt_error(str(path, ": ", bytes, " bytes came for byte ", at, " of ", total));
      leaves.push_back(sha256(answer.payload));
      file.write(reinterpret_cast<const char*>(answer.payload.data()), bytes);
    }
    if (root_of(leaves) != root)
      return corrupt_error(str(path, ": the bytes that came have the content root ",
                               root_of(leaves), ", not ", root));
    return {};
  };
  if (const Status status = copy(); !status.ok()) {
    std::error_code ignored;
    std::filesystem::remove(temporary, ignored);
    return status;
  }
  return put_in_place(file, temporary, path);
}

}  // namespace tandem::protocol::client
