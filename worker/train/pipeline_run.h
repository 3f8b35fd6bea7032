// Runs one step's micro-batches through this rank's stages, as pipeline_schedule says. What lives
// from a unit's forward to its backward lies in an arena of its own (they are not freed in reverse
// of how they came); what backward needs for itself comes from the context's arena.
// One device thread; every rank of the pipeline calls it at once.
#pragma once

#include "worker/model/transformer.h"
#include "worker/train/device_batch.h"
#include "worker/train/pipeline_schedule.h"
#include "worker/train/ranks.h"

#include <functional>
#include <memory>
#include <vector>

namespace tandem::worker::train {

class PipelineRunner {
 public:
  PipelineRunner(kernels::Allocator& allocator, kernels::MemoryLedger& ledger,
                 const model::Context& context, model::WeightSource& weights,
                 const model::AdapterTable& adapters, const Ranks& ranks,
                 model::Recompute recompute);

  struct Step {
    std::vector<std::int64_t> rows;  ///< of each micro-batch's tensors, the same on every stage
    /// Puts micro-batch m on the device, in the given context's arena.
    std::function<DeviceBatch(model::Context&, std::size_t m)> upload;
    float gradient_scale = 1.0f;
    model::GradSink& sink;
    int whole = 0;  ///< micro-batches of a step that is not an epoch's last, see pipeline_schedule
  };
  /// The sum of losses (last stage; 0 on the others).
  double run(const Step& step);
  /// One forward without backward: hidden rows of the final norm on the last stage.
  void forward_only(const DeviceBatch& batch, kernels::Tensor hidden);

 private:
  struct Flight {
    std::unique_ptr<kernels::Arena> arena;
    DeviceBatch batch;
    kernels::Tensor hidden;
    model::Saved saved;
  };
  /// Buffers that are filled and used in turn.
  struct Ring {
    std::vector<kernels::Tensor> buffers;
    std::size_t filled = 0, used = 0;
    kernels::Tensor fill() { return buffers[filled++ % buffers.size()]; }
    kernels::Tensor use() { return buffers[used++ % buffers.size()]; }
  };
  struct Buffers;
  void forward(const Step& step, const PipelineAction& action, kernels::Tensor in);
  double backward(const Step& step, const PipelineAction& action, kernels::Tensor received,
                  kernels::Tensor din);
  void exchange(const PipelineAction& action, Buffers& buffers);
  [[nodiscard]] int next() const { return (ranks_.pp_rank() + 1) % ranks_.layout.pp; }
  [[nodiscard]] int previous() const {
    return (ranks_.pp_rank() + ranks_.layout.pp - 1) % ranks_.layout.pp;
  }
  /// Whether a chunk is the model's first or last stage.
  [[nodiscard]] bool first(int chunk) const { return ranks_.pp_rank() == 0 && chunk == 0; }
  [[nodiscard]] bool last(int chunk) const {
    return next() == 0 && chunk + 1 == static_cast<int>(chunks_.size());
  }

  kernels::Allocator& allocator_;
  kernels::MemoryLedger& ledger_;
  model::Context ctx_;
  const Ranks& ranks_;
  const model::Recompute recompute_;
  std::vector<model::Transformer> chunks_;  ///< this rank's stages
  std::vector<Flight> flights_;             ///< by slot
};

}  // namespace tandem::worker::train
