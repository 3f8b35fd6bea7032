// How the residual stream's rows are cut: decided from sizes alone, so that all ranks and the dry
// run agree.
#include "worker/model/stream_rows.h"
#include "kernels/device_profile.h"
#include "kernels/meta/meta_backend.h"

#include <gtest/gtest.h>

namespace tandem::test {
namespace {

using namespace worker;

struct OnPaper {
  OnPaper(int ranks, std::int64_t rows, std::int64_t width, DType dtype)
      : comm(comm::make_meta_communicator(0, ranks, false)),
        context{*backend.ops, exec, *comm, arena, dtype},
        room(model::make_stream_room(context, arena, rows, width, model::kStreamPartBytes)) {
    context.room = &room;
  }
  [[nodiscard]] std::int64_t parts(std::int64_t t) const {
    return model::stream_parts(context, t, t / comm->size());
  }

  kernels::Backend backend = kernels::make_meta_backend(kernels::DeviceProfile{});
  kernels::Arena arena{*backend.allocator, *backend.ledger, kernels::MemoryKind::kActivations,
                       "rows", std::int64_t{1} << 40};
  kernels::Exec exec{arena};
  std::unique_ptr<comm::Communicator> comm;
  model::Context context;
  model::StreamRoom room;
};

TEST(StreamRows, AreCutIntoEqualPartsOfAboutThirtyTwoMebibytes) {
  const OnPaper eight_billion(4, 32'768, 4096, DType::kBF16);
  EXPECT_EQ(eight_billion.parts(32'768), 8);
  EXPECT_EQ(eight_billion.parts(16'384), 4);
  EXPECT_EQ(eight_billion.parts(8192), 2);
  EXPECT_EQ(eight_billion.parts(4096), 2) << "one would hide nothing";
  EXPECT_EQ(eight_billion.parts(1024), 1) << "too small to be cut";
  const OnPaper seventy_billion(4, 4096, 8192, DType::kBF16);
  EXPECT_EQ(seventy_billion.parts(4096), 2);
  const OnPaper odd(3, 16'320, 4096, DType::kBF16);
  EXPECT_EQ(odd.parts(8208), 3);
  EXPECT_EQ(odd.parts(8256), 2) << "three do not divide a rank's rows";
  EXPECT_EQ(odd.parts(8259), 1) << "nothing does";
}

TEST(StreamRows, AreNotCutWhereEveryRankHasAllOrNobodyMadeRoom) {
  OnPaper eight_billion(4, 32'768, 4096, DType::kBF16);
  EXPECT_EQ(model::stream_parts(eight_billion.context, 8192, 8192), 1);
  eight_billion.context.room = nullptr;
  EXPECT_EQ(eight_billion.parts(8192), 1);
}

TEST(StreamRows, PartsOfAllRowsAndOfARanksRowsGoTogether) {
  const OnPaper paper(4, 8192, 4096, DType::kBF16);
  const auto all = paper.room.addends, own = paper.room.normed;
  EXPECT_EQ(own.dim(0), 2048);
  EXPECT_EQ(model::stream_part(all, 1, 2).data, all.rows(4096, 4096).data);
  EXPECT_EQ(model::stream_part(own, 1, 2).data, own.rows(1024, 1024).data);
  EXPECT_FALSE(model::stream_part({}, 1, 2).defined());
}

}  // namespace
}  // namespace tandem::test
