// What a request's sampling becomes beside the model's generation config.
#include "worker/runtime/serve_host.h"

#include <gtest/gtest.h>

namespace tandem::worker::runtime {
namespace {

constexpr std::int64_t kVocab = 100, kRoom = 50;

serve::SamplingParams resolve(const protocol::SamplingParams& asked,
                              const model::GenerationDefaults& defaults) {
  return resolve_sampling(asked, defaults, kVocab, kRoom);
}

TEST(ResolveSampling, TakesTheModelsDefaultsForWhatIsUnset) {
  model::GenerationDefaults defaults;
  defaults.repetition_penalty = 1.5;
  defaults.max_new_tokens = 5;
  EXPECT_EQ(resolve({}, defaults).repetition_penalty, 1.5f);
  EXPECT_EQ(resolve({}, defaults).max_tokens, 5);
  protocol::SamplingParams asked;
  asked.repetition_penalty = 1.0f;
  asked.max_tokens = 7;
  EXPECT_EQ(resolve(asked, defaults).repetition_penalty, 1.0f);
  EXPECT_EQ(resolve(asked, defaults).max_tokens, 7);
  EXPECT_EQ(resolve({}, {}).repetition_penalty, 1.0f);
  EXPECT_FALSE(resolve({}, {}).max_tokens.has_value());
}

TEST(ResolveSampling, ADefaultLengthIsNeverTheReasonForARefusal) {
  model::GenerationDefaults defaults;
  defaults.max_new_tokens = 1000;
  EXPECT_FALSE(resolve({}, defaults).max_tokens.has_value());
  defaults.max_new_tokens = 5;
  protocol::SamplingParams asked;
  asked.min_tokens = 9;
  EXPECT_EQ(resolve(asked, defaults).max_tokens, 9);
}

TEST(ResolveSampling, AModelThatDoesNotSampleIsGreedyUnlessTheRequestSaysHowToDraw) {
  model::GenerationDefaults defaults;
  defaults.temperature = 0.6;
  EXPECT_EQ(resolve({}, defaults).temperature, 0.6f);
  defaults.do_sample = true;
  EXPECT_EQ(resolve({}, defaults).temperature, 0.6f);
  defaults.do_sample = false;
  EXPECT_EQ(resolve({}, defaults).temperature, 0.0f);
  protocol::SamplingParams asked;
  asked.temperature = 0.9f;
  EXPECT_EQ(resolve(asked, defaults).temperature, 0.9f);
  asked = {};
  asked.top_k = 40;
  EXPECT_EQ(resolve(asked, defaults).temperature, 0.6f);
}

}  // namespace
}  // namespace tandem::worker::runtime
