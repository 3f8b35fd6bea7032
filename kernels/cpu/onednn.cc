#include "kernels/cpu/onednn.h"

#include <dnnl.hpp>

#include <unordered_map>

namespace tandem::kernels::cpu {
namespace {
dnnl::memory::data_type type_of(DType dtype) {
  return dtype == DType::kF32 ? dnnl::memory::data_type::f32 : dnnl::memory::data_type::bf16;
}
}  // namespace

struct OneDnnProduct::Impl {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  dnnl::matmul primitive;
  dnnl::memory x, w, y;
};

OneDnnProduct::OneDnnProduct(DType dtype, std::int64_t t, std::int64_t in, std::int64_t out,
                             const void* w, bool w_in_by_out)
    : impl_(std::make_unique<Impl>()) {
  using dnnl::memory;
  const memory::desc x_desc({t, in}, type_of(dtype), memory::format_tag::ab);
  const memory::desc any({in, out}, type_of(dtype), memory::format_tag::any);
  const memory::desc plain({in, out}, type_of(dtype),
                           w_in_by_out ? memory::format_tag::ab : memory::format_tag::ba);
  const memory::desc y_desc({t, out}, type_of(dtype), memory::format_tag::ab);
#if DNNL_VERSION_MAJOR >= 3
  const dnnl::matmul::primitive_desc chosen(impl_->engine, x_desc, any, y_desc);
#else
  const dnnl::matmul::primitive_desc chosen({x_desc, any, y_desc}, impl_->engine);
#endif
  impl_->primitive = dnnl::matmul(chosen);
  impl_->x = memory(x_desc, impl_->engine, nullptr);
  impl_->y = memory(y_desc, impl_->engine, nullptr);
  impl_->w = memory(chosen.weights_desc(), impl_->engine);
  memory source(plain, impl_->engine, const_cast<void*>(w));
  dnnl::reorder(source, impl_->w).execute(impl_->stream, source, impl_->w);
  impl_->stream.wait();
}

OneDnnProduct::~OneDnnProduct() = default;

void OneDnnProduct::run(const void* x, void* y) {
  impl_->x.set_data_handle(const_cast<void*>(x));
  impl_->y.set_data_handle(y);
  impl_->primitive.execute(
      impl_->stream,
      {{DNNL_ARG_SRC, impl_->x}, {DNNL_ARG_WEIGHTS, impl_->w}, {DNNL_ARG_DST, impl_->y}});
  impl_->stream.wait();
}

}  // namespace tandem::kernels::cpu
