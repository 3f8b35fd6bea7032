// Products with base weights and their adapters. Where one adapter at most can appear (training,
// or serving one adapter) the low-rank part is a thin product, u or du, and an extension of the
// base's inner size (lora_gemm.h); the factor it multiplies is gathered into one matrix,
// block-diagonal over the sites. Where the fast kernels do not fit, all factors are gathered and
// everything is a product of cuBLASLt: u B^T writes the output first and the base product adds to
// it, so that the output is rounded by the base product. Rows of any mix of adapters go through the
// segmented kernels.
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/gemv.cuh"
#include "kernels/cuda/lora_gemm.h"
#include "kernels/cuda/lora_thin.h"
#include "kernels/cuda/skinny.h"
#include "kernels/cuda_workspace.h"
#include "protocol/base/random.h"

#include <algorithm>
#include <array>

namespace tandem::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSitesMax = 4;
/// From here on the widest outputs outgrow the cache, and B u first was faster; at 512 rows it was
/// not.
constexpr std::int64_t kManyRows = 1024;

/// The sites of one fused linear as kernels take them.
struct Sites {
  std::array<const LoraEntry*, kSitesMax> entries{};
  std::array<std::int64_t, kSitesMax> n_begin{}, n{};
  int count = 0;
  const std::int32_t* slots = nullptr;  ///< of the only segment
  std::int64_t rank_max = 0;
  /// Of site s: the batch's adapter there, or null.
  __device__ const LoraEntry* entry(int s) const {
    const std::int32_t slot = slots[0];
    return slot < 0 ? nullptr : entries[static_cast<std::size_t>(s)] + slot;
  }
};

Sites make_sites(const std::vector<LoraSite>& sites, const AdapterRows& rows) {
  TANDEM_CHECK_LE(sites.size(), static_cast<std::size_t>(kSitesMax));
  Sites s;
  s.count = static_cast<int>(sites.size());
  s.slots = rows.segment_slots.as<std::int32_t>();
  s.rank_max = rows.rank_max;
  for (std::size_t j = 0; j < sites.size(); ++j) {
    s.entries[j] = static_cast<const LoraEntry*>(sites[j].entries.data);
    s.n_begin[j] = sites[j].n_begin;
    s.n[j] = sites[j].n;
  }
  return s;
}

unsigned blocks_for(std::int64_t items) {
  return static_cast<unsigned>(
      std::clamp<std::int64_t>((items + kThreads - 1) / kThreads, 1, 1 << 16));
}

// -- gathering factors
// ----------------------------------------------------------------------------

/// out[site * rank_max + r, i] = (scaled ? s : 1) A[r, i]; zeros beyond the rank.
template <class T>
__global__ void gather_a_kernel(Sites sites, std::int64_t inputs, bool scaled, T* out) {
  const std::int64_t total = sites.count * sites.rank_max * inputs;
  for (std::int64_t e = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < total;
       e += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    const std::int64_t column = e / inputs, r = column % sites.rank_max;
    const LoraEntry* entry = sites.entry(static_cast<int>(column / sites.rank_max));
    float value = 0.0f;
    if (entry != nullptr && r < entry->rank) {
      value = load_f32(static_cast<const T*>(entry->a)[r * inputs + e % inputs]);
      if (scaled) value *= entry->scale;
    }
    out[e] = store_as<T>(value);
  }
}

/// out[n, site * rank_max + r] = (scaled ? s : 1) B[n - n_begin, r] inside the site's outputs,
/// zeros elsewhere.
template <class T>
__global__ void gather_b_kernel(Sites sites, std::int64_t outputs, bool scaled, T* out) {
  const std::int64_t columns = sites.count * sites.rank_max, total = outputs * columns;
  for (std::int64_t e = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < total;
       e += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    const std::int64_t n = e / columns, column = e % columns, r = column % sites.rank_max;
    const auto s = static_cast<std::size_t>(column / sites.rank_max);
    const LoraEntry* entry = sites.entry(static_cast<int>(s));
    const std::int64_t row = n - sites.n_begin[s];
    float value = 0.0f;
    if (entry != nullptr && r < entry->rank && row >= 0 && row < sites.n[s]) {
      value = load_f32(static_cast<const T*>(entry->b)[row * entry->rank + r]);
      if (scaled) value *= entry->scale;
    }
    out[e] = store_as<T>(value);
  }
}

/// dA += da, dB += db of every site that is trained.
__global__ void scatter_a_kernel(Sites sites, std::int64_t inputs, const float* da) {
  const std::int64_t total = sites.count * sites.rank_max * inputs;
  for (std::int64_t e = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < total;
       e += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    const std::int64_t column = e / inputs, r = column % sites.rank_max;
    const LoraEntry* entry = sites.entry(static_cast<int>(column / sites.rank_max));
    if (entry != nullptr && entry->da != nullptr && r < entry->rank)
      entry->da[r * inputs + e % inputs] += da[e];
  }
}

__global__ void scatter_b_kernel(Sites sites, std::int64_t outputs, const float* db) {
  const std::int64_t columns = sites.count * sites.rank_max, total = outputs * columns;
  for (std::int64_t e = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < total;
       e += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    const std::int64_t n = e / columns, column = e % columns, r = column % sites.rank_max;
    const auto s = static_cast<std::size_t>(column / sites.rank_max);
    const LoraEntry* entry = sites.entry(static_cast<int>(s));
    const std::int64_t row = n - sites.n_begin[s];
    if (entry != nullptr && entry->db != nullptr && r < entry->rank && row >= 0 && row < sites.n[s])
      entry->db[row * entry->rank + r] += db[e];
  }
}

// -- dropout
// --------------------------------------------------------------------------------------

/// The mask of kernels/cpu/dropout.h: element (row, column) is dropped when its 16 random bits are
/// below p * 65536; four columns share one draw.
struct Mask {
  std::uint64_t seed, stream;
  std::uint32_t threshold;
  float scale;
};

Mask make_mask(const AdapterRows& rows, const LoraSite& site) {
  Mask mask{rows.dropout_seed, site.dropout_stream,
            static_cast<std::uint32_t>(rows.dropout * 65536.0f + 0.5f), 0.0f};
  mask.scale = 1.0f / (1.0f - static_cast<float>(mask.threshold) / 65536.0f);
  return mask;
}

/// out = mask(x), or out += mask(x).
template <class T, bool kAdd>
__global__ void dropout_kernel(Mask mask, const T* x, std::int64_t rows, std::int64_t columns,
                               T* out) {
  constexpr std::int64_t kGroup = 4;
  const std::int64_t groups = (columns + kGroup - 1) / kGroup;
  for (std::int64_t g = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       g < rows * groups; g += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    std::uint64_t bits = random_bits(mask.seed, mask.stream, static_cast<std::uint64_t>(g));
    const std::int64_t row = g / groups, begin = g % groups * kGroup;
    for (std::int64_t c = begin; c < columns && c < begin + kGroup; ++c) {
      const float kept = (bits & 0xffff) < mask.threshold ? 0.0f : mask.scale;
      bits >>= 16;
      const std::int64_t e = row * columns + c;
      out[e] = store_as<T>((kAdd ? load_f32(out[e]) : 0.0f) + load_f32(x[e]) * kept);
    }
  }
}

/// y += bias, where cuBLASLt has no epilogue for it (y f32, bias not).
template <class E>
__global__ void add_bias_kernel(const E* bias, std::int64_t rows, std::int64_t columns, float* y) {
  for (std::int64_t e = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       e < rows * columns; e += static_cast<std::int64_t>(gridDim.x) * kThreads)
    y[e] += load_f32(bias[e % columns]);
}

template <class T>
void dropout(cudaStream_t stream, const Mask& mask, const Tensor& x, const Tensor& out, bool add) {
  const std::int64_t rows = x.dim(0), columns = x.dim(1);
  const auto kernel = add ? dropout_kernel<T, true> : dropout_kernel<T, false>;
  kernel<<<blocks_for(rows * ((columns + 3) / 4)), kThreads, 0, stream>>>(
      mask, static_cast<const T*>(x.data), rows, columns, static_cast<T*>(out.data));
  TANDEM_LAUNCHED("dropout_kernel");
}

template <class T>
void gather_a(cudaStream_t stream, const Sites& sites, std::int64_t inputs, bool scaled,
              const Tensor& out) {
  gather_a_kernel<T><<<blocks_for(out.elements()), kThreads, 0, stream>>>(
      sites, inputs, scaled, static_cast<T*>(out.data));
  TANDEM_LAUNCHED("gather_a_kernel");
}

template <class T>
void gather_b(cudaStream_t stream, const Sites& sites, std::int64_t outputs, bool scaled,
              const Tensor& out) {
  gather_b_kernel<T><<<blocks_for(out.elements()), kThreads, 0, stream>>>(
      sites, outputs, scaled, static_cast<T*>(out.data));
  TANDEM_LAUNCHED("gather_b_kernel");
}

// -- one adapter
// ----------------------------------------------------------------------------------

Matrix weight_matrix(const PackedWeight& w) {
  return {w.storage.data, w.dtype, w.n, w.i, w.i, false};
}

/// Columns of one site in u or du; rows of one site in A.
Matrix site_columns(const Tensor& u, std::int64_t site, std::int64_t rank_max) {
  Matrix m = matrix(u);
  m.data = static_cast<const char*>(u.data) + site * rank_max * dtype_bytes(u.dtype);
  m.columns = rank_max;
  return m;
}
Matrix site_rows(const Tensor& a, std::int64_t site, std::int64_t rank_max) {
  return matrix(a.rows(site * rank_max, rank_max));
}

/// What the steps of one op share.
struct Single {
  cudaStream_t stream;
  Numerics numerics;
  Blas& blas;
  const std::vector<LoraSite>& sites;
  const AdapterRows& rows;
  Tensor x, dropped;
  void* gemm;

  [[nodiscard]] bool drops() const { return rows.dropout > 0.0f; }
  [[nodiscard]] std::int64_t count() const { return static_cast<std::int64_t>(sites.size()); }
  void drop(std::int64_t site, const Tensor& from, const Tensor& to, bool add) const {
    TANDEM_CUDA_DISPATCH(x.dtype, dropout, stream,
                         make_mask(rows, sites[static_cast<std::size_t>(site)]), from, to, add);
  }
  /// u = dropout(x) (s A)^T of all sites.
  void make_u(const Tensor& a_scaled, const Tensor& u) const {
    if (!drops())
      return blas.product(stream, numerics, matrix(x), transpose(matrix(a_scaled)), matrix(u),
                          false, nullptr, gemm);
    for (std::int64_t s = 0; s < count(); ++s) {
      drop(s, x, dropped, false);
      blas.product(stream, numerics, matrix(dropped),
                   transpose(site_rows(a_scaled, s, rows.rank_max)),
                   site_columns(u, s, rows.rank_max), false, nullptr, gemm);
    }
  }
};

/// One pass over x or dy in the profiler's table.
Profiler::Scope pass_scope(Profiler& profiler, cudaStream_t stream, const char* name,
                           const Tensor& wide) {
  return {profiler, stream,
          profiler.on() ? str("  thin ", name, " ", wide.dim(0), "x", wide.dim(1)) : std::string(),
          static_cast<double>(wide.bytes())};
}

/// With fewer tiles of lora_gemm.h than multiprocessors, cuBLASLt, which has smaller ones and
/// splits the inner size, fills a GPU better.
constexpr std::int64_t kExtendedTileElements = 128 * 192;

}  // namespace

void CudaOps::extended_product(const Exec& exec, const Matrix& a, const Matrix& b, const Matrix& u,
                               const Matrix& c, const Matrix& out, const void* bias, void* gemm) {
  const cudaStream_t s = stream(exec);
  const lora_gemm::Product product{a, b, u, c, out, bias, multiprocessors(exec)};
  // Which path is taken depends on the rows, and their roundings differ: not for kInvariant.
  if (exec.numerics != Numerics::kInvariant &&
      lora_gemm::fits(product, profile_.compute_capability) &&
      out.rows * out.columns / kExtendedTileElements >= profile_.sm_count) {
    const Profiler::Scope scope(
        profiler_, s,
        profiler_.on() ? str("  extended ", out.rows, "x", out.columns, "x", a.columns, "+",
                             u.columns, b.transposed ? " tb" : "")
                       : std::string(),
        0.0,
        2.0 * static_cast<double>(out.rows) * static_cast<double>(out.columns) *
            static_cast<double>(a.columns));
    return lora_gemm::run(s, product);
  }
  blas_.product(s, exec.numerics, u, c, out, false, nullptr, gemm);
  blas_.product(s, exec.numerics, a, b, out, true, bias, gemm);
}

namespace {

/// y = x W^T + bias: what products of one order of sums are asked for.
LinearArgs without_adapters(const LinearArgs& a) {
  return {a.x, a.weight, a.bias, {}, nullptr, a.y, {}, {}, a.then};
}
lora_gemm::Product base_product_of(const LinearArgs& a, int multiprocessors) {
  return {matrix(a.x),    transpose(weight_matrix(*a.weight)), {}, {}, matrix(a.y), a.bias.data,
          multiprocessors};
}

/// Whether every output is some site's.
bool cover_outputs(const LinearArgs& a) {
  std::int64_t next = 0;
  for (const LoraSite& site : a.sites) {
    if (site.n_begin != next) return false;
    next += site.n;
  }
  return next == a.weight->n;
}

}  // namespace

bool CudaOps::has_invariant_product(const Exec& exec, const LinearArgs& a) const {
  return skinny_fits(without_adapters(a), profile_) &&
         (a.y.dtype == DType::kF32 ||
          lora_gemm::fits(base_product_of(a, multiprocessors(exec)), profile_.compute_capability));
}

bool CudaOps::joins_reader(const Exec& exec, const LinearArgs& a) const {
  const RopeArgs& rope = a.then.rope;
  const bool adapts = !a.sites.empty() && a.adapters != nullptr && a.adapters->rank_max > 0;
  const std::int64_t distance = rope.qkv.defined() ? rope.head_dim : a.weight->n;
  if (a.y.dtype != a.x.dtype || distance % 16 != 0 || rope.qk_norm.defined()) return false;
  const bool invariant = exec.numerics == Numerics::kInvariant;
  if (gemv_fits(a) && (!invariant || !adapts)) return !invariant || has_invariant_product(exec, a);
  return !invariant && !rope.qkv.defined() && a.x.dim(0) <= kSkinnyRows && skinny_fits(a, profile_);
}

bool CudaOps::invariant_product(
    const Exec& exec, const LinearArgs& a,
    const std::function<void(const LinearArgs&, const Tensor&)>& run_skinny) {
  if (!has_invariant_product(exec, a)) return false;
  LinearArgs plain = without_adapters(a);
  const bool narrow = a.y.dtype != DType::kF32;
  const std::int64_t t = a.x.dim(0);
  if (gemv_fits(plain)) {
    ordered_gemv(stream(exec), plain);
    return true;
  }
  if (narrow && t > kSkinnyRows) {
    lora_gemm::run(stream(exec), base_product_of(a, multiprocessors(exec)));
    return true;
  }
  for (std::int64_t row = 0; row < t; row += kSkinnyRows) {
    const std::int64_t rows = std::min(kSkinnyRows, t - row);
    plain.x = a.x.rows(row, rows);
    plain.y = a.y.rows(row, rows);
    run_skinny(plain, {});
  }
  return true;
}

void CudaOps::linear_backward_thin(Exec& exec, const LinearBackwardArgs& a,
                                   const LinearBackwardLayout& layout, const Scratch& scratch,
                                   const Tensor& u, const Tensor& du) {
  const cudaStream_t s = stream(exec);
  const ThinSites sites{a.sites, *a.adapters};
  const bool drops = a.adapters->dropout > 0.0f, extends = a.dx.defined() && !drops;
  const Tensor factor_a = scratch.tensor(layout.a, a.x.dtype, Shape{layout.columns, a.x.dim(1)});
  void* gemm = scratch.at<char>(layout.gemm);
  if (!a.u.defined()) lora_thin_u(s, sites, {}, a.x, u, {});
  const Tensor gathered = extends ? factor_a : Tensor{};
  if (layout.pair.columns > 0) {
    const Profiler::Scope pass =
        pass_scope(profiler_, s, layout.pair.makes_dy ? "silu du db" : "du db", a.dy);
    lora_thin_pair(s, sites, layout.pair, a.make_dy, a.left, a.dy, u, du, gathered, scratch);
  } else {
    {
      const Profiler::Scope pass =
          pass_scope(profiler_, s, layout.pair.makes_dy ? "silu db" : "db", a.dy);
      if (layout.pair.makes_dy)
        lora_thin_made_db(s, sites, a.make_dy, a.left, a.dy, u);
      else
        lora_thin_db(s, sites, a.dy, u);
    }
    const Profiler::Scope pass = pass_scope(profiler_, s, "du", a.dy);
    lora_thin_du(s, sites, a.dy, du, gathered);
  }
  if (!a.du.defined()) {
    const Profiler::Scope pass = pass_scope(profiler_, s, "da", a.x);
    lora_thin_da(s, sites, a.x, a.make_x, du);
  }
  if (!a.dx.defined()) return;
  const Matrix w = weight_matrix(*a.weight);
  if (extends)
    return extended_product(exec, matrix(a.dy), w, matrix(du), matrix(factor_a), matrix(a.dx),
                            nullptr, gemm);
  blas_.product(s, exec.numerics, matrix(a.dy), w, matrix(a.dx), false, nullptr, gemm);
  lora_segments_dx(s, a.sites, *a.adapters, du, a.dx);
}

void CudaOps::do_linear_forward(Exec& exec, const LinearArgs& a) {
  if (a.then.defined() && !joins_reader(exec, a)) {
    LinearArgs alone = a;
    alone.then = {};
    do_linear_forward(exec, alone);
    return a.then.rope.qkv.defined() ? do_rope_forward(exec, a.then.rope)
                                     : do_silu_mul_forward(exec, a.then.silu_mul);
  }
  const Profiler::Scope scope(
      profiler_, stream(exec), "linear_forward",
      static_cast<double>(a.x.bytes() + a.y.bytes() + a.weight->storage.bytes()));
  const cudaStream_t s = stream(exec);
  const LinearForwardLayout layout = linear_forward_layout(a, profile_);
  const Scratch scratch(exec, layout.bytes);
  void* gemm = scratch.at<char>(layout.gemm);
  const Matrix w = transpose(weight_matrix(*a.weight));
  const bool late_bias = a.bias.defined() && a.y.dtype != a.bias.dtype;
  const void* bias = late_bias ? nullptr : a.bias.data;
  const auto finish = [&] {
    if (!late_bias) return;
    with_element(a.bias.dtype, [&]<class E>(E) {
      add_bias_kernel<<<blocks_for(a.y.elements()), kThreads, 0, s>>>(
          a.bias.as<const E>(), a.y.dim(0), a.y.dim(1), a.y.as<float>());
    });
    TANDEM_LAUNCHED("add_bias_kernel");
  };
  const bool invariant = exec.numerics == Numerics::kInvariant;
  // Which kernel multiplies depends on the rows.
  const bool is_skinny = !invariant && a.x.dim(0) <= kSkinnyRows && skinny_fits(a, profile_);
  const auto run_skinny = [&](const LinearArgs& args, const Tensor& u) {
    const Profiler::Scope product(
        profiler_, s,
        profiler_.on() ? str("  skinny ", args.y.dim(0), "x", args.y.dim(1), "x", args.x.dim(1))
                       : std::string(),
        static_cast<double>(a.weight->storage.bytes()));
    skinny(s, exec.numerics, args, u, multiprocessors(exec));
  };
  const auto base_product = [&] {
    if (invariant && invariant_product(exec, a, run_skinny)) return;
    blas_.product(s, exec.numerics, matrix(a.x), w, matrix(a.y), false, bias, gemm);
    finish();
  };
  if (layout.columns == 0) {
    if (!invariant && gemv_fits(a)) return gemv(s, a, {});
    return is_skinny ? run_skinny(a, {}) : base_product();
  }
  const std::int64_t t = a.x.dim(0), i = a.x.dim(1), n = a.weight->n;
  const DType cd = a.x.dtype;
  const bool few = t <= kFewRows;
  // Kernels of few rows, and of one order of sums, read x.
  if (layout.makes_x && (few || invariant)) do_silu_mul_forward(exec, a.make_x);
  const Tensor u = a.u.defined() ? a.u : scratch.tensor(layout.u, cd, Shape{t, layout.columns});
  const bool is_gemv = !invariant && gemv_fits(a);
  if (is_gemv) {
    {
      const Profiler::Scope pass = pass_scope(profiler_, s, "u", a.x);
      lora_segments_shrink(s, a.sites, *a.adapters, a.x, u, true);
    }
    return gemv(s, a, u);
  }
  if (is_skinny) return run_skinny(a, u);
  // kInvariant: one order of sums and of roundings, whatever the bounds are.
  if (!layout.single || few || invariant) {
    const auto shrink = [&](cudaStream_t queue) {
      const Profiler::Scope pass = pass_scope(profiler_, queue, "u of segments", a.x);
      lora_segments_shrink(queue, a.sites, *a.adapters, a.x, u);
    };
    const auto expand = [&](bool writes) {
      const Profiler::Scope pass = pass_scope(profiler_, s, "B u of segments", a.y);
      lora_segments_expand(s, a.sites, *a.adapters, u, a.y, writes);
    };
    // A y that no cache holds is as many bytes as all else: the product, which does not wait for
    // memory, is the one to read it.
    if (t >= kManyRows && !invariant && is_16_bit(a.y.dtype) && cover_outputs(a)) {
      shrink(s);
      expand(true);
      return blas_.product(s, exec.numerics, matrix(a.x), w, matrix(a.y), true, bias, gemm);
    }
    // The base product does not wait for u.
    shrink(few ? side_.fork(s) : s);
    base_product();
    if (few) side_.join(s);
    return expand(false);
  }
  const Tensor factor_b = scratch.tensor(layout.b, cd, Shape{n, layout.columns});
  if (layout.thin) {
    const Profiler::Scope pass = layout.makes_x
                                     ? pass_scope(profiler_, s, "silu u", a.make_x.gate_up)
                                     : pass_scope(profiler_, s, "u", a.x);
    lora_thin_u(s, {a.sites, *a.adapters}, a.make_x, a.x, u, factor_b);
  } else {
    const Sites sites = make_sites(a.sites, *a.adapters);
    const Tensor factor_a = scratch.tensor(layout.a, cd, Shape{layout.columns, i});
    TANDEM_CUDA_DISPATCH(cd, gather_a, s, sites, i, true, factor_a);
    TANDEM_CUDA_DISPATCH(cd, gather_b, s, sites, n, false, factor_b);
    const Single single{s,
                        exec.numerics,
                        blas_,
                        a.sites,
                        *a.adapters,
                        a.x,
                        scratch.tensor(layout.dropped, cd, a.x.shape),
                        gemm};
    single.make_u(factor_a, u);
  }
  extended_product(exec, matrix(a.x), w, matrix(u), transpose(matrix(factor_b)), matrix(a.y), bias,
                   gemm);
  finish();
}

void CudaOps::do_linear_backward(Exec& exec, const LinearBackwardArgs& a) {
  const Profiler::Scope scope(
      profiler_, stream(exec), "linear_backward",
      static_cast<double>(a.x.bytes() + a.dy.bytes() + a.weight->storage.bytes()));
  const cudaStream_t s = stream(exec);
  const LinearBackwardLayout layout = linear_backward_layout(a, profile_);
  const Scratch scratch(exec, layout.bytes);
  void* gemm = scratch.at<char>(layout.gemm);
  const Matrix w = weight_matrix(*a.weight);
  if (layout.columns == 0) {
    if (a.dx.defined())
      blas_.product(s, exec.numerics, matrix(a.dy), w, matrix(a.dx), false, nullptr, gemm);
    return;
  }
  const std::int64_t t = a.x.dim(0), i = a.x.dim(1), n = a.weight->n, columns = layout.columns;
  const DType cd = a.x.dtype;
  const Tensor u = a.u.defined() ? a.u : scratch.tensor(layout.u, cd, Shape{t, columns});
  const Tensor du = a.du.defined() ? a.du : scratch.tensor(layout.du, cd, Shape{t, columns});
  if (!layout.single) {
    if (!a.u.defined()) lora_segments_shrink(s, a.sites, *a.adapters, a.x, u);
    if (a.dx.defined())
      blas_.product(s, exec.numerics, matrix(a.dy), w, matrix(a.dx), false, nullptr, gemm);
    return lora_segments_backward(s, a, u, du);
  }
  if (layout.thin) return linear_backward_thin(exec, a, layout, scratch, u, du);
  const Sites sites = make_sites(a.sites, *a.adapters);
  const Single single{s,
                      exec.numerics,
                      blas_,
                      a.sites,
                      *a.adapters,
                      a.x,
                      scratch.tensor(layout.dropped, cd, a.x.shape),
                      gemm};
  if (!a.u.defined()) {
    const Tensor a_scaled = scratch.tensor(layout.a_scaled, cd, Shape{columns, i});
    TANDEM_CUDA_DISPATCH(cd, gather_a, s, sites, i, true, a_scaled);
    single.make_u(a_scaled, u);
  }
  const Tensor b_scaled = scratch.tensor(layout.b, cd, Shape{n, columns});
  TANDEM_CUDA_DISPATCH(cd, gather_b, s, sites, n, true, b_scaled);
  blas_.product(s, exec.numerics, matrix(a.dy), matrix(b_scaled), matrix(du), false, nullptr, gemm);

  const Tensor db = scratch.tensor(layout.db, DType::kF32, Shape{n, columns});
  blas_.product(s, exec.numerics, transpose(matrix(a.dy)), matrix(u), matrix(db), false, nullptr,
                gemm);
  scatter_b_kernel<<<blocks_for(db.elements()), kThreads, 0, s>>>(sites, n, db.as<float>());
  TANDEM_LAUNCHED("scatter_b_kernel");

  const Tensor da = scratch.tensor(layout.da, DType::kF32, Shape{columns, i});
  if (!single.drops()) {
    blas_.product(s, exec.numerics, transpose(matrix(du)), matrix(a.x), matrix(da), false, nullptr,
                  gemm);
  } else {
    for (std::int64_t site = 0; site < single.count(); ++site) {
      single.drop(site, a.x, single.dropped, false);
      blas_.product(s, exec.numerics, transpose(site_columns(du, site, sites.rank_max)),
                    matrix(single.dropped), site_rows(da, site, sites.rank_max), false, nullptr,
                    gemm);
    }
  }
  scatter_a_kernel<<<blocks_for(da.elements()), kThreads, 0, s>>>(sites, i, da.as<float>());
  TANDEM_LAUNCHED("scatter_a_kernel");

  if (!a.dx.defined()) return;
  const Tensor factor_a = scratch.tensor(layout.a, cd, Shape{columns, i});
  TANDEM_CUDA_DISPATCH(cd, gather_a, s, sites, i, false, factor_a);
  if (!single.drops())
    return extended_product(exec, matrix(a.dy), w, matrix(du), matrix(factor_a), matrix(a.dx),
                            nullptr, gemm);
  blas_.product(s, exec.numerics, matrix(a.dy), w, matrix(a.dx), false, nullptr, gemm);
  for (std::int64_t site = 0; site < single.count(); ++site) {
    blas_.product(s, exec.numerics, site_columns(du, site, sites.rank_max),
                  site_rows(factor_a, site, sites.rank_max), matrix(single.dropped), false, nullptr,
                  gemm);
    single.drop(site, single.dropped, a.dx, true);
  }
}

}  // namespace tandem::kernels::cuda
