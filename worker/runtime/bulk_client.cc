#include "worker/runtime/bulk_client.h"

#include "protocol/codec.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <utility>

namespace tandem::worker::runtime {
namespace {

constexpr std::size_t kInFlightMax = 256;             ///< calls sent and not answered
constexpr std::int64_t kInFlightBytesMax = 64 << 20;  ///< payload of those
constexpr TimeMs kResendMs = 5000, kPollMs = 100;
constexpr TimeMs kPollFullMs = 1;  ///< until the socket may have room again
constexpr std::size_t kHasBatch = 4096;
constexpr std::int64_t kGroupedBytesMax = 1 << 20;  ///< a larger blob has a message of its own
/// Small enough that storing one group and sending the next overlap.
constexpr std::int64_t kGroupBytesMax = 2 << 20;
constexpr std::size_t kAskBytesMin = 16 << 20;  ///< less is sent without asking what is there

std::uint64_t& call_id(protocol::BulkRequest& request) {
  return std::visit([](auto& r) -> std::uint64_t& { return r.call; }, request);
}

}  // namespace

BulkClient::BulkClient(std::unique_ptr<protocol::ClientEndpoint> endpoint, const Clock& clock)
    : endpoint_(std::move(endpoint)), clock_(clock) {}

bool BulkClient::send_due(std::span<Call> calls) {
  const TimeMs now = clock_.now_ms();
  std::size_t in_flight = 0;
  std::int64_t bytes = 0;
  for (Call& call : calls) {
    if (call.done) continue;
    const bool due = call.sent_ms < 0 || now - call.sent_ms > scaled_ms(kResendMs);
    if (due) {
      const Status sent = endpoint_->send_parts(protocol::encode(call.request), call.parts);
      if (!sent.ok()) return sent.code() != StatusCode::kBusy;  // full or away: later
      call.sent_ms = now;
    }
    bytes += call.bytes;
    if (++in_flight >= kInFlightMax || bytes >= kInFlightBytesMax) break;
  }
  return true;
}

void BulkClient::number(std::vector<Call>& calls) {
  for (Call& call : calls) call_id(call.request) = next_call_++;
}

Status BulkClient::run(std::vector<Call>& calls, TimeMs deadline_ms) {
  const std::uint64_t first = next_call_ - calls.size();
  const TimeMs end = clock_.now_ms() + scaled_ms(deadline_ms);
  for (std::size_t done = 0; done < calls.size();) {
    if (cancelled_) return cancelled_error("the transfer was cancelled");
    if (deadline_ms > 0 && clock_.now_ms() > end)
      return timeout_error(
          str("no answer from the coordinator's bulk socket for ", deadline_ms, " ms"));
    auto envelope = endpoint_->receive(send_due(calls) ? kPollMs : kPollFullMs);
    if (!envelope) continue;
    auto reply = protocol::decode_blob_reply(envelope->frame);
    if (!reply.ok() || reply->call < first || reply->call >= next_call_)
      continue;  // an older call's
    Call& call = calls[reply->call - first];
    if (call.done) continue;
    call.done = true;
    ++done;
    call.reply = std::move(*reply);
    call.data = std::move(envelope->payload);
  }
  return {};
}

Result<std::vector<bool>> BulkClient::ask(std::span<const BlobView> blobs, TimeMs deadline_ms) {
  std::vector<Call> questions;
  for (std::size_t i = 0; i < blobs.size(); i += kHasBatch) {
    protocol::BlobHas has;
    for (const auto& blob : blobs.subspan(i, std::min(kHasBatch, blobs.size() - i)))
      has.digests.push_back(blob.digest);
    questions.push_back({.request = std::move(has), .parts = {}, .reply = {}, .data = {}});
  }
  number(questions);
  TANDEM_RETURN_IF_ERROR(run(questions, deadline_ms));
  std::vector<bool> known;
  for (const Call& question : questions) {
    TANDEM_RETURN_IF_ERROR(question.reply.status);
    known.insert(known.end(), question.reply.has.begin(), question.reply.has.end());
  }
  known.resize(blobs.size());
  return known;
}

Status BulkClient::put(std::span<const BlobView> blobs, const std::string& pin,
                       TimeMs deadline_ms) {
  std::size_t total = 0;
  for (const BlobView& blob : blobs) total += blob.bytes.size();
  std::vector<bool> known(blobs.size(), false);
  if (total > kAskBytesMin) {
    TANDEM_ASSIGN_OR_RETURN(known, ask(blobs, deadline_ms));
  }
  Upload upload(*this, pin);
  for (std::size_t i = 0; i < blobs.size(); ++i)
    if (!known[i]) upload.add(blobs[i]);
  return upload.finish(deadline_ms);
}

void BulkClient::Upload::add(const BlobView& blob) {
  const auto bytes = static_cast<std::int64_t>(blob.bytes.size());
  const bool small = bytes <= kGroupedBytesMax;
  const bool joins = open_ && small && calls_.back().bytes + bytes <= kGroupBytesMax &&
                     calls_.back().parts.size() < kHasBatch;
  if (!joins) {
    send();  // none of these takes more
    calls_.push_back(
        {.request =
             protocol::BlobPut{client_.next_call_++, small ? Digest{} : blob.digest, pin_, {}},
         .parts = {},
         .reply = {},
         .data = {}});
  }
  open_ = small;
  Call& call = calls_.back();
  if (small) std::get<protocol::BlobPut>(call.request).parts.push_back({blob.digest, bytes});
  call.parts.push_back(blob.bytes);
  call.bytes += bytes;
}

void BulkClient::Upload::send() {
  open_ = false;
  (void)client_.send_due(calls_);
}

Status BulkClient::Upload::finish(TimeMs deadline_ms) {
  TANDEM_RETURN_IF_ERROR(client_.run(calls_, deadline_ms));
  for (const Call& call : calls_) TANDEM_RETURN_IF_ERROR(call.reply.status);
  return {};
}

Result<std::vector<std::vector<std::byte>>> BulkClient::get(std::span<const Digest> digests,
                                                            TimeMs deadline_ms) {
  std::vector<Call> calls;
  for (const Digest& digest : digests)
    calls.push_back(
        {.request = protocol::BlobGet{0, digest, 0, 0}, .parts = {}, .reply = {}, .data = {}});
  number(calls);
  TANDEM_RETURN_IF_ERROR(run(calls, deadline_ms));
  std::vector<std::vector<std::byte>> blobs;
  for (std::size_t i = 0; i < calls.size(); ++i) {
    TANDEM_RETURN_IF_ERROR(calls[i].reply.status);
    if (sha256(calls[i].data) != digests[i])
      return corrupt_error(str("blob ", digests[i].hex(), " arrived with other bytes"));
    blobs.push_back(std::move(calls[i].data));
  }
  return blobs;
}

Status BulkClient::fetch_file(const Digest& root, const std::string& path, TimeMs deadline_ms) {
  const std::string temporary = path + ".part";
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(path).parent_path(), error);
  Hasher leaves;
  std::ofstream out(temporary, std::ios::binary | std::ios::trunc);
  for (std::int64_t offset = 0, total = 1; offset < total; offset += kDigestLeafBytes) {
    std::vector<Call> calls(1);
    calls[0].request = protocol::BlobGet{0, root, offset, kDigestLeafBytes};
    number(calls);
    TANDEM_RETURN_IF_ERROR(run(calls, deadline_ms));
    TANDEM_RETURN_IF_ERROR(calls[0].reply.status);
    total = calls[0].reply.total_bytes;
    const auto& data = calls[0].data;
    if (static_cast<std::int64_t>(data.size()) != std::min(kDigestLeafBytes, total - offset))
      return corrupt_error(
          str(path, ": ", data.size(), " bytes arrived at offset ", offset, " of ", total));
    const Digest leaf = sha256(data);
    leaves.update(std::as_bytes(std::span(leaf.bytes)));
    out.write(reinterpret_cast<const char*>(data.data()),
              static_cast<std::streamsize>(data.size()));
  }
  if (!out.flush()) return internal_error(str("cannot write ", temporary, " (disk full?)"));
  if (leaves.finish() != root)
    return corrupt_error(str(path, " does not match its digest ", root.hex()));
  std::filesystem::rename(temporary, path, error);
  if (error) return internal_error(str("cannot rename ", temporary, ": ", error.message()));
  return {};
}

}  // namespace tandem::worker::runtime
