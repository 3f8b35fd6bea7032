// What the benches share: which device they run on and which model. A model is a file, or the shape
// of a well-known one or of a config.json with random weights (speed does not depend on what they
// say).
#pragma once

#include "kernels/ops.h"
#include "worker/model/model_loader.h"

#include <string>
#include <vector>

namespace tandem::tools {

/// "cpu" (with so many threads) or "cuda" (GPU `index`). refused_error: it does not compute in
/// `dtype`.
Result<kernels::Backend> open_bench_device(const std::string& device, int threads, int index = 0,
                                           const std::string& dtype = "f32");

/// Names that load_bench_model takes for `shape`.
std::vector<std::string> bench_shapes();

/// `path` of a model, or, when that is empty, `shape`, one of those or the path of a config.json,
/// with random weights.
Result<worker::model::LoadedModel> load_bench_model(const std::string& path,
                                                    const std::string& shape);

}  // namespace tandem::tools
