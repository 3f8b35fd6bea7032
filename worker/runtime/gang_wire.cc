#include "worker/runtime/gang_wire.h"

#include "protocol/base/str.h"

#include <algorithm>
#include <array>

namespace tandem::worker::runtime {
namespace {

struct Word {
  std::int64_t op = 0, bytes = 0;
};

struct Verdict {
  std::int64_t code = 0;
  std::array<char, 1016> message{};  ///< cut to fit
};

/// Collectives take tensors; here they are bytes in host memory.
kernels::Tensor view(void* data, std::int64_t bytes) {
  return {data, DType::kU8, {bytes}};
}
kernels::Tensor view(std::span<const std::byte> bytes) {
  return view(const_cast<std::byte*>(bytes.data()), static_cast<std::int64_t>(bytes.size()));
}

}  // namespace

void GangWire::tell(GangOp op, std::span<const std::byte> payload) {
  Word word{static_cast<std::int64_t>(op), static_cast<std::int64_t>(payload.size())};
  gang_.broadcast(exec_, view(&word, sizeof word), 0);
  if (word.bytes > 0) gang_.broadcast(exec_, view(payload), 0);
}

GangWire::Heard GangWire::hear() {
  Word word;
  gang_.broadcast(exec_, view(&word, sizeof word), 0);
  Heard heard{static_cast<GangOp>(word.op), ByteVector(static_cast<std::size_t>(word.bytes))};
  if (word.bytes > 0) gang_.broadcast(exec_, view(heard.payload), 0);
  return heard;
}

std::vector<ByteVector> GangWire::gather(std::span<const std::byte> mine) {
  std::int64_t bytes = static_cast<std::int64_t>(mine.size());
  std::vector<std::int64_t> sizes(static_cast<std::size_t>(size()));
  gang_.all_gather(exec_, view(&bytes, sizeof bytes),
                   view(sizes.data(), size() * static_cast<std::int64_t>(sizeof bytes)));
  if (rank() != 0) {
    if (bytes > 0) gang_.exchange(exec_, view(mine), 0, {}, 0);
    return {};
  }
  std::vector<ByteVector> all{ByteVector(mine.begin(), mine.end())};
  for (int r = 1; r < size(); ++r) {
    ByteVector& theirs = all.emplace_back(sizes[static_cast<std::size_t>(r)]);
    if (!theirs.empty()) gang_.exchange(exec_, {}, r, view(theirs), r);
  }
  return all;
}

Status GangWire::agree(const Status& mine) {
  Verdict verdict;
  verdict.code = static_cast<std::int64_t>(mine.code());
  const std::size_t count = std::min(mine.message().size(), verdict.message.size() - 1);
  std::copy_n(mine.message().begin(), count, verdict.message.begin());
  std::vector<Verdict> all(static_cast<std::size_t>(size()));
  gang_.all_gather(exec_, view(&verdict, sizeof verdict),
                   view(all.data(), size() * static_cast<std::int64_t>(sizeof verdict)));
  for (std::size_t r = 0; r < all.size(); ++r)
    if (all[r].code != 0) {
      const auto code = static_cast<StatusCode>(all[r].code);
      const std::string message = all[r].message.data();
      const bool everywhere = std::all_of(
          all.begin(), all.end(), [&](const Verdict& v) { return v.message == all[r].message; });
      return {code, everywhere ? message : str("rank ", r, ": ", message)};
    }
  return {};
}

double GangWire::largest(double mine) {
  std::vector<double> all(static_cast<std::size_t>(size()));
  gang_.all_gather(exec_, view(&mine, sizeof mine),
                   view(all.data(), size() * static_cast<std::int64_t>(sizeof mine)));
  return *std::max_element(all.begin(), all.end());
}

}  // namespace tandem::worker::runtime
