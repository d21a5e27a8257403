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
#include <asio/cancellation_type.hpp>
#include <asio/dispatch.hpp>
#include <asio/error.hpp>
#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>
#include <asio/recycling_allocator.hpp>
#include <asio/system_executor.hpp>
#include <asio/use_awaitable.hpp>
#include <coroutine>
#include <memory>
#include <new>
#include <optional>
#include <system_error>
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

/// An executor of the node's next worker: for sockets, timers and everything else of Asio that is to live there.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
[[nodiscard]] asio::any_io_executor executor(runtime_node& node);

/// Runs a task in a context of your own. An exception that leaves it is thrown out of the context's `run()`.
///
/// Waits: never. Allocates: one frame. Errors: `std::bad_alloc`. Complexity: constant.
inline void spawn(const asio::any_io_executor& executor, task<> what) { spawn_on(hub_of(executor), std::move(what)); }

/// The context's executor.
inline void spawn(asio::io_context& context, task<> what) { spawn(context.get_executor(), std::move(what)); }

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

}  // namespace strait
