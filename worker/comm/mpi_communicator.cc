#include "worker/comm/mpi_communicator.h"

#include "kernels/device_error.h"
#include "protocol/base/random.h"
#include "protocol/base/str.h"
#include "worker/comm/collective_scratch.h"

#define OMPI_SKIP_MPICXX 1
#include <mpi.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
/// What a program that uses MPI starts with, before ASAN_OPTIONS. Leaks of Open MPI are known by
/// its libraries' names (tests/support/lsan.supp), which only whole stacks hold: it has no frame
/// pointers, and its components are unloaded before leaks are looked for.
extern "C" const char* __asan_default_options();
const char* __asan_default_options() {
  return "fast_unwind_on_malloc=0";
}
#endif

namespace tandem::worker::comm {

namespace {

using kernels::ArenaScope;
using kernels::DeviceError;
using kernels::Exec;
using kernels::Tensor;

/// MPI counts are int.
constexpr std::int64_t kMessageBytes = std::int64_t{1} << 30;
/// Sums of at most so many bytes go to every rank whole: one round instead of two.
constexpr std::int64_t kDirectBytes = 16 << 10;
/// A wait this long is no pause between two messages: from then on a rank sleeps between tests and
/// leaves its core to ranks that compute and engines that serve.
constexpr std::int64_t kSpinNs = 1'000'000;
constexpr useconds_t kNapUs = 50;

void check_mpi(int code, const char* what) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw DeviceError(str("MPI: ", what, ": ", text));
}

/// MPI between initialisation and finalization; shared by the gang and its sub-communicators.
class World {
 public:
  explicit World(MpiOptions options) : options_(std::move(options)) {
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    check_mpi(MPI_Comm_rank(MPI_COMM_WORLD, &rank_), "rank");
    check_mpi(MPI_Comm_size(MPI_COMM_WORLD, &size_), "size");
  }
  ~World() {
    if (!failed_) MPI_Finalize();
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  [[nodiscard]] int rank() const { return rank_; }
  [[nodiscard]] int size() const { return size_; }
  [[nodiscard]] TimeMs timeout_ms() const {
    const auto& current = options_.current_timeout_ms;
    return scaled_ms(current != nullptr ? current->load() : options_.timeout_ms);
  }
  void fail() { failed_ = true; }
  [[nodiscard]] bool failed() const { return failed_; }

 private:
  const MpiOptions options_;
  int rank_ = 0, size_ = 0;
  bool failed_ = false;
};

/// The messages of one collective: posted, then waited for together.
class Messages {
 public:
  Messages(World& world, int tag, const char* what) : world_(world), tag_(tag), what_(what) {}
  Messages(const Messages&) = delete;
  Messages& operator=(const Messages&) = delete;

  void send(const void* data, std::int64_t bytes, int to) {
    each_message(bytes, [&](std::int64_t at, int count) {
      check_mpi(MPI_Isend(static_cast<const char*>(data) + at, count, MPI_BYTE, to, tag_,
                          MPI_COMM_WORLD, next()),
                what_);
    });
  }
  void receive(void* data, std::int64_t bytes, int from) {
    each_message(bytes, [&](std::int64_t at, int count) {
      check_mpi(MPI_Irecv(static_cast<char*>(data) + at, count, MPI_BYTE, from, tag_,
                          MPI_COMM_WORLD, next()),
                what_);
    });
  }
  void wait() {
    if (requests_.empty()) return;
    if (world_.failed())  // what else is under way would take as long again
      throw DeviceError(str(what_, " on rank ", world_.rank(), ": another collective has failed"));
    const std::int64_t begin = steady_ns();
    const std::int64_t deadline = begin + world_.timeout_ms() * 1'000'000;
    while (true) {
      int done = 0;
      const int code = MPI_Testall(static_cast<int>(requests_.size()), requests_.data(), &done,
                                   MPI_STATUSES_IGNORE);
      if (code != MPI_SUCCESS) world_.fail();
      check_mpi(code, what_);
      if (done != 0) break;
      const std::int64_t now = steady_ns();
      if (now > deadline) {
        world_.fail();  // the requests and their memory are MPI's for ever: the process must end
        throw DeviceError(str(what_, " on rank ", world_.rank(), " of ", world_.size(),
                              " did not end within ", world_.timeout_ms(),
                              " ms: a member of the gang is gone or hangs"));
      }
      if (now - begin > kSpinNs)
        ::usleep(kNapUs);
      else
        ::sched_yield();
    }
    requests_.clear();
  }

 private:
  MPI_Request* next() { return &requests_.emplace_back(MPI_REQUEST_NULL); }
  template <class F>
  static void each_message(std::int64_t bytes, const F& f) {
    for (std::int64_t at = 0; at < bytes; at += kMessageBytes)
      f(at, static_cast<int>(std::min(kMessageBytes, bytes - at)));
  }

  World& world_;
  const int tag_;
  const char* what_;
  std::vector<MPI_Request> requests_;
};

/// Messages under way while something else runs.
struct PendingMessages final : Pending {
  PendingMessages(std::shared_ptr<World> w, int tag)
      : world(std::move(w)), messages(*world, tag, "all_gather") {}
  ~PendingMessages() override {
    try {
      messages.wait();
    } catch (const DeviceError&) {  // noted in the world: the process can only end
    }
  }
  void wait(Exec&) override { messages.wait(); }

  const std::shared_ptr<World> world;
  Messages messages;
};

/// Elements [begin, end) of a piece that `rank` sums.
struct Slice {
  std::int64_t begin, end;
  [[nodiscard]] std::int64_t count() const { return end - begin; }
};
Slice slice_of(const SumPlan& plan, std::int64_t piece, int rank) {
  return {std::min(piece, rank * plan.slice), std::min(piece, (rank + 1) * plan.slice)};
}

/// Of the n-th communicator made from one with that tag: its members agree on it whatever other
/// groups have made meanwhile. Two tags of a gang are the same once in 2^30.
int sub_tag(int tag, int n) {
  const auto path = static_cast<std::uint64_t>(tag) << 32 | static_cast<std::uint64_t>(n);
  return static_cast<int>(mix64(path) & 0x3fffffff);
}

class MpiCommunicator final : public Communicator {
 public:
  MpiCommunicator(std::shared_ptr<World> world, std::vector<int> members, int tag)
      : world_(std::move(world)), members_(std::move(members)), tag_(tag) {
    const auto at = std::find(members_.begin(), members_.end(), world_->rank());
    TANDEM_CHECK(at != members_.end(), "rank ", world_->rank(), " is not among the members");
    rank_ = static_cast<int>(at - members_.begin());
  }

  [[nodiscard]] int rank() const override { return rank_; }
  [[nodiscard]] int size() const override { return static_cast<int>(members_.size()); }

  void all_reduce_sum(Exec& exec, Tensor x) override {
    const SumPlan plan = all_reduce_plan(x.elements(), x.dtype, size());
    if (plan.bytes == 0) return;
    const ArenaScope scope(exec.workspace);
    char* scratch = static_cast<char*>(exec.workspace.alloc_bytes(plan.bytes));
    const std::int64_t width = dtype_bytes(x.dtype);
    for (std::int64_t e = 0; e < x.elements(); e += plan.piece) {
      char* piece = static_cast<char*>(x.data) + e * width;
      const std::int64_t count = std::min(plan.piece, x.elements() - e);
      if (count * width * size() <= std::min(kDirectBytes, plan.bytes))
        sum_direct(piece, count, x.dtype, scratch);
      else
        sum_by_slices(plan, piece, count, x.dtype, scratch);
    }
  }

  void all_gather(Exec&, Tensor x, Tensor out) override {
    Messages messages = start("all_gather");
    post_all_gather(messages, x, out);
    messages.wait();
  }
  std::unique_ptr<Pending> start_all_gather(Exec&, Tensor x, Tensor out) override {
    auto pending = std::make_unique<PendingMessages>(world_, tag_);
    post_all_gather(pending->messages, x, out);
    return pending;
  }

  void reduce_scatter_sum(Exec& exec, Tensor x, Tensor out) override {
    TANDEM_CHECK_EQ(x.elements(), out.elements() * size());
    TANDEM_CHECK(x.dtype == out.dtype);
    const SumPlan plan = reduce_scatter_plan(out.elements(), x.dtype, size());
    if (plan.bytes == 0) {
      if (out.data != x.data) std::memcpy(out.data, x.data, static_cast<std::size_t>(x.bytes()));
      return;
    }
    const ArenaScope scope(exec.workspace);
    char* scratch = static_cast<char*>(exec.workspace.alloc_bytes(plan.bytes));
    const std::int64_t width = dtype_bytes(x.dtype);
    const auto of = [&](int r, std::int64_t e) {
      return static_cast<char*>(x.data) + (r * out.elements() + e) * width;
    };
    for (std::int64_t e = 0; e < out.elements(); e += plan.piece) {
      const std::int64_t bytes = std::min(plan.piece, out.elements() - e) * width;
      std::vector<const void*> parts(members_.size(), of(rank_, e));
      Messages messages = start("reduce_scatter");
      for_others([&](int r) {
        parts[static_cast<std::size_t>(r)] = scratch + r * plan.piece * width;
        messages.receive(scratch + r * plan.piece * width, bytes, at(r));
      });
      for_others([&](int r) { messages.send(of(r, e), bytes, at(r)); });
      messages.wait();
      sum_in_rank_order(parts, x.dtype, bytes / width, static_cast<char*>(out.data) + e * width);
    }
  }

  void broadcast(Exec&, Tensor x, int root) override {
    TANDEM_CHECK(root >= 0 && root < size(), "root ", root);
    Messages messages = start("broadcast");
    if (rank_ == root)
      for_others([&](int r) { messages.send(x.data, x.bytes(), at(r)); });
    else
      messages.receive(x.data, x.bytes(), at(root));
    messages.wait();
  }

  void barrier(Exec&) override {
    char mine = 0;
    std::vector<char> theirs(members_.size());
    Messages messages = start("barrier");
    for_others([&](int r) { messages.receive(&theirs[static_cast<std::size_t>(r)], 1, at(r)); });
    for_others([&](int r) { messages.send(&mine, 1, at(r)); });
    messages.wait();
  }

  void exchange_all(Exec&, std::span<const Message> sends,
                    std::span<const Message> receives) override {
    Messages messages = start("exchange");
    for (const Message& m : receives) messages.receive(m.x.data, m.x.bytes(), at(other(m.rank)));
    for (const Message& m : sends) messages.send(m.x.data, m.x.bytes(), at(other(m.rank)));
    messages.wait();
  }

  std::unique_ptr<Communicator> sub(std::span<const int> members) override {
    std::vector<int> ranks;
    for (int r : members) {
      TANDEM_CHECK(r >= 0 && r < size(), "member ", r, " of ", size());
      ranks.push_back(at(r));
    }
    return std::make_unique<MpiCommunicator>(world_, std::move(ranks), sub_tag(tag_, ++subs_));
  }

 private:
  [[nodiscard]] Messages start(const char* what) { return Messages(*world_, tag_, what); }
  [[nodiscard]] int at(int r) const { return members_[static_cast<std::size_t>(r)]; }
  [[nodiscard]] int other(int r) const {
    TANDEM_CHECK(r >= 0 && r < size() && r != rank_, "rank ", r, " as seen by ", rank_, " of ",
                 size());
    return r;
  }
  /// Every other rank, the next one first: not all at the same rank at once.
  template <class F>
  void for_others(const F& f) const {
    for (int step = 1; step < size(); ++step) f((rank_ + step) % size());
  }

  void post_all_gather(Messages& messages, const Tensor& x, const Tensor& out) const {
    TANDEM_CHECK_EQ(out.bytes(), x.bytes() * size());
    char* to = static_cast<char*>(out.data);
    for_others([&](int r) { messages.receive(to + r * x.bytes(), x.bytes(), at(r)); });
    for_others([&](int r) { messages.send(x.data, x.bytes(), at(r)); });
    if (to + rank_ * x.bytes() != x.data)
      std::memcpy(to + rank_ * x.bytes(), x.data, static_cast<std::size_t>(x.bytes()));
  }

  void sum_direct(char* x, std::int64_t count, DType dtype, char* scratch) {
    const std::int64_t bytes = count * dtype_bytes(dtype);
    std::vector<const void*> parts(members_.size(), x);
    Messages messages = start("all_reduce");
    for_others([&](int r) {
      parts[static_cast<std::size_t>(r)] = scratch + r * bytes;
      messages.receive(scratch + r * bytes, bytes, at(r));
    });
    for_others([&](int r) { messages.send(x, bytes, at(r)); });
    messages.wait();
    sum_in_rank_order(parts, dtype, count, x);
  }

  /// Each rank sums its slice of everybody's and sends the sum to all.
  void sum_by_slices(const SumPlan& plan, char* x, std::int64_t count, DType dtype, char* scratch) {
    const std::int64_t width = dtype_bytes(dtype);
    const Slice mine = slice_of(plan, count, rank_);
    std::vector<const void*> parts(members_.size(), x + mine.begin * width);
    Messages messages = start("all_reduce");
    for_others([&](int r) {
      parts[static_cast<std::size_t>(r)] = scratch + r * plan.slice * width;
      messages.receive(scratch + r * plan.slice * width, mine.count() * width, at(r));
    });
    for_others([&](int r) {
      const Slice theirs = slice_of(plan, count, r);
      messages.send(x + theirs.begin * width, theirs.count() * width, at(r));
    });
    messages.wait();
    sum_in_rank_order(parts, dtype, mine.count(), x + mine.begin * width);
    for_others([&](int r) {
      const Slice theirs = slice_of(plan, count, r);
      messages.receive(x + theirs.begin * width, theirs.count() * width, at(r));
    });
    for_others([&](int r) { messages.send(x + mine.begin * width, mine.count() * width, at(r)); });
    messages.wait();
  }

  const std::shared_ptr<World> world_;
  const std::vector<int> members_;  ///< ranks of MPI_COMM_WORLD
  const int tag_;                   ///< of this communicator: messages of two never meet
  int rank_ = 0, subs_ = 0;
};

}  // namespace

Result<std::unique_ptr<Communicator>> make_mpi_communicator(const MpiOptions& options) {
  int initialised = 0;
  MPI_Initialized(&initialised);
  TANDEM_CHECK(initialised == 0, "MPI is started once per process");
  int provided = MPI_THREAD_SINGLE;
  if (MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS ||
      provided < MPI_THREAD_FUNNELED)
    return unavailable_error("MPI does not start beside OpenMP threads");
  auto world = std::make_shared<World>(options);
  std::vector<int> members(static_cast<std::size_t>(world->size()));
  for (std::size_t r = 0; r < members.size(); ++r) members[r] = static_cast<int>(r);
  return std::unique_ptr<Communicator>(
      std::make_unique<MpiCommunicator>(std::move(world), std::move(members), 0));
}

}  // namespace tandem::worker::comm
