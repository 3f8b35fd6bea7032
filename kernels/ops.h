// The one interface of the engine's device work. Ops are as coarse as the best kernel: a CPU
// composes, a GPU fuses. Public methods check shapes, dtypes and ranges once for all backends (a
// failure is a bug of the caller and aborts with the values), then call the backend's do_*.
//
// Threads: one device thread calls an Ops. Work is ordered by Exec::stream; the CPU is synchronous.
// Memory: ops allocate nothing but scratch from Exec::workspace, inside a scope; how much is a pure
// function of shapes, dtypes and the device profile (kernels/workspace.h), which is how the meta
// backend knows it. Device failures throw DeviceError. Determinism: every op repeats its bits for
// the same inputs and shapes, whatever the timing.
#pragma once

#include "kernels/device_profile.h"
#include "kernels/exec.h"
#include "kernels/op_args.h"

#include <functional>
#include <memory>
#include <span>

namespace tandem::kernels {

/// Points that Ops::mark() keeps at once.
inline constexpr std::uint64_t kMarksMax = 64;

class Ops {
 public:
  virtual ~Ops() = default;

  [[nodiscard]] virtual const DeviceProfile& profile() const = 0;

  // -- memory traffic -------------------------------------------------------------------------
  /// Copies host bytes to a device tensor of exactly that many bytes.
  void upload(Exec& exec, std::span<const std::byte> host, Tensor to);
  /// Waits for the stream, then copies. The meta backend fills zeros.
  void download(Exec& exec, Tensor from, std::span<std::byte> host);
  void copy(Exec& exec, Tensor from, Tensor to);  ///< same shape; dtype may differ (converts)
  void fill_zero(Exec& exec, Tensor x);
  virtual void synchronize(Exec& exec) = 0;
  /// Runs `body`, which issues ops on `exec` and nothing else. Everything the host puts into them
  /// (shapes, bounds, addresses, numbers) must be a function of `key`; what device tensors hold may
  /// differ; keys of two users of this Ops must differ too. A device with
  /// profile().records_graphs records the ops of a key that comes back and from then on only
  /// replays them.
  virtual void replay(Exec& /*exec*/, std::uint64_t /*key*/, const std::function<void()>& body) {
    body();
  }

  // -- order of work ------------------------------------------------------------------------------
  /// A queue of its own, alive as long as this Ops. Work of an urgent one goes first where both
  /// have some. A device that does everything at once has only the null stream.
  virtual Stream make_stream(bool /*urgent*/) { return {}; }
  /// A point behind everything issued on `exec` so far, and whether the device has passed it. At
  /// most kMarksMax are kept; the device has passed what is older.
  virtual std::uint64_t mark(Exec& /*exec*/) { return 0; }
  virtual bool passed(std::uint64_t /*mark*/) { return true; }

  // -- weights ----------------------------------------------------------------------------------
  /// Bytes pack_weight takes from its arena: pure.
  [[nodiscard]] virtual std::int64_t packed_weight_bytes(DType dtype, std::int64_t n,
                                                         std::int64_t i) const = 0;
  /// Packs host rows W [n, i], converted to `dtype`, into `arena`. Set-up time only. `fill` is
  /// called for blocks of consecutive rows so that the source never exists twice: fill(row,
  /// rows, out f32 [rows, i]); on a GPU's backend from several threads at once.
  using FillRows = std::function<void(std::int64_t row, std::int64_t rows, float* out)>;
  PackedWeight pack_weight(Exec& exec, Arena& arena, DType dtype, std::int64_t n, std::int64_t i,
                           const FillRows& fill);

  // -- forward and backward, side by side --------------------------------------------------------
  void embedding_forward(Exec& exec, const EmbeddingArgs& args);
  void embedding_backward(Exec& exec, const EmbeddingBackwardArgs& args);
  void add_rms_norm_forward(Exec& exec, const AddRmsNormArgs& args);
  void rms_norm_backward(Exec& exec, const RmsNormBackwardArgs& args);
  void linear_forward(Exec& exec, const LinearArgs& args);
  void linear_backward(Exec& exec, const LinearBackwardArgs& args);
  void mlp_backward(Exec& exec, const MlpBackwardArgs& args);
  void linear_weight_grad(Exec& exec, const LinearWeightGradArgs& args);
  void repack_weight(Exec& exec, const RepackWeightArgs& args);
  void rope_forward(Exec& exec, const RopeArgs& args);
  void rope_backward(Exec& exec, const RopeBackwardArgs& args);
  void attention_forward(Exec& exec, const AttentionArgs& args);
  void attention_backward(Exec& exec, const AttentionBackwardArgs& args);
  void paged_attention_forward(Exec& exec, const PagedAttentionArgs& args);
  void silu_mul_forward(Exec& exec, const SiluMulArgs& args);
  void silu_mul_backward(Exec& exec, const SiluMulBackwardArgs& args);
  void gather_rows(Exec& exec, const GatherRowsArgs& args);
  void place_columns(Exec& exec, const PlaceColumnsArgs& args);
  void linear_cross_entropy(Exec& exec, const LinearCrossEntropyArgs& args);
  void cross_entropy_stats(Exec& exec, const CrossEntropyStatsArgs& args);
  void cross_entropy(Exec& exec, const CrossEntropyArgs& args);
  void logprob(Exec& exec, const LogprobArgs& args);
  void sample(Exec& exec, const SampleArgs& args);

  // -- optimizer
  // -----------------------------------------------------------------------------------
  void squared_norm(Exec& exec, const SquaredNormArgs& args);
  void adamw(Exec& exec, const AdamWArgs& args);

 private:
  virtual void do_upload(Exec&, std::span<const std::byte>, Tensor) = 0;
  virtual void do_download(Exec&, Tensor, std::span<std::byte>) = 0;
  virtual void do_copy(Exec&, Tensor, Tensor) = 0;
  virtual void do_fill_zero(Exec&, Tensor) = 0;
  virtual void do_pack_weight(Exec&, PackedWeight&, const FillRows&) = 0;
  virtual void do_embedding_forward(Exec&, const EmbeddingArgs&) = 0;
  virtual void do_embedding_backward(Exec&, const EmbeddingBackwardArgs&) = 0;
  virtual void do_add_rms_norm_forward(Exec&, const AddRmsNormArgs&) = 0;
  virtual void do_rms_norm_backward(Exec&, const RmsNormBackwardArgs&) = 0;
  virtual void do_linear_forward(Exec&, const LinearArgs&) = 0;
  virtual void do_linear_backward(Exec&, const LinearBackwardArgs&) = 0;
  virtual void do_linear_weight_grad(Exec&, const LinearWeightGradArgs&) = 0;
  /// Whether do_linear_weight_grad writes dweight when told to; else it always adds.
  [[nodiscard]] virtual bool overwrites_weight_grads() const { return false; }
  virtual void do_repack_weight(Exec&, const RepackWeightArgs&) = 0;
  virtual void do_rope_forward(Exec&, const RopeArgs&) = 0;
  virtual void do_rope_backward(Exec&, const RopeBackwardArgs&) = 0;
  virtual void do_attention_forward(Exec&, const AttentionArgs&) = 0;
  virtual void do_attention_backward(Exec&, const AttentionBackwardArgs&) = 0;
  virtual void do_paged_attention_forward(Exec&, const PagedAttentionArgs&) = 0;
  virtual void do_silu_mul_forward(Exec&, const SiluMulArgs&) = 0;
  virtual void do_silu_mul_backward(Exec&, const SiluMulBackwardArgs&) = 0;
  virtual void do_gather_rows(Exec&, const GatherRowsArgs&) = 0;
  virtual void do_place_columns(Exec&, const PlaceColumnsArgs&) = 0;
  virtual void do_linear_cross_entropy(Exec&, const LinearCrossEntropyArgs&) = 0;
  virtual void do_cross_entropy_stats(Exec&, const CrossEntropyStatsArgs&) = 0;
  virtual void do_cross_entropy(Exec&, const CrossEntropyArgs&) = 0;
  virtual void do_logprob(Exec&, const LogprobArgs&) = 0;
  virtual void do_sample(Exec&, const SampleArgs&) = 0;
  virtual void do_squared_norm(Exec&, const SquaredNormArgs&) = 0;
  virtual void do_adamw(Exec&, const AdamWArgs&) = 0;
};

/// A device as the worker's main hands it to the engine: where memory comes from and what runs.
struct Backend {
  /// Device memory that is taken now, by whatever the driver counts: this engine's arenas, its
  /// context, its libraries, other processes. A CPU: resident bytes of this process.
  std::function<std::int64_t()> bytes_in_use;
  std::unique_ptr<Allocator> allocator;
  std::unique_ptr<MemoryLedger> ledger;
  std::unique_ptr<Ops> ops;
};

}  // namespace tandem::kernels
