#pragma once
// From many sessions to the one coroutine that holds the sending end of a channel.

#include <asio.hpp>

#include <cstddef>
#include <string_view>
#include <vector>

#include "event.hpp"
#include "message.hpp"

namespace kv {

class request_queue {
 public:
  explicit request_queue(const asio::any_io_executor& executor) : filled_(executor), drained_(executor) {}

  /// Queues one request as a whole, after waiting for room; drops it when the queue is closed.
  asio::awaitable<void> push(address from, std::string_view request) {
    while (slots_.size() >= capacity && !closed_) co_await drained_.wait();
    if (closed_) co_return;
    cut(from, request, slots_);
    filled_.notify();
  }

  /// Exchanges `batch` for everything queued, after waiting for some; false when the queue is closed.
  asio::awaitable<bool> pop_all(std::vector<slot>& batch) {
    while (slots_.empty() && !closed_) co_await filled_.wait();
    batch.clear();
    batch.swap(slots_);
    drained_.notify();
    co_return !closed_;
  }

  void close() {
    closed_ = true;
    filled_.notify();
    drained_.notify();
  }

 private:
  static constexpr std::size_t capacity = 1024;  // slots; the last request in may exceed it

  std::vector<slot> slots_;
  event filled_;
  event drained_;
  bool closed_ = false;
};

}  // namespace kv
