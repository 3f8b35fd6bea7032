#include "storage/memory_store.h"

#include "storage/sealed_value.h"

#include <algorithm>
#include <map>
#include <mutex>

namespace tandem::storage {

namespace {

// Values are kept sealed, as on disk, so that detection can be tested here too.
using Table = std::map<std::string, std::string, std::less<>>;
using Tables = std::map<std::string, std::shared_ptr<Table>, std::less<>>;

}  // namespace

struct MemoryStore::State {
  std::vector<std::string> names;
  Tables tables;
  std::mutex mutex;         // tables, and the fields below
  std::mutex writer;        // held by the write transaction
  std::uint64_t lives = 0;  // counts crashes
  int failing_commits = 0;
  Status failure;
};

namespace {

class MemoryCursor final : public StoreCursor {
 public:
  MemoryCursor(std::string table, std::shared_ptr<const Table> data)
      : table_(std::move(table)), data_(std::move(data)), at_(data_->end()) {}
  void seek(std::string_view key) override { at_ = data_->lower_bound(key); }
  void next() override {
    if (at_ != data_->end()) ++at_;
  }
  [[nodiscard]] bool valid() const override { return at_ != data_->end(); }
  [[nodiscard]] std::string_view key() const override { return at_->first; }
  [[nodiscard]] Result<std::string_view> value() const override {
    return unseal(table_, at_->first, at_->second);
  }
  [[nodiscard]] Status status() const override { return {}; }

 private:
  std::string table_;
  std::shared_ptr<const Table> data_;
  Table::const_iterator at_;
};

// Reads a snapshot: tables are copied by a writer that finds them shared.
class MemoryTxn final : public WriteTxn {
 public:
  MemoryTxn(std::shared_ptr<MemoryStore::State> state, bool writing) : state_(std::move(state)) {
    if (writing) lock_ = std::unique_lock(state_->writer);
    std::lock_guard lock(state_->mutex);
    tables_ = state_->tables;
    life_ = state_->lives;
  }

  Result<std::optional<std::string_view>> get(std::string_view table,
                                              std::string_view key) override {
    const Table& data = *table_named(table);
    const auto at = data.find(key);
    if (at == data.end()) return std::optional<std::string_view>();
    TANDEM_ASSIGN_OR_RETURN(const std::string_view value, unseal(table, key, at->second));
    return std::optional<std::string_view>(value);
  }
  std::unique_ptr<StoreCursor> cursor(std::string_view table) override {
    return std::make_unique<MemoryCursor>(std::string(table), table_named(table));
  }
  Status put(std::string_view table, std::string_view key, std::string_view value) override {
    if (key.empty() || key.size() > kStoreKeyBytesMax)
      return invalid_error(
          str("a key of ", key.size(), " bytes; 1 to ", kStoreKeyBytesMax, " are allowed"));
    (*writable(table))[std::string(key)] = seal(table, key, value);
    return {};
  }
  Status del(std::string_view table, std::string_view key) override {
    writable(table)->erase(std::string(key));
    return {};
  }
  Status commit() override {
    TANDEM_CHECK(lock_.owns_lock(), "commit of a read transaction, or twice");
    const auto unlock = std::move(lock_);
    std::lock_guard lock(state_->mutex);
    if (life_ != state_->lives) return unavailable_error("the store crashed before this commit");
    if (state_->failing_commits > 0) {
      --state_->failing_commits;
      return state_->failure;
    }
    state_->tables = std::move(tables_);
    return {};
  }

 private:
  std::shared_ptr<Table> table_named(std::string_view name) {
    const auto at = tables_.find(name);
    TANDEM_CHECK(at != tables_.end(), "no table ", name);
    return at->second;
  }
  Table* writable(std::string_view name) {
    const auto at = tables_.find(name);
    TANDEM_CHECK(at != tables_.end(), "no table ", name);
    if (owned_.insert({std::string(name), true}).second)
      at->second = std::make_shared<Table>(*at->second);
    return at->second.get();
  }

  std::shared_ptr<MemoryStore::State> state_;
  std::unique_lock<std::mutex> lock_;
  Tables tables_;
  std::map<std::string, bool> owned_;
  std::uint64_t life_ = 0;
};

}  // namespace

MemoryStore::MemoryStore(std::vector<std::string> tables) : state_(std::make_shared<State>()) {
  for (const std::string& name : tables) state_->tables[name] = std::make_shared<Table>();
  state_->names = std::move(tables);
}
MemoryStore::~MemoryStore() = default;

Result<std::unique_ptr<ReadTxn>> MemoryStore::begin_read() {
  return std::unique_ptr<ReadTxn>(std::make_unique<MemoryTxn>(state_, false));
}
Result<std::unique_ptr<WriteTxn>> MemoryStore::begin_write() {
  return std::unique_ptr<WriteTxn>(std::make_unique<MemoryTxn>(state_, true));
}
Status MemoryStore::backup(const std::string&) {
  return refused_error("a store in memory cannot be backed up");
}
Result<StoreStats> MemoryStore::stats() {
  std::lock_guard lock(state_->mutex);
  StoreStats stats;
  for (const auto& [name, table] : state_->tables) {
    stats.entries += static_cast<std::int64_t>(table->size());
    for (const auto& [key, value] : *table)
      stats.used_bytes += static_cast<std::int64_t>(key.size() + value.size());
  }
  return stats;
}
const std::vector<std::string>& MemoryStore::tables() const {
  return state_->names;
}

void MemoryStore::crash() {
  std::lock_guard lock(state_->mutex);
  ++state_->lives;
}
void MemoryStore::fail_commits(int count, Status status) {
  std::lock_guard lock(state_->mutex);
  state_->failing_commits = count;
  state_->failure = std::move(status);
}
bool MemoryStore::flip_bit(std::string_view table, std::string_view key, std::size_t bit) {
  std::lock_guard lock(state_->mutex);
  const auto at = state_->tables.find(table);
  if (at == state_->tables.end()) return false;
  auto copy = std::make_shared<Table>(*at->second);
  const auto value = copy->find(key);
  if (value == copy->end() || bit / 8 >= value->second.size()) return false;
  value->second[bit / 8] = static_cast<char>(value->second[bit / 8] ^ (1 << bit % 8));
  at->second = std::move(copy);
  return true;
}

}  // namespace tandem::storage
