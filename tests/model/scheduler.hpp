#pragma once

/// The test scheduler: runs the project's real templates under every interleaving and every weak-memory outcome within
/// bounds, then along random walks without bounds. A single-threaded, deterministic simulation.
///
/// Threads are fibers that hand over to each other at each operation on a shared word. What a load may return comes
/// from a view-based model of release and acquire (after Kang et al., "A Promising Semantics for Relaxed-Memory
/// Concurrency", POPL 2017, without promises):
///
/// - each word keeps its modification order; each thread has a view: for each word the oldest value it may still read;
/// - a release store carries its thread's view, an acquire load joins what it reads; a relaxed one does neither, so
///   stores to different words may become visible in any order, and every store may be delayed past later loads;
/// - a read-modify-write reads the newest value; a failed compare-exchange is a load and may read an older one;
/// - a seq_cst fence joins a global view both ways; the heavy barrier (membarrier) joins the views of all threads;
/// - message slots are plain memory: vector clocks find each access that no happens-before orders, as TSan would.
///   Fences and barriers order words, never slots: C++ gives them no happens-before of their own.
///
/// What it does not explore: loads that read from a store later in program order of a cycle (load buffering), and a
/// store placed before an existing one in a word's modification order. The second cannot happen here: each word has one
/// storing thread at a time, and everybody else uses read-modify-writes.
///
/// Futex and eventfd are the kernel's: atomic, and without any memory order that the protocol could lean on.

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace model {

inline constexpr std::size_t most_threads = 4;
inline constexpr std::size_t most_words = 40;
inline constexpr std::size_t stack_bytes = 64 * 1024;
inline constexpr std::size_t nobody = most_threads;

/// What a thread has seen: for each word the place in its modification order, for each thread its clock.
struct view {
  std::array<std::uint16_t, most_words> words{};
  std::array<std::uint16_t, most_threads> clocks{};

  void join_words(const view& other) noexcept {
    for (std::size_t i = 0; i < most_words; ++i) words[i] = std::max(words[i], other.words[i]);
  }
  void join(const view& other) noexcept {
    join_words(other);
    for (std::size_t i = 0; i < most_threads; ++i) clocks[i] = std::max(clocks[i], other.clocks[i]);
  }
};

/// How far the exhaustive part goes, and how many random walks follow it.
struct bounds {
  /// Times an execution may take a thread off its CPU while that thread could go on.
  unsigned preemptions = 2;
  /// Times an execution may read a value that is not the newest.
  unsigned old_reads = 2;
  /// Times an execution may let a futex sleep end for no reason.
  unsigned spurious_wakes = 0;
  std::uint64_t executions = 1'000'000;
  std::uint64_t walks = 0;
  std::uint64_t seed = 1;
};

struct outcome {
  std::uint64_t executions = 0;
  /// Whether the exhaustive part visited everything within its bounds.
  bool exhausted = false;
  bool failed = false;
  /// What failed, and the trace that leads to it.
  std::string report;
};

/// One execution at a time: words, threads, choices.
class world {
 public:
  struct message {
    std::uint64_t value;
    view seen;
  };
  struct word {
    std::vector<message> order;
    const char* name = "word";
    bool weak_stores = false;
    bool weak_loads = false;
  };

  world() {
    for (std::size_t i = 0; i < most_threads; ++i) make(fibers_[i]);
    fibers_[nobody].begun = true;  // whoever calls `explore`
  }
  world(const world&) = delete;
  world& operator=(const world&) = delete;

  // -- what the policies call ------------------------------------------------------------------------------------

  std::size_t new_word(std::uint64_t value) {
    if (used_words_ == most_words) std::abort();
    auto& made = words_[used_words_];
    made.order.clear();
    made.order.push_back({value, {}});
    made.name = "word";
    made.weak_stores = made.weak_loads = false;
    return used_words_++;
  }
  word& at(std::size_t id) noexcept { return words_[id]; }

  std::uint64_t load(std::size_t id, std::memory_order order) {
    point();
    auto& from = words_[id];
    if (from.weak_loads) order = std::memory_order_relaxed;
    const std::size_t newest = from.order.size() - 1;
    const std::size_t which = newest - pick_age(newest - me().seen.words[id]);
    read(id, which, order);
    note("load", from.name, from.order[which].value, newest - which);
    return from.order[which].value;
  }

  void store(std::size_t id, std::uint64_t value, std::memory_order order) {
    point();
    auto& to = words_[id];
    if (to.weak_stores) order = std::memory_order_relaxed;
    note(order == std::memory_order_relaxed ? "store relaxed" : "store release", to.name, value, 0);
    append(id, value, order, nullptr);
  }

  /// Reads the newest value and replaces it.
  std::uint64_t exchange(std::size_t id, std::uint64_t value, std::memory_order order) {
    point();
    return replace(id, value, order);
  }

  bool compare_exchange(std::size_t id, std::uint64_t& expected, std::uint64_t desired, std::memory_order success,
                        std::memory_order failure) {
    point();
    auto& from = words_[id];
    const std::size_t newest = from.order.size() - 1;
    const bool may_succeed = from.order[newest].value == expected;
    // The values that a failure may have read, newest first.
    std::array<std::size_t, 16> older{};
    std::size_t count = 0;
    for (std::size_t age = 0; age <= newest - me().seen.words[id] && count < older.size(); ++age) {
      if (from.order[newest - age].value != expected) older[count++] = newest - age;
    }
    std::size_t pick = pick_age(may_succeed ? count : count - 1);
    if (may_succeed && pick-- == 0) {
      replace(id, desired, success);
      return true;
    }
    const std::size_t which = older[pick];
    read(id, which, failure);
    expected = from.order[which].value;
    note("compare-exchange failed", from.name, expected, newest - which);
    return false;
  }

  /// std::atomic_thread_fence(seq_cst).
  void fence() {
    point();
    fence_of(me());
    note("fence", "", 0, 0);
  }

  /// What membarrier does: a full fence in each thread. Conservative: it orders words, not slots.
  void fence_everywhere() {
    point();
    fence_of(me());
    for (std::size_t i = 0; i < thread_count_; ++i) fenced_.join_words(threads_[i].seen);
    for (std::size_t i = 0; i < thread_count_; ++i) threads_[i].seen.join_words(fenced_);
    me().released = me().seen;
    note("membarrier", "", 0, 0);
  }

  /// Sleeps while the newest value is `value`. False: it timed out, which only `may_time_out` allows.
  bool futex_sleep(std::size_t id, std::uint64_t value, bool may_time_out) {
    point();
    if (words_[id].order.back().value != value) {
      note("futex: not asleep, holds", words_[id].name, words_[id].order.back().value, 0);
      return true;
    }
    if (spurious_ < bounds_.spurious_wakes && choose(2) == 1) {
      ++spurious_;
      note("futex: spurious wake", words_[id].name, value, 0);
      return true;
    }
    note("futex: asleep on", words_[id].name, value, 0);
    auto& self = me();
    self.state = sleeping;
    self.sleeps_on = id;
    self.may_time_out = may_time_out;
    self.timed_out = false;
    give_way();
    note(self.timed_out ? "futex: timed out" : "futex: woken", words_[id].name, 0, 0);
    return !self.timed_out;
  }

  void futex_wake(std::size_t id) {
    point();
    note("futex: wake", words_[id].name, 0, 0);
    for (std::size_t i = 0; i < thread_count_; ++i) {
      auto& other = threads_[i];
      if (other.state == sleeping && other.sleeps_on == id) {
        other.state = ready;
        return;
      }
    }
  }

  /// Waits until `condition(state)` holds; nothing can come between that and what the caller does next.
  void wait_until(bool (*condition)(const void*), const void* state, const char* what) {
    point();
    while (!condition(state)) {
      note("waits for", what, 0, 0);
      auto& self = me();
      self.state = waiting;
      self.condition = condition;
      self.condition_state = state;
      give_way();
    }
  }

  /// Other threads may come in here.
  void point() {
    if (running_ == nobody) return;
    if (++steps_ > most_steps) fail("the execution runs on without end");
    if (walking_) {
      if (random() % 4 != 0) return;
    } else if (preemptions_ == bounds_.preemptions) {
      return;
    }
    std::array<std::size_t, most_threads> others{};
    unsigned count = 0;
    for (std::size_t i = 0; i < thread_count_; ++i) {
      if (i != running_ && can_run(threads_[i])) others[count++] = i;
    }
    const unsigned pick = choose(count + 1);
    if (pick == 0) return;
    ++preemptions_;
    switch_to(others[pick - 1]);
  }

  void note(const char* operation, const char* what, std::uint64_t value, std::size_t age) {
    trace_.push_back({running_, operation, what, value, age});
  }

  /// Ends the execution. From a fiber it does not return: the fibers are abandoned where they stand, because an
  /// exception could not pass the noexcept functions under test. So fibers must own nothing.
  void fail(const char* why) {
    if (failure_ == nullptr) failure_ = why;
    if (running_ != nobody) leave();
  }
  void check(bool holds, const char* otherwise) {
    if (!holds) fail(otherwise);
  }

  [[nodiscard]] std::size_t running() const noexcept { return running_; }
  view& running_view() noexcept { return me().seen; }

  // -- exploration -----------------------------------------------------------------------------------------------

  /// A scenario is constructed for each execution, has `names` (one for each thread), `run(thread)` and `finish()`, and
  /// if everybody may be left asleep, `may_rest()` to say when.
  template <class Scenario, class... Arguments>
  outcome explore(const bounds& limits, const Arguments&... arguments) {
    bounds_ = limits;
    path_.clear();
    walking_ = false;
    outcome result;
    while (result.executions < limits.executions) {
      ++result.executions;
      if (!execute<Scenario>(arguments...)) return failed<Scenario>(result);
      while (!path_.empty() && path_.back().picked + 1 == path_.back().count) path_.pop_back();
      if (path_.empty()) {
        result.exhausted = true;
        break;
      }
      ++path_.back().picked;
    }
    walking_ = true;
    for (std::uint64_t walk = 0; walk < limits.walks; ++walk) {
      ++result.executions;
      random_ = (limits.seed + walk) * 0x9E3779B97F4A7C15U;
      if (!execute<Scenario>(arguments...)) return failed<Scenario>(result);
    }
    return result;
  }

 private:
  static constexpr std::uint64_t most_steps = 20'000;

  enum state_of { ready, sleeping, waiting, done };
  struct thread {
    view seen;      // what it has seen
    view acquired;  // what its relaxed loads read: a later fence makes it seen
    view released;  // what its last fence released: its relaxed stores carry it
    state_of state = ready;
    std::size_t sleeps_on = 0;
    bool may_time_out = false;
    bool timed_out = false;
    bool (*condition)(const void*) = nullptr;
    const void* condition_state = nullptr;
  };
  /// `_setjmp` and `_longjmp` hand over, because swapcontext makes a system call each time, which was half of all the time
  /// spent here. That they may jump to another stack is glibc's promise, not C's, and not with _FORTIFY_SOURCE.
  struct fiber {
    std::unique_ptr<std::byte[]> stack;
    /// Where it begins an execution, and where it goes on in one.
    std::jmp_buf beginning;
    std::jmp_buf left_at;
    bool begun = false;
  };
  struct step {
    std::size_t thread;
    const char* operation;
    const char* what;
    std::uint64_t value;
    std::size_t age;
  };
  struct choice {
    unsigned picked;
    unsigned count;
  };

  thread& me() noexcept { return running_ == nobody ? outside_ : threads_[running_]; }

  void read(std::size_t id, std::size_t which, std::memory_order order) noexcept {
    auto& self = me();
    const auto& from = words_[id].order[which];
    self.seen.words[id] = std::max(self.seen.words[id], static_cast<std::uint16_t>(which));
    switch (order) {
      case std::memory_order_relaxed:
        self.acquired.join(from.seen);
        break;
      case std::memory_order_acquire:
      case std::memory_order_acq_rel:
        self.seen.join(from.seen);
        break;
      // Nothing under test uses it, and a model stronger than the machine would hide faults.
      default:
        std::abort();
    }
  }

  /// `base` is what a read-modify-write read: its release sequence goes on.
  void append(std::size_t id, std::uint64_t value, std::memory_order order, const view* base) {
    auto& self = me();
    auto& to = words_[id].order;
    if (order == std::memory_order_seq_cst) std::abort();
    self.seen.words[id] = static_cast<std::uint16_t>(to.size());
    const bool releases = order == std::memory_order_release || order == std::memory_order_acq_rel;
    message made{value, releases ? self.seen : self.released};
    made.seen.words[id] = static_cast<std::uint16_t>(to.size());
    if (base != nullptr) made.seen.join(*base);
    to.push_back(made);
  }

  std::uint64_t replace(std::size_t id, std::uint64_t value, std::memory_order order) {
    auto& at = words_[id];
    const message was = at.order.back();
    if (at.weak_loads)
      order = order == std::memory_order_acq_rel ? std::memory_order_release : std::memory_order_relaxed;
    if (at.weak_stores)
      order = order == std::memory_order_acq_rel ? std::memory_order_acquire : std::memory_order_relaxed;
    read(id, at.order.size() - 1, order == std::memory_order_release ? std::memory_order_relaxed : order);
    note("exchange, held", at.name, was.value, 0);
    note("          now", at.name, value, 0);
    append(id, value, order, &was.seen);
    return was.value;
  }

  void fence_of(thread& self) noexcept {
    self.seen.join(self.acquired);
    self.seen.join_words(fenced_);
    fenced_.join_words(self.seen);
    self.released = self.seen;
  }

  /// How old a value to read: 0 is the newest, `oldest` the oldest allowed.
  std::size_t pick_age(std::size_t oldest) {
    if (oldest == 0 || running_ == nobody) return 0;
    if (walking_) return random() % 2 == 0 ? 0 : random() % (oldest + 1);
    if (old_reads_ == bounds_.old_reads) return 0;
    const unsigned age = choose(static_cast<unsigned>(oldest + 1));
    if (age != 0) ++old_reads_;
    return age;
  }

  unsigned choose(unsigned count) {
    if (count == 1) return 0;
    if (walking_) return static_cast<unsigned>(random() % count);
    if (depth_ == path_.size()) path_.push_back({0, count});
    const choice& made = path_[depth_++];
    // The scenario must depend on nothing but its choices.
    if (made.count != count) std::abort();
    return made.picked;
  }

  std::uint64_t random() noexcept {  // splitmix64
    std::uint64_t z = random_ += 0x9E3779B97F4A7C15U;
    z = (z ^ (z >> 30U)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27U)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31U);
  }

  static bool can_run(const thread& which) {
    switch (which.state) {
      case ready:
        return true;
      case sleeping:
        return which.may_time_out;
      case waiting:
        return which.condition(which.condition_state);
      case done:
        break;
    }
    return false;
  }

  /// The running thread cannot go on: somebody else must, and that is no preemption.
  void give_way() {
    std::array<std::size_t, most_threads> others{};
    unsigned count = 0;
    bool all_done = true;
    for (std::size_t i = 0; i < thread_count_; ++i) {
      if (can_run(threads_[i])) others[count++] = i;
      all_done = all_done && threads_[i].state == done;
    }
    if (all_done) leave();
    if (count == 0) {
      if (may_rest_ != nullptr && may_rest_(scenario_)) leave();
      fail("deadlock: everybody sleeps");
    }
    switch_to(others[choose(count)]);
  }

  void switch_to(std::size_t next) {
    auto& resumed = threads_[next];
    if (resumed.state == sleeping) resumed.timed_out = true;
    resumed.state = ready;
    if (next == running_) return;
    const std::size_t from = std::exchange(running_, next);
    swap(fibers_[from], fibers_[next]);
  }

  /// Back to `execute`, for good.
  void leave() {
    const std::size_t from = std::exchange(running_, nobody);
    swap(fibers_[from], fibers_[nobody]);
    std::abort();
  }

  static void swap(fiber& from, fiber& to) {
    if (_setjmp(from.left_at) != 0) return;
    _longjmp(std::exchange(to.begun, true) ? to.left_at : to.beginning, 1);
  }

  /// Gives a fiber its stack and runs it up to its beginning.
  void make(fiber& made) {
    made.stack.reset(new std::byte[stack_bytes]);
    ucontext_t context;
    ::getcontext(&context);
    context.uc_stack.ss_sp = made.stack.get();
    context.uc_stack.ss_size = stack_bytes;
    context.uc_link = nullptr;
    starting = {this, &made};
    ::makecontext(&context, &world::fiber_main, 0);
    if (_setjmp(fibers_[nobody].left_at) == 0) ::setcontext(&context);
  }

  static inline struct {
    world* in;
    fiber* which;
  } starting{};

  /// Never returns. Whoever begins an execution comes back into it, whatever stood on the stack above.
  static void fiber_main() {
    world& self = *starting.in;
    if (_setjmp(starting.which->beginning) == 0) _longjmp(self.fibers_[nobody].left_at, 1);
    self.run_(self.scenario_, self.running_);
    self.me().state = done;
    self.note("done", "", 0, 0);
    self.give_way();
  }

  template <class Scenario, class... Arguments>
  bool execute(const Arguments&... arguments) {
    used_words_ = 0;
    outside_ = {};
    fenced_ = {};
    trace_.clear();
    failure_ = nullptr;
    running_ = nobody;
    depth_ = steps_ = preemptions_ = old_reads_ = spurious_ = 0;
    thread_count_ = Scenario::names.size();
    static_assert(Scenario::names.size() <= most_threads);
    Scenario scenario{arguments...};
    scenario_ = &scenario;
    run_ = [](void* which, std::size_t thread) { static_cast<Scenario*>(which)->run(thread); };
    if constexpr (requires { scenario.may_rest(); }) {
      may_rest_ = [](void* which) { return static_cast<Scenario*>(which)->may_rest(); };
    } else {
      may_rest_ = nullptr;
    }
    for (std::size_t i = 0; i < thread_count_; ++i) {
      threads_[i] = {};
      // What the constructor did comes before every thread.
      threads_[i].seen = threads_[i].released = outside_.seen;
      fibers_[i].begun = false;
    }
    running_ = walking_ ? random() % thread_count_ : choose(static_cast<unsigned>(thread_count_));
    swap(fibers_[nobody], fibers_[running_]);
    // After the last thread, as join would have it.
    if (failure_ == nullptr) {
      for (std::size_t i = 0; i < thread_count_; ++i) outside_.seen.join(threads_[i].seen);
      scenario.finish();
    }
    return failure_ == nullptr;
  }

  template <class Scenario>
  outcome failed(outcome result) {
    result.failed = true;
    result.report = failure_;
    result.report += walking_ ? "\n  on a random walk, execution " : "\n  in the exhaustive part, execution ";
    result.report += std::to_string(result.executions);
    for (const auto& taken : trace_) {
      char line[160];
      std::snprintf(line, sizeof line, taken.what[0] == '\0' ? "\n  %-10s %s" : "\n  %-10s %-26s %-14s %llu%s",
                    taken.thread == nobody ? "outside" : Scenario::names[taken.thread], taken.operation, taken.what,
                    static_cast<unsigned long long>(taken.value), taken.age == 0 ? "" : "  (old)");
      result.report += line;
    }
    return result;
  }

  std::array<word, most_words> words_;
  std::size_t used_words_ = 0;
  view fenced_;  // the global view of seq_cst fences
  std::array<thread, most_threads> threads_;
  thread outside_;
  std::size_t thread_count_ = 0;
  std::size_t running_ = nobody;
  std::array<fiber, most_threads + 1> fibers_;
  void* scenario_ = nullptr;
  void (*run_)(void*, std::size_t) = nullptr;
  bool (*may_rest_)(void*) = nullptr;

  bounds bounds_;
  std::vector<choice> path_;
  std::size_t depth_ = 0;
  std::uint64_t steps_ = 0;
  unsigned preemptions_ = 0;
  unsigned old_reads_ = 0;
  unsigned spurious_ = 0;
  bool walking_ = false;
  std::uint64_t random_ = 0;
  std::vector<step> trace_;
  const char* failure_ = nullptr;
};

/// The one world: the scheduler is single-threaded.
inline world& the_world() {
  static world one;
  return one;
}

inline void check(bool holds, const char* otherwise) {
  the_world().check(holds, otherwise);
}

/// In the place of std::atomic.
template <class T>
class atomic {
  static_assert(std::is_unsigned_v<T> && sizeof(T) <= 8);

 public:
  atomic() : atomic{T{0}} {}
  atomic(T value) : id_{the_world().new_word(value)} {}  // NOLINT: as std::atomic
  atomic(const atomic&) = delete;
  atomic& operator=(const atomic&) = delete;

  T load(std::memory_order order) const noexcept { return static_cast<T>(the_world().load(id_, order)); }
  void store(T value, std::memory_order order) noexcept { the_world().store(id_, value, order); }
  T exchange(T value, std::memory_order order) noexcept {
    return static_cast<T>(the_world().exchange(id_, value, order));
  }
  bool compare_exchange_strong(T& expected, T desired, std::memory_order success, std::memory_order failure) noexcept {
    std::uint64_t found = expected;
    const bool done = the_world().compare_exchange(id_, found, desired, success, failure);
    expected = static_cast<T>(found);
    return done;
  }

  /// For traces.
  atomic& name(const char* name) noexcept {
    the_world().at(id_).name = name;
    return *this;
  }
  /// Plants a fault: every store to this word, or load of it, becomes relaxed; of a read-modify-write that half.
  void weaken_stores() noexcept { the_world().at(id_).weak_stores = true; }
  void weaken_loads() noexcept { the_world().at(id_).weak_loads = true; }
  [[nodiscard]] std::size_t id() const noexcept { return id_; }

 private:
  std::size_t id_;
};

/// In the place of the lane's slot: plain memory that knows who may touch it.
template <class T>
class slot {
 public:
  template <class U>
  void put(U&& value) {
    auto& clocks = touch();
    check(clocks[writer_] >= written_, "data race: a slot is written over another write");
    for (std::size_t i = 0; i < most_threads; ++i) {
      check(clocks[i] >= read_[i], "data race: a slot is written while another thread reads it");
    }
    if (the_world().running() != nobody) {
      writer_ = the_world().running();
      written_ = clocks[writer_];
    }
    value_ = std::forward<U>(value);
    filled_ = true;
  }

  T take() {
    auto& clocks = touch();
    check(filled_, "a slot is read before anything was written");
    check(clocks[writer_] >= written_, "data race: a slot is read while another thread writes it");
    if (the_world().running() != nobody) read_[the_world().running()] = clocks[the_world().running()];
    return value_;
  }

 private:
  static std::array<std::uint16_t, most_threads>& touch() {
    auto& self = the_world();
    auto& clocks = self.running_view().clocks;
    // A clock of its own for each access: a release that came before must not cover it.
    if (self.running() != nobody) ++clocks[self.running()];
    return clocks;
  }

  T value_{};
  bool filled_ = false;
  std::size_t writer_ = 0;
  std::uint16_t written_ = 0;
  std::array<std::uint16_t, most_threads> read_{};
};

/// The policy for strait.ring.
struct atomics {
  template <class T>
  using atomic = model::atomic<T>;
  template <class T>
  using slot = model::slot<T>;
};

/// The policy for strait.park. `Kind` is strait::store_load, which this header need not import.
struct waiting : atomics {
  template <class Kind>
  static void light_barrier(Kind kind) noexcept {
    if (kind == Kind::by_fence) the_world().fence();
  }
  template <class Kind>
  static void heavy_barrier(Kind kind) noexcept {
    if (kind == Kind::by_fence) {
      the_world().fence();
    } else {
      the_world().fence_everywhere();
    }
  }
};

/// The kernel's futex on a word. False: timed out.
inline bool futex_sleep(atomic<std::uint32_t>& word, std::uint32_t value, bool may_time_out = false) {
  return the_world().futex_sleep(word.id(), value, may_time_out);
}
inline void futex_wake(atomic<std::uint32_t>& word) {
  the_world().futex_wake(word.id());
}

/// The kernel's eventfd.
class eventfd {
 public:
  void write() {
    the_world().point();
    ++count_;
    ++writes_;
    the_world().note("eventfd: write", "count", count_, 0);
  }
  void read() {
    the_world().point();
    the_world().note("eventfd: read", "count", count_, 0);
    count_ = 0;
  }
  /// What poll does.
  void wait() {
    the_world().wait_until([](const void* count) { return *static_cast<const std::uint64_t*>(count) > 0; }, &count_,
                           "eventfd");
  }
  [[nodiscard]] std::uint64_t writes() const noexcept { return writes_; }

 private:
  std::uint64_t count_ = 0;
  std::uint64_t writes_ = 0;
};

/// A mutex with the order of one. `owned` stands for what it protects between threads of one process.
class mutex {
 public:
  void lock() {
    the_world().wait_until([](const void* held) { return !*static_cast<const bool*>(held); }, &held_, "mutex");
    held_ = true;
    the_world().running_view().join(left_);
  }
  /// Nobody need come in before it: whoever would meet the lock waits, and all else can as well happen after it.
  void unlock() {
    left_ = the_world().running_view();
    held_ = false;
  }

 private:
  bool held_ = false;
  view left_;
};

}  // namespace model
