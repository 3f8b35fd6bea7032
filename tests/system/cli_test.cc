// The command line as a program among others: what it does with words it does not know, bytes that
// are no text, signals while nothing comes, and files that tell of processes long gone.
#include "tests/support/tiny_model.h"
#include "tests/system/platform.h"

#include <gtest/gtest.h>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace tandem::test {
namespace {

namespace fs = std::filesystem;

class CommandLine : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    platform_ = std::make_unique<Platform>(
        std::vector<std::string>{"--dtype", "f32", "--threads", "1", "--kv-bytes-max", "8MiB"});
    write_tiny_model(file("model"), 7);
    write_tiny_dataset(file("train.jsonl"), 16, 8);
    platform_->start_coordinator();
    platform_->start_worker();
    ASSERT_EQ(platform_->cli({"model", "add", "tiny", file("model")}).code, 0);
    worker_ = platform_->call("worker.list", Json::object())["workers"][0].value("worker", "");
  }
  static void TearDownTestSuite() { platform_.reset(); }
  static std::string file(const std::string& name) { return platform_->directory() + "/" + name; }

  /// Starts the CLI, lets it wait until `ready`, and interrupts it; its exit code, or -1 when it
  /// does not end.
  static int interrupt(const std::vector<std::string>& arguments, int signal,
                       const std::function<bool()>& ready) {
    const pid_t pid = platform_->start_cli(arguments, "/dev/null", "/dev/null");
    EXPECT_TRUE(eventually(20'000, ready));
    ::kill(pid, signal);
    int status = 0;
    if (!eventually(10'000, [&] { return ::waitpid(pid, &status, WNOHANG) == pid; })) {
      ::kill(pid, SIGKILL);
      ::waitpid(pid, &status, 0);
      return -1;
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  static std::int64_t requests(const char* what) {
    return platform_->call("status", Json::object())["requests"].value(what, std::int64_t{-1});
  }
  /// Every verb's help, from the top.
  static void for_each_help(const std::vector<std::string>& verbs,
                            const std::function<void(const std::string&, const std::string&)>& f) {
    std::vector<std::string> arguments = verbs;
    arguments.emplace_back("--help");
    const auto help = platform_->cli(arguments);
    std::string typed;
    for (const auto& verb : verbs) typed += verb + " ";
    EXPECT_EQ(help.code, 0) << typed;
    const auto inner = help.out.find("Subcommands:");
    if (inner == std::string::npos) return f(typed, help.out);
    std::istringstream lines(help.out.substr(inner));
    std::string line;
    std::getline(lines, line);
    while (std::getline(lines, line) && line.starts_with("  ")) {
      std::istringstream words(line);
      std::vector<std::string> deeper = verbs;
      words >> deeper.emplace_back();
      if (line[2] != ' ') for_each_help(deeper, f);
    }
  }
  static std::unique_ptr<Platform> platform_;
  static std::string worker_;
};
std::unique_ptr<Platform> CommandLine::platform_;
std::string CommandLine::worker_;

TEST_F(CommandLine, UnknownWordsAreNamedWithTheNearest) {
  const std::vector<std::pair<std::vector<std::string>, std::vector<std::string>>> cases{
      {{"job", "lst"}, {"tandem job", "lst", "list"}},
      {{"trian", "--model", "tiny"}, {"trian", "train"}},
      {{"train", "--modle", "tiny"}, {"--modle", "--model"}},
      {{"train", "--learning-rte=3"}, {"--learning-rte", "--learning-rate"}},
      {{"--jsn", "status"}, {"--jsn", "--json"}},
      {{"adapter"}, {"tandem adapter", "rollback"}},
      {{"status", "now"}, {"tandem status", "now"}},
  };
  for (const auto& [arguments, words] : cases) {
    const auto output = platform_->cli(arguments);
    EXPECT_EQ(output.code, 2) << output.err;
    EXPECT_EQ(output.out, "");
    for (const auto& word : words)
      EXPECT_NE(output.err.find(word), std::string::npos) << word << " in " << output.err;
    std::vector<std::string> with_json = arguments;
    with_json.insert(with_json.begin(), "--json");
    const auto json = platform_->cli(with_json);
    EXPECT_EQ(json.code, 2);
    EXPECT_EQ(Json::parse(json.out)["error"]["code"], "invalid") << json.out;
  }
}

TEST_F(CommandLine, BytesThatAreNoTextAreAnErrorAndNotACrash) {
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"job", "show", "\xff"},
        {"generate", "--model", "tiny", "--prompt", "\xfe\xff"},
        {"train", "--model", "\xff", "--data", file("train.jsonl"), "--adapter", "x"},
        {"job", "\xff"},
        {"--\xff"}}) {
    EXPECT_EQ(platform_->cli(arguments).code, 2) << arguments.back();
    std::vector<std::string> with_json = arguments;
    with_json.insert(with_json.begin(), "--json");
    const auto json = platform_->cli(with_json);
    EXPECT_EQ(json.code, 2);
    EXPECT_FALSE(Json::parse(json.out, nullptr, false).is_discarded()) << json.out;
  }
}

TEST_F(CommandLine, OutputThatCannotBeWrittenIsAFailure) {
  const pid_t pid = platform_->start_cli({"--json", "status"}, "/dev/full", "/dev/null");
  int status = 0;
  ASSERT_EQ(::waitpid(pid, &status, 0), pid);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 1);
}

TEST_F(CommandLine, ASystemMessageWithoutTheTemplateIsRefused) {
  const auto output =
      platform_->cli({"generate", "--model", "tiny", "--raw", "--system", "s", "--prompt", "p"});
  EXPECT_EQ(output.code, 2);
  EXPECT_NE(output.err.find("--system"), std::string::npos) << output.err;
}

TEST_F(CommandLine, EveryVerbsHelpHasAnExample) {
  int verbs = 0;
  for_each_help({}, [&](const std::string& typed, const std::string& help) {
    ++verbs;
    EXPECT_NE(help.find("Example"), std::string::npos) << typed;
    EXPECT_NE(help.find("tandem " + typed.substr(0, typed.size() - 1)), std::string::npos) << typed;
  });
  EXPECT_GT(verbs, 40);
}

TEST_F(CommandLine, EveryExampleIsACommandThatCanBeTyped) {
  int examples = 0;
  for_each_help({}, [&](const std::string& typed, const std::string& help) {
    for (const std::string local : {"up ", "down ", "bench ", "logs ", "completion "})
      if (typed == local) return;
    std::istringstream lines(help.substr(help.find("Example")));
    for (std::string line; std::getline(lines, line);) {
      if (!line.starts_with("  tandem ")) continue;
      const std::string command = line.substr(8, line.find("  (") - 8);  // a remark may follow
      std::ofstream(file("words.sh")) << "printf '%s\\n' " << command << " >" << file("words");
      ASSERT_EQ(std::system(("sh " + file("words.sh")).c_str()), 0);
      std::ifstream in(file("words"));
      std::vector<std::string> words;
      for (std::string word; std::getline(in, word);) words.push_back(word);
      EXPECT_NE(platform_->cli(words).code, 2) << line;  // most names are not known here: 3
      ++examples;
    }
  });
  EXPECT_GT(examples, 50);
}

TEST_F(CommandLine, EstimateTakesTrainsOptionsAndTellsTheStepsToo) {
  const auto shown =
      platform_->cli({"--json", "estimate", "--model", "tiny", "--data", file("train.jsonl"),
                      "--adapter", "x", "--num-train-epochs", "2", "--max-length", "128"});
  ASSERT_EQ(shown.code, 0) << shown.err;
  const Json data = Json::parse(shown.out)["data"];
  EXPECT_GT(data["trained_tokens"], 0);
  EXPECT_EQ(data["steps"], 2 * data["steps_per_epoch"].get<int>());
  std::ofstream(file("twice.yaml")) << "model: tiny\nlora_r: 4\nlora_r: 8\n";
  const auto twice = platform_->cli({"estimate", "-f", file("twice.yaml")});
  EXPECT_EQ(twice.code, 2) << twice.out;
  EXPECT_NE(twice.err.find("twice.yaml:3: \"lora_r\""), std::string::npos) << twice.err;
  const auto endless = platform_->cli({"train", "--model", "tiny", "--data", file("train.jsonl"),
                                       "--adapter", "x", "--max-steps", "100000000"});
  EXPECT_EQ(endless.code, 2) << endless.out;
  EXPECT_NE(endless.err.find("passes over the data"), std::string::npos) << endless.err;
}

TEST_F(CommandLine, StatusIsForPeopleWhereJsonIsNotAskedFor) {
  const auto shown = platform_->cli({"status"});
  ASSERT_EQ(shown.code, 0) << shown.err;
  EXPECT_EQ(shown.out.find('{'), std::string::npos) << shown.out;
  EXPECT_EQ(shown.out.find('['), std::string::npos) << shown.out;
  EXPECT_NE(shown.out.find("running 0, waiting 0"), std::string::npos) << shown.out;
}

TEST_F(CommandLine, StatusSpeaksPrometheus) {
  const auto shown = platform_->cli({"status", "--prometheus"});
  ASSERT_EQ(shown.code, 0) << shown.err;
  EXPECT_TRUE(shown.out.starts_with("# HELP tandem_")) << shown.out;
  EXPECT_NE(shown.out.find("\ntandem_models 1\n"), std::string::npos) << shown.out;
  EXPECT_NE(shown.out.find("\ntandem_worker_ready{worker=\"" + worker_ + "\""), std::string::npos)
      << shown.out;
  EXPECT_EQ(platform_->cli({"--json", "status", "--prometheus"}).code, 2);
}

TEST_F(CommandLine, EstimateNamesDataThatIsNeitherAFileNorADataSet) {
  for (const auto& data : {std::vector<std::string>{"--data", "tran.jsonl"},
                           {"--data", file("train.jsonl"), "--eval-data", "tran.jsonl"}}) {
    std::vector<std::string> arguments{"estimate", "--model", "tiny"};
    arguments.insert(arguments.end(), data.begin(), data.end());
    const auto shown = platform_->cli(arguments);
    EXPECT_EQ(shown.code, 3) << shown.out;
    EXPECT_NE(shown.err.find("tran.jsonl"), std::string::npos) << shown.err;
  }
}

TEST_F(CommandLine, DataCheckAndTrainDrawTheSameLineAtTooLong) {
  std::ofstream(file("long.jsonl")) << R"({"text": ")" << std::string(900, 'x') << "\"}\n";
  for (const char* verb : {"train", "estimate"}) {
    const auto refused = platform_->cli(
        {verb, "--model", "tiny", "--data", file("long.jsonl"), "--adapter", "never"});
    EXPECT_NE(refused.code, 0) << verb;
  }
  const auto checked = platform_->cli({"data", "check", file("long.jsonl"), "--model", "tiny"});
  EXPECT_EQ(checked.code, 2) << checked.out;
  EXPECT_NE(checked.err.find("more than max_length 512 tokens"), std::string::npos) << checked.err;
  const auto beyond = platform_->cli(
      {"data", "check", file("train.jsonl"), "--model", "tiny", "--max-length", "1000000"});
  EXPECT_EQ(beyond.code, 2) << beyond.out;
  EXPECT_NE(beyond.err.find("exceeds the context"), std::string::npos) << beyond.err;
}

TEST_F(CommandLine, AJobFileMayBeWrittenAsYamlAllows) {
  platform_->call("worker.drain", {{"worker", worker_}});
  std::ofstream(file("spelled.yaml")) << "model: tiny\ndata: " << file("train.jsonl")
                                      << "\neval_data:\nadapter: 1.10\npacking: No\n"
                                      << "use_rslora: True\nlearning_rate: 1.e-3\n"
                                      << "eval_split: .25\n";
  const auto made = platform_->cli({"--json", "train", "-f", file("spelled.yaml")});
  ASSERT_EQ(made.code, 0) << made.err;
  const std::string job = Json::parse(made.out).value("job", "");
  const Json spec = platform_->call("job.show", {{"job", job}})["spec"];
  platform_->call("job.cancel", {{"job", job}});
  platform_->call("worker.resume", {{"worker", worker_}});
  EXPECT_EQ(spec["adapter"], "1.10");
  EXPECT_EQ(spec["eval_dataset"], "");
  EXPECT_EQ(spec["train"]["packing"], false);
  EXPECT_EQ(spec["train"]["use_rslora"], true);
  EXPECT_EQ(spec["train"]["learning_rate"], 1e-3);
  EXPECT_EQ(spec["train"]["eval_split"], 0.25);
}

TEST_F(CommandLine, AJobFilesPriorityGivesWayToTheCommandLinesAlsoWhereThatIsNought) {
  platform_->call("worker.drain", {{"worker", worker_}});
  const auto priority = [&](const std::string& in_file, std::vector<std::string> more) {
    std::ofstream(file("job.yaml")) << "model: tiny\ndata: " << file("train.jsonl")
                                    << "\nadapter: urgent\npriority: " << in_file << "\n";
    more.insert(more.begin(), {"--json", "train", "-f", file("job.yaml")});
    const auto made = platform_->cli(more);
    EXPECT_EQ(made.code, 0) << made.err;
    const std::string job = Json::parse(made.out).value("job", "");
    const Json shown = platform_->call("job.show", {{"job", job}});
    platform_->call("job.cancel", {{"job", job}});
    return shown["spec"].value("priority", -1);
  };
  EXPECT_EQ(priority("5", {}), 5);
  EXPECT_EQ(priority("5", {"--priority", "0"}), 0);
  std::ofstream(file("word.yaml")) << "model: tiny\npriority: high\n";
  const auto word = platform_->cli({"estimate", "-f", file("word.yaml")});
  EXPECT_EQ(word.code, 2);
  EXPECT_NE(word.err.find("priority must be an integer in -100..100, not \"high\""),
            std::string::npos)
      << word.err;
  platform_->call("worker.resume", {{"worker", worker_}});
}

TEST_F(CommandLine, JsonIsOneValueWhenSomethingIsWrongToo) {
  const auto one_value = [&](std::vector<std::string> arguments, int code) {
    arguments.insert(arguments.begin(), "--json");
    const auto output = platform_->cli(arguments);
    EXPECT_EQ(output.code, code) << output.err;
    EXPECT_NE(output.err, "") << "people are told what is wrong";
    const Json json = Json::parse(output.out, nullptr, false);
    EXPECT_TRUE(json.is_object()) << output.out;
  };
  std::ofstream(file("twice.jsonl")) << "{\"text\": \"good\"}\n{\"text\": \n";
  one_value({"data", "check", file("twice.jsonl"), "--model", "tiny"}, 2);
  const std::string path = std::getenv("PATH");
  ::setenv("PATH", file("nothing").c_str(), 1);
  one_value({"doctor"}, 1);  // no mpirun
  ::setenv("PATH", path.c_str(), 1);
}

TEST_F(CommandLine, LogsAreJsonLinesWhereJsonIsAskedFor) {
  const auto logs = platform_->cli({"logs", "--json", "--lines", "3"});
  EXPECT_EQ(logs.code, 0) << logs.err;
  std::istringstream lines(logs.out);
  int count = 0;
  for (std::string line; std::getline(lines, line); ++count) {
    const Json json = Json::parse(line, nullptr, false);
    EXPECT_TRUE(fs::exists(json.value("file", "-"))) << line;
    EXPECT_NE(json.value("line", ""), "") << line;
  }
  EXPECT_GT(count, 0);
}

TEST_F(CommandLine, EvalSaysThatNeitherAModelNorAnAdapterHasTheName) {
  const auto eval = platform_->cli({"eval", "--model", "nope", "--data", file("train.jsonl")});
  EXPECT_EQ(eval.code, 3);
  EXPECT_NE(eval.err.find("no model or adapter named nope"), std::string::npos) << eval.err;
}

TEST_F(CommandLine, BenchesTakeThePlatformAndJsonAndEndAsVerbsDo) {
  const auto bench = [&](std::vector<std::string> arguments, int code, const std::string& word) {
    const auto output = platform_->cli(arguments);
    EXPECT_EQ(output.code, code) << output.err;
    EXPECT_NE((output.out + output.err).find(word), std::string::npos) << output.out << output.err;
  };
  bench({"bench", "--help"}, 0, "Example");
  bench({"bench", "serve", "--help"}, 0, "--publishes");
  bench({"bench", "collectives", "--json", "--bytes-max", "4096"}, 0, "\"ranks\": 1");
  bench({"bench", "train", "--shape", "tiny", "--layout", "tp2"}, 2, "mpirun -np 2");
  bench({"bench", "nope"}, 2, "collectives");
  bench({"bench"}, 2, "name");
  bench({"bench", "serve"}, 2, "--model");
  bench({"bench", "--json", "serve"}, 2, "--model");
  bench({"bench", "serve", "--model", "tiny", "--nope"}, 2, "--nope");
  bench({"bench", "serve", "--model", "nope", "--json"}, 3, "nope");
  const std::string other = "ipc://" + file("other.sock");
  bench({"--coordinator", other, "bench", "serve", "--model", "tiny"}, 5, other);
}

TEST_F(CommandLine, ASeedThatIsNoIntegerOf64BitsIsRefused) {
  const auto seed = [&](const std::string& text) {
    return platform_->cli(
        {"generate", "--model", "tiny", "--prompt", "p", "--max-tokens", "1", "--seed", text});
  };
  EXPECT_EQ(seed("9223372036854775807").code, 0);
  const auto output = seed("9223372036854775808");
  EXPECT_EQ(output.code, 2);
  EXPECT_NE(output.err.find("9223372036854775808"), std::string::npos) << output.err;
}

TEST_F(CommandLine, TrainsHelpShowsDefaultsAsTheyAreTyped) {
  const std::string help = platform_->cli({"train", "--help"}).out;
  for (const std::string shown : {"[all-linear]", "[lora]", "[0.0002]"})
    EXPECT_NE(help.find(shown), std::string::npos) << shown << " in " << help;
}

TEST_F(CommandLine, CompletionKnowsVerbsAndTheirOptions) {
  std::ofstream(file("complete.bash")) << platform_->cli({"completion"}).out
                                       << "COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); _tandem\n"
                                          "printf '%s\\n' \"${COMPREPLY[@]}\"\n";
  const auto complete = [&](const std::string& line) {
    const std::string out = file("complete.out");
    EXPECT_EQ(std::system(("bash " + file("complete.bash") + " " + line + " >" + out).c_str()), 0);
    std::ifstream in(out);
    return std::string((std::istreambuf_iterator<char>(in)), {});
  };
  EXPECT_EQ(complete("tandem trai"), "train\n");
  EXPECT_EQ(complete("tandem job wa"), "watch\n");
  EXPECT_EQ(complete("tandem --json --data-dir /x job resume job-1 --vir"),
            "--virtual-pipeline-size\n--virtual-pp\n");
  EXPECT_EQ(complete("tandem generate --max"), "--max-tokens\n");
  EXPECT_NE(platform_->cli({"completion", "zsh"}).out.find("bashcompinit"), std::string::npos);
  EXPECT_EQ(platform_->cli({"completion", "tcsh"}).code, 2);
}

TEST_F(CommandLine, CtrlCEndsAWatchOfAJobThatWaitsAndTheJobGoesOn) {
  platform_->call("worker.drain", {{"worker", worker_}});
  const auto made = platform_->cli({"--json", "train", "--model", "tiny", "--data",
                                    file("train.jsonl"), "--adapter", "later", "--max-steps", "2"});
  ASSERT_EQ(made.code, 0) << made.err;
  const std::string job = Json::parse(made.out).value("job", "");
  EXPECT_EQ(interrupt({"job", "watch", job}, SIGINT, [] { return ::usleep(1'000'000) == 0; }), 0);
  EXPECT_EQ(platform_->call("job.show", {{"job", job}}).value("state", ""), "queued");
  platform_->call("worker.resume", {{"worker", worker_}});
  EXPECT_EQ(platform_->wait_job(job).value("state", ""), "done");
}

TEST_F(CommandLine, SignalsCancelAnAnswerThatHasNotBegunAndOneThatIsNotStreamed) {
  platform_->call("worker.drain", {{"worker", worker_}});
  for (const int signal : {SIGINT, SIGTERM}) {
    const auto waiting = [] { return requests("waiting") == 1; };
    EXPECT_EQ(
        interrupt({"generate", "--model", "tiny", "--prompt", "x", "--no-cache"}, signal, waiting),
        1);
    EXPECT_TRUE(eventually(10'000, [] { return requests("waiting") == 0; }));
  }
  platform_->call("worker.resume", {{"worker", worker_}});
  // An engine that holds still does not finish before the signal comes.
  const pid_t engine = platform_->engine();
  ASSERT_EQ(::kill(engine, SIGSTOP), 0);
  EXPECT_EQ(interrupt({"generate", "--model", "tiny", "--prompt", "x", "--no-cache", "--no-stream",
                       "--ignore-eos", "--max-tokens", "400"},
                      SIGINT, [] { return requests("running") == 1; }),
            1);
  ::kill(engine, SIGCONT);
  EXPECT_TRUE(eventually(10'000, [] { return requests("running") == 0; }));
}

TEST_F(CommandLine, AnInterruptStopsAnAnswerOfAChatAtATerminalAndTheChatGoesOn) {
  const int terminal = ::posix_openpt(O_RDWR | O_NOCTTY);
  ASSERT_TRUE(terminal >= 0 && ::grantpt(terminal) == 0 && ::unlockpt(terminal) == 0);
  const pid_t engine = platform_->engine();
  ASSERT_EQ(::kill(engine, SIGSTOP), 0);
  const pid_t chat = platform_->start_cli({"chat", "--model", "tiny", "--ignore-eos", "--no-cache"},
                                          "/dev/null", "/dev/null", ::ptsname(terminal));
  ASSERT_EQ(::write(terminal, "x\n", 2), 2);
  EXPECT_TRUE(eventually(20'000, [] { return requests("running") + requests("waiting") == 1; }));
  ::kill(chat, SIGINT);
  ::kill(engine, SIGCONT);
  EXPECT_TRUE(eventually(10'000, [] { return requests("running") + requests("waiting") == 0; }));
  ASSERT_EQ(::write(terminal, "\n", 1), 1);  // an empty line ends it
  int status = 0;
  EXPECT_TRUE(eventually(10'000, [&] { return ::waitpid(chat, &status, WNOHANG) == chat; }));
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  ::close(terminal);
}

TEST_F(CommandLine, AKilledClientsAnswerThatIsNotStreamedIsNotComputedForNobody) {
  platform_->call("worker.drain", {{"worker", worker_}});
  EXPECT_EQ(interrupt({"generate", "--model", "tiny", "--prompt", "x", "--no-cache", "--no-stream"},
                      SIGKILL, [] { return requests("waiting") == 1; }),
            128 + SIGKILL);
  EXPECT_TRUE(eventually(30'000, [] { return requests("waiting") == 0; }));
  platform_->call("worker.resume", {{"worker", worker_}});
}

TEST(StaleFiles, OfProcessesThatAreGoneAreNeverTakenForWhoHasTheNumberNow) {
  Platform platform;
  const pid_t stranger = ::fork();
  if (stranger == 0) {
    ::pause();
    ::_exit(0);
  }
  fs::create_directories(platform.data_dir() + "/run");
  fs::create_directories(platform.data_dir() + "/registry");
  const std::string pid = std::to_string(stranger);
  for (const char* name : {"coordinator.json", "workers.json"})
    std::ofstream(platform.data_dir() + "/run/" + name) << R"({"pid": )" << pid << "}";
  std::ofstream(platform.data_dir() + "/registry/owner") << pid << "\n";
  const auto down = platform.cli({"down"});
  EXPECT_EQ(down.code, 0) << down.err;
  EXPECT_NE(down.out.find("nothing was running"), std::string::npos) << down.out;
  EXPECT_EQ(::waitpid(stranger, nullptr, WNOHANG), 0) << "a stranger was ended";

  std::ofstream(platform.data_dir() + "/run/coordinator.json") << R"({"pid": "x"})";
  EXPECT_EQ(platform.cli({"down"}).code, 0);
  ::kill(stranger, SIGKILL);
  ::waitpid(stranger, nullptr, 0);
}

}  // namespace
}  // namespace tandem::test
