// The core's tables in the registry: reads them at start, writes each step's changes as one
// transaction. The only place that maps the core's records to the registry's. One thread.
#pragma once

#include "coordinator/records.h"
#include "protocol/base/result.h"
#include "storage/registry.h"

#include <vector>

namespace tandem::coordinator {

class RegistryStore {
 public:
  /// `registry` outlives this.
  explicit RegistryStore(storage::Registry& registry) : registry_(registry) {}

  /// Everything the core starts from. Errors: corrupt (which record, and what to do).
  Result<Snapshot> load();
  /// All or nothing, durable on return. Errors: internal (full), corrupt.
  Status commit(const std::vector<Write>& writes);
  /// The newest `count` events of a job, oldest first.
  Result<std::vector<JobEventRecord>> events(const JobId& job, std::size_t count);

 private:
  storage::Registry& registry_;
};

}  // namespace tandem::coordinator
