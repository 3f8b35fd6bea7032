// peft_dump: trains a few steps on a golden model, exports the adapter in PEFT's format and writes
// its logits. The C++ half of tests/golden/peft_oracle.py; see there.
//   peft_dump CASE OUT_FOLDER   (CASE: a folder of tests/golden/model)
#include "tests/support/engine_fixture.h"
#include "tests/support/model_golden.h"
#include "worker/model/peft.h"
#include "worker/train/device_batch.h"
#include "worker/train/train_session.h"

#include <iostream>

namespace tandem::test {
namespace {

/// Logits of every token of `batch` with the adapter in slot 0.
std::vector<float> logits(Engine& engine, const worker::data::MicroBatch& batch,
                          std::int64_t rank) {
  const worker::model::ModelConfig& config = engine.base->config();
  const worker::model::Transformer transformer(*engine.weights, &engine.adapters,
                                               {0, config.layers});
  worker::train::BatchBounds bounds;
  bounds.include(batch);
  kernels::ArenaScope scope(engine.activation_arena);
  const auto device = worker::train::upload_batch(engine.context, batch, bounds, 0, rank);
  const std::int64_t rows = device.tokens.tokens();
  const auto hidden = engine.activation_arena.alloc({rows, config.width}, DType::kF32);
  const auto out = engine.activation_arena.alloc({rows, config.vocab}, DType::kF32);
  transformer.forward(engine.context, device.tokens, {}, hidden, nullptr,
                      worker::model::Recompute::kNone);
  transformer.logits(engine.context, hidden, out);
  return engine.download(out.rows(0, device.real_tokens));
}

Status run(const std::string& name, const std::string& folder) {
  const ModelGolden golden(name);
  Engine engine(kernels::make_cpu_backend({1, 0}), golden.config(), DType::kF32,
                *worker::model::make_safetensors_source(golden.weights()));
  const worker::data::MicroBatch batch = golden.pack("", 0, 4);
  worker::train::SessionOptions options;
  options.settings.lora_r = 6;
  options.settings.lora_alpha = 9.0;
  options.settings.use_rslora = true;
  options.settings.learning_rate = 1e-2;
  options.settings.target_modules = {"q_proj", "o_proj", "down_proj"};
  TANDEM_ASSIGN_OR_RETURN(auto session, worker::train::TrainSession::create(
                                            engine.session_parts(), options,
                                            worker::train::make_fixed_batches(
                                                {{{batch}, batch.trained_tokens}}, {}, 5)));
  while (!session->finished()) {
    const auto event = session->run_slice();
    if (!event.ok()) return event.status();
  }
  const auto image = worker::model::to_peft(golden.config(), session->lora(),
                                            session->host_adapter(DType::kF32), DType::kF32, name);
  TANDEM_RETURN_IF_ERROR(storage::write_peft(folder, image->config, image->sites));
  const std::vector<float> values = logits(engine, batch, options.settings.lora_r);
  const storage::TensorInfo tensor{
      "logits",
      DType::kF32,
      {static_cast<std::int64_t>(batch.tokens.size()), golden.config().vocab},
      std::as_bytes(std::span(values))};
  return storage::write_safetensors(folder + "/logits.safetensors", std::span(&tensor, 1), {});
}

}  // namespace
}  // namespace tandem::test

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: peft_dump CASE OUT_FOLDER" << std::endl;
    return 2;
  }
  const tandem::Status status = tandem::test::run(argv[1], argv[2]);
  if (status.ok()) return 0;
  std::cerr << "peft_dump: " << status.to_string() << std::endl;
  return 1;
}
