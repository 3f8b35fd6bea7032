#include "worker/comm/nccl_communicator.h"

#include "protocol/base/log.h"
#include "worker/comm/nccl/nccl_handle.h"
#include "worker/comm/nccl/peer_collectives.h"
#include "worker/comm/nccl_module.h"

#include <cstdlib>
#include <cstring>
#include <deque>
#include <numeric>

namespace tandem::worker::comm {

namespace {

using kernels::ArenaScope;
using kernels::DeviceError;
using kernels::Exec;
using kernels::Tensor;

static_assert(sizeof(ncclUniqueId) == std::tuple_size_v<NcclId>);

ncclDataType_t nccl_type(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return ncclFloat32;
    case DType::kF64:
      return ncclFloat64;
    case DType::kBF16:
      return ncclBfloat16;
    case DType::kF16:
      return ncclFloat16;
    default:
      TANDEM_CHECK(false, "no sums of ", dtype_name(dtype));
      return ncclFloat32;
  }
}

/// What runs on a second queue until somebody waits for it.
class Behind final : public Pending {
 public:
  Behind(cudaStream_t main, cudaStream_t side) : main_(main) {
    check_cuda(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming), "event");
    check_cuda(cudaEventRecord(done_, side), "event");
  }
  ~Behind() override {
    if (!waited_) (void)cudaStreamWaitEvent(main_, done_);
    (void)cudaEventDestroy(done_);
  }
  Behind(const Behind&) = delete;
  Behind& operator=(const Behind&) = delete;
  void wait(Exec& exec) override {
    check_cuda(cudaStreamWaitEvent(stream_of(exec), done_), "wait for a collective");
    waited_ = true;
  }

 private:
  const cudaStream_t main_;
  cudaEvent_t done_ = nullptr;
  bool waited_ = false;
};

/// A sum whose addends come on a second queue; who waits for it adds them up.
class Addends final : public Pending {
 public:
  Addends(cudaStream_t main, cudaStream_t side, PeerCollectives& peers,
          const PeerCollectives::Addends& addends)
      : come_(main, side), peers_(peers), addends_(addends) {}
  ~Addends() override {
    if (!added_) peers_.drop(addends_);
  }
  Addends(const Addends&) = delete;
  Addends& operator=(const Addends&) = delete;
  void wait(Exec& exec) override {
    come_.wait(exec);
    peers_.add_up(stream_of(exec), addends_);
    added_ = true;
  }

 private:
  Behind come_;
  PeerCollectives& peers_;
  const PeerCollectives::Addends addends_;
  bool added_ = false;
};

/// The queue of what runs in the background; urgent, so that they move while products run.
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

/// Those of one gang, for as long as somebody may watch what is on them. Each group that begins
/// something in the background has one of its own: rows of a micro-batch do not stand in line
/// behind weights of a block.
using SideQueues = std::deque<SideQueue>;

bool on_one_host(const NcclOptions& options, const std::vector<int>& members) {
  const auto host = [&](int member) { return options.hosts[static_cast<std::size_t>(member)]; };
  return options.hosts.empty() || std::all_of(members.begin(), members.end(), [&](int member) {
           return host(member) == host(members.front());
         });
}

class NcclCommunicator final : public Communicator {
 public:
  /// `members`: ranks of the gang, in this communicator's order.
  NcclCommunicator(std::shared_ptr<Handle> handle, std::shared_ptr<SideQueues> sides, int rank,
                   std::vector<int> members, bool reaches_peers)
      : sides_(std::move(sides)),
        handle_(std::move(handle)),
        rank_(rank),
        size_(static_cast<int>(members.size())),
        members_(std::move(members)),
        gpu_reaches_(reaches_peers),
        reaches_peers_(reaches_peers && on_one_host(handle_->watch()->options(), members_)) {}

  [[nodiscard]] int rank() const override { return rank_; }
  [[nodiscard]] int size() const override { return size_; }

  void all_reduce_sum(Exec& exec, Tensor x) override {
    if (x.elements() == 0) return;
    const cudaStream_t s = stream_of(exec);
    if (const auto peers = this->peers(exec); peers != nullptr && peers->sum(s, x, recording(s)))
      return handle_->watch()->note("all_reduce", s);
    issue("all_reduce", s, [&] {
      return ncclAllReduce(x.data, x.data, count(x), nccl_type(x.dtype), ncclSum, *handle_, s);
    });
  }
  [[nodiscard]] bool sum_and_norm(Exec& exec, const kernels::AddRmsNormArgs& a) override {
    const cudaStream_t s = stream_of(exec);
    const auto peers = this->peers(exec);
    if (peers == nullptr || !peers->sum_and_norm(s, a)) return false;
    handle_->watch()->note("sum and norm", s);
    return true;
  }
  [[nodiscard]] bool gather_columns(Exec& exec, Tensor x, Tensor out) override {
    TANDEM_CHECK_EQ(out.bytes(), x.bytes() * size_);
    const cudaStream_t s = stream_of(exec);
    const auto peers = this->peers(exec);
    if (peers == nullptr || !peers->gather_columns(s, x, out)) return false;
    handle_->watch()->note("gather of columns", s);
    return true;
  }
  [[nodiscard]] bool records() const override { return peers_ != nullptr; }
  void issue_recorded(Exec& exec, const std::function<void()>& issue) override {
    const auto held = handle_->watch()->hold_queue();
    issue();
    handle_->watch()->note("replayed collectives", stream_of(exec));
  }
  void all_gather(Exec& exec, Tensor x, Tensor out) override {
    gather(stream_of(exec), x, out, nullptr);
  }
  std::unique_ptr<Pending> start_all_gather(Exec& exec, Tensor x, Tensor out) override {
    return behind(exec, [&](cudaStream_t side) { gather(side, x, out, peers_.get()); });
  }
  void reduce_scatter_sum(Exec& exec, Tensor x, Tensor out) override {
    reduce_scatter(stream_of(exec), x, out, nullptr);
  }
  std::unique_ptr<Pending> start_reduce_scatter_sum(Exec& exec, Tensor x, Tensor out) override {
    TANDEM_CHECK_EQ(x.elements(), out.elements() * size_);
    TANDEM_CHECK(x.dtype == out.dtype);
    // In 16 bits they are a stream's, which products wait for. What ZeRO sums in f32 is nobody's
    // until the step's end: it is added up on its way, and leaves the room to others.
    PeerCollectives::Addends addends;
    if (peers_ != nullptr && dtype_bytes(x.dtype) == 2 && out.elements() > 0) {
      const cudaStream_t side = fork(exec);
      if (peers_->fetch_addends(side, x, out, addends)) {
        handle_->watch()->note("reduce_scatter", side);
        return std::make_unique<Addends>(stream_of(exec), side, *peers_, addends);
      }
    }
    return behind(exec, [&](cudaStream_t side) { reduce_scatter(side, x, out, peers_.get()); });
  }
  bool share(Exec& exec, Tensor x) override {
    PeerCollectives* const peers = this->peers(exec);
    if (peers == nullptr || x.bytes() == 0) return false;
    const bool shared = all_agree(exec, peers->memory().share(x.data, x.bytes()));
    if (shared)
      peers->memory().keep();
    else
      peers->memory().drop();
    return shared;
  }
  [[nodiscard]] bool has_background() const override { return true; }
  [[nodiscard]] int background_multiprocessors() const override {
    return handle_->watch()->options().multiprocessors_max;
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
    std::vector<int> theirs;
    for (const int member : members) theirs.push_back(members_[static_cast<std::size_t>(member)]);
    if (theirs == members_)
      return std::make_unique<NcclCommunicator>(handle_, sides_, rank_, std::move(theirs),
                                                gpu_reaches_);
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
    return std::make_unique<NcclCommunicator>(std::move(part), sides_, key, std::move(theirs),
                                              gpu_reaches_);
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
  /// What is issued now is recorded: NCCL is left out of it.
  static bool recording(cudaStream_t queue) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(queue, &status), "recording");
    return status != cudaStreamCaptureStatusNone;
  }
  [[nodiscard]] int other(int r) const {
    TANDEM_CHECK(r >= 0 && r < size_ && r != rank_, "rank ", r, " as seen by ", rank_, " of ",
                 size_);
    return r;
  }
  cudaStream_t fork(const Exec& exec) {
    if (side_ == nullptr) side_ = &sides_->emplace_back();
    return side_->fork(stream_of(exec));
  }
  template <class Begin>
  std::unique_ptr<Pending> behind(const Exec& exec, const Begin& begin) {
    const cudaStream_t side = fork(exec);
    begin(side);
    return std::make_unique<Behind>(stream_of(exec), side);
  }
  /// `peers`: only on the side queue, for ranks count what they do together in one order.
  void gather(cudaStream_t s, const Tensor& x, const Tensor& out, PeerCollectives* peers) {
    TANDEM_CHECK_EQ(out.bytes(), x.bytes() * size_);
    if (x.elements() == 0) return;
    if (peers != nullptr && peers->gather(s, x, out))
      return handle_->watch()->note("all_gather", s);
    issue("all_gather", s,
          [&] { return ncclAllGather(x.data, out.data, bytes(x), ncclUint8, *handle_, s); });
  }

  void reduce_scatter(cudaStream_t s, const Tensor& x, const Tensor& out, PeerCollectives* peers) {
    TANDEM_CHECK_EQ(x.elements(), out.elements() * size_);
    TANDEM_CHECK(x.dtype == out.dtype);
    if (out.elements() == 0) return;
    if (peers != nullptr && peers->reduce_scatter(s, x, out))
      return handle_->watch()->note("reduce_scatter", s);
    issue("reduce_scatter", s, [&] {
      return ncclReduceScatter(x.data, out.data, count(out), nccl_type(x.dtype), ncclSum, *handle_,
                               s);
    });
  }
  /// Whether every rank's `mine` is ok.
  bool all_agree(Exec& exec, const Status& mine) {
    if (!mine.ok())
      log_warn(handle_->watch()->rank_name(),
               " leaves to NCCL what copy engines could do: ", mine.to_string());
    const cudaStream_t s = stream_of(exec);
    const ArenaScope scope(exec.workspace);
    void* word = exec.workspace.alloc_bytes(sizeof(float));
    float failures = mine.ok() ? 0.0f : 1.0f;
    check_cuda(cudaMemcpyAsync(word, &failures, sizeof failures, cudaMemcpyHostToDevice, s),
               "word");
    issue("agreement", s,
          [&] { return ncclAllReduce(word, word, 1, ncclFloat32, ncclSum, *handle_, s); });
    check_cuda(cudaMemcpyAsync(&failures, word, sizeof failures, cudaMemcpyDeviceToHost, s),
               "word");
    check_cuda(cudaStreamSynchronize(s), "agreement");
    return failures == 0.0f;
  }
  /// Made at the first use, which is the same call on every rank; null: not to be had.
  PeerCollectives* peers(Exec& exec) {
    if (asked_ || !reaches_peers_) return peers_.get();
    asked_ = true;
    if (size_ > kPeersMax) return nullptr;
    const NcclOptions& options = handle_->watch()->options();
    std::string name(reinterpret_cast<const char*>(options.id.data()), options.id.size());
    for (const int member : members_) name += str(" ", member);
    auto sockets =
        PeerSockets::connect(name, rank_, size_, handle_->timeout_ms(), [&] { barrier(exec); });
    if (!all_agree(exec, sockets.status())) return nullptr;
    auto memory = PeerMemory::create(std::move(*sockets), options.device, rank_, size_);
    if (!all_agree(exec, memory.status())) return nullptr;
    peers_ = std::make_unique<PeerCollectives>(std::move(*memory));
    return peers_.get();
  }

  const std::shared_ptr<SideQueues> sides_;  ///< outlive who watches what is on them
  SideQueue* side_ = nullptr;                ///< of sides_, made at its first use
  const std::shared_ptr<Handle> handle_;     ///< shared by groups of all ranks
  const int rank_, size_;
  const std::vector<int> members_;
  const bool gpu_reaches_;    ///< others of its host
  const bool reaches_peers_;  ///< and this group's are all of one
  bool asked_ = false;
  std::unique_ptr<PeerCollectives> peers_;
};

Result<NcclId> make_id() {
  ncclUniqueId id;
  const ncclResult_t code = ncclGetUniqueId(&id);
  if (code != ncclSuccess) return unavailable_error(str("NCCL: ", ncclGetErrorString(code)));
  NcclId out;
  std::memcpy(out.data(), &id, sizeof id);
  return out;
}

/// Whether this GPU can read all others of the host: what runs in the background then needs none of
/// its multiprocessors.
bool reaches_peers(int device) {
  const char* wish = std::getenv("TANDEM_GPU_PEERS");
  if (wish != nullptr && std::string_view(wish) == "off") return false;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess) return false;
  for (int other = 0; other < devices; ++other) {
    int can = 0;
    if (other != device &&
        (cudaDeviceCanAccessPeer(&can, device, other) != cudaSuccess || can == 0))
      return false;
  }
  return true;
}

Result<std::unique_ptr<Communicator>> make(const NcclOptions& asked) {
  NcclOptions options = asked;
  TANDEM_CHECK(options.rank >= 0 && options.rank < options.size, "rank ", options.rank, " of ",
               options.size);
  // Multicast over NVLink is off unless somebody asks for it.
  (void)::setenv("NCCL_NVLS_ENABLE", "0", 0);
  try {
    check_cuda(cudaSetDevice(options.device), "device");
    std::vector<int> all(static_cast<std::size_t>(options.size));
    std::iota(all.begin(), all.end(), 0);
    const bool peers = reaches_peers(options.device);
    if (peers && on_one_host(options, all)) options.multiprocessors_max = 0;
    auto handle = std::make_unique<Handle>(std::make_shared<Watch>(options));
    const auto lock = handle->watch()->in_nccl();
    ncclUniqueId id;
    std::memcpy(&id, options.id.data(), sizeof id);
    ncclConfig_t config = handle->config();
    handle->call("start",
                 ncclCommInitRankConfig(handle->out(), options.size, id, options.rank, &config));
    handle->call("start", ncclInProgress);
    return std::unique_ptr<Communicator>(std::make_unique<NcclCommunicator>(
        std::move(handle), std::make_shared<SideQueues>(), options.rank, std::move(all), peers));
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
