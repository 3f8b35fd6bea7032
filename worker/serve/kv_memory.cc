#include "worker/serve/kv_memory.h"

#include "protocol/base/units.h"

namespace tandem::worker::serve {

namespace {

std::int64_t plane_bytes(const model::ModelConfig& config, DType dtype, std::int64_t block_size) {
  return config.kv_heads * block_size * config.head_dim * dtype_bytes(dtype);
}

}  // namespace

KvLayout kv_layout(const model::ModelConfig& config, DType dtype, const ServeOptions& options,
                   const model::Stage& stage) {
  KvLayout layout;
  const std::int64_t layers = stage.last > 0 ? stage.last - stage.first : config.layers;
  layout.block_bytes = 2 * layers * plane_bytes(config, dtype, options.block_size);
  layout.blocks = options.kv_bytes_max / layout.block_bytes;
  return layout;
}

KvMemory::KvMemory(kernels::Allocator& allocator, kernels::MemoryLedger& ledger,
                   const model::ModelConfig& config, const model::Stage& stage, DType dtype,
                   std::int64_t blocks, std::int64_t block_size)
    : plane_bytes_(plane_bytes(config, dtype, block_size)) {
  const kernels::Shape shape{blocks, config.kv_heads, block_size, config.head_dim};
  const std::int64_t bytes = round_up(blocks * plane_bytes_, kernels::kDeviceAlignment);
  caches_.resize(static_cast<std::size_t>(config.layers));
  for (std::int64_t layer = stage.first; layer < stage.last; ++layer) {
    kernels::KvCache& cache = caches_[static_cast<std::size_t>(layer)];
    cache.block_size = block_size;
    for (kernels::Tensor* tensor : {&cache.k, &cache.v}) {
      arenas_.push_back(std::make_unique<kernels::Arena>(
          allocator, ledger, kernels::MemoryKind::kKv,
          str("kv layer ", layer, tensor == &cache.k ? " keys" : " values"), bytes));
      *tensor = arenas_.back()->alloc(shape, dtype);
    }
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
