// GGUF: any bytes are refused, or every tensor lies inside them and dequantizes; metadata and the
// tokenizer can be asked for everything.
#include "protocol/base/check.h"
#include "storage/gguf.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace tandem;
  using namespace tandem::storage;
  std::vector<std::byte> bytes(size);
  if (size != 0) std::memcpy(bytes.data(), data, size);
  const auto file = Gguf::parse(MappedFile::of_bytes(std::move(bytes), "fuzz"));
  if (!file.ok()) return 0;
  for (const GgufTensor& tensor : file->tensors()) {
    std::vector<float> values(static_cast<std::size_t>(tensor.numel()));
    const Status status = dequantize(tensor.type, tensor.bytes, std::span<float>(values));
    TANDEM_CHECK(status.ok(), status.to_string());
    (void)gguf_to_hf_name(tensor.name);
  }
  for (const std::string& key : file->keys()) {
    (void)file->integer(key);
    (void)file->number(key);
    (void)file->text(key);
    (void)file->integers(key);
    (void)file->numbers(key);
    (void)file->texts(key);
  }
  (void)file->tokenizer();
  return 0;
}
