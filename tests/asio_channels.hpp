// What each order of including Asio and importing strait must be able to do. Included by each of those files, after
// Asio and strait, and compiled in each of them: that it includes nothing itself is the point.
#pragma once

namespace {

struct order {
  std::uint64_t id;
  std::uint32_t quantity;
};

asio::awaitable<void> place(strait::sender<order> orders, asio::local::stream_protocol::socket from) {
  for (;;) {
    order next{};
    std::error_code error;
    co_await asio::async_read(from, asio::buffer(&next, sizeof next), asio::redirect_error(asio::use_awaitable, error));
    if (error) break;  // the other end hung up
    co_await orders.send(next);
  }
}

asio::awaitable<void> fill(strait::receiver<order>& orders, std::uint64_t& count) {
  while (const auto next = co_await orders.recv()) {
    if (next->id != count || next->quantity != count % 10) throw std::runtime_error{"a wrong order"};
    ++count;
  }
}

asio::awaitable<void> submit(asio::local::stream_protocol::socket to, std::uint64_t count) {
  asio::steady_timer pause{co_await asio::this_coro::executor};
  for (std::uint64_t id = 0; id < count; ++id) {
    const order next{id, static_cast<std::uint32_t>(id % 10)};
    co_await asio::async_write(to, asio::buffer(&next, sizeof next), asio::use_awaitable);
    if (id % 100 == 0) {
      pause.expires_after(asio::chrono::nanoseconds{1});
      co_await pause.async_wait(asio::use_awaitable);
    }
  }
}

/// A socket, a timer, a channel, a task and a completion handler in one context.
void exchange() {
  constexpr std::uint64_t count = 1'000;
  asio::io_context context{1};
  const auto rethrow = [](std::exception_ptr error) {
    if (error) std::rethrow_exception(error);
  };
  auto [tx, rx] = strait::make_channel<order>({.capacity = 8});
  asio::local::stream_protocol::socket near{context};
  asio::local::stream_protocol::socket far{context};
  asio::local::connect_pair(near, far);
  std::uint64_t filled = 0;
  asio::co_spawn(context, place(std::move(tx), std::move(near)), rethrow);
  asio::co_spawn(context, fill(rx, filled), rethrow);
  asio::co_spawn(context, submit(std::move(far), count), rethrow);

  auto [words_tx, words_rx] = strait::make_channel<int>({.capacity = 1});
  int answered = 0;
  strait::spawn(context,
                [](strait::sender<int> words) -> strait::task<> { co_await words.send(42); }(std::move(words_tx)));
  strait::async_recv(words_rx, asio::bind_executor(context, [&](std::error_code error, std::optional<int> word) {
                       CHECK_FALSE(error);
                       answered = word.value_or(0);
                     }));
  context.run();
  CHECK(filled == count);
  CHECK(answered == 42);
}

}  // namespace
