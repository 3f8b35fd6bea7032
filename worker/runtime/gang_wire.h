// How a gang's first rank takes the others along: before everything that all do together it
// broadcasts a word, so a command (checkpoint, pause, cancel) reaches all ranks between the same
// two slices. Over host memory, whatever the ranks' devices are. One device thread
// per rank; a member that is gone is a DeviceError.
#pragma once

#include "protocol/base/status.h"
#include "worker/comm/communicator.h"

#include <cstring>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace tandem::worker::runtime {

using ByteVector = std::vector<std::byte>;

enum class GangOp : std::int64_t {
  kIdle = 0,    ///< nothing to do; the first rank lives
  kOpen = 1,    ///< load your part of the model, open the session (GangPlan) or serve (ReplicaPlan)
  kSlice = 2,   ///< TrainSession::run_slice
  kExport = 3,  ///< send your pieces of the state
  kCompare = 4,  ///< compare what you trained with what is published (payload)
  kEnd = 5,
  kWriteModel = 6,  ///< write your pieces of the weights into a folder (payload: ModelPlace)
  kProbeModel = 7,  ///< compare what you trained with that folder's weights (payload: the same)
  kSnapshot = 8,    ///< copy your pieces of the state and begin to store them
  kStored = 9       ///< say whether they are stored, and what they are
};

class GangWire {
 public:
  GangWire(comm::Communicator& gang, kernels::Exec& exec) : gang_(gang), exec_(exec) {}

  [[nodiscard]] int rank() const { return gang_.rank(); }
  [[nodiscard]] int size() const { return gang_.size(); }

  /// First rank.
  void tell(GangOp op, std::span<const std::byte> payload = {});
  struct Heard {
    GangOp op = GangOp::kIdle;
    ByteVector payload;
  };
  /// The others: waits for the next word.
  Heard hear();

  // -- all ranks at once
  /// At the first rank everybody's bytes, in rank order; elsewhere nothing.
  std::vector<ByteVector> gather(std::span<const std::byte> mine);
  /// ok when all ranks say so; else the first one that does not, with its rank. The same
  /// everywhere.
  Status agree(const Status& mine);
  [[nodiscard]] double largest(double mine);

 private:
  comm::Communicator& gang_;
  kernels::Exec& exec_;
};

/// Numbers, texts and vectors of numbers, one after another, as bytes of this machine.
class ByteWriter {
 public:
  void number(std::int64_t value) { raw(&value, sizeof value); }
  void text(const std::string& value) {
    number(static_cast<std::int64_t>(value.size()));
    raw(value.data(), value.size());
  }
  template <class T>
  void numbers(const std::vector<T>& values) {
    static_assert(std::is_trivially_copyable_v<T>);
    number(static_cast<std::int64_t>(values.size()));
    raw(values.data(), values.size() * sizeof(T));
  }
  [[nodiscard]] const ByteVector& bytes() const { return bytes_; }

 private:
  void raw(const void* data, std::size_t size) {
    const auto* begin = static_cast<const std::byte*>(data);
    bytes_.insert(bytes_.end(), begin, begin + size);
  }
  ByteVector bytes_;
};

/// Reads what a ByteWriter of the same program wrote; anything else is a bug.
class ByteReader {
 public:
  explicit ByteReader(std::span<const std::byte> bytes) : bytes_(bytes) {}
  std::int64_t number() {
    std::int64_t value = 0;
    raw(&value, sizeof value);
    return value;
  }
  std::string text() {
    std::string value(size(1), '\0');
    raw(value.data(), value.size());
    return value;
  }
  template <class T>
  std::vector<T> numbers() {
    std::vector<T> values(size(sizeof(T)));
    raw(values.data(), values.size() * sizeof(T));
    return values;
  }

 private:
  std::size_t size(std::size_t width) {
    const std::int64_t count = number();
    TANDEM_CHECK(count >= 0 && static_cast<std::uint64_t>(count) <= bytes_.size() / width, count,
                 " items in ", bytes_.size(), " bytes");
    return static_cast<std::size_t>(count);
  }
  void raw(void* to, std::size_t size) {
    TANDEM_CHECK(size <= bytes_.size(), size, " of ", bytes_.size(), " bytes");
    if (size > 0) std::memcpy(to, bytes_.data(), size);
    bytes_ = bytes_.subspan(size);
  }
  std::span<const std::byte> bytes_;
};

}  // namespace tandem::worker::runtime
