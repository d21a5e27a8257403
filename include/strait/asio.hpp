// strait for people who write Asio: `co_await channel.recv()` inside an asio::awaitable, completion tokens, executors.
//
// Includes Asio first and imports strait last, which is the order that compilers accept (docs/design/modules.md). May
// itself be included before or after <asio.hpp> and before or after `import strait;`.
#pragma once

#include <asio/any_io_executor.hpp>
#include <asio/associated_allocator.hpp>
#include <asio/associated_cancellation_slot.hpp>
#include <asio/associated_executor.hpp>
#include <asio/async_result.hpp>
#include <asio/awaitable.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/cancellation_type.hpp>
#include <asio/co_spawn.hpp>
#include <asio/dispatch.hpp>
#include <asio/error.hpp>
#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>
#include <asio/recycling_allocator.hpp>
#include <asio/strand.hpp>
#include <asio/system_executor.hpp>
#include <asio/use_awaitable.hpp>
#include <atomic>
#include <coroutine>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <span>
#include <string_view>
#include <system_error>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>

#include "strait/asio_names.hpp"

import strait;

namespace strait {

/// The hub of the executor's context; it is made at the first call, as a service of the context.
///
/// Waits: never. Allocates: at the first call. Errors: `std::system_error` when no eventfd can be had. Complexity: a
/// search among the context's services.
[[nodiscard]] hub& hub_of(const asio::any_io_executor& executor);

/// The executor of the hub's context, without its strand if there was one: for everything of Asio that is to live
/// there.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
[[nodiscard]] asio::any_io_executor executor_of(hub& of);

/// An executor of the node's next worker: for sockets, timers and everything else of Asio that is to live there.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
[[nodiscard]] asio::any_io_executor executor(runtime_node& node);

/// Runs a task in a context of your own. An exception that leaves it is thrown out of the context's `run()`.
///
/// Waits: never. Allocates: at the first call in a context, its hub. Errors: as `hub_of`. Complexity: as `hub_of`.
inline void spawn(const asio::any_io_executor& executor, task<> what) {
  spawn_on(hub_of(executor), std::move(what));
}

/// The same, on the context's executor.
inline void spawn(asio::io_context& context, task<> what) {
  spawn(context.get_executor(), std::move(what));
}

namespace detail {

/// The hub of an executor of any type. What `any_io_executor` cannot hold, as the executor of `use_future`, waits where
/// handlers without an executor do; it still runs them itself.
template <class Executor>
hub& hub_for(const Executor& executor) {
  if constexpr (std::is_constructible_v<asio::any_io_executor, const Executor&>) {
    return hub_of(asio::any_io_executor{executor});
  } else {
    return hub_of(asio::any_io_executor{asio::system_executor{}});
  }
}

/// An operation that waits on a hub on behalf of a completion handler. `Step` has `waiting()`, the operation, and
/// `invoke(handler, aborted)`.
///
/// What waits itself on the hub is found and freed there when the context is destroyed; what waits through others, as a
/// selection does, is entered as a root for as long as it waits.
///
/// A turn of the hub, on whichever thread, finds that it can go on; everything after that happens on the handler's
/// executor. That has to run one thing at a time where operations are cancelled, as for all of Asio. The system executor
/// does not, so there each operation has a strand.
template <class Step, class Handler>
class handler_wait final : public hub_waiter, private hub_root {
 public:
  static void start(Step step, Handler&& handler) {
    const executor_type executor{asio::get_associated_executor(handler, asio::system_executor{})};
    hub& where = hub_for(executor);
    allocator_type allocator = allocator_for(handler);
    handler_wait* const memory = std::allocator_traits<allocator_type>::allocate(allocator, 1);
    std::unique_ptr<handler_wait, dismantled> made{
        ::new (static_cast<void*>(memory)) handler_wait{where, std::move(step), std::move(handler), executor}};
    auto slot = asio::get_associated_cancellation_slot(made->handler_);
    if (slot.is_connected()) {
      made->reach_ = std::allocate_shared<reach>(asio::recycling_allocator<reach>{}, made.get(), executor);
      slot.template emplace<canceller>(made->reach_);
    }
    made.release()->wait();
  }

 private:
  using associated_executor = asio::associated_executor_t<Handler, asio::system_executor>;
  using executor_type = std::conditional_t<std::is_same_v<associated_executor, asio::system_executor>,
                                           asio::strand<asio::system_executor>, associated_executor>;

  /// By which a cancellation finds the operation. A signal may be emitted on any thread, as by the first operation of a
  /// group, also while this one completes: so the slot is not cleared then, and the way goes by the operation's executor.
  struct reach {
    explicit reach(handler_wait* of, const executor_type& by) : operation{of}, executor{by} {}
    /// For the executor; `operation` is read and written on the executor only.
    std::mutex mutex;
    handler_wait* operation;
    /// Empty once the operation is over: an executor must not be kept for longer than its context may live.
    std::optional<executor_type> executor;
  };
  /// What the slot holds.
  struct canceller {
    std::shared_ptr<reach> found_by;
    explicit canceller(std::shared_ptr<reach> by) noexcept : found_by{std::move(by)} {}
    void operator()(asio::cancellation_type type) const {
      if (type == asio::cancellation_type::none) return;
      const std::optional<executor_type> executor = [this] {
        const std::lock_guard lock{found_by->mutex};
        return found_by->executor;
      }();
      if (!executor) return;
      asio::dispatch(*executor, [by = found_by] {
        if (by->operation != nullptr) by->operation->cancel();
      });
    }
  };
  struct dismantled {
    void operator()(handler_wait* what) const noexcept { what->dismantle(); }
  };

  using associated = asio::associated_allocator_t<Handler>;
  /// Asio's own cache of small blocks, unless the user brought an allocator.
  using allocator_source =
      std::conditional_t<std::is_same_v<associated, std::allocator<void>>, asio::recycling_allocator<void>, associated>;
  using allocator_type = typename std::allocator_traits<allocator_source>::template rebind_alloc<handler_wait>;

  static allocator_type allocator_for(const Handler& handler) {
    if constexpr (std::is_same_v<associated, std::allocator<void>>) {
      return allocator_type{};
    } else {
      return allocator_type{asio::get_associated_allocator(handler)};
    }
  }

  handler_wait(hub& where, Step step, Handler&& handler, const executor_type& executor)
      : where_{where}, step_{std::move(step)}, handler_{std::move(handler)}, work_{executor} {
    ready = [](hub_waiter& self, bool alone) noexcept {
      return static_cast<handler_wait&>(self).step_.waiting().look(alone);
    };
    complete = [](hub_waiter& self) {
      auto& me = static_cast<handler_wait&>(self);
      me.waits_no_more();
      asio::dispatch(me.work_.get_executor(), delivery{&me, false});
    };
    abandon = [](hub_waiter& self) noexcept { static_cast<handler_wait&>(self).dismantle(); };
    destroy = [](hub_root& self) noexcept { static_cast<handler_wait&>(self).dismantle(); };
  }

  using operation_type = std::remove_reference_t<decltype(std::declval<Step&>().waiting())>;
  static constexpr bool waits_through_others = requires(operation_type& operation) { operation.forsake(); };

  /// When it waits, its memory is gone as soon as another thread completes it.
  void wait() {
    if constexpr (!waits_through_others) {
      (void)step_.waiting().wait(wait_place{where_}, *this);
    } else {
      where_.add_root(*this);
      bool waits = false;
      try {
        if constexpr (std::is_constructible_v<asio::any_io_executor, const executor_type&>) {
          const asio::any_io_executor executor{work_.get_executor()};
          waits = step_.waiting().wait(wait_place{where_, &executor}, *this);
        } else {
          waits = step_.waiting().wait(wait_place{where_}, *this);
        }
      } catch (...) {
        waits_no_more();
        dismantle();
        throw;
      }
      if (waits) return;
      waits_no_more();
      asio::post(work_.get_executor(), delivery{this, false});
    }
  }
  void waits_no_more() noexcept {
    if constexpr (waits_through_others) where_.remove_root(*this);
  }

  /// Gives this object's memory back and returns what is needed after that.
  auto dismantle() {
    struct rest {
      Step step;
      Handler handler;
      asio::executor_work_guard<executor_type> work;
    };
    allocator_type allocator = allocator_for(handler_);
    rest left{std::move(step_), std::move(handler_), std::move(work_)};
    if (reach_) {
      const std::lock_guard lock{reach_->mutex};
      reach_->operation = nullptr;
      reach_->executor.reset();
    }
    this->~handler_wait();
    std::allocator_traits<allocator_type>::deallocate(allocator, this, 1);
    return left;
  }

  /// The way from the hub's turn to the handler's executor. Until it has arrived this object stays as it is: a
  /// cancellation may come meanwhile.
  class delivery {
   public:
    delivery(handler_wait* what, bool aborted) noexcept : what_{what}, aborted_{aborted} {}
    void operator()() { what_.release()->finish(aborted_); }

   private:
    /// Never delivered, when the context is destroyed first.
    std::unique_ptr<handler_wait, dismantled> what_;
    bool aborted_;
  };

  /// On the handler's executor: only here a message is taken.
  void finish(bool aborted) {
    // Woken and then cancelled, it leaves what is there: where Asio cancels the others as soon as one is complete, no
    // second message is taken for somebody who wants only one.
    if (cancelled_ && !committed()) aborted = true;
    // On the way, another operation on the same handle may have taken what this one was woken for.
    if (!aborted && !step_.waiting().look(false)) return wait();
    auto left = dismantle();
    left.step.invoke(std::move(left.handler), aborted);
  }

  /// Whether it has done what cannot be undone.
  [[nodiscard]] bool committed() {
    auto& operation = step_.waiting();
    if constexpr (requires { operation.committed(); }) {
      return operation.committed();
    } else if constexpr (requires { operation.sent(); }) {
      return operation.look(false);  // it sends while it looks, and all is sent
    } else {
      return false;
    }
  }

  /// On the handler's executor.
  void cancel() {
    cancelled_ = true;
    // Completing already; or it will, when what it waits for has been cancelled in turn.
    if (!step_.waiting().withdraw(where_, *this)) return;
    waits_no_more();
    asio::post(work_.get_executor(), delivery{this, true});
  }

  hub& where_;
  Step step_;
  Handler handler_;
  asio::executor_work_guard<executor_type> work_;
  /// Null where there is no slot.
  std::shared_ptr<reach> reach_;
  bool cancelled_ = false;
};

/// Waits until an operation can go on, and leaves it to the awaiting coroutine to do so.
template <class Operation>
struct until_ready {
  Operation* operation;
  [[nodiscard]] Operation& waiting() const noexcept { return *operation; }
  template <class Handler>
  void invoke(Handler&& handler, bool aborted) {
    std::forward<Handler>(handler)(aborted ? std::error_code{asio::error::operation_aborted} : std::error_code{});
  }
};

/// Waits, does the operation, and hands the result to the handler.
template <class Operation>
struct whole {
  Operation operation;
  [[nodiscard]] Operation& waiting() noexcept { return operation; }
  template <class Handler>
  void invoke(Handler&& handler, bool aborted) {
    news why = news::none;
    using result = decltype(operation.finish(why));
    if constexpr (std::is_void_v<result>) {
      std::error_code error = asio::error::operation_aborted;
      if (!aborted) {
        operation.finish(why);
        error = to_error(why);
      }
      std::forward<Handler>(handler)(error);
    } else if (aborted) {
      result so_far{};
      if constexpr (requires { operation.sent(); }) so_far = operation.sent();
      std::forward<Handler>(handler)(std::error_code{asio::error::operation_aborted}, std::move(so_far));
    } else {
      result value = operation.finish(why);
      std::forward<Handler>(handler)(to_error(why), std::move(value));
    }
  }
  static std::error_code to_error(news why) noexcept {
    return why == news::none ? std::error_code{} : make_error_code(to_errc(why));
  }
};

/// Waits for a peer, and hands it to the handler.
template <class Operation>
struct arriving {
  Operation operation;
  [[nodiscard]] Operation& waiting() noexcept { return operation; }
  template <class Handler>
  void invoke(Handler&& handler, bool aborted) {
    using result = typename Operation::result;
    if (aborted) {
      std::forward<Handler>(handler)(std::error_code{asio::error::operation_aborted}, result{});
      return;
    }
    std::exception_ptr failure;
    result made = operation.finish(failure);
    std::forward<Handler>(handler)(code_of(failure), std::move(made));
  }
};

/// Begins an operation. Its executor is for what a token makes beside it, as `cancel_after` makes a timer: our operations
/// belong to no context before a handler is there.
struct initiation {
  using executor_type = asio::system_executor;
  [[nodiscard]] executor_type get_executor() const noexcept { return {}; }

  template <class Handler, class Step>
  void operator()(Handler&& handler, Step from) const {
    handler_wait<Step, std::decay_t<Handler>>::start(std::move(from), std::forward<Handler>(handler));
  }
};

template <class Step, class Signature, class Token>
auto start(Step step, Token&& token) {
  return asio::async_initiate<Token, Signature>(initiation{}, token, std::move(step));
}

}  // namespace detail

/// How an operation that is not ready suspends an asio::awaitable: through an ordinary asynchronous operation of Asio,
/// whose frame is taken from Asio's cache, and only then.
template <class Operation, class Executor>
struct asio_suspension {
  using awaiter = operation_awaiter<Operation, Executor>;
  using wait_awaitable = asio::awaitable<void, Executor>;

  template <class Promise>
  static void suspend(awaiter& self, std::coroutine_handle<Promise> awaiting) {
    static_assert(sizeof(wait_awaitable) <= sizeof self.suspension_);
    auto* wait = ::new (static_cast<void*>(self.suspension_))
        wait_awaitable{detail::start<detail::until_ready<Operation>, void(std::error_code)>(
            detail::until_ready<Operation>{&self.operation_}, asio::use_awaitable_t<Executor>{})};
    static constexpr typename awaiter::suspended_operations through_asio{
        .destroy = [](awaiter& of) noexcept { wait_in(of).~wait_awaitable(); },
        // Throws when the wait was cancelled.
        .resume = [](awaiter& of) { wait_in(of).await_resume(); }};
    self.suspended_ = &through_asio;
    wait->await_suspend(awaiting);
  }

 private:
  static wait_awaitable& wait_in(awaiter& self) noexcept {
    return *std::launder(reinterpret_cast<wait_awaitable*>(self.suspension_));
  }
};

/// Takes one message; any completion token. Signature: `void(std::error_code, std::optional<T>)`; empty without an error
/// is the end of the stream.
///
/// The completion runs on the handler's associated executor, which also decides whose hub waits; a handler without one
/// gets Asio's system executor. Never within this call.
///
/// Waits: in that hub. Cancel safety: with a cancellation slot, as `recv`: nothing is taken. Allocates: one block from the
/// handler's associated allocator, or from Asio's cache; another from that with a cancellation slot, and a strand without
/// an executor. Errors: as `recv`, and `asio::error::operation_aborted`. Complexity: constant.
template <class T, class Token>
auto async_recv(receiver<T>& from, Token&& token) {
  using operation = typename receiver<T>::template recv_operation<>;
  return detail::start<detail::whole<operation>, void(std::error_code, std::optional<T>)>(
      detail::whole<operation>{operation{from, {}}}, std::forward<Token>(token));
}

/// Takes as many messages as are there and fit; any completion token. Signature: `void(std::error_code, std::size_t)`:
/// how many, 0 without an error at the end of the stream. `into` must live until then.
///
/// Waits: as `async_recv`. Cancel safety: as `async_recv`. Allocates: as `async_recv`. Errors: as `async_recv`.
/// Complexity: linear in the messages.
template <class T, class Token>
  requires std::is_trivially_copyable_v<T>
auto async_recv_many(receiver<T>& from, std::type_identity_t<std::span<T>> into, Token&& token) {
  using operation = typename receiver<T>::template recv_many_operation<>;
  return detail::start<detail::whole<operation>, void(std::error_code, std::size_t)>(
      detail::whole<operation>{operation{from, into, {}}}, std::forward<Token>(token));
}

/// Shows the messages that are there without taking them; any completion token. Signature:
/// `void(std::error_code, std::span<const T>)`; empty without an error is the end of the stream.
///
/// Waits: as `async_recv`. Cancel safety: as `async_recv`. Allocates: as `async_recv`. Errors: as `async_recv`.
/// Complexity: constant.
template <class T, class Token>
  requires std::is_trivially_copyable_v<T>
auto async_peek(receiver<T>& from, Token&& token) {
  using operation = typename receiver<T>::template peek_operation<>;
  return detail::start<detail::whole<operation>, void(std::error_code, std::span<const T>)>(
      detail::whole<operation>{operation{from, {}}}, std::forward<Token>(token));
}

/// Sends one message; any completion token. Signature: `void(std::error_code)`. An error means that it was not sent.
///
/// Waits: as `async_recv`, for room. Cancel safety: with a cancellation slot, as `send`: nothing is sent. Allocates: as
/// `async_recv`. Errors: as `send`, and `asio::error::operation_aborted`. Complexity: constant.
template <class T, class U, class Token>
auto async_send(sender<T>& to, U&& message, Token&& token) {
  using operation = typename sender<T>::template send_operation<>;
  return detail::start<detail::whole<operation>, void(std::error_code)>(
      detail::whole<operation>{operation{to, T(std::forward<U>(message)), {}}}, std::forward<Token>(token));
}

/// Sends all messages of the span, which must live until then; any completion token. Signature:
/// `void(std::error_code, std::size_t)`: how many were sent, which is all of them without an error.
///
/// Waits: as `async_send`. Cancel safety: what was sent before the cancellation stays sent, and is told. Allocates: as
/// `async_recv`. Errors: as `async_send`. Complexity: linear in the messages.
template <class T, class Token>
  requires std::is_trivially_copyable_v<T>
auto async_send_many(sender<T>& to, std::type_identity_t<std::span<const T>> messages, Token&& token) {
  using operation = typename sender<T>::template send_many_operation<>;
  return detail::start<detail::whole<operation>, void(std::error_code, std::size_t)>(
      detail::whole<operation>{operation{to, messages, {}}}, std::forward<Token>(token));
}

/// Reserves room for 1 to `n` messages in the lane itself; any completion token. Signature:
/// `void(std::error_code, strait::permit<T>)`.
///
/// Waits: as `async_send`. Cancel safety: nothing happened. Allocates: as `async_recv`. Errors: as `async_send`.
/// Complexity: constant.
template <class T, class Token>
  requires std::is_trivially_copyable_v<T>
auto async_reserve(sender<T>& to, std::size_t n, Token&& token) {
  using operation = typename sender<T>::template reserve_operation<>;
  return detail::start<detail::whole<operation>, void(std::error_code, permit<T>)>(
      detail::whole<operation>{operation{to, n, {}}}, std::forward<Token>(token));
}

/// The same as `async_recv` of a receiver, for a duplex.
template <class In, class Out, class Token>
auto async_recv(duplex<In, Out>& from, Token&& token) {
  return async_recv(from.in, std::forward<Token>(token));
}
/// The same as `async_send` of a sender, for a duplex.
template <class In, class Out, class U, class Token>
auto async_send(duplex<In, Out>& to, U&& message, Token&& token) {
  return async_send(to.out, std::forward<U>(message), std::forward<Token>(token));
}

/// Accepts the next peer; any completion token. Signature: `void(std::error_code, duplex<In, Out>)`.
///
/// Waits: as `async_recv`. Cancel safety: as `accept`. Allocates: as `async_recv`. Errors: as `accept`, and
/// `asio::error::operation_aborted`. Complexity: constant.
template <class In, class Out, class Token>
auto async_accept(listener<In, Out>& at, Token&& token) {
  using operation = decltype(at.make_operation(errors_thrown{}));
  return detail::start<detail::arriving<operation>, void(std::error_code, duplex<In, Out>)>(
      detail::arriving<operation>{at.make_operation(errors_thrown{})}, std::forward<Token>(token));
}

/// Connects to a listener: `async_connect<Reply, Request>(name, token)`. The attempt begins at once.
///
/// Waits: as `async_recv`. Cancel safety: as `connect`. Allocates: as `async_recv`, and as `connect`. Errors: as `connect`,
/// and `asio::error::operation_aborted`. Complexity: as `connect`.
template <class In, class Out, class Token>
auto async_connect(std::string_view name, Token&& token, const connect_options& options = {}) {
  using operation = arrival_operation<In, Out, std::unique_ptr<caller>, errors_thrown>;
  return detail::start<detail::arriving<operation>, void(std::error_code, duplex<In, Out>)>(
      detail::arriving<operation>{
          operation{std::make_unique<caller>(name, duplex_shape_of<In, Out>, options), errors_thrown{}}},
      std::forward<Token>(token));
}

/// Any awaited operation for an `asio::awaitable<T, Executor>` whose executor is not Asio's default:
/// `co_await strait::rebind_executor<Executor>(rx.recv())`. It suspends as little as without.
///
/// Waits: as the operation. Cancel safety: as the operation. Allocates: never itself. Errors: none itself. Complexity: a
/// move of the operation.
template <class Executor, class Operation>
[[nodiscard]] auto rebind_executor(asio::awaitable<awaited<Operation>, asio::any_io_executor>&& operation) {
  return asio::awaitable<awaited<Operation>, Executor>{std::move(operation)};
}

/// What `this_executor` is.
struct this_executor_t {
  class awaiter {
   public:
    [[nodiscard]] bool await_ready() const noexcept { return false; }
    /// Never suspends: only here the promise is at hand.
    template <class Promise>
    bool await_suspend(std::coroutine_handle<Promise> awaiting) {
      hub_ = &hub_to_wait_on(awaiting);
      return false;
    }
    [[nodiscard]] asio::any_io_executor await_resume() const { return executor_of(*hub_); }

   private:
    hub* hub_ = nullptr;
  };
  [[nodiscard]] awaiter operator co_await() const noexcept { return {}; }
};

/// `co_await strait::this_executor` in a task: the executor of the context that runs it, for sockets and timers of its
/// own.
///
/// Waits: never. Allocates: never. Errors: `no_hub` in a coroutine that is neither a `task` nor on a thread of
/// strait's. Complexity: constant.
inline constexpr this_executor_t this_executor{};

/// What `use_op(error)` is: `use_op`, with errors set instead of thrown.
struct use_op_into_t {
  std::error_code* error;
};

/// What `use_op` is.
struct use_op_t {
  /// Has the operation's error set, to zero when all went well, instead of thrown. `error` must live until then.
  [[nodiscard]] constexpr use_op_into_t operator()(std::error_code& error) const noexcept { return {&error}; }
};

/// The completion token by which a `strait::task` awaits any operation of Asio:
///
///     const std::size_t n = co_await socket.async_read_some(buffer, strait::use_op);
///
/// Yields what the operation completes with, after a leading `std::error_code` or `std::exception_ptr`, which is
/// thrown: nothing, the value, or a tuple of several. The operation begins when it is awaited, and the coroutine goes
/// on in its own context, in place where the operation completes there.
///
/// Waits: in the reactor of the operation's I/O object. Cancel safety: destroying the coroutine cancels the operation
/// (`terminal`) where it supports that, and its completion then touches nothing of the coroutine's. Until a context is
/// destroyed its I/O objects outlive who waits for them; and in a context that several threads run, an operation
/// composed of several is not destroyed while it waits. Allocates: one small block from where frames come from, and
/// what the operation does. Errors: the operation's; `no_hub` in a coroutine that is neither a `task` nor on a thread
/// of strait's. Complexity: constant.
inline constexpr use_op_t use_op{};

namespace detail {

/// The error code that a result is, holds or begins with; zero: none.
template <class Result>
[[nodiscard]] std::error_code error_in(const Result&) noexcept {
  return {};
}
[[nodiscard]] inline std::error_code error_in(const std::error_code& error) noexcept {
  return error;
}
[[nodiscard]] inline std::error_code error_in(const std::exception_ptr& failure) noexcept {
  try {
    if (failure) std::rethrow_exception(failure);
  } catch (const std::system_error& error) {
    return error.code();
  } catch (...) {  // still in `failure`, for whoever is told of it
  }
  return {};
}
template <class First, class... Rest>
[[nodiscard]] std::error_code error_in(const std::tuple<First, Rest...>& results) noexcept {
  return error_in(std::get<0>(results));
}

/// What an operation of Asio and the coroutine that waits for it have in common, so that each may outlive the other.
///
/// | phase     | entered by                                         | and then                                   |
/// |-----------|----------------------------------------------------|--------------------------------------------|
/// | beginning | the awaiter, which calls the initiation            |                                            |
/// | waiting   | the awaiter, when the initiation has returned      | the coroutine is suspended                 |
/// | done      | the handler: within the initiation, else in a turn; | the coroutine goes on                     |
/// |           | a cancellation that finds nothing to cancel with   |                                            |
/// | abandoned | the awaiter, destroyed                             | the handler only drops what it holds       |
template <class... Results>
class op_state final : public hub_waiter {
 public:
  explicit op_state(const wait_place& place, hub_waiter& waiter)
      : where_{&place.where},
        executor_{place.executor != nullptr ? *static_cast<const asio::any_io_executor*>(place.executor)
                                            : executor_of(place.where)},
        waiter_{&waiter} {
    complete = [](hub_waiter& self) {
      auto& me = static_cast<op_state&>(self);
      // The coroutine may have been destroyed while the handler waited for the turn. relaxed: in turns only.
      if (me.phase_.load(std::memory_order_relaxed) != phase::waiting) return;
      me.phase_.store(phase::done, std::memory_order_relaxed);
      if (me.waiter_ != nullptr) me.waiter_->complete(*me.waiter_);
    };
  }
  static void* operator new(std::size_t bytes) { return allocate_frame(bytes); }
  static void operator delete(void* block, std::size_t bytes) noexcept { free_frame(block, bytes); }

  [[nodiscard]] const asio::any_io_executor& executor() const noexcept { return executor_; }
  [[nodiscard]] asio::cancellation_slot slot() noexcept { return signal_.slot(); }

  /// The initiation has returned. False: the operation is complete already, and nobody is told.
  [[nodiscard]] bool began() noexcept {
    phase found = phase::beginning;
    // acquire: the results, which another thread may have left.
    return phase_.compare_exchange_strong(found, phase::waiting, std::memory_order_acquire);
  }
  /// By the handler, which keeps this object until it returns.
  template <class... Arguments>
  void completed(Arguments&&... results) {
    results_.emplace(std::forward<Arguments>(results)...);
    phase found = phase::beginning;
    // release: the results; see began().
    if (phase_.compare_exchange_strong(found, phase::done, std::memory_order_release, std::memory_order_relaxed))
      return;
    where_->resume(*this);
  }
  /// By the awaiter: nobody waits any more.
  void abandoned() noexcept {
    // relaxed: in turns only, or when no thread runs the context.
    const bool waits = phase_.exchange(phase::abandoned, std::memory_order_relaxed) == phase::waiting;
    // Where the handler is gone nothing is left to cancel, and in a context that ends it will be: its I/O objects may
    // be gone, and with them what the operation's cancellation looks at. acquire: what the handler's thread did with
    // this object has happened.
    if (waits && references_.load(std::memory_order_acquire) > 1 && !where_->ending()) {
      signal_.emit(asio::cancellation_type::terminal);
    }
  }
  /// Has the operation cancelled on its own executor, and the waiter completed when it has ended. One that cannot be
  /// cancelled is left to itself, and counts as ended at once.
  void cancel() {
    cancelled_ = true;
    references_.fetch_add(1, std::memory_order_relaxed);  // relaxed: by who holds one already
    asio::dispatch(executor_, [mine = std::unique_ptr<op_state, releaser>{this}] {
      // relaxed: a look; whoever was first is seen by complete().
      if (mine->phase_.load(std::memory_order_relaxed) != phase::waiting) return;
      if (mine->signal_.slot().has_handler()) {
        mine->signal_.emit(asio::cancellation_type::terminal);
      } else {
        mine->left_alone_ = true;
        mine->where_->resume(*mine);
      }
    });
  }
  /// Who is completed from now on; null: nobody. In turns only.
  void tell(hub_waiter* waiter) noexcept { waiter_ = waiter; }

  /// Whether it has ended. In turns only.
  [[nodiscard]] bool done() const noexcept { return phase_.load(std::memory_order_relaxed) == phase::done; }
  /// Whether it ended with results: not because it was cancelled, or could not be.
  [[nodiscard]] bool succeeded_or_failed() const noexcept {
    return done() && !left_alone_ && !(cancelled_ && aborted());
  }
  /// Null unless it ended with any.
  [[nodiscard]] std::tuple<Results...>* results() noexcept {
    return done() && !left_alone_ ? std::addressof(*results_) : nullptr;
  }

  void release() noexcept {
    // acq_rel: whoever frees it has seen all that the other did with it.
    if (references_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }
  struct releaser {
    void operator()(op_state* state) const noexcept { state->release(); }
  };

 private:
  enum class phase : std::uint8_t { beginning, waiting, done, abandoned };

  [[nodiscard]] bool aborted() const noexcept {
    if constexpr (sizeof...(Results) > 0) {
      return error_in(std::get<0>(*results_)) == asio::error::operation_aborted;
    } else {
      return false;
    }
  }

  hub* where_;
  asio::any_io_executor executor_;
  hub_waiter* waiter_;
  asio::cancellation_signal signal_;
  std::optional<std::tuple<Results...>> results_;
  std::atomic<phase> phase_{phase::beginning};
  bool cancelled_ = false;
  bool left_alone_ = false;
  /// The awaiter's, the handler's, and that of a cancellation on its way.
  std::atomic<std::uint32_t> references_{2};
};

/// The completion handler. Its executor is the coroutine's, a task's being its hub's, so that whatever the operation does
/// for it, and the end, happen there.
template <class... Results>
class op_handler {
 public:
  using executor_type = asio::any_io_executor;
  using cancellation_slot_type = asio::cancellation_slot;

  explicit op_handler(op_state<Results...>& state) noexcept : state_{&state} {}
  op_handler(op_handler&& other) noexcept = default;
  op_handler& operator=(op_handler&& other) noexcept = default;

  [[nodiscard]] executor_type get_executor() const noexcept { return state_->executor(); }
  [[nodiscard]] cancellation_slot_type get_cancellation_slot() const noexcept { return state_->slot(); }

  template <class... Arguments>
  void operator()(Arguments&&... results) {
    const auto state = std::move(state_);
    state->completed(std::forward<Arguments>(results)...);
  }

 private:
  std::unique_ptr<op_state<Results...>, typename op_state<Results...>::releaser> state_;
};

/// Whether the first result of an operation tells that it failed.
template <class... Results>
inline constexpr bool first_tells_error = false;
template <class... Rest>
inline constexpr bool first_tells_error<std::error_code, Rest...> = true;
template <class... Rest>
inline constexpr bool first_tells_error<std::exception_ptr, Rest...> = true;

/// An operation of Asio that a coroutine awaits, alone or as one of a selection.
template <class Initiation, class Signature, class... Arguments>
class op_awaiter;
template <class Initiation, class... Results, class... Arguments>
class [[nodiscard]] op_awaiter<Initiation, void(Results...), Arguments...> {
 public:
  static constexpr bool sets_errors = true;

  template <class I, class... A>
  explicit op_awaiter(std::error_code* error, I&& initiation, A&&... arguments)
      : initiation_{std::forward<I>(initiation)}, arguments_{std::forward<A>(arguments)...}, error_{error} {}
  /// Moved only before it is awaited.
  op_awaiter(op_awaiter&& other)
      : initiation_{std::move(other.initiation_)}, arguments_{std::move(other.arguments_)}, error_{other.error_} {}
  op_awaiter& operator=(op_awaiter&&) = delete;
  ~op_awaiter() { forsake(); }

  [[nodiscard]] bool await_ready() const noexcept { return false; }

  template <class Promise>
  bool await_suspend(std::coroutine_handle<Promise> awaiting) {
    alone_.awaiting = awaiting;
    alone_.complete = [](hub_waiter& waiter) { static_cast<resumption&>(waiter).awaiting.resume(); };
    const wait_place place{hub_to_wait_on(awaiting)};
    if (state_ != nullptr) {  // it was lent, and goes on
      state_->tell(&alone_);
      return !state_->done();
    }
    // A completion on another thread waits for the turn that this one is in.
    return begin(place, alone_, [](auto& part) -> auto&& { return std::move(part); });
  }

  auto await_resume() { return finish_lent(); }

  // As one of a selection.
  [[nodiscard]] bool ready_now() const noexcept { return look(false); }
  [[nodiscard]] bool look(bool) const noexcept { return state_ != nullptr && state_->succeeded_or_failed(); }
  [[nodiscard]] bool committed() const noexcept { return look(false); }
  bool wait(const wait_place& place, hub_waiter& waiter) {
    if (look(false)) return false;
    if (state_ != nullptr) {  // it was cancelled, and begins again
      if constexpr (!repeatable) {
        throw std::system_error{std::make_error_code(std::errc::operation_not_supported),
                                "expected an operation of Asio that can be copied, to begin it again; found one that "
                                "can only be moved"};
      }
      forsake();
    }
    return begin(place, waiter, [](auto& part) {
      using part_type = std::remove_reference_t<decltype(part)>;
      if constexpr (repeatable) {
        return part_type(part);
      } else {
        return part_type(std::move(part));
      }
    });
  }
  bool withdraw(hub&, hub_waiter&) noexcept {
    if (state_ == nullptr || state_->done()) return true;
    state_->cancel();
    return false;
  }
  void forsake() noexcept {
    if (state_ == nullptr) return;
    state_->abandoned();
    std::exchange(state_, nullptr)->release();
  }

  /// Lent, it goes on until somebody asks again.
  bool wait_lent(const wait_place& place, hub_waiter& waiter) {
    if (state_ == nullptr) return wait(place, waiter);
    if (state_->done()) return false;
    state_->tell(&waiter);
    return true;
  }
  void withdraw_lent() noexcept {
    if (state_ != nullptr) state_->tell(nullptr);
  }
  /// The results; after them it can be begun again.
  auto finish_lent() {
    struct begin_again {
      op_awaiter& self;
      ~begin_again() { self.forsake(); }
    } const after{*this};
    return finish();
  }

  auto finish() {
    auto& results = *state_->results();
    if constexpr (first_tells_error<std::decay_t<Results>...>) {
      auto& failure = std::get<0>(results);
      if constexpr (std::is_same_v<std::decay_t<decltype(failure)>, std::error_code>) {
        if (error_ != nullptr) {
          *error_ = failure;
        } else if (failure) {
          throw std::system_error{failure};
        }
      } else if (failure) {
        std::rethrow_exception(failure);
      }
      return std::apply([](auto&, auto&... rest) { return yield(rest...); }, results);
    } else {
      return std::apply([](auto&... all) { return yield(all...); }, results);
    }
  }

  /// Ends it for a reason of somebody else's: thrown, set, or in the tuple, as its own errors are.
  auto finish_cancelled(std::error_code why) {
    std::tuple<std::decay_t<Results>...>* const so_far = state_ != nullptr ? state_->results() : nullptr;
    using yielded = decltype(finish());
    if constexpr (first_is_tuple<std::decay_t<Results>...>) {
      yielded results = so_far != nullptr ? std::move(std::get<0>(*so_far)) : yielded{};
      std::get<0>(results) = why;
      return results;
    } else {
      if (error_ == nullptr) throw std::system_error{why, "an operation of Asio"};
      // Whoever has errors set has one first in the results.
      *error_ = why;
      if constexpr (!first_tells_error<std::decay_t<Results>...>) {
        return finish();
      } else if constexpr (!std::is_void_v<yielded>) {
        if (so_far == nullptr) return yielded{};
        return std::apply([](auto&, auto&... rest) { return yield(rest...); }, *so_far);
      }
    }
  }

 private:
  using state_type = op_state<std::decay_t<Results>...>;
  static constexpr bool repeatable =
      std::is_copy_constructible_v<Initiation> && (std::is_copy_constructible_v<Arguments> && ...);
  struct resumption : hub_waiter {
    std::coroutine_handle<> awaiting;
  };
  template <class... First>
  static constexpr bool first_is_tuple = false;
  template <class... Rest>
  static constexpr bool first_is_tuple<std::tuple<std::error_code, Rest...>> = true;

  /// `pass` makes of each part of the initiation what is given to Asio.
  template <class Pass>
  bool begin(const wait_place& place, hub_waiter& waiter, Pass pass) {
    auto* state = new state_type{place, waiter};
    state_ = state;
    // From here on the handler owns its share, also when the initiation throws.
    op_handler<std::decay_t<Results>...> handler{*state};
    std::apply([&](Arguments&... arguments) { pass(initiation_)(std::move(handler), pass(arguments)...); }, arguments_);
    return state->began();
  }

  template <class... Values>
  static auto yield(Values&... values) {
    if constexpr (sizeof...(Values) == 1) {
      return (std::move(values), ...);
    } else if constexpr (sizeof...(Values) > 1) {
      return std::tuple<Values...>{std::move(values)...};
    }
  }

  Initiation initiation_;
  std::tuple<Arguments...> arguments_;
  std::error_code* error_;
  state_type* state_ = nullptr;
  resumption alone_;
};

/// Begins a coroutine of Asio's as an operation, on the executor of whoever waits for it.
struct begin_coroutine {
  template <class Handler, class T>
  void operator()(Handler&& handler, asio::awaitable<T> coroutine) const {
    const asio::any_io_executor executor = asio::get_associated_executor(handler);
    asio::co_spawn(executor, std::move(coroutine), std::forward<Handler>(handler));
  }
};

/// What stands beside an `||`, as an operation of a selection.
template <class Operation, class Executor>
Operation alternative(asio::awaitable<awaited<Operation>, Executor>&& operation) {
  return std::move(operation).take_operation();
}
template <class T, class Executor>
auto alternative(asio::awaitable<T, Executor>&& coroutine) {
  static_assert(std::is_same_v<Executor, asio::any_io_executor>,
                "beside an operation of strait's, `||` takes coroutines of Asio's default executor only");
  if constexpr (std::is_void_v<T>) {
    return op_awaiter<begin_coroutine, void(std::exception_ptr), asio::awaitable<void>>{nullptr, begin_coroutine{},
                                                                                        std::move(coroutine)};
  } else {
    static_assert(std::is_default_constructible_v<T>,
                  "what a coroutine beside an `||` returns must have a value when it throws: make it a std::optional");
    return op_awaiter<begin_coroutine, void(std::exception_ptr, T), asio::awaitable<T>>{nullptr, begin_coroutine{},
                                                                                        std::move(coroutine)};
  }
}

/// What `a || b` yields: as Asio's does, all alternatives of a chain in one variant.
template <class Left, class Right>
struct alternatives {
  using type = std::variant<Left, Right>;
  static type left(Left value) { return type{std::in_place_index<0>, std::move(value)}; }
  static type right(Right value) { return type{std::in_place_index<1>, std::move(value)}; }
};
template <class... Lefts, class Right>
struct alternatives<std::variant<Lefts...>, Right> {
  using type = std::variant<Lefts..., Right>;
  static type left(std::variant<Lefts...> value) {
    return [&]<std::size_t... Is>(std::index_sequence<Is...>) {
      std::optional<type> made;
      (void)((Is == value.index() && (made.emplace(std::in_place_index<Is>, std::get<Is>(std::move(value))), true)) ||
             ...);
      return std::move(*made);
    }(std::index_sequence_for<Lefts...>{});
  }
  static type right(Right value) { return type{std::in_place_index<sizeof...(Lefts)>, std::move(value)}; }
};

/// A `select` of two that yields what `a || b` does.
template <class Left, class Right>
class either_operation : public select_operation<Left, Right> {
  using base = select_operation<Left, Right>;
  using both = decltype(base::result::result);
  using made = alternatives<std::variant_alternative_t<0, both>, std::variant_alternative_t<1, both>>;

 public:
  using result = typename made::type;
  using base::base;

  result finish() {
    auto done = base::finish();
    return done.index == 0 ? made::left(std::get<0>(std::move(done.result)))
                           : made::right(std::get<1>(std::move(done.result)));
  }
  result finish_cancelled(std::error_code why) { throw std::system_error{why, "a || b"}; }
};

template <class Left, class Right, class Executor>
auto either(asio::awaitable<Left, Executor>&& left, asio::awaitable<Right, Executor>&& right) {
  using operation = either_operation<decltype(alternative(std::move(left))), decltype(alternative(std::move(right)))>;
  return asio::awaitable<awaited<operation>, Executor>{
      operation{alternative(std::move(left)), alternative(std::move(right))}};
}

}  // namespace detail

/// `co_await (a || b)`, where at least one of the two is an operation of strait's and the other may be any
/// `asio::awaitable`: does one of them, and yields what that yielded as a `std::variant`, with `std::monostate` for
/// nothing. A chain of them yields one variant of all.
///
///     const auto done = co_await (orders.recv() || cancels.recv() || timer.async_wait(asio::use_awaitable));
///
/// It is `select`, spelled and with the result as by Asio's `awaitable_operators`, and is found with or without those. So
/// unlike between two coroutines of Asio's nothing is lost, and the first to fail ends it: its error is thrown.
///
/// Waits: as `select`. Cancel safety: as `select`. Allocates: for a coroutine of Asio's beside it what `co_spawn` does, and
/// one small block from where frames come from. Errors: as `select`. Complexity: as `select`.
template <class Left, class Right, class Executor>
[[nodiscard]] auto operator||(asio::awaitable<awaited<Left>, Executor> left,
                              asio::awaitable<awaited<Right>, Executor> right) {
  return detail::either(std::move(left), std::move(right));
}
/// The same; one for each of Asio's, which would otherwise be as good.
template <class Left, class T, class Executor>
[[nodiscard]] auto operator||(asio::awaitable<awaited<Left>, Executor> left, asio::awaitable<T, Executor> right) {
  return detail::either(std::move(left), std::move(right));
}
template <class Left, class Executor>
[[nodiscard]] auto operator||(asio::awaitable<awaited<Left>, Executor> left, asio::awaitable<void, Executor> right) {
  return detail::either(std::move(left), std::move(right));
}
template <class T, class Right, class Executor>
[[nodiscard]] auto operator||(asio::awaitable<T, Executor> left, asio::awaitable<awaited<Right>, Executor> right) {
  return detail::either(std::move(left), std::move(right));
}
template <class Right, class Executor>
[[nodiscard]] auto operator||(asio::awaitable<void, Executor> left, asio::awaitable<awaited<Right>, Executor> right) {
  return detail::either(std::move(left), std::move(right));
}
template <class... Ts, class Right, class Executor>
[[nodiscard]] auto operator||(asio::awaitable<std::variant<Ts...>, Executor> left,
                              asio::awaitable<awaited<Right>, Executor> right) {
  return detail::either(std::move(left), std::move(right));
}

}  // namespace strait

/// How Asio begins an operation for `use_op`: not yet, only when it is awaited.
template <class... Results>
class asio::async_result<strait::use_op_t, void(Results...)> {
 public:
  template <class Initiation, class... Arguments>
  static auto initiate(Initiation&& initiation, strait::use_op_t, Arguments&&... arguments) {
    return strait::detail::op_awaiter<std::decay_t<Initiation>, void(Results...), std::decay_t<Arguments>...>{
        nullptr, std::forward<Initiation>(initiation), std::forward<Arguments>(arguments)...};
  }
};

/// The same for `use_op(error)`.
template <class... Results>
  requires std::is_same_v<std::tuple_element_t<0, std::tuple<Results..., void>>, std::error_code>
class asio::async_result<strait::use_op_into_t, void(Results...)> {
 public:
  template <class Initiation, class... Arguments>
  static auto initiate(Initiation&& initiation, strait::use_op_into_t into, Arguments&&... arguments) {
    return strait::detail::op_awaiter<std::decay_t<Initiation>, void(Results...), std::decay_t<Arguments>...>{
        into.error, std::forward<Initiation>(initiation), std::forward<Arguments>(arguments)...};
  }
};
