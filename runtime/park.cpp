module;
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <linux/membarrier.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <map>
#include <mutex>
#include <optional>
#include <system_error>
module strait.park;

namespace strait {

// In runtime/switchboard.cpp, whose mutex comes before that of the doorbells.
void attend_forks();

namespace {

int membarrier(int command) noexcept {
  return static_cast<int>(::syscall(SYS_membarrier, command, 0, 0));
}

int registration_command(store_load kind) noexcept {
  return kind == store_load::by_machine_barrier ? MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED
                                                : MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED;
}

/// This process's doorbells by number. A ringer holds the mutex while it writes, so that a descriptor is never
/// written after its doorbell closed it and the kernel gave the number to something else.
struct doorbell_list {
  std::mutex mutex;
  std::uint64_t next = 1;
  std::map<std::uint64_t, doorbell*> entries;
};

doorbell_list& doorbells() {
  static auto* list = new doorbell_list;  // outlives every thread that may still ring
  return *list;
}

}  // namespace

void lock_doorbells() {
  doorbells().mutex.lock();
}
void unlock_doorbells() {
  doorbells().mutex.unlock();
}
namespace {

/// Puts what `open` makes in the place of `old`, which is closed first, so that there is room for a new one.
template <class Open>
void renew(int old, Open open) noexcept {
  ::close(old);
  const int fresh = open();
  if (fresh >= 0 && fresh != old) {
    ::dup3(fresh, old, O_CLOEXEC);
    ::close(fresh);
  }
}

}  // namespace

void doorbell::renew_all() noexcept {
  for (const auto& [number, bell] : doorbells().entries) {
    // Of the child's own, in the place of the parent's, which both would otherwise read and write. The lines are the
    // parent's, and its child attends none of them.
    renew(bell->descriptor_, [] { return ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK); });
    if (bell->lines_ >= 0) renew(bell->lines_, [] { return ::epoll_create1(EPOLL_CLOEXEC); });
    bell->latch_.reset();
  }
}

bool register_barrier(store_load kind) noexcept {
  if (kind == store_load::by_fence) return true;
  static std::atomic<bool> process_registered{false};
  static std::atomic<bool> machine_registered{false};
  auto& registered = kind == store_load::by_machine_barrier ? machine_registered : process_registered;
  // relaxed: the kernel's registration orders itself; a second one is harmless.
  if (registered.load(std::memory_order_relaxed)) return true;
  if (membarrier(registration_command(kind)) != 0) return false;
  registered.store(true, std::memory_order_relaxed);
  return true;
}

void heavy_barrier(store_load kind) noexcept {
#if defined(__has_feature) && __has_feature(thread_sanitizer)
  native_waiting::light_barrier(kind);
#else
  // Pairs with native_waiting::light_barrier. The fence is what we owe for ourselves; membarrier makes every other
  // running thread of the registered processes execute one, too.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (kind == store_load::by_process_barrier) {
    membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED);
  } else if (kind == store_load::by_machine_barrier) {
    membarrier(MEMBARRIER_CMD_GLOBAL_EXPEDITED);
  }
#endif
}

void futex_sleep(std::atomic<std::uint32_t>& word, presence parked,
                 std::optional<std::chrono::steady_clock::time_point> deadline) noexcept {
  // FUTEX_WAIT_BITSET takes an absolute time of CLOCK_MONOTONIC, which is what steady_clock counts.
  timespec until{};
  if (deadline) {
    const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(deadline->time_since_epoch()).count();
    until.tv_sec = static_cast<time_t>(ns / 1'000'000'000);
    until.tv_nsec = static_cast<long>(ns % 1'000'000'000);
  }
  // EAGAIN (rung already), EINTR and ETIMEDOUT all mean the same to the caller: look again.
  ::syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAIT_BITSET, static_cast<std::uint32_t>(parked),
            deadline ? &until : nullptr, nullptr, FUTEX_BITSET_MATCH_ANY);
}

void futex_wake(std::atomic<std::uint32_t>& word) noexcept {
  // All of them: beside the owner, a relay may still be asleep on the word from a wait of the hub that was withdrawn.
  ::syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

doorbell::doorbell() : descriptor_{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)} {
  if (descriptor_ < 0) throw std::system_error{errno, std::system_category(), "eventfd for a hub's doorbell"};
  attend_forks();
  auto& list = doorbells();
  const std::lock_guard lock{list.mutex};
  number_ = list.next++;
  list.entries.emplace(number_, this);
}

doorbell::~doorbell() {
  auto& list = doorbells();
  const std::lock_guard lock{list.mutex};
  list.entries.erase(number_);
  ::close(descriptor_);
  if (lines_ >= 0) ::close(lines_);
}

void doorbell::drain() noexcept {
  std::uint64_t rings = 0;
  // EAGAIN: nobody rang. There is nothing else that a read of our own eventfd can say.
  [[maybe_unused]] const auto got = ::read(descriptor_, &rings, sizeof rings);
  latch_.reset();
}

void doorbell::ring(std::uint64_t number) noexcept {
  auto& list = doorbells();
  const std::lock_guard lock{list.mutex};
  const auto found = list.entries.find(number);
  if (found == list.entries.end() || !found->second->latch_.claim()) return;
  const std::uint64_t one = 1;
  // EAGAIN: the counter is full, so the bell is readable as it should be.
  [[maybe_unused]] const auto put = ::write(found->second->descriptor_, &one, sizeof one);
}

int doorbell::duplicate(std::uint64_t number) noexcept {
  auto& list = doorbells();
  const std::lock_guard lock{list.mutex};
  const auto found = list.entries.find(number);
  return found == list.entries.end() ? -1 : ::fcntl(found->second->descriptor_, F_DUPFD_CLOEXEC, 0);
}

void doorbell::attend(std::uint64_t number, int line) {
  auto& list = doorbells();
  const std::lock_guard lock{list.mutex};
  const auto found = list.entries.find(number);
  if (found == list.entries.end()) return;
  int& lines = found->second->lines_;
  if (lines < 0) lines = ::epoll_create1(EPOLL_CLOEXEC);
  ::epoll_event interest{};
  interest.events = EPOLLIN | EPOLLRDHUP;
  interest.data.fd = line;
  if (lines < 0 || ::epoll_ctl(lines, EPOLL_CTL_ADD, line, &interest) != 0) {
    throw std::system_error{errno, std::system_category(), "epoll for the lines of a hub's doorbell"};
  }
}

void doorbell::leave(std::uint64_t number, int line) noexcept {
  auto& list = doorbells();
  const std::lock_guard lock{list.mutex};
  const auto found = list.entries.find(number);
  // ENOENT: the line ended and was taken off.
  if (found != list.entries.end()) ::epoll_ctl(found->second->lines_, EPOLL_CTL_DEL, line, nullptr);
}

void doorbell::drain_lines() noexcept {
  auto& list = doorbells();
  const std::lock_guard lock{list.mutex};  // no line is closed meanwhile: `leave` comes before that
  std::array<::epoll_event, 64> events{};
  const int count = ::epoll_wait(lines_, events.data(), static_cast<int>(events.size()), 0);
  for (int i = 0; i < count; ++i) {
    const ::epoll_event& event = events[static_cast<std::size_t>(i)];
    std::array<std::byte, 64> rings{};
    const ::ssize_t got = ::recv(event.data.fd, rings.data(), rings.size(), MSG_DONTWAIT);
    // An ended line would be readable for ever. What its end means the sentry finds out, and rings.
    if (got <= 0 && (event.events & (EPOLLHUP | EPOLLERR | EPOLLRDHUP)) != 0) {
      ::epoll_ctl(lines_, EPOLL_CTL_DEL, event.data.fd, nullptr);
    }
  }
}

void ring_line(int line) noexcept {
  const std::byte ring{};
  ::ssize_t sent = 0;
  do {
    sent = ::send(line, &ring, sizeof ring, MSG_DONTWAIT | MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
}

unsigned online_cpu_count() noexcept {
  // Of the machine, not of this thread's affinity: a pinned thread may well wait for one that is pinned elsewhere.
  static const unsigned count = [] {
    const long online = ::sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? static_cast<unsigned>(online) : 1U;
  }();
  return count;
}

}  // namespace strait
