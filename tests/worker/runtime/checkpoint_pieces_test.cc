// Checkpoints in pieces: whoever saved which part, everybody reads what it needs and no more.
#include "worker/runtime/checkpoint_pieces.h"

#include <gtest/gtest.h>

#include <map>

namespace tandem::worker::runtime {
namespace {

using train::StateRange;
using train::StateTensor;
using train::TrainState;

const Digest kBase = sha256("base");

/// A blob store of this test, which counts what it is asked for.
struct Blobs {
  std::map<Digest, std::vector<std::byte>> all;
  std::size_t fetched = 0;
  StoredPieces store(const TrainState& state) {
    return describe_pieces(state, [&](const BlobView& blob) {
      EXPECT_EQ(sha256(blob.bytes), blob.digest);
      all[blob.digest].assign(blob.bytes.begin(), blob.bytes.end());
    });
  }
  FetchBlobs fetch() {
    return [this](std::span<const Digest> digests) -> Result<std::vector<std::vector<std::byte>>> {
      std::vector<std::vector<std::byte>> found;
      for (const Digest& digest : digests) {
        if (!all.contains(digest)) return not_found_error(str("no chunk ", digest));
        found.push_back(all.at(digest));
        ++fetched;
      }
      return found;
    };
  }
};

std::vector<float> numbers(std::int64_t count, float first = 0) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = first + static_cast<float>(i);
  return values;
}

/// Rows [6], columns [4], cut as tensor-parallel ranks and ZeRO cut: a rectangle each, of which the
/// elements from `first` on.
StateTensor piece(const std::vector<float>& whole, const model::TensorSlice& slice,
                  std::int64_t first, std::int64_t count) {
  StateTensor tensor{"w.param", {6, 4}, {}, slice, first};
  for (std::int64_t e = first; e < first + count; ++e)
    tensor.values.push_back(whole[static_cast<std::size_t>((slice.row + e / slice.columns) * 4 +
                                                           slice.column + e % slice.columns)]);
  return tensor;
}

struct Pieces : testing::Test {
  Pieces() {
    // Two column halves, each of two parts that meet in the middle of a row.
    const model::TensorSlice left{0, 6, 0, 2}, right{0, 6, 2, 2};
    for (const auto& [slice, first, count] :
         {std::tuple{left, 0, 5}, {left, 5, 7}, {right, 0, 7}, {right, 7, 5}}) {
      TrainState state{"{}", {piece(whole, slice, first, count)}};
      if (ranks.empty()) state.tensors.push_back({"norm.param", {3}, {7, 8, 9}});
      ranks.push_back(blobs.store(state));
    }
  }
  [[nodiscard]] std::unique_ptr<CheckpointSource> open() {
    const auto text = checkpoint_manifest(kBase, nullptr, ranks);
    EXPECT_TRUE(text.ok()) << text.status().to_string();
    auto source = CheckpointSource::open(*text, kBase, blobs.fetch());
    EXPECT_TRUE(source.ok()) << source.status().to_string();
    return std::move(*source);
  }
  const std::vector<float> whole = numbers(24);
  Blobs blobs;
  std::vector<StoredPieces> ranks;
};

TEST_F(Pieces, AreTheWholeTensorsAgain) {
  const auto source = open();
  EXPECT_EQ(source->tensors(), 2u);
  EXPECT_EQ(source->state_json(), "{}");
  EXPECT_EQ(source->whole("w.param")->values, whole);
  EXPECT_EQ(source->whole("norm.param")->values, (std::vector<float>{7, 8, 9}));
}

TEST_F(Pieces, AnyRangeOfAnyRectangleIsReadFromThem) {
  const auto source = open();
  int read = 0;
  for (std::int64_t row = 0; row < 6; ++row)
    for (std::int64_t rows = 1; row + rows <= 6; ++rows)
      for (std::int64_t column = 0; column < 4; ++column)
        for (std::int64_t columns = 1; column + columns <= 4; ++columns)
          for (std::int64_t first = 0; first < rows * columns; first += 2) {
            const StateRange range{{row, rows, column, columns}, first, rows * columns - first};
            std::vector<float> out(static_cast<std::size_t>(range.count), -1.0f);
            ASSERT_TRUE(source->read("w.param", {6, 4}, range, out.data()).ok());
            ASSERT_EQ(out, piece(whole, range.slice, first, range.count).values);
            ++read;
          }
  EXPECT_GT(read, 500);
}

TEST_F(Pieces, ARankFetchesOnlyThePiecesThatItNeeds) {
  const auto source = open();
  std::vector<float> out(2);
  ASSERT_TRUE(source->read("w.param", {6, 4}, {{0, 1, 0, 2}, 0, 2}, out.data()).ok());
  EXPECT_EQ(blobs.fetched, 1u);
}

TEST_F(Pieces, OfALargePieceOnlyTheChunksThatAreNeededTravel) {
  constexpr std::int64_t kChunk = kDigestLeafBytes / 4;
  Blobs large;
  const TrainState state{"{}", {{"big.param", {3 * kChunk}, numbers(3 * kChunk)}}};
  const auto text = checkpoint_manifest(kBase, nullptr, {large.store(state)});
  const auto source = CheckpointSource::open(*text, kBase, large.fetch());
  std::vector<float> out(5);
  const StateRange range{{0, 3 * kChunk, 0, 1}, 2 * kChunk + 1, 5};
  ASSERT_TRUE((*source)->read("big.param", {3 * kChunk}, range, out.data()).ok());
  EXPECT_EQ(large.fetched, 1u);
  EXPECT_EQ(out[0], static_cast<float>(2 * kChunk + 1));
}

TEST_F(Pieces, AMissingOrRepeatedPieceMakesNoCheckpoint) {
  auto fewer = ranks;
  fewer.pop_back();
  EXPECT_EQ(checkpoint_manifest(kBase, nullptr, fewer).status().code(), StatusCode::kCorrupt);
  auto twice = ranks;
  twice.push_back(ranks[1]);
  EXPECT_FALSE(checkpoint_manifest(kBase, nullptr, twice).ok());
  auto other = ranks;
  other[2].state_json = "{\"step\":2}";
  EXPECT_EQ(checkpoint_manifest(kBase, nullptr, other).status().code(), StatusCode::kConflict);
}

TEST_F(Pieces, AnotherBaseAndAnotherShapeAreRefused) {
  const auto text = checkpoint_manifest(kBase, nullptr, ranks);
  EXPECT_EQ(CheckpointSource::open(*text, sha256("other"), blobs.fetch()).status().code(),
            StatusCode::kConflict);
  std::vector<float> out(24);
  const Status status = open()->read("w.param", {4, 6}, {{0, 4, 0, 6}, 0, 24}, out.data());
  EXPECT_EQ(status.code(), StatusCode::kCorrupt);
}

TEST_F(Pieces, TravelBetweenRanksAsTheyAre) {
  const StoredPieces again = StoredPieces::decode(ranks[0].encode());
  EXPECT_EQ(again.shapes, ranks[0].shapes);
  ASSERT_EQ(again.tensors.size(), ranks[0].tensors.size());
  EXPECT_EQ(checkpoint_manifest(kBase, nullptr, {again, ranks[1], ranks[2], ranks[3]}).value(),
            checkpoint_manifest(kBase, nullptr, ranks).value());
}

}  // namespace
}  // namespace tandem::worker::runtime
