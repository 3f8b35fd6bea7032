// The one exception type of the engine: a device, its libraries or its memory failed inside a step.
// Thrown by arenas and by the backends' check macros, caught in exactly one place (worker/runtime),
// where the engine process ends and its agent starts another.
#pragma once

#include <stdexcept>
#include <string>

namespace tandem::kernels {

class DeviceError : public std::runtime_error {
 public:
  explicit DeviceError(const std::string& what) : std::runtime_error(what) {}
};

}  // namespace tandem::kernels
