// Which layers of a Hugging Face model have a sliding window: asked by the coordinator, which shows
// where a model's context ends, and by the worker, which holds it there.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <string>

namespace tandem::storage {

struct SlidingWindow {
  bool used = false;       ///< the settings ask for one
  bool in_layers = false;  ///< and it holds in some layer
  std::int64_t size = 0;

  /// What bounds a sequence that every layer is to see whole; 0: nothing does.
  [[nodiscard]] std::int64_t bound() const { return in_layers ? size : 0; }
};

/// As transformers' configurations read it: Mistral's holds in every layer; Qwen's where
/// use_sliding_window says so, in the layers from max_window_layers on or those of layer_types. Its
/// size is 4096 where the file does not speak of it, and null is none. Llama has none. A value of
/// another type counts as absent. `layers`: how many there are.
SlidingWindow sliding_window(const nlohmann::json& config, const std::string& family,
                             std::int64_t layers);

}  // namespace tandem::storage
