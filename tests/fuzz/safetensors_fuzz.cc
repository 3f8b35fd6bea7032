// safetensors: any bytes are refused, or every tensor lies inside them and has its shape's size;
// and a file that is read is written again with the same tensors.
#include "protocol/base/check.h"
#include "storage/safetensors.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace tandem;
  using namespace tandem::storage;
  std::vector<std::byte> bytes(size);
  if (size != 0) std::memcpy(bytes.data(), data, size);
  const auto file = Safetensors::parse(MappedFile::of_bytes(std::move(bytes), "fuzz"));
  if (!file.ok()) return 0;
  for (const TensorInfo& tensor : file->tensors()) {
    TANDEM_CHECK_EQ(tensor.numel() * dtype_bytes(tensor.dtype),
                    static_cast<std::int64_t>(tensor.bytes.size()));
    const std::vector<std::byte> copy(tensor.bytes.begin(), tensor.bytes.end());
  }
  const auto again = encode_safetensors(file->tensors(), file->metadata());
  if (!again.ok()) return 0;  // an empty name: readable, but never written by us
  const auto second = Safetensors::parse(MappedFile::of_bytes(*again, "again"));
  TANDEM_CHECK(second.ok(), second.status().to_string());
  TANDEM_CHECK_EQ(second->tensors().size(), file->tensors().size());
  return 0;
}
