module;
#include <cstddef>
#include <exception>
#include <memory>
#include <optional>
#include <vector>
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
  virtual void task_ended(std::exception_ptr error) noexcept = 0;

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

  /// Has the workers stop as soon as what they are resuming suspends. Tasks that have not ended are destroyed with the
  /// runtime; messages not taken stay in their channels. From any thread.
  ///
  /// Waits: never. Allocates: never. Errors: none. Complexity: linear in the workers.
  void stop() noexcept;

 private:
  friend class runtime_node;
  friend struct runtime_access;
  struct state;
  std::unique_ptr<state> state_;
};

}  // namespace strait
