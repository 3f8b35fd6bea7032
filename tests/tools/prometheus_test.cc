#include "tools/prometheus.h"

#include <gtest/gtest.h>

#include <regex>
#include <set>
#include <sstream>

namespace tandem::tools {
namespace {

using Json = nlohmann::json;

Json example() {
  return Json::parse(R"({
    "server": "tandem-coordinator/0.1.0", "uptime_s": 7, "models": 1, "adapters": 2, "datasets": 3,
    "jobs": {"queued": 0, "running": 1},
    "requests": {"running": 4, "waiting": 5, "accepted": 60, "finished": 50, "failed": 1,
                 "cancelled": 0, "busy": 2, "rerouted": 0, "shared": 3, "tokens": 12345678901},
    "cache": {"entries": 1, "bytes": 100, "hits": 2, "misses": 8},
    "replicas": [{"replica": "replica-1", "model": "smol", "state": "starting", "requests": 0}],
    "workers": [
      {"worker": "host/cpu0", "device": "cpu", "model": "smol", "state": "ready", "requests": 4,
       "adapters": 1, "kv_free": 10, "kv_total": 64, "tokens_per_second": 12.5,
       "stats": {"steps": 99, "memory_bytes": {"kv": 4096, "weights": 8192}, "dtype": "bf16"}},
      {"worker": "ho\"st\\/cpu1\n", "device": "cpu", "model": "", "state": "lost", "requests": 0,
       "stats": {}}]})");
}

std::vector<std::string> lines(const std::string& text) {
  std::istringstream in(text);
  std::vector<std::string> all;
  for (std::string line; std::getline(in, line);) all.push_back(line);
  return all;
}

bool has(const std::string& text, const std::string& line) {
  return ("\n" + text).find("\n" + line + "\n") != std::string::npos;
}

TEST(Prometheus, SaysWhatTheStatusSays) {
  const Json jobs = Json::parse(R"([
    {"job": "job-1", "name": "guide", "model": "smol", "state": "running", "step": 3,
     "total_steps": 10, "loss": 1.25, "attempts": 1, "ended": 0},
    {"job": "job-2", "name": "", "model": "smol", "state": "queued", "step": 0, "total_steps": 10,
     "loss": null, "attempts": 0, "ended": 0},
    {"job": "job-3", "name": "", "model": "smol", "state": "done", "step": 10, "ended": 99}])");
  const std::string text = prometheus_text(example(), jobs);
  for (const char* line :
       {"tandem_uptime_seconds{server=\"tandem-coordinator/0.1.0\"} 7", "tandem_models 1",
        "tandem_jobs{state=\"running\"} 1", "tandem_requests{state=\"waiting\"} 5",
        "tandem_requests_total{outcome=\"finished\"} 50", "tandem_tokens_total 12345678901",
        "tandem_result_cache_misses_total 8",
        "tandem_worker_ready{worker=\"host/cpu0\",device=\"cpu\",model=\"smol\"} 1",
        "tandem_worker_ready{worker=\"ho\\\"st\\\\/cpu1\\n\",device=\"cpu\",model=\"\"} 0",
        "tandem_worker_tokens_per_second{worker=\"host/cpu0\",device=\"cpu\",model=\"smol\"} 12.5",
        "tandem_worker_memory_bytes{worker=\"host/cpu0\",device=\"cpu\",model=\"smol\","
        "kind=\"weights\"} 8192",
        "tandem_replica_ready{replica=\"replica-1\",model=\"smol\"} 0",
        "tandem_job_loss{job=\"job-1\",name=\"guide\",model=\"smol\"} 1.25",
        "tandem_job_step{job=\"job-2\",name=\"\",model=\"smol\"} 0"})
    EXPECT_TRUE(has(text, line)) << line << "\nis not in\n" << text;
  EXPECT_EQ(text.find("job-3"), std::string::npos) << "an ended job has no progress";
  EXPECT_EQ(text.find("tandem_job_loss{job=\"job-2\""), std::string::npos) << "it has no loss yet";
}

// The format's rules: a family's help, then its type, then all of its samples; no family twice;
// names and labels of the permitted letters; the end of a line behind everything.
TEST(Prometheus, KeepsTheFormatsRules) {
  const std::string text = prometheus_text(example(), Json::array());
  ASSERT_TRUE(text.ends_with("\n"));
  const std::regex head("# (HELP|TYPE) (tandem_[a-z_]+) (.+)");
  const std::string label = R"([a-z_]+="([^"\\]|\\.)*")";
  const std::regex sample(R"((tandem_[a-z_]+)(\{)" + label + "(," + label +
                          R"()*\})? -?[0-9.e+-]+)");
  std::set<std::string> families;
  std::string family, type;
  for (const std::string& line : lines(text)) {
    std::smatch found;
    if (std::regex_match(line, found, head)) {
      if (found[1] == "HELP") {
        family = found[2];
        type.clear();
        EXPECT_TRUE(families.insert(family).second) << family << " twice";
      } else {
        EXPECT_EQ(found[2], family);
        type = found[3];
        EXPECT_TRUE(type == "gauge" || type == "counter") << line;
        EXPECT_EQ(type == "counter", family.ends_with("_total")) << line;
      }
    } else {
      ASSERT_TRUE(std::regex_match(line, found, sample)) << line;
      EXPECT_EQ(found[1], family);
      EXPECT_FALSE(type.empty()) << line;
    }
  }
  EXPECT_GT(families.size(), 20u);
}

TEST(Prometheus, LeavesOutWhatIsNotThere) {
  EXPECT_EQ(prometheus_text(Json::object(), Json::array()), "");
}

}  // namespace
}  // namespace tandem::tools
