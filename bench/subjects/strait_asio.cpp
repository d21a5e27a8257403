// strait in an Asio application: `co_await rx.recv()` in an `asio::awaitable` on a plain io_context, alone and beside a
// timer or sockets.
#include <asio/awaitable.hpp>
#include <asio/co_spawn.hpp>
#include <asio/io_context.hpp>
#include <atomic>
#include <exception>
#include <stdexcept>
#include <vector>

#include <strait/asio.hpp>

#include "../placement.hpp"
#include "../subject.hpp"
#include "beside_load.hpp"
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

void run_ready(end& self) {
  pin_to(self.cpu());
  asio::io_context context{1};
  auto [tx, rx] = strait::make_channel<message<8>>({.capacity = capacity_for(8)});
  std::exception_ptr failure;
  asio::co_spawn(context, awaits(self, tx, rx), [&failure](std::exception_ptr raised) { failure = raised; });
  context.run();
  if (failure) std::rethrow_exception(failure);
}

/// Sends as fast as it goes until it is stopped.
strait::task<> send_load(strait::sender<message<8>> tx, source<message<8>>& out, const std::atomic<bool>& stopped) {
  while (!stopped.load(std::memory_order_relaxed)) co_await tx.send(out.next());
}

asio::awaitable<void> take_load(strait::receiver<message<8>>& rx, checker<message<8>>& in, std::uint64_t& taken) {
  while (const auto message = co_await rx.recv()) {
    in.take(*message);
    ++taken;
  }
}

/// asio/timer-beside-load and asio/socket-beside-load: the load is a channel, whose sender runs on the other CPU.
void run_beside_load(end& self) {
  // Outlives the sender, in the runtime.
  source<message<8>> out;
  std::atomic<bool> stopped{false};
  // Before this thread is pinned: a runtime only uses what its process may.
  strait::runtime runtime{{.cpus = std::vector<unsigned>{self.other_cpu()}}};
  pin_to(self.cpu());
  asio::io_context context{1};
  checker<message<8>> in;
  while (const auto round = self.next_round()) {
    out.spoil(self.fault());
    auto [tx, rx] = strait::make_channel<message<8>>({.capacity = load_capacity});
    stopped.store(false, std::memory_order_relaxed);
    std::exception_ptr failure;
    std::uint64_t taken = 0;
    const auto ended = [&](std::exception_ptr raised) {
      if (raised && !failure) failure = raised;
      stopped.store(true, std::memory_order_relaxed);
      if (failure) context.stop();  // the other may wait for ever
    };
    context.restart();
    asio::co_spawn(context, take_load(rx, in, taken), ended);
    asio::co_spawn(context, probe(self, round, taken), ended);
    runtime.spawn(send_load(std::move(tx), out, stopped));
    context.run();
    if (failure) std::rethrow_exception(failure);
    self.report_load(taken);
  }
}

}  // namespace

void run_strait_asio(end& self) {
  self.kind() == work::asio_ready ? run_ready(self) : run_beside_load(self);
}

}  // namespace bench
