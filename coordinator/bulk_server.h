// The bulk socket: chunks in and out of the blob store, model files out. On a thread of its own, so
// that bytes never delay a lease. Puts that wait together are one commit, which a second thread
// makes, so that the next ones are received and verified meanwhile; a put is answered when its
// commit is durable. A reply that its peer has no room for waits, within bounds, and is dropped
// beyond them (the peer repeats).
#pragma once

#include "coordinator/served_files.h"
#include "protocol/messages.h"
#include "protocol/transport.h"
#include "storage/registry.h"

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace tandem::coordinator {

inline constexpr std::size_t kBulkBatchRequests = 512;
/// Of puts that wait, and again of those being stored; a message more may pass it.
inline constexpr std::int64_t kBulkBatchBytes = 32 << 20;
inline constexpr std::int64_t kBulkOutboxBytesMax = 256 << 20;  ///< all peers

struct BulkCounters {
  std::atomic<std::uint64_t> requests{0}, put_bytes{0}, get_bytes{0}, refused{0}, dropped{0};
};

class BulkServer {
 public:
  /// Starts the thread. Registry and files outlive this.
  BulkServer(std::unique_ptr<protocol::ServerEndpoint> endpoint, storage::Registry& registry,
             const ServedFiles& files);
  ~BulkServer();
  BulkServer(const BulkServer&) = delete;
  BulkServer& operator=(const BulkServer&) = delete;

  [[nodiscard]] const BulkCounters& counters() const { return counters_; }

 private:
  struct Put {
    std::string peer, pin;
    std::uint64_t call = 0;
    protocol::Bytes bytes;
    std::vector<storage::BlobChunk> chunks;  ///< in `bytes`, verified
    Status status;                           ///< of storing it
  };
  struct Reply {
    protocol::Bytes frame, payload;
  };

  void loop();
  bool take_batch();
  void handle(protocol::Envelope envelope);
  void has(const std::string& peer, const protocol::BlobHas& request);
  void get(const std::string& peer, const protocol::BlobGet& request);
  void put(std::string peer, const protocol::BlobPut& request, protocol::Bytes bytes);
  /// Gives the storing thread what waits as soon as it is idle; never waits for it.
  void keep_storing();
  void begin_storing();
  void store();  ///< on the storing thread
  /// Waits for the storing thread and answers its puts.
  void end_storing();
  /// Until every put that came is stored and answered.
  void finish_puts();
  void reply(const std::string& peer, const protocol::BlobReply& message,
             protocol::Bytes payload = {});
  void flush();

  const std::unique_ptr<protocol::ServerEndpoint> endpoint_;
  storage::Registry& registry_;
  const ServedFiles& files_;
  BulkCounters counters_;
  std::vector<Put> puts_;  ///< wait for the storing thread
  std::int64_t put_bytes_ = 0;
  std::vector<Put> storing_;  ///< the storing thread's from its start to its end
  std::thread storing_thread_;
  std::atomic<bool> stored_{false};
  std::map<std::string, std::deque<Reply>> outbox_;
  std::int64_t outbox_bytes_ = 0;
  std::atomic<bool> ending_{false};
  std::thread thread_;
};

}  // namespace tandem::coordinator
