#include "worker/serve/batch_scheduler.h"

#include "protocol/base/check.h"

#include <algorithm>
#include <tuple>

namespace tandem::worker::serve {

namespace {

bool older(const Sequence* a, const Sequence* b) {
  return a->age < b->age;
}

void insert_by_age(std::vector<Sequence*>& list, Sequence* sequence) {
  list.insert(std::upper_bound(list.begin(), list.end(), sequence, older), sequence);
}

bool erase(std::vector<Sequence*>& list, Sequence* sequence) {
  const auto at = std::find(list.begin(), list.end(), sequence);
  if (at == list.end()) return false;
  list.erase(at);
  return true;
}

}  // namespace

BatchScheduler::BatchScheduler(KvBlocks& kv, BatchLimits limits, Digest base)
    : kv_(kv), limits_(limits), base_(base) {
  TANDEM_CHECK_GT(limits.token_budget, limits.running_max);
  TANDEM_CHECK_GT(limits.running_max, 0);
  TANDEM_CHECK_GT(limits.block_size, 0);
}

void BatchScheduler::add(Sequence* sequence) {
  TANDEM_CHECK_GT(sequence->size(), 0);
  insert_by_age(waiting_, sequence);
}

void BatchScheduler::remove(Sequence* sequence) {
  give_back(sequence);
  if (!erase(running_, sequence)) TANDEM_CHECK(erase(waiting_, sequence), "unknown sequence");
}

bool BatchScheduler::has_runnable() const {
  if (!running_.empty()) return true;
  return std::any_of(waiting_.begin(), waiting_.end(),
                     [](const Sequence* s) { return s->adapter_ready; });
}

void BatchScheduler::next(Batch& batch) {
  batch.rows.clear();
  batch.too_large.clear();
  batch.tokens = batch.prefill_tokens = batch.preempted = 0;
  ++step_;
  grow_running(batch);
  if (batch.preempted == 0) admit_waiting(batch);
  choose_adapters();
  choose_histories();
  pick_rows(batch);
}

// Every running sequence gets the blocks of its known tokens, oldest first, at the cost of the
// youngest.
void BatchScheduler::grow_running(Batch& batch) {
  for (std::size_t i = 0; i < running_.size(); ++i) {
    Sequence* sequence = running_[i];
    while (static_cast<std::int64_t>(sequence->blocks.size()) < blocks_for(sequence->size())) {
      if (const auto block = kv_.allocate()) {
        sequence->blocks.push_back(*block);
        continue;
      }
      Sequence* youngest = running_.back();
      preempt(youngest);
      ++batch.preempted;
      if (youngest == sequence) break;
    }
  }
}

void BatchScheduler::admit_waiting(Batch& batch) {
  for (std::size_t i = 0; i < waiting_.size();) {
    Sequence* sequence = waiting_[i];
    if (!sequence->adapter_ready) {
      ++i;
      continue;
    }
    if (blocks_for(sequence->size()) > kv_.limit()) {
      waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(i));
      batch.too_large.push_back(sequence);
      continue;
    }
    if (running() >= limits_.running_max || !admit(sequence, running_.empty())) return;
    waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(i));
    insert_by_age(running_, sequence);
  }
}

// All blocks of the known tokens are taken at once: prefills never wait for each other half-way.
// One spare block per running sequence is left so that a newcomer is not preempted at once.
bool BatchScheduler::admit(Sequence* sequence, bool alone) {
  const std::int64_t reusable =
      std::min(sequence->reusable, sequence->size() - 1) / limits_.block_size;
  extend_keys(sequence, reusable);
  std::vector<std::int32_t> blocks =
      kv_.match(std::span(sequence->keys).subspan(1, static_cast<std::size_t>(reusable)));
  const auto cached = static_cast<std::int64_t>(blocks.size());
  const std::int64_t spare = alone ? 0 : running() + 1;
  if (kv_.available() < blocks_for(sequence->size()) - cached + spare) {
    for (auto b = blocks.rbegin(); b != blocks.rend(); ++b) kv_.release(*b);
    return false;
  }
  while (static_cast<std::int64_t>(blocks.size()) < blocks_for(sequence->size()))
    blocks.push_back(*kv_.allocate());
  prefix_queries_ += reusable;
  prefix_hits_ += cached;
  sequence->blocks = std::move(blocks);
  sequence->computed = cached * limits_.block_size;
  sequence->published = cached;
  if (!sequence->admitted_before) sequence->cached_tokens = sequence->computed;
  sequence->admitted_before = true;
  return true;
}

void BatchScheduler::choose_adapters() {
  service_.clear();
  for (const Sequence* s : running_) {
    if (s->adapter.empty()) continue;
    const auto at = std::find_if(service_.begin(), service_.end(),
                                 [&](const Service& x) { return x.adapter == s->adapter; });
    if (at == service_.end())
      service_.push_back({s->adapter, s->last_step, s->age});
    else
      at->last_step = std::max(at->last_step, s->last_step);
  }
  if (static_cast<std::int64_t>(service_.size()) <= limits_.adapters_max) return;
  std::sort(service_.begin(), service_.end(), [](const Service& a, const Service& b) {
    return std::tie(a.last_step, a.age) < std::tie(b.last_step, b.age);
  });
  service_.resize(static_cast<std::size_t>(limits_.adapters_max));
}

bool BatchScheduler::chosen(const Digest& adapter) const {
  if (adapter.empty()) return true;
  return std::any_of(service_.begin(), service_.end(),
                     [&](const Service& x) { return x.adapter == adapter; });
}

// Penalty histories of one step are bounded; when they do not fit together, who ran longest ago
// goes first.
void BatchScheduler::choose_histories() {
  order_.clear();
  std::int64_t total = 0;
  for (Sequence* s : running_) {
    s->held_back = false;
    if (!s->penalized) continue;
    total += s->history.size();
    order_.push_back(s);
  }
  if (total <= limits_.history_max) return;
  std::sort(order_.begin(), order_.end(), [](const Sequence* a, const Sequence* b) {
    return std::tie(a->last_step, a->age) < std::tie(b->last_step, b->age);
  });
  std::int64_t taken = 0;
  for (Sequence* s : order_) {
    s->held_back = taken + s->history.size() > limits_.history_max;
    if (!s->held_back) taken += s->history.size();
  }
}

void BatchScheduler::pick_rows(Batch& batch) {
  order_.assign(running_.begin(), running_.end());
  // Decoding before prefill; among decoding ones who waited longest (all equal unless adapters or
  // penalty histories had to take turns).
  std::stable_sort(order_.begin(), order_.end(), [](const Sequence* a, const Sequence* b) {
    const bool da = a->pending() == 1, db = b->pending() == 1;
    if (da != db) return da;
    return da && a->last_step < b->last_step;
  });
  for (Sequence* s : order_) {
    const std::int64_t left = limits_.token_budget - batch.tokens;
    if (left == 0) break;
    if (s->held_back || !chosen(s->adapter)) continue;
    const std::int64_t chunk =
        limits_.prefill_chunk_max > 0 ? std::min(left, limits_.prefill_chunk_max) : left;
    const std::int64_t count = std::min(s->pending(), chunk);
    const bool sample = s->wants_token && count == s->pending();
    if (s->pending() > 1) batch.prefill_tokens += count;
    batch.rows.push_back({s, s->computed, count, sample});
    batch.tokens += count;
  }
  std::stable_sort(
      batch.rows.begin(), batch.rows.end(), [](const BatchRows& a, const BatchRows& b) {
        return a.sequence->adapter < b.sequence->adapter;  // the empty digest is the smallest
      });
}

void BatchScheduler::commit(const Batch& batch) {
  for (const BatchRows& rows : batch.rows) {
    Sequence* s = rows.sequence;
    s->computed += rows.count;
    s->last_step = step_;
    const std::int64_t full = s->computed / limits_.block_size;
    if (full == s->published) continue;
    extend_keys(s, full);
    for (; s->published < full; ++s->published) {
      const auto i = static_cast<std::size_t>(s->published);
      kv_.insert(s->keys[i + 1], s->blocks[i]);
    }
  }
}

void BatchScheduler::set_kv_limit(std::int64_t blocks) {
  kv_.set_limit(blocks);
  for (std::size_t i = running_.size(); i-- > 0;) {
    Sequence* s = running_[i];
    if (std::any_of(s->blocks.begin(), s->blocks.end(), [&](auto b) { return b >= blocks; }))
      preempt(s);
  }
}

void BatchScheduler::preempt(Sequence* sequence) {
  ++preemptions_;
  give_back(sequence);
  TANDEM_CHECK(erase(running_, sequence), "preempted a sequence that does not run");
  insert_by_age(waiting_, sequence);
}

void BatchScheduler::give_back(Sequence* sequence) {
  for (auto b = sequence->blocks.rbegin(); b != sequence->blocks.rend(); ++b) kv_.release(*b);
  sequence->blocks.clear();
  sequence->computed = sequence->published = 0;
}

void BatchScheduler::extend_keys(Sequence* sequence, std::int64_t full_blocks) {
  auto& keys = sequence->keys;
  if (keys.empty()) keys.push_back(prefix_root(base_, sequence->adapter));
  while (static_cast<std::int64_t>(keys.size()) <= full_blocks) {
    const std::int64_t begin = (static_cast<std::int64_t>(keys.size()) - 1) * limits_.block_size;
    keys.push_back(
        prefix_key(keys.back(), std::span(sequence->tokens)
                                    .subspan(static_cast<std::size_t>(begin),
                                             static_cast<std::size_t>(limits_.block_size))));
  }
}

}  // namespace tandem::worker::serve
