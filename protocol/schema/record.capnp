# What the registry stores, one struct per table. This file is the specification of the values on disk.
#
# Where they stand: each value in the store is an envelope (checksum, table, key; see storage/sealed_value.h)
# around one message of the struct named by its table. Keys are specified in storage/records.h. Only the
# coordinator writes and reads them.
#
# How they evolve: fields are only added, with the next number; none is removed, renumbered or given another type
# or default. A reader of an older binary ignores new fields, so a change that an older binary must not ignore
# raises kRegistrySchemaVersion, and that binary then refuses the registry. A field absent in an old record
# has its default (0, empty), and every default must mean what the old record meant. Enumerations are
# numbers, listed beside protocol/records.h; an unknown number is refused as corrupt.
#
# Digests are 32 bytes, or none where the comment in protocol/records.h allows an empty one. Times are Unix
# milliseconds, 0 for "not yet". Fields ending in Json hold one JSON value or nothing.
# Limits: a record is at most 64 MiB (the canonical text of the largest manifest).

@0xd6a0f1c2b3947e58;

using Cxx = import "/capnp/c++.capnp";
$Cxx.namespace("tandem::protocol::schema");

struct ModelFile {
  path @0 :Text;         # relative to the model's folder; empty where the model is one file
  bytes @1 :Int64;
  mtimeNs @2 :Int64;     # size, mtime and inode unchanged: the root is believed, the file is not read again
  inode @3 :UInt64;
  root @4 :Data;         # content root over 16 MiB leaves
  chunks @5 :List(Data); # the leaves' digests where the file lies in the blob store; none elsewhere (schema 2)
}

struct Model {
  # Table "models". Written by `model add` or a full fine-tune's publish with its manifest, replaced only by
  # the same digest. No path: all files lie in the blob store.
  name @0 :Text;
  digest @1 :Data;
  path @2 :Text;
  shared @3 :Bool;
  family @4 :Text;
  bytes @5 :Int64;
  files @6 :List(ModelFile);
  createdUnixMs @7 :Int64;
  summaryJson @8 :Text;
  job @9 :Text;          # that published it; empty: it was added (schema 2)
  baseModel @10 :Data;   # of a published one: what it was trained from; none otherwise
}

struct AdapterVersion {
  # Table "adapters". Written once, in the transaction that also writes the manifest and moves the alias.
  name @0 :Text;
  version @1 :UInt32;    # from 1
  digest @2 :Data;
  baseModel @3 :Data;
  job @4 :Text;          # empty: imported
  createdUnixMs @5 :Int64;
  metadataJson @6 :Text;
}

struct AliasChange {
  adapter @0 :Text;
  version @1 :UInt32;
  digest @2 :Data;
  unixMs @3 :Int64;
  reason @4 :Text;
}

struct Alias {
  # Table "aliases". The current target stands last in the history (at most 64 entries, oldest dropped).
  name @0 :Text;
  adapter @1 :Text;
  version @2 :UInt32;
  digest @3 :Data;
  pinned @4 :Bool;       # a publish leaves it where it is
  lastVersion @5 :UInt32;  # newest version ever published under this name, so that numbers are not reused
  history @6 :List(AliasChange);
}

struct Manifest {
  # Table "manifests". `text` is canonical (storage/manifest.h) and digest is its SHA-256.
  digest @0 :Data;
  kind @1 :UInt8;        # ManifestKind
  text @2 :Data;
  baseModel @3 :Data;    # of an adapter or checkpoint; none otherwise
  createdUnixMs @4 :Int64;
}

struct Checkpoint {
  # Table "checkpoints". Written after its chunks are durable; the newest two of a job are kept.
  job @0 :Text;
  step @1 :Int64;
  epoch @2 :UInt64;
  manifest @3 :Data;
  createdUnixMs @4 :Int64;
}

struct Job {
  # Table "jobs". Every change of state is committed before it is told to anybody.
  id @0 :Text;
  name @1 :Text;
  state @2 :UInt8;       # JobState
  priority @3 :Int32;
  kind @4 :Text;
  specJson @5 :Text;
  model @6 :Data;
  dataset @7 :Data;
  adapter @8 :Text;
  epoch @9 :UInt64;      # committed before the gang of that epoch is started
  attempts @10 :UInt32;
  step @11 :Int64;
  totalSteps @12 :Int64;
  waitingFor @13 :Text;  # never written
  error @14 :Text;
  submittedUnixMs @15 :Int64;
  startedUnixMs @16 :Int64;
  endedUnixMs @17 :Int64;
  updatedUnixMs @18 :Int64;
  tenant @19 :Text;
  idempotencyKey @20 :Text;
  worker @21 :Text;
  progressSeq @22 :UInt64;
  publishedVersion @23 :UInt32;
  detailsJson @24 :Text;  # an object: what only the coordinator reads (dry run, summary, retries)
}

struct JobEvent {
  # Table "job_events". At most 2000 per job, oldest dropped.
  job @0 :Text;
  seq @1 :UInt64;        # from 1, without gaps when written
  unixMs @2 :Int64;
  level @3 :Text;
  kind @4 :Text;
  message @5 :Text;
  metricsJson @6 :Text;
}

struct Result {
  # Table "results": the result cache. May be dropped at any time.
  key @0 :Data;
  target @1 :Data;
  createdUnixMs @2 :Int64;
  expiresUnixMs @3 :Int64;  # 0: never
  bytes @4 :Int64;
  payload @5 :Data;
  tenant @6 :Text;
}

struct Dataset {
  # Table "datasets".
  digest @0 :Data;
  name @1 :Text;
  rows @2 :Int64;
  bytes @3 :Int64;
  createdUnixMs @4 :Int64;
  format @5 :Text;
}

struct Setting {
  # Table "settings". "schema_version" is the first one written.
  name @0 :Text;
  value @1 :Text;
}

struct Idempotency {
  # Table "idempotency". Written in the transaction of the work it stands for, dropped after 24 hours.
  tenant @0 :Text;
  key @1 :Text;
  request @2 :Data;      # digest of method and parameters
  result @3 :Data;
  createdUnixMs @4 :Int64;
}
