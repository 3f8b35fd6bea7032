@0xa5096d124d00e2ca;
# Content-addressed chunks of at most 16 MiB between the coordinator's store and anybody (clients that
# upload data, engines that fetch and store). The chunk's bytes travel in a second frame of their own,
# never in a field. common.capnp states the rules; there is no hello here: the peer has said it on its
# other socket, and each request stands alone.
#
# All requests can be repeated at will: they change nothing (has, get) or store the same bytes under
# the same digest (put). Loss: the sender repeats after its time-out. At most 4 requests of one peer
# are under way; the coordinator answers `busy` beyond that.

using Cxx = import "/capnp/c++.capnp";
using Common = import "common.capnp";
$Cxx.namespace("tandem::protocol::wire");

struct BulkRequest {
  # client or engine -> coordinator
  union {
    has @0 :BlobHas;
    put @1 :BlobPut;
    get @2 :BlobGet;
  }
}

struct BlobHas {
  # Which of these chunks are durable here? Answered with BlobReply.has in the same order. A chunk
  # that is there is pinned for an hour, so that the put after it can be left out.
  call @0 :UInt64;
  digests @1 :List(Data);  # at most 4096
}

struct BlobPut {
  # Store the payload frame (1 byte to 16 MiB). Its SHA-256 is compared with `digest` first: `corrupt`
  # when they differ. Ok means durable.
  call @0 :UInt64;
  digest @1 :Data;
  pin @2 :Text;  # upload id, at most 64 bytes: garbage collection spares its chunks for an hour
  parts @3 :List(Part);  # not empty: the payload is several chunks one after another, each compared with
                         # its own digest (`digest` is empty then) and stored in one commit; at most 4096

  struct Part {
    digest @0 :Data;
    bytes @1 :Int64;  # the sizes add up to the payload's, else `invalid`
  }
}

struct BlobGet {
  # A chunk or a manifest by its digest, or `bytes` (at most 16 MiB) from `offset` of a base model's file by its
  # content root. Answered with BlobReply and the bytes as payload; `notFound` when it is not here.
  # The receiver compares the digest before it uses a chunk.
  call @0 :UInt64;
  digest @1 :Data;
  offset @2 :Int64;
  bytes @3 :Int64;  # 0: the whole chunk
}

struct BlobReply {
  # coordinator -> client or engine: the answer to the request with the same `call`. An answer to a call
  # that is no longer open is dropped.
  call @0 :UInt64;
  status @1 :Common.Status;
  has @2 :List(Bool);
  totalBytes @3 :Int64;  # get of a file: its size
}
