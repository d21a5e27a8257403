#include <doctest/doctest.h>
#include <fcntl.h>
#include <fmt/core.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

import strait.park;

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define STRAIT_SANITIZED 1
#endif
#if __has_feature(thread_sanitizer)
#define STRAIT_TSAN 1
#endif
#endif

namespace {

using namespace std::chrono_literals;
using clock_type = std::chrono::steady_clock;
using strait::presence;
using strait::store_load;
using presence_word = std::atomic<std::uint32_t>;

constexpr std::uint32_t raw(presence what) {
  return static_cast<std::uint32_t>(what);
}
presence held(const presence_word& word) {
  return static_cast<presence>(word.load(std::memory_order_relaxed));
}

constexpr std::array kinds{store_load::by_fence, store_load::by_process_barrier, store_load::by_machine_barrier};
const char* name_of(store_load kind) {
  switch (kind) {
    case store_load::by_fence:
      return "by fence";
    case store_load::by_process_barrier:
      return "by process barrier";
    case store_load::by_machine_barrier:
      return "by machine barrier";
  }
  return "?";
}

bool readable(int descriptor, std::chrono::milliseconds wait = 0ms) {
  pollfd what{descriptor, POLLIN, 0};
  int got = 0;
  do {
    got = ::poll(&what, 1, static_cast<int>(wait.count()));
  } while (got < 0 && errno == EINTR);
  return got == 1 && (what.revents & POLLIN) != 0;
}

/// Counts the barriers and says what it saw at each.
struct counting_waiting : strait::native_waiting {
  static inline int light = 0;
  static inline int heavy = 0;
  static inline presence_word* watched = nullptr;
  static inline presence seen_by_heavy = presence::vacant;
  static void light_barrier(store_load) noexcept { ++light; }
  static void heavy_barrier(store_load) noexcept {
    ++heavy;
    seen_by_heavy = held(*watched);
  }
};

}  // namespace

TEST_CASE("announce and take_back") {
  for (const auto parked : {presence::thread_parked, presence::hub_parked}) {
    presence_word word{raw(presence::awake)};
    strait::announce(word, parked);
    CHECK(held(word) == parked);
    CHECK(strait::take_back(word));  // nobody rang
    CHECK(held(word) == presence::awake);
    CHECK_FALSE(strait::take_back(word));
    strait::announce(word, parked);
    CHECK(strait::claim_ring(word, store_load::by_fence) == parked);
    CHECK_FALSE(strait::take_back(word));  // somebody rang
  }
}

TEST_CASE("prepare_park: announce, barrier, look, in this order") {
  presence_word word{raw(presence::awake)};
  counting_waiting::watched = &word;
  counting_waiting::heavy = 0;
  int looks = 0;
  const auto look = [&](bool answer) {
    return [&, answer] {
      CHECK(counting_waiting::heavy == ++looks);
      CHECK(counting_waiting::seen_by_heavy == presence::hub_parked);
      return answer;
    };
  };
  CHECK(strait::prepare_park<counting_waiting>(word, presence::hub_parked, store_load::by_fence, look(false)));
  CHECK(held(word) == presence::hub_parked);
  strait::take_back(word);
  CHECK_FALSE(strait::prepare_park<counting_waiting>(word, presence::hub_parked, store_load::by_fence, look(true)));
  CHECK(held(word) == presence::awake);
  CHECK(looks == 2);
}

TEST_CASE("claim_ring: one ringer of many, and only for who is parked") {
  for (const auto other : {presence::vacant, presence::awake, presence::closed, presence::dead}) {
    presence_word word{raw(other)};
    CHECK(strait::claim_ring(word, store_load::by_fence) == other);
    CHECK(held(word) == other);
  }
  for (const auto parked : {presence::thread_parked, presence::hub_parked}) {
    presence_word word{raw(parked)};
    counting_waiting::light = 0;
    CHECK(strait::claim_ring<counting_waiting>(word, store_load::by_fence) == parked);
    CHECK(strait::claim_ring<counting_waiting>(word, store_load::by_fence) == presence::awake);
    CHECK(counting_waiting::light == 2);
    CHECK(held(word) == presence::awake);
  }
}

TEST_CASE("claim_ring: of threads that race for one announcement, one wins each time") {
  constexpr int rounds = 2000;
  presence_word word{raw(presence::awake)};
  std::atomic<int> round{0};
  std::atomic<int> finished{0};
  std::atomic<int> won{0};
  const auto racer = [&] {
    for (int r = 1; r <= rounds; ++r) {
      while (round.load(std::memory_order_acquire) < r) std::this_thread::yield();
      const auto got = strait::claim_ring(word, store_load::by_fence);
      if (got == presence::thread_parked) won.fetch_add(1, std::memory_order_relaxed);
      finished.fetch_add(1, std::memory_order_release);
    }
  };
  std::vector<std::thread> racers;
  for (int i = 0; i < 3; ++i) racers.emplace_back(racer);
  for (int r = 1; r <= rounds; ++r) {
    strait::announce(word, presence::thread_parked);
    round.store(r, std::memory_order_release);
    while (finished.load(std::memory_order_acquire) < 3 * r) std::this_thread::yield();
    if (won.load(std::memory_order_relaxed) != r) break;
  }
  round.store(rounds, std::memory_order_release);
  for (auto& one : racers) one.join();
  CHECK(won.load() == rounds);
}

TEST_CASE("bell_latch: only the first between two resets") {
  strait::bell_latch<> latch;
  CHECK(latch.claim());
  CHECK_FALSE(latch.claim());
  CHECK_FALSE(latch.claim());
  latch.reset();
  CHECK(latch.claim());
  latch.reset();
  latch.reset();
  CHECK(latch.claim());
}

TEST_CASE("register_barrier: accepted, and again") {
  for (const auto kind : kinds) {
    const char* const mode = name_of(kind);
    INFO(std::string{mode});
    CHECK(strait::register_barrier(kind));
    CHECK(strait::register_barrier(kind));
    strait::heavy_barrier(kind);
  }
}

TEST_CASE("futex_sleep returns at once when the word holds something else") {
  presence_word word{raw(presence::awake)};
  const auto before = clock_type::now();
  strait::futex_sleep(word, presence::thread_parked, clock_type::now() + 10s);
  strait::futex_sleep(word, presence::thread_parked, std::nullopt);
  CHECK(clock_type::now() - before < 5s);
}

TEST_CASE("futex_sleep ends at its deadline and not before") {
  presence_word word{raw(presence::thread_parked)};
  const auto deadline = clock_type::now() + 30ms;
  // A signal may end a sleep early; what counts is that it ends at all and that the deadline is an absolute time.
  while (clock_type::now() < deadline) strait::futex_sleep(word, presence::thread_parked, deadline);
  CHECK(clock_type::now() - deadline < 5s);
  CHECK(held(word) == presence::thread_parked);

  const auto before = clock_type::now();
  strait::futex_sleep(word, presence::thread_parked, before - 1s);
  CHECK(clock_type::now() - before < 5s);
}

TEST_CASE("futex_wake wakes the thread that sleeps") {
  presence_word word{raw(presence::thread_parked)};
  std::atomic<bool> woken{false};
  std::thread sleeper{[&] {
    const auto deadline = clock_type::now() + 10s;
    while (held(word) == presence::thread_parked && clock_type::now() < deadline) {
      strait::futex_sleep(word, presence::thread_parked, deadline);
    }
    woken.store(clock_type::now() < deadline);
  }};
  std::this_thread::sleep_for(5ms);  // most likely asleep by now; it must work either way
  REQUIRE(strait::claim_ring(word, store_load::by_fence) == presence::thread_parked);
  strait::futex_wake(word);
  sleeper.join();
  CHECK(woken.load());
}

TEST_CASE("doorbell: readable from the first ring until drain, and one write for many rings") {
  strait::doorbell bell;
  CHECK_FALSE(readable(bell.descriptor()));
  strait::doorbell::ring(bell.number());
  CHECK(readable(bell.descriptor()));
  strait::doorbell::ring(bell.number());
  strait::doorbell::ring(bell.number());
  CHECK(readable(bell.descriptor()));
  std::uint64_t count = 0;
  REQUIRE(::read(bell.descriptor(), &count, sizeof count) == sizeof count);
  CHECK(count == 1);
  bell.drain();  // finds the eventfd empty and resets the latch all the same
  CHECK_FALSE(readable(bell.descriptor()));
  strait::doorbell::ring(bell.number());
  CHECK(readable(bell.descriptor()));
  bell.drain();
  CHECK_FALSE(readable(bell.descriptor()));
}

TEST_CASE("doorbell: its descriptor neither blocks nor survives exec") {
  const strait::doorbell bell;
  CHECK((::fcntl(bell.descriptor(), F_GETFL) & O_NONBLOCK) != 0);
  CHECK((::fcntl(bell.descriptor(), F_GETFD) & FD_CLOEXEC) != 0);
}

TEST_CASE("doorbell: one that nobody has cannot be rung, and is the next one's, with nothing of what was rung before") {
  std::uint64_t number = 0;
  int copy = -1;
  {
    strait::doorbell first;
    const strait::doorbell beside;
    CHECK(beside.number() != first.number());
    CHECK(beside.descriptor() != first.descriptor());
    number = first.number();
    copy = strait::doorbell::duplicate(number);
    strait::doorbell::ring(number);
  }
  // As another process does, which was given it, and this one, to which it looks as if it had been rung.
  const std::uint64_t one = 1;
  REQUIRE(::write(copy, &one, sizeof one) == sizeof one);
  strait::doorbell::ring(number);
  strait::doorbell::ring(0);
  CHECK(strait::doorbell::duplicate(0) == -1);
  const strait::doorbell second;
  CHECK(second.number() == number);
  CHECK_FALSE(readable(second.descriptor()));
  strait::doorbell::ring(number);
  CHECK(readable(second.descriptor()));
  CHECK(readable(copy));  // the same
  ::close(copy);
}

TEST_CASE("doorbell: a duplicate rings the same bell and outlives it") {
  int other = -1;
  {
    strait::doorbell bell;
    other = strait::doorbell::duplicate(bell.number());
    REQUIRE(other >= 0);
    CHECK(other != bell.descriptor());
    CHECK((::fcntl(other, F_GETFD) & FD_CLOEXEC) != 0);
    const std::uint64_t one = 1;
    REQUIRE(::write(other, &one, sizeof one) == sizeof one);
    CHECK(readable(bell.descriptor()));
    bell.drain();
    CHECK_FALSE(readable(other));
  }
  const std::uint64_t one = 1;
  CHECK(::write(other, &one, sizeof one) == sizeof one);
  ::close(other);
}

TEST_CASE("spin_budget: a policy is kept to") {
  strait::spin_budget parks{strait::wait_policy::park, 1000, 50'000};
  CHECK(parks.length() == 0);
  parks.answered();
  parks.parked_for(0);
  CHECK(parks.length() == 0);

  strait::spin_budget spins{strait::wait_policy::busy, 1000, 50'000};
  CHECK(spins.length() == 50'000);
  spins.in_vain();
  spins.preempted();
  CHECK(spins.length() == 50'000);

  strait::spin_budget nothing;
  nothing.answered();
  CHECK(nothing.length() == 0);
}

TEST_CASE("spin_budget: learns") {
  strait::spin_budget adaptive{strait::wait_policy::adaptive, 4000, 50'000};
  if (strait::online_cpu_count() == 1) {  // nobody could answer a spin
    adaptive.answered();
    CHECK(adaptive.length() == 0);
    return;
  }
  CHECK(adaptive.length() == 4000);
  adaptive.answered();
  CHECK(adaptive.length() == 8000);
  for (int i = 0; i < 10; ++i) adaptive.answered();
  CHECK(adaptive.length() == 50'000);
  adaptive.in_vain();
  CHECK(adaptive.length() == 25'000);
  for (int i = 0; i < 20; ++i) adaptive.in_vain();
  CHECK(adaptive.length() == 0);
  adaptive.parked_for(200'000);  // longer than two wake-ups cost: parking was right
  CHECK(adaptive.length() == 0);
  adaptive.parked_for(3000);
  CHECK(adaptive.length() == 1000);
  adaptive.answered();
  CHECK(adaptive.length() == 2000);
  adaptive.preempted();
  CHECK(adaptive.length() == 0);
}

TEST_CASE("gather_pause: longer while that brings more, gone with a lone message") {
  using strait::gather_pause;
  gather_pause pause{4096};
  CHECK(pause.enough() == 512);
  CHECK(pause.length() == 0);
  std::uint64_t messages = 20;
  for (std::uint32_t length = gather_pause::shortest; length <= gather_pause::longest; length *= 2) {
    pause.found(messages);
    CHECK(pause.length() == length);
    messages *= 2;
  }
  for (std::uint32_t i = 0; i < gather_pause::looks_settled; ++i) {
    pause.found(messages);  // fewer than enough
    CHECK(pause.length() == gather_pause::longest);
  }
  pause.found(messages);
  CHECK(pause.length() == 0);  // it is tried anew
  pause.found(messages);
  CHECK(pause.length() == gather_pause::shortest);
  pause.found(1);
  CHECK(pause.length() == 0);
}

TEST_CASE("gather_pause: no longer than it takes for enough, or than it helps") {
  using strait::gather_pause;
  gather_pause pause{4096};
  pause.found(100);
  for (int i = 0; i < 10; ++i) pause.found(pause.enough());
  CHECK(pause.length() == gather_pause::shortest);
  pause.found(4 * pause.enough() + 1);
  CHECK(pause.length() < gather_pause::shortest);

  gather_pause useless{4096};
  for (const std::uint64_t messages : {100U, 200U, 210U, 210U}) useless.found(messages);
  CHECK(useless.length() == gather_pause::shortest);
}

TEST_CASE("gather_pause: none for a while where it brings nothing, a few times in a row") {
  using strait::gather_pause;
  for (const std::uint64_t brought : {10U, 0U}) {  // a burst that was there all the time; and nothing after one
    CAPTURE(brought);
    gather_pause pause{4096};
    for (std::uint32_t i = 0; i < gather_pause::vain_to_rest; ++i) {
      pause.found(10);
      CHECK(pause.length() == gather_pause::shortest);
      pause.found(brought);
      CHECK(pause.length() == 0);
    }
    for (std::uint32_t i = 0; i < gather_pause::looks_settled; ++i) {
      pause.found(10);
      CHECK(pause.length() == 0);
    }
    pause.found(10);
    CHECK(pause.length() == gather_pause::shortest);
  }
}

TEST_CASE("gather_pause: nobody waits for much of a small lane, or for more than pays in a large one") {
  CHECK(strait::gather_pause{1}.enough() == 2);
  CHECK(strait::gather_pause{64}.enough() == 8);
  CHECK(strait::gather_pause{1 << 20}.enough() == strait::gather_pause::most_enough);
  strait::gather_pause small{8};
  for (int i = 0; i < 10; ++i) small.found(8);
  CHECK(small.length() == 0);
}

TEST_CASE("online_cpu_count is at least one, and now_ns follows the steady clock") {
  CHECK(strait::online_cpu_count() >= 1);
  const auto before = strait::now_ns();
  CHECK(strait::now_ns() >= before);
  CHECK(std::chrono::nanoseconds{before} <= clock_type::now().time_since_epoch());
}

// ---------------------------------------------------------------------------------------------------------------------
// Lost wakes. Both sides of a small lane park; a sleep that lasts this long lost its wake.

namespace {

constexpr auto lost = 10s;
#if defined(STRAIT_SANITIZED)
constexpr std::uint64_t stress_messages = 12'000;
#else
constexpr std::uint64_t stress_messages = 40'000;
#endif

/// Everything that both ends share; laid into shared memory for two processes.
struct shared_state {
  static constexpr std::uint64_t capacity = 2;
  using slot = strait::native_slot<std::uint64_t>;

  strait::lane_control<> control;
  alignas(strait::line_padding) presence_word consumer_word{raw(presence::awake)};
  alignas(strait::line_padding) presence_word producer_word{raw(presence::awake)};
  std::array<slot, capacity> slots;
};

struct tally {
  std::uint64_t announcements = 0;
  std::uint64_t parks = 0;
  std::uint64_t rings = 0;
  std::uint64_t lost = 0;
  std::uint64_t wrong = 0;
};

/// Two sides that always park take turns: each sleeps long before it is rung, and they never meet. So by turns of a
/// thousand messages most waits spin: that brings both to work at the same time, and now and then one of them parks
/// just while the other publishes. Without the barrier that loses a wake within some thousand tries. In the other turns
/// the receiver announces before each message, so that the count does not hang on the machine's mood.
bool spinning_turn(std::uint64_t message) {
  return message / 1024 % 2 == 0;
}

template <class Look>
bool spin_first(std::uint64_t message, std::minstd_rand& random, Look&& something_there) {
  if (!spinning_turn(message)) return false;
  const auto longest = random() % 4 == 0 ? random() % 16 : 2000;
  for (std::uint64_t i = 0; i < longest; ++i) {
    if (something_there()) return true;
    strait::cpu_relax();
  }
  return false;
}

template <class Look>
void park(presence_word& word, store_load kind, std::uint64_t message, tally& counted, std::minstd_rand& random,
          Look&& look) {
  if (spin_first(message, random, look)) return;
  ++counted.announcements;
  if (!strait::prepare_park(word, presence::thread_parked, kind, look)) return;
  ++counted.parks;
  auto deadline = clock_type::now() + lost;
  for (int overdue = 0; held(word) == presence::thread_parked;) {
    strait::futex_sleep(word, presence::thread_parked, deadline);
    if (clock_type::now() < deadline) continue;
    // Nothing there: the other side was kept from running. Or it gave up, so not for ever.
    if (look() || ++overdue == 3) {
      ++counted.lost;
      break;
    }
    deadline += lost;
  }
  strait::take_back(word);
}

void ring(presence_word& word, store_load kind, tally& counted) {
  if (strait::claim_ring(word, kind) != presence::thread_parked) return;
  ++counted.rings;
  strait::futex_wake(word);
}

tally produce(shared_state& shared, store_load kind) {
  tally counted;
  std::minstd_rand random{1};
  strait::lane_producer<> producer{shared.control, shared_state::capacity};
  for (std::uint64_t n = 0; n < stress_messages && counted.lost == 0; ++n) {
    while (producer.known_room() == 0 && producer.look() == 0 && counted.lost == 0) {
      park(shared.producer_word, kind, n, counted, random, [&] { return producer.look() > 0; });
    }
    if (counted.lost != 0) break;
    producer.push<std::uint64_t>(shared.slots.data(), n);
    ring(shared.consumer_word, kind, counted);
  }
  return counted;
}

tally consume(shared_state& shared, store_load kind) {
  tally counted;
  std::minstd_rand random{2};
  strait::lane_consumer<> consumer{shared.control, shared_state::capacity};
  for (std::uint64_t n = 0; n < stress_messages && counted.lost == 0; ++n) {
    if (!spinning_turn(n)) {
      park(shared.consumer_word, kind, n, counted, random, [&] { return consumer.look() > 0; });
    }
    while (consumer.known() == 0 && consumer.look() == 0 && counted.lost == 0) {
      park(shared.consumer_word, kind, n, counted, random, [&] { return consumer.look() > 0; });
    }
    if (counted.lost != 0) break;
    if (consumer.take<std::uint64_t>(shared.slots.data()) != n) ++counted.wrong;
    consumer.publish_head();
    ring(shared.producer_word, kind, counted);
  }
  return counted;
}

}  // namespace

TEST_CASE("no wake is lost between two threads that park for messages and for room") {
  for (const auto kind : kinds) {
    const char* const mode = name_of(kind);
    INFO(std::string{mode});
    REQUIRE(strait::register_barrier(kind));
    const auto shared = std::make_unique<shared_state>();
    tally sender;
    std::thread other{[&] { sender = produce(*shared, kind); }};
    const tally receiver = consume(*shared, kind);
    other.join();
    CHECK(sender.lost == 0);
    CHECK(receiver.lost == 0);
    CHECK(receiver.wrong == 0);
    // Otherwise it proves nothing.
    CHECK(receiver.announcements > stress_messages / 3);
    CHECK(sender.parks + receiver.parks > 0);
    fmt::print("threads, {}: {} announcements, {} parks, {} rings\n", mode,
               sender.announcements + receiver.announcements, sender.parks + receiver.parks,
               sender.rings + receiver.rings);
  }
}

#if !defined(STRAIT_TSAN)  // it sees one process, and its stand-in for the barriers is a word of that process
TEST_CASE("no wake is lost between two processes") {
  for (const auto kind : {store_load::by_fence, store_load::by_machine_barrier}) {
    const char* const mode = name_of(kind);
    INFO(std::string{mode});
    void* memory = ::mmap(nullptr, sizeof(shared_state), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    auto& shared = *::new (memory) shared_state;
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      // Registered anew: a fork inherits the flag in our memory and, as the kernel has it, the registration, too.
      const bool registered = strait::register_barrier(kind);
      ::_exit(registered && produce(shared, kind).lost == 0 ? 0 : 1);
    }
    REQUIRE(strait::register_barrier(kind));
    const tally receiver = consume(shared, kind);
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
    CHECK(receiver.lost == 0);
    CHECK(receiver.wrong == 0);
    CHECK(receiver.announcements > stress_messages / 3);
    fmt::print("processes, {}: {} announcements, {} parks of the receiver\n", mode, receiver.announcements,
               receiver.parks);
    ::munmap(memory, sizeof(shared_state));
  }
}
#endif

TEST_CASE("no wake is lost between two senders and a hub that polls its doorbell") {
  constexpr std::uint64_t messages = stress_messages / 2;
  for (const auto kind : kinds) {
    const char* const mode = name_of(kind);
    INFO(std::string{mode});
    REQUIRE(strait::register_barrier(kind));
    std::array<std::unique_ptr<shared_state>, 2> shared{std::make_unique<shared_state>(),
                                                        std::make_unique<shared_state>()};
    strait::doorbell bell;
    std::array<tally, 2> sent;
    const auto send = [&](std::size_t which) {
      auto& lane = *shared[which];
      auto& counted = sent[which];
      std::minstd_rand random{static_cast<unsigned>(which + 3)};
      strait::lane_producer<> producer{lane.control, shared_state::capacity};
      for (std::uint64_t n = 0; n < messages; ++n) {
        while (producer.known_room() == 0 && producer.look() == 0 && counted.lost == 0) {
          park(lane.producer_word, kind, n, counted, random, [&] { return producer.look() > 0; });
        }
        if (counted.lost != 0) return;
        producer.push<std::uint64_t>(lane.slots.data(), n);
        if (strait::claim_ring(lane.consumer_word, kind) == presence::hub_parked) {
          ++counted.rings;
          strait::doorbell::ring(bell.number());
        }
      }
    };
    std::array<std::thread, 2> senders{std::thread{send, 0}, std::thread{send, 1}};

    std::array<strait::lane_consumer<>, 2> consumers;
    for (std::size_t i = 0; i < 2; ++i) consumers[i] = {shared[i]->control, shared_state::capacity};
    std::array<std::uint64_t, 2> received{};
    tally hub;
    int overdue = 0;
    std::minstd_rand random{5};
    while (received[0] + received[1] < 2 * messages && hub.lost == 0) {
      bool any = false;
      for (std::size_t i = 0; i < 2; ++i) {
        while (consumers[i].known() > 0 || consumers[i].look() > 0) {
          if (consumers[i].take<std::uint64_t>(shared[i]->slots.data()) != received[i]++) ++hub.wrong;
          consumers[i].publish_head();
          ring(shared[i]->producer_word, kind, hub);
          any = true;
        }
      }
      if (any) continue;
      const auto something = [&] {
        const bool first = consumers[0].look() > 0;
        return consumers[1].look() > 0 || first;
      };
      if (spin_first(received[0], random, something)) continue;
      ++hub.announcements;
      for (auto& lane : shared) strait::announce(lane->consumer_word, presence::hub_parked);
      strait::heavy_barrier(kind);
      if (!something()) {
        ++hub.parks;
        if (!readable(bell.descriptor(), lost) && (something() || ++overdue == 3)) ++hub.lost;
        bell.drain();
      }
      for (auto& lane : shared) strait::take_back(lane->consumer_word);
    }
    for (auto& sender : senders) sender.join();
    CHECK(hub.lost == 0);
    CHECK(sent[0].lost + sent[1].lost == 0);
    CHECK(hub.wrong == 0);
    CHECK(hub.parks > 0);
    fmt::print("hub, {}: {} announcements, {} parks of the hub, {} parks of the senders, {} rings\n", mode,
               hub.announcements, hub.parks, sent[0].parks + sent[1].parks, sent[0].rings + sent[1].rings);
  }
}
