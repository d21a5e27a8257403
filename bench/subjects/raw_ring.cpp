// The lane beneath a strait channel in a raw loop: no coroutine, no handle, no peer that might sleep or die. The same
// algorithm over the same memory, in one function, where the compiler may keep every cursor in a register.
#include <stdexcept>

#include "../placement.hpp"
#include "../subject.hpp"
#include "ready.hpp"

import strait;

namespace bench {
namespace {

using M = message<8>;

void run(end& self) {
  auto [sending, receiving] =
      strait::endpoint::make_private(strait::shape_of<M>, {.capacity = capacity_for(sizeof(M))}, nullptr);
  auto* const slots = strait::slots_of<M>(sending->lane());
  source<M> out;
  checker<M> in;
  strait::lane_producer<> producer{sending->lane(), sending->capacity()};
  strait::lane_consumer<> consumer{receiving->lane(), receiving->capacity()};
  while (const auto round = self.next_round()) {
    out.spoil(self.fault());
    self.begin();
    for (std::uint64_t left = round.messages; left > 0;) {
      const std::uint64_t block = ready_block(left, round.messages);
      for (std::uint64_t i = 0; i < block; ++i) {
        if (producer.known_room() == 0 && producer.look() == 0) throw std::runtime_error{"expected room, found none"};
        producer.push<M>(slots, out.next());
      }
      for (std::uint64_t i = 0; i < block; ++i) {
        if (consumer.known() == 0 && consumer.look() == 0) throw std::runtime_error{"expected a message, found none"};
        in.take(consumer.take<M>(slots));
        if (consumer.release_due()) consumer.publish_head();
      }
      left -= block;
    }
    self.done();
  }
}

}  // namespace

subject raw_ring_subject() {
  return {.name = "raw-ring", .run = run};
}

}  // namespace bench
