#include "coordinator/resolve.h"
#include "tests/coordinator/core_harness.h"

#include <gtest/gtest.h>

namespace tandem::coordinator {
namespace {

nlohmann::json result(const protocol::CallReply& reply) {
  EXPECT_TRUE(reply.status.ok()) << reply.status.message();
  return nlohmann::json::parse(reply.result_json, nullptr, false);
}

TEST(Calls, UnknownMethodsAndParametersNameTheNearest) {
  CoreHarness h;
  const auto method = h.call("job.lst", nlohmann::json::object()).status;
  EXPECT_EQ(method.code(), StatusCode::kInvalid);
  EXPECT_NE(method.message().find("job.list"), std::string::npos);
  const auto parameter = h.call("job.list", {{"stat", "done"}}).status;
  EXPECT_EQ(parameter.code(), StatusCode::kInvalid);
  EXPECT_NE(parameter.message().find("\"state\""), std::string::npos);
  EXPECT_EQ(h.call("job.list", {{"limit", "ten"}}).status.code(), StatusCode::kInvalid);
  EXPECT_EQ(h.call("model.show", nlohmann::json::object()).status.code(), StatusCode::kInvalid);
  const auto state = h.call("job.list", {{"state", "finished"}}).status;
  EXPECT_EQ(state.code(), StatusCode::kInvalid);
  EXPECT_NE(state.message().find("done, failed"), std::string::npos) << state.message();
  EXPECT_TRUE(h.call("job.list", {{"state", "done"}}).status.ok());
}

TEST(Calls, StatusShowsTheCacheAsItsOwnCallDoes) {
  CoreHarness h;
  const auto result = [&](const std::string& method) {
    return nlohmann::json::parse(h.call(method, nlohmann::json::object()).result_json);
  };
  EXPECT_EQ(result("status")["cache"], result("cache.stats"));
}

TEST(Calls, WhatChangesSomethingNeedsAnIdempotencyKeyAndWhatReadsDoesNot) {
  CoreHarness h;
  h.add_data("rows");
  const auto ask = [&](const std::string& key, const std::string& method) {
    h.from_client("c", protocol::Call{"x", key, method, R"({"data":"rows"})"});
    return h.to_client<protocol::CallReply>("c").at(0).status;
  };
  const Status refused = ask("", "data.rm");
  EXPECT_EQ(refused.code(), StatusCode::kInvalid);
  EXPECT_NE(refused.message().find("data.rm changes something, so it needs an idempotency key"),
            std::string::npos)
      << refused.message();
  EXPECT_TRUE(ask("", "data.show").ok()) << "the refused call changed nothing";
  EXPECT_TRUE(ask("key", "data.rm").ok());
  EXPECT_TRUE(ask("key", "data.rm").ok()) << "a repeat is answered as the first was";
  EXPECT_EQ(ask("other", "data.rm").code(), StatusCode::kNotFound);
}

TEST(Calls, NothingIsAnsweredBeforeTheHelloAndAnotherMajorVersionIsRefusedWithTheRange) {
  CoreHarness h;
  h.from_client("stranger", protocol::Call{"1", "", "status", "{}"});
  EXPECT_TRUE(h.to_client<protocol::CallReply>("stranger").empty());
  h.from_client("old", protocol::ClientHello{{7, 0}, "old"});
  const auto hello = h.to_client<protocol::ServerHello>("old").at(0);
  EXPECT_EQ(hello.status.code(), StatusCode::kRefused);
  EXPECT_NE(hello.status.message().find("1.0"), std::string::npos) << hello.status.message();
}

TEST(Calls, DataWithAMissingChunkOrAWrongSizeIsRefused) {
  CoreHarness h;
  const Digest chunk = sha256("nobody sent this");
  Hasher root;
  root.update(std::as_bytes(std::span(chunk.bytes)));
  const std::string hex = root.finish().hex();
  const auto missing = h.call(
      "data.add", {{"digest", hex}, {"name", "d"}, {"bytes", 16}, {"chunks", {chunk.hex()}}}, "k");
  EXPECT_EQ(missing.status.code(), StatusCode::kNotFound);
  EXPECT_NE(missing.status.message().find(chunk.hex()), std::string::npos);
  const auto other = h.call(
      "data.add",
      {{"digest", sha256("x").hex()}, {"name", "d"}, {"bytes", 16}, {"chunks", {chunk.hex()}}},
      "l");
  EXPECT_EQ(other.status.code(), StatusCode::kInvalid);
  EXPECT_TRUE(h.tables().datasets.empty());
  const auto empty =
      h.call("data.add", {{"digest", hex}, {"bytes", 0}, {"chunks", nlohmann::json::array()}}, "m");
  EXPECT_EQ(empty.status.code(), StatusCode::kInvalid);
}

TEST(Calls, DataThatIsThereKeepsItsName) {
  CoreHarness h;
  h.add_data("alpha");
  const Dataset data = h.tables().datasets.begin()->second;
  const auto add = [&](const std::string& name) {
    return h.call("data.add",
                  {{"digest", data.root.hex()},
                   {"name", name},
                   {"bytes", data.bytes},
                   {"chunks", {data.chunks.at(0).hex()}}},
                  "key" + name);
  };
  const auto renamed = add("beta");
  EXPECT_EQ(renamed.status.code(), StatusCode::kConflict);
  EXPECT_NE(renamed.status.message().find("alpha"), std::string::npos) << renamed.status.message();
  EXPECT_EQ(result(add("alpha"))["name"], "alpha");
  EXPECT_EQ(result(add(""))["name"], "alpha");
  EXPECT_EQ(result(h.call("data.show", {{"data", "alpha"}}))["digest"], data.root.hex());
}

TEST(Calls, AModelThatSomethingNeedsIsNotRemoved) {
  CoreHarness h;
  const Digest base = h.add_model("base");
  const std::string text = h.manifest(ManifestKind::kAdapter, base, "w");
  ASSERT_TRUE(h.call("adapter.import", {{"name", "a"}, {"model", "base"}, {"manifest", text}}, "i")
                  .status.ok());
  EXPECT_EQ(h.call("model.rm", {{"model", "base"}}, "x").status.code(), StatusCode::kRefused);
  EXPECT_TRUE(h.call("model.rm", {{"model", "base"}, {"force", true}}, "y").status.ok());
  h.generate("r", "a", "q");
  EXPECT_EQ(h.to_client<protocol::GenerateChunk>("c").at(0).status.code(), StatusCode::kNotFound);
}

TEST(Calls, OneOfTheNamesOfABaseIsRemovedAtAnyTimeAndItsDigestNamesNone) {
  CoreHarness h;
  const Digest base = h.add_model("base");
  protocol::ModelRecord copy = h.tables().models.at("base");
  copy.name = "copy";
  h.add_model_record(copy);
  const std::string text = h.manifest(ManifestKind::kAdapter, base, "w");
  ASSERT_TRUE(h.call("adapter.import", {{"name", "a"}, {"model", "base"}, {"manifest", text}}, "i")
                  .status.ok());
  const Status both = h.call("model.rm", {{"model", base.hex()}}).status;
  EXPECT_EQ(both.code(), StatusCode::kInvalid);
  EXPECT_NE(both.message().find("base, copy"), std::string::npos) << both.message();
  EXPECT_TRUE(h.call("model.rm", {{"model", "base"}}).status.ok()) << "the adapter has copy still";
  EXPECT_EQ(h.call("model.rm", {{"model", "copy"}}).status.code(), StatusCode::kRefused);
}

TEST(Calls, AnAdapterIsRemovedByItsDigestUnlessThatHasSeveralNames) {
  CoreHarness h;
  const Digest base = h.add_model("base");
  const auto import = [&](const std::string& name) {
    const std::string text = h.manifest(ManifestKind::kAdapter, base, "w");
    EXPECT_TRUE(h.call("adapter.import", {{"name", name}, {"model", "base"}, {"manifest", text}})
                    .status.ok());
    return sha256(text).hex();
  };
  const std::string digest = import("a");
  EXPECT_EQ(h.call("adapter.rm", {{"adapter", digest}}).status.code(), StatusCode::kRefused)
      << "its own name points at it";
  import("b");
  const Status two = h.call("adapter.rm", {{"adapter", digest}}).status;
  EXPECT_EQ(two.code(), StatusCode::kInvalid);
  EXPECT_NE(two.message().find("a@1, b@1"), std::string::npos) << two.message();
  EXPECT_EQ(h.tables().adapters.size(), 2u);
}

TEST(Calls, AnAdapterWhoseBaseGoesWhileItIsVerifiedIsNotPublished) {
  CoreHarness h;
  const Digest base = h.add_model("base");
  const std::string text = h.manifest(ManifestKind::kAdapter, base, "w");
  h.hold_work = true;
  (void)h.call("adapter.import", {{"name", "a"}, {"model", "base"}, {"manifest", text}}, "i");
  ASSERT_TRUE(h.call("model.rm", {{"model", "base"}}).status.ok());
  h.release_work();
  const auto replies = h.to_client<protocol::CallReply>("c");
  ASSERT_EQ(replies.size(), 1u);
  EXPECT_EQ(replies[0].status.code(), StatusCode::kNotFound);
  EXPECT_TRUE(h.tables().adapters.empty());
}

/// Digests that begin with the same digits, as no two objects made on purpose do.
TEST(Names, DigitsThatSeveralDigestsBeginWithAreRefusedWithTheNames) {
  Tables tables;
  const auto digest = [](unsigned char last) {
    Digest d = sha256("prefix");
    d.bytes.back() = last;
    return d;
  };
  for (const unsigned char i : {1, 2}) {
    protocol::ModelRecord model;
    model.name = str("model-", int{i});
    model.digest = digest(i);
    tables.apply(model);
    AdapterVersionRecord adapter;
    adapter.name = str("adapter-", int{i});
    adapter.version = 3;
    adapter.digest = digest(i);
    tables.apply(adapter);
    Dataset data;
    data.name = str("data-", int{i});
    data.root = digest(i);
    tables.apply(data);
  }
  const std::string digits = digest(0).hex().substr(0, 12);
  const auto refused = [](const Status& status, const std::string& names) {
    EXPECT_EQ(status.code(), StatusCode::kInvalid) << status.message();
    for (const char* i : {"1", "2"}) {
      std::string name = names;
      name.replace(name.find('N'), 1, i);
      EXPECT_NE(status.message().find(name), std::string::npos) << status.message();
    }
  };
  refused(find_model(tables, digits).status(), "model-N");
  refused(find_adapter(tables, digits).status(), "adapter-N@3");
  refused(find_dataset(tables, digits).status(), "data-N");
  EXPECT_EQ(find_model(tables, digest(2).hex()).value()->name, "model-2") << "all digits name one";
  EXPECT_EQ(find_adapter(tables, digest(2).hex()).value()->name, "adapter-2");
  EXPECT_EQ(find_dataset(tables, digest(2).hex()).value()->name, "data-2");
}

TEST(Calls, AnAdapterThatDoesNotFitItsBaseIsNotPublished) {
  CoreHarness h;
  const Digest base = h.add_model("base");
  const auto import = [&](const std::string& manifest) {
    return h.call("adapter.import", {{"name", "a"}, {"model", "base"}, {"manifest", manifest}},
                  manifest.substr(manifest.size() / 2));
  };
  const std::string fits = h.manifest(ManifestKind::kAdapter, base, "w");
  std::string deep = fits;
  for (std::size_t at = 0; (at = deep.find("layers.0", at)) != std::string::npos;)
    deep.replace(at, 8, "layers.1");
  const auto other = import(deep);
  EXPECT_EQ(other.status.code(), StatusCode::kRefused);
  EXPECT_NE(other.status.message().find("layers.1.mlp.up_proj.lora_A"), std::string::npos)
      << other.status.message();
  EXPECT_TRUE(h.tables().adapters.empty());
  EXPECT_TRUE(import(fits).status.ok());
}

TEST(Calls, ModelsAndAdaptersShareOneNameSpaceAndVersionsAreNeverUsedTwice) {
  CoreHarness h;
  const Digest base = h.add_model("base");
  const auto import = [&](const std::string& name, const std::string& weights) {
    return h.call("adapter.import",
                  {{"name", name},
                   {"model", "base"},
                   {"manifest", h.manifest(ManifestKind::kAdapter, base, weights)}},
                  name + weights);
  };
  EXPECT_EQ(import("base", "w").status.code(), StatusCode::kConflict);
  EXPECT_EQ(result(import("a", "one"))["version"], 1);
  EXPECT_TRUE(h.call("adapter.rm", {{"adapter", "a"}}, "rm").status.ok());
  EXPECT_EQ(result(import("a", "two"))["version"], 2);
  EXPECT_EQ(h.call("adapter.alias", {{"alias", "base"}, {"target", "a"}}, "al").status.code(),
            StatusCode::kConflict);
  EXPECT_EQ(
      result(h.call("adapter.alias", {{"alias", "prod"}, {"target", "a@2"}}, "am"))["version"], 2);
  EXPECT_EQ(h.call("adapter.rm", {{"adapter", "a"}}, "rn").status.code(), StatusCode::kRefused);
  const std::string digest = h.tables().current_adapter("prod")->digest.hex();
  EXPECT_EQ(result(h.call("adapter.show", {{"adapter", digest.substr(0, 12)}}))["digest"], digest);
}

TEST(Names, AllowSlashesAndColonsAndReserveTheRest) {
  constexpr std::size_t kBytesMax = 128;
  for (const std::string good : {"a", "HuggingFaceTB/SmolLM2-135M", "team:support_v2", "a.b-c"})
    EXPECT_TRUE(check_name("a name", good, kBytesMax).ok()) << good;
  for (const std::string& bad :
       {std::string(), std::string("a@b"), std::string("-a"), std::string("a b"),
        std::string("a//b"), std::string("a/../b"), std::string("a/"), std::string("a\nb"),
        std::string("a\0b", 3), std::string("caf\xc3\xa9"), std::string("0123456789ab"),
        std::string("job-1"), std::string(kBytesMax + 1, 'a')})
    EXPECT_EQ(check_name("a name", bad, kBytesMax).code(), StatusCode::kInvalid) << bad;
}

TEST(Names, ADigestIsNamedByTwelveDigitsOrMore) {
  CoreHarness h;
  const Digest base = h.add_model("base");
  const std::string hex = base.hex();
  EXPECT_EQ(resolve(h.tables(), hex)->model.digest, base);
  EXPECT_EQ(resolve(h.tables(), hex.substr(0, 12))->model.digest, base);
  EXPECT_EQ(resolve(h.tables(), hex.substr(0, 11)).status().code(), StatusCode::kNotFound);
  EXPECT_EQ(resolve(h.tables(), std::string(12, '0')).status().code(), StatusCode::kNotFound);
  const auto unknown = resolve(h.tables(), "bas").status();
  EXPECT_NE(unknown.message().find("did you mean base?"), std::string::npos) << unknown.message();
  EXPECT_EQ(resolve(h.tables(), "").status().code(), StatusCode::kInvalid);
}

TEST(Calls, ListsComeInPages) {
  CoreHarness h;
  const Digest base = h.add_model("base");
  for (int i = 0; i < 5; ++i)
    (void)h.call("adapter.import",
                 {{"name", str("a", i)},
                  {"model", "base"},
                  {"manifest", h.manifest(ManifestKind::kAdapter, base, str(i))}},
                 str("k", i));
  std::vector<std::string> names;
  std::string after;
  do {
    const auto page = result(h.call("adapter.list", {{"limit", 2}, {"after", after}}));
    EXPECT_LE(page["adapters"].size(), 2u);
    for (const auto& adapter : page["adapters"]) names.push_back(adapter["name"]);
    after = page["next"];
  } while (!after.empty());
  EXPECT_EQ(names, (std::vector<std::string>{"a0", "a1", "a2", "a3", "a4"}));
  ASSERT_TRUE(h.call("adapter.rm", {{"adapter", "a1"}}).status.ok());
  const auto rest = result(h.call("adapter.list", {{"limit", 2}, {"after", "a1"}}));
  ASSERT_EQ(rest["adapters"].size(), 2u) << "a name that is gone has its place";
  EXPECT_EQ(rest["adapters"][0]["name"], "a2");
}

TEST(Calls, APageOfJobsInAStateFollowsOneThatHasLeftIt) {
  CoreHarness h;
  h.add_model("base");
  h.add_data("rows");
  h.engine(0);
  std::vector<std::string> jobs;  // the first one runs, the others wait
  for (int i = 0; i < 4; ++i) jobs.push_back(h.submit({{"adapter", str("a", i)}}).value);
  const auto queued = [&](const std::string& after) {
    return h.call("job.list", {{"state", "queued"}, {"limit", 1}, {"after", after}});
  };
  EXPECT_EQ(result(queued(""))["next"], jobs[3]) << "newest first";
  ASSERT_TRUE(h.call("job.cancel", {{"job", jobs[3]}}).status.ok());
  EXPECT_EQ(result(queued(jobs[3]))["jobs"].at(0)["job"], jobs[2]);
  ASSERT_TRUE(h.call("job.rm", {{"job", jobs[3]}}).status.ok());
  EXPECT_EQ(queued(jobs[3]).status.code(), StatusCode::kConflict) << "its place is not known";
}

TEST(Calls, AFullDiskIsAClearErrorAndTheNextCallSucceeds) {
  CoreHarness h;
  h.add_model("base");
  h.fail_commits(1);
  const auto failed = h.call("worker.drain", {{"worker", "nobody"}}, "k");
  EXPECT_EQ(failed.status.code(), StatusCode::kNotFound);
  h.engine(0);
  (void)h.call("worker.drain", {{"worker", CoreHarness::worker(0).value}}, "l");
  EXPECT_FALSE(h.core().workers().draining(CoreHarness::worker(0)));
  EXPECT_TRUE(h.call("worker.drain", {{"worker", CoreHarness::worker(0).value}}, "m").status.ok());
  EXPECT_TRUE(h.core().workers().draining(CoreHarness::worker(0)));
  h.restart();
  EXPECT_TRUE(h.core().workers().draining(CoreHarness::worker(0))) << "drains outlive restarts";
}

TEST(Calls, KeysAndTheCoordinatorsEndAreForAdministrators) {
  CoreHarness h;
  h.client("c", "alice");
  for (const char* method : {"key.create", "key.revoke", "shutdown"}) {
    h.step_as("c", "alice", false, protocol::Call{"1", "key", method, R"({"name": "x"})"});
    const auto replies = h.to_client<protocol::CallReply>("c");
    ASSERT_EQ(replies.size(), 1u) << method;
    EXPECT_EQ(replies[0].status.code(), StatusCode::kRefused) << method;
    EXPECT_NE(replies[0].status.message().find("admin"), std::string::npos);
  }
  h.step_as("c", "alice", false, protocol::Call{"1", "", "key.list", "{}"});
  h.step_as("c", "alice", true, protocol::Call{"2", "key", "key.revoke", R"({"name": "x"})"});
  // Whoever may is told what is wrong else: this coordinator has no keys.
  const auto replies = h.to_client<protocol::CallReply>("c");
  ASSERT_EQ(replies.size(), 2u);
  for (const auto& reply : replies)
    EXPECT_EQ(reply.status.message().find("admin"), std::string::npos) << reply.status.message();
}

TEST(Workers, AReplacedIncarnationIsToldToEnd) {
  CoreHarness h;
  h.engine(0, 5);
  h.engine(0, 6);
  h.to_engine<protocol::WorkerHelloReply>(0);
  h.engine(0, 5);  // its hello was late
  EXPECT_EQ(h.to_engine<protocol::WorkerHelloReply>(0).back().status.code(), StatusCode::kConflict);
  EXPECT_EQ(h.core().workers().find(CoreHarness::worker(0))->engine.incarnation, 6u);
}

TEST(Workers, ARestartIsRepeatedUntilAnotherEngineIsHere) {
  CoreHarness h;
  const auto ask = [&] {
    return h.call("worker.restart", {{"worker", CoreHarness::worker(0).value}}).status.code();
  };
  h.engine(0, 5);
  EXPECT_EQ(ask(), StatusCode::kUnavailable) << "no agent is there to do it";
  h.agent(0);
  EXPECT_EQ(ask(), StatusCode::kOk);
  const std::vector<protocol::AgentCommand> once{{protocol::AgentAction::kRestartEngine, 5}};
  EXPECT_EQ(h.to_agent<protocol::AgentCommand>(0), once) << "it names the engine";
  h.advance(1100);  // the command was lost
  EXPECT_EQ(h.to_agent<protocol::AgentCommand>(0), once);
  h.from_engine(0, protocol::WorkerBye{CoreHarness::worker(0), protocol::WorkerRole::kEngine, 5});
  h.advance(1100);  // nor is another here yet, which the agent may have started
  EXPECT_EQ(h.to_agent<protocol::AgentCommand>(0), once);
  h.engine(0, 6);
  h.advance(3000);
  EXPECT_TRUE(h.to_agent<protocol::AgentCommand>(0).empty());
}

TEST(Workers, AnEngineThatHangsIsEndedByItsAgentAndTheNextHasAsLong) {
  CoreHarness h;
  h.engine(0, 5);
  h.agent(0);
  const auto told = [&](TimeMs ms, bool engine) {
    for (TimeMs t = 0; t < ms; t += 1000) {
      h.advance(1000);
      h.agent(0);
      if (engine) h.beat(0);
    }
    return h.to_agent<protocol::AgentCommand>(0).size();
  };
  EXPECT_EQ(told(120'000, true), 0u) << "it is well";
  EXPECT_EQ(told(120'000, false), 0u) << "its lease runs out first";
  const auto error = [&] {
    return result(h.call("worker.list", nlohmann::json::object()))["workers"][0]["error"]
        .get<std::string>();
  };
  EXPECT_TRUE(error().starts_with("no sign of its engine for 1")) << error();
  EXPECT_EQ(told(10'000, false), 1u);
  EXPECT_EQ(told(110'000, false), 0u) << "the next one may still start";
  EXPECT_TRUE(error().starts_with("no sign of its engine for 2")) << error();
  h.engine(0, 6);
  EXPECT_EQ(told(120'000, true), 0u);
  EXPECT_EQ(error(), "");
  h.restart();  // it knows no engine then
  h.agent(0);
  EXPECT_EQ(told(122'000, false), 1u);
}

TEST(Workers, AnEngineWithoutABaseGetsOneAndAFailedLoadIsRepeatedLaterAndShown) {
  CoreHarness h;
  h.engine(0);
  EXPECT_TRUE(h.to_engine<protocol::LoadModel>(0).empty());
  const Digest base = h.add_model("base");
  protocol::WorkerHello hello;
  hello.role = protocol::WorkerRole::kEngine;
  hello.worker = CoreHarness::worker(0);
  hello.incarnation = 9;
  hello.credits = 1;
  h.from_engine(0, hello);
  ASSERT_EQ(h.to_engine<protocol::LoadModel>(0).size(), 1u);
  h.from_engine(0, protocol::ModelLoaded{base, unavailable_error("no room yet"), 0});
  h.advance(1000);
  EXPECT_TRUE(h.to_engine<protocol::LoadModel>(0).empty()) << "repeated without a pause";
  EXPECT_EQ(result(h.call("worker.list", nlohmann::json::object()))["workers"][0]["error"],
            "no room yet");
  h.advance(2000);
  EXPECT_EQ(h.to_engine<protocol::LoadModel>(0).size(), 1u);
  h.from_engine(0, protocol::ModelLoaded{base, {}, 1});
  EXPECT_EQ(h.core().workers().find(CoreHarness::worker(0))->engine.model, base);
}

TEST(Workers, AJobsBaseIsLoadedWhereTheJobCanStart) {
  CoreHarness h;
  h.add_model("another");
  const Digest base = h.add_model("base");
  h.add_data("rows");
  for (const int slot : {0, 1, 2}) h.engine(slot);  // all hold the other one
  ASSERT_EQ(h.call("worker.drain", {{"worker", CoreHarness::worker(0).value}}).status.code(),
            StatusCode::kOk);
  for (const int slot : {1, 2}) {
    const JobId id = h.submit();
    h.advance(100);
    const auto loads = h.to_engine<protocol::LoadModel>(slot);
    ASSERT_EQ(loads.size(), 1u) << "the engines before drain or train";
    EXPECT_EQ(loads[0].model.digest, base);
    EXPECT_TRUE(h.to_engine<protocol::LoadModel>(0).empty());
    EXPECT_TRUE(h.to_engine<protocol::LoadModel>(2).empty()) << "one is enough";
    h.from_engine(slot, protocol::ModelLoaded{base, {}, 1});
    h.advance(100);
    const auto starts = h.to_engine<protocol::StartJob>(slot);
    ASSERT_EQ(starts.size(), 1u);
    h.beat(slot, {{id, starts[0].epoch, 0}});
  }
}

TEST(Workers, TheOnlyEngineWithABaseKeepsItWhileOthersAreFree) {
  CoreHarness h;
  h.add_model("another");
  const Digest rare = h.add_model("rare"), base = h.add_model("base");
  h.add_data("rows");
  for (const int slot : {0, 1, 2}) h.engine(slot);
  h.from_engine(0, protocol::ModelLoaded{rare, {}, 1});
  h.submit();
  h.advance(100);
  EXPECT_TRUE(h.to_engine<protocol::LoadModel>(0).empty());
  const auto loads = h.to_engine<protocol::LoadModel>(1);
  ASSERT_EQ(loads.size(), 1u);
  EXPECT_EQ(loads[0].model.digest, base);
}

TEST(Workers, ABaseThatCannotBeLoadedHoldsUpNoOther) {
  CoreHarness h;
  const Digest held = h.add_model("a"), bad = h.add_model("bad"), other = h.add_model("other");
  h.client("c");
  h.engine(0);
  const auto loads = [&] {
    h.advance(50);
    std::vector<Digest> digests;
    for (const auto& load : h.to_engine<protocol::LoadModel>(0))
      digests.push_back(load.model.digest);
    return digests;
  };
  const auto engine_model = [&] {
    return h.core().workers().find(CoreHarness::worker(0))->engine.model;
  };
  ASSERT_EQ(engine_model(), held);
  h.generate("1", "bad", "x");
  EXPECT_EQ(loads(), std::vector<Digest>{bad});
  h.from_engine(0, protocol::ModelLoaded{bad, invalid_error("an odd head"), 0});
  EXPECT_EQ(engine_model(), held) << "what it holds it keeps";
  h.advance(100);
  const auto refused = h.to_client<protocol::GenerateChunk>("c");
  ASSERT_EQ(refused.size(), 1u);
  EXPECT_NE(refused[0].status.message().find("an odd head"), std::string::npos);
  h.generate("2", "other", "x");  // within the bad one's pause
  EXPECT_EQ(loads(), std::vector<Digest>{other});
  h.from_engine(0, protocol::ModelLoaded{held, unavailable_error("it made room"), 0});
  EXPECT_EQ(engine_model(), Digest());
  h.from_engine(0, protocol::ModelLoaded{other, {}, 1});
  EXPECT_EQ(engine_model(), other);
  h.advance(50);
  h.answer(0, "2", 0, 1, true);
  h.advance(2'500);
  h.generate("3", "bad", "x");  // its files may have been repaired by now
  EXPECT_EQ(loads(), std::vector<Digest>{bad});
}

TEST(Calls, ParametersThatNestTooDeepAreRefusedAndHarmNobody) {
  CoreHarness h;
  h.client("c");
  const std::string deep = R"({"spec":)" + std::string(400'000, '[') + std::string(400'000, ']');
  h.from_client("c", protocol::Call{"d", "k", "job.submit", deep + "}"});
  const auto replies = h.to_client<protocol::CallReply>("c");
  ASSERT_FALSE(replies.empty());
  EXPECT_EQ(replies.back().status.code(), StatusCode::kInvalid);
  EXPECT_NE(replies.back().status.message().find("64 levels"), std::string::npos);
}

}  // namespace
}  // namespace tandem::coordinator
