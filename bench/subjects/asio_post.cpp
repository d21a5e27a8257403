// Handlers posted to an io_context of one thread: two that take turns, and handlers that are started by another; and a
// load beside which a timer or a socket is measured: each message a handler that another thread posts.
#include <asio/co_spawn.hpp>
#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>

#include <atomic>
#include <exception>
#include <stdexcept>
#include <thread>

#include <fmt/format.h>

#include "../placement.hpp"
#include "../subject.hpp"
#include "beside_load.hpp"
#include "turns.hpp"

namespace bench {
namespace {

using M = message<8>;

/// task/switch: runs, and posts itself again.
struct turn {
  asio::io_context& context;
  relay<M>& both;
  relay<M>::side mine;
  std::uint64_t left;

  void operator()() {
    both.pass(mine);
    if (--left > 0) asio::post(context, *this);
  }
};

void run_switches(end& self) {
  asio::io_context context{1};
  relay<M> both{self};
  while (const auto round = self.next_round()) {
    both.begin_round();
    const std::uint64_t turns = round.messages / 2;
    asio::post(context, turn{context, both, relay<M>::first, turns});
    asio::post(context, turn{context, both, relay<M>::second, turns});
    context.restart();
    self.begin();
    context.run();
    self.done();
  }
}

/// task/spawn: posts a block of handlers, and itself behind them.
struct parent {
  asio::io_context& context;
  brood<M>& all;

  void operator()() {
    const std::uint64_t block = all.next_block();
    for (std::uint64_t i = 0; i < block; ++i) {
      asio::post(context, [&all = all, message = all.next_message()] { all.run(message); });
    }
    if (block > 0) asio::post(context, *this);
  }
};

void run_spawns(end& self) {
  asio::io_context context{1};
  brood<M> all{self};
  while (const auto round = self.next_round()) {
    all.begin_round(round.messages);
    asio::post(context, parent{context, all});
    context.restart();
    self.begin();
    context.run();
    self.done();
  }
}

/// Posts messages from a thread of its own for as long as it lives, as fast as the context takes them.
class posted_load {
 public:
  posted_load(end& self, asio::io_context& context, source<M>& out, checker<M>& in)
      : context_{context}, out_{out}, in_{in}, one_cpu_{self.one_cpu()}, thread_{[this, cpu = self.other_cpu()] {
          pin_to(cpu);
          post_all();
        }} {}
  /// What was posted may still be on its way; it must not run any more.
  ~posted_load() {
    stop();
    if (thread_.joinable()) thread_.join();
  }
  posted_load(const posted_load&) = delete;
  posted_load& operator=(const posted_load&) = delete;

  /// Stops posting. What was posted is still on its way, for the context to run.
  void stop() noexcept { stopped_.store(true, std::memory_order_relaxed); }
  [[nodiscard]] const std::uint64_t& taken() const noexcept { return taken_; }
  /// How many were posted and taken, once the context has run out of work.
  [[nodiscard]] std::uint64_t finish() {
    thread_.join();
    if (taken_ != posted_) throw std::runtime_error{fmt::format("expected {} messages, found {}", posted_, taken_)};
    return taken_;
  }

 private:
  void post_all() {
    // The context goes on until the last message is posted and taken.
    const auto work = asio::make_work_guard(context_);
    while (!stopped_.load(std::memory_order_relaxed)) {
      // As a channel does: an unbounded queue would only grow. relaxed, as the store: only a count; the messages travel
      // through Asio's queue.
      seen_ = posted_ - seen_ >= load_capacity ? told_.load(std::memory_order_relaxed) : seen_;
      if (posted_ - seen_ >= load_capacity) {
        relax(one_cpu_);
        continue;
      }
      ++posted_;
      asio::post(context_, [this, message = out_.next()] {
        in_.take(message);
        // As a lane does: told every eighth, so that the line does not bounce for each.
        if (++taken_ % (load_capacity / 8) == 0) told_.store(taken_, std::memory_order_relaxed);
      });
    }
  }

  asio::io_context& context_;
  source<M>& out_;
  checker<M>& in_;
  bool one_cpu_;
  std::uint64_t posted_ = 0;
  std::uint64_t seen_ = 0;
  std::uint64_t taken_ = 0;
  alignas(cache_pair) std::atomic<std::uint64_t> told_{0};
  alignas(cache_pair) std::atomic<bool> stopped_{false};
  std::thread thread_;
};

void run_beside_load(end& self) {
  asio::io_context context{1};
  source<M> out;
  checker<M> in;
  while (const auto round = self.next_round()) {
    out.spoil(self.fault());
    std::exception_ptr failure;
    context.restart();
    posted_load load{self, context, out, in};
    asio::co_spawn(context, probe(self, round, load.taken()), [&](std::exception_ptr raised) {
      failure = raised;
      load.stop();
    });
    context.run();
    self.report_load(load.finish());
    if (failure) std::rethrow_exception(failure);
  }
}

void run(end& self) {
  switch (self.kind()) {
    case work::task_switch:
      return run_switches(self);
    case work::task_spawn:
      return run_spawns(self);
    default:
      return run_beside_load(self);
  }
}

}  // namespace

subject asio_post_subject() {
  return {.name = "asio-post", .run = run};
}

}  // namespace bench
