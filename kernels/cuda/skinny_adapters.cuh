// Private to skinny.cu: the adapters of its rows. Every block lists those that it needs, "pieces"
// of B; the copy engine streams them behind the weight; warps add the low-rank parts of their rows.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/lora_rows.cuh"
#include "kernels/cuda/skinny.h"

namespace tandem::kernels::cuda::skinny_product {

inline constexpr int kRows = kSkinnyRows,
                     kStep = 64;  ///< of x, and of the inner size, in one stage
inline constexpr int kConsumerWarps = 4, kConsumers = 32 * kConsumerWarps;
inline constexpr int kProducer = kConsumerWarps, kLister = kProducer + 1,
                     kThreads = 32 * (kLister + 1);
/// Of narrow tiles, whose stages are small: a multiprocessor asks for 72 KiB of weights at once.
/// Wide ones do not gain from more than eight.
inline constexpr int kStagesMax = 18;
inline constexpr int kRankMax = 64;
inline constexpr int kPiecesMax = kRows * (kSitesMax + 1);  ///< of two halves in one site

/// B of one adapter for the outputs of one site that a block finishes. Elements as their bits: what
/// lists and copies them need not know the type.
struct Piece {
  const std::uint16_t* b;
  std::uint16_t offset;  ///< from its stage's begin, in 16 bytes
  std::uint8_t row;      ///< the first one that has this adapter
  std::uint8_t rank, site;
  std::uint8_t first, last;  ///< groups of eight of the block's outputs
  std::uint8_t warps;        ///< bit w: warp w has rows with this adapter
};
static_assert(sizeof(Piece) == 16);

struct Control {
  std::uint64_t full[kStagesMax], empty[kStagesMax];
  std::uint64_t list_full, list_empty, parts_full, u_full;
  int slot[kRows];  ///< of each row; -1: no adapter
  int stages;
  std::uint16_t begin[kPiecesMax + 1];  ///< stage s has pieces [begin[s], begin[s + 1])
  Piece piece[kPiecesMax];
};

struct Handover;  // skinny_makers.cuh

struct Params {
  int t, n, steps, tiles;
  int x_rows;  ///< of x in a stage: t, up to whole eights
  const void* bias;
  void* u;  ///< null: none
  SegmentsView adapters;
  int distance;  ///< between the halves of a pair
  int makers;    ///< blocks, the first ones, that make u; 0: it is made before
  const void* x;
  int inputs;
  Handover* handover;
};

template <int kStages>
struct Ring {
  int stage = 0;
  std::uint32_t phase = 0;
  __device__ void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// -- the list
// -----------------------------------------------------------------------------------------

/// Row h of two of a lane: neighbouring lanes have rows of different multiplying warps, so that
/// these find work in the same stages.
__device__ inline int row_of(int lane, int h) {
  return lane % kConsumerWarps * 16 + lane / kConsumerWarps + 8 * h;
}

/// Of row_of(lane, h): bit w: warp w has rows with its slot; 0 where an earlier row has it too, or
/// none is there.
struct Leads {
  std::uint8_t warps[2];
};

__device__ inline Leads find_slots(const SegmentsView& v, Control& c, int lane) {
  for (int t = lane; t < kRows; t += 32) c.slot[t] = -1;
  __syncwarp();
  for (int s = lane; s < v.segments; s += 32) {
    const int begin = load_kept(v.offsets + s), end = load_kept(v.offsets + s + 1),
              own = load_kept(v.slots + s);
    if (begin < 0 || end > v.t) __trap();
    for (int t = begin; t < end; ++t) c.slot[t] = own;
  }
  __syncwarp();
  Leads leads;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = row_of(lane, h), own = c.slot[row];
    bool first = own >= 0;
    unsigned warps = 0;
#pragma unroll 8
    for (int other = 0; other < kRows; ++other) {
      const bool same = c.slot[other] == own;
      first = first && (other >= row || !same);
      warps |= same ? 1u << other / 16 : 0u;
    }
    leads.warps[h] = static_cast<std::uint8_t>(first ? warps : 0);
  }
  return leads;
}

struct Listed {
  int count = 0, stages = 0;
};

/// Pieces of outputs [begin, end), which are a block's groups from `group` on, packed into stages
/// of `capacity` bytes behind what is listed.
__device__ inline void list_pieces(const SegmentsView& v, int begin, int end, int group,
                                   int capacity, const Leads& leads, Control& c, int lane,
                                   Listed& listed) {
  int &count = listed.count, &stages = listed.stages;
  for (int s = 0; s < v.sites; ++s) {
    const SiteView& site = v.site[s];
    const int first = max(begin, site.n_begin), last = min(end, site.n_begin + site.n);
    if (first >= last) continue;
    const int bytes = (last - first) * v.rank_max * 2, fit = capacity / bytes;
    int here = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const LoraEntry entry =
          leads.warps[h] != 0 ? find_entry(v, site, c.slot[row_of(lane, h)]) : LoraEntry{};
      const unsigned present = __ballot_sync(0xffffffffu, entry.rank > 0);
      if (entry.rank > 0) {
        const int index = here + __popc(present & ((1u << lane) - 1));
        c.piece[count + index] = {static_cast<const std::uint16_t*>(entry.b) +
                                      static_cast<std::int64_t>(first - site.n_begin) * entry.rank,
                                  static_cast<std::uint16_t>(index % fit * bytes / 16),
                                  static_cast<std::uint8_t>(row_of(lane, h)),
                                  static_cast<std::uint8_t>(entry.rank),
                                  static_cast<std::uint8_t>(s),
                                  static_cast<std::uint8_t>(group + (first - begin) / 8),
                                  static_cast<std::uint8_t>(group + (last - begin) / 8),
                                  leads.warps[h]};
        if (index % fit == 0)
          c.begin[stages + index / fit] = static_cast<std::uint16_t>(count + index);
      }
      here += __popc(present);
    }
    count += here;
    stages += (here + fit - 1) / fit;
  }
}
__device__ inline void end_list(const Listed& listed, Control& c, int lane) {
  if (lane != 0) return;
  c.begin[listed.stages] = static_cast<std::uint16_t>(listed.count);
  c.stages = listed.stages;
}

__device__ inline int piece_bytes(const Piece& p) {
  return (p.last - p.first) * 8 * p.rank * 2;
}
__device__ inline bool is_aligned(const Piece& p) {
  return reinterpret_cast<std::uintptr_t>(p.b) % 16 == 0;
}

// -- the producer's warp
// ------------------------------------------------------------------------------

/// Streams the listed pieces through the ring.
template <int kStages>
__device__ inline void copy_pieces(const Control& c, unsigned char* stages, int stage_bytes,
                                   std::uint64_t* full, std::uint64_t* empty, Ring<kStages>& ring,
                                   int lane) {
  for (int stage = 0; stage < c.stages; ++stage, ring.next()) {
    barrier_wait(&empty[ring.stage], ring.phase ^ 1);
    unsigned char* to = stages + ring.stage * stage_bytes;
    int bytes = 0;
    for (int i = c.begin[stage] + lane; i < c.begin[stage + 1]; i += 32) {
      const Piece& p = c.piece[i];
      if (is_aligned(p)) {
        bytes += piece_bytes(p);
      } else {
        for (int e = 0; e < piece_bytes(p) / 2; ++e)
          reinterpret_cast<std::uint16_t*>(to + 16 * p.offset)[e] = p.b[e];
      }
    }
    bytes = __reduce_add_sync(0xffffffffu, bytes);
    fence_async();
    __syncwarp();
    if (lane == 0) barrier_expect(&full[ring.stage], bytes);
    __syncwarp();
    for (int i = c.begin[stage] + lane; i < c.begin[stage + 1]; i += 32)
      if (is_aligned(c.piece[i]))
        copy_bytes(shared_address(to + 16 * c.piece[i].offset), c.piece[i].b,
                   piece_bytes(c.piece[i]), &full[ring.stage]);
  }
}

/// Of a lane's rows g and g + 8 of its warp: u at four neighbouring ranks of sixteen.
struct RowInputs {
  uint2 low, high;
};

/// sum += u B^T over ranks [16 k, 16 k + 16), of outputs [8 first, 8 last) of `sum`, b at the first
/// of them; the numbers of rows that are not `own` stay, whatever b is. kPlain: all outputs,
/// ranks in fours.
template <int kGroups, bool kPlain, class E>
__device__ inline void add_piece(const E* b, const Piece& piece, int base, int k,
                                 const RowInputs& u, const bool (&own)[2],
                                 float (&sum)[4 * kGroups]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, q = lane % 4;
  const int rank = piece.rank, first = piece.first - base, last = piece.last - base;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    if (!kPlain && (j < first || j >= last)) continue;
    const E* of = b + ((kPlain ? j : j - first) * 8 + g) * rank;
    const uint2 in = load_4(of, 16 * k + 4 * q, rank, kPlain || rank % 4 == 0);
    float d[4] = {};
    mma<E>(d, u.low.x, u.high.x, u.low.y, u.high.y, in.x, in.y);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (own[e / 2]) sum[4 * j + e] += d[e];
  }
}

/// u of row t at ranks [16 k + 4 q, 16 k + 4 q + 4) of a site.
template <class E>
__device__ inline uint2 load_u(const Params& p, int site, int t, int k, int q) {
  const SegmentsView& v = p.adapters;
  const bool vectors = v.columns % 4 == 0 && v.site[site].column % 4 == 0;
  return load_4(
      static_cast<const E*>(p.u) + static_cast<std::int64_t>(t) * v.columns + v.site[site].column,
      16 * k + 4 * q, t < p.t ? v.rank_max : 0, vectors);
}
template <class E>
__device__ inline RowInputs load_inputs(const Params& p, int site, int k) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int low = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
  return {load_u<E>(p, site, low, k, lane % 4), load_u<E>(p, site, low + 8, k, lane % 4)};
}

/// What a warp's rows bring to pieces of `site`, of the first sixteen ranks.
struct SiteInputs {
  RowInputs u = {};
  int site = -1;
};

/// u of all rows at the first sixteen ranks of the site where a half's outputs begin: the lister
/// brings it while the others multiply.
struct StagedInputs {
  uint2 u[kRows][4];
};
template <class E>
__device__ inline void stage_inputs(const Params& p, int site, StagedInputs& to, int lane) {
#pragma unroll
  for (int i = 0; i < kRows * 4 / 32; ++i) {
    const int row = (lane + 32 * i) / 4, q = lane % 4;
    to.u[row][q] = load_u<E>(p, site, row, 0, q);
  }
}
__device__ inline RowInputs staged_inputs(const StagedInputs& from) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int low = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
  return {from.u[low][lane % 4], from.u[low + 8][lane % 4]};
}

struct Range {
  int begin, end;
};

/// The first site of these outputs, or -1.
__device__ inline int find_site(const SegmentsView& v, Range outputs) {
  const auto [begin, end] = outputs;
  for (int s = 0; s < v.sites; ++s)
    if (begin < v.site[s].n_begin + v.site[s].n && end > v.site[s].n_begin) return s;
  return -1;
}

/// sum += u B^T of the pieces: fragments of all groups of eight outputs of the block, four numbers
/// each (hopper.cuh), of the warp's rows. A row takes nothing from other rows' adapters, infinite
/// ones included. Of u no more than 16 ranks are in registers: where wide tiles leave too few,
/// their blocks do not start beside those that make u.
/// kHalves: each has its own inputs.
template <class E, int kGroups, int kHalves, int kStages>
__device__ inline void add_pieces(const Params& p, Control& c, const unsigned char* stages,
                                  int stage_bytes, Ring<kStages>& ring,
                                  SiteInputs (&inputs)[kHalves], float (&sum)[4 * kGroups]) {
  constexpr int kOwn = kGroups / kHalves;  // groups of a half
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, row = warp * 16 + lane / 4;
  const int slots[2] = {c.slot[row], c.slot[row + 8]};
  const auto add_to = [&]<int kHalf>(const Piece& piece) {
    SiteInputs& in = inputs[kHalf];
    if (piece.site != in.site) in = {load_inputs<E>(p, piece.site, 0), piece.site};
    const int slot = c.slot[piece.row];
    const bool own[2] = {slots[0] == slot, slots[1] == slot};
    const auto* b =
        reinterpret_cast<const E*>(stages + ring.stage * stage_bytes + 16 * piece.offset);
    constexpr int kBase = kHalf * kOwn;
    const bool plain = piece.first == kBase && piece.last == kBase + kOwn && piece.rank % 4 == 0;
    auto& own_sum = *reinterpret_cast<float(*)[4 * kOwn]>(sum + 4 * kBase);
    for (int k = 0; 16 * k < piece.rank; ++k) {
      RowInputs u = k == 0 ? in.u : load_inputs<E>(p, piece.site, k);
      if (!own[0]) u.low = {0, 0};
      if (!own[1]) u.high = {0, 0};
      plain ? add_piece<kOwn, true>(b, piece, kBase, k, u, own, own_sum)
            : add_piece<kOwn, false>(b, piece, kBase, k, u, own, own_sum);
    }
  };
  const auto add = [&](const Piece& piece) {
    if constexpr (kHalves == 1)
      add_to.template operator()<0>(piece);
    else
      piece.first < kOwn ? add_to.template operator()<0>(piece)
                         : add_to.template operator()<1>(piece);
  };
  for (int stage = 0; stage < c.stages; ++stage, ring.next()) {
    barrier_wait(&c.full[ring.stage], ring.phase);
    for (int first = c.begin[stage]; first < c.begin[stage + 1]; first += 32) {
      const int i = first + lane;
      const bool is = i < c.begin[stage + 1] && c.piece[i].warps >> warp & 1;
      for (unsigned left = __ballot_sync(0xffffffffu, is); left != 0; left &= left - 1)
        add(c.piece[first + __ffs(static_cast<int>(left)) - 1]);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&c.empty[ring.stage]);
  }
}

}  // namespace tandem::kernels::cuda::skinny_product
