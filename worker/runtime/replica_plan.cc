#include "worker/runtime/replica_plan.h"

#include "worker/runtime/job_estimate.h"

#include <nlohmann/json.hpp>

namespace tandem::worker::runtime {

Result<comm::Layout> parse_replica(const std::string& json) {
  const auto object = nlohmann::json::parse(json, nullptr, false);
  comm::Layout layout;
  if (!object.is_object()) return invalid_error("a replica's layout is {\"tp\": N, \"pp\": N}");
  for (const auto& [name, value] : object.items()) {
    int* size = name == "tp" ? &layout.tp : name == "pp" ? &layout.pp : nullptr;
    if (size == nullptr || !value.is_number_integer() || value < 1 ||
        value > protocol::kGangMembersMax)
      return invalid_error(str("a replica's layout has tp and pp, 1 to ", protocol::kGangMembersMax,
                               ", not ", name, " ", value.dump()));
    *size = value.get<int>();
  }
  return layout;
}

Result<std::string> estimate_replica(const kernels::DeviceProfile& profile,
                                     const model::ModelConfig& config,
                                     const ModelHostOptions& options, const std::string& json) {
  TANDEM_ASSIGN_OR_RETURN(const comm::Layout layout, parse_replica(json));
  TANDEM_ASSIGN_OR_RETURN(
      const auto ranks,
      memory::estimate_replica(profile, config, options.dtype, serve_options(options),
                               options.adapter_slots, layout));
  return gang_reply(profile, config, options, layout, ranks);
}

ByteVector ReplicaPlan::encode() const {
  ByteWriter to;
  to.text(model_path);
  to.text(base.hex());
  to.number(layout.tp);
  to.number(layout.pp);
  to.number(adapter_bytes);
  return to.bytes();
}

ReplicaPlan ReplicaPlan::decode(std::span<const std::byte> bytes) {
  ByteReader from(bytes);
  ReplicaPlan plan;
  plan.model_path = from.text();
  const auto base = Digest::parse(from.text());
  TANDEM_CHECK(base.ok(), base.status().to_string());
  plan.base = *base;
  plan.layout.tp = static_cast<int>(from.number());
  plan.layout.pp = static_cast<int>(from.number());
  plan.adapter_bytes = from.number();
  return plan;
}

}  // namespace tandem::worker::runtime
