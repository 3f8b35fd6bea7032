// Versions of adapters and the names that point at them: the changes that publish, import, alias
// and rollback make to the tables. Names were checked by the caller.
#pragma once

#include "coordinator/context.h"

#include <string>

namespace tandem::coordinator {

struct NewVersion {
  std::string name, manifest;
  Digest digest, base_model;
  std::string job, metadata_json, reason;
};

/// Manifest, version and (unless it is pinned) alias, in this step's transaction.
AdapterVersionRecord add_version(Context& context, const NewVersion& version);

/// Removes the alias; its versions are the caller's business.
void remove_name(Context& context, const std::string& name);

/// How the reason of a change that a rollback made begins.
inline constexpr const char* kRollbackReason = "rollback ";

/// What a rollback of `alias` goes to: the version before the current one that was not itself
/// rolled back from and is still there; adapters.end() when there is none.
decltype(Tables::adapters)::const_iterator version_before(const Tables& tables,
                                                          const AliasRecord& alias);

/// Points `alias` at `target`, making it when there is none.
AliasRecord point_alias(Context& context, const std::string& alias,
                        const AdapterVersionRecord& target, const std::string& reason);

}  // namespace tandem::coordinator
