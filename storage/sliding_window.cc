#include "storage/sliding_window.h"

#include <nlohmann/json.hpp>

#include <algorithm>

namespace tandem::storage {

SlidingWindow sliding_window(const nlohmann::json& config, const std::string& family,
                             std::int64_t layers) {
  const auto integer = [&](const char* key, std::int64_t otherwise) {
    const auto it = config.find(key);
    return it != config.end() && it->is_number_integer() ? it->get<std::int64_t>() : otherwise;
  };
  const bool mistral = family == "mistral";
  const auto size = config.find("sliding_window"), asked = config.find("use_sliding_window"),
             types = config.find("layer_types");
  SlidingWindow window;
  window.used = (mistral || (asked != config.end() && *asked == true && family != "llama")) &&
                (size == config.end() || size->is_number_integer());
  if (!window.used) return window;
  window.size = integer("sliding_window", 4096);
  if (mistral)
    window.in_layers = true;
  else if (types != config.end() && types->is_array())
    window.in_layers = std::find(types->begin(), types->end(), "sliding_attention") != types->end();
  else
    window.in_layers = integer("max_window_layers", 28) < layers;
  return window;
}

}  // namespace tandem::storage
