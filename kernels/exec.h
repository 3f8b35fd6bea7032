// What an op needs to run beside its tensors. Passed explicitly to every op.
#pragma once

#include "kernels/arena.h"

namespace tandem::kernels {

/// Names a claim of exactness (see README): kReplay: same binary, device, layout and batch shapes,
/// segments of adapters among them, give the same bits. kInvariant: a row's bits depend only on its
/// own sequence and adapter.
enum class Numerics : int { kReplay = 0, kInvariant = 1 };

/// One ordered queue of device work. The CPU runs everything at once and has only the null stream.
struct Stream {
  void* handle = nullptr;
};

struct Exec {
  Arena& workspace;  ///< scratch: an op allocates inside its own ArenaScope and leaves nothing
  Stream stream{};
  Numerics numerics = Numerics::kReplay;
  /// A host backend leaves half of its threads to others. Changes no bit.
  bool background = false;
  /// Large products leave so many of a GPU's multiprocessors to other queues. Changes no bit.
  int spare_multiprocessors = 0;
};

}  // namespace tandem::kernels
