module;
#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <coroutine>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>

#include "strait/asio_names.hpp"
export module strait.channel;

import strait.error;
import strait.hub;
export import strait.endpoint;

/// The handles: `sender<T>` and `receiver<T>`, and every operation in every form.
///
/// An operation is an object with these parts, and each form is one way of putting them together:
///
///  - `ready_now()`: can it go on without waiting? Bounded, so that a coroutine that always finds something still lets
///    its neighbours have their turn.
///  - `look()`: the same for a waiter, which also looks at what happened to the peer.
///  - `wait(place, waiter)`, `withdraw(hub, waiter)`: has the waiter completed when the operation can go on, or not any
///    more. Operations that wait for several things, as those of `strait.select`, do this in their own way.
///  - `finish()`: does it. A message leaves the ring only here, or in the next, both once whoever asked for it is there
///    to take it: an operation that is cancelled or destroyed while it waits has taken nothing.
///  - `at_once()`, where an operation has it: does it without waiting, when nothing but the lane must be looked at. What
///    `outcome()` then returns is made the result by `result_of(outcome)`, where there is one.
export namespace strait {

/// What a message type is called across processes. Specialise it for types of your own: the name and version are
/// compared when an end enters a channel. Never derived from a compiler's spelling, which differs between compilers.
///
///     template <> struct strait::message_traits<Order> {
///       static constexpr std::string_view name = "Order";   // up to 63 characters
///       static constexpr std::uint32_t version = 1;
///     };
template <class T>
struct message_traits {
  static constexpr std::string_view name = [] {
    constexpr std::string_view integers[] = {"i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64"};
    if constexpr (std::is_same_v<T, bool>) {
      return std::string_view{"bool"};
    } else if constexpr (std::is_integral_v<T> && sizeof(T) <= 8) {
      constexpr std::size_t size = sizeof(T) == 1 ? 0 : sizeof(T) == 2 ? 1 : sizeof(T) == 4 ? 2 : 3;
      return integers[(std::is_signed_v<T> ? 0 : 4) + size];
    } else if constexpr (std::is_same_v<T, float>) {
      return std::string_view{"f32"};
    } else if constexpr (std::is_same_v<T, double>) {
      return std::string_view{"f64"};
    } else {
      return std::string_view{};
    }
  }();
  static constexpr std::uint32_t version = 0;
};

/// The shape that a segment's header tells of `T`.
template <class T>
inline constexpr message_shape shape_of = [] {
  static_assert(alignof(T) <= 4096,
                "a lane begins where a page does, so a message cannot be aligned to more than that");
  static_assert(message_traits<T>::name.size() < 64, "a message type's name has up to 63 characters");
  return message_shape{message_traits<T>::name, message_traits<T>::version, static_cast<std::uint32_t>(sizeof(T)),
                       static_cast<std::uint32_t>(alignof(T))};
}();

/// How many messages an awaited operation takes or puts without suspending before its coroutine lets others have their
/// turn once. A suspension costs some tens of nanoseconds, so this is invisible in the mean; its length is what a
/// neighbour waits at most.
inline constexpr std::uint64_t ready_budget = 1024;

/// Whether the operation on message number `cursor` gives the others their turn. The cursor counts already, so that the
/// budget costs no counter of its own.
[[nodiscard]] constexpr bool turn_due(std::uint64_t cursor) noexcept {
  return cursor % ready_budget == ready_budget - 1;
}

/// The first such cursor from this one on.
[[nodiscard]] constexpr std::uint64_t next_turn(std::uint64_t cursor) noexcept {
  return cursor | (ready_budget - 1);
}

/// The same for batches, which may step over that cursor each time.
class batch_turn {
 public:
  batch_turn() = default;
  inline explicit batch_turn(std::uint64_t cursor) noexcept : stretch_{cursor / ready_budget} {}
  /// Whether the batch that begins at `cursor` gives the others their turn: it is the first of its stretch.
  [[nodiscard]] inline bool due(std::uint64_t cursor) noexcept {
    return std::exchange(stretch_, cursor / ready_budget) != cursor / ready_budget;
  }

 private:
  std::uint64_t stretch_ = 0;
};

/// Sees to it, in debug builds, that a handle is used by one thread at a time: the lane's private cursors are not
/// atomic, and two threads in them lose or double messages without a sign. Moving a handle from thread to thread is
/// fine.
class single_user {
 public:
  single_user() = default;
  inline single_user(const single_user&) noexcept {}  // whom a copied or moved handle is used by begins anew
  inline single_user& operator=(const single_user&) noexcept { return *this; }

  /// While it lives, the handle is this thread's.
  class [[nodiscard]] use {
   public:
#ifdef NDEBUG
    inline explicit use(const single_user&) noexcept {}
#else
    inline explicit use(const single_user& handle) noexcept : handle_{&handle} {
      const auto me = static_cast<std::uintptr_t>(::pthread_self());
      std::uintptr_t user = 0;
      // relaxed: a detector of mistakes, and not a lock that anything may lean on.
      outermost_ = handle.user_.compare_exchange_strong(user, me, std::memory_order_relaxed);
      if (!outermost_ && user != me) two_users();
    }
    inline ~use() {
      if (outermost_) handle_->user_.store(0, std::memory_order_relaxed);
    }
    use(const use&) = delete;
    use& operator=(const use&) = delete;

   private:
    const single_user* handle_;
    bool outermost_ = false;
#endif
  };

 private:
  /// Says so and aborts. There in every build, because a debug build may import what is installed from a release build.
  [[noreturn]] static void two_users() noexcept;
#ifndef NDEBUG
  mutable std::atomic<std::uintptr_t> user_{0};
#endif
};

template <class T>
class sender;
template <class T>
class receiver;

/// An operation, awaitable in any coroutine: in `asio::awaitable` directly, because it is one of its specialisations
/// and so passes Asio's `await_transform`; in every other coroutine because it has an `operator co_await`. Both lead to
/// an awaiter of our own, which suspends only when it has to wait.
template <class Operation>
struct awaited {};

/// Whether a promise is that of an `asio::awaitable`, which must be resumed by Asio and by nobody else.
template <class T>
inline constexpr bool is_asio_awaitable = false;
template <class T, class Executor>
inline constexpr bool is_asio_awaitable<asio::awaitable<T, Executor>> = true;
template <class Promise>
concept asio_promise =
    requires(Promise& promise) { requires is_asio_awaitable<decltype(promise.get_return_object())>; };

/// As much as an operation that was done at once tells its awaiter: a small message, or where a larger one lies.
inline constexpr std::size_t at_once_outcome_bytes = 2 * sizeof(void*);

/// An operation that may be done without waiting, when nothing but the lane must be looked at.
template <class Operation>
concept done_at_once_operation = requires(Operation& operation) { operation.at_once(); };

/// The awaiter of every operation.
///
/// Waits: in the hub of the coroutine's executor; that of its task; or that of this thread. Cancel safety: destroying
/// it while it waits takes nothing. Allocates: never, unless an `asio::awaitable` has to suspend, which takes one frame
/// from Asio's cache. Errors: `no_hub` when a coroutine that is neither Asio's nor a `task` has to wait where no hub
/// is. Complexity: constant.
template <class Operation, class Executor>
class operation_awaiter {
 public:
  /// Of an operation that is not done.
  explicit operation_awaiter(Operation&& operation) : operation_{std::move(operation)} {}
  /// Of one that was done at once. Writes no more than it must: see `co_await`.
  template <class Outcome>
  explicit operation_awaiter(const Outcome& outcome) noexcept : done_at_once_{1} {
    static_assert(std::is_trivially_destructible_v<Operation>, "an operation that is done at once is never destroyed");
    static_assert(sizeof(Outcome) <= sizeof outcome_);
    std::memcpy(&outcome_, &outcome, sizeof(Outcome));
  }
  operation_awaiter(const operation_awaiter&) = delete;
  operation_awaiter& operator=(const operation_awaiter&) = delete;
  ~operation_awaiter() {
    if (suspended_ != nullptr) [[unlikely]]
      suspended_->destroy(*this);
    if constexpr (!done_at_once_operation<Operation>) operation_.~Operation();
  }

  [[nodiscard, gnu::always_inline]] bool await_ready() noexcept { return done_at_once() || operation_.ready_now(); }

  template <class Promise>
  bool await_suspend(std::coroutine_handle<Promise> awaiting) {
    if constexpr (asio_promise<Promise>) {
      asio_suspension<Operation, Executor>::suspend(*this, awaiting);
    } else {
      hub* where = hub_of_coroutine(awaiting);
      if (where == nullptr) {
        // Ready, and only meant to let others have their turn: here is nobody who could give it back.
        if (operation_.look(false)) return false;
        where = &hub_to_wait_on(awaiting);  // says so
      }
      auto* waiting = ::new (static_cast<void*>(suspension_)) plain_suspension;
      waiting->self = this;
      waiting->awaiting = awaiting;
      waiting->ready = [](hub_waiter& waiter, bool alone) noexcept {
        return static_cast<plain_suspension&>(waiter).self->operation_.look(alone);
      };
      waiting->complete = [](hub_waiter& waiter) {
        auto& me = static_cast<plain_suspension&>(waiter);
        me.self->suspended_ = nullptr;
        me.awaiting.resume();
      };
      static constexpr suspended_operations plain{
          .destroy =
              [](operation_awaiter& self) noexcept {
                if constexpr (requires { self.operation_.forsake(); }) {
                  self.operation_.forsake();
                } else {
                  auto* me = std::launder(reinterpret_cast<plain_suspension*>(self.suspension_));
                  if (me->owner != nullptr) me->owner->withdraw(*me);
                }
              },
          .resume = nullptr};  // not suspended any more when it resumes
      suspended_ = &plain;
      // When it waits another thread may resume us: nothing of this object is touched after.
      if (!operation_.wait(wait_place{*where}, *waiting)) {
        suspended_ = nullptr;
        return false;
      }
    }
    return true;
  }

  [[gnu::always_inline]] decltype(auto) await_resume() {
    // Said here, where both ways meet, so that the compiler need not ask in the destructor.
    struct nothing_suspended {
      operation_awaiter& self;
      ~nothing_suspended() { self.suspended_ = nullptr; }
    } guard{*this};
    using result = decltype(operation_.finish());
    if constexpr (done_at_once_operation<Operation>) {
      // Read before it is known to be there: in a block of its own the read would be shared with awaiters that waited, and
      // the outcome would have to be in memory for it.
      const auto outcome = outcome_;
      if (done_at_once()) [[likely]] {
        if constexpr (std::is_void_v<result>) {
          return;
        } else {
          return result(std::in_place, Operation::result_of(outcome));
        }
      }
    }
    return finish();
  }

 private:
  friend struct asio_suspension<Operation, Executor>;

  struct plain_suspension : hub_waiter {
    operation_awaiter* self = nullptr;
    std::coroutine_handle<> awaiting;
  };

  /// What to do with `suspension_`.
  struct suspended_operations {
    void (*destroy)(operation_awaiter&) noexcept;
    /// Asio has something to say first: that the wait was cancelled.
    void (*resume)(operation_awaiter&);
  };

  [[nodiscard, gnu::always_inline]] bool done_at_once() const noexcept {
    if constexpr (done_at_once_operation<Operation>) {
      return done_at_once_ != 0;
    } else {
      return false;
    }
  }

  /// Out of line: a result that came from two places in one function would cost each message the choice between them.
  [[gnu::noinline]] auto finish() {
    if (suspended_ != nullptr) [[unlikely]] {
      if constexpr (Operation::sets_errors) {
        if (const std::error_code cancelled = reason_to_stop()) return operation_.finish_cancelled(cancelled);
      } else {
        end_suspension();
      }
    }
    return operation_.finish();
  }

  /// Throws when the wait was cancelled.
  void end_suspension() {
    struct destroy_after {
      operation_awaiter& self;
      ~destroy_after() { self.suspended_->destroy(self); }
    } guard{*this};
    suspended_->resume(*this);
  }

  /// What Asio throws when the wait was cancelled, for an operation that sets its errors.
  [[gnu::noinline]] std::error_code reason_to_stop() {
    try {
      end_suspension();
      return {};
    } catch (const std::system_error& cancelled) {
      return cancelled.code();
    }
  }

  /// If the operation was done at once; then there never was an `operation_`. Zeros otherwise, though nobody reads them:
  /// what every awaiter overwrites need not be written by one that is done.
  std::array<std::byte, at_once_outcome_bytes> outcome_{};
  /// Not a bool, whose loads clang 19 does not follow from one block into another.
  std::uint32_t done_at_once_ = 0;
  /// Null unless `suspension_` holds something.
  const suspended_operations* suspended_ = nullptr;
  union {
    Operation operation_;
  };
  /// Nothing is written here unless the operation waits.
  alignas(plain_suspension) std::byte suspension_[sizeof(plain_suspension)];
};

}  // namespace strait

/// What an operation of a handle returns: the operation, until it is awaited.
export template <class Operation, class Executor>
class [[nodiscard]] asio::awaitable<strait::awaited<Operation>, Executor> {
 public:
  explicit awaitable(Operation operation) noexcept : operation_{std::move(operation)} {}
  /// The operation itself, for whoever makes it part of another before it is awaited.
  [[nodiscard]] Operation take_operation() && noexcept { return std::move(operation_); }
  awaitable(awaitable&&) noexcept = default;
  /// The same operation for coroutines of another executor.
  template <class Other>
  explicit awaitable(awaitable<strait::awaited<Operation>, Other>&& other) noexcept
      : operation_{std::move(other).take_operation()} {}
  awaitable& operator=(awaitable&&) = delete;

  /// Does the operation where that needs no look at anything but the lane; otherwise it is the awaiter's.
  ///
  /// Here, and not in the awaiter's `await_ready`, because an awaiter lies in the coroutine's frame, and what is written
  /// into a frame is written for every message: a compiler cannot know that nobody reads it. This object has not
  /// been anywhere yet, so its members are registers, and an awaiter is told no more than that all is done.
  [[nodiscard, gnu::always_inline]] strait::operation_awaiter<Operation, Executor> operator co_await() && {
    using awaiter = strait::operation_awaiter<Operation, Executor>;
    if constexpr (strait::done_at_once_operation<Operation>) {
      if (operation_.at_once()) [[likely]]
        return awaiter{operation_.outcome()};
    }
    return awaiter{std::move(operation_)};
  }

 private:
  Operation operation_;
};

namespace strait {

/// Turns what happened to the peer into what the caller asked for.
[[gnu::cold]] void report(news why, std::error_code* error, const std::string& channel);

/// Errors of an operation are thrown ...
export struct errors_thrown {
  static constexpr bool set = false;
  static constexpr std::error_code* code = nullptr;
};
/// ... or set. Two types, so that the throwing form, which is on everybody's path, carries no pointer.
export struct errors_set {
  static constexpr bool set = true;
  std::error_code* code;
};

/// The steps that all operations share. `Derived` has `finish(news&)`.
template <class Derived, class Errors>
class operation_base {
 public:
  static constexpr bool sets_errors = Errors::set;

  explicit operation_base(Errors errors) noexcept : errors_{errors} {}

  /// Does it; throws, or sets the caller's error code.
  [[gnu::always_inline]] decltype(auto) finish() {
    auto& self = static_cast<Derived&>(*this);
    news why = news::none;
    if constexpr (std::is_void_v<decltype(self.finish(why))>) {
      self.finish(why);
      if (why != news::none || errors_.code != nullptr) [[unlikely]]
        report(why, errors_.code, self.end_name());
    } else {
      auto result = self.finish(why);
      if (why != news::none || errors_.code != nullptr) [[unlikely]]
        report(why, errors_.code, self.end_name());
      return result;
    }
  }

  /// Ends it without having done anything more, for a reason that is not the channel's: thrown or set.
  auto finish_cancelled(std::error_code why) {
    auto& self = static_cast<Derived&>(*this);
    using result = decltype(self.finish(std::declval<news&>()));
    if constexpr (!Errors::set) {
      throw std::system_error{why, self.end_name()};
      return result();
    } else {
      *errors_.code = why;
      if constexpr (requires { self.sent(); }) {
        return self.sent();
      } else {
        return result();
      }
    }
  }

  /// Has `waiter` completed, in a turn, when the operation can go on; its `ready` is the operation's `look`. False: it can
  /// go on already, and nobody waits.
  bool wait(const wait_place& place, hub_waiter& waiter) noexcept {
    auto& self = static_cast<Derived&>(*this);
    if constexpr (requires { self.wait_begins(); }) self.wait_begins();
    waiter.end = self.end();
    place.where.wait(waiter);
    return true;
  }
  /// False: the waiter does not wait any more, it is being completed or was.
  bool withdraw(hub& where, hub_waiter& waiter) noexcept { return where.withdraw(waiter); }

 private:
  [[no_unique_address]] Errors errors_;
};

}  // namespace strait

export namespace strait {

/// What an awaitable operation of a handle returns.
template <class Operation>
using awaitable_operation = asio::awaitable<awaited<Operation>, asio::any_io_executor>;

/// How far ahead of a cursor its owner fetches slots. A line that the other CPU wrote takes some 100 to 200 ns to come,
/// in which dozens of messages could be handled; the out-of-order window of a CPU reaches over one or two lines, and
/// the hardware's own prefetcher does not cross lines that are modified elsewhere in time.
inline constexpr std::size_t bytes_ahead = 512;

/// How many messages ahead that is, and for how many it is done together: a stretch.
template <class T>
inline constexpr std::uint64_t messages_ahead = sizeof(T) >= bytes_ahead ? 1 : std::bit_floor(bytes_ahead / sizeof(T));

/// The first cursor of the stretch after that of this one.
template <class T>
[[nodiscard]] constexpr std::uint64_t next_stretch(std::uint64_t cursor) noexcept {
  return (cursor | (messages_ahead<T> - 1)) + 1;
}

/// Calls `use` with an address in each line of the `count` slots from number `first` on; `mask` wraps them.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: linear in the lines.
template <class Slot, class Use>
void for_each_line(const Slot* slots, std::uint64_t mask, std::uint64_t first, std::uint64_t count, Use use) noexcept {
  constexpr std::uint64_t step = sizeof(Slot) >= 64 ? 1 : 64 / sizeof(Slot);
  for (std::uint64_t i = 0; i < count; i += step) {
    const auto* bytes = reinterpret_cast<const std::byte*>(&slots[(first + i) & mask]);
    for (std::size_t at = 0; at < sizeof(Slot); at += 64) use(bytes + at);
  }
}

/// Room for messages that was reserved in the lane itself. Fill `messages()` in place and `commit`; dropping the permit
/// sends nothing. The sender sends nothing else meanwhile.
template <class T>
class [[nodiscard]] permit {
 public:
  permit() = default;
  permit(permit&& other) noexcept
      : sender_{std::exchange(other.sender_, nullptr)}, messages_{std::exchange(other.messages_, {})} {}
  permit& operator=(permit&& other) noexcept {
    std::swap(sender_, other.sender_);
    std::swap(messages_, other.messages_);
    return *this;
  }

  /// Where the messages go; as many as asked for, or fewer: what was free without a gap.
  [[nodiscard]] std::span<T> messages() const noexcept { return messages_; }

  /// Sends the first `n` messages.
  ///
  /// Waits: never. Allocates: never. Errors: none. Complexity: one store.
  void commit(std::size_t n) noexcept {
    n = std::min(n, messages_.size());
    if (n != 0) sender_->commit(n);  // an empty permit may have no sender
    messages_ = {};
  }
  /// The same, of all of them.
  void commit() noexcept { commit(messages_.size()); }

 private:
  friend class sender<T>;
  permit(sender<T>& from, std::span<T> messages) noexcept : sender_{&from}, messages_{messages} {}
  sender<T>* sender_ = nullptr;
  std::span<T> messages_;
};

/// The sending end of a channel. Used by one thread at a time; the destructor closes.
///
/// Every operation reports `errc::closed` when the receiver closed, `errc::peer_died` once when its process died (the
/// handle stays usable: what is sent next goes to a replacement), and `errc::corrupt` when the shared memory holds an
/// impossible value. An operation that reports an error sent nothing; `send_many` tells how much it had sent before.
template <class T>
class sender {
 public:
  using value_type = T;

  /// One message to be sent.
  template <class Errors = errors_thrown>
  class send_operation : public operation_base<send_operation<Errors>, Errors> {
   public:
    send_operation(sender& from, T message, Errors errors) noexcept(std::is_nothrow_move_constructible_v<T>)
        : operation_base<send_operation, Errors>{errors}, sender_{&from}, message_{std::move(message)} {}
    using operation_base<send_operation, Errors>::finish;
    [[nodiscard]] bool ready_now() noexcept { return sender_->ready_now(); }
    /// Sends it if there is room, the receiver is awake and nobody's turn is due.
    [[nodiscard, gnu::always_inline]] bool at_once() noexcept
      requires(!Errors::set && std::is_trivially_copyable_v<T>)
    {
      if (!sender_->can_send_at_once()) [[unlikely]]
        return false;
      sender_->push_at_once(message_);
      return true;
    }
    [[nodiscard]] char outcome() const noexcept { return 0; }  // nothing to tell
    [[nodiscard]] bool look(bool) noexcept { return sender_->look(); }
    [[gnu::always_inline]] void finish(news& why) {
      if (sender_->fails(why)) [[unlikely]]
        return;
      sender_->push(std::move(message_));
    }
    [[nodiscard]] endpoint* end() const noexcept { return sender_->end_.get(); }
    [[nodiscard]] const std::string& end_name() const noexcept { return sender_->name(); }

   private:
    sender* sender_;
    T message_;
  };

  /// Many messages to be sent.
  template <class Errors = errors_thrown>
  class send_many_operation : public operation_base<send_many_operation<Errors>, Errors> {
   public:
    send_many_operation(sender& from, std::span<const T> messages, Errors errors) noexcept
        : operation_base<send_many_operation, Errors>{errors}, sender_{&from}, messages_{messages} {}
    using operation_base<send_many_operation, Errors>::finish;
    [[nodiscard]] bool ready_now() noexcept { return !sender_->batch_turn_.due(sender_->lane_.tail()) && go_on(); }
    [[nodiscard]] bool look(bool) noexcept { return go_on(); }
    std::size_t finish(news& why) {
      if (!messages_.empty()) (void)sender_->fails(why);  // it says why
      return sent_;
    }
    [[nodiscard]] std::size_t sent() const noexcept { return sent_; }
    [[nodiscard]] endpoint* end() const noexcept { return sender_->end_.get(); }
    [[nodiscard]] const std::string& end_name() const noexcept { return sender_->name(); }

   private:
    bool go_on() noexcept {
      while (!messages_.empty()) {
        if (!sender_->look()) return false;
        if (sender_->ending_ != news::none) return true;
        const std::size_t n = sender_->push_many(messages_);
        messages_ = messages_.subspan(n);
        sent_ += n;
      }
      return true;
    }
    sender* sender_;
    std::span<const T> messages_;
    std::size_t sent_ = 0;
  };

  /// Room to be reserved.
  template <class Errors = errors_thrown>
  class reserve_operation : public operation_base<reserve_operation<Errors>, Errors> {
   public:
    reserve_operation(sender& from, std::size_t n, Errors errors) noexcept
        : operation_base<reserve_operation, Errors>{errors}, sender_{&from}, count_{n} {}
    using operation_base<reserve_operation, Errors>::finish;
    [[nodiscard]] bool ready_now() noexcept { return sender_->batch_ready_now(); }
    [[nodiscard]] bool look(bool) noexcept { return sender_->look(); }
    permit<T> finish(news& why) {
      if (sender_->fails(why)) return {};
      return {*sender_, sender_->free_span(count_)};
    }
    [[nodiscard]] endpoint* end() const noexcept { return sender_->end_.get(); }
    [[nodiscard]] const std::string& end_name() const noexcept { return sender_->name(); }

   private:
    sender* sender_;
    std::size_t count_;
  };

  sender() = default;
  /// For `make_channel` and `open_sender`.
  explicit sender(std::unique_ptr<endpoint> end) noexcept
      : lane_{end->lane(), end->capacity()},
        barrier_{end->barrier()},
        batch_turn_{lane_.tail()},
        end_{std::move(end)} {}
  sender(sender&& other) noexcept { *this = std::move(other); }
  sender& operator=(sender&& other) noexcept {
    if (this == &other) return *this;
    lane_ = std::exchange(other.lane_, {});
    at_once_until_ = std::exchange(other.at_once_until_, 0);
    barrier_ = other.barrier_;
    batch_turn_ = other.batch_turn_;
    ending_ = std::exchange(other.ending_, news::none);
    end_ = std::move(other.end_);
    return *this;
  }

  /// Sends one message, waiting for room. To be awaited; yields nothing.
  ///
  /// Waits: in the hub while the lane is full; never otherwise. Cancel safety: a send that is cancelled or destroyed
  /// while it waits sent nothing. Allocates: never. Errors: as the class says, thrown or set. Complexity: constant.
  [[nodiscard]] awaitable_operation<send_operation<>> send(T message) {
    return awaitable_operation<send_operation<>>{send_operation<>{*this, std::move(message), {}}};
  }
  [[nodiscard]] awaitable_operation<send_operation<errors_set>> send(T message, std::error_code& error) {
    return awaitable_operation<send_operation<errors_set>>{
        send_operation<errors_set>{*this, std::move(message), errors_set{&error}}};
  }

  /// Sends all messages of the span, in contiguous batches that cost one store each. To be awaited; yields how many
  /// were sent, which is all of them unless there was an error. The span must live until then.
  ///
  /// Waits: in the hub while the lane is full. Cancel safety: what was sent before the cancellation stays sent, so
  /// cancel only what may be sent in part. Allocates: never. Errors: as the class says. Complexity: linear.
  [[nodiscard]] awaitable_operation<send_many_operation<>> send_many(std::span<const T> messages)
    requires std::is_trivially_copyable_v<T>
  {
    return awaitable_operation<send_many_operation<>>{send_many_operation<>{*this, messages, {}}};
  }
  [[nodiscard]] awaitable_operation<send_many_operation<errors_set>> send_many(std::span<const T> messages,
                                                                               std::error_code& error)
    requires std::is_trivially_copyable_v<T>
  {
    return awaitable_operation<send_many_operation<errors_set>>{
        send_many_operation<errors_set>{*this, messages, errors_set{&error}}};
  }

  /// Reserves room for 1 to `n` messages in the lane itself. To be awaited; yields a permit.
  ///
  /// Waits: in the hub while the lane is full. Cancel safety: nothing happened. Allocates: never. Errors: as the class
  /// says. Complexity: constant.
  [[nodiscard]] awaitable_operation<reserve_operation<>> reserve(std::size_t n)
    requires std::is_trivially_copyable_v<T>
  {
    return awaitable_operation<reserve_operation<>>{reserve_operation<>{*this, n, {}}};
  }
  [[nodiscard]] awaitable_operation<reserve_operation<errors_set>> reserve(std::size_t n, std::error_code& error)
    requires std::is_trivially_copyable_v<T>
  {
    return awaitable_operation<reserve_operation<errors_set>>{
        reserve_operation<errors_set>{*this, n, errors_set{&error}}};
  }

  /// Sends one message if there is room. False: there is none, and `message` is as it was.
  ///
  /// Waits: never. Allocates: never. Errors: as the class says, thrown or set. Complexity: constant.
  template <class U>
    requires std::is_constructible_v<T, U&&>
  [[nodiscard]] bool try_send(U&& message) {
    return try_send(std::forward<U>(message), nullptr);
  }
  template <class U>
    requires std::is_constructible_v<T, U&&>
  [[nodiscard]] bool try_send(U&& message, std::error_code& error) {
    return try_send(std::forward<U>(message), &error);
  }

  /// Sends one message, blocking the thread while there is no room.
  ///
  /// Waits: spins, then parks on the futex. Cancel safety: only a deadline ends it, and then nothing was sent. Allocates:
  /// never. Errors: as the class says. Complexity: constant.
  void blocking_send(T message) { block(std::move(message), nullptr, std::nullopt); }
  void blocking_send(T message, std::error_code& error) { block(std::move(message), &error, std::nullopt); }
  /// The same, until the deadline: false, or `std::errc::timed_out` in `error`, when it passed and nothing was sent.
  bool blocking_send_until(T message, std::chrono::steady_clock::time_point deadline) {
    return block(std::move(message), nullptr, deadline);
  }
  bool blocking_send_until(T message, std::chrono::steady_clock::time_point deadline, std::error_code& error) {
    return block(std::move(message), &error, deadline);
  }

  /// What was sent is still delivered; then the receiver sees the end. Idempotent.
  ///
  /// Waits: for a named channel at most a second while another end enters or leaves, and another one for the kernel to drop
  /// the locks of a peer that is known to have died. Cancel safety: cannot be cancelled.
  /// Allocates: for a named channel its path. Errors: none. Complexity: constant; some system calls for a named channel.
  void close() noexcept { *this = sender{}; }
  /// Whether the receiver, or this end, closed.
  [[nodiscard]] bool is_closed() const noexcept { return !end_ || end_->peer_closed(); }
  /// Messages sent and not yet released by the receiver, at most an eighth of the capacity more than it has taken.
  [[nodiscard]] std::size_t depth() const noexcept {
    if (!end_) return 0;
    // relaxed: a figure that may be old when it is read. What cannot be is for the next operation to find out.
    const std::uint64_t there = lane_.tail() - end_->lane().head.load(std::memory_order_relaxed);
    return static_cast<std::size_t>(std::min(there, lane_.capacity()));
  }
  [[nodiscard]] std::size_t capacity() const noexcept { return static_cast<std::size_t>(lane_.capacity()); }
  /// Has the disk hold the channel as it is now: what was sent survives a power failure from then on, until it is taken.
  /// (docs/04-memory.md says exactly what, and what not.) For `file:`; of other memory nothing is on a disk, and nothing
  /// is done.
  ///
  /// Waits: for the disk. Cancel safety: cannot be cancelled. Allocates: never. Errors: `closed`, `inherited`, or the
  /// errno of the disk. Complexity: linear in the pages that were written to since the last time.
  void sync() {
    if (!end_) fail(errc::closed, name() + ": expected an open one to be written to the disk");
    end_->sync();
  }
  /// Where the channel is and how it works: memory, nodes and pages, CPUs, how it waits and is woken, and what that costs.
  /// `text()` of the result is for people.
  ///
  /// Waits: never. Allocates: the result. Errors: `closed` for a handle that was closed. Complexity: linear in the pages;
  /// reads /proc, so milliseconds.
  [[nodiscard]] explanation explain() const {
    if (!end_) fail(errc::closed, name() + ": expected an open one to explain");
    return end_->explain();
  }

 private:
  friend class permit<T>;

  [[nodiscard, gnu::always_inline]] native_slot<T>* slots() const noexcept { return slots_of<T>(lane_.control()); }
  [[nodiscard, gnu::always_inline]] std::atomic<std::uint32_t>& receiver_word() const noexcept {
    return segment_of(lane_.control()).ends[static_cast<std::size_t>(role::receiver)].presence;
  }
  /// Not asked of a handle that was closed, which knows of no room.
  [[nodiscard, gnu::always_inline]] bool receiver_is_awake() const noexcept {
    // relaxed: `closed` only has to be seen soon; what a parked receiver needs is in claim_ring.
    return receiver_word().load(std::memory_order_relaxed) == static_cast<std::uint32_t>(presence::awake);
  }

  /// Room, nobody's turn, no fence to execute and an awake receiver: two compares.
  [[nodiscard, gnu::always_inline]] bool can_send_at_once() noexcept {
    if (lane_.tail() >= at_once_until_) [[unlikely]] {
      if (!begin_at_once()) return false;
    }
    return receiver_is_awake();
  }
  /// Whether messages can be sent at once, and up to which: all that is not asked for each of them.
  [[gnu::noinline]] bool begin_at_once() noexcept {
    if (ending_ != news::none || barrier_ == store_load::by_fence) return false;
    const std::uint64_t tail = lane_.tail();
    at_once_until_ = std::min({lane_.room_until(), next_turn(tail), next_stretch<T>(tail)});
    if (tail >= at_once_until_) return false;
    fetch_ahead();
    return true;
  }

  [[nodiscard]] bool ready_now() noexcept {
    if (turn_due(lane_.tail())) return false;
    return (lane_.known_room() != 0 && receiver_is_awake()) || look();
  }

  [[nodiscard]] bool batch_ready_now() noexcept { return !batch_turn_.due(lane_.tail()) && look(); }

  [[gnu::noinline]] bool look() noexcept {
    const single_user::use mine{user_};
    at_once_until_ = 0;  // what this look finds is for the operation that looks next to tell
    if (!end_) {
      ending_ = news::closed;
      return true;
    }
    ending_ = end_->look_at_peer(lane_.tail());
    if (ending_ != news::none || lane_.known_room() != 0 || lane_.look() != 0) return true;
    if (!lane_.corrupt()) return false;
    ending_ = end_->poison();
    return true;
  }

  /// Whether the operation ends without sending; why is the caller's.
  [[nodiscard]] bool fails(news& why) noexcept {
    if (ending_ == news::none) [[likely]]
      return false;
    why = std::exchange(ending_, news::none);
    if (why == news::died) end_->death_reported();
    return true;
  }

  template <class U>
  [[gnu::always_inline]] void push(U&& message) {
    const single_user::use mine{user_};
    fetch_ahead();
    lane_.template push<T>(slots(), std::forward<U>(message));
    published();
  }

  /// The same where `can_send_at_once`: no fence.
  [[gnu::always_inline]] void push_at_once(const T& message) noexcept {
    const single_user::use mine{user_};
    // Before the publication, behind which the compiler would load the pointer to it again.
    std::atomic<std::uint32_t>& receivers_word = receiver_word();
    lane_.template push<T>(slots(), message);
    if (const presence receiver = claim_ring(receivers_word, store_load::by_machine_barrier);
        receiver != presence::awake) [[unlikely]]
      end_->ring(receiver);
  }

  [[gnu::always_inline]] void fetch_ahead() const noexcept {
    // Only slots that are known to be free: the receiver still reads the others.
    if (lane_.tail() % messages_ahead<T> == 0 && lane_.known_room() >= 2 * messages_ahead<T>) [[unlikely]] {
      for_each_line(slots(), lane_.capacity() - 1, lane_.tail() + messages_ahead<T>, messages_ahead<T>,
                    [](const std::byte* line) { prefetch_for_writing(line); });
    }
  }

  /// The one check after a publication: does the receiver sleep?
  [[gnu::always_inline]] void published() noexcept {
    const presence receiver = claim_ring(receiver_word(), barrier_);
    if (receiver != presence::awake) [[unlikely]]
      end_->ring(receiver);
  }

  [[nodiscard]] std::span<T> free_span(std::size_t wanted) noexcept {
    const std::uint64_t at = lane_.tail() & (lane_.capacity() - 1);
    const std::uint64_t to_the_end = lane_.capacity() - at;
    std::uint64_t room = lane_.known_room();
    if (room < wanted) room = lane_.look();
    const std::uint64_t n = std::min({static_cast<std::uint64_t>(wanted), room, to_the_end});
    return {reinterpret_cast<T*>(slots()) + at, static_cast<std::size_t>(n)};
  }

  /// Publishes `n` messages that are in their slots.
  void commit(std::size_t n) noexcept {
    if (n == 1) {
      // A message that is published alone must lie beside `tail`, too.
      push(T{*(reinterpret_cast<const T*>(slots()) + (lane_.tail() & (lane_.capacity() - 1)))});
      return;
    }
    lane_.publish(n);
    published();
  }

  std::size_t push_many(std::span<const T> messages) noexcept {
    const std::span<T> room = free_span(messages.size());
    std::memcpy(static_cast<void*>(room.data()), messages.data(), room.size() * sizeof(T));
    commit(room.size());
    return room.size();
  }

  template <class U>
  bool try_send(U&& message, std::error_code* error) {
    // The budget is for those who could suspend.
    if (lane_.known_room() == 0 || !receiver_is_awake()) [[unlikely]] {
      if (!look()) {
        if (error != nullptr) error->clear();
        return false;
      }
      news why = news::none;
      if (fails(why)) {
        report(why, error, name());
        return false;
      }
    }
    push(std::forward<U>(message));
    if (error != nullptr) [[unlikely]]
      error->clear();
    return true;
  }

  bool block(T message, std::error_code* error, std::optional<std::chrono::steady_clock::time_point> deadline) {
    if (!look() && !end_->wait([this] { return look(); }, deadline)) {
      if (error != nullptr) *error = std::make_error_code(std::errc::timed_out);
      return false;
    }
    news why = news::none;
    if (fails(why)) {
      report(why, error, name());
      return false;
    }
    push(std::move(message));
    if (error != nullptr) error->clear();
    return true;
  }

  [[nodiscard]] const std::string& name() const noexcept {
    static const std::string closed_name{"a channel handle that was closed"};
    return end_ ? end_->name() : closed_name;
  }

  lane_producer<> lane_;
  /// The number of the first message for which an awaited send looks at more than the receiver's word. Never beyond the
  /// known room, which only grows; the tail may be beyond it, after a batch.
  std::uint64_t at_once_until_ = 0;
  store_load barrier_ = store_load::by_fence;
  batch_turn batch_turn_;
  news ending_ = news::none;
  [[no_unique_address]] single_user user_;
  std::unique_ptr<endpoint> end_;
};

/// The receiving end of a channel. Used by one thread at a time; the destructor closes.
///
/// A stream that ended, every sender closed and everything taken, is not an error: it is the empty optional. Errors are
/// `errc::peer_died`, once, when the sender's process died and everything that it committed was taken (the handle stays
/// usable: the next operation waits for a replacement), and `errc::corrupt`.
///
/// Cancel safety, of every operation: a message leaves the lane only when the operation that asked for it goes on; one
/// that is cancelled, timed out or destroyed while it waits has taken nothing.
template <class T>
class receiver {
 public:
  using value_type = T;

  /// One message to be received.
  template <class Errors = errors_thrown>
  class recv_operation : public operation_base<recv_operation<Errors>, Errors> {
   public:
    recv_operation(receiver& from, Errors errors) noexcept
        : operation_base<recv_operation, Errors>{errors}, receiver_{&from} {}
    using operation_base<recv_operation, Errors>::finish;
    [[nodiscard]] bool ready_now() noexcept { return receiver_->ready_now(); }
    /// Takes a message if one is known to be there, nobody's turn is due and no room has to be given back. It stays in
    /// its slot for as long as that is ours.
    [[nodiscard, gnu::always_inline]] bool at_once() noexcept
      requires(!Errors::set && std::is_trivially_copyable_v<T>)
    {
      if (!receiver_->can_take_at_once()) [[unlikely]]
        return false;
      receiver_->take_at_once();
      return true;
    }
    /// The message, when it is small; otherwise where it lies, so that it is copied once.
    using at_once_outcome = std::conditional_t<(sizeof(T) <= at_once_outcome_bytes), T, const native_slot<T>*>;
    [[nodiscard, gnu::always_inline]] at_once_outcome outcome() const noexcept {
      const native_slot<T>& taken = receiver_->lane_.template last<T>(receiver_->slots());
      if constexpr (std::is_same_v<at_once_outcome, T>) {
        return taken.copy();
      } else {
        return &taken;
      }
    }
    template <class Bytes>
    [[nodiscard, gnu::always_inline]] static T result_of(const Bytes& bytes) noexcept {
      std::array<std::byte, sizeof(at_once_outcome)> mine;
      std::memcpy(&mine, &bytes, sizeof mine);
      const auto outcome = std::bit_cast<at_once_outcome>(mine);
      if constexpr (std::is_same_v<at_once_outcome, T>) {
        return outcome;
      } else {
        return outcome->copy();
      }
    }
    [[nodiscard]] bool look(bool alone) noexcept { return receiver_->look_for_hub(alone); }
    void wait_begins() const noexcept { receiver_->hub_looks_ = 0; }
    [[gnu::always_inline]] std::optional<T> finish(news& why) {
      if (receiver_->lane_.known() == 0) [[unlikely]] {
        receiver_->take_ending(why);
        return std::nullopt;
      }
      return receiver_->take();
    }
    [[nodiscard]] endpoint* end() const noexcept { return receiver_->end_.get(); }
    [[nodiscard]] const std::string& end_name() const noexcept { return receiver_->name(); }

   private:
    receiver* receiver_;
  };

  /// Many messages to be received into a span.
  template <class Errors = errors_thrown>
  class recv_many_operation : public operation_base<recv_many_operation<Errors>, Errors> {
   public:
    recv_many_operation(receiver& from, std::span<T> into, Errors errors) noexcept
        : operation_base<recv_many_operation, Errors>{errors}, receiver_{&from}, into_{into} {}
    using operation_base<recv_many_operation, Errors>::finish;
    [[nodiscard]] bool ready_now() noexcept { return receiver_->batch_ready_now(); }
    [[nodiscard]] bool look(bool alone) noexcept { return receiver_->look_for_hub(alone); }
    void wait_begins() const noexcept { receiver_->hub_looks_ = 0; }
    std::size_t finish(news& why) {
      std::size_t taken = 0;
      while (taken < into_.size()) {
        const std::span<const T> there = receiver_->span();
        if (there.empty()) break;
        const std::size_t n = std::min(there.size(), into_.size() - taken);
        std::memcpy(static_cast<void*>(into_.data() + taken), there.data(), n * sizeof(T));
        receiver_->lane_.skip(n);
        taken += n;
      }
      if (taken == 0) {
        receiver_->take_ending(why);
      } else {
        receiver_->released_if_due();
      }
      return taken;
    }
    [[nodiscard]] endpoint* end() const noexcept { return receiver_->end_.get(); }
    [[nodiscard]] const std::string& end_name() const noexcept { return receiver_->name(); }

   private:
    receiver* receiver_;
    std::span<T> into_;
  };

  /// Messages to be looked at where they lie.
  template <class Errors = errors_thrown>
  class peek_operation : public operation_base<peek_operation<Errors>, Errors> {
   public:
    peek_operation(receiver& from, Errors errors) noexcept
        : operation_base<peek_operation, Errors>{errors}, receiver_{&from} {}
    using operation_base<peek_operation, Errors>::finish;
    [[nodiscard]] bool ready_now() noexcept { return receiver_->batch_ready_now(); }
    [[nodiscard]] bool look(bool alone) noexcept { return receiver_->look_for_hub(alone); }
    void wait_begins() const noexcept { receiver_->hub_looks_ = 0; }
    std::span<const T> finish(news& why) {
      if (receiver_->lane_.known() == 0) receiver_->take_ending(why);
      return receiver_->span();
    }
    [[nodiscard]] endpoint* end() const noexcept { return receiver_->end_.get(); }
    [[nodiscard]] const std::string& end_name() const noexcept { return receiver_->name(); }

   private:
    receiver* receiver_;
  };

  receiver() = default;
  /// For `make_channel` and `open_receiver`.
  explicit receiver(std::unique_ptr<endpoint> end) noexcept
      : lane_{end->lane(), end->capacity()},
        gather_{end->capacity()},
        linger_{end->policy()},
        batch_turn_{lane_.head()},
        end_{std::move(end)} {}
  receiver(receiver&& other) noexcept { *this = std::move(other); }
  receiver& operator=(receiver&& other) noexcept {
    if (this == &other) return *this;
    if (end_ && lane_.release_pending()) lane_.publish_head();
    lane_ = std::exchange(other.lane_, {});
    at_once_until_ = std::exchange(other.at_once_until_, 0);
    gather_ = other.gather_;
    linger_ = other.linger_;
    batch_turn_ = other.batch_turn_;
    ending_ = std::exchange(other.ending_, news::none);
    end_ = std::move(other.end_);
    return *this;
  }
  ~receiver() { close(); }

  /// Takes one message. To be awaited; yields `std::optional<T>`, empty at the end of the stream.
  ///
  /// Waits: in the hub while there is none. Cancel safety: a receive that is cancelled or destroyed while it waits took
  /// nothing. Allocates: never. Errors: as the class says, thrown or set. Complexity: constant.
  [[nodiscard]] awaitable_operation<recv_operation<>> recv() {
    return awaitable_operation<recv_operation<>>{recv_operation<>{*this, {}}};
  }
  [[nodiscard]] awaitable_operation<recv_operation<errors_set>> recv(std::error_code& error) {
    return awaitable_operation<recv_operation<errors_set>>{recv_operation<errors_set>{*this, errors_set{&error}}};
  }

  /// Takes as many messages as are there and fit. To be awaited; yields how many, 0 only at the end of the stream, on
  /// an error, or for an empty span.
  ///
  /// Waits: in the hub while there is none. Cancel safety: as `recv`. Allocates: never. Errors: as the class says.
  /// Complexity: linear.
  [[nodiscard]] awaitable_operation<recv_many_operation<>> recv_many(std::span<T> into)
    requires std::is_trivially_copyable_v<T>
  {
    return awaitable_operation<recv_many_operation<>>{recv_many_operation<>{*this, into, {}}};
  }
  [[nodiscard]] awaitable_operation<recv_many_operation<errors_set>> recv_many(std::span<T> into,
                                                                               std::error_code& error)
    requires std::is_trivially_copyable_v<T>
  {
    return awaitable_operation<recv_many_operation<errors_set>>{
        recv_many_operation<errors_set>{*this, into, errors_set{&error}}};
  }

  /// Shows the messages that are there, where they lie, without taking them; `release` takes them. To be awaited;
  /// yields a span, empty only at the end of the stream or on an error.
  ///
  /// Waits: in the hub while there is none. Cancel safety: as `recv`. Allocates: never. Errors: as the class says.
  /// Complexity: constant.
  [[nodiscard]] awaitable_operation<peek_operation<>> peek()
    requires std::is_trivially_copyable_v<T>
  {
    return awaitable_operation<peek_operation<>>{peek_operation<>{*this, {}}};
  }
  [[nodiscard]] awaitable_operation<peek_operation<errors_set>> peek(std::error_code& error)
    requires std::is_trivially_copyable_v<T>
  {
    return awaitable_operation<peek_operation<errors_set>>{peek_operation<errors_set>{*this, errors_set{&error}}};
  }

  /// Takes the first `n` of the messages that `peek` showed; their memory is the sender's again.
  ///
  /// Waits: never. Allocates: never. Errors: none; more than are there counts as all. Complexity: constant.
  void release(std::size_t n) noexcept {
    lane_.skip(std::min<std::uint64_t>(n, lane_.known()));
    released_if_due();
  }

  /// Takes one message if there is one. Empty: there is none now, or the stream ended; `is_closed()` tells.
  ///
  /// Waits: never. Allocates: never. Errors: as the class says, thrown or set. Complexity: constant.
  [[nodiscard]] std::optional<T> try_recv() { return try_recv(nullptr); }
  [[nodiscard]] std::optional<T> try_recv(std::error_code& error) { return try_recv(&error); }

  /// Takes one message, blocking the thread while there is none. Empty at the end of the stream.
  ///
  /// Waits: spins, then parks on the futex. Cancel safety: only a deadline ends it, and then nothing was taken. Allocates:
  /// never. Errors: as the class says. Complexity: constant.
  [[nodiscard]] std::optional<T> blocking_recv() { return block(nullptr, std::nullopt); }
  [[nodiscard]] std::optional<T> blocking_recv(std::error_code& error) { return block(&error, std::nullopt); }
  /// The same, until the deadline; when it passes, `std::errc::timed_out` is thrown or set.
  [[nodiscard]] std::optional<T> blocking_recv_until(std::chrono::steady_clock::time_point deadline) {
    return block(nullptr, deadline);
  }
  [[nodiscard]] std::optional<T> blocking_recv_until(std::chrono::steady_clock::time_point deadline,
                                                     std::error_code& error) {
    return block(&error, deadline);
  }

  /// Senders that wait for room are told at once. Messages not taken are lost, unless another receiver enters.
  /// Idempotent.
  ///
  /// Waits: for a named channel at most a second while another end enters or leaves, and another one for the kernel to drop
  /// the locks of a peer that is known to have died. Cancel safety: cannot be cancelled.
  /// Allocates: for a named channel its path. Errors: none. Complexity: constant, and some system calls for a named channel;
  /// linear in messages that need a destructor.
  void close() noexcept {
    if (end_) *this = receiver{};
  }
  /// Whether the sender closed and everything was taken, or this end closed.
  [[nodiscard]] bool is_closed() const noexcept { return !end_ || (end_->peer_closed() && depth() == 0); }
  /// Messages sent and not yet taken.
  [[nodiscard]] std::size_t depth() const noexcept {
    if (!end_) return 0;
    // acquire: pairs with the publication; whoever sees a depth may go and take. What cannot be is for the next
    // operation to find out.
    const std::uint64_t there = end_->lane().tail.load(std::memory_order_acquire) - lane_.head();
    return static_cast<std::size_t>(std::min(there, lane_.capacity()));
  }
  [[nodiscard]] std::size_t capacity() const noexcept { return static_cast<std::size_t>(lane_.capacity()); }
  /// Has the disk hold the channel as it is now: what was taken does not come again after a power failure. What `peek`
  /// showed and was not released is not taken. For the rest as the sender's.
  ///
  /// Waits: for the disk. Cancel safety: cannot be cancelled. Allocates: never. Errors: `closed`, `inherited`, or the
  /// errno of the disk. Complexity: linear in the pages that were written to since the last time.
  void sync() {
    const single_user::use mine{user_};
    if (!end_) fail(errc::closed, name() + ": expected an open one to be written to the disk");
    if (lane_.release_pending()) released();
    end_->sync();
  }
  /// Where the channel is and how it works: memory, nodes and pages, CPUs, how it waits and is woken, and what that costs.
  /// `text()` of the result is for people.
  ///
  /// Waits: never. Allocates: the result. Errors: `closed` for a handle that was closed. Complexity: linear in the pages;
  /// reads /proc, so milliseconds.
  [[nodiscard]] explanation explain() const {
    if (!end_) fail(errc::closed, name() + ": expected an open one to explain");
    return end_->explain();
  }

 private:
  [[nodiscard, gnu::always_inline]] native_slot<T>* slots() const noexcept { return slots_of<T>(lane_.control()); }

  /// A known message, nobody's turn, and no room to be given back: one compare.
  [[nodiscard, gnu::always_inline]] bool can_take_at_once() noexcept {
    if (lane_.head() < at_once_until_) [[likely]]
      return true;
    return lane_.known() != 0 && begin_at_once();
  }
  /// Whether messages can be taken at once, and up to which: all that is not asked for each of them.
  [[gnu::noinline]] bool begin_at_once() noexcept {
    const std::uint64_t head = lane_.head();
    at_once_until_ = std::min({lane_.plain_until(), next_turn(head), next_stretch<T>(head)});
    if (head >= at_once_until_) return false;
    fetch_ahead();
    return true;
  }

  [[nodiscard]] bool ready_now() noexcept { return !turn_due(lane_.head()) && (lane_.known() != 0 || look_in_place()); }

  /// Looks, and lingers if the next message is near.
  [[gnu::noinline]] bool look_in_place() noexcept {
    if (look(true)) return true;
    const std::uint32_t length = linger_.length();
    if (length == 0) return false;
    for (std::uint32_t i = 0; i < length; ++i) {
      if (i >= linger::without_pause) cpu_relax();
      // What happened to the peer is for the waiter's look: here only a message counts.
      if (look_at_lane() != 0) {
        gather_.found(lane_.known());
        return true;
      }
      if (lane_.corrupt()) return corrupt();
    }
    linger_.in_vain();
    return false;
  }

  /// A waiter's look, from the hub.
  bool look_for_hub(bool alone) noexcept {
    ++hub_looks_;
    if (!look(alone)) return false;
    // Beside others a look tells nothing of how near the message was.
    if (alone) linger_.hub_found(hub_looks_);
    return true;
  }

  [[nodiscard]] bool batch_ready_now() noexcept { return !batch_turn_.due(lane_.head()) && look_in_place(); }

  /// Whether there is a message, or a reason to wait no longer. `gather`: nobody is harmed by a short pause.
  [[gnu::noinline]] bool look(bool gather) noexcept {
    const single_user::use mine{user_};
    at_once_until_ = 0;  // what this look finds may lie beside `tail`, or be less than was known
    if (lane_.known() != 0) return true;
    if (!end_) {
      ending_ = news::closed;
      return true;
    }
    // For good: a tail that is possible again is no reason to believe what is in the lane.
    if (lane_.corrupt()) [[unlikely]]
      return corrupt();
    if (gather) gather_.before_look();
    if (const std::uint64_t there = look_at_lane(); there != 0) {
      gather_.found(there);
      if (there > 1) {
        for_each_line(slots(), lane_.capacity() - 1, lane_.head(), std::min(there, messages_ahead<T>),
                      [](const std::byte* line) { prefetch_for_reading(line); });
      }
      return true;
    }
    if (lane_.corrupt()) return corrupt();
    gather_.found(0);
    // The lane is empty: nobody needs the line with `head` now, and the sender may wait for it.
    if (lane_.release_pending()) released();
    const news heard = end_->look_at_peer(lane_.head());
    if (heard == news::none) return false;
    // The peer published before it left; look_at_peer acquired that.
    if (heard != news::corrupt && look_at_lane() != 0) return true;
    if (lane_.corrupt()) return corrupt();
    ending_ = heard;
    return true;
  }

  /// The messages that are there, up to where a dead sender's end: its death is told before its replacement's first.
  std::uint64_t look_at_lane() noexcept {
    const std::uint64_t there = lane_.look();
    // A replacement published behind the declaration of the death, so whoever sees its message sees the death, too.
    if (there == 0 || !end_->death_untold()) [[likely]]
      return there;
    return lane_.limit(end_->died_at());
  }

  bool corrupt() noexcept {
    ending_ = end_->poison();
    return true;
  }

  /// Why there is no message. The end of the stream is no error.
  void take_ending(news& why) noexcept {
    why = std::exchange(ending_, news::none);
    if (why == news::died) end_->death_reported();
    if (why == news::closed) why = news::none;
  }

  [[nodiscard, gnu::always_inline]] T take() {
    const single_user::use mine{user_};
    struct release_after {
      receiver& self;
      ~release_after() { self.released_if_due(); }
    } guard{*this};
    fetch_ahead();
    return lane_.template take<T>(slots());
  }

  /// The same for a message that is left in its slot, and whose taking releases nothing.
  [[gnu::always_inline]] void take_at_once() noexcept {
    const single_user::use mine{user_};
    lane_.advance();
  }

  [[gnu::always_inline]] void fetch_ahead() const noexcept {
    // Only messages that are known to be there: the sender still writes the other slots.
    if (lane_.head() % messages_ahead<T> == 0 && lane_.known() >= 2 * messages_ahead<T>) [[unlikely]] {
      for_each_line(slots(), lane_.capacity() - 1, lane_.head() + messages_ahead<T>, messages_ahead<T>,
                    [](const std::byte* line) { prefetch_for_reading(line); });
    }
  }

  [[gnu::always_inline]] void released_if_due() noexcept {
    if (lane_.release_due()) [[unlikely]]
      released();
  }

  /// Gives the slots of everything taken back, and wakes a sender that waits for room.
  [[gnu::noinline]] void released() noexcept {
    lane_.publish_head();
    const presence sender = claim_ring(end_->peer_word(), end_->barrier());
    if (sender != presence::awake) [[unlikely]]
      end_->ring(sender);
  }

  /// The known messages up to where the lane wraps.
  [[nodiscard]] std::span<const T> span() const noexcept {
    if (lane_.known() == 0) return {};
    const std::uint64_t at = lane_.head() & (lane_.capacity() - 1);
    return {reinterpret_cast<const T*>(slots()) + at,
            static_cast<std::size_t>(std::min(lane_.known(), lane_.capacity() - at))};
  }

  std::optional<T> try_recv(std::error_code* error) {
    if (lane_.known() == 0 && !look(false)) {
      if (error != nullptr) error->clear();
      return std::nullopt;
    }
    return finish(error);
  }

  std::optional<T> block(std::error_code* error, std::optional<std::chrono::steady_clock::time_point> deadline) {
    if (!look(true) && !end_->wait([this] { return look(true); }, deadline)) {
      const std::error_code late = std::make_error_code(std::errc::timed_out);
      if (error == nullptr) throw std::system_error{late, name()};
      *error = late;
      return std::nullopt;
    }
    return finish(error);
  }

  std::optional<T> finish(std::error_code* error) {
    news why = news::none;
    if (lane_.known() != 0) {
      if (error != nullptr) [[unlikely]]
        error->clear();
      return take();
    }
    take_ending(why);
    if (why != news::none || error != nullptr) report(why, error, name());
    return std::nullopt;
  }

  [[nodiscard]] const std::string& name() const noexcept {
    static const std::string closed_name{"a channel handle that was closed"};
    return end_ ? end_->name() : closed_name;
  }

  lane_consumer<> lane_;
  /// The number of the first message for which an awaited receive looks at more than this. Never beyond what is known to
  /// be there; the head may be beyond it, after a batch.
  std::uint64_t at_once_until_ = 0;
  gather_pause gather_;
  linger linger_;
  /// How often the hub has looked since it began to wait.
  std::uint32_t hub_looks_ = 0;
  batch_turn batch_turn_;
  news ending_ = news::none;
  [[no_unique_address]] single_user user_;
  std::unique_ptr<endpoint> end_;
};

/// Makes a channel inside this process. Any movable type may be sent.
///
/// Waits: never. Allocates: `capacity` slots. Errors: `bad_capacity`, `no_space`. Complexity: touching the memory.
template <class T>
[[nodiscard]] std::pair<sender<T>, receiver<T>> make_channel(const channel_options& options = {}) {
  static_assert(std::is_move_constructible_v<T>, "a message must be movable");
  endpoint::destroy_messages destroy = nullptr;
  if constexpr (!std::is_trivially_destructible_v<T>) {
    destroy = [](std::byte* slots, std::uint64_t mask, std::uint64_t head, std::uint64_t tail) noexcept {
      auto* messages = reinterpret_cast<native_slot<T>*>(slots);
      for (; head != tail; ++head) (void)messages[head & mask].take();
    };
  }
  auto [sending, receiving] = endpoint::make_private(shape_of<T>, options, destroy);
  return {sender<T>{std::move(sending)}, receiver<T>{std::move(receiving)}};
}

/// Ends the compilation for a type that cannot be sent to another process.
///
/// Waits: never. Allocates: never. Errors: that. Complexity: none when the program runs.
template <class T>
consteval void must_cross_processes() {
  static_assert(std::is_trivially_copyable_v<T>,
                "a message crosses processes as bytes: its type must be trivially copyable (no pointers into this "
                "process, no strings, no virtual functions)");
}

/// Opens the sending end of a named channel, creating the channel when it is not there.
///
/// Waits: parks while another end enters or leaves. Allocates: the segment. Errors: see `endpoint::open`. Complexity:
/// system calls.
template <class T>
[[nodiscard]] sender<T> open_sender(std::string_view name, const channel_options& options = {}) {
  must_cross_processes<T>();
  return sender<T>{endpoint::open(role::sender, name, shape_of<T>, options)};
}

/// Opens the receiving end of a named channel, creating the channel when it is not there.
///
/// Waits: parks while another end enters or leaves. Allocates: the segment. Errors: see `endpoint::open`. Complexity:
/// system calls.
template <class T>
[[nodiscard]] receiver<T> open_receiver(std::string_view name, const channel_options& options = {}) {
  must_cross_processes<T>();
  return receiver<T>{endpoint::open(role::receiver, name, shape_of<T>, options)};
}

}  // namespace strait
