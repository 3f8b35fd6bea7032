// The objects of protocol/schema/client.capnp as JSON, for answers. Pure functions.
#pragma once

#include "coordinator/jobs.h"
#include "coordinator/params.h"
#include "coordinator/replicas.h"
#include "coordinator/workers.h"

#include <string>

namespace tandem::coordinator {

/// MODEL; `workers` counts engines that hold it.
/// What a job published, as it is asked for; "" before.
std::string published_name(const Job& job);
Json model_json(const ModelRecord& model, const WorkerTable& workers);
/// DATA
Json data_json(const Dataset& data);
/// JOB
Json job_json(const Job& job, const Jobs& jobs, const Tables& tables);
/// JOB with spec, epoch, checkpoints, metrics, error, estimate.
Json job_details_json(const Job& job, const Jobs& jobs, const Tables& tables);
/// ADAPTER
Json adapter_json(const AdapterVersionRecord& adapter, const Tables& tables,
                  const WorkerTable& workers);
/// WORKER
Json worker_json(const Worker& worker, const WorkerTable& workers, const Tables& tables);
/// REPLICA
Json replica_json(const Replica& replica, const Replicas& replicas, const Tables& tables);
/// One item of job.watch.
Json event_json(const JobEventRecord& event);
/// One item of job.logs.
Json log_json(const JobEventRecord& event);

/// ["host/cpu0", ...]
Json id_list(const std::vector<WorkerId>& ids);

/// The JSON in `text`, or an empty object.
Json parse_object(const std::string& text);

}  // namespace tandem::coordinator
