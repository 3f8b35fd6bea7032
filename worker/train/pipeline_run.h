// Runs one step's micro-batches through this rank's stage, as schedule_1f1b says. What lives from a
// micro-batch's forward to its backward lies in an arena of its own (they are freed in the order in
// which they came, not in reverse); what backward needs for itself comes from the context's arena.
// One device thread; every rank of the pipeline calls it at once.
#pragma once

#include "worker/model/transformer.h"
#include "worker/train/device_batch.h"
#include "worker/train/ranks.h"

#include <functional>
#include <memory>
#include <vector>

namespace tandem::worker::train {

class PipelineRunner {
 public:
  PipelineRunner(kernels::Allocator& allocator, kernels::MemoryLedger& ledger,
                 const model::Context& context, const model::Transformer& transformer,
                 const Ranks& ranks, model::Recompute recompute)
      : allocator_(allocator),
        ledger_(ledger),
        ctx_(context),
        transformer_(transformer),
        ranks_(ranks),
        recompute_(recompute) {}

  struct Step {
    std::vector<std::int64_t> rows;  ///< of each micro-batch's tensors, the same on every stage
    /// Puts micro-batch m on the device, in the given context's arena.
    std::function<DeviceBatch(model::Context&, std::size_t m)> upload;
    float gradient_scale = 1.0f;
    model::GradSink& sink;
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
  Flight& flight(int micro_batch);
  void forward(const Step& step, int m, kernels::Tensor in);
  double backward(const Step& step, int m, kernels::Tensor received, kernels::Tensor din);
  [[nodiscard]] bool first() const { return ranks_.pp_rank() == 0; }
  [[nodiscard]] bool last() const { return ranks_.pp_rank() == ranks_.layout.pp - 1; }

  kernels::Allocator& allocator_;
  kernels::MemoryLedger& ledger_;
  model::Context ctx_;
  const model::Transformer& transformer_;
  const Ranks& ranks_;
  const model::Recompute recompute_;
  std::vector<Flight> flights_;
};

}  // namespace tandem::worker::train
