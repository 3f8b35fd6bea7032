#include "worker/serve/replica.h"

#include "protocol/base/str.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace tandem::worker::serve {
namespace {

/// Most frames go in one broadcast; longer ones take a second.
constexpr std::int64_t kFirstBytes = 4096;

class CommLink final : public CallLink {
 public:
  CommLink(comm::Communicator& host, kernels::Exec& exec) : host_(host), exec_(exec) {}

  void send(std::span<const std::byte> frame) override {
    const auto size = static_cast<std::int64_t>(frame.size());
    std::vector<std::byte> first(kFirstBytes);
    std::memcpy(first.data(), &size, sizeof size);
    const std::size_t head = std::min(frame.size(), first.size() - sizeof size);
    std::copy_n(frame.begin(), head, first.begin() + sizeof size);
    broadcast(first);
    std::vector<std::byte> rest(frame.begin() + static_cast<std::ptrdiff_t>(head), frame.end());
    broadcast(rest);
  }

  std::vector<std::byte> receive() override {
    std::vector<std::byte> first(kFirstBytes);
    broadcast(first);
    std::int64_t size = 0;
    std::memcpy(&size, first.data(), sizeof size);
    std::vector<std::byte> frame(static_cast<std::size_t>(size));
    const std::size_t head = std::min(frame.size(), first.size() - sizeof size);
    std::copy_n(first.begin() + sizeof size, head, frame.begin());
    std::vector<std::byte> rest(frame.size() - head);
    broadcast(rest);
    std::copy(rest.begin(), rest.end(), frame.begin() + static_cast<std::ptrdiff_t>(head));
    return frame;
  }

  Status agree(const Status& mine) override {
    const auto ranks = static_cast<std::size_t>(host_.size());
    Verdict verdict;
    verdict.code = static_cast<std::int64_t>(mine.code());
    mine.message().copy(verdict.message.data(), verdict.message.size() - 1);
    std::vector<Verdict> all(ranks);
    host_.all_gather(exec_, view(std::as_writable_bytes(std::span(&verdict, 1))),
                     view(std::as_writable_bytes(std::span(all))));
    for (std::size_t r = 0; r < ranks; ++r) {
      if (all[r].code == 0) continue;
      const std::string message = all[r].message.data();
      const bool everywhere = std::all_of(
          all.begin(), all.end(), [&](const Verdict& v) { return v.message == all[r].message; });
      return {static_cast<StatusCode>(all[r].code),
              everywhere ? message : str("rank ", r, ": ", message)};
    }
    return {};
  }

 private:
  struct Verdict {
    std::int64_t code = 0;
    std::array<char, 1016> message{};  ///< cut to fit
  };

  static kernels::Tensor view(std::span<std::byte> bytes) {
    return {bytes.data(), DType::kU8, {static_cast<std::int64_t>(bytes.size())}};
  }
  /// Rank 0's bytes to everybody.
  void broadcast(std::span<std::byte> bytes) {
    if (!bytes.empty()) host_.broadcast(exec_, view(bytes), 0);
  }

  comm::Communicator& host_;
  kernels::Exec& exec_;
};

}  // namespace

std::unique_ptr<CallLink> make_comm_link(comm::Communicator& host, kernels::Exec& exec) {
  return std::make_unique<CommLink>(host, exec);
}

}  // namespace tandem::worker::serve
