// Keeps zeros written, and on the disk, behind the last byte in use of a file that grows. A commit
// into bytes that a file has already is one write of data; into new ones it is also the file
// system's own commit and the search for memory and disk blocks (a commit of 10 MB, alone, on a
// busy virtual machine: 63 to 96 ms, 26 to 29 ms where zeros lay there).
//
// Works on a thread of its own while the file's owner is still, in short pieces with its writers
// kept out, so that no byte is ever touched that a writer may use. What it did before a crash is
// only lost effort. Stops quietly where the disk has little room.
#pragma once

#include "protocol/base/result.h"

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace tandem::storage {

class AheadWriter {
 public:
  struct Options {
    std::string path;              ///< a file that exists
    std::int64_t ahead_bytes = 0;  ///< kept behind the end
    std::int64_t bytes_max = 0;    ///< of the file
  };
  /// Calls its argument with the end of what is in use, while nobody else can write; must not when
  /// it fails.
  using WithWritersOut = std::function<Status(const std::function<Status(std::int64_t end)>&)>;

  /// `with_writers_out` is called from the thread until the destructor has returned.
  AheadWriter(Options options, WithWritersOut with_writers_out);
  ~AheadWriter();
  AheadWriter(const AheadWriter&) = delete;
  AheadWriter& operator=(const AheadWriter&) = delete;

  /// The end may have moved. Any thread; never waits for the writing.
  void moved();

 private:
  void loop();
  /// Waits until the owner is still, or has long not been. False: this ends.
  bool wait_for_quiet();
  /// One piece; false when there is no more to do.
  Result<bool> write_piece();
  Status write_zeros(std::int64_t begin, std::int64_t count) const;

  const Options options_;
  const WithWritersOut with_writers_out_;
  int fd_ = -1;
  std::int64_t written_ = 0;  ///< up to here this life has seen bytes in the file
  std::mutex mutex_;          // guards what follows
  std::condition_variable changed_;
  bool ending_ = false;
  bool moved_ = true;
  std::int64_t moved_ns_ = 0, first_moved_ns_ = 0;
  std::thread thread_;
};

}  // namespace tandem::storage
