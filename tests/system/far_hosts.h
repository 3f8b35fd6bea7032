// Hosts for tests, on one machine: two, and a head where the coordinator and the test are, each a
// network namespace with a name of its own, on a bridge in a fourth. The bridge can fall silent
// towards a host as a cut cable or a power cut does: no link goes down, no connection is reset, no
// router says anything. One thread.
#pragma once

#include "protocol/base/str.h"

#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace tandem::test {

class FarHosts {
 public:
  static constexpr int kHosts = 2, kHead = 2;

  /// made(): whether this machine can (root, ip, unshare, bridges).
  FarHosts() : home_(::open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC)) {
    made_ = home_ >= 0 && run(str("ip netns add ", space(kBridge))) &&
            run(str("ip -n ", space(kBridge), " link add bridge type bridge")) &&
            run(str("ip -n ", space(kBridge), " link set bridge up"));
    for (int host = 0; made_ && host <= kHead; ++host) made_ = make(host);
    made_ = made_ && run(str("ip netns exec ", space(0), " unshare --uts true"));
    for (int host = 0; made_ && host <= kHead; ++host) speak(host);
  }
  ~FarHosts() {
    leave();
    if (home_ >= 0) ::close(home_);
    for (int i = 0; i <= kBridge; ++i) run(str("ip netns del ", space(i)));
  }
  FarHosts(const FarHosts&) = delete;
  FarHosts& operator=(const FarHosts&) = delete;
  [[nodiscard]] bool made() const { return made_; }

  static std::string address(int host) { return str("10.87.0.", host + 1); }
  static std::string name(int host) { return str("far", host); }
  /// What a program is started through on a host: its namespace, and its name; no ssh is there.
  static std::vector<std::string> through(int host) {
    return {"ip",
            "netns",
            "exec",
            space(host),
            "unshare",
            "--uts",
            "sh",
            "-c",
            str("hostname ", name(host),
                "; for shell in ssh rsh; do at=$(command -v $shell) && mount --bind /dev/null $at; "
                "done; exec \"$0\" \"$@\"")};
  }
  /// This thread, and what it starts from now on, is at the head; until leave().
  static bool enter() {
    const int fd = ::open(("/run/netns/" + space(kHead)).c_str(), O_RDONLY | O_CLOEXEC);
    const bool entered = fd >= 0 && ::setns(fd, CLONE_NEWNET) == 0;
    if (fd >= 0) ::close(fd);
    return entered;
  }
  void leave() const {
    if (home_ >= 0) (void)::setns(home_, CLONE_NEWNET);
  }

  /// Nothing reaches the host and nothing comes from it.
  static void silence(int host) {
    run(str("ip -n ", space(kBridge), " link set ", port(host), " nomaster"));
  }
  static void speak(int host) {
    run(str("ip -n ", space(kBridge), " link set ", port(host), " master bridge"));
  }
  /// Whether the hosts reach each other; the head reaches both.
  static void set_apart(bool apart) {
    for (int host = 0; host < kHosts; ++host)
      run(str("ip -n ", space(kBridge), " link set ", port(host), " type bridge_slave isolated ",
              apart ? "on" : "off"));
  }

 private:
  static constexpr int kBridge = 3;
  static std::string space(int i) { return str("tandem-", ::getpid(), "-", i); }
  static std::string port(int host) { return str("port", host); }
  static std::string mac(int host) { return str("02:00:00:87:00:0", host); }
  static bool run(const std::string& command) {
    return std::system((command + " 2>/dev/null").c_str()) == 0;
  }
  static bool make(int host) {
    const std::string in = str("ip -n ", space(host));
    bool made = run(str("ip netns add ", space(host))) &&
                run(str("ip link add eth0 netns ", space(host), " address ", mac(host),
                        " type veth peer name ", port(host), " netns ", space(kBridge))) &&
                run(str(in, " addr add ", address(host), "/24 dev eth0")) &&
                run(str(in, " link set lo up")) && run(str(in, " link set eth0 up")) &&
                run(str("ip -n ", space(kBridge), " link set ", port(host), " up"));
    // Known for ever, as behind a router: who asks a silent host hears nothing at all.
    for (int other = 0; made && other <= kHead; ++other)
      if (other != host)
        made = run(str(in, " neigh replace ", address(other), " lladdr ", mac(other),
                       " dev eth0 nud permanent"));
    return made;
  }

  const int home_;
  bool made_ = false;
};

}  // namespace tandem::test
