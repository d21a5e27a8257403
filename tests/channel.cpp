#include <strait/asio.hpp>

#include <doctest/doctest.h>

#include <asio/co_spawn.hpp>
#include <asio/detached.hpp>
#include <asio/io_context.hpp>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>

import strait;

TEST_CASE("private: try forms") {
  auto [tx, rx] = strait::make_channel<std::uint64_t>({.capacity = 4});
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

TEST_CASE("private: blocking across threads") {
  auto [tx, rx] = strait::make_channel<std::uint64_t>({.capacity = 64});
  std::thread producer{[&tx] {
    for (std::uint64_t i = 0; i < 1'000'000; ++i) tx.blocking_send(i);
    tx.close();
  }};
  std::uint64_t expected = 0;
  while (auto v = rx.blocking_recv()) REQUIRE(*v == expected++);
  CHECK(expected == 1'000'000);
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

TEST_CASE("private: tasks on the runtime") {
  strait::runtime rt;
  auto [tx, rx] = strait::make_channel<std::uint64_t>({.capacity = 64});
  std::uint64_t got = 0;
  rt.spawn(produce(std::move(tx), 1'000'000));
  rt.spawn(consume(std::move(rx), got));
  rt.join();
  CHECK(got == 1'000'000);
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

TEST_CASE("private: asio::awaitable in one io_context") {
  asio::io_context context{1};
  auto [tx, rx] = strait::make_channel<std::uint64_t>({.capacity = 64});
  std::uint64_t got = 0;
  asio::co_spawn(context, asio_produce(std::move(tx), 100'000), asio::detached);
  asio::co_spawn(context, asio_consume(std::move(rx), got), asio::detached);
  context.run();
  CHECK(got == 100'000);
}

TEST_CASE("posix: two ends in one process") {
  auto tx = strait::open_sender<std::uint64_t>("posix:strait-test-two-ends", {.capacity = 64});
  auto rx = strait::open_receiver<std::uint64_t>("posix:strait-test-two-ends");
  CHECK(rx.capacity() == 64);
  std::uint64_t got = 0;
  strait::runtime rt;
  rt.spawn(produce(std::move(tx), 1'000'000));
  rt.spawn(consume(std::move(rx), got));
  rt.join();
  CHECK(got == 1'000'000);
  CHECK_THROWS_WITH((void)strait::open_receiver<std::uint64_t>("posix:strait-test-two-ends", {.open = strait::open_mode::open}),
                    doctest::Contains("expected an existing channel"));
}
