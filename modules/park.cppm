module;
#include <algorithm>
#include <atomic>
#include <chrono>
#include <compare>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <string_view>
#include <thread>
export module strait.park;

export import strait.ring;

/// Waiting: spin policy, futex, doorbell, and the one wake protocol that everything else uses.
///
/// Each end of a channel has one word in shared memory that tells what its owner is doing (`presence`).
///
///     waiter                                  sender
///     ------                                  ------
///     word = thread_parked | hub_parked       publish a message (or room)
///     heavy barrier                           light barrier
///     look once more at every lane            read the word
///     sleep                                   parked? take it back to `awake`; the one who did rings
///
/// Either the sender sees the announcement, or the waiter sees the message: that is Dekker's argument, and it needs a
/// StoreLoad order on both sides. The waiter buys both with one membarrier, so that a sender pays for a compiler
/// barrier only (`store_load`).
///
/// | word value             | written by                                        | when                                     |
/// |------------------------|---------------------------------------------------|------------------------------------------|
/// | vacant                 | who makes the segment; who enters a channel that the peer has closed, under the gate | nobody is there yet |
/// | awake                  | owner; or who rings it, its own sentry among them, by compare-exchange | attach, wake        |
/// | thread_/hub_parked     | owner                                             | before it sleeps                         |
/// | closed                 | owner                                             | its last store, before it drops its lock |
/// | dead                   | a survivor, under the gate, with the lock free    | the owner's process is gone: no race     |
///
/// Killed after `thread_/hub_parked` an owner leaves it; a ringer that takes it back wakes nobody. Killed between taking it
/// back and ringing, a ringer leaves `awake` with the owner asleep: whoever settles the ringer's death wakes him whatever
/// the word says. In memory that was handed over there is no gate, the sentry of the survivor writes `dead`, and the peer
/// may write anything at any time: there the word only tells when to look.
export namespace strait {

/// What the owner of an end is doing; one 32-bit word in shared memory.
enum class presence : std::uint32_t {
  vacant = 0,
  awake = 1,
  thread_parked = 2,
  hub_parked = 3,
  closed = 4,
  dead = 5,
};

/// Whether a word that was read from shared memory is one of these.
[[nodiscard]] constexpr bool is_presence(std::uint32_t word) noexcept {
  return word <= static_cast<std::uint32_t>(presence::dead);
}

[[nodiscard]] constexpr std::string_view to_string(presence p) noexcept {
  switch (p) {
    case presence::vacant:
      return "vacant";
    case presence::awake:
      return "awake";
    case presence::thread_parked:
      return "thread_parked";
    case presence::hub_parked:
      return "hub_parked";
    case presence::closed:
      return "closed";
    case presence::dead:
      return "dead";
  }
  return "corrupt";
}

/// How the StoreLoad order between a publication and the read of the presence word is had. Fixed when a channel is
/// created; all its ends must agree.
enum class store_load : std::uint32_t {
  /// Every sender executes a fence for each send: 4 to 10 times slower item by item.
  by_fence = 1,
  /// The waiter calls membarrier(PRIVATE_EXPEDITED): both ends are in one process.
  by_process_barrier = 2,
  /// The waiter calls membarrier(GLOBAL_EXPEDITED): every attached process has registered.
  by_machine_barrier = 3,
};

static_assert(std::atomic<std::uint32_t>::is_always_lock_free, "a futex word must not hide a lock");
static_assert(sizeof(std::atomic<std::uint32_t>) == 4, "a futex word has 32 bits");

/// Registers this process for the machine barrier; again after exec, which forgets it. Idempotent and cheap after the
/// first call; the first may take tens of milliseconds when threads run already.
///
/// Waits: never. Allocates: never. Errors: false when the kernel refuses. Complexity: one system call, once.
[[nodiscard]] bool register_barrier(store_load kind) noexcept;

/// Makes every store that this thread did before it visible to all, and every publication of the others that came
/// before it visible to this thread. About a microsecond; only who is about to sleep calls it.
///
/// Waits: never. Allocates: never. Errors: none, where `register_barrier` succeeded. Complexity: one system call.
void heavy_barrier(store_load kind) noexcept;

/// The production policy: std::atomic, and the barriers of the kernel.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: of the light barrier a few instructions; of the other, see
/// there.
struct native_waiting : native_atomics {
  static inline void light_barrier(store_load kind) noexcept {
#if defined(__SANITIZE_THREAD__) || (defined(__has_feature) && __has_feature(thread_sanitizer))
    // ThreadSanitizer models no fences and knows nothing of membarrier: a read-modify-write is its full barrier.
    static std::atomic<std::uint32_t> order{0};
    order.fetch_add(1, std::memory_order_seq_cst);
    (void)kind;
#else
    if (kind == store_load::by_fence) [[unlikely]] {
      // Pairs with the waiter's fence in heavy_barrier: orders our publication before our read of the word.
      std::atomic_thread_fence(std::memory_order_seq_cst);
    } else {
      // The CPU's order is bought by the waiter's membarrier; the compiler's is ours to keep.
      std::atomic_signal_fence(std::memory_order_seq_cst);
    }
#endif
  }
  static inline void heavy_barrier(store_load kind) noexcept { strait::heavy_barrier(kind); }
};

/// The owner says that it is about to sleep. Then: heavy_barrier, look once more, and only then sleep.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
template <class Word>
inline void announce(Word& word, presence parked) noexcept {
  // relaxed: the heavy barrier that must follow orders it against our last look and against every sender.
  word.store(static_cast<std::uint32_t>(parked), std::memory_order_relaxed);
}

/// The owner is awake again. Returns true when nobody had rung: no wake-up is on its way.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
template <class Word>
inline bool take_back(Word& word) noexcept {
  // acq_rel: a ringer's compare-exchange released what it published before it rang; we are about to read that.
  const auto was =
      static_cast<presence>(word.exchange(static_cast<std::uint32_t>(presence::awake), std::memory_order_acq_rel));
  return was == presence::thread_parked || was == presence::hub_parked;
}

/// The waiter's half of the protocol, up to the sleep: announce, make it visible, look once more. True: the caller may
/// sleep on whatever `parked` names, and must `take_back` when it wakes. False: there was something, and the
/// announcement was taken back; a sender may have rung meanwhile, and only us. So a waiter that gives up after false,
/// because it was cancelled, passes the wake on as one that was rung.
///
/// A hub that waits for many ends announces in each of their words, pays one barrier, and looks at each: the same three
/// steps in the same order.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: one barrier (a system call) and one look.
template <class Policy = native_waiting, class Word, class Look>
[[nodiscard]] inline bool prepare_park(Word& word, presence parked, store_load kind, Look&& something_there) {
  announce(word, parked);
  Policy::heavy_barrier(kind);
  if (!something_there()) return true;
  take_back(word);
  return false;
}

/// After a publication: what the owner of `word` is doing, and whether to ring it. `thread_parked` or `hub_parked` come
/// back only to the one caller, of possibly many, that took the announcement back and so must ring; every other value
/// is what the word holds, and nobody needs to be rung.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: one load while the owner is awake.
template <class Policy = native_waiting, class Word>
[[nodiscard]] inline presence claim_ring(Word& word, store_load kind) noexcept {
  Policy::light_barrier(kind);
  // relaxed: the barrier pair above orders it after our publication.
  std::uint32_t now = word.load(std::memory_order_relaxed);
  // First and by itself, because it is what every message meets.
  if (now == static_cast<std::uint32_t>(presence::awake)) [[likely]]
    return presence::awake;
  if (now != static_cast<std::uint32_t>(presence::thread_parked) &&
      now != static_cast<std::uint32_t>(presence::hub_parked)) {
    return static_cast<presence>(now);
  }
  // acq_rel: release hands our publication to take_back; acquire orders what the owner wrote about its doorbell before
  // it announced. A compare-exchange, because the owner may have closed meanwhile, and `closed` must stay.
  const auto parked = static_cast<presence>(now);
  if (word.compare_exchange_strong(now, static_cast<std::uint32_t>(presence::awake), std::memory_order_acq_rel,
                                   std::memory_order_relaxed)) {
    return parked;
  }
  const auto found = static_cast<presence>(now);
  return found == presence::thread_parked || found == presence::hub_parked ? presence::awake : found;
}

/// The latch before a doorbell: of all ringers between two resets only the first makes the system call.
///
/// | shared word | written by                          | what the other side may be doing                              |
/// |-------------|-------------------------------------|---------------------------------------------------------------|
/// | rung_       | ringers set it, the owner resets it | the owner has read the eventfd and not yet looked at its lanes |
///
/// The owner reads the eventfd first, resets second and looks at its lanes third. A ringer that still finds the latch
/// set comes before the reset, so its message is seen by the look; one that comes after it writes the eventfd.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
template <class Atomics = native_atomics>
class bell_latch {
 public:
  /// True: the caller is the one who writes the eventfd.
  [[nodiscard]] bool claim() noexcept {
    // acq_rel: the reset that follows in the word's order acquires what this ringer published.
    return rung_.exchange(1, std::memory_order_acq_rel) == 0;
  }
  /// After the eventfd was read, before the lanes are looked at.
  void reset() noexcept {
    // A read-modify-write, not a store: it must read the last ringer's exchange to acquire what that ringer published.
    rung_.exchange(0, std::memory_order_acq_rel);
  }

 private:
  typename Atomics::template atomic<std::uint32_t> rung_{0};
};

/// Sleeps while the word holds `parked`, until `deadline` if there is one. Returns on every signal and spurious wake.
/// The futex is shared: the waker may be another process. `std::atomic::wait` would not do, its futex is private.
///
/// Waits: parks. Cancel safety: a wake ends it, and nothing else changes. Allocates: never. Errors: none; whoever sleeps
/// looks again. Complexity: one system call.
void futex_sleep(std::atomic<std::uint32_t>& word, presence parked,
                 std::optional<std::chrono::steady_clock::time_point> deadline) noexcept;

/// Wakes every thread that sleeps on the word.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: one system call.
void futex_wake(std::atomic<std::uint32_t>& word) noexcept;

/// An eventfd by which a hub of this process is woken: a latch, readable from the first ring until `drain`.
///
/// The bell of a hub that ended is the next hub's. Other processes keep a copy of each bell that was left in their
/// mailbox, which costs them a descriptor; so a process has as many bells as it ever had hubs at once, and not one for
/// each. Who still has the number of the hub before wakes its successor for nothing, which looks once more.
///
/// | what        | written by                             | read by        | what the other side may be doing             |
/// |-------------|----------------------------------------|----------------|----------------------------------------------|
/// | the eventfd | ringers, here and in other processes   | the owner      | see `bell_latch`; nobody owns it: it keeps what was rung |
/// | the latch   | see `bell_latch`                       | the same       | the same; ringers in other processes have none |
/// | the lines   | ends: added and taken off, list locked | the owner      | a line rings while it is added: it is readable at once |
/// | owned       | owner, with the list locked            | ringers        | a ring that came before waits for the next owner, who drains it |
///
/// Waits: never. Allocates: when there are more of them than ever before. Errors: `std::system_error` when it is made and
/// no descriptor is left. Complexity: one system call at most; linear in the bells when it is made.
class doorbell {
 public:
  /// Takes one that nobody has, or makes an eventfd and enters it in this process's list under a number of its own.
  doorbell();
  ~doorbell();
  doorbell(const doorbell&) = delete;
  doorbell& operator=(const doorbell&) = delete;

  /// The number under which this process's sentry and senders find it.
  [[nodiscard]] std::uint64_t number() const noexcept;
  [[nodiscard]] int descriptor() const noexcept;

  /// Empties the eventfd and resets the latch; the lanes are looked at after this, never before.
  void drain() noexcept;

  /// Rings the bell of that number in this process; nothing happens when nobody has it or it is already rung.
  static void ring(std::uint64_t number) noexcept;

  /// A duplicate of that bell's descriptor, to be sent to another process; -1 when there is none.
  [[nodiscard]] static int duplicate(std::uint64_t number) noexcept;

  // A peer that is not trusted is given no eventfd: it could fill it and have our own ringers block, or swap what is
  // behind it. It rings by a byte on a connection to it, the *line*. A line that is readable counts as a ring.

  /// From now on `line` rings the bell of that number, until `leave` or the line's end, of which it rings once.
  ///
  /// Waits: never. Allocates: a descriptor, for the first line of each bell. Errors: `std::system_error` when none is to
  /// be had. Complexity: one system call.
  static void attend(std::uint64_t number, int line);
  /// No longer. Before the line is closed.
  static void leave(std::uint64_t number, int line) noexcept;
  /// Readable while a line is; -1 as long as there was none.
  [[nodiscard]] int lines() const noexcept;
  /// Takes what rang off the lines, one message of each: an honest peer sends one for each park, and one that sends more
  /// wakes the hub again, at its own expense. The lanes are looked at after this.
  void drain_lines() noexcept;

  // For forks: none may find the list locked by a thread that the child does not have.
  static void lock_all() noexcept;
  static void unlock_all() noexcept;
  /// In the child, with the list locked: has every bell stand for an eventfd of the child's.
  static void renew_all() noexcept;

 private:
  struct bell;
  struct list;
  [[nodiscard]] static list& all() noexcept;
  bell* bell_;
};

/// Sends one message over a connected Unix socket, with copies of up to `most_descriptors` descriptors. False, and errno
/// set: it was not sent.
///
/// Waits: never: where there is no room, that is EAGAIN. Allocates: never. Errors: as errno has them. Complexity: one system
/// call.
bool send_at_once(int connection, std::span<const std::byte> message, std::span<const int> descriptors = {}) noexcept;
inline constexpr std::size_t most_descriptors = 4;

/// Rings whoever waits at the other end of a line; see `doorbell::attend`.
///
/// Waits: never, whatever the peer does with its end: where the line is full nobody has read it, so the peer's hub does
/// not sleep on it; where it has ended, the peer has left. Allocates: never. Errors: none. Complexity: one system call.
void ring_line(int line) noexcept;

/// A process as others find it: 128 random bits, drawn when it first opens a channel that others can enter. Process ids
/// are for people to read; they are reused, and mean nothing in another PID namespace.
struct process_identity {
  std::uint64_t high = 0;
  std::uint64_t low = 0;
  friend bool operator==(const process_identity&, const process_identity&) = default;
  friend auto operator<=>(const process_identity&, const process_identity&) = default;
};

/// This process's identity. The first call opens its mailbox, a Unix socket in the abstract namespace named after the
/// identity, where others leave the doorbells by which this process may ring them. When no socket can be had, nobody
/// can leave one, and hubs elsewhere wait on the futex instead.
///
/// Waits: never. Allocates: once. Errors: `std::system_error` when the first call finds no descriptors left. Complexity:
/// constant after the first call.
[[nodiscard]] process_identity this_process();

/// Leaves the doorbell `number` of this process in the mailbox of process `to`, once. False: it cannot be reached
/// (another network namespace, another user, a full mailbox); it then must be waited for on the futex.
///
/// Waits: never. Allocates: the first time for each process. Errors: none. Complexity: one look-up after the first time.
[[nodiscard]] bool offer_doorbell(process_identity to, std::uint64_t number) noexcept;

/// Rings doorbell `number` of process `owner`, which may be this one. Its hub left the bell in our mailbox before it
/// parked, so this collects the mailbox when the bell is not known yet.
///
/// Waits: never. Allocates: the first time. Errors: none. Complexity: one system call.
void ring_doorbell(process_identity owner, std::uint64_t number) noexcept;

/// Remembers that a process has died, the last 256 of them: the kernel drops its locks one after the other, and who finds
/// one still held then knows that it is about to be dropped.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: linear in what is remembered.
void remember_death(process_identity process) noexcept;

/// Whether a process is among those remembered. Says nothing of others: they may live or have died.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: linear in what is remembered.
[[nodiscard]] bool is_remembered_dead(process_identity process) noexcept;

/// Who wants to know when a process may have ended.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: a system call or two.
class process_watcher {
 public:
  /// Called by the sentry thread when the connection to the process ended, and again until it returns true. The end of
  /// a connection proves nothing; this is where the lock is looked at.
  virtual bool look() noexcept = 0;

 protected:
  ~process_watcher() = default;
};

/// Has the sentry call `watcher.look()` when there is reason to think that `process` ended. The sentry is one thread of
/// this process that sleeps in epoll on one connection to each watched process; a process that it cannot connect to is
/// looked at every ten milliseconds. It exists while something is watched.
///
/// Waits: never. Allocates: yes. Errors: `std::system_error` when no thread can be had. Complexity: constant after the
/// first watcher of a process.
void watch_process(process_identity process, process_watcher& watcher);

/// The same for a process that is at the other end of `line`, a connected Unix socket, and for as long as `watcher`
/// watches, which must end before the line is closed. What comes over the line is left there.
void watch_line(int line, process_watcher& watcher);

/// After this returns, `watcher` is not called any more.
///
/// Waits: for a `look` in progress. Cancel safety: cannot be cancelled. Allocates: never. Errors: none. Complexity: linear
/// in the watchers of that process.
void unwatch_process(process_watcher& watcher) noexcept;

/// Lets a hub sleep on a futex: a thread that waits until `word` no longer holds `thread_parked` and then rings the
/// hub's doorbell. For peers that do not have the doorbell: those that have not attached yet, and those that cannot be
/// reached over a socket.
///
/// | shared word | written by                                 | read by             | what the other side may be doing            |
/// |-------------|--------------------------------------------|---------------------|---------------------------------------------|
/// | the word    | see above                                  | the thread          | it was announced, taken back and announced again since `arm`: the hub has looked, so the thread may sleep on |
/// | armed       | `arm` sets it, the thread clears it, locked | the thread, locked | the thread still sleeps since the `arm` before: it then looks twice, and rings once too often |
/// | stopped     | the destructor, locked                     | the thread, locked  | the thread sleeps on the word, which was taken back: the wake finds it, or it finds the word changed |
///
/// Waits: only the destructor, for the thread. Cancel safety: it cannot be cancelled. Allocates: when it is made. Errors:
/// `std::system_error` when it is made and no thread can be had. Complexity: a system call for each sleep and wake.
class futex_relay {
 public:
  futex_relay(std::atomic<std::uint32_t>& word, std::uint64_t doorbell_number);
  /// The word must have been taken back.
  ~futex_relay();
  futex_relay(const futex_relay&) = delete;
  futex_relay& operator=(const futex_relay&) = delete;
  /// The word was announced as `thread_parked`; watch it now.
  void arm();

 private:
  void run();

  std::atomic<std::uint32_t>& word_;
  std::uint64_t doorbell_number_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool armed_ = false;
  bool stopped_ = false;
  std::thread thread_;
};

/// How an end waits.
enum class wait_policy : std::uint32_t {
  /// Spins while a message is likely to come sooner than a wake-up would cost, then parks. Learns.
  adaptive,
  /// Never parks.
  busy,
  /// Never spins.
  park,
};
[[nodiscard]] constexpr std::string_view to_string(wait_policy p) noexcept {
  switch (p) {
    case wait_policy::adaptive:
      return "adaptive";
    case wait_policy::busy:
      return "busy";
    case wait_policy::park:
      return "park";
  }
  return "unknown";
}

/// Nanoseconds of the steady clock.
[[nodiscard]] inline std::int64_t now_ns() noexcept {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

/// CPUs of this machine that are online, counted once.
[[nodiscard]] unsigned online_cpu_count() noexcept;

/// How long to spin, learnt from how spinning and parking went. Private to one waiting thread.
///
/// A spin that was answered costs what it took; one that was not costs its whole length, and a park costs two
/// wake-ups. So the budget doubles when a park turned out shorter than a wake-up costs, and halves when a spin was in
/// vain. A gap between two looks at the clock that no instruction explains means that somebody else has our CPU:
/// there are more runnable threads than CPUs, and spinning only keeps the sender from running.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
class spin_budget {
 public:
  spin_budget() = default;
  inline spin_budget(wait_policy policy, std::int64_t first, std::int64_t longest) noexcept
      : policy_{policy}, budget_{first}, longest_{longest} {
    if (policy == wait_policy::park || (policy == wait_policy::adaptive && online_cpu_count() == 1)) {
      budget_ = 0;
      longest_ = 0;
    }
  }

  /// How long to spin now, in nanoseconds.
  [[nodiscard]] inline std::int64_t length() const noexcept {
    return policy_ == wait_policy::busy ? longest_ : budget_;
  }

  inline void answered() noexcept { grow(); }
  inline void in_vain() noexcept { budget_ = budget_ / 2 < shortest ? 0 : budget_ / 2; }
  /// We lost our CPU while spinning.
  inline void preempted() noexcept { budget_ = 0; }
  /// A park ended after `slept` nanoseconds.
  inline void parked_for(std::int64_t slept) noexcept {
    if (slept < 2 * longest_) grow();
  }

  /// A gap in the clock that means preemption, in nanoseconds.
  static constexpr std::int64_t preemption_gap = 200'000;

 private:
  static constexpr std::int64_t shortest = 250;
  inline void grow() noexcept {
    const std::int64_t next = budget_ == 0 ? 4 * shortest : 2 * budget_;
    budget_ = next < longest_ ? next : longest_;
  }

  wait_policy policy_ = wait_policy::adaptive;
  std::int64_t budget_ = 0;
  std::int64_t longest_ = 0;
};

/// How long to leave the sender's line alone once a lane has run empty.
///
/// A consumer that keeps up with a stream finds its lane empty after every few messages; if it looks again at once,
/// the line with `tail` crosses for each message. If it waits for a moment, one crossing announces many messages. In
/// ping-pong that same moment is latency. Two messages found at once prove that their sender did not wait for an
/// answer between them: it streams, and the pause doubles as long as that brings more messages, until it brings enough.
/// Then it is settled for so many looks, and tried anew: a stream may have changed. One message alone ends it.
///
/// Where pauses bring nothing again and again, the sender does not run meanwhile: it is a coroutine of the same thread, or
/// sends in bursts. Then there is none for as many looks.
///
/// Waits: spins, for `length()` PAUSEs. Cancel safety: nothing to cancel. Allocates: never. Errors: none. Complexity:
/// constant.
class gather_pause {
 public:
  gather_pause() = default;
  /// For a lane of so many slots. An eighth of them is enough: a look that has to bring much of a small lane would leave
  /// its sender without room.
  inline explicit gather_pause(std::uint64_t capacity) noexcept
      : enough_{std::clamp<std::uint64_t>(capacity / 8, 2, most_enough)} {}

  /// In PAUSE instructions.
  [[nodiscard]] inline std::uint32_t length() const noexcept { return pauses_; }
  /// Before a look at a lane that has just run empty.
  inline void before_look() const noexcept {
    for (std::uint32_t i = 0; i < pauses_; ++i) cpu_relax();
  }
  /// After a look that found so many.
  inline void found(std::uint64_t messages) noexcept {
    if (rest_ != 0) {
      --rest_;
    } else if (messages < 2) {
      if (messages == 0 && pauses_ != 0) in_vain();
      pauses_ = 0;
      settled_ = 0;
    } else if (settled_ != 0) {
      if (--settled_ == 0) {
        pauses_ = 0;
      } else if (messages > 4 * enough_) {
        pauses_ /= 2;
      }
    } else if (pauses_ != 0 && messages < before_ + before_ / 4) {
      if (pauses_ == shortest) {
        pauses_ = 0;
        in_vain();
      } else {
        settle(pauses_ / 2);
      }
    } else if (messages >= enough_ || pauses_ == longest) {
      settle(pauses_);
    } else {
      before_ = messages;
      pauses_ = pauses_ == 0 ? shortest : pauses_ * 2;
    }
  }

  /// How many messages a look should bring.
  [[nodiscard]] inline std::uint64_t enough() const noexcept { return enough_; }

  /// A line takes some 50 to 400 ns to cross; spread over this many messages, that is less than a nanosecond for each.
  static constexpr std::uint64_t most_enough = 512;

  /// In PAUSE instructions. The longest is a few hundred nanoseconds to two microseconds, by CPU; a shorter one than the
  /// shortest could not be told from none beside the crossing.
  static constexpr std::uint32_t shortest = 16;
  static constexpr std::uint32_t longest = 64;

  /// What a trial costs, some hundred PAUSEs or a few looks that bring little, is nothing beside so many looks.
  static constexpr std::uint32_t looks_settled = 1024;
  static constexpr std::uint32_t vain_to_rest = 8;

 private:
  inline void settle(std::uint32_t pauses) noexcept {
    pauses_ = pauses;
    settled_ = looks_settled;
    vain_ = 0;
  }
  inline void in_vain() noexcept {
    // A few times it means little: a sender that waits for a line of its own sends nothing meanwhile, either.
    if (++vain_ < vain_to_rest) return;
    vain_ = 0;
    rest_ = looks_settled;
  }

  std::uint64_t enough_ = 2;
  /// How many messages the last shorter pause brought.
  std::uint64_t before_ = 0;
  std::uint32_t pauses_ = 0;
  /// Looks for which the pause is not lengthened.
  std::uint32_t settled_ = 0;
  /// Looks for which there is none, and how many pauses in a row have brought nothing.
  std::uint32_t rest_ = 0;
  std::uint32_t vain_ = 0;
};

/// How many looks an awaiting receiver spends in place before its coroutine suspends.
///
/// A suspension and a resumption cost some 20 to 40 ns, as much as half a cache line's way between neighbouring cores,
/// and in ping-pong both ends pay it in each trip. So where the last messages came within a moment, it waits that moment
/// in place. It learns: a moment spent in vain is not spent again until the hub, waiting for nobody else, finds a message
/// that soon. And it is bounded: after so many waits in place the coroutine suspends once, for its neighbours' sake.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
class linger {
 public:
  linger() = default;
  inline explicit linger(wait_policy policy) noexcept
      : allowed_{policy != wait_policy::park && online_cpu_count() > 1} {}

  /// Looks to spend now: `without_pause` at once, the others with a PAUSE before each.
  [[nodiscard]] inline std::uint32_t length() noexcept {
    if (!near_) return 0;
    if (--until_suspension_ != 0) return longest;
    until_suspension_ = waits_between_suspensions;
    return 0;
  }
  /// None of them found anything.
  inline void in_vain() noexcept { near_ = false; }
  /// The hub found a message with its look number `looks`.
  inline void hub_found(std::uint32_t looks) noexcept { near_ = allowed_ && looks <= longest; }

  /// Together about half a microsecond to one, by CPU: a round trip of a line between distant cores.
  static constexpr std::uint32_t longest = 64;
  /// A PAUSE takes as long as a line needs from a neighbouring core, and a message that came in it waits for its end; but
  /// who polls without one pays for leaving the loop. Of 0, 4, 8, 12, 16, 32 and 48, tried between near and distant cores,
  /// 12 had the best rounds of both.
  static constexpr std::uint32_t without_pause = 12;
  static constexpr std::uint32_t waits_between_suspensions = 256;

 private:
  bool allowed_ = false;
  bool near_ = false;
  std::uint32_t until_suspension_ = waits_between_suspensions;
};

}  // namespace strait
