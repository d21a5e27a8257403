/// How two ends part: closing, draining, coming back; handles that have no end any more; and whose the messages are.
#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "attempt.hpp"
#include "ends.hpp"
#include "other_process.hpp"
#include "segment_files.hpp"

import strait;

using namespace std::chrono_literals;
using strait::errc;
using strait::presence;
using test::attempt;
using test::channel_name;
using test::check_refused;

namespace {

using number = std::uint64_t;

/// Both ends of a channel, and the words in which they tell what they do.
struct pair_of_ends {
  strait::sender<number> tx;
  strait::receiver<number> rx;
  std::atomic<std::uint32_t>* sender_word = nullptr;
  std::atomic<std::uint32_t>* receiver_word = nullptr;

  void keep(std::unique_ptr<strait::endpoint> sending, std::unique_ptr<strait::endpoint> receiving) {
    sender_word = &sending->own_word();
    receiver_word = &receiving->own_word();
    tx = strait::sender<number>{std::move(sending)};
    rx = strait::receiver<number>{std::move(receiving)};
  }
};

pair_of_ends in_this_process(const strait::channel_options& options) {
  pair_of_ends made;
  auto [sending, receiving] = strait::endpoint::make_private(strait::shape_of<number>, options, nullptr);
  made.keep(std::move(sending), std::move(receiving));
  return made;
}
pair_of_ends under(const channel_name& name, const strait::channel_options& options) {
  pair_of_ends made;
  auto [sending, receiving] = test::make_ends<number>(name, options);
  made.keep(std::move(sending), std::move(receiving));
  return made;
}

/// The same for every memory.
template <class Check>
void for_every_memory(const strait::channel_options& options, Check&& check) {
  {
    INFO("private");
    auto ends = in_this_process(options);
    check(ends);
  }
  const auto in = [&](std::string_view scheme) {
    INFO(std::string{scheme});
    const channel_name name{"closing", scheme};
    {
      auto ends = under(name, options);
      check(ends);
    }
    CHECK(name.exists() == name.outlives_its_ends());
  };
  for (const std::string_view scheme : test::named_memories) in(scheme);
  for (int direction = 0; direction < 2; ++direction) in(test::handed_over_scheme);
}

void wait_until(const std::atomic<std::uint32_t>& word, presence what) {
  test::eventually([&] { return word.load() == static_cast<std::uint32_t>(what); });
}

}  // namespace

TEST_CASE("closing: a receiver that closes tells a thread that waits for room") {
  for_every_memory({.capacity = 2, .wait = strait::wait_policy::park}, [](pair_of_ends& ends) {
    for (number i = 0; i < 2; ++i) REQUIRE(ends.tx.try_send(i));
    std::error_code error;
    std::thread waiting{[&] { ends.tx.blocking_send(2, error); }};
    wait_until(*ends.sender_word, presence::thread_parked);
    ends.rx.close();
    waiting.join();
    CHECK(error == errc::closed);
    CHECK(ends.tx.is_closed());
    // And so for each that comes later, in whatever form.
    CHECK_FALSE(ends.tx.try_send(number{3}, error));
    CHECK(error == errc::closed);
    CHECK_FALSE(ends.tx.blocking_send_until(3, std::chrono::steady_clock::now() + 1h, error));
    CHECK(error == errc::closed);
    CHECK_THROWS_AS(ends.tx.blocking_send(3), std::system_error);
    CHECK_THROWS_AS((void)ends.tx.try_send(number{3}), std::system_error);
  });
}

TEST_CASE("closing: a receiver that closes tells a coroutine that waits for room") {
  for_every_memory({.capacity = 2}, [](pair_of_ends& ends) {
    for (number i = 0; i < 2; ++i) REQUIRE(ends.tx.try_send(i));
    strait::runtime rt;
    std::error_code error;
    rt.spawn([](strait::sender<number>& tx, std::error_code& told) -> strait::task<> { co_await tx.send(2, told); }(
                                                                       ends.tx, error));
    // In a named channel the hub may have to wait on the futex, by a thread of its own.
    test::eventually([&] {
      const auto word = static_cast<presence>(ends.sender_word->load());
      return word == presence::hub_parked || word == presence::thread_parked;
    });
    ends.rx.close();
    rt.join();
    CHECK(error == errc::closed);
  });
}

TEST_CASE("closing: a send that throws `closed` names the channel") {
  const channel_name name{"text"};
  auto ends = under(name, {.capacity = 1});
  ends.rx.close();
  check_refused(errc::closed, {name.text()}, [&] { ends.tx.blocking_send(1); });
}

TEST_CASE("closing: what was sent is delivered before the end, and the end stays") {
  for_every_memory({.capacity = 8}, [](pair_of_ends& ends) {
    for (number i = 0; i < 5; ++i) REQUIRE(ends.tx.try_send(i));
    ends.tx.close();
    CHECK_FALSE(ends.rx.is_closed());  // there is something yet
    CHECK(ends.rx.depth() == 5);
    CHECK(ends.rx.try_recv() == 0U);
    CHECK(ends.rx.blocking_recv() == 1U);
    CHECK(ends.rx.blocking_recv_until(std::chrono::steady_clock::now()) == 2U);
    CHECK(attempt(ends.rx.recv()).value() == 3U);
    CHECK_FALSE(ends.rx.is_closed());
    std::array<number, 4> many{};
    CHECK(attempt(ends.rx.recv_many(many)).value() == 1);
    CHECK(many[0] == 4);
    CHECK(ends.rx.is_closed());
    for (int again = 0; again < 2; ++again) {
      std::error_code error = errc::corrupt;
      CHECK_FALSE(ends.rx.try_recv(error));
      CHECK_FALSE(error);
      CHECK_FALSE(ends.rx.blocking_recv());
      CHECK_FALSE(ends.rx.blocking_recv_until(std::chrono::steady_clock::now() + 1h));
      CHECK_FALSE(attempt(ends.rx.recv()).value());
      CHECK(attempt(ends.rx.recv_many(many)).value() == 0);
      CHECK(attempt(ends.rx.peek()).value().empty());
    }
  });
}

TEST_CASE("closing: a sender that closes tells a thread and a coroutine that wait for a message") {
  for_every_memory({.capacity = 2, .wait = strait::wait_policy::park}, [](pair_of_ends& ends) {
    std::optional<number> got = 1;
    std::thread waiting{[&] { got = ends.rx.blocking_recv(); }};
    wait_until(*ends.receiver_word, presence::thread_parked);
    ends.tx.close();
    waiting.join();
    CHECK_FALSE(got);
  });
  for_every_memory({.capacity = 2}, [](pair_of_ends& ends) {
    strait::runtime rt;
    int messages = 0;
    rt.spawn([](strait::receiver<number>& rx, int& count) -> strait::task<> {
      while (co_await rx.recv()) ++count;
    }(ends.rx, messages));
    test::eventually([&] {
      const auto word = static_cast<presence>(ends.receiver_word->load());
      return word == presence::hub_parked || word == presence::thread_parked;
    });
    REQUIRE(ends.tx.try_send(number{1}));
    ends.tx.close();
    rt.join();
    CHECK(messages == 1);
  });
}

TEST_CASE("closing: the destructor closes, and so does the assignment of another end") {
  for_every_memory({.capacity = 2}, [](pair_of_ends& ends) {
    REQUIRE(ends.tx.try_send(number{1}));
    {
      const auto gone = std::move(ends.tx);
    }
    CHECK(ends.rx.try_recv() == 1U);
    CHECK_FALSE(ends.rx.blocking_recv());
  });
  for_every_memory({.capacity = 2}, [](pair_of_ends& ends) {
    {
      const auto gone = std::move(ends.rx);
    }
    CHECK(ends.tx.is_closed());
  });
  for_every_memory({.capacity = 2}, [](pair_of_ends& ends) {
    auto other = in_this_process({.capacity = 4});
    REQUIRE(ends.tx.try_send(number{1}));
    ends.tx = std::move(other.tx);
    CHECK(ends.rx.try_recv() == 1U);
    CHECK_FALSE(ends.rx.blocking_recv());
    REQUIRE(ends.tx.try_send(number{2}));
    CHECK(other.rx.try_recv() == 2U);
    CHECK(ends.tx.capacity() == 4);
    ends.rx = std::move(other.rx);
    REQUIRE(ends.tx.try_send(number{3}));
    CHECK(ends.rx.try_recv() == 3U);
  });
}

TEST_CASE("closing: a receiver comes back and goes on with what the last one did not take") {
  const channel_name name{"receiver-back"};
  auto tx = strait::open_sender<number>(name.text(), {.capacity = 64});
  auto rx = strait::open_receiver<number>(name.text());
  for (number i = 0; i < 5; ++i) REQUIRE(tx.try_send(i));
  for (number i = 0; i < 3; ++i) CHECK(rx.try_recv() == i);
  rx.close();  // fewer than are released at a time
  std::error_code error;
  CHECK_FALSE(tx.try_send(number{5}, error));
  CHECK(error == errc::closed);
  CHECK(tx.is_closed());
  CHECK(name.exists());
  rx = strait::open_receiver<number>(name.text());
  CHECK_FALSE(tx.is_closed());
  CHECK(tx.try_send(number{5}, error));
  CHECK_FALSE(error);
  for (number i = 3; i < 6; ++i) CHECK(rx.try_recv() == i);
  CHECK_FALSE(rx.try_recv());
  // A full lane that was closed upon is a full lane again.
  for (number i = 0; i < 64; ++i) REQUIRE(tx.try_send(i));
  rx.close();
  rx = strait::open_receiver<number>(name.text());
  CHECK_FALSE(tx.try_send(number{64}, error));
  CHECK_FALSE(error);
}

TEST_CASE("closing: a sender comes back after the end of the stream, and the stream goes on") {
  const channel_name name{"sender-back"};
  auto rx = strait::open_receiver<number>(name.text(), {.capacity = 8, .wait = strait::wait_policy::park});
  for (number round = 0; round < 3; ++round) {
    auto tx = strait::open_sender<number>(name.text());
    REQUIRE(tx.try_send(2 * round));
    REQUIRE(tx.try_send(2 * round + 1));
    tx.close();
    CHECK(rx.blocking_recv() == 2 * round);
    CHECK(rx.blocking_recv() == 2 * round + 1);
    CHECK_FALSE(rx.blocking_recv());
    CHECK(rx.is_closed());
  }
  auto tx = strait::open_sender<number>(name.text());
  CHECK_FALSE(rx.is_closed());
  std::error_code error;
  CHECK_FALSE(rx.try_recv(error));
  CHECK_FALSE(error);
  CHECK_FALSE(rx.blocking_recv_until(std::chrono::steady_clock::now(), error));
  CHECK(error == std::errc::timed_out);
}

TEST_CASE("closing: whoever waits for a sender that has yet to come is woken by its first message") {
  const channel_name name{"yet-to-come"};
  auto end = strait::endpoint::open(strait::role::receiver, name.text(), strait::shape_of<number>,
                                    {.capacity = 8, .wait = strait::wait_policy::park});
  const auto& word = end->own_word();
  strait::receiver<number> rx{std::move(end)};
  std::optional<number> got;
  std::thread waiting{[&] { got = rx.blocking_recv(); }};
  wait_until(word, presence::thread_parked);
  auto tx = strait::open_sender<number>(name.text());
  REQUIRE(tx.try_send(number{7}));
  waiting.join();
  CHECK(got == 7U);
}

namespace {

/// Everything that can be asked of a sender without an end.
template <class T>
void check_no_sender(strait::sender<T>& tx) {
  CHECK(tx.is_closed());
  CHECK(tx.depth() == 0);
  CHECK(tx.capacity() == 0);
  std::error_code error;
  CHECK_FALSE(tx.try_send(T{}, error));
  CHECK(error == errc::closed);
  error.clear();
  tx.blocking_send(T{}, error);
  CHECK(error == errc::closed);
  error.clear();
  CHECK_FALSE(tx.blocking_send_until(T{}, std::chrono::steady_clock::now() + 1h, error));
  CHECK(error == errc::closed);
  error.clear();
  {
    REQUIRE(attempt(tx.send(T{}, error)));
    CHECK(error == errc::closed);
  }
  check_refused(errc::closed, {"a channel handle that was closed"}, [&] { (void)tx.try_send(T{}); });
  check_refused(errc::closed, {"a channel handle that was closed"}, [&] { tx.blocking_send(T{}); });
  if constexpr (std::is_trivially_copyable_v<T>) {
    const std::array<T, 2> two{};
    error.clear();
    CHECK(attempt(tx.send_many(two, error)).value() == 0);
    CHECK(error == errc::closed);
    error.clear();
    auto room = attempt(tx.reserve(2, error)).value();
    CHECK(error == errc::closed);
    CHECK(room.messages().empty());
    room.commit();
    room.commit(2);
  }
  tx.close();
  tx.close();
}

/// The same of a receiver: for who has no end, the stream has ended.
template <class T>
void check_no_receiver(strait::receiver<T>& rx) {
  CHECK(rx.is_closed());
  CHECK(rx.depth() == 0);
  CHECK(rx.capacity() == 0);
  std::error_code error = errc::corrupt;
  CHECK_FALSE(rx.try_recv(error).has_value());
  CHECK_FALSE(error);
  CHECK_FALSE(rx.try_recv().has_value());
  CHECK_FALSE(rx.blocking_recv().has_value());
  CHECK_FALSE(rx.blocking_recv_until(std::chrono::steady_clock::now() + 1h).has_value());
  CHECK_FALSE(attempt(rx.recv()).value().has_value());
  if constexpr (std::is_trivially_copyable_v<T>) {
    std::array<T, 2> two{};
    CHECK(attempt(rx.recv_many(two)).value() == 0);
    CHECK(attempt(rx.peek()).value().empty());
    rx.release(0);
    rx.release(1000);
  }
  rx.close();
  rx.close();
}

template <class T>
void check_handles_without_ends() {
  strait::sender<T> tx;
  strait::receiver<T> rx;
  check_no_sender(tx);
  check_no_receiver(rx);

  std::tie(tx, rx) = strait::make_channel<T>({.capacity = 4});
  auto other_tx = std::move(tx);
  auto other_rx = std::move(rx);
  check_no_sender(tx);
  check_no_receiver(rx);
  // Nothing of that was noticed at the ends, wherever they are.
  REQUIRE(other_tx.try_send(T{}));
  CHECK(other_rx.depth() == 1);
  CHECK(other_rx.try_recv().has_value());
  CHECK_FALSE(other_tx.is_closed());

  other_tx.close();
  check_no_sender(other_tx);
  other_rx.close();
  check_no_receiver(other_rx);
  // A handle without an end can have one again, and lose it to itself without harm.
  std::tie(tx, rx) = strait::make_channel<T>({.capacity = 4});
  auto& same_tx = tx;
  auto& same_rx = rx;
  tx = std::move(same_tx);
  rx = std::move(same_rx);
  REQUIRE(tx.try_send(T{}));
  CHECK(rx.try_recv().has_value());
}

}  // namespace

TEST_CASE("handles: without an end, every operation is safe and says so") {
  check_handles_without_ends<number>();
  check_handles_without_ends<std::array<char, 100>>();
  check_handles_without_ends<std::string>();
  check_handles_without_ends<std::unique_ptr<int>>();
}

TEST_CASE("handles: a move takes along what was taken and not yet released, and what is known and not yet taken") {
  auto [tx, rx] = strait::make_channel<number>({.capacity = 64});
  for (number i = 0; i < 64; ++i) REQUIRE(tx.try_send(i));
  for (number i = 0; i < 3; ++i) CHECK(rx.try_recv() == i);  // less than an eighth: not released
  auto moved_rx = std::move(rx);
  auto moved_tx = std::move(tx);
  for (number i = 3; i < 64; ++i) CHECK(moved_rx.try_recv() == i);
  CHECK_FALSE(moved_rx.try_recv());
  for (number i = 0; i < 64; ++i) REQUIRE(moved_tx.try_send(i));
  CHECK_FALSE(moved_tx.try_send(number{64}));
}

TEST_CASE("handles: a permit sends what was committed, once, and dropping it sends nothing") {
  auto [tx, rx] = strait::make_channel<number>({.capacity = 4});
  {
    auto dropped = attempt(tx.reserve(2)).value();
    REQUIRE(dropped.messages().size() == 2);
    dropped.messages()[0] = 99;
  }
  CHECK_FALSE(rx.try_recv());
  auto room = attempt(tx.reserve(3)).value();
  for (number i = 0; i < 3; ++i) room.messages()[i] = i;
  auto moved = std::move(room);
  room.commit();
  room.commit(3);
  CHECK(room.messages().empty());
  CHECK_FALSE(rx.try_recv());
  moved.commit(2);
  moved.commit(2);
  moved.commit();
  CHECK(rx.try_recv() == 0U);
  CHECK(rx.try_recv() == 1U);
  CHECK_FALSE(rx.try_recv());
  auto more_than_there_is = attempt(tx.reserve(100)).value();
  const auto size = more_than_there_is.messages().size();
  REQUIRE(size >= 1);
  REQUIRE(size <= 4);
  for (auto& message : more_than_there_is.messages()) message = 7;
  more_than_there_is.commit(100);
  for (std::size_t i = 0; i < size; ++i) CHECK(rx.try_recv() == 7U);
  CHECK_FALSE(rx.try_recv());
}

namespace {

/// Counts how many of its kind live, and holds memory that a second destruction would free twice.
class tracked {
 public:
  explicit tracked(number value) : value_{std::make_unique<number>(value)} { ++alive; }
  tracked(tracked&& other) noexcept : value_{std::move(other.value_)} { ++alive; }
  tracked& operator=(tracked&&) = default;
  ~tracked() { --alive; }
  [[nodiscard]] number value() const { return *value_; }
  [[nodiscard]] bool empty() const { return !value_; }

  static inline std::atomic<int> alive{0};

 private:
  std::unique_ptr<number> value_;
};

}  // namespace

TEST_CASE("messages: any movable type crosses inside a process, in order and whole") {
  constexpr number count = 5'000;
  {
    auto [tx, rx] = strait::make_channel<std::unique_ptr<number>>({.capacity = 16});
    std::thread producer{[tx = std::move(tx)]() mutable {
      for (number i = 0; i < count; ++i) tx.blocking_send(std::make_unique<number>(i));
    }};
    for (number i = 0; i < count; ++i) {
      const auto got = rx.blocking_recv();
      REQUIRE(got);
      REQUIRE(**got == i);
    }
    CHECK_FALSE(rx.blocking_recv());
    producer.join();
  }
  {
    // Long enough to be on the heap, every other one.
    const auto text = [](number i) { return std::string(i % 2 == 0 ? 100 : 3, static_cast<char>('a' + i % 26)); };
    auto [tx, rx] = strait::make_channel<std::string>({.capacity = 16});
    strait::runtime rt;
    rt.spawn([](strait::sender<std::string> out, auto make) -> strait::task<> {
      for (number i = 0; i < count; ++i) co_await out.send(make(i));
    }(std::move(tx), text));
    number got = 0;
    rt.spawn([](strait::receiver<std::string> in, auto make, number& right) -> strait::task<> {
      while (auto message = co_await in.recv()) {
        if (*message == make(right)) ++right;
      }
    }(std::move(rx), text, got));
    rt.join();
    CHECK(got == count);
  }
}

TEST_CASE("messages: those not taken are destroyed, once, whoever leaves first") {
  REQUIRE(tracked::alive == 0);
  // A small lane releases each message, a large one only an eighth of it at a time.
  for (const auto [sender_first, capacity] : {std::pair{true, 8U}, {false, 8U}, {true, 64U}, {false, 64U}}) {
    for (const number sent : {0U, 1U, 5U, 8U}) {
      for (const number taken : {0U, 1U, 5U, 8U}) {
        for (const number before : {0U, capacity - 2}) {  // so that what remains lies across the end of the ring
          if (taken > sent) continue;
          CAPTURE(sender_first);
          CAPTURE(capacity);
          CAPTURE(sent);
          CAPTURE(taken);
          auto [tx, rx] = strait::make_channel<tracked>({.capacity = capacity});
          for (number i = 0; i < before; ++i) {
            REQUIRE(tx.try_send(tracked{i}));
            REQUIRE(rx.try_recv());
          }
          CHECK(tracked::alive == 0);
          for (number i = 0; i < sent; ++i) REQUIRE(tx.try_send(tracked{i}));
          CHECK(tracked::alive == static_cast<int>(sent));
          for (number i = 0; i < taken; ++i) CHECK(rx.try_recv()->value() == i);
          CHECK(tracked::alive == static_cast<int>(sent - taken));
          if (sender_first) tx.close();
          rx.close();
          tx.close();
          CHECK(tracked::alive == 0);
        }
      }
    }
  }
}

TEST_CASE("messages: what could not be sent stays with the caller, or is destroyed with the operation") {
  auto [tx, rx] = strait::make_channel<tracked>({.capacity = 1});
  REQUIRE(tx.try_send(tracked{1}));
  tracked kept{2};
  CHECK_FALSE(tx.try_send(std::move(kept)));
  REQUIRE_FALSE(kept.empty());
  CHECK(kept.value() == 2);
  std::error_code error;
  CHECK_FALSE(tx.blocking_send_until(tracked{3}, std::chrono::steady_clock::now(), error));
  CHECK(error == std::errc::timed_out);
  {
    const auto never_awaited = tx.send(tracked{4});
  }
  CHECK(tracked::alive == 2);
  rx.close();
  CHECK_FALSE(tx.try_send(std::move(kept), error));
  CHECK(error == errc::closed);
  REQUIRE_FALSE(kept.empty());
  CHECK(kept.value() == 2);
  tx.close();
  CHECK(tracked::alive == 1);
}

TEST_CASE("messages: both ends leave at once, on two threads, with messages between them") {
  for (int round = 0; round < 200; ++round) {
    auto [tx, rx] = strait::make_channel<tracked>({.capacity = 8});
    std::thread sending{[tx = std::move(tx)]() mutable {
      std::error_code error;
      for (number i = 0; i < 20 && !error; ++i) tx.blocking_send(tracked{i}, error);
    }};
    std::thread receiving{[rx = std::move(rx), round]() mutable {
      for (int i = 0; i < round % 12; ++i) (void)rx.blocking_recv();
    }};
    sending.join();
    receiving.join();
    REQUIRE(tracked::alive == 0);
  }
}

TEST_CASE("handles: ends that move from thread to thread lose nothing") {
  constexpr int hops = 40;
  constexpr number each = 50;
  const auto check = [](strait::sender<number> tx, strait::receiver<number> rx) {
    std::thread producers{[tx = std::move(tx)]() mutable {
      for (int hop = 0; hop < hops; ++hop) {
        std::thread next{[from = std::move(tx), &tx, hop]() mutable {
          for (number i = 0; i < each; ++i) from.blocking_send(static_cast<number>(hop) * each + i);
          tx = std::move(from);
        }};
        next.join();
      }
    }};
    number expected = 0;
    for (int hop = 0; hop < hops; ++hop) {
      std::thread next{[from = std::move(rx), &rx, &expected]() mutable {
        for (number i = 0; i < each; ++i) {
          if (from.blocking_recv() == expected) ++expected;
        }
        rx = std::move(from);
      }};
      next.join();
    }
    producers.join();
    CHECK(expected == hops * each);
    CHECK_FALSE(rx.blocking_recv());
  };
  auto [tx, rx] = strait::make_channel<number>({.capacity = 8});
  check(std::move(tx), std::move(rx));
  const channel_name name{"hops"};
  auto named_tx = strait::open_sender<number>(name.text(), {.capacity = 8});
  auto named_rx = strait::open_receiver<number>(name.text());
  check(std::move(named_tx), std::move(named_rx));
  CHECK_FALSE(name.exists());
}

#ifndef NDEBUG

namespace {

/// A message that stops its sender in the middle of a send until it is told to go on.
struct slow_message {
  explicit slow_message(std::atomic<bool>* in_the_middle) : in_the_middle_{in_the_middle} {}
  slow_message(slow_message&& other) noexcept : in_the_middle_{other.in_the_middle_} {
    if (in_the_middle_ == nullptr) return;
    in_the_middle_->store(true);
    for (;;) std::this_thread::yield();  // the process ends around it
  }
  std::atomic<bool>* in_the_middle_;
};

}  // namespace

TEST_CASE("child: two threads in one handle" * doctest::skip()) {
  if (!test::is_child()) return;
  std::signal(SIGABRT, SIG_DFL);
  auto [tx, rx] = strait::make_channel<slow_message>({.capacity = 8});
  std::atomic<bool> in_the_middle{false};
  std::thread first{[&] { (void)tx.try_send(slow_message{&in_the_middle}); }};
  while (!in_the_middle.load()) std::this_thread::yield();
  test::tell_parent("in the middle");
  (void)tx.try_send(slow_message{nullptr});
  first.join();
}

TEST_CASE("closing: two threads in one handle are told, in debug builds") {
  test::other_process child{"child: two threads in one handle"};
  REQUIRE(child.hears() == "in the middle");
  CHECK(child.finish() == 128 + SIGABRT);
}

#endif
