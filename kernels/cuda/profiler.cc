#include "kernels/cuda/profiler.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>

namespace tandem::kernels::cuda {
namespace {
/// A run longer than this is profiled as far as it goes.
constexpr std::size_t kSpansMax = 200000;
}  // namespace

Profiler::Profiler() : on_(std::getenv("TANDEM_CUDA_PROFILE") != nullptr) {}

std::size_t Profiler::begin(cudaStream_t stream, const std::string& name, double bytes,
                            double flops) {
  if (spans_.size() >= kSpansMax) return spans_.size();
  Span span{name, bytes, flops, nullptr, nullptr};
  (void)cudaEventCreate(&span.begin);
  (void)cudaEventCreate(&span.end);
  (void)cudaEventRecord(span.begin, stream);
  spans_.push_back(std::move(span));
  return spans_.size() - 1;
}

void Profiler::end(cudaStream_t stream, std::size_t index) {
  if (index < spans_.size()) (void)cudaEventRecord(spans_[index].end, stream);
}

Profiler::~Profiler() {
  if (spans_.empty()) return;
  (void)cudaDeviceSynchronize();
  struct Row {
    double ms = 0, best_ms = 0, bytes = 0, flops = 0;
    std::size_t count = 0;
  };
  std::map<std::string, Row> rows;
  for (Span& span : spans_) {
    float ms = 0.0f;
    if (cudaEventElapsedTime(&ms, span.begin, span.end) == cudaSuccess) {
      Row& row = rows[span.name];
      row.ms += static_cast<double>(ms);
      row.best_ms =
          row.count == 0 ? static_cast<double>(ms) : std::min(row.best_ms, static_cast<double>(ms));
      row.bytes += span.bytes;
      row.flops += span.flops;
      ++row.count;
    }
    (void)cudaEventDestroy(span.begin);
    (void)cudaEventDestroy(span.end);
  }
  std::vector<std::pair<std::string, Row>> sorted(rows.begin(), rows.end());
  std::sort(sorted.begin(), sorted.end(),
            [](const auto& a, const auto& b) { return a.second.ms > b.second.ms; });
  std::fprintf(stderr, "%-44s %8s %10s %9s %9s %8s %8s\n", "op", "calls", "ms", "us/call",
               "best us", "TB/s", "TFLOP/s");
  for (const auto& [name, row] : sorted)
    std::fprintf(stderr, "%-44s %8zu %10.2f %9.1f %9.1f %8.2f %8.0f\n", name.c_str(), row.count,
                 row.ms, row.ms * 1e3 / static_cast<double>(row.count), row.best_ms * 1e3,
                 row.bytes / row.ms * 1e-9, row.flops / row.ms * 1e-9);
}

}  // namespace tandem::kernels::cuda
