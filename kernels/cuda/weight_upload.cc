#include "kernels/cuda/weight_upload.h"

#include "kernels/cuda/cuda_check.h"
#include "protocol/base/processors.h"
#include "protocol/base/units.h"

#include <array>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace tandem::kernels::cuda {
namespace {

constexpr std::int64_t kUploadThreadsMax = 16;
/// A matrix of fewer elements per thread is not worth starting it.
constexpr std::int64_t kUploadThreadElements = 1 << 20;
/// Elements that are filled, rounded and sent at once.
constexpr std::int64_t kUploadElements = 1 << 19;

template <class T>
void round_rows(const float* from, std::int64_t count, std::byte* to) {
  for (std::int64_t e = 0; e < count; ++e) reinterpret_cast<T*>(to)[e] = from_f32<T>(from[e]);
}

/// Two halves of pinned memory, of which one is filled while the other is sent.
class PinnedPair {
 public:
  explicit PinnedPair(std::int64_t bytes) : bytes_(static_cast<std::size_t>(bytes)) {
    TANDEM_CUDA(cudaMallocHost(&base_, 2 * bytes_));
    for (cudaEvent_t& event : sent_)
      TANDEM_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  }
  ~PinnedPair() {
    for (cudaEvent_t event : sent_) {
      (void)cudaEventSynchronize(event);
      (void)cudaEventDestroy(event);
    }
    (void)cudaFreeHost(base_);
  }
  PinnedPair(const PinnedPair&) = delete;
  PinnedPair& operator=(const PinnedPair&) = delete;

  /// The half that is sent next, once the device has fetched what it held.
  std::byte* half() {
    TANDEM_CUDA(cudaEventSynchronize(sent_[at_]));
    return base_ + at_ * bytes_;
  }
  void send(cudaStream_t stream, void* to, std::int64_t bytes) {
    TANDEM_CUDA(cudaMemcpyAsync(to, base_ + at_ * bytes_, static_cast<std::size_t>(bytes),
                                cudaMemcpyHostToDevice, stream));
    TANDEM_CUDA(cudaEventRecord(sent_[at_], stream));
    at_ = 1 - at_;
  }

 private:
  const std::size_t bytes_;
  std::byte* base_ = nullptr;
  std::array<cudaEvent_t, 2> sent_{};
  std::size_t at_ = 0;
};

}  // namespace

struct UploadThreads::Impl {
  explicit Impl(int index) : device(index) {}

  void upload(cudaStream_t stream, const PackedWeight& w, const Ops::FillRows& fill) {
    const std::int64_t block = std::clamp<std::int64_t>(kUploadElements / w.i, 1, w.n);
    const std::int64_t bytes = block * w.i * dtype_bytes(w.dtype);
    if (bytes > half_bytes) {
      pairs.clear();
      half_bytes = bytes;
    }
    static const std::int64_t cores = processors();
    const auto count = static_cast<std::size_t>(std::clamp<std::int64_t>(
        w.n * w.i / kUploadThreadElements, 1, std::min(kUploadThreadsMax, cores)));
    while (pairs.size() < count) pairs.push_back(std::make_unique<PinnedPair>(half_bytes));
    next_row = 0;
    failure = nullptr;
    std::vector<std::thread> threads;
    for (std::size_t t = 1; t < count; ++t)
      threads.emplace_back([&, t] { run(*pairs[t], stream, w, fill, block); });
    run(*pairs[0], stream, w, fill, block);
    for (std::thread& thread : threads) thread.join();
    if (failure) std::rethrow_exception(failure);
  }

  void run(PinnedPair& pinned, cudaStream_t stream, const PackedWeight& w,
           const Ops::FillRows& fill, std::int64_t block) {
    try {
      TANDEM_CUDA(cudaSetDevice(device));
      std::vector<float> rows(static_cast<std::size_t>(block * w.i));
      const std::int64_t row_bytes = w.i * dtype_bytes(w.dtype);
      for (;;) {
        const std::int64_t row = next_row.fetch_add(block);
        if (row >= w.n) return;
        const std::int64_t count = std::min(block, w.n - row);
        fill(row, count, rows.data());
        std::byte* half = pinned.half();
        if (w.dtype == DType::kF32)
          std::memcpy(half, rows.data(), static_cast<std::size_t>(count * row_bytes));
        else if (w.dtype == DType::kF16)
          round_rows<f16>(rows.data(), count * w.i, half);
        else
          round_rows<bf16>(rows.data(), count * w.i, half);
        pinned.send(stream, static_cast<char*>(w.storage.data) + row * row_bytes,
                    count * row_bytes);
      }
    } catch (...) {
      const std::lock_guard lock(mutex);
      failure = std::current_exception();
      next_row = w.n;
    }
  }

  const int device;
  std::int64_t half_bytes = 0;
  std::vector<std::unique_ptr<PinnedPair>> pairs;
  std::atomic<std::int64_t> next_row{0};
  std::mutex mutex;
  std::exception_ptr failure;
};

UploadThreads::UploadThreads(int device) : impl_(std::make_unique<Impl>(device)) {}
UploadThreads::~UploadThreads() = default;

void UploadThreads::upload(cudaStream_t stream, const PackedWeight& to, const Ops::FillRows& fill) {
  TANDEM_CHECK(to.dtype == DType::kF32 || is_16_bit(to.dtype), dtype_name(to.dtype));
  impl_->upload(stream, to, fill);
}

}  // namespace tandem::kernels::cuda
