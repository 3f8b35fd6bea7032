#include "worker/train/state_files.h"

#include "storage/file_io.h"
#include "storage/safetensors.h"
#include "worker/train/state_pieces.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>

namespace tandem::worker::train {

namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr const char* kStateKey = "state";
constexpr int kRanksMax = 65'536;

std::string part_name(int rank, int ranks) {
  return str("part-", rank, "-of-", ranks, ".safetensors");
}

/// Ranks of the checkpoint in `folder`, from the names of its parts.
Result<int> count_parts(const std::string& folder) {
  std::error_code error;
  int ranks = 0;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
    int rank = 0, of = 0, end = 0;
    const std::string name = entry.path().filename().string();
    if (std::sscanf(name.c_str(), "part-%d-of-%d.safetensors%n", &rank, &of, &end) != 2 ||
        end != static_cast<int>(name.size()))
      continue;
    if (of < 1 || of > kRanksMax || rank < 0 || rank >= of)
      return corrupt_error(str(folder, "/", name, " is no part of a checkpoint"));
    if (ranks != 0 && ranks != of)
      return corrupt_error(
          str(folder, " holds parts of two checkpoints, of ", ranks, " and of ", of, " ranks"));
    ranks = of;
  }
  if (error || ranks == 0) return not_found_error(str(folder, " holds no checkpoint"));
  return ranks;
}

Result<StateTensor> read_piece(const std::string& path, const storage::TensorInfo& info,
                               const std::map<std::string, std::string>& metadata) {
  const auto bad = [&](const char* what) {
    return corrupt_error(str(path, ": tensor ", info.name, ": ", what));
  };
  const auto it = metadata.find(info.name);
  if (it == metadata.end()) return bad("nothing says which piece it is");
  const Json json = Json::parse(it->second, nullptr, false);
  StateTensor piece;
  piece.name = info.name;
  try {
    piece.shape = json.at("shape").get<std::vector<std::int64_t>>();
    const auto slice = json.at("slice").get<std::vector<std::int64_t>>();
    if (slice.size() != 4) return bad("a slice has four numbers");
    piece.slice = {slice[0], slice[1], slice[2], slice[3]};
    piece.first = json.at("first").get<std::int64_t>();
  } catch (const Json::exception&) {
    return bad("its description is damaged");
  }
  if (info.dtype != DType::kF32) return bad("expected f32");
  const auto in_range = [](std::int64_t x) { return x >= 0 && x <= std::int64_t{1} << 40; };
  if (piece.shape.empty() || piece.shape.size() > 2 || !in_range(piece.first) ||
      !std::all_of(piece.shape.begin(), piece.shape.end(), in_range) ||
      !in_range(piece.slice.row) || !in_range(piece.slice.rows) || !in_range(piece.slice.column) ||
      !in_range(piece.slice.columns))
    return bad("its numbers are out of range");
  piece.values.resize(static_cast<std::size_t>(info.numel()));
  std::memcpy(piece.values.data(), info.bytes.data(), info.bytes.size());
  return piece;
}

}  // namespace

Status write_state_part(const std::string& folder, int rank, int ranks, const TrainState& state) {
  TANDEM_CHECK(rank >= 0 && rank < ranks && ranks <= kRanksMax, "rank ", rank, " of ", ranks);
  TANDEM_RETURN_IF_ERROR(storage::make_directories(folder));
  std::vector<storage::TensorInfo> infos;
  std::map<std::string, std::string> metadata{{kStateKey, state.json}};
  for (const StateTensor& piece : state.tensors) {
    storage::TensorInfo info;
    info.name = piece.name;
    info.shape = {static_cast<std::int64_t>(piece.values.size())};
    info.bytes = std::as_bytes(std::span(piece.values));
    infos.push_back(std::move(info));
    const model::TensorSlice& s = piece.slice;
    metadata[piece.name] = Json{
        {"shape", piece.shape},
        {"slice", {s.row, s.rows, s.column, s.columns}},
        {"first", piece.first}}.dump();
  }
  return storage::write_safetensors((fs::path(folder) / part_name(rank, ranks)).string(), infos,
                                    metadata);
}

Result<TrainState> read_state(const std::string& folder) {
  TANDEM_ASSIGN_OR_RETURN(const int ranks, count_parts(folder));
  std::vector<TrainState> states;
  for (int rank = 0; rank < ranks; ++rank) {
    const std::string path = (fs::path(folder) / part_name(rank, ranks)).string();
    if (!fs::exists(path))
      return corrupt_error(str("the checkpoint is not complete: ", path, " is missing"));
    TANDEM_ASSIGN_OR_RETURN(const storage::Safetensors file, storage::Safetensors::open(path));
    TrainState state;
    const auto json = file.metadata().find(kStateKey);
    if (json == file.metadata().end()) return corrupt_error(str(path, " has no state"));
    state.json = json->second;
    for (const storage::TensorInfo& info : file.tensors()) {
      TANDEM_ASSIGN_OR_RETURN(StateTensor piece, read_piece(path, info, file.metadata()));
      state.tensors.push_back(std::move(piece));
    }
    states.push_back(std::move(state));
  }
  return merge_states(states);
}

}  // namespace tandem::worker::train
