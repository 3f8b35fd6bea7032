// What a name in a request means: one look at the tables, at admission; the answer is kept for the
// request's whole life. Pure functions.
#pragma once

#include "coordinator/records.h"
#include "protocol/base/result.h"
#include "protocol/messages.h"

#include <string>
#include <vector>

namespace tandem::coordinator {

/// A base, or a base with an adapter (a published version, or a job's checkpoint).
struct Target {
  protocol::ModelRef model;
  Digest adapter;        ///< empty: the base itself
  std::string manifest;  ///< the adapter's canonical text
  std::string name;      ///< "base", "alias@version", "job-…@step-N"
  JobId job;             ///< asked as JOB@latest: its trainer has the tensors at hand
  Status unservable{};   ///< why no engine answers for it; ok: one does
};

/// `name`: model, alias, alias@version, JOB@latest, JOB@step-N, or 12 and more digits of a digest.
/// Errors: kNotFound with the nearest name, kInvalid (malformed, or digits that fit several).
Result<Target> resolve(const Tables& tables, const std::string& name);

/// A base model by name or digest digits, which may fit no other's digest; errors as resolve, and
/// kInvalid for an adapter's name.
Result<const ModelRecord*> find_model(const Tables& tables, const std::string& name);
/// A data set by name, digest or digest digits.
Result<const Dataset*> find_dataset(const Tables& tables, const std::string& name);
/// "name", "name@version" or digest digits.
Result<const AdapterVersionRecord*> find_adapter(const Tables& tables, const std::string& name);
Result<const Job*> find_job(const Tables& tables, const std::string& id);

/// As a worker needs it.
protocol::ModelRef model_ref(const ModelRecord& model);

/// Names of models and adapters: 1 to `bytes_max` letters, digits and "._-/:", not 12 or more hex
/// digits alone. `what` names the object in the message.
Status check_name(const std::string& what, const std::string& name, std::size_t bytes_max);
/// kConflict when a model (or, with `adapters_too`, an adapter or alias) has the name.
Status check_free(const Tables& tables, const std::string& name, bool adapters_too);
/// Also when a job that has not ended, other than `self`, will publish a model, or with `model`
/// anything, under the name.
Status check_unpromised(const Tables& tables, const std::string& name, bool model,
                        const JobId& self = {});

}  // namespace tandem::coordinator
