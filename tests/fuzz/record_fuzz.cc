// Registry records: the first byte picks the table, the rest is the stored value. Any bytes are
// refused as corrupt or decode to a record that is stored as it was read.
#include "protocol/base/check.h"
#include "protocol/codec/record_codec.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace {

using namespace tandem;
using namespace tandem::protocol;

template <class Record>
void check(std::span<const std::byte> bytes) {
  const auto record = decode_record<Record>(bytes);
  if (!record.ok()) {
    TANDEM_CHECK(record.status().code() == StatusCode::kCorrupt, record.status().to_string());
    return;
  }
  const std::string stored = encode_record(*record);
  const auto again = decode_record<Record>(std::as_bytes(std::span(stored)));
  TANDEM_CHECK(again.ok(), again.status().to_string());
  TANDEM_CHECK(encode_record(*again) == stored, "the record changed on its way");
}

constexpr std::array kChecks{
    check<ModelRecord>,    check<AdapterVersionRecord>, check<AliasRecord>,
    check<ManifestRecord>, check<CheckpointRecord>,     check<JobRecord>,
    check<JobEventRecord>, check<ResultRecord>,         check<DatasetRecord>,
    check<SettingRecord>,  check<IdempotencyRecord>};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  kChecks[data[0] % kChecks.size()](bytes.subspan(1));
  return 0;
}
