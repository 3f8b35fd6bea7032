// What an op has to do at least, as pure functions of its arguments: operations of its products and
// bytes of the tensors it reads and writes once, each by what a device does at a rate of its own. A
// planner turns them into seconds; the meta backend counts them. Ragged batches are taken at the
// host's bounds, causal attention as half of its square. Any thread.
#pragma once

#include "kernels/op_args.h"

#include <functional>

namespace tandem::kernels {

struct OpCost {
  double product_flops = 0.0;      ///< of matrix products, two per multiply-add
  double weight_grad_flops = 0.0;  ///< of those that give gradients of weights
  double low_rank_flops = 0.0;     ///< of those through an adapter's few columns
  double low_rank_products = 0.0;  ///< how many of these, all sites of an op as one
  double attention_flops = 0.0;    ///< of scores, values and their gradients
  double logits = 0.0;             ///< whose loss and gradient are taken
  double bytes = 0.0;              ///< of device memory
  double row_bytes = 0.0;          ///< likewise, in a pass over rows (norms, rotations, silu)
};

/// Told the cost of every op that a dry run issues, in order.
using OpWatcher = std::function<void(const OpCost&)>;

OpCost op_cost(const LinearArgs& args);
OpCost op_cost(const LinearBackwardArgs& args);
OpCost op_cost(const LinearWeightGradArgs& args);
OpCost op_cost(const RepackWeightArgs& args);
OpCost op_cost(const AttentionArgs& args);
OpCost op_cost(const AttentionBackwardArgs& args);
OpCost op_cost(const PagedAttentionArgs& args);
OpCost op_cost(const LinearCrossEntropyArgs& args);
OpCost op_cost(const CrossEntropyStatsArgs& args);
OpCost op_cost(const CrossEntropyArgs& args);
OpCost op_cost(const AdamWArgs& args);
OpCost op_cost(const SquaredNormArgs& args);
OpCost op_cost(const EmbeddingArgs& args);
OpCost op_cost(const EmbeddingBackwardArgs& args);
OpCost op_cost(const AddRmsNormArgs& args);
OpCost op_cost(const RmsNormBackwardArgs& args);
OpCost op_cost(const RopeArgs& args);
OpCost op_cost(const RopeBackwardArgs& args);
OpCost op_cost(const SiluMulArgs& args);
OpCost op_cost(const SiluMulBackwardArgs& args);
OpCost op_cost(const GatherRowsArgs& args);
OpCost op_cost(const PlaceColumnsArgs& args);
OpCost op_cost(const LogprobArgs& args);
OpCost op_cost(const SampleArgs& args);

}  // namespace tandem::kernels
