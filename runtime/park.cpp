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

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <map>
#include <mutex>
#include <optional>
#include <span>
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

struct doorbell::bell {
  std::uint64_t number = 0;
  int eventfd = -1;
  int lines = -1;
  bool owned = true;
  bell_latch<> latch;
};

/// This process's bells by number, of which none ever goes.
struct doorbell::list {
  std::mutex mutex;
  std::map<std::uint64_t, bell> bells;
};

doorbell::list& doorbell::all() noexcept {
  static auto* const bells = new list;  // outlives every thread that may still ring
  return *bells;
}

void doorbell::lock_all() noexcept {
  all().mutex.lock();
}
void doorbell::unlock_all() noexcept {
  all().mutex.unlock();
}

void doorbell::renew_all() noexcept {
  for (auto& [number, bell] : all().bells) {
    // Of the child's own, in the place of the parent's, which both would otherwise read and write. The lines are the
    // parent's, and its child attends none of them.
    renew(bell.eventfd, [] { return ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK); });
    if (bell.lines >= 0) renew(bell.lines, [] { return ::epoll_create1(EPOLL_CLOEXEC); });
    bell.latch.reset();
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

doorbell::doorbell() {
  attend_forks();
  auto& here = all();
  const std::lock_guard lock{here.mutex};
  const auto idle = std::ranges::find_if(here.bells, [](const auto& entry) { return !entry.second.owned; });
  if (idle != here.bells.end()) {
    bell_ = &idle->second;
    bell_->owned = true;
    drain();  // of rings that were for the one before
    return;
  }
  const int made = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (made < 0) throw std::system_error{errno, std::system_category(), "eventfd for a hub's doorbell"};
  const std::uint64_t number = here.bells.size() + 1;
  try {
    bell_ = &here.bells[number];
  } catch (...) {
    ::close(made);
    throw;
  }
  bell_->number = number;
  bell_->eventfd = made;
}

doorbell::~doorbell() {
  const std::lock_guard lock{all().mutex};
  bell_->owned = false;
}

std::uint64_t doorbell::number() const noexcept {
  return bell_->number;
}
int doorbell::descriptor() const noexcept {
  return bell_->eventfd;
}
int doorbell::lines() const noexcept {
  return bell_->lines;
}

void doorbell::drain() noexcept {
  std::uint64_t rings = 0;
  // EAGAIN: nobody rang. There is nothing else that a read of our own eventfd can say.
  [[maybe_unused]] const auto got = ::read(bell_->eventfd, &rings, sizeof rings);
  bell_->latch.reset();
}

void doorbell::ring(std::uint64_t number) noexcept {
  auto& here = all();
  const std::lock_guard lock{here.mutex};
  const auto found = here.bells.find(number);
  if (found == here.bells.end() || !found->second.owned || !found->second.latch.claim()) return;
  const std::uint64_t one = 1;
  // EAGAIN: the counter is full, so the bell is readable as it should be.
  [[maybe_unused]] const auto put = ::write(found->second.eventfd, &one, sizeof one);
}

int doorbell::duplicate(std::uint64_t number) noexcept {
  auto& here = all();
  const std::lock_guard lock{here.mutex};
  const auto found = here.bells.find(number);
  return found == here.bells.end() ? -1 : ::fcntl(found->second.eventfd, F_DUPFD_CLOEXEC, 0);
}

void doorbell::attend(std::uint64_t number, int line) {
  auto& here = all();
  const std::lock_guard lock{here.mutex};
  const auto found = here.bells.find(number);
  if (found == here.bells.end()) return;
  int& lines = found->second.lines;
  if (lines < 0) lines = ::epoll_create1(EPOLL_CLOEXEC);
  ::epoll_event interest{};
  interest.events = EPOLLIN | EPOLLRDHUP;
  interest.data.fd = line;
  if (lines < 0 || ::epoll_ctl(lines, EPOLL_CTL_ADD, line, &interest) != 0) {
    throw std::system_error{errno, std::system_category(), "epoll for the lines of a hub's doorbell"};
  }
}

void doorbell::leave(std::uint64_t number, int line) noexcept {
  auto& here = all();
  const std::lock_guard lock{here.mutex};
  // ENOENT: the line ended and was taken off.
  if (const auto found = here.bells.find(number); found != here.bells.end()) {
    ::epoll_ctl(found->second.lines, EPOLL_CTL_DEL, line, nullptr);
  }
}

void doorbell::drain_lines() noexcept {
  const std::lock_guard lock{all().mutex};  // no line is closed meanwhile: `leave` comes before that
  std::array<::epoll_event, 64> events{};
  const int count = ::epoll_wait(bell_->lines, events.data(), static_cast<int>(events.size()), 0);
  for (int i = 0; i < count; ++i) {
    const ::epoll_event& event = events[static_cast<std::size_t>(i)];
    std::array<std::byte, 64> rings{};
    const ::ssize_t got = ::recv(event.data.fd, rings.data(), rings.size(), MSG_DONTWAIT);
    // An ended line would be readable for ever. What its end means the sentry finds out, and rings.
    if (got <= 0 && (event.events & (EPOLLHUP | EPOLLERR | EPOLLRDHUP)) != 0) {
      ::epoll_ctl(bell_->lines, EPOLL_CTL_DEL, event.data.fd, nullptr);
    }
  }
}

bool send_at_once(int connection, std::span<const std::byte> message, std::span<const int> descriptors) noexcept {
  ::iovec part{const_cast<std::byte*>(message.data()), message.size()};  // sendmsg only reads it
  alignas(::cmsghdr) std::array<std::byte, CMSG_SPACE(most_descriptors * sizeof(int))> control{};
  ::msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  if (!descriptors.empty()) {
    header.msg_control = control.data();
    header.msg_controllen = CMSG_SPACE(descriptors.size_bytes());
    ::cmsghdr* rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(descriptors.size_bytes());
    std::memcpy(CMSG_DATA(rights), descriptors.data(), descriptors.size_bytes());
  }
  ::ssize_t sent = 0;
  do {
    sent = ::sendmsg(connection, &header, MSG_DONTWAIT | MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  return sent == static_cast<::ssize_t>(message.size());
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
