// BulkRequest and BlobReply. The chunk's bytes are not in here: they have a frame of their own.
#include "protocol/codec/shared.h"

#include "protocol/schema/bulk.capnp.h"

namespace tandem::protocol {
namespace codec {

static void put(wire::BulkRequest::Builder root, const BlobHas& m) {
  auto b = root.initHas();
  b.setCall(m.call);
  put_digests(b.initDigests(count(m.digests)), m.digests);
}
static void put(wire::BulkRequest::Builder root, const BlobPut& m) {
  auto b = root.initPut();
  b.setCall(m.call);
  b.setDigest(data(m.digest));
  b.setPin(text(m.pin));
  if (!m.parts.empty())
    put_structs(b.initParts(count(m.parts)), m.parts, [](auto item, const BlobPart& part) {
      item.setDigest(data(part.digest));
      item.setBytes(part.bytes);
    });
}
static void put(wire::BulkRequest::Builder root, const BlobGet& m) {
  auto b = root.initGet();
  b.setCall(m.call);
  b.setDigest(data(m.digest));
  b.setOffset(m.offset);
  b.setBytes(m.bytes);
}

static BulkRequest get(wire::BulkRequest::Reader r) {
  switch (r.which()) {
    case wire::BulkRequest::HAS:
      return BlobHas{r.getHas().getCall(),
                     get_digests(r.getHas().getDigests(), "has.digests", kBlobHasMax)};
    case wire::BulkRequest::PUT: {
      const auto put_request = r.getPut();
      check_list(put_request.getParts().size(), "put.parts", kBlobHasMax);
      return BlobPut{put_request.getCall(), get_digest(put_request.getDigest(), "put.digest"),
                     get_text(put_request.getPin(), "put.pin", kIdBytesMax),
                     get_structs<BlobPart>(put_request.getParts(), "put.parts", [](auto item) {
                       return BlobPart{get_digest(item.getDigest(), "put.parts.digest"),
                                       get_count(item.getBytes(), "put.parts.bytes")};
                     })};
    }
    case wire::BulkRequest::GET: {
      const auto get_request = r.getGet();
      return BlobGet{get_request.getCall(), get_digest(get_request.getDigest(), "get.digest"),
                     get_count(get_request.getOffset(), "get.offset"),
                     get_count(get_request.getBytes(), "get.bytes")};
    }
  }
  refuse_unknown("bulk request", static_cast<unsigned>(r.which()));
}

static void put(wire::BlobReply::Builder b, const BlobReply& m) {
  b.setCall(m.call);
  put(b.initStatus(), m.status);
  auto has = b.initHas(count(m.has));
  for (unsigned i = 0; i < count(m.has); ++i) has.set(i, m.has[i]);
  b.setTotalBytes(m.total_bytes);
}
static BlobReply get(wire::BlobReply::Reader r) {
  BlobReply m;
  m.call = r.getCall();
  m.status = get(r.getStatus());
  const auto has = r.getHas();
  check_list(has.size(), "reply.has", kBlobHasMax);
  for (const bool here : has) m.has.push_back(here);
  m.total_bytes = get_count(r.getTotalBytes(), "reply.total_bytes");
  return m;
}

}  // namespace codec

Bytes encode(const BulkRequest& message) {
  return codec::encode_root<wire::BulkRequest>(
      [&](auto b) { std::visit([&](const auto& m) { codec::put(b, m); }, message); });
}

Bytes encode(const BlobReply& message) {
  return codec::encode_root<wire::BlobReply>([&](auto b) { codec::put(b, message); });
}

Result<BulkRequest> decode_bulk(std::span<const std::byte> frame, DecodeCounters* counters) {
  return codec::decode_root<wire::BulkRequest, BulkRequest>("bulk request", frame, counters,
                                                            [](auto r) { return codec::get(r); });
}

Result<BlobReply> decode_blob_reply(std::span<const std::byte> frame, DecodeCounters* counters) {
  return codec::decode_root<wire::BlobReply, BlobReply>("bulk reply", frame, counters,
                                                        [](auto r) { return codec::get(r); });
}

}  // namespace tandem::protocol
