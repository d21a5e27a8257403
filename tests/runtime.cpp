#include <strait/asio.hpp>

#include <doctest/doctest.h>
#include <errno.h>
#include <sched.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <asio/co_spawn.hpp>
#include <asio/io_context.hpp>
#include <asio/local/connect_pair.hpp>
#include <asio/local/stream_protocol.hpp>
#include <asio/post.hpp>
#include <asio/read.hpp>
#include <asio/steady_timer.hpp>
#include <asio/use_awaitable.hpp>
#include <asio/use_future.hpp>
#include <asio/write.hpp>
#include <atomic>
#include <chrono>
#include <coroutine>
#include <cstdint>
#include <exception>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <stop_token>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "coroutines.hpp"

import strait;

namespace {

using message = std::uint64_t;

/// The first CPU of this machine: where tests put a worker, or several.
unsigned first_cpu() {
  return strait::topology::machine().cpus().front().id;
}
strait::runtime_options workers(std::size_t count) {
  return {.cpus = std::vector<unsigned>(count, first_cpu())};
}

strait::task<> produce(strait::sender<message> tx, message count) {
  for (message i = 0; i < count; ++i) co_await tx.send(i);
}
strait::task<> consume(strait::receiver<message> rx, std::atomic<message>& got) {
  while (const auto value = co_await rx.recv()) {
    if (*value != got) throw std::runtime_error{"out of order"};
    ++got;
  }
}

/// The exit status of this program, run anew with that one skipped case on a machine that hwloc makes up.
int status_on(const char* machine, const char* skipped_case) {
  const std::string filter = std::string{"--test-case="} + skipped_case;
  std::string program = "/proc/self/exe";
  std::string no_skip = "--no-skip";
  std::array<char*, 4> arguments{program.data(), no_skip.data(), const_cast<char*>(filter.c_str()), nullptr};
  std::vector<std::string> texts;
  for (char** entry = environ; *entry != nullptr; ++entry) texts.emplace_back(*entry);
  texts.push_back(std::string{"HWLOC_SYNTHETIC="} + machine);
  std::vector<char*> environment;
  for (std::string& text : texts) environment.push_back(text.data());
  environment.push_back(nullptr);
  pid_t child = 0;
  REQUIRE(::posix_spawn(&child, program.c_str(), nullptr, nullptr, arguments.data(), environment.data()) == 0);
  int status = -1;
  pid_t ended = 0;
  do {
    ended = ::waitpid(child, &status, 0);
  } while (ended < 0 && errno == EINTR);
  REQUIRE(ended == child);
  REQUIRE(WIFEXITED(status));
  return WEXITSTATUS(status);
}

}  // namespace

TEST_CASE("by default each core has a worker, pinned to its first CPU, grouped by node") {
  const strait::topology& machine = strait::topology::machine();
  strait::runtime rt;
  REQUIRE(rt.node_count() == machine.nodes().size());
  for (std::size_t n = 0; n < rt.node_count(); ++n) {
    strait::runtime_node& node = rt.node(n);
    CHECK(node.id() == machine.nodes()[n].id);
    REQUIRE(node.worker_count() == machine.nodes()[n].cores.size());
    for (std::size_t w = 0; w < node.worker_count(); ++w) {
      CHECK(node.cpu(w) == machine.nodes()[n].cores[w]);
      // One spawn after the other goes to one worker after the other.
      std::promise<std::pair<int, int>> where;
      node.spawn([](std::promise<std::pair<int, int>>& out) -> strait::task<> {
        cpu_set_t allowed;
        CPU_ZERO(&allowed);
        const bool known = ::sched_getaffinity(0, sizeof allowed, &allowed) == 0;
        out.set_value({strait::this_cpu(), known ? CPU_COUNT(&allowed) : 0});
        co_return;
      }(where));
      const auto [cpu, allowed] = where.get_future().get();
      CHECK(cpu == static_cast<int>(node.cpu(w)));
      CHECK(allowed == 1);
    }
  }
  rt.join();
}

TEST_CASE("spawn spreads tasks over all workers; each stays where it began") {
  strait::runtime rt{workers(3)};
  std::mutex mutex;
  std::set<std::thread::id> threads;
  std::atomic<int> moved{0};
  for (int i = 0; i < 6; ++i) {
    rt.spawn([](std::mutex& guard, std::set<std::thread::id>& seen, std::atomic<int>& wandered) -> strait::task<> {
      const auto here = std::this_thread::get_id();
      {
        const std::lock_guard lock{guard};
        seen.insert(here);
      }
      auto [tx, rx] = strait::make_channel<message>({.capacity = 1});
      for (message n = 0; n < 5'000; ++n) {  // more than the budget: it suspends now and then
        co_await tx.send(n);
        (void)co_await rx.recv();
        if (std::this_thread::get_id() != here) ++wandered;
      }
    }(mutex, threads, moved));
  }
  rt.join();
  CHECK(threads.size() == 3);
  CHECK(moved == 0);
}

TEST_CASE("a list of CPUs that cannot be had is refused with both sides named") {
  const auto refusal = [](std::vector<unsigned> cpus) -> std::string {
    try {
      const strait::runtime rt{{.cpus = std::move(cpus)}};
    } catch (const std::system_error& error) {
      CHECK(error.code() == std::errc::invalid_argument);
      return error.what();
    }
    return {};
  };
  const std::string beyond = refusal({first_cpu(), 99'999});
  CHECK(beyond.find("expected CPUs that this process may use") != std::string::npos);
  CHECK(beyond.find("99999") != std::string::npos);
  CHECK(refusal({}).find("found none") != std::string::npos);
}

TEST_CASE("a node or a worker that does not exist is named") {
  strait::runtime rt{workers(1)};
  CHECK(rt.node_count() == 1);
  CHECK_THROWS_WITH_AS((void)rt.node(1), "runtime: expected a node below 1, found 1", std::out_of_range);
  CHECK_THROWS_WITH_AS((void)rt.node(0).cpu(1), "expected a worker below 1, found 1", std::out_of_range);
}

// Run by the case below.
TEST_CASE("child: two nodes of four cores with two threads each" * doctest::skip()) {
  REQUIRE(!strait::topology::machine().is_this_machine());
  {
    strait::runtime rt;
    REQUIRE(rt.node_count() == 2);
    for (std::size_t n = 0; n < 2; ++n) {
      CHECK(rt.node(n).id() == n);
      REQUIRE(rt.node(n).worker_count() == 4);
      for (std::size_t w = 0; w < 4; ++w) CHECK(rt.node(n).cpu(w) == 8 * n + 2 * w);
    }
    // Nothing can be pinned on a machine that does not exist, so the workers run anywhere, and work.
    auto [tx, rx] = strait::make_channel<message>({.capacity = 16});
    std::atomic<message> got{0};
    rt.node(0).spawn(produce(std::move(tx), 2'000));
    rt.node(1).spawn(consume(std::move(rx), got));
    rt.join();
    CHECK(got == 2'000);
  }
  // Some of them, grouped by node whatever their order.
  strait::runtime some{{.cpus = std::vector<unsigned>{15, 3, 9}}};
  REQUIRE(some.node_count() == 2);
  CHECK(some.node(0).worker_count() == 1);
  CHECK(some.node(0).cpu(0) == 3);
  REQUIRE(some.node(1).worker_count() == 2);
  CHECK(some.node(1).cpu(0) == 15);
  CHECK(some.node(1).cpu(1) == 9);
  // A node without any of them has no workers, and is not there.
  strait::runtime one_node{{.cpus = std::vector<unsigned>{8}}};
  REQUIRE(one_node.node_count() == 1);
  CHECK(one_node.node(0).id() == 1);
  CHECK_THROWS_WITH(strait::runtime({.cpus = std::vector<unsigned>{16}}), doctest::Contains("synthetic: 16 CPUs"));
}
TEST_CASE("placement follows the machine that hwloc describes") {
  CHECK(status_on("node:2 core:4 pu:2", "child: two nodes of four cores with two threads each") == 0);
}

// ---- ends
// ------------------------------------------------------------------------------------------------------------

TEST_CASE("join waits for every task, those too that tasks spawn") {
  strait::runtime rt{workers(2)};
  std::atomic<int> done{0};
  struct tree {
    static strait::task<> grow(strait::runtime& own, int levels, std::atomic<int>& count) {
      if (levels > 0) {
        own.spawn(grow(own, levels - 1, count));
        own.node(0).spawn(grow(own, levels - 1, count));
      }
      ++count;
      co_return;
    }
  };
  rt.spawn(tree::grow(rt, 6, done));
  rt.join();
  CHECK(done == 127);
}

namespace {

/// Goes on in a thread of its own, which knows nothing of any hub.
struct elsewhere {
  std::vector<std::thread>& threads;
  [[nodiscard]] bool await_ready() const noexcept { return false; }
  void await_suspend(std::coroutine_handle<> awaiting) const {
    threads.emplace_back([awaiting] { awaiting.resume(); });
  }
  void await_resume() const noexcept {}
};

}  // namespace

TEST_CASE("a task that ends on a foreign thread has ended, in its first turn or later, with an error or without") {
  for (const bool later : {false, true}) {
    for (const bool fails : {false, true}) {
      std::vector<std::thread> threads;
      std::atomic<int> done{0};
      bool caught = false;
      {
        strait::runtime rt{workers(1)};
        rt.spawn([](strait::runtime& own, std::vector<std::thread>& by, std::atomic<int>& count, bool wait,
                    bool fail) -> strait::task<> {
          for (int i = 0; i < 20; ++i) {
            own.spawn(
                [](std::vector<std::thread>& on, std::atomic<int>& ended, bool yields, bool throws) -> strait::task<> {
                  if (yields) co_await strait::yield();
                  co_await elsewhere{on};
                  ++ended;
                  if (throws) throw std::runtime_error{"elsewhere"};
                }(by, count, wait, fail));
          }
          co_return;
        }(rt, threads, done, later, fails));
        try {
          rt.join();
        } catch (const std::runtime_error& error) {
          caught = std::string{error.what()} == "elsewhere";
        }
        // The runtime outlives who resumes its tasks.
        for (std::thread& each : threads) each.join();
      }
      CHECK(done == 20);
      CHECK(caught == fails);
    }
  }
}

TEST_CASE("join throws the first exception that left a task, when all have ended") {
  strait::runtime rt{workers(2)};
  std::atomic<message> got{0};
  auto [tx, rx] = strait::make_channel<message>({.capacity = 4});
  rt.spawn([]() -> strait::task<> {
    throw std::runtime_error{"from a task"};
    co_return;
  }());
  rt.spawn(consume(std::move(rx), got));
  rt.spawn(produce(std::move(tx), 1'000));
  CHECK_THROWS_WITH_AS(rt.join(), "from a task", std::runtime_error);
  CHECK(got == 1'000);
}

TEST_CASE("a join without tasks returns at once") {
  strait::runtime rt{workers(2)};
  rt.join();
}

TEST_CASE("stop destroys what has not ended; messages stay in their channels") {
  watched_channel<message> channel{{.capacity = 4, .wait = strait::wait_policy::park}};
  watched_channel<message> full{{.capacity = 1, .wait = strait::wait_policy::park}};
  REQUIRE(full.tx.try_send(message{1}));
  const auto held = std::make_shared<int>(0);
  {
    strait::runtime rt{workers(2)};
    rt.spawn([](strait::receiver<message>& rx, std::shared_ptr<int>) -> strait::task<> {
      (void)co_await [](strait::receiver<message>& from) -> strait::task<message> {
        co_return (co_await from.recv()).value_or(0);
      }(rx);
      FAIL("nothing came");
    }(channel.rx, held));
    rt.spawn([](strait::sender<message>& tx, std::shared_ptr<int>) -> strait::task<> {
      co_await tx.send(2);
      FAIL("no room came");
    }(full.tx, held));
    // One that is always ready: it is stopped where it gives up its turn.
    rt.spawn([](std::shared_ptr<int>) -> strait::task<> {
      auto [tx, rx] = strait::make_channel<message>();
      for (;;) {
        co_await tx.send(1);
        (void)co_await rx.recv();
      }
    }(held));
    REQUIRE(eventually([&] { return parked(*channel.receiver_word) || parked(*full.sender_word); }));
    rt.stop();
    rt.join();
  }
  CHECK(held.use_count() == 1);
  CHECK(channel.tx.try_send(message{3}));
  CHECK(channel.rx.blocking_recv() == 3);
  CHECK(full.rx.try_recv() == 1);
  CHECK_FALSE(full.rx.try_recv());
}

TEST_CASE("stop tells those who heed its token, and what is due has its turn once more") {
  watched_channel<message> heeds{{.wait = strait::wait_policy::park}};
  watched_channel<message> due{{.wait = strait::wait_policy::park}};
  std::vector<std::string> said;
  const auto held = std::make_shared<int>(0);
  strait::runtime rt{workers(1)};
  rt.spawn([](strait::receiver<message>& rx, std::stop_token token, std::vector<std::string>& out,
              std::shared_ptr<int>) -> strait::task<> {
    std::error_code error;
    (void)co_await (rx.recv(error) | strait::stop_on(token));
    if (error == std::errc::operation_canceled) out.push_back("told");
    (void)co_await rx.recv();
    FAIL("it was destroyed here");
  }(heeds.rx, rt.stop_token(), said, held));
  rt.spawn([](strait::receiver<message>& rx, std::vector<std::string>& out, std::shared_ptr<int>) -> strait::task<> {
    if (co_await rx.recv() == 7) out.push_back("drained");
    (void)co_await rx.recv();
    FAIL("it was destroyed here");
  }(due.rx, said, held));
  REQUIRE(eventually([&] { return parked(*heeds.receiver_word) && parked(*due.receiver_word); }));
  CHECK(due.tx.try_send(message{7}));
  rt.stop();
  rt.join();
  CHECK(held.use_count() == 1);  // by their worker, not by the destructor of the runtime
  std::ranges::sort(said);
  CHECK(said == std::vector<std::string>{"drained", "told"});
}

TEST_CASE("a stop that is only requested lets tasks end in their own time") {
  strait::runtime rt{workers(2)};
  std::atomic<int> ended{0};
  for (int i = 0; i < 8; ++i) {
    rt.spawn([](std::stop_token token, std::atomic<int>& count) -> strait::task<> {
      try {
        co_await (strait::sleep_for(std::chrono::hours{1}) | strait::stop_on(token));
      } catch (const std::system_error& told) {
        if (told.code() != std::errc::operation_canceled) throw;
      }
      co_await strait::sleep_for(std::chrono::milliseconds{1});  // its own time
      ++count;
    }(rt.stop_token(), ended));
  }
  rt.request_stop();
  rt.join();
  CHECK(ended == 8);
}

TEST_CASE("what leaves a task of nobody's while its runtime stops is thrown by join") {
  strait::runtime rt{workers(1)};
  std::atomic<bool> began{false};
  // Through the executor: the runtime keeps no count of it.
  strait::spawn(strait::executor(rt.node(0)), [](std::stop_token token, std::atomic<bool>& in) -> strait::task<> {
    in = true;
    co_await (strait::sleep_for(std::chrono::hours{1}) | strait::stop_on(token));
  }(rt.stop_token(), began));
  REQUIRE(eventually([&] { return began.load(); }));
  rt.stop();
  CHECK_THROWS_AS(rt.join(), std::system_error);
}

TEST_CASE("a task stops its runtime") {
  strait::runtime rt{workers(2)};
  rt.spawn([](strait::runtime& own) -> strait::task<> {
    own.stop();
    co_await strait::sleep_for(std::chrono::hours{1});
  }(rt));
  rt.join();
}

TEST_CASE("a thread blocks on a task: on a runtime, or on its own") {
  const auto sum = [](strait::receiver<message> rx) -> strait::task<message> {
    message total = 0;
    while (const auto next = co_await rx.recv()) total += *next;
    co_return total;
  };
  const auto send_ten = [](strait::sender<message> tx) {
    for (message i = 1; i <= 10; ++i) tx.blocking_send(i);
  };
  {
    strait::runtime rt{workers(1)};
    auto [tx, rx] = strait::make_channel<message>();
    std::thread other{send_ten, std::move(tx)};
    CHECK(rt.block_on(sum(std::move(rx))) == 55);
    other.join();
    std::string thrown;
    try {
      rt.block_on([]() -> strait::task<> {
        co_await strait::sleep_for(std::chrono::nanoseconds{0});
        throw std::runtime_error{"from within"};
      }());
    } catch (const std::runtime_error& error) {
      thrown = error.what();
    }
    CHECK(thrown == "from within");
    // On a worker it would wait for itself.
    std::error_code refused;
    rt.block_on([](strait::runtime& own, std::error_code& error) -> strait::task<> {
      try {
        own.block_on([]() -> strait::task<> { co_return; }());
      } catch (const std::system_error& told) {
        error = told.code();
      }
      co_return;
    }(rt, refused));
    CHECK(refused == std::errc::resource_deadlock_would_occur);
    // The runtime stops first.
    std::error_code destroyed;
    try {
      rt.block_on([](strait::runtime& own) -> strait::task<> {
        own.stop();
        co_await strait::sleep_for(std::chrono::hours{1});
      }(rt));
    } catch (const std::system_error& told) {
      destroyed = told.code();
    }
    CHECK(destroyed == std::errc::operation_canceled);
    rt.join();
  }
  auto [tx, rx] = strait::make_channel<message>();
  std::thread other{send_ten, std::move(tx)};
  CHECK(strait::block_on(sum(std::move(rx))) == 55);
  other.join();
  strait::block_on([]() -> strait::task<> { co_await strait::sleep_for(std::chrono::milliseconds{1}); }());
}

TEST_CASE("a runtime that goes out of scope stops") {
  const auto held = std::make_shared<int>(0);
  auto [tx, rx] = strait::make_channel<message>();
  {
    strait::runtime rt{workers(1)};
    std::promise<void> begun;
    rt.spawn([](strait::receiver<message>& in, std::shared_ptr<int>, std::promise<void>& out) -> strait::task<> {
      out.set_value();
      (void)co_await in.recv();
    }(rx, held, begun));
    begun.get_future().wait();
  }
  CHECK(held.use_count() == 1);
}

TEST_CASE("a task that was never begun is destroyed with the runtime") {
  const auto held = std::make_shared<int>(0);
  {
    strait::runtime rt{workers(1)};
    rt.stop();
    rt.spawn([](std::shared_ptr<int>) -> strait::task<> { co_return; }(held));
  }
  CHECK(held.use_count() == 1);
}

// ---- beside Asio
// -------------------------------------------------------------------------------------------------------

TEST_CASE("timers and sockets live on a worker beside channels") {
  strait::runtime rt{workers(1)};
  auto [tx, rx] = strait::make_channel<message>({.capacity = 8});
  std::atomic<message> got{0};
  rt.node(0).spawn(consume(std::move(rx), got));

  const asio::any_io_executor executor = strait::executor(rt.node(0));
  asio::local::stream_protocol::socket near{executor};
  asio::local::stream_protocol::socket far{executor};
  asio::local::connect_pair(near, far);
  // The socket's bytes become messages, between which a timer fires.
  auto reader = asio::co_spawn(
      executor,
      [](asio::local::stream_protocol::socket& from, strait::sender<message> out) -> asio::awaitable<int> {
        int laps = 0;
        asio::steady_timer timer{co_await asio::this_coro::executor};
        for (message i = 0; i < 200; ++i) {
          message value = 0;
          co_await asio::async_read(from, asio::buffer(&value, sizeof value), asio::use_awaitable);
          co_await out.send(value);
          timer.expires_after(std::chrono::nanoseconds{1});
          co_await timer.async_wait(asio::use_awaitable);
          ++laps;
        }
        co_return laps;
      }(near, std::move(tx)),
      asio::use_future);
  auto writer = asio::co_spawn(
      executor,
      [](asio::local::stream_protocol::socket& to) -> asio::awaitable<void> {
        for (message i = 0; i < 200; ++i) {
          co_await asio::async_write(to, asio::buffer(&i, sizeof i), asio::use_awaitable);
        }
      }(far),
      asio::use_future);
  writer.get();
  CHECK(reader.get() == 200);
  rt.join();
  CHECK(got == 200);
}

TEST_CASE("an executor that is asked for while a worker spins or is busy gets its turn") {
  // Before the runtime, whose tasks end with it.
  std::atomic<bool> done{false};
  std::atomic<bool> begun{false};
  strait::runtime rt{workers(1)};
  SUBCASE("beside a task that is always ready") {
    rt.spawn([](std::atomic<bool>& first, const std::atomic<bool>& end) -> strait::task<> {
      auto [tx, rx] = strait::make_channel<message>();
      while (!end) {
        co_await tx.send(1);
        (void)co_await rx.recv();
        first = true;
      }
    }(begun, done));
  }
  SUBCASE("beside one that waits busily") {
    rt.spawn([](std::atomic<bool>& first) -> strait::task<> {
      auto [tx, rx] = strait::make_channel<message>({.wait = strait::wait_policy::busy});
      first = true;
      (void)co_await rx.recv();
    }(begun));
  }
  REQUIRE(eventually([&] { return begun.load(); }));
  std::promise<std::thread::id> ran;
  asio::post(strait::executor(rt.node(0)), [&] {
    done = true;
    ran.set_value(std::this_thread::get_id());
  });
  std::future<std::thread::id> there = ran.get_future();
  REQUIRE(there.wait_for(std::chrono::seconds{30}) == std::future_status::ready);
  CHECK(there.get() != std::this_thread::get_id());
  rt.stop();
}

TEST_CASE("an asio::awaitable and a task on two workers exchange messages") {
  strait::runtime rt{workers(2)};
  auto [tx, rx] = strait::make_channel<message>({.capacity = 4});
  auto [back_tx, back_rx] = strait::make_channel<message>({.capacity = 4});
  rt.spawn([](strait::receiver<message> in, strait::sender<message> out) -> strait::task<> {
    while (const auto value = co_await in.recv()) co_await out.send(*value * 2);
  }(std::move(rx), std::move(back_tx)));
  auto sum = asio::co_spawn(
      strait::executor(rt.node(0)),
      [](strait::sender<message> out, strait::receiver<message> in) -> asio::awaitable<message> {
        message total = 0;
        for (message i = 1; i <= 500; ++i) {
          co_await out.send(i);
          total += (co_await in.recv()).value_or(0);
        }
        co_return total;
      }(std::move(tx), std::move(back_rx)),
      asio::use_future);
  CHECK(sum.get() == 500 * 501);
  rt.join();
}

TEST_CASE("a stream between two workers") {
  for (const auto wait : {strait::wait_policy::adaptive, strait::wait_policy::park}) {
    strait::runtime rt;
    auto [tx, rx] = strait::make_channel<message>({.capacity = 64, .wait = wait});
    std::atomic<message> got{0};
    rt.spawn(produce(std::move(tx), 50'000));
    rt.spawn(consume(std::move(rx), got));
    rt.join();
    CHECK(got == 50'000);
  }
}

TEST_CASE("on a worker there is a hub, elsewhere there is none") {
  strait::runtime rt{workers(1)};
  CHECK(strait::hub::current() == nullptr);
  std::promise<strait::hub*> there;
  asio::post(strait::executor(rt.node(0)), [&] { there.set_value(strait::hub::current()); });
  CHECK(there.get_future().get() == &strait::hub_of(strait::executor(rt.node(0))));
  rt.join();
}
