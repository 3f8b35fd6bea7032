#include "tools/bench_gang.h"

#include "protocol/base/clock.h"
#include "protocol/base/str.h"
#include "worker/comm/device_gang.h"
#include "worker/comm/mpi_communicator.h"

#include <cstdlib>

namespace tandem::tools {

int local_rank() {
  const char* rank = std::getenv("OMPI_COMM_WORLD_LOCAL_RANK");
  return rank == nullptr ? 0 : std::atoi(rank);
}

int started_ranks() {
  const char* ranks = std::getenv("OMPI_COMM_WORLD_SIZE");
  return ranks == nullptr ? 1 : std::atoi(ranks);
}

Result<BenchGang> make_bench_gang(int ranks, bool gathers, kernels::Ops& ops, kernels::Exec& exec) {
  BenchGang gang;
  if (ranks == 1) {
    gang.device = worker::comm::make_single_communicator(
        [&ops](kernels::Exec& e, kernels::Tensor from, kernels::Tensor to) {
          ops.copy(e, from, to);
        });
    return gang;
  }
  TANDEM_ASSIGN_OR_RETURN(gang.host, worker::comm::make_mpi_communicator());
  if (gang.host->size() != ranks)
    return invalid_error(str("the layout has ", ranks, " ranks, and there are ", gang.host->size(),
                             "; start it under mpirun -np ", ranks));
  worker::comm::NcclOptions options;
  options.device = local_rank();
  if (gathers) options.multiprocessors_max = worker::comm::kGatherMultiprocessors;
  TANDEM_ASSIGN_OR_RETURN(gang.device, worker::comm::join_devices(*gang.host, ops, exec, options));
  exec.stream = ops.make_stream(false);
  return gang;
}

namespace {

using kernels::Exec;
using kernels::Tensor;
using worker::comm::Communicator;
using worker::comm::Message;
using worker::comm::Pending;

class Timer {
 public:
  explicit Timer(std::int64_t& ns) : ns_(ns), begin_(steady_ns()) {}
  ~Timer() { ns_ += steady_ns() - begin_; }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

 private:
  std::int64_t& ns_;
  const std::int64_t begin_;
};

class TimedPending final : public Pending {
 public:
  TimedPending(std::unique_ptr<Pending> pending, std::int64_t& ns)
      : pending_(std::move(pending)), ns_(ns) {}
  void wait(Exec& exec) override {
    const Timer timer(ns_);
    pending_->wait(exec);
  }

 private:
  const std::unique_ptr<Pending> pending_;
  std::int64_t& ns_;
};

class TimedCommunicator final : public Communicator {
 public:
  TimedCommunicator(std::unique_ptr<Communicator> comm, std::int64_t& ns)
      : comm_(std::move(comm)), ns_(ns) {}
  [[nodiscard]] int rank() const override { return comm_->rank(); }
  [[nodiscard]] int size() const override { return comm_->size(); }
  void all_reduce_sum(Exec& exec, Tensor x) override {
    const Timer timer(ns_);
    comm_->all_reduce_sum(exec, x);
  }
  void all_gather(Exec& exec, Tensor x, Tensor out) override {
    const Timer timer(ns_);
    comm_->all_gather(exec, x, out);
  }
  std::unique_ptr<Pending> start_all_gather(Exec& exec, Tensor x, Tensor out) override {
    const Timer timer(ns_);
    return std::make_unique<TimedPending>(comm_->start_all_gather(exec, x, out), ns_);
  }
  void reduce_scatter_sum(Exec& exec, Tensor x, Tensor out) override {
    const Timer timer(ns_);
    comm_->reduce_scatter_sum(exec, x, out);
  }
  std::unique_ptr<Pending> start_reduce_scatter_sum(Exec& exec, Tensor x, Tensor out) override {
    const Timer timer(ns_);
    return std::make_unique<TimedPending>(comm_->start_reduce_scatter_sum(exec, x, out), ns_);
  }
  bool share(Exec& exec, Tensor x) override { return comm_->share(exec, x); }
  [[nodiscard]] bool has_background() const override { return comm_->has_background(); }
  [[nodiscard]] int background_multiprocessors() const override {
    return comm_->background_multiprocessors();
  }
  void broadcast(Exec& exec, Tensor x, int root) override {
    const Timer timer(ns_);
    comm_->broadcast(exec, x, root);
  }
  void barrier(Exec& exec) override {
    const Timer timer(ns_);
    comm_->barrier(exec);
  }
  void exchange_all(Exec& exec, std::span<const Message> sends,
                    std::span<const Message> receives) override {
    const Timer timer(ns_);
    comm_->exchange_all(exec, sends, receives);
  }
  std::unique_ptr<Communicator> sub(std::span<const int> members) override {
    return comm_->sub(members);
  }

 private:
  const std::unique_ptr<Communicator> comm_;
  std::int64_t& ns_;
};

}  // namespace

std::unique_ptr<Communicator> timed_communicator(std::unique_ptr<Communicator> comm,
                                                 std::int64_t& ns) {
  if (comm->size() == 1) return comm;
  return std::make_unique<TimedCommunicator>(std::move(comm), ns);
}

}  // namespace tandem::tools
