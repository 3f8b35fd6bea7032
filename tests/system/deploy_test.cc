// What deploy/ says, held against the programs: scripts parse, YAML parses and names known
// settings, every flag exists, systemd takes the units, and a pool over TCP with keys starts,
// answers and drains.
#include "protocol/settings.h"

#include <gtest/gtest.h>
#include <yaml-cpp/yaml.h>

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <regex>
#include <set>

namespace tandem::test {
namespace {

namespace fs = std::filesystem;

const fs::path kDeploy = fs::path(TANDEM_SOURCE_DIR) / "deploy";
constexpr int kSkipped = 77;

struct Output {
  int code = 0;
  std::string text;  ///< standard output and error
};

Output run(const std::string& command) {
  Output output;
  std::FILE* pipe = ::popen((command + " 2>&1").c_str(), "r");
  if (pipe == nullptr) return {127, "popen failed"};
  char buffer[4096];
  while (const std::size_t got = std::fread(buffer, 1, sizeof buffer, pipe))
    output.text.append(buffer, got);
  const int status = ::pclose(pipe);
  output.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128;
  return output;
}

bool have(const std::string& program) {
  return run("command -v " + program).code == 0;
}

std::string read(const fs::path& path) {
  std::ifstream in(path);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::vector<fs::path> files(const std::vector<std::string>& endings) {
  std::vector<fs::path> found;
  for (const auto& entry : fs::recursive_directory_iterator(kDeploy))
    if (entry.is_regular_file() &&
        (endings.empty() || std::any_of(endings.begin(), endings.end(), [&](const auto& ending) {
           return entry.path().string().ends_with(ending);
         })))
      found.push_back(entry.path());
  std::sort(found.begin(), found.end());
  return found;
}

std::set<std::string> flags_of(const std::string& text) {
  static const std::regex flag(R"((^|[^-A-Za-z0-9/])--([a-z][a-z0-9_-]*[a-z0-9]))");
  std::set<std::string> flags;
  for (std::sregex_iterator it(text.begin(), text.end(), flag), end; it != end; ++it) {
    std::string name = (*it)[2];
    std::replace(name.begin(), name.end(), '_', '-');
    flags.insert(name);
  }
  return flags;
}

TEST(Deploy, ShellScriptsParse) {
  if (!have("bash")) GTEST_SKIP() << "no bash";
  const auto scripts = files({".sh", ".sbatch"});
  EXPECT_GE(scripts.size(), 7U);
  for (const auto& script : scripts) {
    const Output parsed = run("bash -n '" + script.string() + "'");
    EXPECT_EQ(parsed.code, 0) << parsed.text;
    EXPECT_EQ(read(script).rfind("#!/usr/bin/env bash\n", 0), 0U) << script;
    EXPECT_NE(fs::status(script).permissions() & fs::perms::owner_exec, fs::perms::none) << script;
  }
}

TEST(Deploy, ManifestsAreKubernetesObjectsOfOneNamespace) {
  int objects = 0;
  for (const auto& file : files({".yaml"})) {
    std::vector<YAML::Node> documents;
    ASSERT_NO_THROW(documents = YAML::LoadAllFromFile(file.string())) << file;
    if (file.parent_path().filename() != "kubernetes") continue;
    for (const auto& document : documents) {
      ++objects;
      EXPECT_TRUE(document["apiVersion"] && document["kind"]) << file;
      EXPECT_EQ(document["metadata"]["namespace"].as<std::string>(""), "tandem") << file;
    }
  }
  EXPECT_GE(objects, 5);
}

TEST(Deploy, TheExampleConfigurationNamesKnownSettings) {
  const auto settings = protocol::Settings::load({}, (kDeploy / "systemd/config.yaml").string());
  ASSERT_TRUE(settings.ok()) << settings.status().message();
  EXPECT_EQ(settings->get("listen_workers"), "tcp://0.0.0.0:5556");
}

TEST(Deploy, EveryFlagIsOneOfThePrograms) {
  const std::string bin = TANDEM_BIN_DIR;
  std::set<std::string> known;
  for (const std::string command :
       {"/tandem-worker --help", "/tandem-coordinator --help", "/tandem --help",
        "/tandem completion", "/tandem config show --help", "/tandem key create --help"}) {
    const Output help = run(bin + command);
    ASSERT_EQ(help.code, 0) << command << ": " << help.text;
    known.merge(flags_of(help.text));
  }
  ASSERT_TRUE(known.contains("listen-workers") && known.contains("max-length"));
  // Flags of the programs around ours; a flag that we drop or rename is in neither list.
  const std::set<std::string> foreign{
      // mpirun
      "enable-recovery", "oversubscribe", "bind-to", "mca",
      // Slurm
      "batch", "signal", "nodes", "gpus-per-node", "job-name", "ntasks-per-node", "exclusive",
      "no-kill", "requeue", "open-mode", "ntasks", "nodelist", "overlap", "cpu-bind", "immediate",
      "parsable", "output", "noheader", "format", "user", "time",
      // munged, coreutils, apt
      "force", "foreground", "socket", "key-file", "pid-file", "seed-file", "log-file",
      "block-signal", "no-install-recommends",
      // cmake, podman, kubectl, kubernetes-validate, useradd, Containerfiles
      "strict", "preset", "build", "target", "from", "from-file", "shm-size", "stop-timeout",
      "name", "uid", "user-group", "create-home", "now", "arg"};
  std::set<std::string> used;
  for (const auto& file : files({}))
    for (const auto& flag : flags_of(read(file))) {
      EXPECT_TRUE(known.contains(flag) || foreign.contains(flag)) << file << " names --" << flag;
      used.insert(flag);
    }
  for (const auto& flag : foreign) EXPECT_TRUE(used.contains(flag)) << "nobody uses --" << flag;
}

TEST(Deploy, SystemdTakesTheUnits) {
  if (!have("systemd-analyze")) GTEST_SKIP() << "no systemd-analyze";
  const fs::path scratch =
      fs::temp_directory_path() / ("tandem-units-" + std::to_string(::getpid()));
  fs::create_directories(scratch);
  std::string units;
  for (const auto& file : files({".service"})) {
    // The programs are not installed here: systemd would only say so.
    std::string unit =
        std::regex_replace(read(file), std::regex("ExecStart=\\S+"), "ExecStart=/bin/true");
    std::ofstream(scratch / file.filename()) << unit;
    units += " '" + (scratch / file.filename()).string() + "'";
  }
  const Output verified = run("systemd-analyze verify --man=no" + units);
  fs::remove_all(scratch);
  EXPECT_EQ(verified.code, 0) << verified.text;
  EXPECT_EQ(verified.text.find("Unknown key"), std::string::npos) << verified.text;
  EXPECT_EQ(verified.text.find("Failed to parse"), std::string::npos) << verified.text;
}

TEST(Deploy, DrainsFitIntoEveryGracePeriod) {
  const auto settings = protocol::Settings::load({}, "");
  ASSERT_TRUE(settings.ok());
  const auto drain_s = settings->get_int("drain_timeout_s").value() + 2;
  const std::regex grace(
      R"((?:terminationGracePeriodSeconds: |TimeoutStopSec=|--stop-timeout )(\d+))");
  int seen = 0;
  for (const auto& file : files({".yaml", ".service", "Containerfile"})) {
    const std::string text = read(file);
    for (std::sregex_iterator it(text.begin(), text.end(), grace), end; it != end; ++it, ++seen)
      EXPECT_GT(std::stoi((*it)[1]), drain_s) << file << ": " << it->str();
  }
  EXPECT_GE(seen, 6);
}

TEST(Deploy, APoolOverTcpWithKeysStartsAnswersAndDrains) {
  const Output pool =
      run("bash '" TANDEM_SOURCE_DIR "/tests/system/deployed_pool.sh' '" TANDEM_BIN_DIR "'");
  if (pool.code == kSkipped) GTEST_SKIP() << pool.text;
  EXPECT_EQ(pool.code, 0) << pool.text;
}

}  // namespace
}  // namespace tandem::test
