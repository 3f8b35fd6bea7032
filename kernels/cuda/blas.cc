#include "kernels/cuda/blas.h"

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda_workspace.h"

#include <map>
#include <tuple>

namespace tandem::kernels::cuda {
namespace {

cudaDataType_t cuda_type(DType dtype) {
  TANDEM_CHECK(dtype == DType::kF32 || is_16_bit(dtype), dtype_name(dtype));
  return dtype == DType::kF32 ? CUDA_R_32F : dtype == DType::kF16 ? CUDA_R_16F : CUDA_R_16BF;
}

/// Everything cuBLASLt's choice of algorithm depends on.
using Key = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                       std::int64_t, int, int, int, int, int>;

struct Plan {
  cublasLtMatmulDesc_t op = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, out = nullptr;
  cublasLtMatmulAlgo_t algorithm{};
};

/// Largest power of two up to 16 that divides an address and a row.
int alignment(const Matrix& m) {
  const auto bits = reinterpret_cast<std::uintptr_t>(m.data) |
                    static_cast<std::uintptr_t>(m.ld * dtype_bytes(m.dtype)) | 16u;
  return static_cast<int>(bits & (~bits + 1));
}

/// Row-major [rows, columns] is column-major [columns, rows].
cublasLtMatrixLayout_t make_layout(const Matrix& m) {
  cublasLtMatrixLayout_t layout = nullptr;
  TANDEM_CUBLAS(cublasLtMatrixLayoutCreate(&layout, cuda_type(m.dtype),
                                           static_cast<std::uint64_t>(m.columns),
                                           static_cast<std::uint64_t>(m.rows), m.ld));
  return layout;
}

struct DestroyLayout {
  void operator()(cublasLtMatrixLayoutOpaque_t* layout) const {
    (void)cublasLtMatrixLayoutDestroy(layout);
  }
};
using LayoutOwner = std::unique_ptr<cublasLtMatrixLayoutOpaque_t, DestroyLayout>;

template <class T>
void set(cublasLtMatmulDesc_t op, cublasLtMatmulDescAttributes_t what, const T& value) {
  TANDEM_CUBLAS(cublasLtMatmulDescSetAttribute(op, what, &value, sizeof value));
}

}  // namespace

struct Blas::Impl {
  Impl() { TANDEM_CUBLAS(cublasLtCreate(&handle)); }
  ~Impl() {
    for (auto& [key, plan] : plans) {
      (void)cublasLtMatmulDescDestroy(plan.op);
      for (cublasLtMatrixLayout_t layout : {plan.a, plan.b, plan.out})
        (void)cublasLtMatrixLayoutDestroy(layout);
    }
    (void)cublasLtDestroy(handle);
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  /// `left` and `right` in cuBLAS's column-major order: out^T = right^T left^T.
  Plan make(const Matrix& a, const Matrix& b, const Matrix& out, bool accumulate, bool bias,
            bool invariant) {
    Plan plan;
    TANDEM_CUBLAS(cublasLtMatmulDescCreate(&plan.op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set(plan.op, CUBLASLT_MATMUL_DESC_TRANSA, b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(plan.op, CUBLASLT_MATMUL_DESC_TRANSB, a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    if (bias) {
      set(plan.op, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      set(plan.op, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, cuda_type(a.dtype));
    }
    plan.a = make_layout(b);
    plan.b = make_layout(a);
    plan.out = make_layout(out);
    // What the heuristic is asked about: the same, with the canonical number of rows.
    Matrix asked_a = a, asked_out = out;
    if (invariant) asked_a.rows = asked_out.rows = kInvariantRows;
    const LayoutOwner layout_a(make_layout(asked_a)), layout_out(make_layout(asked_out));
    cublasLtMatmulPreference_t preference = nullptr;
    TANDEM_CUBLAS(cublasLtMatmulPreferenceCreate(&preference));
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t what, auto value) {
      TANDEM_CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, what, &value, sizeof value));
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
           static_cast<std::uint64_t>(kGemmWorkspaceBytes));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<std::uint32_t>(alignment(b)));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<std::uint32_t>(alignment(a)));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<std::uint32_t>(alignment(out)));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<std::uint32_t>(alignment(out)));
    if (invariant)
      prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
             static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_NONE));
    cublasLtMatmulHeuristicResult_t found{};
    int count = 0;
    const cublasStatus_t code =
        cublasLtMatmulAlgoGetHeuristic(handle, plan.op, plan.a, layout_a.get(), layout_out.get(),
                                       layout_out.get(), preference, 1, &found, &count);
    (void)cublasLtMatmulPreferenceDestroy(preference);
    if (code != CUBLAS_STATUS_SUCCESS || count == 0)
      throw DeviceError(str("cuBLASLt has no algorithm for ", dtype_name(a.dtype), " [", a.rows,
                            ", ", a.columns, "] x [", b.rows, ", ", b.columns, "] -> ",
                            dtype_name(out.dtype), " [", out.rows, ", ", out.columns, "]",
                            accumulate ? " accumulated" : "", ": ", cublasLtGetStatusName(code)));
    plan.algorithm = found.algo;
    return plan;
  }

  Plan& plan(const Matrix& a, const Matrix& b, const Matrix& out, bool accumulate, bool bias,
             bool invariant) {
    const int flags = (a.transposed ? 1 : 0) | (b.transposed ? 2 : 0) | (accumulate ? 4 : 0) |
                      (bias ? 8 : 0) | (invariant ? 16 : 0);
    const std::int64_t inner = a.transposed ? a.rows : a.columns;
    const Key key{out.rows,
                  out.columns,
                  inner,
                  a.ld,
                  b.ld,
                  out.ld,
                  static_cast<int>(a.dtype) * 16 + static_cast<int>(out.dtype),
                  flags,
                  alignment(a),
                  alignment(b),
                  alignment(out)};
    const auto known = plans.find(key);
    if (known != plans.end()) return known->second;
    return plans.emplace(key, make(a, b, out, accumulate, bias, invariant)).first->second;
  }

  cublasLtHandle_t handle = nullptr;
  std::map<Key, Plan> plans;
};

Blas::Blas(Profiler& profiler) : impl_(std::make_unique<Impl>()), profiler_(profiler) {}
Blas::~Blas() = default;

void Blas::product(cudaStream_t stream, Numerics numerics, const Matrix& a, const Matrix& b,
                   const Matrix& out, bool accumulate, const void* bias, void* workspace) {
  const std::int64_t m = a.transposed ? a.columns : a.rows, k = a.transposed ? a.rows : a.columns;
  const std::int64_t n = b.transposed ? b.rows : b.columns;
  TANDEM_CHECK(out.rows == m && out.columns == n && (b.transposed ? b.columns : b.rows) == k &&
                   a.dtype == b.dtype && !out.transposed,
               "product [", m, ", ", k, "] x [", b.rows, ", ", b.columns, "] -> [", out.rows, ", ",
               out.columns, "]");
  if (m == 0 || n == 0) return;
  TANDEM_CHECK_GT(k, 0);
  Plan& plan = impl_->plan(a, b, out, accumulate, bias != nullptr,
                           numerics == Numerics::kInvariant && !a.transposed);
  if (bias != nullptr) set(plan.op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
  const Profiler::Scope scope(
      profiler_, stream,
      profiler_.on() ? str("  product ", m, "x", n, "x", k, a.transposed ? " ta" : "",
                           b.transposed ? " tb" : "", accumulate ? " +" : "")
                     : std::string(),
      static_cast<double>((m * k + k * n) * dtype_bytes(a.dtype) +
                          m * n * dtype_bytes(out.dtype) * (accumulate ? 2 : 1)),
      2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k));
  const float one = 1.0f, beta = accumulate ? 1.0f : 0.0f;
  auto* result = const_cast<void*>(out.data);
  TANDEM_CUBLAS(cublasLtMatmul(impl_->handle, plan.op, &one, b.data, plan.a, a.data, plan.b, &beta,
                               result, plan.out, result, plan.out, &plan.algorithm, workspace,
                               kGemmWorkspaceBytes, stream));
}

}  // namespace tandem::kernels::cuda
