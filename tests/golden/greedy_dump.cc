// greedy_dump: greedy continuations of prompts given as token ids, by the serving engine in f32.
// The C++ half of tests/golden/greedy_oracle.py; see there.
//   greedy_dump MODEL PROMPTS.json TOKENS   (a list of lists of ids; the same comes out on stdout)
#include "kernels/cpu/cpu_backend.h"
#include "protocol/base/clock.h"
#include "worker/comm/communicator.h"
#include "worker/model/model_loader.h"
#include "worker/serve/serve_engine.h"

#include <nlohmann/json.hpp>

#include <fstream>
#include <iostream>

namespace {

using namespace tandem;

Status run(const std::string& model_path, const std::string& prompts_path, std::int64_t tokens) {
  std::ifstream in(prompts_path);
  const auto prompts = nlohmann::json::parse(in).get<std::vector<std::vector<std::int32_t>>>();
  TANDEM_ASSIGN_OR_RETURN(auto loaded, worker::model::load_model(model_path));
  kernels::Backend backend = kernels::make_cpu_backend({});
  constexpr std::int64_t kReserve = std::int64_t{1} << 36;  // address space
  const auto arena = [&](kernels::MemoryKind kind, const char* name) {
    return std::make_unique<kernels::Arena>(*backend.allocator, *backend.ledger, kind, name,
                                            kReserve);
  };
  const auto weight_arena = arena(kernels::MemoryKind::kWeights, "weights");
  const auto activations = arena(kernels::MemoryKind::kActivations, "activations");
  const auto workspace = arena(kernels::MemoryKind::kWorkspace, "workspace");
  kernels::Exec exec{*workspace, {}, kernels::Numerics::kInvariant};
  const auto comm = worker::comm::make_single_communicator(
      [&](kernels::Exec& e, kernels::Tensor from, kernels::Tensor to) {
        backend.ops->copy(e, from, to);
      });
  TANDEM_ASSIGN_OR_RETURN(
      auto base, worker::model::BaseWeights::load(*backend.ops, exec, *weight_arena, loaded.config,
                                                  DType::kF32, *loaded.source));
  const auto weights = worker::model::make_resident_weights(base);
  worker::model::Context context{*backend.ops, exec, *comm, *activations, DType::kF32};
  const SystemClock clock;
  worker::serve::ServeOptions options;
  TANDEM_ASSIGN_OR_RETURN(auto engine, worker::serve::ServeEngine::create(
                                           {*backend.allocator, *backend.ledger, context, *weights,
                                            nullptr, 0, 0, std::nullopt, clock},
                                           options));
  for (std::size_t p = 0; p < prompts.size(); ++p) {
    worker::serve::GenerateRequest request;
    request.id = RequestId(std::to_string(p));
    request.prompt = prompts[p];
    request.sampling.max_tokens = tokens;
    request.sampling.temperature = 0.0f;
    request.sampling.ignore_eos = true;
    TANDEM_RETURN_IF_ERROR(engine->submit(std::move(request)));
  }
  std::vector<std::vector<std::int32_t>> generated(prompts.size());
  while (engine->has_work())
    for (const auto& output : engine->step().outputs) {
      if (!output.error.ok()) return output.error;
      auto& ids = generated[std::stoul(output.id.value)];
      ids.insert(ids.end(), output.token_ids.begin(), output.token_ids.end());
    }
  std::cout << nlohmann::json(generated).dump() << std::endl;
  return {};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: greedy_dump MODEL PROMPTS.json TOKENS" << std::endl;
    return 2;
  }
  const Status status = run(argv[1], argv[2], std::atoll(argv[3]));
  if (status.ok()) return 0;
  std::cerr << "greedy_dump: " << status.to_string() << std::endl;
  return exit_code(status.code());
}
