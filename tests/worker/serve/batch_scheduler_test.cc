#include "worker/serve/batch_scheduler.h"
#include "protocol/base/random.h"

#include <gtest/gtest.h>

#include <deque>
#include <map>
#include <set>

namespace tandem::worker::serve {
namespace {

BatchLimits limits() {
  return {.token_budget = 64,
          .prefill_chunk_max = 0,
          .running_max = 8,
          .adapters_max = 4,
          .history_max = 1000,
          .block_size = 4};
}

/// Runs batches without a device: every drawn token is the sequence's length.
struct Harness {
  explicit Harness(std::int64_t blocks, BatchLimits l = limits(), bool reuse = false)
      : kv(blocks, reuse), scheduler(kv, l, sha256("base")) {}

  Sequence& add(std::int64_t prompt, std::int64_t new_tokens, Digest adapter = {}) {
    Sequence& s = sequences.emplace_back();
    s.age = static_cast<std::int64_t>(sequences.size());
    s.adapter = adapter;
    s.prompt = prompt;
    for (std::int64_t i = 0; i < prompt; ++i)
      s.tokens.push_back(static_cast<std::int32_t>(1000 * s.age + i));
    goal[&s] = prompt + new_tokens;
    scheduler.add(&s);
    return s;
  }
  const Batch& step() {
    scheduler.next(batch);
    scheduler.commit(batch);
    for (const BatchRows& rows : batch.rows)
      if (rows.sample) rows.sequence->tokens.push_back(static_cast<std::int32_t>(rows.begin));
    for (const BatchRows& rows : batch.rows)
      if (rows.sequence->size() >= goal[rows.sequence]) {
        scheduler.remove(rows.sequence);
        finished.push_back(rows.sequence);
      }
    return batch;
  }

  KvBlocks kv;
  BatchScheduler scheduler;
  std::deque<Sequence> sequences;
  std::map<Sequence*, std::int64_t> goal;
  std::vector<Sequence*> finished;
  Batch batch;
};

TEST(BatchScheduler, DecodesEveryRunningSequenceAndFillsTheRestWithPrefill) {
  BatchLimits l = limits();
  l.token_budget = 10;
  Harness h(100, l);
  h.add(4, 5);
  h.step();
  h.add(30, 1);
  const Batch& batch = h.step();
  ASSERT_EQ(batch.rows.size(), 2u);
  EXPECT_EQ(batch.rows[0].count, 1);
  EXPECT_TRUE(batch.rows[0].sample);
  EXPECT_EQ(batch.rows[1].count, 9);
  EXPECT_FALSE(batch.rows[1].sample);
  EXPECT_EQ(batch.tokens, 10);
  EXPECT_EQ(batch.prefill_tokens, 9);
}

TEST(BatchScheduler, SamplesOnlyWithTheLastChunkOfAPrompt) {
  BatchLimits l = limits();
  l.prefill_chunk_max = 7;
  Harness h(100, l);
  h.add(16, 2);
  EXPECT_FALSE(h.step().rows[0].sample);
  EXPECT_FALSE(h.step().rows[0].sample);
  const Batch& last = h.step();
  EXPECT_EQ(last.rows[0].begin, 14);
  EXPECT_EQ(last.rows[0].count, 2);
  EXPECT_TRUE(last.rows[0].sample);
}

TEST(BatchScheduler, PutsRowsOfOneAdapterTogetherAndTheBaseFirst) {
  Harness h(100);
  const Digest a = sha256("a"), b = sha256("b");
  for (const Digest& adapter : {a, Digest{}, b, a, Digest{}, b}) h.add(3, 3, adapter);
  const Batch& batch = h.step();
  ASSERT_EQ(batch.rows.size(), 6u);
  EXPECT_TRUE(batch.rows[0].sequence->adapter.empty());
  EXPECT_TRUE(batch.rows[1].sequence->adapter.empty());
  EXPECT_EQ(batch.rows[2].sequence->adapter, batch.rows[3].sequence->adapter);
  EXPECT_EQ(batch.rows[4].sequence->adapter, batch.rows[5].sequence->adapter);
}

TEST(BatchScheduler, TakesTurnsWhenMoreAdaptersRunThanAStepMayName) {
  BatchLimits l = limits();
  l.adapters_max = 2;
  Harness h(200, l);
  std::map<Digest, int> last;
  for (int i = 0; i < 5; ++i) h.add(3, 1000, sha256(str("adapter ", i)));
  Sequence& base = h.add(3, 1000);
  int base_rows = 0;
  for (int i = 0; i < 50; ++i) {
    std::set<Digest> distinct;
    for (const BatchRows& rows : h.step().rows) {
      if (rows.sequence == &base)
        ++base_rows;
      else
        distinct.insert(rows.sequence->adapter);
    }
    EXPECT_EQ(distinct.size(), 2u);
    for (const Digest& d : distinct) last[d] = i;
    if (i < 4) continue;
    ASSERT_EQ(last.size(), 5u);
    for (const auto& [adapter, step] : last) EXPECT_LE(i - step, 3) << adapter;
  }
  EXPECT_EQ(base_rows, 50);
}

TEST(BatchScheduler, PreemptsTheYoungestAndFinishesEverything) {
  Harness h(8);
  Sequence& first = h.add(8, 20);
  Sequence& second = h.add(8, 20);
  int preempted_first = 0;
  for (int i = 0; i < 200 && h.finished.size() < 2; ++i) {
    const std::int64_t before = h.scheduler.preemptions();
    const std::int64_t computed = first.computed;
    h.step();
    if (h.scheduler.preemptions() > before && first.computed < computed) ++preempted_first;
  }
  ASSERT_EQ(h.finished.size(), 2u);
  EXPECT_EQ(h.finished[0], &first);
  EXPECT_EQ(h.finished[1], &second);
  EXPECT_GT(h.scheduler.preemptions(), 0);
  EXPECT_EQ(preempted_first, 0);
  EXPECT_EQ(h.kv.available(), 8);
}

TEST(BatchScheduler, DoesNotLetYoungerOnesOvertakeOneThatDoesNotFitYet) {
  Harness h(10);
  h.add(20, 8);                  // 5 blocks, grows to 7
  Sequence& big = h.add(28, 2);  // 7 blocks: not now
  Sequence& small = h.add(4, 2);
  h.step();
  EXPECT_TRUE(big.blocks.empty());
  EXPECT_TRUE(small.blocks.empty());
  for (int i = 0; i < 30; ++i) h.step();
  EXPECT_EQ(h.finished.size(), 3u);
}

TEST(BatchScheduler, PassesOverSequencesWhoseAdapterIsNotThere) {
  Harness h(100);
  Sequence& waits = h.add(4, 2, sha256("a"));
  waits.adapter_ready = false;
  h.add(4, 2);
  EXPECT_TRUE(h.scheduler.has_runnable());
  h.step();
  h.step();
  EXPECT_EQ(h.finished.size(), 1u);
  EXPECT_FALSE(h.scheduler.has_runnable());
  waits.adapter_ready = true;
  EXPECT_TRUE(h.scheduler.has_runnable());
  h.step();
  h.step();
  EXPECT_EQ(h.finished.size(), 2u);
}

TEST(BatchScheduler, ReportsASequenceThatCanNeverFit) {
  Harness h(4);
  Sequence& s = h.add(40, 2);
  EXPECT_EQ(h.step().too_large, (std::vector<Sequence*>{&s}));
  EXPECT_EQ(h.scheduler.waiting(), 0);
  // One that outgrows memory while it runs alone is reported too, not retried for ever.
  Sequence& grows = h.add(14, 10);
  bool reported = false;
  for (int i = 0; i < 20 && !reported; ++i) {
    const auto& out = h.step().too_large;
    reported = std::find(out.begin(), out.end(), &grows) != out.end();
  }
  EXPECT_TRUE(reported);
  EXPECT_EQ(h.kv.available(), 4);
}

TEST(BatchScheduler, ReusesCachedPrefixesButAlwaysComputesTheLastToken) {
  Harness h(100, limits(), true);
  Sequence& first = h.add(8, 1);
  h.step();
  Sequence& again = h.add(8, 1);
  again.tokens = std::vector<std::int32_t>(first.tokens.begin(), first.tokens.begin() + 8);
  const Batch& batch = h.step();
  EXPECT_EQ(again.cached_tokens, 4);  // of two full blocks one: the last token must run
  EXPECT_EQ(batch.rows[0].begin, 4);
  Sequence& scored = h.add(8, 1);
  scored.tokens = again.tokens;
  scored.tokens.resize(8);
  scored.reusable = 3;  // outputs from row 3 on are wanted
  EXPECT_EQ(h.step().rows[0].begin, 0);
}

TEST(BatchScheduler, ShrinkingKvPreemptsHoldersOfWhatGoesAndGrowsBack) {
  Harness h(12);
  Sequence& a = h.add(12, 6);
  Sequence& b = h.add(12, 6);
  h.step();
  h.scheduler.set_kv_limit(5);
  EXPECT_FALSE(a.blocks.empty());
  EXPECT_TRUE(b.blocks.empty());
  for (int i = 0; i < 40; ++i) h.step();
  EXPECT_EQ(h.finished.size(), 2u);
  h.scheduler.set_kv_limit(12);
  EXPECT_EQ(h.kv.available(), 12);
}

TEST(BatchScheduler, PenaltyHistoriesTakeTurnsWithinTheirBound) {
  BatchLimits l = limits();
  l.history_max = 10;
  Harness h(100, l);
  std::vector<Sequence*> all;
  for (int i = 0; i < 3; ++i) {
    Sequence& s = h.add(6, 1000);
    s.penalized = true;
    s.history.add_prompt(s.tokens);
    all.push_back(&s);
  }
  for (int i = 0; i < 30; ++i) {
    std::int64_t entries = 0;
    for (const BatchRows& rows : h.step().rows)
      if (rows.sample) entries += rows.sequence->history.size();
    EXPECT_LE(entries, 10);
  }
  for (Sequence* s : all) EXPECT_GE(s->size(), 6 + 8);
}

// Any load: rows are right, budgets hold, blocks are never shared wrongly, all finish.
TEST(BatchScheduler, HoldsItsPromisesUnderRandomLoad) {
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    Random random(seed);
    BatchLimits l = limits();
    l.token_budget = 9 + static_cast<std::int64_t>(random.below(30));
    l.prefill_chunk_max = static_cast<std::int64_t>(random.below(3)) * 7;
    l.adapters_max = 1 + static_cast<std::int64_t>(random.below(3));
    Harness h(12 + static_cast<std::int64_t>(random.below(20)), l, random.below(2) == 1);
    std::size_t added = 0, cancelled = 0;
    for (int i = 0; i < 3000 && h.finished.size() + cancelled < 25; ++i) {
      if (added < 25 && random.below(3) == 0) {
        Sequence& s = h.add(1 + static_cast<std::int64_t>(random.below(20)),
                            1 + static_cast<std::int64_t>(random.below(20)),
                            random.below(2) ? sha256(str(random.below(4))) : Digest{});
        for (auto& t : s.tokens) t %= 3;  // prefixes meet
        ++added;
      }
      const Batch& batch = h.step();
      ASSERT_TRUE(batch.too_large.empty());
      std::set<Digest> adapters;
      std::int64_t tokens = 0;
      for (const BatchRows& rows : batch.rows) {
        ASSERT_GT(rows.count, 0);
        tokens += rows.count;
        if (!rows.sequence->adapter.empty()) adapters.insert(rows.sequence->adapter);
      }
      ASSERT_EQ(tokens, batch.tokens);
      ASSERT_LE(tokens, l.token_budget);
      ASSERT_LE(static_cast<std::int64_t>(adapters.size()), l.adapters_max);
    }
    EXPECT_EQ(h.finished.size(), 25u) << "seed " << seed;
    EXPECT_EQ(h.kv.available(), h.kv.limit());
  }
}

}  // namespace
}  // namespace tandem::worker::serve
