// cuDNN's fused attention over packed sequences. The only file that knows cuDNN.
//
// The packed layout is cuDNN's "ragged" one: dims (sequences, heads, seq_len_max, D) with the
// strides of our rows, and per sequence the element offset of its first row. The statistics are
// ragged too, which makes them our lse [T, H].
#include "kernels/cuda/attention.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wunused-variable"
#include <cudnn_frontend.h>
#pragma GCC diagnostic pop

#include <map>
#include <tuple>
#include <unordered_map>

namespace tandem::kernels::cuda {
namespace {

namespace fe = cudnn_frontend;
namespace graph = cudnn_frontend::graph;
using TensorRef = std::shared_ptr<graph::Tensor_attributes>;

enum Uid : std::int64_t {
  kQ = 1,
  kK,
  kV,
  kO,
  kStats,
  kDO,
  kDQ,
  kDK,
  kDV,
  kLengths,
  kOffsetQkv,
  kOffsetOut,
  kOffsetKv,
  kOffsetStats
};

enum class Pass : int { kForward, kForwardWithStats, kBackward };
/// Pass, T, sequences, seq_len_max, heads, kv heads, head dim, scale.
using Key = std::tuple<Pass, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                       std::int64_t, float>;

struct Plan {
  std::shared_ptr<graph::Graph> graph;  ///< null: cuDNN has none
  std::int64_t workspace_bytes = 0;
  std::string refusal;
};

/// The tensors of one graph.
class Builder {
 public:
  Builder(const AttentionSpec& spec, const CudnnAttentionLayout& l)
      : spec_(spec), sequences_(l.sequences), length_(l.seq_len_max) {
    g_->set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    width_ = (spec.heads + 2 * spec.kv_heads) * spec.head_dim;
    lengths = index("lengths", kLengths, sequences_);
    qkv = index("qkv_offsets", kOffsetQkv, sequences_ + 1);
    out = index("out_offsets", kOffsetOut, sequences_ + 1);
  }

  TensorRef index(const char* name, std::int64_t uid, std::int64_t count) {
    return g_->tensor(graph::Tensor_attributes()
                          .set_name(name)
                          .set_uid(uid)
                          .set_dim({count, 1, 1, 1})
                          .set_stride({1, 1, 1, 1})
                          .set_data_type(fe::DataType_t::INT32));
  }
  graph::Tensor_attributes ragged(std::int64_t uid, std::int64_t heads, std::int64_t row,
                                  std::int64_t dim, const TensorRef& offsets) const {
    graph::Tensor_attributes t;
    t.set_uid(uid)
        .set_dim({sequences_, heads, length_, dim})
        .set_stride({row * length_, dim, row, 1})
        .set_ragged_offset(offsets);
    return t;
  }
  /// As the graph's operand or, by `to`, its result.
  TensorRef operand(const char* name, const graph::Tensor_attributes& t) {
    return g_->tensor(graph::Tensor_attributes(t).set_name(name));
  }
  static void result(const TensorRef& to, const graph::Tensor_attributes& t) {
    to->set_output(true).set_uid(t.get_uid()).set_dim(t.get_dim()).set_stride(t.get_stride());
    to->set_ragged_offset(graph::Tensor_attributes(t).get_ragged_offset());
  }
  graph::Tensor_attributes q_like(std::int64_t uid) const {
    return ragged(uid, spec_.heads, width_, spec_.head_dim, qkv);
  }
  graph::Tensor_attributes kv_like(std::int64_t uid) const {
    return ragged(uid, spec_.kv_heads, width_, spec_.head_dim, qkv);
  }
  graph::Tensor_attributes out_like(std::int64_t uid) const {
    return ragged(uid, spec_.heads, spec_.heads * spec_.head_dim, spec_.head_dim, out);
  }
  graph::Tensor_attributes stats_like() {
    return ragged(kStats, spec_.heads, spec_.heads, 1,
                  index("stats_offsets", kOffsetStats, sequences_ + 1))
        .set_data_type(fe::DataType_t::FLOAT);
  }

  void forward(bool with_stats) {
    auto options = graph::SDPA_attributes()
                       .set_name("attention")
                       .set_generate_stats(with_stats)
                       .set_padding_mask(true)
                       .set_seq_len_q(lengths)
                       .set_seq_len_kv(lengths)
                       .set_attn_scale(spec_.scale)
                       .set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
                       .set_diagonal_band_right_bound(0);
    auto [o, stats] = g_->sdpa(operand("q", q_like(kQ)), operand("k", kv_like(kK)),
                               operand("v", kv_like(kV)), options);
    result(o, out_like(kO));
    if (!with_stats) return;
    result(stats, stats_like());
    stats->set_data_type(fe::DataType_t::FLOAT);
  }

  void backward(std::int64_t tokens) {
    auto options = graph::SDPA_backward_attributes()
                       .set_name("attention_backward")
                       .set_padding_mask(true)
                       .set_seq_len_q(lengths)
                       .set_seq_len_kv(lengths)
                       .set_max_total_seq_len_q(tokens)
                       .set_max_total_seq_len_kv(tokens)
                       .set_attn_scale(spec_.scale)
                       .set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
                       .set_diagonal_band_right_bound(0);
    auto [dq, dk, dv] =
        g_->sdpa_backward(operand("q", q_like(kQ)), operand("k", kv_like(kK)),
                          operand("v", kv_like(kV)), operand("o", out_like(kO)),
                          operand("do", out_like(kDO)), operand("stats", stats_like()), options);
    result(dq, q_like(kDQ));
    // Rows of their own: cuDNN keeps dk and dv of every query head with the row stride of these.
    const TensorRef kv = index("kv_offsets", kOffsetKv, sequences_ + 1);
    const std::int64_t row = spec_.kv_heads * spec_.head_dim;
    result(dk, ragged(kDK, spec_.kv_heads, row, spec_.head_dim, kv));
    result(dv, ragged(kDV, spec_.kv_heads, row, spec_.head_dim, kv));
  }

  Plan build(cudnnHandle_t handle) {
    Plan plan;
    fe::error_t e = g_->validate();
    if (e.is_good()) e = g_->build_operation_graph(handle);
    if (e.is_good()) e = g_->create_execution_plans({fe::HeurMode_t::A});
    if (e.is_good()) e = g_->check_support();
    if (e.is_good()) e = g_->build_plans();
    if (e.is_good()) e = g_->get_workspace_size(plan.workspace_bytes);
    if (e.is_bad()) {
      plan.refusal = str("cuDNN: ", e.get_message());
      return plan;
    }
    plan.graph = g_;
    return plan;
  }

 private:
  const AttentionSpec& spec_;
  const std::int64_t sequences_, length_;
  std::int64_t width_ = 0;
  std::shared_ptr<graph::Graph> g_ = std::make_shared<graph::Graph>();
  TensorRef lengths, qkv, out;
};

void check_cudnn(cudnnStatus_t code, const char* what) {
  if (code != CUDNN_STATUS_SUCCESS)
    throw DeviceError(str("cuDNN: ", what, ": ", cudnnGetErrorString(code)));
}

}  // namespace

struct CudnnAttention::Impl {
  Impl() { check_cudnn(cudnnCreate(&handle), "create"); }
  ~Impl() { (void)cudnnDestroy(handle); }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  const Plan& plan(Pass pass, const AttentionSpec& spec, std::int64_t tokens,
                   const CudnnAttentionLayout& l) {
    const Key key{pass,       tokens,        l.sequences,   l.seq_len_max,
                  spec.heads, spec.kv_heads, spec.head_dim, spec.scale};
    const auto found = plans.find(key);
    if (found != plans.end()) return found->second;
    Builder builder(spec, l);
    if (pass == Pass::kBackward)
      builder.backward(tokens);
    else
      builder.forward(pass == Pass::kForwardWithStats);
    return plans.emplace(key, builder.build(handle)).first->second;
  }

  bool run(cudaStream_t stream, const Plan& p, const CudnnAttentionLayout& l,
           std::unordered_map<std::int64_t, void*>& tensors, char* scratch) {
    tensors[kLengths] = scratch + l.lengths;
    tensors[kOffsetQkv] = scratch + l.qkv;
    tensors[kOffsetOut] = scratch + l.out;
    if (tensors.contains(kDK)) tensors[kOffsetKv] = scratch + l.kv;
    if (tensors.contains(kStats)) tensors[kOffsetStats] = scratch + l.stats;
    check_cudnn(cudnnSetStream(handle, stream), "set stream");
    fe::error_t e = p.graph->execute(handle, tensors, scratch + l.workspace);
    if (e.is_bad()) throw DeviceError(str("cuDNN: execute: ", e.get_message()));
    return true;
  }

  bool usable(const Plan& p, const CudnnAttentionLayout& l) {
    refusal = p.refusal;
    if (p.graph != nullptr && p.workspace_bytes > l.workspace_bytes)
      refusal = str("cuDNN wants ", p.workspace_bytes, " bytes of workspace, planned were ",
                    l.workspace_bytes);
    return refusal.empty();
  }

  cudnnHandle_t handle = nullptr;
  std::map<Key, Plan> plans;
  std::string refusal;
};

CudnnAttention::CudnnAttention() : impl_(std::make_unique<Impl>()) {}
CudnnAttention::~CudnnAttention() = default;
const std::string& CudnnAttention::refusal() const {
  return impl_->refusal;
}

namespace {

RaggedOffsets ragged_in(const CudnnAttentionLayout& l, char* scratch) {
  const auto at = [&](std::int64_t offset) {
    return reinterpret_cast<std::int32_t*>(scratch + offset);
  };
  return {at(l.lengths), at(l.qkv), at(l.out), at(l.kv), at(l.stats), l.sequences};
}

/// The q, k and v columns of a packed matrix.
struct Columns {
  char *q, *k, *v;
};
Columns columns(const AttentionSpec& spec, const Tensor& qkv) {
  auto* base = static_cast<char*>(qkv.data);
  const std::int64_t head = spec.head_dim * dtype_bytes(qkv.dtype);
  return {base, base + spec.heads * head, base + (spec.heads + spec.kv_heads) * head};
}

}  // namespace

bool CudnnAttention::forward(cudaStream_t stream, const AttentionArgs& a, char* scratch) {
  const CudnnAttentionLayout l = cudnn_attention_layout(a);
  const Pass pass = a.lse.defined() ? Pass::kForwardWithStats : Pass::kForward;
  const Plan& plan = impl_->plan(pass, a.spec, 0, l);
  if (!impl_->usable(plan, l)) return false;
  ragged_offsets(stream, a.seq_offsets, a.spec, ragged_in(l, scratch));
  const Columns in = columns(a.spec, a.qkv);
  std::unordered_map<std::int64_t, void*> tensors{
      {kQ, in.q}, {kK, in.k}, {kV, in.v}, {kO, a.out.data}};
  if (a.lse.defined()) tensors[kStats] = a.lse.data;
  return impl_->run(stream, plan, l, tensors, scratch);
}

bool CudnnAttention::backward(cudaStream_t stream, const AttentionBackwardArgs& a, char* scratch) {
  const CudnnAttentionLayout l = cudnn_attention_layout(a);
  const Plan& plan = impl_->plan(Pass::kBackward, a.spec, a.qkv.dim(0), l);
  if (!impl_->usable(plan, l)) return false;
  ragged_offsets(stream, a.seq_offsets, a.spec, ragged_in(l, scratch));
  const Columns in = columns(a.spec, a.qkv), out = columns(a.spec, a.dqkv);
  std::unordered_map<std::int64_t, void*> tensors{
      {kQ, in.q},           {kK, in.k},           {kV, in.v},   {kO, a.out.data},
      {kDO, a.dout.data},   {kStats, a.lse.data}, {kDQ, out.q}, {kDK, scratch + l.dk},
      {kDV, scratch + l.dv}};
  impl_->run(stream, plan, l, tensors, scratch);
  scatter_kv_gradients(stream, a.spec, scratch + l.dk, scratch + l.dv, a.dqkv);
  return true;
}

}  // namespace tandem::kernels::cuda
