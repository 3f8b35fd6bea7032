// The layouts of as many ranks as mpirun started, over MPI: the losses of one rank, and the bits of
// the same layout over threads.
#include "kernels/cpu/cpu_backend.h"
#include "tests/support/rank_job.h"
#include "worker/comm/mpi_communicator.h"
#include "worker/train/state_pieces.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

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

using worker::train::StateTensor;
using worker::train::TrainState;

void write_part(const std::string& path, const TrainState& state) {
  std::ofstream out(path, std::ios::binary);
  for (const StateTensor& t : state.tensors) {
    out << t.name << ' ' << t.shape.size();
    for (const std::int64_t n : t.shape) out << ' ' << n;
    out << ' ' << t.slice.row << ' ' << t.slice.rows << ' ' << t.slice.column << ' '
        << t.slice.columns << ' ' << t.first << ' ' << t.values.size() << '\n';
    out.write(reinterpret_cast<const char*>(t.values.data()),
              static_cast<std::streamsize>(t.values.size() * sizeof(float)));
  }
}

TrainState read_part(const std::string& path, const std::string& json) {
  TrainState state{json, {}};
  std::ifstream in(path, std::ios::binary);
  for (StateTensor t; in >> t.name;) {
    std::size_t dimensions = 0, values = 0;
    in >> dimensions;
    t.shape.resize(dimensions);
    for (std::int64_t& n : t.shape) in >> n;
    in >> t.slice.row >> t.slice.rows >> t.slice.column >> t.slice.columns >> t.first >> values;
    in.get();
    t.values.resize(values);
    in.read(reinterpret_cast<char*>(t.values.data()),
            static_cast<std::streamsize>(values * sizeof(float)));
    state.tensors.push_back(t);
  }
  return state;
}

/// Each rank writes its part at the same time; all of them read all parts.
TEST(LayoutsOverMpi, ACheckpointSavedInOneLayoutContinuesInEachOther) {
  kernels::Backend backend = kernels::make_cpu_backend({1, 0});
  kernels::Arena arena(*backend.allocator, *backend.ledger, kernels::MemoryKind::kWorkspace,
                       "workspace", 1 << 20);
  kernels::Exec exec{arena};
  const char* temporary = std::getenv("TMPDIR");
  const std::string folder = str(temporary != nullptr ? temporary : "/tmp", "/tandem_mpi_state_",
                                 gang->size(), "_", ::getppid());  // mpirun's, of all ranks
  int saved = 0;
  for_each_job([&](RankJob job) {
    const std::string here = str(folder, "/", saved++);
    job.steps = 9;
    const RankResult whole = run_rank(*gang, job);
    job.stop_after = 4;
    const RankResult part = run_rank(*gang, job);
    std::filesystem::create_directories(here);
    write_part(str(here, "/", gang->rank()), part.state);
    gang->barrier(exec);
    std::vector<TrainState> parts;
    for (int rank = 0; rank < gang->size(); ++rank)
      parts.push_back(read_part(str(here, "/", rank), part.state.json));
    const auto state = worker::train::merge_states(parts);
    ASSERT_TRUE(state.ok()) << state.status().to_string();
    job.stop_after = 0;
    job.resume = &*state;
    for (const auto& layout : tested_layouts()) {
      if (layout.ranks() != gang->size()) continue;
      job.layout = layout;
      const RankResult resumed = run_rank(*gang, job);
      ASSERT_EQ(resumed.losses.size(), 5u);
      for (std::size_t s = 0; s < resumed.losses.size(); ++s)
        EXPECT_NEAR(resumed.losses[s], whole.losses[s + 4], 1e-5)
            << "resumed in " << layout_name(layout);
    }
    gang->barrier(exec);
  });
  gang->barrier(exec);
  if (gang->rank() == 0) std::filesystem::remove_all(folder);
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
