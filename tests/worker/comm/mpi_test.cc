// The claims of collective_checks.h as a gang under mpirun. `mpi_test stuck`: rank 0 waits for
// members that never come and must get a DeviceError in time.
#include "kernels/device_error.h"
#include "tests/worker/comm/collective_checks.h"
#include "worker/comm/mpi_communicator.h"

#include <unistd.h>

#include <chrono>
#include <iostream>
#include <thread>

namespace tandem::worker::comm {
namespace {

Communicator* gang = nullptr;

TEST(Mpi, SumsAreTakenInRankOrderToTheSameBitsEverywhere) {
  RankDevice device;
  check_sums<float>(*gang, device.exec);
  check_sums<bf16>(*gang, device.exec);
  check_sums<double>(*gang, device.exec);
}
TEST(Mpi, MovesPutEveryPartInItsPlace) {
  RankDevice device;
  check_moves(*gang, device.exec);
}
TEST(Mpi, GroupsOfEveryLayoutHoldTheRanksThatItNames) {
  RankDevice device;
  check_groups(*gang, device.exec);
}

int stuck() {
  auto comm = make_mpi_communicator({.timeout_ms = 500});
  TANDEM_CHECK(comm.ok(), comm.status().to_string());
  RankDevice device;
  if ((*comm)->rank() != 0) {
    std::this_thread::sleep_for(std::chrono::seconds(30));  // until mpirun ends us
    return 0;
  }
  std::vector<float> x(100);
  const std::int64_t begin = steady_ns();
  try {
    (*comm)->all_reduce_sum(device.exec, over(x));
  } catch (const kernels::DeviceError& error) {
    const bool in_time = steady_ns() - begin < scaled_ms(10'000) * 1'000'000;
    std::cout << (in_time ? "raised in time: " : "late: ") << error.what() << std::endl;
    ::_exit(3);
  }
  return 1;
}

}  // namespace
}  // namespace tandem::worker::comm

int main(int argc, char** argv) {
  using namespace tandem::worker::comm;
  if (argc > 1 && std::string(argv[1]) == "stuck") return stuck();
  testing::InitGoogleTest(&argc, argv);
  auto comm = make_mpi_communicator();
  TANDEM_CHECK(comm.ok(), comm.status().to_string());
  gang = comm->get();
  return RUN_ALL_TESTS();
}
