// Greedy tokens of a real model through the serving engine against what transformers drew in f32
// (tests/golden/greedy_smollm2.py). All prompts run together. Prints JSON; exit code 1 when a token
// differs where the reference's two largest logits are 1e-4 or more apart.
//
//   greedy_golden MODEL.gguf tests/golden/greedy_smollm2.json [threads]
#include "kernels/cpu/cpu_backend.h"
#include "worker/model/model_loader.h"
#include "worker/serve/serve_engine.h"

#include <nlohmann/json.hpp>

#include <fstream>
#include <iostream>
#include <map>

namespace {

using namespace tandem;
namespace model = tandem::worker::model;
namespace serve = tandem::worker::serve;

/// Both tokens are right below this gap of the reference's logits.
constexpr double kTieGap = 1e-4;

std::map<std::string, std::vector<std::int32_t>> generate(const std::string& path,
                                                          const nlohmann::json& golden,
                                                          int threads) {
  auto loaded = model::load_model(path);
  TANDEM_CHECK(loaded.ok(), loaded.status().to_string());
  kernels::CpuOptions cpu;
  cpu.threads = threads;
  kernels::Backend backend = kernels::make_cpu_backend(cpu);
  constexpr std::int64_t kReserve = std::int64_t{1} << 36;  // address space
  kernels::Arena weights_arena(*backend.allocator, *backend.ledger, kernels::MemoryKind::kWeights,
                               "weights", kReserve);
  kernels::Arena activations(*backend.allocator, *backend.ledger, kernels::MemoryKind::kActivations,
                             "activations", kReserve);
  kernels::Arena workspace(*backend.allocator, *backend.ledger, kernels::MemoryKind::kWorkspace,
                           "workspace", kReserve);
  kernels::Exec exec{workspace, {}, kernels::Numerics::kInvariant};
  const auto comm = worker::comm::make_single_communicator(
      [&](kernels::Exec& e, kernels::Tensor from, kernels::Tensor to) {
        backend.ops->copy(e, from, to);
      });
  model::Context context{*backend.ops, exec, *comm, activations, DType::kF32};
  const auto base = model::BaseWeights::load(*backend.ops, exec, weights_arena, loaded->config,
                                             DType::kF32, *loaded->source);
  const auto weights = model::make_resident_weights(base.value());
  const SystemClock clock;
  auto engine = serve::ServeEngine::create({.allocator = *backend.allocator,
                                            .ledger = *backend.ledger,
                                            .context = context,
                                            .weights = *weights,
                                            .adapters = nullptr,
                                            .slot_begin = 0,
                                            .slot_count = 0,
                                            .tokenizer = std::nullopt,
                                            .clock = clock},
                                           {})
                    .value();
  for (std::size_t i = 0; i < golden["rows"].size(); ++i) {
    serve::GenerateRequest r;
    r.id = RequestId(str(i));
    r.prompt = golden["rows"][i]["prompt"].get<std::vector<std::int32_t>>();
    r.sampling.max_tokens = golden["new_tokens"].get<std::int64_t>();
    r.sampling.temperature = 0.0f;
    r.sampling.ignore_eos = true;
    const Status status = engine->submit(std::move(r));
    TANDEM_CHECK(status.ok(), status.to_string());
  }
  std::map<std::string, std::vector<std::int32_t>> ids;
  while (engine->has_work())
    for (const serve::SequenceOutput& out : engine->step().outputs)
      ids[out.id.value].insert(ids[out.id.value].end(), out.token_ids.begin(), out.token_ids.end());
  return ids;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "greedy_golden MODEL.gguf GOLDEN.json [threads]" << std::endl;
    return 2;
  }
  const nlohmann::json golden = nlohmann::json::parse(std::ifstream(argv[2]));
  const auto got = generate(argv[1], golden, argc > 3 ? std::atoi(argv[3]) : 0);
  int different = 0, compared = 0;
  nlohmann::json ties = nlohmann::json::array(), wrong = nlohmann::json::array();
  for (std::size_t i = 0; i < golden["rows"].size(); ++i) {
    const auto& row = golden["rows"][i];
    const auto& ids = got.at(str(i));
    for (std::size_t t = 0; t < row["ids"].size(); ++t, ++compared) {
      if (t < ids.size() && ids[t] == row["ids"][t].get<std::int32_t>()) continue;
      const double gap = row["gaps"][t].get<double>();
      (gap < kTieGap ? ties : wrong).push_back({{"prompt", i}, {"token", t}, {"gap", gap}});
      if (gap >= kTieGap) ++different;
      break;  // what follows has another past
    }
  }
  std::cout << nlohmann::json{{"bench", "greedy_golden"},
                              {"prompts", golden["rows"].size()},
                              {"tokens_compared", compared},
                              {"ties", ties},
                              {"different", wrong}}
                   .dump(2)
            << std::endl;
  return different == 0 ? 0 : 1;
}
