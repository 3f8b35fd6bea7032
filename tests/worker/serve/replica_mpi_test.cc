// Sharded replicas as processes over MPI: the layouts of as many ranks as mpirun started.
#include "tests/worker/serve/replica_fixture.h"
#include "worker/comm/mpi_communicator.h"

namespace tandem::worker::serve {
namespace {

comm::Communicator* gang = nullptr;

TEST(ReplicaOverMpi, AnswersAsOneRankDoes) {
  int replicas = 0;
  for (const comm::Layout& layout :
       {comm::Layout{1, 2, 1, 0}, comm::Layout{1, 1, 2, 0}, comm::Layout{1, 4, 1, 0},
        comm::Layout{1, 1, 4, 0}, comm::Layout{1, 2, 2, 0}}) {
    if (layout.ranks() != gang->size()) continue;
    SCOPED_TRACE(layout.to_string());
    const Outcomes got = run_replica(*gang, layout, true);
    if (gang->rank() == 0) expect_same(got, run_alone(true));
    ++replicas;
  }
  ASSERT_GT(replicas, 0);
}

}  // namespace
}  // namespace tandem::worker::serve

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  auto comm = tandem::worker::comm::make_mpi_communicator();
  TANDEM_CHECK(comm.ok(), comm.status().to_string());
  tandem::worker::serve::gang = comm->get();
  return RUN_ALL_TESTS();
}
