#include "worker/memory/cost_model.h"

#include "protocol/base/json_nesting.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <fstream>
#include <sstream>
#include <utility>

namespace tandem::worker::memory {

namespace {

using Json = nlohmann::ordered_json;
using Kind = comm::CommCall::Kind;

template <class Model>
auto fields(Model& model) {
  return std::array{
      std::pair("product_flops_bf16", &model.product_flops_bf16),
      std::pair("product_flops_f32", &model.product_flops_f32),
      std::pair("attention_flops", &model.attention_flops),
      std::pair("memory_bytes_per_second", &model.memory_bytes_per_second),
      std::pair("op_seconds", &model.op_seconds),
      std::pair("all_reduce_hop_seconds", &model.all_reduce.hop_seconds),
      std::pair("all_reduce_bytes_per_second", &model.all_reduce.bytes_per_second),
      std::pair("all_gather_hop_seconds", &model.all_gather.hop_seconds),
      std::pair("all_gather_bytes_per_second", &model.all_gather.bytes_per_second),
      std::pair("reduce_scatter_hop_seconds", &model.reduce_scatter.hop_seconds),
      std::pair("reduce_scatter_bytes_per_second", &model.reduce_scatter.bytes_per_second),
      std::pair("exchange_hop_seconds", &model.exchange.hop_seconds),
      std::pair("exchange_bytes_per_second", &model.exchange.bytes_per_second),
      std::pair("gather_slowdown", &model.gather_slowdown),
  };
}

double transfer(const LinkCost& link, double hops, double bytes) {
  return hops * link.hop_seconds + bytes / link.bytes_per_second;
}

}  // namespace

double CostModel::seconds(const kernels::OpCost& cost, DType dtype) const {
  const double products = is_16_bit(dtype) ? product_flops_bf16 : product_flops_f32;
  return op_seconds +
         std::max(cost.product_flops / products + cost.attention_flops / attention_flops,
                  cost.bytes / memory_bytes_per_second);
}

double CostModel::seconds(const comm::CommCall& call) const {
  const auto others = static_cast<double>(call.members.size()) - 1.0;
  const auto bytes = static_cast<double>(call.bytes);
  const double share = bytes * others / (others + 1.0);  // what a ring moves through each link
  switch (call.kind) {
    case Kind::kAllReduce:
      return transfer(all_reduce, 2.0 * others, 2.0 * share);
    case Kind::kReduceScatter:
    case Kind::kStartReduceScatter:
      return transfer(reduce_scatter, others, share);
    case Kind::kAllGather:
    case Kind::kStartGather:
      return transfer(all_gather, others, share);
    case Kind::kBroadcast:
      return transfer(all_gather, others, bytes);
    case Kind::kExchange:  // message by message
    case Kind::kWait:
      return 0.0;
  }
  return 0.0;
}

double CostModel::message_seconds(std::int64_t bytes) const {
  return transfer(exchange, 1.0, static_cast<double>(bytes));
}

std::string CostModel::to_json() const {
  Json json;
  for (const auto& [name, value] : fields(*this)) json[name] = *value;
  return json.dump(2);
}

Result<CostModel> CostModel::parse(const std::string& json, const std::string& where) {
  if (json_nests_too_deep(json)) return invalid_error(str(where, " nests too deep"));
  const Json object = Json::parse(json, nullptr, false);
  if (!object.is_object()) return invalid_error(str(where, " is not a JSON object"));
  CostModel model;
  for (const auto& [name, value] : fields(model)) {
    const auto it = object.find(name);
    if (it == object.end() || !it->is_number())
      return invalid_error(str(where, ": the number ", name, " is missing"));
    *value = it->get<double>();
    const bool time = std::string_view(name).ends_with("seconds") &&
                      !std::string_view(name).ends_with("per_second");
    if (!(time ? *value >= 0.0 : *value > 0.0))
      return invalid_error(str(where, ": ", name, " is ", *value, "; it must be positive"));
  }
  return model;
}

CostModel default_cost_model(const kernels::DeviceProfile& profile) {
  CostModel model;
  if (profile.type == kernels::DeviceType::kCuda) {
    // H100 SXM on NVLink, fitted to LoRA steps of an 8B base on one and two of them. On four H200:
    // dp4 and zero3 of LoRA are predicted 5 and 4 % too fast, tp4 of a 70B base 1 % too slow; full
    // fine-tuning of 8B too slow throughout (zero3 7 %, pp4 6 to 11 %, tp4 14 %).
    model.product_flops_bf16 = 640e12;
    model.product_flops_f32 = 50e12;
    model.attention_flops = 420e12;
    model.memory_bytes_per_second = 2.6e12;
    model.op_seconds = 5e-6;
    model.all_reduce = {20e-6, 150e9};
    model.all_gather = {20e-6, 300e9};
    model.reduce_scatter = {20e-6, 250e9};
    model.exchange = {20e-6, 100e9};
    model.gather_slowdown = 1.05;
    return model;
  }
  // A Xeon's thread, two ranks of one host that talk through shared memory; bf16 with AMX at half
  // of what large products reach.
  const double threads = std::max(1, profile.threads);
  model.product_flops_f32 = (profile.has_avx512 ? 80e9 : 40e9) * threads;
  model.product_flops_bf16 = profile.has_amx_bf16 ? 600e9 * threads : model.product_flops_f32;
  model.attention_flops = (profile.has_amx_bf16 ? 150e9 : 40e9) * threads;
  model.memory_bytes_per_second = 8e9 * threads;
  model.op_seconds = 1e-6;
  model.all_reduce = {4e-6, 5.5e9};
  model.all_gather = {4e-6, 5.3e9};
  model.reduce_scatter = {4e-6, 3.9e9};
  model.exchange = {4e-6, 11e9};
  return model;
}

Result<CostModel> read_cost_model(const std::string& path) {
  std::ifstream file(path);
  if (!file) return not_found_error(str("no cost model ", path));
  std::ostringstream text;
  text << file.rdbuf();
  return CostModel::parse(text.str(), path);
}

}  // namespace tandem::worker::memory
