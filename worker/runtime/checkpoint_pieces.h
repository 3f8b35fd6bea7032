// Checkpoints that ranks store in pieces, each its own, and that any layout reads back in the
// pieces it needs.
//
// A manifest of kind checkpoint lists pieces: a tensor that one rank had whole under its own name
// ("PATH.param", f32, its shape); else one entry for each piece, called
// "PATH.param@ROW+ROWS,COLUMN+COLUMNS:FIRST" (of that rectangle the row-major elements from FIRST
// on, f32, shape [count]), and settings.shapes has the shape of PATH.param. Older checkpoints, of
// whole tensors alone, are the first case throughout. Pure functions but for fetching; any thread.
#pragma once

#include "worker/runtime/adapter_codec.h"
#include "worker/runtime/gang_wire.h"
#include "worker/train/state_pieces.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace tandem::worker::runtime {

/// What a rank stored, without the bytes: all that the first rank needs to know of it.
struct StoredPieces {
  std::string state_json;
  std::vector<storage::ManifestTensor> tensors;
  std::map<std::string, std::vector<std::int64_t>> shapes;  ///< of tensors that are cut
  [[nodiscard]] ByteVector encode() const;
  static StoredPieces decode(std::span<const std::byte> bytes);
};

/// Names and hashes one rank's pieces; `on_blob` gets each chunk, whose bytes are `state`'s.
StoredPieces describe_pieces(const train::TrainState& state,
                             const std::function<void(const BlobView&)>& on_blob);

/// The canonical manifest of all ranks' pieces. `config` null: of a full fine-tune. corrupt_error:
/// an element is missing or comes twice; conflict_error: pieces of different steps.
Result<std::string> checkpoint_manifest(const Digest& base_model, const storage::PeftConfig* config,
                                        const std::vector<StoredPieces>& ranks);

/// A checkpoint's values as they are asked for: of each piece that is needed, the chunks that are.
class CheckpointSource final : public train::StateSource {
 public:
  /// corrupt_error: not a checkpoint's manifest; conflict_error: of another base.
  static Result<std::unique_ptr<CheckpointSource>> open(const std::string& manifest,
                                                        const Digest& base_model, FetchBlobs fetch);
  [[nodiscard]] const std::string& state_json() const { return state_json_; }
  /// Logical tensors and their shapes.
  [[nodiscard]] const std::map<std::string, std::vector<std::int64_t>>& shapes() const {
    return shapes_;
  }
  [[nodiscard]] std::size_t tensors() const override { return shapes_.size(); }
  Status read(const std::string& name, const std::vector<std::int64_t>& shape,
              const train::StateRange& range, float* out) const override;
  /// All of one tensor.
  Result<train::StateTensor> whole(const std::string& name) const;

 private:
  struct Piece {
    storage::ManifestTensor tensor;
    train::StateRange range;
  };
  CheckpointSource() = default;
  Status copy_piece(const Piece& piece, const std::vector<std::int64_t>& shape,
                    const train::StateRange& range, float* out, std::int64_t& copied) const;

  std::string state_json_;
  std::map<std::string, std::vector<std::int64_t>> shapes_;
  std::map<std::string, std::vector<Piece>> pieces_;  ///< by logical name
  FetchBlobs fetch_;
};

}  // namespace tandem::worker::runtime
