// Processes of a gang hand each other file descriptors: here each is a thread.
#include "worker/comm/nccl/peer_sockets.h"

#include "protocol/base/str.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <barrier>
#include <functional>
#include <thread>

namespace tandem::test {
namespace {

using worker::comm::OwnedFd;
using worker::comm::PeerMessage;
using worker::comm::PeerSockets;

std::string gang_name() {
  static std::atomic<int> gangs{0};
  return str("peer sockets of ", ::getpid(), " ", gangs++);
}

void on_threads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int rank = 0; rank < count; ++rank) threads.emplace_back([&, rank] { body(rank); });
  for (std::thread& thread : threads) thread.join();
}

/// The reading end of a pipe that holds `number`, once for each of two readers.
OwnedFd holding(int number) {
  int ends[2];
  TANDEM_CHECK_EQ(::pipe(ends), 0);
  for (int reader = 0; reader < 2; ++reader)
    TANDEM_CHECK_EQ(::write(ends[1], &number, sizeof number), ssize_t{sizeof number});
  ::close(ends[1]);
  return OwnedFd(ends[0]);
}
int number_in(const OwnedFd& fd) {
  int number = -1;
  return ::read(fd.get(), &number, sizeof number) == sizeof number ? number : -1;
}

TEST(PeerSockets, EveryRankGetsWhatEveryOtherHands) {
  constexpr int kRanks = 3;
  const std::string name = gang_name();
  std::barrier all(kRanks);
  on_threads(kRanks, [&](int rank) {
    auto connected =
        PeerSockets::connect(name, rank, kRanks, 10'000, [&] { all.arrive_and_wait(); });
    ASSERT_TRUE(connected.ok()) << connected.status().to_string();
    const PeerSockets sockets(std::move(*connected));
    // None, few, as many as one message carries, and more; of each rank another number.
    for (const int count : {0, 1, 63, 150}) {
      PeerMessage mine;
      mine.offset = 1000 * rank + count;
      mine.bytes = 7;
      for (int i = 0; i < count + rank; ++i) mine.fds.push_back(holding(10'000 * rank + i));
      const auto got = sockets.exchange(mine);
      ASSERT_TRUE(got.ok()) << got.status().to_string();
      ASSERT_EQ(got->size(), std::size_t{kRanks});
      for (int r = 0; r < kRanks; ++r) {
        const PeerMessage& theirs = (*got)[static_cast<std::size_t>(r)];
        if (r == rank) {
          EXPECT_TRUE(theirs.fds.empty());
          continue;
        }
        EXPECT_EQ(theirs.offset, 1000 * r + count);
        EXPECT_EQ(theirs.bytes, 7);
        ASSERT_EQ(theirs.fds.size(), static_cast<std::size_t>(count + r));
        for (int i = 0; i < count + r; ++i)
          EXPECT_EQ(number_in(theirs.fds[static_cast<std::size_t>(i)]), 10'000 * r + i);
      }
      all.arrive_and_wait();  // pipes are this process's: no more at once than one round's
    }
  });
}

TEST(PeerSockets, TwoGangsDoNotMeet) {
  const std::string names[] = {gang_name(), gang_name()};
  std::barrier all(4);
  on_threads(4, [&](int thread) {
    const int gang = thread / 2, rank = thread % 2;
    auto connected =
        PeerSockets::connect(names[gang], rank, 2, 10'000, [&] { all.arrive_and_wait(); });
    ASSERT_TRUE(connected.ok()) << connected.status().to_string();
    PeerMessage mine;
    mine.offset = gang;
    const auto got = PeerSockets(std::move(*connected)).exchange(mine);
    ASSERT_TRUE(got.ok()) << got.status().to_string();
    EXPECT_EQ((*got)[static_cast<std::size_t>(1 - rank)].offset, gang);
  });
}

TEST(PeerSockets, ARankThatNeverComesIsAnErrorInTime) {
  const std::string name = gang_name();
  const auto first = PeerSockets::connect(name, 0, 2, 1, [] {});
  EXPECT_EQ(first.status().code(), StatusCode::kUnavailable) << first.status().to_string();
  const auto second = PeerSockets::connect(name, 1, 2, 1, [] {});
  EXPECT_EQ(second.status().code(), StatusCode::kUnavailable) << second.status().to_string();
}

TEST(PeerSockets, ARankThatIsGoneIsAnErrorAndNoSignal) {
  const std::string name = gang_name();
  std::barrier both(2);
  on_threads(2, [&](int rank) {
    auto connected = PeerSockets::connect(name, rank, 2, 10'000, [&] { both.arrive_and_wait(); });
    ASSERT_TRUE(connected.ok()) << connected.status().to_string();
    if (rank == 1) connected->clear();
    both.arrive_and_wait();
    if (rank == 1) return;
    const auto got = PeerSockets(std::move(*connected)).exchange({});
    EXPECT_EQ(got.status().code(), StatusCode::kUnavailable) << got.status().to_string();
  });
}

}  // namespace
}  // namespace tandem::test
