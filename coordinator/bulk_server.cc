#include "coordinator/bulk_server.h"

#include "protocol/base/log.h"
#include "protocol/codec.h"

#include <algorithm>
#include <span>
#include <utility>

namespace tandem::coordinator {
namespace {

constexpr TimeMs kWaitMs = 50, kWaitWithRepliesMs = 2;
constexpr std::size_t kHasDigestsMax = 4096;
constexpr std::size_t kPinBytesMax = 64;

std::int64_t size_of(const protocol::Bytes& bytes) {
  return static_cast<std::int64_t>(bytes.size());
}

/// The chunks of one put: its whole payload, or its parts.
Result<std::vector<storage::BlobChunk>> split(const protocol::BlobPut& request,
                                              const protocol::Bytes& payload) {
  if (request.parts.empty()) return std::vector<storage::BlobChunk>{{request.digest, payload}};
  std::vector<storage::BlobChunk> chunks;
  std::int64_t at = 0;
  const std::span<const std::byte> bytes = payload;
  for (const protocol::BlobPart& part : request.parts) {
    if (part.bytes < 1 || part.bytes > size_of(payload) - at)
      return invalid_error(str("the parts of a put do not fit its payload of ", size_of(payload),
                               " bytes: ", part.bytes, " from byte ", at));
    chunks.push_back({part.digest, bytes.subspan(static_cast<std::size_t>(at),
                                                 static_cast<std::size_t>(part.bytes))});
    at += part.bytes;
  }
  if (at != size_of(payload))
    return invalid_error(
        str("the parts of a put have ", at, " bytes, its payload ", size_of(payload)));
  return chunks;
}

}  // namespace

BulkServer::BulkServer(std::unique_ptr<protocol::ServerEndpoint> endpoint,
                       storage::Registry& registry, const ServedFiles& files)
    : endpoint_(std::move(endpoint)), registry_(registry), files_(files) {
  thread_ = std::thread([this] { loop(); });
}

BulkServer::~BulkServer() {
  ending_ = true;
  endpoint_->wake();
  thread_.join();
}

void BulkServer::loop() {
  while (!ending_) {
    const bool any = take_batch();
    // The storing thread is waited for only when no more may be taken before it is done.
    if (put_bytes_ >= kBulkBatchBytes) end_storing();
    keep_storing();
    flush();
    if (any) continue;
    auto envelope = endpoint_->receive(outbox_.empty() ? kWaitMs : kWaitWithRepliesMs);
    if (envelope) handle(std::move(*envelope));
  }
  finish_puts();
}

bool BulkServer::take_batch() {
  bool any = false;
  for (std::size_t i = 0; i < kBulkBatchRequests && put_bytes_ < kBulkBatchBytes; ++i) {
    auto envelope = endpoint_->receive(0);
    if (!envelope) break;
    any = true;
    handle(std::move(*envelope));
    keep_storing();  // the disk works from the first put on
  }
  return any;
}

void BulkServer::handle(protocol::Envelope envelope) {
  ++counters_.requests;
  auto request = protocol::decode_bulk(envelope.frame);
  if (!request.ok()) {
    ++counters_.refused;
    log_debug("bulk: refused a frame of ", envelope.frame.size(),
              " bytes: ", request.status().message());
    return;
  }
  if (const auto* put_request = std::get_if<protocol::BlobPut>(&*request)) {
    put(std::move(envelope.peer), *put_request, std::move(envelope.payload));
  } else if (const auto* has_request = std::get_if<protocol::BlobHas>(&*request)) {
    finish_puts();  // a put that came before the question is part of the answer
    has(envelope.peer, *has_request);
  } else if (const auto* get_request = std::get_if<protocol::BlobGet>(&*request)) {
    finish_puts();
    get(envelope.peer, *get_request);
  }
}

void BulkServer::put(std::string peer, const protocol::BlobPut& request, protocol::Bytes bytes) {
  auto chunks = split(request, bytes);
  Status status = chunks.ok() ? storage::BlobStore::verify(*chunks) : chunks.status();
  if (!status.ok()) {
    protocol::BlobReply message;
    message.call = request.call;
    message.status = std::move(status);
    return reply(peer, message);
  }
  put_bytes_ += size_of(bytes);
  puts_.push_back({std::move(peer),
                   request.pin.substr(0, kPinBytesMax),
                   request.call,
                   std::move(bytes),
                   std::move(*chunks),
                   {}});
}

void BulkServer::keep_storing() {
  if (stored_) end_storing();
  if (!storing_thread_.joinable()) begin_storing();
}

void BulkServer::begin_storing() {
  if (puts_.empty()) return;
  storing_ = std::exchange(puts_, {});
  put_bytes_ = 0;
  stored_ = false;
  storing_thread_ = std::thread([this] {
    store();
    stored_ = true;
    endpoint_->wake();
  });
}

void BulkServer::end_storing() {
  if (!storing_thread_.joinable()) return;
  storing_thread_.join();
  for (const Put& put : storing_) {
    if (put.status.ok()) counters_.put_bytes += put.bytes.size();
    protocol::BlobReply message;
    message.call = put.call;
    message.status = put.status;
    reply(put.peer, message);
  }
  storing_.clear();
}

void BulkServer::finish_puts() {
  end_storing();
  begin_storing();
  end_storing();
}

void BulkServer::store() {
  std::map<std::string, std::vector<Put*>> by_pin;
  for (Put& put : storing_) by_pin[put.pin].push_back(&put);
  for (const auto& [pin, puts] : by_pin) {
    std::vector<storage::BlobChunk> chunks;
    for (const Put* put : puts) chunks.insert(chunks.end(), put->chunks.begin(), put->chunks.end());
    const Status together = registry_.blobs().put_verified(chunks, pin);
    // One put that cannot be stored must not fail its neighbours: each is asked for alone then.
    for (Put* put : puts)
      put->status = together.ok() ? together : registry_.blobs().put_verified(put->chunks, pin);
  }
}

void BulkServer::has(const std::string& peer, const protocol::BlobHas& request) {
  protocol::BlobReply message;
  message.call = request.call;
  if (request.digests.size() > kHasDigestsMax) {
    message.status = invalid_error(
        str("at most ", kHasDigestsMax, " digests at once, not ", request.digests.size()));
    return reply(peer, message);
  }
  auto missing = registry_.blobs().missing(request.digests, "has/" + peer.substr(0, 48));
  if (!missing.ok()) {
    message.status = missing.status();
    return reply(peer, message);
  }
  std::size_t next = 0;
  for (const Digest& digest : request.digests) {
    const bool absent = next < missing->size() && (*missing)[next] == digest;
    next += absent ? 1 : 0;
    message.has.push_back(!absent);
  }
  reply(peer, message);
}

void BulkServer::get(const std::string& peer, const protocol::BlobGet& request) {
  protocol::BlobReply message;
  message.call = request.call;
  auto blob = registry_.blob(request.digest);
  protocol::Bytes payload;
  if (blob.ok()) {
    message.total_bytes = size_of(*blob);
    const std::int64_t begin = std::clamp<std::int64_t>(request.offset, 0, message.total_bytes);
    const std::int64_t count = request.bytes <= 0
                                   ? message.total_bytes - begin
                                   : std::min(request.bytes, message.total_bytes - begin);
    payload.assign(blob->begin() + begin, blob->begin() + begin + count);
  } else if (blob.status().code() == StatusCode::kNotFound) {
    auto piece = files_.read(request.digest, request.offset, request.bytes);
    message.status = piece.status();
    if (piece.ok()) {
      message.total_bytes = piece->total_bytes;
      payload = std::move(piece->bytes);
    }
  } else {
    message.status = blob.status();
  }
  counters_.get_bytes += payload.size();
  reply(peer, message, std::move(payload));
}

void BulkServer::reply(const std::string& peer, const protocol::BlobReply& message,
                       protocol::Bytes payload) {
  Reply next{protocol::encode(message), std::move(payload)};
  const std::int64_t bytes = size_of(next.frame) + size_of(next.payload);
  if (outbox_bytes_ + bytes > kBulkOutboxBytesMax) {
    ++counters_.dropped;  // the peer asks again
    return;
  }
  outbox_bytes_ += bytes;
  outbox_[peer].push_back(std::move(next));
  flush();
}

void BulkServer::flush() {
  for (auto peer = outbox_.begin(); peer != outbox_.end();) {
    auto& queue = peer->second;
    bool gone = false;
    while (!queue.empty()) {
      const Reply& next = queue.front();
      const Status sent = endpoint_->send(peer->first, next.frame, next.payload);
      if (sent.code() == StatusCode::kBusy) break;
      gone = !sent.ok();
      if (gone) break;
      outbox_bytes_ -= size_of(next.frame) + size_of(next.payload);
      queue.pop_front();
    }
    if (gone) {
      for (const Reply& lost : queue) {
        outbox_bytes_ -= size_of(lost.frame) + size_of(lost.payload);
        ++counters_.dropped;
      }
      queue.clear();
    }
    peer = queue.empty() ? outbox_.erase(peer) : std::next(peer);
  }
}

}  // namespace tandem::coordinator
