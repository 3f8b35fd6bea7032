#include "storage/store.h"

namespace tandem::storage {

Status scan_prefix(ReadTxn& txn, std::string_view table, std::string_view prefix,
                   const std::function<bool(std::string_view key, std::string_view value)>& visit) {
  const auto cursor = txn.cursor(table);
  for (cursor->seek(prefix); cursor->valid() && cursor->key().starts_with(prefix); cursor->next()) {
    TANDEM_ASSIGN_OR_RETURN(const std::string_view value, cursor->value());
    if (!visit(cursor->key(), value)) return {};
  }
  return cursor->status();
}

Result<std::optional<std::string>> last_key(ReadTxn& txn, std::string_view table,
                                            std::string_view prefix) {
  // 0xff.. after the prefix is above every key that begins with it and has other bytes there.
  const auto cursor = txn.cursor(table);
  cursor->seek_before(std::string(prefix) + std::string(kStoreKeyBytesMax - prefix.size(), '\xff'));
  TANDEM_RETURN_IF_ERROR(cursor->status());
  if (!cursor->valid() || !cursor->key().starts_with(prefix)) return std::optional<std::string>();
  return std::optional<std::string>(cursor->key());
}

}  // namespace tandem::storage
