// Operations of ours in Asio's own groups: `||`, `&&` and make_parallel_group. What is sent is in a result or still in
// its channel, whoever is first and whatever is cancelled.
#include <strait/asio.hpp>

#include <doctest/doctest.h>

#include <array>
#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/co_spawn.hpp>
#include <asio/executor_work_guard.hpp>
#include <asio/experimental/awaitable_operators.hpp>
#include <asio/experimental/parallel_group.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>
#include <asio/steady_timer.hpp>
#include <asio/strand.hpp>
#include <asio/use_awaitable.hpp>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "asio_moved.hpp"
#include "chance.hpp"

import strait;

namespace {

using message = std::uint64_t;
using optional_message = std::optional<message>;
using namespace std::chrono_literals;
using namespace asio::experimental::awaitable_operators;

const auto rethrow = [](std::exception_ptr error) {
  if (error) std::rethrow_exception(error);
};

/// A channel with messages in it.
struct filled {
  strait::sender<message> tx;
  strait::receiver<message> rx;
  explicit filled(message first, message count = 1) {
    std::tie(tx, rx) = strait::make_channel<message>({.capacity = 8});
    for (message i = 0; i < count; ++i) CHECK(tx.try_send(first + i));
  }
};

/// Runs a coroutine on a strand of a context, to its end.
void run_on_strand(asio::awaitable<void> what) {
  asio::io_context context{1};
  asio::co_spawn(asio::make_strand(context), std::move(what), rethrow);
  context.run();
}

/// The same, but what the coroutine waits for first is found ready, by a turn of the hub on another thread, while the
/// strand is still held: all of it is on its way when the first of it completes.
void run_overtaken(asio::awaitable<void> what) {
  asio::io_context context{2};
  const auto strand = asio::make_strand(context);
  asio::post(strand, [&] {
    asio::co_spawn(strand, std::move(what), rethrow);
    std::thread{[&] { context.poll(); }}.join();
  });
  context.run();
}

asio::awaitable<optional_message> next(strait::receiver<message>& rx) {
  co_return co_await rx.recv();
}
asio::awaitable<optional_message> next_suspended(strait::receiver<message>& rx) {
  co_return co_await strait::async_recv(rx, asio::use_awaitable);
}
asio::awaitable<void> never() {
  asio::steady_timer timer{co_await asio::this_coro::executor, asio::steady_timer::time_point::max()};
  co_await timer.async_wait(asio::use_awaitable);
}
asio::awaitable<void> soon() {
  asio::steady_timer timer{co_await asio::this_coro::executor, 1ms};
  co_await timer.async_wait(asio::use_awaitable);
}
asio::awaitable<void> fails() {
  co_await asio::post(asio::use_awaitable);
  throw std::runtime_error{"on purpose"};
}

}  // namespace

// ---- a || b, with an operation itself ------------------------------------------------------------------------------

TEST_CASE("a.recv() || b.recv() yields the first in a variant and leaves the other's message") {
  run_on_strand([]() -> asio::awaitable<void> {
    filled a{1};
    filled b{2};
    const auto done = co_await (a.rx.recv() || b.rx.recv());
    static_assert(std::is_same_v<decltype(done), const std::variant<optional_message, optional_message>>);
    if (done.index() == 0) {
      CHECK(std::get<0>(done) == 1);
      CHECK(b.rx.try_recv() == 2);
      CHECK(a.rx.depth() == 0);
    } else {
      CHECK(std::get<1>(done) == 2);
      CHECK(a.rx.try_recv() == 1);
      CHECK(b.rx.depth() == 0);
    }
  }());
}

TEST_CASE("a chain of || yields one variant of all, as Asio's does") {
  run_on_strand([]() -> asio::awaitable<void> {
    filled a{1, 0};
    filled b{1, 0};
    filled full{1, 8};
    auto empty = co_await (a.rx.recv() || full.tx.send(message{9}) || b.rx.recv() || soon());
    static_assert(std::is_same_v<decltype(empty),
                                 std::variant<optional_message, std::monostate, optional_message, std::monostate>>);
    CHECK(empty.index() == 3);
    CHECK(full.rx.depth() == 8);
    CHECK(b.tx.try_send(message{7}));
    empty = co_await (a.rx.recv() || full.tx.send(message{9}) || b.rx.recv() || never());
    REQUIRE(empty.index() == 2);
    CHECK(std::get<2>(empty) == 7);
    CHECK(full.rx.try_recv() == 1);
    empty = co_await (a.rx.recv() || full.tx.send(message{9}) || b.rx.recv() || never());
    CHECK(empty.index() == 1);
    // Asio's own on the left: what it yields is a variant, too.
    CHECK(a.tx.try_send(message{8}));
    const auto behind = co_await ((never() || never()) || a.rx.recv());
    static_assert(
        std::is_same_v<decltype(behind), const std::variant<std::monostate, std::monostate, optional_message>>);
    REQUIRE(behind.index() == 2);
    CHECK(std::get<2>(behind) == 8);
  }());
}

TEST_CASE("|| beside a coroutine of Asio's, on either side") {
  run_on_strand([]() -> asio::awaitable<void> {
    filled a{1, 0};
    filled b{2};
    CHECK((co_await (soon() || a.rx.recv())).index() == 0);
    CHECK((co_await (a.rx.recv() || soon())).index() == 1);
    CHECK((co_await (never() || b.rx.recv())).index() == 1);
    CHECK(b.tx.try_send(message{3}));
    const auto value = co_await (next(b.rx) || a.rx.recv());
    REQUIRE(value.index() == 0);
    CHECK(std::get<0>(value) == 3);
  }());
}

TEST_CASE("|| beside a coroutine that is done all the same: it is the one that is yielded") {
  run_on_strand([]() -> asio::awaitable<void> {
    for (int round = 0; round < 64; ++round) {
      filled a{1};
      filled b{2};
      // Both can go on at once, and the coroutine takes its message before it can be asked to give it back.
      const auto done = co_await (a.rx.recv() || next(b.rx));
      const bool first = done.index() == 0;
      CHECK((first ? std::get<0>(done) == 1 : std::get<1>(done) == 2));
      CHECK(a.rx.depth() + b.rx.depth() == 1);
      CHECK(a.rx.depth() == (first ? 0 : 1));
    }
  }());
}

TEST_CASE("the first of a || b to fail ends it") {
  run_on_strand([]() -> asio::awaitable<void> {
    filled a{1, 0};
    filled closed{1, 0};
    closed.rx.close();
    bool told = false;
    try {
      (void)co_await (a.rx.recv() || closed.tx.send(message{1}));
    } catch (const std::system_error& error) {
      told = error.code() == strait::errc::closed;
    }
    CHECK(told);
    told = false;
    try {
      (void)co_await (a.rx.recv() || fails());
    } catch (const std::runtime_error& error) {
      told = std::string{error.what()} == "on purpose";
    }
    CHECK(told);
    CHECK(a.tx.try_send(message{5}));
    CHECK(a.rx.try_recv() == 5);
  }());
}

TEST_CASE("a || b in a task, with an Asio coroutine, too") {
  asio::io_context context{1};
  bool ended = false;
  strait::spawn(context, [](bool& done) -> strait::task<> {
    filled a{1, 0};
    filled b{2};
    const auto value = co_await (a.rx.recv() || b.rx.recv());
    CHECK(value.index() == 1);
    CHECK((co_await (a.rx.recv() || soon())).index() == 1);
    done = true;
  }(ended));
  context.run();
  CHECK(ended);
}

TEST_CASE("a select whose co_spawned coroutine is cancelled yields the other") {
  run_on_strand([]() -> asio::awaitable<void> {
    filled a{1, 0};
    auto [index, result] = co_await strait::select(
        asio::co_spawn(co_await asio::this_coro::executor, next(a.rx), strait::use_op), strait::sleep_for(1ms));
    CHECK(index == 1);
    CHECK(a.tx.try_send(message{4}));
    CHECK(a.rx.try_recv() == 4);
  }());
}

// ---- Asio's groups -------------------------------------------------------------------------------------------------

TEST_CASE("what was woken and is cancelled before it was its turn takes nothing") {
  SUBCASE("make_parallel_group") {
    run_overtaken([]() -> asio::awaitable<void> {
      const auto executor = co_await asio::this_coro::executor;
      filled a{1};
      filled b{2};
      const auto [order, error_a, got_a, error_b, got_b] =
          co_await asio::experimental::make_parallel_group(
              asio::bind_executor(executor, strait::async_recv(a.rx, moved::deferred)),
              asio::bind_executor(executor, strait::async_recv(b.rx, moved::deferred)))
              .async_wait(asio::experimental::wait_for_one(), asio::use_awaitable);
      CHECK(order[0] == 0);
      CHECK_FALSE(error_a);
      CHECK(got_a == 1);
      CHECK(error_b == asio::error::operation_aborted);
      CHECK_FALSE(got_b);
      CHECK(b.rx.try_recv() == 2);
    }());
  }
  SUBCASE("||") {
    run_overtaken([]() -> asio::awaitable<void> {
      filled a{1};
      filled b{2};
      const auto done =
          co_await (strait::async_recv(a.rx, asio::use_awaitable) || strait::async_recv(b.rx, asio::use_awaitable));
      REQUIRE(done.index() == 0);
      CHECK(std::get<0>(done) == 1);
      CHECK(b.rx.try_recv() == 2);
    }());
  }
  SUBCASE("sends") {
    run_overtaken([]() -> asio::awaitable<void> {
      filled a{1, 0};
      filled b{1, 0};
      const auto done = co_await (strait::async_send(a.tx, message{1}, asio::use_awaitable) ||
                                  strait::async_send(b.tx, message{2}, asio::use_awaitable));
      CHECK(done.index() == 0);
      CHECK(a.rx.try_recv() == 1);
      CHECK(b.rx.depth() == 0);
    }());
  }
  SUBCASE("async_send_many, which sent all before: it says so") {
    run_overtaken([]() -> asio::awaitable<void> {
      const auto executor = co_await asio::this_coro::executor;
      filled a{1};
      filled b{1, 0};
      const std::array<message, 3> batch{1, 2, 3};
      const auto [order, error_a, got_a, error_b, sent] =
          co_await asio::experimental::make_parallel_group(
              asio::bind_executor(executor, strait::async_recv(a.rx, moved::deferred)),
              asio::bind_executor(executor, strait::async_send_many(b.tx, batch, moved::deferred)))
              .async_wait(asio::experimental::wait_for_one(), asio::use_awaitable);
      CHECK(got_a == 1);
      CHECK_FALSE(error_b);
      CHECK(sent == batch.size());
      CHECK(b.rx.depth() == batch.size());
    }());
  }
}

TEST_CASE("what Asio throws away between two coroutines, and what it does not, is as docs/07-asio.md says") {
  run_on_strand([]() -> asio::awaitable<void> {
    filled a{1};
    filled b{2};
    CHECK((co_await (next(a.rx) || next(b.rx))).index() == 0);
    CHECK(b.rx.depth() == 0);  // taken by a coroutine that was never suspended, and thrown away
    CHECK(a.tx.try_send(message{1}));
    CHECK(b.tx.try_send(message{2}));
    CHECK((co_await (next_suspended(a.rx) || next_suspended(b.rx))).index() == 0);
    CHECK(b.rx.try_recv() == 2);
  }());
}

TEST_CASE("a signal that is emitted when the operation is over, and its context gone, does nothing") {
  filled a{1};
  asio::cancellation_signal stop;
  bool completed = false;
  const auto receive = [&](asio::io_context& context) {
    strait::async_recv(a.rx, asio::bind_executor(asio::make_strand(context),
                                                 asio::bind_cancellation_slot(
                                                     stop.slot(), [&](std::error_code error, optional_message value) {
                                                       completed = !error && value == 1;
                                                     })));
  };
  {
    asio::io_context context{1};
    receive(context);
    context.run();
  }
  CHECK(completed);
  stop.emit(asio::cancellation_type::terminal);
  {
    asio::io_context context{1};
    receive(context);  // the context abandons it
  }
  stop.emit(asio::cancellation_type::terminal);
  CHECK(a.tx.try_send(message{2}));
  CHECK(a.rx.try_recv() == 2);
}

// ---- a storm of groups ---------------------------------------------------------------------------------------------

namespace {

/// One end's account of a channel.
struct account {
  message next = 0;
  bool ended = false;

  void took(const optional_message& value) {
    if (!value) {
      ended = true;
    } else if (*value != next) {
      throw std::runtime_error{"expected message " + std::to_string(next) + ", found " + std::to_string(*value)};
    } else {
      ++next;
    }
  }
  /// For an operation of a group: it was done, or it was cancelled.
  void took(std::error_code error, const optional_message& value) {
    if (error == asio::error::operation_aborted) {
      if (value) throw std::runtime_error{"a message beside a cancellation"};
    } else if (error) {
      throw std::system_error{error};
    } else {
      took(value);
    }
  }
  void sent(std::error_code error) {
    if (error && error != asio::error::operation_aborted) throw std::system_error{error};
    if (!error) ++next;
  }
};

struct weather {
  std::uint64_t rounds = 0;
  /// Rounds in which the timer was first.
  std::uint64_t late = 0;
};

/// Sends so many numbers through each of two channels, by one kind of group after the other. `own` gives operations of a
/// make_parallel_group an executor of their own.
template <class Own>
asio::awaitable<void> send_groups(strait::sender<message> a, strait::sender<message> b, message count, Own own,
                                  std::array<account, 2>& sent, weather& seen) {
  test::chance any{11};
  asio::steady_timer timer{co_await asio::this_coro::executor};
  while (sent[0].next < count || sent[1].next < count) {
    ++seen.rounds;
    const bool second = sent[0].next == count || (sent[1].next < count && any.below(2) == 0);
    strait::sender<message>& tx = second ? b : a;
    account& mine = sent[second ? 1 : 0];
    const bool both = sent[0].next < count && sent[1].next < count;
    timer.expires_after(any.moment());
    std::size_t done = 1;
    switch (any.below(6)) {
      case 0:
        done = (co_await (tx.send(mine.next) || timer.async_wait(asio::use_awaitable))).index();
        if (done == 0) ++mine.next;
        break;
      case 1:
        done =
            (co_await (strait::async_send(tx, mine.next, asio::use_awaitable) || timer.async_wait(asio::use_awaitable)))
                .index();
        if (done == 0) ++mine.next;
        break;
      case 2: {
        const auto [order, error, timed] =
            co_await asio::experimental::make_parallel_group(own(strait::async_send(tx, mine.next, moved::deferred)),
                                                             timer.async_wait(moved::deferred))
                .async_wait(asio::experimental::wait_for_one(), asio::use_awaitable);
        mine.sent(error);
        done = order[0];
        break;
      }
      case 3:
        if (!both) break;
        if ((co_await (a.send(sent[0].next) || b.send(sent[1].next))).index() == 0) {
          ++sent[0].next;
        } else {
          ++sent[1].next;
        }
        break;
      case 4:
        if (!both) break;
        if ((co_await (strait::async_send(a, sent[0].next, asio::use_awaitable) ||
                       strait::async_send(b, sent[1].next, asio::use_awaitable)))
                .index() == 0) {
          ++sent[0].next;
        } else {
          ++sent[1].next;
        }
        break;
      default:
        if (!both) break;
        co_await (strait::async_send(a, sent[0].next, asio::use_awaitable) &&
                  strait::async_send(b, sent[1].next, asio::use_awaitable));
        ++sent[0].next;
        ++sent[1].next;
    }
    if (done == 1) ++seen.late;
  }
}

/// Receives from two channels until both have ended, by one kind of group after the other.
template <class Own>
asio::awaitable<void> receive_groups(strait::receiver<message>& a, strait::receiver<message>& b, Own own,
                                     std::array<account, 2>& got, weather& seen) {
  using namespace asio::experimental;
  test::chance any{22};
  asio::steady_timer timer{co_await asio::this_coro::executor};
  const auto one_of_two = [&](const auto& done) {
    if (done.index() == 0) {
      got[0].took(std::get<0>(done));
    } else if (done.index() == 1) {
      got[1].took(std::get<1>(done));
    }
  };
  while (!got[0].ended || !got[1].ended) {
    ++seen.rounds;
    timer.expires_after(any.moment());
    if (got[0].ended || got[1].ended) {
      account& mine = got[got[0].ended ? 1 : 0];
      strait::receiver<message>& rx = got[0].ended ? b : a;
      const auto done = co_await (strait::async_recv(rx, asio::use_awaitable) || timer.async_wait(asio::use_awaitable));
      if (done.index() == 0) {
        mine.took(std::get<0>(done));
      } else {
        ++seen.late;
      }
      continue;
    }
    switch (any.below(9)) {
      case 0:
        one_of_two(co_await (a.recv() || b.recv()));
        break;
      case 1: {
        const auto done = co_await (a.recv() || b.recv() || timer.async_wait(asio::use_awaitable));
        if (done.index() == 2) ++seen.late;
        one_of_two(done);
        break;
      }
      case 2:  // a coroutine beside an operation: done or not, it is told
        one_of_two(co_await (a.recv() || next(b)));
        break;
      case 3:
        one_of_two(co_await (strait::async_recv(a, asio::use_awaitable) || strait::async_recv(b, asio::use_awaitable)));
        break;
      case 4: {
        const auto done =
            co_await (strait::async_recv(a, asio::use_awaitable) || timer.async_wait(asio::use_awaitable));
        if (done.index() == 0) {
          got[0].took(std::get<0>(done));
        } else {
          ++seen.late;
        }
        break;
      }
      case 5: {
        const auto [order, error_a, got_a, error_b, got_b, timed] =
            co_await make_parallel_group(own(strait::async_recv(a, moved::deferred)),
                                         own(strait::async_recv(b, moved::deferred)), timer.async_wait(moved::deferred))
                .async_wait(wait_for_one(), asio::use_awaitable);
        got[0].took(error_a, got_a);
        got[1].took(error_b, got_b);
        if (order[0] == 2) ++seen.late;
        break;
      }
      case 6: {
        const auto [order, error_a, got_a, error_b, got_b] =
            co_await make_parallel_group(own(strait::async_recv(a, moved::deferred)),
                                         own(strait::async_recv(b, moved::deferred)))
                .async_wait(wait_for_one_success(), asio::use_awaitable);
        got[0].took(error_a, got_a);
        got[1].took(error_b, got_b);
        break;
      }
      case 7: {
        if (a.depth() == 0) break;  // the sender may be waiting for room in the other
        const auto [order, error_a, got_a, timed] =
            co_await make_parallel_group(own(strait::async_recv(a, moved::deferred)), timer.async_wait(moved::deferred))
                .async_wait(wait_for_all(), asio::use_awaitable);
        got[0].took(error_a, got_a);
        break;
      }
      default: {
        if (a.depth() == 0) break;
        const auto value =
            co_await (strait::async_recv(a, asio::use_awaitable) && timer.async_wait(asio::use_awaitable));
        got[0].took(value);
      }
    }
  }
}

/// Where the operations of a make_parallel_group complete.
enum class place : std::uint8_t { one_thread, strand_of_two_threads, strand_of_its_own_context, nowhere_in_particular };

void run_storm(place where, message count) {
  auto [a_tx, a_rx] = strait::make_channel<message>({.capacity = 4});
  auto [b_tx, b_rx] = strait::make_channel<message>({.capacity = 4});
  std::array<account, 2> sent;
  std::array<account, 2> got;
  weather sending;
  weather receiving;
  std::array<std::exception_ptr, 2> failed;

  // The operations' own context, where they have one.
  asio::io_context others{1};
  auto work = asio::make_work_guard(others);
  std::thread other{[&] { others.run(); }};

  const auto run = [where](auto begin, std::exception_ptr& error) {
    asio::io_context context{where == place::strand_of_two_threads ? 2 : 1};
    const auto strand = asio::make_strand(context);
    begin(strand, [&](std::exception_ptr what) { error = what; });
    std::optional<std::jthread> second;
    if (where == place::strand_of_two_threads) second.emplace([&] { context.run(); });
    context.run();
  };
  // Calls `use` with what gives an operation its executor.
  const auto with_own = [&](const auto& strand, auto use) {
    const auto bound_to = [&](const auto& executor) {
      use([executor](auto operation) { return asio::bind_executor(executor, std::move(operation)); });
    };
    switch (where) {
      case place::one_thread:
      case place::strand_of_two_threads:
        return bound_to(strand);
      case place::strand_of_its_own_context:
        return bound_to(asio::make_strand(others));
      case place::nowhere_in_particular:
        return use([](auto operation) { return operation; });
    }
  };
  std::thread sender{[&, a = std::move(a_tx), b = std::move(b_tx)]() mutable {
    run(
        [&](const auto& strand, auto done) {
          with_own(strand, [&](auto own) {
            asio::co_spawn(strand, send_groups(std::move(a), std::move(b), count, own, sent, sending), done);
          });
        },
        failed[0]);
  }};
  run(
      [&](const auto& strand, auto done) {
        with_own(strand,
                 [&](auto own) { asio::co_spawn(strand, receive_groups(a_rx, b_rx, own, got, receiving), done); });
      },
      failed[1]);
  // Whatever went wrong at this end, the other is not to wait for it.
  a_rx.close();
  b_rx.close();
  sender.join();
  work.reset();
  other.join();
  if (failed[1]) std::rethrow_exception(failed[1]);
  if (failed[0]) std::rethrow_exception(failed[0]);
  MESSAGE(sending.rounds, " groups sent, in ", sending.late, " the timer was first; ", receiving.rounds,
          " received, in ", receiving.late, " the timer was first");
  for (std::size_t i = 0; i < 2; ++i) {
    CHECK(sent[i].next == count);
    CHECK(got[i].next == count);
  }
  // That it was a storm.
  CHECK(sending.late > sending.rounds / 100);
  CHECK(receiving.late > receiving.rounds / 100);
}

constexpr message storm_messages = 2'000;

}  // namespace

TEST_CASE("a storm of groups loses nothing and doubles nothing: in a context with one thread") {
  run_storm(place::one_thread, storm_messages);
}
TEST_CASE("a storm of groups loses nothing and doubles nothing: on a strand of a context with two threads") {
  run_storm(place::strand_of_two_threads, storm_messages);
}
TEST_CASE("a storm of groups loses nothing and doubles nothing: whose operations are in another context") {
  run_storm(place::strand_of_its_own_context, storm_messages);
}
TEST_CASE("a storm of groups loses nothing and doubles nothing: whose operations have no executor") {
  run_storm(place::nowhere_in_particular, storm_messages);
}
