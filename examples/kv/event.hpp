#pragma once
// Coroutines of one io_context wait here for something that another one of them does.

#include <asio.hpp>

namespace kv {

/// A waiter tests its condition in a loop around `wait`. As all of them run on one thread and none is suspended between
/// its test and its wait, no wake-up is lost, and no lock is needed.
class event {
 public:
  explicit event(const asio::any_io_executor& executor) : timer_(executor, asio::steady_timer::time_point::max()) {}

  asio::awaitable<void> wait() {
    std::error_code woken;  // operation_aborted: the timer never expires, it is cancelled
    co_await timer_.async_wait(asio::redirect_error(asio::use_awaitable, woken));
  }

  /// Wakes everybody who waits.
  void notify() { timer_.cancel(); }

 private:
  asio::steady_timer timer_;
};

}  // namespace kv
