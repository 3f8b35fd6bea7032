#include "worker/runtime/gang_state.h"

#include "worker/model/peft.h"
#include "worker/train/state_pieces.h"

#include <cmath>
#include <limits>

namespace tandem::worker::runtime {
namespace {

constexpr const char* kHalves[] = {".lora_A.param", ".lora_B.param"};

model::AdapterLayout layout_of(const model::ModelConfig& config, const model::LoraConfig& lora) {
  model::AdapterLayout layout;
  for (std::int64_t layer = 0; layer < config.layers; ++layer)
    for (const model::Site site : lora.target_modules)
      layout.add(config, layer, site, lora.r, lora.scale());
  return layout;
}

/// Where a half of a pair lies, and its width; nothing for what is no adapter's value.
struct Place {
  std::int64_t begin = 0, width = 0;
};
std::optional<Place> place_of(const model::AdapterLayout& layout, const std::string& name) {
  for (int half = 0; half < 2; ++half) {
    if (!name.ends_with(kHalves[half])) continue;
    const auto site = model::parse_site_path(
        std::string_view(name).substr(0, name.size() - std::strlen(kHalves[half])));
    for (const auto& pair : layout.pairs)
      if (site && pair.layer == site->first && pair.site == site->second)
        return half == 0 ? Place{pair.a_begin, pair.i} : Place{pair.b_begin, pair.rank};
  }
  return std::nullopt;
}

void encode_dataset(const data::Dataset& dataset, ByteWriter& to) {
  to.number(static_cast<std::int64_t>(dataset.examples.size()));
  for (const auto& example : dataset.examples) {
    to.numbers(example.tokens);
    to.numbers(example.labels);
    to.number(example.line);
  }
}

std::shared_ptr<const data::Dataset> decode_dataset(ByteReader& from) {
  auto dataset = std::make_shared<data::Dataset>();
  const std::int64_t count = from.number();
  for (std::int64_t i = 0; i < count; ++i) {
    data::Example example;
    example.tokens = from.numbers<std::int32_t>();
    example.labels = from.numbers<std::int32_t>();
    example.line = from.number();
    dataset->examples.push_back(std::move(example));
  }
  return dataset;
}

float value_at(const model::FlatAdapter& adapter, std::int64_t at) {
  float value = 0.0f;
  load_floats(adapter.bytes.data() + at * dtype_bytes(adapter.dtype), adapter.dtype, {&value, 1});
  return value;
}

}  // namespace

void encode_state(const train::TrainState& state, ByteWriter& to) {
  to.text(state.json);
  to.number(static_cast<std::int64_t>(state.tensors.size()));
  for (const auto& t : state.tensors) {
    to.text(t.name);
    to.numbers(t.shape);
    to.numbers(t.values);
    for (const std::int64_t n :
         {t.slice.row, t.slice.rows, t.slice.column, t.slice.columns, t.first})
      to.number(n);
  }
}

train::TrainState decode_state(ByteReader& from) {
  train::TrainState state;
  state.json = from.text();
  const std::int64_t count = from.number();
  for (std::int64_t i = 0; i < count; ++i) {
    train::StateTensor t;
    t.name = from.text();
    t.shape = from.numbers<std::int64_t>();
    t.values = from.numbers<float>();
    for (std::int64_t* n :
         {&t.slice.row, &t.slice.rows, &t.slice.column, &t.slice.columns, &t.first})
      *n = from.number();
    state.tensors.push_back(std::move(t));
  }
  return state;
}

ByteVector GangPlan::encode() const {
  ByteWriter to;
  to.text(model_path);
  to.text(settings.to_json());
  encode_dataset(*train, to);
  to.number(eval ? 1 : 0);
  if (eval) encode_dataset(*eval, to);
  to.text(base_model.hex());
  to.text(checkpoint);
  return to.bytes();
}

GangPlan GangPlan::decode(std::span<const std::byte> bytes) {
  ByteReader from(bytes);
  GangPlan plan;
  plan.model_path = from.text();
  auto settings = protocol::TrainSettings::parse(from.text());
  TANDEM_CHECK(settings.ok(), "the first rank parsed them: ", settings.status().to_string());
  plan.settings = std::move(*settings);
  plan.train = decode_dataset(from);
  if (from.number() != 0) plan.eval = decode_dataset(from);
  auto base = Digest::parse(from.text());
  TANDEM_CHECK(base.ok(), "the first rank wrote it");
  plan.base_model = *base;
  plan.checkpoint = from.text();
  return plan;
}

ByteVector ModelPlace::encode() const {
  ByteWriter to;
  to.text(folder);
  to.number(static_cast<std::int64_t>(dtype));
  to.numbers(prompt);
  return to.bytes();
}

ModelPlace ModelPlace::decode(std::span<const std::byte> bytes) {
  ByteReader from(bytes);
  ModelPlace place;
  place.folder = from.text();
  place.dtype = static_cast<DType>(from.number());
  place.prompt = from.numbers<std::int32_t>();
  return place;
}

Result<model::FlatAdapter> adapter_of_state(const model::ModelConfig& config,
                                            const model::LoraConfig& lora,
                                            const train::TrainState& state, DType dtype) {
  model::FlatAdapter adapter{layout_of(config, lora), DType::kF32, {}};
  adapter.bytes.resize(static_cast<std::size_t>(adapter.layout.elements) * sizeof(float));
  auto* values = reinterpret_cast<float*>(adapter.bytes.data());
  std::size_t found = 0;
  for (const auto& tensor : state.tensors) {
    const auto place = place_of(adapter.layout, tensor.name);
    if (!place) continue;
    std::copy(tensor.values.begin(), tensor.values.end(), values + place->begin);
    ++found;
  }
  if (found != 2 * adapter.layout.pairs.size())
    return corrupt_error(str("the gang's state has ", found, " adapter tensors of ",
                             2 * adapter.layout.pairs.size()));
  return dtype == DType::kF32 ? std::move(adapter) : adapter.in(dtype);
}

ByteVector encode_adapter(const model::FlatAdapter& adapter) {
  ByteWriter to;
  to.number(static_cast<std::int64_t>(adapter.dtype));
  to.numbers(adapter.bytes);
  return to.bytes();
}

model::FlatAdapter decode_adapter(const model::ModelConfig& config, const model::LoraConfig& lora,
                                  std::span<const std::byte> bytes) {
  ByteReader from(bytes);
  const auto dtype = static_cast<DType>(from.number());
  return {layout_of(config, lora), dtype, from.numbers<std::byte>()};
}

double largest_difference(const train::TrainState& pieces, const model::FlatAdapter& published) {
  double worst = 0.0;
  for (const auto& piece : pieces.tensors) {
    if (!piece.name.ends_with(".param")) continue;
    const auto place = place_of(published.layout, piece.name);
    if (!place) return std::numeric_limits<double>::infinity();
    model::TensorSlice slice = piece.slice;
    if (slice.rows == 0) slice = {0, piece.shape.at(0), 0, place->width};
    for (std::size_t e = 0; e < piece.values.size(); ++e) {
      const std::int64_t at = piece.first + static_cast<std::int64_t>(e);
      const std::int64_t whole =
          (slice.row + at / slice.columns) * place->width + slice.column + at % slice.columns;
      const float mine = rounded(piece.values[e], published.dtype);
      const double difference =
          std::fabs(static_cast<double>(mine) - value_at(published, place->begin + whole));
      if (!(difference <= worst)) worst = difference;  // NaN too
    }
  }
  return worst;
}

}  // namespace tandem::worker::runtime
