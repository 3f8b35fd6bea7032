// Reads JSON strings, one per line, and writes what the tokenizer makes of each: the other half of
// tests/golden/tokenizer_oracle.py.
//
//   tokenizer_dump --gguf MODEL.gguf < lines     tokenizer_dump --json tokenizer.json < lines
#include "storage/gguf.h"
#include "worker/text/tokenizer.h"

#include <nlohmann/json.hpp>

#include <fstream>
#include <iostream>
#include <iterator>

namespace tandem::worker::text {
namespace {

Result<Tokenizer> load(const std::string& kind, const std::string& path) {
  if (kind == "--gguf") {
    TANDEM_ASSIGN_OR_RETURN(const storage::Gguf file, storage::Gguf::open(path));
    TANDEM_ASSIGN_OR_RETURN(const storage::GgufTokenizer data, file.tokenizer());
    return Tokenizer::from_gguf(data);
  }
  std::ifstream in(path, std::ios::binary);
  if (!in) return not_found_error(str("no file ", path));
  return Tokenizer::from_json(std::string(std::istreambuf_iterator<char>(in), {}));
}

nlohmann::json dump(const Tokenizer& tokenizer, const std::string& text) {
  const auto plain = tokenizer.encode(text, {.add_special_tokens = false});
  const auto special = tokenizer.encode(text, {.add_special_tokens = true});
  if (!plain.ok() || !special.ok()) return {{"error", plain.status().to_string()}};
  return {{"ids", *plain},
          {"special_ids", *special},
          {"text", tokenizer.decode(*plain, false)},
          {"shown", tokenizer.decode(*special, true)}};
}

int run(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: tokenizer_dump --gguf|--json FILE < lines of JSON strings\n";
    return 2;
  }
  const auto tokenizer = load(argv[1], argv[2]);
  if (!tokenizer.ok()) {
    std::cerr << tokenizer.status().to_string() << "\n";
    return 1;
  }
  for (std::string line; std::getline(std::cin, line);)
    std::cout << dump(*tokenizer, nlohmann::json::parse(line).get<std::string>()).dump() << "\n";
  return 0;
}

}  // namespace
}  // namespace tandem::worker::text

int main(int argc, char** argv) {
  return tandem::worker::text::run(argc, argv);
}
