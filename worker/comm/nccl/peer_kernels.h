// Private to libtandem_nccl.so: what sums over the memory of several GPUs take of a multiprocessor.
//
// A sum is one kernel. In one shot each rank sends its addend to all others, and each adds them up;
// in two shots rank r adds up part r of the tensor and sends all others the sum, which is 2 (n - 1)
// / n of the tensor's bytes over the links instead of n - 1, for one more trip. Nothing is read
// from another GPU: what is written there need not come back. Both give the same bits: addends are
// added in rank order, in f32, and rounded once.
//
// *How a rank knows that words have come.* Rooms are filled with kEmpty (all ones) where nothing
// has come, each four bytes for themselves, and nobody sends such a word: all ones are NaNs in
// every dtype, sent as others. So a word that is not kEmpty is the one that was sent; there are no
// flags and no fences, and a store of 16 bytes may come in pieces. Who takes words puts kEmpty
// back.
//
// *Why no two sums meet in a room.* Sums, and gathers of columns, of one gang take turns, each on
// every rank's queue in the same order; turn t uses the rooms of side t % 2. Let rank i write into
// rank j's room at turn t. (1) A rank that has ended turn t - 1 holds what all ranks sent in that
// turn, or a sum of it, so all have begun it: their kernels of turn t - 2 had ended
// (wait_for_inputs() waits for the kernel before, which waited for its own), with all that they
// took from rooms of this side and put back; nothing else touched them since. (2) Rank i begins to
// write at turn t when its kernel of turn t - 1 has ended. So the room is empty and nobody is going
// to read it for turn t - 2. An empty sum sends nothing and is no turn. Turns are counted on the
// device, by the kernels, so that a recording may be replayed: every block adds its share of
// kTurnParts at its end, and a turn's blocks read the count at their begin, where less than a whole
// turn has been added since the last.
//
// *That all ranks come through.* Block b waits for blocks b of the others alone. Blocks come to the
// multiprocessors in order, so the first that has not ended is running, or about to, everywhere.
#pragma once

#include "worker/comm/nccl/peer_memory.h"

#include <cuda_runtime.h>

namespace tandem::worker::comm {

enum class PeerType : int { kF32, kBF16, kF16 };

struct SumRooms {
  char* windows[kPeersMax];
  int rank, size;
  bool one_shot;
};

/// x becomes the sum over ranks. sum_fits: at most kRoomBytes go through a room.
struct PlainSum {
  void* x;
  std::int64_t elements;
};
bool sum_fits(const SumRooms& rooms, PeerType type, const PlainSum& sum);
cudaError_t sum(cudaStream_t stream, PeerType type, const SumRooms& rooms, const PlainSum& sum);

/// stream [rows, columns] becomes the sum over ranks, rounded, + delta (null: nothing), rounded;
/// y = its rms norm, as kernels::AddRmsNormArgs says, and rstd (null: not wanted). Sums of squares
/// are added up in an order that depends on `columns` alone. All but rstd aligned to 16 bytes.
/// norm_fits: a Hopper, whole vectors, rows that one cluster holds, few enough for the rooms.
struct NormSum {
  void* stream;
  const void* delta;
  const void* weight;
  void* y;
  float* rstd;
  float eps;
  std::int64_t rows, columns;
};
bool norm_fits(const SumRooms& rooms, PeerType type, const NormSum& sum);
cudaError_t sum_and_norm(cudaStream_t stream, PeerType type, const SumRooms& rooms,
                         const NormSum& sum);

/// out [rows, n * row_bytes] = beside each other, in rank order, the ranks' x [rows, row_bytes], of
/// elements of four bytes; both aligned to 16 bytes, as is row_bytes. All of x goes through a room,
/// n times. A turn as those of sums.
struct ColumnGather {
  const void* x;
  void* out;
  std::int64_t rows, row_bytes;
};
cudaError_t gather_columns(cudaStream_t stream, const SumRooms& rooms, const ColumnGather& gather);

/// out[e] = parts[0][e] + parts[1][e] + ..., in f32, rounded once; all aligned to 16 bytes. out may
/// be one of the parts.
struct PartSum {
  const void* parts[kPeersMax];
  void* out;
  std::int64_t elements;
  int size;
};
cudaError_t sum_parts(cudaStream_t stream, PeerType type, const PartSum& sum);

}  // namespace tandem::worker::comm
