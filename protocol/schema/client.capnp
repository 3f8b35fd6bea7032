@0xbf9c58cdd270412c;
# Clients (the CLI, the gateway, applications) and the coordinator. common.capnp states the rules.

using Cxx = import "/capnp/c++.capnp";
using Common = import "common.capnp";
$Cxx.namespace("tandem::protocol::wire");

struct ClientMessage {
  # client -> coordinator
  union {
    hello @0 :ClientHello;
    generate @1 :Common.Generate;
    cancel @2 :Cancel;
    call @3 :Call;
    callCancel @4 :CallCancel;
    ping @5 :Ping;
  }
}

struct ServerMessage {
  # coordinator -> client
  union {
    hello @0 :ServerHello;
    chunk @1 :Common.GenerateChunk;
    callReply @2 :CallReply;
    pong @3 :Pong;
  }
}

struct ClientHello {
  # First message of every connection, also after each reconnect. Answered with ServerHello; anything
  # that arrives before it is dropped and counted. Lost: sent again after 2 s. A repeat is answered
  # again and changes nothing.
  version @0 :Common.Version;
  client @1 :Text;  # program and version, "tandem-cli/0.1.0", for logs; at most 256 bytes
}

struct ServerHello {
  status @0 :Common.Status;  # refused: the version is not understood (the message names the range)
  version @1 :Common.Version;  # what both will speak; with `refused`, the newest that the server speaks
  server @2 :Text;
  incarnation @3 :UInt64;    # of the coordinator's process; a new one means that it was restarted:
                             # the client sends every open Generate and Call again
  heartbeatMs @4 :Int64;     # a client with open requests that hears nothing for so long sends Ping;
                             # nothing for three times as long: it sends its hello and open requests again
                             # (so it is for one that read nothing while 8,192 messages or 64 MiB waited for
                             # it: these are dropped, and nothing comes after them until its next hello)
}

struct Cancel {
  # The client no longer wants this generation. The coordinator stops it and sends a last chunk with
  # finish cancelled, unless it had ended. Unknown id: ignored. Lost: the request runs to its end.
  id @0 :Text;
}

struct Call {
  # Any verb of the table below. Answered with one CallReply, or, where the table says stream, with
  # replies whose `more` is true until one has it false.
  # Loss: the client sends it again with the same callId and idempotencyKey, at reconnect and after 5, 10,
  # 20, … s of silence; a repeat of what is still being worked on is ignored. A call that changes
  # something stores the key in the transaction of its effect and answers a repeat (for 24 hours, over
  # restarts) as it answered first; the same key with other parameters is answered `conflict`. A
  # repeat of a streaming call starts the stream again from `after`.
  callId @0 :Text;          # 1 to 256 bytes, unique within the client's process
  idempotencyKey @1 :Text;  # 1 to 256 bytes where the method changes something (marked !): none is `invalid`.
                            # Elsewhere it is ignored
  method @2 :Text;
  paramsJson @3 :Text;      # an object; an unknown or missing key is answered `invalid` and named
}

struct CallCancel {
  # Ends a streaming call. No answer. Lost: the stream goes on and the client drops its replies.
  callId @0 :Text;
}

struct CallReply {
  callId @0 :Text;
  status @1 :Common.Status;
  resultJson @2 :Text;       # "" unless status is ok
  more @3 :Bool;             # a streaming call goes on
  retryAfterMs @4 :Int64;    # with `busy`; since 1.1 (a 1.0 peer says "retry after N ms" in the message)
}

struct Ping {
  # Answered with a Pong of the same nonce. Lost: the client asks again.
  nonce @0 :UInt64;
}

struct Pong {
  # Unasked, with nonce 0, it goes to a client that waits for an answer and has been silent for 5 s:
  # one that is gone is found out so, and what it asked for is ended. It needs no answer.
  nonce @0 :UInt64;
}

# -- Methods of Call ----------------------------------------------------------------------------
#
# Notation: {params} -> result; "key?": optional; "= x": its default. (!) changes something and needs
# an idempotency key. (stream) sends replies with `more`. Every name that is not there is answered
# `notFound`. Times are Unix milliseconds, sizes bytes, digests 64 hex digits in results and 12 or more
# in parameters, versions integers from 1. Lists that can grow take {limit = 1000, after = ""} and
# answer {..., "next": ""}: a `next` that is not empty is the `after` of the following page
# (`conflict`: it was removed meanwhile). MODEL, ADAPTER and JOB below are the objects that stand under "Objects".
#
# status            {} -> {"server", "version", "incarnation", "uptime_s", "pid", "endpoints": {"client",
#                   "worker", "bulk"}, "data_dir", "log_path", "tensorboard_dir", "models": n,
#                   "adapters": n, "jobs": {"queued", "running", "paused", "done", "failed",
#                   "cancelled"}, "requests": {"running", "waiting", "accepted", "finished", "failed",
#                   "cancelled", "busy", "rerouted", "shared", "tokens"}, "frames": {"refused": those that
#                   were no message, "before_hello"}, "cache": as cache.stats,
#                   "datasets": n, "workers": [WORKER], "replicas": [REPLICA]}
#
# model.add !       {"name", "path", "shared"? = false} -> MODEL. The path is on the coordinator's host,
#                   under one of its model_roots, else `refused`; a family or GGUF type that is not
#                   supported: `refused` with its name; another model of that name: `conflict`.
# model.list        {} + page -> {"models": [MODEL], "next"}
# model.show        {"model"} -> MODEL with "config", "files": [{"path", "digest", "bytes"}]
# model.rm !        {"model", "force"? = false} -> {}. `refused` while replicas, jobs or adapters need it, unless
#                   forced.
#
# data.add !        {"digest", "name"?, "bytes", "chunks": [digest], "upload"?, "rows"?, "format"?} -> DATA. The chunks of at
#                   most 16 MiB lie on the bulk socket already (BlobPut with pin = upload); `digest` is
#                   the content root: SHA-256 over their digests (base/digest.h). `notFound` names the
#                   first chunk that is missing. Bytes that are there already keep the name they have: another
#                   one is a `conflict`; without a name the answer is the data set that is there.
# data.list         {} + page -> {"data": [DATA], "next"}
# data.show         {"data"} -> DATA with "chunks"
# data.rm !         {"data"} -> {}. `refused` while a job that has not ended needs it.
#
# job.submit !      {"spec": JobSpec, "name"?} -> {"job", "state", "position", "reason", "estimate"}. The
#                   whole job is checked first: an unknown setting is `invalid` with the nearest name;
#                   what does not fit in memory is `refused` with the bytes and by how much. Method "lora"
#                   publishes the spec's "adapter", method "full" the model that its "name" says; a name that
#                   is taken, or that another job will publish: `conflict`.
# job.list          {"state"?} + page -> {"jobs": [JOB], "next"}; newest first. A state that no job has: `invalid`
# job.show          {"job"} -> JOB with "spec", "epoch", "model_digest", "dataset", "eval_dataset", "checkpoints": [{"step", "digest",
#                   "created"}], "metrics" (the last of each kind), "error_code", "estimate", "summary",
#                   "published" (digest), "published_version"
# job.watch stream  {"job", "after"? = 0} -> {"seq", "time", "kind", "step", "total_steps", "message",
#                   "metrics"} for each event with seq > after, old ones first, then as they come. The
#                   last reply (more false) is {"job", "state", "adapter": "name@version" or a model's name, "method", "digest",
#                   "summary", "error"} when the job ended.
# job.logs stream   {"job", "after"? = 0, "follow"? = false} -> {"seq", "time", "line"}; as watch
# job.cancel !      {"job"} -> JOB. A job that has ended: `conflict`.
# job.pause !       {"job"} -> JOB. Writes a checkpoint first; state is "pausing" until then.
# job.resume !      {"job", "layout"?} -> JOB. A paused or failed job is queued again from its last checkpoint;
#                   layout {"dp"?,"tp"?,"pp"?,"zero"?,"virtual_pipeline_size"?,"pipeline_balance"?,
#                   "sequence_parallel"?} lets it go on over other ranks, after a new dry run.
#                   A layout or job that cannot work is `refused` and the job stays as it was.
# job.rm !          {"job"} -> {}. One that has ended, with its events and checkpoints; what it published stays.
#                   One that has not: `conflict`. Of ended jobs the newest jobs_kept stand here, the newest of
#                   these with events and checkpoints.
# job.restore !     {"job", "spec", "name"?, "model", "dataset", "eval_dataset"?, "step", "manifest" or
#                   "manifest_digest"} -> JOB. A checkpoint out of another registry's backup: the job is made,
#                   paused, if it is not here, and gets the checkpoint. Model and data are named by digest; the
#                   checkpoint's chunks lie on the bulk socket already, and so does the manifest that is named by
#                   its digest: one may be larger than a call. `conflict`: another job has the id, or another
#                   checkpoint the step, or the job is not paused.
#
# replica.add !     {"model", "tp"? = 1, "pp"? = 1, "count"? = 1} -> {"replicas": [REPLICA], "estimate"}. Since 1.3.
#                   Serves the base over tp x pp workers, of one host where one has as many, from now on until
#                   it is removed. The dry run of every rank comes first: what does not fit, a model that cannot
#                   be cut so (with the nearest layout), one rank, or more ranks than the pool has workers of
#                   one kind: `refused`.
# replica.list      {} -> {"replicas": [REPLICA]}. At most 256.
# replica.rm !      {"replica"} -> REPLICA in state "stopping" (it ends after what it answers), or "removed".
#
# adapter.list      {"model"?} + page -> {"adapters": [ADAPTER], "next"}
# adapter.show      {"adapter"} -> ADAPTER with "manifest", "history": [{"version", "digest", "time",
#                   "job"}], "aliases"
# adapter.alias !   {"alias", "target"} -> {"alias", "version", "digest"}. Points alias at what target
#                   (a name, name@version or digest) resolves to now.
# adapter.rollback ! {"alias", "version"? = the one before} -> {"alias", "version", "digest"}. A new
#                   version with the old digest: history is never rewritten.
# adapter.rm !      {"adapter"} -> {}. Removes the name with its versions, or name@version alone; `refused`
#                   while an alias points there. The bytes go with the next registry.gc.
# adapter.import !  {"name", "model", "manifest", "metadata"?, "upload"?} -> ADAPTER. The tensors' chunks lie on the
#                   bulk socket already; a tensor that fits no site, a rank or base that does not fit:
#                   `refused` with the tensor's name.
# adapter.manifest  {"adapter"} -> {"digest", "manifest", "name", "model"}: the canonical text, for export; the
#                   chunks are fetched by BlobGet. Where the text is larger than an answer "manifest" is
#                   "": BlobGet of its digest brings any manifest.
#
# estimate          {"model", "train"? : TrainSettings, "eval_data"? = false} -> {"peak_bytes", "by_kind": {kind: bytes},
#                   "limit_bytes", "fits", "dtype", "device"}; over several ranks with "ranks": [{kind: bytes}], with
#                   layout auto "layout", "layout_name" and "layouts" (those looked at); "pool": why the pool as
#                   it is cannot run it
#
# worker.list       {} -> {"workers": [WORKER]}
# worker.drain !    {"worker"} -> WORKER. No new work; what runs goes on; jobs write a checkpoint and move.
# worker.resume !   {"worker"} -> WORKER
# worker.restart !  {"worker"} -> WORKER. Its engine ends (a job's checkpoint first), agent and engine start anew, of the
#                   programs that are in place then: so a pool is upgraded, worker by worker.
#
# cache.stats       {} -> {"entries", "bytes", "bytes_max", "hits", "misses", "evictions", "expired"}
# cache.clear !     {} -> {"entries": removed}
#
# registry.check    {"verify_blobs"? = true} -> {"ok", "records", "blobs", "bytes", "registry_bytes",
#                   "registry_bytes_max", "problems": [text]}
# registry.gc !     {} -> {"blobs", "bytes", "manifests", "results"} freed, {"spared"} blobs. Spares what an upload pins
#                   and what is younger than an hour.
# registry.backup ! {"path"} -> {"path", "bytes"}. A consistent copy on the coordinator's host, while it runs.
#
# With CURVE, key.create, key.revoke and shutdown are for keys of role admin, else `refused`.
# key.create !      {"name", "role"} -> {"name", "role", "public", "secret", "server_public"}. The secret
#                   is answered once and kept nowhere (a repeat with the same idempotency key answers
#                   `conflict`, not the secret). role: client, worker or admin.
# key.list          {} -> {"keys": [{"name", "role", "public"}]}
# key.revoke !      {"name"} -> {}. Within 100 ms, open connections of that key are
#                   refused, and what they asked for before, answers and events, no longer reaches them.
#
# config.show       {} -> {"settings": [{"name", "value", "origin", "default"}]}; secrets are not shown
# shutdown !        {"checkpoint"? = true} -> {}. Jobs write a checkpoint, then the coordinator ends.
#
# Objects
#   MODEL    {"name", "digest", "family", "parameters", "dtype", "bytes", "context", "layers", "path", "shared",
#            "created", "job", "base_model", "workers": n ready}; path "": in the registry's blob store; job and
#            base_model (a digest): which job published it and from what, "" for one that was added
#   DATA     {"name", "digest", "bytes", "created"}
#   JOB      {"job", "name", "state", "model", "adapter" ("" of method full), "publishes", "method", "step", "total_steps", "loss", "priority",
#            "position", "reason", "worker", "attempts", "error", "created", "started", "ended"}; state: queued, estimating,
#            starting, running, pausing, paused, cancelling, done, failed, cancelled; reason: why a queued
#            job waits
#   ADAPTER  {"name", "version", "digest", "model", "rank", "bytes", "job", "created", "resident": n}
#   WORKER   {"worker", "host", "device", "device_name", "version" (of its programs), "state", "model", "loading", "error", "jobs": [JOB
#            id], "requests", "credits", "kv_free", "kv_total", "tokens_per_second", "memory_bytes",
#            "adapters": n, "agent": alive, "pid", "agent_pid", "stats"}; state: starting, ready, draining,
#            drained, lost; "replica": id of the replica that has a rank on it, or ""
#   REPLICA  {"replica", "model", "tp", "pp", "layout", "state", "reason", "epoch", "worker", "workers", "requests",
#            "adapters": n, "kv_free", "kv_total", "tokens_per_second", "pid", "attempts", "rank_bytes", "created",
#            "stats"}; state: waiting, starting, serving, stopping; reason: why it does not serve
