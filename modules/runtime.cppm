module;
#include <version>

#include <condition_variable>
#include <cstddef>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef __cpp_lib_jthread
#include <stop_token>
#endif
export module strait.runtime;

export import strait.hub;
export import strait.task;
export import strait.topology;

/// The runtime: one pinned worker a core, each with an Asio `io_context` of its own, grouped by NUMA node.
export namespace strait {

/// Is told when a spawned task ends.
class spawn_observer {
 public:
  /// `error` is what left the task, or null. Called on the thread that ran it.
  ///
  /// Waits: never. Allocates: never. Errors: none. Complexity: constant.
  virtual void task_ended(const std::exception_ptr& error) noexcept = 0;

 protected:
  ~spawn_observer() = default;
};

/// Starts `what` on a hub, from any thread; nobody awaits it. If the context is destroyed first, so is the task. A thread
/// of something foreign that resumes it uses the hub until that call returns, so the context outlives the call.
///
/// Waits: never. Allocates: never. Errors: what leaves the task goes to `observer`; without one, it is thrown out of the
/// context's `run()`. Complexity: constant.
void spawn_on(hub& where, task<> what, spawn_observer* observer = nullptr) noexcept;

struct runtime_options {
  /// CPUs to run a worker on, by the system's numbers. Default: the first of each core that this process may use.
  std::optional<std::vector<unsigned>> cpus = std::nullopt;
};

class runtime;

/// The workers of one NUMA node.
class runtime_node {
 public:
  /// The system's number of the node: what `channel_options::node` takes.
  [[nodiscard]] unsigned id() const noexcept { return id_; }
  [[nodiscard]] std::size_t worker_count() const noexcept { return count_; }
  /// The CPU of a worker.
  ///
  /// Waits: never. Allocates: never. Errors: `std::out_of_range` that names how many there are. Complexity: constant.
  [[nodiscard]] unsigned cpu(std::size_t worker) const;

  /// Starts a task on the node's next worker. It stays there. From any thread.
  ///
  /// Waits: never. Allocates: never. Errors: what leaves the task is thrown by `join`. Complexity: constant.
  void spawn(task<> what) noexcept;

 private:
  friend class runtime;
  friend struct runtime_access;
  runtime_node(runtime& owner, unsigned id, std::size_t first, std::size_t count) noexcept
      : owner_{&owner}, id_{id}, first_{first}, count_{count} {}
  runtime* owner_;
  unsigned id_;
  std::size_t first_;
  std::size_t count_;
  /// Whose turn it is; only through next_worker, which counts atomically.
  [[nodiscard]] std::size_t next_worker() noexcept;
  std::size_t next_ = 0;
};

/// Runs tasks.
///
///     strait::runtime rt;
///     rt.node(0).spawn(engine(std::move(orders)));
///     rt.join();
class runtime {
 public:
  /// Starts the workers.
  ///
  /// Waits: until every worker is pinned. Allocates: threads and contexts. Errors: `std::system_error` for a CPU that
  /// does not exist or may not be used. Complexity: a thread for each worker.
  explicit runtime(const runtime_options& options = {});
  /// Stops and joins.
  ~runtime();
  runtime(const runtime&) = delete;
  runtime& operator=(const runtime&) = delete;

  [[nodiscard]] std::size_t node_count() const noexcept;
  /// The node by its place in the list, 0 to `node_count() - 1`.
  ///
  /// Waits: never. Allocates: never. Errors: `std::out_of_range` that names how many there are. Complexity: constant.
  [[nodiscard]] runtime_node& node(std::size_t index);

  /// Starts a task on the next worker of all. From any thread.
  ///
  /// Waits: never. Allocates: never. Errors: what leaves the task is thrown by `join`. Complexity: constant.
  void spawn(task<> what) noexcept;

  /// Waits until every spawned task has ended, or `stop` was called, and stops the workers. Throws the first exception
  /// that left a task, or a handler of Asio on one of the workers.
  ///
  /// Waits: parks this thread, which must not be a worker. Cancel safety: `stop`, from another thread, ends it. Allocates:
  /// never. Errors: that exception. Complexity: linear in the workers.
  void join();

  /// Ends everything: requests a stop by `stop_token`, gives whatever can go on now its turn once more, a message that is
  /// there, a time that has come, a task that was told to stop, and destroys the tasks that have not ended then, each on
  /// its worker. Messages not taken stay in their channels. From any thread, a worker's, too; `join` and the destructor
  /// wait until it is done.
  ///
  /// Waits: never. Cancel safety: nobody awaits it. Allocates: a handler for each worker. Errors: none. Complexity: linear
  /// in the workers.
  void stop() noexcept;

#ifdef __cpp_lib_jthread
  /// Only requests the stop: tasks that heed `stop_token` end in their own time, and `join` waits for them. From any
  /// thread.
  ///
  /// Waits: never. Cancel safety: nobody awaits it. Allocates: never. Errors: none. Complexity: linear in who heeds it.
  void request_stop() noexcept;
  /// For `stop_on`, and for whoever asks it between two steps.
  [[nodiscard]] std::stop_token stop_token() const noexcept;
#endif

  /// Runs a task on the next worker and blocks this thread, which must not be a worker, until it has ended. Returns what
  /// it returned.
  ///
  /// Waits: parks this thread. Cancel safety: `stop`, from another thread, ends it. Allocates: two frames. Errors: what
  /// left the task; `std::errc::operation_canceled` when the runtime stopped before it ended;
  /// `std::errc::resource_deadlock_would_occur` on a worker. Complexity: constant.
  template <class T>
  T block_on(task<T> what);

 private:
  friend class runtime_node;
  friend struct runtime_access;
  struct state;
  std::unique_ptr<state> state_;
};

/// What a thread blocks on while a task runs elsewhere.
///
/// Waits: parks the thread in `wait`; `here` runs the task. Cancel safety: not to be cancelled. Allocates: `here` makes a
/// context. Errors: as `block_on`. Complexity: constant.
class blocking_wait {
 public:
  void ended() noexcept;
  void wait();
  /// Starts the task on the next worker.
  static void on(runtime& where, task<> what);
  /// Runs it on this thread, in a context of its own.
  static void here(task<> what);

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool ended_ = false;
};

/// The result of a task for a thread that blocks.
///
/// Waits: `take` parks the thread. Cancel safety: not to be cancelled. Allocates: one frame. Errors: as `block_on`.
/// Complexity: constant.
template <class T>
class blocking_result {
 public:
  /// The task, wrapped so that it leaves its result here.
  [[nodiscard]] task<> of(task<T> what) { return run(std::move(what), reporter{*this}); }
  T take() {
    wait_.wait();
    if (error_) std::rethrow_exception(error_);
    if (!value_) {
      throw std::system_error{std::make_error_code(std::errc::operation_canceled),
                              "block_on: expected the task to end, found it destroyed before"};
    }
    if constexpr (!std::is_void_v<T>) return std::move(*value_);
  }

 private:
  /// Lives as long as the task's frame, and so tells of its end, however that comes.
  class reporter {
   public:
    explicit reporter(blocking_result& to) noexcept : to_{&to} {}
    reporter(reporter&& other) noexcept : to_{std::exchange(other.to_, nullptr)} {}
    reporter& operator=(reporter&&) = delete;
    ~reporter() {
      if (to_ != nullptr) to_->wait_.ended();
    }
    [[nodiscard]] blocking_result& to() const noexcept { return *to_; }

   private:
    blocking_result* to_;
  };
  static task<> run(task<T> what, reporter report) {
    try {
      if constexpr (std::is_void_v<T>) {
        co_await std::move(what);
        report.to().value_.emplace();
      } else {
        report.to().value_.emplace(co_await std::move(what));
      }
    } catch (...) {
      report.to().error_ = std::current_exception();
    }
  }

  blocking_wait wait_;
  std::optional<result_or_monostate<T>> value_;
  std::exception_ptr error_;
};

template <class T>
T runtime::block_on(task<T> what) {
  blocking_result<T> result;
  blocking_wait::on(*this, result.of(std::move(what)));
  return result.take();
}

/// Runs a task on this thread until it has ended, and returns what it returned: for a caller that is no coroutine and has
/// no runtime.
///
///     const auto answer = strait::block_on(ask(requests, replies));
///
/// Waits: in a context made for it. Cancel safety: nobody awaits it. Allocates: that context and two frames. Errors: what
/// left the task; `std::errc::operation_canceled` when it can never end, because nothing it waits for is left;
/// `std::errc::resource_deadlock_would_occur` on a worker or within a turn. Complexity: system calls.
template <class T>
T block_on(task<T> what) {
  blocking_result<T> result;
  blocking_wait::here(result.of(std::move(what)));
  return result.take();
}

}  // namespace strait
