module;
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>
export module strait.endpoint;

import strait.error;
import strait.memory;
export import strait.park;

/// The engine under the handles: the table of ends in the segment, entering with its checks, closing, and death.
///
/// | shared word          | written by                                   | read by    | what a SIGKILL of its writer leaves       |
/// |----------------------|----------------------------------------------|------------|-------------------------------------------|
/// | presence             | see strait.park                              | both ends  | an end that looks alive with its lock free |
/// | incarnation          | owner, entering, under the gate              | the peer   | a count of an end that never was awake     |
/// | last_death, died_at  | who declares a death, under the gate         | the peer   | half a declaration: the same written again |
/// | boot                 | owner, entering, under the gate              | who enters | a boot that its role does not live in      |
/// | process, doorbell    | owner, before it announces `hub_parked`      | the ringer | nothing: nobody reads it while awake       |
/// | node_asked           | who enters and asks for one, under the gate  | who enters | a wish that nobody fulfilled               |
/// | cpu                  | owner, before it sleeps                      | `explain`, `inspect` | where it slept before            |
/// | poisoned             | who found an impossible value                | both ends  | the channel is unusable either way         |
/// | parks, wakes         | owner, on the slow path                      | `inspect`  | a count that stands still                  |
///
/// **One truth about death**: an end is dead when its word says that it lives and its byte of the segment file is not
/// locked. The sentry thread only looks when there is reason to; whoever enters looks, too.
export namespace strait {

enum class role : std::uint32_t { sender = 0, receiver = 1 };
inline constexpr std::size_t role_count = 2;
[[nodiscard]] constexpr role other(role r) noexcept {
  return r == role::sender ? role::receiver : role::sender;
}
[[nodiscard]] constexpr std::string_view to_string(role r) noexcept {
  return r == role::sender ? "sender" : "receiver";
}

/// How a channel orders its publications against the peer's going to sleep; see `store_load`.
enum class ordering : std::uint8_t {
  /// The waiter pays with membarrier; with a fence for each send where the kernel has none.
  automatic,
  /// The sender pays with a fence for each send: for processes that may not call membarrier.
  fence,
};

/// What a channel is made with. What is not said is taken from the channel that is there, or has the default.
struct channel_options {
  /// In messages, rounded up to a power of two. Default: that of the existing channel, or 1024.
  std::optional<std::size_t> capacity = std::nullopt;
  /// The NUMA node of the memory. Default: that of the receiver. Whoever asks, when it enters, has the memory moved.
  std::optional<unsigned> node = std::nullopt;
  /// How this end waits.
  wait_policy wait = wait_policy::adaptive;
  /// The longest spin before this end parks, unless `wait` is `busy` or `park`.
  std::chrono::nanoseconds longest_spin = std::chrono::microseconds{50};
  open_mode open = open_mode::open_or_create;
  /// How long `open_mode::open` waits for the channel to be made. Default: not at all.
  std::chrono::milliseconds patience{0};
  /// Permissions of a segment that is created, and the group that it is given to. Default: the creator's.
  unsigned mode = 0600;
  std::optional<unsigned> group = std::nullopt;
  ordering order = ordering::automatic;
  /// What kind of pages to have. Where they are not to be had, others do; `explain` tells.
  page_kind pages = page_kind::automatic;
  /// Whether this end touches all pages when it enters, so that no message meets a page fault. (A sender leaves that to
  /// its first lap where there are several memory nodes and nobody asked for one: see `node`.)
  bool prefault = true;
  /// Whether to lock the pages in memory, as far as RLIMIT_MEMLOCK allows; beyond that it is an error.
  bool lock = false;
};

/// The message type as the segment's header tells it.
struct message_shape {
  std::string_view name;
  std::uint32_t version = 0;
  std::uint32_t bytes = 0;
  std::uint32_t alignment = 0;
};

/// As error messages tell it: `type "Order" version 1 of 24 bytes aligned to 8`.
///
/// Waits: never. Allocates: the text. Errors: `std::bad_alloc`. Complexity: linear in the name.
[[nodiscard]] std::string describe(const message_shape& shape);

/// One end's entry in the segment.
struct end_entry {
  /// The park word, on a line of its own: the peer reads it after every publication.
  alignas(line_padding) std::atomic<std::uint32_t> presence{0};

  /// Counts the ends that held this role.
  alignas(line_padding) std::atomic<std::uint32_t> incarnation{0};
  /// The incarnation that died last; 0 when none did.
  std::atomic<std::uint32_t> last_death{0};
  /// The lane's tail when the last sender died: what lies before it was committed by the dead.
  std::atomic<std::uint64_t> died_at{0};
  std::atomic<std::uint64_t> process_high{0};
  std::atomic<std::uint64_t> process_low{0};
  /// The doorbell of the hub that waits, within its process.
  std::atomic<std::uint64_t> doorbell{0};
  /// For people to read.
  std::atomic<std::uint32_t> pid{0};
  /// The boot in which the owner entered (`this_boot`): from another one, nothing but the count above means anything.
  std::atomic<std::uint64_t> boot_high{0};
  std::atomic<std::uint64_t> boot_low{0};

  /// How often the owners of this end went to sleep, and how often they rang the peer. Counted where a system call is
  /// made anyway, and behind what the peer reads at each look at an empty lane, in a cache line that it never reads.
  alignas(64) std::atomic<std::uint64_t> parks{0};
  std::atomic<std::uint64_t> wakes{0};
  /// The CPU on which the owner last went to sleep, plus one; 0: it has not.
  std::atomic<std::uint32_t> cpu{0};
};
static_assert(sizeof(end_entry) == 2 * line_padding);
static_assert(offsetof(end_entry, parks) == line_padding + 64);

/// Counts one more in a word that only its owner writes.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
inline void count_one(std::atomic<std::uint64_t>& counter) noexcept {
  // relaxed, and no read-modify-write: nobody else writes it, and nothing is concluded from it.
  counter.store(counter.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}

/// The first page of a segment. Everything but the atomics is written before the segment has a name, and never again.
struct segment_header {
  std::uint64_t magic;
  std::uint32_t layout_version;
  std::uint32_t header_bytes;
  std::uint64_t segment_bytes;
  std::uint64_t capacity;
  std::uint32_t message_bytes;
  std::uint32_t message_alignment;
  std::uint32_t message_version;
  store_load barrier;
  char message_name[64];
  std::uint32_t creator_pid;
  std::uint32_t slots_offset;
  std::atomic<std::uint32_t> poisoned;
  /// The memory node that somebody asked for, plus one; 0: nobody did, so the memory follows the receiver.
  std::atomic<std::uint32_t> node_asked;

  alignas(line_padding) end_entry ends[role_count];
  lane_control<> lane;

  static constexpr std::uint64_t expected_magic = 0x5354'5241'4954'0a00;  // "STRAIT\n\0"
  static constexpr std::uint32_t expected_layout = 2;
};
static_assert(sizeof(segment_header) == 7 * line_padding);
static_assert(offsetof(segment_header, ends) == line_padding);

/// Where the slots of messages of that alignment begin, in bytes from the beginning of the segment.
[[nodiscard]] constexpr std::uint64_t slots_offset_for(std::uint32_t alignment) noexcept {
  return round_up(sizeof(segment_header), std::max<std::uint64_t>(alignment, line_padding));
}

/// The segment around a lane. With these, a handle needs one pointer on the path of each message, and everything else lies
/// at a distance from it that is known to the compiler.
[[nodiscard]] inline segment_header& segment_of(lane_control<>& lane) noexcept {
  return *reinterpret_cast<segment_header*>(reinterpret_cast<std::byte*>(&lane) - offsetof(segment_header, lane));
}
/// The slots of a lane of `T`s: the segment was checked to hold no other type.
template <class T>
[[nodiscard]] native_slot<T>* slots_of(lane_control<>& lane) noexcept {
  return reinterpret_cast<native_slot<T>*>(reinterpret_cast<std::byte*>(&segment_of(lane)) +
                                           slots_offset_for(alignof(T)));
}

/// Why a wait ends without a message or room.
enum class news : std::uint8_t { none, closed, died, corrupt, inherited };

[[nodiscard]] constexpr errc to_errc(news n) noexcept {
  switch (n) {
    case news::died:
      return errc::peer_died;
    case news::corrupt:
      return errc::corrupt;
    case news::inherited:
      return errc::inherited;
    default:
      return errc::closed;
  }
}

/// What wakes an end.
enum class bell_kind : std::uint8_t {
  /// It has not slept yet.
  none,
  /// A thread sleeps on the word itself.
  futex,
  /// A hub sleeps in its reactor; the peer writes its eventfd.
  eventfd,
  /// A hub sleeps in its reactor; the peer, which is not trusted with an eventfd, sends over the connection.
  line,
  /// A hub sleeps in its reactor, and a helper thread on the word in its place, because the peer does not have the eventfd.
  relay,
};
[[nodiscard]] constexpr std::string_view to_string(bell_kind k) noexcept {
  switch (k) {
    case bell_kind::none:
      return "none";
    case bell_kind::futex:
      return "futex";
    case bell_kind::eventfd:
      return "eventfd";
    case bell_kind::line:
      return "line";
    case bell_kind::relay:
      return "relay";
  }
  return "unknown";
}

/// Where one end of a channel runs.
struct end_place {
  /// Empty when its word holds what no correct end writes.
  std::optional<presence> state;
  /// In its own PID namespace; 0: nobody has been there.
  std::uint32_t pid = 0;
  /// Of the end that explains: where its thread runs now. Of the other one: where it last went to sleep; empty when it has
  /// not.
  std::optional<unsigned> cpu;
  /// The node of that CPU; empty when it is not known.
  std::optional<unsigned> node;
};

/// Where a channel is and how it works, as one end sees it at one moment.
struct explanation {
  std::string channel;
  /// The end that explains.
  role which = role::sender;
  std::uint64_t capacity = 0;
  std::uint32_t message_bytes = 0;
  /// The memory, as this process has mapped it.
  page_report pages;
  /// The node that somebody asked for; empty: nobody did, so the memory follows the receiver.
  std::optional<unsigned> node_asked;
  /// By role.
  std::array<end_place, role_count> ends;
  /// How this end waits: for how long at most it spins, and for how long it would now.
  wait_policy wait = wait_policy::adaptive;
  std::chrono::nanoseconds longest_spin{0};
  std::chrono::nanoseconds spin{0};
  /// Who pays for the order between a message and a sleep, and what one barrier costs the waiter: the least of a few, just
  /// measured.
  store_load barrier = store_load::by_fence;
  std::chrono::nanoseconds barrier_cost{0};
  /// What woke this end last.
  bell_kind bell = bell_kind::none;

  /// All of it for people, with what it costs: some lines, each ended by a newline.
  ///
  /// Waits: never. Allocates: the text. Errors: `std::bad_alloc`. Complexity: linear in the text.
  [[nodiscard]] std::string text() const;
};

/// One end of a channel: its place in the segment, and everything that is not on the path of each message.
///
/// From the first watch to `unwatch_process` the sentry's thread looks on, beside the owner's:
///
/// | of this end's       | the owner                                  | the sentry, in `look`                              |
/// |---------------------|--------------------------------------------|----------------------------------------------------|
/// | the gate            | before the first watch and after the last  | in between, without waiting for it                 |
/// | watched_incarnation | writes it before each watch                | reads it: another one holds the role, so it is settled |
/// | bell                | writes it before each announcement         | rings it, after what it has to tell was written    |
/// | fate                | see there                                  | the same                                           |
/// | everything else     | reads and writes it                        | reads what was there before the watch              |
///
/// What says nothing else: Waits: never. Allocates: never. Errors: none. Complexity: constant, a system call at most.
class endpoint final : private process_watcher {
 public:
  /// Enters the named channel, creating it where the options say so.
  ///
  /// Waits: parks while another end is entering or leaving; as long as `patience` says for a channel that is to be
  /// opened. Cancel safety: cannot be cancelled. Allocates: the segment when it is created. Errors: see `errc` and
  /// `open_segment`; nothing is changed in a segment that is refused. Complexity: system calls.
  [[nodiscard]] static std::unique_ptr<endpoint> open(role mine, std::string_view name, const message_shape& shape,
                                                      const channel_options& options);

  /// An end in memory that is handed over, and that memory, for the peer.
  struct to_hand_over {
    std::unique_ptr<endpoint> end;
    unshared_descriptor memory;
  };

  /// Makes a channel for a peer that the caller has at the other end of a socket, in sealed memory of its own, and enters
  /// it. `take_line` must follow when the peer has entered, too. `barrier`: whether that granted `membarrier` to itself.
  ///
  /// Waits: never. Allocates: the segment. Errors: `bad_capacity`, and those of `make_sealed_segment`. Complexity:
  /// touching the memory.
  [[nodiscard]] static to_hand_over make_handed_over(role mine, const memory_name& name, const message_shape& shape,
                                                     const channel_options& options, bool barrier);

  /// Enters a channel in memory that was handed over; nothing about it is believed. `take_line` must follow.
  ///
  /// Waits: never. Allocates: the mapping. Errors: those of `enter_sealed_segment`, `type_mismatch`, `layout_mismatch`,
  /// `no_barrier`, `end_in_use`. Complexity: touching the memory.
  [[nodiscard]] static std::unique_ptr<endpoint> enter_handed_over(role mine, const memory_name& name, int memory,
                                                                   const message_shape& shape,
                                                                   const channel_options& options);

  /// The connection by which this end and its peer ring each other, and whose end is the reason to look whether the peer
  /// died. For ends in memory that was handed over: both of them are in now.
  ///
  /// Waits: never. Allocates: a little. Errors: `std::system_error` when no thread is to be had. Complexity: constant.
  void take_line(unshared_descriptor line);

  /// Destroys the messages that were sent and never taken; called by the last end of a private channel.
  using destroy_messages = void (*)(std::byte* slots, std::uint64_t mask, std::uint64_t head,
                                    std::uint64_t tail) noexcept;

  /// Makes a channel in this process's own memory.
  ///
  /// Waits: never. Allocates: the memory. Errors: `bad_capacity`, `no_space`, and those of the kernel. Complexity: touching
  /// the pages dominates.
  [[nodiscard]] static std::pair<std::unique_ptr<endpoint>, std::unique_ptr<endpoint>> make_private(
      const message_shape& shape, const channel_options& options, destroy_messages destroy);

  /// Closes.
  ~endpoint();
  endpoint(const endpoint&) = delete;
  endpoint& operator=(const endpoint&) = delete;

  [[nodiscard]] inline lane_control<>& lane() const noexcept { return header_->lane; }
  [[nodiscard]] inline std::uint64_t capacity() const noexcept { return capacity_; }
  [[nodiscard]] inline store_load barrier() const noexcept { return barrier_; }
  [[nodiscard]] inline std::atomic<std::uint32_t>& own_word() const noexcept { return own().presence; }
  [[nodiscard]] inline std::atomic<std::uint32_t>& peer_word() const noexcept { return peer().presence; }
  [[nodiscard]] inline wait_policy policy() const noexcept { return policy_; }
  [[nodiscard]] inline std::int64_t longest_spin() const noexcept { return longest_spin_; }
  /// For error messages: `posix:orders`.
  [[nodiscard]] inline const std::string& name() const noexcept { return text_; }

  /// Rings the peer, whose announcement the caller took back with `claim_ring`.
  ///
  /// Waits: never. Allocates: the first time for each doorbell. Errors: none. Complexity: one system call; several the first
  /// time.
  void ring(presence parked) noexcept;

  /// What happened to the peer, for an end that found nothing to do. `position` is this end's cursor. After anything but
  /// `none` the caller looks at the lane once more, because the peer may have published before it left.
  ///
  /// Waits: never. Allocates: the first time for each peer process. Errors: none. Complexity: a few loads of lines that
  /// rarely change.
  [[nodiscard]] inline news look_at_peer(std::uint64_t position) noexcept {
    // acquire: pairs with the release in look_at_line_end.
    if (const news fate = fate_.load(std::memory_order_acquire); fate != news::none) [[unlikely]]
      return settled(fate);
    const end_entry& them = peer();
    if (memory_to_follow_) [[unlikely]]
      fetch_memory();
    // acquire, here, in death_untold and for the presence: pairs with the release of whoever poisoned, declared or
    // closed; what the peer published before that is then visible to the look that follows.
    if (header_->poisoned.load(std::memory_order_acquire) != 0) return news::corrupt;
    if (death_untold()) {
      if (role_ == role::sender) return news::died;
      const std::uint64_t committed = died_at();
      if (position >= committed) return news::died;
      // Nobody commits more than the lane holds; who believed it would wait for ever.
      if (committed - position > capacity_) [[unlikely]]
        return found_rubbish();
    }
    const std::uint32_t word = them.presence.load(std::memory_order_acquire);
    if (!is_presence(word)) [[unlikely]]
      return found_rubbish();
    const auto now = static_cast<presence>(word);
    if (now == presence::closed) return found_closed();
    if (now != presence::vacant && now != presence::dead && entered_ &&
        // relaxed: written before the presence that was just read with acquire.
        them.incarnation.load(std::memory_order_relaxed) != watched_incarnation_) [[unlikely]] {
      watch_peer();
    }
    return news::none;
  }

  /// Whether the peer died and that was not reported yet: what lies at `died_at` and behind it is a replacement's.
  [[nodiscard]] inline bool death_untold() const noexcept {
    // acquire: as in look_at_peer.
    return peer().last_death.load(std::memory_order_acquire) != death_seen_;
  }
  /// Where the dead sender's messages end.
  [[nodiscard]] inline std::uint64_t died_at() const noexcept {
    // relaxed: behind the load in death_untold.
    return peer().died_at.load(std::memory_order_relaxed);
  }

  /// The death that `look_at_peer` told of was reported to the user.
  void death_reported() noexcept;

  /// Whether this process is a child, made by fork, of the one that opened this end in a named segment: then the end is
  /// the parent's, and what lies where the segment was is a copy with cursors that cannot be.
  [[nodiscard]] inline bool inherited() const noexcept { return entered_ && fork_generation_ != fork_generation(); }

  /// An impossible value was found in shared memory: nobody can use the channel any more. Returns the news of that,
  /// which is another one where this end was inherited.
  news poison() noexcept;

  /// Whether the peer closed, or the channel is poisoned.
  [[nodiscard]] inline bool peer_closed() const noexcept {
    if (const news fate = fate_.load(std::memory_order_acquire); fate != news::none) [[unlikely]]
      return settled(fate) != news::died;
    // acquire: the caller may go on to look at the lane for what came before.
    return static_cast<presence>(peer().presence.load(std::memory_order_acquire)) == presence::closed ||
           header_->poisoned.load(std::memory_order_acquire) != 0;
  }

  /// Blocks the calling thread until `ready()`, spinning first as the policy says. False: the deadline passed.
  ///
  /// Waits: spins, then parks on the futex. Cancel safety: only the deadline ends it; the announcement was taken back then.
  /// Allocates: never. Errors: none. Complexity: a barrier and a system call for each park.
  template <class Ready>
  bool wait(Ready&& ready, std::optional<std::chrono::steady_clock::time_point> deadline);

  /// Has the disk hold the channel as it is now, where there is one: of a `file:`.
  ///
  /// Waits: for the disk. Cancel safety: cannot be cancelled. Allocates: never. Errors: `inherited`, or the errno of the
  /// disk, EIO for instance. Complexity: linear in the pages that were written to since the last time.
  void sync();

  /// Where the channel is and how it works. Called by whoever uses the end.
  ///
  /// Waits: never, but executes the barrier of the channel a few times. Allocates: the result. Errors: `std::bad_alloc`.
  /// Complexity: linear in the pages, and in the mappings of the process.
  [[nodiscard]] explanation explain();

  // For the hub, which waits for many ends with one doorbell.

  /// Announces that a hub waits for this end with that doorbell; `heavy_barrier` and another look must follow.
  ///
  /// Waits: never. Allocates: the first time, and with each new peer. Errors: `std::system_error` when a thread is needed
  /// and none can be had; nothing is announced then. Complexity: constant; a few system calls the first time.
  void announce_hub(std::uint64_t doorbell_number);
  /// The last look found nothing and the hub is about to sleep. False: the peer that was given the doorbell has been
  /// replaced meanwhile, so the announcement must be taken back and made again.
  [[nodiscard]] bool hub_sleeps() noexcept;
  /// The hub is awake.
  inline void hub_awake() noexcept { take_back(own_word()); }

 private:
  /// What both ends of a private channel share.
  struct private_channel;

  endpoint() = default;
  [[nodiscard]] inline end_entry& own() const noexcept { return *own_; }
  [[nodiscard]] inline end_entry& peer() const noexcept { return *peer_; }
  void adopt(segment_header& header, const segment_header& checked, role mine, const channel_options& options) noexcept;
  void enter(std::optional<unsigned> node);
  void watch_peer() noexcept;
  /// Has the memory moved to where this thread runs: the receiver, in the first look that finds nothing. Not earlier,
  /// because a handle may be made on one thread and used on another.
  [[gnu::cold]] void fetch_memory() noexcept;
  [[nodiscard]] mapping& memory() noexcept;
  /// Notes that the owner goes to sleep, and where.
  void count_park(bell_kind bell) noexcept;
  [[gnu::cold]] news found_rubbish() noexcept { return poison(); }
  [[gnu::cold]] news found_closed() noexcept;
  /// How it ends for good, in memory that was handed over; the first word counts.
  void decide(news fate) noexcept;
  bool look() noexcept override;
  bool look_at_line_end() noexcept;
  void wake_own_waiter() noexcept;
  void hold(process_identity process, std::optional<unsigned> node) noexcept;
  void enter_handed_over_memory(std::optional<unsigned> node);
  void keep_from_children();
  /// What there is to tell of an end for which nobody comes any more: a death once, and then that it is closed.
  [[nodiscard]] inline news settled(news fate) const noexcept {
    return fate == news::died && death_told_ ? news::closed : fate;
  }
  void close() noexcept;
  [[nodiscard]] bool peer_has_left() noexcept;

  // Read on the path of each message that found its peer not awake, and at each look at an empty lane.
  segment_header* header_ = nullptr;
  end_entry* own_ = nullptr;
  end_entry* peer_ = nullptr;
  std::uint64_t capacity_ = 0;
  role role_ = role::sender;
  std::uint32_t death_seen_ = 0;
  std::atomic<std::uint32_t> watched_incarnation_{0};
  /// Whether this end holds a role in a segment that another process shares: only there can a peer die.
  bool entered_ = false;
  /// Whether the memory is yet to be moved to where this end runs.
  bool memory_to_follow_ = false;
  /// How it ended for good, where nobody replaces a peer: in memory that was handed over. Written by the sentry when the
  /// line has ended, or by this end when it found an impossible value, a farewell, or a death that it told; kept here,
  /// because the peer may write what it likes to the segment.
  std::atomic<news> fate_{news::none};
  bool death_told_ = false;
  store_load barrier_ = store_load::by_fence;

  wait_policy policy_ = wait_policy::adaptive;
  std::int64_t longest_spin_ = 0;
  spin_budget spin_;

  std::uint32_t message_bytes_ = 0;

  // The segment that another process shares.
  std::string text_;
  memory_name name_;
  segment segment_;
  std::uint32_t fork_generation_ = 0;
  /// The bell of the hub that waited last. The sentry reads it; the copy in the segment is for the peer.
  std::atomic<std::uint64_t> bell_{0};
  /// In memory that was handed over: the connection to the peer, and the bell that it rings. The locks go first: the end
  /// of the line is the peer's reason to look at them.
  unshared_descriptor line_;
  std::uint64_t attended_by_ = 0;
  /// Whose incarnation is watched.
  process_identity watched_process_;
  /// The peer that was alive when the hub announced itself, and so has its doorbell.
  std::uint32_t announced_to_ = 0;
  std::unique_ptr<futex_relay> relay_;
  std::uint64_t relay_doorbell_ = 0;
  bool hub_waits_on_futex_ = false;
  bell_kind woken_by_ = bell_kind::none;

  std::shared_ptr<private_channel> private_;
};

template <class Ready>
bool endpoint::wait(Ready&& ready, std::optional<std::chrono::steady_clock::time_point> deadline) {
  for (;;) {
    const std::int64_t start = now_ns();
    std::int64_t last = start;
    const std::int64_t length = spin_.length();
    while (length > 0 || policy_ == wait_policy::busy) {
      constexpr int looks_between_clocks = 32;
      for (int i = 0; i < looks_between_clocks; ++i) {
        if (ready()) {
          spin_.answered();
          return true;
        }
        cpu_relax();
      }
      const std::int64_t now = now_ns();
      if (deadline && std::chrono::steady_clock::now() >= *deadline) return false;
      if (policy_ == wait_policy::busy) continue;
      if (now - last > spin_budget::preemption_gap) {
        spin_.preempted();
        break;
      }
      if (now - start >= length) {
        spin_.in_vain();
        break;
      }
      last = now;
    }
    if (!prepare_park(own_word(), presence::thread_parked, barrier_, ready)) return true;
    if (deadline && std::chrono::steady_clock::now() >= *deadline) {
      take_back(own_word());
      return ready();
    }
    count_park(bell_kind::futex);
    const std::int64_t asleep = now_ns();
    futex_sleep(own_word(), presence::thread_parked, deadline);
    take_back(own_word());
    spin_.parked_for(now_ns() - asleep);
    if (ready()) return true;
  }
}

/// What is under a channel's name, as far as it can be told.
enum class channel_condition : std::uint8_t {
  /// An end lives in it, or is just entering or leaving.
  live,
  /// A whole segment in which nobody lives: what a crash left, or messages for a receiver that has yet to come.
  stale,
  /// What was left by somebody who died while making or removing it, or of whose halves one was removed: there is
  /// nothing in it, and whoever comes next clears it away.
  unfinished,
  /// A segment of ours that is cut short, or whose fields do not agree with each other.
  damaged,
  /// A segment of another layout version of strait: nothing else is known of it, and it is never touched.
  other_version,
  /// A file that this user may not read: it may be a channel or not.
  no_permission,
};
[[nodiscard]] constexpr std::string_view to_string(channel_condition c) noexcept {
  switch (c) {
    case channel_condition::live:
      return "live";
    case channel_condition::stale:
      return "stale";
    case channel_condition::unfinished:
      return "unfinished";
    case channel_condition::damaged:
      return "damaged";
    case channel_condition::other_version:
      return "other version";
    case channel_condition::no_permission:
      return "no permission";
  }
  return "unknown";
}

/// One end of a channel, as others see it.
struct end_state {
  role which = role::sender;
  /// Whether a process holds the end: the kernel's word. Everything below is what the segment says.
  bool alive = false;
  /// Empty when its word holds what no correct end writes. `dead`, too, when the process is gone and nobody noticed yet.
  std::optional<presence> state;
  /// The process that holds the end, or held it last, in its own PID namespace; 0 when nobody ever did.
  std::uint32_t pid = 0;
  /// How often the owners of this end went to sleep, and how often they rang the other end, since the segment was made.
  std::uint64_t parks = 0;
  std::uint64_t wakes = 0;
  /// The CPU on which its owner last went to sleep; empty when it has not.
  std::optional<unsigned> cpu;
};

/// A channel between processes, as others see it.
struct channel_state {
  memory_name name;
  channel_condition condition = channel_condition::live;
  /// What was expected and what was found, where the condition is neither `live` nor `stale`. All below is then unknown.
  std::string trouble;

  /// Of the message type; empty when it has none. As the segment says it: any bytes but NUL.
  std::string type;
  std::uint32_t type_version = 0;
  std::uint32_t message_bytes = 0;
  std::uint32_t message_alignment = 0;
  /// In messages.
  std::uint64_t capacity = 0;
  /// Messages sent and not yet released by the receiver, which releases an eighth of the ring at a time while it is busy.
  std::uint64_t depth = 0;
  /// Messages sent and released since the segment was made; `depth` is their difference, kept within `capacity`.
  std::uint64_t sent = 0;
  std::uint64_t taken = 0;
  std::uint64_t segment_bytes = 0;
  std::uint32_t creator_pid = 0;
  store_load barrier = store_load::by_fence;
  /// The memory node that somebody asked for; empty: nobody did, so the memory follows the receiver.
  std::optional<unsigned> node_asked;
  /// The channel is poisoned, or a word in it holds what no correct end writes.
  bool corrupt = false;
  /// Nobody lives in it because the sender has closed and the receiver has yet to come: its messages wait.
  bool deposited = false;
  /// By role.
  std::array<end_state, role_count> ends{};
};

/// Looks at the named channel, changing nothing, whatever is in the segment.
///
/// The header is read, not mapped, so that a file that somebody cuts short meanwhile is no SIGBUS. It is not read at one
/// instant: of a live channel each number is right, and two of them may be of different moments.
///
/// Waits: never. Cancel safety: nothing to cancel. Allocates: the result. Errors: `unknown_scheme`, `bad_name`,
/// `foreign_segment`, `no_permission`, or the errno of the failing call: ENOENT when there is nothing. Complexity: a few
/// system calls.
[[nodiscard]] channel_state inspect(std::string_view name);

/// Looks at every channel between processes on this machine, by name. What is not ours is left out, and so is what
/// vanishes while we look; a file that this user may not read and that is large enough to be a channel is listed.
///
/// Waits: never. Cancel safety: nothing to cancel. Allocates: the result. Errors: the errno of the failing call when the
/// names cannot be had. Complexity: a few system calls for each file in /dev/shm and each System V segment.
[[nodiscard]] std::vector<channel_state> list_channels();

/// What `remove_channel` takes away.
enum class removal : std::uint8_t {
  /// Any segment in which nobody lives.
  any,
  /// Only what a crash left: a whole segment or an unfinished one, and not one whose messages wait for a receiver that has yet to come.
  leftover,
};

/// Takes a channel's name away, and with it the segment, if nobody lives in it. Done with the gate held, so that nobody
/// enters meanwhile.
///
/// Waits: at most a second, for an end that is entering or leaving. Cancel safety: nothing to cancel. Allocates: a
/// little. Errors: `end_in_use` when an end lives in it, naming the processes; `version_mismatch` and `foreign_segment`,
/// which are never touched; `layout_mismatch` when a `leftover` was asked for and it is none; `no_permission`; ENOENT when
/// there is nothing; or the errno of the failing call. Complexity: a dozen system calls.
void remove_channel(std::string_view name, removal which = removal::any);

}  // namespace strait
