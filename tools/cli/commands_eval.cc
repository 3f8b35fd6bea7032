#include "tools/cli/commands.h"
#include "tools/cli/model_files.h"
#include "tools/cli/output.h"
#include "worker/model/model_loader.h"
#include "worker/runtime/encoder.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <iostream>
#include <mutex>
#include <thread>

namespace tandem::tools {
namespace {

constexpr std::size_t kConcurrentMax = 16;

/// The base model behind a base's, an adapter's or an alias's name.
Result<Json> base_model(Session& session, const std::string& name) {
  auto model = session.call("model.show", {{"model", name}});
  if (model.ok()) return model;
  TANDEM_ASSIGN_OR_RETURN(const Json adapter,
                          session.call("adapter.manifest", {{"adapter", name}}));
  return session.call("model.show", {{"model", field(adapter, "model")}});
}

/// Negative log-likelihood of one example's trained tokens, as the serving path computes it.
Result<double> score(protocol::client::Client& client, const std::string& model,
                     const worker::data::Example& example) {
  const auto first = std::find_if(example.labels.begin(), example.labels.end(),
                                  [](auto l) { return l != worker::data::kIgnore; });
  const auto from = static_cast<std::size_t>(first - example.labels.begin()) + 1;
  protocol::Generate request;
  request.model = model;
  request.input.tokens = example.tokens;
  request.stream = false;
  request.sampling.max_tokens = 0;
  request.sampling.temperature = 0.0f;
  request.sampling.repetition_penalty = 1.0f;
  request.sampling.prompt_logprobs_from = static_cast<std::int64_t>(from);
  std::vector<float> logprobs;
  const auto answer =
      client.generate(std::move(request), [&](const protocol::GenerateChunk& chunk) {
        logprobs.insert(logprobs.end(), chunk.prompt_logprobs.begin(), chunk.prompt_logprobs.end());
        return true;
      });
  if (!answer.ok()) return answer.status();
  if (logprobs.size() + from != example.tokens.size())
    return internal_error(str("row of line ", example.line, ": ", logprobs.size(), " scores for ",
                              example.tokens.size() - from, " tokens"));
  double loss = 0;
  for (std::size_t i = from; i < example.tokens.size(); ++i)
    if (example.labels[i - 1] != worker::data::kIgnore) loss -= logprobs[i - from];
  return loss;
}

}  // namespace

Status run_eval(Session& session, const std::string& model, const std::string& path,
                std::int64_t max_length) {
  TANDEM_ASSIGN_OR_RETURN(const Json base, base_model(session, model));
  TANDEM_ASSIGN_OR_RETURN(const auto files,
                          ModelFiles::find(session, base, ModelFiles::Part::kTexts));
  TANDEM_ASSIGN_OR_RETURN(const auto loaded, worker::model::load_model_texts(files->path()));
  TANDEM_ASSIGN_OR_RETURN(const auto encoder, worker::runtime::make_encoder(loaded, files->path()));
  worker::data::DatasetOptions options;
  options.max_length = std::min(max_length, loaded.config.context_max);
  TANDEM_ASSIGN_OR_RETURN(const auto dataset, worker::data::load_dataset(path, encoder, options));
  TANDEM_ASSIGN_OR_RETURN(auto* const client, session.client());

  std::mutex mutex;
  Status failure;
  double loss = 0;
  std::atomic<std::size_t> next{0}, done{0};
  ProgressBar bar;
  auto work = [&] {
    for (std::size_t i; (i = next++) < dataset.examples.size();) {
      const auto row = score(*client, model, dataset.examples[i]);
      std::lock_guard lock(mutex);
      if (!row.ok()) failure = row.status();
      if (!failure.ok()) return;
      loss += *row;
      if (!session.json())
        bar.update(static_cast<std::int64_t>(++done),
                   static_cast<std::int64_t>(dataset.examples.size()), "rows");
    }
  };
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < std::min(kConcurrentMax, dataset.examples.size()); ++i)
    threads.emplace_back(work);
  for (auto& thread : threads) thread.join();
  bar.finish();
  TANDEM_RETURN_IF_ERROR(failure);
  const auto tokens = dataset.trained_tokens();
  const double mean = loss / static_cast<double>(tokens);
  const Json result{{"model", model},
                    {"rows", dataset.examples.size()},
                    {"trained_tokens", tokens},
                    {"loss", mean},
                    {"perplexity", std::exp(mean)}};
  std::cout << (session.json() ? result.dump() + "\n" : describe(result));
  return {};
}

}  // namespace tandem::tools
