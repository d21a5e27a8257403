module;
#include <coroutine>
#include <cstddef>
#include <exception>
#include <optional>
#include <type_traits>
#include <utility>
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

/// Memory for a coroutine frame: from the mimalloc heap of this worker, or from mimalloc's heap of this thread outside a
/// worker; from `operator new` where strait was built without mimalloc.
///
/// Waits: never. Allocates: yes. Errors: `std::bad_alloc`. Complexity: constant.
[[nodiscard]] void* allocate_frame(std::size_t bytes);
/// Gives it back, from any thread.
void free_frame(void* frame) noexcept;

/// A mimalloc heap that this thread takes its frames from while the object lives. Frames may outlive it.
class frame_heap {
 public:
  frame_heap();
  ~frame_heap();
  frame_heap(const frame_heap&) = delete;
  frame_heap& operator=(const frame_heap&) = delete;

 private:
  void* heap_ = nullptr;
  void* before_ = nullptr;
};

template <class T = void>
class task;

/// What every task's promise holds.
class task_promise_base {
 public:
  static inline void* operator new(std::size_t bytes) { return allocate_frame(bytes); }
  static inline void operator delete(void* frame) noexcept { free_frame(frame); }

  [[nodiscard]] inline std::suspend_always initial_suspend() const noexcept { return {}; }

  /// Goes on with whoever awaited the task, without growing the stack.
  struct final_awaiter {
    [[nodiscard]] inline bool await_ready() const noexcept { return false; }
    template <class Promise>
    [[nodiscard]] std::coroutine_handle<> await_suspend(std::coroutine_handle<Promise> finished) const noexcept {
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

}  // namespace strait
