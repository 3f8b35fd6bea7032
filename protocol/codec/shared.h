// Private to the codec: the one place where bytes become a Cap'n Proto message and back, the checks
// every field goes through, and the pieces that several directions share. Functions named put()
// fill a builder, functions named get() copy out of a reader; no reader lives longer than the
// decode.
#pragma once

#include "protocol/codec.h"

#include "protocol/schema/common.capnp.h"

#include <capnp/message.h>
#include <capnp/serialize.h>

#include <exception>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace tandem::protocol::codec {

// -- encode --------------------------------------------------------------------------------------

inline constexpr std::size_t kScratchWords = 512;  ///< most messages need no heap segment

Bytes to_bytes(capnp::MessageBuilder& builder);

template <class Root, class Fill>
Bytes encode_root(Fill fill) {
  capnp::word scratch[kScratchWords] = {};
  capnp::MallocMessageBuilder builder(kj::arrayPtr(scratch, kScratchWords));
  fill(builder.initRoot<Root>());
  return to_bytes(builder);
}

inline capnp::Text::Reader text(const std::string& s) {
  return {s.c_str(), s.size()};
}
inline capnp::Data::Reader data(const Digest& d) {
  return d.empty() ? capnp::Data::Reader() : capnp::Data::Reader(d.bytes.data(), d.bytes.size());
}
template <class T>
unsigned count(const std::vector<T>& values) {
  return static_cast<unsigned>(values.size());
}
template <class Builder, class T, class Put>
void put_structs(Builder list, const std::vector<T>& values, Put put_item) {
  for (unsigned i = 0; i < count(values); ++i) put_item(list[i], values[i]);
}
template <class Builder, class T>
void put_scalars(Builder list, const std::vector<T>& values) {
  for (unsigned i = 0; i < count(values); ++i) list.set(i, values[i]);
}
template <class Builder, class T>
void put_ids(Builder list, const std::vector<T>& ids) {
  for (unsigned i = 0; i < count(ids); ++i) list.set(i, text(ids[i].value));
}
template <class Builder>
void put_digests(Builder list, const std::vector<Digest>& digests) {
  for (unsigned i = 0; i < count(digests); ++i) list.set(i, data(digests[i]));
}

// -- decode --------------------------------------------------------------------------------------

/// Why a frame is refused: which counter, and the message. Thrown by the checks below, caught by
/// decode_root only.
struct Refusal : std::exception {
  Refusal(std::uint64_t DecodeCounters::*which, std::string why)
      : counter(which), message(std::move(why)) {}
  [[nodiscard]] const char* what() const noexcept override { return message.c_str(); }
  std::uint64_t DecodeCounters::*counter;
  std::string message;
};

/// Words of the frame, aligned: ZeroMQ's small frames mostly are not, and those are copied.
class AlignedWords {
 public:
  explicit AlignedWords(std::span<const std::byte> frame);
  [[nodiscard]] kj::ArrayPtr<const capnp::word> words() const { return words_; }

 private:
  kj::Array<capnp::word> copy_;
  kj::ArrayPtr<const capnp::word> words_;
};

capnp::ReaderOptions reader_options(std::size_t words);
void check_frame_size(std::span<const std::byte> frame, std::int64_t bytes_max);
void check_no_rest(const capnp::FlatArrayMessageReader& reader,
                   kj::ArrayPtr<const capnp::word> words);
/// Turns the exception in flight into a Status and counts it. Call inside catch (...) only.
Status refuse_current_exception(const char* what, DecodeCounters* counters);

template <class Root, class Message, class Get>
Result<Message> decode_root(const char* what, std::span<const std::byte> frame,
                            DecodeCounters* counters, Get get_message,
                            std::int64_t bytes_max = kFrameBytesMax) {
  try {
    check_frame_size(frame, bytes_max);
    const AlignedWords aligned(frame);
    capnp::FlatArrayMessageReader reader(aligned.words(), reader_options(aligned.words().size()));
    check_no_rest(reader, aligned.words());
    Message message = get_message(reader.template getRoot<Root>());
    if (counters != nullptr) ++counters->accepted;
    return message;
  } catch (...) {
    return refuse_current_exception(what, counters);
  }
}

[[noreturn]] void refuse_unknown(const char* field, unsigned value);

/// Copies a text of at most `bytes_max` bytes of UTF-8.
std::string get_text(capnp::Text::Reader reader, const char* field,
                     std::int64_t bytes_max = kTextBytesMax);
template <class IdType>
IdType get_id(capnp::Text::Reader reader, const char* field) {
  return IdType(get_text(reader, field, kIdBytesMax));
}
Digest get_digest(capnp::Data::Reader reader, const char* field);
void check_list(std::size_t size, const char* field, std::int64_t items_max = kListItemsMax);
/// Of a count, size or time: a receiver may add one to a clock's time or a size of its own.
inline constexpr std::int64_t kCountMax = std::int64_t{1} << 62;
/// Refuses a count, size or time that is negative or over kCountMax.
std::int64_t get_count(std::int64_t value, const char* field);

/// The C++ enum of a wire enum whose last known value is `last`; both number their values alike.
template <class E, class Wire>
E get_enum(Wire value, E last, const char* field) {
  const auto number = static_cast<unsigned>(value);
  if (number > static_cast<unsigned>(last)) refuse_unknown(field, number);
  return static_cast<E>(number);
}

template <class T, class List>
std::vector<T> get_scalars(List list, const char* field) {
  check_list(list.size(), field);
  std::vector<T> values;
  values.reserve(list.size());
  for (const T value : list) values.push_back(value);
  return values;
}
template <class T, class List, class Get>
std::vector<T> get_structs(List list, const char* field, Get get_item) {
  check_list(list.size(), field);
  std::vector<T> values;
  values.reserve(list.size());
  for (auto item : list) values.push_back(get_item(item));
  return values;
}
template <class T>
std::vector<T> get_ids(capnp::List<capnp::Text>::Reader list, const char* field) {
  return get_structs<T>(list, field, [&](auto item) { return get_id<T>(item, field); });
}
std::vector<Digest> get_digests(capnp::List<capnp::Data>::Reader list, const char* field,
                                std::int64_t items_max = kListItemsMax);

// -- pieces that several directions share --------------------------------------------------------

void put(wire::Version::Builder b, const Version& m);
void put(wire::Status::Builder b, const Status& m);
void put(wire::Generate::Builder b, const Generate& m);
void put(wire::GenerateChunk::Builder b, const GenerateChunk& m);
Version get(wire::Version::Reader r);
Status get(wire::Status::Reader r);
Generate get(wire::Generate::Reader r);
GenerateChunk get(wire::GenerateChunk::Reader r);

}  // namespace tandem::protocol::codec
