@0x999dcb8f2be99786;
# Workers (agents and engines) and the coordinator. common.capnp states the rules.
#
# Identity. `worker` names the slot (host and device) and outlives processes; `incarnation` is one start
# of one process. (job, epoch) names one gang; a message of an older epoch is answered with JobAck
# `conflict`, and its sender stops that job at once without publishing.
#
# Lease. The coordinator counts a peer as lost when no Heartbeat came for leaseMs. A peer that hears no
# HeartbeatReply keeps what runs going (jobs, started answers), repeats its hello, and is adopted or
# told to stop. Work that waits for an acknowledgement waits as long as it takes.

using Cxx = import "/capnp/c++.capnp";
using Common = import "common.capnp";
$Cxx.namespace("tandem::protocol::wire");

struct WorkerMessage {
  # agent or engine -> coordinator
  union {
    hello @0 :WorkerHello;
    heartbeat @1 :Heartbeat;
    modelLoaded @2 :ModelLoaded;
    estimateReply @3 :EstimateReply;
    progress @4 :JobProgress;
    checkpoint @5 :CheckpointReady;
    publish @6 :Publish;
    ended @7 :JobEnded;
    chunk @8 :InferChunk;
    bye @9 :WorkerBye;
    launch @10 :LaunchDaemon;      # since 1.4
    launched @11 :DaemonLaunched;  # since 1.4
  }
}

struct ControlMessage {
  # coordinator -> agent or engine
  union {
    hello @0 :WorkerHelloReply;
    heartbeat @1 :HeartbeatReply;
    agent @2 :AgentCommand;
    loadModel @3 :LoadModel;
    estimate @4 :EstimateRequest;
    startJob @5 :StartJob;
    stopJob @6 :StopJob;
    jobAck @7 :JobAck;
    infer @8 :Infer;
    inferCancel @9 :InferCancel;
    announce @10 :Announce;
    launch @11 :LaunchDaemon;      # since 1.4
    launched @12 :DaemonLaunched;  # since 1.4
  }
}

enum WorkerRole {
  agent @0;
  engine @1;
  gang @2;         # since 1.2: the first rank of a gang, which speaks for all its ranks; since 1.3 of a replica too
}

struct FileRef {
  path @0 :Text;    # relative; "" when the model is one file
  digest @1 :Data;  # content root
}

struct ModelRef {
  # A base model as a worker needs it: read from `path` when it is on this host and its files' roots
  # agree, else fetched by BlobGet of the roots.
  digest @0 :Data;
  name @1 :Text;
  path @2 :Text;
  shared @3 :Bool;  # every worker sees the same path
  files @4 :List(FileRef);
}

struct RunningJob {
  job @0 :Text;
  epoch @1 :UInt64;
  step @2 :Int64;
}

# -- worker -> coordinator ------------------------------------------------------------------------

struct WorkerHello {
  # First message of every connection of an agent or engine, repeated every 2 s until WorkerHelloReply
  # comes. It says what is running, and the coordinator adopts it or names it in stopJobs and
  # stopRequests. A hello of an older incarnation of the same (worker, role) is refused (`conflict`); a
  # newer one takes the place of the older, whose work is then lost unless it names it.
  version @0 :Common.Version;
  role @1 :WorkerRole;
  worker @2 :Text;       # at most 256 bytes
  host @3 :Text;
  slot @4 :Int32;
  device @5 :Text;       # "cpu" or "cuda"
  deviceName @6 :Text;   # a gang has one device and one name of it
  memoryBytes @7 :Int64; # what the device may give to this worker
  pid @8 :Int64;
  incarnation @9 :UInt64;  # random, not 0
  model @10 :Data;       # engine: the base it holds; empty: none
  jobs @11 :List(RunningJob);
  requests @12 :List(Text);  # ids of requests still being answered
  adapters @13 :List(Data);  # resident
  credits @14 :Int64;    # requests it will hold at once; the coordinator never has more open with it
  program @15 :Text;     # since 1.5, agent: the version of its host's programs; hosts of a gang have one
  baseBytes @16 :Int64;  # since 1.9, engine: of memoryBytes, to serve its base, adapters apart; 0: no base
}

struct Heartbeat {
  # Every heartbeatMs. An engine sends it from its device loop: a hung step is seen by its silence.
  # Answered with HeartbeatReply. Lost: the next one says the same and more.
  worker @0 :Text;
  role @1 :WorkerRole;
  incarnation @2 :UInt64;
  seq @3 :UInt64;
  running @4 :Int64;     # requests
  waiting @5 :Int64;
  kvBlocksFree @6 :Int64;
  kvBlocksTotal @7 :Int64;
  tokensPerSecond @8 :Float64;
  jobs @9 :List(RunningJob);
  adapters @10 :List(Data);
  statsJson @11 :Text;   # counters for status and metrics
}

struct ModelLoaded {
  # Engine: outcome of LoadModel. Lost: the coordinator repeats LoadModel, which is answered again.
  model @0 :Data;
  status @1 :Common.Status;
  seconds @2 :Float64;
  baseBytes @3 :Int64;   # since 1.9: of a base that it holds now, as in WorkerHello
}

struct EstimateReply {
  # Outcome of EstimateRequest. Lost: the request is repeated.
  callId @0 :Text;
  status @1 :Common.Status;
  resultJson @2 :Text;   # {"peak_bytes", "by_kind": {kind: bytes}, "limit_bytes", "fits", …}
}

struct JobProgress {
  # Engine: something happened in a job. seq counts from 1 per (job, epoch). Answered with JobAck
  # "progress:SEQ" after it is on disk; the engine keeps at most 1024 that are not acknowledged (it then
  # drops "step" and "log" ones, oldest first, never others) and repeats them after a reconnect. A repeat
  # is known by its seq and acknowledged again.
  job @0 :Text;
  epoch @1 :UInt64;
  seq @2 :UInt64;
  kind @3 :Text;         # started, step, eval, log, data, probe
  step @4 :Int64;
  totalSteps @5 :Int64;
  message @6 :Text;
  metricsJson @7 :Text;  # numbers: loss, learning_rate, grad_norm, tokens, tokens_per_second, …
}

struct CheckpointReady {
  # Engine: all blobs of the checkpoint are durable (BlobPut was answered ok). The coordinator checks
  # that, writes the record and acknowledges with "checkpoint:STEP" after the commit. Repeated until then
  # (at reconnect, and every 5 s); a repeat is acknowledged again.
  job @0 :Text;
  epoch @1 :UInt64;
  step @2 :Int64;
  manifest @3 :Text;     # canonical; its SHA-256 is the checkpoint's identity
}

struct Publish {
  # Engine: all blobs of the adapter are durable. The coordinator writes manifest, version and alias in
  # one transaction, acknowledges with "publish" (digest, "alias@version"), and announces. Repeated until
  # acknowledged; (job, epoch, manifest) makes a repeat: one version, however often it comes.
  job @0 :Text;
  epoch @1 :UInt64;
  step @2 :Int64;
  manifest @3 :Text;
  metadataJson @4 :Text; # probe result, losses
}

struct JobEnded {
  # Engine: the job is over here, after its last Publish was acknowledged, or instead of it. Repeated
  # until acknowledged with "ended".
  job @0 :Text;
  epoch @1 :UInt64;
  status @2 :Common.Status;  # cancelled: stopped as asked
  step @3 :Int64;
  summaryJson @4 :Text;
}

struct InferChunk {
  # Engine: part of an answer. Not acknowledged: a lost connection makes the coordinator send Infer again
  # with nextIndex, here or elsewhere, under the next attempt.
  attempt @0 :UInt32;    # as in Infer; chunks of an older attempt are dropped
  chunk @1 :Common.GenerateChunk;
}

struct WorkerBye {
  # The process is about to end on purpose; its work may be moved at once. Lost: the lease runs out.
  worker @0 :Text;
  role @1 :WorkerRole;
  incarnation @2 :UInt64;
}

# -- coordinator -> worker ------------------------------------------------------------------------

struct WorkerHelloReply {
  status @0 :Common.Status;  # not ok: the peer must end (old incarnation, version, slot taken)
  coordinator @1 :UInt64;    # its incarnation
  heartbeatMs @2 :Int64;
  leaseMs @3 :Int64;
  stopJobs @4 :List(Text);   # not adopted: end them, publish nothing
  stopRequests @5 :List(Text);
  gangBytes @6 :Int64;       # since 1.8: as in HeartbeatReply
}

struct HeartbeatReply {
  # To an engine it says, since 1.8, what it must leave to a gang's rank on its slot: adapters that nobody
  # uses go at once, others when they are idle, and no base is loaded that does not fit beside it.
  seq @0 :UInt64;
  gangBytes @1 :Int64;       # device memory of that rank, of a replica with its adapters; 0: no rank
}

enum AgentAction {
  restartEngine @0;  # the engine ends, then agent and engine start anew, of the programs in place
  drain @1;        # from here on not sent, and nothing an agent does
  resume @2;
  shutdown @3;
  upgrade @4;
}

struct AgentCommand {
  # To an agent. Its worker's next hello or Heartbeats show the effect; the coordinator repeats it until they do.
  # Doing it twice is doing it once: since 1.9 a restart names the engine that is to end.
  action @0 :AgentAction;
  engine @1 :UInt64;     # since 1.9, of a restart: an engine's incarnation; 0: none has said hello, whichever there is
}

struct LoadModel {
  # To an engine: hold this base. Answered with ModelLoaded, also when it holds it already. Another base
  # while work runs: `refused`. Repeated every 5 s until answered or the lease is lost.
  model @0 :ModelRef;
  gangBytes @1 :Int64 = -1;  # since 1.9: as in HeartbeatReply, so that a gang placed just now counts; -1: not said
}

struct EstimateRequest {
  # To an engine: a dry run on the shape-only backend. Answered with EstimateReply. Repeated after 5 s;
  # computing it twice does no harm. Since 1.3 with `serveJson`: of a replica's ranks, not of a job.
  callId @0 :Text;
  model @1 :ModelRef;
  specJson @2 :Text;     # the "train" object of a JobSpec
  serveJson @3 :Text;    # {"tp", "pp"} of a replica; "": a job
  evaluates @4 :Bool = true;  # since 1.7: the job has something to evaluate on
}

struct StartJob {
  # To an engine: run this job as this epoch, from the checkpoint (or the start). Answered with
  # JobProgress "started" or JobEnded. Repeated until one of them comes; a repeat of what runs does nothing,
  # a newer epoch of a job that runs here ends the older one first.
  # Since 1.2 with `gang`, to the agent of the first member: start a gang of one rank per member, by
  # mpirun. Its first rank connects as role `gang` under that incarnation and answers as an engine does.
  # When the gang ends without its own JobEnded, the agent sends one (`unavailable`) until it is acknowledged.
  # Since 1.3 with `serveJson`, and then always with `gang`: the ranks are a replica of the model, `job` is its
  # id. Its first rank says hello again, with the model, when it can serve; from then on it is given Infer,
  # InferCancel and Announce as an engine is. StopJob `pause` drains it (the coordinator sends nothing new).
  job @0 :Text;
  epoch @1 :UInt64;
  specJson @2 :Text;     # JobSpec
  model @3 :ModelRef;
  dataset @4 :Data;
  evalDataset @5 :Data;
  datasetBytes @6 :Int64;
  evalDatasetBytes @7 :Int64;
  checkpointManifest @8 :Text;  # "": from the start
  gang @9 :UInt64;       # incarnation of the first rank's process; 0: not a gang
  members @10 :List(Text);  # workers whose slots it takes, at most 64, the leader first
  serveJson @11 :Text;   # {"tp", "pp"} of a replica; "": a job
  adapterBytes @12 :Int64 = -1;  # since 1.8, of a replica: what adapters may take of each rank; -1: not said
}

enum StopMode {
  cancel @0;
  pause @1;        # checkpoint first
}

struct StopJob {
  # To an engine, a gang, or the agent of a gang that has not connected (it kills it). Answered with JobEnded (`cancelled`). Repeated until that comes; of a job that does not
  # run here: answered with JobEnded `notFound`.
  job @0 :Text;
  epoch @1 :UInt64;
  mode @2 :StopMode;
}

struct JobAck {
  # To an engine: receipt, after commit where something was written. Lost: the engine repeats the
  # message and is answered again.
  job @0 :Text;
  epoch @1 :UInt64;
  of @2 :Text;           # "progress:SEQ", "checkpoint:STEP", "publish", "ended"
  status @3 :Common.Status;  # conflict: old epoch; stop at once
  digest @4 :Data;       # of what was published
  name @5 :Text;         # "alias@version" published
}

struct Infer {
  # To an engine: a request with everything resolved at admission; these digests stay for its life.
  # Answered with InferChunks from request.nextIndex on. At most `credits` are open at once. A repeat
  # with the same attempt does nothing; a newer attempt replaces the older.
  request @0 :Common.Generate;
  attempt @1 :UInt32;
  model @2 :ModelRef;
  adapter @3 :Data;      # empty: the base itself
  adapterManifest @4 :Text;  # canonical, for an engine that does not have the adapter yet
  job @5 :Text;          # not empty: JOB@latest, answered by the engine that trains this job
}

struct InferCancel {
  # To an engine: free the request's memory at the next step. Answered with a last chunk (cancelled)
  # when it was running. Lost: the answer's chunks come for a request that is no longer known, and the
  # coordinator says it again.
  id @0 :Text;
}

struct Announce {
  # To engines, after the commit: a version was published; they may load it ahead of the first request.
  # Lost: nothing; Infer carries all that is needed.
  name @0 :Text;
  model @1 :Data;
  adapter @2 :Data;
  adapterManifest @3 :Text;
}

# -- both ways, since 1.4 -------------------------------------------------------------------------

struct LaunchDaemon {
  # A gang over several hosts. Leader's agent -> coordinator: the gang's mpirun wants its daemon (orted) on
  # the host of `worker`, the first member there. The coordinator checks that (job, epoch) is placed so and
  # that the sender leads it, and passes it on to that worker's agent, which starts its own host's orted with
  # these arguments; it takes none but `-mca NAME VALUE` of a list of names. Answered with DaemonLaunched.
  # Repeated every second until then; doing it twice is doing it once. Where the daemon fails later, the
  # answer comes again, with the reason.
  worker @0 :Text;
  start @1 :StartJob;         # what the gang was started with: its ranks there read it
  arguments @2 :List(Text);   # at most 256, of at most 16 KiB each; without the program's name
}

struct DaemonLaunched {
  # Outcome of LaunchDaemon: that agent -> coordinator -> the leader's agent. Lost: LaunchDaemon is repeated.
  job @0 :Text;
  epoch @1 :UInt64;
  worker @2 :Text;
  status @3 :Common.Status;
}
