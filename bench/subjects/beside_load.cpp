#include "beside_load.hpp"

#include <asio/buffer.hpp>
#include <asio/co_spawn.hpp>
#include <asio/detached.hpp>
#include <asio/local/connect_pair.hpp>
#include <asio/local/stream_protocol.hpp>
#include <asio/read.hpp>
#include <asio/redirect_error.hpp>
#include <asio/steady_timer.hpp>
#include <asio/this_coro.hpp>
#include <asio/use_awaitable.hpp>
#include <asio/write.hpp>

#include <chrono>
#include <cstdint>
#include <random>

namespace bench {
namespace {

using M = message<8>;
using std::chrono::steady_clock;
using socket = asio::local::stream_protocol::socket;

/// Between two samples. Of changing length: the context looks at its timers and sockets in some rhythm, which a fixed
/// length might be in step with.
std::chrono::nanoseconds pause(std::minstd_rand& random) {
  return std::chrono::nanoseconds{std::uniform_int_distribution<int>{150'000, 250'000}(random)};
}

asio::awaitable<void> late_timers(end& self, end::round round) {
  asio::steady_timer timer{co_await asio::this_coro::executor};
  std::minstd_rand random;
  for (std::uint64_t i = 0; i < round.warm_up + round.stamped; ++i) {
    if (i == round.warm_up) self.begin();
    timer.expires_after(pause(random));
    co_await timer.async_wait(asio::use_awaitable);
    const auto late = steady_clock::now() - timer.expiry();
    if (i >= round.warm_up) self.sample(late);
  }
  self.done();
}

/// Sends everything back until the other end closes.
asio::awaitable<void> echo(socket other) {
  M message;
  std::error_code closed;
  for (;;) {
    co_await asio::async_read(other, asio::buffer(&message, sizeof message),
                              asio::redirect_error(asio::use_awaitable, closed));
    if (closed) co_return;
    co_await asio::async_write(other, asio::buffer(&message, sizeof message), asio::use_awaitable);
  }
}

asio::awaitable<void> socket_trips(end& self, end::round round) {
  const auto executor = co_await asio::this_coro::executor;
  socket mine{executor};
  socket other{executor};
  asio::local::connect_pair(mine, other);
  asio::co_spawn(executor, echo(std::move(other)), asio::detached);
  asio::steady_timer timer{executor};
  std::minstd_rand random;
  source<M> out{direction::back};
  checker<M> in{direction::back};
  for (std::uint64_t i = 0; i < round.warm_up + round.stamped; ++i) {
    if (i == round.warm_up) self.begin();
    timer.expires_after(pause(random));
    co_await timer.async_wait(asio::use_awaitable);
    M message = out.next();
    const auto before = steady_clock::now();
    co_await asio::async_write(mine, asio::buffer(&message, sizeof message), asio::use_awaitable);
    co_await asio::async_read(mine, asio::buffer(&message, sizeof message), asio::use_awaitable);
    const auto after = steady_clock::now();
    in.take(message);
    if (i >= round.warm_up) self.sample(after - before);
  }
  self.done();
}

}  // namespace

asio::awaitable<void> probe(end& self, end::round round, const std::uint64_t& taken) {
  asio::steady_timer timer{co_await asio::this_coro::executor};
  const std::uint64_t flows = taken + 2 * load_capacity;
  while (taken < flows) {
    timer.expires_after(std::chrono::microseconds{100});
    co_await timer.async_wait(asio::use_awaitable);
  }
  co_await (self.kind() == work::timer ? late_timers(self, round) : socket_trips(self, round));
}

}  // namespace bench
