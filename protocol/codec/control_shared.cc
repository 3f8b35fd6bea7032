// Pieces of a gang's start that both directions of the worker's socket carry.
#include "protocol/codec/control_shared.h"

namespace tandem::protocol::codec {

void put(wire::ModelRef::Builder b, const ModelRef& m) {
  b.setDigest(data(m.digest));
  b.setName(text(m.name));
  b.setPath(text(m.path));
  b.setShared(m.shared);
  auto files = b.initFiles(count(m.files));
  for (unsigned i = 0; i < count(m.files); ++i) {
    files[i].setPath(text(m.files[i].first));
    files[i].setDigest(data(m.files[i].second));
  }
}
ModelRef get(wire::ModelRef::Reader r) {
  ModelRef m;
  m.digest = get_digest(r.getDigest(), "model.digest");
  m.name = get_text(r.getName(), "model.name", kNameBytesMax);
  m.path = get_text(r.getPath(), "model.path", kPathBytesMax);
  m.shared = r.getShared();
  m.files = get_structs<std::pair<std::string, Digest>>(r.getFiles(), "model.files", [](auto item) {
    return std::pair(get_text(item.getPath(), "model.files.path", kPathBytesMax),
                     get_digest(item.getDigest(), "model.files.digest"));
  });
  return m;
}

void put(wire::StartJob::Builder b, const StartJob& m) {
  put_job_epoch(b, m);
  b.setSpecJson(text(m.spec_json));
  put(b.initModel(), m.model);
  b.setDataset(data(m.dataset));
  b.setEvalDataset(data(m.eval_dataset));
  b.setDatasetBytes(m.dataset_bytes);
  b.setEvalDatasetBytes(m.eval_dataset_bytes);
  b.setCheckpointManifest(text(m.checkpoint_manifest));
  b.setGang(m.gang);
  put_ids(b.initMembers(count(m.members)), m.members);
  b.setServeJson(text(m.serve_json));
  b.setAdapterBytes(m.adapter_bytes);
}
StartJob get(wire::StartJob::Reader r) {
  StartJob m;
  get_job_epoch(r, m, "start_job.job");
  m.spec_json = get_text(r.getSpecJson(), "start_job.spec_json");
  m.model = get(r.getModel());
  m.dataset = get_digest(r.getDataset(), "start_job.dataset");
  m.eval_dataset = get_digest(r.getEvalDataset(), "start_job.eval_dataset");
  m.dataset_bytes = get_count(r.getDatasetBytes(), "start_job.dataset_bytes");
  m.eval_dataset_bytes = get_count(r.getEvalDatasetBytes(), "start_job.eval_dataset_bytes");
  m.checkpoint_manifest =
      get_text(r.getCheckpointManifest(), "start_job.checkpoint_manifest", kManifestBytesMax);
  m.gang = r.getGang();
  check_list(r.getMembers().size(), "start_job.members", kGangMembersMax);
  m.members = get_ids<WorkerId>(r.getMembers(), "start_job.members");
  m.serve_json = get_text(r.getServeJson(), "start_job.serve_json");
  m.adapter_bytes = std::max<std::int64_t>(r.getAdapterBytes(), -1);
  return m;
}

void put(wire::LaunchDaemon::Builder b, const LaunchDaemon& m) {
  b.setWorker(text(m.worker.value));
  put(b.initStart(), m.start);
  auto arguments = b.initArguments(count(m.arguments));
  for (unsigned i = 0; i < count(m.arguments); ++i) arguments.set(i, text(m.arguments[i]));
}
LaunchDaemon get(wire::LaunchDaemon::Reader r) {
  LaunchDaemon m;
  m.worker = get_id<WorkerId>(r.getWorker(), "launch.worker");
  m.start = get(r.getStart());
  check_list(r.getArguments().size(), "launch.arguments", kDaemonArgumentsMax);
  m.arguments = get_structs<std::string>(r.getArguments(), "launch.arguments", [](auto item) {
    return get_text(item, "launch.arguments", kDaemonArgumentBytesMax);
  });
  return m;
}

void put(wire::DaemonLaunched::Builder b, const DaemonLaunched& m) {
  put_job_epoch(b, m);
  b.setWorker(text(m.worker.value));
  put(b.initStatus(), m.status);
}
DaemonLaunched get(wire::DaemonLaunched::Reader r) {
  DaemonLaunched m;
  get_job_epoch(r, m, "launched.job");
  m.worker = get_id<WorkerId>(r.getWorker(), "launched.worker");
  m.status = get(r.getStatus());
  return m;
}

}  // namespace tandem::protocol::codec
