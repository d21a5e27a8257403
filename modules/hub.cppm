module;
#include <cstdint>
#include <exception>
export module strait.hub;

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
/// | idle     | the turn, when nobody waits               | the context's `run()` may return                 |
/// | resident | whoever finds it idle or parked, by CAS   | exactly one turn is posted or running            |
/// | parked   | the turn                                  | the doorbell, or a new waiter, makes it resident |
export namespace strait {

class hub;

/// One operation that waits. It lives in the awaiter or in the operation's own memory, and is on one hub at most.
struct hub_waiter {
  /// The end whose word the peer reads; null for one that only wants its turn.
  endpoint* end = nullptr;
  /// Looks whether the operation can go on. `alone`: no other operation waits on this hub, so a pause harms nobody.
  bool (*ready)(hub_waiter& self, bool alone) noexcept = nullptr;
  /// Goes on. Called once, by the turn, when the waiter is on no list any more; `self` may be gone when it returns.
  void (*complete)(hub_waiter& self) = nullptr;
  /// The context is being destroyed: frees what the operation owns, without going on.
  void (*abandon)(hub_waiter& self) noexcept = nullptr;

  hub* owner = nullptr;
  hub_waiter* previous = nullptr;
  hub_waiter* next = nullptr;
};

/// A coroutine that nobody awaits, and that the context destroys when it is destroyed itself.
struct hub_root {
  void (*destroy)(hub_root& self) noexcept = nullptr;
  hub_root* previous = nullptr;
  hub_root* next = nullptr;
};

class hub {
 public:
  /// The hub whose turn this thread is in, or that of the worker that this thread is; null elsewhere.
  [[nodiscard]] static hub* current() noexcept;
  /// Makes `of_worker` the current hub of this thread outside turns.
  static void set_current(hub* of_worker) noexcept;

  /// Has the turn complete `waiter` when it is ready. From any thread; within a turn it costs a list insertion.
  ///
  /// Waits: never. Allocates: never. Errors: none. Complexity: constant.
  virtual void wait(hub_waiter& waiter) noexcept = 0;

  /// Takes the waiter off, if it still waits; false: it does not, it is being completed or was. The caller sees to it that
  /// `waiter` lives until then.
  ///
  /// Waits: for the slice of a turn that runs on another thread. Allocates: never. Complexity: constant.
  virtual bool withdraw(hub_waiter& waiter) noexcept = 0;

  /// From now on nothing but this hub uses the context (`false`), so a turn need not end for the sake of others; or
  /// something may (`true`, the first state).
  virtual void share(bool shared) noexcept = 0;

  /// No turn goes on after this; what waits stays waiting.
  virtual void stop() noexcept = 0;

  /// A coroutine that nobody awaits lives from here ...
  virtual void add_root(hub_root& root) noexcept = 0;
  /// ... to here. `error`, if there is one, is thrown out of the context's `run()`.
  virtual void remove_root(hub_root& root, std::exception_ptr error) noexcept = 0;

 protected:
  hub() = default;
  ~hub() = default;
};

}  // namespace strait
