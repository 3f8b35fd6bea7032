// Where the tensors of a block (or of the two ends: embedding, head, final norm) lie in one flat
// buffer: the unit in which masters, gradients and optimizer state are kept, sharded over
// data-parallel ranks, gathered and saved. Tensors that one op reads as a stack (q, k, v; gate, up)
// follow each other, so that the stack is one view. Pure but for upload_flat and
// unpack. Any thread.
#pragma once

#include "worker/model/base_weights.h"

#include <memory>
#include <string>
#include <vector>

namespace tandem::worker::model {

/// Elements to which stacks are aligned: kDeviceAlignment bytes in bf16.
inline constexpr std::int64_t kFlatAlignment = 128;

struct FlatTensor {
  std::string name;                 ///< as in the checkpoint
  std::vector<std::int64_t> shape;  ///< of the logical tensor: [n] or [n, i]
  TensorSlice slice;                ///< what this rank holds, row-major from `begin` on
  std::int64_t begin = 0;           ///< elements from the buffer's start
  bool partial = false;             ///< its gradient is a part of a sum over tensor-parallel ranks
  /// Every tensor-parallel rank holds all of it.
  [[nodiscard]] bool is_whole() const {
    return slice.rows == shape[0] && slice.columns == (shape.size() > 1 ? shape[1] : 1);
  }
  /// Matrices decay, norms and biases do not.
  [[nodiscard]] bool decays() const { return shape.size() > 1; }
  bool counted = true;  ///< of several ranks' equal copies one counts in norms and checkpoints
};

struct FlatLayout {
  std::vector<FlatTensor> tensors;
  std::int64_t elements = 0;
  /// At the end; `aligned` at a multiple of kFlatAlignment, else right behind the last one.
  FlatTensor& add(std::string name, std::vector<std::int64_t> shape, const TensorSlice& slice,
                  bool aligned = true);
  /// The tensor called `name`; null: not here.
  [[nodiscard]] const FlatTensor* find(const std::string& name) const;
};

/// Everything of a block; `config` is the whole model's.
FlatLayout block_layout(const ModelConfig& config, const ModelShard& shard, std::int64_t layer);
/// Embedding (first stage; last stage too when tied), head and final norm (last stage); empty
/// between.
FlatLayout ends_layout(const ModelConfig& config, const ModelShard& shard);

/// The views of a buffer of block_layout / ends_layout, in any dtype, by their use.
BlockGrads block_views(const FlatLayout& layout, const kernels::Tensor& flat);
EndGrads end_views(const FlatLayout& layout, const kernels::Tensor& flat);
/// A buffer of block_layout in cd as a block's weights, where packs_rows().
BlockWeights block_weights(const FlatLayout& layout, const kernels::Tensor& flat);
/// A tensor's part of a buffer, in its local shape.
kernels::Tensor tensor_view(const FlatTensor& tensor, const kernels::Tensor& flat);

/// to = elements [begin, begin + its own) of a buffer, in any floating dtype: slices of the
/// source's tensors, zeros between and behind them. Several threads read, and no row that has none
/// of these elements. Waits for the device.
void upload_flat(kernels::Ops& ops, kernels::Exec& exec, const TensorSource& source,
                 const FlatLayout& layout, std::int64_t begin, const kernels::Tensor& to);
/// Writes a buffer's values (f32 or cd) into packed weights and vectors of the same shapes.
void unpack_block(kernels::Ops& ops, kernels::Exec& exec, const FlatLayout& layout,
                  const kernels::Tensor& flat, const BlockWeights& to);
void unpack_ends(kernels::Ops& ops, kernels::Exec& exec, const FlatLayout& layout,
                 const kernels::Tensor& flat, const BaseWeights& to);

/// Where packs_rows(): the memory of weights that holds a buffer's values [begin, begin + its
/// elements), flat, in cd. All stacks of a buffer, in order; between them lies padding.
struct PlainRows {
  std::int64_t begin = 0;
  kernels::Tensor values;
  bool decays = true;
};
std::vector<PlainRows> plain_block(const FlatLayout& layout, const BlockWeights& block);
std::vector<PlainRows> plain_ends(const FlatLayout& layout, const BaseWeights& ends);

/// A block's packed weights and vectors, allocated and undefined.
BlockWeights allocate_block(kernels::Ops& ops, kernels::Arena& arena, const ModelConfig& local,
                            DType dtype);

/// The tensors of `source` as a tensor-parallel rank sees them. Refers to `source`.
std::unique_ptr<TensorSource> make_shard_source(const TensorSource& source,
                                                const ModelConfig& config, const ModelShard& shard);

}  // namespace tandem::worker::model
