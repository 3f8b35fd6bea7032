#include "protocol/base/file_lock.h"

#include <gtest/gtest.h>

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <string>

namespace tandem {
namespace {

std::string temporary(const std::string& name) {
  return testing::TempDir() + "tandem_lock_" + std::to_string(::getpid()) + "_" + name;
}

TEST(FileLock, NamesItsHolderToTheSecondWhoWantsIt) {
  const std::string path = temporary("lock");
  {
    auto first = FileLock::acquire(path);
    ASSERT_TRUE(first.ok());
    EXPECT_TRUE(FileLock::is_held(path));
    EXPECT_EQ(FileLock::holder(path), ::getpid());
    const auto second = FileLock::acquire(path);
    ASSERT_FALSE(second.ok());
    EXPECT_EQ(second.status().code(), StatusCode::kConflict);
    EXPECT_NE(second.status().message().find(std::to_string(::getpid())), std::string::npos);
  }
  EXPECT_FALSE(FileLock::is_held(path));
  EXPECT_EQ(FileLock::holder(path), 0);
  EXPECT_TRUE(FileLock::acquire(path).ok());
  std::filesystem::remove(path);
}

TEST(FileLock, IsFreeOnceItsHolderWasKilled) {
  const std::string path = temporary("killed");
  const pid_t child = ::fork();
  if (child == 0) {
    auto lock = FileLock::acquire(path);
    ::pause();
    ::_exit(lock.ok() ? 0 : 1);
  }
  while (!FileLock::is_held(path)) ::usleep(1000);
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  EXPECT_FALSE(FileLock::is_held(path));
  std::filesystem::remove(path);
}

/// Asks all the time, as status and up do while workers start.
class Asker {
 public:
  explicit Asker(const std::string& path) : pid_(::fork()) {
    if (pid_ == 0) ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    while (pid_ == 0) (void)FileLock::is_held(path);
  }
  ~Asker() {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  Asker(const Asker&) = delete;
  Asker& operator=(const Asker&) = delete;

 private:
  pid_t pid_;
};

TEST(FileLock, IsGivenToTheOneWhoWantsItWhileOthersAsk) {
  const std::string path = temporary("asked");
  ASSERT_TRUE(FileLock::acquire(path).ok());
  const Asker one(path);
  const Asker other(path);
  for (int i = 0; i < 300; ++i) {
    const auto lock = FileLock::acquire(path);
    ASSERT_TRUE(lock.ok()) << "attempt " << i << ": " << lock.status().message();
    EXPECT_TRUE(FileLock::is_held(path));
  }
  std::filesystem::remove(path);
}

TEST(FileLock, IsHeldByNobodyWhoOnlyAsks) {
  const std::string path = temporary("free");
  ASSERT_TRUE(FileLock::acquire(path).ok());
  const Asker one(path);
  const Asker other(path);
  for (int i = 0; i < 20'000; ++i) ASSERT_FALSE(FileLock::is_held(path)) << "question " << i;
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace tandem
