// Every limit of the coordinator, in one place; main prints them at start. Times are before
// scaled_ms(), which the loop applies once when it builds Options.
#pragma once

#include "protocol/base/clock.h"

#include <cstddef>
#include <cstdint>

namespace tandem::coordinator {

struct Limits {
  // -- workers
  TimeMs heartbeat_ms = 1000;     ///< agents and engines report this often
  TimeMs lease_ms = 5000;         ///< silence after which a worker's work is moved
  TimeMs adoption_ms = 10'000;    ///< after a start: how long running jobs wait for their engine
  TimeMs missing_job_ms = 3000;   ///< an engine that lives but no longer names its job
  TimeMs load_resend_ms = 3000;   ///< LoadModel without an answer is sent again
  TimeMs load_backoff_ms = 2000;  ///< after a failed load; doubles up to load_backoff_max_ms
  TimeMs load_backoff_max_ms = 60'000;
  TimeMs engine_silent_ms = 120'000;  ///< an engine without a lease is then ended by its agent
  std::size_t workers_max = 4096;     ///< known at once, lost ones included
  // -- jobs
  TimeMs resend_ms = 1000;              ///< StartJob and StopJob are repeated
  TimeMs estimate_resend_ms = 5000;     ///< EstimateRequest is repeated (a dry run takes a while)
  TimeMs estimate_timeout_ms = 60'000;  ///< an estimate nobody answered
  TimeMs start_timeout_ms = 300'000;    ///< an engine that holds a job but never reports a step
  TimeMs retry_backoff_ms = 500;        ///< after a failed attempt; doubles up to the next
  TimeMs retry_backoff_max_ms = 30'000;
  TimeMs preempt_check_ms = 500;     ///< a waiting job looks for victims this often
  TimeMs preempt_spare_ms = 60'000;  ///< a job is not preempted twice within this time
  int attempts_max = 10;             ///< attempts in a row without a new step or checkpoint
  int own_failures_max = 3;          ///< failures reported by the job itself without a new step
  std::size_t jobs_live_max = 4096;
  std::size_t replicas_max = 256;
  TimeMs replica_stable_ms = 60'000;  ///< one that served so long is started again at once
  std::size_t events_kept = 2000;     ///< of one job; older ones go first
  std::size_t jobs_kept = 10'000;     ///< that have ended; older ones are forgotten
  /// Of ended jobs' events and checkpoints in the registry (a quarter of it): older ones go first.
  std::int64_t history_bytes_max = 256ll << 20;
  TimeMs lazy_commit_ms = 100;  ///< progress and cached results wait this long for a commit
  // -- requests
  std::size_t queue_max = 1024;  ///< waiting for an engine, all users
  std::size_t queue_per_user_max =
      512;  ///< waiting, one user (with a key; else nobody is told apart)
  std::size_t requests_per_user_max = 2048;  ///< waiting and running
  TimeMs no_engine_wait_ms = 30'000;         ///< without any engine of the model: then kUnavailable
  TimeMs probe_ms = 5000;                    ///< a silent client that waits is looked for
  TimeMs orphan_ms = 3000;                   ///< client gone: the request is cancelled after this
  TimeMs idle_engine_ms = 4000;              ///< engine says it runs nothing, we think it does
  int request_attempts_max = 8;              ///< engines tried for one request
  TimeMs retry_after_ms = 500;               ///< least value sent with kBusy
  std::size_t sessions_max = 16'384;
  std::size_t streams_max = 4096;     ///< job.watch and job.logs calls that follow
  std::size_t prefixes_max = 16'384;  ///< entries of the prefix affinity table
  std::size_t prefix_depth_max = 32;  ///< messages (or 1 KiB pieces of a prompt) digested
  TimeMs finished_kept_ms = 60'000;   ///< answers kept for clients that ask again
  std::size_t finished_max = 4096;    ///< of these
  // -- result cache
  std::size_t results_bytes_max = 64u << 20;
  std::size_t result_bytes_max = 1u << 20;  ///< a larger answer is not kept
  std::int64_t result_ttl_ms = 24ll * 3600 * 1000;
  // -- calls
  std::size_t idempotency_max = 16'384;
  std::int64_t idempotency_ttl_ms = 24ll * 3600 * 1000;
  std::size_t alias_history_max = 64;
  std::size_t pending_calls_max = 1024;  ///< calls that wait for background work
  std::size_t name_bytes_max = 128;
  std::size_t page_max = 1000;  ///< entries of one list answer
  TimeMs gc_ms = 900'000;       ///< garbage is collected this often
};

}  // namespace tandem::coordinator
