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
      std::pair("weight_grad_share", &model.weight_grad_share),
      std::pair("low_rank_share", &model.low_rank_share),
      std::pair("low_rank_seconds", &model.low_rank_seconds),
      std::pair("attention_flops", &model.attention_flops),
      std::pair("logits_per_second", &model.logits_per_second),
      std::pair("row_bytes_per_second", &model.row_bytes_per_second),
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
      std::pair("sum_16_bit_slowdown", &model.sum_16_bit_slowdown),
      std::pair("background_gather_hop_seconds", &model.background_gather.hop_seconds),
      std::pair("background_gather_bytes_per_second", &model.background_gather.bytes_per_second),
      std::pair("background_reduce_hop_seconds", &model.background_reduce.hop_seconds),
      std::pair("background_reduce_bytes_per_second", &model.background_reduce.bytes_per_second),
      std::pair("background_slowdown", &model.background_slowdown),
  };
}

double transfer(const LinkCost& link, double hops, double bytes) {
  return hops * link.hop_seconds + bytes / link.bytes_per_second;
}

}  // namespace

double CostModel::seconds(const kernels::OpCost& cost, DType dtype) const {
  const double products = is_16_bit(dtype) ? product_flops_bf16 : product_flops_f32;
  return op_seconds + cost.low_rank_products * low_rank_seconds +
         (cost.product_flops + cost.weight_grad_flops / weight_grad_share +
          cost.low_rank_flops / low_rank_share) /
             products +
         cost.attention_flops / attention_flops + cost.logits / logits_per_second +
         cost.bytes / memory_bytes_per_second + cost.row_bytes / row_bytes_per_second;
}

double CostModel::seconds(const comm::CommCall& call) const {
  const auto others = static_cast<double>(call.members.size()) - 1.0;
  const auto bytes = static_cast<double>(call.bytes);
  const double share = bytes * others / (others + 1.0);  // what a ring moves through each link
  const double summed = share * (is_16_bit(call.dtype) ? sum_16_bit_slowdown : 1.0);
  switch (call.kind) {
    case Kind::kAllReduce:
      return transfer(all_reduce, 2.0 * others, 2.0 * summed);
    case Kind::kReduceScatter:
      return transfer(reduce_scatter, others, summed);
    case Kind::kStartReduceScatter:
      return transfer(background_reduce, others, summed);
    case Kind::kAllGather:
      return transfer(all_gather, others, share);
    case Kind::kStartGather:
      return transfer(background_gather, others, share);
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
    // H200 SXM, two on NVLink: what bench_layout measures of an 8B base's ops.
    model.product_flops_bf16 = 850e12;
    model.product_flops_f32 = 50e12;
    model.weight_grad_share = 1.0;
    model.low_rank_share = 0.05;
    model.low_rank_seconds = 5e-6;
    model.attention_flops = 450e12;
    model.logits_per_second = 1e13;
    model.row_bytes_per_second = 4.3e12;
    model.memory_bytes_per_second = 3.6e12;
    model.op_seconds = 3.5e-6;
    model.all_reduce = {2e-6, 265e9};
    model.all_gather = {40e-6, 290e9};
    model.reduce_scatter = {40e-6, 280e9};
    model.exchange = {43e-6, 320e9};
    model.background_gather = {23e-6, 315e9};
    model.background_reduce = {25e-6, 275e9};
    model.background_slowdown = 1.25;
    return model;
  }
  // A Xeon's thread, two ranks of one host that talk through shared memory; bf16 with AMX at half
  // of what large products reach.
  const double threads = std::max(1, profile.threads);
  model.product_flops_f32 = (profile.has_avx512 ? 80e9 : 40e9) * threads;
  model.product_flops_bf16 = profile.has_amx_bf16 ? 600e9 * threads : model.product_flops_f32;
  model.weight_grad_share = profile.has_amx_bf16 ? 0.5 : 0.9;
  model.low_rank_share = profile.has_amx_bf16 ? 0.4 : 0.9;
  model.low_rank_seconds = 15e-6;
  model.attention_flops = (profile.has_amx_bf16 ? 150e9 : 40e9) * threads;
  model.logits_per_second = 0.5e9 * threads;
  model.row_bytes_per_second = 6e9 * threads;
  model.memory_bytes_per_second = 20e9 * threads;
  model.op_seconds = 1e-6;
  model.all_reduce = {4e-6, 3.2e9};
  model.all_gather = {4e-6, 3e9};
  model.reduce_scatter = {4e-6, 2.5e9};
  model.exchange = {4e-6, 4.5e9};
  model.sum_16_bit_slowdown = 2.0;
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
