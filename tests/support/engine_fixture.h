// A small engine for tests: one backend, its arenas, a base model and a table of adapter slots, in
// the order in which the runtime builds them.
#pragma once

#include "kernels/meta/meta_backend.h"
#include "tests/support/test_device.h"
#include "worker/model/adapter.h"
#include "worker/model/base_weights.h"
#include "worker/model/context.h"
#include "worker/model/tensor_source.h"
#include "worker/train/train_session.h"

#include <memory>

namespace tandem::test {

inline constexpr std::int64_t kEngineArenaBytes = std::int64_t{1} << 32;  ///< address space only

/// Sizes of a model that runs in microseconds; grouped heads, no width equal to another.
inline worker::model::ModelConfig tiny_config() {
  worker::model::ModelConfig config;
  config.family = "llama";
  config.vocab = 96;
  config.width = 32;
  config.layers = 2;
  config.heads = 4;
  config.kv_heads = 2;
  config.head_dim = 8;
  config.mlp_width = 48;
  config.context_max = 256;
  return config;
}

struct Engine {
  Engine(kernels::Backend owned, const worker::model::ModelConfig& config, DType dtype,
         const worker::model::TensorSource& source, std::int64_t slots = 2)
      : backend(std::move(owned)),
        weight_arena(*backend.allocator, *backend.ledger, kernels::MemoryKind::kWeights, "weights",
                     kEngineArenaBytes),
        table_arena(*backend.allocator, *backend.ledger, kernels::MemoryKind::kAdapters, "slots",
                    kEngineArenaBytes),
        activation_arena(*backend.allocator, *backend.ledger, kernels::MemoryKind::kActivations,
                         "activations", kEngineArenaBytes),
        workspace(*backend.allocator, *backend.ledger, kernels::MemoryKind::kWorkspace, "workspace",
                  kEngineArenaBytes),
        exec{workspace, {}, kernels::Numerics::kInvariant},
        comm(worker::comm::make_single_communicator(
            [this](kernels::Exec& e, kernels::Tensor from, kernels::Tensor to) {
              backend.ops->copy(e, from, to);
            })),
        base(worker::model::BaseWeights::load(*backend.ops, exec, weight_arena, config, dtype,
                                              source)
                 .value()),
        weights(worker::model::make_resident_weights(base)),
        adapters(*backend.ops, exec, table_arena, config, slots),
        context{*backend.ops, exec, *comm, activation_arena, dtype} {}
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  [[nodiscard]] worker::train::SessionParts session_parts(std::int64_t slot = 0) {
    return {*backend.allocator, *backend.ledger, context, *weights, adapters, slot};
  }
  kernels::Tensor upload(const std::vector<std::int32_t>& values) {
    const kernels::Tensor tensor =
        activation_arena.alloc({static_cast<std::int64_t>(values.size())}, DType::kI32);
    backend.ops->upload(exec, std::as_bytes(std::span(values)), tensor);
    return tensor;
  }
  std::vector<float> download(const kernels::Tensor& tensor) {
    std::vector<float> host(static_cast<std::size_t>(tensor.elements()));
    std::vector<std::byte> raw(static_cast<std::size_t>(tensor.bytes()));
    backend.ops->download(exec, tensor, raw);
    load_floats(raw.data(), tensor.dtype, host);
    return host;
  }

  kernels::Backend backend;
  kernels::Arena weight_arena, table_arena, activation_arena, workspace;
  kernels::Exec exec;
  std::unique_ptr<worker::comm::Communicator> comm;
  std::shared_ptr<const worker::model::BaseWeights> base;
  std::unique_ptr<worker::model::WeightSource> weights;
  worker::model::AdapterTable adapters;
  worker::model::Context context;
};

inline std::unique_ptr<Engine> cpu_engine(const worker::model::ModelConfig& config, DType dtype,
                                          std::uint64_t seed = 7, int threads = 2) {
  return std::make_unique<Engine>(make_test_backend(threads), config, dtype,
                                  *worker::model::make_random_source(config, seed));
}

}  // namespace tandem::test
