#include "worker/serve/replica.h"

#include "protocol/base/str.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace tandem::worker::serve {
namespace {

/// Most frames go in one broadcast; longer ones take further ones of at most so many bytes.
constexpr std::int64_t kFirstBytes = 4096, kMoreBytes = std::int64_t{4} << 20;

class CommLink final : public CallLink {
 public:
  CommLink(comm::Communicator& model, model::Context& context) : model_(model), ctx_(context) {}

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
    const auto ranks = static_cast<std::size_t>(model_.size());
    Verdict verdict;
    verdict.code = static_cast<std::int64_t>(mine.code());
    mine.message().copy(verdict.message.data(), verdict.message.size() - 1);
    std::vector<Verdict> all(ranks);
    {
      const kernels::ArenaScope scope(ctx_.activations);
      constexpr auto kBytes = static_cast<std::int64_t>(sizeof verdict);
      const kernels::Tensor one = ctx_.activations.alloc({kBytes}, DType::kU8);
      const kernels::Tensor each =
          ctx_.activations.alloc({static_cast<std::int64_t>(ranks) * kBytes}, DType::kU8);
      ctx_.ops.upload(ctx_.exec, std::as_bytes(std::span(&verdict, 1)), one);
      model_.all_gather(ctx_.exec, one, each);
      ctx_.ops.download(ctx_.exec, each, std::as_writable_bytes(std::span(all)));
    }
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

  /// Rank 0's bytes to everybody, through device memory, which is what communicators move.
  void broadcast(std::span<std::byte> bytes) {
    for (std::size_t at = 0; at < bytes.size(); at += kMoreBytes) {
      const auto part =
          bytes.subspan(at, std::min(bytes.size() - at, static_cast<std::size_t>(kMoreBytes)));
      const kernels::ArenaScope scope(ctx_.activations);
      const kernels::Tensor x =
          ctx_.activations.alloc({static_cast<std::int64_t>(part.size())}, DType::kU8);
      if (model_.rank() == 0) ctx_.ops.upload(ctx_.exec, part, x);
      model_.broadcast(ctx_.exec, x, 0);
      if (model_.rank() != 0) ctx_.ops.download(ctx_.exec, x, part);
    }
  }

  comm::Communicator& model_;
  model::Context& ctx_;
};

}  // namespace

std::unique_ptr<CallLink> make_comm_link(comm::Communicator& model, model::Context& context) {
  return std::make_unique<CommLink>(model, context);
}

}  // namespace tandem::worker::serve
