#include "tests/support/op_harness.h"

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_backend.h"
#include "protocol/base/random.h"
#include "protocol/base/units.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace tandem::kernels::testing {
namespace {

constexpr std::int64_t kGuardBytes = kDeviceAlignment;
constexpr std::byte kGuard{0xa5};
constexpr std::int64_t kArenaBytes = std::int64_t{1} << 32;

/// A GPU takes long to open: one backend serves all tests of a program, and is left to the end of
/// the process. Null where there is none.
Backend* gpu() {
  static Backend* const backend = []() -> Backend* {
    auto made = make_cuda_backend({});
    if (made.ok()) return new Backend(std::move(*made));
    TANDEM_CHECK(std::getenv("TANDEM_TEST_GPU") == nullptr, made.status().to_string());
    return nullptr;
  }();
  return backend;
}

std::shared_ptr<Backend> make_backend(const std::string& name, int threads) {
  if (name == "cuda") return {gpu(), [](Backend*) {}};
  TANDEM_CHECK(name == "cpu", "no backend named ", name);
  return std::make_shared<Backend>(make_cpu_backend({.threads = threads}));
}

template <class T>
void append(std::vector<std::byte>& out, T value) {
  const auto* p = reinterpret_cast<const std::byte*>(&value);
  out.insert(out.end(), p, p + sizeof value);
}

std::vector<std::byte> encode(const Values& values, DType dtype) {
  std::vector<std::byte> out;
  for (double v : values) {
    if (dtype == DType::kF32) append(out, static_cast<float>(v));
    if (dtype == DType::kBF16) append(out, to_bf16(static_cast<float>(v)));
    if (dtype == DType::kF16) append(out, to_f16(static_cast<float>(v)));
  }
  return out;
}

}  // namespace

std::vector<std::string> executing_backends() {
  if (std::getenv("TANDEM_TEST_GPU") != nullptr) return {"cuda"};
  return gpu() != nullptr ? std::vector<std::string>{"cpu", "cuda"}
                          : std::vector<std::string>{"cpu"};
}

Values rounded(Values values, DType dtype) {
  for (double& v : values) {
    const auto f = static_cast<float>(v);
    v = dtype == DType::kBF16 ? to_f32(to_bf16(f)) : dtype == DType::kF16 ? to_f32(to_f16(f)) : f;
  }
  return values;
}

Values random_values(std::int64_t count, DType dtype, std::uint64_t seed, double scale) {
  Random random(seed);
  Values values(static_cast<std::size_t>(count));
  for (double& v : values) v = scale * random.normal();
  return rounded(std::move(values), dtype);
}

Values Output::values() const {
  Values out(static_cast<std::size_t>(shape.elements()));
  const std::byte* p = bytes.data();
  const auto size = static_cast<std::size_t>(dtype_bytes(dtype));
  for (double& v : out) {
    if (dtype == DType::kF32) {
      float x;
      std::memcpy(&x, p, size);
      v = x;
    } else if (dtype == DType::kBF16) {
      bf16 x;
      std::memcpy(&x, p, size);
      v = to_f32(x);
    } else if (dtype == DType::kF16) {
      f16 x;
      std::memcpy(&x, p, size);
      v = to_f32(x);
    } else {
      TANDEM_CHECK(dtype == DType::kI32, "no numbers of ", dtype_name(dtype));
      std::int32_t x;
      std::memcpy(&x, p, size);
      v = x;
    }
    p += size;
  }
  return out;
}

std::vector<std::byte> Output::rows(std::int64_t begin, std::int64_t count) const {
  const std::int64_t row = static_cast<std::int64_t>(bytes.size()) / shape[0];
  return {bytes.begin() + begin * row, bytes.begin() + (begin + count) * row};
}

namespace {
/// memcheck reports a bulk copy that passes from one mapped page to the next: what fits one begins
/// in it.
void stay_in_page(Arena& arena, std::int64_t bytes) {
  const std::int64_t left = round_up(arena.used(), kMapGranularity) - arena.used();
  if (left < bytes && bytes <= kMapGranularity) arena.alloc_bytes(left);
}
}  // namespace

TestDevice::TestDevice(const std::string& backend, int threads)
    : backend_(make_backend(backend, threads)),
      tensors_(*backend_->allocator, *backend_->ledger, MemoryKind::kActivations, "test tensors",
               kArenaBytes),
      workspace_(*backend_->allocator, *backend_->ledger, MemoryKind::kWorkspace, "test workspace",
                 kArenaBytes),
      exec_{workspace_, {}, Numerics::kInvariant} {}

TestDevice::~TestDevice() = default;

Tensor TestDevice::place(const std::string& name, const std::vector<std::byte>& content,
                         DType dtype, Shape shape, bool keep) {
  const auto size = static_cast<std::int64_t>(content.size());
  // The tensor ends right at its guard; its start is aligned.
  const std::int64_t span = kGuardBytes + size + kGuardBytes;
  std::vector<std::byte> image(static_cast<std::size_t>(span), kGuard);
  std::copy(content.begin(), content.end(), image.begin() + kGuardBytes);
  stay_in_page(tensors_, span);
  auto* begin = static_cast<char*>(tensors_.alloc_bytes(span));
  ops().upload(exec_, image, {begin, DType::kU8, Shape{span}});
  const Tensor tensor{begin + kGuardBytes, dtype, shape};
  buffers_.push_back({name, tensor, begin, span, keep ? content : std::vector<std::byte>{}});
  return tensor;
}

Tensor TestDevice::input(const Values& values, DType dtype, Shape shape) {
  TANDEM_CHECK_EQ(static_cast<std::int64_t>(values.size()), shape.elements());
  return place("", encode(values, dtype), dtype, shape, true);
}

Tensor TestDevice::ints(const std::vector<std::int32_t>& values) {
  std::vector<std::byte> content;
  for (std::int32_t v : values) append(content, v);
  return place("", content, DType::kI32, Shape{static_cast<std::int64_t>(values.size())}, true);
}

Tensor TestDevice::longs(const std::vector<std::int64_t>& values) {
  std::vector<std::byte> content;
  for (std::int64_t v : values) append(content, v);
  return place("", content, DType::kI64, Shape{static_cast<std::int64_t>(values.size())}, true);
}

Tensor TestDevice::bytes(const void* data, std::int64_t count) {
  const auto* p = static_cast<const std::byte*>(data);
  return place("", {p, p + count}, DType::kU8, Shape{count}, true);
}

Tensor TestDevice::in_out(const std::string& name, const Values& values, DType dtype, Shape shape) {
  TANDEM_CHECK_EQ(static_cast<std::int64_t>(values.size()), shape.elements());
  return place(name, encode(values, dtype), dtype, shape, false);
}

Tensor TestDevice::output(const std::string& name, DType dtype, Shape shape) {
  // All ones is a NaN in every floating dtype.
  const auto size = static_cast<std::size_t>(shape.elements() * dtype_bytes(dtype));
  return place(name, std::vector<std::byte>(size, std::byte{0xff}), dtype, shape, false);
}

PackedWeight TestDevice::weight(const Values& values, DType dtype, std::int64_t n, std::int64_t i) {
  return ops().pack_weight(
      exec_, tensors_, dtype, n, i, [&](std::int64_t row, std::int64_t rows, float* out) {
        for (std::int64_t j = 0; j < rows * i; ++j)
          out[j] = static_cast<float>(values[static_cast<std::size_t>(row * i + j)]);
      });
}

Outputs TestDevice::collect() {
  ops().synchronize(exec_);
  EXPECT_EQ(workspace_.used(), 0) << "an op left scratch behind";
  Outputs outputs;
  for (const Buffer& b : buffers_) {
    std::vector<std::byte> image(static_cast<std::size_t>(b.span_bytes));
    ops().download(exec_, {b.guard_begin, DType::kU8, Shape{b.span_bytes}}, image);
    const auto is_guard = [](std::byte x) { return x == kGuard; };
    const std::string name = b.name.empty() ? "an input" : b.name;
    EXPECT_TRUE(std::all_of(image.begin(), image.begin() + kGuardBytes, is_guard))
        << name << ": bytes before the tensor were written";
    EXPECT_TRUE(std::all_of(image.end() - kGuardBytes, image.end(), is_guard))
        << name << ": bytes behind the tensor were written";
    std::vector<std::byte> content(image.begin() + kGuardBytes, image.end() - kGuardBytes);
    if (b.name.empty()) {
      EXPECT_EQ(content, b.before) << "an input of shape " << b.tensor.shape << " was changed";
      continue;
    }
    Output output{b.tensor.dtype, b.tensor.shape, std::move(content)};
    if (is_stored_float(output.dtype)) {
      const Values values = output.values();
      const auto bad =
          std::find_if(values.begin(), values.end(), [](double v) { return std::isnan(v); });
      EXPECT_TRUE(bad == values.end())
          << name << ": element " << bad - values.begin() << " of " << output.shape << " is NaN";
    }
    outputs[b.name] = std::move(output);
  }
  return outputs;
}

Outputs run_op(const std::string& backend, const std::function<void(TestDevice&)>& run) {
  Outputs first;
  for (int attempt = 0; attempt < 3; ++attempt) {
    TestDevice device(backend, attempt == 0 ? 1 : 2);
    run(device);
    Outputs outputs = device.collect();
    if (attempt == 0) {
      first = std::move(outputs);
      continue;
    }
    for (const auto& [name, output] : outputs)
      EXPECT_EQ(output.bytes, first.at(name).bytes)
          << name << ": bits differ between " << (attempt == 1 ? "1 and 2 threads" : "two runs");
  }
  return first;
}

double unit_roundoff(DType dtype) {
  return dtype == DType::kBF16 ? 0x1p-8 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-24;
}

double tolerance(DType dtype, std::int64_t reduction, int roundings) {
  return roundings * unit_roundoff(dtype) +
         4.0 * std::sqrt(static_cast<double>(std::max<std::int64_t>(1, reduction))) * 0x1p-24;
}

double relative_error(const Values& got, const Values& want) {
  TANDEM_CHECK_EQ(got.size(), want.size());
  double difference = 0.0, reference = 0.0;
  for (std::size_t j = 0; j < got.size(); ++j) {
    difference += (got[j] - want[j]) * (got[j] - want[j]);
    reference += want[j] * want[j];
  }
  if (difference == 0.0) return 0.0;
  return reference == 0.0 ? INFINITY : std::sqrt(difference / reference);
}

void expect_close(const std::string& what, const Values& got, const Values& want,
                  double tolerance) {
  ASSERT_EQ(got.size(), want.size()) << what;
  const double error = relative_error(got, want);
  std::size_t worst = 0;
  for (std::size_t j = 0; j < got.size(); ++j)
    if (!(std::abs(got[j] - want[j]) <= std::abs(got[worst] - want[worst]))) worst = j;
  // Written so that a NaN fails.
  EXPECT_TRUE(error <= tolerance) << what << ": relative error " << error << ", tolerance "
                                  << tolerance << "; worst element " << worst << " of "
                                  << got.size() << ": " << (got.empty() ? 0.0 : got[worst])
                                  << ", expected " << (want.empty() ? 0.0 : want[worst]);
}

Values numeric_gradient(const std::function<double(const Values&)>& f, Values x) {
  constexpr double kStep = 1e-5;
  Values gradient(x.size());
  for (std::size_t j = 0; j < x.size(); ++j) {
    const double at = x[j];
    x[j] = at + kStep;
    const double up = f(x);
    x[j] = at - kStep;
    const double down = f(x);
    x[j] = at;
    gradient[j] = (up - down) / (2.0 * kStep);
  }
  return gradient;
}

}  // namespace tandem::kernels::testing
