module;
#include <version>

#include <chrono>
#include <concepts>
#include <coroutine>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <system_error>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#ifdef __cpp_lib_jthread
#include <stop_token>
#endif

#include "strait/asio_names.hpp"
export module strait.select;

import strait.hub;
import strait.task;
export import strait.channel;

/// Waiting for whichever of several things comes first: `select`, and what bounds a wait, `timeout`, `deadline` and
/// `stop_on`. All of them are one mechanism, the selection: it has each of its operations wait in the hub at once, so the
/// hub parks once for all of them; the first that can go on decides, and the others are withdrawn before anything is
/// taken. Then the one that decided does what it does, as if it had been awaited alone.
///
/// Most operations can be withdrawn at any moment, because they take nothing before they finish. Those that cannot, the
/// operations of Asio, are cancelled and waited for. If one of them was done all the same, then it has *committed*, and it
/// decides in place of the first: the first has taken nothing yet.
///
/// | stage    | entered by                          | what the hub knows of it                                          |
/// |----------|-------------------------------------|-------------------------------------------------------------------|
/// | quiet    | first; and when all are withdrawn   | nothing                                                           |
/// | waiting  | `wait`, in a visit to the hub       | each operation that waits                                         |
/// | settling | the first to go on, in a turn       | those of Asio that were cancelled and have not ended yet          |
///
/// Everything here is changed in a turn of the hub or in a visit to it, which exclude each other.
export namespace strait {

/// What an operation waits by; see the parts of one at the top of `strait.channel`.
template <class T>
concept waiting_operation = requires(T& operation, const wait_place& place, hub& where, hub_waiter& waiter) {
  { operation.look(false) } -> std::same_as<bool>;
  { operation.wait(place, waiter) } -> std::same_as<bool>;
  { operation.withdraw(where, waiter) } -> std::same_as<bool>;
  operation.finish();
};

/// Where a selection begins to look, out of `count`: somewhere else each time, so that an operation that can always go on
/// keeps no other from its turn. `turn_due`: whether this one lets the others of its hub have theirs.
struct selection_start {
  std::uint32_t first = 0;
  bool turn_due = false;
};
[[nodiscard]] selection_start start_selection(std::uint32_t count) noexcept;

/// Operations of which one is to go on: what `select_operation` and limits are made of.
///
/// Waits: never; what it begins does. Allocates: never. Errors: those of the operations. Complexity: linear in them.
template <class... Operations>
class selection {
 public:
  static constexpr std::uint32_t count = sizeof...(Operations);
  static_assert(count > 0 && count <= 32, "expected 1 to 32 operations");

  explicit selection(Operations... operations) : branches_{branch<Operations>{{}, std::move(operations)}...} {}
  /// Moved only before it waits.
  selection(selection&&) = default;
  selection& operator=(selection&&) = delete;
  ~selection() { forsake(); }

  /// Whether one can go on; it is then the one that does.
  [[nodiscard]] bool look(bool) noexcept { return look_from(start_selection(count).first); }

  bool wait(const wait_place& place, hub_waiter& parent) {
    return wait_from(start_selection(count).first, place, parent);
  }

  /// False: it has been decided, or something has to end first; the parent is being completed, or will be.
  bool withdraw(hub& where, hub_waiter&) noexcept {
    const hub::visit visiting{where};
    if (stage_ != stage::waiting) return false;
    return settle();
  }

  /// Whether one of them has done what cannot be undone.
  [[nodiscard]] bool committed() noexcept { return committed_one() != none; }

  /// Ends the wait; nobody is completed.
  void forsake() noexcept {
    if (stage_ == stage::quiet) return;
    const hub::visit visiting{*where_};
    stage_ = stage::quiet;
    for_each([&](auto& of, std::uint32_t index) {
      if ((waiting_ & bit(index)) == 0) return;
      if constexpr (requires { of.operation.forsake(); }) {
        of.operation.forsake();
      } else {
        (void)of.operation.withdraw(*where_, of);
      }
    });
    waiting_ = 0;
  }

 protected:
  static constexpr std::uint32_t none = count;

  template <std::size_t I>
  [[nodiscard]] auto& operation() noexcept {
    return std::get<I>(branches_).operation;
  }

  [[nodiscard]] bool look_from(std::uint32_t first) noexcept {
    if (const std::uint32_t done = committed_one(); done != none) {
      winner_ = done;
      return true;
    }
    if (winner_ != none && look_at(winner_)) return true;
    for (std::uint32_t i = 0; i < count; ++i) {
      const std::uint32_t index = (first + i) % count;
      if (!look_at(index)) continue;
      winner_ = index;
      return true;
    }
    return false;
  }

  bool wait_from(std::uint32_t first, const wait_place& place, hub_waiter& parent) {
    // Until all of them wait none may be completed. When the visit ends another thread may complete the parent, and this
    // object be gone.
    const hub::visit visiting{place.where};
    where_ = &place.where;
    parent_ = &parent;
    winner_ = none;
    stage_ = stage::waiting;
    try {
      for (std::uint32_t i = 0; i < count && winner_ == none; ++i) {
        const std::uint32_t index = (first + i) % count;
        // Before it waits, so that one that fails half-way is withdrawn, too.
        waiting_ |= bit(index);
        if (begin(index, place)) continue;
        waiting_ &= ~bit(index);
        winner_ = index;
      }
    } catch (...) {
      forsake();
      throw;
    }
    return winner_ == none || !settle();
  }

  /// Who goes on: an operation that has committed, otherwise the first that could. To be called once all are withdrawn.
  [[nodiscard]] std::uint32_t decide() noexcept {
    const std::uint32_t done = committed_one();
    return done != none ? done : winner_;
  }

  std::uint32_t winner_ = none;

 private:
  enum class stage : std::uint8_t { quiet, waiting, settling };

  template <class Operation>
  struct branch final : hub_waiter {
    Operation operation;
    selection* of = nullptr;
    std::uint32_t index = 0;
  };

  static constexpr std::uint32_t bit(std::uint32_t index) noexcept { return std::uint32_t{1} << index; }

  /// Calls `use(branch, index)` for each.
  template <class Use>
  void for_each(Use use) {
    [&]<std::size_t... Is>(std::index_sequence<Is...>) {
      (use(std::get<Is>(branches_), static_cast<std::uint32_t>(Is)), ...);
    }(std::index_sequence_for<Operations...>{});
  }
  /// What `use(branch)` yields for the one at `index`.
  template <class Use>
  bool at(std::uint32_t index, Use use) {
    bool result = false;
    [&]<std::size_t... Is>(std::index_sequence<Is...>) {
      (void)((Is == index && (result = use(std::get<Is>(branches_)), true)) || ...);
    }(std::index_sequence_for<Operations...>{});
    return result;
  }

  [[nodiscard]] bool look_at(std::uint32_t index) noexcept {
    return at(index, [](auto& of) { return of.operation.look(false); });
  }

  [[nodiscard]] std::uint32_t committed_one() noexcept {
    std::uint32_t found = none;
    for_each([&](auto& of, std::uint32_t index) {
      if constexpr (requires { of.operation.committed(); }) {
        if (found == none && of.operation.committed()) found = index;
      }
    });
    return found;
  }

  bool begin(std::uint32_t index, const wait_place& place) {
    return at(index, [&](auto& of) {
      using branch_type = std::remove_reference_t<decltype(of)>;
      of.of = this;
      of.index = index;
      of.ready = [](hub_waiter& waiter, bool alone) noexcept {
        return static_cast<branch_type&>(waiter).operation.look(alone);
      };
      of.complete = [](hub_waiter& waiter) {
        auto& me = static_cast<branch_type&>(waiter);
        me.of->completed(me.index);
      };
      return of.operation.wait(place, of);
    });
  }

  /// In a turn: this one can go on, or has ended after it was cancelled.
  void completed(std::uint32_t index) {
    waiting_ &= ~bit(index);
    if (stage_ == stage::settling) {
      if (--unsettled_ != 0) return;
    } else {
      winner_ = index;
      if (!settle()) return;
    }
    stage_ = stage::quiet;
    parent_->complete(*parent_);  // this object may be gone when it returns
  }

  /// Withdraws all that wait. False: some of them have to end first.
  bool settle() noexcept {
    stage_ = stage::settling;
    // One for ourselves: what ends while it is being withdrawn must not be the last.
    unsettled_ = 1;
    for_each([&](auto& of, std::uint32_t index) {
      if ((waiting_ & bit(index)) == 0) return;
      ++unsettled_;
      if (!of.operation.withdraw(*where_, of)) return;
      --unsettled_;
      waiting_ &= ~bit(index);
    });
    if (--unsettled_ != 0) return false;
    stage_ = stage::quiet;
    return true;
  }

  std::tuple<branch<Operations>...> branches_;
  hub* where_ = nullptr;
  hub_waiter* parent_ = nullptr;
  /// Bits of those that wait, or were cancelled and have not ended.
  std::uint32_t waiting_ = 0;
  std::uint32_t unsettled_ = 0;
  stage stage_ = stage::quiet;
};

// ---- what can be selected ------------------------------------------------------------------------------------------

/// A time to wait for, as an operation: what `sleep_for` is in a selection, and the limit of `timeout` and `deadline`.
class time_operation {
 public:
  static constexpr bool sets_errors = false;
  /// A limit that lets the operation go on which it limits, if that can.
  static constexpr bool yields = true;

  /// At `due`, in nanoseconds of the steady clock.
  [[nodiscard]] static inline time_operation at(std::int64_t due) noexcept { return time_operation{due, 0}; }
  /// `length` nanoseconds after it begins to wait.
  [[nodiscard]] static inline time_operation after(std::int64_t length) noexcept {
    return time_operation{unset, length};
  }

  /// Moved only before it waits.
  inline time_operation(time_operation&& other) noexcept : length_{other.length_} { timer_.due = other.timer_.due; }
  time_operation& operator=(time_operation&&) = delete;
  inline ~time_operation() {
    if (timer_.owner != nullptr) timer_.owner->withdraw(timer_);
  }

  [[nodiscard]] inline bool ready_now() const noexcept { return false; }
  [[nodiscard]] inline bool look(bool) const noexcept { return timer_.due != unset && timer_.due <= now_ns(); }
  inline bool wait(const wait_place& place, hub_waiter& waiter) {
    if (timer_.due == unset) {
      const std::int64_t now = now_ns();
      timer_.due = length_ < latest_due - now ? now + length_ : latest_due;
    }
    timer_.waiter = &waiter;
    timer_.complete = [](hub_timer& timer) {
      hub_waiter& waiting = *static_cast<waiting_timer&>(timer).waiter;
      waiting.complete(waiting);
    };
    place.where.wait_until(timer_);
    return true;
  }
  inline bool withdraw(hub& where, hub_waiter&) noexcept { return where.withdraw(timer_); }
  inline void finish() const noexcept {}
  inline void finish_cancelled(std::error_code why) const { throw std::system_error{why, "a sleep"}; }

  /// As a limit: whether it is reached before anything began; the clock is read only by those who wait.
  [[nodiscard]] inline bool reached() const noexcept { return false; }
  [[nodiscard]] inline std::error_code reason() const noexcept { return std::make_error_code(std::errc::timed_out); }

 private:
  static constexpr std::int64_t unset = -1;
  struct waiting_timer : hub_timer {
    hub_waiter* waiter = nullptr;
  };
  inline time_operation(std::int64_t due, std::int64_t length) noexcept : length_{length} { timer_.due = due; }
  waiting_timer timer_;
  std::int64_t length_;
};

#ifdef __cpp_lib_jthread
/// A `std::stop_token` as a limit.
///
/// Whoever requests the stop does it on its own thread, at any moment: it only has the hub look again, which any thread
/// may. The callback is gone, or has returned, before the waiter is: `std::stop_callback` sees to that.
class stop_operation {
 public:
  /// A stop that was requested ends the operation even where it could go on: who is never without a message would
  /// otherwise never stop.
  static constexpr bool yields = false;

  explicit inline stop_operation(std::stop_token token) noexcept : token_{std::move(token)} {}
  /// Moved only before it waits.
  inline stop_operation(stop_operation&& other) noexcept : token_{std::move(other.token_)} {}
  stop_operation& operator=(stop_operation&&) = delete;

  [[nodiscard]] inline bool look(bool) const noexcept { return token_.stop_requested(); }
  inline bool wait(const wait_place& place, hub_waiter& waiter) {
    // Calls at once when the stop was requested already.
    callback_.emplace(token_, wake{&place.where, &waiter});
    return true;
  }
  inline bool withdraw(hub& where, hub_waiter& waiter) noexcept {
    callback_.reset();  // waits for a call that another thread is in; that one waits for nobody
    if (waiter.owner != nullptr) where.withdraw(waiter);
    return true;
  }
  inline void finish() const noexcept {}

  [[nodiscard]] inline bool reached() const noexcept { return token_.stop_requested(); }
  [[nodiscard]] inline std::error_code reason() const noexcept {
    return std::make_error_code(std::errc::operation_canceled);
  }

 private:
  struct wake {
    hub* where;
    hub_waiter* waiter;
    inline void operator()() const noexcept { where->wait(*waiter); }
  };
  std::stop_token token_;
  std::optional<std::stop_callback<wake>> callback_;
};
#endif

/// A task as an operation: it runs beside the others from when they wait, and is destroyed when it has not ended first.
template <class T>
class task_operation {
 public:
  static constexpr bool sets_errors = false;

  explicit task_operation(task<T> what) noexcept : task_{std::move(what)} {}
  /// Moved only before it waits.
  task_operation(task_operation&& other) noexcept : task_{std::move(other.task_)} {}
  task_operation& operator=(task_operation&&) = delete;
  ~task_operation() { forsake(); }

  [[nodiscard]] bool ready_now() const noexcept { return false; }
  [[nodiscard]] bool look(bool) const noexcept { return ended_; }
  [[nodiscard]] bool committed() const noexcept { return ended_; }
  bool wait(const wait_place& place, hub_waiter& waiter) {
    if (!runner_) {
      runner_ = run(*this).frame;
      runner_.promise().of = this;
      runner_.promise().where = &place.where;
      runner_.resume();
    }
    // Only now: what ends before it has to wait completes nobody.
    if (!ended_) waiter_ = &waiter;
    return !ended_;
  }
  /// It goes on until it is destroyed, and may yet end.
  bool withdraw(hub& where, hub_waiter& waiter) noexcept {
    waiter_ = nullptr;
    if (waiter.owner != nullptr) where.withdraw(waiter);
    return true;
  }
  void forsake() noexcept {
    if (waiter_ != nullptr && waiter_->owner != nullptr) waiter_->owner->withdraw(*waiter_);
    waiter_ = nullptr;
    if (runner_) std::exchange(runner_, nullptr).destroy();
  }
  T finish() {
    if (error_) std::rethrow_exception(error_);
    if constexpr (!std::is_void_v<T>) return std::move(*result_);
  }
  T finish_cancelled(std::error_code why) {
    forsake();
    throw std::system_error{why, "a task"};
  }

 private:
  /// The coroutine around the task, that tells of its end.
  struct runner {
    struct promise_type {
      static void* operator new(std::size_t bytes) { return allocate_frame(bytes); }
      static void operator delete(void* frame, std::size_t bytes) noexcept { free_frame(frame, bytes); }

      runner get_return_object() noexcept { return {std::coroutine_handle<promise_type>::from_promise(*this)}; }
      std::suspend_always initial_suspend() const noexcept { return {}; }
      struct last_step {
        [[nodiscard]] bool await_ready() const noexcept { return false; }
        void await_suspend(std::coroutine_handle<promise_type> ended) const noexcept {
          task_operation& operation = *ended.promise().of;
          operation.ended_ = true;
          // Who waits for it goes on with the next look, and not from in here: it destroys this frame, and may throw.
          if (operation.waiter_ != nullptr) ended.promise().where->wait(*operation.waiter_);
        }
        void await_resume() const noexcept {}
      };
      last_step final_suspend() const noexcept { return {}; }
      void return_void() const noexcept {}
      void unhandled_exception() noexcept { of->error_ = std::current_exception(); }
      /// Handed down to everything that the task awaits; see task_promise_base.
      [[nodiscard]] void* environment() const noexcept { return where; }

      task_operation* of = nullptr;
      hub* where = nullptr;
    };
    std::coroutine_handle<promise_type> frame;
  };
  static runner run(task_operation& self) {
    if constexpr (std::is_void_v<T>) {
      co_await self.task_;
    } else {
      self.result_.emplace(co_await self.task_);
    }
  }

  task<T> task_;
  std::optional<result_or_monostate<T>> result_;
  std::exception_ptr error_;
  hub_waiter* waiter_ = nullptr;
  bool ended_ = false;
  std::coroutine_handle<typename runner::promise_type> runner_;
};

/// An operation that somebody else holds and that goes on when it loses, so that it can be in the next selection.
template <class Operation>
class lent_operation {
 public:
  static constexpr bool sets_errors = Operation::sets_errors;
  using result = decltype(std::declval<Operation&>().finish());

  explicit lent_operation(Operation& operation) noexcept : operation_{&operation} {}
  [[nodiscard]] bool ready_now() const noexcept { return operation_->look(false); }
  [[nodiscard]] bool look(bool) const noexcept { return operation_->look(false); }
  bool wait(const wait_place& place, hub_waiter& waiter) { return operation_->wait_lent(place, waiter); }
  bool withdraw(hub&, hub_waiter&) noexcept {
    operation_->withdraw_lent();
    return true;
  }
  result finish() { return operation_->finish_lent(); }
  result finish_cancelled(std::error_code why) { return operation_->finish_cancelled(why); }

 private:
  Operation* operation_;
};

/// What awaiting an object yields.
///
/// Waits: never. Allocates: never. Errors: those of the object. Complexity: constant.
template <class T>
decltype(auto) awaiter_of(T&& what) {
  if constexpr (requires { std::forward<T>(what).operator co_await(); }) {
    return std::forward<T>(what).operator co_await();
  } else if constexpr (requires { operator co_await(std::forward<T>(what)); }) {
    return operator co_await(std::forward<T>(what));
  } else {
    return std::forward<T>(what);
  }
}
template <class T>
using await_result = decltype(awaiter_of(std::declval<T>()).await_resume());

template <class T>
inline constexpr bool is_awaited_operation = false;
template <class Operation, class Executor>
inline constexpr bool is_awaited_operation<asio::awaitable<awaited<Operation>, Executor>> = true;
template <class T>
inline constexpr bool is_task = false;
template <class T>
inline constexpr bool is_task<task<T>> = true;

/// What can be selected or limited: operations of channels, of Asio with `use_op`, sleeps, tasks, and everything else that
/// a task can await.
template <class T>
concept selectable = std::move_constructible<T> &&
                     (is_awaited_operation<T> || waiting_operation<T> || requires { typename await_result<T>; });

/// A task that awaits the object and yields a copy of what that yields.
///
/// Waits: as the object. Cancel safety: as the object. Allocates: one frame. Errors: as the object. Complexity: as the
/// object.
template <class T>
[[nodiscard]] task<std::decay_t<await_result<T>>> as_task(T what) {
  co_return co_await std::move(what);
}

/// The operation that an awaitable is in a selection.
///
/// Waits: never. Allocates: one frame where it has to be awaited by a task. Errors: `std::bad_alloc` then. Complexity:
/// constant.
template <selectable T>
[[nodiscard]] auto as_operation(T&& what) {
  if constexpr (std::is_lvalue_reference_v<T>) {
    return lent_operation<std::remove_reference_t<T>>{what};
  } else if constexpr (is_awaited_operation<T>) {
    return std::move(what).take_operation();
  } else if constexpr (waiting_operation<T>) {
    return std::move(what);
  } else if constexpr (std::is_same_v<T, sleep_operation>) {
    return time_operation::at(what.due());
  } else if constexpr (is_task<T>) {
    return task_operation<typename T::value_type>{std::move(what)};
  } else {
    return task_operation<std::decay_t<await_result<T>>>{as_task(std::move(what))};
  }
}
template <class T>
using operation_in = decltype(as_operation(std::declval<T>()));

/// The executor of the coroutines of Asio that can await it: that of the first operation that has one.
template <class... Ts>
struct executor_in {
  using type = asio::any_io_executor;
};
template <class Operation, class Executor, class... Rest>
struct executor_in<asio::awaitable<awaited<Operation>, Executor>, Rest...> {
  using type = Executor;
};
template <class First, class... Rest>
struct executor_in<First, Rest...> : executor_in<Rest...> {};

// ---- select --------------------------------------------------------------------------------------------------------

/// What `select` yields: which of its operations was done, counted from 0, and what it yielded.
///
///     auto [index, result] = co_await strait::select(orders.recv(), strait::sleep_for(1s));
///     if (index == 0) fill(std::get<0>(result));
template <class... Ts>
struct selected {
  std::size_t index = 0;
  /// `std::monostate` for those that yield nothing.
  std::variant<Ts...> result;
};

template <class... Operations>
class select_operation : public selection<Operations...> {
  using base = selection<Operations...>;

 public:
  static constexpr bool sets_errors = false;
  using result = selected<result_or_monostate<std::decay_t<decltype(std::declval<Operations&>().finish())>>...>;

  using base::base;

  [[nodiscard]] bool ready_now() noexcept {
    const selection_start start = start_selection(base::count);
    return !start.turn_due && base::look_from(start.first);
  }

  result finish() {
    const std::uint32_t which = base::decide();
    std::optional<result> done;
    [&]<std::size_t... Is>(std::index_sequence<Is...>) {
      (void)((Is == which && (finish_one<Is>(done), true)) || ...);
    }(std::index_sequence_for<Operations...>{});
    // Before it returns: no task of them outlives it, wherever the whole stands in an expression.
    [&]<std::size_t... Is>(std::index_sequence<Is...>) {
      (drop(base::template operation<Is>()), ...);
    }(std::index_sequence_for<Operations...>{});
    return std::move(*done);
  }
  result finish_cancelled(std::error_code why) { throw std::system_error{why, "a select"}; }

 private:
  template <std::size_t I>
  void finish_one(std::optional<result>& done) {
    auto& operation = base::template operation<I>();
    if constexpr (std::is_void_v<decltype(operation.finish())>) {
      operation.finish();
      done.emplace(result{I, decltype(result::result){std::in_place_index<I>}});
    } else {
      done.emplace(result{I, decltype(result::result){std::in_place_index<I>, operation.finish()}});
    }
  }
  template <class Operation>
  static void drop(Operation& operation) noexcept {
    if constexpr (requires { operation.forsake(); }) operation.forsake();
  }
};

/// Waits for whichever of the operations can go on first, does that one, and no other. To be awaited, in a task, an
/// `asio::awaitable` or any other coroutine; yields `selected`: its index and what it yielded.
///
///     auto [index, result] = co_await strait::select(rx_a.recv(), rx_b.recv(), tx.send(7), strait::sleep_for(1s));
///
/// It looks at them from a random one on, so none is starved by another that can always go on. The others took nothing,
/// sent nothing and lost nothing: their messages are where they were. An operation that ends with an error counts as one
/// that can go on: its error is thrown, or set where it was asked for so (`rx.recv(error)`).
///
/// A task among them runs from when the others wait, and is destroyed before `select` returns when it was not the first
/// to end. An operation of Asio (`use_op`) begins then, too; when another was first it is cancelled and waited for, and if
/// it was done all the same it is the one that is yielded, and the other is not done. Given by name, as
/// `auto read = socket.async_read_some(buffer, strait::use_op)`, it is only lent: it goes on when it loses, keeps what it
/// ends with for the next selection that it is in, and is cancelled when it is destroyed.
///
/// Waits: in the hub; a hub parks once for all of them. Cancel safety: as that of its operations: destroying or
/// cancelling it while it waits takes nothing. Allocates: never for channels and times, unless more times are waited for
/// on this hub than ever before; one frame for each task. Errors: those of the operation that was done. Complexity:
/// linear in how many there are.
template <selectable... Ts>
  requires(sizeof...(Ts) > 0)
[[nodiscard]] auto select(Ts&&... operations) {
  using operation = select_operation<operation_in<Ts>...>;
  return asio::awaitable<awaited<operation>, typename executor_in<Ts...>::type>{
      operation{as_operation(std::forward<Ts>(operations))...}};
}

/// Runs the tasks beside each other until the first ends, by returning or by an exception, and destroys the others, which
/// takes nothing from their channels. To be awaited; yields `selected`: the index of the first and what it returned. Tasks
/// behind one that ends before it first waits are never begun.
///
/// Waits: as the tasks do. Cancel safety: destroying it destroys the tasks. Allocates: one frame for each. Errors: what
/// left the first to end. Complexity: linear.
template <class... Ts>
  requires(sizeof...(Ts) > 0)
[[nodiscard]] auto when_any(task<Ts>... tasks) {
  return select(std::move(tasks)...);
}

// ---- limits --------------------------------------------------------------------------------------------------------

/// An operation and what ends its wait.
template <class Operation, class Limit>
class limited_operation : public selection<Operation, Limit> {
  using base = selection<Operation, Limit>;

 public:
  static constexpr bool sets_errors = Operation::sets_errors;
  using result = decltype(std::declval<Operation&>().finish());

  using base::base;

  [[nodiscard]] bool ready_now() noexcept {
    if (limit().reached()) {
      base::winner_ = limit_wins;
      return true;
    }
    base::winner_ = operation_wins;
    return operation().ready_now();
  }
  [[nodiscard]] bool look(bool) noexcept { return base::look_from(Limit::yields ? operation_wins : limit_wins); }
  bool wait(const wait_place& place, hub_waiter& parent) { return base::wait_from(operation_wins, place, parent); }

  result finish() {
    if (base::decide() == limit_wins && !(Limit::yields && operation().look(false))) {
      return operation().finish_cancelled(limit().reason());
    }
    return operation().finish();
  }
  result finish_cancelled(std::error_code why) { return operation().finish_cancelled(why); }

 private:
  static constexpr std::uint32_t operation_wins = 0;
  static constexpr std::uint32_t limit_wins = 1;
  [[nodiscard]] auto& operation() noexcept { return base::template operation<0>(); }
  [[nodiscard]] auto& limit() noexcept { return base::template operation<1>(); }
};

/// How an operation is limited: what stands behind the `|`.
struct time_limit {
  std::int64_t nanoseconds;
  bool from_now;
  [[nodiscard]] inline time_operation operation() const noexcept {
    return from_now ? time_operation::after(nanoseconds) : time_operation::at(nanoseconds);
  }
};

/// Ends an operation that has waited for `length`:
///
///     auto order = co_await (orders.recv() | strait::timeout(5ms));
///
/// The error is `std::errc::timed_out`, thrown or set as the operation's own errors are. The time counts from when the
/// operation has to wait, so one that need not wait reads no clock. It took nothing and lost nothing; a message that is
/// there when the time is over is taken. What a send that timed out would have sent is destroyed with it. Everything that
/// can be selected can be limited: sends, `select` itself, tasks, which are then destroyed, and operations of Asio, which
/// are then cancelled.
///
/// Waits: as the operation, and no longer than that. Cancel safety: as the operation. Allocates: when more times are
/// waited for on this hub than ever before. Errors: the operation's, and `std::errc::timed_out`. Complexity: constant,
/// logarithmic in how many times are waited for when it has to wait.
template <class Rep, class Period>
[[nodiscard]] time_limit timeout(std::chrono::duration<Rep, Period> length) {
  return {nanoseconds_within(length, latest_due), true};
}

/// The same, at a time of the steady clock: `orders.recv() | strait::deadline(end_of_slice)`.
template <class Duration>
[[nodiscard]] time_limit deadline(std::chrono::time_point<std::chrono::steady_clock, Duration> when) {
  return {nanoseconds_within(when.time_since_epoch(), latest_due), false};
}

#ifdef __cpp_lib_jthread
struct stop_limit {
  std::stop_token token;
  [[nodiscard]] inline stop_operation operation() const noexcept { return stop_operation{token}; }
};

/// Ends an operation when a stop is requested, from whichever thread, or was requested before:
///
///     while (auto order = co_await (orders.recv(error) | strait::stop_on(token))) match(*order);
///
/// The error is `std::errc::operation_canceled`, thrown or set as the operation's own errors are. A stop that was requested
/// wins over a message that is there, so a receiver that always finds one stops, too; the message stays.
///
/// Waits: as the operation. Cancel safety: as the operation. Allocates: what `std::stop_callback` does, nothing with
/// libstdc++. Errors: the operation's, and `std::errc::operation_canceled`. Complexity: constant; one load more than the
/// operation when it does not have to wait.
[[nodiscard]] inline stop_limit stop_on(std::stop_token token) noexcept {
  return {std::move(token)};
}
#endif

/// `timeout(...)`, `deadline(...)` and `stop_on(...)`.
template <class T>
concept limit_of_wait = requires(const T& limit) {
  { limit.operation().reason() } -> std::same_as<std::error_code>;
};

/// Limits an operation; see `timeout`. Several limits may follow each other.
template <selectable T, limit_of_wait Limit>
[[nodiscard]] auto operator|(T&& operation, const Limit& limit) {
  using limited = limited_operation<operation_in<T>, decltype(limit.operation())>;
  return asio::awaitable<awaited<limited>, typename executor_in<T>::type>{
      limited{as_operation(std::forward<T>(operation)), limit.operation()}};
}

}  // namespace strait
