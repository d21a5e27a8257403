// strait's own tasks, on a runtime of one worker: what awaiting, switching and spawning cost there.
#include <stdexcept>
#include <utility>
#include <vector>

#include "../subject.hpp"
#include "ready.hpp"
#include "strait.hpp"
#include "turns.hpp"

import strait;

namespace bench {
namespace {

using M = message<8>;

/// task/ready-await: so many sends that find room, then so many receives that find a message.
strait::task<> awaits(end& self, strait::sender<M> tx, strait::receiver<M> rx) {
  source<M> out;
  checker<M> in;
  while (const auto round = self.next_round()) {
    out.spoil(self.fault());
    for (std::uint64_t left = round.warm_up + round.messages; left > 0;) {
      if (left == round.messages) self.begin();
      const std::uint64_t block = ready_block(left, round.messages);
      for (std::uint64_t i = 0; i < block; ++i) co_await tx.send(out.next());
      for (std::uint64_t i = 0; i < block; ++i) {
        const auto message = co_await rx.recv();
        if (!message) throw std::runtime_error{"expected a message, found the end of the stream"};
        in.take(*message);
      }
      left -= block;
    }
    self.done();
  }
}

strait::task<> take_turns(relay<M>& both, relay<M>::side mine, std::uint64_t turns) {
  for (std::uint64_t i = 0; i < turns; ++i) {
    both.pass(mine);
    co_await strait::yield();
  }
  both.end();
}

/// task/switch: two tasks yield to each other.
strait::task<> switches(end& self, strait::runtime& runtime) {
  relay<M> both{self};
  while (const auto round = self.next_round()) {
    both.begin_round();
    const std::uint64_t turns = round.messages / 2;
    runtime.spawn(take_turns(both, relay<M>::second, turns));
    self.begin();
    co_await take_turns(both, relay<M>::first, turns);
    while (!both.both_ended()) co_await strait::yield();
    self.done();
  }
}

strait::task<> child(brood<M>& all, M message) {
  all.run(message);
  co_return;
}

/// task/spawn: a task spawns others on its own worker.
strait::task<> spawns(end& self, strait::runtime& runtime) {
  brood<M> all{self};
  while (const auto round = self.next_round()) {
    all.begin_round(round.messages);
    self.begin();
    while (const std::uint64_t block = all.next_block()) {
      for (std::uint64_t i = 0; i < block; ++i) runtime.spawn(child(all, all.next_message()));
      while (!all.idle()) co_await strait::yield();
    }
    self.done();
  }
}

}  // namespace

void run_strait_task(end& self) {
  strait::runtime runtime{{.cpus = std::vector<unsigned>{self.cpu()}}};
  switch (self.kind()) {
    case work::task_ready: {
      auto [tx, rx] = strait::make_channel<M>({.capacity = capacity_for(sizeof(M))});
      runtime.spawn(awaits(self, std::move(tx), std::move(rx)));
      break;
    }
    case work::task_switch:
      runtime.spawn(switches(self, runtime));
      break;
    default:
      runtime.spawn(spawns(self, runtime));
      break;
  }
  runtime.join();
}

}  // namespace bench
