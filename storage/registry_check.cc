// `tandem registry check`: every value, key, digest and reference, none believed because another
// was right.
#include "storage/registry.h"

#include "storage/json_strict.h"

#include <map>
#include <set>

namespace tandem::storage {
namespace {

class Checker {
 public:
  Checker(RegistryTxn& txn, BlobStore& blobs) : txn_(txn), blobs_(blobs) {}

  Status run() {
    TANDEM_RETURN_IF_ERROR(manifests());
    TANDEM_RETURN_IF_ERROR(each<ModelRecord>([&](const ModelRecord& r) {
      refer(where(r), r.digest, ManifestKind::kModel);
      for (const ModelFile& file : r.files) {
        present(where(r), "file " + file.path, file.chunks);
        for (const Digest& chunk : file.chunks) holders_[chunk].insert(r.digest);
      }
    }));
    TANDEM_RETURN_IF_ERROR(each<AdapterVersionRecord>([&](const AdapterVersionRecord& r) {
      refer(where(r), r.digest, ManifestKind::kAdapter);
      refer(where(r), r.base_model, ManifestKind::kModel);
    }));
    TANDEM_RETURN_IF_ERROR(each<AliasRecord>([&](const AliasRecord& r) { alias(r); }));
    TANDEM_RETURN_IF_ERROR(each<CheckpointRecord>([&](const CheckpointRecord& r) {
      refer(where(r), r.manifest, ManifestKind::kCheckpoint);
      expect(txn_.find<JobRecord>(r.job), where(r), "the job " + r.job);
    }));
    TANDEM_RETURN_IF_ERROR(each<DatasetRecord>(
        [&](const DatasetRecord& r) { refer(where(r), r.digest, ManifestKind::kDataset); }));
    TANDEM_RETURN_IF_ERROR(each<JobRecord>([&](const JobRecord& r) { job(r); }));
    TANDEM_RETURN_IF_ERROR(each<JobEventRecord>([&](const JobEventRecord& r) {
      expect(txn_.find<JobRecord>(r.job), where(r), "the job " + r.job);
    }));
    TANDEM_RETURN_IF_ERROR(each<ResultRecord>([](const ResultRecord&) {}));
    TANDEM_RETURN_IF_ERROR(each<SettingRecord>([](const SettingRecord&) {}));
    return each<IdempotencyRecord>([](const IdempotencyRecord&) {});
  }

  /// "; needed by adapters guide@3": who cannot be had without this chunk, the first of them.
  [[nodiscard]] std::string needed_by(const std::string& chunk) const {
    const auto digest = Digest::parse(chunk);
    const auto holders = digest.ok() ? holders_.find(*digest) : holders_.end();
    std::set<std::string> names;
    if (holders != holders_.end())
      for (const Digest& manifest : holders->second)
        if (const auto known = names_.find(manifest); known != names_.end())
          names.insert(known->second.begin(), known->second.end());
    if (names.empty()) return "";  // nobody, or somebody who cannot be read
    constexpr std::size_t kNamesMax = 3;
    std::string text = "; needed by ";
    std::size_t shown = 0;
    for (auto name = names.begin(); name != names.end() && shown < kNamesMax; ++name, ++shown)
      text += (shown == 0 ? "" : ", ") + *name;
    return names.size() > shown ? str(text, " and ", names.size() - shown, " more") : text;
  }

  std::vector<Finding> findings;

 private:
  template <class Record>
  static std::string where(const Record& record) {
    return str(RecordTraits<Record>::kTable, " ", printable_key(RecordTraits<Record>::key(record)));
  }
  void report(const std::string& at, const std::string& message) {
    findings.push_back({at, message});
  }

  /// Goes on after a bad record: one finding must not hide the next.
  template <class Record, class Visit>
  Status each(const Visit& visit) {
    const auto cursor = txn_.raw().cursor(RecordTraits<Record>::kTable);
    for (cursor->seek(""); cursor->valid(); cursor->next()) {
      const std::string at = str(RecordTraits<Record>::kTable, " ", printable_key(cursor->key()));
      const auto value = cursor->value();
      if (!value.ok()) {
        report(at, value.status().message());
        continue;
      }
      const auto record = decode_at<Record>(cursor->key(), *value);
      if (record.ok())
        visit(*record);
      else
        report(at, record.status().message());
    }
    return cursor->status();
  }

  template <class Record>
  void expect(const Result<std::optional<Record>>& found, const std::string& at,
              const std::string& what) {
    if (!found.ok())
      report(at, what + ": " + found.status().message());
    else if (!found->has_value())
      report(at, what + " is absent");
  }

  void refer(const std::string& at, const Digest& digest, ManifestKind kind) {
    names_[digest].insert(at);
    const auto found = kinds_.find(digest);
    if (found == kinds_.end())
      report(at, str("the ", manifest_kind_name(kind), " manifest ", digest, " is absent"));
    else if (found->second != kind)
      report(at, str("the manifest ", digest, " is of kind ", manifest_kind_name(found->second)));
  }

  Status manifests() {
    return each<ManifestRecord>([&](const ManifestRecord& r) {
      kinds_[r.digest] = r.kind;
      if (manifest_digest(r.text) != r.digest)
        return report(where(r), "the text does not match the digest");
      const auto manifest = parse_manifest(r.text);
      if (!manifest.ok()) return report(where(r), manifest.status().message());
      if (manifest->kind != r.kind) report(where(r), "the kind differs from the text's");
      if (r.kind != ManifestKind::kModel) chunks(where(r), r.digest, *manifest);
    });
  }

  void chunks(const std::string& at, const Digest& digest, const Manifest& manifest) {
    for (const ManifestTensor& tensor : manifest.tensors) {
      present(at, "tensor " + tensor.name, tensor.chunks);
      for (const Digest& chunk : tensor.chunks) holders_[chunk].insert(digest);
    }
  }

  void present(const std::string& at, const std::string& what, const std::vector<Digest>& chunks) {
    const auto absent = blobs_.missing(chunks);
    if (!absent.ok())
      report(at, str(what, ": ", absent.status().message()));
    else if (!absent->empty())
      report(at, str(what, ": the chunk ", absent->front(), " is absent"));
  }

  void alias(const AliasRecord& r) {
    const auto version = txn_.find<AdapterVersionRecord>(adapter_key(r.adapter, r.version));
    expect(version, where(r), str(r.adapter, "@", r.version));
    if (version.ok() && version->has_value() && (*version)->digest != r.digest)
      report(where(r), str("points at ", r.digest, " but ", r.adapter, "@", r.version, " is ",
                           (*version)->digest));
    const auto model = txn_.find<ModelRecord>(r.name);
    if (model.ok() && model->has_value()) report(where(r), "a model has the same name");
  }

  void job(const JobRecord& r) {
    if (job_has_ended(r.state)) return;  // what an ended job used may be gone
    if (!r.model.empty()) refer(where(r), r.model, ManifestKind::kModel);
    if (!r.spec_json.empty())
      if (const auto spec = parse_json_strict(r.spec_json, "its spec"); !spec.ok())
        report(where(r), spec.status().message());
  }

  RegistryTxn& txn_;
  BlobStore& blobs_;
  std::map<Digest, ManifestKind> kinds_;
  std::map<Digest, std::set<Digest>> holders_;     // chunk -> manifests that name it
  std::map<Digest, std::set<std::string>> names_;  // manifest -> records that name it
};

}  // namespace

Result<std::vector<Finding>> Registry::check(bool deep) {
  TANDEM_ASSIGN_OR_RETURN(auto txn, begin_read());
  Checker checker(txn, *blobs_);
  TANDEM_RETURN_IF_ERROR(checker.run());
  if (deep)
    TANDEM_RETURN_IF_ERROR(blobs_->check([&](const std::string& name, const std::string& message) {
      checker.findings.push_back({"blobs " + name, message + checker.needed_by(name)});
    }));
  return std::move(checker.findings);
}

}  // namespace tandem::storage
