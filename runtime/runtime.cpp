module;
#include <version>

#include <pthread.h>
#include <asio/any_io_executor.hpp>
#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>

#include <atomic>
#include <condition_variable>
#include <coroutine>
#include <cstddef>
#include <exception>
#include <future>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#ifdef __cpp_lib_jthread
#include <stop_token>
#endif
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>
module strait.runtime;

namespace strait {

extern "C++" hub& hub_of(const asio::any_io_executor& executor);

namespace {

/// What is kept of a spawned task, in its own frame.
///
/// Until its first turn it waits on the hub; when it has suspended in that, it is one of the hub's roots. Both are changed
/// in turns only, so that a spawn takes no lock: a task that ends elsewhere, resumed by something foreign, waits once more
/// for a turn to end in.
struct spawned : hub_waiter, hub_root {
  /// What its first turn learns of a task that ends in it: the hub has nothing to know, and the frame frees itself.
  struct first_turn {
    bool ended = false;
    std::exception_ptr error;
  };

  std::coroutine_handle<task_promise<void>> task;
  spawn_observer* observer = nullptr;
  /// Null behind its first turn.
  first_turn* within = nullptr;

  [[nodiscard]] hub& where() const noexcept { return *static_cast<hub*>(task.promise().environment()); }

  static void begin(hub_waiter& waiter) {
    auto& me = static_cast<spawned&>(waiter);
    spawn_observer* const observer = me.observer;
    hub& where = me.where();
    first_turn turn;
    me.within = &turn;
    me.task.resume();
    if (turn.ended) return tell(where, observer, turn.error);
    me.within = nullptr;
    where.add_root(me);
  }
  /// At the end of the task, wherever that is; see task_promise.
  static bool ended(task_promise<void>& promise, bool suspended) noexcept {
    auto& me = *std::launder(static_cast<spawned*>(promise.room()));
    hub& where = me.where();
    // In a turn, or on a worker's own thread outside of one, which so waits for nobody else's. Only there is it known
    // whether this is the first turn.
    const bool at_home = hub::current() == &where;
    if (!suspended) {
      if (!at_home || me.within == nullptr) return false;
      me.within->error = promise.take_error();
      me.within->ended = true;
      return true;
    }
    if (at_home) {
      end(me);
    } else {
      me.complete = end;
      where.wait(me);
    }
    return false;
  }
  static void end(hub_waiter& waiter) noexcept {
    auto& me = static_cast<spawned&>(waiter);
    spawn_observer* const observer = me.observer;
    hub& where = me.where();
    const std::exception_ptr error = me.task.promise().take_error();
    where.remove_root(me);
    me.task.destroy();
    tell(where, observer, error);
  }
  /// To whom the error goes, or that there is none.
  static void tell(hub& where, spawn_observer* observer, const std::exception_ptr& error) noexcept {
    if (observer != nullptr) {
      observer->task_ended(error);
    } else if (error) {
      where.throw_out(error);
    }
  }
};
static_assert(sizeof(spawned) <= task_promise<void>::room_bytes && alignof(spawned) <= alignof(void*));
static_assert(std::is_trivially_destructible_v<spawned>, "nobody destroys it; its memory goes with the frame");

}  // namespace

void spawn_on(hub& where, task<> what, spawn_observer* observer) noexcept {
  const auto task = std::move(what).release();
  // The context ends before its first turn, or after that.
  const auto abandon = [](hub_waiter& waiter) noexcept { static_cast<spawned&>(waiter).task.destroy(); };
  const auto destroy = [](hub_root& root) noexcept {
    auto& me = static_cast<spawned&>(root);
    if (me.owner != nullptr) me.owner->withdraw(me);
    me.task.destroy();
  };
  auto& kept = *::new (task.promise().room())
                   spawned{{.complete = spawned::begin, .abandon = abandon}, {.destroy = destroy}, task, observer};
  task.promise().run_alone(&where, spawned::ended);
  where.wait(kept);
}

namespace {

/// How many tasks have not ended, of a runtime: one for each task that was spawned from outside, and one for each worker
/// on which tasks live that were spawned there. So a task that spawns others where it runs changes no word that other
/// threads change.
class task_count {
 public:
  void add() noexcept {
    // relaxed: who adds holds one already, or is who will join.
    tasks_.fetch_add(1, std::memory_order_relaxed);
  }
  void remove() noexcept {
    // acq_rel: what the task did has happened before join returns.
    if (tasks_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    const std::lock_guard lock{mutex_};
    changed_.notify_all();
  }
  void fail(std::exception_ptr error) noexcept {
    const std::lock_guard lock{mutex_};
    if (!error_) error_ = std::move(error);
  }
  /// False: it was stopped before.
  bool stop() noexcept {
    const std::lock_guard lock{mutex_};
    if (std::exchange(stopped_, true)) return false;
    changed_.notify_all();
    return true;
  }
  /// Calls `spawn` unless it was stopped, and has the stop come after it.
  template <class Spawn>
  void unless_stopped(Spawn spawn) {
    const std::lock_guard lock{mutex_};
    if (!stopped_) spawn();
  }
  /// Until there is none, or it is stopped.
  void wait() {
    std::unique_lock lock{mutex_};
    // acquire: see remove().
    changed_.wait(lock, [this] { return tasks_.load(std::memory_order_acquire) == 0 || stopped_; });
  }
  /// What left a task first. When no worker runs any more.
  [[nodiscard]] std::exception_ptr take_error() noexcept { return std::exchange(error_, nullptr); }

 private:
  std::atomic<std::size_t> tasks_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopped_ = false;
  std::exception_ptr error_;
};

struct worker final : spawn_observer {
  explicit worker(task_count& of_runtime) noexcept : tasks{of_runtime} {}

  /// Of a task that was spawned on this worker's own thread, on which it ends as well.
  void task_ended(const std::exception_ptr& error) noexcept override {
    if (error) tasks.fail(error);
    if (--own_tasks == 0) tasks.remove();
  }
  void spawn_here(task<> what) noexcept {
    if (own_tasks++ == 0) tasks.add();
    spawn_on(*own_hub, std::move(what), this);
  }

  task_count& tasks;
  /// Tasks that were spawned here and have not ended; this worker's thread only.
  std::size_t own_tasks = 0;
  unsigned cpu = 0;
  asio::io_context context{1};
  asio::executor_work_guard<asio::io_context::executor_type> work{context.get_executor()};
  hub* own_hub = nullptr;
  std::thread thread;
};

}  // namespace

struct runtime::state final : spawn_observer {
  task_count tasks;
  std::vector<std::unique_ptr<worker>> workers;
  std::vector<runtime_node> nodes;
  std::atomic<std::size_t> next{0};
#ifdef __cpp_lib_jthread
  std::stop_source stopping;
#endif

  /// Of a task that was spawned from outside.
  void task_ended(const std::exception_ptr& error) noexcept override {
    if (error) tasks.fail(error);
    tasks.remove();
  }

  void spawn(worker& where, task<> what) noexcept {
    if (hub::current() == where.own_hub) return where.spawn_here(std::move(what));
    tasks.add();
    spawn_on(*where.own_hub, std::move(what), this);
  }

  void start(worker& one, bool pin) {
    one.own_hub = &hub_of(one.context.get_executor());
    // Nobody else has this context's executor yet.
    one.own_hub->share(false);
    std::promise<std::error_code> pinned;
    one.thread = std::thread{[this, &one, &pinned, pin] {
      ::pthread_setname_np(::pthread_self(), ("strait-" + std::to_string(one.cpu)).c_str());
      const std::error_code error = pin ? pin_this_thread(one.cpu) : std::error_code{};
      const frame_heap frames;
      hub::set_current(one.own_hub);
      pinned.set_value(error);
      if (!error) serve(one);
      hub::set_current(nullptr);
    }};
    if (const std::error_code error = pinned.get_future().get()) {
      throw std::system_error{error, "pinning a worker to CPU " + std::to_string(one.cpu)};
    }
  }

  /// Runs the worker's context to its end. What a handler of the user's throws is for `join`, and the others go on.
  void serve(worker& one) noexcept {
    for (;;) {
      try {
        one.context.run();
        return;
      } catch (...) {
        tasks.fail(std::current_exception());
      }
    }
  }

  void stop() noexcept {
    if (!tasks.stop()) return;
#ifdef __cpp_lib_jthread
    stopping.request_stop();
#endif
    for (const auto& one : workers) {
      if (one->own_hub == nullptr) continue;
      one->own_hub->stop();
      try {
        // Behind what is in the queue already, which so has its turn.
        asio::post(one->context, [worker = one.get()] {
          worker->context.stop();  // when this handler has returned
          worker->own_hub->end_roots();
        });
      } catch (const std::bad_alloc&) {
        one->context.stop();  // the tasks are destroyed with it
      }
    }
  }

  void join_threads() noexcept {
    for (const auto& one : workers) {
      if (one->thread.joinable()) one->thread.join();
    }
  }

  ~state() {
    stop();
    join_threads();
  }
};

/// For the functions of <strait/asio.hpp>.
struct runtime_access {
  template <class Spawn>
  static void unless_stopped(runtime& of, Spawn spawn) {
    of.state_->tasks.unless_stopped(std::move(spawn));
  }
  static asio::any_io_executor executor(runtime_node& node) {
    worker& one = *node.owner_->state_->workers[node.next_worker()];
    one.own_hub->share(true);
    return one.context.get_executor();
  }
};

unsigned runtime_node::cpu(std::size_t worker) const {
  if (worker >= count_) {
    throw std::out_of_range{"expected a worker below " + std::to_string(count_) + ", found " + std::to_string(worker)};
  }
  return owner_->state_->workers[first_ + worker]->cpu;
}

std::size_t runtime_node::next_worker() noexcept {
  // relaxed: only spreads tasks.
  return first_ + std::atomic_ref{next_}.fetch_add(1, std::memory_order_relaxed) % count_;
}

void runtime_node::spawn(task<> what) noexcept {
  auto& all = *owner_->state_;
  all.spawn(*all.workers[next_worker()], std::move(what));
}

runtime::runtime(const runtime_options& options) : state_{std::make_unique<state>()} {
  const topology machine = topology::discover();
  for (const numa_node& node : machine.nodes()) {
    std::vector<unsigned> cpus;
    if (options.cpus) {
      for (const unsigned wanted : *options.cpus) {
        for (const unsigned there : node.cpus) {
          if (there == wanted) cpus.push_back(wanted);
        }
      }
    } else {
      cpus.assign(node.cores.begin(), node.cores.end());
    }
    if (cpus.empty()) continue;
    state_->nodes.push_back(runtime_node{*this, node.id, state_->workers.size(), cpus.size()});
    for (const unsigned cpu : cpus) {
      state_->workers.push_back(std::make_unique<worker>(state_->tasks));
      state_->workers.back()->cpu = cpu;
    }
  }
  if (options.cpus && (options.cpus->empty() || state_->workers.size() != options.cpus->size())) {
    std::string asked;
    for (const unsigned cpu : *options.cpus) asked += (asked.empty() ? "" : ", ") + std::to_string(cpu);
    throw std::system_error{std::make_error_code(std::errc::invalid_argument),
                            "runtime: expected CPUs that this process may use (" + machine.describe() + "), found " +
                                (asked.empty() ? "none" : asked)};
  }
  for (const auto& one : state_->workers) state_->start(*one, machine.is_this_machine());
}

runtime::~runtime() = default;

std::size_t runtime::node_count() const noexcept {
  return state_->nodes.size();
}

runtime_node& runtime::node(std::size_t index) {
  if (index >= state_->nodes.size()) {
    throw std::out_of_range{"runtime: expected a node below " + std::to_string(state_->nodes.size()) + ", found " +
                            std::to_string(index)};
  }
  return state_->nodes[index];
}

void runtime::spawn(task<> what) noexcept {
  const auto& workers = state_->workers;
  if (workers.size() == 1) return state_->spawn(*workers.front(), std::move(what));
  // relaxed: only spreads tasks.
  const std::size_t turn = state_->next.fetch_add(1, std::memory_order_relaxed);
  state_->spawn(*workers[turn % workers.size()], std::move(what));
}

void runtime::join() {
  state_->tasks.wait();
  state_->stop();
  state_->join_threads();
  if (std::exception_ptr error = state_->tasks.take_error()) std::rethrow_exception(std::move(error));
}

void runtime::stop() noexcept {
  state_->stop();
}

#ifdef __cpp_lib_jthread
void runtime::request_stop() noexcept {
  state_->stopping.request_stop();
}

std::stop_token runtime::stop_token() const noexcept {
  return state_->stopping.get_token();
}
#endif

namespace {

/// On a thread that resumes coroutines, waiting for one would wait for itself.
void refuse_to_block_a_hub() {
  if (hub::current() == nullptr) return;
  throw std::system_error{std::make_error_code(std::errc::resource_deadlock_would_occur),
                          "block_on: expected a thread that runs no coroutines, found a worker, or one within a turn"};
}

}  // namespace

void blocking_wait::ended() noexcept {
  // Notified with the mutex held: the object goes as soon as its owner has it.
  const std::lock_guard lock{mutex_};
  ended_ = true;
  changed_.notify_all();
}

void blocking_wait::wait() {
  std::unique_lock lock{mutex_};
  changed_.wait(lock, [this] { return ended_; });
}

void blocking_wait::on(runtime& where, task<> what) {
  refuse_to_block_a_hub();
  // What is spawned behind the stop is destroyed with the runtime, which may be long after.
  runtime_access::unless_stopped(where, [&] { where.spawn(std::move(what)); });
}

void blocking_wait::here(task<> what) {
  refuse_to_block_a_hub();
  asio::io_context context{1};
  hub& where = hub_of(context.get_executor());
  where.share(false);  // until somebody asks for the executor
  spawn_on(where, std::move(what));
  context.run();
}

// Of no module, so that <strait/asio.hpp> can declare it.
extern "C++" asio::any_io_executor executor(runtime_node& node) {
  return runtime_access::executor(node);
}

}  // namespace strait
