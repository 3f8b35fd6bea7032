#include "worker/model/stream_rows.h"

#include <algorithm>

namespace tandem::worker::model {

using kernels::Tensor;

StreamRoom make_stream_room(Context& ctx, kernels::Arena& arena, std::int64_t rows,
                            std::int64_t width, std::int64_t part_bytes) {
  const std::int64_t own = rows / ctx.comm.size();
  // One tensor: what is shared is mapped piece by piece.
  const Tensor all = arena.alloc({rows + 2 * own, width}, ctx.compute_dtype);
  ctx.comm.share(ctx.exec, all);
  return {all.rows(0, rows), all.rows(rows, own), all.rows(rows + own, own), part_bytes};
}

std::int64_t stream_parts(const Context& ctx, std::int64_t t, std::int64_t s) {
  if (ctx.room == nullptr || s == t) return 1;
  const std::int64_t row = ctx.room->addends.dim(1) * dtype_bytes(ctx.compute_dtype);
  const std::int64_t bytes = t * row;
  if (bytes < ctx.room->part_bytes / 2) return 1;
  std::int64_t parts = std::clamp((bytes + ctx.room->part_bytes - 1) / ctx.room->part_bytes,
                                  std::int64_t{2}, kStreamPartsMax);
  // Parts are equal, and begin where vectors may.
  const auto fits = [&] {
    return s % parts == 0 && t / parts % 8 == 0 && s / parts * row % 16 == 0;
  };
  while (parts > 1 && !fits()) --parts;
  return parts;
}

void wait_part(const Context& ctx, PartsPending& pending, std::int64_t p) {
  if (static_cast<std::size_t>(p) >= pending.size()) return;
  auto& part = pending[static_cast<std::size_t>(p)];
  if (part) part->wait(ctx.exec);
  part.reset();
}

void wait_parts(const Context& ctx, PartsPending& pending) {
  for (std::size_t p = 0; p < pending.size(); ++p)
    wait_part(ctx, pending, static_cast<std::int64_t>(p));
}

void gather_stream(Context& ctx, const Tensor& x, const Tensor& all) {
  const std::int64_t parts = stream_parts(ctx, all.dim(0), x.dim(0));
  for (std::int64_t p = 0; p < parts; ++p)
    ctx.comm.all_gather(ctx.exec, stream_part(x, p, parts), stream_part(all, p, parts));
}

void sum_stream(Context& ctx, const Tensor& all, const Tensor& x) {
  const std::int64_t parts = stream_parts(ctx, all.dim(0), x.dim(0));
  for (std::int64_t p = 0; p < parts; ++p)
    ctx.comm.reduce_scatter_sum(ctx.exec, stream_part(all, p, parts), stream_part(x, p, parts));
}

}  // namespace tandem::worker::model
