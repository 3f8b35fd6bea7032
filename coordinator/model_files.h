// What the coordinator learns of a base model from its files: format, family, sizes, the manifest
// that is its identity, and each file's content root, by which workers fetch it. Reads every byte;
// belongs on a background thread.
#pragma once

#include "coordinator/effects.h"
#include "protocol/base/result.h"

#include <string>
#include <vector>

namespace tandem::coordinator {

/// `roots`: directories that the real path must lie in; empty: any. `threads` hash. Errors:
/// not_found, refused (outside the roots; a format, family or element type that is not supported),
/// corrupt (names the file).
Result<ModelHashed> hash_model(const HashModel& request, const std::vector<std::string>& roots,
                               int threads);

}  // namespace tandem::coordinator
