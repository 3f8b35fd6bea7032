// Publishes adapters and submits jobs until it is killed, and says on stdout what was acknowledged:
//   storage_publisher DATA_DIRECTORY SEED
// Lines: "publish VERSION DIGEST" and "job ID KEY", each written after the commit.
#include "protocol/base/log.h"
#include "protocol/base/random.h"
#include "storage/registry.h"
#include "tests/storage/registry_fixture.h"

#include <unistd.h>

namespace tandem::storage {
namespace {

void acknowledge(const std::string& line) {
  if (::write(STDOUT_FILENO, line.data(), line.size()) != static_cast<ssize_t>(line.size()))
    ::_exit(3);
}

Status submit(Registry& registry, std::uint64_t number) {
  JobRecord job;
  job.id = str("job-", number);
  job.tenant = "t";
  job.idempotency_key = str("key-", number);
  TANDEM_ASSIGN_OR_RETURN(auto txn, registry.begin_write());
  TANDEM_RETURN_IF_ERROR(txn.put(job));
  TANDEM_RETURN_IF_ERROR(
      txn.put(IdempotencyRecord{job.tenant, job.idempotency_key, {}, job.id, 0}));
  TANDEM_RETURN_IF_ERROR(txn.put(JobEventRecord{job.id, 1, 0, "info", "state", "queued", ""}));
  TANDEM_RETURN_IF_ERROR(txn.commit());
  acknowledge(str("job ", job.id, " ", job.idempotency_key, "\n"));
  return {};
}

Status run(const std::string& directory, std::uint64_t seed) {
  SystemClock clock;
  RegistryOptions options{directory, 16 << 20, 256 << 20, 200'000, true};
  TANDEM_ASSIGN_OR_RETURN(const auto registry, Registry::open(options, clock));
  TANDEM_ASSIGN_OR_RETURN(auto read, registry->begin_read());
  TANDEM_ASSIGN_OR_RETURN(const auto base, read.find<ModelRecord>("base"));
  Random random(seed);
  for (std::uint64_t round = 0;; ++round) {
    const std::string data(100 + random.below(30'000), static_cast<char>(random.next()));
    const std::string unique = data + std::to_string(seed) + "-" + std::to_string(round);
    TANDEM_ASSIGN_OR_RETURN(const auto version,
                            publish(*registry, "support", base->digest, unique));
    acknowledge(str("publish ", version.version, " ", version.digest.hex(), "\n"));
    TANDEM_RETURN_IF_ERROR(submit(*registry, seed * 100'000 + round));
  }
}

}  // namespace
}  // namespace tandem::storage

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const tandem::Status status = tandem::storage::run(argv[1], std::stoull(argv[2]));
  tandem::log_error(status.to_string());
  return 1;
}
