#include "worker/serve/kv_memory.h"

#include "protocol/base/units.h"

namespace tandem::worker::serve {

namespace {

std::int64_t plane_bytes(const model::ModelConfig& config, DType dtype, std::int64_t block_size) {
  return config.kv_heads * block_size * config.head_dim * dtype_bytes(dtype);
}

}  // namespace

KvLayout kv_layout(const model::ModelConfig& config, DType dtype, const ServeOptions& options) {
  KvLayout layout;
  layout.block_bytes = 2 * config.layers * plane_bytes(config, dtype, options.block_size);
  layout.blocks = options.kv_bytes_max / layout.block_bytes;
  return layout;
}

KvMemory::KvMemory(kernels::Allocator& allocator, kernels::MemoryLedger& ledger,
                   const model::ModelConfig& config, DType dtype, std::int64_t blocks,
                   std::int64_t block_size)
    : plane_bytes_(plane_bytes(config, dtype, block_size)) {
  const kernels::Shape shape{blocks, config.kv_heads, block_size, config.head_dim};
  const std::int64_t bytes = round_up(blocks * plane_bytes_, kernels::kDeviceAlignment);
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    kernels::KvCache cache;
    cache.block_size = block_size;
    for (kernels::Tensor* tensor : {&cache.k, &cache.v}) {
      arenas_.push_back(std::make_unique<kernels::Arena>(
          allocator, ledger, kernels::MemoryKind::kKv,
          str("kv layer ", layer, tensor == &cache.k ? " keys" : " values"), bytes));
      *tensor = arenas_.back()->alloc(shape, dtype);
    }
    caches_.push_back(cache);
  }
}

std::int64_t KvMemory::set_blocks(std::int64_t blocks) {
  for (auto& arena : arenas_) {
    arena->reset(0);
    arena->alloc_bytes(blocks * plane_bytes_);
    arena->trim();
  }
  return static_cast<std::int64_t>(arenas_.size()) * blocks * plane_bytes_;
}

}  // namespace tandem::worker::serve
