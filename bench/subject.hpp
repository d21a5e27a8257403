// What is compared. A subject is one way of carrying messages; each has a file in subjects/.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "process.hpp"

namespace bench {

/// What the two ends of a subject inherit from the conductor, each in the order in which it asks for them.
struct link {
  std::vector<descriptor> producer;
  std::vector<descriptor> consumer;
};

struct job {
  work kind = work::stream;
  std::size_t message_bytes = 8;
  tally counted = tally::nothing;
  bench::memory memory = bench::memory::posix;
};

struct subject {
  std::string_view name;
  /// Runs one end until there are no more rounds; in its own process. Throws on a broken message or a failure.
  void (*run)(end&);
  /// Makes what the ends inherit; in the conductor. Null: nothing.
  link (*connect)(const job&) = nullptr;
  /// Settings of which the best counts; empty when there is nothing to set. An end is told the index.
  std::vector<std::string_view> variants = {};
  /// Removes from the system what names the ends have made, once they are gone or one has failed; in the conductor.
  void (*forget_names)(memory where, std::uint64_t nonce) = nullptr;
  /// Whether the ends share a ring of `capacity_for` messages. A round that fits into it would measure one end alone.
  bool is_ring = false;
  /// Whether its channels lie in the memory that the job names; both ends are in the producer's process when that is
  /// private.
  bool in_any_memory = false;
  /// Whether the end pins itself: a library that places its own workers is told where.
  bool pins_itself = false;
};

/// Every subject, strait first.
[[nodiscard]] std::span<const subject> subjects();
[[nodiscard]] const subject& subject_named(std::string_view name);

/// The file of each one.
[[nodiscard]] subject strait_subject();
[[nodiscard]] subject unix_socket_subject();
[[nodiscard]] subject pipe_subject();
[[nodiscard]] subject posix_mq_subject();
[[nodiscard]] subject tcp_subject();
[[nodiscard]] subject textbook_ring_subject();
[[nodiscard]] subject tuned_ring_subject();
[[nodiscard]] subject raw_line_subject();
[[nodiscard]] subject raw_eventfd_subject();
[[nodiscard]] subject asio_channel_subject();
[[nodiscard]] subject raw_ring_subject();
[[nodiscard]] subject asio_post_subject();
[[nodiscard]] subject asio_co_spawn_subject();

/// Calls `use.operator()<message<N>>()` for the size that is asked for.
template <class Use>
void with_message(std::size_t bytes, Use&& use) {
  switch (bytes) {
    case 8:
      return use.template operator()<message<8>>();
    case 64:
      return use.template operator()<message<64>>();
    case 1024:
      return use.template operator()<message<1024>>();
    default:
      throw std::runtime_error{"expected messages of 8, 64 or 1024 bytes, found " + std::to_string(bytes)};
  }
}

/// The producer's side of a stream through anything that has `send(message)`. `spoil` comes once a round.
template <class M, class Send>
void produce(end& self, Send&& send) {
  source<M> out;
  while (const auto round = self.next_round()) {
    out.spoil(self.fault());
    for (std::uint64_t i = 0; i < round.warm_up; ++i) send(out.next());
    self.begin();
    for (std::uint64_t i = 0; i < round.messages; ++i) send(out.next());
    self.done();
  }
}

/// The consumer's side, through anything that has `receive()`.
template <class M, class Receive>
void consume(end& self, Receive&& receive) {
  checker<M> in;
  while (const auto round = self.next_round()) {
    for (std::uint64_t i = 0; i < round.warm_up; ++i) in.take(receive());
    self.begin();
    for (std::uint64_t i = 0; i < round.messages; ++i) in.take(receive());
    self.done();
  }
}

/// The side that pings. Spinning, the time is that of many round trips together, so that no clock is read between
/// them; then come as many again of which each is stamped, for the percentiles. Parked, each has its own time, for
/// there is a pause before it.
template <class M, class Send, class Receive>
void ping(end& self, Send&& send, Receive&& receive) {
  source<M> out{direction::there};
  checker<M> in{direction::back};
  while (const auto round = self.next_round()) {
    out.spoil(self.fault());
    self.begin();
    for (std::uint64_t i = 0; i < round.messages; ++i) {
      send(out.next());
      in.take(receive());
    }
    self.done();
    const bool parked = self.kind() == work::parked;
    std::uint64_t before = self.ticks();
    for (std::uint64_t i = 0; i < round.stamped; ++i) {
      if (parked) {
        self.pause_before_ping();
        before = self.ticks();
      }
      send(out.next());
      in.take(receive());
      // One look at the clock a trip: where one ends, the next begins. It costs about as much as half a bounced line.
      const std::uint64_t after = self.ticks();
      self.sample(after - before);
      before = after;
    }
  }
}

/// The side that answers.
template <class M, class Send, class Receive>
void pong(end& self, Send&& send, Receive&& receive) {
  checker<M> in{direction::there};
  source<M> out{direction::back};
  while (const auto round = self.next_round()) {
    self.begin();
    for (std::uint64_t i = 0; i < round.messages + round.stamped; ++i) {
      in.take(receive());
      send(out.next());
    }
    self.done();
  }
}

}  // namespace bench
