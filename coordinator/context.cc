#include "coordinator/context.h"

#include <algorithm>
#include <iterator>

namespace tandem::coordinator {

void Context::put(Write write) {
  ++version_;
  auto back = tables_.apply(write);
  std::move(back.begin(), back.end(), std::back_inserter(undo_));
  writes_.push_back(std::move(write));
}

void Context::put_lazy(Write write) {
  // Behind a write of this step it must stay behind it, or an older record would win on disk.
  if (!writes_.empty()) return put(std::move(write));
  ++version_;
  if (lazy_writes_.empty() && lazy_sends_.empty()) lazy_since_ = now_.ms;
  tables_.apply(write);
  lazy_writes_.push_back(std::move(write));
}

void Context::send_client(const std::string& peer, protocol::ServerMessage message) {
  sends_.emplace_back(SendClient{peer, std::move(message)});
}

void Context::send_worker(const std::string& peer, protocol::ControlMessage message) {
  sends_.emplace_back(SendWorker{peer, std::move(message)});
}

void Context::send_worker_after_commit(const std::string& peer, protocol::ControlMessage message) {
  if (lazy_writes_.empty() && lazy_sends_.empty()) lazy_since_ = now_.ms;
  lazy_sends_.push_back({peer, std::move(message)});
}

std::uint64_t Context::start_work(WorkRequest request) {
  work_.emplace_back(StartWork{++work_ids_, std::move(request)});
  return work_ids_;
}

std::string Context::random_hex(int digits) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (int i = 0; i < digits; ++i) text.push_back(kDigits[random_.below(16)]);
  return text;
}

void Context::undo() {
  for (auto write = undo_.rbegin(); write != undo_.rend(); ++write) tables_.apply(*write);
  undo_.clear();
  lazy_writes_.clear();
  lazy_sends_.clear();
}

std::vector<Effect> Context::take() {
  std::vector<Effect> effects;
  const bool lazy_due =
      (!lazy_writes_.empty() || !lazy_sends_.empty()) &&
      (!writes_.empty() || shutdown_ || now_.ms - lazy_since_ >= options_.limits.lazy_commit_ms);
  if (lazy_due) {
    // Lazy writes are older than this step's, so they go first.
    lazy_writes_.insert(lazy_writes_.end(), std::make_move_iterator(writes_.begin()),
                        std::make_move_iterator(writes_.end()));
    writes_ = std::exchange(lazy_writes_, {});
  }
  if (!writes_.empty()) effects.emplace_back(Persist{std::exchange(writes_, {})});
  if (lazy_due)
    for (SendWorker& send : std::exchange(lazy_sends_, {})) effects.emplace_back(std::move(send));
  std::move(sends_.begin(), sends_.end(), std::back_inserter(effects));
  std::move(work_.begin(), work_.end(), std::back_inserter(effects));
  for (LogLine& line : logs_) effects.emplace_back(std::move(line));
  if (shutdown_) effects.emplace_back(Shutdown{});
  sends_.clear();
  work_.clear();
  logs_.clear();
  shutdown_ = false;
  return effects;
}

}  // namespace tandem::coordinator
