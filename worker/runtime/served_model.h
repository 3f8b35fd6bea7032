// What ServeHost needs of whoever holds a base model: an engine (one rank, ModelHost) or a
// replica's first rank (replica_rank.h). Device thread.
#pragma once

#include "protocol/messages.h"
#include "worker/model/model_loader.h"
#include "worker/serve/serve_engine.h"

#include <vector>

namespace tandem::worker::runtime {

class ServedModel {
 public:
  virtual ~ServedModel() = default;
  [[nodiscard]] virtual const protocol::ModelRef& ref() const = 0;
  [[nodiscard]] virtual const model::ModelConfig& config() const = 0;  ///< of the whole model
  [[nodiscard]] virtual const model::GenerationDefaults& generation() const = 0;
  virtual serve::ServeEngine& serve() = 0;
  /// Makes an adapter servable from its whole tensors: on all ranks or on none. Errors: shapes that
  /// do not fit the model, and those of ServeEngine::install_adapter.
  virtual Status load_adapter(const Digest& digest,
                              const std::vector<model::HostAdapterTensor>& tensors) = 0;
  /// Token ids of a request's input; see encode_input (encoder.h).
  [[nodiscard]] virtual Result<std::vector<std::int32_t>> tokenize(
      const protocol::PromptInput& input) const = 0;
};

}  // namespace tandem::worker::runtime
