// The serving engine of one base model on one device: continuous batching over a paged KV cache
// with prefix reuse, rows of any adapters and of none in one batch, on the same weights and forward
// path as training. It solves "which rows run next, and what came out"; it has no threads, sockets
// or names: one device thread (worker/runtime) submits, calls step() while has_work(), and forwards
// the outputs. All device memory comes from arenas; after create() a step allocates none.
//
// Life of a request: submit -> waiting (for its adapter, KV blocks, a place) -> running (prefill in
// chunks, then one token per step; preempted and recomputed when KV is short) -> one output with a
// finish reason. Under Numerics::kInvariant its tokens and logprobs do not depend on any of that.
#pragma once

#include "protocol/base/clock.h"
#include "worker/model/transformer.h"
#include "worker/serve/engine_call.h"
#include "worker/serve/replica.h"
#include "worker/serve/request.h"
#include "worker/text/tokenizer.h"

#include <memory>
#include <optional>
#include <vector>

namespace tandem::worker::serve {

struct ServeOptions {
  std::int64_t kv_bytes_max = std::int64_t{1} << 30;  ///< of keys and values, all layers together
  std::int64_t block_size = 16;                       ///< tokens per KV block: 16 or 32
  std::int64_t max_batch_tokens = 512;  ///< rows of one step, decode and prefill; > max_running
  std::int64_t prefill_chunk_max = 0;  ///< rows of one sequence in one step; 0: what the step holds
  std::int64_t max_running = 32;       ///< sequences that hold KV at once
  std::int64_t max_waiting = 1024;     ///< further ones that wait; beyond: busy_error
  std::int64_t context_max = 0;        ///< prompt + new tokens; 0: the model's own
  std::int64_t adapter_rank_max = 128;   ///< larger adapters are refused
  std::int64_t adapters_max = 256;       ///< installed at once, in slots or not
  std::int64_t adapter_wait_ms = 30000;  ///< a request whose adapter does not come fails after it
  bool prefix_cache = true;
  Digest base_digest;                 ///< root of every prefix key
  std::vector<std::int32_t> eos_ids;  ///< added to the model's own
  /// Allowed row counts of a batch, ascending (one captured graph each); a batch is filled up with
  /// inert rows. Empty: exact row counts.
  std::vector<std::int64_t> token_buckets;
};

/// What the engine runs on; everything outlives it.
struct ServeParts {
  kernels::Allocator& allocator;
  kernels::MemoryLedger& ledger;
  model::Context& context;  ///< activations and workspace are used inside a step only
  model::WeightSource& weights;
  model::AdapterTable* adapters = nullptr;      ///< null: base only
  std::int64_t slot_begin = 0, slot_count = 0;  ///< the slots of the table that serving may set
  std::optional<text::Tokenizer> tokenizer;     ///< absent: no text, and stop strings are refused
  const Clock& clock;
  const ReplicaRanks* ranks = nullptr;  ///< a sharded replica; null: this rank is all of it
};

/// KV geometry, a pure function: the estimator and admission use the same.
struct KvLayout {
  std::int64_t block_bytes = 0;  ///< of one block: keys and values, all layers
  std::int64_t blocks = 0;       ///< that kv_bytes_max holds
};
/// `config` as the rank's ops see it; `stage`: its blocks, {0, 0} for all.
KvLayout kv_layout(const model::ModelConfig& config, DType dtype, const ServeOptions& options,
                   const model::Stage& stage = {});

struct StepOutput {
  std::vector<SequenceOutput> outputs;                 ///< only requests with news
  std::int64_t prefill_tokens = 0, decode_tokens = 0;  ///< rows that ran
};

struct ServeStats {
  std::int64_t running = 0, waiting = 0;
  std::int64_t kv_blocks_free = 0;   ///< unused or only kept for prefix reuse
  std::int64_t kv_blocks_total = 0;  ///< the present limit
  std::int64_t kv_block_bytes = 0;
  std::int64_t prefix_queries = 0, prefix_hits = 0;  ///< in blocks, since the start
  std::int64_t preemptions = 0;
  std::int64_t steps = 0, prefill_tokens = 0, decode_tokens = 0;  ///< since the start
  double decode_tokens_per_s = 0, prefill_tokens_per_s = 0;       ///< lately, while busy
  std::vector<Digest> resident_adapters;                          ///< most recently used first
};

class ServeEngine {
 public:
  /// Takes its KV and batch buffers. invalid_error: options that contradict each other or the model
  /// (names the option, its limit and value). Throws DeviceError when memory is out.
  static Result<std::unique_ptr<ServeEngine>> create(const ServeParts& parts,
                                                     const ServeOptions& options);
  ~ServeEngine();
  ServeEngine(const ServeEngine&) = delete;
  ServeEngine& operator=(const ServeEngine&) = delete;

  /// Runs the largest batch there can be, all rows inert (once, or once for each kind of products
  /// with adapters), so that arenas hold what any later step needs: after it the ledger's peak is
  /// final, and equal on the meta backend.
  void reserve_worst_case();

  /// Queues a request. invalid_error: empty prompt, token ids outside the vocabulary, over the
  /// context, sampling values out of range. refused_error: needs more KV than there is.
  /// conflict_error: the id is live. busy_error: the queue is full ("retry after N ms").
  Status submit(GenerateRequest request);
  /// New tokens that there is space for after a prompt of so many; none: 0 or less.
  [[nodiscard]] std::int64_t room(std::int64_t prompt_tokens) const;
  /// Its KV and its id are free at once; the next step reports kCancelled, unless the id was
  /// submitted again before. Unknown and finished ids: nothing.
  void cancel(const RequestId& id);
  /// Every live request ends with kError and `why` at the next step.
  void fail_all(const Status& why);

  /// Adapters that waiting requests need and that are not installed, longest wanted first.
  [[nodiscard]] std::vector<Digest> missing_adapters() const;
  /// Makes an adapter servable. Beyond adapters_max the least recently used idle one goes.
  /// refused_error: rank over adapter_rank_max, no slots; busy_error: all are in use. Installing
  /// one that is installed is a no-op.
  Status install_adapter(const Digest& digest,
                         std::shared_ptr<const model::AdapterWeights> weights);
  /// The same with the whole model's tensors, of which a rank of a sharded replica takes its part:
  /// the only way there, and all of them have it then or none: one that has no memory for its part
  /// fails it for all (unavailable_error, with the rank). invalid_error: see build_adapter. Makes
  /// room as make_adapter_room does, on a replica for the largest part that a rank has of it: so
  /// all ranks let the same ones go.
  Status install_adapter(const Digest& digest,
                         const std::vector<model::HostAdapterTensor>& tensors);
  /// Of installed adapters, from now on: idle ones go at once, the least recently used first, those
  /// in use when they are idle. On a replica not told to the others: each rank is given the same.
  void set_adapter_bytes_max(std::int64_t bytes);
  /// Before memory for one more is taken: idle ones go until `bytes` fit. refused_error: more than
  /// all may take; busy_error: those in use leave less.
  Status make_adapter_room(const Digest& digest, std::int64_t bytes);
  /// The adapter cannot be had: requests that wait for it end with kError and `why`.
  void fail_adapter(const Digest& digest, const Status& why);
  /// Forgets an adapter once no live request uses it; its prefix blocks age out.
  void drop_adapter(const Digest& digest);

  /// True when step() would do something: rows to run or outcomes to report. False while all that
  /// is left waits for an adapter that has not come (its time-out makes it true again).
  [[nodiscard]] bool has_work() const;
  /// One iteration: at most one packed batch through the model, each sampled row's token back.
  StepOutput step();
  /// The same in two halves, for a device that works behind this thread's back: start_step() issues
  /// the batch and returns its rows, finish_step() waits for it. Every other call in between waits
  /// for it first. No start before the last one is finished.
  std::int64_t start_step();
  /// finish_step() would not wait.
  [[nodiscard]] bool step_ready() const;
  StepOutput finish_step();

  /// Rows per step from now on, at most max_batch_tokens, more than max_running: a worker that also
  /// trains keeps steps short.
  void set_token_budget(std::int64_t tokens);
  /// Changes how many blocks may be used, at most kv_layout().blocks, and returns the memory beyond
  /// to the device. Prefixes cached there are forgotten and sequences with blocks there preempted
  /// (recomputed later); one that no longer fits at all ends with kError. Returns the bytes of KV
  /// now mapped.
  std::int64_t set_kv_limit(std::int64_t blocks);

  [[nodiscard]] ServeStats stats() const;

  // -- a sharded replica (ServeParts::ranks). Rank 0 is used as any engine; the calls above reach
  // the others with its next step. All others only follow.
  /// Makes the calls of the leader's next frame. False: it was the last one.
  bool follow();
  /// The leader has nothing to run but is still there.
  void keep_alive();
  /// Ends the others' following.
  void end();

 private:
  struct Impl;
  explicit ServeEngine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tandem::worker::serve
