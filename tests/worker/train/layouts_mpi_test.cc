// The layouts of as many ranks as mpirun started, over MPI: the losses of one rank, and the bits of
// the same layout over threads.
#include "tests/support/rank_job.h"
#include "worker/comm/mpi_communicator.h"

#include <gtest/gtest.h>

namespace tandem::test {
namespace {

worker::comm::Communicator* gang = nullptr;

template <class F>
void for_each_job(const F& f) {
  int jobs = 0;
  for (const auto& layout : tested_layouts())
    for (const bool full : {false, true}) {
      if (layout.ranks() != gang->size()) continue;
      SCOPED_TRACE(layout_name(layout) + (full ? " full" : " lora"));
      RankJob job;
      job.layout = layout;
      job.full = full;
      f(job);
      ++jobs;
    }
  ASSERT_GT(jobs, 0) << "no layout has " << gang->size() << " ranks";
}

TEST(LayoutsOverMpi, ThirtyLossesInF64AreThoseOfOneRank) {
  for_each_job([](RankJob job) {
    job.exact = true;
    const RankResult want = as_one_rank(job), got = run_rank(*gang, job);
    ASSERT_EQ(got.losses.size(), 30u);
    for (std::size_t s = 0; s < want.losses.size(); ++s)
      EXPECT_NEAR(got.losses[s], want.losses[s], 1e-9) << "step " << s + 1;
  });
}

TEST(LayoutsOverMpi, TwoRunsAndTheThreadsInF32EndWithTheSameBits) {
  for_each_job([](RankJob job) {
    job.steps = 4;
    const RankResult a = run_rank(*gang, job), b = run_rank(*gang, job);
    const RankResult threads = run_as_threads(job)[static_cast<std::size_t>(gang->rank())];
    for (const RankResult* other : {&b, &threads}) {
      EXPECT_EQ(a.losses, other->losses);
      ASSERT_EQ(a.state.tensors.size(), other->state.tensors.size());
      for (std::size_t t = 0; t < a.state.tensors.size(); ++t)
        EXPECT_EQ(a.state.tensors[t].values, other->state.tensors[t].values)
            << a.state.tensors[t].name;
    }
  });
}

}  // namespace
}  // namespace tandem::test

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  auto comm = tandem::worker::comm::make_mpi_communicator();
  TANDEM_CHECK(comm.ok(), comm.status().to_string());
  tandem::test::gang = comm->get();
  return RUN_ALL_TESTS();
}
