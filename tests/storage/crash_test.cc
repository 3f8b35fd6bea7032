// kill -9 of a process that publishes: what it acknowledged is there, nothing is half there.
#include "protocol/base/log.h"
#include "protocol/base/random.h"
#include "storage/registry.h"
#include "tests/storage/registry_fixture.h"
#include "tests/storage/scratch.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <map>
#include <set>
#include <sstream>

namespace tandem::storage {
namespace {

/// What the publisher acknowledged over all its lives.
struct History {
  std::map<std::uint32_t, std::string> versions;  // number -> digest
  std::map<std::string, std::string> jobs;        // idempotency key -> id
};

/// Starts a publisher, reads `lines` acknowledgements, waits up to `delay_us` more and kills it.
void publish_and_kill(const std::string& directory, std::uint64_t seed, int lines, int delay_us,
                      History& history) {
  int pipe_fd[2];
  ASSERT_EQ(::pipe2(pipe_fd, O_CLOEXEC), 0);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    ::dup2(pipe_fd[1], STDOUT_FILENO);
    const std::string program = std::string(TANDEM_BIN_DIR) + "/storage_publisher",
                      number = std::to_string(seed);
    ::execl(program.c_str(), program.c_str(), directory.c_str(), number.c_str(), nullptr);
    ::_exit(127);
  }
  ::close(pipe_fd[1]);
  std::string text;
  char buffer[4096];
  auto lines_read = [&] { return std::count(text.begin(), text.end(), '\n'); };
  for (ssize_t n; lines_read() < lines && (n = ::read(pipe_fd[0], buffer, sizeof buffer)) > 0;)
    text.append(buffer, static_cast<std::size_t>(n));
  ::usleep(static_cast<useconds_t>(delay_us));
  ::kill(child, SIGKILL);
  for (ssize_t n; (n = ::read(pipe_fd[0], buffer, sizeof buffer)) > 0;)
    text.append(buffer, static_cast<std::size_t>(n));
  ::close(pipe_fd[0]);
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status)) << "the publisher ended by itself with " << WEXITSTATUS(status);
  ASSERT_GE(lines_read(), lines);
  std::istringstream in(text);
  for (std::string line; std::getline(in, line) && !in.eof();) {
    std::istringstream words(line);
    std::string what, first, second;
    words >> what >> first >> second;
    if (what == "publish") history.versions[static_cast<std::uint32_t>(std::stoul(first))] = second;
    if (what == "job") history.jobs[second] = first;
  }
}

void expect_whole(Registry& registry, const History& history) {
  const auto findings = registry.check().value();
  for (const Finding& finding : findings) ADD_FAILURE() << finding.where << ": " << finding.message;
  auto txn = registry.begin_read().value();
  const auto versions = txn.list<AdapterVersionRecord>(name_prefix("support")).value();
  std::map<std::uint32_t, std::string> stored;
  for (const auto& version : versions) stored[version.version] = version.digest.hex();
  for (const auto& [version, digest] : history.versions)
    EXPECT_EQ(stored[version], digest) << "support@" << version;
  EXPECT_EQ(stored.size(), versions.size());
  ASSERT_FALSE(versions.empty());
  EXPECT_EQ(versions.back().version, versions.size());  // none is missing in between
  const AliasRecord alias = txn.find<AliasRecord>("support").value().value();
  EXPECT_EQ(alias.version, versions.back().version);
  EXPECT_EQ(alias.digest, versions.back().digest);
  // Jobs: all that were acknowledged, each once, each with the event of its own transaction.
  const auto jobs = txn.list<JobRecord>().value();
  std::set<std::string> keys;
  for (const JobRecord& job : jobs) {
    EXPECT_TRUE(keys.insert(job.idempotency_key).second) << job.idempotency_key << " made two jobs";
    EXPECT_EQ(
        txn.find<IdempotencyRecord>(idempotency_key("t", job.idempotency_key))->value().result,
        job.id);
    EXPECT_EQ(txn.list<JobEventRecord>(name_prefix(job.id))->size(), 1u);
  }
  for (const auto& [key, id] : history.jobs)
    EXPECT_TRUE(txn.find<JobRecord>(id)->has_value()) << id;
}

TEST(RegistryCrash, AKilledPublisherLosesNothingAndLeavesNothingHalf) {
  Scratch scratch;
  SystemClock clock;
  const RegistryOptions options{scratch / "data", 16 << 20, 256 << 20, 200'000, true};
  add_base(*Registry::open(options, clock).value());
  const char* wanted = std::getenv("TANDEM_TEST_KILLS");
  const int kills = wanted == nullptr ? 10 : std::atoi(wanted);
  Random random(20261122);
  History history;
  for (int i = 1; i <= kills; ++i) {
    publish_and_kill(scratch / "data", static_cast<std::uint64_t>(i),
                     1 + static_cast<int>(random.below(8)), static_cast<int>(random.below(6000)),
                     history);
    if (HasFatalFailure()) return;
    auto registry = Registry::open(options, clock);
    ASSERT_TRUE(registry.ok()) << registry.status().to_string();
    expect_whole(**registry, history);
    if (HasFailure()) return;
  }
  RecordProperty("acknowledged_publishes", static_cast<int>(history.versions.size()));
  EXPECT_GE(history.versions.size(), static_cast<std::size_t>(kills) / 2);
}

TEST(RegistryCrash, AKilledCreationLeavesNoRegistryOrAWholeOne) {
  SystemClock clock;
  Random random(7);
  for (int i = 0; i < 10; ++i) {
    Scratch scratch;
    const RegistryOptions options{scratch / "data", 16 << 20, 256 << 20, 200'000, true};
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      auto registry = Registry::open(options, clock);
      ::_exit(0);
    }
    ::usleep(static_cast<useconds_t>(random.below(8000)));
    ::kill(child, SIGKILL);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    auto registry = Registry::open(options, clock);
    ASSERT_TRUE(registry.ok()) << registry.status().to_string();
    EXPECT_TRUE((*registry)->check()->empty());
  }
}

}  // namespace
}  // namespace tandem::storage
