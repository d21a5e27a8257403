// Asio's coroutines on an io_context of one thread: they take turns by `co_await asio::post`, and are started by
// `asio::co_spawn`.
//
// With the executor that `asio::awaitable<>` has by default, and with the context's own, which a good engineer writes
// where it must be fast. The best counts.
#include <asio/any_io_executor.hpp>
#include <asio/awaitable.hpp>
#include <asio/co_spawn.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>
#include <asio/use_awaitable.hpp>

#include <exception>

#include "../subject.hpp"
#include "turns.hpp"

namespace bench {
namespace {

using M = message<8>;

template <class Executor>
using coroutine = asio::awaitable<void, Executor>;
template <class Executor>
constexpr asio::use_awaitable_t<Executor> awaited{};

/// What a coroutine that nobody awaits throws comes out of run().
void throw_on(std::exception_ptr problem) {
  if (problem) std::rethrow_exception(problem);
}

template <class Executor>
coroutine<Executor> take_turns(Executor executor, relay<M>& both, relay<M>::side mine, std::uint64_t turns) {
  for (std::uint64_t i = 0; i < turns; ++i) {
    both.pass(mine);
    co_await asio::post(executor, awaited<Executor>);
  }
  both.end();
}

template <class Executor>
coroutine<Executor> switches(end& self, Executor executor) {
  relay<M> both{self};
  while (const auto round = self.next_round()) {
    both.begin_round();
    const std::uint64_t turns = round.messages / 2;
    // Before the first turn of this one, because what is spawned takes two ways through the queue to begin.
    bool begun = false;
    const auto second = [&]() -> coroutine<Executor> {
      begun = true;
      co_await asio::post(executor, awaited<Executor>);
      co_await take_turns<Executor>(executor, both, relay<M>::second, turns);
    };
    asio::co_spawn(executor, second, throw_on);
    while (!begun) co_await asio::post(executor, awaited<Executor>);
    self.begin();
    co_await take_turns<Executor>(executor, both, relay<M>::first, turns);
    while (!both.both_ended()) co_await asio::post(executor, awaited<Executor>);
    self.done();
  }
}

template <class Executor>
coroutine<Executor> child(brood<M>& all, M message) {
  all.run(message);
  co_return;
}

template <class Executor>
coroutine<Executor> spawns(end& self, Executor executor) {
  brood<M> all{self};
  while (const auto round = self.next_round()) {
    all.begin_round(round.messages);
    self.begin();
    while (const std::uint64_t block = all.next_block()) {
      for (std::uint64_t i = 0; i < block; ++i) {
        asio::co_spawn(executor, child<Executor>(all, all.next_message()), throw_on);
      }
      while (!all.idle()) co_await asio::post(executor, awaited<Executor>);
    }
    self.done();
  }
}

template <class Executor>
void run_with(end& self) {
  asio::io_context context{1};
  const Executor executor = context.get_executor();
  asio::co_spawn(
      executor,
      self.kind() == work::task_switch ? switches<Executor>(self, executor) : spawns<Executor>(self, executor),
      throw_on);
  context.run();
}

void run(end& self) {
  self.variant() == 0 ? run_with<asio::any_io_executor>(self) : run_with<asio::io_context::executor_type>(self);
}

}  // namespace

subject asio_co_spawn_subject() {
  return {.name = "asio-co-spawn", .run = run, .variants = {"any_io_executor", "io_context::executor_type"}};
}

}  // namespace bench
