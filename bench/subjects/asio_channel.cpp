// Asio's own channel, awaited with use_awaitable where a message is there already; nothing added.
//
// As with strait (strait.cpp, `ready`): the channel is filled, untimed, and then the awaits alone are timed.
#include <asio/awaitable.hpp>
#include <asio/co_spawn.hpp>
#include <asio/experimental/concurrent_channel.hpp>
#include <asio/io_context.hpp>
#include <asio/use_awaitable.hpp>
#include <exception>

#include "../subject.hpp"
#include "ready.hpp"

namespace bench {
namespace {

using M = message<8>;
using channel = asio::experimental::concurrent_channel<void(asio::error_code, M)>;

asio::awaitable<void> awaits(end& self, channel& messages) {
  ready_rounds<M> rounds{self};
  while (rounds.next()) {
    while (const std::uint64_t block = rounds.block()) {
      for (std::uint64_t i = 0; i < block; ++i) messages.try_send(asio::error_code{}, rounds.out.next());
      rounds.start();
      for (std::uint64_t i = 0; i < block; ++i) {
        rounds.in.take(co_await messages.async_receive(asio::use_awaitable));
      }
      rounds.stop();
    }
  }
}

void run(end& self) {
  asio::io_context context{1};
  channel messages{context, capacity_for(sizeof(M))};
  std::exception_ptr failure;
  asio::co_spawn(context, awaits(self, messages), [&failure](std::exception_ptr raised) { failure = raised; });
  context.run();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

subject asio_channel_subject() {
  return {.name = "asio-concurrent-channel", .run = run};
}

}  // namespace bench
