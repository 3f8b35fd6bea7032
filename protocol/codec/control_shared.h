// Private to the codec: pieces that both directions of the worker's socket carry.
#pragma once

#include "protocol/codec/shared.h"

#include "protocol/schema/control.capnp.h"

namespace tandem::protocol::codec {

inline constexpr std::int64_t kPathBytesMax = 4096;

template <class Builder, class Message>
void put_job_epoch(Builder b, const Message& m) {
  b.setJob(text(m.job.value));
  b.setEpoch(m.epoch);
}
/// Fills job and epoch, which begin every message about a job.
template <class Reader, class Message>
void get_job_epoch(Reader r, Message& m, const char* field) {
  m.job = get_id<JobId>(r.getJob(), field);
  m.epoch = r.getEpoch();
}

void put(wire::ModelRef::Builder b, const ModelRef& m);
ModelRef get(wire::ModelRef::Reader r);
void put(wire::StartJob::Builder b, const StartJob& m);
StartJob get(wire::StartJob::Reader r);
void put(wire::LaunchDaemon::Builder b, const LaunchDaemon& m);
LaunchDaemon get(wire::LaunchDaemon::Reader r);
void put(wire::DaemonLaunched::Builder b, const DaemonLaunched& m);
DaemonLaunched get(wire::DaemonLaunched::Reader r);

}  // namespace tandem::protocol::codec
