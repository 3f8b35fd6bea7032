#include "worker/runtime/checkpoint_pieces.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>

namespace tandem::worker::runtime {
namespace {

using Json = nlohmann::json;
using train::StateRange;
using train::StateTensor;

constexpr std::int64_t kFloatBytes = sizeof(float);
constexpr std::int64_t kDimensionMax = std::int64_t{1} << 30;
constexpr std::int64_t kLeafFloats = kDigestLeafBytes / kFloatBytes;

std::int64_t elements_of(const std::vector<std::int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
}

std::int64_t width_of(const std::vector<std::int64_t>& shape) {
  return shape.size() > 1 ? shape[1] : 1;
}

StateRange whole_of(const std::vector<std::int64_t>& shape) {
  const std::int64_t width = width_of(shape), all = elements_of(shape);
  return {{0, all / std::max<std::int64_t>(1, width), 0, width}, 0, all};
}

std::string piece_name(const StateTensor& piece) {
  const auto& s = piece.slice;
  return str(piece.name, "@", s.row, "+", s.rows, ",", s.column, "+", s.columns, ":", piece.first);
}

/// The logical name of "NAME@..." and what stands behind it; nothing for another name.
std::optional<std::pair<std::string, StateRange>> parse_piece(const std::string& name,
                                                              std::int64_t count) {
  const std::size_t at = name.rfind('@');
  if (at == std::string::npos) return std::nullopt;
  StateRange range;
  long long n[5] = {};
  int end = 0;
  if (std::sscanf(name.c_str() + at, "@%lld+%lld,%lld+%lld:%lld%n", &n[0], &n[1], &n[2], &n[3],
                  &n[4], &end) != 5 ||
      name.c_str()[at + static_cast<std::size_t>(end)] != '\0')
    return std::nullopt;
  range.slice = {n[0], n[1], n[2], n[3]};
  range.first = n[4];
  range.count = count;
  return std::pair{name.substr(0, at), range};
}

/// Whether a range lies inside a tensor, in numbers that cannot overflow.
bool fits(const StateRange& r, const std::vector<std::int64_t>& shape) {
  const StateRange all = whole_of(shape);
  const auto& s = r.slice;
  return s.row >= 0 && s.rows > 0 && s.row <= all.slice.rows && s.rows <= all.slice.rows - s.row &&
         s.column >= 0 && s.columns > 0 && s.column <= all.slice.columns &&
         s.columns <= all.slice.columns - s.column && r.first >= 0 && r.count >= 0 &&
         r.count <= s.rows * s.columns && r.first <= s.rows * s.columns - r.count;
}

/// Calls `copy(from, to, count)` for stretches that both ranges have, as indices into each.
template <class Copy>
void intersect(const StateRange& from, const StateRange& to, const Copy& copy) {
  const auto &f = from.slice, &t = to.slice;
  const std::int64_t first_row = f.row + from.first / f.columns;
  const std::int64_t last_row = f.row + (from.first + from.count - 1) / f.columns;
  const std::int64_t begin = std::max(f.column, t.column);
  const std::int64_t end = std::min(f.column + f.columns, t.column + t.columns);
  if (from.count == 0 || begin >= end) return;
  for (std::int64_t r = std::max(first_row, t.row); r <= std::min(last_row, t.row + t.rows - 1);
       ++r) {
    // Of this row both have [begin, end), less what lies outside [first, first + count) of either.
    std::int64_t in_from = (r - f.row) * f.columns + begin - f.column - from.first;
    std::int64_t in_to = (r - t.row) * t.columns + begin - t.column - to.first;
    const std::int64_t skip = std::max({std::int64_t{0}, -in_from, -in_to});
    in_from += skip;
    in_to += skip;
    const std::int64_t count =
        std::min({end - begin - skip, from.count - in_from, to.count - in_to});
    if (count > 0) copy(in_from, in_to, count);
  }
}

}  // namespace

ByteVector StoredPieces::encode() const {
  ByteWriter to;
  to.text(state_json);
  to.number(static_cast<std::int64_t>(tensors.size()));
  for (const auto& tensor : tensors) {
    to.text(tensor.name);
    to.numbers(tensor.shape);
    to.number(tensor.bytes);
    to.numbers(tensor.chunks);
    to.numbers(std::vector<Digest>{tensor.root});
  }
  to.number(static_cast<std::int64_t>(shapes.size()));
  for (const auto& [name, shape] : shapes) {
    to.text(name);
    to.numbers(shape);
  }
  return to.bytes();
}

StoredPieces StoredPieces::decode(std::span<const std::byte> bytes) {
  ByteReader from(bytes);
  StoredPieces pieces;
  pieces.state_json = from.text();
  for (std::int64_t left = from.number(); left > 0; --left) {
    auto& tensor = pieces.tensors.emplace_back();
    tensor.name = from.text();
    tensor.dtype = dtype_name(DType::kF32);
    tensor.shape = from.numbers<std::int64_t>();
    tensor.bytes = from.number();
    tensor.chunks = from.numbers<Digest>();
    tensor.root = from.numbers<Digest>().at(0);
  }
  for (std::int64_t left = from.number(); left > 0; --left) {
    const std::string name = from.text();
    pieces.shapes[name] = from.numbers<std::int64_t>();
  }
  return pieces;
}

StoredPieces describe_pieces(const train::TrainState& state,
                             const std::function<void(const BlobView&)>& on_blob) {
  StoredPieces stored;
  stored.state_json = state.json;
  for (const StateTensor& piece : state.tensors) {
    const bool cut = piece.slice.rows != 0;
    if (cut) stored.shapes[piece.name] = piece.shape;
    const auto bytes = std::as_bytes(std::span(piece.values));
    stored.tensors.push_back(storage::describe_tensor(
        cut ? piece_name(piece) : piece.name, dtype_name(DType::kF32),
        cut ? std::vector{static_cast<std::int64_t>(piece.values.size())} : piece.shape, bytes));
    const auto& chunks = stored.tensors.back().chunks;
    for (std::size_t i = 0; i < chunks.size(); ++i) {
      const std::size_t begin = i * kDigestLeafBytes;
      on_blob({chunks[i], bytes.subspan(begin, std::min<std::size_t>(kDigestLeafBytes,
                                                                     bytes.size() - begin))});
    }
  }
  return stored;
}

Result<std::string> checkpoint_manifest(const Digest& base_model, const storage::PeftConfig* config,
                                        const std::vector<StoredPieces>& ranks) {
  storage::Manifest manifest;
  manifest.kind = storage::ManifestKind::kCheckpoint;
  Json settings = checkpoint_settings(base_model, config);
  std::map<std::string, std::int64_t> missing;  // elements of tensors that are cut
  Json shapes = Json::object();
  for (const StoredPieces& rank : ranks) {
    if (rank.state_json != ranks[0].state_json)
      return conflict_error("the parts of a checkpoint belong to different steps or jobs");
    for (const auto& [name, shape] : rank.shapes) {
      missing.emplace(name, elements_of(shape));
      shapes[name] = shape;
    }
  }
  for (const StoredPieces& rank : ranks)
    for (const auto& tensor : rank.tensors) {
      if (const auto piece = parse_piece(tensor.name, tensor.bytes / kFloatBytes))
        missing[piece->first] -= piece->second.count;
      manifest.tensors.push_back(tensor);
    }
  for (const auto& [name, elements] : missing)
    if (elements != 0)
      return corrupt_error(str("the ranks' pieces of ", name, elements > 0 ? " lack " : " repeat ",
                               elements > 0 ? elements : -elements, " elements"));
  if (!shapes.empty()) settings["shapes"] = shapes;
  settings["state"] = ranks.at(0).state_json;
  manifest.settings_json = settings.dump();
  return storage::encode_manifest(manifest);
}

Result<std::unique_ptr<CheckpointSource>> CheckpointSource::open(const std::string& text,
                                                                 const Digest& base_model,
                                                                 FetchBlobs fetch) {
  TANDEM_ASSIGN_OR_RETURN(storage::Manifest manifest, storage::parse_manifest(text));
  if (manifest.kind != storage::ManifestKind::kCheckpoint)
    return corrupt_error("not a checkpoint's manifest");
  const Json settings = Json::parse(manifest.settings_json, nullptr, false);
  TANDEM_RETURN_IF_ERROR(check_base(settings, base_model));
  std::unique_ptr<CheckpointSource> source(new CheckpointSource);
  source->fetch_ = std::move(fetch);
  try {
    source->state_json_ = settings.value("state", std::string());
    source->shapes_ = settings.value("shapes", std::map<std::string, std::vector<std::int64_t>>{});
  } catch (const Json::exception& error) {
    return corrupt_error(str("checkpoint manifest: ", error.what()));
  }
  for (const auto& [name, shape] : source->shapes_)
    if (shape.empty() || shape.size() > 2 || !std::all_of(shape.begin(), shape.end(), [](auto n) {
          return n >= 0 && n <= kDimensionMax;
        }))
      return corrupt_error(str("checkpoint tensor ", name, " has an impossible shape"));
  for (auto& tensor : manifest.tensors) {
    if (tensor.dtype != dtype_name(DType::kF32))
      return corrupt_error(
          str("checkpoint tensor ", tensor.name, " is ", tensor.dtype, ", not f32"));
    auto piece = parse_piece(tensor.name, tensor.bytes / kFloatBytes);
    if (!piece || !source->shapes_.contains(piece->first)) {
      source->shapes_[tensor.name] = tensor.shape;
      piece = std::pair{tensor.name, whole_of(tensor.shape)};
    }
    if (!fits(piece->second, source->shapes_[piece->first]))
      return corrupt_error(str("checkpoint piece ", tensor.name, " lies outside its tensor"));
    source->pieces_[piece->first].push_back({std::move(tensor), piece->second});
  }
  return source;
}

Status CheckpointSource::copy_piece(const Piece& piece, const std::vector<std::int64_t>& shape,
                                    const StateRange& range, float* out,
                                    std::int64_t& copied) const {
  std::int64_t least = piece.range.count, end = 0;
  intersect(piece.range, range, [&](std::int64_t from, std::int64_t, std::int64_t count) {
    least = std::min(least, from);
    end = std::max(end, from + count);
  });
  if (least >= end) return {};
  const auto first = static_cast<std::size_t>(least / kLeafFloats);
  const auto last = static_cast<std::size_t>((end - 1) / kLeafFloats);
  const auto wanted = std::span(piece.tensor.chunks).subspan(first, last - first + 1);
  TANDEM_ASSIGN_OR_RETURN(const auto blobs, fetch_(wanted));
  std::vector<std::byte> bytes;
  for (const auto& blob : blobs) bytes.insert(bytes.end(), blob.begin(), blob.end());
  const std::int64_t begin = static_cast<std::int64_t>(first) * kLeafFloats;
  if (static_cast<std::int64_t>(bytes.size()) < (end - begin) * kFloatBytes)
    return corrupt_error(str("checkpoint piece ", piece.tensor.name, " of a tensor of ",
                             elements_of(shape), " elements is shorter than its manifest says"));
  intersect(piece.range, range, [&](std::int64_t from, std::int64_t to, std::int64_t count) {
    std::memcpy(out + to, bytes.data() + (from - begin) * kFloatBytes,
                static_cast<std::size_t>(count * kFloatBytes));
    copied += count;
  });
  return {};
}

Status CheckpointSource::read(const std::string& name, const std::vector<std::int64_t>& shape,
                              const StateRange& range, float* out) const {
  const auto pieces = pieces_.find(name);
  if (pieces == pieces_.end()) return corrupt_error(str("the checkpoint has no tensor ", name));
  if (shapes_.at(name) != shape)
    return corrupt_error(str("checkpoint tensor ", name, " has ", elements_of(shapes_.at(name)),
                             " elements in another shape than the job's of ", elements_of(shape)));
  std::int64_t copied = 0;
  for (const Piece& piece : pieces->second)
    TANDEM_RETURN_IF_ERROR(copy_piece(piece, shape, range, out, copied));
  if (copied == range.count) return {};
  return corrupt_error(str("the checkpoint has ", copied, " of the ", range.count, " elements of ",
                           name, " that this rank needs"));
}

Result<StateTensor> CheckpointSource::whole(const std::string& name) const {
  const auto shape = shapes_.find(name);
  if (shape == shapes_.end()) return corrupt_error(str("the checkpoint has no tensor ", name));
  StateTensor tensor{name, shape->second, {}};
  const StateRange all = whole_of(tensor.shape);
  tensor.values.resize(static_cast<std::size_t>(all.count));
  TANDEM_RETURN_IF_ERROR(read(name, tensor.shape, all, tensor.values.data()));
  return tensor;
}

}  // namespace tandem::worker::runtime
