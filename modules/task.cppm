module;
#include <array>
#include <coroutine>
#include <cstddef>
#include <exception>
#include <new>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
export module strait.task;

// Whoever writes a coroutine needs these names, and an importer would otherwise be told to include <coroutine>.
export namespace std {
using std::coroutine_handle;
using std::coroutine_traits;
using std::noop_coroutine;
using std::suspend_always;
using std::suspend_never;
}  // namespace std

export namespace strait {

/// Memory for a coroutine frame: from the heap of this worker (`frame_heap`), or from mimalloc's heap of this thread outside
/// a worker; from `operator new` where strait was built without mimalloc.
///
/// Waits: never. Allocates: yes. Errors: `std::bad_alloc`. Complexity: constant.
[[nodiscard]] void* allocate_frame(std::size_t bytes);
/// Gives it back, with the size that was asked for, from any thread.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
void free_frame(void* frame, std::size_t bytes) noexcept;

/// What this thread takes its frames from while the object lives: those that were given back here, and a mimalloc heap.
/// Frames may outlive it.
///
/// Tasks that are awaited or spawned make and free frames of a few sizes without end, and a sixth of a spawn was
/// mimalloc's. So up to `most_kept` of each size up to a kilobyte are kept for the next: a thread's own, with nothing
/// shared.
///
/// Waits: never. Allocates: the heap. Errors: `std::bad_alloc`. Complexity: constant; linear in what is kept when it ends.
class frame_heap {
 public:
  frame_heap();
  ~frame_heap();
  frame_heap(const frame_heap&) = delete;
  frame_heap& operator=(const frame_heap&) = delete;

  static constexpr std::size_t most_kept = 128;

 private:
  friend void* allocate_frame(std::size_t bytes);
  friend void free_frame(void* frame, std::size_t bytes) noexcept;

  struct unused_frame {
    unused_frame* next;
  };
  struct size_class {
    unused_frame* first = nullptr;
    std::size_t room = most_kept;
  };
  static constexpr std::size_t step = 64;
  static constexpr std::size_t size_classes = 16;

  /// Of this thread; null where there is no such heap.
  [[nodiscard]] static inline size_class* class_of(std::size_t bytes) noexcept {
    const std::size_t which = (bytes - 1) / step;
    return current_ != nullptr && which < size_classes ? &current_->kept_[which] : nullptr;
  }
  /// Past what is kept.
  [[nodiscard]] static void* make(std::size_t bytes);
  static void destroy(void* frame) noexcept;

  static constinit thread_local frame_heap* current_;
  void* heap_ = nullptr;
  frame_heap* before_ = nullptr;
  std::array<size_class, size_classes> kept_;
};

/// The same, as far as it needs no call.
inline void* allocate_frame(std::size_t bytes) {
  auto* const kept = frame_heap::class_of(bytes);
  if (kept == nullptr || kept->first == nullptr) [[unlikely]]
    return frame_heap::make(bytes);
  ++kept->room;
  return std::exchange(kept->first, kept->first->next);
}

/// The same.
inline void free_frame(void* frame, std::size_t bytes) noexcept {
  auto* const kept = frame_heap::class_of(bytes);
  if (kept == nullptr || kept->room == 0) [[unlikely]]
    return frame_heap::destroy(frame);
  --kept->room;
  kept->first = ::new (frame) frame_heap::unused_frame{kept->first};
}

template <class T = void>
class task;

/// What every task's promise holds.
class task_promise_base {
 public:
  static inline void* operator new(std::size_t bytes) { return allocate_frame(bytes); }
  static inline void operator delete(void* frame, std::size_t bytes) noexcept { free_frame(frame, bytes); }

  [[nodiscard]] inline std::suspend_always initial_suspend() const noexcept { return {}; }

  /// Goes on with whoever awaited the task, without growing the stack; or tells whoever runs it that it has ended.
  struct final_awaiter {
    /// Whether nobody wants the frame any more: it then goes without a suspension.
    bool forgotten = false;
    [[nodiscard]] inline bool await_ready() const noexcept { return forgotten; }
    template <class Promise>
    [[nodiscard]] std::coroutine_handle<> await_suspend(std::coroutine_handle<Promise> finished) const noexcept {
      if constexpr (requires { finished.promise().ended_alone(); }) {
        // The frame may be gone when this returns.
        if (finished.promise().ended_alone()) return std::noop_coroutine();
      }
      return finished.promise().continuation_;
    }
    inline void await_resume() const noexcept {}
  };
  [[nodiscard]] inline final_awaiter final_suspend() const noexcept { return {}; }

  inline void unhandled_exception() noexcept { error_ = std::current_exception(); }

  /// What the task runs in, handed down from whoever awaits it to everything that it awaits: a hub, for those who know.
  [[nodiscard]] inline void* environment() const noexcept { return environment_; }

 protected:
  template <class T>
  friend class task;
  std::coroutine_handle<> continuation_ = std::noop_coroutine();
  void* environment_ = nullptr;
  std::exception_ptr error_;
};

template <class T>
class task_promise final : public task_promise_base {
 public:
  task<T> get_return_object() noexcept;
  template <class U>
  void return_value(U&& value) {
    value_.emplace(std::forward<U>(value));
  }
  [[nodiscard]] T result() {
    if (error_) std::rethrow_exception(error_);
    return std::move(*value_);
  }

 private:
  std::optional<T> value_;
};

template <>
class task_promise<void> final : public task_promise_base {
 public:
  inline task<void> get_return_object() noexcept;
  inline void return_void() const noexcept {}
  inline void result() const {
    if (error_) std::rethrow_exception(error_);
  }

  /// Makes it a task that nobody awaits, in `environment`: `ended` is called at its end. When it returns true the task
  /// frees itself. Otherwise it is called once more, `suspended`, and then the frame is the callee's to destroy.
  inline void run_alone(void* environment, bool (*ended)(task_promise& self, bool suspended) noexcept) noexcept {
    environment_ = environment;
    ended_ = ended;
  }
  [[nodiscard]] inline final_awaiter final_suspend() noexcept {
    return {.forgotten = ended_ != nullptr && ended_(*this, false)};
  }
  /// Tells of the end; false: it is awaited.
  [[nodiscard]] inline bool ended_alone() noexcept {
    if (ended_ == nullptr) return false;
    (void)ended_(*this, true);
    return true;
  }
  /// What left the task.
  [[nodiscard]] inline std::exception_ptr take_error() noexcept { return std::exchange(error_, nullptr); }

  /// Room in the frame for what whoever runs it keeps of a task that nobody awaits, so that a spawn allocates nothing.
  /// Nothing is written here in a task that is awaited.
  static constexpr std::size_t room_bytes = 13 * sizeof(void*);
  [[nodiscard]] inline void* room() noexcept { return room_; }

 private:
  bool (*ended_)(task_promise& self, bool suspended) noexcept = nullptr;
  alignas(void*) std::byte room_[room_bytes];
};

/// A coroutine that starts when it is awaited or spawned, and whose result goes to whoever awaited it.
///
/// Waits: as what it awaits does. Cancel safety: destroying a task that is suspended destroys what it waits for, and
/// nothing is lost: a message not yet returned stays in its channel. Allocates: one frame (`allocate_frame`). Errors: an
/// exception that leaves the body is thrown where the task is awaited. Complexity: a start and an end are a jump each.
template <class T>
class [[nodiscard]] task {
 public:
  using promise_type = task_promise<T>;
  using value_type = T;

  task(task&& other) noexcept : frame_{std::exchange(other.frame_, nullptr)} {}
  task& operator=(task&& other) noexcept {
    std::swap(frame_, other.frame_);
    return *this;
  }
  ~task() {
    if (frame_) frame_.destroy();
  }

  /// Awaited once: runs the task to its end and yields what it returned.
  class awaiter {
   public:
    explicit awaiter(std::coroutine_handle<promise_type> frame) noexcept : frame_{frame} {}
    [[nodiscard]] bool await_ready() const noexcept { return false; }
    template <class Promise>
    [[nodiscard]] std::coroutine_handle<> await_suspend(std::coroutine_handle<Promise> awaiting) noexcept {
      auto& promise = frame_.promise();
      promise.continuation_ = awaiting;
      if constexpr (requires { awaiting.promise().environment(); }) {
        promise.environment_ = awaiting.promise().environment();
      }
      return frame_;
    }
    T await_resume() { return frame_.promise().result(); }

   private:
    std::coroutine_handle<promise_type> frame_;
  };
  [[nodiscard]] awaiter operator co_await() const& noexcept { return awaiter{frame_}; }
  [[nodiscard]] awaiter operator co_await() const&& noexcept { return awaiter{frame_}; }

  /// Hands the coroutine over to who runs it without awaiting it, and from now on sees to its destruction.
  [[nodiscard]] std::coroutine_handle<promise_type> release() && noexcept { return std::exchange(frame_, nullptr); }

 private:
  friend promise_type;
  explicit task(std::coroutine_handle<promise_type> frame) noexcept : frame_{frame} {}
  std::coroutine_handle<promise_type> frame_;
};

template <class T>
task<T> task_promise<T>::get_return_object() noexcept {
  return task<T>{std::coroutine_handle<task_promise>::from_promise(*this)};
}

inline task<void> task_promise<void>::get_return_object() noexcept {
  return task<void>{std::coroutine_handle<task_promise>::from_promise(*this)};
}

/// Coroutines that run beside whoever started them, and are destroyed with this object: what `task_group` and
/// `when_all` have in common. Used by one thread at a time, as everything that runs on one hub is.
///
/// Waits: never. Allocates: never. Errors: those of the tasks, where it is said. Complexity: constant; linear in what is
/// destroyed.
class task_siblings {
 public:
  task_siblings() = default;
  task_siblings(const task_siblings&) = delete;
  task_siblings& operator=(const task_siblings&) = delete;
  inline ~task_siblings() { destroy_all(); }

  /// What a call of start() learns of the coroutine that it runs.
  struct first_step {
    bool ended = false;
    std::exception_ptr error;
  };

  /// The coroutine around a task: it tells the siblings of its end, and frees itself.
  struct member {
    struct promise_type {
      static inline void* operator new(std::size_t bytes) { return allocate_frame(bytes); }
      static inline void operator delete(void* frame, std::size_t bytes) noexcept { free_frame(frame, bytes); }

      inline member get_return_object() noexcept { return {std::coroutine_handle<promise_type>::from_promise(*this)}; }
      [[nodiscard]] inline std::suspend_always initial_suspend() const noexcept { return {}; }
      struct last_step {
        [[nodiscard]] inline bool await_ready() const noexcept { return false; }
        [[nodiscard]] inline std::coroutine_handle<> await_suspend(
            std::coroutine_handle<promise_type> ended) const noexcept {
          task_siblings& siblings = *ended.promise().siblings;
          first_step* const within = ended.promise().within;
          std::exception_ptr error = std::move(ended.promise().error);
          siblings.unlink(ended.promise());
          ended.destroy();
          if (within == nullptr) return siblings.one_ended(std::move(error));
          within->ended = true;
          within->error = std::move(error);
          return std::noop_coroutine();
        }
        inline void await_resume() const noexcept {}
      };
      [[nodiscard]] inline last_step final_suspend() const noexcept { return {}; }
      inline void return_void() const noexcept {}
      inline void unhandled_exception() noexcept { error = std::current_exception(); }
      /// Handed down to everything that the task awaits; see task_promise_base.
      [[nodiscard]] inline void* environment() const noexcept { return environment_of_starter; }

      task_siblings* siblings = nullptr;
      promise_type* previous = nullptr;
      promise_type* next = nullptr;
      void* environment_of_starter = nullptr;
      /// Null once it has suspended.
      first_step* within = nullptr;
      std::exception_ptr error;
    };
    std::coroutine_handle<promise_type> frame;
  };

  /// Runs the coroutine until it suspends for the first time. Throws what leaves it before that: whoever waits for the
  /// siblings must not go on, and destroy them, beneath one of them that starts another.
  inline void start(member one, void* environment) {
    auto& promise = one.frame.promise();
    promise.siblings = this;
    promise.environment_of_starter = environment;
    promise.previous = last_;
    (last_ != nullptr ? last_->next : first_) = &promise;
    last_ = &promise;
    ++running_;
    first_step step;
    promise.within = &step;
    one.frame.resume();
    if (!step.ended) {
      promise.within = nullptr;
    } else if (step.error) {
      std::rethrow_exception(step.error);
    }
  }

  [[nodiscard]] inline std::size_t running() const noexcept { return running_; }
  [[nodiscard]] inline bool failed() const noexcept { return error_ != nullptr; }
  /// Whether nobody has to wait: all have ended, or one has failed.
  [[nodiscard]] inline bool settled() const noexcept { return running_ == 0 || failed(); }

  /// Who goes on when they are settled; null: nobody.
  inline void resume_when_settled(std::coroutine_handle<> waiting) noexcept { waiting_ = waiting; }

  /// After the wait: destroys who has not ended and throws what the first that failed threw.
  inline void throw_if_failed() {
    if (!error_) return;
    destroy_all();
    std::rethrow_exception(std::exchange(error_, nullptr));
  }

  inline void destroy_all() noexcept {
    while (first_ != nullptr) {
      promise_type& one = *last_;  // the youngest first, as everywhere
      unlink(one);
      std::coroutine_handle<promise_type>::from_promise(one).destroy();
    }
  }

 private:
  using promise_type = member::promise_type;

  inline void unlink(promise_type& one) noexcept {
    (one.previous != nullptr ? one.previous->next : first_) = one.next;
    (one.next != nullptr ? one.next->previous : last_) = one.previous;
    --running_;
  }

  /// Who goes on.
  [[nodiscard]] inline std::coroutine_handle<> one_ended(std::exception_ptr error) noexcept {
    if (error && !error_) error_ = std::move(error);
    if (!waiting_ || !settled()) return std::noop_coroutine();
    return std::exchange(waiting_, nullptr);
  }

  promise_type* first_ = nullptr;
  promise_type* last_ = nullptr;
  std::size_t running_ = 0;
  std::coroutine_handle<> waiting_;
  std::exception_ptr error_;
};

/// Tasks that run beside each other and beside whoever started them, for as long as this object lives.
///
///     strait::task_group sessions;
///     while (auto request = co_await requests.recv()) sessions.spawn(serve(*request));
///     co_await sessions.join();
///
/// All of them run where the task runs that owns the group. Destroying the group, for instance because an exception
/// leaves its task, destroys those that have not ended: no task outlives it.
class task_group {
 public:
  task_group() = default;

  /// Starts a task now, and returns when it suspends for the first time or has ended; also from one of the group. After
  /// the first error of the group nothing is started any more.
  ///
  /// Waits: never. Allocates: one frame. Errors: `std::bad_alloc`, and what leaves the task before it suspends for the
  /// first time; what leaves it later is thrown by `join`. Complexity: constant.
  inline void spawn(task<> what) {
    if (siblings_.failed()) return;
    siblings_.start(run(std::move(what)), nullptr);
  }

  /// How many tasks have not ended.
  [[nodiscard]] inline std::size_t size() const noexcept { return siblings_.running(); }

  /// Destroys all tasks that have not ended, youngest first; what they wait for takes nothing. Not from one of them.
  ///
  /// Waits: never. Allocates: never. Errors: none. Complexity: linear.
  inline void cancel() noexcept { siblings_.destroy_all(); }

  class [[nodiscard]] join_operation {
   public:
    explicit inline join_operation(task_siblings& siblings) noexcept : siblings_{&siblings} {}
    /// Moved only before it is awaited.
    inline join_operation(join_operation&& other) noexcept : siblings_{std::exchange(other.siblings_, nullptr)} {}
    join_operation& operator=(join_operation&&) = delete;
    inline ~join_operation() {
      if (siblings_ != nullptr) siblings_->resume_when_settled(nullptr);
    }
    [[nodiscard]] inline bool await_ready() const noexcept { return siblings_->settled(); }
    inline void await_suspend(std::coroutine_handle<> awaiting) const noexcept {
      siblings_->resume_when_settled(awaiting);
    }
    inline void await_resume() const { siblings_->throw_if_failed(); }

   private:
    task_siblings* siblings_;
  };

  /// Waits until all tasks have ended, or one has failed: then it destroys the others and throws that error. To be
  /// awaited by one task at a time. The group may be used again.
  ///
  /// Waits: as the tasks do. Cancel safety: the tasks go on, and it may be awaited again. Allocates: never. Errors: the
  /// first that left a task. Complexity: constant.
  [[nodiscard]] inline join_operation join() noexcept { return join_operation{siblings_}; }

 private:
  static inline task_siblings::member run(task<> what) { co_await std::move(what); }

  task_siblings siblings_;
};

/// What a task yields where nothing cannot stand: in a tuple, in an optional.
template <class T>
using result_or_monostate = std::conditional_t<std::is_void_v<T>, std::monostate, T>;

/// Tasks that are awaited together. What `when_all` returns.
template <class... Ts>
class [[nodiscard]] when_all_operation {
 public:
  explicit when_all_operation(task<Ts>... tasks) noexcept : tasks_{std::move(tasks)...} {}
  /// Moved only before it is awaited.
  when_all_operation(when_all_operation&& other) noexcept : tasks_{std::move(other.tasks_)} {}
  when_all_operation& operator=(when_all_operation&&) = delete;

  [[nodiscard]] bool await_ready() const noexcept { return sizeof...(Ts) == 0; }
  template <class Promise>
  bool await_suspend(std::coroutine_handle<Promise> awaiting) {
    void* environment = nullptr;
    if constexpr (requires { awaiting.promise().environment(); }) environment = awaiting.promise().environment();
    start_all(environment, std::index_sequence_for<Ts...>{});
    if (siblings_.settled()) return false;
    siblings_.resume_when_settled(awaiting);
    return true;
  }
  std::tuple<result_or_monostate<Ts>...> await_resume() {
    siblings_.throw_if_failed();
    return std::apply([](auto&... results) { return std::tuple<result_or_monostate<Ts>...>{std::move(*results)...}; },
                      results_);
  }

 private:
  template <std::size_t... Is>
  void start_all([[maybe_unused]] void* environment, std::index_sequence<Is...>) {
    (siblings_.start(run(std::get<Is>(tasks_), std::get<Is>(results_)), environment), ...);
  }

  template <class T>
  static task_siblings::member run(task<T>& what, std::optional<result_or_monostate<T>>& into) {
    if constexpr (std::is_void_v<T>) {
      co_await what;
      into.emplace();
    } else {
      into.emplace(co_await what);
    }
  }

  // Destroyed in the opposite order: the siblings hold on to both others.
  std::tuple<task<Ts>...> tasks_;
  std::tuple<std::optional<result_or_monostate<Ts>>...> results_;
  task_siblings siblings_;
};

/// Runs the tasks beside each other, each until it suspends for the first time before the next begins. To be awaited;
/// yields a tuple of what they returned, with `std::monostate` for those that return nothing.
///
/// Waits: as the tasks do. Cancel safety: destroying it destroys the tasks. Allocates: one frame for each. Errors: the
/// first that leaves a task is thrown, at once, after those that have not ended were destroyed. Complexity: linear.
template <class... Ts>
[[nodiscard]] when_all_operation<Ts...> when_all(task<Ts>... tasks) {
  return when_all_operation<Ts...>{std::move(tasks)...};
}

}  // namespace strait
