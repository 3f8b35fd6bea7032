// What `tandem status` knows as Prometheus' text exposition format, version 0.0.4
// (https://prometheus.io/docs/instrumenting/exposition_formats): metrics are named tandem_*, in
// seconds, bytes and tokens; counters, whose names end in _total, begin again with the coordinator
// or the engine that counts.
#pragma once

#include <nlohmann/json.hpp>

#include <string>

namespace tandem::tools {

/// `status` is the answer of the coordinator's call "status", `jobs` the list of "job.list". What
/// they lack is left out.
std::string prometheus_text(const nlohmann::json& status, const nlohmann::json& jobs);

}  // namespace tandem::tools
