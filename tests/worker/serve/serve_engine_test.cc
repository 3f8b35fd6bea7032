#include "tests/worker/serve/serve_fixture.h"

#include <functional>
#include <set>

namespace tandem::worker::serve {
namespace {

struct Fixture : ServeBench {
  Fixture() : ServeBench(ServeBench::cpu()) {}
  Random random{42};
  std::vector<std::int32_t> prompt(std::int64_t length) { return random_prompt(random, length); }
};

// -- submission ----------------------------------------------------------------------------------

TEST(ServeSubmit, NamesWhatIsWrongWithARequestItsLimitAndItsValue) {
  Fixture f;
  auto engine = f.engine();
  const auto refused = [&](StatusCode code, std::initializer_list<std::string> parts,
                           const std::function<void(GenerateRequest&)>& spoil) {
    GenerateRequest r = request("r", {1, 2, 3});
    spoil(r);
    const Status status = engine->submit(r);
    EXPECT_EQ(status.code(), code) << status.to_string();
    for (const std::string& part : parts)
      EXPECT_NE(status.message().find(part), std::string::npos) << status.message();
    EXPECT_FALSE(engine->has_work());
  };
  const auto invalid = StatusCode::kInvalid;
  refused(invalid, {"no id"}, [](auto& r) { r.id = {}; });
  refused(invalid, {"prompt is empty"}, [](auto& r) { r.prompt.clear(); });
  refused(invalid, {"token 1", "id 300", "[0, 300)"}, [](auto& r) { r.prompt[1] = 300; });
  refused(invalid, {"token 0", "id -1"}, [](auto& r) { r.prompt[0] = -1; });
  refused(invalid, {"160 tokens", "shorten"}, [](auto& r) { r.prompt.assign(160, 1); });
  refused(invalid, {"max_tokens (158)", "160", "157"},
          [](auto& r) { r.sampling.max_tokens = 158; });
  refused(invalid, {"max_tokens", "got 0"}, [](auto& r) { r.sampling.max_tokens = 0; });
  refused(invalid, {"max_tokens", "got -5"}, [](auto& r) { r.sampling.max_tokens = -5; });
  refused(invalid, {"max_tokens"},
          [](auto& r) { r.sampling.max_tokens = std::numeric_limits<std::int64_t>::max(); });
  refused(invalid, {"temperature", "0 and 10", "-1"},
          [](auto& r) { r.sampling.temperature = -1.0f; });
  refused(invalid, {"temperature", "nan"},
          [](auto& r) { r.sampling.temperature = std::numeric_limits<float>::quiet_NaN(); });
  refused(invalid, {"top_p", "above 0", "got 0"}, [](auto& r) { r.sampling.top_p = 0.0f; });
  refused(invalid, {"top_k", "300", "-1"}, [](auto& r) { r.sampling.top_k = -1; });
  refused(invalid, {"min_p", "1.5"}, [](auto& r) { r.sampling.min_p = 1.5f; });
  refused(invalid, {"repetition_penalty", "got 0"},
          [](auto& r) { r.sampling.repetition_penalty = 0.0f; });
  refused(invalid, {"presence_penalty", "-2", "2.5"},
          [](auto& r) { r.sampling.presence_penalty = 2.5f; });
  refused(invalid, {"frequency_penalty"}, [](auto& r) { r.sampling.frequency_penalty = -3.0f; });
  refused(invalid, {"logprobs", "20", "21"}, [](auto& r) { r.sampling.logprobs = 21; });
  refused(invalid, {"min_tokens", "13"}, [](auto& r) { r.sampling.min_tokens = 13; });
  refused(invalid, {"start_index"}, [](auto& r) { r.start_index = -1; });
  refused(invalid, {"priority", "8", "9"}, [](auto& r) { r.priority = 9; });
  refused(invalid, {"prompt_logprobs_from", "1 and 3", "0"},
          [](auto& r) { r.sampling.prompt_logprobs_from = 0; });
  refused(invalid, {"stop token 0", "999"}, [](auto& r) { r.sampling.stop_token_ids = {999}; });
  refused(invalid, {"stop string"}, [](auto& r) { r.sampling.stop = {""}; });
  refused(invalid, {"stop_token_ids", "64"},
          [](auto& r) { r.sampling.stop_token_ids.assign(65, 1); });
}

TEST(ServeSubmit, RefusesWhatTheKvCacheCannotHoldAndClipsAnOpenEnd) {
  Fixture f;
  ServeOptions o = f.options();
  o.kv_bytes_max = 4 * kv_layout(f.config, f.dtype, o).block_bytes;  // 64 tokens
  auto engine = f.engine(o);
  const Status status = engine->submit(request("r", f.prompt(30), 60));
  EXPECT_EQ(status.code(), StatusCode::kRefused);
  EXPECT_NE(status.message().find("64"), std::string::npos) << status.message();
  GenerateRequest open = request("open", f.prompt(30));
  open.sampling.max_tokens.reset();
  const Outcome got = run_alone(*engine, open);
  EXPECT_EQ(got.ids.size(), 35u);  // the last drawn token needs no KV
  EXPECT_EQ(got.finish, FinishReason::kLength);
  open.start_index = 40;  // begun by a worker that holds more
  EXPECT_EQ(engine->submit(open).code(), StatusCode::kRefused);
  open.sampling.max_tokens = 20;
  EXPECT_EQ(engine->submit(open).code(), StatusCode::kInvalid);
}

TEST(ServeSubmit, AnswersBusyWithATimeWhenTheQueueIsFull) {
  Fixture f;
  ServeOptions o = f.options();
  o.max_waiting = 3;
  auto engine = f.engine(o);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(engine->submit(request(str(i), f.prompt(4))).ok());
  const Status status = engine->submit(request("late", f.prompt(4)));
  EXPECT_EQ(status.code(), StatusCode::kBusy);
  EXPECT_NE(status.message().find("retry after"), std::string::npos);
  EXPECT_NE(status.message().find("3 requests"), std::string::npos);
  drain(*engine);
  EXPECT_TRUE(engine->submit(request("late", f.prompt(4))).ok());
}

TEST(ServeSubmit, AnIdThatIsAliveConflictsAndAFinishedOneMayReturn) {
  Fixture f;
  auto engine = f.engine();
  ASSERT_TRUE(engine->submit(request("r", {1, 2, 3})).ok());
  EXPECT_EQ(engine->submit(request("r", {1, 2, 3})).code(), StatusCode::kConflict);
  drain(*engine);
  EXPECT_TRUE(engine->submit(request("r", {1, 2, 3})).ok());
}

TEST(ServeSubmit, PriorityGoesFirstWithoutStarvingAnyone) {
  Fixture f;
  ServeOptions o = f.options();
  o.max_running = 1;
  o.max_waiting = 400;
  auto engine = f.engine(o);
  ASSERT_TRUE(engine->submit(request("plain", {1, 2}, 1)).ok());
  GenerateRequest urgent = request("urgent", {1, 2}, 1);
  urgent.priority = 2;
  ASSERT_TRUE(engine->submit(urgent).ok());
  std::vector<std::string> order;
  for (int i = 0; i < 300; ++i) {
    GenerateRequest r = request(str("later ", i), {1, 2}, 1);
    r.priority = 1;
    ASSERT_TRUE(engine->submit(r).ok());
  }
  while (engine->has_work())
    for (const SequenceOutput& out : engine->step().outputs) order.push_back(out.id.value);
  ASSERT_EQ(order.size(), 302u);
  EXPECT_EQ(order[0], "urgent");
  const auto plain = std::find(order.begin(), order.end(), "plain") - order.begin();
  EXPECT_GT(plain, 10);
  EXPECT_LE(plain, kPriorityHeadStart + 1);
}

// -- text, stops, ends ---------------------------------------------------------------------------

TEST(ServeText, DeltasAreWholeCharactersAndAddUpToTheDecodedTokens) {
  Fixture f;
  auto engine = f.engine();
  for (int i = 0; i < 8; ++i) {
    GenerateRequest r = request(str(i), f.prompt(10), 60);
    r.sampling.temperature = 1.5f;  // bytes at random: halves of characters abound
    const Outcome got = run_alone(*engine, r);
    EXPECT_EQ(got.text, f.tokenizer->decode(got.ids, true));
    for (const std::string& delta : got.deltas)
      EXPECT_TRUE(f.tokenizer->encode(delta).ok()) << "not UTF-8";
  }
}

/// A sampled run whose text is long enough to cut stops from.
GenerateRequest wordy(Fixture& f, const std::string& id) {
  GenerateRequest r = request(id, f.prompt(10), 60);
  r.sampling.temperature = 1.0f;
  r.sampling.seed = 11;
  return r;
}

TEST(ServeText, EndsAtAStopStringWhichIsNeverShown) {
  Fixture f;
  auto engine = f.engine();
  const GenerateRequest free = wordy(f, "free");
  const Outcome whole = run_alone(*engine, free);
  // A stop string of several tokens from the middle of the text that begins on a character.
  std::string stop;
  for (std::size_t at = whole.text.size() / 3; stop.size() < 4; ++at)
    if (f.tokenizer->encode(whole.text.substr(at, 4)).ok()) stop = whole.text.substr(at, 4);
  GenerateRequest r = free;
  r.id = RequestId("stopped");
  r.sampling.stop = {"never there", stop};
  const Outcome got = run_alone(*engine, r);
  EXPECT_EQ(got.finish, FinishReason::kStop);
  EXPECT_EQ(got.matched_stop, stop);
  EXPECT_EQ(got.text, whole.text.substr(0, whole.text.find(stop)));
  EXPECT_LT(got.ids.size(), whole.ids.size());
  r.sampling.include_stop = true;
  r.id = RequestId("shown");
  EXPECT_EQ(run_alone(*engine, r).text, got.text + stop);
}

TEST(ServeText, HeldBackTextComesOutWhenTheLengthEndsIt) {
  Fixture f;
  auto engine = f.engine();
  GenerateRequest r = wordy(f, "r");
  const Outcome whole = run_alone(*engine, r);
  r.id = RequestId("held");
  // The text's own end, and more: held back to the last token.
  std::string tail = whole.text.substr(whole.text.size() / 2);
  while (!f.tokenizer->encode(tail).ok()) tail = tail.substr(1);
  r.sampling.stop = {tail + "zzz"};
  const Outcome got = run_alone(*engine, r);
  EXPECT_EQ(got.finish, FinishReason::kLength);
  EXPECT_EQ(got.text, whole.text);
}

TEST(ServeStops, EosEndsARequestUnlessIgnoredAndMinTokensPostponesIt) {
  Fixture f;
  auto engine = f.engine();
  GenerateRequest r = request("free", f.prompt(10), 20);
  const Outcome whole = run_alone(*engine, r);
  ASSERT_GE(whole.ids.size(), 6u) << "ended by " << static_cast<int>(whole.finish);
  // What greedy draws at index 5 (where first drawn) serves as the stop token.
  const std::int32_t stop = whole.ids[5];
  const auto first = std::find(whole.ids.begin(), whole.ids.end(), stop) - whole.ids.begin();
  r.id = RequestId("stop token");
  r.sampling.stop_token_ids = {stop};
  const Outcome stopped = run_alone(*engine, r);
  EXPECT_EQ(stopped.finish, FinishReason::kStop);
  EXPECT_EQ(stopped.matched_stop, "");
  EXPECT_EQ(static_cast<std::int64_t>(stopped.ids.size()), first + 1);
  EXPECT_EQ(stopped.usage.completion_tokens, first + 1);
  // The stop token adds no text.
  EXPECT_EQ(stopped.text,
            f.tokenizer->decode(std::span(stopped.ids).first(stopped.ids.size() - 1)));
  r.id = RequestId("min tokens");
  r.sampling.min_tokens = 15;
  const Outcome later = run_alone(*engine, r);
  EXPECT_GE(later.ids.size(), 15u);
  for (std::size_t i = 0; i < 15 && i < later.ids.size(); ++i) EXPECT_NE(later.ids[i], stop);
  EXPECT_EQ(std::vector(later.ids.begin(), later.ids.begin() + first),
            std::vector(whole.ids.begin(), whole.ids.begin() + first));

  ServeOptions o = f.options();
  o.eos_ids = {stop};
  auto with_eos = f.engine(o);
  GenerateRequest e = request("eos", r.prompt, 20);
  EXPECT_EQ(run_alone(*with_eos, e).ids, whole.ids);  // ignore_eos
  e.id = RequestId("eos ends");
  e.sampling.ignore_eos = false;
  const Outcome ended = run_alone(*with_eos, e);
  EXPECT_EQ(ended.ids, stopped.ids);
  EXPECT_EQ(ended.finish, FinishReason::kStop);
}

// -- randomness and resumption -------------------------------------------------------------------

TEST(ServeSeeds, AreTheOnlySourceOfRandomness) {
  Fixture f;
  const auto prompt = f.prompt(12);
  const auto sampled = [&](const std::string& id, std::optional<std::uint64_t> seed) {
    auto engine = f.engine();
    GenerateRequest r = request(id, prompt, 30);
    r.sampling.temperature = 1.0f;
    r.sampling.seed = seed;
    return run_alone(*engine, r).ids;
  };
  EXPECT_EQ(sampled("a", 5), sampled("b", 5));
  EXPECT_NE(sampled("a", 5), sampled("a", 6));
  EXPECT_EQ(sampled("a", std::nullopt), sampled("a", std::nullopt));  // from the id
  EXPECT_NE(sampled("a", std::nullopt), sampled("b", std::nullopt));
}

TEST(ServeResume, DeliversExactlyWhatIsMissingAfterAnyToken) {
  Fixture f;
  auto engine = f.engine();
  GenerateRequest r = wordy(f, "r");
  r.sampling.max_tokens = 20;
  r.sampling.logprobs = 2;
  r.sampling.prompt_logprobs_from = 1;
  ASSERT_TRUE(engine->submit(r).ok());
  std::vector<SequenceOutput> whole;
  while (engine->has_work())
    for (auto& out : engine->step().outputs) whole.push_back(std::move(out));
  ASSERT_EQ(whole.size(), 20u);
  for (std::int64_t index = 0; index < 20; ++index) {
    GenerateRequest again = r;
    again.start_index = index;
    const Outcome got = run_alone(*engine, again);
    std::vector<std::int32_t> ids;
    std::string text;
    for (auto i = static_cast<std::size_t>(index); i < whole.size(); ++i) {
      ids.push_back(whole[i].token_ids[0]);
      text += whole[i].text;
    }
    EXPECT_EQ(got.ids, ids) << index;
    EXPECT_EQ(got.text, text) << index;
    EXPECT_EQ(got.first_index, index);
    EXPECT_EQ(got.logprobs.size(), ids.size());
    EXPECT_EQ(got.prompt_logprobs.size(), index == 0 ? r.prompt.size() - 1 : 0);
    EXPECT_EQ(got.usage.completion_tokens, 20);
  }
}

// -- cancellation ---------------------------------------------------------------------------------

TEST(ServeCancel, FreesKvAtOnceAndReportsOnce) {
  Fixture f;
  auto engine = f.engine();
  ASSERT_TRUE(engine->submit(request("running", f.prompt(40), 50)).ok());
  ASSERT_TRUE(engine->submit(request("other", f.prompt(10), 5)).ok());
  Outcomes got;
  take(engine->step(), got);
  take(engine->step(), got);
  const std::int64_t free = engine->stats().kv_blocks_free;
  engine->cancel(RequestId("running"));
  EXPECT_GE(engine->stats().kv_blocks_free, free + 3);
  engine->cancel(RequestId("running"));
  engine->cancel(RequestId("nobody"));
  drain(*engine, got);
  EXPECT_EQ(got["running"].finish, FinishReason::kCancelled);
  EXPECT_EQ(got["running"].usage.prompt_tokens, 40);
  EXPECT_EQ(got["other"].finish, FinishReason::kLength);
  engine->cancel(RequestId("other"));
  EXPECT_FALSE(engine->has_work());
  EXPECT_EQ(engine->stats().kv_blocks_free, engine->stats().kv_blocks_total);
}

TEST(ServeCancel, ReachesWaitingRequestsAndFailAllReachesEveryone) {
  Fixture f;
  auto engine = f.engine();
  GenerateRequest waits = request("waits", f.prompt(4));
  waits.adapter = ServeBench::name(1);
  ASSERT_TRUE(engine->submit(waits).ok());
  EXPECT_FALSE(engine->has_work());
  engine->cancel(waits.id);
  EXPECT_TRUE(engine->has_work());
  EXPECT_EQ(drain(*engine)["waits"].finish, FinishReason::kCancelled);
  EXPECT_TRUE(engine->missing_adapters().empty());
  ASSERT_TRUE(engine->submit(request("a", f.prompt(4), 50)).ok());
  engine->step();
  ASSERT_TRUE(engine->submit(request("b", f.prompt(4), 50)).ok());
  engine->fail_all(unavailable_error("the worker drains"));
  Outcomes got = drain(*engine);
  EXPECT_EQ(got["a"].finish, FinishReason::kError);
  EXPECT_EQ(got["b"].error.message(), "the worker drains");
}

TEST(ServeCancel, AnIdSubmittedAgainAfterCancellingIsANewRequest) {
  Fixture f;
  auto engine = f.engine();
  const GenerateRequest r = request("r", f.prompt(10), 6);
  const Outcome alone = run_alone(*engine, r);
  ASSERT_TRUE(engine->submit(r).ok());
  engine->step();
  engine->cancel(r.id);
  ASSERT_TRUE(engine->submit(r).ok());
  const Outcome got = drain(*engine)["r"];
  EXPECT_EQ(got.ids, alone.ids);
  EXPECT_EQ(got.finish, FinishReason::kLength);
}

// -- a step in two halves -------------------------------------------------------------------------

TEST(ServeStep, TwoHalvesAreAStepWhateverIsCalledBetweenThem) {
  Fixture f;
  auto engine = f.engine();
  const GenerateRequest a = request("a", f.prompt(10), 6), b = request("b", f.prompt(7), 6);
  const Outcome alone_a = run_alone(*engine, a), alone_b = run_alone(*engine, b);
  Outcomes got;
  ASSERT_TRUE(engine->submit(a).ok());
  EXPECT_EQ(engine->start_step(), 10);
  ASSERT_TRUE(engine->submit(b).ok()) << "it waits for the step and joins the next";
  EXPECT_TRUE(engine->step_ready());
  take(engine->finish_step(), got);
  EXPECT_EQ(got["a"].ids.size(), 1u);
  while (engine->has_work()) {
    EXPECT_GT(engine->start_step(), 0);
    engine->cancel(RequestId("nobody"));
    take(engine->finish_step(), got);
  }
  EXPECT_EQ(got["a"].ids, alone_a.ids);
  EXPECT_EQ(got["b"].ids, alone_b.ids);
}

TEST(ServeStep, ARequestCancelledWhileItRunsEndsWithTheNextStep) {
  Fixture f;
  auto engine = f.engine();
  const GenerateRequest r = request("r", f.prompt(10), 6);
  ASSERT_TRUE(engine->submit(r).ok());
  engine->start_step();
  engine->cancel(r.id);
  Outcomes got;
  take(engine->finish_step(), got);
  EXPECT_EQ(got["r"].finish, FinishReason::kNone);
  EXPECT_EQ(drain(*engine)["r"].finish, FinishReason::kCancelled);
  EXPECT_EQ(engine->stats().running, 0);
}

// -- adapters -------------------------------------------------------------------------------------

TEST(ServeAdapters, WaitForTheirWeightsWhileOthersAreServed) {
  Fixture f;
  auto engine = f.engine();
  GenerateRequest a = request("a", f.prompt(8)), b = request("b", f.prompt(8));
  a.adapter = ServeBench::name(1);
  b.adapter = ServeBench::name(2);
  ASSERT_TRUE(engine->submit(a).ok());
  ASSERT_TRUE(engine->submit(b).ok());
  ASSERT_TRUE(engine->submit(request("base", f.prompt(8))).ok());
  EXPECT_EQ(engine->missing_adapters(), (std::vector{ServeBench::name(1), ServeBench::name(2)}));
  Outcomes got = drain(*engine);
  EXPECT_EQ(got["base"].finish, FinishReason::kLength);
  EXPECT_FALSE(got.contains("a"));
  ASSERT_TRUE(engine->install_adapter(ServeBench::name(1), f.adapter(1)).ok());
  engine->fail_adapter(ServeBench::name(2), not_found_error("no adapter of that digest"));
  got = drain(*engine);
  EXPECT_EQ(got["a"].finish, FinishReason::kLength);
  EXPECT_EQ(got["b"].finish, FinishReason::kError);
  EXPECT_EQ(got["b"].error.code(), StatusCode::kNotFound);
  EXPECT_TRUE(engine->missing_adapters().empty());
}

TEST(ServeAdapters, TheWaitIsBounded) {
  Fixture f;
  ServeOptions o = f.options();
  o.adapter_wait_ms = 1000;
  auto engine = f.engine(o);
  GenerateRequest r = request("r", f.prompt(8));
  r.adapter = ServeBench::name(1);
  ASSERT_TRUE(engine->submit(r).ok());
  f.clock.advance(scaled_ms(999));
  EXPECT_FALSE(engine->has_work());
  f.clock.advance(scaled_ms(1));
  EXPECT_TRUE(engine->has_work());
  const Outcome got = drain(*engine)["r"];
  EXPECT_EQ(got.error.code(), StatusCode::kUnavailable);
  EXPECT_NE(got.error.message().find("1000 ms"), std::string::npos);
}

TEST(ServeAdapters, MoreOfThemThanSlotsRunTogether) {
  Fixture f;
  ServeOptions o = f.options();
  o.max_running = 16;
  auto engine = f.engine(o, 2);
  constexpr int kAdapters = 9;
  for (int i = 0; i < kAdapters; ++i) {
    ASSERT_TRUE(engine->install_adapter(ServeBench::name(i), f.adapter(i)).ok());
    GenerateRequest r = request(str(i), {1, 2, 3, 4}, 10);
    r.adapter = ServeBench::name(i);
    ASSERT_TRUE(engine->submit(r).ok());
  }
  Outcomes got;
  int most = 0;
  while (engine->has_work()) {
    take(engine->step(), got);
    most = std::max(most, static_cast<int>(engine->stats().running));
  }
  EXPECT_EQ(most, kAdapters);  // none waited for a slot to be given up
  std::set<std::vector<std::int32_t>> answers;
  for (auto& [id, outcome] : got) {
    EXPECT_EQ(outcome.finish, FinishReason::kLength);
    answers.insert(outcome.ids);
  }
  EXPECT_EQ(answers.size(), std::size_t{kAdapters});  // each answered with its own weights
}

TEST(ServeAdapters, AreRefusedWithTheLimitAndEvictedWhenIdle) {
  Fixture f;
  ServeOptions o = f.options();
  o.adapter_rank_max = 2;
  o.adapters_max = 2;
  auto engine = f.engine(o);
  std::vector<std::uint64_t> small;
  Status too_large;
  for (std::uint64_t seed = 0; small.size() < 3 || too_large.ok(); ++seed) {
    const auto weights = f.adapter(seed);
    if (weights->rank_max <= 2)
      small.push_back(seed);
    else
      too_large = engine->install_adapter(ServeBench::name(seed), weights);
  }
  EXPECT_EQ(too_large.code(), StatusCode::kRefused);
  EXPECT_NE(too_large.message().find("up to 2"), std::string::npos);
  for (int i = 0; i < 3; ++i)
    ASSERT_TRUE(engine->install_adapter(ServeBench::name(small[i]), f.adapter(small[i])).ok());
  EXPECT_EQ(engine->stats().resident_adapters,
            (std::vector{ServeBench::name(small[2]), ServeBench::name(small[1])}));
  engine->drop_adapter(ServeBench::name(small[2]));
  EXPECT_EQ(engine->stats().resident_adapters, (std::vector{ServeBench::name(small[1])}));
  GenerateRequest r = request("r", {1});
  r.adapter = ServeBench::name(1);
  EXPECT_EQ(f.engine(o, 0)->submit(r).code(), StatusCode::kRefused);
}

TEST(ServeAdapters, NeverShareCachedPrefixes) {
  Fixture f;
  auto engine = f.engine();
  ASSERT_TRUE(engine->install_adapter(ServeBench::name(1), f.adapter(1)).ok());
  const auto prompt = f.prompt(50);
  const auto ask = [&](const std::string& id, Digest adapter) {
    GenerateRequest r = request(id, prompt, 4);
    r.adapter = adapter;
    return run_alone(*engine, r);
  };
  EXPECT_EQ(ask("1", {}).usage.cached_prompt_tokens, 0);
  EXPECT_EQ(ask("2", ServeBench::name(1)).usage.cached_prompt_tokens, 0);
  EXPECT_EQ(ask("3", ServeBench::name(1)).usage.cached_prompt_tokens, 48);
  EXPECT_EQ(ask("4", {}).usage.cached_prompt_tokens, 48);
}

// -- memory ---------------------------------------------------------------------------------------

TEST(ServeMemory, ADryRunOnMetaHasThePeakOfTheRealEngineUnderAnyLoad) {
  for (const DType dtype : test::test_dtypes()) {
    ServeBench real(ServeBench::cpu(), tiny_config(), 4, dtype);
    ServeBench meta(kernels::make_meta_backend(real.backend.ops->profile()), tiny_config(), 4,
                    dtype);
    ServeOptions o = real.options();
    meta.engine(o)->reserve_worst_case();
    auto engine = real.engine(o);
    engine->reserve_worst_case();
    const auto expect_equal = [&](const char* when) {
      for (int kind = 0; kind < kernels::kMemoryKindCount; ++kind) {
        const auto k = static_cast<kernels::MemoryKind>(kind);
        if (k == kernels::MemoryKind::kAdapters) continue;  // installed by the caller
        EXPECT_EQ(real.backend.ledger->peak(k), meta.backend.ledger->peak(k))
            << when << " " << kernels::memory_kind_name(k);
      }
    };
    expect_equal("after the reservation");
    // The exact use inside the arenas, which mapping by large pages would hide.
    const std::int64_t activations = real.activations.peak_used();
    const std::int64_t workspace = real.workspace.peak_used();
    EXPECT_EQ(activations, meta.activations.peak_used());
    EXPECT_EQ(workspace, meta.workspace.peak_used());
    Random random(1);
    for (int i = 0; i < 3; ++i)
      ASSERT_TRUE(engine->install_adapter(ServeBench::name(i), real.adapter(i)).ok());
    for (int i = 0; i < 40; ++i) {
      GenerateRequest r = request(str(i), random_prompt(random, 1 + random.below(90)), 60);
      r.sampling.logprobs = 20;
      r.sampling.repetition_penalty = 1.1f;
      if (i % 3) r.adapter = ServeBench::name(i % 3);
      if (i % 5 == 0) r.sampling.prompt_logprobs_from = 1;
      ASSERT_TRUE(engine->submit(r).ok());
    }
    drain(*engine);
    expect_equal("after the load");
    EXPECT_EQ(real.activations.peak_used(), activations);
    EXPECT_EQ(real.workspace.peak_used(), workspace);
  }
}

TEST(ServeMemory, KvGivesMemoryBackAndGrowsAgainWithTheSameTokens) {
  ServeBench f(ServeBench::cpu());
  ServeOptions o = f.options();
  o.kv_bytes_max = std::int64_t{256} << 20;
  auto engine = f.engine(o);
  Random random(3);
  const GenerateRequest r = request("r", random_prompt(random, 40), 60);
  const Outcome alone = run_alone(*engine, r);
  const std::int64_t full = f.backend.ledger->live(kernels::MemoryKind::kKv);
  const std::int64_t blocks = engine->stats().kv_blocks_total;
  GenerateRequest again = r;
  again.id = RequestId("again");
  ASSERT_TRUE(engine->submit(again).ok());
  Outcomes got;
  for (int i = 0; i < 10; ++i) take(engine->step(), got);
  const std::int64_t bytes = engine->set_kv_limit(10);
  EXPECT_EQ(bytes, 10 * engine->stats().kv_block_bytes);
  EXPECT_LT(f.backend.ledger->live(kernels::MemoryKind::kKv), full / 10);
  for (int i = 0; i < 10; ++i) take(engine->step(), got);
  engine->set_kv_limit(blocks);
  EXPECT_EQ(f.backend.ledger->live(kernels::MemoryKind::kKv), full);
  drain(*engine, got);
  EXPECT_EQ(got["again"].ids, alone.ids);
  engine->set_kv_limit(2);
  EXPECT_EQ(engine->submit(r).code(), StatusCode::kRefused);
}

TEST(ServeMemory, ARequestThatNoLongerFitsAfterAShrinkEndsWithTheReason) {
  ServeBench f(ServeBench::cpu());
  auto engine = f.engine();
  Random random(3);
  ASSERT_TRUE(engine->submit(request("r", random_prompt(random, 60), 60)).ok());
  engine->step();
  engine->set_kv_limit(2);
  const Outcome got = drain(*engine)["r"];
  EXPECT_EQ(got.finish, FinishReason::kError);
  EXPECT_EQ(got.error.code(), StatusCode::kUnavailable);
  EXPECT_NE(got.error.message().find("32"), std::string::npos) << got.error.message();
}

TEST(ServeOptionsCheck, NamesTheOptionThatContradicts) {
  ServeBench f(ServeBench::cpu());
  const auto refused = [&](const std::string& part,
                           const std::function<void(ServeOptions&)>& spoil) {
    ServeOptions o = f.options();
    spoil(o);
    const auto engine = ServeEngine::create(f.parts(), o);
    ASSERT_FALSE(engine.ok());
    EXPECT_EQ(engine.status().code(), StatusCode::kInvalid);
    EXPECT_NE(engine.status().message().find(part), std::string::npos) << engine.status().message();
  };
  refused("block_size must be 16 or 32, got 8", [](auto& o) { o.block_size = 8; });
  refused("max_batch_tokens must be between 9", [](auto& o) { o.max_batch_tokens = 8; });
  refused("context_max must be between 0 and 160", [](auto& o) { o.context_max = 161; });
  refused("kv_bytes_max of 100 B holds 0 blocks", [](auto& o) { o.kv_bytes_max = 100; });
  refused("token_buckets", [](auto& o) { o.token_buckets = {1, 2}; });
}

}  // namespace
}  // namespace tandem::worker::serve
