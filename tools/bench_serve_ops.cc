// bench_serve_ops: times what a decode step is made of (products with adapters, paged attention,
// sampling) at the shapes of a model, a whole layer of it, and prefill attention, on one device;
// each case but the largest is also run on the CPU backend and the outputs compared. Prints one
// JSON value: per case microseconds, the bytes it must move and GB/s, and the relative error (for
// sampled ids: the share that differs).
//   bench_serve_ops [--shape NAME|CONFIG_JSON] [--device cpu|cuda] [--threads N] [--only NAME]
//   [--check no]
#include "kernels/cpu/cpu_backend.h"
#include "protocol/base/clock.h"
#include "protocol/base/random.h"
#include "tools/bench_options.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

namespace tandem::tools {
namespace {

using namespace kernels;
using nlohmann::json;
using worker::model::ModelConfig;

constexpr std::int64_t kRank = 16, kBlockSize = 16;
constexpr std::int64_t kArenaBytes = std::int64_t{1} << 36;
/// Calls of one replay go round copies of what a step reads once, so that no cache holds it.
constexpr int kCalls = 16;
constexpr double kCopyBytes = 400e6;
constexpr int kRepeats = 5;

/// One case on one device: `call(i)` issues the op on copy i, `output` is what it wrote.
struct Prepared {
  std::function<void(int)> call;
  Tensor output;
  double bytes = 0.0;  ///< that a call must read and write at least
};

class Device {
 public:
  Device(Backend backend, ModelConfig config)
      : model(std::move(config)),
        backend_(std::move(backend)),
        tensors_(*backend_.allocator, *backend_.ledger, MemoryKind::kActivations, "tensors",
                 kArenaBytes),
        workspace_(*backend_.allocator, *backend_.ledger, MemoryKind::kWorkspace, "workspace",
                   kArenaBytes),
        exec_{workspace_},
        table_(std::size_t{1} << 20) {
    Random random(7);
    for (float& x : table_) x = random.normal();
  }

  Ops& ops() { return *backend_.ops; }
  Exec& exec() { return exec_; }
  Arena& tensors() { return tensors_; }

  const ModelConfig model;

  /// Numbers that depend on the seed alone.
  Tensor random(DType dtype, const Shape& shape, std::uint64_t seed, float scale) {
    const Tensor t = tensors_.alloc(shape, dtype);
    std::vector<std::byte> bytes(static_cast<std::size_t>(t.bytes()));
    for (std::int64_t j = 0; j < shape.elements(); ++j) {
      const float x = scale * value(seed, j);
      if (dtype == DType::kF32)
        reinterpret_cast<float*>(bytes.data())[j] = x;
      else
        reinterpret_cast<bf16*>(bytes.data())[j] = to_bf16(x);
    }
    ops().upload(exec_, bytes, t);
    return t;
  }
  template <class T>
  Tensor list(const std::vector<T>& values, DType dtype) {
    const Tensor t = tensors_.alloc({static_cast<std::int64_t>(values.size())}, dtype);
    ops().upload(exec_, std::as_bytes(std::span(values)), t);
    return t;
  }
  Tensor ints(const std::vector<std::int32_t>& values) { return list(values, DType::kI32); }
  PackedWeight weight(std::int64_t n, std::int64_t i, std::uint64_t seed) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(i));
    return ops().pack_weight(exec_, tensors_, DType::kBF16, n, i,
                             [&](std::int64_t row, std::int64_t rows, float* out) {
                               for (std::int64_t j = 0; j < rows * i; ++j)
                                 out[j] = scale * value(seed, row * i + j);
                             });
  }
  std::vector<double> values(const Tensor& t) {
    std::vector<std::byte> bytes(static_cast<std::size_t>(t.bytes()));
    ops().download(exec_, t, bytes);
    std::vector<double> out(static_cast<std::size_t>(t.elements()));
    for (std::size_t j = 0; j < out.size(); ++j)
      out[j] = t.dtype == DType::kF32    ? reinterpret_cast<const float*>(bytes.data())[j]
               : t.dtype == DType::kBF16 ? to_f32(reinterpret_cast<const bf16*>(bytes.data())[j])
                                         : reinterpret_cast<const std::int32_t*>(bytes.data())[j];
    return out;
  }

  /// Microseconds of a call, the best of several replays.
  double time(const Prepared& p) {
    double best = INFINITY;
    ++key_;
    for (int r = 0; r < kRepeats + 2; ++r) {
      ops().synchronize(exec_);
      const std::int64_t begin = steady_ns();
      ops().replay(exec_, key_, [&] {
        for (int i = 0; i < kCalls; ++i) p.call(i);
      });
      ops().synchronize(exec_);
      const double took_us = static_cast<double>(steady_ns() - begin) * 1e-3;
      if (r >= 2) best = std::min(best, took_us / kCalls);  // two to record
    }
    return best;
  }

 private:
  [[nodiscard]] float value(std::uint64_t seed, std::int64_t j) const {
    const auto row = static_cast<std::uint64_t>(j) / 4096,
               at = static_cast<std::uint64_t>(j) % 4096;
    return table_[(mix64(seed + (row << 20)) + at) % table_.size()];
  }

  Backend backend_;
  Arena tensors_, workspace_;
  Exec exec_;
  std::vector<float> table_;
  std::uint64_t key_ = 0;
};

int copies_of(double bytes, bool timed) {
  return timed ? std::clamp(static_cast<int>(kCopyBytes / bytes) + 1, 1, kCalls) : 1;
}

/// A fused linear, whose rows carry `adapters` in turn, each the same number of rows.
struct Fused {
  PackedWeight weight;
  std::vector<LoraSite> sites;
  AdapterRows rows;
  double bytes = 0.0;  ///< of the weight and all factors

  [[nodiscard]] LinearArgs args(const Tensor& x, const Tensor& y,
                                const LinearReader& then = {}) const {
    return {x, &weight, {}, sites, rows.rank_max > 0 ? &rows : nullptr, y, {}, {}, then};
  }
};
Fused make_fused(Device& d, std::int64_t t, std::int64_t i,
                 const std::vector<std::int64_t>& outputs, std::int64_t adapters,
                 std::uint64_t seed) {
  Fused f;
  std::int64_t n = 0;
  for (const std::int64_t o : outputs) n += o;
  f.weight = d.weight(n, i, seed);
  f.bytes = 2.0 * static_cast<double>(n * i);
  if (adapters == 0) return f;
  std::vector<std::int32_t> offsets, slots;
  f.rows.segments_max = adapters + 2;  // as serving's bounds
  for (std::int64_t s = 0; s <= f.rows.segments_max; ++s)
    offsets.push_back(static_cast<std::int32_t>(s < adapters ? t * s / adapters : t));
  for (std::int64_t s = 0; s < f.rows.segments_max; ++s)
    slots.push_back(s < adapters ? static_cast<std::int32_t>(s) : -1);
  f.rows.segment_offsets = d.ints(offsets);
  f.rows.segment_slots = d.ints(slots);
  f.rows.rank_max = kRank;
  std::int64_t begin = 0;
  for (const std::int64_t o : outputs) {
    std::vector<LoraEntry> entries;
    for (std::int64_t k = 0; k < adapters; ++k) {
      LoraEntry e;
      const auto own = seed + static_cast<std::uint64_t>(k + begin);
      e.a = d.random(DType::kBF16, {kRank, i}, own + 1, 1.0f / 64).data;
      e.b = d.random(DType::kBF16, {o, kRank}, own + 2, 1.0f).data;
      e.rank = kRank;
      e.scale = 0.5f;
      entries.push_back(e);
    }
    const auto bytes = static_cast<std::int64_t>(entries.size() * sizeof(LoraEntry));
    const Tensor list = d.tensors().alloc({bytes}, DType::kU8);
    d.ops().upload(d.exec(), std::as_bytes(std::span(entries)), list);
    f.sites.push_back({begin, o, list, 0});
    f.bytes += 2.0 * static_cast<double>(adapters * kRank * (i + o));
    begin += o;
  }
  return f;
}

/// y of a fused linear.
Prepared linear(Device& d, bool timed, std::int64_t t, std::int64_t i,
                const std::vector<std::int64_t>& outputs, std::int64_t adapters) {
  Prepared p;
  auto linears = std::make_shared<std::vector<Fused>>();
  do linears->push_back(make_fused(d, t, i, outputs, adapters, 100 * linears->size()));
  while (static_cast<int>(linears->size()) < copies_of(linears->front().bytes, timed));
  p.bytes = linears->front().bytes;
  const std::int64_t n = linears->front().weight.n;
  const ModelConfig& m = d.model;
  const Tensor x = d.random(DType::kBF16, {t, i}, 5, 1.0f);
  p.output = d.tensors().alloc({t, n}, n == m.vocab ? DType::kF32 : DType::kBF16);
  p.call = [&d, linears, x, y = p.output](int at) {
    const auto c = static_cast<std::size_t>(at) % linears->size();
    d.ops().linear_forward(d.exec(), (*linears)[c].args(x, y));
  };
  return p;
}

/// `rows` new rows of each of `sequences`, the last at key `length` - 1.
struct Attention {
  ModelConfig m;
  KvCache kv;
  Tensor qkv, offsets, lens, table, out;
  std::int64_t length;
  double bytes;
  [[nodiscard]] PagedAttentionArgs args() const {
    return {{m.heads, m.kv_heads, m.head_dim, 1.0f / std::sqrt(static_cast<float>(m.head_dim))},
            qkv,
            offsets,
            lens,
            table,
            &kv,
            length,
            out};
  }
};
std::shared_ptr<const Attention> make_attention(Device& d, std::int64_t sequences,
                                                std::int64_t rows, std::int64_t length) {
  const ModelConfig& m = d.model;
  const std::int64_t t = sequences * rows, each = (length + kBlockSize - 1) / kBlockSize;
  const std::int64_t width = (m.heads + 2 * m.kv_heads) * m.head_dim;
  const Shape cache{sequences * each, m.kv_heads, kBlockSize, m.head_dim};
  auto a = std::make_shared<Attention>();
  a->m = m;
  a->kv.k = d.random(DType::kBF16, cache, 1, 1.0f);
  a->kv.v = d.random(DType::kBF16, cache, 2, 1.0f);
  a->kv.block_size = kBlockSize;
  std::vector<std::int32_t> offsets, lens, table;
  for (std::int64_t s = 0; s <= sequences; ++s)
    offsets.push_back(static_cast<std::int32_t>(s * rows));
  for (std::int64_t s = 0; s < sequences; ++s) lens.push_back(static_cast<std::int32_t>(length));
  for (std::int64_t b = 0; b < sequences * each; ++b)  // scattered
    table.push_back(static_cast<std::int32_t>(b * 7919 % (sequences * each)));
  a->qkv = d.random(DType::kBF16, {t, width}, 3, 1.5f);
  a->offsets = d.ints(offsets);
  a->lens = d.ints(lens);
  a->table = d.ints(table).reshaped({sequences, each});
  a->length = length;
  a->out = d.tensors().alloc({t, m.heads * m.head_dim}, DType::kBF16);
  a->bytes = 4.0 * static_cast<double>(sequences * length * m.kv_heads * m.head_dim);
  return a;
}
Prepared attention(Device& d, std::int64_t sequences, std::int64_t rows, std::int64_t length) {
  const auto a = make_attention(d, sequences, rows, length);
  return {[&d, a](int) { d.ops().paged_attention_forward(d.exec(), a->args()); }, a->out, a->bytes};
}

/// What a layer does in a decode step of `t` sequences of `length` tokens: of attention, of the
/// MLP.
Prepared layer(Device& d, std::int64_t t, std::int64_t length, std::int64_t adapters, bool attends,
               bool mlp) {
  struct Layer {
    std::shared_ptr<const Attention> attention;
    Fused qkv, o, gate_up, down;
    Tensor stream, delta, normed, weight, wide, act, positions, slots, inv_freq;
  };
  const ModelConfig& m = d.model;
  auto l = std::make_shared<Layer>();
  Prepared p;
  const auto fresh = [&](std::int64_t width) {
    return d.random(DType::kBF16, {t, width}, 5, 1.0f);
  };
  l->stream = fresh(m.width), l->delta = fresh(m.width), l->normed = fresh(m.width);
  l->weight = d.random(DType::kBF16, {m.width}, 6, 1.0f);
  if (attends) {
    l->attention = make_attention(d, t, 1, length);
    l->qkv = make_fused(d, t, m.width,
                        {m.heads * m.head_dim, m.kv_heads * m.head_dim, m.kv_heads * m.head_dim},
                        adapters, 100);
    l->o = make_fused(d, t, m.heads * m.head_dim, {m.width}, adapters, 200);
    std::vector<std::int32_t> slots;
    for (std::int64_t s = 0; s < t; ++s)  // the last key's, as the attention's table has it
      slots.push_back(static_cast<std::int32_t>(((s + 1) * (length / kBlockSize) - 1) * 7919 %
                                                    (t * (length / kBlockSize)) * kBlockSize +
                                                kBlockSize - 1));
    l->slots = d.ints(slots);
    l->positions =
        d.ints(std::vector(static_cast<std::size_t>(t), static_cast<std::int32_t>(length - 1)));
    l->inv_freq = d.list(std::vector<float>(m.head_dim / 2, 0.01f), DType::kF32);
    p.bytes += l->attention->bytes + l->qkv.bytes + l->o.bytes;
  }
  if (mlp) {
    l->gate_up = make_fused(d, t, m.width, {m.mlp_width, m.mlp_width}, adapters, 300);
    l->down = make_fused(d, t, m.mlp_width, {m.width}, adapters, 400);
    l->wide = fresh(2 * m.mlp_width), l->act = fresh(m.mlp_width);
    p.bytes += l->gate_up.bytes + l->down.bytes;
  }
  p.output = l->delta;
  p.call = [&d, l, attends, mlp](int) {
    const auto norm = [&] {
      d.ops().add_rms_norm_forward(d.exec(),
                                   {l->stream, l->delta, l->weight, 1e-5f, l->normed, {}});
    };
    if (attends) {
      const Attention& a = *l->attention;
      norm();
      d.ops().linear_forward(
          d.exec(), l->qkv.args(l->normed, a.qkv,
                                {.rope = {a.qkv, l->positions, l->inv_freq, 1.0f, d.model.heads,
                                          d.model.kv_heads, d.model.head_dim, &a.kv, l->slots}}));
      d.ops().paged_attention_forward(d.exec(), a.args());
      d.ops().linear_forward(d.exec(), l->o.args(a.out, l->delta));
    }
    if (!mlp) return;
    norm();
    d.ops().linear_forward(d.exec(),
                           l->gate_up.args(l->normed, l->wide, {.silu_mul = {l->wide, l->act}}));
    d.ops().linear_forward(d.exec(), l->down.args(l->act, l->delta));
  };
  return p;
}

Prepared sampling(Device& d, std::int64_t s, float temperature, std::int32_t k, float top_p,
                  std::int64_t top) {
  const ModelConfig& m = d.model;
  const auto count = static_cast<std::size_t>(s);
  SampleArgs a;
  a.logits = d.random(DType::kF32, {s, m.vocab}, 9, 3.0f);
  a.temperature = d.list(std::vector<float>(count, temperature), DType::kF32);
  a.top_k = d.ints(std::vector<std::int32_t>(count, k));
  a.top_p = d.list(std::vector<float>(count, top_p), DType::kF32);
  a.min_p = d.list(std::vector<float>(count, 0.0f), DType::kF32);
  std::vector<std::int64_t> seeds;
  for (std::int64_t r = 0; r < s; ++r) seeds.push_back(r);
  a.seed = a.position = d.list(seeds, DType::kI64);
  a.ids = d.tensors().alloc({s}, DType::kI32);
  a.logprob = d.tensors().alloc({s}, DType::kF32);
  a.top_logprobs = top;
  a.top_ids = d.tensors().alloc({s, top}, DType::kI32);
  a.top_logprob = d.tensors().alloc({s, top}, DType::kF32);
  Prepared p;
  p.output = a.ids;
  p.bytes = 4.0 * static_cast<double>(s * m.vocab);
  p.call = [&d, a](int) { d.ops().sample(d.exec(), a); };
  return p;
}

struct Case {
  std::string name;
  std::function<Prepared(Device&, bool timed)> prepare;
  bool check = true;
};

std::vector<Case> cases(const ModelConfig& m) {
  std::vector<Case> all;
  const auto add = [&](const std::string& name, auto prepare, bool check = true) {
    all.push_back({name, prepare, check});
  };
  struct Site {
    const char* name;
    std::int64_t i;
    std::vector<std::int64_t> outputs;
  };
  const std::vector<Site> sites{
      {"qkv", m.width, {m.heads * m.head_dim, m.kv_heads * m.head_dim, m.kv_heads * m.head_dim}},
      {"o", m.heads * m.head_dim, {m.width}},
      {"gate_up", m.width, {m.mlp_width, m.mlp_width}},
      {"down", m.mlp_width, {m.width}},
      {"logits", m.width, {m.vocab}}};
  for (const Site& s : sites)
    for (const auto& [t, adapters] : {std::pair{1, 0}, {1, 1}, {8, 0}, {64, 0}, {64, 8}, {64, 64}})
      if (adapters == 0 || s.i != m.width || s.outputs[0] != m.vocab)
        add(str("linear_", s.name, "_", t, "_rows_", adapters, "_adapters"),
            [=, t = t, adapters = adapters](Device& d, bool timed) {
              return linear(d, timed, t, s.i, s.outputs, adapters);
            });
  for (const int adapters : {0, 8, 64})
    for (const int halves : {1, 2, 3})  // attention's, the MLP's, both
      add(
          str(halves == 1   ? "attention_"
              : halves == 2 ? "mlp_"
                            : "layer_",
              "64_x_1024_", adapters, "_adapters"),
          [=](Device& d, bool) {
            return layer(d, 64, 1024, adapters, halves % 2 == 1, halves >= 2);
          },
          false);
  for (const auto& [n, length] : {std::pair{1, 512}, {1, 8192}, {64, 1024}})
    add(str("decode_attention_", n, "_x_", length),
        [=, n = n, length = length](Device& d, bool) { return attention(d, n, 1, length); });
  add("prefill_attention_4_x_2048", [](Device& d, bool) { return attention(d, 4, 2048, 2048); });
  add(
      "prefill_attention_1_x_8192", [](Device& d, bool) { return attention(d, 1, 8192, 8192); },
      false);
  for (const int s : {1, 64}) {
    add(str("greedy_", s), [=](Device& d, bool) { return sampling(d, s, 0.0f, 0, 1.0f, 0); });
    add(str("top_p_", s), [=](Device& d, bool) { return sampling(d, s, 0.8f, 0, 0.9f, 0); });
    add(str("top_k_p_", s), [=](Device& d, bool) { return sampling(d, s, 0.8f, 40, 0.9f, 0); });
    add(str("top_20_", s), [=](Device& d, bool) { return sampling(d, s, 0.0f, 0, 1.0f, 20); });
  }
  return all;
}

/// Relative L2 error; of integers the share that differs.
double difference(const std::vector<double>& got, const std::vector<double>& want, bool integers) {
  double sum = 0.0, reference = 0.0, different = 0.0;
  for (std::size_t j = 0; j < got.size(); ++j) {
    sum += (got[j] - want[j]) * (got[j] - want[j]);
    reference += want[j] * want[j];
    different += got[j] != want[j] ? 1.0 : 0.0;
  }
  return integers ? different / static_cast<double>(got.size()) : std::sqrt(sum / reference);
}

json run(const std::string& device, const ModelConfig& model, int threads, const std::string& only,
         bool check) {
  json rows = json::array();
  auto opened = open_bench_device(device, threads);
  if (!opened.ok()) throw std::runtime_error(opened.status().to_string());
  Device timed(std::move(*opened), model);
  Device reference(make_cpu_backend({.threads = threads}), model);
  for (const Case& c : cases(model)) {
    if (c.name.find(only) == std::string::npos) continue;
    const ArenaScope scope(timed.tensors()), other(reference.tensors());
    const Prepared p = c.prepare(timed, true);
    const double us = timed.time(p);
    json row{
        {"case", c.name}, {"us", us}, {"bytes", p.bytes}, {"gbytes_per_s", p.bytes / us / 1e3}};
    if (check && c.check) {
      const Prepared q = c.prepare(reference, false);
      p.call(0);
      q.call(0);
      row["error"] = difference(timed.values(p.output), reference.values(q.output),
                                p.output.dtype == DType::kI32);
    }
    rows.push_back(row);
    std::cerr << row.dump() << "\n";
  }
  return {{"machine", timed.ops().profile().name}, {"cases", rows}};
}

}  // namespace
}  // namespace tandem::tools

int main(int argc, char** argv) {
  using namespace tandem;
  std::string path, shape = "llama3-8b", device = "cuda", only;
  int threads = 0;
  bool check = true;
  CLI::App app("Times what a decode step is made of");
  tools::add_model_options(app, path, shape, device);
  app.add_option("--threads", threads, "OpenMP threads of the ops; 0: all");
  app.add_option("--only", only, "cases whose name has this in it");
  app.add_option("--check", check, "no: do not compare with the CPU");
  CLI11_PARSE(app, argc, argv);
  const auto model = tools::load_bench_model(path, shape);
  if (!model.ok()) return std::cerr << "bench_serve_ops: " << model.status().message() << "\n", 1;
  try {
    std::cout << tools::run(device, model->config, threads, only, check).dump(1) << std::endl;
    return 0;
  } catch (const std::exception& e) {
    std::cerr << "bench_serve_ops: " << e.what() << "\n";
    return 1;
  }
}
