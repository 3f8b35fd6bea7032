// Work that reads many bytes, off the loop's thread: hashing models, verifying manifests, registry
// maintenance, key files. Two threads, so that hashing a large model does not hold up a publish.
#pragma once

#include "coordinator/effects.h"
#include "protocol/base/bounded_queue.h"
#include "storage/registry.h"

#include <atomic>
#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace tandem::coordinator {

inline constexpr std::size_t kBackgroundQueueMax = 8192;

struct BackgroundOptions {
  std::vector<std::string> model_roots;  ///< empty: any
  std::string keys_dir;                  ///< "": no keys
  std::string server_public_key;         ///< shown to those for whom a key is made
  int hash_threads = 1;
};

/// Does one piece of work now, on the calling thread.
WorkDone do_work(const StartWork& work, storage::Registry& registry,
                 const BackgroundOptions& options);

class Background {
 public:
  /// `done` is called on a background thread for each piece of work.
  Background(storage::Registry& registry, BackgroundOptions options,
             std::function<void(WorkDone)> done);
  ~Background();
  Background(const Background&) = delete;
  Background& operator=(const Background&) = delete;

  /// Never blocks; a full queue is reported through `done` as kBusy.
  void start(StartWork work);

 private:
  using Queue = BoundedQueue<StartWork>;
  void loop(Queue& queue);

  storage::Registry& registry_;
  const BackgroundOptions options_;
  const std::function<void(WorkDone)> done_;
  Queue quick_{kBackgroundQueueMax}, slow_{kBackgroundQueueMax};
  std::atomic<bool> ending_{false};
  std::thread quick_thread_, slow_thread_;
};

}  // namespace tandem::coordinator
