// What both orders of Asio and strait must be able to do. It includes nothing: its users' order is what is looked at.
#pragma once

namespace {

asio::awaitable<void> produce(strait::sender<std::uint64_t> numbers, std::uint64_t count) {
  asio::steady_timer pause{co_await asio::this_coro::executor, asio::chrono::milliseconds{1}};
  co_await pause.async_wait(asio::use_awaitable);
  for (std::uint64_t i = 0; i < count; ++i) co_await numbers.send(i);
}

asio::awaitable<void> consume(strait::receiver<std::uint64_t> numbers, std::uint64_t& sum) {
  while (auto number = co_await numbers.recv()) sum += *number;
}

/// Numbers from one coroutine to another; true when all came.
bool exchange() {
  constexpr std::uint64_t count = 1'000;
  std::uint64_t sum = 0;
  asio::io_context context{1};
  const auto rethrow = [](std::exception_ptr error) {
    if (error) std::rethrow_exception(error);
  };
  auto [tx, rx] = strait::make_channel<std::uint64_t>({.capacity = 8});
  asio::co_spawn(context, produce(std::move(tx), count), rethrow);
  asio::co_spawn(context, consume(std::move(rx), sum), rethrow);
  context.run();
  const std::uint64_t expected = count * (count - 1) / 2;
  if (sum != expected) {
    std::printf("expected the sum %llu, found %llu\n", static_cast<unsigned long long>(expected),
                static_cast<unsigned long long>(sum));
  }
  return sum == expected;
}

}  // namespace
