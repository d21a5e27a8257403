module;
#include <pthread.h>
#include <asio/any_io_executor.hpp>
#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>

#include <atomic>
#include <condition_variable>
#include <coroutine>
#include <cstddef>
#include <exception>
#include <future>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>
module strait.runtime;

namespace strait {

extern "C++" hub& hub_of(const asio::any_io_executor& executor);

namespace {

/// The coroutine around a spawned task: nobody awaits it, and it destroys itself.
struct spawned {
  struct promise_type {
    static void* operator new(std::size_t bytes) { return allocate_frame(bytes); }
    static void operator delete(void* frame) noexcept { free_frame(frame); }

    spawned get_return_object() noexcept { return {std::coroutine_handle<promise_type>::from_promise(*this)}; }
    std::suspend_always initial_suspend() const noexcept { return {}; }

    struct last_step {
      bool await_ready() const noexcept { return false; }
      void await_suspend(std::coroutine_handle<promise_type> ended) const noexcept {
        promise_type& promise = ended.promise();
        hub& where = *promise.where;
        spawn_observer* observer = promise.observer;
        std::exception_ptr error = std::move(promise.error);
        where.remove_root(promise.root, observer == nullptr ? error : nullptr);
        ended.destroy();
        if (observer != nullptr) observer->task_ended(std::move(error));
      }
      void await_resume() const noexcept {}
    };
    last_step final_suspend() const noexcept { return {}; }
    void return_void() const noexcept {}
    void unhandled_exception() noexcept { error = std::current_exception(); }

    /// Handed down to everything that the task awaits; see task_promise_base.
    [[nodiscard]] void* environment() const noexcept { return where; }

    struct first_turn : hub_waiter {
      promise_type* promise = nullptr;
    };
    struct life : hub_root {
      promise_type* promise = nullptr;
    };
    first_turn start;
    life root;
    hub* where = nullptr;
    spawn_observer* observer = nullptr;
    std::exception_ptr error;
  };
  std::coroutine_handle<promise_type> frame;
};

spawned run(task<> what) {
  co_await std::move(what);
}

}  // namespace

void spawn_on(hub& where, task<> what, spawn_observer* observer) {
  auto& promise = run(std::move(what)).frame.promise();
  promise.where = &where;
  promise.observer = observer;
  promise.root.promise = &promise;
  promise.root.destroy = [](hub_root& root) noexcept {
    auto& mine = *static_cast<spawned::promise_type::life&>(root).promise;
    if (mine.start.owner != nullptr) mine.start.owner->withdraw(mine.start);
    std::coroutine_handle<spawned::promise_type>::from_promise(mine).destroy();
  };
  promise.start.promise = &promise;
  promise.start.ready = [](hub_waiter&, bool) noexcept { return true; };
  promise.start.complete = [](hub_waiter& waiter) {
    auto& mine = *static_cast<spawned::promise_type::first_turn&>(waiter).promise;
    std::coroutine_handle<spawned::promise_type>::from_promise(mine).resume();
  };
  where.add_root(promise.root);
  where.wait(promise.start);
}

namespace {

struct worker {
  unsigned cpu = 0;
  asio::io_context context{1};
  asio::executor_work_guard<asio::io_context::executor_type> work{context.get_executor()};
  hub* own_hub = nullptr;
  std::thread thread;
};

}  // namespace

struct runtime::state final : spawn_observer {
  std::vector<std::unique_ptr<worker>> workers;
  std::vector<runtime_node> nodes;
  std::atomic<std::size_t> next{0};

  std::mutex mutex;
  std::condition_variable changed;
  std::size_t tasks = 0;
  bool stopped = false;
  std::exception_ptr error;

  void task_ended(std::exception_ptr what) noexcept override {
    const std::lock_guard lock{mutex};
    if (what && !error) error = std::move(what);
    if (--tasks == 0) changed.notify_all();
  }

  void spawn(worker& where, task<> what) {
    {
      const std::lock_guard lock{mutex};
      ++tasks;
    }
    try {
      spawn_on(*where.own_hub, std::move(what), this);
    } catch (...) {
      task_ended(nullptr);
      throw;
    }
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
        const std::lock_guard lock{mutex};
        if (!error) error = std::current_exception();
      }
    }
  }

  void stop() noexcept {
    {
      const std::lock_guard lock{mutex};
      stopped = true;
      changed.notify_all();
    }
    for (const auto& one : workers) {
      if (one->own_hub != nullptr) one->own_hub->stop();
      one->context.stop();
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

void runtime_node::spawn(task<> what) {
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
      state_->workers.push_back(std::make_unique<worker>());
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

void runtime::spawn(task<> what) {
  // relaxed: only spreads tasks.
  const std::size_t turn = state_->next.fetch_add(1, std::memory_order_relaxed);
  state_->spawn(*state_->workers[turn % state_->workers.size()], std::move(what));
}

void runtime::join() {
  {
    std::unique_lock lock{state_->mutex};
    state_->changed.wait(lock, [this] { return state_->tasks == 0 || state_->stopped; });
  }
  state_->stop();
  state_->join_threads();
  if (state_->error) std::rethrow_exception(std::exchange(state_->error, nullptr));
}

void runtime::stop() noexcept {
  state_->stop();
}

// Of no module, so that <strait/asio.hpp> can declare it.
extern "C++" asio::any_io_executor executor(runtime_node& node) {
  return runtime_access::executor(node);
}

}  // namespace strait
