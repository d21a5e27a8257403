// Asio's own operations awaited in a strait::task: co_await socket.async_read_some(buffer, strait::use_op).
#include <strait/asio.hpp>

#include <doctest/doctest.h>
#include <signal.h>

#include <array>
#include <asio/buffer.hpp>
#include <asio/dispatch.hpp>
#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/local/connect_pair.hpp>
#include <asio/local/stream_protocol.hpp>
#include <asio/post.hpp>
#include <asio/read.hpp>
#include <asio/signal_set.hpp>
#include <asio/steady_timer.hpp>
#include <asio/thread_pool.hpp>
#include <asio/write.hpp>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <future>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "asio_moved.hpp"
#include "coroutines.hpp"

import strait;

namespace {

using socket_type = asio::local::stream_protocol::socket;
using strait::use_op;

strait::task<> echo(socket_type peer, std::size_t& echoed) {
  std::array<char, 64> buffer;
  for (;;) {
    std::error_code error;
    const std::size_t n = co_await peer.async_read_some(asio::buffer(buffer), use_op(error));
    if (error == asio::error::eof) break;
    if (error) throw std::system_error{error};
    co_await asio::async_write(peer, asio::buffer(buffer, n), use_op);
    echoed += n;
  }
}

strait::task<> ask(socket_type server, int rounds, bool& done) {
  for (int i = 0; i < rounds; ++i) {
    const std::string question = "question " + std::to_string(i);
    std::string answer(question.size(), ' ');
    const std::size_t written = co_await asio::async_write(server, asio::buffer(question), use_op);
    const std::size_t read = co_await asio::async_read(server, asio::buffer(answer), use_op);
    if (written != read || question != answer) throw std::runtime_error{"a wrong answer"};
  }
  done = true;
}

/// An operation that is complete before its initiation returns.
template <class Token>
auto at_once(int value, Token&& token) {
  return asio::async_initiate<Token, void(std::error_code, int)>(
      [](auto handler, int result) { std::move(handler)(std::error_code{}, result); }, token, value);
}

/// Completes when the test says so, by calling the handler that it keeps; supports no cancellation.
template <class Token>
auto at_will(std::unique_ptr<strait::detail::op_handler<int>>& kept, Token&& token) {
  return asio::async_initiate<Token, void(int)>(
      [&kept](auto handler) { kept = std::make_unique<strait::detail::op_handler<int>>(std::move(handler)); }, token);
}

/// Runs `begin` in a turn of the context's hub, where a coroutine that is no task finds it, too.
template <class Begin>
void in_turn(asio::io_context& context, Begin begin) {
  strait::spawn(context, [](Begin what) -> strait::task<> {
    what();
    co_return;
  }(std::move(begin)));
  context.restart();
  context.poll();
}

}  // namespace

TEST_CASE("sockets in tasks: an echo server and its client in one context") {
  asio::io_context context{1};
  socket_type near{context};
  socket_type far{context};
  asio::local::connect_pair(near, far);
  std::size_t echoed = 0;
  bool done = false;
  strait::spawn(context, echo(std::move(far), echoed));
  strait::spawn(context, ask(std::move(near), 200, done));
  context.run();
  CHECK(done);
  CHECK(echoed > 200);
}

TEST_CASE("sockets in tasks on the workers of a runtime") {
  strait::runtime rt;
  std::size_t echoed = 0;
  bool done = false;
  std::promise<int> descriptor;
  rt.spawn([](std::size_t& count, bool& end, std::promise<int>& handed) -> strait::task<> {
    const asio::any_io_executor here = co_await strait::this_executor;
    socket_type near{here};
    socket_type far{here};
    asio::local::connect_pair(near, far);
    handed.set_value(far.release());
    co_await ask(std::move(near), 100, end);
    (void)count;
  }(echoed, done, descriptor));
  const int handed = descriptor.get_future().get();
  rt.spawn([](int socket, std::size_t& count) -> strait::task<> {
    co_await echo(socket_type{co_await strait::this_executor, asio::local::stream_protocol{}, socket}, count);
  }(handed, echoed));
  rt.join();
  CHECK(done);
  CHECK(echoed > 100);
}

TEST_CASE("what an operation completes with is what the await yields") {
  asio::io_context context{1};
  int checks = 0;
  strait::spawn(context, [](asio::io_context& in, int& done) -> strait::task<> {
    asio::steady_timer timer{in, std::chrono::nanoseconds{1}};
    static_assert(std::is_void_v<decltype(timer.async_wait(use_op).await_resume())>);
    co_await timer.async_wait(use_op);
    const int value = co_await at_once(7, use_op);
    CHECK(value == 7);
    const auto [error, same] = co_await at_once(8, moved::as_tuple(use_op));
    CHECK_FALSE(error);
    CHECK(same == 8);

    // An exception_ptr in the first place, and several values.
    auto [one, box] =
        co_await asio::async_initiate<const strait::use_op_t, void(std::exception_ptr, int, std::unique_ptr<int>)>(
            [](auto handler) { std::move(handler)(std::exception_ptr{}, 1, std::make_unique<int>(2)); }, use_op);
    CHECK(one == 1);
    REQUIRE(box);
    CHECK(*box == 2);
    std::string caught;
    try {
      co_await asio::async_initiate<const strait::use_op_t, void(std::exception_ptr)>(
          [](auto handler) { std::move(handler)(std::make_exception_ptr(std::runtime_error{"handed over"})); }, use_op);
    } catch (const std::runtime_error& error_thrown) {
      caught = error_thrown.what();
    }
    CHECK(caught == "handed over");
    ++done;
  }(context, checks));
  context.run();
  CHECK(checks == 1);
}

TEST_CASE("an operation's error is thrown, set, or in the tuple, as it was asked for") {
  asio::io_context context{1};
  int checks = 0;
  strait::spawn(context, [](asio::io_context& in, int& done) -> strait::task<> {
    // Each its own socket: Asio waits for an event in vain when a socket whose end it has seen is read once more.
    std::vector<socket_type> ended;
    for (int i = 0; i < 3; ++i) {
      socket_type far{in};
      asio::local::connect_pair(ended.emplace_back(in), far);
    }
    std::array<char, 4> buffer;
    std::error_code thrown;
    try {
      (void)co_await ended[0].async_read_some(asio::buffer(buffer), use_op);
    } catch (const std::system_error& error) {
      thrown = error.code();
    }
    CHECK(thrown == asio::error::eof);
    std::error_code set;
    const std::size_t none = co_await ended[1].async_read_some(asio::buffer(buffer), use_op(set));
    CHECK(set == asio::error::eof);
    CHECK(none == 0);
    const auto [error, n] = co_await ended[2].async_read_some(asio::buffer(buffer), moved::as_tuple(use_op));
    CHECK(error == asio::error::eof);
    CHECK(n == 0);
    asio::steady_timer timer{in, std::chrono::nanoseconds{1}};
    co_await timer.async_wait(use_op(set));
    CHECK_FALSE(set);
    ++done;
  }(context, checks));
  context.run();
  CHECK(checks == 1);
}

TEST_CASE("an operation that completes within its initiation does not suspend, however often") {
  asio::io_context context{1};
  int sum = 0;
  strait::spawn(context, [](asio::io_context& in, int& total) -> strait::task<> {
    // Would overflow the stack if each resumed the coroutine from within its initiation.
    for (int i = 0; i < 100'000; ++i) {
      total += co_await at_once(1, use_op);
      co_await asio::dispatch(in, use_op);
    }
  }(context, sum));
  context.run();
  CHECK(sum == 100'000);
}

TEST_CASE("a resolver, a signal and a tcp connection") {
  asio::io_context context{1};
  int checks = 0;
  strait::spawn(context, [](asio::io_context& in, int& done) -> strait::task<> {
    asio::ip::tcp::acceptor door{in, {asio::ip::make_address("127.0.0.1"), 0}};
    asio::ip::tcp::resolver resolver{in};
    const auto found =
        co_await resolver.async_resolve("127.0.0.1", std::to_string(door.local_endpoint().port()), use_op);
    asio::ip::tcp::socket client{in};
    co_await client.async_connect(found.begin()->endpoint(), use_op);
    asio::ip::tcp::socket server = co_await door.async_accept(use_op);
    const std::string_view sent = "hello";
    co_await asio::async_write(client, asio::buffer(sent), use_op);
    std::array<char, 5> got;
    co_await asio::async_read(server, asio::buffer(got), use_op);
    CHECK(std::string_view{got.data(), got.size()} == sent);

    asio::signal_set signals{in, SIGUSR1};
    ::raise(SIGUSR1);
    const int signal = co_await signals.async_wait(use_op);
    CHECK(signal == SIGUSR1);
    ++done;
  }(context, checks));
  context.run();
  CHECK(checks == 1);
}

TEST_CASE("a task that a parked hub's socket resumes goes on to its channel at once") {
  asio::io_context context{1};
  watched_channel<int> channel{{.capacity = 4, .wait = strait::wait_policy::park}};
  watched_channel<int> back{{.capacity = 4, .wait = strait::wait_policy::park}};
  socket_type near{context};
  socket_type far{context};
  asio::local::connect_pair(near, far);
  strait::spawn(context,
                [](socket_type from, strait::sender<int> to, strait::receiver<int>& answers) -> strait::task<> {
                  for (;;) {
                    int number = 0;
                    std::error_code error;
                    co_await asio::async_read(from, asio::buffer(&number, sizeof number), use_op(error));
                    if (error) break;
                    co_await to.send(number);
                    const auto answer = co_await answers.recv();
                    co_await asio::async_write(from, asio::buffer(&*answer, sizeof *answer), use_op);
                  }
                }(std::move(far), std::move(channel.tx), back.rx));
  std::thread running{[&] { context.run(); }};
  std::thread answering{[&] {
    while (const auto number = channel.rx.blocking_recv()) back.tx.blocking_send(*number + 1);
  }};
  for (int i = 0; i < 500; ++i) {
    asio::write(near, asio::buffer(&i, sizeof i));
    int answer = 0;
    asio::read(near, asio::buffer(&answer, sizeof answer));
    REQUIRE(answer == i + 1);
  }
  near.close();
  running.join();
  answering.join();
}

TEST_CASE("a task goes on in its own context when the operation belongs to another") {
  asio::io_context here{1};
  asio::io_context there{1};
  auto keep = asio::make_work_guard(there);
  int right = 0;
  strait::spawn(here, [](asio::io_context& other, int& on_own_thread) -> strait::task<> {
    const auto home = std::this_thread::get_id();
    for (int i = 0; i < 100; ++i) {
      asio::steady_timer timer{other, std::chrono::nanoseconds{1}};
      co_await timer.async_wait(use_op);
      if (std::this_thread::get_id() == home) ++on_own_thread;
    }
  }(there, right));
  std::thread foreign{[&] { there.run(); }};
  here.run();  // does not return before the task has ended
  CHECK(right == 100);
  keep.reset();
  foreign.join();
}

TEST_CASE("in a context that several threads run, tasks go on one at a time") {
  asio::thread_pool pool{4};
  constexpr int tasks = 8;
  constexpr int rounds = 500;
  int plain = 0;  // not atomic, on purpose: the sanitizer would see two tasks at once
  std::atomic<int> ended{0};
  for (int i = 0; i < tasks; ++i) {
    strait::spawn(pool.get_executor(), [](asio::thread_pool& in, int& count, std::atomic<int>& end) -> strait::task<> {
      for (int round = 0; round < rounds; ++round) {
        co_await asio::post(in, use_op);
        ++count;
        asio::steady_timer timer{in, std::chrono::nanoseconds{1}};
        co_await timer.async_wait(use_op);
        ++count;
      }
      ++end;
    }(pool, plain, ended));
  }
  pool.join();
  CHECK(ended == tasks);
  CHECK(plain == 2 * tasks * rounds);
}

// ---- a coroutine that is destroyed while it waits
// --------------------------------------------------------------------

TEST_CASE("destroying a coroutine cancels its read, which has taken nothing, and run() returns") {
  asio::io_context context{1};
  socket_type near{context};
  socket_type far{context};
  asio::local::connect_pair(near, far);
  bool went_on = false;
  std::optional<owned_coroutine> waiting;
  waiting.emplace([](socket_type& from, bool& on) -> owned_coroutine {
    std::array<char, 16> buffer;  // of the frame: what is read after its end would be written to freed memory
    (void)co_await from.async_read_some(asio::buffer(buffer), use_op);
    on = true;
  }(near, went_on));
  in_turn(context, [&] { waiting->resume(); });
  context.poll();
  in_turn(context, [&] { waiting.reset(); });
  asio::write(far, asio::buffer("still there", 11));
  context.restart();
  context.run();
  CHECK_FALSE(went_on);
  CHECK(near.available() == 11);
}

TEST_CASE("destroying a coroutine between the parts of a composed operation, and after its completion was queued") {
  asio::io_context context{1};
  socket_type near{context};
  socket_type far{context};
  asio::local::connect_pair(near, far);
  bool went_on = false;
  for (const bool completed : {false, true}) {
    std::optional<owned_coroutine> waiting;
    waiting.emplace([](socket_type& from, bool& on) -> owned_coroutine {
      std::array<char, 64> buffer;
      (void)co_await asio::async_read(from, asio::buffer(buffer), use_op);
      on = true;
    }(near, went_on));
    in_turn(context, [&] { waiting->resume(); });
    const std::string part(completed ? 64 : 8, 'x');
    asio::write(far, asio::buffer(part));
    // In one handler: nothing of what the reactor has found is delivered in between.
    in_turn(context, [&] { waiting.reset(); });
    context.restart();
    context.run();
    std::vector<char> rest(near.available());
    asio::read(near, asio::buffer(rest));
  }
  std::optional<owned_coroutine> posted;
  posted.emplace([](asio::io_context& in, bool& on) -> owned_coroutine {
    co_await asio::post(in, use_op);
    on = true;
  }(context, went_on));
  strait::spawn(context, [](std::optional<owned_coroutine>& one) -> strait::task<> {
    one->resume();
    one.reset();  // its completion is in the queue
    co_return;
  }(posted));
  context.restart();
  context.run();
  CHECK_FALSE(went_on);
}

TEST_CASE("an operation that cannot be cancelled completes into nothing when its coroutine is gone") {
  asio::io_context context{1};
  std::unique_ptr<strait::detail::op_handler<int>> kept;
  int got = 0;
  const auto wait = [](std::unique_ptr<strait::detail::op_handler<int>>& keep, int& into) -> owned_coroutine {
    into = co_await at_will(keep, use_op);
  };
  {
    std::optional<owned_coroutine> waiting;
    waiting.emplace(wait(kept, got));
    in_turn(context, [&] { waiting->resume(); });
    REQUIRE(kept);
    in_turn(context, [&] { waiting.reset(); });
    in_turn(context, [&] { (*std::exchange(kept, nullptr))(1); });
  }
  CHECK(got == 0);
  // And one whose handler is dropped first: the coroutine waits for ever, and is freed by whoever holds it.
  {
    std::optional<owned_coroutine> waiting;
    waiting.emplace(wait(kept, got));
    in_turn(context, [&] { waiting->resume(); });
    kept.reset();
    in_turn(context, [&] { waiting.reset(); });
  }
  // And one that completes.
  const owned_coroutine waiting = wait(kept, got);
  in_turn(context, [&] { waiting.resume(); });
  in_turn(context, [&] { (*std::exchange(kept, nullptr))(3); });
  CHECK(got == 3);
  CHECK(waiting.done());
}

TEST_CASE("a context may be destroyed while tasks wait for operations") {
  int living = 0;
  {
    asio::io_context context{1};
    {
      socket_type near{context};
      socket_type far{context};
      asio::local::connect_pair(near, far);
      strait::spawn(context, [](socket_type& from, int& count) -> strait::task<> {
        const counted here{count};
        std::array<char, 16> buffer;
        (void)co_await asio::async_read(from, asio::buffer(buffer), use_op);
      }(near, living));
      strait::spawn(context, [](asio::io_context& in, int& count) -> strait::task<> {
        const counted here{count};
        asio::steady_timer timer{in, std::chrono::hours{1}};
        co_await timer.async_wait(use_op);
      }(context, living));
      strait::spawn(context, [](asio::io_context& in, int& count) -> strait::task<> {
        const counted here{count};
        for (;;) co_await asio::post(in, use_op);
      }(context, living));
      for (int i = 0; i < 20; ++i) context.poll_one();
      CHECK(living == 3);
    }
    // The sockets are gone before the task that waits for one of them.
  }
  CHECK(living == 0);
}

TEST_CASE("a runtime may be destroyed while tasks wait for operations") {
  std::atomic<int> began{0};
  auto held = std::make_shared<int>(0);
  {
    strait::runtime rt;
    for (int i = 0; i < 4; ++i) {
      rt.spawn([](std::atomic<int>& count, std::shared_ptr<int>) -> strait::task<> {
        asio::steady_timer timer{co_await strait::this_executor, std::chrono::hours{1}};
        ++count;
        co_await timer.async_wait(use_op);
      }(began, held));
    }
    REQUIRE(eventually([&] { return began == 4; }));
    rt.stop();
  }
  CHECK(held.use_count() == 1);  // their frames are gone
}

TEST_CASE("a coroutine that belongs to nobody's hub is told so") {
  asio::io_context context{1};
  std::error_code code;
  const owned_coroutine alone = [](asio::io_context& in, std::error_code& got) -> owned_coroutine {
    try {
      co_await asio::post(in, use_op);
    } catch (const std::system_error& error) {
      got = error.code();
    }
  }(context, code);
  alone.resume();
  CHECK(code == strait::errc::no_hub);
  CHECK(alone.done());
}

TEST_CASE("an exception that leaves a task after an operation is thrown out of run()") {
  asio::io_context context{1};
  strait::spawn(context, [](asio::io_context& in) -> strait::task<> {
    co_await asio::post(in, use_op);
    throw std::runtime_error{"after the operation"};
  }(context));
  std::string caught;
  try {
    context.run();
  } catch (const std::runtime_error& error) {
    caught = error.what();
  }
  CHECK(caught == "after the operation");
  context.run();  // the hub still works
}
