// One background thread that runs closures in order: blob traffic, hashing, parsing of data sets.
// Work that needs the device posts a closure back to the device thread.
#pragma once

#include "protocol/base/bounded_queue.h"

#include <functional>
#include <thread>

namespace tandem::worker::runtime {

using Task = std::function<void()>;

class TaskThread {
 public:
  explicit TaskThread(std::size_t capacity) : queue_(capacity), thread_([this] { loop(); }) {}
  ~TaskThread() {
    queue_.close();
    thread_.join();
  }
  TaskThread(const TaskThread&) = delete;
  TaskThread& operator=(const TaskThread&) = delete;

  /// False when too much is waiting. Any thread.
  [[nodiscard]] bool post(Task task) { return queue_.try_push(std::move(task)); }

 private:
  void loop() {
    while (!queue_.closed_and_empty())
      if (auto task = queue_.pop_for(std::chrono::milliseconds(200))) (*task)();
  }
  BoundedQueue<Task> queue_;
  std::thread thread_;
};

}  // namespace tandem::worker::runtime
