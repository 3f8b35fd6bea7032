// Memory traffic between host and device, and the life of the backend.
#include "kernels/cuda/cuda_ops.h"

#include "kernels/cuda/weight_upload.h"
#include "protocol/base/processors.h"
#include "protocol/base/units.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <exception>
#include <map>
#include <thread>
#include <utility>
#include <vector>

namespace tandem::kernels::cuda {

/// Pinned host memory that small copies pass through, so that neither direction waits for the
/// device to be idle and the caller's buffer is free again at once. Parts are reused in order; a
/// part is waited for only when the device is a whole ring behind.
class PinnedRing {
 public:
  explicit PinnedRing(int device) : device_(device), weights_(device) {
    TANDEM_CUDA(cudaMallocHost(&base_, kParts * kPartBytes));
    for (cudaEvent_t& event : used_)
      TANDEM_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  }
  ~PinnedRing() {
    for (cudaEvent_t event : used_) (void)cudaEventDestroy(event);
    (void)cudaFreeHost(base_);
  }
  PinnedRing(const PinnedRing&) = delete;
  PinnedRing& operator=(const PinnedRing&) = delete;

  /// Pinned memory that weights come through.
  UploadThreads& weights() { return weights_; }

  void upload(cudaStream_t stream, std::span<const std::byte> host, void* to) {
    for (std::size_t at = 0; at < host.size(); at += kPartBytes) {
      const std::size_t bytes = std::min(kPartBytes, host.size() - at);
      std::byte* part = take();
      std::memcpy(part, host.data() + at, bytes);
      TANDEM_CUDA(cudaMemcpyAsync(static_cast<std::byte*>(to) + at, part, bytes,
                                  cudaMemcpyHostToDevice, stream));
      TANDEM_CUDA(cudaEventRecord(used_[next_], stream));
      next_ = (next_ + 1) % kParts;
    }
  }

  /// The device fills later parts while the host empties the oldest. Much is emptied by several
  /// threads, each through parts of its own: one copies less than the device sends.
  void download(cudaStream_t stream, const void* from, std::span<std::byte> host) {
    const std::size_t parts = (host.size() + kPartBytes - 1) / kPartBytes;
    static const auto cores = static_cast<std::size_t>(processors());
    const std::size_t threads =
        parts < 2 * kParts ? 1 : std::bit_floor(std::clamp<std::size_t>(cores / 2, 1, kParts / 2));
    const std::size_t begin = std::exchange(next_, (next_ + parts) % kParts);
    std::vector<std::exception_ptr> failures(threads);
    const auto empty = [&](std::size_t first) noexcept {
      try {
        TANDEM_CUDA(cudaSetDevice(device_));
        const auto at = [&](std::size_t i) { return (begin + i) % kParts; };
        const auto bytes = [&](std::size_t i) {
          return std::min(kPartBytes, host.size() - i * kPartBytes);
        };
        for (std::size_t i = first, asked = first; i < parts; i += threads) {
          for (; asked < std::min(parts, i + kParts); asked += threads) {
            TANDEM_CUDA(cudaEventSynchronize(used_[at(asked)]));
            TANDEM_CUDA(cudaMemcpyAsync(base_ + at(asked) * kPartBytes,
                                        static_cast<const std::byte*>(from) + asked * kPartBytes,
                                        bytes(asked), cudaMemcpyDeviceToHost, stream));
            TANDEM_CUDA(cudaEventRecord(used_[at(asked)], stream));
          }
          TANDEM_CUDA(cudaEventSynchronize(used_[at(i)]));
          std::memcpy(host.data() + i * kPartBytes, base_ + at(i) * kPartBytes, bytes(i));
        }
      } catch (...) {
        failures[first] = std::current_exception();
      }
    };
    std::vector<std::thread> others;
    for (std::size_t t = 1; t < threads; ++t) others.emplace_back(empty, t);
    empty(0);
    for (std::thread& other : others) other.join();
    for (const std::exception_ptr& failure : failures)
      if (failure) std::rethrow_exception(failure);
  }

 private:
  static constexpr std::size_t kParts = 8, kPartBytes = 4 << 20;  // kParts: a power of two
  std::byte* take() {
    TANDEM_CUDA(cudaEventSynchronize(used_[next_]));
    return base_ + next_ * kPartBytes;
  }
  const int device_;
  UploadThreads weights_;
  std::byte* base_ = nullptr;
  std::size_t next_ = 0;
  std::array<cudaEvent_t, kParts> used_{};
};

/// Recorded sequences of ops, by the key that their caller gave them.
class Graphs {
 public:
  ~Graphs() { clear(); }
  Graphs() = default;
  Graphs(const Graphs&) = delete;
  Graphs& operator=(const Graphs&) = delete;

  /// The first time a key only runs: libraries set themselves up, arenas grow. The second time
  /// records.
  void run(cudaStream_t stream, std::uint64_t key, const std::function<void()>& body) {
    if (graphs_.size() >= kGraphsMax && !graphs_.contains(key)) clear();
    const auto [known, fresh] = graphs_.try_emplace(key, nullptr);
    if (fresh) return body();
    if (known->second == nullptr) known->second = record(stream, body);
    TANDEM_CUDA(cudaGraphLaunch(known->second, stream));
  }

 private:
  /// Keys beyond this many begin anew: a graph of a deep model takes about a megabyte.
  static constexpr std::size_t kGraphsMax = 128;

  static cudaGraphExec_t record(cudaStream_t stream, const std::function<void()>& body) {
    TANDEM_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    body();
    cudaGraph_t graph = nullptr;
    TANDEM_CUDA(cudaStreamEndCapture(stream, &graph));
    cudaGraphExec_t executable = nullptr;
    TANDEM_CUDA(cudaGraphInstantiate(&executable, graph, 0));
    TANDEM_CUDA(cudaGraphDestroy(graph));
    return executable;
  }
  void clear() {
    for (auto& [key, executable] : graphs_)
      if (executable != nullptr) (void)cudaGraphExecDestroy(executable);
    graphs_.clear();
  }
  std::map<std::uint64_t, cudaGraphExec_t> graphs_;
};

CudaOps::CudaOps(const CudaOptions& options, const DeviceProfile& profile)
    : options_(options),
      profile_(profile),
      ring_(std::make_unique<PinnedRing>(options.device)),
      graphs_(std::make_unique<Graphs>()) {
  TANDEM_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  for (cudaEvent_t& event : marks_)
    TANDEM_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
}

CudaOps::~CudaOps() {
  for (cudaEvent_t event : marks_) (void)cudaEventDestroy(event);
  for (cudaStream_t made : made_streams_) (void)cudaStreamDestroy(made);
  (void)cudaStreamDestroy(stream_);
}

Stream CudaOps::make_stream(bool urgent) {
  int least = 0, greatest = 0;
  TANDEM_CUDA(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  cudaStream_t made = nullptr;
  TANDEM_CUDA(
      cudaStreamCreateWithPriority(&made, cudaStreamNonBlocking, urgent ? greatest : least));
  made_streams_.push_back(made);
  return {made};
}

std::uint64_t CudaOps::mark(Exec& exec) {
  const std::uint64_t mark = next_mark_++;
  cudaEvent_t event = marks_[mark % kMarksMax];
  TANDEM_CUDA(cudaEventSynchronize(event));  // of the mark that it held before
  TANDEM_CUDA(cudaEventRecord(event, stream(exec)));
  return mark;
}

bool CudaOps::passed(std::uint64_t mark) {
  if (mark + kMarksMax < next_mark_) return true;  // mark() has waited for it
  const cudaError_t code = cudaEventQuery(marks_[mark % kMarksMax]);
  if (code == cudaErrorNotReady) return false;
  TANDEM_CUDA(code);
  return true;
}

void CudaOps::synchronize(Exec& exec) {
  TANDEM_CUDA(cudaStreamSynchronize(stream(exec)));
}

void CudaOps::replay(Exec& exec, std::uint64_t key, const std::function<void()>& body) {
  if (profiler_.on()) return body();
  graphs_->run(stream(exec), key, body);
}

void CudaOps::do_upload(Exec& exec, std::span<const std::byte> host, Tensor to) {
  ring_->upload(stream(exec), host, to.data);
}

void CudaOps::do_download(Exec& exec, Tensor from, std::span<std::byte> host) {
  ring_->download(stream(exec), from.data, host);
}

void CudaOps::do_fill_zero(Exec& exec, Tensor x) {
  TANDEM_CUDA(cudaMemsetAsync(x.data, 0, static_cast<std::size_t>(x.bytes()), stream(exec)));
}

void CudaOps::do_pack_weight(Exec& exec, PackedWeight& w, const FillRows& fill) {
  ring_->weights().upload(stream(exec), w, fill);
}

}  // namespace tandem::kernels::cuda
