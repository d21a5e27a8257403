// select, time-outs, stop tokens and when_any: in tasks, in Asio's coroutines and in coroutines that know neither.
#include <doctest/doctest.h>
#include <unistd.h>

#include <array>
#include <asio/bind_cancellation_slot.hpp>
#include <asio/buffer.hpp>
#include <asio/co_spawn.hpp>
#include <asio/io_context.hpp>
#include <asio/local/connect_pair.hpp>
#include <asio/local/stream_protocol.hpp>
#include <asio/read.hpp>
#include <asio/strand.hpp>
#include <asio/thread_pool.hpp>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <stop_token>
#include <strait/asio.hpp>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "asio_moved.hpp"
#include "coroutines.hpp"

import strait;

namespace {

using namespace std::chrono_literals;
using message = std::uint64_t;

void rethrow(std::exception_ptr error) {
  if (error) std::rethrow_exception(error);
}

/// Begins a coroutine of either kind in the context.
void begin(asio::io_context& context, strait::task<> what) {
  strait::spawn(context, std::move(what));
}
void begin(asio::io_context& context, asio::awaitable<void> what) {
  asio::co_spawn(context, std::move(what), rethrow);
}

template <class Coroutine>
using with_channel = Coroutine (*)(strait::sender<message>&, strait::receiver<message>&);

/// Runs a coroutine that needs nothing but a channel to its end.
template <class Coroutine>
void run(with_channel<Coroutine> body, const strait::channel_options& options = {.capacity = 2}) {
  asio::io_context context{1};
  auto [tx, rx] = strait::make_channel<message>(options);
  bool ended = false;
  begin(context,
        [](with_channel<Coroutine> of, strait::sender<message>& out, strait::receiver<message>& in,
           bool& done) -> Coroutine {
          co_await of(out, in);
          done = true;
        }(body, tx, rx, ended));
  context.run();
  CHECK(ended);
}

// What an exception of an awaited operation says; a coroutine cannot await in a handler, but it can here.
#define CODE_OF(into, expression)              \
  do {                                         \
    into = {};                                 \
    try {                                      \
      (void)(expression);                      \
    } catch (const std::system_error& error) { \
      into = error.code();                     \
    }                                          \
  } while (false)

}  // namespace

#define BOTH_WORLDS strait::task<>, asio::awaitable<void>

// ---- time-outs
// ---------------------------------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("a time-out ends a wait, takes nothing, and leaves the handle as it was", Coroutine, BOTH_WORLDS) {
  run<Coroutine>([](strait::sender<message>& tx, strait::receiver<message>& rx) -> Coroutine {
    std::error_code code;
    const auto began = std::chrono::steady_clock::now();
    CODE_OF(code, co_await (rx.recv() | strait::timeout(2ms)));
    CHECK(code == std::errc::timed_out);
    CHECK(std::chrono::steady_clock::now() - began >= 2ms);
    CODE_OF(code, co_await (rx.recv() | strait::deadline(std::chrono::steady_clock::now() + 1ms)));
    CHECK(code == std::errc::timed_out);
    CODE_OF(code, co_await (rx.recv() | strait::timeout(0ms)));
    CHECK(code == std::errc::timed_out);

    // The same, set: never thrown.
    std::error_code set;
    auto none = co_await (rx.recv(set) | strait::timeout(1ms));
    CHECK_FALSE(none);
    CHECK(set == std::errc::timed_out);
    std::array<message, 4> into{};
    const std::size_t taken = co_await (rx.recv_many(into, set) | strait::timeout(1ms));
    CHECK(taken == 0);
    CHECK(set == std::errc::timed_out);
    const auto seen = co_await (rx.peek(set) | strait::timeout(1ms));
    CHECK(seen.empty());
    CHECK(set == std::errc::timed_out);

    // A full lane.
    co_await (tx.send(1) | strait::timeout(1ms));
    co_await (tx.send(2, set) | strait::timeout(1ms));
    CHECK_FALSE(set);
    CODE_OF(code, co_await (tx.send(3) | strait::timeout(1ms)));
    CHECK(code == std::errc::timed_out);
    co_await (tx.send(3, set) | strait::timeout(1ms));
    CHECK(set == std::errc::timed_out);
    const strait::permit<message> room = co_await (tx.reserve(1, set) | strait::timeout(1ms));
    CHECK(room.messages().empty());
    CHECK(set == std::errc::timed_out);

    // What is there is taken, however late it is.
    auto value = co_await (rx.recv() | strait::deadline(began));
    CHECK(value == 1);
    value = co_await (rx.recv(set) | strait::timeout(0ms));
    CHECK(value == 2);
    CHECK_FALSE(set);
    // A batch of which a part found room tells how much.
    const std::array<message, 3> three{4, 5, 6};
    const std::size_t sent = co_await (tx.send_many(three, set) | strait::timeout(1ms));
    CHECK(sent == 2);
    CHECK(set == std::errc::timed_out);
    value = co_await (rx.recv() | strait::timeout(1h));
    CHECK(value == 4);
    value = co_await (rx.recv() | strait::timeout(std::chrono::hours::max()));
    CHECK(value == 5);
    CHECK_FALSE(rx.try_recv());
  });
}

TEST_CASE_TEMPLATE("a message that comes in time ends the wait, and nothing of the time-out is left", Coroutine,
                   BOTH_WORLDS) {
  asio::io_context context{1};
  watched_channel<message> channel;
  std::optional<message> got;
  begin(context, [](strait::receiver<message>& in, std::optional<message>& into) -> Coroutine {
    into = co_await (in.recv() | strait::timeout(1h));
  }(channel.rx, got));
  std::thread sender{[&] {
    CHECK(eventually([&] { return parked(*channel.receiver_word); }));
    channel.tx.blocking_send(7);
  }};
  context.run();  // does not wait for the hour
  sender.join();
  CHECK(got == 7);
}

TEST_CASE("a time-out that is reached while the hub has parked") {
  asio::io_context context{1};
  watched_channel<message> channel{{.wait = strait::wait_policy::park}};
  int late = 0;
  begin(context, [](strait::receiver<message>& in, int& count) -> strait::task<> {
    std::error_code error;
    for (int i = 0; i < 10; ++i) {
      (void)co_await (in.recv(error) | strait::timeout(2ms));
      count += error == std::errc::timed_out;
    }
  }(channel.rx, late));
  context.run();
  CHECK(late == 10);
  CHECK_FALSE(parked(*channel.receiver_word));
}

TEST_CASE("everything that a task can await can be limited") {
  int done = 0;
  run<strait::task<>>([](strait::sender<message>&, strait::receiver<message>& rx) -> strait::task<> {
    std::error_code code;
    const auto slow = [](strait::receiver<message>& in) -> strait::task<int> { co_return co_await in.recv() ? 1 : 0; };
    CODE_OF(code, co_await (slow(rx) | strait::timeout(1ms)));
    CHECK(code == std::errc::timed_out);
    CODE_OF(code, co_await (strait::sleep_for(1h) | strait::timeout(1ms)));
    CHECK(code == std::errc::timed_out);
    CODE_OF(code, co_await (strait::select(rx.recv(), strait::sleep_for(1h)) | strait::timeout(1ms)));
    CHECK(code == std::errc::timed_out);
    CODE_OF(code, co_await (strait::when_all(slow(rx)) | strait::timeout(1ms)));
    CHECK(code == std::errc::timed_out);
    strait::task_group group;
    group.spawn([](strait::receiver<message>& in) -> strait::task<> { (void)co_await in.recv(); }(rx));
    CODE_OF(code, co_await (group.join() | strait::timeout(1ms)));
    CHECK(code == std::errc::timed_out);
    CHECK(group.size() == 1);  // they go on
    const int fast = co_await ([]() -> strait::task<int> { co_return 5; }() | strait::timeout(1h));
    CHECK(fast == 5);
  });
  (void)done;
}

// ---- stop tokens
// -------------------------------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("a stop that was requested before wins over a message that is there", Coroutine, BOTH_WORLDS) {
  run<Coroutine>([](strait::sender<message>& tx, strait::receiver<message>& rx) -> Coroutine {
    std::stop_source source;
    std::error_code code;
    co_await (tx.send(1) | strait::stop_on(source.get_token()));
    source.request_stop();
    CODE_OF(code, co_await (rx.recv() | strait::stop_on(source.get_token())));
    CHECK(code == std::errc::operation_canceled);
    (void)co_await (rx.recv(code) | strait::stop_on(source.get_token()));
    CHECK(code == std::errc::operation_canceled);
    CODE_OF(code, co_await (tx.send(2) | strait::stop_on(source.get_token())));
    CHECK(code == std::errc::operation_canceled);
    const auto value = co_await (rx.recv() | strait::stop_on(std::stop_token{}));
    CHECK(value == 1);
    CHECK_FALSE(rx.try_recv());
  });
}

TEST_CASE_TEMPLATE("a stop is requested from another thread while the hub has parked", Coroutine, BOTH_WORLDS) {
  asio::io_context context{1};
  watched_channel<message> channel{{.wait = strait::wait_policy::park}};
  std::stop_source source;
  std::error_code told;
  begin(context, [](strait::receiver<message>& in, std::stop_token token, std::error_code& into) -> Coroutine {
    (void)co_await (in.recv(into) | strait::timeout(1h) | strait::stop_on(token));
  }(channel.rx, source.get_token(), told));
  std::thread stopper{[&] {
    CHECK(eventually([&] { return parked(*channel.receiver_word); }));
    source.request_stop();
  }};
  context.run();
  stopper.join();
  CHECK(told == std::errc::operation_canceled);
  CHECK_FALSE(parked(*channel.receiver_word));
}

TEST_CASE("a stop is requested by a coroutine of the same hub, in its turn") {
  asio::io_context context{1};
  auto [tx, rx] = strait::make_channel<message>();
  std::stop_source source;
  std::error_code told;
  begin(context, [](strait::receiver<message>& in, std::stop_token token, std::error_code& into) -> strait::task<> {
    (void)co_await (in.recv(into) | strait::stop_on(token));
  }(rx, source.get_token(), told));
  begin(context, [](std::stop_source& of) -> strait::task<> {
    co_await strait::sleep_for(1ms);
    of.request_stop();
  }(source));
  context.run();
  CHECK(told == std::errc::operation_canceled);
}

// ---- select
// ------------------------------------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("select does one operation, and the others have taken and sent nothing", Coroutine, BOTH_WORLDS) {
  run<Coroutine>(
      [](strait::sender<message>& tx, strait::receiver<message>& rx) -> Coroutine {
        auto [other_tx, other_rx] = strait::make_channel<std::string>({.capacity = 2});
        (void)tx.try_send(message{1});
        (void)tx.try_send(message{2});  // full
        {
          auto [index, result] =
              co_await strait::select(other_rx.recv(), rx.recv(), tx.send(99), strait::sleep_for(1h));
          static_assert(
              std::is_same_v<decltype(result), std::variant<std::optional<std::string>, std::optional<message>,
                                                            std::monostate, std::monostate>>);
          CHECK(index == 1);
          CHECK(result.index() == 1);
          CHECK(std::get<1>(result) == 1);
        }
        CHECK(rx.depth() == 1);
        CHECK(rx.try_recv() == 2);
        CHECK_FALSE(rx.try_recv());
        {
          (void)other_tx.try_send(std::string{"here"});
          const auto chosen = co_await strait::select(rx.recv(), other_rx.recv());
          CHECK(chosen.index == 1);
          CHECK(std::get<1>(chosen.result) == "here");
        }
        {
          const auto [index, result] = co_await strait::select(rx.recv(), tx.send(3));
          CHECK(index == 1);
          CHECK(rx.try_recv() == 3);
        }
        {
          const auto [index, result] = co_await strait::select(rx.recv(), other_rx.recv(), strait::sleep_for(2ms));
          CHECK(index == 2);
        }
        {
          std::error_code late;
          const auto [index, result] = co_await strait::select(other_rx.recv(), rx.recv(late) | strait::timeout(1ms));
          CHECK(index == 1);
          CHECK(late == std::errc::timed_out);
        }
        other_tx.close();
        {
          const auto [index, result] = co_await strait::select(rx.recv(), other_rx.recv());
          CHECK(index == 1);
          CHECK_FALSE(std::get<1>(result));  // the end of the stream
        }
        other_rx.close();
        rx.close();
        std::error_code code;
        CODE_OF(code, co_await strait::select(tx.send(1), strait::sleep_for(1h)));
        CHECK(code == strait::errc::closed);
      },
      {.capacity = 2});
}

TEST_CASE_TEMPLATE("a select that has to wait parks once for all, and any of them wakes it", Coroutine, BOTH_WORLDS) {
  asio::io_context context{1};
  watched_channel<message> one{{.wait = strait::wait_policy::park}};
  watched_channel<message> two{{.wait = strait::wait_policy::park}};
  watched_channel<message> full{{.capacity = 1, .wait = strait::wait_policy::park}};
  REQUIRE(full.tx.try_send(message{100}));
  std::vector<std::size_t> order;
  std::vector<message> got;
  begin(context,
        [](watched_channel<message>& a, watched_channel<message>& b, watched_channel<message>& c,
           std::vector<std::size_t>& who, std::vector<message>& what) -> Coroutine {
          for (int i = 0; i < 30; ++i) {
            auto [index, result] =
                co_await strait::select(a.rx.recv(), b.rx.recv(), c.tx.send(101), strait::sleep_for(1h));
            who.push_back(index);
            if (index == 0) what.push_back(*std::get<0>(result));
            if (index == 1) what.push_back(*std::get<1>(result));
          }
        }(one, two, full, order, got));
  std::thread other{[&] {
    for (int i = 0; i < 30; ++i) {
      // All three words tell of the sleep; whichever is rung, the other two are taken back.
      REQUIRE(eventually(
          [&] { return parked(*one.receiver_word) && parked(*two.receiver_word) && parked(*full.sender_word); }));
      if (i % 3 == 0) one.tx.blocking_send(static_cast<message>(i));
      if (i % 3 == 1) two.tx.blocking_send(static_cast<message>(i));
      if (i % 3 == 2) CHECK(full.rx.blocking_recv() == (i == 2 ? 100 : 101));
    }
  }};
  context.run();
  other.join();
  REQUIRE(order.size() == 30);
  for (std::size_t i = 0; i < order.size(); ++i) CHECK(order[i] == i % 3);
  CHECK(got.size() == 20);
  CHECK_FALSE(parked(*one.receiver_word));
  CHECK_FALSE(parked(*two.receiver_word));
  CHECK_FALSE(parked(*full.sender_word));
}

TEST_CASE("a ready select does not suspend, but for its neighbours' sake") {
  auto [a_tx, a_rx] = strait::make_channel<message>({.capacity = 4});
  auto [b_tx, b_rx] = strait::make_channel<message>({.capacity = 4});
  auto [calls_tx, calls_rx] = strait::make_channel<message>({.capacity = 1});
  asio::io_context context{1};
  int turns = 0;
  begin(context, [](strait::receiver<message>& calls, int& count) -> strait::task<> {
    while (co_await calls.recv()) ++count;
  }(calls_rx, turns));
  begin(context,
        [](strait::sender<message>& to_a, strait::receiver<message>& a, strait::receiver<message>& b,
           strait::sender<message> calls) -> strait::task<> {
          for (int i = 0; i < 10'240; ++i) {
            (void)calls.try_send(message{1});
            CHECK(to_a.try_send(message{1}));
            const auto [index, result] = co_await strait::select(a.recv(), b.recv(), strait::sleep_for(1h));
            CHECK(index == 0);
          }
        }(a_tx, a_rx, b_rx, std::move(calls_tx)));
  context.run();
  CHECK(turns >= 10);
  CHECK(turns <= 12);
}

TEST_CASE_TEMPLATE("operations that can always go on have their turns alike", Coroutine, BOTH_WORLDS) {
  run<Coroutine>([](strait::sender<message>& tx, strait::receiver<message>& rx) -> Coroutine {
    auto [other_tx, other_rx] = strait::make_channel<message>({.capacity = 4});
    std::array<int, 3> counts{};
    for (int i = 0; i < 6'000; ++i) {
      if (rx.depth() == 0) CHECK(tx.try_send(message{1}));
      if (other_rx.depth() == 0) CHECK(other_tx.try_send(message{1}));
      const auto [index, result] =
          co_await strait::select(rx.recv(), other_rx.recv(), strait::sleep_until(std::chrono::steady_clock::now()));
      ++counts[index];
    }
    for (const int count : counts) {
      CHECK(count > 1'600);
      CHECK(count < 2'400);
    }
  });
}

TEST_CASE("a select in a coroutine that knows neither Asio nor strait") {
  asio::io_context context{1};
  auto [tx, rx] = strait::make_channel<message>();
  std::size_t chosen = 99;
  begin(context, [](strait::receiver<message>& in, std::size_t& into) -> strait::task<> {
    [](strait::receiver<message>& from, std::size_t& index_of) -> bare_coroutine {
      index_of = (co_await strait::select(from.recv(), strait::sleep_for(1ms))).index;
    }(in, into);
    co_return;
  }(rx, chosen));
  context.run();
  CHECK(chosen == 1);
  // Where nobody could resume it, it says so.
  std::error_code code;
  [](strait::receiver<message>& from, std::error_code& into) -> bare_coroutine {
    CODE_OF(into, co_await strait::select(from.recv(), strait::sleep_for(1ms)));
  }(rx, code);
  CHECK(code == strait::errc::no_hub);
}

TEST_CASE("tasks in a select: the first to end is yielded, the others are destroyed before it returns") {
  int living = 0;
  const auto sleeper = [](int& count, std::chrono::milliseconds length, int value) -> strait::task<int> {
    const counted here{count};
    co_await strait::sleep_for(length);
    co_return value;
  };
  asio::io_context context{1};
  bool ended = false;
  begin(context, [](auto make, int& count, bool& done) -> strait::task<> {
    {
      const auto chosen = co_await strait::when_any(make(count, 1h, 1), make(count, 1ms, 2), make(count, 2h, 3));
      CHECK(count == 0);
      CHECK(chosen.index == 1);
      CHECK(std::get<1>(chosen.result) == 2);
    }
    // One that ends at once; and an error is an end.
    const auto at_once = co_await strait::when_any(make(count, 1h, 1), []() -> strait::task<> { co_return; }());
    CHECK(at_once.index == 1);
    CHECK(count == 0);
    std::string caught;
    try {
      (void)co_await strait::when_any(make(count, 1h, 1), []() -> strait::task<> {
        co_await strait::sleep_for(1ms);
        throw std::runtime_error{"first"};
      }());
    } catch (const std::runtime_error& error) {
      caught = error.what();
    }
    CHECK(caught == "first");
    CHECK(count == 0);
    auto [tx, rx] = strait::make_channel<message>();
    CHECK(tx.try_send(message{5}));
    // What is ready is done, and the task is never begun.
    const auto ready = co_await strait::select(make(count, 1ms, 1), rx.recv());
    CHECK(ready.index == 1);
    const auto timed = co_await strait::select(make(count, 1h, 1), rx.recv(), strait::sleep_for(1ms));
    CHECK(timed.index == 2);
    CHECK(count == 0);
    done = true;
  }(sleeper, living, ended));
  context.run();
  CHECK(ended);
}

TEST_CASE("a task in a select in an asio::awaitable") {
  asio::io_context context{1};
  int living = 0;
  bool ended = false;
  begin(context, [](int& count, bool& done) -> asio::awaitable<void> {
    auto [tx, rx] = strait::make_channel<message>();
    const auto task = [](strait::receiver<message>& in, int& alive) -> strait::task<message> {
      const counted here{alive};
      co_return (co_await in.recv()).value_or(0) + 1;
    };
    const auto first = co_await strait::select(task(rx, count), strait::sleep_for(1ms));
    CHECK(first.index == 1);
    CHECK(count == 0);
    CHECK(tx.try_send(message{41}));
    const auto second = co_await strait::select(task(rx, count), strait::sleep_for(1h));
    CHECK(std::get<0>(second.result) == 42);
    CHECK(count == 0);
    done = true;
  }(living, ended));
  context.run();
  CHECK(ended);
}

// ---- Asio's operations
// -------------------------------------------------------------------------------------------------

namespace {

using stream_socket = asio::local::stream_protocol::socket;

/// An operation that the test ends when it likes, and that may ignore that it is cancelled.
struct puppet {
  std::function<void(std::error_code, int)> handler;
  bool cancelled = false;

  template <class Token>
  auto async_play(bool can_be_cancelled, Token&& token) {
    return asio::async_initiate<Token, void(std::error_code, int)>(
        [this, can_be_cancelled](auto&& with) {
          auto kept = std::make_shared<std::decay_t<decltype(with)>>(std::forward<decltype(with)>(with));
          auto slot = asio::get_associated_cancellation_slot(*kept);
          if (can_be_cancelled && slot.is_connected()) {
            slot.assign([this](asio::cancellation_type) { cancelled = true; });
          }
          handler = [kept](std::error_code error, int value) { (*kept)(error, value); };
        },
        token);
  }
  void end(asio::io_context& context, std::error_code error, int value) {
    asio::post(context, [handler = std::exchange(handler, nullptr), error, value] { handler(error, value); });
  }
};

/// Runs a coroutine to its end that is given the two ends of a socket pair and of a channel.
template <class Coroutine>
void run_beside_socket(Coroutine (*begun)(stream_socket&, stream_socket&, strait::sender<message>&,
                                          strait::receiver<message>&, bool&)) {
  asio::io_context context{1};
  auto [tx, rx] = strait::make_channel<message>();
  stream_socket near{context};
  stream_socket far{context};
  asio::local::connect_pair(near, far);
  bool ended = false;
  begin(context, begun(near, far, tx, rx, ended));
  context.run();
  CHECK(ended);
}

}  // namespace

TEST_CASE_TEMPLATE("a read that loses is cancelled and has taken nothing; one that wins is yielded", Coroutine,
                   BOTH_WORLDS) {
  run_beside_socket<Coroutine>([](stream_socket& in, stream_socket& out, strait::sender<message>& to,
                                  strait::receiver<message>& from, bool& done) -> Coroutine {
    std::array<char, 8> bytes{};
    CHECK(to.try_send(message{1}));
    {
      // Ready: the read does not even begin.
      const auto [index, result] =
          co_await strait::select(in.async_read_some(asio::buffer(bytes), strait::use_op), from.recv());
      CHECK(index == 1);
    }
    {
      const auto [index, result] = co_await strait::select(in.async_read_some(asio::buffer(bytes), strait::use_op),
                                                           from.recv(), strait::sleep_for(1ms));
      CHECK(index == 2);
    }
    out.write_some(asio::buffer("abc", 3));
    {
      const auto [index, result] =
          co_await strait::select(from.recv(), in.async_read_some(asio::buffer(bytes), strait::use_op));
      CHECK(index == 1);
      CHECK(std::get<1>(result) == 3);
      CHECK(std::string_view{bytes.data(), 3} == "abc");
    }
    std::error_code code;
    CODE_OF(code, co_await (in.async_read_some(asio::buffer(bytes), strait::use_op) | strait::timeout(1ms)));
    CHECK(code == std::errc::timed_out);
    std::error_code set;
    const std::size_t none =
        co_await (in.async_read_some(asio::buffer(bytes), strait::use_op(set)) | strait::timeout(1ms));
    CHECK(none == 0);
    CHECK(set == std::errc::timed_out);
    const auto [third, zero] =
        co_await (in.async_read_some(asio::buffer(bytes), moved::as_tuple(strait::use_op)) | strait::timeout(1ms));
    CHECK(third == std::errc::timed_out);
    CHECK(zero == 0);
    // An operation composed of several, of which a part has been done.
    out.write_some(asio::buffer("de", 2));
    const std::size_t part =
        co_await (asio::async_read(in, asio::buffer(bytes), strait::use_op(set)) | strait::timeout(1ms));
    CHECK(part == 2);
    CHECK(set == std::errc::timed_out);
    std::stop_source stopped;
    stopped.request_stop();
    CODE_OF(code,
            co_await (in.async_read_some(asio::buffer(bytes), strait::use_op) | strait::stop_on(stopped.get_token())));
    CHECK(code == std::errc::operation_canceled);
    out.write_some(asio::buffer("f", 1));
    const std::size_t one = co_await (in.async_read_some(asio::buffer(bytes), strait::use_op) | strait::timeout(1h));
    CHECK(one == 1);
    CHECK(bytes[0] == 'f');
    // Its error is an end, too.
    out.close();
    CODE_OF(code, co_await strait::select(from.recv(), in.async_read_some(asio::buffer(bytes), strait::use_op)));
    CHECK(code == asio::error::eof);
    done = true;
  });
}

TEST_CASE_TEMPLATE("an operation that was done all the same is yielded, and the one that was first is not done",
                   Coroutine, BOTH_WORLDS) {
  asio::io_context context{1};
  auto [tx, rx] = strait::make_channel<message>();
  puppet play;
  std::size_t chosen = 99;
  int got = 0;
  begin(context, [](puppet& with, strait::receiver<message>& in, std::size_t& which, int& what) -> Coroutine {
    const auto [index, result] = co_await strait::select(with.async_play(true, strait::use_op), in.recv());
    which = index;
    if (index == 0) what = std::get<0>(result);
  }(play, rx, chosen, got));
  context.poll();
  REQUIRE(play.handler);
  CHECK(tx.try_send(message{1}));
  while (!play.cancelled) context.poll();
  for (int i = 0; i < 10; ++i) context.poll();
  CHECK(chosen == 99);  // it waits for the end of what it cancelled
  context.restart();
  SUBCASE("done") {
    play.end(context, {}, 42);
    context.run();
    CHECK(chosen == 0);
    CHECK(got == 42);
    CHECK(rx.try_recv() == 1);
  }
  SUBCASE("cancelled") {
    play.end(context, asio::error::operation_aborted, 0);
    context.run();
    CHECK(chosen == 1);
    CHECK_FALSE(rx.try_recv());
  }
}

TEST_CASE_TEMPLATE("an operation that cannot be cancelled is left to itself", Coroutine, BOTH_WORLDS) {
  asio::io_context context{1};
  auto [tx, rx] = strait::make_channel<message>();
  puppet play;
  std::size_t chosen = 99;
  begin(context, [](puppet& with, strait::receiver<message>& in, std::size_t& which) -> Coroutine {
    which = (co_await strait::select(with.async_play(false, strait::use_op), in.recv())).index;
  }(play, rx, chosen));
  context.poll();
  CHECK(tx.try_send(message{1}));
  context.restart();
  context.run();
  CHECK(chosen == 1);
  play.end(context, {}, 42);
  context.restart();
  context.run();
}

TEST_CASE_TEMPLATE("an operation that is lent goes on when it loses, and keeps what it ends with", Coroutine,
                   BOTH_WORLDS) {
  run_beside_socket<Coroutine>([](stream_socket& in, stream_socket& out, strait::sender<message>& to,
                                  strait::receiver<message>& from, bool& done) -> Coroutine {
    std::array<char, 8> bytes{};
    std::error_code error;
    auto read = in.async_read_some(asio::buffer(bytes), strait::use_op(error));
    for (int round = 0; round < 3; ++round) {
      const auto lost = co_await strait::select(read, strait::sleep_for(1ms));
      CHECK(lost.index == 1);
      const auto timed = co_await strait::select(read | strait::timeout(1ms), strait::sleep_for(1h));
      CHECK(timed.index == 0);
      CHECK(error == std::errc::timed_out);
      out.write_some(asio::buffer("abc", 3));
      CHECK(to.try_send(message{1}));
      (void)co_await (from.recv() | strait::timeout(1h));
      (void)co_await strait::select(strait::sleep_for(1ms));  // the read ends while nobody waits for it
      const auto kept = co_await strait::select(strait::sleep_for(1h), read);
      CHECK(kept.index == 1);
      CHECK_FALSE(error);
      CHECK(std::get<1>(kept.result) == 3);
      CHECK(std::string_view{bytes.data(), 3} == "abc");
      bytes = {};
    }
    // In flight when it is destroyed.
    (void)co_await strait::select(read, strait::sleep_for(1ms));
    done = true;
  });
}

TEST_CASE("a lent operation is awaited alone in the end") {
  run_beside_socket<strait::task<>>([](stream_socket& in, stream_socket& out, strait::sender<message>&,
                                       strait::receiver<message>&, bool& done) -> strait::task<> {
    std::array<char, 8> bytes{};
    auto read = in.async_read_some(asio::buffer(bytes), strait::use_op);
    (void)co_await strait::select(read, strait::sleep_for(1ms));
    out.write_some(asio::buffer("abc", 3));
    CHECK(co_await read == 3);
    (void)co_await strait::select(read, strait::sleep_for(1ms));
    out.write_some(asio::buffer("de", 2));
    co_await strait::sleep_for(1ms);
    CHECK(co_await read == 2);
    done = true;
  });
}

// Bytes come through a socket and messages through a channel; whichever loses loses nothing.
TEST_CASE_TEMPLATE("a socket and a channel in one select, on several threads", Coroutine, BOTH_WORLDS) {
  constexpr message count = 3'000;
  asio::thread_pool pool{2};
  auto [tx, rx] = strait::make_channel<message>({.capacity = 4});
  stream_socket near{pool};
  stream_socket far{pool};
  asio::local::connect_pair(near, far);
  std::atomic<int> running{1};
  const auto receive = [](stream_socket& in, strait::receiver<message>& from, std::atomic<int>& left) -> Coroutine {
    message next = 0;
    std::size_t read = 0;
    std::array<unsigned char, 3> bytes{};
    while (next < count || read < count) {
      auto [index, result] = co_await strait::select(in.async_read_some(asio::buffer(bytes), strait::use_op),
                                                     from.recv(), strait::sleep_for(50us));
      if (index == 0) {
        for (std::size_t i = 0; i < std::get<0>(result); ++i) {
          if (bytes[i] != read++ % 251) throw std::runtime_error{"a byte was lost or doubled"};
        }
      } else if (index == 1) {
        if (!std::get<1>(result)) throw std::runtime_error{"the stream ended"};
        if (*std::get<1>(result) != next++) throw std::runtime_error{"a message was lost or doubled"};
      }
    }
    --left;
  };
  if constexpr (std::is_same_v<Coroutine, strait::task<>>) {
    strait::spawn(pool.get_executor(), receive(near, rx, running));
  } else {
    asio::co_spawn(asio::make_strand(pool), receive(near, rx, running), rethrow);
  }
  std::thread writer{[&] {
    for (message i = 0; i < count; ++i) {
      const auto byte = static_cast<unsigned char>(i % 251);
      far.write_some(asio::buffer(&byte, 1));
      if (i % 16 == 0) std::this_thread::yield();
    }
  }};
  for (message i = 0; i < count; ++i) tx.blocking_send(i);
  writer.join();
  pool.join();
  CHECK(running == 0);
}

// ---- ends
// --------------------------------------------------------------------------------------------------------------

TEST_CASE("Asio cancels a select as it does everything else, and nothing is taken") {
  asio::io_context context{1};
  auto [tx, rx] = strait::make_channel<message>();
  asio::cancellation_signal stop;
  std::vector<std::error_code> told;
  asio::co_spawn(
      context,
      [](strait::receiver<message>& in, std::vector<std::error_code>& into) -> asio::awaitable<void> {
        co_await asio::this_coro::throw_if_cancelled(false);
        co_await asio::this_coro::reset_cancellation_state(asio::enable_total_cancellation());
        std::error_code code;
        CODE_OF(code, co_await strait::select(in.recv(), strait::sleep_for(1h)));
        into.push_back(code);
        (void)co_await (in.recv(code) | strait::timeout(1h));
        into.push_back(code);
        CODE_OF(code, co_await strait::select(
                          [](strait::receiver<message>& from) -> strait::task<> { (void)co_await from.recv(); }(in)));
        into.push_back(code);
        stream_socket one{co_await asio::this_coro::executor};
        stream_socket two{co_await asio::this_coro::executor};
        asio::local::connect_pair(one, two);
        std::array<char, 1> byte{};
        CODE_OF(code, co_await strait::select(in.recv(), one.async_read_some(asio::buffer(byte), strait::use_op)));
        into.push_back(code);
        (void)co_await (one.async_read_some(asio::buffer(byte), strait::use_op(code)) | strait::timeout(1h));
        into.push_back(code);
      }(rx, told),
      asio::bind_cancellation_slot(stop.slot(), rethrow));
  for (std::size_t i = 0; i < 5; ++i) {
    while (told.size() == i) {
      stop.emit(asio::cancellation_type::total);
      context.run_one();
    }
  }
  context.run();
  CHECK(told.size() == 5);
  for (const std::error_code code : told) CHECK(code == asio::error::operation_aborted);
  CHECK(tx.try_send(message{1}));
  CHECK(rx.try_recv() == 1);
}

TEST_CASE_TEMPLATE("a context may be destroyed while selects wait, and so may a coroutine", Coroutine, BOTH_WORLDS) {
  auto [tx, rx] = strait::make_channel<message>({.capacity = 1});
  auto [other_tx, other_rx] = strait::make_channel<message>({.capacity = 1});
  int living = 0;
  std::stop_source source;
  {
    asio::io_context context{1};
    begin(context, [](strait::receiver<message>& in, std::stop_token token, int& count) -> Coroutine {
      const counted here{count};
      (void)co_await (strait::select(in.recv(), strait::sleep_for(1h)) | strait::stop_on(token));
    }(rx, source.get_token(), living));
    begin(context, [](int& count) -> Coroutine {
      const counted here{count};
      (void)co_await strait::select(strait::sleep_for(1h), strait::sleep_for(2h));
    }(living));
    begin(context, [](int& count) -> Coroutine {
      const counted here{count};
      (void)co_await strait::select([](int& inner) -> strait::task<> {
        const counted also{inner};
        co_await strait::sleep_for(1h);
      }(count));
    }(living));
    begin(context, [](asio::io_context& of, strait::receiver<message>& in, int& count) -> Coroutine {
      const counted here{count};
      stream_socket one{of};
      stream_socket two{of};
      asio::local::connect_pair(one, two);
      std::array<char, 1> byte{};
      auto lent = two.async_read_some(asio::buffer(byte), strait::use_op);
      (void)co_await strait::select(asio::async_read(one, asio::buffer(byte), strait::use_op), in.recv(), lent);
    }(context, other_rx, living));
    while (living != 5) context.run_one();
    for (int i = 0; i < 10; ++i) context.poll();
  }
  CHECK(living == 0);
  source.request_stop();  // of nobody's
  CHECK(tx.try_send(message{1}));
  CHECK(rx.try_recv() == 1);
}

TEST_CASE("destroying a task that waits in a select withdraws all of it, and run() returns") {
  asio::io_context context{1};
  watched_channel<message> one{{.wait = strait::wait_policy::park}};
  watched_channel<message> two{{.wait = strait::wait_policy::park}};
  begin(context, [](watched_channel<message>& a, watched_channel<message>& b) -> strait::task<> {
    strait::task_group group;
    group.spawn([](watched_channel<message>& c, watched_channel<message>& d) -> strait::task<> {
      (void)co_await strait::select(c.rx.recv(), d.rx.recv(), strait::sleep_for(1h));
    }(a, b));
    co_await strait::sleep_for(2ms);
    CHECK(group.size() == 1);
    group.cancel();
  }(one, two));
  context.run();
  CHECK_FALSE(parked(*one.receiver_word));
  CHECK_FALSE(parked(*two.receiver_word));
  CHECK(one.tx.try_send(message{1}));
  CHECK(one.rx.try_recv() == 1);
}

// ---- beside others
// -----------------------------------------------------------------------------------------------------

// Two threads run the context, each coroutine is on a strand, and stops come from a third: what decides, what is withdrawn
// and what goes on are on different threads.
TEST_CASE_TEMPLATE("selects, time-outs and stops beside each other on several threads", Coroutine, BOTH_WORLDS) {
  constexpr message count = 4'000;
  asio::thread_pool pool{2};
  auto [a_tx, a_rx] = strait::make_channel<message>({.capacity = 4});
  auto [b_tx, b_rx] = strait::make_channel<message>({.capacity = 4});
  std::atomic<int> running{3};
  struct shared {
    std::mutex mutex;
    std::stop_source source;
    std::stop_token token() {
      const std::lock_guard lock{mutex};
      return source.get_token();
    }
    void stop() {
      std::stop_source next;
      {
        const std::lock_guard lock{mutex};
        std::swap(next, source);
      }
      next.request_stop();
    }
  } stops;
  const auto send_all = [](strait::sender<message> to, shared& with, std::atomic<int>& left) -> Coroutine {
    std::error_code error;
    for (message next = 0; next < count;) {
      co_await (to.send(next, error) | strait::timeout(20us) | strait::stop_on(with.token()));
      if (!error) {
        ++next;
      } else if (error != std::errc::timed_out && error != std::errc::operation_canceled) {
        throw std::system_error{error};
      }
    }
    --left;
  };
  const auto receive_all = [](strait::receiver<message>& a, strait::receiver<message>& b, shared& with,
                              std::atomic<int>& left) -> Coroutine {
    std::array<message, 2> next{};
    bool open[] = {true, true};
    const auto take = [&](std::size_t from, std::optional<message> value) {
      if (!value) {
        open[from] = false;
      } else if (*value != next[from]++) {
        throw std::runtime_error{"lost, doubled or out of order"};
      }
    };
    while (open[0] && open[1]) {
      std::error_code error;
      try {
        auto [index, result] =
            co_await (strait::select(a.recv(), b.recv(), strait::sleep_for(30us)) | strait::stop_on(with.token()));
        if (index == 0) take(0, std::get<0>(result));
        if (index == 1) take(1, std::get<1>(result));
      } catch (const std::system_error& stopped) {
        if (stopped.code() != std::errc::operation_canceled) throw;
      }
    }
    while (open[0]) take(0, co_await a.recv());
    while (open[1]) take(1, co_await b.recv());
    if (next[0] != count || next[1] != count) throw std::runtime_error{"not all"};
    --left;
  };
  const auto start = [&](Coroutine what) {
    if constexpr (std::is_same_v<Coroutine, strait::task<>>) {
      strait::spawn(pool.get_executor(), std::move(what));
    } else {
      asio::co_spawn(asio::make_strand(pool), std::move(what), rethrow);
    }
  };
  start(send_all(std::move(a_tx), stops, running));
  start(send_all(std::move(b_tx), stops, running));
  start(receive_all(a_rx, b_rx, stops, running));
  while (running != 0) {
    stops.stop();
    std::this_thread::sleep_for(50us);
  }
  pool.join();
}
