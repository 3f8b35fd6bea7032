// Where each pair of an adapter lies in one flat buffer. Training and serving use the same layout,
// so the optimizer works on one long tensor, and a snapshot is one device copy.
#pragma once

#include "worker/model/adapter.h"

#include <vector>

namespace tandem::worker::model {

/// Elements to which every tensor's start is rounded up: kDeviceAlignment bytes in bf16.
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

/// A [rank, I] or B [n, rank] of a pair inside a flat tensor of the layout, whatever its dtype.
kernels::Tensor pair_a(const AdapterLayout::Pair& pair, const kernels::Tensor& flat);
kernels::Tensor pair_b(const AdapterLayout::Pair& pair, const kernels::Tensor& flat);

}  // namespace tandem::worker::model
