#include "tools/cli/output.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <ctime>

namespace tandem::tools {
namespace {

TEST(Describe, TimesAreLocalTimesInRecordsAndInTheirLists) {
  ASSERT_EQ(::setenv("TZ", "UTC-2", 1), 0);
  ::tzset();
  const Json job = Json::parse(R"({"job": "j", "step": 7, "created": 1700000000123, "ended": 0,
      "checkpoints": [{"step": 7, "created": 1700000000123}], "config": {"time": 1}})");
  EXPECT_EQ(describe(job),
            "job:          j\n"
            "step:         7\n"
            "created:      2023-11-15 00:13:20 +0200\n"
            "ended:        -\n"
            "checkpoints:  [{\"step\":7,\"created\":\"2023-11-15 00:13:20 +0200\"}]\n"
            "config:       time 1\n");
}

TEST(Field, NumbersAreWrittenOut) {
  const Json worker = Json::parse(R"({"a": 10380.26, "b": 0.00012345, "c": 999.96, "d": 1e20})");
  EXPECT_EQ(field(worker, "a"), "10380");
  EXPECT_EQ(field(worker, "b"), "0.0001234");
  EXPECT_EQ(field(worker, "c"), "1000");
  EXPECT_EQ(field(worker, "d"), "1e+20");
}

TEST(Colors, AreForTerminalsThatWantThem) {
  const int terminal = ::posix_openpt(O_RDWR | O_NOCTTY);
  ASSERT_GE(terminal, 0);
  ::setenv("TERM", "xterm", 1);
  ::unsetenv("NO_COLOR");
  EXPECT_TRUE(colors(terminal));
  ::setenv("NO_COLOR", "1", 1);
  EXPECT_FALSE(colors(terminal));
  ::setenv("NO_COLOR", "", 1);  // by no-color.org, an empty one says nothing
  EXPECT_TRUE(colors(terminal));
  ::setenv("TERM", "dumb", 1);
  EXPECT_FALSE(colors(terminal));
  ::close(terminal);
}

}  // namespace
}  // namespace tandem::tools
