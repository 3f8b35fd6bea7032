#include "worker/program.h"

#include <gtest/gtest.h>

#include <cstdlib>

namespace tandem::worker {
namespace {

Result<Identity> identity_of(std::vector<std::string> words) {
  protocol::CommandLine line;
  line.rest = std::move(words);
  return identity(line, protocol::Settings::load({{"device", "cpu"}}, "").value(), {"--agent"});
}

TEST(WorkerIdentity, IsWhatTheCommandLineElseTheLauncherSays) {
  ::setenv("OMPI_COMM_WORLD_LOCAL_RANK", "2", 1);
  ::setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "4", 1);
  EXPECT_EQ(identity_of({"--agent"})->slot, 2);
  EXPECT_EQ(identity_of({"--agent"})->local_workers, 4);
  EXPECT_EQ(identity_of({"--slot", "7"})->slot, 7);
  ::unsetenv("OMPI_COMM_WORLD_LOCAL_RANK");
  ::unsetenv("OMPI_COMM_WORLD_LOCAL_SIZE");
  EXPECT_EQ(identity_of({})->slot, 0);
}

TEST(WorkerIdentity, RefusesWhatIsNoNumber) {
  for (const char* wrong : {"", "abc", "1x", "-1", "99999"}) {
    EXPECT_EQ(identity_of({"--slot", wrong}).status().code(), StatusCode::kInvalid) << wrong;
    ::setenv("TANDEM_WORKER_LOCAL_SIZE", wrong, 1);
    const Status status = identity_of({}).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalid) << wrong;
    EXPECT_NE(status.message().find("TANDEM_WORKER_LOCAL_SIZE"), std::string::npos);
  }
  ::setenv("TANDEM_WORKER_LOCAL_SIZE", "0", 1);  // the cores are divided by it
  EXPECT_EQ(identity_of({}).status().code(), StatusCode::kInvalid);
  ::unsetenv("TANDEM_WORKER_LOCAL_SIZE");
  EXPECT_EQ(identity_of({"--slot"}).status().message(), "--slot needs a value");
}

}  // namespace
}  // namespace tandem::worker
