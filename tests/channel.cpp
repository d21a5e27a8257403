#include <strait/asio.hpp>

#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/co_spawn.hpp>
#include <asio/detached.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>
#include <asio/redirect_error.hpp>
#include <asio/steady_timer.hpp>
#include <asio/strand.hpp>
#include <asio/use_awaitable.hpp>
#include <asio/use_future.hpp>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <future>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "asio_moved.hpp"
#include "coroutines.hpp"
#include "ends.hpp"

import strait;

TEST_CASE("try forms") {
  auto [tx, rx] = test::make_channel<std::uint64_t>({.capacity = 4});
  for (std::uint64_t i = 0; i < 4; ++i) CHECK(tx.try_send(i));
  CHECK_FALSE(tx.try_send(std::uint64_t{9}));
  for (std::uint64_t i = 0; i < 4; ++i) CHECK(rx.try_recv() == i);
  CHECK_FALSE(rx.try_recv());
  CHECK(tx.try_send(std::uint64_t{5}));
  tx.close();
  CHECK(rx.try_recv() == 5);
  CHECK_FALSE(rx.try_recv());
  CHECK(rx.is_closed());
}

TEST_CASE("blocking across threads") {
  auto [tx, rx] = test::make_channel<std::uint64_t>({.capacity = 64});
  std::thread producer{[&tx] {
    for (std::uint64_t i = 0; i < 200'000; ++i) tx.blocking_send(i);
    tx.close();
  }};
  std::uint64_t expected = 0;
  while (auto v = rx.blocking_recv()) REQUIRE(*v == expected++);
  CHECK(expected == 200'000);
  producer.join();
}

strait::task<> produce(strait::sender<std::uint64_t> tx, std::uint64_t count) {
  for (std::uint64_t i = 0; i < count; ++i) co_await tx.send(i);
}
strait::task<> consume(strait::receiver<std::uint64_t> rx, std::uint64_t& got) {
  while (auto v = co_await rx.recv()) {
    if (*v != got) throw std::runtime_error{"out of order"};
    ++got;
  }
}

TEST_CASE("tasks on the runtime") {
  strait::runtime rt;
  auto [tx, rx] = test::make_channel<std::uint64_t>({.capacity = 64});
  std::uint64_t got = 0;
  rt.spawn(produce(std::move(tx), 200'000));
  rt.spawn(consume(std::move(rx), got));
  rt.join();
  CHECK(got == 200'000);
}

asio::awaitable<void> asio_produce(strait::sender<std::uint64_t> tx, std::uint64_t count) {
  for (std::uint64_t i = 0; i < count; ++i) co_await tx.send(i);
}
asio::awaitable<void> asio_consume(strait::receiver<std::uint64_t> rx, std::uint64_t& got) {
  while (auto v = co_await rx.recv()) {
    if (*v != got) throw std::runtime_error{"out of order"};
    ++got;
  }
}

TEST_CASE("asio::awaitable in one io_context") {
  asio::io_context context{1};
  auto [tx, rx] = test::make_channel<std::uint64_t>({.capacity = 64});
  std::uint64_t got = 0;
  asio::co_spawn(context, asio_produce(std::move(tx), 100'000), asio::detached);
  asio::co_spawn(context, asio_consume(std::move(rx), got), asio::detached);
  context.run();
  CHECK(got == 100'000);
}

TEST_CASE("posix: two ends in one process") {
  const std::string name = "posix:strait-test-two-ends-" + std::to_string(::getpid());
  auto tx = strait::open_sender<std::uint64_t>(name, {.capacity = 64});
  auto rx = strait::open_receiver<std::uint64_t>(name);
  CHECK(rx.capacity() == 64);
  std::uint64_t got = 0;
  strait::runtime rt;
  rt.spawn(produce(std::move(tx), 200'000));
  rt.spawn(consume(std::move(rx), got));
  rt.join();
  CHECK(got == 200'000);
  CHECK_THROWS_WITH((void)strait::open_receiver<std::uint64_t>(name, {.open = strait::open_mode::open}),
                    doctest::Contains("expected an existing channel"));
}

namespace {

using message = std::uint64_t;
using namespace std::chrono_literals;

const auto rethrow = [](std::exception_ptr error) {
  if (error) std::rethrow_exception(error);
};

/// Runs a task in a context of its own until nothing is left to do.
void run(strait::task<> what) {
  asio::io_context context{1};
  strait::spawn(context, std::move(what));
  context.run();
}

/// The code of the system_error that `what` throws.
template <class Operation>
std::error_code code_of(Operation what) {
  try {
    what();
  } catch (const std::system_error& error) {
    return error.code();
  }
  return {};
}

}  // namespace

// ---- coroutines of every kind
// ------------------------------------------------------------------------------------------

TEST_CASE("a ready await does not suspend: in a task") {
  asio::io_context context{1};
  bool others_ran = false;
  message done = 0;
  strait::spawn(context, [](asio::io_context& own, bool& flag, message& count) -> strait::task<> {
    auto [tx, rx] = test::make_channel<message>({.capacity = 16});
    asio::post(own, [&] { flag = true; });
    for (; count < 1'000; ++count) {  // fewer than the budget
      co_await tx.send(count);
      const auto got = co_await rx.recv();
      if (got != count) throw std::runtime_error{"wrong message"};
      if (flag) throw std::runtime_error{"suspended"};
    }
  }(context, others_ran, done));
  context.run();
  CHECK(done == 1'000);
  CHECK(others_ran);
}

TEST_CASE("a ready await does not suspend: in an asio::awaitable, of any executor") {
  asio::io_context context{1};
  bool others_ran = false;
  message done = 0;
  SUBCASE("the default") {
    asio::co_spawn(
        context,
        [](asio::io_context& own, bool& flag, message& count) -> asio::awaitable<void> {
          auto [tx, rx] = test::make_channel<message>({.capacity = 16});
          asio::post(own, [&] { flag = true; });
          for (; count < 1'000; ++count) {
            co_await tx.send(count);
            const auto got = co_await rx.recv();
            if (got != count) throw std::runtime_error{"wrong message"};
            if (flag) throw std::runtime_error{"suspended"};
          }
        }(context, others_ran, done),
        rethrow);
  }
  SUBCASE("an io_context's") {
    using executor = asio::io_context::executor_type;
    asio::co_spawn(
        context.get_executor(),
        [](asio::io_context& own, bool& flag, message& count) -> asio::awaitable<void, executor> {
          auto [tx, rx] = test::make_channel<message>({.capacity = 16});
          asio::post(own, [&] { flag = true; });
          for (; count < 1'000; ++count) {
            co_await strait::rebind_executor<executor>(tx.send(count));
            const auto got = co_await strait::rebind_executor<executor>(rx.recv());
            if (got != count) throw std::runtime_error{"wrong message"};
            if (flag) throw std::runtime_error{"suspended"};
          }
        }(context, others_ran, done),
        rethrow);
  }
  context.run();
  CHECK(done == 1'000);
  CHECK(others_ran);
}

TEST_CASE("awaitables of other executors wait as well") {
  asio::io_context context{1};
  auto [tx, rx] = test::make_channel<message>({.capacity = 2});
  message got = 0;
  using plain = asio::io_context::executor_type;
  using strand = asio::strand<asio::io_context::executor_type>;
  asio::co_spawn(
      context.get_executor(),
      [](strait::sender<message> own) -> asio::awaitable<void, plain> {
        for (message i = 0; i < 5'000; ++i) co_await strait::rebind_executor<plain>(own.send(i));
      }(std::move(tx)),
      rethrow);
  asio::co_spawn(
      asio::make_strand(context.get_executor()),
      [](strait::receiver<message> own, message& next) -> asio::awaitable<void, strand> {
        while (const auto value = co_await strait::rebind_executor<strand>(own.recv())) {
          if (*value != next++) throw std::runtime_error{"out of order"};
        }
      }(std::move(rx), got),
      rethrow);
  context.run();
  CHECK(got == 5'000);
}

namespace {

bare_coroutine bare_consume(strait::receiver<message> rx, std::atomic<message>& got, bool& done) {
  while (const auto value = co_await rx.recv()) got += *value;
  done = true;
}
bare_coroutine bare_produce(strait::sender<message> tx, message count) {
  for (message i = 1; i <= count; ++i) co_await tx.send(i);
}

}  // namespace

TEST_CASE("a coroutine that knows neither Asio nor strait waits in the hub in whose turn it runs") {
  auto [tx, rx] = test::make_channel<message>({.capacity = 4});
  std::atomic<message> got{0};
  bool done = false;
  SUBCASE("begun by a task") {
    run([](strait::sender<message> out, strait::receiver<message> in, std::atomic<message>& sum,
           bool& end) -> strait::task<> {
      bare_consume(std::move(in), sum, end);
      bare_produce(std::move(out), 3'000);
      co_return;
    }(std::move(tx), std::move(rx), got, done));
  }
  SUBCASE("begun on a worker of a runtime") {
    strait::runtime rt{{.cpus = std::vector<unsigned>{strait::topology::machine().cpus().front().id}}};
    std::promise<void> begun;
    asio::post(strait::executor(rt.node(0)), [&] {
      bare_consume(std::move(rx), got, done);
      bare_produce(std::move(tx), 3'000);
      begun.set_value();
    });
    begun.get_future().wait();
    REQUIRE(eventually([&] { return got == 3'000 * 3'001 / 2; }));
    rt.stop();
    rt.join();
  }
  CHECK(got == 3'000 * 3'001 / 2);
  CHECK(done);
}

TEST_CASE("where there is no hub, what is ready goes on and what has to wait fails with no_hub") {
  auto [tx, rx] = test::make_channel<message>({.capacity = 2});
  message rounds = 0;
  std::error_code receiving;
  std::error_code sending;
  [](strait::sender<message>& out, strait::receiver<message>& in, message& count, std::error_code& recv_error,
     std::error_code& send_error) -> bare_coroutine {
    for (; count < 5'000; ++count) {  // more than the budget
      co_await out.send(count);
      (void)co_await in.recv();
    }
    try {
      (void)co_await in.recv();
    } catch (const std::system_error& error) {
      recv_error = error.code();
    }
    co_await out.send(1);
    co_await out.send(2);
    try {
      co_await out.send(3);
    } catch (const std::system_error& error) {
      send_error = error.code();
    }
  }(tx, rx, rounds, receiving, sending);
  CHECK(rounds == 5'000);
  CHECK(receiving == strait::errc::no_hub);
  CHECK(sending == strait::errc::no_hub);
  // Nothing was sent or taken by those that failed.
  CHECK(rx.try_recv() == 1);
  CHECK(rx.try_recv() == 2);
  CHECK_FALSE(rx.try_recv());
}

TEST_CASE("a task that is awaited where there is no hub fails in the same way") {
  auto [tx, rx] = test::make_channel<message>();
  std::error_code failed;
  [](strait::receiver<message>& in, std::error_code& error) -> bare_coroutine {
    try {
      co_await [](strait::receiver<message>& from) -> strait::task<> { (void)co_await from.recv(); }(in);
    } catch (const std::system_error& caught) {
      error = caught.code();
    }
  }(rx, failed);
  CHECK(failed == strait::errc::no_hub);
}

// ---- how errors are told
// -----------------------------------------------------------------------------------------------

TEST_CASE("the receiver closes: every form of a send says closed") {
  auto [tx, rx] = test::make_channel<message>({.capacity = 4});
  CHECK(tx.try_send(message{1}));
  rx.close();
  CHECK(tx.is_closed());
  std::error_code error;
  CHECK(code_of([&] { (void)tx.try_send(message{2}); }) == strait::errc::closed);
  CHECK_FALSE(tx.try_send(message{2}, error));
  CHECK(error == strait::errc::closed);
  CHECK(code_of([&] { tx.blocking_send(2); }) == strait::errc::closed);
  error.clear();
  tx.blocking_send(2, error);
  CHECK(error == strait::errc::closed);
  int told = 0;
  asio::io_context context{1};
  strait::async_send(tx, message{2}, asio::bind_executor(context, [&](std::error_code e) {
                       CHECK(e == strait::errc::closed);
                       ++told;
                     }));
  context.run();
  run([](strait::sender<message>& out, int& count) -> strait::task<> {
    std::error_code code;
    co_await out.send(2, code);
    count += code == strait::errc::closed;
    const std::array<message, 3> batch{};
    code.clear();
    const std::size_t sent = co_await out.send_many(batch, code);
    count += code == strait::errc::closed && sent == 0;
    code.clear();
    const auto room = co_await out.reserve(2, code);
    count += code == strait::errc::closed && room.messages().empty();
    try {
      co_await out.send(2);
    } catch (const std::system_error& caught) {
      count += caught.code() == strait::errc::closed;
    }
  }(tx, told));
  CHECK(told == 5);
}

TEST_CASE("the sender closes: what it sent is delivered, then every form of a receive is empty without an error") {
  auto [tx, rx] = test::make_channel<message>({.capacity = 4});
  CHECK(tx.try_send(message{1}));
  tx.close();
  CHECK_FALSE(rx.is_closed());
  CHECK(rx.try_recv() == 1);
  CHECK(rx.is_closed());
  std::error_code error = std::make_error_code(std::errc::io_error);
  CHECK_FALSE(rx.try_recv(error));
  CHECK_FALSE(error);
  error = std::make_error_code(std::errc::io_error);
  CHECK_FALSE(rx.blocking_recv(error));
  CHECK_FALSE(error);
  CHECK_FALSE(rx.blocking_recv());
  int told = 0;
  asio::io_context context{1};
  strait::async_recv(rx, asio::bind_executor(context, [&](std::error_code e, std::optional<message> value) {
                       CHECK_FALSE(e);
                       CHECK_FALSE(value);
                       ++told;
                     }));
  context.run();
  run([](strait::receiver<message>& in, int& count) -> strait::task<> {
    std::error_code code = std::make_error_code(std::errc::io_error);
    const auto value = co_await in.recv(code);
    count += !value && !code;
    std::array<message, 3> batch{};
    const std::size_t n = co_await in.recv_many(batch);
    count += n == 0;
    const auto seen = co_await in.peek();
    count += seen.empty();
  }(rx, told));
  CHECK(told == 4);
}

TEST_CASE("handles that closed or were moved from say so in every form") {
  strait::sender<message> tx;
  strait::receiver<message> rx;
  CHECK(tx.is_closed());
  CHECK(rx.is_closed());
  CHECK(tx.depth() == 0);
  CHECK(rx.depth() == 0);
  CHECK(tx.capacity() == 0);
  CHECK(code_of([&] { (void)tx.try_send(message{1}); }) == strait::errc::closed);
  CHECK(code_of([&] { tx.blocking_send(1); }) == strait::errc::closed);
  CHECK_FALSE(rx.try_recv());
  CHECK_FALSE(rx.blocking_recv());
  auto [other_tx, other_rx] = test::make_channel<message>();
  tx = std::move(other_tx);
  rx = std::move(other_rx);
  CHECK(code_of([&] { (void)other_tx.try_send(message{1}); }) == strait::errc::closed);
  CHECK(tx.try_send(message{1}));
  CHECK(rx.try_recv() == 1);
  int told = 0;
  run([](strait::sender<message>& out, strait::receiver<message>& in, int& count) -> strait::task<> {
    std::error_code code;
    co_await out.send(1, code);
    count += code == strait::errc::closed;
    const auto value = co_await in.recv();
    count += !value;
  }(other_tx, other_rx, told));
  CHECK(told == 2);
}

TEST_CASE("recv(ec) and its kin never throw, not even when they are cancelled") {
  asio::io_context context{1};
  auto [tx, rx] = test::make_channel<message>({.capacity = 2});
  std::vector<std::error_code> told;
  asio::cancellation_signal stop;
  asio::co_spawn(
      context,
      [](strait::sender<message>& out, strait::receiver<message>& in,
         std::vector<std::error_code>& codes) -> asio::awaitable<void> {
        // What comes after the first cancellation would otherwise not be awaited at all.
        co_await asio::this_coro::throw_if_cancelled(false);
        co_await asio::this_coro::reset_cancellation_state(asio::enable_total_cancellation());
        std::error_code code;
        const auto value = co_await in.recv(code);
        if (!value) codes.push_back(code);
        const auto seen = co_await in.peek(code);
        if (seen.empty()) codes.push_back(code);
        const std::array<message, 3> batch{7, 8, 9};
        const std::size_t sent = co_await out.send_many(batch, code);
        if (sent == 2) codes.push_back(code);
        co_await out.send(1, code);
        codes.push_back(code);
      }(tx, rx, told),
      asio::bind_cancellation_slot(stop.slot(), rethrow));
  while (told.size() < 4) {
    stop.emit(asio::cancellation_type::total);
    context.run_one();
  }
  context.run();
  for (const std::error_code code : told) CHECK(code == asio::error::operation_aborted);
  CHECK(rx.try_recv() == 7);
  CHECK(rx.try_recv() == 8);
  CHECK_FALSE(rx.try_recv());
}

// ---- completion tokens
// -------------------------------------------------------------------------------------------------

TEST_CASE("async_send and async_recv take every completion token") {
  asio::io_context context{1};
  auto [tx, rx] = test::make_channel<message>({.capacity = 1});
  int steps = 0;

  SUBCASE("callbacks") {
    strait::async_recv(rx, asio::bind_executor(context, [&](std::error_code error, std::optional<message> value) {
                         CHECK_FALSE(error);
                         CHECK(value == 5);
                         ++steps;
                       }));
    strait::async_send(tx, message{5}, asio::bind_executor(context, [&](std::error_code error) {
                         CHECK_FALSE(error);
                         ++steps;
                       }));
    CHECK(steps == 0);  // never from within the initiating function
    context.run();
    CHECK(steps == 2);
  }
  SUBCASE("use_awaitable, and its adapters") {
    asio::co_spawn(
        context,
        [](strait::sender<message>& out, strait::receiver<message>& in, int& count) -> asio::awaitable<void> {
          co_await strait::async_send(out, message{1}, asio::use_awaitable);
          auto value = co_await strait::async_recv(in, asio::use_awaitable);
          count += value == 1;
          co_await strait::async_send(out, 2, asio::use_awaitable);  // converted
          std::error_code error = std::make_error_code(std::errc::io_error);
          value = co_await strait::async_recv(in, asio::redirect_error(asio::use_awaitable, error));
          count += value == 2 && !error;
          const auto [sent] = co_await strait::async_send(out, message{3}, moved::as_tuple(asio::use_awaitable));
          const auto [received, third] = co_await strait::async_recv(in, moved::as_tuple(asio::use_awaitable));
          count += !sent && !received && third == 3;
          out.close();
          value = co_await strait::async_recv(in, asio::use_awaitable);
          count += !value;
        }(tx, rx, steps),
        rethrow);
    context.run();
    CHECK(steps == 4);
  }
  SUBCASE("use_future") {
    std::future<std::optional<message>> received = strait::async_recv(rx, asio::use_future);
    std::future<void> sent = strait::async_send(tx, message{6}, asio::use_future);
    sent.get();
    CHECK(received.get() == 6);
    std::future<std::optional<message>> ended = strait::async_recv(rx, asio::use_future);
    tx.close();
    CHECK_FALSE(ended.get());
    rx.close();
    std::future<void> refused = strait::async_send(tx, message{7}, asio::use_future);
    CHECK(code_of([&] { refused.get(); }) == strait::errc::closed);
  }
  SUBCASE("deferred: nothing happens before it is called") {
    auto receive = strait::async_recv(rx, moved::deferred);
    auto send = strait::async_send(tx, message{8}, moved::deferred);
    context.run();
    CHECK(rx.depth() == 0);
    std::move(send)(asio::bind_executor(context, [&](std::error_code error) {
      CHECK_FALSE(error);
      ++steps;
    }));
    std::move(receive)(asio::bind_executor(context, [&](std::error_code, std::optional<message> value) {
      CHECK(value == 8);
      ++steps;
    }));
    context.restart();
    context.run();
    CHECK(steps == 2);
  }
  SUBCASE("without an executor: Asio's system executor") {
    std::promise<message> received;
    std::thread::id where;
    strait::async_recv(rx, [&](std::error_code, std::optional<message> value) {
      where = std::this_thread::get_id();
      received.set_value(value.value_or(0));
    });
    tx.blocking_send(9);
    CHECK(received.get_future().get() == 9);
    CHECK(where != std::this_thread::get_id());
  }
  SUBCASE("the executor that a handler is bound to is where it runs, and whose hub waits") {
    asio::io_context other{1};
    const auto strand = asio::make_strand(other);
    strait::async_recv(rx, asio::bind_executor(strand, [&](std::error_code, std::optional<message> value) {
                         CHECK(value == 10);
                         CHECK(strand.running_in_this_thread());
                         ++steps;
                       }));
    CHECK(tx.try_send(message{10}));
    CHECK(context.run() == 0);
    other.run();
    CHECK(steps == 1);
  }
  SUBCASE("a handler that can only be moved") {
    strait::async_recv(rx, asio::bind_executor(context, [&, own = std::make_unique<int>(1)](
                                                            std::error_code, std::optional<message> value) {
                         CHECK(value == 11);
                         steps += *own;
                       }));
    CHECK(tx.try_send(message{11}));
    context.run();
    CHECK(steps == 1);
  }
}

TEST_CASE("an operation is begun again from within its own handler") {
  asio::io_context context{1};
  auto [tx, rx] = test::make_channel<message>({.capacity = 4});
  message received = 0;
  message sent = 0;
  std::function<void()> receive = [&] {
    strait::async_recv(rx, asio::bind_executor(context, [&](std::error_code error, std::optional<message> value) {
                         CHECK_FALSE(error);
                         if (!value) return;
                         REQUIRE(*value == received++);
                         receive();
                       }));
  };
  std::function<void()> send = [&] {
    strait::async_send(tx, sent, asio::bind_executor(context, [&](std::error_code error) {
                         CHECK_FALSE(error);
                         if (++sent == 10'000) {
                           tx.close();
                         } else {
                           send();
                         }
                       }));
  };
  receive();
  send();
  context.run();
  CHECK(received == 10'000);
}

TEST_CASE("a cancelled operation took nothing and sent nothing") {
  asio::io_context context{1};
  auto [tx, rx] = test::make_channel<message>({.capacity = 1});
  asio::cancellation_signal stop;
  std::vector<std::error_code> told;
  strait::async_recv(
      rx, asio::bind_executor(context, asio::bind_cancellation_slot(
                                           stop.slot(), [&](std::error_code error, std::optional<message> value) {
                                             CHECK_FALSE(value);
                                             told.push_back(error);
                                           })));
  context.poll();
  stop.emit(asio::cancellation_type::none);
  context.poll();
  CHECK(told.empty());
  stop.emit(asio::cancellation_type::terminal);
  CHECK(tx.try_send(message{1}));  // too late for it
  context.restart();
  context.run();
  REQUIRE(told.size() == 1);
  strait::async_send(tx, message{2},
                     asio::bind_executor(context, asio::bind_cancellation_slot(stop.slot(), [&](std::error_code error) {
                                           told.push_back(error);
                                         })));
  context.restart();
  context.poll();
  stop.emit(asio::cancellation_type::partial);
  CHECK(rx.try_recv() == 1);
  context.restart();
  context.run();
  REQUIRE(told.size() == 2);
  for (const std::error_code code : told) CHECK(code == asio::error::operation_aborted);
  CHECK_FALSE(rx.try_recv());
  // The signal can be used on.
  stop.emit(asio::cancellation_type::total);
}

// ---- batches
// -----------------------------------------------------------------------------------------------------------

TEST_CASE("send_many and recv_many: every batch size across the wrap") {
  for (const std::size_t capacity : {1U, 2U, 8U, 16U}) {
    for (std::size_t size = 1; size <= 2 * capacity + 1; ++size) {
      auto [tx, rx] = test::make_channel<message>({.capacity = capacity});
      message expected = 0;
      const message count = 40 * size;
      asio::io_context context{1};
      strait::spawn(context, [](strait::sender<message> out, std::size_t n, message total) -> strait::task<> {
        std::vector<message> batch(n);
        for (message first = 0; first < total; first += n) {
          std::iota(batch.begin(), batch.end(), first);
          const std::size_t sent = co_await out.send_many(batch);
          if (sent != n) throw std::runtime_error{"sent in part"};
        }
      }(std::move(tx), size, count));
      strait::spawn(context, [](strait::receiver<message> in, message& next) -> strait::task<> {
        std::array<message, 3> batch{};
        while (const std::size_t n = co_await in.recv_many(batch)) {
          for (std::size_t i = 0; i < n; ++i) {
            if (batch[i] != next++) throw std::runtime_error{"out of order"};
          }
        }
      }(std::move(rx), expected));
      context.run();
      CHECK(expected == count);
    }
  }
}

TEST_CASE("batches and single messages mixed") {
  auto [tx, rx] = test::make_channel<message>({.capacity = 8});
  message sent = 0;
  message expected = 0;
  asio::io_context context{1};
  constexpr message count = 6'000;
  strait::spawn(context, [](strait::sender<message> out, message& next) -> strait::task<> {
    while (next < count) {
      switch (next % 7) {
        case 0:
          co_await out.send(next++);
          break;
        case 1: {
          const std::array<message, 1> one{next++};
          (void)co_await out.send_many(one);
          break;
        }
        case 2: {
          auto room = co_await out.reserve(5);
          for (message& place : room.messages()) place = next++;
          room.commit();
          break;
        }
        default: {
          const std::array<message, 3> three{next, next + 1, next + 2};
          next += co_await out.send_many(three);
        }
      }
    }
  }(std::move(tx), sent));
  strait::spawn(context, [](strait::receiver<message> in, message& next) -> strait::task<> {
    for (;;) {
      std::array<message, 4> batch{};
      std::size_t n = 0;
      if (next % 5 == 0) {
        const auto one = co_await in.recv();
        if (one) batch[n++] = *one;
      } else if (next % 5 < 3) {
        const auto seen = co_await in.peek();
        n = std::min<std::size_t>(seen.size(), 2);
        for (std::size_t i = 0; i < n; ++i) batch[i] = seen[i];
        in.release(n);
      } else {
        n = co_await in.recv_many(batch);
      }
      if (n == 0) break;
      for (std::size_t i = 0; i < n; ++i) {
        if (batch[i] != next++) throw std::runtime_error{"out of order"};
      }
    }
  }(std::move(rx), expected));
  context.run();
  CHECK(sent >= count);
  CHECK(expected == sent);
}

namespace {

/// Sends and receives in every form, in an order that `random` chooses, so that no operation has to wait; and checks each
/// message.
strait::task<> every_form(strait::sender<std::uint64_t>& tx, strait::receiver<std::uint64_t>& rx,
                          std::minstd_rand random, int steps, std::uint64_t& passed) {
  std::uint64_t sent = 0;
  std::uint64_t taken = 0;
  const auto upto = [&random](std::uint64_t most) { return 1 + random() % most; };
  std::vector<std::uint64_t> many(tx.capacity());
  for (int step = 0; step < steps; ++step) {
    const std::uint64_t there = sent - taken;
    // What is released late may leave less room than was taken.
    if (random() % 2 == 0 && tx.depth() < tx.capacity()) {
      const std::uint64_t room = tx.capacity() - tx.depth();
      switch (random() % 5) {
        case 0:
          for (std::uint64_t n = upto(room); n > 0; --n) co_await tx.send(sent++);
          break;
        case 1:
          CHECK(tx.try_send(sent++));
          break;
        case 2: {
          const std::uint64_t n = upto(room);
          for (std::uint64_t i = 0; i < n; ++i) many[i] = sent++;
          const std::size_t done = co_await tx.send_many(std::span{many}.first(n));
          CHECK(done == n);
          break;
        }
        case 3: {
          std::error_code error = std::make_error_code(std::errc::io_error);
          co_await tx.send(sent++, error);
          CHECK(!error);
          break;
        }
        default: {
          auto permit = co_await tx.reserve(upto(room));
          for (std::uint64_t& each : permit.messages()) each = sent++;
          permit.commit();
          break;
        }
      }
    } else if (there > 0) {
      switch (random() % 5) {
        case 0:
          for (std::uint64_t n = upto(there); n > 0; --n) {
            const auto message = co_await rx.recv();
            CHECK(message == taken++);
          }
          break;
        case 1:
          CHECK(rx.try_recv() == taken++);
          break;
        case 2: {
          const std::size_t n = co_await rx.recv_many(std::span{many}.first(upto(there)));
          for (std::size_t i = 0; i < n; ++i) CHECK(many[i] == taken++);
          break;
        }
        case 3: {
          std::error_code error = std::make_error_code(std::errc::io_error);
          const auto message = co_await rx.recv(error);
          CHECK(!error);
          CHECK(message == taken++);
          break;
        }
        default: {
          const std::span<const std::uint64_t> seen = co_await rx.peek();
          const std::uint64_t n = upto(seen.size());
          for (const std::uint64_t each : seen.first(n)) CHECK(each == taken++);
          rx.release(n);
          break;
        }
      }
    }
  }
  while (taken < sent) CHECK(co_await rx.recv() == taken++);
  passed = taken;
}

}  // namespace

TEST_CASE("every form beside every other, in lanes of every size: each message once, in order") {
  for (const std::size_t capacity : {1U, 2U, 8U, 16U, 64U, 1024U, 4096U}) {
    asio::io_context context{1};
    auto [tx, rx] = test::make_channel<std::uint64_t>({.capacity = capacity});
    std::uint64_t passed = 0;
    strait::spawn(context, every_form(tx, rx, std::minstd_rand{static_cast<unsigned>(capacity)}, 2000, passed));
    context.run();
    CHECK(passed > 200);
    CHECK(tx.depth() <= capacity / 8);
  }
}

TEST_CASE("a peer that closes between two awaited operations is seen by the second, however ready that is") {
  asio::io_context context{1};
  strait::spawn(context, []() -> strait::task<> {
    auto [tx, rx] = test::make_channel<std::uint64_t>({.capacity = 64});
    for (std::uint64_t i = 0; i < 10; ++i) co_await tx.send(i);
    // Three are known to be there and taken at once, then the sender closes.
    for (std::uint64_t i = 0; i < 3; ++i) CHECK(co_await rx.recv() == i);
    tx.close();
    for (std::uint64_t i = 3; i < 10; ++i) CHECK(co_await rx.recv() == i);
    const auto end = co_await rx.recv();
    CHECK(!end);
  }());
  strait::spawn(context, []() -> strait::task<> {
    auto [tx, rx] = test::make_channel<std::uint64_t>({.capacity = 64});
    for (std::uint64_t i = 0; i < 3; ++i) co_await tx.send(i);  // and 61 more are known to have room
    rx.close();
    std::error_code why;
    try {
      co_await tx.send(std::uint64_t{3});
    } catch (const std::system_error& error) {
      why = error.code();
    }
    CHECK(why == strait::errc::closed);
    CHECK(tx.is_closed());
  }());
  context.run();
}

TEST_CASE("a permit: filled in place, committed in part, or dropped as if nothing had been") {
  auto [tx, rx] = test::make_channel<message>({.capacity = 4});
  run([](strait::sender<message>& out) -> strait::task<> {
    {
      auto dropped = co_await out.reserve(3);
      if (dropped.messages().size() != 3) throw std::runtime_error{"room for three was there"};
      for (message& place : dropped.messages()) place = 99;
    }
    auto room = co_await out.reserve(3);
    room.messages()[0] = 1;
    room.messages()[1] = 2;
    room.commit(2);
    room.commit();  // a second time: nothing
    // Two are free, and lie before the wrap; more than there is was asked for.
    auto rest = co_await out.reserve(100);
    if (rest.messages().size() != 2) throw std::runtime_error{"two were free"};
    rest.messages()[0] = 3;
    auto moved = std::move(rest);
    moved.commit(1);
  }(tx));
  CHECK(rx.depth() == 3);
  for (message i = 1; i <= 3; ++i) CHECK(rx.try_recv() == i);
  CHECK_FALSE(rx.try_recv());
}

TEST_CASE("a permit ends at the wrap: there is no gap in a span") {
  auto [tx, rx] = test::make_channel<message>({.capacity = 4});
  for (message i = 0; i < 3; ++i) CHECK(tx.try_send(i));
  for (message i = 0; i < 3; ++i) CHECK(rx.try_recv() == i);
  CHECK_FALSE(rx.try_recv());  // an empty lane is released
  run([](strait::sender<message>& out) -> strait::task<> {
    for (const std::size_t expected : {1U, 3U}) {
      auto room = co_await out.reserve(4);
      if (room.messages().size() != expected) throw std::runtime_error{"not up to the wrap"};
      for (message& place : room.messages()) place = 7;
      room.commit();
    }
  }(tx));
  CHECK(rx.depth() == 4);
}

TEST_CASE("peek shows without taking; release takes what was seen") {
  auto [tx, rx] = test::make_channel<message>({.capacity = 4});
  for (message i = 0; i < 4; ++i) CHECK(tx.try_send(i));
  run([](strait::receiver<message>& in) -> strait::task<> {
    const auto seen = co_await in.peek();
    if (seen.size() != 4 || seen[3] != 3) throw std::runtime_error{"four were there"};
    const auto again = co_await in.peek();
    if (again.data() != seen.data()) throw std::runtime_error{"something was taken"};
    in.release(3);
    const auto last = co_await in.peek();
    if (last.size() != 1 || last[0] != 3) throw std::runtime_error{"one was left"};
    in.release(100);  // all that are known
  }(rx));
  CHECK(rx.depth() == 0);
  CHECK(tx.try_send(message{4}));
  CHECK(rx.try_recv() == 4);
}

TEST_CASE("a lane of one slot, in every form") {
  auto [tx, rx] = test::make_channel<message>({.capacity = 1});
  CHECK(tx.capacity() == 1);
  CHECK(tx.try_send(message{1}));
  CHECK_FALSE(tx.try_send(message{2}));
  CHECK(rx.try_recv() == 1);
  CHECK_FALSE(rx.try_recv());
  message got = 0;
  std::thread consumer{[&] {
    while (const auto value = rx.blocking_recv()) got += *value;
  }};
  message sum = 0;
  for (message i = 0; i < 2'000; ++i) {
    tx.blocking_send(i);
    sum += i;
  }
  tx.close();
  consumer.join();
  CHECK(got == sum);
}

// ---- threads
// -------------------------------------------------------------------------------------------------------------

TEST_CASE("a deadline that passes: nothing was sent, nothing was taken") {
  for (const auto wait : {strait::wait_policy::adaptive, strait::wait_policy::busy, strait::wait_policy::park}) {
    auto [tx, rx] = test::make_channel<message>({.capacity = 1, .wait = wait});
    const auto soon = [] { return std::chrono::steady_clock::now() + 2ms; };
    const auto past = std::chrono::steady_clock::now() - 1s;
    std::error_code error;
    for (const auto& when : {soon(), past}) {
      CHECK(code_of([&] { (void)rx.blocking_recv_until(when); }) == std::errc::timed_out);
      CHECK_FALSE(rx.blocking_recv_until(when, error));
      CHECK(error == std::errc::timed_out);
    }
    // What is there is taken, however late it is; so is room.
    CHECK(tx.blocking_send_until(1, past));
    for (const auto& when : {soon(), past}) {
      CHECK_FALSE(tx.blocking_send_until(2, when));
      CHECK_FALSE(tx.blocking_send_until(2, when, error));
      CHECK(error == std::errc::timed_out);
    }
    CHECK(rx.blocking_recv_until(past, error) == 1);
    CHECK_FALSE(error);
    CHECK(rx.depth() == 0);
    CHECK(tx.blocking_send_until(3, soon(), error));
    CHECK_FALSE(error);
    CHECK(rx.try_recv() == 3);
  }
}

TEST_CASE("a busy end never parks, even with a longest spin of nothing") {
  watched_channel<message> channel{{.wait = strait::wait_policy::busy, .longest_spin = 0ns}};
  std::atomic<bool> seen_parked{false};
  std::atomic<bool> done{false};
  std::thread watcher{[&] {
    while (!done) {
      if (parked(*channel.receiver_word)) seen_parked = true;
    }
  }};
  CHECK(code_of([&] { (void)channel.rx.blocking_recv_until(std::chrono::steady_clock::now() + 5ms); }) ==
        std::errc::timed_out);
  done = true;
  watcher.join();
  CHECK_FALSE(seen_parked);
}

TEST_CASE("a parked thread is woken: by a message, by room, by a close") {
  watched_channel<message> channel{{.capacity = 1, .wait = strait::wait_policy::park}};
  std::optional<message> first;
  std::optional<message> last;
  std::thread receiver{[&] {
    first = channel.rx.blocking_recv();
    last = channel.rx.blocking_recv();
  }};
  REQUIRE(eventually([&] { return parked(*channel.receiver_word); }));
  channel.tx.blocking_send(1);
  REQUIRE(eventually([&] { return channel.tx.depth() == 0 && parked(*channel.receiver_word); }));
  channel.tx.close();
  receiver.join();
  CHECK(first == 1);
  CHECK_FALSE(last);

  watched_channel<message> full{{.capacity = 1, .wait = strait::wait_policy::park}};
  CHECK(full.tx.try_send(message{1}));
  std::error_code ended;
  std::thread sender{[&] {
    full.tx.blocking_send(2);
    full.tx.blocking_send(3, ended);
  }};
  REQUIRE(eventually([&] { return parked(*full.sender_word); }));
  CHECK(full.rx.try_recv() == 1);
  REQUIRE(eventually([&] { return full.rx.depth() == 1 && parked(*full.sender_word); }));
  full.rx.close();
  sender.join();
  CHECK(ended == strait::errc::closed);
}

// ---- messages that are more than bytes
// -----------------------------------------------------------------------------------

TEST_CASE("inside a process any movable type is sent, and destroyed exactly once") {
  const auto held = std::make_shared<int>(0);
  {
    auto [tx, rx] = strait::make_channel<std::shared_ptr<int>>({.capacity = 4});
    for (int i = 0; i < 3; ++i) CHECK(tx.try_send(held));
    CHECK(held.use_count() == 4);
    CHECK(rx.try_recv() == held);
    CHECK(held.use_count() == 3);
    tx.close();
    // Two are never taken.
  }
  CHECK(held.use_count() == 1);
}

TEST_CASE("a message that can only be moved stays with a try_send that found no room") {
  auto [tx, rx] = strait::make_channel<std::unique_ptr<int>>({.capacity = 1});
  CHECK(tx.try_send(std::make_unique<int>(1)));
  auto second = std::make_unique<int>(2);
  CHECK_FALSE(tx.try_send(std::move(second)));
  REQUIRE(second);
  auto first = rx.try_recv();
  REQUIRE(first);
  CHECK(**first == 1);
  CHECK(tx.try_send(std::move(second)));
  CHECK_FALSE(second);
}

TEST_CASE("strings and boxes through coroutines of both kinds") {
  asio::io_context context{1};
  auto [tx, rx] = strait::make_channel<std::string>({.capacity = 2});
  auto [box_tx, box_rx] = strait::make_channel<std::unique_ptr<std::string>>({.capacity = 2});
  std::size_t got = 0;
  strait::spawn(context, [](strait::sender<std::string> out) -> strait::task<> {
    for (int i = 0; i < 1'000; ++i)
      co_await out.send("a text that is too long for the small buffer " + std::to_string(i));
  }(std::move(tx)));
  asio::co_spawn(
      context,
      [](strait::receiver<std::string> in, strait::sender<std::unique_ptr<std::string>> out) -> asio::awaitable<void> {
        while (auto text = co_await in.recv()) co_await out.send(std::make_unique<std::string>(std::move(*text)));
      }(std::move(rx), std::move(box_tx)),
      rethrow);
  strait::spawn(context, [](strait::receiver<std::unique_ptr<std::string>> in, std::size_t& count) -> strait::task<> {
    while (const auto box = co_await in.recv()) {
      if (!(*box)->ends_with(" " + std::to_string(count))) throw std::runtime_error{"out of order"};
      ++count;
    }
  }(std::move(box_rx), got));
  context.run();
  CHECK(got == 1'000);
}

TEST_CASE("the message of a send that is destroyed or cancelled while it waits is destroyed with it") {
  const auto held = std::make_shared<int>(0);
  auto [tx, rx] = strait::make_channel<std::shared_ptr<int>>({.capacity = 1});
  CHECK(tx.try_send(nullptr));
  {
    asio::io_context context{1};
    strait::spawn(context, [](strait::sender<std::shared_ptr<int>>& out, std::shared_ptr<int> what) -> strait::task<> {
      co_await out.send(std::move(what));
    }(tx, held));
    context.poll();
    CHECK(held.use_count() == 2);
  }
  CHECK(held.use_count() == 1);
  asio::io_context context{1};
  asio::cancellation_signal stop;
  strait::async_send(tx, held,
                     asio::bind_executor(context, asio::bind_cancellation_slot(stop.slot(), [](std::error_code) {})));
  context.poll();
  CHECK(held.use_count() == 2);
  stop.emit(asio::cancellation_type::total);
  context.run();
  CHECK(held.use_count() == 1);
  CHECK(rx.try_recv() == nullptr);
  CHECK_FALSE(rx.try_recv());
}
