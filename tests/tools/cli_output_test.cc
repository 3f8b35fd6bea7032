#include "tools/cli/output.h"

#include <gtest/gtest.h>

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

}  // namespace
}  // namespace tandem::tools
