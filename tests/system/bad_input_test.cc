// Bad input through the CLI, as a user meets it: the exit code, and a message that names the object
// and the limit.
#include "storage/safetensors.h"
#include "tests/support/tiny_model.h"
#include "tests/system/platform.h"

#include <gtest/gtest.h>

#include <sys/stat.h>

#include <filesystem>
#include <fstream>

namespace tandem::test {
namespace {

namespace fs = std::filesystem;

class BadInput : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    platform_ = std::make_unique<Platform>(std::vector<std::string>{"--dtype", "f32", "--threads",
                                                                    "1", "--kv-bytes-max", "8MiB",
                                                                    "--memory-bytes-max", "64MiB"});
    write_tiny_model(file("model"), 7);
    write_tiny_dataset(file("train.jsonl"), 16, 8);
    platform_->start_coordinator();
    platform_->start_worker();
    ASSERT_EQ(platform_->cli({"model", "add", "tiny", file("model")}).code, 0);
  }
  static void TearDownTestSuite() { platform_.reset(); }

  static std::string file(const std::string& name) { return platform_->directory() + "/" + name; }
  static std::string write(const std::string& name, const std::string& text) {
    fs::create_directories(fs::path(file(name)).parent_path());
    std::ofstream(file(name), std::ios::binary) << text;
    return file(name);
  }
  /// Runs the CLI and expects an exit code and words in the message.
  static void expect(const std::vector<std::string>& arguments, int code,
                     const std::vector<std::string>& words) {
    const auto output = platform_->cli(arguments);
    EXPECT_EQ(output.code, code) << output.out << output.err;
    for (const auto& word : words)
      EXPECT_NE(output.err.find(word), std::string::npos)
          << "no \"" << word << "\" in: " << output.err;
  }
  static std::vector<std::string> train(const std::string& data,
                                        std::vector<std::string> more = {}) {
    std::vector<std::string> arguments{"train",       "--model",   "tiny",         "--data",
                                       data,          "--adapter", "bad",          "--follow",
                                       "--max-steps", "2",         "--max-length", "128"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }
  /// A copy of the tiny model with a digest of its own, added under its folder's name.
  static void add_copy(const std::string& name) {
    fs::create_directories(file(name));
    fs::copy(file("model"), file(name), fs::copy_options::recursive);
    std::ifstream in(file("model/config.json"));
    Json config = Json::parse(in);
    config["initializer_range"] = static_cast<double>(std::hash<std::string>()(name));
    write(name + "/config.json", config.dump());
    expect({"model", "add", name, file(name)}, 0, {});
  }
  /// A PEFT folder of rank 4 for q_proj of a model of this width.
  static std::string write_adapter(const std::string& name, std::int64_t width) {
    write(name + "/adapter_config.json",
          R"({"peft_type":"LORA","r":4,"lora_alpha":8,"task_type":"CAUSAL_LM")"
          R"(,"target_modules":["q_proj"]})");
    const std::string site = "base_model.model.model.layers.0.self_attn.q_proj.lora_";
    const std::vector<std::byte> zeros(static_cast<std::size_t>(4 * width) * sizeof(float));
    const std::vector<storage::TensorInfo> halves{
        {site + "A.weight", DType::kF32, {4, width}, zeros},
        {site + "B.weight", DType::kF32, {width, 4}, zeros}};
    EXPECT_TRUE(
        storage::write_safetensors(file(name + "/adapter_model.safetensors"), halves, {}).ok());
    return file(name);
  }
  static std::unique_ptr<Platform> platform_;
};
std::unique_ptr<Platform> BadInput::platform_;

TEST_F(BadInput, NoSuchModelOrAdapter) {
  expect({"generate", "--model", "tinny", "--prompt", "x"}, 3, {"tinny", "tiny"});
  expect({"model", "show", "nothing"}, 3, {"nothing"});
  expect({"adapter", "show", "nothing"}, 3, {"nothing"});
  expect({"job", "show", "job-000000000000"}, 3, {"job-000000000000"});
}

TEST_F(BadInput, AModelThatIsNotThereOrNotSupported) {
  expect({"model", "add", "m", file("absent")}, 3, {"absent"});
  fs::create_directories(file("bert"));
  fs::copy(file("model"), file("bert"), fs::copy_options::recursive);
  write("bert/config.json",
        R"({"architectures":["BertModel"],"model_type":"bert","hidden_size":8})");
  expect({"model", "add", "bert", file("bert")}, 4, {"bert"});
  std::string gguf("GGUF\3\0\0\0\0\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0", 24);  // no tensors, one key
  gguf += std::string("\x14\0\0\0\0\0\0\0general.architecture\x08\0\0\0\5\0\0\0\0\0\0\0mamba",
                      8 + 20 + 4 + 8 + 5);
  expect({"model", "add", "mamba", write("mamba.gguf", gguf)}, 4, {"mamba"});
}

TEST_F(BadInput, AModelOfOneFileIsNotExportedAsAFolder) {
  std::string gguf("GGUF\3\0\0\0\0\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0", 24);  // no tensors, one key
  gguf += std::string("\x14\0\0\0\0\0\0\0general.architecture\x08\0\0\0\5\0\0\0\0\0\0\0llama",
                      8 + 20 + 4 + 8 + 5);
  platform_->call("model.add", {{"name", "one"}, {"path", write("one.gguf", gguf)}});
  expect({"model", "export", "one", file("one")}, 4, {"one GGUF file", file("one.gguf")});
  EXPECT_FALSE(fs::exists(file("one")));
  platform_->call("model.rm", {{"model", "one"}});
}

TEST_F(BadInput, AModelThatCannotBeLoadedTakesNothingFromTheOthers) {
  expect({"generate", "--model", "tiny", "--prompt", "x", "--max-tokens", "2"}, 0, {});
  for (const std::string name : {"gone1", "gone2", "gone3"}) {
    fs::create_directories(file(name));
    fs::copy(file("model"), file(name), fs::copy_options::recursive);
    std::ifstream in(file("model/config.json"));
    Json config = Json::parse(in);
    config["initializer_range"] = 0.01 * name.back();  // another digest
    write(name + "/config.json", config.dump());
    expect({"model", "add", name, file(name), "--shared"}, 0, {});
    fs::remove(file(name + "/tokenizer.json"));
    EXPECT_NE(platform_->cli({"generate", "--model", name, "--prompt", "x"}).code, 0);
    // At once, and by the engine that held it all along.
    expect({"generate", "--model", "tiny", "--prompt", name, "--max-tokens", "2"}, 0, {});
  }
}

TEST_F(BadInput, AModelThatNoEngineCouldLoadIsNotAdded) {
  fs::create_directories(file("odd"));
  fs::copy(file("model"), file("odd"), fs::copy_options::recursive);
  std::ifstream in(file("model/config.json"));
  Json config = Json::parse(in);
  config["rope_scaling"] = {{"rope_type", "longrope"}, {"factor", 2.0}};
  write("odd/config.json", config.dump());
  expect({"model", "add", "odd", file("odd")}, 4, {"odd", "longrope"});
  fs::copy(file("model/config.json"), file("odd/config.json"),
           fs::copy_options::overwrite_existing);
  write("odd/tokenizer.json", R"({"model":{"type":"Unigram"}})");
  expect({"model", "add", "odd", file("odd")}, 4, {"odd", "Unigram"});
  expect({"model", "show", "odd"}, 3, {"odd"});
}

TEST_F(BadInput, TruncatedSafetensors) {
  fs::create_directories(file("cut"));
  fs::copy(file("model"), file("cut"), fs::copy_options::recursive);
  fs::resize_file(file("cut/model.safetensors"),
                  fs::file_size(file("cut/model.safetensors")) - 100);
  expect({"model", "add", "cut", file("cut")}, 1, {"model.safetensors", "truncated"});
}

TEST_F(BadInput, DataSets) {
  expect(train(file("absent.jsonl")), 3, {"absent.jsonl"});
  expect(train(write("empty.jsonl", "")), 2, {"empty.jsonl", "empty"});
  expect(train(write("line.jsonl", "{\"text\": \"good\"}\n{\"text\": \n")), 2,
         {"line.jsonl", "line 2"});
  expect(train(write("utf8.jsonl", "{\"text\": \"good\"}\n{\"text\": \"\xff\xfe\"}\n")), 2,
         {"line 2", "UTF-8"});
  expect(
      train(write("mute.jsonl", R"({"messages":[{"role":"user","content":"only a question"}]})")),
      2, {"trained"});
  expect(train(write("long.jsonl", "{\"text\": \"" + std::string(300, 'x') + "\"}\n")), 2, {"128"});
  expect({"data", "check", file("line.jsonl"), "--model", "tiny"}, 2, {"line 2"});
}

TEST_F(BadInput, TrainingSettings) {
  expect(train(file("train.jsonl"), {"--target-modules", "nothing_proj"}), 2,
         {"nothing_proj", "q_proj"});
  expect(train(file("train.jsonl"), {"--lora-r", "0"}), 2, {"lora_r", "1..512", "0"});
  expect(train(file("train.jsonl"), {"--no-such-flag", "1"}), 2, {"no-such-flag"});
  write("job.yaml", "model: tiny\ndata: train.jsonl\nadapter: x\nlearning_rat: 1e-3\n");
  expect({"train", "-f", file("job.yaml")}, 2, {"learning_rat", "learning_rate"});
}

TEST_F(BadInput, LayoutsThatCannotWork) {
  const std::string data = file("train.jsonl");
  // Known from the settings alone.
  expect(train(data, {"--dp", "2"}), 4, {"gradient_accumulation_steps", "multiple of 2"});
  expect(train(data, {"--zero", "2"}), 4, {"zero 2", "dp is 1"});
  expect(train(data, {"--tp", "2", "--lora-dropout", "0.5"}), 4, {"lora_dropout 0.5", "tp 1"});
  expect(train(data, {"--pp", "2", "--virtual-pp", "2"}), 4,
         {"virtual_pipeline_size 2", "gradient_accumulation_steps to 2"});
  expect(train(data, {"--tp", "0"}), 2, {"tp must be in 1..64", "0"});
  expect(train(data, {"--pp", "65"}), 2, {"pp must be in 1..64", "65"});
  // Known to the dry run: 4 heads, 2 kv heads, 2 blocks.
  expect(train(data, {"--tp", "3"}), 4, {"tp 3", "2 kv heads", "nearest layout", "tp 2"});
  expect(train(data, {"--pp", "5"}), 4, {"pp 5", "the model has 2", "pp 2"});
  expect({"estimate", "--model", "tiny", "--tp", "4"}, 4, {"tp 4", "nearest layout"});
  expect({"estimate", "--model", "tiny", "--pp", "2", "--virtual-pp", "2",
          "--gradient-accumulation-steps", "2"},
         4, {"virtual_pipeline_size 2", "nearest layout", "pp 2"});
  // Known to the coordinator: one worker. It says so once it knows its pool.
  write("gang.yaml", str("model: tiny\ndata: ", data, "\nadapter: g\ntp: 2\nmax_length: 128\n"));
  ASSERT_TRUE(eventually(30'000, [&] {
    const auto output = platform_->cli({"train", "-f", file("gang.yaml")});
    if (output.code == 0) {  // queued while workers may still come back
      const std::string job = output.out.substr(0, output.out.find(' '));
      EXPECT_EQ(platform_->cli({"job", "cancel", job}).code, 0);
      return false;
    }
    return output.code == 4 && output.err.find("2 ranks") != std::string::npos &&
           output.err.find("1 CPU worker") != std::string::npos;
  })) << "more ranks than the pool has slots";
  const auto estimate = platform_->cli({"estimate", "-f", file("gang.yaml")});
  EXPECT_EQ(estimate.code, 0) << estimate.err;
  EXPECT_NE(estimate.out.find("not on this pool: the job has 2 ranks"), std::string::npos)
      << estimate.out;
}

TEST_F(BadInput, EveryRanksBytesAreEstimated) {
  const auto output = platform_->cli(
      {"--json", "estimate", "--model", "tiny", "--tp", "2", "--pp", "2", "--max-length", "128"});
  ASSERT_EQ(output.code, 0) << output.err;
  const Json json = Json::parse(output.out);
  ASSERT_EQ(json["ranks"].size(), 4u) << output.out;
  for (const Json& rank : json["ranks"]) EXPECT_GT(rank.value("peak_total", 0), 0);
  EXPECT_GT(json["by_kind"].value("serving_engine", 0), 0);
}

TEST_F(BadInput, AJobThatDoesNotFitIsRefusedWithTheNumber) {
  expect(train(file("train.jsonl"), {"--per-device-train-batch-size", "4096"}), 4, {"MiB"});
}

TEST_F(BadInput, Requests) {
  expect({"generate", "--model", "tiny", "--prompt", std::string(600, 'x')}, 2, {"512"});
  expect({"generate", "--model", "tiny", "--prompt", "x", "--temperature", "-1"}, 2,
         {"temperature", "-1"});
  expect({"generate", "--model", "tiny", "--prompt", "x", "--top-p", "3"}, 2, {"top_p", "3"});
  expect({"generate", "--model", "tiny", "--prompt", "x", "--max-tokens", "0"}, 2, {"max_tokens"});
  expect({"generate", "--model", "tiny", "--prompt", "\xff\xfe"}, 2, {"UTF-8"});
}

TEST_F(BadInput, AnAdapterThatDoesNotFitItsBase) {
  const std::string peft = R"({"peft_type":"LORA","r":4,"lora_alpha":8,"task_type":"CAUSAL_LM")"
                           R"(,"target_modules":["q_proj"])";
  write("peft/adapter_config.json", peft + "}");
  expect({"adapter", "import", "p", file("peft"), "--model", "tiny"}, 3,
         {"adapter_model.safetensors"});
  write("dora/adapter_config.json", peft + R"(,"use_dora":true})");
  expect({"adapter", "import", "p", file("dora"), "--model", "tiny"}, 4, {"use_dora"});
  add_copy("away");
  fs::rename(file("away"), file("elsewhere"));  // as seen from another host
  for (const std::string model : {"tiny", "away"})
    expect({"adapter", "import", "p", write_adapter("wide", 48), "--model", model}, 4,
           {"q_proj.lora_A.weight", "[4,48]", "[r,64]"});
  expect({"adapter", "show", "p"}, 3, {"p"});
}

TEST_F(BadInput, ARollbackToAVersionThatIsNotThere) {
  const std::string folder = write_adapter("peft-rolled", 64);
  for (int version = 1; version <= 3; ++version)
    expect({"adapter", "import", "rolled", folder, "--model", "tiny"}, 0, {});
  expect({"adapter", "alias", "stable", "rolled@3"}, 0, {});
  expect({"adapter", "rollback", "stable", "--to", "9"}, 3, {"stable", "version 9"});
  const auto back = platform_->cli({"--json", "adapter", "rollback", "stable", "--to", "1"});
  ASSERT_EQ(back.code, 0) << back.err;
  EXPECT_EQ(Json::parse(back.out)["version"], 1);
}

TEST_F(BadInput, AMergeIntoABaseThatChangedSinceItWasAdded) {
  add_copy("swapped");
  expect({"adapter", "import", "s", write_adapter("peft-s", 64), "--model", "swapped"}, 0, {});
  expect({"adapter", "merge", "s", file("merged")}, 0, {});
  for (const char* verb : {"merge", "export"})
    expect({"adapter", verb, "s", file("merged")}, 4, {"merged", "not an empty folder"});
  std::fstream(file("swapped/model.safetensors"), std::ios::in | std::ios::out | std::ios::binary)
      .seekp(-4, std::ios::end)
      .write("\1\2\3\4", 4);
  expect({"adapter", "merge", "s", file("merged-again")}, 1, {"swapped", "was added with"});
  EXPECT_FALSE(fs::exists(file("merged-again")));
}

TEST_F(BadInput, NamesAndSettings) {
  expect({"model", "add", "a@b", file("model")}, 2, {"@"});
  expect({"--config", write("bad.yaml", "treads: 2\n"), "status"}, 2,
         {"bad.yaml:1", "treads", "threads"});
  expect({"--config", file("absent.yaml"), "status"}, 3, {"absent.yaml"});
}

TEST_F(BadInput, ASecondCoordinatorOnTheRegistry) {
  const std::string command = std::string(TANDEM_BIN_DIR) + "/tandem-coordinator --data-dir " +
                              platform_->data_dir() + " 2>" + file("second.err") + " >/dev/null";
  const int status = std::system(command.c_str());
  EXPECT_EQ(WEXITSTATUS(status), 4);
  std::ifstream in(file("second.err"));
  const std::string text((std::istreambuf_iterator<char>(in)), {});
  EXPECT_NE(text.find(std::to_string(platform_->coordinator())), std::string::npos) << text;
}

TEST(Unreachable, ACommandWithoutACoordinatorSaysHowToStartOne) {
  Platform platform;  // nothing started
  const auto output = platform.cli({"status"});
  EXPECT_EQ(output.code, 5) << output.err;
  EXPECT_NE(output.err.find("tandem up"), std::string::npos) << output.err;
  const auto json = platform.cli({"--json", "status"});
  EXPECT_EQ(json.code, 5);
  EXPECT_EQ(Json::parse(json.out)["error"]["code"], "unavailable") << json.out;
}

}  // namespace
}  // namespace tandem::test
