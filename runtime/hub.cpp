module;
#include <asio/any_io_executor.hpp>
#include <asio/execution.hpp>
#include <asio/execution_context.hpp>
#include <asio/io_context.hpp>
#include <asio/posix/stream_descriptor.hpp>
#include <asio/post.hpp>
#include <asio/prefer.hpp>
#include <asio/steady_timer.hpp>
#include <asio/strand.hpp>
#include <asio/thread_pool.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <mutex>
#include <optional>
#include <system_error>
#include <typeinfo>
#include <utility>
#include <vector>
module strait.hub;

namespace strait {
namespace {

/// The hub whose turn this thread is in, and so may touch the lists of.
thread_local hub* turning_hub = nullptr;

/// How long a turn lasts when others use the context: what a socket or a timer waits at most beside a busy channel.
constexpr std::int64_t slice_ns = 50'000;
constexpr std::uint64_t looks_between_clocks = 32;
/// Completions between two looks at the clock, at most; and how long they shall take together: a coroutine may handle a
/// thousand messages before it suspends again, and a slice must not be exceeded by many such.
constexpr int most_completions_between_clocks = 32;
constexpr std::int64_t between_clocks_ns = slice_ns / 8;

enum class hub_state : std::uint32_t { idle, resident, parked };

/// A doubly linked list through the nodes themselves.
template <class Node>
class intrusive_list {
 public:
  [[nodiscard]] bool empty() const noexcept { return first_ == nullptr; }
  [[nodiscard]] bool single() const noexcept { return first_ != nullptr && first_ == last_; }
  [[nodiscard]] Node* first() const noexcept { return first_; }

  void push_back(Node& node) noexcept {
    node.previous = last_;
    node.next = nullptr;
    (last_ != nullptr ? last_->next : first_) = &node;
    last_ = &node;
  }
  void remove(Node& node) noexcept {
    (node.previous != nullptr ? node.previous->next : first_) = node.next;
    (node.next != nullptr ? node.next->previous : last_) = node.previous;
  }

 private:
  Node* first_ = nullptr;
  Node* last_ = nullptr;
};

/// What stands beneath the strand, if `executor` is a strand of that kind.
template <class Inner>
bool replace_by_inner(asio::any_io_executor& executor) {
  // Asio before 1.24 casts without asking whether the type is right.
  if (executor.target_type() != typeid(asio::strand<Inner>)) return false;
  // A copy: what it points into goes with the assignment.
  asio::any_io_executor inner = executor.target<asio::strand<Inner>>()->get_inner_executor();
  executor = std::move(inner);
  return true;
}

/// The executor that turns are posted to: a strand would make them wait for the user's own handlers. A strand of a kind
/// that is not known here only does that.
asio::any_io_executor without_strand(asio::any_io_executor executor) {
  while (replace_by_inner<asio::any_io_executor>(executor) ||
         replace_by_inner<asio::io_context::executor_type>(executor) ||
         replace_by_inner<asio::thread_pool::executor_type>(executor)) {
  }
  return executor;
}

/// | member          | written by                   | read by                        | orders                               |
/// |-----------------|------------------------------|--------------------------------|--------------------------------------|
/// | state_          | turn, and who makes resident | the same                       | Dekker with inbox_, hence seq_cst    |
/// | inbox_          | any thread pushes            | the turn takes all             | Dekker with state_, hence seq_cst    |
/// | shared_, stopped_ | any thread                 | the turn, to end early         | relaxed                              |
/// | executor_       | use, once                    | who posts a turn               | call_once                            |
/// | ended_          | shutdown                     | whoever is freed then          | nothing else of the context runs     |
/// | everything else | the holder of mutex_         | the same                       | the mutex                            |
///
/// A turn holds mutex_ throughout. In a context with one thread nobody ever waits for it.
class asio_hub final : public hub, public asio::execution_context::service {
 public:
  using key_type = asio_hub;
  static asio::execution_context::id id;

  explicit asio_hub(asio::execution_context& context) : asio::execution_context::service{context} {}

  /// The first executor that asks decides where turns run.
  void use(const asio::any_io_executor& executor) {
    // Not under mutex_: a coroutine that is resumed by the turn may ask.
    // Untracked: what the hub holds for good must not count as work that the context's run() waits for.
    std::call_once(used_, [&] {
      executor_ = asio::prefer(without_strand(executor), asio::execution::outstanding_work.untracked);
      // Now, because Asio may open a reactor for it: when it is time to park there may be no descriptors left.
      bell_wait_.descriptor.emplace(executor_, bell_.descriptor());
      alarm_.emplace(executor_);
    });
  }

  void wait(hub_waiter& waiter) noexcept override {
    waiter.owner = this;
    if (turning_hub == this) {
      append(waiter);
      return;
    }
    hub_waiter* head = inbox_.load(std::memory_order_relaxed);
    do {
      waiter.next = head;
      // seq_cst: before the read of state_ in make_resident; see go_idle.
    } while (!inbox_.compare_exchange_weak(head, &waiter, std::memory_order_seq_cst, std::memory_order_relaxed));
    if (make_resident()) post_turn();
  }

  bool withdraw(hub_waiter& waiter) noexcept override {
    const auto lock = lock_unless_turning();
    if (waiter.owner != this) return false;
    absorb_inbox();
    remove(waiter);
    if (!announced_ || waiter.end == nullptr) return true;
    // The ringer, if there was one, rang for the end, not for this waiter: the next that waits for it looks first.
    waiter.end->hub_awake();
    // Nobody rings a parked hub for this end any more. That concerns whoever else waits for it; and when nobody waits,
    // the doorbell's handler must not keep the context's run() from returning. The turn sees to both.
    if ((waiters_.empty() || waits_for(*waiter.end)) && make_resident()) post_turn();
    return true;
  }

  void wait_until(hub_timer& timer) override {
    const auto lock = lock_unless_turning();
    timers_.push_back(&timer);
    move_up(timer, timers_.size() - 1);
    timer.owner = this;
    appended_ = true;
    if (turning_hub != this && make_resident()) post_turn();
  }

  bool withdraw(hub_timer& timer) noexcept override {
    const auto lock = lock_unless_turning();
    if (timer.owner != this) return false;
    remove(timer);
    // The reactor's timer must not keep the context's run() from returning when nobody sleeps any more.
    if (timers_.empty() && alarm_due_ != forever && make_resident()) post_turn();
    return true;
  }

  bool enter() noexcept override {
    if (turning_hub == this) return false;
    mutex_.lock();
    outside_visit_ = std::exchange(turning_hub, this);
    appended_ = false;
    return true;
  }

  void leave() noexcept override {
    turning_hub = outside_visit_;
    const bool owed = appended_ && make_resident();
    mutex_.unlock();
    if (owed) post_turn();
  }

  void resume(hub_waiter& waiter) override {
    if (turning_hub == this) {
      waiter.complete(waiter);
    } else {
      turn(&waiter);
    }
  }

  // Written by shutdown, which runs when nothing else of the context does.
  [[nodiscard]] bool ending() const noexcept override { return ended_; }

  [[nodiscard]] const asio::any_io_executor& executor() const noexcept { return executor_; }

  void share(bool shared) noexcept override {
    // relaxed: a turn that misses the change for a moment ends at its next look at the clock.
    shared_.store(shared, std::memory_order_relaxed);
  }

  void stop() noexcept override { stopped_.store(true, std::memory_order_relaxed); }

  void end_roots() override {
    std::exception_ptr error;
    {
      const std::lock_guard lock{mutex_};
      const within_turn turning{this};
      wake_up();
      absorb_inbox();
      const auto attempt = [&](auto step) {
        try {
          step();
        } catch (...) {
          if (!error) error = std::current_exception();
        }
      };
      // Only as many as there are now: those who always wait again are not to keep it going.
      const std::int64_t now = now_ns();
      for (std::size_t left = timers_.size(); left != 0 && timer_due(now); --left) {
        hub_timer& timer = *timers_.front();
        remove(timer);
        attempt([&] { timer.complete(timer); });
      }
      std::size_t left = 0;
      for (const hub_waiter* waiter = waiters_.first(); waiter != nullptr; waiter = waiter->next) ++left;
      cursor_ = waiters_.first();
      for (; cursor_ != nullptr && left != 0; --left) {
        hub_waiter& waiter = *cursor_;
        cursor_ = waiter.next;
        if (waiter.ready != nullptr && !waiter.ready(waiter, false)) continue;
        remove(waiter);
        attempt([&] { waiter.complete(waiter); });
      }
      cursor_ = nullptr;
      destroy_roots();
      if (!error) error = std::exchange(error_, nullptr);
    }
    if (error) std::rethrow_exception(error);
  }

  void add_root(hub_root& root) noexcept override {
    const auto lock = lock_unless_turning();
    roots_.push_back(root);
  }

  void remove_root(hub_root& root) noexcept override {
    const auto lock = lock_unless_turning();
    roots_.remove(root);
  }

  void throw_out(std::exception_ptr error) noexcept override {
    const auto lock = lock_unless_turning();
    if (!error_) error_ = std::move(error);
  }

 private:
  /// The context ends: nothing is resumed any more, everything is freed.
  ///
  /// No end is touched: in an Asio program the handles often go before the context. Whoever rings for an end whose word
  /// still says `hub_parked` wakes nobody, or the hub that has the doorbell next, for nothing.
  void shutdown() override {
    ended_ = true;
    announced_ = false;
    // Not under mutex_: what they wait for is withdrawn.
    destroy_roots();
    absorb_inbox();
    while (hub_waiter* waiter = waiters_.first()) {
      remove(*waiter);
      if (waiter->abandon != nullptr) waiter->abandon(*waiter);
      absorb_inbox();  // what a destructor began
    }
    // Of coroutines that outlive the context.
    while (!timers_.empty()) remove(*timers_.back());
    alarm_.reset();
    for (bell_wait* wait : {&bell_wait_, &lines_wait_}) {
      if (!wait->descriptor) continue;
      wait->descriptor->release();  // the descriptor is the doorbell's
      wait->descriptor.reset();
    }
  }

  /// The context goes on in the child of a fork, and so does the hub: the doorbell's number stands for an eventfd of the
  /// child's own by now, which the reactor has taken up or is about to. What waits for an end that is the parent's must
  /// be told, so there is a turn.
  void notify_fork(asio::execution_context::fork_event event) override {
    if (event == asio::execution_context::fork_child && executor_ && make_resident()) post_turn();
  }

  /// While it lives, this thread is in the hub's turn. The mutex must be held.
  class within_turn {
   public:
    explicit within_turn(hub* of) noexcept
        : outside_{std::exchange(current_, of)}, turning_{std::exchange(turning_hub, of)} {}
    ~within_turn() {
      turning_hub = turning_;
      current_ = outside_;
    }
    within_turn(const within_turn&) = delete;
    within_turn& operator=(const within_turn&) = delete;

   private:
    hub* outside_;
    hub* turning_;
  };

  void destroy_roots() noexcept {
    while (hub_root* root = roots_.first()) {
      roots_.remove(*root);
      root->destroy(*root);
    }
  }

  void append(hub_waiter& waiter) noexcept {
    waiters_.push_back(waiter);
    appended_ = true;
    if (waiter.end == nullptr || ended_) return;
    const std::int64_t longest = waiter.end->longest_spin();
    if (longest > longest_spin_) {
      longest_spin_ = longest;
      spin_ = spin_budget{wait_policy::adaptive, std::min<std::int64_t>(longest, 10'000), longest};
    }
  }

  /// For what may be called from within a turn, which holds the mutex, and from outside of it.
  [[nodiscard]] std::unique_lock<std::mutex> lock_unless_turning() {
    return turning_hub == this ? std::unique_lock<std::mutex>{} : std::unique_lock{mutex_};
  }

  [[nodiscard]] bool waits_for(const endpoint& end) const noexcept {
    for (const hub_waiter* waiter = waiters_.first(); waiter != nullptr; waiter = waiter->next) {
      if (waiter->end == &end) return true;
    }
    return false;
  }

  void remove(hub_waiter& waiter) noexcept {
    if (cursor_ == &waiter) cursor_ = waiter.next;
    waiters_.remove(waiter);
    waiter.owner = nullptr;
  }

  void put(hub_timer& timer, std::size_t place) noexcept {
    timers_[place] = &timer;
    timer.place = place;
  }

  /// Puts the timer at `place` or as far above it as it belongs.
  void move_up(hub_timer& timer, std::size_t place) noexcept {
    for (; place != 0; place = (place - 1) / 2) {
      hub_timer& above = *timers_[(place - 1) / 2];
      if (above.due <= timer.due) break;
      put(above, place);
    }
    put(timer, place);
  }

  /// Puts the timer at `place` or as far below it as it belongs.
  void move_down(hub_timer& timer, std::size_t place) noexcept {
    for (;;) {
      std::size_t below = 2 * place + 1;
      if (below >= timers_.size()) break;
      if (below + 1 < timers_.size() && timers_[below + 1]->due < timers_[below]->due) ++below;
      if (timer.due <= timers_[below]->due) break;
      put(*timers_[below], place);
      place = below;
    }
    put(timer, place);
  }

  void remove(hub_timer& timer) noexcept {
    const std::size_t place = timer.place;
    hub_timer& last = *timers_.back();
    timers_.pop_back();
    if (&last != &timer) {
      move_down(last, place);
      move_up(last, last.place);
    }
    timer.owner = nullptr;
  }

  [[nodiscard]] bool timer_due(std::int64_t now) const noexcept {
    return !timers_.empty() && timers_.front()->due <= now;
  }

  /// Completes timers whose time has come, but no more than a pass does.
  void ring_timers(std::int64_t now) {
    for (int completed = 0; completed < most_completions_between_clocks && timer_due(now) && !error_; ++completed) {
      hub_timer& timer = *timers_.front();
      remove(timer);
      timer.complete(timer);
    }
  }

  /// Has the reactor wake the hub when the first timer is due.
  void set_alarm() {
    const std::int64_t due = timers_.empty() ? forever : timers_.front()->due;
    if (due == alarm_due_) return;
    ++alarming_;  // the handler of an alarm that is replaced must not count as this one's
    alarm_due_ = forever;
    if (due == forever) {
      alarm_->cancel();
      return;
    }
    alarm_->expires_at(std::chrono::steady_clock::time_point{std::chrono::nanoseconds{due}});
    alarm_->async_wait([this, alarming = alarming_](const std::error_code& error) { alarmed(error, alarming); });
    alarm_due_ = due;  // not if the call above found no memory
  }

  /// The first timer is due.
  void alarmed(const std::error_code& error, std::uint64_t alarming) {
    {
      // As for rung().
      const auto lock = lock_unless_turning();
      if (alarming != alarming_) return;
      alarm_due_ = forever;
      if (error) return;
    }
    begin_turn();
  }

  /// What kept the context's run() going has come. If somebody else made the hub resident just now, the turn that is owed
  /// may not have been posted yet, by a thread that has lost its CPU: until it has, the doorbell's handler keeps run()
  /// from returning. That turn parks, or cancels it.
  void begin_turn() {
    if (make_resident()) return turn();
    if (turning_hub == this) return;
    const std::lock_guard lock{mutex_};
    // No turn is running, so one that ended meanwhile shows here: states are left with the mutex held.
    if (state_.load(std::memory_order_seq_cst) == hub_state::resident) arm(bell_wait_);
  }

  void absorb_inbox() noexcept {
    // relaxed: a look; the exchange below acquires.
    if (inbox_.load(std::memory_order_relaxed) == nullptr) return;
    hub_waiter* newest = inbox_.exchange(nullptr, std::memory_order_acquire);
    hub_waiter* oldest = nullptr;
    while (newest != nullptr) {
      hub_waiter* next = newest->next;
      newest->next = oldest;
      oldest = newest;
      newest = next;
    }
    while (oldest != nullptr) {
      hub_waiter* next = oldest->next;
      append(*oldest);
      oldest = next;
    }
  }

  /// True: the hub was idle or parked, and the caller now owes it a turn.
  bool make_resident() noexcept {
    hub_state now = state_.load(std::memory_order_seq_cst);
    while (now != hub_state::resident) {
      if (state_.compare_exchange_weak(now, hub_state::resident, std::memory_order_seq_cst)) return true;
    }
    return false;
  }

  void post_turn() {
    asio::post(executor_, [this] { turn(); });
  }

  /// After a slice. Asio polls its reactor behind what is in its queue already, and puts what it finds there behind that:
  /// a turn posted once would be in front of it for a whole slice more.
  void post_turn_behind_others() {
    asio::post(executor_, [this] { post_turn(); });
  }

  /// The turn that the resident state stands for. With `first`: completes that, as a turn would; and then is that turn
  /// only if it left something to wait for and no turn is on its way.
  void turn(hub_waiter* first = nullptr) {
    std::exception_ptr error;
    {
      const std::lock_guard lock{mutex_};
      bool resident = first == nullptr;
      const within_turn turning{this};
      try {
        if (first != nullptr) {
          appended_ = false;
          first->complete(*first);
          resident = appended_ && make_resident();
        }
        if (resident) {
          wake_up();
          run_slice();
        }
      } catch (...) {
        // A handler threw: that is for whoever called run(), as with every other handler. The hub goes on.
        error = std::current_exception();
        cursor_ = nullptr;
        if (resident || make_resident()) post_turn();
      }
      if (!error) error = std::exchange(error_, nullptr);
    }
    if (error) std::rethrow_exception(error);
  }

  void wake_up() noexcept {
    if (!announced_) return;
    take_back_all();
    spin_.parked_for(now_ns() - parked_at_);
  }

  void take_back_all() noexcept {
    announced_ = false;
    for (hub_waiter* waiter = waiters_.first(); waiter != nullptr; waiter = waiter->next) {
      if (waiter->end != nullptr) waiter->end->hub_awake();
    }
  }

  /// Looks at one waiter after the other and completes those that are ready; returns how many were. Ends at the end of
  /// the list or after so many completions that the clock must be looked at: a coroutine that waits again joins the end
  /// of the list, so two that are always ready would keep a pass going for ever. The next pass goes on where this ended.
  int pass() {
    int completed = 0;
    looked_ = 0;
    const bool alone = waiters_.single();
    if (cursor_ == nullptr) cursor_ = waiters_.first();
    while (cursor_ != nullptr && completed < completions_between_clocks_ && !error_) {
      hub_waiter& waiter = *cursor_;
      cursor_ = waiter.next;
      ++looked_;
      if (waiter.ready != nullptr && !waiter.ready(waiter, alone)) continue;
      remove(waiter);
      ++completed;
      waiter.complete(waiter);
    }
    return completed;
  }

  void run_slice() {
    const bool shared = shared_.load(std::memory_order_relaxed);
    const std::int64_t began = now_ns();
    std::int64_t last = began;
    int completions = 0;
    bool rang = false;
    for (;;) {
      absorb_inbox();
      // No clock of their own: `last` is as old as a few looks or completions.
      if (timer_due(last)) {
        // Some may always be due again; a pass lies between.
        if (rang && ends_slice(shared, last - began)) return;
        ring_timers(last);
        rang = true;
        last = now_ns();
      }
      if (const int completed = pass(); completed != 0) {
        if (idle_looks_ >= looks_between_clocks) spin_.answered();
        idle_looks_ = 0;
        completions += completed;
        if (completions < completions_between_clocks_ && !error_) continue;
        completions = 0;
        const std::int64_t now = now_ns();
        completions_between_clocks_ = now - last > between_clocks_ns
                                          ? std::max(completions_between_clocks_ / 2, 1)
                                          : std::min(completions_between_clocks_ * 2, most_completions_between_clocks);
        last = now;
      } else if (waiters_.empty()) {
        idle_looks_ = 0;
        if (go_idle()) return;
        continue;
      } else {
        // The first looks read no clock, so that a message that is near meets no detour; but who never spins parks now.
        if (idle_looks_ == 0 && spin_length() == 0) {
          if (park()) return;
          continue;
        }
        const std::uint64_t before = idle_looks_;
        idle_looks_ += std::max<std::uint64_t>(looked_, 1);
        if (before / looks_between_clocks == idle_looks_ / looks_between_clocks) continue;
        const std::int64_t now = now_ns();
        if (before < looks_between_clocks) idle_since_ = last = now;
        if (now - last > spin_budget::preemption_gap) {
          spin_.preempted();
        } else if (now - idle_since_ >= spin_length()) {
          spin_.in_vain();
        } else {
          last = now;
          if (ends_slice(shared, now - began)) return;
          continue;
        }
        if (spin_length() != forever) {
          idle_looks_ = 0;
          if (park()) return;
          continue;
        }
        last = now;
      }
      if (ends_slice(shared, last - began)) return;
    }
  }

  /// Whether others have waited long enough. Then the next turn was posted behind them.
  [[nodiscard]] bool ends_slice(bool shared, std::int64_t elapsed) {
    const bool over = (shared && elapsed >= slice_ns) || stopped_.load(std::memory_order_relaxed) ||
                      error_ != nullptr || shared != shared_.load(std::memory_order_relaxed);
    if (over) post_turn_behind_others();
    return over;
  }

  static constexpr std::int64_t forever = std::numeric_limits<std::int64_t>::max();

  /// How long to spin for those who wait now.
  [[nodiscard]] std::int64_t spin_length() const noexcept {
    std::int64_t longest = 0;
    for (hub_waiter* waiter = waiters_.first(); waiter != nullptr; waiter = waiter->next) {
      if (waiter->end == nullptr) continue;
      if (waiter->end->policy() == wait_policy::busy) return forever;
      if (waiter->end->policy() == wait_policy::adaptive) longest = spin_.length();
    }
    return longest;
  }

  /// False: somebody came meanwhile.
  bool go_idle() {
    for (bell_wait* wait : {&bell_wait_, &lines_wait_}) {
      if (!wait->armed) continue;
      ++wait->arming;  // the handler that is cancelled now must not count as the doorbell's
      wait->armed = false;
      wait->descriptor->cancel();
    }
    set_alarm();
    return rest(hub_state::idle);
  }

  /// The turn ends in `state`, unless the inbox is not empty. seq_cst on both words: whoever pushes and then reads
  /// state_ sees it, or we see the push. With less, both could miss the other, and the waiter would wait for ever.
  bool rest(hub_state state) noexcept {
    state_.store(state, std::memory_order_seq_cst);
    if (inbox_.load(std::memory_order_seq_cst) == nullptr) return true;
    return !make_resident();  // if another made it resident, a turn is on its way
  }

  /// Announces, looks once more, and leaves the context to its reactor. False: there was something.
  bool park() {
    announced_ = true;
    if (fall_asleep()) return true;
    take_back_all();
    return false;
  }

  bool fall_asleep() {
    bool by_process = false;
    bool by_machine = false;
    bool by_fence = false;
    for (hub_waiter* waiter = waiters_.first(); waiter != nullptr; waiter = waiter->next) {
      if (waiter->end == nullptr) return false;  // it wants its turn
      try {
        waiter->end->announce_hub(bell_.number());
      } catch (const std::system_error&) {
        return false;  // no thread for the relay that this end needs, or no descriptor for its line: stay awake
      }
      by_process = by_process || waiter->end->barrier() == store_load::by_process_barrier;
      by_machine = by_machine || waiter->end->barrier() == store_load::by_machine_barrier;
      by_fence = by_fence || waiter->end->barrier() == store_load::by_fence;
    }
    if (bell_.lines() >= 0 && !lines_wait_.descriptor && !wait_for_lines()) return false;
    if (by_fence) heavy_barrier(store_load::by_fence);
    if (by_process) heavy_barrier(store_load::by_process_barrier);
    if (by_machine) heavy_barrier(store_load::by_machine_barrier);
    for (hub_waiter* waiter = waiters_.first(); waiter != nullptr; waiter = waiter->next) {
      if (waiter->ready(*waiter, false)) return false;
    }
    for (hub_waiter* waiter = waiters_.first(); waiter != nullptr; waiter = waiter->next) {
      if (!waiter->end->hub_sleeps()) return false;
    }
    parked_at_ = now_ns();
    arm(bell_wait_);
    if (lines_wait_.descriptor) arm(lines_wait_);
    set_alarm();
    return rest(hub_state::parked);
  }

  /// A wait of the reactor's for the doorbell, or for the lines of those who may not have it.
  struct bell_wait {
    std::optional<asio::posix::stream_descriptor> descriptor;
    bool armed = false;
    std::uint64_t arming = 0;
  };

  /// False: the reactor has no room for them, so nobody may sleep behind a line.
  [[nodiscard]] bool wait_for_lines() {
    try {
      lines_wait_.descriptor.emplace(executor_, bell_.lines());
      return true;
    } catch (const std::system_error&) {
      return false;
    }
  }

  void arm(bell_wait& wait) {
    if (wait.armed) return;
    wait.descriptor->async_wait(
        asio::posix::stream_descriptor::wait_read,
        [this, &wait, arming = ++wait.arming](const std::error_code& error) { rung(wait, error, arming); });
    wait.armed = true;  // not if the call above found no memory
  }

  /// The doorbell, or a line, is readable.
  void rung(bell_wait& wait, const std::error_code& error, std::uint64_t arming) {
    {
      // A handler that is called in a turn may run the context in turn, and so come here.
      const auto lock = lock_unless_turning();
      if (arming != wait.arming) return;
      wait.armed = false;
      if (error) return;
      if (&wait == &bell_wait_) {
        bell_.drain();
      } else {
        bell_.drain_lines();
      }
    }
    begin_turn();
  }

  std::once_flag used_;
  asio::any_io_executor executor_;
  std::atomic<hub_state> state_{hub_state::idle};
  std::atomic<hub_waiter*> inbox_{nullptr};
  std::atomic<bool> shared_{true};
  std::atomic<bool> stopped_{false};

  std::mutex mutex_;
  intrusive_list<hub_waiter> waiters_;
  /// Waiters that the last pass looked at, and that were looked at since one was ready. The latter and the time of the
  /// first such looks outlive a turn: a spin may be longer than a slice.
  std::uint64_t looked_ = 0;
  std::uint64_t idle_looks_ = 0;
  std::int64_t idle_since_ = 0;
  /// As many as take `between_clocks_ns`, roughly.
  int completions_between_clocks_ = most_completions_between_clocks;
  /// The next that a pass looks at; null: the first.
  hub_waiter* cursor_ = nullptr;
  spin_budget spin_;
  std::int64_t longest_spin_ = 0;
  /// Whether the context is being destroyed.
  bool ended_ = false;
  /// Whether our doorbell stands in the words of those who wait.
  bool announced_ = false;
  std::int64_t parked_at_ = 0;

  doorbell bell_;
  bell_wait bell_wait_;
  bell_wait lines_wait_;

  /// Who sleeps: a binary heap, the first to wake at its front.
  std::vector<hub_timer*> timers_;
  std::optional<asio::steady_timer> alarm_;
  /// When the reactor wakes the hub; forever: it does not.
  std::int64_t alarm_due_ = forever;
  std::uint64_t alarming_ = 0;
  /// Whether something began to wait since this was false.
  bool appended_ = false;
  /// What `turning_hub` was before the visit that holds mutex_.
  hub* outside_visit_ = nullptr;

  intrusive_list<hub_root> roots_;
  /// What left a coroutine of ours; the turn ends and throws it.
  std::exception_ptr error_;
};

asio::execution_context::id asio_hub::id;

}  // namespace

constinit thread_local hub* hub::current_ = nullptr;

// Of no module, so that <strait/asio.hpp> can declare it: an interface unit would need Asio for that.
extern "C++" hub& hub_of(const asio::any_io_executor& executor) {
  auto& found = asio::use_service<asio_hub>(asio::query(executor, asio::execution::context));
  found.use(executor);
  return found;
}

// Of no module either. Whoever asks for the executor may use it, so the reactor must have its turns from now on.
extern "C++" asio::any_io_executor executor_of(hub& of) {
  of.share(true);
  return static_cast<asio_hub&>(of).executor();
}

}  // namespace strait
