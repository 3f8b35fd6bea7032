// The options that benches of a model share: which model, and which device (bench_device.h).
#pragma once

#include "tools/bench_device.h"

#include <CLI/CLI.hpp>

#include <string>

namespace tandem::tools {

inline void add_model_options(CLI::App& app, std::string& model, std::string& shape,
                              std::string& device) {
  app.add_option("--model", model, "Hugging Face folder or GGUF file");
  app.add_option("--shape", shape, "random weights of this shape, or of a config.json's, instead")
      ->check(CLI::IsMember(bench_shapes()) | CLI::ExistingFile);
  app.add_option("--device", device)->check(CLI::IsMember({"cpu", "cuda"}));
}

}  // namespace tandem::tools
