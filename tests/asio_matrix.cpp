// One object, every coroutine world, and one function, every completion token: each cell of the tables in docs/07-asio.md.
#include <strait/asio.hpp>

#include <doctest/doctest.h>

#include <array>
#include <asio/bind_allocator.hpp>
#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/co_spawn.hpp>
#include <asio/experimental/co_spawn.hpp>
#include <asio/experimental/coro.hpp>
#include <asio/io_context.hpp>
#include <asio/redirect_error.hpp>
#include <asio/strand.hpp>
#include <asio/thread_pool.hpp>
#include <asio/use_awaitable.hpp>
#include <asio/use_future.hpp>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <future>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#if ASIO_VERSION < 102300
#include <asio/experimental/use_coro.hpp>
#endif
#if __has_include(<asio/cancel_after.hpp>)
#include <asio/cancel_after.hpp>
#endif

#include "asio_moved.hpp"
#include "coroutines.hpp"

import strait;

namespace {

using message = std::uint64_t;

const auto rethrow = [](std::exception_ptr error) {
  if (error) std::rethrow_exception(error);
};

// ---- how a kind of coroutine spells the operations -----------------------------------------------------------------

/// `co_await rx.recv()`.
struct directly {
  static auto recv(strait::receiver<message>& rx, auto&... error) { return rx.recv(error...); }
  static auto recv_many(strait::receiver<message>& rx, std::span<message> into, auto&... error) {
    return rx.recv_many(into, error...);
  }
  static auto peek(strait::receiver<message>& rx, auto&... error) { return rx.peek(error...); }
  static auto send(strait::sender<message>& tx, message what, auto&... error) { return tx.send(what, error...); }
  static auto send_many(strait::sender<message>& tx, std::span<const message> what, auto&... error) {
    return tx.send_many(what, error...);
  }
  static auto reserve(strait::sender<message>& tx, std::size_t n, auto&... error) { return tx.reserve(n, error...); }
};

/// `co_await strait::rebind_executor<Executor>(rx.recv())`.
template <class Executor>
struct rebound {
  static auto recv(auto&... all) { return strait::rebind_executor<Executor>(directly::recv(all...)); }
  static auto recv_many(strait::receiver<message>& rx, std::span<message> into, auto&... error) {
    return strait::rebind_executor<Executor>(rx.recv_many(into, error...));
  }
  static auto peek(auto&... all) { return strait::rebind_executor<Executor>(directly::peek(all...)); }
  static auto send(strait::sender<message>& tx, message what, auto&... error) {
    return strait::rebind_executor<Executor>(tx.send(what, error...));
  }
  static auto send_many(strait::sender<message>& tx, std::span<const message> what, auto&... error) {
    return strait::rebind_executor<Executor>(tx.send_many(what, error...));
  }
  static auto reserve(strait::sender<message>& tx, std::size_t n, auto&... error) {
    return strait::rebind_executor<Executor>(tx.reserve(n, error...));
  }
};

/// `co_await strait::async_recv(rx, token)`.
template <class Token>
struct by_token {
  Token token;
  auto recv(strait::receiver<message>& rx) const { return strait::async_recv(rx, token); }
  auto recv_many(strait::receiver<message>& rx, std::span<message> into) const {
    return strait::async_recv_many(rx, into, token);
  }
  auto peek(strait::receiver<message>& rx) const { return strait::async_peek(rx, token); }
  auto send(strait::sender<message>& tx, message what) const { return strait::async_send(tx, what, token); }
  auto send_many(strait::sender<message>& tx, std::span<const message> what) const {
    return strait::async_send_many(tx, what, token);
  }
  auto reserve(strait::sender<message>& tx, std::size_t n) const { return strait::async_reserve(tx, n, token); }
};
template <class Token>
by_token(Token) -> by_token<Token>;

// ---- what every kind of coroutine does -----------------------------------------------------------------------------

constexpr int rounds = 300;

struct outcome {
  message sent = 0;
  message received = 0;
  bool ended = false;
};

/// Every kind of send, in turn. The context comes first because an asio::experimental::coro looks there for one.
template <class Coroutine, class Ways>
Coroutine produce(asio::io_context&, Ways how, strait::sender<message>& tx, outcome& out) {
  for (int round = 0; round < rounds; ++round) {
    co_await how.send(tx, out.sent++);
    std::array<message, 5> batch;
    for (message& one : batch) one = out.sent++;
    const std::size_t sent = co_await how.send_many(tx, batch);
    if (sent != batch.size()) throw std::runtime_error{"not all were sent"};
    strait::permit<message> room = co_await how.reserve(tx, 3);
    if (room.messages().empty()) throw std::runtime_error{"no room was reserved"};
    for (message& one : room.messages()) one = out.sent++;
    room.commit();
  }
  tx.close();
}

/// Every kind of receive, in turn.
template <class Coroutine, class Ways>
Coroutine consume(asio::io_context&, Ways how, strait::receiver<message>& rx, outcome& out) {
  const auto count = [&](std::span<const message> got) {
    for (const message one : got) {
      if (one != out.received++) throw std::runtime_error{"out of order"};
    }
    return !got.empty();
  };
  for (;;) {
    const std::optional<message> one = co_await how.recv(rx);
    if (!one || !count({&*one, 1})) break;
    std::array<message, 3> some;
    const std::size_t n = co_await how.recv_many(rx, some);
    if (!count({some.data(), n})) break;
    const std::span<const message> there = co_await how.peek(rx);
    if (!count(there)) break;
    rx.release(there.size());
  }
  out.ended = true;
}

/// Both at once over a channel that holds four, so that both have to wait. `begin` starts the two in the context.
template <class Begin>
void exchange(Begin begin) {
  asio::io_context context{1};
  auto [tx, rx] = strait::make_channel<message>({.capacity = 4});
  outcome out;
  begin(context, tx, rx, out);
  context.run();
  CHECK(out.sent >= 7 * rounds);
  CHECK(out.received == out.sent);
  CHECK(out.ended);
}

/// The errors of every operation: `codes` are the receives' and then the sends'.
template <class Coroutine, class Ways>
Coroutine fail_thrown(asio::io_context&, Ways how, strait::receiver<message>& rx, strait::sender<message>& tx,
                      std::vector<std::error_code>& codes) {
  std::array<message, 2> some{};
  // Each in a block of its own: a coroutine may not await in a handler.
  try {
    (void)co_await how.recv(rx);
  } catch (const std::system_error& error) {
    codes.push_back(error.code());
  }
  try {
    (void)co_await how.recv_many(rx, some);
  } catch (const std::system_error& error) {
    codes.push_back(error.code());
  }
  try {
    (void)co_await how.peek(rx);
  } catch (const std::system_error& error) {
    codes.push_back(error.code());
  }
  try {
    co_await how.send(tx, message{1});
  } catch (const std::system_error& error) {
    codes.push_back(error.code());
  }
  try {
    (void)co_await how.send_many(tx, some);
  } catch (const std::system_error& error) {
    codes.push_back(error.code());
  }
  try {
    (void)co_await how.reserve(tx, std::size_t{2});
  } catch (const std::system_error& error) {
    codes.push_back(error.code());
  }
}

template <class Coroutine, class Ways>
Coroutine fail_set(asio::io_context&, Ways how, strait::receiver<message>& rx, strait::sender<message>& tx,
                   std::vector<std::error_code>& codes) {
  std::array<message, 2> some{};
  std::error_code error;
  const std::optional<message> one = co_await how.recv(rx, error);
  if (!one) codes.push_back(std::exchange(error, {}));
  const std::size_t n = co_await how.recv_many(rx, some, error);
  if (n == 0) codes.push_back(std::exchange(error, {}));
  const std::span<const message> there = co_await how.peek(rx, error);
  if (there.empty()) codes.push_back(std::exchange(error, {}));
  co_await how.send(tx, message{1}, error);
  codes.push_back(std::exchange(error, {}));
  const std::size_t sent = co_await how.send_many(tx, some, error);
  if (sent == 0) codes.push_back(std::exchange(error, {}));
  const strait::permit<message> room = co_await how.reserve(tx, std::size_t{2}, error);
  if (room.messages().empty()) codes.push_back(std::exchange(error, {}));
}

/// A receiver whose channel holds rubbish, and a sender whose receiver has closed.
template <class Begin>
void fail(Begin begin) {
  asio::io_context context{1};
  watched_channel<message> broken;
  broken.sender_word->store(77);
  watched_channel<message> ended;
  ended.rx.close();
  std::vector<std::error_code> codes;
  begin(context, broken.rx, ended.tx, codes);
  context.run();
  REQUIRE(codes.size() == 6);
  for (std::size_t i = 0; i < 6; ++i) CHECK(codes[i] == (i < 3 ? strait::errc::corrupt : strait::errc::closed));
}

using of_context = asio::io_context::executor_type;
using of_strand = asio::strand<of_context>;
template <class T>
using coro = asio::experimental::coro<void, T>;
// What a coro awaits; with the other of the two, neither version compiles under clang.
#if ASIO_VERSION >= 102300
constexpr auto token_in_coro = asio::deferred;
#else
constexpr auto token_in_coro = asio::experimental::use_coro;
#endif

/// Begins a coroutine that is none of Asio's and no task where a hub is found: in a turn.
template <class Begin>
void in_turn(asio::io_context& context, Begin begin) {
  strait::spawn(context, [](Begin what) -> strait::task<> {
    what();
    co_return;
  }(std::move(begin)));
}

}  // namespace

// ---- coroutines ----------------------------------------------------------------------------------------------------

TEST_CASE("every operation in an asio::awaitable") {
  using coroutine = asio::awaitable<void>;
  SUBCASE("directly") {
    exchange([](auto& context, auto& tx, auto& rx, outcome& out) {
      asio::co_spawn(context, consume<coroutine>(context, directly{}, rx, out), rethrow);
      asio::co_spawn(context, produce<coroutine>(context, directly{}, tx, out), rethrow);
    });
    fail([](auto& context, auto& rx, auto& tx, auto& codes) {
      asio::co_spawn(context, fail_thrown<coroutine>(context, directly{}, rx, tx, codes), rethrow);
    });
    fail([](auto& context, auto& rx, auto& tx, auto& codes) {
      asio::co_spawn(context, fail_set<coroutine>(context, directly{}, rx, tx, codes), rethrow);
    });
  }
  SUBCASE("with use_awaitable") {
    const by_token how{asio::use_awaitable};
    exchange([&](auto& context, auto& tx, auto& rx, outcome& out) {
      asio::co_spawn(context, consume<coroutine>(context, how, rx, out), rethrow);
      asio::co_spawn(context, produce<coroutine>(context, how, tx, out), rethrow);
    });
    fail([&](auto& context, auto& rx, auto& tx, auto& codes) {
      asio::co_spawn(context, fail_thrown<coroutine>(context, how, rx, tx, codes), rethrow);
    });
  }
#if ASIO_VERSION >= 102300
  SUBCASE("with deferred") {
    const by_token how{asio::deferred};
    exchange([&](auto& context, auto& tx, auto& rx, outcome& out) {
      asio::co_spawn(context, consume<coroutine>(context, how, rx, out), rethrow);
      asio::co_spawn(context, produce<coroutine>(context, how, tx, out), rethrow);
    });
  }
#endif
}

TEST_CASE("every operation in an asio::awaitable of another executor") {
  SUBCASE("an io_context's") {
    using coroutine = asio::awaitable<void, of_context>;
    const rebound<of_context> how;
    exchange([&](auto& context, auto& tx, auto& rx, outcome& out) {
      asio::co_spawn(context.get_executor(), consume<coroutine>(context, how, rx, out), rethrow);
      asio::co_spawn(context.get_executor(), produce<coroutine>(context, how, tx, out), rethrow);
    });
    fail([&](auto& context, auto& rx, auto& tx, auto& codes) {
      asio::co_spawn(context.get_executor(), fail_thrown<coroutine>(context, how, rx, tx, codes), rethrow);
    });
    fail([&](auto& context, auto& rx, auto& tx, auto& codes) {
      asio::co_spawn(context.get_executor(), fail_set<coroutine>(context, how, rx, tx, codes), rethrow);
    });
  }
  SUBCASE("a strand's") {
    using coroutine = asio::awaitable<void, of_strand>;
    const rebound<of_strand> how;
    exchange([&](auto& context, auto& tx, auto& rx, outcome& out) {
      asio::co_spawn(asio::make_strand(context.get_executor()), consume<coroutine>(context, how, rx, out), rethrow);
      asio::co_spawn(asio::make_strand(context.get_executor()), produce<coroutine>(context, how, tx, out), rethrow);
    });
  }
}

TEST_CASE("every operation in a strait::task") {
  using coroutine = strait::task<>;
  exchange([](auto& context, auto& tx, auto& rx, outcome& out) {
    strait::spawn(context, consume<coroutine>(context, directly{}, rx, out));
    strait::spawn(context, produce<coroutine>(context, directly{}, tx, out));
  });
  fail([](auto& context, auto& rx, auto& tx, auto& codes) {
    strait::spawn(context, fail_thrown<coroutine>(context, directly{}, rx, tx, codes));
  });
  fail([](auto& context, auto& rx, auto& tx, auto& codes) {
    strait::spawn(context, fail_set<coroutine>(context, directly{}, rx, tx, codes));
  });
}

TEST_CASE("every operation in an asio::experimental::coro") {
  using coroutine = coro<void>;
  const by_token how{token_in_coro};
  exchange([&](auto& context, auto& tx, auto& rx, outcome& out) {
    asio::experimental::co_spawn(consume<coroutine>(context, how, rx, out), rethrow);
    asio::experimental::co_spawn(produce<coroutine>(context, how, tx, out), rethrow);
  });
  fail([&](auto& context, auto& rx, auto& tx, auto& codes) {
    asio::experimental::co_spawn(fail_thrown<coroutine>(context, how, rx, tx, codes), rethrow);
  });
}

TEST_CASE("every operation in a coroutine that knows neither Asio nor strait") {
  using coroutine = bare_coroutine;
  exchange([](auto& context, auto& tx, auto& rx, outcome& out) {
    in_turn(context, [&] { consume<coroutine>(context, directly{}, rx, out); });
    in_turn(context, [&] { produce<coroutine>(context, directly{}, tx, out); });
  });
  fail([](auto& context, auto& rx, auto& tx, auto& codes) {
    in_turn(context, [&] { fail_thrown<coroutine>(context, directly{}, rx, tx, codes); });
  });
  fail([](auto& context, auto& rx, auto& tx, auto& codes) {
    in_turn(context, [&] { fail_set<coroutine>(context, directly{}, rx, tx, codes); });
  });
}

TEST_CASE("a coroutine of each kind on one channel") {
  exchange([](auto& context, auto& tx, auto& rx, outcome& out) {
    asio::experimental::co_spawn(consume<coro<void>>(context, by_token{token_in_coro}, rx, out), rethrow);
    strait::spawn(context, produce<strait::task<>>(context, directly{}, tx, out));
  });
  exchange([](auto& context, auto& tx, auto& rx, outcome& out) {
    strait::spawn(context, consume<strait::task<>>(context, directly{}, rx, out));
    asio::co_spawn(context, produce<asio::awaitable<void>>(context, directly{}, tx, out), rethrow);
  });
}

// ---- completion tokens ---------------------------------------------------------------------------------------------

namespace {

// One operation each: `unblock` gives it what it waits for, `begin` begins it, and `check` is given what it yields.

struct receiving {
  strait::sender<message> tx;
  strait::receiver<message> rx;
  receiving() { std::tie(tx, rx) = strait::make_channel<message>({.capacity = 2}); }
  void unblock() { CHECK(tx.try_send(message{1})); }
  /// Nothing was taken by an operation that was cancelled.
  void check_untouched() {
    unblock();
    CHECK(rx.try_recv() == 1);
    CHECK_FALSE(rx.try_recv());
  }
};

struct recv_case : receiving {
  auto begin(auto&& token) { return strait::async_recv(rx, std::forward<decltype(token)>(token)); }
  void check(const std::optional<message>& got) { CHECK(got == 1); }
  void check_aborted(const std::optional<message>& got) { CHECK_FALSE(got); }
};
struct recv_many_case : receiving {
  std::array<message, 3> into{};
  auto begin(auto&& token) { return strait::async_recv_many(rx, into, std::forward<decltype(token)>(token)); }
  void check(std::size_t n) {
    CHECK(n == 1);
    CHECK(into[0] == 1);
  }
  void check_aborted(std::size_t n) { CHECK(n == 0); }
};
struct peek_case : receiving {
  auto begin(auto&& token) { return strait::async_peek(rx, std::forward<decltype(token)>(token)); }
  void check(std::span<const message> there) {
    REQUIRE(there.size() == 1);
    CHECK(there[0] == 1);
  }
  void check_aborted(std::span<const message> there) { CHECK(there.empty()); }
};

struct sending {
  strait::sender<message> tx;
  strait::receiver<message> rx;
  sending() {
    std::tie(tx, rx) = strait::make_channel<message>({.capacity = 1});
    CHECK(tx.try_send(message{0}));
  }
  void unblock() { CHECK(rx.try_recv() == 0); }
  void check_sent() {
    CHECK(rx.try_recv() == 1);
    CHECK_FALSE(rx.try_recv());
  }
  void check_untouched() {
    unblock();
    CHECK_FALSE(rx.try_recv());
  }
};

struct send_case : sending {
  auto begin(auto&& token) { return strait::async_send(tx, message{1}, std::forward<decltype(token)>(token)); }
  void check() { check_sent(); }
  void check_aborted() {}
};
struct send_many_case : sending {
  std::array<message, 1> batch{1};
  auto begin(auto&& token) { return strait::async_send_many(tx, batch, std::forward<decltype(token)>(token)); }
  void check(std::size_t n) {
    CHECK(n == 1);
    check_sent();
  }
  void check_aborted(std::size_t n) { CHECK(n == 0); }
};
struct reserve_case : sending {
  auto begin(auto&& token) { return strait::async_reserve(tx, 1, std::forward<decltype(token)>(token)); }
  void check(strait::permit<message> room) {
    REQUIRE(room.messages().size() == 1);
    room.messages()[0] = 1;
    room.commit();
    check_sent();
  }
  void check_aborted(const strait::permit<message>& room) { CHECK(room.messages().empty()); }
};

/// When the operation can go on: before it begins, or only when it waits.
enum class when : std::uint8_t { ready, waits };

/// Calls `use` with the type of each operation.
template <class Use>
void each_case(Use use) {
  use(std::type_identity<recv_case>{});
  use(std::type_identity<recv_many_case>{});
  use(std::type_identity<peek_case>{});
  use(std::type_identity<send_case>{});
  use(std::type_identity<send_many_case>{});
  use(std::type_identity<reserve_case>{});
}

/// Has `one(context, operation, completed)` begin each operation, in both ways, and runs the context; then calls what
/// `one` returned, if that is anything. One of the two must have counted one completion.
template <class One>
void each_operation(One one) {
  each_case([&]<class Case>(std::type_identity<Case>) {
    for (const when how : {when::ready, when::waits}) {
      asio::io_context context{1};
      Case operation;
      int completed = 0;
      if (how == when::ready) operation.unblock();
      const auto go_on = [&] {
        if (how == when::waits) {
          context.poll();
          CHECK(completed == 0);
          operation.unblock();
        }
        context.restart();
        context.run();
      };
      if constexpr (std::is_void_v<decltype(one(context, operation, completed))>) {
        one(context, operation, completed);
        go_on();
      } else {
        const auto afterwards = one(context, operation, completed);
        go_on();
        afterwards();
      }
      CHECK(completed == 1);
    }
  });
}

/// A handler that checks what it is called with.
template <class Case>
auto checking(Case& operation, int& completed) {
  return [&](std::error_code error, auto... results) {
    CHECK_FALSE(error);
    operation.check(std::move(results)...);
    ++completed;
  };
}

/// A handler of an operation that is cancelled.
template <class Case>
auto aborted(Case& operation, int& completed) {
  return [&](std::error_code error, auto... results) {
    CHECK(error == asio::error::operation_aborted);
    operation.check_aborted(std::move(results)...);
    ++completed;
  };
}

/// What was allocated through it, and where.
struct ledger {
  std::size_t allocations = 0;
  std::size_t living = 0;
};
template <class T>
struct counting_allocator {
  using value_type = T;
  ledger* counts;
  explicit counting_allocator(ledger& to) noexcept : counts{&to} {}
  template <class U>
  counting_allocator(const counting_allocator<U>& other) noexcept : counts{other.counts} {}
  T* allocate(std::size_t n) {
    ++counts->allocations;
    ++counts->living;
    return std::allocator<T>{}.allocate(n);
  }
  void deallocate(T* block, std::size_t n) noexcept {
    --counts->living;
    std::allocator<T>{}.deallocate(block, n);
  }
  template <class U>
  bool operator==(const counting_allocator<U>& other) const noexcept {
    return counts == other.counts;
  }
};

/// A token that somebody else wrote: leaves the results in a tuple and returns a pointer to it.
struct into_box {
  asio::io_context* where;
};

}  // namespace

template <class... Results>
class asio::async_result<into_box, void(Results...)> {
 public:
  using box = std::optional<std::tuple<std::decay_t<Results>...>>;
  template <class Initiation, class... Arguments>
  static std::shared_ptr<box> initiate(Initiation&& initiation, into_box token, Arguments&&... arguments) {
    auto made = std::make_shared<box>();
    std::forward<Initiation>(initiation)(
        asio::bind_executor(*token.where, [made](Results... results) { made->emplace(std::move(results)...); }),
        std::forward<Arguments>(arguments)...);
    return made;
  }
};

TEST_CASE("a callback, on the executor that it is bound to") {
  each_operation([](asio::io_context& context, auto& operation, int& completed) {
    const auto strand = asio::make_strand(context);
    operation.begin(asio::bind_executor(strand, [&, strand](std::error_code error, auto... results) {
      CHECK(strand.running_in_this_thread());
      checking(operation, completed)(error, std::move(results)...);
    }));
    CHECK(completed == 0);  // never within the call
  });
}

TEST_CASE("a callback without an executor") {
  each_operation([](asio::io_context& context, auto& operation, int& completed) {
    // Asio's system executor: another thread. The context has to stay until it was here.
    auto work = std::make_shared<asio::executor_work_guard<of_context>>(context.get_executor());
    operation.begin([&, work, here = std::this_thread::get_id()](std::error_code error, auto... results) {
      const bool elsewhere = std::this_thread::get_id() != here;
      asio::post(context, [&, work, elsewhere, error,
                           box = std::make_shared<std::tuple<decltype(results)...>>(std::move(results)...)] {
        CHECK(elsewhere);
        std::apply([&](auto&... all) { checking(operation, completed)(error, std::move(all)...); }, *box);
      });
    });
  });
}

TEST_CASE("use_future") {
  each_operation([](asio::io_context& context, auto& operation, int& completed) {
    return [&, future = std::make_shared<decltype(operation.begin(asio::use_future))>(
                   operation.begin(asio::bind_executor(context, asio::use_future)))] {
      REQUIRE(future->wait_for(std::chrono::seconds{0}) == std::future_status::ready);
      if constexpr (std::is_void_v<decltype(future->get())>) {
        future->get();
        operation.check();
      } else {
        operation.check(future->get());
      }
      ++completed;
    };
  });
}

TEST_CASE("use_awaitable, with its errors thrown, set, or in a tuple") {
  each_operation([](asio::io_context& context, auto& operation, int& completed) {
    asio::co_spawn(
        context,
        [](auto& of, int& count) -> asio::awaitable<void> {
          if constexpr (std::is_void_v<decltype(of.begin(asio::use_awaitable).await_resume())>) {
            co_await of.begin(asio::use_awaitable);
            of.check();
          } else {
            of.check(co_await of.begin(asio::use_awaitable));
          }
          ++count;
        }(operation, completed),
        rethrow);
  });
  each_operation([](asio::io_context& context, auto& operation, int& completed) {
    asio::co_spawn(
        context,
        [](auto& of, int& count) -> asio::awaitable<void> {
          std::error_code error = std::make_error_code(std::errc::io_error);
          if constexpr (std::is_void_v<decltype(of.begin(asio::use_awaitable).await_resume())>) {
            co_await of.begin(asio::redirect_error(asio::use_awaitable, error));
            of.check();
          } else {
            of.check(co_await of.begin(asio::redirect_error(asio::use_awaitable, error)));
          }
          CHECK_FALSE(error);
          ++count;
        }(operation, completed),
        rethrow);
  });
  each_operation([](asio::io_context& context, auto& operation, int& completed) {
    asio::co_spawn(
        context,
        [](auto& of, int& count) -> asio::awaitable<void> {
          auto all = co_await of.begin(moved::as_tuple(asio::use_awaitable));
          std::apply(checking(of, count), std::move(all));
        }(operation, completed),
        rethrow);
  });
}

TEST_CASE("as_tuple around a callback") {
  each_operation([](asio::io_context& context, auto& operation, int& completed) {
    operation.begin(moved::as_tuple(
        asio::bind_executor(context, [&](auto all) { std::apply(checking(operation, completed), std::move(all)); })));
  });
}

TEST_CASE("redirect_error around a callback") {
  each_operation([](asio::io_context& context, auto& operation, int& completed) {
    auto error = std::make_shared<std::error_code>(std::make_error_code(std::errc::io_error));
    operation.begin(asio::redirect_error(
        asio::bind_executor(
            context, [&, error](auto... results) { checking(operation, completed)(*error, std::move(results)...); }),
        *error));
  });
}

TEST_CASE("deferred: nothing happens before it is called") {
  each_operation([](asio::io_context& context, auto& operation, int& completed) {
    auto later = operation.begin(moved::deferred);
    CHECK(context.poll() == 0);
    context.restart();
    std::move(later)(asio::bind_executor(context, checking(operation, completed)));
  });
}

TEST_CASE("bind_allocator: what waits lies in the handler's own memory, and nothing stays there") {
  std::size_t operations = 0;
  ledger counts;
  each_operation([&](asio::io_context& context, auto& operation, int& completed) {
    ++operations;
    operation.begin(asio::bind_allocator(counting_allocator<void*>{counts},
                                         asio::bind_executor(context, [&](std::error_code error, auto... results) {
                                           // Given back before the handler runs, so that it may begin the next.
                                           CHECK(counts.living == 0);
                                           checking(operation, completed)(error, std::move(results)...);
                                         })));
    CHECK(counts.living >= 1);
  });
  CHECK(counts.allocations >= operations);
  CHECK(counts.living == 0);
}

TEST_CASE("bind_cancellation_slot: a cancelled operation did nothing") {
  each_operation([](asio::io_context& context, auto& operation, int& completed) {
    // Ready or not, one that was not cancelled completes as ever ...
    auto never = std::make_shared<asio::cancellation_signal>();
    operation.begin(asio::bind_executor(
        context, asio::bind_cancellation_slot(never->slot(), [&, never](std::error_code error, auto... results) {
          checking(operation, completed)(error, std::move(results)...);
        })));
  });
  each_case([]<class Case>(std::type_identity<Case>) {
    // ... and one that is cancelled while it waits says so.
    asio::io_context context{1};
    Case operation;
    asio::cancellation_signal stop;
    int completed = 0;
    operation.begin(
        asio::bind_executor(context, asio::bind_cancellation_slot(stop.slot(), aborted(operation, completed))));
    context.poll();
    CHECK(completed == 0);
    stop.emit(asio::cancellation_type::terminal);
    context.restart();
    context.run();
    CHECK(completed == 1);
    operation.check_untouched();
  });
}

TEST_CASE("what a cancelled async_send_many had sent is told, and stays sent") {
  asio::io_context context{1};
  auto [tx, rx] = strait::make_channel<message>({.capacity = 2});
  const std::array<message, 5> batch{1, 2, 3, 4, 5};
  asio::cancellation_signal stop;
  std::size_t told = 0;
  strait::async_send_many(tx, batch,
                          asio::bind_executor(context, asio::bind_cancellation_slot(
                                                           stop.slot(), [&](std::error_code error, std::size_t sent) {
                                                             CHECK(error == asio::error::operation_aborted);
                                                             told = sent;
                                                           })));
  context.poll();
  stop.emit(asio::cancellation_type::partial);
  context.restart();
  context.run();
  CHECK(told == 2);
  CHECK(rx.try_recv() == 1);
  CHECK(rx.try_recv() == 2);
  CHECK_FALSE(rx.try_recv());
}

#if __has_include(<asio/cancel_after.hpp>)
TEST_CASE("cancel_after") {
  each_operation([](asio::io_context& context, auto& operation, int& completed) {
    operation.begin(
        asio::cancel_after(std::chrono::hours{1}, asio::bind_executor(context, checking(operation, completed))));
  });
  each_case([]<class Case>(std::type_identity<Case>) {
    asio::io_context context{1};
    Case operation;
    int completed = 0;
    operation.begin(
        asio::cancel_after(std::chrono::milliseconds{1}, asio::bind_executor(context, aborted(operation, completed))));
    context.run();
    CHECK(completed == 1);
    operation.check_untouched();
  });
}
#endif

TEST_CASE("a token of the user's own") {
  each_operation([](asio::io_context& context, auto& operation, int& completed) {
    return [&, box = operation.begin(into_box{&context})] {
      REQUIRE(*box);
      std::apply(checking(operation, completed), std::move(**box));
    };
  });
}
