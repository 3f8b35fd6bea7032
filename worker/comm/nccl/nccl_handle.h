// Private to libtandem_nccl.so: one communicator of NCCL's, and the thread that looks after all of
// a gang's.
#pragma once

#include "kernels/device_error.h"
#include "kernels/exec.h"
#include "protocol/base/str.h"
#include "worker/comm/nccl_communicator.h"

#include <cuda_runtime.h>
#include <nccl.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <thread>
#include <utility>

namespace tandem::worker::comm {

inline void check_cuda(cudaError_t code, const char* what) {
  if (code != cudaSuccess)
    throw kernels::DeviceError(str("CUDA: ", what, ": ", cudaGetErrorName(code)));
}

inline cudaStream_t stream_of(const kernels::Exec& exec) {
  TANDEM_CHECK(exec.stream.handle != nullptr, "a collective needs a queue of Ops::make_stream");
  return static_cast<cudaStream_t>(exec.stream.handle);
}

/// Looks after all communicators of one gang on a thread of its own: NCCL reports what fails after
/// a call to whoever asks, and what never ends is not reported at all.
class Watch {
 public:
  explicit Watch(const NcclOptions& options) : options_(options) {
    if (options_.on_failure) thread_ = std::thread([this] { run(); });
  }
  ~Watch() {
    over_ = true;
    if (thread_.joinable()) thread_.join();
  }
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  [[nodiscard]] const NcclOptions& options() const { return options_; }
  [[nodiscard]] TimeMs timeout_ms() const {
    const auto& current = options_.current_timeout_ms;
    return scaled_ms(current != nullptr ? current->load() : options_.timeout_ms);
  }
  [[nodiscard]] std::string rank_name() const {
    return str("rank ", options_.rank, " of ", options_.size);
  }
  /// Held over every call into NCCL: asking a communicator how it is takes part in its calls.
  [[nodiscard]] std::unique_lock<std::recursive_mutex> in_nccl() {
    return std::unique_lock(mutex_);
  }
  void add(const ncclComm_t* comm) {
    const auto lock = in_nccl();
    comms_.push_back(comm);
  }
  void remove(const ncclComm_t* comm) {
    const auto lock = in_nccl();
    std::erase(comms_, comm);
  }
  /// While this is held the watching thread leaves queues alone: they may be recorded.
  [[nodiscard]] std::unique_lock<std::mutex> hold_queue() { return std::unique_lock(queue_mutex_); }
  /// The device thread has put a collective on `queue`.
  void note(const char* what, cudaStream_t queue) {
    what_.store(what, std::memory_order_relaxed);
    queue_.store(queue, std::memory_order_relaxed);
    noted_.fetch_add(1, std::memory_order_release);
  }

 private:
  static constexpr std::chrono::milliseconds kLook{100};

  void run() {
    (void)cudaSetDevice(options_.device);
    std::string failure;
    if (cudaEventCreateWithFlags(&passed_, cudaEventDisableTiming) != cudaSuccess)
      failure = str("CUDA: no event to watch ", rank_name(), " with");
    while (failure.empty() && !over_) {
      std::this_thread::sleep_for(kLook);
      failure = reported();
      if (failure.empty()) failure = overdue();
    }
    if (!failure.empty() && !over_) return options_.on_failure(failure);
    (void)cudaEventDestroy(passed_);
  }

  /// What NCCL knows to have failed; "": nothing, or the device thread is in a call, which asks.
  std::string reported() {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return "";
    for (const ncclComm_t* comm : comms_) {
      const ncclComm_t made = __atomic_load_n(comm, __ATOMIC_ACQUIRE);
      ncclResult_t state = ncclSuccess;
      if (made == nullptr || ncclCommGetAsyncError(made, &state) != ncclSuccess) continue;
      if (state != ncclSuccess && state != ncclInProgress)
        return str("NCCL: ", last(), " on ", rank_name(), ": ", ncclGetErrorString(state), ": ",
                   ncclGetLastError(made));
    }
    return "";
  }

  /// A point behind the newest collective that the device does not reach in time; "": none.
  std::string overdue() {
    if (!pending_) {
      const std::unique_lock lock(queue_mutex_, std::try_to_lock);
      const std::uint64_t noted = noted_.load(std::memory_order_acquire);
      if (!lock.owns_lock()) return held_too_long(noted);
      held_since_ns_ = 0;
      if (noted == seen_) return "";
      seen_ = noted;
      pending_what_ = last();
      begin_ns_ = steady_ns();
      pending_ = true;
      const cudaError_t code = cudaEventRecord(passed_, queue_.load(std::memory_order_relaxed));
      if (code != cudaSuccess) return device_failure(code);
    }
    const cudaError_t code = cudaEventQuery(passed_);
    if (code == cudaSuccess) {
      pending_ = false;
      return "";
    }
    if (code != cudaErrorNotReady) return device_failure(code);
    const TimeMs limit = timeout_ms();
    if (steady_ns() - begin_ns_ <= limit * 1'000'000) return "";
    return str("NCCL: ", pending_what_, " on ", rank_name(), " did not end within ", limit,
               " ms: a member of the gang is gone or hangs");
  }
  /// The device thread issues what may be recorded. It gets stuck there where a queue is full that
  /// does not advance.
  std::string held_too_long(std::uint64_t noted) {
    if (held_since_ns_ == 0 || held_noted_ != noted) {
      held_since_ns_ = steady_ns();
      held_noted_ = noted;
      return "";
    }
    const TimeMs limit = timeout_ms();
    if (steady_ns() - held_since_ns_ <= limit * 1'000'000) return "";
    return str("NCCL: ", last(), " on ", rank_name(), " could not be issued within ", limit,
               " ms: a member of the gang is gone or hangs");
  }
  [[nodiscard]] std::string device_failure(cudaError_t code) const {
    return str("CUDA: after ", pending_what_, " on ", rank_name(), ": ", cudaGetErrorString(code));
  }
  [[nodiscard]] const char* last() const { return what_.load(std::memory_order_relaxed); }

  const NcclOptions options_;
  std::atomic<const char*> what_{"start"};
  std::atomic<cudaStream_t> queue_{nullptr};
  std::atomic<std::uint64_t> noted_{0};
  std::atomic<bool> over_{false};
  std::recursive_mutex mutex_;
  std::mutex queue_mutex_;
  std::vector<const ncclComm_t*> comms_;
  // The watching thread's.
  cudaEvent_t passed_ = nullptr;
  bool pending_ = false;
  std::uint64_t seen_ = 0;
  std::int64_t begin_ns_ = 0, held_since_ns_ = 0;
  std::uint64_t held_noted_ = 0;
  const char* pending_what_ = "";
  std::thread thread_;
};

/// One ncclComm_t. It never blocks: every call is followed until NCCL has taken it or has failed.
class Handle {
 public:
  explicit Handle(std::shared_ptr<Watch> watch) : watch_(std::move(watch)) { watch_->add(&comm_); }
  ~Handle() {
    const auto lock = watch_->in_nccl();
    watch_->remove(&comm_);
    if (comm_ == nullptr || failed_) return;  // after a failure even ending it can hang
    try {
      call("end", ncclCommFinalize(comm_));
    } catch (const kernels::DeviceError&) {
      return;
    }
    (void)ncclCommDestroy(comm_);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  ncclComm_t* out() { return &comm_; }
  operator ncclComm_t() const { return comm_; }
  [[nodiscard]] const std::shared_ptr<Watch>& watch() const { return watch_; }
  [[nodiscard]] TimeMs timeout_ms() const { return watch_->timeout_ms(); }
  [[nodiscard]] ncclConfig_t config() const {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    const int most = watch_->options().multiprocessors_max;
    if (most > 0) config.maxCTAs = most;
    return config;
  }

  /// Follows what `code` says was begun.
  void call(const char* what, ncclResult_t code) {
    const TimeMs limit = timeout_ms();
    const std::int64_t deadline = steady_ns() + limit * 1'000'000;
    while (code == ncclInProgress) {
      // A new communicator's handle may appear only after the call that asked for it.
      if (ncclComm_t made = __atomic_load_n(&comm_, __ATOMIC_ACQUIRE); made != nullptr) {
        ncclResult_t state = ncclInProgress;
        code = ncclCommGetAsyncError(made, &state);
        if (code == ncclSuccess) code = state;
      }
      if (code != ncclInProgress) break;
      if (steady_ns() > deadline) fail(what, str("not done within ", limit, " ms"));
      ::sched_yield();
    }
    if (code != ncclSuccess)
      fail(what, str(ncclGetErrorString(code), ": ", ncclGetLastError(comm_)));
  }
  [[noreturn]] void fail(const char* what, const std::string& why) {
    failed_ = true;
    throw kernels::DeviceError(str("NCCL: ", what, " on ", watch_->rank_name(), ": ", why));
  }

 private:
  const std::shared_ptr<Watch> watch_;
  ncclComm_t comm_ = nullptr;
  bool failed_ = false;
};

}  // namespace tandem::worker::comm
