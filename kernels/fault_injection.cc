#include "kernels/fault_injection.h"

#include "kernels/device_error.h"

#include <filesystem>
#include <fstream>
#include <map>
#include <utility>
#include <vector>

namespace tandem::kernels {
namespace {

struct Fault {
  std::string what, how;  ///< both empty: none
};

Fault read_fault(const std::string& file) {
  Fault fault;
  std::ifstream in(file);
  in >> fault.what >> fault.how;
  return fault;
}

#define TANDEM_FORWARD(op, Args)                        \
  void do_##op(Exec& exec, const Args& args) override { \
    fail_if_asked(#op);                                 \
    inner_->op(exec, args);                             \
  }

class FaultyOps final : public Ops {
 public:
  FaultyOps(std::unique_ptr<Ops> inner, std::string file)
      : inner_(std::move(inner)), file_(std::move(file)) {}

  [[nodiscard]] const DeviceProfile& profile() const override { return inner_->profile(); }
  void synchronize(Exec& exec) override { inner_->synchronize(exec); }
  void replay(Exec& exec, std::uint64_t key, const std::function<void()>& body) override {
    inner_->replay(exec, key, body);
  }
  Stream make_stream(bool urgent) override { return inner_->make_stream(urgent); }
  std::uint64_t mark(Exec& exec) override { return inner_->mark(exec); }
  bool passed(std::uint64_t mark) override { return inner_->passed(mark); }
  [[nodiscard]] std::int64_t packed_weight_bytes(DType dtype, std::int64_t n,
                                                 std::int64_t i) const override {
    return inner_->packed_weight_bytes(dtype, n, i);
  }

 private:
  void fail_if_asked(const char* op) const {
    const Fault fault = read_fault(file_);
    if (fault.what != op) return;
    if (fault.how == "once") std::filesystem::remove(file_);
    throw DeviceError(str("an injected fault in ", op));
  }

  void do_upload(Exec& exec, std::span<const std::byte> host, Tensor to) override {
    inner_->upload(exec, host, to);
  }
  void do_download(Exec& exec, Tensor from, std::span<std::byte> host) override {
    inner_->download(exec, from, host);
  }
  void do_copy(Exec& exec, Tensor from, Tensor to) override { inner_->copy(exec, from, to); }
  void do_fill_zero(Exec& exec, Tensor x) override { inner_->fill_zero(exec, x); }
  void do_pack_weight(Exec& exec, PackedWeight& w, const FillRows& fill) override {
    fail_if_asked("pack_weight");
    std::vector<float> rows(static_cast<std::size_t>(w.n * w.i));
    fill(0, w.n, rows.data());
    const ArenaScope scope(exec.workspace);
    const Tensor staged = exec.workspace.alloc({w.n, w.i}, DType::kF32);
    inner_->upload(exec, std::as_bytes(std::span(rows)), staged);
    inner_->repack_weight(exec, {staged, &w});
  }
  TANDEM_FORWARD(embedding_forward, EmbeddingArgs)
  TANDEM_FORWARD(embedding_backward, EmbeddingBackwardArgs)
  TANDEM_FORWARD(add_rms_norm_forward, AddRmsNormArgs)
  TANDEM_FORWARD(rms_norm_backward, RmsNormBackwardArgs)
  TANDEM_FORWARD(linear_forward, LinearArgs)
  TANDEM_FORWARD(linear_backward, LinearBackwardArgs)
  TANDEM_FORWARD(linear_weight_grad, LinearWeightGradArgs)
  TANDEM_FORWARD(repack_weight, RepackWeightArgs)
  TANDEM_FORWARD(rope_forward, RopeArgs)
  TANDEM_FORWARD(rope_backward, RopeBackwardArgs)
  TANDEM_FORWARD(attention_forward, AttentionArgs)
  TANDEM_FORWARD(attention_backward, AttentionBackwardArgs)
  TANDEM_FORWARD(paged_attention_forward, PagedAttentionArgs)
  TANDEM_FORWARD(silu_mul_forward, SiluMulArgs)
  TANDEM_FORWARD(silu_mul_backward, SiluMulBackwardArgs)
  TANDEM_FORWARD(gather_rows, GatherRowsArgs)
  TANDEM_FORWARD(place_columns, PlaceColumnsArgs)
  TANDEM_FORWARD(linear_cross_entropy, LinearCrossEntropyArgs)
  TANDEM_FORWARD(cross_entropy_stats, CrossEntropyStatsArgs)
  TANDEM_FORWARD(cross_entropy, CrossEntropyArgs)
  TANDEM_FORWARD(logprob, LogprobArgs)
  TANDEM_FORWARD(sample, SampleArgs)
  TANDEM_FORWARD(squared_norm, SquaredNormArgs)
  TANDEM_FORWARD(adamw, AdamWArgs)

  const std::unique_ptr<Ops> inner_;
  const std::string file_;
};

#undef TANDEM_FORWARD

class FaultyAllocator final : public Allocator {
 public:
  FaultyAllocator(std::unique_ptr<Allocator> inner, std::string file)
      : inner_(std::move(inner)), file_(std::move(file)) {}

  Result<void*> reserve(std::int64_t bytes) override { return inner_->reserve(bytes); }
  Result<void*> reserve_for_peers(std::int64_t bytes) override {
    return inner_->reserve_for_peers(bytes);
  }
  Status map(void* base, std::int64_t from, std::int64_t to) override {
    const Fault fault = read_fault(file_);
    if (fault.what == "memory" && mapped_ + to - from > std::atoll(fault.how.c_str()))
      return refused_error(str("device memory is out (an injected fault): ", to - from,
                               " B asked, ", mapped_, " B mapped, ", fault.how, " B allowed"));
    TANDEM_RETURN_IF_ERROR(inner_->map(base, from, to));
    mapped_ += to - from;
    ranges_[base] += to - from;
    return {};
  }
  void unmap(void* base, std::int64_t from, std::int64_t to) override {
    inner_->unmap(base, from, to);
    mapped_ -= to - from;
    ranges_[base] -= to - from;
  }
  void release(void* base, std::int64_t bytes) override {
    inner_->release(base, bytes);
    mapped_ -= std::exchange(ranges_[base], 0);
  }

 private:
  const std::unique_ptr<Allocator> inner_;
  const std::string file_;
  std::int64_t mapped_ = 0;
  std::map<void*, std::int64_t> ranges_;
};

}  // namespace

Backend with_faults(Backend backend, const std::string& file) {
  backend.allocator = std::make_unique<FaultyAllocator>(std::move(backend.allocator), file);
  backend.ops = std::make_unique<FaultyOps>(std::move(backend.ops), file);
  return backend;
}

}  // namespace tandem::kernels
