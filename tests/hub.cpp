#include <strait/asio.hpp>

#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/co_spawn.hpp>
#include <asio/detached.hpp>
#include <asio/io_context.hpp>
#include <asio/local/connect_pair.hpp>
#include <asio/local/stream_protocol.hpp>
#include <asio/posix/stream_descriptor.hpp>
#include <asio/post.hpp>
#include <asio/read.hpp>
#include <asio/steady_timer.hpp>
#include <asio/strand.hpp>
#include <asio/thread_pool.hpp>
#include <asio/use_awaitable.hpp>
#include <asio/write.hpp>
#include <atomic>
#include <chrono>
#include <coroutine>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "coroutines.hpp"

import strait;

namespace {

using message = std::uint64_t;

/// A thread that runs a context, and can tell whether it sleeps.
class runner {
 public:
  explicit runner(asio::io_context& context)
      : thread_{[this, &context] {
          id_ = ::gettid();
          context.run();
          returned_ = true;
        }} {}
  ~runner() { join(); }
  void join() {
    if (thread_.joinable()) thread_.join();
  }
  [[nodiscard]] bool returned() const { return returned_; }
  /// Parked for certain: the word says so, and the kernel has the thread asleep.
  [[nodiscard]] bool sleeps_with(const std::atomic<std::uint32_t>& word) const {
    return parked(word) && id_ != 0 && asleep(id_) && parked(word);
  }

 private:
  std::atomic<pid_t> id_{0};
  std::atomic<bool> returned_{false};
  std::thread thread_;
};

strait::task<> count_all(strait::receiver<message>& rx, std::atomic<message>& got) {
  while (auto value = co_await rx.recv()) {
    if (*value != got) throw std::runtime_error{"out of order"};
    ++got;
  }
}

strait::task<> send_all(strait::sender<message> tx, message count) {
  for (message i = 0; i < count; ++i) co_await tx.send(i);
}

asio::awaitable<void> asio_count_all(strait::receiver<message>& rx, std::atomic<message>& got) {
  while (auto value = co_await rx.recv()) {
    if (*value != got) throw std::runtime_error{"out of order"};
    ++got;
  }
}

asio::awaitable<void> asio_send_all(strait::sender<message> tx, message count) {
  for (message i = 0; i < count; ++i) co_await tx.send(i);
}

const auto rethrow = [](std::exception_ptr error) {
  if (error) std::rethrow_exception(error);
};

}  // namespace

TEST_CASE("each context has one hub, whoever asks") {
  asio::io_context one;
  asio::io_context two;
  strait::hub& hub = strait::hub_of(one.get_executor());
  CHECK(&hub == &strait::hub_of(one.get_executor()));
  CHECK(&hub == &strait::hub_of(asio::make_strand(one)));
  CHECK(&hub == &strait::hub_of(asio::any_io_executor{asio::make_strand(one.get_executor())}));
  CHECK(&hub != &strait::hub_of(two.get_executor()));
  CHECK(strait::hub::current() == nullptr);
}

// ---- parking and waking -------------------------------------------------------------------------------------------

TEST_CASE("a parked hub is woken by a sender in another thread, again and again") {
  for (const auto wait : {strait::wait_policy::adaptive, strait::wait_policy::park}) {
    asio::io_context context{1};
    watched_channel<message> channel{{.capacity = 16, .wait = wait}};
    std::atomic<message> got{0};
    strait::spawn(context, count_all(channel.rx, got));
    runner thread{context};
    for (message i = 0; i < 50; ++i) {
      REQUIRE(eventually([&] { return got == i; }));
      // The word says "parked" before the last look: with every other message only that is waited for.
      REQUIRE(eventually(
          [&] { return i % 2 == 0 ? thread.sleeps_with(*channel.receiver_word) : parked(*channel.receiver_word); }));
      channel.tx.blocking_send(i);
    }
    channel.tx.close();
    thread.join();
    CHECK(got == 50);
  }
}

TEST_CASE("a hub that has learnt to spin for longer than a slice parks all the same") {
  asio::io_context context{1};
  watched_channel<message> channel{{.longest_spin = std::chrono::milliseconds{2}}};
  std::atomic<message> got{0};
  strait::spawn(context, count_all(channel.rx, got));
  runner thread{context};
  // Spins that are answered double the next.
  for (message i = 0; i < 2'000; ++i) {
    channel.tx.blocking_send(i);
    while (got != i + 1) std::this_thread::yield();
    for (int pause = 0; pause < 60; ++pause) strait::cpu_relax();
  }
  REQUIRE(eventually([&] { return thread.sleeps_with(*channel.receiver_word); }));
  channel.tx.close();
}

TEST_CASE("a hub that waits busily never parks") {
  asio::io_context context{1};
  watched_channel<message> channel{{.capacity = 16, .wait = strait::wait_policy::busy}};
  std::atomic<message> got{0};
  std::atomic<int> turns{0};
  strait::spawn(context, count_all(channel.rx, got));
  runner thread{context};
  // Many slices and far more than the longest spin: every handler that gets its turn marks the end of a slice.
  for (int i = 0; i < 100; ++i) {
    asio::post(context, [&] { ++turns; });
    REQUIRE(eventually([&] { return turns == i + 1; }));
    REQUIRE_FALSE(parked(*channel.receiver_word));
  }
  channel.tx.blocking_send(0);
  REQUIRE(eventually([&] { return got == 1; }));
  channel.tx.close();
}

TEST_CASE("a parked hub is woken by a close") {
  asio::io_context context{1};
  watched_channel<message> channel{{.wait = strait::wait_policy::park}};
  std::atomic<message> got{0};
  strait::spawn(context, count_all(channel.rx, got));
  runner thread{context};
  REQUIRE(eventually([&] { return thread.sleeps_with(*channel.receiver_word); }));
  channel.tx.close();
  thread.join();
  CHECK(got == 0);
}

TEST_CASE("a sender parked because the lane is full is woken by the receiver, and by its close") {
  asio::io_context context{1};
  watched_channel<message> channel{{.capacity = 8, .wait = strait::wait_policy::park}};
  std::optional<std::error_code> ended;
  asio::co_spawn(
      context,
      [](strait::sender<message>& tx, std::optional<std::error_code>& end) -> asio::awaitable<void> {
        std::error_code error;
        for (message i = 0; !error; ++i) co_await tx.send(i, error);
        end = error;
      }(channel.tx, ended),
      rethrow);
  runner thread{context};
  for (message i = 0; i < 100; ++i) {
    REQUIRE(eventually([&] { return thread.sleeps_with(*channel.sender_word); }));
    REQUIRE(channel.rx.try_recv() == i);
  }
  REQUIRE(eventually([&] { return thread.sleeps_with(*channel.sender_word); }));
  channel.rx.close();
  thread.join();
  CHECK(ended == strait::errc::closed);
}

TEST_CASE("a parked hub is woken by another hub, both ways") {
  asio::io_context left{1};
  asio::io_context right{1};
  watched_channel<message> there{{.capacity = 4, .wait = strait::wait_policy::park}};
  watched_channel<message> back{{.capacity = 4, .wait = strait::wait_policy::park}};
  constexpr message rounds = 2'000;
  message answered = 0;
  strait::spawn(left, [](strait::sender<message> tx, strait::receiver<message>& rx, message& done) -> strait::task<> {
    for (message i = 0; i < rounds; ++i) {
      co_await tx.send(i);
      const auto reply = co_await rx.recv();
      if (reply != i + 1) throw std::runtime_error{"wrong answer"};
      ++done;
    }
  }(std::move(there.tx), back.rx, answered));
  strait::spawn(right, [](strait::receiver<message>& rx, strait::sender<message> tx) -> strait::task<> {
    while (const auto request = co_await rx.recv()) co_await tx.send(*request + 1);
  }(there.rx, std::move(back.tx)));
  runner one{left};
  runner two{right};
  one.join();
  two.join();
  CHECK(answered == rounds);
}

TEST_CASE("one hub waits for 200 channels, and each wakes its own coroutine") {
  constexpr std::size_t count = 200;
  constexpr message rounds = 5;
  asio::io_context context{1};
  std::vector<watched_channel<message>> channels;
  std::vector<std::atomic<message>> got(count);
  channels.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    channels.emplace_back(strait::channel_options{.capacity = 4});
    if (i % 2 == 0) {
      strait::spawn(context, count_all(channels[i].rx, got[i]));
    } else {
      asio::co_spawn(context, asio_count_all(channels[i].rx, got[i]), rethrow);
    }
  }
  runner thread{context};
  std::mt19937 random{1};
  for (message round = 0; round < rounds; ++round) {
    REQUIRE(eventually([&] { return thread.sleeps_with(*channels[random() % count].receiver_word); }));
    // One alone: nobody else's coroutine goes on.
    const std::size_t chosen = random() % count;
    const message before = got[chosen];
    channels[chosen].tx.blocking_send(before);
    REQUIRE(eventually([&] { return got[chosen] == before + 1; }));
    message total = 0;
    for (const auto& one : got) total += one;
    CHECK(total == round + 1);
  }
  // All at once.
  for (std::size_t i = 0; i < count; ++i) {
    while (got[i] < rounds + 1) {
      const message next = got[i];
      channels[i].tx.blocking_send(next);
      REQUIRE(eventually([&] { return got[i] == next + 1; }));
    }
    channels[i].tx.close();
  }
  thread.join();
  for (const auto& one : got) CHECK(one == rounds + 1);
}

TEST_CASE("two coroutines that wait for one channel share what comes") {
  asio::io_context context{1};
  watched_channel<message> channel{{.capacity = 64, .wait = strait::wait_policy::park}};
  std::atomic<message> sum{0};
  const auto take = [](strait::receiver<message>& rx, std::atomic<message>& into) -> strait::task<> {
    while (const auto value = co_await rx.recv()) into += *value;
  };
  strait::spawn(context, take(channel.rx, sum));
  strait::spawn(context, take(channel.rx, sum));
  runner thread{context};
  message expected = 0;
  for (message i = 1; i <= 1'000; ++i) {
    channel.tx.blocking_send(i);
    expected += i;
  }
  REQUIRE(eventually([&] { return thread.sleeps_with(*channel.receiver_word); }));
  channel.tx.close();
  thread.join();
  CHECK(sum == expected);
}

// ---- when run() returns --------------------------------------------------------------------------------------------

TEST_CASE("run() goes on while a recv is outstanding and returns when nobody waits") {
  asio::io_context context{1};
  watched_channel<message> channel{{.capacity = 4}};
  std::atomic<message> got{0};
  strait::spawn(context, count_all(channel.rx, got));
  runner thread{context};
  REQUIRE(eventually([&] { return thread.sleeps_with(*channel.receiver_word); }));
  CHECK_FALSE(thread.returned());
  channel.tx.blocking_send(0);
  REQUIRE(eventually([&] { return got == 1; }));
  REQUIRE(eventually([&] { return thread.sleeps_with(*channel.receiver_word); }));
  CHECK_FALSE(thread.returned());
  channel.tx.close();
  thread.join();
  CHECK(thread.returned());
  // And once more with the same hub.
  watched_channel<message> second{{.capacity = 4}};
  second.tx.blocking_send(1);
  second.tx.close();
  context.restart();
  strait::spawn(context, count_all(second.rx, got));
  context.run();
  CHECK(got == 2);
}

TEST_CASE("run() returns when the last operation that a parked hub waited for is cancelled") {
  asio::io_context context{1};
  watched_channel<message> channel{{.wait = strait::wait_policy::park}};
  asio::cancellation_signal stop;
  std::optional<std::error_code> ended;
  strait::async_recv(
      channel.rx,
      asio::bind_executor(
          context, asio::bind_cancellation_slot(stop.slot(), [&](std::error_code error, std::optional<message> value) {
            CHECK_FALSE(value);
            ended = error;
          })));
  runner thread{context};
  REQUIRE(eventually([&] { return thread.sleeps_with(*channel.receiver_word); }));
  asio::post(context, [&] { stop.emit(asio::cancellation_type::terminal); });
  REQUIRE(eventually([&] { return thread.returned(); }));
  CHECK(ended == asio::error::operation_aborted);
  CHECK_FALSE(parked(*channel.receiver_word));
}

TEST_CASE("run() returns when the last coroutine that a parked hub waited for is destroyed") {
  asio::io_context context{1};
  watched_channel<message> channel{{.wait = strait::wait_policy::park}};
  std::optional<owned_coroutine> waiting;
  waiting.emplace([](strait::receiver<message>& rx) -> owned_coroutine { (void)co_await rx.recv(); }(channel.rx));
  // Begun in a turn, so that it finds the hub.
  strait::spawn(context, [](owned_coroutine& begin) -> strait::task<> {
    begin.resume();
    co_return;
  }(*waiting));
  runner thread{context};
  REQUIRE(eventually([&] { return thread.sleeps_with(*channel.receiver_word); }));
  asio::post(context, [&] { waiting.reset(); });
  REQUIRE(eventually([&] { return thread.returned(); }));
  CHECK_FALSE(parked(*channel.receiver_word));
  channel.tx.blocking_send(1);
  CHECK(channel.rx.try_recv() == 1);
}

TEST_CASE("one of two waiters of a parked end is cancelled: the other is still woken") {
  asio::io_context context{1};
  watched_channel<message> channel{{.wait = strait::wait_policy::park}};
  asio::cancellation_signal stop;
  std::optional<std::error_code> cancelled;
  std::optional<message> value_of_other;
  const auto receive = [&](auto done) {
    strait::async_recv(channel.rx, asio::bind_executor(context, std::move(done)));
  };
  receive(asio::bind_cancellation_slot(stop.slot(),
                                       [&](std::error_code error, std::optional<message>) { cancelled = error; }));
  receive([&](std::error_code, std::optional<message> value) { value_of_other = value; });
  runner thread{context};
  REQUIRE(eventually([&] { return thread.sleeps_with(*channel.receiver_word); }));
  std::atomic<bool> emitted{false};
  asio::post(context, [&] {
    stop.emit(asio::cancellation_type::terminal);
    emitted = true;
  });
  REQUIRE(eventually([&] { return emitted && thread.sleeps_with(*channel.receiver_word); }));
  channel.tx.blocking_send(7);
  REQUIRE(eventually([&] { return thread.returned(); }));
  CHECK(cancelled == asio::error::operation_aborted);
  CHECK(value_of_other == 7);
}

TEST_CASE("a context that its owner drives in steps of its own") {
  // Each step returns when it likes, so that no turn comes to its end within one.
  const std::array<std::function<void(asio::io_context&)>, 4> steps{
      [](asio::io_context& context) { context.poll(); }, [](asio::io_context& context) { context.poll_one(); },
      [](asio::io_context& context) { context.run_one(); },
      [](asio::io_context& context) { context.run_for(std::chrono::milliseconds{1}); }};
  for (const auto wait : {strait::wait_policy::adaptive, strait::wait_policy::park}) {
    for (const auto& step : steps) {
      asio::io_context context{1};
      auto [tx, rx] = strait::make_channel<message>({.capacity = 4, .wait = wait});
      std::atomic<message> got{0};
      strait::spawn(context, count_all(rx, got));
      std::thread other{[&tx] {
        for (message i = 0; i < 300; ++i) {
          tx.blocking_send(i);
          if (i % 100 == 99) std::this_thread::sleep_for(std::chrono::milliseconds{1});  // it parks meanwhile
        }
        tx.close();
      }};
      while (!context.stopped()) step(context);
      other.join();
      CHECK(got == 300);
    }
  }
}

TEST_CASE("a context is stopped and goes on later: nothing is lost") {
  asio::io_context context{1};
  watched_channel<message> channel{{.capacity = 16, .wait = strait::wait_policy::park}};
  std::atomic<message> got{0};
  bool stop_within = false;
  strait::spawn(context,
                [](asio::io_context& own, strait::receiver<message>& rx, std::atomic<message>& count,
                   const bool& stop) -> strait::task<> {
                  while (const auto value = co_await rx.recv()) {
                    if (*value != count) throw std::runtime_error{"out of order"};
                    ++count;
                    if (stop) own.stop();
                  }
                }(context, channel.rx, got, stop_within));
  message sent = 0;
  for (int round = 0; round < 20; ++round) {
    {
      // Stopped while it sleeps ...
      runner thread{context};
      REQUIRE(eventually([&] { return thread.sleeps_with(*channel.receiver_word); }));
      context.stop();
      REQUIRE(eventually([&] { return thread.returned(); }));
    }
    // ... and what comes then is there when it goes on.
    for (int i = 0; i < 3; ++i) channel.tx.blocking_send(sent++);
    CHECK(got == sent - 3);
    context.restart();
    context.poll();
    CHECK(got == sent);
    // Stopped by the coroutine itself, in a turn that has more to do.
    stop_within = true;
    for (int i = 0; i < 3; ++i) channel.tx.blocking_send(sent++);
    while (got != sent) {
      context.restart();
      context.run();
    }
    stop_within = false;
    context.restart();
  }
  channel.tx.close();
  context.run();
  CHECK(got == sent);
}

TEST_CASE("an executor that tracks work does not keep run() from returning") {
  asio::io_context context{1};
  std::atomic<message> got{0};
  watched_channel<message> channel;
  channel.tx.blocking_send(0);
  channel.tx.close();
  strait::spawn(asio::require(context.get_executor(), asio::execution::outstanding_work.tracked),
                count_all(channel.rx, got));
  runner thread{context};
  REQUIRE(eventually([&] { return thread.returned(); }));
  CHECK(got == 1);
}

// ---- fairness ------------------------------------------------------------------------------------------------------

namespace {

/// More operations than any slice and budget allow for without the others having had their turn.
constexpr message starved = 50'000'000;

/// Sends to itself, so that every operation is ready: until `stop`, or until it is clear that nobody else gets a turn.
strait::task<> spin(strait::sender<message> tx, strait::receiver<message> rx, const std::atomic<bool>& stop,
                    message& count) {
  while (!stop && count < starved) {
    co_await tx.send(count);
    (void)co_await rx.recv();
    ++count;
  }
}
asio::awaitable<void> asio_spin(strait::sender<message> tx, strait::receiver<message> rx, const std::atomic<bool>& stop,
                                message& count) {
  while (!stop && count < starved) {
    co_await tx.send(count);
    (void)co_await rx.recv();
    ++count;
  }
}
/// The same, but every message is put there one by one, and found only by a look at the lane.
strait::task<> spin_one_by_one(strait::sender<message> tx, strait::receiver<message> rx, const std::atomic<bool>& stop,
                               message& count) {
  while (!stop && count < starved) {
    if (!tx.try_send(count)) throw std::runtime_error{"full"};
    (void)co_await rx.recv();
    ++count;
  }
}
strait::task<> spin_one_slot(strait::sender<message> tx, strait::receiver<message> rx, const std::atomic<bool>& stop,
                             message& count) {
  while (!stop && count < starved) {
    co_await tx.send(count);
    if (!rx.try_recv()) throw std::runtime_error{"empty"};
    ++count;
  }
}

/// In batches, which never end where a single message would.
strait::task<> spin_many(strait::sender<message> tx, strait::receiver<message> rx, const std::atomic<bool>& stop,
                         message& count) {
  std::array<message, 32> batch{};
  while (!stop && count < starved) {
    (void)co_await tx.send_many(batch);
    (void)co_await rx.recv_many(batch);
    count += batch.size();
  }
}
strait::task<> spin_in_place(strait::sender<message> tx, strait::receiver<message> rx, const std::atomic<bool>& stop,
                             message& count) {
  while (!stop && count < starved) {
    auto room = co_await tx.reserve(32);
    room.commit();
    const auto there = co_await rx.peek();
    rx.release(there.size());
    count += there.size();
  }
}

}  // namespace

TEST_CASE("a channel that is always ready starves neither a timer nor another coroutine") {
  asio::io_context context{1};
  std::atomic<bool> stop{false};
  std::vector<message> counts(1);
  std::size_t loops = 1;
  std::size_t capacity = 64;
  enum class kind { task, awaitable, one_by_one, one_slot, many, in_place } how = kind::task;
  SUBCASE("a task") {}
  SUBCASE("an asio::awaitable") {
    how = kind::awaitable;
  }
  SUBCASE("two tasks") {
    loops = 2;
  }
  SUBCASE("three asio::awaitables") {
    how = kind::awaitable;
    loops = 3;
  }
  SUBCASE("messages that come one by one") {
    how = kind::one_by_one;
  }
  SUBCASE("batches") {
    how = kind::many;
  }
  SUBCASE("batches in place") {
    how = kind::in_place;
  }
  SUBCASE("a lane of one slot") {
    how = kind::one_slot;
    capacity = 1;
  }
  counts.resize(loops);
  for (std::size_t i = 0; i < loops; ++i) {
    auto [tx, rx] = strait::make_channel<message>({.capacity = capacity});
    switch (how) {
      case kind::task:
        strait::spawn(context, spin(std::move(tx), std::move(rx), stop, counts[i]));
        break;
      case kind::awaitable:
        asio::co_spawn(context, asio_spin(std::move(tx), std::move(rx), stop, counts[i]), rethrow);
        break;
      case kind::one_by_one:
        strait::spawn(context, spin_one_by_one(std::move(tx), std::move(rx), stop, counts[i]));
        break;
      case kind::many:
        strait::spawn(context, spin_many(std::move(tx), std::move(rx), stop, counts[i]));
        break;
      case kind::in_place:
        strait::spawn(context, spin_in_place(std::move(tx), std::move(rx), stop, counts[i]));
        break;
      case kind::one_slot:
        strait::spawn(context, spin_one_slot(std::move(tx), std::move(rx), stop, counts[i]));
        break;
    }
  }
  // Another coroutine, a timer and a socket; each has to get on twenty times.
  constexpr int laps = 20;
  int others = 0;
  const auto lap_done = [&] {
    if (++others == 3) stop = true;
  };
  auto [lap_tx, lap_rx] = strait::make_channel<message>({.capacity = 1});
  strait::spawn(context, [](strait::receiver<message> rx, auto done) -> strait::task<> {
    for (int i = 0; i < laps; ++i) (void)co_await rx.recv();
    done();
  }(std::move(lap_rx), lap_done));
  strait::spawn(context, send_all(std::move(lap_tx), laps));
  asio::co_spawn(
      context,
      [](auto done) -> asio::awaitable<void> {
        asio::steady_timer timer{co_await asio::this_coro::executor};
        for (int i = 0; i < laps; ++i) {
          timer.expires_after(std::chrono::nanoseconds{1});
          co_await timer.async_wait(asio::use_awaitable);
        }
        done();
      }(lap_done),
      rethrow);
  asio::local::stream_protocol::socket near{context};
  asio::local::stream_protocol::socket far{context};
  asio::local::connect_pair(near, far);
  asio::co_spawn(
      context,
      [](asio::local::stream_protocol::socket& a, asio::local::stream_protocol::socket& b,
         auto done) -> asio::awaitable<void> {
        for (int i = 0; i < laps; ++i) {
          char byte = 'x';
          co_await asio::async_write(a, asio::buffer(&byte, 1), asio::use_awaitable);
          co_await asio::async_read(b, asio::buffer(&byte, 1), asio::use_awaitable);
        }
        done();
      }(near, far, lap_done),
      rethrow);
  context.run();
  CHECK(others == 3);
  for (const message count : counts) CHECK(count < starved);
}

TEST_CASE("a busy receiver leaves the context to others while nothing comes") {
  asio::io_context context{1};
  auto [tx, rx] = strait::make_channel<message>({.wait = strait::wait_policy::busy});
  std::atomic<message> got{0};
  strait::spawn(context, count_all(rx, got));
  asio::steady_timer timer{context};
  int laps = 0;
  std::function<void(std::error_code)> lap = [&](std::error_code) {
    if (++laps == 20) {
      tx.close();
      return;
    }
    timer.expires_after(std::chrono::nanoseconds{1});
    timer.async_wait(lap);
  };
  lap({});
  context.run();
  CHECK(laps == 20);
}

TEST_CASE("a context may be run from within a turn") {
  // Without the hint 1, with which Asio itself miscounts its work when it is run within a handler that posted.
  asio::io_context context;
  watched_channel<message> first{{.wait = strait::wait_policy::park}};
  watched_channel<message> second{{.wait = strait::wait_policy::park}};
  std::atomic<message> got{0};
  bool posted = false;
  strait::spawn(context, [](asio::io_context& inner, strait::receiver<message>& rx, bool& flag) -> strait::task<> {
    (void)co_await rx.recv();
    asio::post(inner, [&] { flag = true; });
    while (!flag) inner.poll();
  }(context, first.rx, posted));
  strait::spawn(context, count_all(second.rx, got));
  runner thread{context};
  REQUIRE(eventually([&] { return thread.sleeps_with(*first.receiver_word); }));
  first.tx.blocking_send(0);
  second.tx.blocking_send(0);
  second.tx.close();
  REQUIRE(eventually([&] { return thread.returned(); }));
  CHECK(posted);
  CHECK(got == 1);
}

// ---- several threads
// -------------------------------------------------------------------------------------------------

TEST_CASE("a context of three threads: channels between coroutines, with strands and without") {
  asio::io_context context{3};
  constexpr std::size_t pairs = 8;
  constexpr message count = 3'000;
  std::vector<std::atomic<message>> got(pairs);
  for (std::size_t i = 0; i < pairs; ++i) {
    auto [tx, rx] = strait::make_channel<message>({.capacity = i % 2 == 0 ? 1U : 16U});
    auto consume = [](strait::receiver<message> own, std::atomic<message>& into) -> asio::awaitable<void> {
      co_await asio_count_all(own, into);
    }(std::move(rx), got[i]);
    auto produce = asio_send_all(std::move(tx), count);
    if (i % 4 < 2) {
      asio::co_spawn(asio::make_strand(context), std::move(consume), rethrow);
      asio::co_spawn(asio::make_strand(context), std::move(produce), rethrow);
    } else {
      asio::co_spawn(context, std::move(consume), rethrow);
      asio::co_spawn(context, std::move(produce), rethrow);
    }
  }
  {
    runner one{context};
    runner two{context};
    runner three{context};
  }
  for (const auto& one : got) CHECK(one == count);
}

TEST_CASE("a context of two threads: spawned tasks, fed from outside while parked") {
  asio::io_context context{2};
  constexpr std::size_t count = 4;
  constexpr message messages = 500;
  std::vector<watched_channel<message>> channels;
  std::vector<std::atomic<message>> got(count);
  channels.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    channels.emplace_back(strait::channel_options{.capacity = 8, .wait = strait::wait_policy::park});
    strait::spawn(context, count_all(channels[i].rx, got[i]));
  }
  runner one{context};
  runner two{context};
  for (message i = 0; i < messages; ++i) {
    for (auto& channel : channels) channel.tx.blocking_send(i);
  }
  for (auto& channel : channels) channel.tx.close();
  one.join();
  two.join();
  for (const auto& each : got) CHECK(each == messages);
}

TEST_CASE("a thread pool of Asio's is a context like any other") {
  asio::thread_pool pool{2};
  auto [tx, rx] = strait::make_channel<message>({.capacity = 4});
  std::atomic<message> got{0};
  asio::co_spawn(asio::make_strand(pool), asio_count_all(rx, got), rethrow);
  asio::co_spawn(asio::make_strand(pool), asio_send_all(std::move(tx), 2'000), rethrow);
  pool.join();
  CHECK(got == 2'000);
}

namespace {

/// Handlers that were sent to a `late_executor`, and wait there until the test runs them.
class late_handlers {
 public:
  void add(std::function<void()> handler) {
    const std::lock_guard lock{mutex_};
    waiting_.push_back(std::move(handler));
  }
  [[nodiscard]] std::size_t size() {
    const std::lock_guard lock{mutex_};
    return waiting_.size();
  }
  void run() {
    std::vector<std::function<void()>> now;
    {
      const std::lock_guard lock{mutex_};
      now.swap(waiting_);
    }
    for (const auto& handler : now) handler();
  }

 private:
  std::mutex mutex_;
  std::vector<std::function<void()>> waiting_;
};

class late_executor {
 public:
  explicit late_executor(late_handlers& to) noexcept : to_{&to} {}
  template <class Function>
  void execute(Function&& function) const {
    // std::function copies, and what Asio hands over can only be moved.
    auto held = std::make_shared<std::decay_t<Function>>(std::forward<Function>(function));
    to_->add([held] { (*held)(); });
  }
  /// It never runs anything at once.
  late_executor require(asio::execution::blocking_t::never_t) const noexcept { return *this; }
  bool operator==(const late_executor&) const noexcept = default;

 private:
  late_handlers* to_;
};

}  // namespace

TEST_CASE("two receives on one handle share what comes, however late their handlers run") {
  late_handlers handlers;
  auto [tx, rx] = strait::make_channel<message>({.capacity = 8});
  int values = 0;
  int ends = 0;
  for (int i = 0; i < 2; ++i) {
    strait::async_recv(
        rx, asio::bind_executor(late_executor{handlers}, [&](std::error_code error, std::optional<message> value) {
          CHECK_FALSE(error);
          ++(value ? values : ends);
        }));
  }
  tx.blocking_send(1);
  // Both are found ready. Who does not get the message must not take that for the end of the stream.
  REQUIRE(eventually([&] { return handlers.size() == 2; }));
  handlers.run();
  CHECK(values == 1);
  CHECK(ends == 0);
  tx.close();
  REQUIRE(eventually([&] { return handlers.size() == 1; }));
  handlers.run();
  CHECK(ends == 1);
}

TEST_CASE("two sends on one handle share the room that comes, however late their handlers run") {
  late_handlers handlers;
  auto [tx, rx] = strait::make_channel<message>({.capacity = 1});
  CHECK(tx.try_send(message{0}));
  int sent = 0;
  for (message i = 1; i <= 2; ++i) {
    strait::async_send(tx, i, asio::bind_executor(late_executor{handlers}, [&](std::error_code error) {
                         CHECK_FALSE(error);
                         ++sent;
                       }));
  }
  CHECK(rx.try_recv() == 0);
  REQUIRE(eventually([&] { return handlers.size() == 2; }));
  handlers.run();
  CHECK(sent == 1);
  CHECK(rx.try_recv() == 1);
  REQUIRE(eventually([&] { return handlers.size() == 1; }));
  handlers.run();
  CHECK(sent == 2);
  CHECK(rx.try_recv() == 2);
}

// ---- errors and ends
// -------------------------------------------------------------------------------------------------

TEST_CASE("what leaves a spawned task is thrown out of run(), and the hub goes on") {
  asio::io_context context{1};
  auto [tx, rx] = strait::make_channel<message>();
  std::atomic<message> got{0};
  strait::spawn(context, count_all(rx, got));
  const auto fail = [](const char* what) -> strait::task<> {
    throw std::runtime_error{what};
    co_return;
  };
  strait::spawn(context, fail("first"));
  CHECK_THROWS_WITH_AS(context.run(), "first", std::runtime_error);
  context.restart();
  strait::spawn(context, fail("second"));
  CHECK_THROWS_WITH_AS(context.run(), "second", std::runtime_error);
  tx.blocking_send(0);
  tx.close();
  context.run();
  CHECK(got == 1);
}

TEST_CASE("what leaves several tasks in one turn is thrown one by one") {
  asio::io_context context{1};
  const auto fail = [](const char* what) -> strait::task<> {
    throw std::runtime_error{what};
    co_return;
  };
  strait::spawn(context, fail("one"));
  strait::spawn(context, fail("two"));
  std::string caught;
  for (int i = 0; i < 2; ++i) {
    try {
      context.run();
    } catch (const std::runtime_error& error) {
      caught += error.what();
    }
  }
  CHECK(caught == "onetwo");
}

TEST_CASE("what a completion handler throws comes out of run(), and the hub goes on") {
  asio::io_context context{1};
  auto [tx, rx] = strait::make_channel<message>();
  std::atomic<message> got{0};
  strait::async_recv(rx, asio::bind_executor(context, [](std::error_code, std::optional<message>) {
                       throw std::runtime_error{"from the handler"};
                     }));
  tx.blocking_send(9);
  CHECK_THROWS_WITH(context.run(), "from the handler");
  context.restart();  // nothing was left to do
  strait::spawn(context, count_all(rx, got));
  tx.blocking_send(0);
  tx.close();
  context.run();
  CHECK(got == 1);
}

TEST_CASE("a context is destroyed with operations that wait: everything is freed, nothing is resumed") {
  int turns = 0;  // handlers that are run first; -1: until the hub is parked
  SUBCASE("never run") {}
  SUBCASE("the tasks have begun") {
    turns = 1;
  }
  SUBCASE("all have begun") {
    turns = 2;
  }
  SUBCASE("parked") {
    turns = -1;
  }
  const auto held = std::make_shared<int>(0);
  watched_channel<message> channel{{.wait = strait::wait_policy::park}};
  watched_channel<message> full{{.capacity = 1, .wait = strait::wait_policy::park}};
  REQUIRE(full.tx.try_send(message{1}));
  int living = 0;
  {
    asio::io_context context{1};
    strait::spawn(context, [](strait::receiver<message>& rx, std::shared_ptr<int>, int& count) -> strait::task<> {
      const counted here{count};
      co_await [](strait::receiver<message>& from, int& inner) -> strait::task<> {
        const counted level{inner};
        (void)co_await from.recv();
        FAIL("resumed");
      }(rx, count);
    }(channel.rx, held, living));
    asio::co_spawn(
        context,
        [](strait::sender<message>& tx, std::shared_ptr<int>, int& count) -> asio::awaitable<void> {
          const counted here{count};
          co_await tx.send(2);
          FAIL("resumed");
        }(full.tx, held, living),
        rethrow);
    strait::async_recv(
        channel.rx, asio::bind_executor(context, [held](std::error_code, std::optional<message>) { FAIL("called"); }));
    if (turns < 0) {
      while (!parked(*channel.receiver_word)) context.poll();
      CHECK(parked(*full.sender_word));
    } else {
      for (int i = 0; i < turns; ++i) context.run_one();
    }
    CHECK(held.use_count() == 4);
  }
  CHECK(living == 0);
  CHECK(held.use_count() == 1);
  // The handles can be used on.
  CHECK(channel.tx.try_send(message{3}));
  CHECK(channel.rx.blocking_recv() == 3);
  CHECK(full.rx.try_recv() == 1);
}

TEST_CASE("a thread pool is stopped and destroyed with operations that wait") {
  auto [tx, unread] = strait::make_channel<message>({.capacity = 1});
  auto [unsent, rx] = strait::make_channel<message>({.capacity = 1});
  CHECK(tx.try_send(message{1}));
  auto held = std::make_shared<int>(0);
  {
    asio::thread_pool pool{2};
    std::atomic<int> begun{0};
    strait::spawn(pool.get_executor(),
                  [](strait::receiver<message>& from, std::shared_ptr<int>, std::atomic<int>& count) -> strait::task<> {
                    ++count;
                    (void)co_await from.recv();
                  }(rx, held, begun));
    strait::async_send(tx, message{2}, asio::bind_executor(asio::make_strand(pool), [held](std::error_code) {}));
    REQUIRE(eventually([&] { return begun == 1; }));
    pool.stop();
    pool.join();
  }
  CHECK(held.use_count() == 1);
}

TEST_CASE("a context may be destroyed after the handles that its operations name") {
  asio::io_context context{1};
  const auto held = std::make_shared<int>(0);
  {
    watched_channel<message> channel{{.wait = strait::wait_policy::park}};
    strait::spawn(context, [](strait::receiver<message>& rx, std::shared_ptr<int>) -> strait::task<> {
      (void)co_await rx.recv();
    }(channel.rx, held));
    asio::co_spawn(
        context,
        [](strait::receiver<message>& rx, std::shared_ptr<int>) -> asio::awaitable<void> { (void)co_await rx.recv(); }(
                                                                    channel.rx, held),
        rethrow);
    while (!parked(*channel.receiver_word)) context.poll();
  }
  CHECK(held.use_count() == 3);
}

// ---- cancellation
// ----------------------------------------------------------------------------------------------------

namespace {

/// Runs one operation after the other on a strand of a context of two threads, and cancels them at random points of
/// their lives.
class cancelling_loop {
 public:
  cancelling_loop(asio::io_context& context, unsigned seed)
      : context_{context}, strand_{asio::make_strand(context)}, random_{seed} {}

  /// `begin(handler)` starts one operation.
  template <class Begin, class Handler>
  void operation(Begin begin, Handler handler) {
    begin(asio::bind_executor(strand_, asio::bind_cancellation_slot(signal_->slot(), std::move(handler))));
    // At once, or after a few hops through the context's threads: the operation may be waiting, ready, on its way to
    // its handler, or another one by then.
    for (unsigned i = random_() % 3; i > 0; --i) hop(random_() % 4);
  }
  template <class Start>
  void start(Start start) {
    asio::post(strand_, std::move(start));
  }

 private:
  void hop(unsigned more) {
    if (more == 0) {
      signal_->emit(asio::cancellation_type::total);
      return;
    }
    asio::post(context_, [this, more] { asio::post(strand_, [this, more] { hop(more - 1); }); });
  }

  asio::io_context& context_;
  asio::strand<asio::io_context::executor_type> strand_;
  std::unique_ptr<asio::cancellation_signal> signal_ = std::make_unique<asio::cancellation_signal>();
  std::mt19937 random_;
};

constexpr message cancelled_messages = 5'000;

}  // namespace

TEST_CASE("receives that are cancelled at any moment take nothing and lose nothing") {
  asio::io_context context{2};
  cancelling_loop loop{context, 1};
  auto [tx, rx] = strait::make_channel<message>({.capacity = 8});
  message expected = 0;
  int cancelled = 0;
  int wrong = 0;
  std::function<void()> next = [&] {
    loop.operation([&](auto token) { strait::async_recv(rx, std::move(token)); },
                   [&](std::error_code error, std::optional<message> value) {
                     if (error == asio::error::operation_aborted) {
                       ++cancelled;
                       wrong += value.has_value();
                     } else if (!value) {
                       wrong += error ? 1 : 0;
                       return;  // the end
                     } else {
                       wrong += *value != expected++;
                     }
                     next();
                   });
  };
  loop.start(next);
  std::thread producer{[&tx] {
    for (message i = 0; i < cancelled_messages; ++i) tx.blocking_send(i);
    tx.close();
  }};
  {
    runner one{context};
    runner two{context};
  }
  producer.join();
  CHECK(wrong == 0);
  CHECK(expected == cancelled_messages);
  CHECK(cancelled > 0);
}

TEST_CASE("sends that are cancelled at any moment sent nothing, and those that were not sent it once") {
  asio::io_context context{2};
  cancelling_loop loop{context, 2};
  auto [tx, rx] = strait::make_channel<message>({.capacity = 2});
  message next_message = 0;
  int cancelled = 0;
  int wrong = 0;
  std::function<void()> next = [&] {
    loop.operation([&](auto token) { strait::async_send(tx, next_message, std::move(token)); },
                   [&](std::error_code error) {
                     if (error == asio::error::operation_aborted) {
                       ++cancelled;
                     } else {
                       wrong += error ? 1 : 0;
                       if (++next_message == cancelled_messages) {
                         tx.close();
                         return;
                       }
                     }
                     next();
                   });
  };
  loop.start(next);
  message expected = 0;
  int disordered = 0;
  std::thread consumer{[&] {
    while (const auto value = rx.blocking_recv()) disordered += *value != expected++;
  }};
  {
    runner one{context};
    runner two{context};
  }
  consumer.join();
  CHECK(wrong == 0);
  CHECK(disordered == 0);
  CHECK(expected == cancelled_messages);
  CHECK(cancelled > 0);
}

TEST_CASE("an asio::awaitable on a strand is cancelled at any moment: nothing is lost") {
  asio::io_context context{2};
  auto [tx, rx] = strait::make_channel<message>({.capacity = 8});
  message expected = 0;
  bool ended = false;
  int wrong = 0;
  int cancelled = 0;
  const auto strand = asio::make_strand(context);
  // A coroutine that is cancelled begins again, until the stream has ended.
  asio::cancellation_signal stop;
  std::function<void()> begin = [&] {
    asio::co_spawn(
        strand,
        [](strait::receiver<message>& from, message& next, int& bad) -> asio::awaitable<bool> {
          while (const auto value = co_await from.recv()) bad += *value != next++;
          co_return true;
        }(rx, expected, wrong),
        asio::bind_cancellation_slot(stop.slot(), asio::bind_executor(strand, [&](std::exception_ptr error, bool end) {
                                       if (error) {
                                         try {
                                           std::rethrow_exception(error);
                                         } catch (const std::system_error& why) {
                                           wrong += why.code() != asio::error::operation_aborted;
                                           ++cancelled;
                                         }
                                       }
                                       if (end) {
                                         ended = true;
                                       } else {
                                         begin();
                                       }
                                     })));
  };
  std::function<void()> cancel = [&] {
    if (ended) return;
    stop.emit(asio::cancellation_type::terminal);
    asio::post(context, [&] { asio::post(strand, cancel); });
  };
  asio::post(strand, begin);
  asio::post(strand, cancel);
  std::thread producer{[&tx] {
    for (message i = 0; i < cancelled_messages; ++i) tx.blocking_send(i);
    tx.close();
  }};
  {
    runner one{context};
    runner two{context};
  }
  producer.join();
  CHECK(wrong == 0);
  CHECK(expected == cancelled_messages);
  CHECK(cancelled > 0);
}

// ---- sleeping ------------------------------------------------------------------------------------------------------

namespace {

strait::task<> sleep_and_note(std::chrono::nanoseconds length, int name, std::vector<int>& woken) {
  co_await strait::sleep_for(length);
  woken.push_back(name);
}

owned_coroutine sleep_alone(std::chrono::nanoseconds length, int name, std::vector<int>& woken) {
  co_await strait::sleep_for(length);
  woken.push_back(name);
}

}  // namespace

TEST_CASE("run() goes on while somebody sleeps, and who sleeps less wakes first") {
  asio::io_context context{1};
  std::vector<int> woken;
  const auto began = std::chrono::steady_clock::now();
  strait::spawn(context, sleep_and_note(std::chrono::milliseconds{60}, 3, woken));
  strait::spawn(context, sleep_and_note(std::chrono::milliseconds{20}, 1, woken));
  strait::spawn(context, sleep_and_note(std::chrono::milliseconds{40}, 2, woken));
  strait::spawn(context, sleep_and_note(std::chrono::milliseconds{-1}, 0, woken));
  context.run();
  CHECK(std::chrono::steady_clock::now() - began >= std::chrono::milliseconds{60});
  CHECK(woken.size() == 4);
  CHECK(woken.back() == 3);
  CHECK(woken.front() == 0);
  // And once more with the same hub.
  context.restart();
  strait::spawn(context, sleep_and_note(std::chrono::milliseconds{1}, 4, woken));
  context.run();
  CHECK(woken.back() == 4);
}

TEST_CASE("of a thousand sleepers every third is destroyed, and the others wake in order") {
  using std::chrono::steady_clock;
  asio::io_context context{1};
  std::mt19937 random{7};
  std::vector<int> lengths;
  std::vector<int> woken;
  std::vector<std::optional<owned_coroutine>> sleepers(1'000);
  for (auto& one : sleepers) {
    // Long past: they are all due when the first has its turn, and only their order is left to see.
    lengths.push_back(static_cast<int>(random() % 500));
    one.emplace([](steady_clock::time_point when, int length, std::vector<int>& list) -> owned_coroutine {
      co_await strait::sleep_until(when);
      list.push_back(length);
    }(steady_clock::time_point{std::chrono::microseconds{lengths.back()}}, lengths.back(), woken));
  }
  strait::spawn(context, [](std::vector<std::optional<owned_coroutine>>& all) -> strait::task<> {
    for (auto& one : all) one->resume();
    for (std::size_t i = 0; i < all.size(); i += 3) all[i].reset();
    co_return;
  }(sleepers));
  context.run();
  std::vector<int> expected;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    if (i % 3 != 0) expected.push_back(lengths[i]);
  }
  std::sort(expected.begin(), expected.end());
  CHECK(woken == expected);
}

TEST_CASE("a sleeper has its turn beside a channel that is never empty") {
  for (const bool shared : {true, false}) {
    CAPTURE(shared);
    asio::io_context context{1};
    strait::hub_of(context.get_executor()).share(shared);
    auto [tx, rx] = strait::make_channel<message>({.capacity = 16});
    bool woken = false;
    const auto produce = [](strait::sender<message> to, const bool& stop) -> strait::task<> {
      message next = 0;
      while (!stop) co_await to.send(next++);
    };
    std::atomic<message> got{0};
    strait::spawn(context, produce(std::move(tx), woken));
    strait::spawn(context, count_all(rx, got));
    strait::spawn(context, [](bool& flag) -> strait::task<> {
      for (int i = 0; i < 20; ++i) co_await strait::sleep_for(std::chrono::microseconds{100});
      flag = true;
    }(woken));
    context.run();
    CHECK(got > 0);
  }
}

TEST_CASE("a sleeper wakes a hub that is parked for a channel, and the channel one that only sleeps") {
  for (const auto wait : {strait::wait_policy::adaptive, strait::wait_policy::park}) {
    asio::io_context context{1};
    watched_channel<message> channel{{.capacity = 16, .wait = wait}};
    std::atomic<message> got{0};
    std::atomic<bool> slept{false};
    strait::spawn(context, count_all(channel.rx, got));
    strait::spawn(context, [](std::atomic<bool>& flag) -> strait::task<> {
      co_await strait::sleep_for(std::chrono::milliseconds{20});
      flag = true;
    }(slept));
    runner thread{context};
    REQUIRE(eventually([&] { return slept.load(); }));
    REQUIRE(eventually([&] { return thread.sleeps_with(*channel.receiver_word); }));
    channel.tx.blocking_send(0);
    REQUIRE(eventually([&] { return got == 1; }));
    // From another thread, while an hour's sleep is the only thing that the hub waits for.
    asio::io_context sleeping{1};
    std::optional<owned_coroutine> hour;
    std::vector<int> woken;
    hour.emplace(sleep_alone(std::chrono::hours{1}, 1, woken));
    strait::spawn(sleeping, [](owned_coroutine& one) -> strait::task<> {
      one.resume();
      co_return;
    }(*hour));
    runner other{sleeping};
    watched_channel<message> late{{.capacity = 4, .wait = wait}};
    std::atomic<message> late_got{0};
    strait::spawn(sleeping, count_all(late.rx, late_got));
    late.tx.blocking_send(0);
    REQUIRE(eventually([&] { return late_got == 1; }));
    late.tx.close();
    // Destroyed where its context runs: then nothing is left to run for.
    asio::post(sleeping, [&] { hour.reset(); });
    other.join();
    CHECK(woken.empty());
    channel.tx.close();
  }
}

TEST_CASE("run() returns when the last sleeper is destroyed, within a turn and without") {
  for (const bool in_turn : {true, false}) {
    CAPTURE(in_turn);
    asio::io_context context{1};
    std::vector<int> woken;
    std::optional<owned_coroutine> first;
    std::optional<owned_coroutine> last;
    first.emplace(sleep_alone(std::chrono::hours{1}, 1, woken));
    last.emplace(sleep_alone(std::chrono::nanoseconds::max(), 2, woken));
    strait::spawn(context, [](owned_coroutine& one, owned_coroutine& two) -> strait::task<> {
      one.resume();
      two.resume();
      co_return;
    }(*first, *last));
    context.poll();
    CHECK_FALSE(context.stopped());
    first.reset();
    if (in_turn) {
      strait::spawn(context, [](std::optional<owned_coroutine>& one) -> strait::task<> {
        one.reset();
        co_return;
      }(last));
    } else {
      last.reset();
    }
    context.run();
    CHECK(woken.empty());
  }
}

TEST_CASE("a sleep longer than the clock can tell is as long as it can tell") {
  CHECK(strait::sleep_for(std::chrono::hours::max()).due() == strait::latest_due);
  CHECK(strait::sleep_until(std::chrono::steady_clock::time_point::max()).due() == strait::latest_due);
  CHECK(strait::sleep_until(std::chrono::steady_clock::time_point::min()).due() == 0);
}

TEST_CASE("a context may be destroyed while tasks sleep, and before who sleeps") {
  int living = 0;
  std::vector<int> woken;
  std::optional<owned_coroutine> outlives;
  {
    asio::io_context context{1};
    for (int i = 0; i < 3; ++i) {
      strait::spawn(context, [](int& count) -> strait::task<> {
        const counted here{count};
        co_await strait::sleep_for(std::chrono::hours{1});
      }(living));
    }
    outlives.emplace(sleep_alone(std::chrono::hours{1}, 1, woken));
    strait::spawn(context, [](owned_coroutine& one) -> strait::task<> {
      one.resume();
      co_return;
    }(*outlives));
    context.poll();
    CHECK(living == 3);
  }
  CHECK(living == 0);
  outlives.reset();
  CHECK(woken.empty());
}

TEST_CASE("sleeping on the workers of a runtime, and in a context that several threads run") {
  std::atomic<int> ended{0};
  const auto nap = [](std::atomic<int>& count) -> strait::task<> {
    for (int i = 0; i < 20; ++i) co_await strait::sleep_for(std::chrono::microseconds{200});
    ++count;
  };
  {
    strait::runtime rt;
    for (int i = 0; i < 8; ++i) rt.spawn(nap(ended));
    rt.join();
  }
  CHECK(ended == 8);
  asio::thread_pool pool{3};
  for (int i = 0; i < 8; ++i) strait::spawn(pool.get_executor(), nap(ended));
  pool.join();
  CHECK(ended == 16);
}

TEST_CASE("sleepers that are always due again do not keep a channel from its turns") {
  for (const bool shared : {true, false}) {
    CAPTURE(shared);
    asio::io_context context{1};
    strait::hub_of(context.get_executor()).share(shared);
    auto [tx, rx] = strait::make_channel<message>({.capacity = 1});
    bool stop = false;
    for (int i = 0; i < 40; ++i) {
      strait::spawn(context, [](const bool& end) -> strait::task<> {
        while (!end) co_await strait::sleep_for(std::chrono::seconds{0});
      }(stop));
    }
    strait::spawn(context, send_all(std::move(tx), 200));
    std::atomic<message> got{0};
    strait::spawn(context,
                  [](strait::receiver<message>& from, std::atomic<message>& count, bool& end) -> strait::task<> {
                    co_await count_all(from, count);
                    end = true;
                  }(rx, got, stop));
    context.run();
    CHECK(got == 200);
  }
}

TEST_CASE("tasks that yield take turns, in one order") {
  asio::io_context context{1};
  std::string order;
  const auto letters = [](std::string& into, char letter) -> strait::task<> {
    for (int i = 0; i < 100; ++i) {
      into += letter;
      co_await strait::yield();
    }
  };
  for (const char letter : {'a', 'b', 'c'}) strait::spawn(context, letters(order, letter));
  context.run();
  std::string expected;
  for (int i = 0; i < 100; ++i) expected += "abc";
  CHECK(order == expected);
}

TEST_CASE("a task that always yields starves neither a timer, nor a channel, nor the context's own handlers") {
  asio::io_context context{1};
  auto [tx, rx] = strait::make_channel<int>({.capacity = 4});
  bool stop = false;
  int heard = 0;
  strait::spawn(context, [](const bool& end) -> strait::task<> {
    while (!end) co_await strait::yield();
  }(stop));
  strait::spawn(context, [](strait::receiver<int>& from, int& got) -> strait::task<> {
    while (co_await from.recv()) ++got;
  }(rx, heard));
  asio::steady_timer timer{context};
  int fired = 0;
  const std::function<void()> again = [&] {
    timer.expires_after(std::chrono::microseconds{100});
    timer.async_wait([&](const std::error_code& error) {
      CHECK(!error);
      CHECK(tx.try_send(1));
      if (++fired < 50) return again();
      tx.close();
      stop = true;
    });
  };
  again();
  context.run();
  CHECK(fired == 50);
  CHECK(heard == 50);
}

TEST_CASE("a task that yielded is destroyed with its context, and not resumed") {
  auto context = std::make_unique<asio::io_context>(1);
  int resumed = 0;
  bool destroyed = false;
  struct flag {
    bool& set;
    ~flag() { set = true; }
  };
  strait::spawn(*context, [](int& count, bool& gone) -> strait::task<> {
    const flag mine{gone};
    for (;;) {
      ++count;
      co_await strait::yield();
    }
  }(resumed, destroyed));
  context->poll_one();
  CHECK(resumed > 0);
  const int before = resumed;
  context.reset();
  CHECK(destroyed);
  CHECK(resumed == before);
}

TEST_CASE("a sleep of no length lets the others have their turn") {
  asio::io_context context{1};
  bool stop = false;
  bool slept = false;
  strait::spawn(context, [](const bool& end, bool& flag) -> strait::task<> {
    while (!end) {
      co_await strait::sleep_for(std::chrono::seconds{0});
      flag = true;
    }
  }(stop, slept));
  strait::spawn(context, [](bool& end, const bool& other) -> strait::task<> {
    while (!other) co_await strait::sleep_until(std::chrono::steady_clock::now());
    end = true;
  }(stop, slept));
  bool handled = false;
  asio::post(context, [&] { handled = true; });
  context.run();
  CHECK(slept);
  CHECK(handled);
}

// ---- fork ----------------------------------------------------------------------------------------------------------

namespace {

/// Forks as Asio asks for it. In the child: whatever `child` returns is its exit status, and it has 30 seconds for it.
template <class Child>
pid_t fork_with(asio::io_context& context, Child child) {
  context.notify_fork(asio::execution_context::fork_prepare);
  const pid_t forked = ::fork();
  if (forked != 0) {
    context.notify_fork(asio::execution_context::fork_parent);
    return forked;
  }
  ::alarm(30);
  context.notify_fork(asio::execution_context::fork_child);
  ::_exit(child());
}

int exit_status(pid_t child) {
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 256 + status;
}

/// Takes what comes, and tells why nothing came any more.
strait::task<> take_all(strait::receiver<message>& rx, message& got, std::optional<std::error_code>& ended) {
  std::error_code error;
  while (const auto value = co_await rx.recv(error)) ++got;
  ended = error;
}

strait::task<> give_all(strait::sender<message>& tx, std::optional<std::error_code>& ended) {
  std::error_code error;
  for (message i = 0; !error; ++i) co_await tx.send(i, error);
  ended = error;
}

}  // namespace

TEST_CASE("the child of a fork goes on with its context, and with none of its parent's channels") {
  for (const auto wait : {strait::wait_policy::park, strait::wait_policy::busy}) {
    const std::string name = "posix:strait-test-fork-" + std::to_string(::getpid());
    const strait::channel_options options{.capacity = 8, .wait = wait};
    auto tx = strait::open_sender<message>(name + "-1", options);
    auto rx = strait::open_receiver<message>(name + "-1", options);
    auto full_tx = strait::open_sender<message>(name + "-2", options);
    auto full_rx = strait::open_receiver<message>(name + "-2", options);
    auto [own_tx, own_rx] = strait::make_channel<message>(options);
    asio::io_context context{1};
    message got = 0;
    message own_got = 0;
    std::optional<std::error_code> received;
    std::optional<std::error_code> sent;
    std::optional<std::error_code> own_ended;
    strait::spawn(context, take_all(rx, got, received));
    strait::spawn(context, give_all(full_tx, sent));
    strait::spawn(context, take_all(own_rx, own_got, own_ended));
    for (int i = 0; i < 20; ++i) context.poll_one();  // all three wait; a busy hub would never let poll() return
    REQUIRE(full_rx.depth() == 8);

    const pid_t child = fork_with(context, [&] {
      bool slept = false;
      strait::spawn(context, [](bool& done) -> strait::task<> {
        co_await strait::sleep_for(std::chrono::milliseconds{2});
        done = true;
      }(slept));
      own_tx.blocking_send(1);
      own_tx.close();
      // A channel of the child's own, under a name of its own.
      auto new_tx = strait::open_sender<message>(name + "-child", options);
      auto new_rx = strait::open_receiver<message>(name + "-child", options);
      message new_got = 0;
      std::optional<std::error_code> new_ended;
      strait::spawn(context, take_all(new_rx, new_got, new_ended));
      for (message i = 0; i < 5; ++i) new_tx.blocking_send(i);
      new_tx.close();
      context.run();
      if (received != strait::errc::inherited || got != 0) return 1;
      if (sent != strait::errc::inherited) return 2;
      if (!own_ended || *own_ended || own_got != 1) return 3;
      if (!slept) return 4;
      if (!new_ended || *new_ended || new_got != 5) return 5;
      // Every other form says so, too, and changes nothing.
      std::error_code error;
      (void)rx.try_recv(error);
      if (error != strait::errc::inherited) return 6;
      full_tx.blocking_send(99, error);
      if (error != strait::errc::inherited) return 7;
      rx.close();
      tx.close();
      full_tx.close();
      full_rx.close();
      return 0;
    });

    // Meanwhile, in the parent, it is as if nothing had been.
    for (message i = 0; i < 5; ++i) tx.blocking_send(i);
    tx.close();
    own_tx.close();
    CHECK(exit_status(child) == 0);
    for (message i = 0; i < 20; ++i) {
      while (full_rx.depth() == 0) context.poll_one();
      CHECK(full_rx.try_recv() == i);
    }
    full_rx.close();
    context.run();
    CHECK(got == 5);
    CHECK(received == std::error_code{});
    CHECK(sent == strait::errc::closed);
    CHECK(own_ended == std::error_code{});
    CHECK(own_got == 0);
  }
}

TEST_CASE("a fork from within a task: both go on behind it") {
  asio::io_context context{1};
  auto [tx, rx] = strait::make_channel<message>({.capacity = 1, .wait = strait::wait_policy::park});
  pid_t child = -1;
  std::atomic<message> got{0};
  strait::spawn(context, count_all(rx, got));
  strait::spawn(context, [](asio::io_context& own, strait::sender<message> out, pid_t& forked) -> strait::task<> {
    co_await out.send(0);
    own.notify_fork(asio::execution_context::fork_prepare);
    forked = ::fork();
    if (forked == 0) ::alarm(30);
    own.notify_fork(forked == 0 ? asio::execution_context::fork_child : asio::execution_context::fork_parent);
    for (message i = 1; i < 100; ++i) {
      co_await out.send(i);
      if (i % 10 == 0) co_await strait::sleep_for(std::chrono::microseconds{10});
    }
  }(context, std::move(tx), child));
  context.run();
  if (child == 0) ::_exit(got == 100 ? 0 : 1);
  CHECK(got == 100);
  CHECK(exit_status(child) == 0);
}

TEST_CASE("the child's hub does not take the bells of its parent's") {
  if (test::memory() != "private") {
    MESSAGE("does not apply: a channel between processes stays the parent's (death.cpp), and the child has none");
    return;
  }
  asio::io_context context{1};
  watched_channel<message> channel{{.capacity = 16, .wait = strait::wait_policy::park}};
  std::atomic<message> got{0};
  strait::spawn(context, count_all(channel.rx, got));
  context.poll();  // it sleeps
  std::array<int, 2> line{};
  REQUIRE(::pipe2(line.data(), O_CLOEXEC) == 0);
  const pid_t child = fork_with(context, [&] {
    asio::posix::stream_descriptor end{context, line[0]};
    bool told = false;
    end.async_wait(asio::posix::stream_descriptor::wait_read, [&](std::error_code) { told = true; });
    while (!told) context.run_one();
    return got == 0 ? 0 : 1;
  });
  {
    runner thread{context};
    // If both read one eventfd, the child would take some of these.
    for (message i = 0; i < 200; ++i) {
      REQUIRE(eventually([&] { return thread.sleeps_with(*channel.receiver_word); }));
      channel.tx.blocking_send(i);
      REQUIRE(eventually([&] { return got == i + 1; }));
    }
    channel.tx.close();
  }
  CHECK(::write(line[1], "x", 1) == 1);
  CHECK(exit_status(child) == 0);
  ::close(line[0]);
  ::close(line[1]);
}
