// The rings that strait is held against: single producer, single consumer, as the literature has them.
//
// `textbook-ring`: head and tail stored for each message, each in a line of its own; a private copy of the other side's
// cursor, read again when the ring looks full or empty; release stores, acquire loads; a power of two; a raw loop that
// polls with no PAUSE or with one. `tuned-ring` is the same with 8, 32 or 128 PAUSEs between polls: throughput at any
// price in latency. Of each the best setting counts. In batches both copy whole runs and store one cursor a batch.
#include <algorithm>
#include <atomic>

#include "../subject.hpp"

namespace bench {
namespace {

template <class M>
struct ring_memory {
  static constexpr std::size_t capacity = capacity_for(sizeof(M));
  static_assert((capacity & (capacity - 1)) == 0);

  alignas(cache_pair) std::atomic<std::uint64_t> tail{0};
  alignas(cache_pair) std::atomic<std::uint64_t> head{0};
  alignas(cache_pair) M slots[capacity];
};

template <unsigned Pauses>
inline void poll_again(bool one_cpu) noexcept {
  if (one_cpu) [[unlikely]] {
    relax(true);
    return;
  }
#if defined(__x86_64__)
  for (unsigned i = 0; i < Pauses; ++i) __builtin_ia32_pause();
#endif
}

template <class M, unsigned Pauses>
class ring_producer {
 public:
  ring_producer(ring_memory<M>& ring, bool one_cpu) noexcept : ring_{ring}, one_cpu_{one_cpu} {}

  void send(const M& message) noexcept {
    wait_for_room();
    ring_.slots[tail_ & (ring_.capacity - 1)] = message;
    // release: the message is in its slot before the consumer sees the cursor.
    ring_.tail.store(++tail_, std::memory_order_release);
  }

  void send_batch(source<M>& from, std::uint64_t messages) noexcept {
    while (messages > 0) {
      const std::uint64_t run = std::min(wait_for_room(), messages);
      for (std::uint64_t i = 0; i < run; ++i) ring_.slots[(tail_ + i) & (ring_.capacity - 1)] = from.next();
      tail_ += run;
      ring_.tail.store(tail_, std::memory_order_release);
      messages -= run;
    }
  }

 private:
  std::uint64_t wait_for_room() noexcept {
    while (tail_ - head_seen_ == ring_.capacity) {
      // acquire: the consumer has read the slot before we write it again.
      head_seen_ = ring_.head.load(std::memory_order_acquire);
      if (tail_ - head_seen_ == ring_.capacity) poll_again<Pauses>(one_cpu_);
    }
    return ring_.capacity - (tail_ - head_seen_);
  }

  ring_memory<M>& ring_;
  bool one_cpu_;
  std::uint64_t tail_ = 0;
  std::uint64_t head_seen_ = 0;
};

template <class M, unsigned Pauses>
class ring_consumer {
 public:
  ring_consumer(ring_memory<M>& ring, bool one_cpu) noexcept : ring_{ring}, one_cpu_{one_cpu} {}

  M receive() noexcept {
    wait_for_message();
    const M message = ring_.slots[head_ & (ring_.capacity - 1)];
    // release: the message is read before the producer sees the cursor.
    ring_.head.store(++head_, std::memory_order_release);
    return message;
  }

  std::uint64_t receive_batch(checker<M>& into, std::uint64_t most) {
    const std::uint64_t run = std::min(wait_for_message(), most);
    for (std::uint64_t i = 0; i < run; ++i) into.take(ring_.slots[(head_ + i) & (ring_.capacity - 1)]);
    head_ += run;
    ring_.head.store(head_, std::memory_order_release);
    return run;
  }

 private:
  std::uint64_t wait_for_message() noexcept {
    while (tail_seen_ == head_) {
      // acquire: pairs with the producer's release; the slot is read after the cursor.
      tail_seen_ = ring_.tail.load(std::memory_order_acquire);
      if (tail_seen_ == head_) poll_again<Pauses>(one_cpu_);
    }
    return tail_seen_ - head_;
  }

  ring_memory<M>& ring_;
  bool one_cpu_;
  std::uint64_t head_ = 0;
  std::uint64_t tail_seen_ = 0;
};

template <class M, unsigned Pauses>
void run_ring(end& self) {
  const mapping memory{self.fd(0), sizeof(ring_memory<M>)};
  auto& ring = memory.as<ring_memory<M>>();  // zeroes from the kernel are its first state
  if (self.producing()) {
    ring_producer<M, Pauses> producer{ring, self.one_cpu()};
    if (self.kind() != work::batch) return produce<M>(self, [&producer](const M& m) { producer.send(m); });
    source<M> from;
    while (const auto round = self.next_round()) {
      from.spoil(self.fault());
      self.begin();
      for (std::uint64_t sent = 0; sent < round.messages;) {
        const std::uint64_t batch = std::min<std::uint64_t>(batch_messages, round.messages - sent);
        producer.send_batch(from, batch);
        sent += batch;
      }
      self.done();
    }
  } else {
    ring_consumer<M, Pauses> consumer{ring, self.one_cpu()};
    if (self.kind() != work::batch) return consume<M>(self, [&consumer] { return consumer.receive(); });
    checker<M> into;
    while (const auto round = self.next_round()) {
      self.begin();
      for (std::uint64_t got = 0; got < round.messages;) {
        got += consumer.receive_batch(into, std::min<std::uint64_t>(batch_messages, round.messages - got));
      }
      self.done();
    }
  }
}

link connect(const job& task) {
  link both;
  with_message(task.message_bytes, [&both]<class M>() {
    both.producer.push_back(make_memory("strait-demo ring", sizeof(ring_memory<M>)));
  });
  both.consumer.push_back(both.producer.front().duplicate());
  return both;
}

void run_textbook(end& self) {
  with_message(self.message_bytes(),
               [&self]<class M>() { self.variant() == 0 ? run_ring<M, 0>(self) : run_ring<M, 1>(self); });
}

void run_tuned(end& self) {
  with_message(self.message_bytes(), [&self]<class M>() {
    switch (self.variant()) {
      case 0:
        return run_ring<M, 8>(self);
      case 1:
        return run_ring<M, 32>(self);
      default:
        return run_ring<M, 128>(self);
    }
  });
}

}  // namespace

subject textbook_ring_subject() {
  return {.name = "textbook-ring",
          .run = run_textbook,
          .connect = connect,
          .variants = {"no PAUSE", "1 PAUSE"},
          .is_ring = true};
}

subject tuned_ring_subject() {
  return {.name = "tuned-ring",
          .run = run_tuned,
          .connect = connect,
          .variants = {"8 PAUSEs", "32 PAUSEs", "128 PAUSEs"},
          .is_ring = true};
}

}  // namespace bench
