// A store in memory with the semantics of the real one, for tests and simulations: it can lose what
// was not committed, refuse commits and damage values.
#pragma once

#include "storage/store.h"

namespace tandem::storage {

class MemoryStore final : public Store {
 public:
  explicit MemoryStore(std::vector<std::string> tables);
  ~MemoryStore() override;

  [[nodiscard]] Result<std::unique_ptr<ReadTxn>> begin_read() override;
  [[nodiscard]] Result<std::unique_ptr<WriteTxn>> begin_write() override;
  Status backup(const std::string& directory) override;  ///< refused: there is nothing on disk
  [[nodiscard]] Result<StoreStats> stats() override;
  [[nodiscard]] const std::vector<std::string>& tables() const override;

  /// As if the process had died: an open write transaction is undone and its commit fails.
  void crash();
  /// The next `count` commits fail with `status` and do nothing.
  void fail_commits(int count, Status status);
  /// Flips one bit of a stored value; false when there is no such value. For tests of detection.
  bool flip_bit(std::string_view table, std::string_view key, std::size_t bit);

  struct State;

 private:
  std::shared_ptr<State> state_;
};

}  // namespace tandem::storage
