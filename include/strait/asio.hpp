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
#include <asio/dispatch.hpp>
#include <asio/error.hpp>
#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>
#include <asio/recycling_allocator.hpp>
#include <asio/system_executor.hpp>
#include <asio/use_awaitable.hpp>
#include <atomic>
#include <coroutine>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <system_error>
#include <tuple>
#include <type_traits>
#include <utility>

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

/// The context's executor.
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

/// An operation that waits on a hub on behalf of a completion handler. `Step` has `end()`, `look(alone)` and
/// `invoke(handler, aborted)`.
template <class Step, class Handler>
class handler_wait final : public hub_waiter {
 public:
  static void start(Step step, Handler&& handler) {
    const auto executor = asio::get_associated_executor(handler, asio::system_executor{});
    hub& where = hub_for(executor);
    allocator_type allocator = allocator_for(handler);
    handler_wait* made = std::allocator_traits<allocator_type>::allocate(allocator, 1);
    ::new (static_cast<void*>(made)) handler_wait{where, std::move(step), std::move(handler), executor};
    auto slot = asio::get_associated_cancellation_slot(made->handler_);
    if (slot.is_connected()) {
      slot.assign([made](asio::cancellation_type type) {
        if (type != asio::cancellation_type::none) made->cancel();
      });
    }
    where.wait(*made);
  }

 private:
  using executor_type = asio::associated_executor_t<Handler, asio::system_executor>;
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
    end = step_.end();
    ready = [](hub_waiter& self, bool alone) noexcept { return static_cast<handler_wait&>(self).step_.look(alone); };
    complete = [](hub_waiter& self) {
      auto& me = static_cast<handler_wait&>(self);
      asio::dispatch(me.work_.get_executor(), delivery{&me, false});
    };
    abandon = [](hub_waiter& self) noexcept { static_cast<handler_wait&>(self).dismantle(); };
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
    this->~handler_wait();
    std::allocator_traits<allocator_type>::deallocate(allocator, this, 1);
    return left;
  }

  /// The way from the hub's turn to the handler's executor. Until it has arrived this object stays as it is: a
  /// cancellation comes by the handler's executor, and may come meanwhile.
  class delivery {
   public:
    delivery(handler_wait* what, bool aborted) noexcept : what_{what}, aborted_{aborted} {}
    void operator()() { what_.release()->finish(aborted_); }

   private:
    struct dismantled {
      void operator()(handler_wait* what) const noexcept { what->dismantle(); }
    };
    /// Never delivered, when the context is destroyed first.
    std::unique_ptr<handler_wait, dismantled> what_;
    bool aborted_;
  };

  /// On the handler's executor: only here a message is taken.
  void finish(bool aborted) {
    // On the way, another operation on the same handle may have taken what this one was woken for.
    if (!aborted && !step_.look(false)) {
      where_.wait(*this);
      return;
    }
    asio::get_associated_cancellation_slot(handler_).clear();
    auto left = dismantle();
    left.step.invoke(std::move(left.handler), aborted);
  }

  /// On the handler's executor, as Asio's cancellation asks for.
  void cancel() {
    if (!where_.withdraw(*this)) return;  // completing already
    asio::post(work_.get_executor(), delivery{this, true});
  }

  hub& where_;
  Step step_;
  Handler handler_;
  asio::executor_work_guard<executor_type> work_;
};

/// Waits until an operation can go on, and leaves it to the awaiting coroutine to do so.
template <class Operation>
struct until_ready {
  Operation* operation;
  [[nodiscard]] endpoint* end() const noexcept { return operation->end(); }
  [[nodiscard]] bool look(bool alone) noexcept { return operation->look(alone); }
  template <class Handler>
  void invoke(Handler&& handler, bool aborted) {
    std::forward<Handler>(handler)(aborted ? std::error_code{asio::error::operation_aborted} : std::error_code{});
  }
};

/// Waits, does the operation, and hands the result to the handler.
template <class Operation>
struct whole {
  Operation operation;
  [[nodiscard]] endpoint* end() const noexcept { return operation.end(); }
  [[nodiscard]] bool look(bool alone) noexcept { return operation.look(alone); }
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
      std::forward<Handler>(handler)(std::error_code{asio::error::operation_aborted}, result{});
    } else {
      result value = operation.finish(why);
      std::forward<Handler>(handler)(to_error(why), std::move(value));
    }
  }
  static std::error_code to_error(news why) noexcept {
    return why == news::none ? std::error_code{} : make_error_code(to_errc(why));
  }
};

template <class Step, class Signature, class Token>
auto start(Step step, Token&& token) {
  return asio::async_initiate<Token, Signature>(
      [](auto&& handler, Step from) {
        using handler_type = std::decay_t<decltype(handler)>;
        handler_wait<Step, handler_type>::start(std::move(from), std::forward<decltype(handler)>(handler));
      },
      token, std::move(step));
}

}  // namespace detail

/// How an operation that is not ready suspends an asio::awaitable: through an ordinary asynchronous operation of Asio,
/// whose frame is taken from Asio's cache, and only then.
template <class Operation, class Executor>
struct asio_suspension {
  using operation_awaitable = asio::awaitable<awaited<Operation>, Executor>;
  using wait_awaitable = asio::awaitable<void, Executor>;

  template <class Promise>
  static void suspend(operation_awaitable& self, std::coroutine_handle<Promise> awaiting) {
    static_assert(sizeof(wait_awaitable) <= sizeof self.suspension_);
    auto* wait = ::new (static_cast<void*>(self.suspension_))
        wait_awaitable{detail::start<detail::until_ready<Operation>, void(std::error_code)>(
            detail::until_ready<Operation>{&self.operation_}, asio::use_awaitable_t<Executor>{})};
    static constexpr typename operation_awaitable::suspended_operations through_asio{
        .destroy = [](operation_awaitable& of) noexcept { wait_in(of).~wait_awaitable(); },
        // Throws when the wait was cancelled.
        .resume = [](operation_awaitable& of) { wait_in(of).await_resume(); }};
    self.suspended_ = &through_asio;
    wait->await_suspend(awaiting);
  }

 private:
  static wait_awaitable& wait_in(operation_awaitable& self) noexcept {
    return *std::launder(reinterpret_cast<wait_awaitable*>(self.suspension_));
  }
};

/// Takes one message; any completion token. Signature: `void(std::error_code, std::optional<T>)`; empty without an error
/// is the end of the stream.
///
/// The completion runs on the handler's associated executor, which also decides whose hub waits; a handler without one
/// gets Asio's system executor. Waits: in that hub. Cancel safety: with a cancellation slot, as `recv`: nothing is taken.
/// Allocates: from the handler's associated allocator. Errors: as `recv`, and `asio::error::operation_aborted`.
template <class T, class Token>
auto async_recv(receiver<T>& from, Token&& token) {
  using operation = typename receiver<T>::template recv_operation<>;
  return detail::start<detail::whole<operation>, void(std::error_code, std::optional<T>)>(
      detail::whole<operation>{operation{from, {}}}, std::forward<Token>(token));
}

/// Sends one message; any completion token. Signature: `void(std::error_code)`. An error means that it was not sent.
/// Everything else as for `async_recv`.
template <class T, class U, class Token>
auto async_send(sender<T>& to, U&& message, Token&& token) {
  using operation = typename sender<T>::template send_operation<>;
  return detail::start<detail::whole<operation>, void(std::error_code)>(
      detail::whole<operation>{operation{to, T(std::forward<U>(message)), {}}}, std::forward<Token>(token));
}

/// `recv()` for an `asio::awaitable<T, Executor>` whose executor is not Asio's default: `co_await strait::recv<Executor>(rx)`.
template <class Executor, class T>
[[nodiscard]] auto recv(receiver<T>& from) {
  using operation = typename receiver<T>::template recv_operation<>;
  return asio::awaitable<awaited<operation>, Executor>{operation{from, {}}};
}

/// `send()` for the same: `co_await strait::send<Executor>(tx, message)`.
template <class Executor, class T, class U>
[[nodiscard]] auto send(sender<T>& to, U&& message) {
  using operation = typename sender<T>::template send_operation<>;
  return asio::awaitable<awaited<operation>, Executor>{operation{to, T(std::forward<U>(message)), {}}};
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

/// What an operation of Asio and the coroutine that waits for it have in common, so that each may outlive the other.
///
/// | phase     | entered by                                        | and then                                    |
/// |-----------|---------------------------------------------------|---------------------------------------------|
/// | beginning | the awaiter, which calls the initiation           |                                             |
/// | waiting   | the awaiter, when the initiation has returned     | the coroutine is suspended                  |
/// | done      | the handler: within the initiation, else in a turn | the coroutine goes on                      |
/// | abandoned | the awaiter, destroyed                            | the handler only drops what it holds        |
template <class... Results>
class op_state final : public hub_waiter {
 public:
  explicit op_state(hub& where, std::coroutine_handle<> awaiting) noexcept : where_{&where}, awaiting_{awaiting} {
    complete = [](hub_waiter& self) {
      auto& me = static_cast<op_state&>(self);
      // The coroutine may have been destroyed while the handler waited for the turn. relaxed: in turns only.
      if (me.phase_.load(std::memory_order_relaxed) != phase::waiting) return;
      me.phase_.store(phase::done, std::memory_order_relaxed);
      me.awaiting_.resume();
    };
  }
  static void* operator new(std::size_t bytes) { return allocate_frame(bytes); }
  static void operator delete(void* block) noexcept { free_frame(block); }

  [[nodiscard]] hub& where() const noexcept { return *where_; }
  [[nodiscard]] asio::cancellation_slot slot() noexcept { return signal_.slot(); }

  /// The initiation has returned. False: the operation is complete already, and nobody resumes the coroutine.
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
  [[nodiscard]] std::tuple<Results...>& results() noexcept { return *results_; }

  void release() noexcept {
    // acq_rel: whoever frees it has seen all that the other did with it.
    if (references_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

 private:
  enum class phase : std::uint8_t { beginning, waiting, done, abandoned };

  hub* where_;
  std::coroutine_handle<> awaiting_;
  asio::cancellation_signal signal_;
  std::optional<std::tuple<Results...>> results_;
  std::atomic<phase> phase_{phase::beginning};
  /// The awaiter's and the handler's.
  std::atomic<std::uint32_t> references_{2};
};

/// The completion handler. Its executor is the hub's, so that whatever the operation does for it, and the end, happen
/// there.
template <class... Results>
class op_handler {
 public:
  using executor_type = asio::any_io_executor;
  using cancellation_slot_type = asio::cancellation_slot;

  explicit op_handler(op_state<Results...>& state) noexcept : state_{&state} {}
  op_handler(op_handler&& other) noexcept = default;
  op_handler& operator=(op_handler&& other) noexcept = default;

  [[nodiscard]] executor_type get_executor() const noexcept { return executor_of(state_->where()); }
  [[nodiscard]] cancellation_slot_type get_cancellation_slot() const noexcept { return state_->slot(); }

  template <class... Arguments>
  void operator()(Arguments&&... results) {
    const auto state = std::move(state_);
    state->completed(std::forward<Arguments>(results)...);
  }

 private:
  struct releaser {
    void operator()(op_state<Results...>* state) const noexcept { state->release(); }
  };
  std::unique_ptr<op_state<Results...>, releaser> state_;
};

/// Whether the first result of an operation tells that it failed.
template <class... Results>
inline constexpr bool first_tells_error = false;
template <class... Rest>
inline constexpr bool first_tells_error<std::error_code, Rest...> = true;
template <class... Rest>
inline constexpr bool first_tells_error<std::exception_ptr, Rest...> = true;

/// An operation of Asio that a coroutine awaits.
template <class Initiation, class Signature, class... Arguments>
class op_awaiter;
template <class Initiation, class... Results, class... Arguments>
class [[nodiscard]] op_awaiter<Initiation, void(Results...), Arguments...> {
 public:
  template <class I, class... A>
  explicit op_awaiter(std::error_code* error, I&& initiation, A&&... arguments)
      : initiation_{std::forward<I>(initiation)}, arguments_{std::forward<A>(arguments)...}, error_{error} {}
  /// Moved only before it is awaited.
  op_awaiter(op_awaiter&& other)
      : initiation_{std::move(other.initiation_)}, arguments_{std::move(other.arguments_)}, error_{other.error_} {}
  op_awaiter& operator=(op_awaiter&&) = delete;
  ~op_awaiter() {
    if (state_ == nullptr) return;
    state_->abandoned();
    state_->release();
  }

  [[nodiscard]] bool await_ready() const noexcept { return false; }

  template <class Promise>
  bool await_suspend(std::coroutine_handle<Promise> awaiting) {
    auto* state = new state_type{hub_to_wait_on(awaiting), awaiting};
    state_ = state;
    // From here on the handler owns its share, also when the initiation throws.
    op_handler<std::decay_t<Results>...> handler{*state};
    std::apply([&](Arguments&... arguments) { std::move(initiation_)(std::move(handler), std::move(arguments)...); },
               arguments_);
    // A completion on another thread waits for the turn that this one is in.
    return state->began();
  }

  auto await_resume() {
    auto& results = state_->results();
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

 private:
  using state_type = op_state<std::decay_t<Results>...>;

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
};

}  // namespace detail

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
