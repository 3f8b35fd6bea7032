// What the client library promises while the coordinator answers late, twice, not at all, or anew.
#include "protocol/client/client.h"

#include "protocol/base/str.h"
#include "protocol/inproc_transport.h"
#include "tests/protocol/fake_coordinator.h"

#include <gtest/gtest.h>

#include <map>
#include <numeric>

namespace tandem::protocol::client {
namespace {

class ClientTest : public ::testing::Test {
 protected:
  void serve(FakeCoordinator::Handler handler, const ServerHello& hello = {{}, {}, "fake", 1, 0}) {
    coordinator_.reset();
    coordinator_ =
        std::make_unique<FakeCoordinator>(network_.listen("c").value(), std::move(handler), hello);
  }
  Result<std::unique_ptr<Client>> connect() {
    return Client::connect(network_.connect("c", "me/1"), nullptr, options_);
  }
  std::unique_ptr<Client> client() {
    auto made = connect();
    TANDEM_CHECK(made.ok(), made.status().to_string());
    return std::move(made).value();
  }
  /// Options whose times are short; every one is scaled by the library.
  static ClientOptions quick() {
    ClientOptions options;
    options.endpoint = "ipc:///run/tandem/client";
    options.connect_ms = 300;
    options.reconnect_ms = 10'000;
    options.repeat_ms = 100;
    options.busy_ms_max = 500;
    return options;
  }

  SystemClock clock_;
  InprocNetwork network_{clock_};
  ClientOptions options_ = quick();
  std::unique_ptr<FakeCoordinator> coordinator_;
};

Generate hello_request() {
  Generate request;
  request.model = "m";
  request.input.prompt = "hi";
  return request;
}

/// Token i has the id 100 + i and the text "i,".
GenerateChunk token(const RequestId& id, std::int64_t i, bool last = false) {
  GenerateChunk chunk;
  chunk.id = id;
  chunk.index = i;
  chunk.tokens = {static_cast<std::int32_t>(100 + i)};
  chunk.text = str(i, ",");
  if (last) {
    chunk.finish = FinishReason::kStop;
    chunk.usage = {2, i + 1, 0};
  }
  return chunk;
}

std::vector<std::int32_t> tokens_to(int n) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(n));
  std::iota(ids.begin(), ids.end(), 100);
  return ids;
}

void answer_all(const Generate& request, const FakeCoordinator::Reply& reply, int n) {
  for (std::int64_t i = request.next_index; i < n; ++i) reply(token(request.id, i, i == n - 1));
}

TEST_F(ClientTest, ACoordinatorThatIsNotThereIsNamedWithWhatToDo) {
  const auto made = connect();
  ASSERT_FALSE(made.ok());
  EXPECT_EQ(made.status().code(), StatusCode::kUnavailable);
  EXPECT_NE(made.status().message().find("ipc:///run/tandem/client"), std::string::npos);
  EXPECT_NE(made.status().message().find("tandem up"), std::string::npos);
}

TEST_F(ClientTest, AVersionOutsideTheRangeIsRefusedWithTheRange) {
  serve([](const auto&, const auto&) {},
        {refused_error("this coordinator understands 3.1 to 3.2"), {3, 2}, "fake", 1, 0});
  const auto made = connect();
  ASSERT_FALSE(made.ok());
  EXPECT_EQ(made.status().code(), StatusCode::kRefused);
  EXPECT_NE(made.status().message().find("3.1 to 3.2"), std::string::npos);
}

TEST_F(ClientTest, SpeaksThePreviousMinorWithACoordinatorThatKnowsNoOther) {
  // 1.0 has no CallReply.retryAfterMs: the delay stands in the message only.
  int asked = 0;
  serve(
      [&](const ClientMessage& message, const auto& reply) {
        const auto* call = std::get_if<Call>(&message);
        if (call == nullptr) return;
        CallReply answer;
        answer.call_id = call->call_id;
        if (++asked == 1) {
          answer.status = busy_error("the queue is full: retry after 40 ms");
        } else {
          answer.result_json = "{}";
        }
        reply(answer);
      },
      {{}, {1, 0}, "old", 1, 0});
  options_.repeat_ms = 60'000;  // only the retry can bring the second call
  const auto made = client();
  EXPECT_EQ(made->version(), (Version{1, 0}));
  EXPECT_TRUE(made->call("status", "{}").ok());
  EXPECT_EQ(asked, 2);
}

TEST_F(ClientTest, StreamsEveryTokenOnceAndInOrder) {
  serve([](const ClientMessage& message, const auto& reply) {
    const auto* request = std::get_if<Generate>(&message);
    if (request == nullptr) return;
    reply(token(request->id, 0));
    reply(token(request->id, 0));
    reply(token(request->id, 1));
    reply(token(request->id, 0));
    reply(token(request->id, 2, true));
    reply(token(request->id, 2, true));
  });
  std::string streamed;
  const auto made = client();
  const auto all = made->generate(hello_request(), [&](const GenerateChunk& chunk) {
    streamed += chunk.text;
    return true;
  });
  ASSERT_TRUE(all.ok()) << all.status().to_string();
  EXPECT_EQ(all->tokens, tokens_to(3));
  EXPECT_EQ(all->text, "0,1,2,");
  EXPECT_EQ(streamed, all->text);
  EXPECT_EQ(all->finish, FinishReason::kStop);
  EXPECT_EQ(all->usage.completion_tokens, 3);
  EXPECT_EQ(all->id.value.size(), 32u);
}

TEST_F(ClientTest, AsksForAMissingTokenWithTheSameId) {
  serve([](const ClientMessage& message, const auto& reply) {
    const auto* request = std::get_if<Generate>(&message);
    if (request == nullptr) return;
    if (request->next_index == 0) {
      reply(token(request->id, 0));
      reply(token(request->id, 2));  // 1 was lost
    } else {
      answer_all(*request, reply, 4);
    }
  });
  const auto all = client()->generate(hello_request());
  ASSERT_TRUE(all.ok()) << all.status().to_string();
  EXPECT_EQ(all->tokens, tokens_to(4));
  const auto requests = coordinator_->seen_of<Generate>();
  ASSERT_GE(requests.size(), 2u);
  EXPECT_EQ(requests[1].id, requests[0].id);
  EXPECT_EQ(requests[1].next_index, 1);
}

TEST_F(ClientTest, GoesOnAtTheNextTokenAfterTheCoordinatorWasRestarted) {
  serve([](const ClientMessage& message, const auto& reply) {
    if (const auto* request = std::get_if<Generate>(&message))
      for (int i = 0; i < 3; ++i) reply(token(request->id, i));
  });
  const auto made = client();
  Result<Generation> all = internal_error("not yet");
  std::atomic<int> got{0};
  std::thread caller([&] {
    all = made->generate(hello_request(), [&](const GenerateChunk&) {
      ++got;
      return true;
    });
  });
  while (got < 3) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  serve(
      [](const ClientMessage& message, const auto& reply) {
        if (const auto* request = std::get_if<Generate>(&message)) answer_all(*request, reply, 6);
      },
      {{}, {}, "fake", 2, 0});
  caller.join();
  ASSERT_TRUE(all.ok()) << all.status().to_string();
  EXPECT_EQ(all->tokens, tokens_to(6));
  EXPECT_EQ(coordinator_->seen_of<ClientHello>().size(), 1u);
  EXPECT_EQ(coordinator_->seen_of<Generate>().at(0).next_index, 3);
}

TEST_F(ClientTest, AnOperationEndsWhenTheCoordinatorStaysAway) {
  options_.reconnect_ms = 100;
  serve([](const auto&, const auto&) {});
  const auto made = client();
  Result<Generation> all = internal_error("not yet");
  std::thread caller([&] { all = made->generate(hello_request()); });
  while (coordinator_->seen_of<Generate>().empty())
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  coordinator_.reset();
  caller.join();
  EXPECT_EQ(all.status().code(), StatusCode::kUnavailable);
}

TEST_F(ClientTest, WaitsAsLongAsABusyCoordinatorSaysAndThenNoLongerThanItsLimit) {
  int asked = 0;
  serve([&](const ClientMessage& message, const auto& reply) {
    const auto* request = std::get_if<Generate>(&message);
    if (request == nullptr) return;
    GenerateChunk busy;
    busy.id = request->id;
    busy.finish = FinishReason::kError;
    busy.status = busy_error("64 requests wait");
    busy.retry_after_ms = 20;
    if (request->model == "never" || ++asked < 3) {
      reply(busy);
    } else {
      answer_all(*request, reply, 2);
    }
  });
  const auto made = client();
  ASSERT_TRUE(made->generate(hello_request()).ok());
  EXPECT_EQ(asked, 3);
  Generate never = hello_request();
  never.model = "never";
  EXPECT_EQ(made->generate(never).status().code(), StatusCode::kBusy);
}

TEST_F(ClientTest, RepeatsACallWithItsKeyUntilItIsAnswered) {
  int asked = 0;
  serve([&](const ClientMessage& message, const auto& reply) {
    const auto* call = std::get_if<Call>(&message);
    if (call == nullptr || ++asked < 3) return;  // two are lost
    CallReply answer;
    answer.call_id = call->call_id;
    answer.result_json = R"({"job":"job-1"})";
    reply(answer);
  });
  const auto made = client();
  const auto result = made->call("job.submit", R"({"spec":{}})", {20'000, "my-key"});
  ASSERT_TRUE(result.ok()) << result.status().to_string();
  EXPECT_EQ(*result, R"({"job":"job-1"})");
  const auto calls = coordinator_->seen_of<Call>();
  ASSERT_EQ(calls.size(), 3u);
  for (const Call& call : calls) {
    EXPECT_EQ(call.idempotency_key, "my-key");
    EXPECT_EQ(call.call_id, calls[0].call_id);
  }
}

TEST_F(ClientTest, ACallWithoutAnAnswerTimesOut) {
  serve([](const auto&, const auto&) {});
  EXPECT_EQ(client()->call("status", "{}", {50, ""}).status().code(), StatusCode::kTimeout);
}

TEST_F(ClientTest, AnErrorArrivesAsItWasSaid) {
  serve([](const ClientMessage& message, const auto& reply) {
    if (const auto* call = std::get_if<Call>(&message))
      reply(CallReply{call->call_id, not_found_error("no job job-9"), "", false, 0});
  });
  const auto made = client();
  EXPECT_EQ(made->call("job.show", R"({"job":"job-9"})").status(), not_found_error("no job job-9"));
  EXPECT_EQ(made->call("job.show", "[1]").status().code(), StatusCode::kInvalid);
}

TEST_F(ClientTest, AStreamShowsEachEventOnceAlsoAfterARestart) {
  const auto events = [](const Call& call, int from, int to, const FakeCoordinator::Reply& reply,
                         bool end) {
    for (int seq = from; seq <= to; ++seq)
      reply(CallReply{call.call_id, {}, str("{\"seq\":", seq, "}"), true, 0});
    if (end) reply(CallReply{call.call_id, {}, R"({"state":"done"})", false, 0});
  };
  serve([&](const ClientMessage& message, const auto& reply) {
    if (const auto* call = std::get_if<Call>(&message)) {
      events(*call, 1, 3, reply, false);
      events(*call, 2, 3, reply, false);
    }
  });
  options_.repeat_ms = 60'000;
  const auto made = client();
  std::vector<std::string> got;
  std::atomic<int> count{0};
  Status ended = internal_error("not yet");
  std::thread caller([&] {
    ended = made->stream("job.watch", R"({"job":"j"})", [&](const std::string& json) {
      got.push_back(json);
      ++count;
      return true;
    });
  });
  while (count < 3) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  serve([&](const ClientMessage& message, const auto& reply) {
    if (const auto* call = std::get_if<Call>(&message)) events(*call, 3, 5, reply, true);
  });
  caller.join();
  ASSERT_TRUE(ended.ok()) << ended.to_string();
  EXPECT_EQ(got, (std::vector<std::string>{R"({"seq":1})", R"({"seq":2})", R"({"seq":3})",
                                           R"({"seq":4})", R"({"seq":5})", R"({"state":"done"})"}));
  EXPECT_NE(coordinator_->seen_of<Call>().at(0).params_json.find("\"after\":3"), std::string::npos);
}

TEST_F(ClientTest, LeavingAStreamTellsTheCoordinator) {
  serve([](const ClientMessage& message, const auto& reply) {
    if (const auto* call = std::get_if<Call>(&message))
      reply(CallReply{call->call_id, {}, R"({"seq":1})", true, 0});
  });
  const auto made = client();
  EXPECT_TRUE(made->stream("job.watch", "{}", [](const std::string&) { return false; }).ok());
  for (TimeMs i = 0; i < scaled_ms(5000) && coordinator_->seen_of<CallCancel>().empty(); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(coordinator_->seen_of<CallCancel>().size(), 1u);
}

TEST_F(ClientTest, CancelEndsARunningGenerationAndTellsTheCoordinator) {
  serve([](const ClientMessage& message, const auto& reply) {
    if (const auto* request = std::get_if<Generate>(&message)) reply(token(request->id, 0));
  });
  const auto made = client();
  Generate request = hello_request();
  request.id = RequestId("0123456789abcdef0123456789abcdef");
  std::thread other([&] {
    while (coordinator_->seen_of<Generate>().empty())
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    made->cancel(request.id);
  });
  EXPECT_EQ(made->generate(request).status().code(), StatusCode::kCancelled);
  other.join();
  EXPECT_EQ(made->generate(hello_request(), [](const auto&) { return false; }).status().code(),
            StatusCode::kCancelled);
  for (TimeMs i = 0; i < scaled_ms(5000) && coordinator_->seen_of<Cancel>().size() < 2; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const auto cancels = coordinator_->seen_of<Cancel>();
  ASSERT_EQ(cancels.size(), 2u);
  EXPECT_EQ(cancels[0].id, request.id);
}

TEST_F(ClientTest, ASlowCallerLosesNothing) {
  // More than the client keeps unread, in portions that fit the connection's queue.
  static constexpr std::int64_t kTokens = static_cast<std::int64_t>(kUnreadRepliesMax) + 500;
  static constexpr std::int64_t kPortion = 900;
  serve([](const ClientMessage& message, const auto& reply) {
    const auto* request = std::get_if<Generate>(&message);
    if (request == nullptr) return;
    const std::int64_t end = std::min(kTokens, request->next_index + kPortion);
    for (std::int64_t i = request->next_index; i < end; ++i)
      reply(token(request->id, i, i + 1 == kTokens));
  });
  const auto made = client();
  bool first = true;
  const auto all = made->generate(hello_request(), [&](const GenerateChunk&) {
    const auto seen = [&] { return coordinator_->seen_of<Generate>().size(); };
    for (TimeMs i = 0; first && i < scaled_ms(20'000) && seen() < 7; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    first = false;
    return true;
  });
  ASSERT_TRUE(all.ok()) << all.status().to_string();
  EXPECT_EQ(all->tokens, tokens_to(static_cast<int>(kTokens)));
}

TEST_F(ClientTest, WhatTheCoordinatorWouldRefuseIsRefusedHereByName) {
  serve([](const auto&, const auto&) {});
  const auto made = client();
  Generate request = hello_request();
  request.input.prompt = "caf\xe9";
  auto refused = made->generate(request).status();
  EXPECT_EQ(refused.code(), StatusCode::kInvalid);
  EXPECT_NE(refused.message().find("generate.prompt: not valid UTF-8 at byte 3"), std::string::npos)
      << refused.message();
  request.input.prompt = std::string(kTextBytesMax + 1, 'x');
  refused = made->generate(request).status();
  EXPECT_NE(refused.message().find(str(kTextBytesMax)), std::string::npos) << refused.message();
  const std::string large = str("{\"x\":\"", std::string(kCallJsonBytesMax, 'x'), "\"}");
  refused = made->call("job.submit", large).status();
  EXPECT_EQ(refused.code(), StatusCode::kRefused);
  EXPECT_NE(refused.message().find(str(kCallJsonBytesMax)), std::string::npos) << refused.message();
}

TEST_F(ClientTest, ALossyNetworkCostsTimeButNoToken) {
  serve([](const ClientMessage& message, const auto& reply) {
    if (const auto* request = std::get_if<Generate>(&message)) answer_all(*request, reply, 120);
    if (const auto* call = std::get_if<Call>(&message))
      reply(CallReply{call->call_id, {}, call->params_json, false, 0});
  });
  options_.repeat_ms = 30;
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    network_.set_faults({});
    const auto made = client();
    network_.set_faults({.seed = seed,
                         .drop = 0.1f,
                         .repeat = 0.2f,
                         .reorder = 0.1f,
                         .delay = 0.05f,
                         .delay_ms_max = 5});
    const auto all = made->generate(hello_request());
    ASSERT_TRUE(all.ok()) << "seed " << seed << ": " << all.status().to_string();
    EXPECT_EQ(all->tokens, tokens_to(120)) << "seed " << seed;
    const auto echoed = made->call("status", R"({"a":1})");
    ASSERT_TRUE(echoed.ok()) << "seed " << seed << ": " << echoed.status().to_string();
    EXPECT_EQ(*echoed, R"({"a":1})");
  }
}

}  // namespace
}  // namespace tandem::protocol::client
