#include "protocol/codec/shared.h"

#include "protocol/base/str.h"
#include "protocol/utf8.h"

#include <kj/exception.h>
#include <kj/io.h>

#include <algorithm>
#include <cstring>
#include <new>

namespace tandem::protocol::codec {
namespace {

// Each object of a message is read once. The slack covers landing pads of far pointers and the
// root.
constexpr std::uint64_t kTraversalFactor = 2, kTraversalSlackWords = 64;

}  // namespace

Bytes to_bytes(capnp::MessageBuilder& builder) {
  Bytes bytes(capnp::computeSerializedSizeInWords(builder) * sizeof(capnp::word));
  kj::ArrayOutputStream stream(
      kj::arrayPtr(reinterpret_cast<kj::byte*>(bytes.data()), bytes.size()));
  capnp::writeMessage(stream, builder);
  return bytes;
}

AlignedWords::AlignedWords(std::span<const std::byte> frame) {
  const std::size_t count = frame.size() / sizeof(capnp::word);
  if (reinterpret_cast<std::uintptr_t>(frame.data()) % sizeof(capnp::word) == 0) {
    words_ = kj::arrayPtr(reinterpret_cast<const capnp::word*>(frame.data()), count);
    return;
  }
  copy_ = kj::heapArray<capnp::word>(count);
  if (count > 0) std::memcpy(copy_.begin(), frame.data(), count * sizeof(capnp::word));
  words_ = copy_.asPtr();
}

capnp::ReaderOptions reader_options(std::size_t words) {
  capnp::ReaderOptions options;
  options.traversalLimitInWords = words * kTraversalFactor + kTraversalSlackWords;
  options.nestingLimit = kNestingMax;
  return options;
}

void check_frame_size(std::span<const std::byte> frame, std::int64_t bytes_max) {
  if (static_cast<std::int64_t>(frame.size()) > bytes_max)
    throw Refusal(&DecodeCounters::too_large,
                  str("a frame of ", frame.size(), " bytes exceeds the limit of ", bytes_max));
  if (frame.size() < 2 * sizeof(capnp::word) || frame.size() % sizeof(capnp::word) != 0)
    throw Refusal(&DecodeCounters::malformed,
                  str("a frame of ", frame.size(), " bytes is not whole words"));
}

void check_no_rest(const capnp::FlatArrayMessageReader& reader,
                   kj::ArrayPtr<const capnp::word> words) {
  if (reader.getEnd() != words.end())
    throw Refusal(&DecodeCounters::malformed,
                  str(words.end() - reader.getEnd(), " words follow the message"));
}

Status refuse_current_exception(const char* what, DecodeCounters* counters) {
  auto counter = &DecodeCounters::malformed;
  std::string why;
  try {
    throw;
  } catch (const Refusal& refusal) {
    counter = refusal.counter;
    why = refusal.message;
  } catch (const kj::Exception& e) {
    why = e.getDescription().cStr();
  } catch (const std::bad_alloc&) {
    counter = &DecodeCounters::too_large;
    why = "not enough memory to decode it";
  } catch (const std::exception& e) {
    why = e.what();
  }
  if (counters != nullptr) ++(counters->*counter);
  return corrupt_error(str(what, ": ", why));
}

void refuse_unknown(const char* field, unsigned value) {
  throw Refusal(&DecodeCounters::unknown, str(field, ": value ", value, " is not known"));
}

std::string get_text(capnp::Text::Reader reader, const char* field, std::int64_t bytes_max) {
  if (static_cast<std::int64_t>(reader.size()) > bytes_max)
    throw Refusal(&DecodeCounters::over_limit,
                  str(field, ": ", reader.size(), " bytes exceed the limit of ", bytes_max));
  std::string copy(reader.begin(), reader.size());
  if (const std::size_t valid = utf8_valid_prefix(copy); valid != copy.size())
    throw Refusal(&DecodeCounters::bad_text,
                  str(field, ": not valid UTF-8 at byte ", valid, " of ", copy.size()));
  return copy;
}

Digest get_digest(capnp::Data::Reader reader, const char* field) {
  Digest digest;
  if (reader.size() == 0) return digest;
  if (reader.size() != digest.bytes.size())
    throw Refusal(&DecodeCounters::over_limit,
                  str(field, ": a digest has 32 bytes, not ", reader.size()));
  std::copy(reader.begin(), reader.end(), digest.bytes.begin());
  return digest;
}

void check_list(std::size_t size, const char* field, std::int64_t items_max) {
  if (static_cast<std::int64_t>(size) > items_max)
    throw Refusal(&DecodeCounters::over_limit,
                  str(field, ": ", size, " items exceed the limit of ", items_max));
}

std::int64_t get_count(std::int64_t value, const char* field) {
  if (value < 0)
    throw Refusal(&DecodeCounters::over_limit, str(field, ": ", value, " is negative"));
  if (value > kCountMax)
    throw Refusal(&DecodeCounters::over_limit,
                  str(field, ": ", value, " exceeds the limit of ", kCountMax));
  return value;
}

std::vector<Digest> get_digests(capnp::List<capnp::Data>::Reader list, const char* field,
                                std::int64_t items_max) {
  check_list(list.size(), field, items_max);
  std::vector<Digest> digests;
  digests.reserve(list.size());
  for (auto item : list) digests.push_back(get_digest(item, field));
  return digests;
}

}  // namespace tandem::protocol::codec
