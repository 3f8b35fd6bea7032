#include "worker/model/model_config.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace tandem::worker::model {

namespace {

// Su et al. 2021: theta^(-2d/D).
std::vector<double> default_frequencies(const ModelConfig& config) {
  std::vector<double> freq(static_cast<std::size_t>(config.head_dim / 2));
  for (std::size_t d = 0; d < freq.size(); ++d)
    freq[d] = std::pow(config.rope_theta,
                       -2.0 * static_cast<double>(d) / static_cast<double>(config.head_dim));
  return freq;
}

// Hugging Face modeling_rope_utils._compute_llama3_parameters.
void scale_llama3(const RopeScaling& scaling, std::vector<double>& freq) {
  const auto context = static_cast<double>(scaling.original_max_position_embeddings);
  const double low_wavelength = context / scaling.low_freq_factor;
  const double high_wavelength = context / scaling.high_freq_factor;
  for (double& f : freq) {
    const double wavelength = 2.0 * std::numbers::pi / f;
    if (wavelength < high_wavelength) continue;
    if (wavelength > low_wavelength) {
      f /= scaling.factor;
      continue;
    }
    const double smooth = (context / wavelength - scaling.low_freq_factor) /
                          (scaling.high_freq_factor - scaling.low_freq_factor);
    f = (1.0 - smooth) * f / scaling.factor + smooth * f;
  }
}

// Peng et al. 2023, as Hugging Face's _compute_yarn_parameters computes it.
void scale_yarn(const ModelConfig& config, std::vector<double>& freq) {
  const RopeScaling& scaling = config.rope_scaling;
  const auto dim = static_cast<double>(config.head_dim);
  const auto context = static_cast<double>(scaling.original_max_position_embeddings);
  const auto correction_dim = [&](double rotations) {
    return dim * std::log(context / (rotations * 2.0 * std::numbers::pi)) /
           (2.0 * std::log(config.rope_theta));
  };
  double low = correction_dim(scaling.beta_fast), high = correction_dim(scaling.beta_slow);
  if (scaling.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1.0);
  if (low == high) high += 0.001;
  for (std::size_t d = 0; d < freq.size(); ++d) {
    const double ramp = std::clamp((static_cast<double>(d) - low) / (high - low), 0.0, 1.0);
    freq[d] = freq[d] / scaling.factor * ramp + freq[d] * (1.0 - ramp);
  }
}

}  // namespace

RopeTable make_rope_table(const ModelConfig& config) {
  const RopeScaling& scaling = config.rope_scaling;
  RopeTable table;
  std::vector<double> freq = default_frequencies(config);
  switch (scaling.kind) {
    case RopeScaling::Kind::kDefault:
      break;
    case RopeScaling::Kind::kLinear:
      for (double& f : freq) f /= scaling.factor;
      break;
    case RopeScaling::Kind::kLlama3:
      scale_llama3(scaling, freq);
      break;
    case RopeScaling::Kind::kYarn:
      scale_yarn(config, freq);
      table.attention_factor = static_cast<float>(scaling.attention_factor.value_or(
          scaling.factor <= 1.0 ? 1.0 : 0.1 * std::log(scaling.factor) + 1.0));
      break;
  }
  if (!scaling.factors.empty()) {
    TANDEM_CHECK_EQ(scaling.factors.size(), freq.size());
    for (std::size_t d = 0; d < freq.size(); ++d)
      freq[d] /= static_cast<double>(scaling.factors[d]);
  }
  for (double f : freq) table.inv_freq.push_back(static_cast<float>(f));
  return table;
}

}  // namespace tandem::worker::model
