// A checkpoint on a file system that all ranks see: every rank writes its own part at the same
// time, any number of ranks reads it back. One folder per checkpoint. Any thread.
//
// part-R-of-N.safetensors holds rank R's pieces as f32 vectors; the file's metadata has the state's
// JSON and, under each tensor's name, the logical shape and which piece it is.
#pragma once

#include "worker/train/train_session.h"

#include <string>

namespace tandem::worker::train {

/// Writes rank `rank`'s part durably into `folder` (made when missing). The checkpoint is complete
/// when all parts are there.
Status write_state_part(const std::string& folder, int rank, int ranks, const TrainState& state);

/// The whole state. not_found_error: no parts; corrupt_error: a part is missing, damaged, or
/// belongs to another checkpoint.
Result<TrainState> read_state(const std::string& folder);

}  // namespace tandem::worker::train
