@0x99ed28a809443e09;
# What the other schemas share, and the rules that hold for all of them.
#
# These files are the specification of Tandem's wire. A message is one Cap'n Proto message in one
# ZeroMQ frame, framed by the standard stream header (segment table), not packed. On the bulk socket
# a second frame may follow with the bytes of one chunk; nothing else has more than one frame.
#
# Sockets. The coordinator binds three ROUTERs: clients (client.capnp), workers (control.capnp) and
# bulk (bulk.capnp). Peers are DEALERs. A peer's routing id names its key where CURVE is used, and
# differs on every start of a process.
#
# Order and loss. Within one connection messages arrive in order and at most once; a connection that
# breaks loses what was under way. So whatever matters carries an id, is repeated by its sender until
# it is acknowledged, and is recognised as a repeat by its receiver. Each message below says how.
#
# Limits. A frame: 4 MiB (of workers 20 MiB, bulk payload: 16 MiB + 4 KiB). A text: 1 MiB of valid UTF-8
# (manifests between coordinator and workers: 16 MiB, a call's JSON: 64 KiB less than a frame) unless it
# says less. A list: 2^18 items. Nesting: 32. Counts, indices and times: not negative. Data that holds a
# digest: 0 or 32 bytes. Enum values that this file does not name are refused. A frame that breaks a
# limit is dropped and counted; it is never answered and never ends the receiver.
#
# Versions. The first message of a connection is a hello with (major, minor). A process understands
# minor versions from version.h's oldest to its own, at least the one before. The lower of the two is
# spoken; any other peer is refused in the answer to its hello, with the range. A peer that is refused
# with a version it understands itself may say hello again with that.
#
# Evolution. Never change the type, number or default of a field, never reuse a number, never delete
# (rename to obsoleteX). New fields get the next number and a default that means "as before"; new
# members of a union and new enum values are sent only to a peer whose version has them. Each such
# addition raises the minor version and is marked "since M.N".

using Cxx = import "/capnp/c++.capnp";
$Cxx.namespace("tandem::protocol::wire");

struct Version {
  major @0 :UInt16;
  minor @1 :UInt16;
}
# History: 1.0 the first; 1.1 CallReply.retryAfterMs, Sampling.promptLogprobsFrom,
# GenerateChunk.promptLogprobs; 1.6 Sampling.repetitionPenalty.unset; 1.7 EstimateRequest.evaluates;
# 1.8 HeartbeatReply.gangBytes, WorkerHelloReply.gangBytes, StartJob.adapterBytes;
# 1.9 WorkerHello.baseBytes, ModelLoaded.baseBytes, LoadModel.gangBytes, AgentCommand.engine.

enum StatusCode {
  ok @0;
  invalid @1;      # the input is wrong; repeating it cannot help
  notFound @2;
  refused @3;      # does not fit, quota, not supported
  unavailable @4;  # a peer is gone or not there yet; repeat later
  busy @5;         # a bounded queue is full; repeat after the time that stands beside or in the message
  timeout @6;
  corrupt @7;
  cancelled @8;
  internal @9;
  conflict @10;    # an old epoch, a second writer, a name that is taken
}

struct Status {
  code @0 :StatusCode;
  message @1 :Text;  # for people: what failed, the object, the limit, the value, what to do; at most 16 KiB
}

struct Sampling {
  # How the next token is drawn. What is unset takes the model's generation config, then the default
  # named here. Ranges are checked by the engine, which knows the model; it answers `invalid`.
  maxTokens :union { unset @0 :Void; value @1 :Int64; }    # default: up to the context; the model's
                                                           # counts as far as there is space
  temperature :union { unset @2 :Void; value @3 :Float32; }  # 0 is greedy; default 1. Greedy as well: a
                                                             # model that says do_sample false, with
                                                             # topK, topP and minP unset too
  topK :union { unset @4 :Void; value @5 :Int64; }         # 0 is off
  topP :union { unset @6 :Void; value @7 :Float32; }       # 1 is off
  minP :union { unset @8 :Void; value @9 :Float32; }       # 0 is off
  repetitionPenalty :union { value @10 :Float32 = 1; unset @21 :Void; }  # 1 is off; default 1. unset
                                      # since 1.6: an older peer reads it as 1
  presencePenalty @11 :Float32;
  frequencyPenalty @12 :Float32;
  seed :union { unset @13 :Void; value @14 :Int64; }       # default: made from the request's id
  stop @15 :List(Text);          # the text ends before the first of these
  stopTokenIds @16 :List(Int32);
  logprobs @17 :Int64 = -1;      # -1 none; n: of every token and its n likeliest
  minTokens @18 :Int64;
  ignoreEos @19 :Bool;
  promptLogprobsFrom @20 :Int64 = -1;  # k >= 1: also the log-probabilities of prompt tokens k, k + 1, ...,
                                      # each given those before it; with maxTokens 0 nothing is generated
}

struct ChatMessage {
  role @0 :Text;
  content @1 :Text;
}

struct PromptInput {
  # Exactly one of messages, prompt and tokens is not empty.
  messages @0 :List(ChatMessage);  # the model's chat template applies
  prompt @1 :Text;                 # a user's message for the template; taken as it is when raw
  tokens @2 :List(Int32);          # taken as they are
  raw @3 :Bool;
}

struct TopLogprob {
  token @0 :Int32;
  logprob @1 :Float32;
}

struct TokenLogprob {
  token @0 :Int32;
  logprob @1 :Float32;
  top @2 :List(TopLogprob);
}

enum FinishReason {
  none @0;       # more chunks follow
  stop @1;       # end of sequence, stop token or stop string
  length @2;     # maxTokens or the context
  cancelled @3;
  error @4;      # status says which
}

struct Usage {
  promptTokens @0 :Int64;
  completionTokens @1 :Int64;
  cachedPromptTokens @2 :Int64;  # of the prompt, from the prefix cache
}

struct Generate {
  # client -> coordinator, at any time after the hello: start a generation or, with an id that was
  # sent before, go on with it. The coordinator answers with GenerateChunks until one has a finish
  # other than none; a full queue is answered at once with `busy` and retryAfterMs.
  # Loss or a broken connection: the client sends it again with the same id and nextIndex = number of
  # tokens it has; the coordinator (or, after its restart, an engine that computes the same tokens
  # again) goes on with exactly that token. After a first chunk the client names the digest in it, not an
  # alias, which may mean another version by then. A repeat while the request runs only moves its answers to
  # the connection it came on. Ids are 32 hex digits, unique for ever; a different request under an
  # id in use is answered `conflict`.
  id @0 :Text;           # at most 64 bytes
  model @1 :Text;        # base, alias, alias@version, JOB@latest, JOB@step-N, digest prefix (12 digits or more)
  input @2 :PromptInput;
  sampling @3 :Sampling;
  stream @4 :Bool = true;  # false: one chunk with everything (a few where one would exceed 512 KiB)
  noCache @5 :Bool;        # neither answer from nor write to the result cache
  nextIndex @6 :Int64;
  deadlineMs @7 :Int64;    # time left when sent; then the request ends with `timeout`; 0: none
}

struct GenerateChunk {
  # engine -> coordinator (within InferChunk) and coordinator -> client: part of an answer. Chunks of
  # one request come in order of index without gaps; the receiver drops tokens whose index it has.
  # Every chunk but the last has at least one token, and its text is what the detokenizer gives after
  # them, so that the same tokens give the same text however often they are computed. The coordinator
  # keeps an answer's chunks for a minute after its end for repeats, and sends those from nextIndex on.
  id @0 :Text;
  index @1 :Int64;         # of tokens[0] in the completion
  text @2 :Text;           # never half a character
  tokens @3 :List(Int32);
  logprobs @4 :List(TokenLogprob);
  finish @5 :FinishReason;
  status @6 :Status;       # not ok: finish is error or cancelled
  usage @7 :Usage;         # on the last chunk
  model @8 :Data;          # digest of what answers: on the first and the last chunk
  adapter @9 :Data;        # empty: the base itself
  cached @10 :Bool;        # from the result cache
  queueUs @11 :Int64;      # on the last chunk: the coordinator's share of the first token's time
  firstTokenUs @12 :Int64; # and the engine's
  retryAfterMs @13 :Int64; # with `busy`
  promptLogprobs @14 :List(Float32);  # complete, once, where promptLogprobsFrom asks
}
