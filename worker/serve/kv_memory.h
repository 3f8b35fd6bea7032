// The device memory of the paged KV cache: per layer one range for keys and one for values, so that
// shrinking to fewer blocks returns the tail of every range while block ids keep their addresses.
// One device thread.
#pragma once

#include "worker/model/model_config.h"
#include "worker/serve/serve_engine.h"

#include <memory>
#include <vector>

namespace tandem::worker::serve {

class KvMemory {
 public:
  /// Of the layers of `stage`; the other layers' caches are undefined. Maps all blocks. Throws
  /// DeviceError when memory is out.
  KvMemory(kernels::Allocator& allocator, kernels::MemoryLedger& ledger,
           const model::ModelConfig& config, const model::Stage& stage, DType dtype,
           std::int64_t blocks, std::int64_t block_size);

  /// Blocks [0, blocks) stay or become usable; the contents of those that stay are kept. Returns
  /// the bytes in use.
  std::int64_t set_blocks(std::int64_t blocks);
  [[nodiscard]] const std::vector<kernels::KvCache>& caches() const { return caches_; }

 private:
  const std::int64_t plane_bytes_;                       ///< one block of one layer's keys
  std::vector<std::unique_ptr<kernels::Arena>> arenas_;  ///< [2 * layers]: k, v, k, v, ...
  std::vector<kernels::KvCache> caches_;                 ///< [layers]
};

}  // namespace tandem::worker::serve
