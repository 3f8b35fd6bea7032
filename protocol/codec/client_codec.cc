// ClientMessage and ServerMessage.
#include "protocol/codec/shared.h"

#include "protocol/schema/client.capnp.h"

namespace tandem::protocol {
namespace codec {

static void put(wire::ClientMessage::Builder b, const ClientHello& m) {
  auto hello = b.initHello();
  put(hello.initVersion(), m.version);
  hello.setClient(text(m.client));
}
static void put(wire::ClientMessage::Builder b, const Generate& m) {
  put(b.initGenerate(), m);
}
static void put(wire::ClientMessage::Builder b, const Cancel& m) {
  b.initCancel().setId(text(m.id.value));
}
static void put(wire::ClientMessage::Builder b, const Call& m) {
  auto call = b.initCall();
  call.setCallId(text(m.call_id));
  call.setIdempotencyKey(text(m.idempotency_key));
  call.setMethod(text(m.method));
  call.setParamsJson(text(m.params_json));
}
static void put(wire::ClientMessage::Builder b, const CallCancel& m) {
  b.initCallCancel().setCallId(text(m.call_id));
}
static void put(wire::ClientMessage::Builder b, const Ping& m) {
  b.initPing().setNonce(m.nonce);
}

static void put(wire::ServerMessage::Builder b, const ServerHello& m) {
  auto hello = b.initHello();
  put(hello.initStatus(), m.status);
  put(hello.initVersion(), m.version);
  hello.setServer(text(m.server));
  hello.setIncarnation(m.incarnation);
  hello.setHeartbeatMs(m.heartbeat_ms);
}
static void put(wire::ServerMessage::Builder b, const GenerateChunk& m) {
  put(b.initChunk(), m);
}
static void put(wire::ServerMessage::Builder b, const CallReply& m) {
  auto reply = b.initCallReply();
  reply.setCallId(text(m.call_id));
  put(reply.initStatus(), m.status);
  reply.setResultJson(text(m.result_json));
  reply.setMore(m.more);
  reply.setRetryAfterMs(m.retry_after_ms);
}
static void put(wire::ServerMessage::Builder b, const Pong& m) {
  b.initPong().setNonce(m.nonce);
}

static ClientMessage get(wire::ClientMessage::Reader r) {
  switch (r.which()) {
    case wire::ClientMessage::HELLO: {
      const auto hello = r.getHello();
      return ClientHello{get(hello.getVersion()),
                         get_text(hello.getClient(), "hello.client", kNameBytesMax)};
    }
    case wire::ClientMessage::GENERATE:
      return get(r.getGenerate());
    case wire::ClientMessage::CANCEL:
      return Cancel{get_id<RequestId>(r.getCancel().getId(), "cancel.id")};
    case wire::ClientMessage::CALL: {
      const auto call = r.getCall();
      return Call{get_text(call.getCallId(), "call.call_id", kIdBytesMax),
                  get_text(call.getIdempotencyKey(), "call.idempotency_key", kIdBytesMax),
                  get_text(call.getMethod(), "call.method", kNameBytesMax),
                  get_text(call.getParamsJson(), "call.params_json", kCallJsonBytesMax)};
    }
    case wire::ClientMessage::CALL_CANCEL:
      return CallCancel{
          get_text(r.getCallCancel().getCallId(), "call_cancel.call_id", kIdBytesMax)};
    case wire::ClientMessage::PING:
      return Ping{r.getPing().getNonce()};
  }
  refuse_unknown("client message", static_cast<unsigned>(r.which()));
}

static ServerMessage get(wire::ServerMessage::Reader r) {
  switch (r.which()) {
    case wire::ServerMessage::HELLO: {
      const auto hello = r.getHello();
      ServerHello m;
      m.status = get(hello.getStatus());
      m.version = get(hello.getVersion());
      m.server = get_text(hello.getServer(), "hello.server", kNameBytesMax);
      m.incarnation = hello.getIncarnation();
      m.heartbeat_ms = get_count(hello.getHeartbeatMs(), "hello.heartbeat_ms");
      return m;
    }
    case wire::ServerMessage::CHUNK:
      return get(r.getChunk());
    case wire::ServerMessage::CALL_REPLY: {
      const auto reply = r.getCallReply();
      CallReply m;
      m.call_id = get_text(reply.getCallId(), "call_reply.call_id", kIdBytesMax);
      m.status = get(reply.getStatus());
      m.result_json = get_text(reply.getResultJson(), "call_reply.result_json", kCallJsonBytesMax);
      m.more = reply.getMore();
      m.retry_after_ms = get_count(reply.getRetryAfterMs(), "call_reply.retry_after_ms");
      return m;
    }
    case wire::ServerMessage::PONG:
      return Pong{r.getPong().getNonce()};
  }
  refuse_unknown("server message", static_cast<unsigned>(r.which()));
}

}  // namespace codec

Bytes encode(const ClientMessage& message) {
  return codec::encode_root<wire::ClientMessage>(
      [&](auto b) { std::visit([&](const auto& m) { codec::put(b, m); }, message); });
}

Bytes encode(const ServerMessage& message) {
  return codec::encode_root<wire::ServerMessage>(
      [&](auto b) { std::visit([&](const auto& m) { codec::put(b, m); }, message); });
}

Result<ClientMessage> decode_client(std::span<const std::byte> frame, DecodeCounters* counters) {
  return codec::decode_root<wire::ClientMessage, ClientMessage>(
      "client message", frame, counters, [](auto r) { return codec::get(r); });
}

Result<ServerMessage> decode_server(std::span<const std::byte> frame, DecodeCounters* counters) {
  return codec::decode_root<wire::ServerMessage, ServerMessage>(
      "server message", frame, counters, [](auto r) { return codec::get(r); });
}

Status check_encodable(const ClientMessage& message) {
  const auto decoded = decode_client(encode(message));
  return decoded.ok() ? Status() : invalid_error(decoded.status().message());
}

}  // namespace tandem::protocol
