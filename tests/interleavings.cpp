// The lane and the wake protocol under the test scheduler (model/scheduler.hpp): every interleaving and every weak
// outcome within bounds, then random walks. The source explored is the one that ships; each planted fault shows that
// the scheduler would have noticed.
#include <doctest/doctest.h>
#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "model/scheduler.hpp"

import strait.park;

namespace {

using strait::presence;
using strait::store_load;
using presence_word = model::atomic<std::uint32_t>;

constexpr auto thread_parked = static_cast<std::uint32_t>(presence::thread_parked);
constexpr auto closed = static_cast<std::uint32_t>(presence::closed);

/// What a test does wrong on purpose.
enum class fault {
  none,
  // the six of the protocol
  no_second_look,
  no_barrier,
  published_early,
  wake_dropped_on_cancel,
  tail_relaxed,
  latch_not_reset,
  // and what else can go wrong with them
  latch_reset_before_read,
  wake_dropped_before_sleep,
  take_back_relaxed,
  claim_relaxed,
  // each further memory order that a comment in the modules calls necessary
  head_relaxed,
  head_read_relaxed,
  tail_read_relaxed,
  copies_relaxed,
  copies_read_relaxed,
  batch_of_one_without_copy,
  no_light_barrier,
};

struct no_heavy_barrier : model::waiting {
  template <class Kind>
  static void heavy_barrier(Kind) noexcept {}
};
struct no_light_barrier : model::waiting {
  template <class Kind>
  static void light_barrier(Kind) noexcept {}
};

/// Two words, so that a torn one shows.
struct two_words {
  std::uint64_t first;
  std::uint64_t second;
};
two_words message(std::uint64_t n) {
  return {n, ~n};
}
void check_message(const two_words& got, std::uint64_t n) {
  model::check(got.second == ~got.first, "a message is torn");
  model::check(got.first == n, "a message is lost, doubled or out of order");
}

template <std::uint64_t Capacity>
struct lane {
  using slot = model::slot<two_words>;

  strait::lane_control<model::atomics> control;
  std::array<slot, Capacity> slots;
  strait::lane_producer<model::atomics> producer{control, Capacity};
  strait::lane_consumer<model::atomics> consumer{control, Capacity};
  std::uint64_t sent = 0;
  std::uint64_t received = 0;

  explicit lane(fault planted = fault::none) {
    control.tail.name("tail");
    control.head.name("head");
    for (auto& copy : control.copies) {
      for (auto& part : copy) {
        part.name("copy");
        if (planted == fault::copies_relaxed) part.weaken_stores();
        if (planted == fault::copies_read_relaxed) part.weaken_loads();
      }
    }
    if (planted == fault::tail_relaxed) control.tail.weaken_stores();
    if (planted == fault::tail_read_relaxed) control.tail.weaken_loads();
    if (planted == fault::head_relaxed) control.head.weaken_stores();
    if (planted == fault::head_read_relaxed) control.head.weaken_loads();
  }

  bool room() { return producer.known_room() > 0 || producer.look() > 0; }
  bool something() { return consumer.known() > 0 || consumer.look() > 0; }

  void push(fault planted = fault::none) {
    if (planted == fault::published_early) {
      auto& place = producer.slot<two_words>(slots.data(), 0);
      producer.publish(1);
      place.put(message(sent++));
    } else {
      producer.push<two_words>(slots.data(), message(sent++));
    }
  }
  void push_batch(std::uint64_t n) {
    for (std::uint64_t i = 0; i < n; ++i) producer.slot<two_words>(slots.data(), i).put(message(sent++));
    producer.publish(n);
  }
  void take() { check_message(consumer.take<two_words>(slots.data()), received++); }
  void take_batch() {
    const auto n = consumer.known();
    for (std::uint64_t i = 0; i < n; ++i) {
      check_message(consumer.slot<two_words>(slots.data(), i).take(), received++);
    }
    consumer.skip(n);
  }
  void take_rest() {
    while (something()) take();
    model::check(received == sent, "a message that was sent never arrives");
    model::check(!producer.corrupt() && !consumer.corrupt(), "a cursor is called corrupt");
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The scheduler itself, on the litmus tests of the literature: what it allows and what it forbids.

enum class between { nothing, fences, barriers };

/// One side, as the sender's light barrier or the waiter's heavy one.
void order(between what, bool heavy) {
  switch (what) {
    case between::nothing:
      break;
    case between::fences:
      model::the_world().fence();
      break;
    case between::barriers:
      if (heavy) model::the_world().fence_everywhere();
      break;
  }
}

/// SB: may both miss the other's store?
struct store_buffering {
  static constexpr std::array names{"a", "b"};
  static inline bool seen = false;
  between what;
  std::array<model::atomic<std::uint32_t>, 2> words;
  std::array<std::uint32_t, 2> got{};

  explicit store_buffering(between order) : what{order} {}
  void run(std::size_t thread) {
    words[thread].store(1, std::memory_order_release);
    order(what, thread == 0);
    got[thread] = words[1 - thread].load(std::memory_order_acquire);
  }
  void finish() { seen = seen || (got[0] == 0 && got[1] == 0); }
};

/// MP: may the flag be seen and the data not? `slot` as data: a race just then.
struct message_passing {
  static constexpr std::array names{"a", "b"};
  static inline bool seen = false;
  std::memory_order stored, loaded;
  bool plain;
  model::atomic<std::uint32_t> data, flag;
  model::slot<int> slot;
  std::uint32_t got = 1;

  message_passing(std::memory_order store, std::memory_order load, bool with_slot)
      : stored{store}, loaded{load}, plain{with_slot} {}
  void run(std::size_t thread) {
    if (thread == 0) {
      if (plain) {
        slot.put(1);
      } else {
        data.store(1, std::memory_order_relaxed);
      }
      flag.store(1, stored);
    } else if (flag.load(loaded) == 1) {
      if (plain) {
        (void)slot.take();
      } else {
        got = data.load(std::memory_order_relaxed);
      }
    }
  }
  void finish() { seen = seen || got == 0; }
};

/// IRIW: may two readers see two independent stores in opposite orders?
struct independent_reads {
  static constexpr std::array names{"write x", "write y", "read x y", "read y x"};
  static inline bool seen = false;
  between what;
  std::array<model::atomic<std::uint32_t>, 2> words;
  std::array<std::uint32_t, 4> got{};

  explicit independent_reads(between order) : what{order} {}
  void run(std::size_t thread) {
    if (thread < 2) {
      words[thread].store(1, std::memory_order_release);
      return;
    }
    const std::size_t first = thread - 2;
    got[2 * first] = words[first].load(std::memory_order_acquire);
    order(what, true);
    got[2 * first + 1] = words[1 - first].load(std::memory_order_acquire);
  }
  void finish() { seen = seen || (got[0] == 1 && got[1] == 0 && got[2] == 1 && got[3] == 0); }
};

/// CoRR: may a word be seen to go back? And a release sequence: does a relaxed read-modify-write keep what it replaces?
struct coherence {
  static constexpr std::array names{"writer", "changer", "reader"};
  static inline bool seen = false;
  static inline bool changed_seen = false;
  model::atomic<std::uint32_t> data, flag;
  std::array<std::uint32_t, 3> got{};

  void run(std::size_t thread) {
    switch (thread) {
      case 0:
        data.store(1, std::memory_order_relaxed);
        flag.store(1, std::memory_order_release);
        break;
      case 1: {
        std::uint32_t expected = 1;
        flag.compare_exchange_strong(expected, 2, std::memory_order_relaxed, std::memory_order_relaxed);
        break;
      }
      default:
        got[0] = flag.load(std::memory_order_acquire);
        got[1] = data.load(std::memory_order_relaxed);
        got[2] = flag.load(std::memory_order_relaxed);
        break;
    }
  }
  void finish() {
    changed_seen = changed_seen || got[0] == 2;
    seen = seen || got[2] < got[0] || (got[0] > 0 && got[1] == 0);
  }
};

template <class Scenario, class... Arguments>
bool ever_seen(const Arguments&... arguments) {
  model::bounds everything;
  everything.preemptions = 4;
  everything.old_reads = 8;
  Scenario::seen = false;
  const auto got = model::the_world().explore<Scenario>(everything, arguments...);
  CHECK(got.exhausted);
  return Scenario::seen;
}

// ---------------------------------------------------------------------------------------------------------------------
// The lane alone: nobody waits, each side tries a few times.

template <std::uint64_t Capacity>
struct lone_messages {
  static constexpr std::array names{"producer", "consumer"};
  fault planted;
  int tries;
  lane<Capacity> line{planted};

  lone_messages(fault plant, int attempts) : planted{plant}, tries{attempts} {}
  void run(std::size_t thread) {
    for (int i = 0; i < tries; ++i) {
      if (thread == 0) {
        if (line.room()) line.push(planted);
      } else if (line.something()) {
        line.take();
        if (line.consumer.release_due()) line.consumer.publish_head();
      }
    }
  }
  void finish() { line.take_rest(); }
};

/// Lone messages and batches, taken one by one and as spans.
struct batches {
  static constexpr std::array names{"producer", "consumer"};
  fault planted;
  lane<4> line{planted};

  explicit batches(fault plant) : planted{plant} {}
  void run(std::size_t thread) {
    constexpr std::array<std::uint64_t, 4> sizes{1, 2, 1, 3};
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      if (thread == 0) {
        if (line.producer.known_room() < sizes[i] && line.producer.look() < sizes[i]) continue;
        if (sizes[i] == 1 && planted != fault::batch_of_one_without_copy) {
          line.push();
        } else {
          line.push_batch(sizes[i]);
        }
      } else if (line.something()) {
        if (i % 2 == 0) {
          line.take();
        } else {
          line.take_batch();
        }
        line.consumer.publish_head();
      }
    }
  }
  void finish() { line.take_rest(); }
};

// ---------------------------------------------------------------------------------------------------------------------
// The wake protocol.

struct protocol {
  store_load kind;
  fault planted;

  template <class Look>
  bool prepare_park(presence_word& word, presence parked, Look&& look) const {
    switch (planted) {
      case fault::no_second_look:
        strait::announce(word, parked);
        model::waiting::heavy_barrier(kind);
        return true;
      case fault::no_barrier:
        return strait::prepare_park<no_heavy_barrier>(word, parked, kind, look);
      default:
        return strait::prepare_park<model::waiting>(word, parked, kind, look);
    }
  }
  presence claim_ring(presence_word& word) const {
    return planted == fault::no_light_barrier ? strait::claim_ring<no_light_barrier>(word, kind)
                                              : strait::claim_ring<model::waiting>(word, kind);
  }
  void ring_thread(presence_word& word) const {
    if (claim_ring(word) == presence::thread_parked) model::futex_wake(word);
  }
  /// Returns when it is worth looking again.
  template <class Look>
  void park_thread(presence_word& word, Look&& look) const {
    if (!prepare_park(word, presence::thread_parked, look)) return;
    model::futex_sleep(word, thread_parked);
    strait::take_back(word);
  }
};

presence_word& awake(presence_word& word, const char* name) {
  word.store(static_cast<std::uint32_t>(presence::awake), std::memory_order_relaxed);
  return word.name(name);
}

/// Both sides park: the consumer for a message, the producer for room.
template <std::uint64_t Capacity>
struct thread_park {
  static constexpr std::array names{"producer", "consumer"};
  protocol wake;
  std::uint64_t messages;
  lane<Capacity> line{wake.planted};
  presence_word producer_word, consumer_word;

  thread_park(store_load kind, fault plant, std::uint64_t count) : wake{kind, plant}, messages{count} {
    awake(producer_word, "producer word");
    awake(consumer_word, "consumer word");
  }
  void release() {
    line.consumer.publish_head();
    wake.ring_thread(producer_word);
  }
  void run(std::size_t thread) {
    for (std::uint64_t i = 0; i < messages; ++i) {
      if (thread == 0) {
        while (!line.room()) {
          wake.park_thread(producer_word, [this] { return line.room(); });
        }
        line.push(wake.planted);
        wake.ring_thread(consumer_word);
      } else {
        while (!line.something()) {
          if (line.consumer.release_pending()) release();
          wake.park_thread(consumer_word, [this] { return line.something(); });
        }
        line.take();
        if (line.consumer.release_due()) release();
      }
    }
  }
  void finish() {
    line.take_rest();
    model::check(line.received == messages, "not every message arrived");
  }
};

/// The producer sends one message and closes; the consumer must get both the message and the end.
struct producer_closes {
  static constexpr std::array names{"producer", "consumer"};
  protocol wake;
  lane<2> line;
  presence_word producer_word, consumer_word;

  producer_closes(store_load kind, fault plant) : wake{kind, plant} {
    awake(producer_word, "producer word");
    awake(consumer_word, "consumer word");
  }
  bool peer_closed() { return producer_word.load(std::memory_order_acquire) == closed; }
  void run(std::size_t thread) {
    if (thread == 0) {
      line.push();
      wake.ring_thread(consumer_word);
      producer_word.store(closed, std::memory_order_release);
      wake.ring_thread(consumer_word);
      return;
    }
    for (;;) {
      if (line.something()) {
        line.take();
      } else if (peer_closed()) {
        // Only now is a look that finds nothing the end: the message may have come between the two.
        if (!line.something()) return;
      } else {
        wake.park_thread(consumer_word, [this] { return line.something() || peer_closed(); });
      }
    }
  }
  void finish() { model::check(line.received == 1, "the end came before the message"); }
};

/// The consumer takes one message and closes; the producer, full and parked, must be told.
struct consumer_closes {
  static constexpr std::array names{"producer", "consumer"};
  protocol wake;
  lane<1> line;
  presence_word producer_word, consumer_word;

  consumer_closes(store_load kind, fault plant) : wake{kind, plant} {
    awake(producer_word, "producer word");
    awake(consumer_word, "consumer word");
  }
  bool peer_closed() { return consumer_word.load(std::memory_order_acquire) == closed; }
  void run(std::size_t thread) {
    if (thread == 1) {
      if (line.something()) line.take();
      line.consumer.publish_head();
      consumer_word.store(closed, std::memory_order_release);
      wake.ring_thread(producer_word);
      return;
    }
    for (;;) {
      if (peer_closed()) return;
      if (line.room()) {
        line.push();
        model::check(wake.claim_ring(consumer_word) != presence::thread_parked, "rang for a consumer that never parks");
      } else {
        wake.park_thread(producer_word, [this] { return line.room() || peer_closed(); });
      }
    }
  }
  void finish() {
    model::check(consumer_word.load(std::memory_order_relaxed) == closed, "a ringer overwrote `closed`");
  }
};

/// Two senders, two lanes, one hub with one eventfd. The lanes are of two channels (a word each) or of one.
struct hub_park {
  static constexpr std::array names{"sender a", "sender b", "hub"};
  protocol wake;
  bool one_channel;
  std::array<std::uint64_t, 2> messages;
  std::array<lane<2>, 2> lines;
  std::array<presence_word, 2> words;
  strait::bell_latch<model::atomics> latch;
  model::eventfd bell;
  std::uint64_t parks = 0;
  int other_wakes;

  hub_park(store_load kind, fault plant, bool shared, std::uint64_t from_a, std::uint64_t from_b,
           int woken_otherwise = 0)
      : wake{kind, plant}, one_channel{shared}, messages{from_a, from_b}, other_wakes{woken_otherwise} {
    for (auto& word : words) awake(word, "hub word");
  }
  presence_word& word_of(std::size_t sender) { return words[one_channel ? 0 : sender]; }
  bool something() {
    const bool a = lines[0].something();
    return lines[1].something() || a;
  }
  void take_back() {
    strait::take_back(words[0]);
    if (!one_channel) strait::take_back(words[1]);
  }
  bool prepare() {
    ++parks;
    if (one_channel) return wake.prepare_park(words[0], presence::hub_parked, [this] { return something(); });
    // Many words, one barrier, as prepare_park's comment has it.
    for (auto& word : words) strait::announce(word, presence::hub_parked);
    if (wake.planted != fault::no_barrier) model::waiting::heavy_barrier(wake.kind);
    if (wake.planted == fault::no_second_look || !something()) return true;
    take_back();
    return false;
  }
  void run(std::size_t thread) {
    if (thread < 2) {
      for (std::uint64_t i = 0; i < messages[thread]; ++i) {
        lines[thread].push();  // room for all of them
        if (wake.claim_ring(word_of(thread)) == presence::hub_parked && latch.claim()) bell.write();
      }
      return;
    }
    for (;;) {
      for (auto& line : lines) {
        while (line.something()) line.take();
      }
      if (lines[0].received + lines[1].received == messages[0] + messages[1]) return;
      if (!prepare()) continue;
      if (other_wakes > 0) {
        // A socket or a timer woke the hub: the bell is left as it is, rung or not.
        --other_wakes;
      } else {
        bell.wait();
        if (wake.planted == fault::latch_reset_before_read) latch.reset();
        bell.read();
        if (wake.planted != fault::latch_not_reset && wake.planted != fault::latch_reset_before_read) latch.reset();
      }
      take_back();
    }
  }
  void finish() {
    for (auto& line : lines) line.take_rest();
    // Each announcement is claimed once. With two words a ringer may be so late that the latch was reset before it:
    // then one park costs two writes, and the second only wakes the hub for nothing.
    model::check(bell.writes() <= parks * (one_channel ? 1 : 2), "more writes to the eventfd than announcements");
  }
};

/// Two receivers take turns on one lane, each with its word. A sender rings one of them. The first is cancelled,
/// perhaps just after it was rung: then the second must still get the message.
struct cancel_parked {
  static constexpr std::array names{"sender", "first", "second", "canceller"};
  protocol wake;
  lane<1> line;
  std::array<presence_word, 2> words;
  model::atomic<std::uint32_t> cancelled;
  model::mutex lease;

  cancel_parked(store_load kind, fault plant) : wake{kind, plant} {
    awake(words[0], "first's word");
    awake(words[1], "second's word");
    cancelled.name("cancelled");
  }
  bool is_cancelled(std::size_t which) { return which == 0 && cancelled.load(std::memory_order_acquire) == 1; }
  bool something() {
    lease.lock();
    const bool there = line.something();
    lease.unlock();
    return there;
  }
  bool take() {
    lease.lock();
    const bool there = line.something();
    if (there) line.take();
    lease.unlock();
    return there;
  }
  void receive(std::size_t which) {
    while (!take()) {
      const auto worth_it = [this, which] { return something() || is_cancelled(which); };
      // Whether somebody may have rung us, and only us, for a message.
      bool rung = true;
      if (wake.prepare_park(words[which], presence::thread_parked, worth_it)) {
        model::futex_sleep(words[which], thread_parked);
        rung = !strait::take_back(words[which]);
      } else if (wake.planted == fault::wake_dropped_before_sleep) {
        rung = false;
      }
      if (is_cancelled(which)) {
        if (rung && wake.planted != fault::wake_dropped_on_cancel) wake.ring_thread(words[1 - which]);
        return;
      }
    }
  }
  void run(std::size_t thread) {
    switch (thread) {
      case 0:
        line.push();
        for (auto& word : words) {
          if (wake.claim_ring(word) == presence::thread_parked) {
            model::futex_wake(word);
            break;  // one message, one receiver
          }
        }
        break;
      case 1:
      case 2:
        receive(thread - 1);
        break;
      default:
        cancelled.store(1, std::memory_order_release);
        wake.ring_thread(words[0]);
        break;
    }
  }
  /// Who got nothing sleeps on; that is right once the message was taken.
  bool may_rest() const { return line.received == 1; }
  void finish() { model::check(line.received == 1, "the message was taken by nobody"); }
};

/// A deadline: the wait may end at any moment, also just when it is rung. What the last look finds is not lost.
struct deadline_passes {
  static constexpr std::array names{"producer", "consumer"};
  protocol wake;
  lane<1> line;
  presence_word consumer_word;
  bool timed_out = false;

  deadline_passes(store_load kind, fault plant) : wake{kind, plant} {
    awake(consumer_word, "consumer word");
    if (plant == fault::take_back_relaxed) consumer_word.weaken_loads();
    if (plant == fault::claim_relaxed) consumer_word.weaken_stores();
  }
  void run(std::size_t thread) {
    if (thread == 0) {
      line.push();
      wake.ring_thread(consumer_word);
      return;
    }
    while (!line.something()) {
      if (!wake.prepare_park(consumer_word, presence::thread_parked, [this] { return line.something(); })) continue;
      const bool woken = model::futex_sleep(consumer_word, thread_parked, true);
      const bool nobody_rang = strait::take_back(consumer_word);
      if (!nobody_rang) model::check(line.something(), "rung, and nothing there");
      if (!woken && nobody_rang) {
        timed_out = true;
        return;
      }
    }
    line.take();
  }
  void finish() {
    const std::uint64_t before = line.received;
    line.take_rest();
    model::check(timed_out || before == 1, "the message was not received");
  }
};

// ---------------------------------------------------------------------------------------------------------------------

/// Everything with few preemptions and old reads first, then with more and more, as long as it stays within
/// `executions`; then random walks without such bounds.
template <class Scenario, class... Arguments>
model::outcome explore(std::uint64_t executions, std::uint64_t walks, std::string& reached,
                       const Arguments&... arguments) {
  model::outcome all;
  model::bounds limits;
  reached = "nothing in full";
  for (unsigned level = 2; level <= 12 && all.executions < executions; ++level) {
    limits.preemptions = level / 2;
    limits.old_reads = std::min((level - 1) / 2, 3U);
    limits.spurious_wakes = level < 4 ? 0 : 1;
    limits.executions = executions - all.executions;
    const auto got = model::the_world().explore<Scenario>(limits, arguments...);
    all.executions += got.executions;
    all.failed = got.failed;
    all.report = got.report;
    if (got.failed) return all;
    if (!got.exhausted) break;
    all.exhausted = true;
    reached = fmt::format("all with <= {} preemptions, <= {} old reads", limits.preemptions, limits.old_reads);
  }
  limits.executions = 0;
  limits.walks = walks;
  const auto got = model::the_world().explore<Scenario>(limits, arguments...);
  all.executions += got.executions;
  all.failed = got.failed;
  all.report = got.report;
  return all;
}

constexpr std::uint64_t walks = 100'000;

/// STRAIT_MODEL_EXECUTIONS=5000000 explores deeper than there is time for each day.
const std::uint64_t executions = [] {
  const char* const wanted = std::getenv("STRAIT_MODEL_EXECUTIONS");
  return wanted != nullptr ? std::uint64_t{std::strtoull(wanted, nullptr, 10)} : std::uint64_t{300'000};
}();

template <class Scenario, class... Arguments>
void expect_clean(const char* what, const Arguments&... arguments) {
  std::string reached;
  const auto got = explore<Scenario>(executions, walks, reached, arguments...);
  CHECK_MESSAGE(!got.failed, got.report);
  CHECK_MESSAGE(got.exhausted, "not even the smallest bounds were exhausted");
  CHECK(got.executions >= walks + 1000);
  fmt::print("  {:<32} {:>8} executions; {}\n", what, got.executions, reached);
}

template <class Scenario, class... Arguments>
void expect_found(const char* what, const char* reason, const Arguments&... arguments) {
  std::string reached;
  const auto got = explore<Scenario>(executions, walks, reached, arguments...);
  CHECK_MESSAGE(got.failed, "not found in " << got.executions << " executions: " << what);
  CHECK_MESSAGE(got.report.find(reason) != std::string::npos, got.report);
  fmt::print("  {:<32} found after {:>6} executions: {}\n", what, got.executions,
             got.report.substr(0, got.report.find('\n')));
}

// by_process_barrier and by_machine_barrier differ only in which system call the kernel gets.
constexpr std::array kinds{store_load::by_process_barrier, store_load::by_fence};
void announce_mode(store_load kind) {
  fmt::print("{}\n", kind == store_load::by_fence ? "by fence:" : "by barrier:");
}

}  // namespace

TEST_CASE("scheduler: store buffering is seen unless fences or barriers forbid it") {
  CHECK(ever_seen<store_buffering>(between::nothing));
  CHECK_FALSE(ever_seen<store_buffering>(between::fences));
  CHECK_FALSE(ever_seen<store_buffering>(between::barriers));
}
TEST_CASE("scheduler: message passing needs release and acquire") {
  constexpr auto relaxed = std::memory_order_relaxed;
  constexpr auto release = std::memory_order_release;
  constexpr auto acquire = std::memory_order_acquire;
  CHECK(ever_seen<message_passing>(relaxed, relaxed, false));
  CHECK(ever_seen<message_passing>(release, relaxed, false));
  CHECK(ever_seen<message_passing>(relaxed, acquire, false));
  CHECK_FALSE(ever_seen<message_passing>(release, acquire, false));
  model::bounds everything;
  CHECK(model::the_world().explore<message_passing>(everything, release, relaxed, true).failed);
  CHECK(model::the_world().explore<message_passing>(everything, relaxed, acquire, true).failed);
  CHECK_FALSE(model::the_world().explore<message_passing>(everything, release, acquire, true).failed);
}
TEST_CASE("scheduler: independent reads of independent writes") {
  CHECK(ever_seen<independent_reads>(between::nothing));
  CHECK_FALSE(ever_seen<independent_reads>(between::fences));
  CHECK_FALSE(ever_seen<independent_reads>(between::barriers));
}
TEST_CASE("scheduler: coherence and release sequences") {
  CHECK_FALSE(ever_seen<coherence>());
  CHECK(coherence::changed_seen);
}

TEST_CASE("lane: lone messages, one at a time and overwritten while they are read") {
  expect_clean<lone_messages<4>>("capacity 4", fault::none, 4);
}
TEST_CASE("lane: wrap at capacity 1 and 2") {
  expect_clean<lone_messages<1>>("capacity 1", fault::none, 3);
  expect_clean<lone_messages<2>>("capacity 2", fault::none, 4);
}
TEST_CASE("lane: batches mixed with lone messages") {
  expect_clean<batches>("batches", fault::none);
}

TEST_CASE("thread park: message side and room side, spurious wakes among them") {
  for (const auto kind : kinds) {
    announce_mode(kind);
    expect_clean<thread_park<1>>("capacity 1", kind, fault::none, std::uint64_t{2});
    expect_clean<thread_park<2>>("capacity 2", kind, fault::none, std::uint64_t{4});
  }
}
TEST_CASE("thread park: a deadline passes at any moment") {
  for (const auto kind : kinds) {
    announce_mode(kind);
    expect_clean<deadline_passes>("deadline", kind, fault::none);
  }
}
TEST_CASE("close while the other side is parked") {
  for (const auto kind : kinds) {
    announce_mode(kind);
    expect_clean<producer_closes>("producer closes", kind, fault::none);
    expect_clean<consumer_closes>("consumer closes", kind, fault::none);
  }
}
TEST_CASE("hub park: two senders, eventfd and latch") {
  for (const auto kind : kinds) {
    announce_mode(kind);
    expect_clean<hub_park>("two channels", kind, fault::none, false, std::uint64_t{2}, std::uint64_t{1});
    expect_clean<hub_park>("one channel", kind, fault::none, true, std::uint64_t{2}, std::uint64_t{1});
    expect_clean<hub_park>("woken by a socket, too", kind, fault::none, true, std::uint64_t{1}, std::uint64_t{1}, 1);
  }
}
TEST_CASE("cancel: a receiver that was rung and then cancelled passes the wake on") {
  for (const auto kind : kinds) {
    announce_mode(kind);
    expect_clean<cancel_parked>("cancel", kind, fault::none);
  }
}

TEST_CASE("planted fault: the second look left out") {
  for (const auto kind : kinds) {
    announce_mode(kind);
    expect_found<thread_park<1>>("thread", "deadlock", kind, fault::no_second_look, std::uint64_t{2});
    expect_found<hub_park>("hub", "deadlock", kind, fault::no_second_look, false, std::uint64_t{1}, std::uint64_t{1});
    expect_found<producer_closes>("close", "deadlock", kind, fault::no_second_look);
  }
}
TEST_CASE("planted fault: the barrier left out") {
  for (const auto kind : kinds) {
    announce_mode(kind);
    expect_found<thread_park<1>>("thread", "deadlock", kind, fault::no_barrier, std::uint64_t{2});
    expect_found<hub_park>("hub, two channels", "deadlock", kind, fault::no_barrier, false, std::uint64_t{1},
                           std::uint64_t{1});
    expect_found<hub_park>("hub, one channel", "deadlock", kind, fault::no_barrier, true, std::uint64_t{1},
                           std::uint64_t{1});
    expect_found<consumer_closes>("close", "deadlock", kind, fault::no_barrier);
  }
  expect_found<thread_park<1>>("the sender's fence", "deadlock", store_load::by_fence, fault::no_light_barrier,
                               std::uint64_t{2});
}
TEST_CASE("planted fault: published before the slot is written") {
  expect_found<lone_messages<2>>("lane", "a slot is read", fault::published_early, 2);
  for (const auto kind : kinds) {
    announce_mode(kind);
    expect_found<thread_park<1>>("thread", "a slot is read", kind, fault::published_early, std::uint64_t{2});
  }
}
TEST_CASE("planted fault: the wake of a cancelled receiver dropped") {
  for (const auto kind : kinds) {
    announce_mode(kind);
    expect_found<cancel_parked>("cancel", "deadlock", kind, fault::wake_dropped_on_cancel);
  }
}
TEST_CASE("planted fault: tail stored relaxed") {
  expect_found<batches>("lane", "a slot is read", fault::tail_relaxed);
  for (const auto kind : kinds) {
    announce_mode(kind);
    expect_found<thread_park<2>>("thread", "a slot is", kind, fault::tail_relaxed, std::uint64_t{2});
  }
}
TEST_CASE("planted fault: the latch not reset") {
  for (const auto kind : kinds) {
    announce_mode(kind);
    expect_found<hub_park>("two channels", "deadlock", kind, fault::latch_not_reset, false, std::uint64_t{1},
                           std::uint64_t{1});
    expect_found<hub_park>("one channel", "deadlock", kind, fault::latch_not_reset, true, std::uint64_t{2},
                           std::uint64_t{0});
  }
}

TEST_CASE("planted faults around the six") {
  for (const auto kind : kinds) {
    announce_mode(kind);
    expect_found<hub_park>("latch reset, then eventfd read", "deadlock", kind, fault::latch_reset_before_read, false,
                           std::uint64_t{2}, std::uint64_t{1});
    // prepare_park says false, and does not say whether it was rung before it looked.
    expect_found<cancel_parked>("wake dropped before the sleep", "deadlock", kind, fault::wake_dropped_before_sleep);
    expect_found<deadline_passes>("take_back without acquire", "rung, and nothing there", kind,
                                  fault::take_back_relaxed);
  }
  // Only here: a sender's fence would release all the same.
  expect_found<deadline_passes>("claim_ring without release", "rung, and nothing there", store_load::by_process_barrier,
                                fault::claim_relaxed);
}

TEST_CASE("each memory order of the lane is needed") {
  expect_found<batches>("tail loaded relaxed", "a slot is read", fault::tail_read_relaxed);
  expect_found<batches>("head stored relaxed", "written while another thread reads", fault::head_relaxed);
  expect_found<batches>("head loaded relaxed", "written while another thread reads", fault::head_read_relaxed);
  expect_found<lone_messages<4>>("copies stored relaxed", "a message is", fault::copies_relaxed, 4);
  expect_found<lone_messages<4>>("copies loaded relaxed", "a message is", fault::copies_read_relaxed, 4);
  expect_found<batches>("batch of one without its copy", "a message is", fault::batch_of_one_without_copy);
}
