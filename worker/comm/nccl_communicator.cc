#include "worker/comm/nccl_communicator.h"

#include "kernels/device_error.h"
#include "protocol/base/str.h"
#include "worker/comm/nccl_module.h"

#include <cuda_runtime.h>
#include <nccl.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <thread>
#include <utility>

namespace tandem::worker::comm {

namespace {

using kernels::ArenaScope;
using kernels::DeviceError;
using kernels::Exec;
using kernels::Tensor;

static_assert(sizeof(ncclUniqueId) == std::tuple_size_v<NcclId>);

void check_cuda(cudaError_t code, const char* what) {
  if (code != cudaSuccess) throw DeviceError(str("CUDA: ", what, ": ", cudaGetErrorName(code)));
}

cudaStream_t stream_of(const Exec& exec) {
  TANDEM_CHECK(exec.stream.handle != nullptr, "a collective needs a queue of Ops::make_stream");
  return static_cast<cudaStream_t>(exec.stream.handle);
}

ncclDataType_t nccl_type(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return ncclFloat32;
    case DType::kF64:
      return ncclFloat64;
    case DType::kBF16:
      return ncclBfloat16;
    default:
      TANDEM_CHECK(false, "no sums of ", dtype_name(dtype));
      return ncclFloat32;
  }
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
      const std::uint64_t noted = noted_.load(std::memory_order_acquire);
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
  std::vector<const ncclComm_t*> comms_;
  // The watching thread's.
  cudaEvent_t passed_ = nullptr;
  bool pending_ = false;
  std::uint64_t seen_ = 0;
  std::int64_t begin_ns_ = 0;
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
    } catch (const DeviceError&) {
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
    throw DeviceError(str("NCCL: ", what, " on ", watch_->rank_name(), ": ", why));
  }

 private:
  const std::shared_ptr<Watch> watch_;
  ncclComm_t comm_ = nullptr;
  bool failed_ = false;
};

/// What runs on a second queue until somebody waits for it.
class Gather final : public Pending {
 public:
  Gather(cudaStream_t main, cudaStream_t side) : main_(main) {
    check_cuda(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming), "event");
    check_cuda(cudaEventRecord(done_, side), "event");
  }
  ~Gather() override {
    if (!waited_) (void)cudaStreamWaitEvent(main_, done_);
    (void)cudaEventDestroy(done_);
  }
  Gather(const Gather&) = delete;
  Gather& operator=(const Gather&) = delete;
  void wait(Exec& exec) override {
    check_cuda(cudaStreamWaitEvent(stream_of(exec), done_), "wait for a gather");
    waited_ = true;
  }

 private:
  const cudaStream_t main_;
  cudaEvent_t done_ = nullptr;
  bool waited_ = false;
};

/// The queue of gathers in the background; urgent, so that they move while products run.
class SideQueue {
 public:
  SideQueue() {
    int least = 0, greatest = 0;
    check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "priorities");
    check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest), "queue");
    check_cuda(cudaEventCreateWithFlags(&forked_, cudaEventDisableTiming), "event");
  }
  ~SideQueue() {
    (void)cudaEventDestroy(forked_);
    (void)cudaStreamDestroy(stream_);
  }
  SideQueue(const SideQueue&) = delete;
  SideQueue& operator=(const SideQueue&) = delete;
  /// The queue, behind all that `main` holds now.
  cudaStream_t fork(cudaStream_t main) {
    check_cuda(cudaEventRecord(forked_, main), "event");
    check_cuda(cudaStreamWaitEvent(stream_, forked_), "fork");
    return stream_;
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t forked_ = nullptr;
};

class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(std::shared_ptr<Handle> handle, std::shared_ptr<SideQueue> side, int rank,
                   int size)
      : side_(std::move(side)),
        handle_(std::move(handle)),
        rank_(rank),
        size_(size),
        all_(static_cast<std::size_t>(size)) {
    std::iota(all_.begin(), all_.end(), 0);
  }

  [[nodiscard]] int rank() const override { return rank_; }
  [[nodiscard]] int size() const override { return size_; }

  void all_reduce_sum(Exec& exec, Tensor x) override {
    if (x.elements() == 0) return;
    const cudaStream_t s = stream_of(exec);
    issue("all_reduce", s, [&] {
      return ncclAllReduce(x.data, x.data, count(x), nccl_type(x.dtype), ncclSum, *handle_, s);
    });
  }
  void all_gather(Exec& exec, Tensor x, Tensor out) override { gather(stream_of(exec), x, out); }
  std::unique_ptr<Pending> start_all_gather(Exec& exec, Tensor x, Tensor out) override {
    const cudaStream_t side = side_->fork(stream_of(exec));
    gather(side, x, out);
    return std::make_unique<Gather>(stream_of(exec), side);
  }
  void reduce_scatter_sum(Exec& exec, Tensor x, Tensor out) override {
    TANDEM_CHECK_EQ(x.elements(), out.elements() * size_);
    TANDEM_CHECK(x.dtype == out.dtype);
    if (out.elements() == 0) return;
    const cudaStream_t s = stream_of(exec);
    issue("reduce_scatter", s, [&] {
      return ncclReduceScatter(x.data, out.data, count(out), nccl_type(x.dtype), ncclSum, *handle_,
                               s);
    });
  }
  void broadcast(Exec& exec, Tensor x, int root) override {
    TANDEM_CHECK(root >= 0 && root < size_, "root ", root);
    if (x.elements() == 0) return;
    const cudaStream_t s = stream_of(exec);
    issue("broadcast", s,
          [&] { return ncclBroadcast(x.data, x.data, bytes(x), ncclUint8, root, *handle_, s); });
  }
  void barrier(Exec& exec) override {
    const cudaStream_t s = stream_of(exec);
    const ArenaScope scope(exec.workspace);
    void* word = exec.workspace.alloc_bytes(sizeof(float));
    check_cuda(cudaMemsetAsync(word, 0, sizeof(float), s), "barrier");
    issue("barrier", s,
          [&] { return ncclAllReduce(word, word, 1, ncclFloat32, ncclSum, *handle_, s); });
    const TimeMs limit = handle_->timeout_ms();
    const std::int64_t deadline = steady_ns() + limit * 1'000'000;
    for (;;) {
      const cudaError_t code = cudaStreamQuery(s);
      if (code == cudaSuccess) return;
      if (code != cudaErrorNotReady) check_cuda(code, "barrier");
      if (steady_ns() > deadline)
        handle_->fail("barrier",
                      str("not done within ", limit, " ms: a member of the gang is gone or hangs"));
      ::sched_yield();
    }
  }
  void exchange_all(Exec& exec, std::span<const Message> sends,
                    std::span<const Message> receives) override {
    const cudaStream_t s = stream_of(exec);
    const auto lock = in_nccl();
    call("exchange", ncclGroupStart());
    for (const Message& m : sends)
      queue(ncclSend(m.x.data, bytes(m.x), ncclUint8, other(m.rank), *handle_, s));
    for (const Message& m : receives)
      queue(ncclRecv(m.x.data, bytes(m.x), ncclUint8, other(m.rank), *handle_, s));
    issue("exchange", s, [&] { return ncclGroupEnd(); });
  }

  std::unique_ptr<Communicator> sub(std::span<const int> members) override {
    const auto at = std::find(members.begin(), members.end(), rank_);
    TANDEM_CHECK(at != members.end(), "rank ", rank_, " is not among the members");
    const int key = static_cast<int>(at - members.begin());
    const auto lock = in_nccl();
    // Each communicator of NCCL's takes memory of the GPU: a group of all shares this one, and a
    // group of one needs none.
    if (std::equal(members.begin(), members.end(), all_.begin(), all_.end()))
      return std::make_unique<NcclCommunicator>(handle_, side_, rank_, size_);
    auto part = std::make_unique<Handle>(handle_->watch());
    ncclConfig_t config = part->config();
    const bool single = members.size() == 1;
    const int color =
        single ? NCCL_SPLIT_NOCOLOR : *std::min_element(members.begin(), members.end());
    const ncclResult_t code = ncclCommSplit(*handle_, color, key, part->out(), &config);
    if (code != ncclSuccess && code != ncclInProgress) call("split", code);
    if (!single) part->call("split", ncclInProgress);
    call("split", ncclInProgress);  // the parent has done its part, too
    if (single)
      return make_single_communicator([](Exec& exec, Tensor from, Tensor to) {
        check_cuda(cudaMemcpyAsync(to.data, from.data, bytes(from), cudaMemcpyDeviceToDevice,
                                   stream_of(exec)),
                   "copy");
      });
    return std::make_unique<NcclCommunicator>(std::move(part), side_, key,
                                              static_cast<int>(members.size()));
  }

 private:
  static std::size_t count(const Tensor& x) { return static_cast<std::size_t>(x.elements()); }
  static std::size_t bytes(const Tensor& x) { return static_cast<std::size_t>(x.bytes()); }
  [[nodiscard]] std::unique_lock<std::recursive_mutex> in_nccl() const {
    return handle_->watch()->in_nccl();
  }
  void call(const char* what, ncclResult_t code) { handle_->call(what, code); }
  /// `begin` puts a collective on `queue`.
  template <class Begin>
  void issue(const char* what, cudaStream_t queue, const Begin& begin) {
    const auto lock = in_nccl();
    handle_->call(what, begin());
    handle_->watch()->note(what, queue);
  }
  /// Inside a group: what is begun ends with the group.
  void queue(ncclResult_t code) {
    if (code != ncclSuccess && code != ncclInProgress) call("exchange", code);
  }
  [[nodiscard]] int other(int r) const {
    TANDEM_CHECK(r >= 0 && r < size_ && r != rank_, "rank ", r, " as seen by ", rank_, " of ",
                 size_);
    return r;
  }
  void gather(cudaStream_t s, const Tensor& x, const Tensor& out) {
    TANDEM_CHECK_EQ(out.bytes(), x.bytes() * size_);
    if (x.elements() == 0) return;
    issue("all_gather", s,
          [&] { return ncclAllGather(x.data, out.data, bytes(x), ncclUint8, *handle_, s); });
  }

  const std::shared_ptr<SideQueue> side_;  ///< outlives who watches what is on it
  const std::shared_ptr<Handle> handle_;   ///< shared by groups of all ranks
  const int rank_, size_;
  std::vector<int> all_;  ///< 0 .. size - 1
};

Result<NcclId> make_id() {
  ncclUniqueId id;
  const ncclResult_t code = ncclGetUniqueId(&id);
  if (code != ncclSuccess) return unavailable_error(str("NCCL: ", ncclGetErrorString(code)));
  NcclId out;
  std::memcpy(out.data(), &id, sizeof id);
  return out;
}

Result<std::unique_ptr<Communicator>> make(const NcclOptions& options) {
  TANDEM_CHECK(options.rank >= 0 && options.rank < options.size, "rank ", options.rank, " of ",
               options.size);
  // Multicast over NVLink is off unless somebody asks for it.
  (void)::setenv("NCCL_NVLS_ENABLE", "0", 0);
  try {
    check_cuda(cudaSetDevice(options.device), "device");
    auto handle = std::make_unique<Handle>(std::make_shared<Watch>(options));
    const auto lock = handle->watch()->in_nccl();
    ncclUniqueId id;
    std::memcpy(&id, options.id.data(), sizeof id);
    ncclConfig_t config = handle->config();
    handle->call("start",
                 ncclCommInitRankConfig(handle->out(), options.size, id, options.rank, &config));
    handle->call("start", ncclInProgress);
    return std::unique_ptr<Communicator>(std::make_unique<NcclCommunicator>(
        std::move(handle), std::make_shared<SideQueue>(), options.rank, options.size));
  } catch (const DeviceError& error) {
    return unavailable_error(error.what());
  }
}

}  // namespace
}  // namespace tandem::worker::comm

extern "C" __attribute__((visibility("default"))) const tandem::worker::comm::NcclModule*
tandem_nccl_module() {
  static const tandem::worker::comm::NcclModule module{
      TANDEM_VERSION, tandem::worker::comm::make_id, tandem::worker::comm::make};
  return &module;
}
