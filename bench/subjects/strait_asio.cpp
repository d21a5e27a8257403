// strait in an Asio application: `co_await rx.recv()` in an `asio::awaitable` on a plain io_context.
#include <asio/awaitable.hpp>
#include <asio/co_spawn.hpp>
#include <asio/io_context.hpp>
#include <exception>

#include <strait/asio.hpp>

#include "../placement.hpp"
#include "../subject.hpp"
#include "ready.hpp"
#include "strait.hpp"

namespace bench {
namespace {

/// asio/ready-await: an `asio::awaitable` on an io_context of its own awaits `recv()` where a message is there. As with
/// Asio's channel (asio_channel.cpp) the channel is filled first, untimed, and the awaits alone are timed.
asio::awaitable<void> awaits(end& self, strait::sender<message<8>>& tx, strait::receiver<message<8>>& rx) {
  ready_rounds<message<8>> rounds{self};
  while (rounds.next()) {
    while (const std::uint64_t block = rounds.block()) {
      for (std::uint64_t i = 0; i < block; ++i) {
        if (!tx.try_send(rounds.out.next())) throw std::runtime_error{"expected room in the channel, found none"};
      }
      rounds.start();
      for (std::uint64_t i = 0; i < block; ++i) {
        const auto message = co_await rx.recv();
        if (!message) throw std::runtime_error{"expected a message, found the end of the stream"};
        rounds.in.take(*message);
      }
      rounds.stop();
    }
  }
}

}  // namespace

void run_strait_ready(end& self) {
  pin_to(self.cpu());
  asio::io_context context{1};
  auto [tx, rx] = strait::make_channel<message<8>>({.capacity = capacity_for(8)});
  std::exception_ptr failure;
  asio::co_spawn(context, awaits(self, tx, rx), [&failure](std::exception_ptr raised) { failure = raised; });
  context.run();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace bench
