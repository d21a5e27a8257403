/// A peer that writes rubbish into the shared memory. What a correct end makes of each word is `errc::corrupt`, or
/// nothing at all where the word is not needed; never an access outside the segment, and never a wait without an end.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "attempt.hpp"
#include "segment_files.hpp"

import strait;

using strait::errc;
using strait::presence;
using strait::segment_header;
using test::attempt;
using test::channel_name;
using test::check_refused;

namespace {

using number = std::uint64_t;
/// With 128 slots of these a segment is one page to its last byte.
using odd = std::array<char, 25>;
static_assert(sizeof(segment_header) + 128 * sizeof(odd) == 4096);

constexpr std::uint32_t raw(presence what) {
  return static_cast<std::uint32_t>(what);
}

/// A channel in this process and the words that its ends share.
template <class T>
struct rig {
  strait::sender<T> tx;
  strait::receiver<T> rx;
  segment_header* header = nullptr;

  explicit rig(const strait::channel_options& options) {
    auto [sending, receiving] = strait::endpoint::make_private(strait::shape_of<T>, options, nullptr);
    header = reinterpret_cast<segment_header*>(reinterpret_cast<std::byte*>(&sending->lane()) -
                                               offsetof(segment_header, lane));
    tx = strait::sender<T>{std::move(sending)};
    rx = strait::receiver<T>{std::move(receiving)};
  }
  [[nodiscard]] std::atomic<std::uint64_t>& tail() const { return header->lane.tail; }
  [[nodiscard]] std::atomic<std::uint64_t>& head() const { return header->lane.head; }
  [[nodiscard]] strait::end_entry& sender_end() const { return header->ends[0]; }
  [[nodiscard]] strait::end_entry& receiver_end() const { return header->ends[1]; }
};

/// A named channel with both ends here, and a third mapping of its segment through which rubbish comes in.
template <class T>
struct named_rig {
  channel_name name{"rubbish"};
  strait::sender<T> tx;
  strait::receiver<T> rx;
  std::size_t bytes = 0;
  void* memory = MAP_FAILED;

  explicit named_rig(strait::channel_options options)
      : tx{strait::open_sender<T>(name.text(), options)}, rx{strait::open_receiver<T>(name.text(), options)} {
    const int file = ::open(name.path().c_str(), O_RDWR | O_CLOEXEC);
    struct ::stat status{};
    REQUIRE(::fstat(file, &status) == 0);
    bytes = static_cast<std::size_t>(status.st_size);
    memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    ::close(file);
    REQUIRE(memory != MAP_FAILED);
  }
  named_rig(const named_rig&) = delete;
  named_rig& operator=(const named_rig&) = delete;
  ~named_rig() { ::munmap(memory, bytes); }
  [[nodiscard]] segment_header& header() const { return *static_cast<segment_header*>(memory); }
};

/// Sends until there is an error, which must come before more than a lane of messages went.
template <class T>
std::error_code send_until_error(strait::sender<T>& tx) {
  std::error_code error;
  for (std::size_t i = 0; i <= tx.capacity() && !error; ++i) {
    if (!tx.try_send(T{}, error) && !error) break;
  }
  return error;
}
template <class T>
std::error_code receive_until_error(strait::receiver<T>& rx) {
  std::error_code error;
  for (std::size_t i = 0; i <= rx.capacity() && !error; ++i) {
    if (!rx.try_recv(error) && !error) break;
  }
  return error;
}

/// Both ends are told, in whatever form they ask, and again whenever they ask.
template <class T>
void check_poisoned_for_both(rig<T>& channel) {
  CHECK(channel.header->poisoned.load() != 0);
  // The sender looks when it runs out of the room that it knows of; what it sent until then may be delivered.
  CHECK(send_until_error(channel.tx) == errc::corrupt);
  CHECK(receive_until_error(channel.rx) == errc::corrupt);
  CHECK(channel.tx.is_closed());
  std::error_code error;
  CHECK_FALSE(channel.rx.try_recv(error));
  CHECK(error == errc::corrupt);
  CHECK_FALSE(channel.rx.blocking_recv(error));
  CHECK(error == errc::corrupt);
  check_refused(errc::corrupt, {"private channel"}, [&] { (void)channel.rx.try_recv(); });
  CHECK_FALSE(channel.tx.try_send(T{}, error));
  CHECK(error == errc::corrupt);
  channel.tx.blocking_send(T{}, error);
  CHECK(error == errc::corrupt);
  check_refused(errc::corrupt, {"private channel"}, [&] { channel.tx.blocking_send(T{}); });
}

constexpr std::size_t capacity = 8;

}  // namespace

TEST_CASE("rubbish: an impossible tail poisons the channel, in every form of receiving") {
  const auto forms = {"try_recv", "blocking_recv", "blocking_recv_until", "recv", "recv_many", "peek"};
  for (const std::string form : forms) {
    // Three were sent and taken, so 3 to 11 are possible.
    for (const number tail : {number{12}, number{2}, number{0}, number{1} << 63U, ~number{0}, number{1} << 32U}) {
      CAPTURE(form);
      CAPTURE(tail);
      rig<number> channel{{.capacity = capacity}};
      for (number i = 0; i < 3; ++i) REQUIRE(channel.tx.try_send(i));
      for (number i = 0; i < 3; ++i) REQUIRE(channel.rx.try_recv() == i);
      channel.tail().store(tail);
      std::error_code error;
      std::array<number, capacity> into{};
      if (form == "try_recv") CHECK_FALSE(channel.rx.try_recv(error));
      if (form == "blocking_recv") CHECK_FALSE(channel.rx.blocking_recv(error));
      if (form == "blocking_recv_until") {
        CHECK_FALSE(channel.rx.blocking_recv_until(std::chrono::steady_clock::now() + std::chrono::hours{1}, error));
      }
      if (form == "recv") CHECK_FALSE(attempt(channel.rx.recv(error)).value());
      if (form == "recv_many") CHECK(attempt(channel.rx.recv_many(into, error)).value() == 0);
      if (form == "peek") CHECK(attempt(channel.rx.peek(error)).value().empty());
      CHECK(error == errc::corrupt);
      CHECK(channel.rx.depth() <= capacity);
      check_poisoned_for_both(channel);
    }
  }
}

TEST_CASE("rubbish: a tail that was impossible once is believed no more") {
  rig<number> channel{{.capacity = capacity}};
  channel.tail().store(~number{0});
  CHECK(receive_until_error(channel.rx) == errc::corrupt);
  channel.tail().store(1);
  std::error_code error;
  CHECK_FALSE(channel.rx.try_recv(error));
  CHECK(error == errc::corrupt);
  REQUIRE(channel.tx.try_send(number{1}, error));  // the sender has room that it knows of, and does not look
  CHECK_FALSE(channel.rx.try_recv(error));
  CHECK(error == errc::corrupt);
}

TEST_CASE("rubbish: a tail that is possible is believed, and what it shows lies in the lane") {
  rig<number> channel{{.capacity = capacity}};
  channel.tail().store(capacity);
  for (number i = 0; i < capacity; ++i) CHECK(channel.rx.try_recv());
  CHECK_FALSE(channel.rx.try_recv());
}

TEST_CASE("rubbish: an impossible head poisons the channel, in every form of sending") {
  const auto forms = {"try_send", "blocking_send", "blocking_send_until", "send", "send_many", "reserve"};
  for (const std::string form : forms) {
    // The lane is full: 8 were sent and none taken.
    for (const number head : {number{9}, number{1} << 63U, ~number{0}, number{1} << 32U}) {
      CAPTURE(form);
      CAPTURE(head);
      rig<number> channel{{.capacity = capacity}};
      for (number i = 0; i < capacity; ++i) REQUIRE(channel.tx.try_send(i));
      channel.head().store(head);
      std::error_code error;
      const std::array<number, 3> more{8, 9, 10};
      if (form == "try_send") CHECK_FALSE(channel.tx.try_send(number{8}, error));
      if (form == "blocking_send") channel.tx.blocking_send(number{8}, error);
      if (form == "blocking_send_until") {
        const auto late = std::chrono::steady_clock::now() + std::chrono::hours{1};
        CHECK_FALSE(channel.tx.blocking_send_until(number{8}, late, error));
      }
      if (form == "send") {
        REQUIRE(attempt(channel.tx.send(number{8}, error)));
      }
      if (form == "send_many") CHECK(attempt(channel.tx.send_many(more, error)).value() == 0);
      if (form == "reserve") {
        auto room = attempt(channel.tx.reserve(3, error)).value();
        CHECK(room.messages().empty());
        room.commit(3);  // of nothing: nothing
      }
      CHECK(error == errc::corrupt);
      CHECK(channel.tx.depth() <= capacity);
      CHECK(channel.tail().load() == capacity);
      // What was sent before is not the peer's doing: the receiver still gets it, and then is told.
      for (number i = 0; i < capacity; ++i) CHECK(channel.rx.try_recv() == i);
      check_poisoned_for_both(channel);
    }
  }
}

TEST_CASE("rubbish: an end that comes to impossible cursors finds them out at its first look") {
  named_rig<number> channel{{.capacity = capacity}};
  channel.tx.close();
  channel.header().lane.head.store(1000);
  channel.tx = strait::open_sender<number>(channel.name.text());
  CHECK(send_until_error(channel.tx) == errc::corrupt);
  CHECK(receive_until_error(channel.rx) == errc::corrupt);
  channel.tx.close();
  channel.rx.close();
  CHECK_FALSE(channel.name.exists());
}

TEST_CASE("rubbish: a presence word that means nothing poisons the channel") {
  for (const std::uint32_t word : {std::uint32_t{6}, std::uint32_t{77}, ~std::uint32_t{0}, std::uint32_t{1} << 31U}) {
    CAPTURE(word);
    {
      rig<number> channel{{.capacity = capacity}};
      channel.sender_end().presence.store(word);
      CHECK(receive_until_error(channel.rx) == errc::corrupt);
      check_poisoned_for_both(channel);
    }
    rig<number> channel{{.capacity = capacity}};
    channel.receiver_end().presence.store(word);
    std::error_code error;
    CHECK_FALSE(channel.tx.try_send(number{1}, error));
    CHECK(error == errc::corrupt);
    check_poisoned_for_both(channel);
  }
}

TEST_CASE("rubbish: deaths that nobody died are reported once, or poison the channel where they cannot be true") {
  std::error_code error;
  SUBCASE("to the sender") {
    rig<number> channel{{.capacity = 1}};
    REQUIRE(channel.tx.try_send(number{1}));
    channel.receiver_end().last_death.store(1000);
    CHECK_FALSE(channel.tx.try_send(number{2}, error));
    CHECK(error == errc::peer_died);
    CHECK_FALSE(channel.tx.try_send(number{2}, error));
    CHECK_FALSE(error);
    CHECK(channel.rx.try_recv() == 1U);
    CHECK(channel.tx.try_send(number{2}));
  }
  SUBCASE("to the receiver") {
    rig<number> channel{{.capacity = capacity}};
    channel.sender_end().last_death.store(1000);
    CHECK_FALSE(channel.rx.try_recv(error));
    CHECK(error == errc::peer_died);
    CHECK_FALSE(channel.rx.try_recv(error));
    CHECK_FALSE(error);
    REQUIRE(channel.tx.try_send(number{3}));
    CHECK(channel.rx.try_recv() == 3U);
  }
  SUBCASE("to the receiver, further on than the lane is long") {
    // Believed, it would have the receiver wait for ever for messages that are not there.
    for (const number died_at : {number{capacity + 1}, number{1} << 63U, ~number{0}}) {
      rig<number> channel{{.capacity = capacity}};
      channel.sender_end().died_at.store(died_at);
      channel.sender_end().last_death.store(1);
      CHECK_FALSE(channel.rx.try_recv(error));
      CHECK(error == errc::corrupt);
      check_poisoned_for_both(channel);
    }
  }
}

TEST_CASE("rubbish: the poison itself may be any value but none") {
  rig<number> channel{{.capacity = capacity}};
  REQUIRE(channel.tx.try_send(number{1}));
  channel.header->poisoned.store(0x8000'0000U);
  CHECK(channel.rx.try_recv() == 1U);
  check_poisoned_for_both(channel);
}

TEST_CASE("rubbish: words that are read only at the door are of no use to who is in") {
  named_rig<number> channel{{.capacity = capacity}};
  segment_header& header = channel.header();
  header.magic = 0;
  header.layout_version = 99;
  header.header_bytes = ~0U;
  header.segment_bytes = ~number{0};
  header.capacity = number{1} << 40U;
  header.message_bytes = 4096;
  header.message_alignment = 0;
  header.barrier = static_cast<strait::store_load>(99);
  header.slots_offset = ~0U;
  std::memset(header.message_name, 'x', sizeof header.message_name);
  header.ends[0].pid.store(0);
  header.ends[1].pid.store(~0U);
  header.ends[0].process_low.store(1);
  header.ends[1].process_high.store(1);
  header.ends[0].doorbell.store(~number{0});
  header.ends[1].incarnation.store(12345);
  for (number i = 0; i < 10 * capacity; ++i) {
    REQUIRE(channel.tx.try_send(i));
    REQUIRE(channel.rx.try_recv() == i);
  }
  CHECK(channel.tx.capacity() == capacity);
  CHECK(channel.rx.capacity() == capacity);
  check_refused(errc::foreign_segment, {"expected a strait segment"},
                [&] { (void)strait::open_sender<number>(channel.name.text()); });
  channel.tx.close();
  CHECK_FALSE(channel.rx.blocking_recv());
  channel.rx.close();
  CHECK_FALSE(channel.name.exists());
}

TEST_CASE("rubbish: who sleeps is woken and told") {
  SUBCASE("a receiver, of a head") {
    rig<number> channel{{.capacity = capacity, .wait = strait::wait_policy::park}};
    for (number i = 0; i < capacity; ++i) REQUIRE(channel.tx.try_send(i));  // so it looks at `head` next
    std::error_code error;
    std::thread sleeper{[&] {
      do {
        (void)channel.rx.blocking_recv(error);
      } while (!error);
    }};
    test::eventually([&] {
      return channel.head().load() == capacity &&
             channel.receiver_end().presence.load() == raw(presence::thread_parked);
    });
    channel.head().store(~number{0} / 2);
    std::error_code found;
    CHECK_FALSE(channel.tx.try_send(number{1}, found));
    CHECK(found == errc::corrupt);
    sleeper.join();
    CHECK(error == errc::corrupt);
  }
  SUBCASE("a sender, of a tail") {
    rig<number> channel{{.capacity = 1, .wait = strait::wait_policy::park}};
    REQUIRE(channel.tx.try_send(number{0}));
    std::error_code error;
    std::thread sleeper{[&] { channel.tx.blocking_send(number{1}, error); }};
    test::eventually([&] { return channel.sender_end().presence.load() == raw(presence::thread_parked); });
    channel.tail().store(~number{0} / 2);
    CHECK(receive_until_error(channel.rx) == errc::corrupt);
    sleeper.join();
    CHECK(error == errc::corrupt);
  }
  // Announced is not yet asleep, and who is not looks again; so the word is overwritten until the sender has seen it.
  const auto overwrite = [](rig<number>& channel, presence parked) {
    auto& word = channel.receiver_end().presence;
    test::eventually([&] { return word.load() == raw(parked); });
    std::error_code error;
    do {
      word.store(77);
      (void)channel.tx.try_send(number{1}, error);
    } while (!error);
    CHECK(error == errc::corrupt);
  };
  SUBCASE("a receiver, behind a presence word that was overwritten") {
    rig<number> channel{{.capacity = capacity, .wait = strait::wait_policy::park}};
    std::error_code error;
    std::thread sleeper{[&] {
      do {
        (void)channel.rx.blocking_recv(error);
      } while (!error);
    }};
    overwrite(channel, presence::thread_parked);
    sleeper.join();
    CHECK(error == errc::corrupt);
  }
  SUBCASE("a coroutine, behind a presence word that was overwritten") {
    rig<number> channel{{.capacity = capacity}};
    strait::runtime rt;
    std::error_code error;
    rt.spawn([](strait::receiver<number>& rx, std::error_code& told) -> strait::task<> {
      do {
        (void)co_await rx.recv(told);
      } while (!told);
    }(channel.rx, error));
    overwrite(channel, presence::hub_parked);
    rt.join();
    CHECK(error == errc::corrupt);
  }
}

TEST_CASE("rubbish: messages that cannot be there are not destroyed") {
  int destroyed = 0;
  struct counted {
    int* count;
    explicit counted(int& where) : count{&where} {}
    counted(counted&& other) noexcept : count{std::exchange(other.count, nullptr)} {}
    counted& operator=(counted&&) = delete;
    ~counted() {
      if (count != nullptr) ++*count;
    }
  };
  constexpr auto destroy = [](std::byte* slots, std::uint64_t mask, std::uint64_t head, std::uint64_t tail) noexcept {
    auto* messages = reinterpret_cast<strait::native_slot<counted>*>(slots);
    for (; head != tail; ++head) (void)messages[head & mask].take();
  };
  auto [sending, receiving] = strait::endpoint::make_private(strait::shape_of<counted>, {.capacity = 2}, destroy);
  auto& lane = sending->lane();
  {
    strait::sender<counted> tx{std::move(sending)};
    const strait::receiver<counted> rx{std::move(receiving)};
    REQUIRE(tx.try_send(counted{destroyed}));
    lane.tail.store(number{1} << 40U);  // a day of destroying what is not there
  }
  CHECK(destroyed == 0);
}

namespace {

/// A channel between two stretches of memory that nobody may touch, so that an access outside is a signal. New mappings
/// go to the top of the highest gap that is wide enough, each beneath the last, so that after a few attempts have
/// filled the narrow gaps there is a channel that is placed so.
template <class T>
class fenced_rig {
 public:
  explicit fenced_rig(const strait::channel_options& options) {
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    stretch_ = (sizeof(segment_header) + *options.capacity * sizeof(T) + page - 1) / page * page;
    for (int attempt = 0; attempt < 100 && !complete_; ++attempt) {
      std::byte* const above = forbid(nullptr);
      rigs_.push_back(std::make_unique<rig<T>>(options));
      auto* const begin = reinterpret_cast<std::byte*>(rigs_.back()->header);
      complete_ = begin + stretch_ == above && forbid(begin - stretch_) == begin - stretch_;
    }
  }
  fenced_rig(const fenced_rig&) = delete;
  fenced_rig& operator=(const fenced_rig&) = delete;
  ~fenced_rig() {
    for (std::byte* const at : forbidden_) ::munmap(at, stretch_);
  }
  [[nodiscard]] bool complete() const { return complete_; }
  [[nodiscard]] rig<T>& channel() { return *rigs_.back(); }

 private:
  std::byte* forbid(std::byte* at) {
    const int where = at == nullptr ? 0 : MAP_FIXED_NOREPLACE;
    void* const got = ::mmap(at, stretch_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | where, -1, 0);
    if (got == MAP_FAILED) return nullptr;
    forbidden_.push_back(static_cast<std::byte*>(got));
    return forbidden_.back();
  }

  std::vector<std::unique_ptr<rig<T>>> rigs_;
  std::vector<std::byte*> forbidden_;
  std::size_t stretch_ = 0;
  bool complete_ = false;
};

class vandal {
 public:
  explicit vandal(std::uint32_t seed) : random_{seed} {}

  number any() {
    const std::array<number, 10> liked{0,
                                       1,
                                       ~number{0},
                                       number{1} << 63U,
                                       number{1} << 32U,
                                       below(200),
                                       random_(),
                                       number{0} - below(200),
                                       ~number{0} >> 1U,
                                       number{1} << below(64)};
    return liked[static_cast<std::size_t>(below(liked.size()))];
  }
  number below(number limit) { return random_() % limit; }

  /// Writes rubbish into some word of the header. As a peer would, with atomic stores.
  void strike(void* header) {
    auto* words = static_cast<std::byte*>(header);
    if (below(2) == 0) {
      const auto at = static_cast<std::size_t>(below(sizeof(segment_header) / 8) * 8);
      reinterpret_cast<std::atomic<std::uint64_t>*>(words + at)->store(any());
    } else {
      const auto at = static_cast<std::size_t>(below(sizeof(segment_header) / 4) * 4);
      reinterpret_cast<std::atomic<std::uint32_t>*>(words + at)->store(static_cast<std::uint32_t>(any()));
    }
  }
  /// The words that matter most are a small part of the header.
  void strike_well(segment_header& header) {
    switch (below(6)) {
      case 0:
        header.lane.tail.store(any());
        break;
      case 1:
        header.lane.head.store(any());
        break;
      case 2:
        header.lane.tail.fetch_add(any());
        break;
      case 3:
        header.ends[below(2)].presence.store(static_cast<std::uint32_t>(below(8)));
        break;
      case 4:
        header.ends[below(2)].died_at.store(any());
        break;
      default:
        header.ends[below(2)].last_death.fetch_add(1);
    }
  }

 private:
  std::mt19937_64 random_;
};

/// One operation, whichever; the errors are those that the contract names.
template <class T>
void do_something(strait::sender<T>& tx, strait::receiver<T>& rx, vandal& chance) {
  std::error_code error;
  std::array<T, 5> messages{};
  switch (chance.below(14)) {
    case 0:
    case 1:
    case 2:
      (void)tx.try_send(T{}, error);
      break;
    case 3:
    case 4:
    case 5:
      (void)rx.try_recv(error);
      break;
    case 6:
      (void)attempt(tx.send_many(messages, error));
      break;
    case 7:
      (void)attempt(rx.recv_many(messages, error));
      break;
    case 8:
      (void)tx.blocking_send_until(T{}, std::chrono::steady_clock::now(), error);
      break;
    case 9:
      (void)rx.blocking_recv_until(std::chrono::steady_clock::now(), error);
      break;
    case 10: {
      auto room = attempt(tx.reserve(3, error));
      if (!room) break;
      for (T& message : room->messages()) message = T{};
      room->commit(chance.below(5));
      break;
    }
    case 11: {
      const auto there = attempt(rx.peek(error));
      if (!there) break;
      std::size_t sum = 0;
      for (const T& message : *there) {
        std::array<unsigned char, sizeof(T)> bytes{};
        std::memcpy(bytes.data(), &message, sizeof(T));
        for (const unsigned char byte : bytes) sum += byte;  // reads all that it was shown
      }
      rx.release(there->size() + (sum & 1U));
      break;
    }
    case 12:
      CHECK(tx.depth() <= tx.capacity());
      break;
    default:
      CHECK(rx.depth() <= rx.capacity());
  }
  const bool known = !error || error == errc::corrupt || error == errc::closed || error == errc::peer_died ||
                     error == std::errc::timed_out;
  CHECK_MESSAGE(known, error.message());
}

template <class T>
void riot(std::size_t slots, std::uint32_t seed, int& fenced) {
  CAPTURE(seed);
  vandal chance{seed};
  fenced_rig<T> around{{.capacity = slots, .wait = strait::wait_policy::park}};
  if (around.complete()) ++fenced;
  rig<T>& channel = around.channel();
  for (int step = 0; step < 60; ++step) {
    if (chance.below(4) == 0) chance.strike(channel.header);
    if (chance.below(6) == 0) chance.strike_well(*channel.header);
    // Most of the time it goes on as if nothing had been seen, so that other words are looked at, too.
    if (chance.below(3) != 0) channel.header->poisoned.store(0);
    do_something(channel.tx, channel.rx, chance);
  }
}

}  // namespace

TEST_CASE("rubbish: anywhere in the header, at any time, leads nobody outside") {
  int fenced = 0;
  for (std::uint32_t seed = 0; seed < 150; ++seed) {
    riot<odd>(128, seed, fenced);
    riot<number>(8, seed, fenced);
    riot<std::array<number, 16>>(1, seed, fenced);
  }
  CHECK(fenced == 450);
}

TEST_CASE("rubbish: the same between ends of a named channel, which look at locks and processes, too") {
  for (std::uint32_t seed = 0; seed < 40; ++seed) {
    CAPTURE(seed);
    vandal chance{seed};
    named_rig<number> channel{{.capacity = 8, .wait = strait::wait_policy::park}};
    for (int step = 0; step < 40; ++step) {
      if (chance.below(4) == 0) chance.strike(channel.memory);
      if (chance.below(6) == 0) chance.strike_well(channel.header());
      if (chance.below(3) != 0) channel.header().poisoned.store(0);
      do_something(channel.tx, channel.rx, chance);
    }
    // The last one out takes the name away; what looks like messages for a receiver to come may keep it.
    if (chance.below(2) == 0) {
      channel.tx.close();
      channel.rx.close();
    } else {
      channel.rx.close();
      channel.tx.close();
    }
    // The next start is not troubled by it, unless the header itself is not ours any more, or tells of messages that a
    // sender left for a receiver to come.
    try {
      auto tx = strait::open_sender<std::array<number, 2>>(channel.name.text(), {.open = strait::open_mode::create});
      CHECK(tx.try_send(std::array<number, 2>{1, 2}));
    } catch (const std::system_error& error) {
      const bool not_ours = error.code() == errc::foreign_segment || error.code() == errc::version_mismatch ||
                            error.code() == errc::layout_mismatch || error.code() == std::errc::file_exists;
      CHECK_MESSAGE(not_ours, error.what());
    }
  }
}

TEST_CASE("rubbish: a file of rubbish under the name is refused as it is, or entered safely") {
  std::vector<char> good;
  {
    const channel_name name{"image"};
    auto tx = strait::open_sender<number>(name.text(), {.capacity = 8});
    for (number i = 0; i < 3; ++i) REQUIRE(tx.try_send(i));
    good = test::state_of(name.path()).bytes;
  }
  int entered = 0;
  int refused = 0;
  for (std::uint32_t seed = 0; seed < 200; ++seed) {
    CAPTURE(seed);
    vandal chance{seed};
    auto image = good;
    for (auto strikes = 1 + chance.below(2); strikes > 0; --strikes) chance.strike(image.data());
    if (chance.below(8) == 0) image.resize(static_cast<std::size_t>(chance.below(image.size())));
    const channel_name name{"image"};
    test::write_file(name.path(), image);
    const auto before = test::state_of(name.path());
    const auto mode = chance.below(2) == 0 ? strait::open_mode::open : strait::open_mode::open_or_create;
    try {
      auto rx = strait::open_receiver<number>(name.text(), {.wait = strait::wait_policy::park, .open = mode});
      auto tx = strait::open_sender<number>(name.text(), {.wait = strait::wait_policy::park});
      ++entered;
      for (int step = 0; step < 30; ++step) do_something(tx, rx, chance);
    } catch (const std::system_error& error) {
      ++refused;
      CHECK_MESSAGE(&error.code().category() == &strait::error_category(), error.what());
      CHECK(test::state_of(name.path()) == before);
    }
  }
  CHECK(entered > 10);
  CHECK(refused > 10);
}
