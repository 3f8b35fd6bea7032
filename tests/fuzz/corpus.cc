// Writes the seed corpora: `fuzz_corpus FOLDER` makes FOLDER/<target>/<seed>, real messages of
// every type, so that the fuzzers begin behind the first checks.
#include "protocol/codec.h"
#include "protocol/codec/record_codec.h"
#include "protocol/job_spec.h"
#include "tests/protocol/random_messages.h"

#include <filesystem>
#include <fstream>
#include <iostream>
#include <span>
#include <string>

namespace {

using namespace tandem;
using namespace tandem::protocol;

class Corpus {
 public:
  explicit Corpus(std::filesystem::path folder) : folder_(std::move(folder)) {}
  void add(const std::string& target, std::span<const std::byte> bytes) {
    const auto where = folder_ / target;
    std::filesystem::create_directories(where);
    std::ofstream file(where / std::to_string(count_++), std::ios::binary);
    file.write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
  }
  void add(const std::string& target, const std::string& text) {
    add(target, std::as_bytes(std::span(text)));
  }

 private:
  std::filesystem::path folder_;
  int count_ = 0;
};

void add_messages(Corpus& corpus) {
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    const auto each = [&](std::size_t kinds, const char* target, auto make) {
      for (std::size_t kind = 0; kind < kinds; ++kind) {
        Random random(seed, kind);
        const Bytes bytes = encode(make(kind, random));
        corpus.add(target, bytes);
        if (kind == 0) corpus.add("hello", bytes);
      }
    };
    each(kClientKinds, "client", random_client_message);
    each(kServerKinds, "server", random_server_message);
    each(kWorkerKinds, "worker", random_worker_message);
    each(kControlKinds, "control", random_control_message);
    each(kBulkKinds, "bulk", random_bulk_request);
    each(1, "blob_reply", [](std::size_t, Random& random) { return random_blob_reply(random); });
  }
  for (const std::uint16_t minor :
       {std::uint16_t{0}, std::uint16_t{1}, std::uint16_t{2}, std::uint16_t{3}})
    corpus.add("hello", encode(ClientMessage(ClientHello{{1, minor}, "seed"})));
}

template <class Record>
void add_record(Corpus& corpus, char table, const Record& record) {
  corpus.add("record", std::string(1, table) + encode_record(record));
}

void add_records(Corpus& corpus) {
  Digest digest;
  digest.bytes.fill(7);
  ModelRecord model;
  model.name = "m";
  model.digest = digest;
  model.files.resize(2);
  add_record(corpus, 0, model);
  AdapterVersionRecord version;
  version.name = "a";
  version.version = 1;
  version.digest = digest;
  add_record(corpus, 1, version);
  AliasRecord alias;
  alias.name = "a";
  alias.history.resize(2);
  add_record(corpus, 2, alias);
  ManifestRecord manifest;
  manifest.text = "tandem-manifest";
  add_record(corpus, 3, manifest);
  add_record(corpus, 4, CheckpointRecord{});
  add_record(corpus, 5, JobRecord{});
  add_record(corpus, 6, JobEventRecord{});
  add_record(corpus, 7, ResultRecord{});
  add_record(corpus, 8, DatasetRecord{});
  add_record(corpus, 9, SettingRecord{});
  add_record(corpus, 10, IdempotencyRecord{});
}

/// The smallest files that are read whole.
void add_files(Corpus& corpus) {
  const std::string header = R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})";
  corpus.add("safetensors", std::string(1, static_cast<char>(header.size())) +
                                std::string(7, '\0') + header + "data");
  std::string gguf = "GGUF" + std::string(20, '\0');
  gguf[4] = 3;  // version; no metadata, no tensors
  corpus.add("gguf", gguf);
  corpus.add("manifest",
             std::string(R"({"format":1,"kind":"adapter","settings":{"r":1},"tensors":[]})"));
  corpus.add("manifest", std::string(R"({"peft_type":"LORA","r":8,"target_modules":["q_proj"]})"));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: fuzz_corpus FOLDER\n";
    return 2;
  }
  Corpus corpus(argv[1]);
  add_messages(corpus);
  add_records(corpus);
  add_files(corpus);
  JobSpec spec;
  spec.model = "m";
  spec.dataset = "d";
  spec.adapter = "a";
  corpus.add("job_spec", spec.to_json());
  corpus.add("job_spec",
             std::string(R"({"model":"m","dataset":"d","adapter":"a","train":{"lora_r":8}})"));
  for (const char* text : {"ipc:///run/tandem/client", "tcp://127.0.0.1:5555", "retry after 40 ms",
                           "caf\xc3\xa9 \xe6\xbc\xa2 \xf0\x9f\x98\x80"})
    corpus.add("text", std::string(text));
  return 0;
}
