#include "coordinator/prefix_table.h"
#include "coordinator/result_cache.h"
#include "protocol/codec.h"
#include "tests/coordinator/core_harness.h"

#include <gtest/gtest.h>

namespace tandem::coordinator {
namespace {

using protocol::FinishReason;
using protocol::GenerateChunk;
using protocol::Infer;
using protocol::InferCancel;

struct RequestsTest : testing::Test {
  explicit RequestsTest(Limits limits = {}) : h(limits) {
    base = h.add_model("base");
    h.engine(0);
  }
  /// Tokens of all chunks, checked to be without gap or repeat from `next`.
  static std::vector<std::int32_t> tokens(const std::vector<GenerateChunk>& chunks,
                                          std::int64_t next = 0) {
    std::vector<std::int32_t> all;
    for (const GenerateChunk& chunk : chunks) {
      EXPECT_EQ(chunk.index, next + static_cast<std::int64_t>(all.size()));
      all.insert(all.end(), chunk.tokens.begin(), chunk.tokens.end());
    }
    return all;
  }
  Digest publish(const std::string& name, const std::string& weights) {
    const std::string text = h.manifest(ManifestKind::kAdapter, base, weights);
    const auto reply =
        h.call("adapter.import", {{"name", name}, {"model", "base"}, {"manifest", text}}, weights);
    EXPECT_TRUE(reply.status.ok()) << reply.status.message();
    return sha256(text);
  }
  CoreHarness h;
  Digest base;
};

TEST_F(RequestsTest, AnEnginesDeathMovesTheRequestAndTheClientSeesEachTokenOnce) {
  h.generate("r", "base", "hello");
  h.answer(0, "r", 0, 2, false);
  h.engine(1);
  h.engine(0);  // a new process: the old one died
  h.advance(100);
  auto moved = h.to_engine<Infer>(1);
  const int slot = moved.empty() ? 0 : 1;
  if (moved.empty()) moved = h.to_engine<Infer>(0);
  EXPECT_EQ(moved.back().request.next_index, 2);
  h.answer(slot, "r", 2, 2, true);
  const auto chunks = h.to_client<GenerateChunk>("c");
  EXPECT_EQ(tokens(chunks).size(), 4u);
  EXPECT_EQ(chunks.back().finish, FinishReason::kStop);
}

TEST_F(RequestsTest, WhatOneEngineRefusesIsAskedOfTheOthersAndRefusedWhenAllDo) {
  h.engine(1);
  /// The slot that was asked; it refuses.
  const auto refuse = [&] {
    for (int slot = 0; slot < 2; ++slot)
      for (const Infer& asked : h.to_engine<Infer>(slot)) {
        protocol::InferChunk no;
        no.attempt = asked.attempt;
        no.chunk.id = asked.request.id;
        no.chunk.finish = FinishReason::kError;
        no.chunk.status = refused_error(str("engine ", slot, " holds 10 tokens"));
        h.from_engine(slot, no);
        return slot;
      }
    return -1;
  };
  h.generate("r", "base", "long");
  const int first = refuse();
  h.advance(100);
  const int second = 1 - first;
  h.answer(second, "r", 0, 2, true);
  (void)h.to_engine<Infer>(second);
  EXPECT_EQ(tokens(h.to_client<GenerateChunk>("c")).size(), 2u);

  h.generate("s", "base", "longer");
  EXPECT_GE(refuse(), 0);
  h.advance(100);
  EXPECT_GE(refuse(), 0);
  h.advance(100);
  const auto chunks = h.to_client<GenerateChunk>("c");
  ASSERT_EQ(chunks.size(), 1u);
  EXPECT_EQ(chunks[0].status.code(), StatusCode::kRefused);
  EXPECT_EQ(refuse(), -1) << "nobody is asked twice";
}

TEST_F(RequestsTest, WhatAnEngineIsTooBusyForGoesToAnotherThoughItsPrefixIsThere) {
  h.engine(1);
  const auto ask = [&](const std::string& id) {
    protocol::Generate request;
    request.id = RequestId(id);
    request.model = "base";
    request.input.messages = {{"user", "hello"}};
    request.no_cache = true;
    h.from_client("c", request);
    for (int slot = 0; slot < 2; ++slot)
      for (const Infer& asked : h.to_engine<Infer>(slot)) return std::pair(slot, asked.attempt);
    return std::pair(-1, 0u);
  };
  const int first = ask("r").first;
  ASSERT_GE(first, 0);
  h.answer(first, "r", 0, 2, true);
  const auto [again, attempt] = ask("s");
  ASSERT_EQ(again, first) << "its prefix is there";
  protocol::InferChunk busy;
  busy.attempt = attempt;
  busy.chunk.id = RequestId("s");
  busy.chunk.finish = FinishReason::kError;
  busy.chunk.status = busy_error("adapters in use take all there is");
  h.from_engine(first, busy);
  h.advance(100);
  EXPECT_TRUE(h.to_engine<Infer>(first).empty());
  EXPECT_EQ(h.to_engine<Infer>(1 - first).size(), 1u);
}

TEST_F(RequestsTest, ChunksOfAnOlderAttemptAreDropped) {
  h.generate("r", "base", "hello");
  const auto first = h.to_engine<Infer>(0).at(0);
  h.engine(0);
  h.advance(100);
  protocol::InferChunk stale;
  stale.attempt = first.attempt;
  stale.chunk.id = RequestId("r");
  stale.chunk.tokens = {1, 2, 3};
  h.from_engine(0, stale);
  EXPECT_TRUE(h.to_client<GenerateChunk>("c").empty());
}

TEST_F(RequestsTest, EqualDeterministicRequestsInFlightShareOneExecution) {
  h.client("d");
  h.generate("r1", "base", "same");
  h.answer(0, "r1", 0, 1, false);
  h.generate("r2", "base", "same", "d");
  EXPECT_EQ(h.to_engine<Infer>(0).size(), 1u);
  h.answer(0, "r1", 1, 1, true);
  EXPECT_EQ(tokens(h.to_client<GenerateChunk>("c")), tokens(h.to_client<GenerateChunk>("d")));
}

TEST_F(RequestsTest, TheOtherSharersKeepTheirAnswerWhenTheFirstOneCancels) {
  h.client("d");
  h.generate("r1", "base", "same");
  h.generate("r2", "base", "same", "d");
  h.from_client("c", protocol::Cancel{RequestId("r1")});
  EXPECT_EQ(h.to_client<GenerateChunk>("c").back().finish, FinishReason::kCancelled);
  EXPECT_TRUE(h.to_engine<InferCancel>(0).empty());
  h.answer(0, "r1", 0, 2, true);
  EXPECT_EQ(tokens(h.to_client<GenerateChunk>("d")).size(), 2u);
}

TEST_F(RequestsTest, ACachedAnswerIsTheSameFlaggedAndOutlivesARestart) {
  h.generate("r1", "base", "again");
  h.answer(0, "r1", 0, 3, true);
  const auto first = h.to_client<GenerateChunk>("c");
  h.generate("r2", "base", "again");
  const auto second = h.to_client<GenerateChunk>("c");
  ASSERT_EQ(second.size(), 1u);
  EXPECT_TRUE(second[0].cached);
  EXPECT_EQ(second[0].tokens, tokens(first));
  h.advance(200);
  h.restart();
  h.generate("r3", "base", "again");
  EXPECT_TRUE(h.to_client<GenerateChunk>("c").at(0).cached);
}

TEST_F(RequestsTest, WhereAnEnginesRoomEndsAnOpenEndedAnswerItIsNotKeptForOthers) {
  const auto ask = [&](const std::string& id, std::optional<std::int64_t> max_tokens) {
    protocol::Generate request;
    request.id = RequestId(id);
    request.model = "base";
    request.input.prompt = "q";
    request.sampling.temperature = 0.0f;
    request.sampling.max_tokens = max_tokens;
    h.from_client("c", request);
    return h.to_engine<Infer>(0);
  };
  const auto cut = [&](const Infer& asked) {
    protocol::InferChunk message;
    message.attempt = asked.attempt;
    message.chunk.id = asked.request.id;
    message.chunk.tokens = {1, 2};
    message.chunk.finish = FinishReason::kLength;
    h.from_engine(0, message);
  };
  cut(ask("r1", {}).at(0));
  EXPECT_EQ(ask("r2", {}).size(), 1u);
  cut(ask("r3", 2).at(0));
  EXPECT_TRUE(ask("r4", 2).empty()) << "as long as was asked for";
  h.answer(0, "r2", 0, 2, true);
  EXPECT_TRUE(ask("r5", {}).empty()) << "it ended by itself";
}

TEST_F(RequestsTest, ANewVersionUnderAnAliasIsNeverAnsweredFromTheOld) {
  publish("tuned", "one");
  h.generate("r1", "tuned", "q");
  h.answer(0, "r1", 0, 2, true);
  h.to_client<GenerateChunk>("c");
  const Digest two = publish("tuned", "two");
  h.to_engine<Infer>(0);
  h.generate("r2", "tuned", "q");
  EXPECT_TRUE(h.to_client<GenerateChunk>("c").empty());
  EXPECT_EQ(h.to_engine<Infer>(0).at(0).adapter, two);
}

TEST_F(RequestsTest, ARequestInFlightKeepsTheVersionItBeganWith) {
  const Digest one = publish("tuned", "one");
  h.generate("r", "tuned", "q");
  h.answer(0, "r", 0, 1, false);
  publish("tuned", "two");
  h.engine(0);
  h.advance(100);
  EXPECT_EQ(h.to_engine<Infer>(0).back().adapter, one);
}

TEST_F(RequestsTest, OtherTenantsSamplingAndNoCacheAreNotAnsweredFromTheCache) {
  h.generate("r1", "base", "q");
  h.answer(0, "r1", 0, 1, true);
  h.to_engine<Infer>(0);
  h.client("d", "another-user");
  h.generate("r2", "base", "q", "d");
  EXPECT_EQ(h.to_engine<Infer>(0).size(), 1u);
  protocol::Generate request;
  request.id = RequestId("r3");
  request.model = "base";
  request.input.prompt = "q";
  request.sampling.temperature = 0.0f;
  request.no_cache = true;
  h.from_client("c", request);
  EXPECT_EQ(h.to_engine<Infer>(0).size(), 1u);
  request.no_cache = false;
  request.id = RequestId("r4");
  request.sampling.max_tokens = 5;
  const Digest key = result_key(base, {}, "", request);
  request.sampling.max_tokens = 6;
  EXPECT_NE(result_key(base, {}, "", request), key);
  request.sampling.temperature = 0.7f;
  EXPECT_FALSE(is_deterministic(request));
  request.sampling.seed = 1;
  EXPECT_TRUE(is_deterministic(request));
}

TEST_F(RequestsTest, AnotherUsersRequestIsNeitherTakenOverNorCancelled) {
  h.client("d", "another-user");
  h.generate("r", "base", "q");
  h.generate("r", "base", "q", "d");
  const auto refused = h.to_client<GenerateChunk>("d");
  ASSERT_EQ(refused.size(), 1u);
  EXPECT_EQ(refused[0].status.code(), StatusCode::kConflict);
  h.from_client("d", protocol::Cancel{RequestId("r")});
  h.answer(0, "r", 0, 2, true);
  EXPECT_EQ(tokens(h.to_client<GenerateChunk>("c")).size(), 2u);
}

/// A greedy request of "base" that asks for its prompt's scores.
protocol::Generate scored_request(const std::string& id) {
  protocol::Generate request;
  request.id = RequestId(id);
  request.model = "base";
  request.input.prompt = "q";
  request.sampling.temperature = 0.0f;
  request.sampling.prompt_logprobs_from = 1;
  return request;
}

TEST_F(RequestsTest, AWholeAnswerThatNoMessageHoldsComesInAFew) {
  protocol::Generate request = scored_request("r");
  request.stream = false;
  h.from_client("c", request);
  const auto infer = h.to_engine<Infer>(0).back();
  constexpr int kParts = 24;
  constexpr std::size_t kTop = 5000;
  for (int i = 0; i < kParts; ++i) {
    protocol::InferChunk part;
    part.attempt = infer.attempt;
    part.chunk.id = request.id;
    part.chunk.index = i;
    part.chunk.tokens = {i};
    part.chunk.text = "x";
    part.chunk.logprobs = {{i, -1.0f, {kTop, {i, -2.0f}}}};
    if (i == 0) part.chunk.prompt_logprobs = {-3.0f, -4.0f};
    if (i + 1 == kParts) part.chunk.finish = FinishReason::kLength;
    h.from_engine(0, part);
  }
  const auto parts = h.to_client<GenerateChunk>("c");
  EXPECT_EQ(parts.size(), 2u);
  std::size_t logprobs = 0;
  for (const GenerateChunk& part : parts) {
    EXPECT_LE(protocol::encode(protocol::ServerMessage{part}).size(), 1u << 20);
    logprobs += part.logprobs.size();
  }
  EXPECT_EQ(logprobs, static_cast<std::size_t>(kParts));
  EXPECT_EQ(tokens(parts).size(), static_cast<std::size_t>(kParts));
  EXPECT_EQ(parts.front().prompt_logprobs.size(), 2u);
  EXPECT_EQ(parts.front().finish, FinishReason::kNone);
  EXPECT_EQ(parts.back().finish, FinishReason::kLength);
}

TEST_F(RequestsTest, ACachedAnswerHasTheScoresOfItsPrompt) {
  protocol::Generate request = scored_request("r1");
  h.from_client("c", request);
  protocol::InferChunk part;
  part.attempt = h.to_engine<Infer>(0).back().attempt;
  part.chunk.id = request.id;
  part.chunk.tokens = {1};
  part.chunk.prompt_logprobs = {-3.0f, -4.0f};
  h.from_engine(0, part);
  part.chunk.index = 1;
  part.chunk.prompt_logprobs.clear();
  part.chunk.finish = FinishReason::kStop;
  h.from_engine(0, part);
  h.to_client<GenerateChunk>("c");
  request.id = RequestId("r2");
  h.from_client("c", request);
  const auto cached = h.to_client<GenerateChunk>("c");
  ASSERT_EQ(cached.size(), 1u);
  EXPECT_TRUE(cached[0].cached);
  EXPECT_EQ(cached[0].prompt_logprobs, (std::vector<float>{-3.0f, -4.0f}));
}

TEST_F(RequestsTest, ASilentClientThatWaitsIsLookedForAndAnotherIsLeftAlone) {
  h.client("d");
  h.generate("r", "base", "q");
  for (int s = 0; s < 4; ++s) {
    h.beat(0);
    h.advance(1000);
  }
  EXPECT_TRUE(h.to_client<protocol::Pong>("c").empty());
  for (int s = 0; s < 4; ++s) {
    h.from_client("d", protocol::Ping{7});
    h.beat(0);
    h.advance(1000);
  }
  EXPECT_EQ(h.to_client<protocol::Pong>("c").size(), 1u);
  for (const protocol::Pong& pong : h.to_client<protocol::Pong>("d")) EXPECT_EQ(pong.nonce, 7u);
  h.client_gone("c");
  h.beat(0);
  h.advance(4000);
  EXPECT_EQ(h.to_engine<InferCancel>(0).size(), 1u);
}

struct SmallQueue : RequestsTest {
  static Limits limits() {
    Limits limits;
    limits.queue_max = 3;
    return limits;
  }
  SmallQueue() : RequestsTest(limits()) {}
};

TEST_F(SmallQueue, AFullQueueAnswersBusyWithATimeAndAnEngineNeverGetsMoreThanItsCredits) {
  for (int i = 0; i < 6; ++i) h.generate(str("r", i), "base", str("prompt ", i));
  EXPECT_EQ(h.to_engine<Infer>(0).size(), 2u);
  const auto refused = h.to_client<GenerateChunk>("c");
  ASSERT_EQ(refused.size(), 1u);
  EXPECT_EQ(refused[0].status.code(), StatusCode::kBusy);
  EXPECT_GT(refused[0].retry_after_ms, 0);
  h.answer(0, "r0", 0, 1, true);
  EXPECT_EQ(h.to_engine<Infer>(0).at(0).request.id, RequestId("r2"));
}

struct SmallShare : RequestsTest {
  static Limits limits() {
    Limits limits;
    limits.queue_per_user_max = 2;
    return limits;
  }
  SmallShare() : RequestsTest(limits()) {}
};

TEST_F(SmallShare, AUserWhoFillsItsShareOfTheQueueKeepsNobodyElseOut) {
  h.client("a", "anna");
  h.client("b", "bert");
  for (int i = 0; i < 6; ++i) h.generate(str("a", i), "base", str("prompt ", i), "a");
  EXPECT_EQ(h.to_engine<Infer>(0).size(), 2u);
  const auto refused = h.to_client<GenerateChunk>("a");
  ASSERT_EQ(refused.size(), 2u);  // two run, two wait
  EXPECT_EQ(refused[0].status.code(), StatusCode::kBusy);
  EXPECT_GT(refused[0].retry_after_ms, 0);
  h.generate("b0", "base", "hello", "b");
  EXPECT_TRUE(h.to_client<GenerateChunk>("b").empty());
}

TEST_F(RequestsTest, ADeadlineEndsTheRequestAndFreesTheEngine) {
  protocol::Generate request;
  request.id = RequestId("r");
  request.model = "base";
  request.input.prompt = "slow";
  request.deadline_ms = 500;
  h.from_client("c", request);
  h.advance(600);
  EXPECT_EQ(h.to_client<GenerateChunk>("c").at(0).status.code(), StatusCode::kTimeout);
  EXPECT_EQ(h.to_engine<InferCancel>(0).at(0).id, RequestId("r"));
}

TEST_F(RequestsTest, WithoutAnEngineTheRequestWaitsAWhileAndThenSaysWhy) {
  h.advance(6000);  // the engine's lease runs out
  h.generate("r", "base", "q");
  h.advance(10'000);
  EXPECT_TRUE(h.to_client<GenerateChunk>("c").empty());
  h.advance(25'000);
  const auto end = h.to_client<GenerateChunk>("c");
  ASSERT_EQ(end.size(), 1u);
  EXPECT_EQ(end[0].status.code(), StatusCode::kUnavailable);
  EXPECT_NE(end[0].status.message().find("no engine"), std::string::npos);
}

TEST_F(RequestsTest, AnUnknownNameGetsTheNearestAndBadSamplingItsRange) {
  h.generate("r", "bass", "q");
  const auto unknown = h.to_client<GenerateChunk>("c").at(0).status;
  EXPECT_EQ(unknown.code(), StatusCode::kNotFound);
  EXPECT_NE(unknown.message().find("did you mean base"), std::string::npos) << unknown.message();
  protocol::Generate request;
  request.id = RequestId("r");
  request.model = "base";
  request.input.prompt = "q";
  request.sampling.top_p = 1.5f;
  h.from_client("c", request);
  EXPECT_EQ(h.to_client<GenerateChunk>("c").at(0).status.code(), StatusCode::kInvalid);
  request.sampling.top_p.reset();
  const auto named = [&](const std::string& what, auto&& set) {
    protocol::Generate bad = request;
    set(bad.sampling);
    h.from_client("c", bad);
    const Status status = h.to_client<GenerateChunk>("c").at(0).status;
    EXPECT_EQ(status.code(), StatusCode::kInvalid) << what;
    EXPECT_NE(status.message().find(what), std::string::npos) << status.message();
  };
  named("logprobs", [](auto& s) { s.logprobs = -2; });
  named("prompt_logprobs_from", [](auto& s) { s.prompt_logprobs_from = -2; });
  named("16 strings", [](auto& s) { s.stop.assign(17, "x"); });
  request.input.tokens = {1};
  h.from_client("c", request);
  EXPECT_EQ(h.to_client<GenerateChunk>("c").at(0).status.code(), StatusCode::kInvalid);
}

TEST_F(RequestsTest, PrefersTheEngineThatHasTheAdapterThenThePrefixThenTheLeastLoad) {
  const Digest adapter = publish("tuned", "one");
  h.engine(1);
  h.beat(0);
  h.beat(1, {}, 1, {adapter});
  h.generate("r1", "tuned", "q");
  EXPECT_EQ(h.to_engine<Infer>(1).size(), 1u);
  protocol::Generate chat;
  chat.id = RequestId("r2");
  chat.model = "base";
  chat.input.messages = {{"user", "a long story"}};
  h.from_client("c", chat);
  EXPECT_EQ(h.to_engine<Infer>(0).size(), 1u) << "engine 1 has a request already";
  h.answer(0, "r2", 0, 1, true);
  h.answer(1, "r1", 0, 1, true);
  chat.id = RequestId("r3");
  h.from_client("c", chat);
  EXPECT_EQ(h.to_engine<Infer>(0).size(), 1u) << "the prefix is on engine 0";
}

TEST_F(RequestsTest, AClientThatAsksAgainOnAnotherConnectionGetsTheRest) {
  h.generate("r", "base", "q");
  h.answer(0, "r", 0, 2, false);
  h.to_client<GenerateChunk>("c");
  h.client("c2");
  protocol::Generate again;
  again.id = RequestId("r");
  again.model = "base";
  again.input.prompt = "q";
  again.sampling.temperature = 0.0f;
  again.next_index = 2;
  h.from_client("c2", again);
  h.answer(0, "r", 2, 1, true);
  EXPECT_EQ(tokens(h.to_client<GenerateChunk>("c2"), 2).size(), 1u);
  h.from_client("c2", again);  // the end was lost on its way
  const auto repeat = h.to_client<GenerateChunk>("c2");
  ASSERT_EQ(repeat.size(), 1u);
  EXPECT_EQ(repeat[0].finish, FinishReason::kStop);
  EXPECT_EQ(repeat[0].index, 2);
}

TEST_F(RequestsTest, AnEngineThatForgotTheRequestLosesIt) {
  h.generate("r", "base", "q");
  h.to_engine<Infer>(0);
  for (int i = 0; i < 8; ++i) {
    h.beat(0, {}, 0);
    h.advance(1000);
  }
  EXPECT_FALSE(h.to_engine<Infer>(0).empty());
}

TEST(PrefixTable, DepthCountsOnlyAnUnbrokenBeginningAndSplitsAreNotConfused) {
  protocol::PromptInput one, two, three;
  one.messages = {{"user", "a"}, {"assistant", "b"}, {"user", "c"}};
  two.messages = {{"user", "a"}, {"assistant", "b"}, {"user", "d"}};
  three.messages = {{"user", "ab"}, {"assistant", ""}};
  const auto chain = [](const protocol::PromptInput& input) {
    return prefix_chain({}, {}, input, 32);
  };
  PrefixTable table(2);
  table.record(chain(two), WorkerId("w"));  // three digests in a table of two: the first went
  EXPECT_TRUE(table.depths(chain(one)).empty());
  PrefixTable large(100);
  large.record(chain(two), WorkerId("w"));
  EXPECT_EQ(large.depths(chain(one)).at(WorkerId("w")), 2u);
  EXPECT_TRUE(large.depths(chain(three)).empty());
  large.forget(WorkerId("w"));
  EXPECT_TRUE(large.depths(chain(one)).empty());
}

TEST(ResultCache, StaysInsideItsBytesOldestUseOutAndForgetsWhatExpired) {
  GenerateChunk answer;
  answer.text = std::string(1000, 'x');
  answer.finish = FinishReason::kStop;
  ResultCache cache(5000, 2000);
  std::vector<Digest> evicted;
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(cache.insert(sha256(str(i)), "", answer, 0, 1000, evicted).has_value());
    (void)cache.find(sha256("0"), 0);
  }
  EXPECT_LE(cache.stats().bytes, 5000u);
  EXPECT_NE(cache.find(sha256("0"), 0), nullptr) << "used all the time";
  EXPECT_EQ(cache.find(sha256("1"), 0), nullptr);
  EXPECT_FALSE(evicted.empty());
  EXPECT_EQ(cache.find(sha256("0"), 1000), nullptr) << "expired";
  answer.text = std::string(3000, 'x');
  EXPECT_FALSE(cache.insert(sha256("big"), "", answer, 0, 1000, evicted).has_value());
}

}  // namespace
}  // namespace tandem::coordinator
