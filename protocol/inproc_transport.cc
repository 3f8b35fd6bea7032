#include "protocol/inproc_transport.h"

#include "protocol/base/random.h"
#include "protocol/base/str.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <set>

namespace tandem::protocol {
namespace {

struct Pending {
  Envelope envelope;
  TimeMs due_ms = 0;
};

/// One direction of one connection, or all that comes to a server.
struct Lane {
  std::deque<Pending> queue;
  std::map<std::string, std::size_t> per_peer;  // server: messages of each peer in the queue
};

struct Server {
  Lane inbox;
  std::size_t queue_max = 0;
  bool woken = false;
};

struct Client {
  std::string address, peer, user_id;
  Lane inbox;
  std::uint64_t connections = 0;
  bool connected = false, woken = false, changed = false;
};

}  // namespace

struct InprocNetwork::Hub {
  explicit Hub(const Clock& network_clock) : clock(network_clock) {}

  const Clock& clock;
  std::mutex mutex;
  std::condition_variable event;
  InprocFaults faults;
  std::uint64_t draws = 0;
  InprocCounters counters;
  std::map<std::string, Server*> servers;
  std::set<Client*> clients;
  std::set<std::pair<std::string, std::string>> cuts;

  float draw() { return random_uniform(faults.seed, 0, draws++); }
  std::uint64_t draw_below(std::uint64_t bound) {
    return random_bits(faults.seed, 1, draws++) % bound;
  }

  void push(Lane& lane, Envelope envelope) {
    Pending pending{std::move(envelope), clock.now_ms()};
    if (faults.delay_ms_max > 0 && draw() < faults.delay) {
      pending.due_ms +=
          1 + static_cast<TimeMs>(draw_below(static_cast<std::uint64_t>(faults.delay_ms_max)));
      ++counters.delayed;
    }
    auto at = lane.queue.end();
    if (!lane.queue.empty() && draw() < faults.reorder) {
      at = lane.queue.begin() + static_cast<std::ptrdiff_t>(draw_below(lane.queue.size()));
      ++counters.reordered;
    }
    ++lane.per_peer[pending.envelope.peer];
    lane.queue.insert(at, std::move(pending));
  }

  /// Lets the faults decide, then queues what arrives.
  void transmit(Lane& lane, Envelope envelope) {
    ++counters.sent;
    if (draw() < faults.drop) {
      ++counters.dropped;
    } else {
      if (draw() < faults.repeat) {
        ++counters.repeated;
        push(lane, envelope);
      }
      push(lane, std::move(envelope));
    }
    event.notify_all();
  }

  /// The first message that is due. A delayed one lets later ones pass.
  std::optional<Envelope> take(Lane& lane) {
    const TimeMs now = clock.now_ms();
    const auto it = std::find_if(lane.queue.begin(), lane.queue.end(),
                                 [&](const Pending& p) { return p.due_ms <= now; });
    if (it == lane.queue.end()) return std::nullopt;
    Envelope envelope = std::move(it->envelope);
    lane.queue.erase(it);
    if (--lane.per_peer[envelope.peer] == 0) lane.per_peer.erase(envelope.peer);
    return envelope;
  }
  bool has_due(const Lane& lane) const {
    const TimeMs now = clock.now_ms();
    return std::any_of(lane.queue.begin(), lane.queue.end(),
                       [&](const Pending& p) { return p.due_ms <= now; });
  }

  void set_connected(Client& client, bool connected) {
    if (client.connected == connected) return;
    client.connected = connected;
    client.changed = true;
    client.inbox = {};
    const auto server = servers.find(client.address);
    if (server != servers.end()) {
      Lane& inbox = server->second->inbox;
      std::erase_if(inbox.queue, [&](const Pending& p) { return p.envelope.peer == client.peer; });
      inbox.per_peer.erase(client.peer);
    }
    if (connected) ++client.connections;
    event.notify_all();
  }
  void try_connect(Client& client) {
    if (!servers.contains(client.address) || cuts.contains({client.address, client.peer})) return;
    for (Client* other : clients)  // the newest connection of a routing id takes it over
      if (other != &client && other->address == client.address && other->peer == client.peer)
        set_connected(*other, false);
    set_connected(client, true);
  }
  Client* find_client(const std::string& address, const std::string& peer) {
    for (Client* client : clients)
      if (client->connected && client->address == address && client->peer == peer) return client;
    return nullptr;
  }

  /// Waits on the hub's event until `ready` or the time-out. Delayed messages become due by the
  /// clock alone, so the wait looks again every few milliseconds.
  template <class Ready>
  void wait(std::unique_lock<std::mutex>& lock, TimeMs timeout_ms, Ready ready) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
    while (!ready() && std::chrono::steady_clock::now() < end)
      event.wait_until(
          lock, std::min(end, std::chrono::steady_clock::now() + std::chrono::milliseconds(2)));
  }
};

namespace {

using Hub = InprocNetwork::Hub;

class InprocServer final : public ServerEndpoint {
 public:
  InprocServer(std::shared_ptr<Hub> hub, std::string address, std::size_t queue_max)
      : hub_(std::move(hub)), address_(std::move(address)) {
    server.queue_max = queue_max;
  }
  ~InprocServer() override {
    std::lock_guard lock(hub_->mutex);
    for (Client* client : hub_->clients)
      if (client->address == address_) hub_->set_connected(*client, false);
    hub_->servers.erase(address_);
  }
  InprocServer(const InprocServer&) = delete;
  InprocServer& operator=(const InprocServer&) = delete;

  Status send(const std::string& peer, const Bytes& frame, const Bytes& payload) override {
    std::lock_guard lock(hub_->mutex);
    Client* client = hub_->find_client(address_, peer);
    if (client == nullptr) {
      ++counters_.unavailable;
      return unavailable_error(str("peer ", peer, " is not connected"));
    }
    if (client->inbox.queue.size() >= server.queue_max) {
      ++counters_.busy;
      return busy_error(
          str("peer ", peer, ": its queue of ", server.queue_max, " messages is full"));
    }
    ++counters_.sent;
    hub_->transmit(client->inbox, {"", "", frame, payload});
    return {};
  }
  std::optional<Envelope> receive(TimeMs timeout_ms) override {
    std::unique_lock lock(hub_->mutex);
    hub_->wait(lock, timeout_ms, [&] { return server.woken || hub_->has_due(server.inbox); });
    auto envelope = hub_->take(server.inbox);
    if (envelope.has_value()) ++counters_.received;
    if (!envelope.has_value()) server.woken = false;
    return envelope;
  }
  void wake() override {
    std::lock_guard lock(hub_->mutex);
    server.woken = true;
    hub_->event.notify_all();
  }
  [[nodiscard]] std::string address() const override { return address_; }
  [[nodiscard]] EndpointCounters counters() const override { return counters_; }

  Server server;

 private:
  const std::shared_ptr<Hub> hub_;
  const std::string address_;
  EndpointCounters counters_;
};

class InprocClient final : public ClientEndpoint {
 public:
  explicit InprocClient(std::shared_ptr<Hub> hub) : hub_(std::move(hub)) {}
  ~InprocClient() override {
    std::lock_guard lock(hub_->mutex);
    hub_->set_connected(client, false);
    hub_->clients.erase(&client);
  }
  InprocClient(const InprocClient&) = delete;
  InprocClient& operator=(const InprocClient&) = delete;

  Status send(const Bytes& frame, const Bytes& payload) override {
    std::lock_guard lock(hub_->mutex);
    const auto it = hub_->servers.find(client.address);
    if (!client.connected || it == hub_->servers.end()) {
      ++counters_.unavailable;
      return unavailable_error(str("not connected to ", client.address));
    }
    Lane& inbox = it->second->inbox;
    const auto waiting = inbox.per_peer.find(client.peer);
    if (waiting != inbox.per_peer.end() && waiting->second >= it->second->queue_max) {
      ++counters_.busy;
      return busy_error(
          str(client.address, ": the queue of ", it->second->queue_max, " messages is full"));
    }
    ++counters_.sent;
    hub_->transmit(inbox, {client.peer, client.user_id, frame, payload});
    return {};
  }
  Status send_parts(const Bytes& frame, ByteParts payload) override {
    Bytes whole;
    for (const auto& part : payload) whole.insert(whole.end(), part.begin(), part.end());
    return send(frame, whole);
  }
  std::optional<Envelope> receive(TimeMs timeout_ms) override {
    std::unique_lock lock(hub_->mutex);
    hub_->wait(lock, timeout_ms,
               [&] { return client.woken || client.changed || hub_->has_due(client.inbox); });
    auto envelope = hub_->take(client.inbox);
    if (envelope.has_value()) {
      ++counters_.received;
    } else {
      client.woken = client.changed = false;
    }
    return envelope;
  }
  void wake() override {
    std::lock_guard lock(hub_->mutex);
    client.woken = true;
    hub_->event.notify_all();
  }
  [[nodiscard]] std::uint64_t connections() const override {
    std::lock_guard lock(hub_->mutex);
    return client.connections;
  }
  [[nodiscard]] bool connected() const override {
    std::lock_guard lock(hub_->mutex);
    return client.connected;
  }
  [[nodiscard]] EndpointCounters counters() const override { return counters_; }

  Client client;

 private:
  const std::shared_ptr<Hub> hub_;
  EndpointCounters counters_;
};

class InprocPoller final : public Poller {
 public:
  explicit InprocPoller(std::shared_ptr<Hub> hub) : hub_(std::move(hub)) {}

  void add(ServerEndpoint& endpoint) override { servers_.insert(&server_of(endpoint)); }
  void add(ClientEndpoint& endpoint) override { clients_.insert(&client_of(endpoint)); }
  void remove(ServerEndpoint& endpoint) override { servers_.erase(&server_of(endpoint)); }
  void remove(ClientEndpoint& endpoint) override { clients_.erase(&client_of(endpoint)); }
  void wait(TimeMs timeout_ms) override {
    std::unique_lock lock(hub_->mutex);
    hub_->wait(lock, timeout_ms, [&] {
      const auto ready = [&](const auto* end) { return end->woken || hub_->has_due(end->inbox); };
      return woken_ || std::any_of(servers_.begin(), servers_.end(), ready) ||
             std::any_of(clients_.begin(), clients_.end(),
                         [&](const Client* c) { return c->changed || ready(c); });
    });
    woken_ = false;
    for (Server* server : servers_) server->woken = false;
    for (Client* client : clients_) client->woken = client->changed = false;
  }
  void wake() override {
    std::lock_guard lock(hub_->mutex);
    woken_ = true;
    hub_->event.notify_all();
  }

 private:
  static Server& server_of(ServerEndpoint& endpoint) {
    auto* inproc = dynamic_cast<InprocServer*>(&endpoint);
    TANDEM_CHECK(inproc != nullptr, "this poller serves endpoints of its InprocNetwork only");
    return inproc->server;
  }
  static Client& client_of(ClientEndpoint& endpoint) {
    auto* inproc = dynamic_cast<InprocClient*>(&endpoint);
    TANDEM_CHECK(inproc != nullptr, "this poller serves endpoints of its InprocNetwork only");
    return inproc->client;
  }

  const std::shared_ptr<Hub> hub_;
  std::set<Server*> servers_;
  std::set<Client*> clients_;
  bool woken_ = false;
};

}  // namespace

InprocNetwork::InprocNetwork(const Clock& clock, InprocFaults faults)
    : hub_(std::make_shared<Hub>(clock)) {
  hub_->faults = faults;
}

InprocNetwork::~InprocNetwork() = default;

Result<std::unique_ptr<ServerEndpoint>> InprocNetwork::listen(const std::string& address,
                                                              std::size_t queue_max) {
  std::lock_guard lock(hub_->mutex);
  if (hub_->servers.contains(address))
    return conflict_error(str("endpoint ", address, ": another endpoint listens there"));
  auto endpoint = std::make_unique<InprocServer>(hub_, address, queue_max);
  hub_->servers.emplace(address, &endpoint->server);
  for (Client* client : hub_->clients)
    if (client->address == address) hub_->try_connect(*client);
  return std::unique_ptr<ServerEndpoint>(std::move(endpoint));
}

std::unique_ptr<ClientEndpoint> InprocNetwork::connect(const std::string& address,
                                                       const std::string& peer,
                                                       const std::string& user_id) {
  auto endpoint = std::make_unique<InprocClient>(hub_);
  endpoint->client.address = address;
  endpoint->client.peer = peer;
  endpoint->client.user_id = user_id;
  std::lock_guard lock(hub_->mutex);
  hub_->clients.insert(&endpoint->client);
  hub_->try_connect(endpoint->client);
  return endpoint;
}

std::unique_ptr<Poller> InprocNetwork::make_poller() {
  return std::make_unique<InprocPoller>(hub_);
}

void InprocNetwork::set_faults(const InprocFaults& faults) {
  std::lock_guard lock(hub_->mutex);
  hub_->faults = faults;
}

void InprocNetwork::cut(const std::string& address, const std::string& peer) {
  std::lock_guard lock(hub_->mutex);
  hub_->cuts.emplace(address, peer);
  if (Client* client = hub_->find_client(address, peer)) hub_->set_connected(*client, false);
}

void InprocNetwork::heal(const std::string& address, const std::string& peer) {
  std::lock_guard lock(hub_->mutex);
  hub_->cuts.erase({address, peer});
  for (Client* client : hub_->clients)
    if (client->address == address && client->peer == peer && !client->connected) {
      hub_->try_connect(*client);
      return;
    }
}

InprocCounters InprocNetwork::counters() const {
  std::lock_guard lock(hub_->mutex);
  return hub_->counters;
}

}  // namespace tandem::protocol
