// Where each pair of an adapter lies in one flat buffer. Training and serving use the same layout,
// so the optimizer works on one long tensor, and a snapshot is one device copy.
#pragma once

#include "worker/model/adapter.h"

#include <span>
#include <vector>

namespace tandem::worker::model {

/// Elements to which every tensor's start is rounded up: kDeviceAlignment bytes in 16 bits.
inline constexpr std::int64_t kAdapterAlignment = 128;

struct AdapterLayout {
  struct Pair {
    std::int64_t layer = 0;
    Site site = Site::kQ;
    std::int64_t rank = 0, n = 0, i = 0;
    float scale = 0.0f;
    std::int64_t a_begin = 0, b_begin = 0;  ///< elements from the start of the buffer
  };
  std::vector<Pair> pairs;  ///< by layer, then site
  std::int64_t elements = 0;
  std::int64_t rank_max = 0;

  /// Adds a pair of a site at the end.
  void add(const ModelConfig& config, std::int64_t layer, Site site, std::int64_t rank,
           float scale);
  /// The frozen adapter that lies in `flat` [elements] (cd); `storage` keeps its memory alive.
  [[nodiscard]] std::shared_ptr<const AdapterWeights> view(const ModelConfig& config,
                                                           kernels::Tensor flat,
                                                           std::shared_ptr<void> storage) const;
};

/// An adapter on the host as it is published: a layout's tensors in one buffer of `dtype` (f32,
/// bf16 or f16), so that packing and loading it are one copy each.
struct FlatAdapter {
  AdapterLayout layout;
  DType dtype = DType::kF32;
  std::vector<std::byte> bytes;
  /// The same values in another dtype.
  [[nodiscard]] FlatAdapter in(DType other) const;
  /// The bytes of `count` elements from element `begin` on.
  [[nodiscard]] std::span<const std::byte> part(std::int64_t begin, std::int64_t count) const {
    const auto size = static_cast<std::size_t>(dtype_bytes(dtype));
    return std::span(bytes).subspan(static_cast<std::size_t>(begin) * size,
                                    static_cast<std::size_t>(count) * size);
  }
};

/// As build_adapter of host tensors: on the device in compute dtype `dtype`.
std::shared_ptr<const AdapterWeights> build_adapter(kernels::Ops& ops, kernels::Exec& exec,
                                                    kernels::Allocator& allocator,
                                                    kernels::MemoryLedger& ledger,
                                                    const ModelConfig& config, DType dtype,
                                                    const FlatAdapter& adapter);

/// Device memory for one adapter, made and touched before the adapter is there: put into fresh
/// memory, 10 MB took 23 to 53 ms of a publish on a busy virtual machine.
class AdapterRoom {
 public:
  AdapterRoom(kernels::Ops& ops, kernels::Exec& exec, kernels::Allocator& allocator,
              kernels::MemoryLedger& ledger, std::int64_t elements, DType dtype);
  /// What build_adapter gives, in this memory; once. CHECKs that the adapter fits exactly.
  std::shared_ptr<const AdapterWeights> fill(kernels::Ops& ops, kernels::Exec& exec,
                                             const ModelConfig& config, const FlatAdapter& adapter);

 private:
  kernels::Tensor flat_;
  std::shared_ptr<void> storage_;  ///< empty once it is filled
};

/// A [rank, I] or B [n, rank] of a pair inside a flat tensor of the layout, whatever its dtype.
kernels::Tensor pair_a(const AdapterLayout::Pair& pair, const kernels::Tensor& flat);
kernels::Tensor pair_b(const AdapterLayout::Pair& pair, const kernels::Tensor& flat);

}  // namespace tandem::worker::model
