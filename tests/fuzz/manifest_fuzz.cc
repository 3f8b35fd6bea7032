// Manifests and PEFT configurations: any text is refused or read; a manifest that is read is
// written as the same text, because the text is the identity, and names the chunks that a scan of
// it finds.
#include "protocol/base/check.h"
#include "storage/manifest.h"
#include "storage/peft.h"

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace tandem;
  using namespace tandem::storage;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  (void)parse_peft_config(text, "fuzz");
  const auto manifest = parse_manifest(text);
  if (!manifest.ok()) return 0;
  const auto again = encode_manifest(*manifest);
  TANDEM_CHECK(again.ok(), again.status().to_string());
  TANDEM_CHECK(*again == text, "a manifest changed on its way");
  // Garbage collection goes by these: one that is missed would be lost.
  std::vector<Digest> chunks;
  for (const ManifestTensor& tensor : manifest->tensors)
    chunks.insert(chunks.end(), tensor.chunks.begin(), tensor.chunks.end());
  const auto named = manifest_chunks(text);
  TANDEM_CHECK(named.ok(), named.status().to_string());
  TANDEM_CHECK(*named == chunks, "chunks that were read otherwise");
  return 0;
}
