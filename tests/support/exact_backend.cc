#include "tests/support/exact_backend.h"

#include "kernels/cpu/cpu_backend.h"
#include "tests/kernels/reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace tandem::test {
namespace {

using namespace kernels;
using testing::Values;

Values values_of(const Tensor& t) {
  const double* x = t.as<double>();
  return {x, x + t.elements()};
}
void store(const Values& values, const Tensor& to) {
  TANDEM_CHECK_EQ(static_cast<std::int64_t>(values.size()), to.elements());
  std::copy(values.begin(), values.end(), to.as<double>());
}
std::vector<std::int32_t> ints_of(const Tensor& t) {
  const auto* x = t.as<std::int32_t>();
  return {x, x + t.elements()};
}

/// y[t, n] (+)= x[t, k] w^T with any strides; `w(n, k)` and `x(t, k)` give elements.
template <class X, class W>
void product(std::int64_t t, std::int64_t n, std::int64_t k, const X& x, const W& w, double* y,
             std::int64_t ldy, bool add, double scale = 1.0) {
  for (std::int64_t i = 0; i < t; ++i)
    for (std::int64_t j = 0; j < n; ++j) {
      double sum = 0.0;
      for (std::int64_t l = 0; l < k; ++l) sum += x(i, l) * w(j, l);
      double& to = y[i * ldy + j];
      to = (add ? to : 0.0) + scale * sum;
    }
}

class ExactOps final : public Ops {
 public:
  const DeviceProfile& profile() const override { return profile_; }
  void synchronize(Exec&) override {}
  std::int64_t packed_weight_bytes(DType, std::int64_t n, std::int64_t i) const override {
    return n * i * 8;
  }

 private:
  void do_upload(Exec&, std::span<const std::byte> host, Tensor to) override {
    std::memcpy(to.data, host.data(), host.size());
  }
  void do_download(Exec&, Tensor from, std::span<std::byte> host) override {
    std::memcpy(host.data(), from.data, host.size());
  }
  void do_copy(Exec&, Tensor from, Tensor to) override {
    TANDEM_CHECK(from.dtype == to.dtype, "the exact backend converts nothing");
    std::memcpy(to.data, from.data, static_cast<std::size_t>(to.bytes()));
  }
  void do_fill_zero(Exec&, Tensor x) override {
    std::memset(x.data, 0, static_cast<std::size_t>(x.bytes()));
  }
  void do_pack_weight(Exec&, PackedWeight& w, const FillRows& fill) override {
    std::vector<float> rows(static_cast<std::size_t>(w.n * w.i));
    fill(0, w.n, rows.data());
    std::copy(rows.begin(), rows.end(), static_cast<double*>(w.storage.data));
  }
  void do_repack_weight(Exec&, const RepackWeightArgs& a) override {
    std::memcpy(a.weight->storage.data, a.rows.data, static_cast<std::size_t>(a.rows.bytes()));
  }
  static const double* matrix(const PackedWeight& w) {
    return static_cast<const double*>(w.storage.data);
  }

  void do_embedding_forward(Exec&, const EmbeddingArgs& a) override {
    const std::int64_t c = a.out.dim(1);
    for (std::int64_t row = 0; row < a.out.dim(0); ++row) {
      const std::int64_t id = a.ids.as<std::int32_t>()[row] - a.first;
      double* out = a.out.as<double>() + row * c;
      if (id >= 0 && id < a.table->n)
        std::copy_n(matrix(*a.table) + id * c, c, out);
      else
        std::fill_n(out, c, 0.0);
    }
  }
  void do_embedding_backward(Exec&, const EmbeddingBackwardArgs& a) override {
    const std::int64_t c = a.dout.dim(1);
    for (std::int64_t row = 0; row < a.dout.dim(0); ++row) {
      const std::int64_t id = a.ids.as<std::int32_t>()[row] - a.first;
      if (id < 0 || id >= a.dtable.dim(0)) continue;
      for (std::int64_t j = 0; j < c; ++j)
        a.dtable.as<double>()[id * c + j] += a.dout.as<double>()[row * c + j];
    }
  }

  void do_add_rms_norm_forward(Exec&, const AddRmsNormArgs& a) override {
    const auto r = testing::rms_norm(
        values_of(a.residual), a.delta.defined() ? values_of(a.delta) : Values{},
        values_of(a.weight), a.residual.dim(0), a.residual.dim(1), static_cast<double>(a.eps));
    store(r.residual, a.residual);
    store(r.y, a.y);
    if (a.rstd.defined()) store(r.rstd, a.rstd);
  }
  void do_rms_norm_backward(Exec&, const RmsNormBackwardArgs& a) override {
    const std::int64_t c = a.dy.dim(1);
    if (a.dweight.defined()) add_norm_weight_grad(a);
    const double* w = a.weight.as<double>();
    for (std::int64_t row = 0; row < a.dy.dim(0); ++row) {
      const double *dy = a.dy.as<double>() + row * c, *x = a.residual.as<double>() + row * c;
      const double r = a.rstd.as<double>()[row];
      double sum = 0.0;
      for (std::int64_t j = 0; j < c; ++j) sum += dy[j] * w[j] * x[j];
      for (std::int64_t j = 0; j < c; ++j)
        a.dresidual.as<double>()[row * c + j] +=
            r * (dy[j] * w[j] - x[j] * r * r * sum / static_cast<double>(c));
    }
  }
  static void add_norm_weight_grad(const RmsNormBackwardArgs& a) {
    const std::int64_t c = a.dy.dim(1);
    for (std::int64_t row = 0; row < a.dy.dim(0); ++row)
      for (std::int64_t j = 0; j < c; ++j)
        a.dweight.as<double>()[j] += a.dy.as<double>()[row * c + j] *
                                     a.residual.as<double>()[row * c + j] *
                                     a.rstd.as<double>()[row];
  }

  /// The adapter of a site in a batch of one segment; null: none.
  static const LoraEntry* entry_of(const LoraSite& site, const AdapterRows* rows) {
    if (rows == nullptr || rows->rank_max == 0) return nullptr;
    TANDEM_CHECK(rows->dropout == 0.0f && rows->segments_max == 1);
    const std::int32_t slot = rows->segment_slots.as<std::int32_t>()[0];
    return slot < 0 ? nullptr : static_cast<const LoraEntry*>(site.entries.data) + slot;
  }
  /// u [T, rank] = s A x.
  static Values lora_inputs(const LoraEntry& e, const Tensor& x) {
    const std::int64_t t = x.dim(0), i = x.dim(1);
    const auto* in = x.as<double>();
    const auto* a = static_cast<const double*>(e.a);
    Values u(static_cast<std::size_t>(t * e.rank));
    product(
        t, e.rank, i, [&](auto r, auto l) { return in[r * i + l]; },
        [&](auto j, auto l) { return a[j * i + l]; }, u.data(), e.rank, false,
        static_cast<double>(e.scale));
    return u;
  }
  void do_linear_forward(Exec&, const LinearArgs& a) override {
    const std::int64_t t = a.x.dim(0), i = a.x.dim(1), n = a.y.dim(1);
    const double *x = a.x.as<double>(), *w = matrix(*a.weight);
    double* y = a.y.as<double>();
    product(
        t, n, i, [&](auto r, auto l) { return x[r * i + l]; },
        [&](auto j, auto l) { return w[j * i + l]; }, y, n, false);
    for (std::int64_t r = 0; a.bias.defined() && r < t; ++r)
      for (std::int64_t j = 0; j < n; ++j) y[r * n + j] += a.bias.as<double>()[j];
    if (a.u.defined()) std::fill_n(a.u.as<double>(), a.u.elements(), 0.0);
    for (const LoraSite& site : a.sites) {
      const LoraEntry* e = entry_of(site, a.adapters);
      if (e == nullptr || e->rank == 0) continue;
      const Values u = lora_inputs(*e, a.x);
      const auto* b = static_cast<const double*>(e->b);
      const std::int64_t rank = e->rank;
      product(
          t, site.n, rank,
          [&](auto r, auto l) { return u[static_cast<std::size_t>(r * rank + l)]; },
          [&](auto j, auto l) { return b[j * rank + l]; }, y + site.n_begin, n, true);
    }
  }
  void do_linear_backward(Exec&, const LinearBackwardArgs& a) override {
    const std::int64_t t = a.x.dim(0), i = a.x.dim(1), n = a.dy.dim(1);
    const double *x = a.x.as<double>(), *dy = a.dy.as<double>(), *w = matrix(*a.weight);
    if (a.dx.defined())
      product(
          t, i, n, [&](auto r, auto l) { return dy[r * n + l]; },
          [&](auto j, auto l) { return w[l * i + j]; }, a.dx.as<double>(), i, false);
    for (const LoraSite& site : a.sites) {
      const LoraEntry* e = entry_of(site, a.adapters);
      if (e == nullptr || e->rank == 0) continue;
      const std::int64_t rank = e->rank;
      const double* d = dy + site.n_begin;
      const auto *pa = static_cast<const double*>(e->a), *pb = static_cast<const double*>(e->b);
      const Values u = lora_inputs(*e, a.x);
      Values du(static_cast<std::size_t>(t * rank));
      product(
          t, rank, site.n, [&](auto r, auto l) { return d[r * n + l]; },
          [&](auto j, auto l) { return pb[l * rank + j]; }, du.data(), rank, false,
          static_cast<double>(e->scale));
      const auto at = [&](const Values& v, std::int64_t r, std::int64_t l) {
        return v[static_cast<std::size_t>(r * rank + l)];
      };
      if (e->da != nullptr)
        product(
            rank, i, t, [&](auto j, auto r) { return at(du, r, j); },
            [&](auto l, auto r) { return x[r * i + l]; }, reinterpret_cast<double*>(e->da), i,
            true);
      if (e->db != nullptr)
        product(
            site.n, rank, t, [&](auto j, auto r) { return d[r * n + j]; },
            [&](auto l, auto r) { return at(u, r, l); }, reinterpret_cast<double*>(e->db), rank,
            true);
      if (a.dx.defined())
        product(
            t, i, rank, [&](auto r, auto l) { return at(du, r, l); },
            [&](auto j, auto l) { return pa[l * i + j]; }, a.dx.as<double>(), i, true);
    }
  }
  void do_linear_weight_grad(Exec&, const LinearWeightGradArgs& a) override {
    const std::int64_t t = a.x.dim(0), i = a.x.dim(1), n = a.dy.dim(1);
    const double *x = a.x.as<double>(), *dy = a.dy.as<double>();
    product(
        n, i, t, [&](auto j, auto r) { return dy[r * n + j]; },
        [&](auto l, auto r) { return x[r * i + l]; }, a.dweight.as<double>(), i, true);
    for (std::int64_t r = 0; a.dbias.defined() && r < t; ++r)
      for (std::int64_t j = 0; j < n; ++j) a.dbias.as<double>()[j] += dy[r * n + j];
  }

  static Values turned(const Tensor& qkv, const Tensor& positions, const Tensor& inv_freq,
                       float factor, std::int64_t heads, std::int64_t head_dim, double sign) {
    const auto* f = inv_freq.as<float>();
    return testing::rope(values_of(qkv), ints_of(positions), {f, f + inv_freq.elements()},
                         static_cast<double>(factor), heads, head_dim, qkv.dim(1), sign);
  }
  void do_rope_forward(Exec&, const RopeArgs& a) override {
    TANDEM_CHECK(a.cache == nullptr, "the exact backend does not serve");
    if (a.qk_norm.defined())
      store(testing::qk_norm({a.qkv.dim(0), a.heads, a.kv_heads, a.head_dim},
                             values_of(a.raw.defined() ? a.raw : a.qkv), values_of(a.qk_norm),
                             static_cast<double>(a.norm_eps)),
            a.qkv);
    store(turned(a.qkv, a.positions, a.inv_freq, a.attention_factor, a.heads + a.kv_heads,
                 a.head_dim, 1.0),
          a.qkv);
  }
  void do_rope_backward(Exec&, const RopeBackwardArgs& a) override {
    store(turned(a.dqkv, a.positions, a.inv_freq, a.attention_factor, a.heads + a.kv_heads,
                 a.head_dim, -1.0),
          a.dqkv);
    if (!a.qk_norm.defined()) return;
    const testing::QkNormGrads grads = testing::qk_norm_backward(
        {a.dqkv.dim(0), a.heads, a.kv_heads, a.head_dim}, values_of(a.dqkv), values_of(a.raw),
        values_of(a.qk_norm), static_cast<double>(a.norm_eps));
    store(grads.draw, a.dqkv);
    if (!a.dqk_norm.defined()) return;
    for (std::size_t j = 0; j < grads.dweight.size(); ++j)
      a.dqk_norm.as<double>()[j] += grads.dweight[j];
  }
  void do_attention_forward(Exec&, const AttentionArgs& a) override {
    const auto r =
        testing::attention(a.spec, values_of(a.qkv), ints_of(a.seq_offsets), a.qkv.dim(0));
    store(r.out, a.out);
    if (a.lse.defined()) store(r.lse, a.lse);
  }
  void do_attention_backward(Exec&, const AttentionBackwardArgs& a) override {
    store(testing::attention_backward(a.spec, values_of(a.dout), values_of(a.qkv),
                                      ints_of(a.seq_offsets), a.qkv.dim(0)),
          a.dqkv);
  }
  void do_silu_mul_forward(Exec&, const SiluMulArgs& a) override {
    store(testing::silu_mul(values_of(a.gate_up), a.out.dim(0), a.out.dim(1)), a.out);
  }
  void do_silu_mul_backward(Exec&, const SiluMulBackwardArgs& a) override {
    store(testing::silu_mul_backward(values_of(a.dout), values_of(a.gate_up), a.dout.dim(0),
                                     a.dout.dim(1)),
          a.dgate_up);
  }
  void do_linear_cross_entropy(Exec&, const LinearCrossEntropyArgs& a) override {
    const double* w = matrix(*a.weight);
    const auto r = testing::cross_entropy(values_of(a.x), {w, w + a.weight->n * a.weight->i},
                                          ints_of(a.labels), a.x.dim(1), a.weight->n,
                                          static_cast<double>(a.gradient_scale));
    store(r.loss, a.loss);
    if (a.correct.defined()) store(r.correct, a.correct);
    if (a.dx.defined()) store(r.dx, a.dx);
  }
  void do_cross_entropy_stats(Exec&, const CrossEntropyStatsArgs& a) override {
    const std::int64_t v = a.logits.dim(1);
    for (std::int64_t row = 0; row < a.logits.dim(0); ++row) {
      const double* x = a.logits.as<double>() + row * v;
      double* stats = a.stats.as<double>() + row * 4;
      const std::int64_t label = a.labels.as<std::int32_t>()[row] - a.first;
      const double* top = std::max_element(x, x + v);
      stats[0] = *top;
      stats[1] = 0.0;
      for (std::int64_t j = 0; j < v; ++j) stats[1] += std::exp(x[j] - *top);
      stats[2] = label >= 0 && label < v ? x[label] : 0.0;
      stats[3] = static_cast<double>(a.first + (top - x));
    }
  }
  void do_cross_entropy(Exec&, const CrossEntropyArgs& a) override {
    const std::int64_t t = a.logits.dim(0), v = a.logits.dim(1), shards = a.stats.dim(0);
    for (std::int64_t row = 0; row < t; ++row) {
      const std::int32_t label = a.labels.as<std::int32_t>()[row];
      const auto stat = [&](std::int64_t s, int k) {
        return a.stats.as<double>()[(s * t + row) * 4 + k];
      };
      double top = -INFINITY, argmax = 0.0, own = 0.0, sum = 0.0;
      for (std::int64_t s = 0; s < shards; ++s) {
        if (stat(s, 0) > top) top = stat(s, 0), argmax = stat(s, 3);
        own += stat(s, 2);
      }
      for (std::int64_t s = 0; s < shards; ++s) sum += stat(s, 1) * std::exp(stat(s, 0) - top);
      const double lse = top + std::log(sum);
      a.loss.as<double>()[row] = label < 0 ? 0.0 : lse - own;
      if (a.correct.defined())
        a.correct.as<double>()[row] = label >= 0 && argmax == static_cast<double>(label);
      if (!a.dlogits.defined()) continue;
      for (std::int64_t j = 0; j < v; ++j)
        a.dlogits.as<double>()[row * v + j] =
            label < 0 ? 0.0
                      : static_cast<double>(a.gradient_scale) *
                            (std::exp(a.logits.as<double>()[row * v + j] - lse) -
                             (a.first + j == label ? 1.0 : 0.0));
    }
  }
  void do_squared_norm(Exec&, const SquaredNormArgs& a) override {
    double sum = 0.0;
    for (const Tensor& x : a.tensors)
      for (std::int64_t e = 0; e < x.elements(); ++e) sum += x.as<double>()[e] * x.as<double>()[e];
    a.out.as<double>()[0] = sum;
  }
  void do_adamw(Exec&, const AdamWArgs& a) override {
    const double b1 = static_cast<double>(a.beta1), b2 = static_cast<double>(a.beta2);
    const double lr = static_cast<double>(a.lr), steps = static_cast<double>(a.step);
    const double factor = static_cast<double>(a.grad_factor);
    const double clip =
        a.max_norm > 0.0f
            ? std::min(1.0, static_cast<double>(a.max_norm) /
                                (factor * std::sqrt(a.squared_norm.as<double>()[0]) + 1e-6))
            : 1.0;
    double *p = a.param.as<double>(), *m = a.m.as<double>(), *v = a.v.as<double>();
    for (std::int64_t e = 0; e < a.param.elements(); ++e) {
      const double g = a.grad.as<double>()[e] * (clip * factor);
      p[e] *= 1.0 - lr * static_cast<double>(a.weight_decay);
      m[e] = b1 * m[e] + (1.0 - b1) * g;
      v[e] = b2 * v[e] + (1.0 - b2) * g * g;
      p[e] -= lr * (m[e] / (1.0 - std::pow(b1, steps))) /
              (std::sqrt(v[e] / (1.0 - std::pow(b2, steps))) + static_cast<double>(a.eps));
    }
    if (a.param_cd.defined()) std::copy_n(p, a.param.elements(), a.param_cd.as<double>());
  }

  [[noreturn]] static void absent(const char* op) {
    TANDEM_CHECK(false, op, ": the exact backend only trains");
    std::abort();
  }
  void do_paged_attention_forward(Exec&, const PagedAttentionArgs&) override {
    absent("paged_attention_forward");
  }
  void do_gather_rows(Exec&, const GatherRowsArgs&) override { absent("gather_rows"); }
  void do_place_columns(Exec&, const PlaceColumnsArgs&) override { absent("place_columns"); }
  void do_logprob(Exec&, const LogprobArgs&) override { absent("logprob"); }
  void do_sample(Exec&, const SampleArgs&) override { absent("sample"); }

  const DeviceProfile profile_ = cpu_profile({1, 0});
};

}  // namespace

kernels::Backend make_exact_backend() {
  kernels::Backend backend = kernels::make_cpu_backend({1, 0});
  backend.ops = std::make_unique<ExactOps>();
  return backend;
}

}  // namespace tandem::test
