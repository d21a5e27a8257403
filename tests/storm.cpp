// The cancellation storm: sends and receives, each cancelled at a random moment by an Asio slot, a stop token, a time-out,
// a select or destruction, lose nothing and double nothing. In one process and between two, in tasks and in Asio's
// coroutines. STRAIT_STORM says how many operations; a million are behind `./dev test long`.
#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <asio/bind_cancellation_slot.hpp>
#include <asio/co_spawn.hpp>
#include <asio/io_context.hpp>
#include <asio/redirect_error.hpp>
#include <asio/steady_timer.hpp>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <stop_token>
#include <strait/asio.hpp>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <variant>

#include "chance.hpp"
#include "coroutines.hpp"
#include "other_process.hpp"

import strait;

namespace {

using namespace std::chrono_literals;

/// Every word of it tells the number, so that a torn one is seen.
struct parcel {
  std::uint64_t number = 0;
  std::array<std::uint64_t, 5> contents{};
};

parcel parcel_of(std::uint64_t number) {
  parcel made{number, {}};
  for (std::uint64_t i = 0; i < made.contents.size(); ++i) made.contents[i] = (number + i) * 0x9e37'79b9'7f4a'7c15;
  return made;
}

}  // namespace

template <>
struct strait::message_traits<parcel> {
  static constexpr std::string_view name = "parcel";
  static constexpr std::uint32_t version = 1;
};

namespace {

std::uint64_t operations() {
  const char* const asked = std::getenv("STRAIT_STORM");
  if (asked == nullptr) return 20'000;
  const std::string_view text{asked};
  std::uint64_t count = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), count);
  if (error != std::errc{} || end != text.data() + text.size()) throw std::invalid_argument{"STRAIT_STORM: a number"};
  return count;
}

/// Requests a stop again and again, on a thread of its own.
class stopper {
 public:
  stopper() : thread_{[this] { stop_again(); }} {}
  ~stopper() {
    over_ = true;
    thread_.join();
  }
  std::stop_token token() {
    const std::lock_guard lock{mutex_};
    return source_.get_token();
  }

 private:
  void stop_again() {
    test::chance when{77};
    while (!over_) {
      std::this_thread::sleep_for(when.moment());
      std::stop_source next;
      {
        const std::lock_guard lock{mutex_};
        std::swap(next, source_);
      }
      next.request_stop();
    }
  }
  std::mutex mutex_;
  std::stop_source source_;
  std::atomic<bool> over_{false};
  std::thread thread_;
};

/// What an end counts, and what it does when anything but a cancellation ends an operation.
struct tally {
  std::uint64_t attempts = 0;
  /// Cancelled before anything was done.
  std::uint64_t cancelled = 0;
  /// Sent, or received.
  std::uint64_t done = 0;
  bool ended = false;

  /// The operation ended; whether it was done.
  bool over(std::error_code error) {
    if (!error) return true;
    if (error != std::errc::timed_out && error != std::errc::operation_canceled &&
        error != asio::error::operation_aborted) {
      throw std::system_error{error};
    }
    return false;
  }
  void took(const std::optional<parcel>& value) {
    if (!value) {
      ended = true;
      return;
    }
    const parcel expected = parcel_of(done);
    if (value->number != expected.number || value->contents != expected.contents) {
      throw std::runtime_error{"expected parcel " + std::to_string(done) + ", found " + std::to_string(value->number)};
    }
    ++done;
  }
};

/// Emits a signal at a random moment, in the context of whoever waits.
class later {
 public:
  later(const asio::any_io_executor& executor, std::chrono::nanoseconds when) : timer_{executor, when} {
    timer_.async_wait([this](std::error_code error) {
      if (!error) signal_.emit(asio::cancellation_type::total);
      over_ = true;
    });
  }
  asio::cancellation_slot slot() { return signal_.slot(); }
  /// Until nothing of Asio's knows this object any more.
  asio::awaitable<void> ends() {
    timer_.cancel();
    while (!over_) co_await asio::post(asio::use_awaitable);
  }

 private:
  asio::cancellation_signal signal_;
  asio::steady_timer timer_;
  bool over_ = false;
};

strait::task<> send_one(strait::sender<parcel>& tx, std::uint64_t number, bool& done) {
  co_await tx.send(parcel_of(number));
  done = true;
}
strait::task<> receive_one(strait::receiver<parcel>& rx, tally& into, bool& done) {
  into.took(co_await rx.recv());
  done = true;
}
asio::awaitable<void> send_and_tell(strait::sender<parcel>& tx, std::uint64_t number, bool& done) {
  co_await tx.send(parcel_of(number));
  done = true;
}
asio::awaitable<void> receive_and_tell(strait::receiver<parcel>& rx, tally& into, bool& done) {
  into.took(co_await rx.recv());
  done = true;
}

template <class Coroutine>
Coroutine send_storm(strait::sender<parcel> tx, std::uint64_t attempts, stopper& stops, tally& counts) {
  constexpr bool in_asio = std::is_same_v<Coroutine, asio::awaitable<void>>;
  test::chance any{1};
  // Whoever is cancelled must be able to try again.
  for (; counts.attempts < attempts; ++counts.attempts) {
    bool done = false;
    std::error_code error;
    switch (any.below(6)) {
      case 0:
        co_await (tx.send(parcel_of(counts.done), error) | strait::timeout(any.moment()));
        done = counts.over(error);
        break;
      case 1:
        co_await (tx.send(parcel_of(counts.done), error) | strait::stop_on(stops.token()));
        done = counts.over(error);
        break;
      case 2:
        done = (co_await strait::select(strait::sleep_for(any.moment()), tx.send(parcel_of(counts.done)))).index == 1;
        break;
      case 3:  // destroyed by a select
        (void)co_await strait::select(send_one(tx, counts.done, done), strait::sleep_for(any.moment()));
        break;
      case 4:
        if constexpr (in_asio) {
          later cancel{co_await asio::this_coro::executor, any.moment()};
          if (any.below(2) == 0) {
            co_await strait::async_send(
                tx, parcel_of(counts.done),
                asio::bind_cancellation_slot(cancel.slot(), asio::redirect_error(asio::use_awaitable, error)));
            done = counts.over(error);
          } else {
            try {
              co_await asio::co_spawn(co_await asio::this_coro::executor, send_and_tell(tx, counts.done, done),
                                      asio::bind_cancellation_slot(cancel.slot(), asio::use_awaitable));
            } catch (const std::system_error& cancelled) {
              (void)counts.over(cancelled.code());
            }
          }
          co_await cancel.ends();
        } else {
          strait::task_group group;  // destroyed by its owner
          group.spawn(send_one(tx, counts.done, done));
          co_await strait::sleep_for(any.moment());
          group.cancel();
        }
        break;
      default:
        co_await tx.send(parcel_of(counts.done));
        done = true;
    }
    ++(done ? counts.done : counts.cancelled);
  }
}

template <class Coroutine>
Coroutine receive_storm(strait::receiver<parcel>& rx, stopper& stops, tally& counts) {
  constexpr bool in_asio = std::is_same_v<Coroutine, asio::awaitable<void>>;
  test::chance any{2};
  for (; !counts.ended; ++counts.attempts) {
    const std::uint64_t before = counts.done;
    bool done = false;
    std::error_code error;
    switch (any.below(6)) {
      case 0: {
        const auto value = co_await (rx.recv(error) | strait::timeout(any.moment()));
        if (counts.over(error)) counts.took(value);
        break;
      }
      case 1: {
        const auto value = co_await (rx.recv(error) | strait::stop_on(stops.token()));
        if (counts.over(error)) counts.took(value);
        break;
      }
      case 2: {
        const auto chosen = co_await strait::select(rx.recv(), strait::sleep_for(any.moment()));
        if (chosen.index == 0) counts.took(std::get<0>(chosen.result));
        break;
      }
      case 3:
        (void)co_await strait::select(receive_one(rx, counts, done), strait::sleep_for(any.moment()));
        break;
      case 4:
        if constexpr (in_asio) {
          later cancel{co_await asio::this_coro::executor, any.moment()};
          if (any.below(2) == 0) {
            const auto value = co_await strait::async_recv(
                rx, asio::bind_cancellation_slot(cancel.slot(), asio::redirect_error(asio::use_awaitable, error)));
            if (counts.over(error)) counts.took(value);
          } else {
            try {
              co_await asio::co_spawn(co_await asio::this_coro::executor, receive_and_tell(rx, counts, done),
                                      asio::bind_cancellation_slot(cancel.slot(), asio::use_awaitable));
            } catch (const std::system_error& cancelled) {
              (void)counts.over(cancelled.code());
            }
          }
          co_await cancel.ends();
        } else {
          strait::task_group group;
          group.spawn(receive_one(rx, counts, done));
          co_await strait::sleep_for(any.moment());
          group.cancel();
        }
        break;
      default:
        counts.took(co_await rx.recv());
    }
    counts.cancelled += counts.done == before && !counts.ended;
  }
}

/// Runs a coroutine to its end in a context of its own.
void run(strait::task<> what) {
  asio::io_context context{1};
  strait::spawn(context, std::move(what));
  context.run();
}
void run(asio::awaitable<void> what) {
  asio::io_context context{1};
  asio::co_spawn(context, std::move(what), [](std::exception_ptr error) {
    if (error) std::rethrow_exception(error);
  });
  context.run();
}

/// That it was a storm: of both kinds there was plenty.
void check_weather(const tally& counts) {
  MESSAGE(counts.attempts, " operations: ", counts.done, " done, ", counts.cancelled, " cancelled");
  CHECK(counts.done + counts.cancelled + (counts.ended ? 1U : 0U) == counts.attempts);
  CHECK(counts.done > counts.attempts / 100);
  CHECK(counts.cancelled > counts.attempts / 100);
}

}  // namespace

TEST_CASE_TEMPLATE("storm: in one process", Coroutine, strait::task<>, asio::awaitable<void>) {
  auto [tx, rx] = strait::make_channel<parcel>({.capacity = 4});
  stopper stops;
  tally sent;
  tally received;
  std::exception_ptr failed;
  std::thread sender{[&, end = std::move(tx)]() mutable {
    try {
      run(send_storm<Coroutine>(std::move(end), operations() / 8, stops, sent));
    } catch (...) {
      failed = std::current_exception();
    }
  }};
  run(receive_storm<Coroutine>(rx, stops, received));
  sender.join();
  if (failed) std::rethrow_exception(failed);
  CHECK(received.done == sent.done);
  check_weather(sent);
  check_weather(received);
}

TEST_CASE("child: sends through the storm" * doctest::skip()) {
  if (!test::is_child()) return;
  const bool in_asio = test::parent_says() == "asio";
  auto tx = strait::open_sender<parcel>(test::parent_says());
  stopper stops;
  tally sent;
  if (in_asio) {
    run(send_storm<asio::awaitable<void>>(std::move(tx), operations() / 8, stops, sent));
  } else {
    run(send_storm<strait::task<>>(std::move(tx), operations() / 8, stops, sent));
  }
  check_weather(sent);
  test::tell_parent(std::to_string(sent.done));
}

TEST_CASE_TEMPLATE("storm: between two processes", Coroutine, strait::task<>, asio::awaitable<void>) {
  const bool in_asio = std::is_same_v<Coroutine, asio::awaitable<void>>;
  const std::string name = "posix:test-storm-" + std::to_string(::getpid()) + (in_asio ? "-asio" : "-task");
  auto rx = strait::open_receiver<parcel>(name, {.capacity = 4});
  test::other_process child{"child: sends through the storm"};
  child.say(in_asio ? "asio" : "task");
  child.say(name);
  stopper stops;
  tally received;
  run(receive_storm<Coroutine>(rx, stops, received));
  CHECK(child.hears() == std::to_string(received.done));
  CHECK(child.finish() == 0);
  check_weather(received);
}
