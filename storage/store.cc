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

}  // namespace tandem::storage
