// An encoder with ChatML and a small tokenizer, and rows for it.
#pragma once

#include "tests/worker/text/text_fixtures.h"
#include "worker/data/dataset.h"

#include <string>
#include <vector>

namespace tandem::worker::data {

inline Encoder chatml_encoder() {
  return {text::golden_tokenizer(), text::golden_template("chatml")};
}
inline Encoder plain_encoder() {
  return {text::golden_tokenizer(), std::nullopt};
}

/// The texts of the runs of tokens that are trained.
inline std::vector<std::string> trained_texts(const Encoder& encoder, const Example& example) {
  std::vector<std::string> texts;
  std::vector<std::int32_t> run;
  const auto flush = [&] {
    if (!run.empty()) texts.push_back(encoder.tokenizer.decode(run));
    run.clear();
  };
  for (std::size_t i = 0; i + 1 < example.tokens.size(); ++i) {
    if (example.labels[i] == kIgnore) {
      flush();
      continue;
    }
    EXPECT_EQ(example.labels[i], example.tokens[i + 1]) << "a label is the next token";
    run.push_back(example.labels[i]);
  }
  flush();
  EXPECT_TRUE(example.labels.empty() || example.labels.back() == kIgnore);
  EXPECT_EQ(example.labels.size(), example.tokens.size());
  return texts;
}

}  // namespace tandem::worker::data
