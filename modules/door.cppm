module;
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include "strait/asio_names.hpp"
export module strait.door;

import strait.error;
import strait.hub;
export import strait.channel;

/// Channels for peers who are not trusted: a listener at a Unix socket hands each client memory of its own, sealed, with
/// a lane in each direction.
///
///     client                                      listener, on its thread
///     ------                                      -----------------------
///     connect
///     hello: its two message types     ->         who is it? do the types fit?
///                                      <-         welcome, with three descriptors: the memory of both lanes and a line
///     checks, maps and enters both
///     entered                          ->         the duplex is ready for accept()
///
/// From then on the socket carries no more than rings: the connection itself is the line of the lane towards the
/// listener, and the third descriptor that of the lane back. What either side may do to the other is in docs/06-strangers.md.
export namespace strait {

/// Whom one is connected to, as the kernel tells it.
struct peer_credentials {
  /// In our PID namespace; 0 when it is not visible from there.
  std::uint32_t process = 0;
  std::uint32_t user = 0;
  std::uint32_t group = 0;
};

/// How a listener is made.
struct listener_options {
  /// Of each lane of each peer; `open` and `mode` have no meaning here.
  channel_options lanes = {};
  /// Permissions of the socket: who may write to it may connect. An abstract name has none.
  unsigned mode = 0600;
  /// The group of the socket. Default: that of a file that this process makes there.
  std::optional<unsigned> group = std::nullopt;
  /// Whose processes are let in, besides those of this process's own user: of these users, or with one of these groups.
  std::vector<unsigned> users = {};
  std::vector<unsigned> groups = {};
  /// How many peers may wait for `accept`, and how many may be on their way in. After 100 ms the oldest of the latter makes
  /// room for a newcomer, so that those who connect and say nothing are not long in anybody's way.
  std::size_t backlog = 64;
  /// How long a peer may take from the connection to `entered`. Afterwards no time counts.
  std::chrono::milliseconds handshake = std::chrono::seconds{2};
};

/// How one connects.
struct connect_options {
  /// Of this end of each lane. `capacity` is the listener's to choose; if it is given, it must be that. `open` and
  /// `mode` have no meaning here; `node` has the memory moved.
  channel_options lanes = {};
  /// Whose listeners are accepted, besides those of this process's own user.
  std::vector<unsigned> users = {};
  std::vector<unsigned> groups = {};
};

/// What comes in at a door: both ends of a peer's, or why there are none.
struct arrival {
  std::unique_ptr<endpoint> receiving;
  std::unique_ptr<endpoint> sending;
  peer_credentials peer;
  /// Why a `connect` failed: a `std::system_error`.
  std::exception_ptr failure;
};

/// The code of a failure that is a `std::system_error`; that of no error where there is none.
[[nodiscard]] std::error_code code_of(const std::exception_ptr& failure) noexcept;
/// What a listener says that was closed.
///
/// Waits: never. Allocates: the exception. Errors: none. Complexity: constant.
[[nodiscard]] std::exception_ptr listener_closed();

/// A pair of lanes to one peer: a receiver and a sender, to be used together through this object, or apart, each in a
/// coroutine of its own, as `in` and `out`.
///
/// After the peer's process died, each of the two reports `errc::peer_died` once, and then that it is closed: nobody
/// replaces an end of memory without a name. A client connects again.
///
/// Every operation, as that of the same name of `receiver` or `sender`: Waits: as there. Cancel safety: as there. Allocates:
/// as there. Errors: as there. Complexity: as there.
template <class In, class Out>
class duplex {
 public:
  receiver<In> in;
  sender<Out> out;

  duplex() = default;
  /// For the listener and `connect`.
  explicit duplex(arrival came) noexcept
      : in{std::move(came.receiving)}, out{std::move(came.sending)}, peer_{came.peer} {}

  /// As of the receiver.
  [[nodiscard]] auto recv() { return in.recv(); }
  [[nodiscard]] auto recv(std::error_code& error) { return in.recv(error); }
  [[nodiscard]] auto recv_many(std::span<In> into) { return in.recv_many(into); }
  [[nodiscard]] auto recv_many(std::span<In> into, std::error_code& error) { return in.recv_many(into, error); }
  /// What is shown can change while it is looked at: to a peer that is not trusted, copy before you check.
  [[nodiscard]] auto peek() { return in.peek(); }
  [[nodiscard]] auto peek(std::error_code& error) { return in.peek(error); }
  void release(std::size_t n) noexcept { in.release(n); }
  [[nodiscard]] std::optional<In> try_recv() { return in.try_recv(); }
  [[nodiscard]] std::optional<In> try_recv(std::error_code& error) { return in.try_recv(error); }
  [[nodiscard]] std::optional<In> blocking_recv() { return in.blocking_recv(); }
  [[nodiscard]] std::optional<In> blocking_recv(std::error_code& error) { return in.blocking_recv(error); }
  [[nodiscard]] std::optional<In> blocking_recv_until(std::chrono::steady_clock::time_point deadline) {
    return in.blocking_recv_until(deadline);
  }
  [[nodiscard]] std::optional<In> blocking_recv_until(std::chrono::steady_clock::time_point deadline,
                                                      std::error_code& error) {
    return in.blocking_recv_until(deadline, error);
  }

  /// As of the sender.
  [[nodiscard]] auto send(Out message) { return out.send(std::move(message)); }
  [[nodiscard]] auto send(Out message, std::error_code& error) { return out.send(std::move(message), error); }
  [[nodiscard]] auto send_many(std::span<const Out> messages) { return out.send_many(messages); }
  [[nodiscard]] auto send_many(std::span<const Out> messages, std::error_code& error) {
    return out.send_many(messages, error);
  }
  [[nodiscard]] auto reserve(std::size_t n) { return out.reserve(n); }
  [[nodiscard]] auto reserve(std::size_t n, std::error_code& error) { return out.reserve(n, error); }
  [[nodiscard]] bool try_send(const Out& message) { return out.try_send(message); }
  [[nodiscard]] bool try_send(const Out& message, std::error_code& error) { return out.try_send(message, error); }
  void blocking_send(Out message) { out.blocking_send(std::move(message)); }
  void blocking_send(Out message, std::error_code& error) { out.blocking_send(std::move(message), error); }
  bool blocking_send_until(Out message, std::chrono::steady_clock::time_point deadline) {
    return out.blocking_send_until(std::move(message), deadline);
  }
  bool blocking_send_until(Out message, std::chrono::steady_clock::time_point deadline, std::error_code& error) {
    return out.blocking_send_until(std::move(message), deadline, error);
  }

  /// Closes both directions. Idempotent.
  void close() noexcept {
    in.close();
    out.close();
  }

  /// Whom this one is connected to.
  [[nodiscard]] peer_credentials peer() const noexcept { return peer_; }

 private:
  peer_credentials peer_;
};

/// The types of a duplex's lanes, and how each end of them is made.
struct duplex_shape {
  message_shape in;
  message_shape out;
};

template <class In, class Out>
inline constexpr duplex_shape duplex_shape_of = [] {
  must_cross_processes<In>();
  must_cross_processes<Out>();
  return duplex_shape{shape_of<In>, shape_of<Out>};
}();

/// The listener without its types: the socket, the thread that lets peers in, and the private channel by which they come
/// to whoever accepts. It has a thread of its own because a newcomer's memory is allocated and touched, which takes
/// milliseconds that no `io_context` should pay.
///
/// Waits: `close` and the destructor, for that thread. Cancel safety: cannot be cancelled. Allocates: as `listener` says.
/// Errors: as `listener` says. Complexity: system calls.
class doorkeeper {
 public:
  doorkeeper(std::string_view name, const duplex_shape& shape, const listener_options& options);
  ~doorkeeper();
  doorkeeper(const doorkeeper&) = delete;
  doorkeeper& operator=(const doorkeeper&) = delete;

  /// Where they come; after `close` a receiver whose stream has ended.
  [[nodiscard]] receiver<arrival>& arrivals() noexcept;
  /// One was taken, so there is room for the next.
  void taken() noexcept;
  void close() noexcept;
  [[nodiscard]] bool is_closed() const noexcept { return !state_; }
  [[nodiscard]] std::uint64_t refused() const noexcept;

 private:
  struct state;
  std::unique_ptr<state> state_;
  receiver<arrival> closed_;
};

/// A `connect` on its way: a thread that talks to the listener and leaves what came of it in a private channel.
///
/// Waits: the destructor, for that thread. Cancel safety: destroying it ends the attempt. Allocates: as `connect` says.
/// Errors: as `connect` says. Complexity: system calls.
class caller {
 public:
  /// What fails arrives as an error.
  caller(std::string_view name, const duplex_shape& shape, const connect_options& options);
  /// Ends the attempt.
  ~caller();
  caller(const caller&) = delete;
  caller& operator=(const caller&) = delete;

  [[nodiscard]] receiver<arrival>& arrivals() noexcept;
  void taken() noexcept {}

  /// The same on the calling thread, until the deadline if there is one.
  [[nodiscard]] static arrival call(std::string_view name, const duplex_shape& shape, const connect_options& options,
                                    std::optional<std::chrono::steady_clock::time_point> deadline);

 private:
  struct state;
  std::unique_ptr<state> state_;
};

/// Waits for one to arrive. `From` keeps the private channel by which it comes: the `doorkeeper` of a listener, which is
/// the listener's, or a `caller` of its own.
template <class In, class Out, class From, class Errors>
class arrival_operation {
 public:
  static constexpr bool sets_errors = Errors::set;
  using result = duplex<In, Out>;

  arrival_operation(From from, Errors errors) noexcept
      : from_{std::move(from)}, wait_{from_->arrivals(), errors_thrown{}}, errors_{errors} {}

  [[nodiscard]] bool ready_now() noexcept { return wait_.ready_now(); }
  [[nodiscard]] bool look(bool alone) noexcept { return wait_.look(alone); }
  bool wait(const wait_place& place, hub_waiter& waiter) noexcept { return wait_.wait(place, waiter); }
  bool withdraw(hub& where, hub_waiter& waiter) noexcept { return wait_.withdraw(where, waiter); }

  result finish() {
    std::exception_ptr failure;
    result made = finish(failure);
    if constexpr (Errors::set) {
      *errors_.code = code_of(failure);
    } else if (failure) {
      std::rethrow_exception(failure);
    }
    return made;
  }
  /// The same, for those who want the error to go elsewhere.
  result finish(std::exception_ptr& failure) {
    news why = news::none;
    std::optional<arrival> came = wait_.finish(why);
    if (!came) {
      failure = listener_closed();  // the private channel has no other end any more
      return {};
    }
    from_->taken();
    failure = came->failure;
    if (failure) return {};
    return result{std::move(*came)};
  }
  result finish_cancelled(std::error_code why) {
    if constexpr (!Errors::set) {
      throw std::system_error{why, "waiting for a peer"};
    } else {
      *errors_.code = why;
    }
    return {};
  }

 private:
  From from_;
  typename receiver<arrival>::template recv_operation<> wait_;
  [[no_unique_address]] Errors errors_;
};

/// Accepts peers at a Unix socket. Used by one thread at a time, and after it was moved from only to be assigned or
/// destroyed; the destructor closes: the socket goes, those who were
/// not accepted yet are hung up on, and those who were keep their lanes.
///
/// `In` is what peers send to this side, `Out` what this side sends to them.
template <class In, class Out>
class listener {
 public:
  /// Listens at `unix:/run/app.sock`, or at `unix:@app`, a name in the abstract namespace, which leaves no trace in any
  /// directory and has no permissions.
  ///
  /// What a dead listener left at the path is replaced; a living one, and anything that is not a socket, is not touched.
  ///
  /// Waits: at most a second, while another listener is coming or going in the same directory. Allocates: a thread, a
  /// little memory. Errors: `unknown_scheme`, `bad_name`, `bad_capacity`; `end_in_use` when a listener lives there;
  /// `foreign_segment` when something else is in the way; `no_permission`; or the errno of the failing call. Complexity:
  /// system calls.
  explicit listener(std::string_view name, const listener_options& options = {})
      : keeper_{std::make_unique<doorkeeper>(name, duplex_shape_of<In, Out>, options)} {}

  /// Waits for the next peer. To be awaited; yields a `duplex<In, Out>`.
  ///
  /// Waits: in the hub while there is none. Cancel safety: who was not yielded waits for the next `accept`. Allocates:
  /// never; the listener's thread made everything. Errors: `closed` when this listener was closed, thrown or set.
  /// Complexity: constant.
  [[nodiscard]] auto accept() { return operation(errors_thrown{}); }
  [[nodiscard]] auto accept(std::error_code& error) { return operation(errors_set{&error}); }

  /// The next peer if there is one; empty otherwise.
  ///
  /// Waits: never. Allocates: never. Errors: as `accept`. Complexity: constant.
  [[nodiscard]] std::optional<duplex<In, Out>> try_accept() {
    if (is_closed()) std::rethrow_exception(listener_closed());
    return let_in(keeper_->arrivals().try_recv());
  }

  /// Waits for the next peer, blocking the thread.
  ///
  /// Waits: spins, then parks on the futex. Cancel safety: only a deadline ends it, and who comes then waits for the next
  /// `accept`. Allocates: never. Errors: as `accept`. Complexity: constant.
  [[nodiscard]] duplex<In, Out> blocking_accept() {
    std::error_code error;
    auto made = blocking_accept(error);
    if (error) std::rethrow_exception(listener_closed());
    return made;
  }
  [[nodiscard]] duplex<In, Out> blocking_accept(std::error_code& error) { return block(error, std::nullopt); }
  /// The same, until the deadline; when it passes, `std::errc::timed_out` is thrown or set.
  [[nodiscard]] duplex<In, Out> blocking_accept_until(std::chrono::steady_clock::time_point deadline) {
    std::error_code error;
    auto made = block(error, deadline);
    if (error) throw std::system_error{error, "waiting for a peer"};
    return made;
  }
  [[nodiscard]] duplex<In, Out> blocking_accept_until(std::chrono::steady_clock::time_point deadline,
                                                      std::error_code& error) {
    return block(error, deadline);
  }

  /// As the class says. Idempotent. No operation may be waiting.
  ///
  /// Waits: for the listener's thread. Cancel safety: cannot be cancelled. Allocates: never. Errors: none. Complexity:
  /// linear in those who are on their way in.
  void close() noexcept { keeper_->close(); }
  [[nodiscard]] bool is_closed() const noexcept { return keeper_->is_closed(); }
  /// How many were not let in since this listener was made: of another user, with other message types, too slow, or
  /// saying something else than our clients do. Clients of ours were told why.
  [[nodiscard]] std::uint64_t refused() const noexcept { return keeper_->refused(); }

  /// For `async_accept`.
  ///
  /// Waits: never. Allocates: never. Errors: none. Complexity: constant.
  template <class Errors>
  [[nodiscard]] auto make_operation(Errors errors) {
    return arrival_operation<In, Out, doorkeeper*, Errors>{keeper_.get(), errors};
  }

 private:
  template <class Errors>
  [[nodiscard]] auto operation(Errors errors) {
    return awaitable_operation<arrival_operation<In, Out, doorkeeper*, Errors>>{make_operation(errors)};
  }

  std::optional<duplex<In, Out>> let_in(std::optional<arrival> came) {
    if (!came) return std::nullopt;
    keeper_->taken();
    return duplex<In, Out>{std::move(*came)};
  }

  duplex<In, Out> block(std::error_code& error, std::optional<std::chrono::steady_clock::time_point> deadline) {
    if (is_closed()) {
      error = make_error_code(errc::closed);
      return {};
    }
    auto& arrivals = keeper_->arrivals();
    auto came = let_in(deadline ? arrivals.blocking_recv_until(*deadline, error) : arrivals.blocking_recv(error));
    return came ? std::move(*came) : duplex<In, Out>{};
  }

  std::unique_ptr<doorkeeper> keeper_;
};

/// Connects to a listener. To be awaited; yields a `duplex<In, Out>`: `In` is what the listener sends to this side, `Out`
/// what this side sends to it. The attempt begins at once, on a thread that lives as long as it does.
///
/// Waits: in the hub. Cancel safety: an attempt that is cancelled or destroyed is given up; the listener then sees a peer
/// that closed, if any. Allocates: a thread; the mapping of the memory. Errors, thrown or set: `unknown_scheme`,
/// `bad_name`; `type_mismatch`, `layout_mismatch`, `version_mismatch`, `no_permission`, each of which tells both sides;
/// ENOENT or ECONNREFUSED when nobody listens, ECONNRESET when the listener hangs up meanwhile; `foreign_segment` and the
/// like when what was handed over is not sound; or the errno of the failing call. Complexity: system calls; touching the
/// memory.
template <class In, class Out>
[[nodiscard]] auto connect(std::string_view name, const connect_options& options = {}) {
  using operation = arrival_operation<In, Out, std::unique_ptr<caller>, errors_thrown>;
  return awaitable_operation<operation>{
      operation{std::make_unique<caller>(name, duplex_shape_of<In, Out>, options), errors_thrown{}}};
}
template <class In, class Out>
[[nodiscard]] auto connect(std::string_view name, std::error_code& error, const connect_options& options = {}) {
  using operation = arrival_operation<In, Out, std::unique_ptr<caller>, errors_set>;
  return awaitable_operation<operation>{
      operation{std::make_unique<caller>(name, duplex_shape_of<In, Out>, options), errors_set{&error}}};
}

/// The same, blocking the thread; no other is made.
///
/// Waits: parks in the kernel while the listener answers. Everything else as for `connect`.
template <class In, class Out>
[[nodiscard]] duplex<In, Out> blocking_connect(std::string_view name, std::error_code& error,
                                               const connect_options& options = {}) {
  arrival came = caller::call(name, duplex_shape_of<In, Out>, options, std::nullopt);
  error = code_of(came.failure);
  return error ? duplex<In, Out>{} : duplex<In, Out>{std::move(came)};
}
template <class In, class Out>
[[nodiscard]] duplex<In, Out> blocking_connect(std::string_view name, const connect_options& options = {}) {
  arrival came = caller::call(name, duplex_shape_of<In, Out>, options, std::nullopt);
  if (came.failure) std::rethrow_exception(came.failure);
  return duplex<In, Out>{std::move(came)};
}
/// The same, until the deadline; when it passes, `std::errc::timed_out` is thrown or set.
template <class In, class Out>
[[nodiscard]] duplex<In, Out> blocking_connect_until(std::string_view name,
                                                     std::chrono::steady_clock::time_point deadline,
                                                     std::error_code& error, const connect_options& options = {}) {
  arrival came = caller::call(name, duplex_shape_of<In, Out>, options, deadline);
  error = code_of(came.failure);
  return error ? duplex<In, Out>{} : duplex<In, Out>{std::move(came)};
}
template <class In, class Out>
[[nodiscard]] duplex<In, Out> blocking_connect_until(std::string_view name,
                                                     std::chrono::steady_clock::time_point deadline,
                                                     const connect_options& options = {}) {
  arrival came = caller::call(name, duplex_shape_of<In, Out>, options, deadline);
  if (came.failure) std::rethrow_exception(came.failure);
  return duplex<In, Out>{std::move(came)};
}

}  // namespace strait
