// The codec: every message and field survives, the wire's bytes do not change by accident, and
// whatever is not a message is refused and counted.
#include "protocol/codec.h"

#include "protocol/base/str.h"
#include "protocol/schema/bulk.capnp.h"
#include "protocol/schema/client.capnp.h"
#include "protocol/schema/control.capnp.h"
#include "tests/protocol/random_messages.h"

#include <capnp/dynamic.h>
#include <capnp/message.h>
#include <capnp/serialize.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <set>
#include <sstream>

namespace tandem::protocol {
namespace {

/// One direction of the wire, so that every claim is made of all of them.
struct Direction {
  const char* name;
  std::size_t kinds;
  capnp::StructSchema schema;
  std::function<Bytes(std::size_t kind, Random&)> encode_random;
  /// Decodes; encoded again when that works.
  std::function<Result<Bytes>(std::span<const std::byte>, DecodeCounters*)> recode;
  /// True when decode(encode(m)) == m for a random message.
  std::function<bool(std::size_t kind, Random&)> round_trips;
};

template <class Message, class Make, class Decode>
Direction direction(const char* name, std::size_t kinds, capnp::StructSchema schema, Make make,
                    Decode decode) {
  return {name,
          kinds,
          schema,
          [=](std::size_t kind, Random& random) { return encode(Message(make(kind, random))); },
          [=](std::span<const std::byte> frame, DecodeCounters* counters) -> Result<Bytes> {
            const auto message = decode(frame, counters);
            if (!message.ok()) return message.status();
            return encode(*message);
          },
          [=](std::size_t kind, Random& random) {
            const Message message = make(kind, random);
            const auto again = decode(encode(message), nullptr);
            return again.ok() && *again == message;
          }};
}

const std::vector<Direction>& directions() {
  static const std::vector<Direction> all{
      direction<ClientMessage>("client", kClientKinds, capnp::Schema::from<wire::ClientMessage>(),
                               random_client_message, decode_client),
      direction<ServerMessage>("server", kServerKinds, capnp::Schema::from<wire::ServerMessage>(),
                               random_server_message, decode_server),
      direction<WorkerMessage>("worker", kWorkerKinds, capnp::Schema::from<wire::WorkerMessage>(),
                               random_worker_message, decode_worker),
      direction<ControlMessage>("control", kControlKinds,
                                capnp::Schema::from<wire::ControlMessage>(), random_control_message,
                                decode_control),
      direction<BulkRequest>("bulk", kBulkKinds, capnp::Schema::from<wire::BulkRequest>(),
                             random_bulk_request, decode_bulk),
      direction<BlobReply>(
          "reply", 1, capnp::Schema::from<wire::BlobReply>(),
          [](std::size_t, Random& random) { return random_blob_reply(random); },
          decode_blob_reply)};
  return all;
}

TEST(Codec, EveryMessageWithEveryFieldSurvives) {
  for (const Direction& d : directions())
    for (std::size_t kind = 0; kind < d.kinds; ++kind)
      for (std::uint64_t seed = 1; seed <= 50; ++seed) {
        Random random(seed, kind);
        ASSERT_TRUE(d.round_trips(kind, random)) << d.name << " kind " << kind << " seed " << seed;
      }
}

TEST(Codec, DefaultsSurvive) {
  EXPECT_EQ(std::get<Generate>(decode_client(encode(ClientMessage(Generate{}))).value()),
            Generate{});
  EXPECT_EQ(std::get<GenerateChunk>(decode_server(encode(ServerMessage(GenerateChunk{}))).value()),
            GenerateChunk{});
  EXPECT_EQ(std::get<WorkerHello>(decode_worker(encode(WorkerMessage(WorkerHello{}))).value()),
            WorkerHello{});
  EXPECT_EQ(std::get<StartJob>(decode_control(encode(ControlMessage(StartJob{}))).value()),
            StartJob{});
  EXPECT_EQ(decode_blob_reply(encode(BlobReply{})).value(), BlobReply{});
}

/// Notes every field of `value` that is set, by its path in the schema.
void note_fields(capnp::DynamicStruct::Reader value, std::set<std::string>& seen) {
  const auto note = [&](capnp::StructSchema::Field field) {
    const std::string name = str(value.getSchema().getProto().getDisplayName().cStr(), ".",
                                 field.getProto().getName().cStr());
    const auto type = field.getType();
    if (field.getProto().isGroup() || type.isStruct()) {
      if (!field.getProto().isGroup() && !value.has(field)) return;
      seen.insert(name);
      note_fields(value.get(field).as<capnp::DynamicStruct>(), seen);
      return;
    }
    if (type.isVoid()) return;
    if (!value.has(field, capnp::HasMode::NON_DEFAULT)) return;
    seen.insert(name);
    if (type.isList() && type.asList().getElementType().isStruct())
      for (auto item : value.get(field).as<capnp::DynamicList>())
        note_fields(item.as<capnp::DynamicStruct>(), seen);
  };
  for (auto field : value.getSchema().getNonUnionFields()) note(field);
  KJ_IF_MAYBE (field, value.which()) note(*field);
}

void all_fields(capnp::StructSchema schema, std::set<std::string>& all) {
  for (auto field : schema.getFields()) {
    const auto type = field.getType();
    if (type.isVoid()) continue;
    const std::string name =
        str(schema.getProto().getDisplayName().cStr(), ".", field.getProto().getName().cStr());
    if (!all.insert(name).second) continue;
    if (type.isStruct()) all_fields(type.asStruct(), all);
    if (type.isList() && type.asList().getElementType().isStruct())
      all_fields(type.asList().getElementType().asStruct(), all);
  }
}

TEST(Codec, EncodesEveryFieldOfTheSchemas) {
  for (const Direction& d : directions()) {
    std::set<std::string> all, seen;
    all_fields(d.schema, all);
    for (std::size_t kind = 0; kind < d.kinds; ++kind)
      for (std::uint64_t seed = 1; seed <= 5; ++seed) {
        Random random(seed, kind);
        const Bytes frame = d.encode_random(kind, random);
        capnp::FlatArrayMessageReader reader(
            kj::arrayPtr(reinterpret_cast<const capnp::word*>(frame.data()), frame.size() / 8));
        note_fields(reader.getRoot<capnp::DynamicStruct>(d.schema), seen);
      }
    for (const std::string& field : all)
      EXPECT_TRUE(seen.contains(field)) << d.name << ": " << field << " is never set";
  }
}

// -- golden bytes
// -----------------------------------------------------------------------------------

std::string hex_of(const Bytes& bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const std::byte b : bytes) {
    text.push_back(kDigits[std::to_integer<unsigned>(b) >> 4]);
    text.push_back(kDigits[std::to_integer<unsigned>(b) & 15]);
  }
  return text;
}

Bytes bytes_of_hex(const std::string& hex) {
  Bytes bytes;
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2)
    bytes.push_back(static_cast<std::byte>(std::stoi(hex.substr(i, 2), nullptr, 16)));
  return bytes;
}

/// "direction kind hex" for one message of each type.
std::string golden_now() {
  std::string text;
  for (const Direction& d : directions())
    for (std::size_t kind = 0; kind < d.kinds; ++kind) {
      Random random(2026, kind);
      text += str(d.name, " ", kind, " ", hex_of(d.encode_random(kind, random)), "\n");
    }
  return text;
}

/// TANDEM_WRITE_GOLDEN=1 writes the file again; do so only with a new minor version (the schemas
/// say when that is).
TEST(Codec, TheWiresBytesAreThoseOfTheGoldens) {
  const std::string path = std::string(TANDEM_SOURCE_DIR) + "/tests/protocol/golden/wire_1_9.txt";
  if (std::getenv("TANDEM_WRITE_GOLDEN") != nullptr) std::ofstream(path) << golden_now();
  std::ifstream file(path);
  std::stringstream golden;
  golden << file.rdbuf();
  ASSERT_FALSE(golden.str().empty()) << path << " is missing";
  EXPECT_EQ(golden_now(), golden.str());
}

TEST(Codec, ReadsWhatVersion18Wrote) {
  std::ifstream file(std::string(TANDEM_SOURCE_DIR) + "/tests/protocol/golden/wire_1_8.txt");
  int hellos = 0, loaded = 0, loads = 0, commands = 0;
  for (std::string line; std::getline(file, line);) {
    const auto bytes = bytes_of_hex(line.substr(line.rfind(' ') + 1));
    if (line.starts_with("worker ")) {
      const auto message = decode_worker(bytes);
      ASSERT_TRUE(message.ok()) << line << ": " << message.status().to_string();
      if (const auto* hello = std::get_if<WorkerHello>(&*message)) {
        ++hellos;
        EXPECT_EQ(hello->base_bytes, 0);
      } else if (const auto* done = std::get_if<ModelLoaded>(&*message)) {
        ++loaded;
        EXPECT_EQ(done->base_bytes, 0);
      }
    } else if (line.starts_with("control ")) {
      const auto message = decode_control(bytes);
      ASSERT_TRUE(message.ok()) << line << ": " << message.status().to_string();
      if (const auto* load = std::get_if<LoadModel>(&*message)) {
        ++loads;
        EXPECT_EQ(load->gang_bytes, -1) << "1.8 did not say";
      } else if (const auto* command = std::get_if<AgentCommand>(&*message)) {
        ++commands;
        EXPECT_EQ(command->engine, 0u);
      }
    }
  }
  EXPECT_EQ(hellos, 1);
  EXPECT_EQ(loaded, 1);
  EXPECT_EQ(loads, 1);
  EXPECT_EQ(commands, 1);
}

TEST(Codec, ReadsWhatVersion17Wrote) {
  std::ifstream file(std::string(TANDEM_SOURCE_DIR) + "/tests/protocol/golden/wire_1_7.txt");
  int starts = 0, replies = 0;
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("control ")) continue;
    const auto message = decode_control(bytes_of_hex(line.substr(line.rfind(' ') + 1)));
    ASSERT_TRUE(message.ok()) << line << ": " << message.status().to_string();
    if (const auto* start = std::get_if<StartJob>(&*message)) {
      ++starts;
      EXPECT_EQ(start->adapter_bytes, -1) << "1.7 did not say";
    } else if (const auto* reply = std::get_if<HeartbeatReply>(&*message)) {
      ++replies;
      EXPECT_EQ(reply->gang_bytes, 0);
    }
  }
  EXPECT_EQ(starts, 1);
  EXPECT_EQ(replies, 1);
}

TEST(Codec, ReadsWhatVersion16Wrote) {
  std::ifstream file(std::string(TANDEM_SOURCE_DIR) + "/tests/protocol/golden/wire_1_6.txt");
  int estimates = 0;
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("control ")) continue;
    const auto message = decode_control(bytes_of_hex(line.substr(line.rfind(' ') + 1)));
    ASSERT_TRUE(message.ok()) << line << ": " << message.status().to_string();
    const auto* estimate = std::get_if<EstimateRequest>(&*message);
    if (estimate == nullptr) continue;
    ++estimates;
    EXPECT_TRUE(estimate->evaluates) << "it may: 1.6 did not say";
  }
  EXPECT_EQ(estimates, 1);
}

TEST(Codec, ReadsWhatVersion15Wrote) {
  std::ifstream file(std::string(TANDEM_SOURCE_DIR) + "/tests/protocol/golden/wire_1_5.txt");
  int generates = 0;
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("client ")) continue;
    const auto message = decode_client(bytes_of_hex(line.substr(line.rfind(' ') + 1)));
    ASSERT_TRUE(message.ok()) << line << ": " << message.status().to_string();
    const auto* generate = std::get_if<Generate>(&*message);
    if (generate == nullptr) continue;
    ++generates;
    EXPECT_TRUE(generate->sampling.repetition_penalty.has_value())
        << "1.5 could not leave it unset";
  }
  EXPECT_EQ(generates, 1);
  capnp::MallocMessageBuilder plain;
  plain.initRoot<wire::ClientMessage>().initGenerate().initSampling();
  const auto words = capnp::messageToFlatArray(plain);
  const auto message = decode_client(std::as_bytes(std::span(words.begin(), words.size())));
  ASSERT_TRUE(message.ok()) << message.status().to_string();
  EXPECT_EQ(std::get<Generate>(*message).sampling.repetition_penalty, 1.0f);
}

TEST(Codec, ReadsWhatVersion14Wrote) {
  std::ifstream file(std::string(TANDEM_SOURCE_DIR) + "/tests/protocol/golden/wire_1_4.txt");
  int hellos = 0;
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("worker ")) continue;
    const auto message = decode_worker(bytes_of_hex(line.substr(line.rfind(' ') + 1)));
    ASSERT_TRUE(message.ok()) << line << ": " << message.status().to_string();
    const auto* hello = std::get_if<WorkerHello>(&*message);
    if (hello == nullptr) continue;
    ++hellos;
    EXPECT_FALSE(hello->device_name.empty());
    EXPECT_EQ(hello->program, "") << "1.4 did not say it";
  }
  EXPECT_EQ(hellos, 1);
}

TEST(Codec, ReadsWhatVersion13Wrote) {
  std::ifstream file(std::string(TANDEM_SOURCE_DIR) + "/tests/protocol/golden/wire_1_3.txt");
  int frames = 0;
  for (std::string line; std::getline(file, line);) {
    const Bytes frame = bytes_of_hex(line.substr(line.rfind(' ') + 1));
    if (line.starts_with("worker ")) {
      ++frames;
      EXPECT_TRUE(decode_worker(frame).ok()) << line;
    } else if (line.starts_with("control ")) {
      ++frames;
      const auto message = decode_control(frame);
      ASSERT_TRUE(message.ok()) << line << ": " << message.status().to_string();
      if (const auto* start = std::get_if<StartJob>(&*message)) {
        EXPECT_FALSE(start->serve_json.empty());
      }
    }
  }
  EXPECT_EQ(frames, 21);
}

TEST(Codec, ReadsWhatVersion12Wrote) {
  std::ifstream file(std::string(TANDEM_SOURCE_DIR) + "/tests/protocol/golden/wire_1_2.txt");
  int frames = 0;
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("control ")) continue;
    ++frames;
    const auto message = decode_control(bytes_of_hex(line.substr(line.rfind(' ') + 1)));
    ASSERT_TRUE(message.ok()) << line << ": " << message.status().to_string();
    if (const auto* start = std::get_if<StartJob>(&*message)) {
      EXPECT_NE(start->gang, 0u);
      EXPECT_EQ(start->serve_json, "") << "1.2 knew no replicas";
    }
    if (const auto* estimate = std::get_if<EstimateRequest>(&*message)) {
      EXPECT_FALSE(estimate->call_id.empty());
      EXPECT_EQ(estimate->serve_json, "");
      EXPECT_TRUE(estimate->evaluates) << "it may: 1.2 did not say";
    }
  }
  EXPECT_EQ(frames, 11);
}

TEST(Codec, ReadsWhatVersion11Wrote) {
  std::ifstream file(std::string(TANDEM_SOURCE_DIR) + "/tests/protocol/golden/wire_1_1.txt");
  int frames = 0;
  for (std::string line; std::getline(file, line);) {
    const std::string hex = line.substr(line.rfind(' ') + 1);
    if (line.starts_with("worker ")) {
      ++frames;
      EXPECT_TRUE(decode_worker(bytes_of_hex(hex)).ok()) << line;
    }
    if (!line.starts_with("control ")) continue;
    ++frames;
    const auto message = decode_control(bytes_of_hex(hex));
    ASSERT_TRUE(message.ok()) << line << ": " << message.status().to_string();
    if (const auto* start = std::get_if<StartJob>(&*message)) {
      EXPECT_FALSE(start->job.empty());
      EXPECT_EQ(start->gang, 0u) << "1.1 knew no gangs";
      EXPECT_TRUE(start->members.empty());
    }
  }
  EXPECT_EQ(frames, 21);
}

TEST(Codec, ReadsWhatVersion10Wrote) {
  // CallReply of 1.0: one word less, for it lacks retryAfterMs. Written by hand as 1.0 lays it out:
  // segment table; root with one data word (the union's tag) and one pointer; the reply with one
  // data word (more) and three pointers (callId "c", status, resultJson "{}").
  const Bytes frame = bytes_of_hex(
      "00000000"
      "0b000000"            // one segment of 11 words
      "0000000001000100"    // root: data 1, pointers 1
      "0200000000000000"    // which = callReply
      "0000000001000300"    // reply: data 1, pointers 3
      "0100000000000000"    // more = true
      "0900000012000000"    // callId: 2 bytes, 3 words on
      "0800000001000100"    // status: 3 words on, data 1, pointers 1
      "0d0000001a000000"    // resultJson: 3 bytes, 4 words on
      "6300000000000000"    // "c"
      "0500000000000000"    // status.code = busy
      "0000000000000000"    // no message
      "7b7d000000000000");  // "{}"
  const auto message = decode_server(frame);
  ASSERT_TRUE(message.ok()) << message.status().to_string();
  const auto& reply = std::get<CallReply>(*message);
  EXPECT_EQ(reply.call_id, "c");
  EXPECT_EQ(reply.status.code(), StatusCode::kBusy);
  EXPECT_EQ(reply.result_json, "{}");
  EXPECT_TRUE(reply.more);
  EXPECT_EQ(reply.retry_after_ms, 0);
}

// -- hostile frames
// -----------------------------------------------------------------------------------

/// The frame at every alignment, in memory that ends where the frame does.
void expect_same_at_every_alignment(const Direction& d, const Bytes& frame, bool accepted) {
  for (std::size_t shift = 0; shift < 8; ++shift) {
    std::vector<std::byte> memory(frame.size() + shift);
    std::copy(frame.begin(), frame.end(), memory.begin() + static_cast<std::ptrdiff_t>(shift));
    EXPECT_EQ(d.recode(std::span(memory).subspan(shift), nullptr).ok(), accepted)
        << d.name << " shifted by " << shift;
  }
}

TEST(HostileFrames, AlignmentDoesNotMatter) {
  for (const Direction& d : directions()) {
    Random random(1);
    expect_same_at_every_alignment(d, d.encode_random(0, random), true);
  }
}

TEST(HostileFrames, EveryTruncationIsRefusedAndCounted) {
  for (const Direction& d : directions())
    for (std::size_t kind = 0; kind < d.kinds; ++kind) {
      Random random(3, kind);
      const Bytes frame = d.encode_random(kind, random);
      DecodeCounters counters;
      for (std::size_t size = 0; size < frame.size(); ++size)
        EXPECT_FALSE(d.recode(std::span(frame).first(size), &counters).ok()) << d.name << size;
      EXPECT_EQ(counters.malformed, frame.size());
      EXPECT_EQ(counters.accepted, 0u);
    }
}

TEST(HostileFrames, ALongerFrameThanItsMessageIsRefused) {
  for (const Direction& d : directions()) {
    Random random(4);
    Bytes frame = d.encode_random(0, random);
    frame.resize(frame.size() + 8);
    EXPECT_FALSE(d.recode(frame, nullptr).ok()) << d.name;
  }
}

TEST(HostileFrames, AnOversizedFrameIsRefusedUnread) {
  DecodeCounters counters;
  const Bytes frame(static_cast<std::size_t>(kWorkerFrameBytesMax) + 8);
  for (const Direction& d : directions()) EXPECT_FALSE(d.recode(frame, &counters).ok());
  EXPECT_EQ(counters.too_large, directions().size());
}

TEST(Codec, ManifestsTravelBetweenCoordinatorAndWorkersUpToTheirOwnLimit) {
  std::string manifest(static_cast<std::size_t>(kManifestBytesMax), 'm');
  const CheckpointReady checkpoint{JobId("job"), 1, 10, manifest};
  EXPECT_EQ(decode_worker(encode(WorkerMessage{checkpoint})).value(), WorkerMessage{checkpoint});
  StartJob start;
  start.job = JobId("job");
  start.checkpoint_manifest = manifest;
  EXPECT_EQ(decode_control(encode(ControlMessage{start})).value(), ControlMessage{start});
  manifest += 'm';
  EXPECT_FALSE(
      decode_worker(encode(WorkerMessage{CheckpointReady{JobId("job"), 1, 10, manifest}})).ok());
}

TEST(Codec, ACallsParametersAndItsAnswerMayFillAFrame) {
  const std::string most(static_cast<std::size_t>(kCallJsonBytesMax), ' ');
  const Call call{"call-1", "key", "job.restore", most};
  const Bytes frame = encode(ClientMessage{call});
  EXPECT_LE(static_cast<std::int64_t>(frame.size()), kFrameBytesMax);
  EXPECT_EQ(decode_client(frame).value(), ClientMessage{call});
  CallReply reply;
  reply.call_id = "call-1";
  reply.result_json = most;
  EXPECT_EQ(decode_server(encode(ServerMessage{reply})).value(), ServerMessage{reply});
}

TEST(HostileFrames, SeededMutationsAreRefusedOrDecodeAndNeverCrash) {
  constexpr int kMutations = 4000;
  for (const Direction& d : directions()) {
    DecodeCounters counters;
    Random random(5);
    int accepted = 0;
    for (int i = 0; i < kMutations; ++i) {
      Bytes frame = d.encode_random(random.below(d.kinds), random);
      const auto changes = 1 + random.below(6);
      for (std::uint64_t change = 0; change < changes; ++change) {
        const std::size_t at = random.below(frame.size());
        switch (random.below(4)) {
          case 0:
            frame[at] ^= static_cast<std::byte>(1u << random.below(8));
            break;
          case 1:
            frame[at] = static_cast<std::byte>(random.below(256));
            break;
          case 2:
            frame[at] = std::byte{0xff};
            break;
          default:
            if (frame.size() > 16) frame.resize(frame.size() - 8);
        }
      }
      const auto again = d.recode(frame, &counters);
      if (!again.ok()) {
        EXPECT_EQ(again.status().code(), StatusCode::kCorrupt);
        continue;
      }
      ++accepted;
      // What was accepted is within all limits: it can be sent again.
      EXPECT_TRUE(d.recode(*again, nullptr).ok()) << d.name << " mutation " << i;
    }
    EXPECT_EQ(counters.accepted, static_cast<std::uint64_t>(accepted));
    EXPECT_EQ(counters.accepted + counters.refused(), static_cast<std::uint64_t>(kMutations));
    EXPECT_GT(counters.refused(), 100u) << d.name;
  }
}

TEST(HostileFrames, RandomBytesAreRefused) {
  Random random(6);
  DecodeCounters counters;
  int frames = 0;
  for (const Direction& d : directions())
    for (int i = 0; i < 2000; ++i, ++frames) {
      Bytes frame(8 * (2 + random.below(64)));
      for (auto& byte : frame) byte = static_cast<std::byte>(random.below(256));
      if (random.below(2) == 0) {  // a right segment table, so that the body is looked at
        std::fill_n(frame.begin(), 8, std::byte{0});
        frame[4] = static_cast<std::byte>(frame.size() / 8 - 1);
      }
      static_cast<void>(d.recode(frame, &counters));
    }
  EXPECT_EQ(counters.accepted + counters.refused(), static_cast<std::uint64_t>(frames));
  EXPECT_LT(counters.accepted, static_cast<std::uint64_t>(frames) / 100);
}

/// A message whose root is built by `fill` with the schema's own builder.
template <class Root, class Fill>
Bytes raw_message(Fill fill) {
  capnp::MallocMessageBuilder builder;
  fill(builder.initRoot<Root>());
  const auto words = capnp::messageToFlatArray(builder);
  const auto* begin = reinterpret_cast<const std::byte*>(words.begin());
  return {begin, begin + words.size() * sizeof(capnp::word)};
}

TEST(HostileFrames, AnEnumValueOfTheFutureIsRefusedAsUnknown) {
  DecodeCounters counters;
  const Bytes status = raw_message<wire::BlobReply>(
      [](auto b) { b.initStatus().setCode(static_cast<wire::StatusCode>(11)); });
  EXPECT_FALSE(decode_blob_reply(status, &counters).ok());
  const Bytes action = raw_message<wire::ControlMessage>(
      [](auto b) { b.initAgent().setAction(static_cast<wire::AgentAction>(5)); });
  EXPECT_FALSE(decode_control(action, &counters).ok());
  EXPECT_EQ(counters.unknown, 2u);
}

TEST(HostileFrames, AMessageOfTheFutureIsRefusedAsUnknown) {
  Bytes frame = raw_message<wire::ClientMessage>([](auto b) { b.initPing(); });
  frame[16] = std::byte{200};  // the union's tag: segment table and root pointer lie before it
  DecodeCounters counters;
  EXPECT_FALSE(decode_client(frame, &counters).ok());
  EXPECT_EQ(counters.unknown, 1u);
}

TEST(HostileFrames, LimitsNameTheFieldTheLimitAndTheValue) {
  DecodeCounters counters;
  Call call;
  call.method = std::string(static_cast<std::size_t>(kNameBytesMax) + 1, 'm');
  const auto refused = decode_client(encode(ClientMessage(call)), &counters).status().message();
  EXPECT_NE(refused.find("call.method: 1025 bytes exceed the limit of 1024"), std::string::npos)
      << refused;
  Generate generate;
  generate.next_index = -1;
  EXPECT_FALSE(decode_client(encode(ClientMessage(generate)), &counters).ok());
  // Added to a clock, a size or a position these would overflow.
  generate.next_index = std::numeric_limits<std::int64_t>::max();
  EXPECT_FALSE(decode_client(encode(ClientMessage(generate)), &counters).ok());
  generate.next_index = 0;
  generate.deadline_ms = std::numeric_limits<std::int64_t>::max();
  EXPECT_FALSE(decode_client(encode(ClientMessage(generate)), &counters).ok());
  const BlobGet whole{1, {}, 0, std::numeric_limits<std::int64_t>::max()};
  EXPECT_FALSE(decode_bulk(encode(BulkRequest(whole)), &counters).ok());
  BlobHas has;
  has.digests.resize(static_cast<std::size_t>(kBlobHasMax) + 1);
  EXPECT_FALSE(decode_bulk(encode(BulkRequest(has)), &counters).ok());
  const Bytes digest = raw_message<wire::BulkRequest>(
      [](auto b) { b.initPut().setDigest(kj::StringPtr("short").asBytes()); });
  EXPECT_FALSE(decode_bulk(digest, &counters).ok());
  EXPECT_EQ(counters.over_limit, 7u);
}

TEST(HostileFrames, ATextThatIsNotUtf8IsRefusedWithItsPlace) {
  DecodeCounters counters;
  const auto refused =
      decode_client(encode(ClientMessage(Cancel{RequestId("ab\xff")})), &counters).status();
  EXPECT_NE(refused.message().find("byte 2"), std::string::npos) << refused.message();
  EXPECT_EQ(counters.bad_text, 1u);
}

TEST(Codec, AStatusAlwaysArrives) {
  BlobReply reply;
  reply.status = internal_error("file \xff\xfe: " + std::string(1 << 20, 'x'));
  const auto again = decode_blob_reply(encode(reply));
  ASSERT_TRUE(again.ok()) << again.status().to_string();
  EXPECT_EQ(again->status.code(), StatusCode::kInternal);
  EXPECT_EQ(again->status.message().substr(0, 14), "file \xef\xbf\xbd\xef\xbf\xbd: x");
  EXPECT_LE(static_cast<std::int64_t>(again->status.message().size()), kStatusTextBytesMax);
}

TEST(HostileFrames, AListOfManyElementsInFewBytesIsRefused) {
  // 2^29 - 1 elements of no size, in 24 bytes.
  const Bytes frame = bytes_of_hex(
      "0000000005000000"
      "0000000001000100"    // root: the union's tag and one pointer
      "0000000000000000"    // which = has
      "0000000001000100"    // BlobHas: one data word, one pointer
      "0000000000000000"    // call
      "01000000f8ffffff");  // list of 2^29 - 1 elements of 0 bits
  DecodeCounters counters;
  EXPECT_FALSE(decode_bulk(frame, &counters).ok());
  EXPECT_EQ(counters.refused(), 1u);
}

TEST(HostileFrames, ManyPointersToOneListEndAtTheTraversalLimit) {
  constexpr unsigned kItems = 200;  // all in one segment
  Bytes frame = raw_message<wire::ServerMessage>([](auto b) {
    auto logprobs = b.initChunk().initLogprobs(kItems);
    logprobs[0].initTop(kItems);
  });
  ASSERT_TRUE(decode_server(frame).ok()) << "it must be fine before it is made hostile";
  std::vector<std::uint32_t> halves(frame.size() / 4);
  std::memcpy(halves.data(), frame.data(), frame.size());
  // The pointer of the first `top`: a composite list of kItems words. The others lie 2 words apart.
  std::size_t at = 0;
  while (at < halves.size() && !(halves[at + 1] == (kItems << 3 | 7) && (halves[at] & 3) == 1))
    at += 2;
  ASSERT_LT(at, halves.size());
  for (std::size_t i = 1; i < kItems; ++i) {
    halves[at + 4 * i] = halves[at] - static_cast<std::uint32_t>(8 * i);  // 2 i words, times 4
    halves[at + 4 * i + 1] = halves[at + 1];
  }
  std::memcpy(frame.data(), halves.data(), frame.size());
  DecodeCounters counters;
  const Status refused = decode_server(frame, &counters).status();
  EXPECT_NE(refused.message().find("traversal"), std::string::npos) << refused.message();
  EXPECT_EQ(counters.malformed, 1u);
}

}  // namespace
}  // namespace tandem::protocol
