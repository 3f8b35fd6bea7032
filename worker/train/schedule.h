// Learning rates by step, as Hugging Face transformers' get_scheduler computes them. Pure.
#pragma once

#include "protocol/job_spec.h"

#include <cstdint>

namespace tandem::worker::train {

/// Warm-up steps of a job: settings.warmup_steps where positive, else
/// ceil(warmup_ratio * total_steps), as TrainingArguments.get_warmup_steps.
std::int64_t warmup_steps(const protocol::TrainSettings& settings, std::int64_t total_steps);

/// The rate of optimizer step `index` (from 0; the first step of a warm-up has rate 0, as in
/// Hugging Face). kConstant warms up too, like constant_with_warmup.
double learning_rate(const protocol::TrainSettings& settings, std::int64_t total_steps,
                     std::int64_t index);

}  // namespace tandem::worker::train
