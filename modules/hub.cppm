module;
#include <chrono>
#include <coroutine>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
export module strait.hub;

import strait.error;
export import strait.endpoint;

/// The hub: what coroutines wait on. One lives in each Asio execution context, as a service of it, and needs no
/// registration by the user; `<strait/asio.hpp>` finds it from an executor.
///
/// While there is traffic a hub keeps one handler in the context's own `run()`, the turn. It looks at the lanes that are
/// waited for and completes what is ready, in place, for a slice of time; then it posts itself again, so that sockets and
/// timers have theirs. When nothing was ready for as long as its spin budget, it parks: it announces its doorbell in the
/// word of every end, pays one barrier, looks once more, and leaves the context to sleep in its reactor.
///
/// | state    | who changes it                            | what follows                                    |
/// |----------|-------------------------------------------|-------------------------------------------------|
/// | idle     | the turn, when nobody waits but timers    | `run()` returns, unless a timer is set           |
/// | resident | whoever finds it idle or parked, by CAS   | exactly one turn is posted or running            |
/// | parked   | the turn                                  | the doorbell, the alarm or a new waiter makes it resident |
export namespace strait {

class hub;

/// One operation that waits. It lives in the awaiter or in the operation's own memory, and is on one hub at most.
struct hub_waiter {
  /// The end whose word the peer reads; null for one that only wants its turn.
  endpoint* end = nullptr;
  /// Looks whether the operation can go on; null: it always can. `alone`: no other operation waits on this hub, so a
  /// pause harms nobody.
  bool (*ready)(hub_waiter& self, bool alone) noexcept = nullptr;
  /// Goes on. Called once, by the turn, when the waiter is on no list any more; `self` may be gone when it returns.
  void (*complete)(hub_waiter& self) = nullptr;
  /// The context is being destroyed: frees what the operation owns, without going on.
  void (*abandon)(hub_waiter& self) noexcept = nullptr;

  hub* owner = nullptr;
  hub_waiter* previous = nullptr;
  hub_waiter* next = nullptr;
};

/// One thing that waits for a time. It lives in the awaiter, and is on one hub at most.
struct hub_timer {
  /// When, in nanoseconds of `std::chrono::steady_clock`.
  std::int64_t due = 0;
  /// Goes on. Called once, by the turn, when the timer is on no hub any more; `self` may be gone when it returns.
  void (*complete)(hub_timer& self) = nullptr;

  hub* owner = nullptr;
  /// Its place in the hub's heap.
  std::size_t place = 0;
};

/// Where an operation waits.
struct wait_place {
  hub& where;
  /// What Asio's operations are to complete on, a `const asio::any_io_executor*`; null: the hub's own executor.
  const void* executor = nullptr;
};

/// What nobody awaits, a coroutine for instance, and what the context destroys when it is destroyed itself.
struct hub_root {
  void (*destroy)(hub_root& self) noexcept = nullptr;
  hub_root* previous = nullptr;
  hub_root* next = nullptr;
};

class hub {
 public:
  /// The hub whose turn this thread is in, or that of the worker that this thread is; null elsewhere.
  [[nodiscard]] static inline hub* current() noexcept { return current_; }
  /// Makes `of_worker` the current hub of this thread outside turns.
  ///
  /// Waits: never. Allocates: never. Errors: none. Complexity: constant.
  static inline void set_current(hub* of_worker) noexcept { current_ = of_worker; }

  /// Has the turn complete `waiter` when it is ready. From any thread; within a turn it costs a list insertion.
  ///
  /// Waits: never. Allocates: never. Errors: none. Complexity: constant.
  virtual void wait(hub_waiter& waiter) noexcept = 0;

  /// Takes the waiter off, if it still waits; false: it does not, it is being completed or was. The caller sees to it that
  /// `waiter` lives until then.
  ///
  /// Waits: for the slice of a turn that runs on another thread. Cancel safety: cannot be cancelled. Allocates: never.
  /// Errors: none. Complexity: constant.
  virtual bool withdraw(hub_waiter& waiter) noexcept = 0;

  /// Has the turn complete `timer` when its time has come: within a slice beside traffic, through the reactor
  /// otherwise.
  ///
  /// Waits: for the slice of a turn that runs on another thread. Cancel safety: cannot be cancelled. Allocates: when more
  /// timers wait than ever before. Errors: `std::bad_alloc`. Complexity: logarithmic in how many wait.
  virtual void wait_until(hub_timer& timer) = 0;
  /// Takes the timer off, if it still waits; false: it does not.
  ///
  /// Waits: for the slice of a turn that runs on another thread. Cancel safety: cannot be cancelled. Allocates: never.
  /// Errors: none. Complexity: logarithmic in how many wait.
  virtual bool withdraw(hub_timer& timer) noexcept = 0;

  /// While it lives, what waits on the hub changes by this thread only: no turn runs on another. So several waits begin
  /// or end as one; within a turn it costs nothing. Nothing is completed meanwhile.
  ///
  /// Waits: for the slice of a turn that runs on another thread. Cancel safety: cannot be cancelled. Allocates: never.
  /// Errors: none. Complexity: constant.
  class [[nodiscard]] visit {
   public:
    inline explicit visit(hub& of) noexcept : of_{of}, entered_{of.enter()} {}
    inline ~visit() {
      if (entered_) of_.leave();
    }
    visit(const visit&) = delete;
    visit& operator=(const visit&) = delete;

   private:
    hub& of_;
    bool entered_;
  };

  /// Completes `waiter`, which is on no list, as the turn does: in place, and never beside a turn on another thread.
  /// For handlers of the hub's own context, on the thread that runs them.
  ///
  /// Waits: for the slice of a turn that runs on another thread. Cancel safety: cannot be cancelled. Allocates: never.
  /// Errors: what leaves the coroutine. Complexity: that of the coroutine.
  virtual void resume(hub_waiter& waiter) = 0;

  /// Whether the context is being destroyed: what waits is freed, and nothing of the context's may be asked to cancel.
  [[nodiscard]] virtual bool ending() const noexcept = 0;

  /// From now on nothing but this hub uses the context (`false`), so a turn need not end for the sake of others; or
  /// something may (`true`, the first state).
  ///
  /// Waits: never. Allocates: never. Errors: none. Complexity: constant.
  virtual void share(bool shared) noexcept = 0;

  /// From now on a turn ends after one round; what waits stays waiting.
  ///
  /// Waits: never. Allocates: never. Errors: none. Complexity: constant.
  virtual void stop() noexcept = 0;

  /// Gives whatever can go on now its turn, once, and then destroys every root. In a handler of the hub's own context.
  ///
  /// Waits: for the slice of a turn that runs on another thread. Cancel safety: nobody awaits it. Allocates: never.
  /// Errors: the first that left a coroutine, after that. Complexity: linear in how many wait.
  virtual void end_roots() = 0;

  /// What nobody awaits lives from here ...
  ///
  /// Waits: for the slice of a turn that runs on another thread. Cancel safety: cannot be cancelled. Allocates: never.
  /// Errors: none. Complexity: constant.
  virtual void add_root(hub_root& root) noexcept = 0;
  /// The same, to here.
  virtual void remove_root(hub_root& root) noexcept = 0;
  /// Has the context's `run()` throw `error` when the turn ends; of several, the first.
  ///
  /// Waits: for the slice of a turn that runs on another thread. Cancel safety: cannot be cancelled. Allocates: never.
  /// Errors: that one. Complexity: constant.
  virtual void throw_out(std::exception_ptr error) noexcept = 0;

 protected:
  hub() = default;
  ~hub() = default;
  static constinit thread_local hub* current_;

 private:
  /// For `visit`. False: this thread is within a turn or a visit already, and does not leave it.
  virtual bool enter() noexcept = 0;
  virtual void leave() noexcept = 0;
};

/// The hub of a coroutine: that of its task, or that of this thread; null where there is none.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
template <class Promise>
[[nodiscard]] hub* hub_of_coroutine(std::coroutine_handle<Promise> awaiting) noexcept {
  if constexpr (requires { awaiting.promise().environment(); }) {
    if (void* of_task = awaiting.promise().environment()) return static_cast<hub*>(of_task);
  }
  return hub::current();
}

/// The hub that a coroutine waits on.
///
/// Waits: never. Allocates: never. Errors: `no_hub` when there is none. Complexity: constant.
template <class Promise>
[[nodiscard]] hub& hub_to_wait_on(std::coroutine_handle<Promise> awaiting) {
  hub* const found = hub_of_coroutine(awaiting);
  if (found == nullptr) {
    fail(errc::no_hub,
         "a coroutine has to wait: expected a strait::task, an asio::awaitable or a thread of strait::runtime, found "
         "none of them");
  }
  return *found;
}

/// Waits for a time. What `sleep_for` and `sleep_until` return.
class [[nodiscard]] sleep_operation {
 public:
  explicit inline sleep_operation(std::int64_t due) noexcept { timer_.due = due; }
  /// Moved only before it waits.
  inline sleep_operation(sleep_operation&& other) noexcept { timer_.due = other.timer_.due; }
  sleep_operation& operator=(sleep_operation&&) = delete;
  inline ~sleep_operation() {
    if (timer_.owner != nullptr) timer_.owner->withdraw(timer_);
  }

  [[nodiscard]] inline bool await_ready() const noexcept { return false; }
  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> awaiting) {
    timer_.awaiting = awaiting;
    timer_.complete = [](hub_timer& timer) { static_cast<sleeper&>(timer).awaiting.resume(); };
    hub_to_wait_on(awaiting).wait_until(timer_);
  }
  inline void await_resume() const noexcept {}

  /// When it ends, in nanoseconds of `std::chrono::steady_clock`.
  [[nodiscard]] inline std::int64_t due() const noexcept { return timer_.due; }

 private:
  struct sleeper : hub_timer {
    std::coroutine_handle<> awaiting;
  };
  sleeper timer_;
};

/// Gives the others their turn. What `yield` returns.
class [[nodiscard]] yield_operation {
 public:
  yield_operation() = default;
  /// Moved only before it waits.
  inline yield_operation(yield_operation&&) noexcept {}
  yield_operation& operator=(yield_operation&&) = delete;
  inline ~yield_operation() {
    if (turn_.owner != nullptr) turn_.owner->withdraw(turn_);
  }

  [[nodiscard]] inline bool await_ready() const noexcept { return false; }
  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> awaiting) {
    turn_.awaiting = awaiting;
    turn_.complete = [](hub_waiter& waiter) { static_cast<next_turn&>(waiter).awaiting.resume(); };
    hub_to_wait_on(awaiting).wait(turn_);
  }
  inline void await_resume() const noexcept {}

 private:
  struct next_turn : hub_waiter {
    std::coroutine_handle<> awaiting;
  };
  next_turn turn_;
};

/// Lets everybody else on this hub who is ready have their turn, and goes on. To be awaited; yields nothing.
///
/// Waits: for the turns of the others. Cancel safety: destroying the coroutine ends the wait. Allocates: never. Errors:
/// `no_hub` in a coroutine that is neither a `task` nor on a thread of strait's. Complexity: constant.
[[nodiscard]] inline yield_operation yield() noexcept {
  return {};
}

/// A length in nanoseconds, rounded up; from 0 to what `longest` is where it is less or more than that.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
template <class Rep, class Period>
[[nodiscard]] std::int64_t nanoseconds_within(std::chrono::duration<Rep, Period> length, std::int64_t longest) {
  // In floating point, because hours::max() in nanoseconds would overflow.
  const double about = std::chrono::duration<double, std::nano>{length}.count();
  if (!(about > 0)) return 0;
  if (about >= static_cast<double>(longest)) return longest;
  return std::chrono::ceil<std::chrono::nanoseconds>(length).count();
}

/// The latest time that anybody waits for.
inline constexpr std::int64_t latest_due = std::numeric_limits<std::int64_t>::max() - 1;

/// Suspends the coroutine for at least `length`. To be awaited; yields nothing. A length of zero lets everybody else
/// who is ready have their turn.
///
/// Waits: in the hub, which sleeps meanwhile. Cancel safety: destroying the coroutine ends the wait. Allocates: when
/// more sleep on this hub than ever before. Errors: `no_hub` in a coroutine that is neither a `task` nor on a thread of
/// strait's; `std::bad_alloc`. Complexity: logarithmic in how many sleep on this hub.
template <class Rep, class Period>
[[nodiscard]] sleep_operation sleep_for(std::chrono::duration<Rep, Period> length) {
  const std::int64_t now = now_ns();
  return sleep_operation{now + nanoseconds_within(length, latest_due - now)};
}

/// The same, until `when`, or for no longer than its turn takes to come where that has passed.
template <class Duration>
[[nodiscard]] sleep_operation sleep_until(std::chrono::time_point<std::chrono::steady_clock, Duration> when) {
  return sleep_operation{nanoseconds_within(when.time_since_epoch(), latest_due)};
}

}  // namespace strait
