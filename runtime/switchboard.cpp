module;
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>
module strait.park;

/// How processes find each other: mailboxes, doorbells left in them, and the sentry.
///
/// Every process has a mailbox, a listening socket that nobody needs to serve: a hub that is about to park connects to
/// its peer's mailbox and sends its eventfd; both lie in the kernel's queue until the peer wants to ring, and only then
/// are collected. The hub's side of that connection is kept, because the kernel ends it when the peer's process ends.
///
/// Everything here is off the hot path, under one mutex, that of the doorbells within it. A note is one message of a
/// SEQPACKET socket: whole, or not there. Killed at any moment, a process leaves connections that the kernel ends; what it
/// sent before is read first.
namespace strait {

namespace {

class descriptor {
 public:
  descriptor() = default;
  explicit descriptor(int value) noexcept : value_{value} {}
  descriptor(descriptor&& other) noexcept : value_{std::exchange(other.value_, -1)} {}
  descriptor& operator=(descriptor&& other) noexcept {
    std::swap(value_, other.value_);
    return *this;
  }
  ~descriptor() {
    if (value_ >= 0) ::close(value_);
  }
  [[nodiscard]] int get() const noexcept { return value_; }
  explicit operator bool() const noexcept { return value_ >= 0; }

 private:
  int value_ = -1;
};

/// What travels over a mailbox connection. With a descriptor: "this is my doorbell". Without, in the other direction:
/// "ring that bell of yours for me, its descriptor did not arrive".
struct note {
  std::uint64_t magic = expected_magic;
  process_identity from;
  std::uint64_t doorbell_number = 0;
  static constexpr std::uint64_t expected_magic = 0x74696172'74530001;  // "strait", version 1
};

/// The address in the abstract namespace: it vanishes with the process, and needs no directory.
struct mailbox_address {
  ::sockaddr_un address{};
  ::socklen_t length = 0;

  explicit mailbox_address(process_identity of) {
    address.sun_family = AF_UNIX;
    // sun_path[0] stays NUL: that is what makes it abstract.
    const int written =
        std::snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "strait-%016llx%016llx",
                      static_cast<unsigned long long>(of.high), static_cast<unsigned long long>(of.low));
    length = static_cast<::socklen_t>(offsetof(::sockaddr_un, sun_path) + 1 + static_cast<std::size_t>(written));
  }
};

/// Only processes of our own user may ring us or be rung: both sides apply the same rule, so neither believes in a bell
/// that the other refused.
bool same_user(int connection) noexcept {
  ::ucred credentials{};
  ::socklen_t length = sizeof credentials;
  return ::getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &credentials, &length) == 0 &&
         credentials.uid == ::geteuid();
}

/// A bell must be an eventfd: writing eight bytes into anything else could block or do harm.
bool is_eventfd(int candidate) noexcept {
  std::array<char, 64> link{};
  std::array<char, 64> target{};
  std::snprintf(link.data(), link.size(), "/proc/self/fd/%d", candidate);
  const ::ssize_t length = ::readlink(link.data(), target.data(), target.size() - 1);
  return length > 0 && std::string_view{target.data(), static_cast<std::size_t>(length)} == "anon_inode:[eventfd]";
}

/// How often a lock is looked at that has to be looked at again. Who waits for its answer is to have it within 5 ms; each look
/// costs some microseconds.
constexpr int look_again_ms = 3;

process_identity random_identity() {
  process_identity drawn;
  if (::getrandom(&drawn, sizeof drawn, 0) != sizeof drawn) {
    throw std::system_error{errno, std::system_category(), "random bits for this process's identity"};
  }
  return drawn;
}

class switchboard {
 public:
  switchboard() : identity_{random_identity()} {
    // All that waking and being told of a death needs is made now, where its lack is an error that opening a channel
    // reports: a process that runs out of descriptors later neither loses a bell nor sleeps on beside a dead peer.
    spare_ = descriptor{::open("/dev/null", O_RDONLY | O_CLOEXEC)};
    epoll_ = descriptor{::epoll_create1(EPOLL_CLOEXEC)};
    control_ = descriptor{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    if (!spare_ || !epoll_ || !control_ || !add_to_epoll(control_.get())) {
      throw std::system_error{errno, std::system_category(),
                              "descriptors for the wake-ups of a channel between processes"};
    }
    descriptor box{::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
    const mailbox_address here{identity_};
    if (box && ::bind(box.get(), reinterpret_cast<const ::sockaddr*>(&here.address), here.length) == 0 &&
        ::listen(box.get(), SOMAXCONN) == 0) {
      mailbox_ = std::move(box);
    }
  }

  std::mutex mutex;

  [[nodiscard]] process_identity identity() const noexcept { return identity_; }

  bool offer(process_identity to, std::uint64_t number) {
    outgoing* line = connect_to(to);
    if (line == nullptr) return false;
    if (line->offered.contains(number)) return true;
    const descriptor bell{doorbell::duplicate(number)};
    if (!bell || !send_note(line->connection.get(), number, std::array{bell.get()})) return false;
    line->offered.insert(number);
    return true;
  }

  void ring(process_identity owner, std::uint64_t number) {
    auto found = bells_.find({owner, number});
    if (found == bells_.end()) {
      collect_mailbox();
      found = bells_.find({owner, number});
      // Not there: its owner has died (and is told nothing any more), or left the bell with a predecessor of ours,
      // whose end wakes it, or was rung by our hanging up.
      if (found == bells_.end()) return;
    }
    if (found->second.eventfd) {
      const std::uint64_t one = 1;
      // EAGAIN: the counter is full, so the bell is readable as it should be. It would block only for a peer that fills
      // it and clears O_NONBLOCK after it came here, which takes malice.
      [[maybe_unused]] const auto put = ::write(found->second.eventfd.get(), &one, sizeof one);
    } else {
      send_note(found->second.connection, number);
    }
  }

  void watch(process_identity process, process_watcher& watcher) {
    std::erase_if(watched_, [&](const watched& entry) { return entry.watcher == &watcher; });
    start_sentry();  // before the entry is made, which nobody would look at if there is no thread to be had
    watched_.push_back({&watcher, process, false});
    if (connect_to(process) == nullptr) {
      watched_.back().look_again = true;
      poke();
    }
  }

  void watch_line(int line, process_watcher& watcher) {
    start_sentry();
    watched_.push_back({&watcher, {}, false, line});
    // Not for EPOLLIN: what comes over a line is for hubs.
    if (!add_to_epoll(line, EPOLLRDHUP)) {
      watched_.back().look_again = true;
      poke();
    }
  }

  void unwatch(process_watcher& watcher) noexcept {
    std::erase_if(watched_, [&](const watched& entry) {
      if (entry.watcher != &watcher) return false;
      if (entry.line >= 0) drop_line(entry.line);
      return true;
    });
  }

  void remember_death(process_identity process) noexcept {
    // This process lives, whatever rubbish in a segment says: else each close beside an end of our own would wait.
    if (process == identity_ || is_remembered_dead(process)) return;
    dead_[next_dead_] = process;
    next_dead_ = (next_dead_ + 1) % dead_.size();
  }
  [[nodiscard]] bool is_remembered_dead(process_identity process) const noexcept {
    return process != process_identity{} && std::ranges::find(dead_, process) != dead_.end();
  }

  /// The thread to join, if nothing is watched any more.
  std::thread stop_sentry_if_idle() noexcept {
    if (!watched_.empty() || !sentry_.joinable()) return {};
    ++watch_number_;  // whose watch it was ends
    ++relieved_;
    poke();
    return std::move(sentry_);
  }

  /// In the child of a fork: the descriptors are copies, the thread does not exist.
  void abandon_in_child() noexcept {
    mailbox_ = {};
    spare_ = {};
    epoll_ = {};
    control_ = {};
    outgoing_.clear();
    incoming_.clear();
    bells_.clear();
    watched_.clear();
    // The thread object stands for a thread of the parent: it must be neither joined nor destroyed.
    new std::thread{std::move(sentry_)};
  }

 private:
  struct outgoing {
    descriptor connection;
    std::set<std::uint64_t> offered;
  };
  struct bell {
    descriptor eventfd;  // empty when none arrived: this process had no room for it, or it was something else
    int connection;
  };
  struct watched {
    process_watcher* watcher;
    process_identity process;
    /// Whether nobody would tell: look every few milliseconds.
    bool look_again;
    /// The connection that is the watcher's own; -1: one of ours, to the process.
    int line = -1;
  };

  bool send_note(int connection, std::uint64_t number, std::span<const int> bell = {}) const noexcept {
    const note text{.from = identity_, .doorbell_number = number};
    return send_at_once(connection, std::as_bytes(std::span{&text, 1}), bell);
  }

  outgoing* connect_to(process_identity process) {
    if (const auto found = outgoing_.find(process); found != outgoing_.end()) return &found->second;
    descriptor connection{::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
    if (!connection) return nullptr;
    const mailbox_address there{process};
    int result = 0;
    do {
      result = ::connect(connection.get(), reinterpret_cast<const ::sockaddr*>(&there.address), there.length);
    } while (result != 0 && errno == EINTR);
    if (result != 0 || !same_user(connection.get())) return nullptr;
    if (!add_to_epoll(connection.get())) return nullptr;
    return &outgoing_.emplace(process, outgoing{std::move(connection), {}}).first->second;
  }

  /// Takes everything that others left: connections, and the bells on them.
  void collect_mailbox() {
    if (!spare_) spare_ = descriptor{::open("/dev/null", O_RDONLY | O_CLOEXEC)};
    for (;;) {
      int accepted = ::accept4(mailbox_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
      if (accepted < 0 && (errno == EMFILE || errno == ENFILE) && spare_) {
        // No descriptor left, which is said even when nobody has called.
        ::pollfd calls{mailbox_.get(), POLLIN, 0};
        if (::poll(&calls, 1, 0) <= 0) break;
        // The spare one makes room for the connection, but only to hang up: that rings every bell that was left on it,
        // and there may be more behind it. Kept open, it is the spare one for the next, so that nobody takes the room.
        spare_ = {};
        accepted = ::accept4(mailbox_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (accepted >= 0) {
          ::shutdown(accepted, SHUT_RDWR);
          spare_ = descriptor{accepted};
          continue;
        }
      }
      if (accepted < 0) {
        if (errno == EINTR) continue;
        break;
      }
      descriptor connection{accepted};
      if (!same_user(accepted) || !add_to_epoll(accepted)) continue;
      incoming_.push_back(std::move(connection));
    }
    std::erase_if(incoming_, [this](const descriptor& connection) {
      if (read_notes(connection.get())) return false;
      forget(connection.get());
      return true;
    });
  }

  /// Reads what came over a connection. False when it ended.
  bool read_notes(int connection) {
    for (;;) {
      note text;
      ::iovec part{&text, sizeof text};
      alignas(::cmsghdr) std::array<char, CMSG_SPACE(4 * sizeof(int))> control{};
      ::msghdr message{};
      message.msg_iov = &part;
      message.msg_iovlen = 1;
      message.msg_control = control.data();
      message.msg_controllen = control.size();
      const ::ssize_t got = ::recvmsg(connection, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return errno == EAGAIN || errno == EWOULDBLOCK;
      if (got == 0) return false;
      descriptor arrived;
      for (::cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
        if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
        const std::size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (std::size_t i = 0; i < count; ++i) {
          int one = -1;
          std::memcpy(&one, CMSG_DATA(header) + i * sizeof(int), sizeof one);
          arrived = descriptor{one};  // of several, the last; the others are closed
        }
      }
      if (got != sizeof text || text.magic != note::expected_magic) continue;
      const bool ours = is_outgoing(connection);
      if (ours) {
        doorbell::ring(text.doorbell_number);
        continue;
      }
      // Then it rings like one that did not arrive: over the connection, at no risk. So it does where /proc does not tell.
      if (arrived && !is_eventfd(arrived.get())) arrived = {};
      // Its owner has made it so; if not, a full counter would have the ringer wait for him.
      if (arrived) ::fcntl(arrived.get(), F_SETFL, O_NONBLOCK);
      bells_.insert_or_assign({text.from, text.doorbell_number}, bell{std::move(arrived), connection});
    }
  }

  /// Before the connection is closed.
  void forget(int connection) {
    serials_.erase(connection);
    std::erase_if(bells_, [&](const auto& entry) { return entry.second.connection == connection; });
  }

  [[nodiscard]] bool is_outgoing(int connection) const noexcept {
    for (const auto& [process, line] : outgoing_) {
      if (line.connection.get() == connection) return true;
    }
    return false;
  }

  /// The line is the watcher's: it is neither read nor closed here.
  void drop_line(int line) noexcept {
    if (serials_.erase(line) != 0) ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, line, nullptr);
  }

  bool add_to_epoll(int connection, std::uint32_t events = EPOLLIN | EPOLLRDHUP) {
    const std::uint32_t serial = ++last_serial_;
    ::epoll_event interest{};
    interest.events = events;
    interest.data.u64 = std::uint64_t{serial} << 32 | static_cast<std::uint32_t>(connection);
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, connection, &interest) != 0) return false;
    serials_[connection] = serial;
    return true;
  }

  void poke() noexcept {
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto put = ::write(control_.get(), &one, sizeof one);
  }

  void start_sentry() {
    if (sentry_.joinable()) return;
    sentry_ = std::thread{[this, mine = ++watch_number_] { stand_sentry(mine); }};
  }

  void stand_sentry(std::uint64_t mine) {
    ::pthread_setname_np(::pthread_self(), "strait-sentry");
    std::unique_lock lock{mutex};
    while (watch_number_ == mine) {
      bool look_again = false;
      for (const auto& entry : watched_) look_again = look_again || entry.look_again;
      const int epoll = epoll_.get();
      std::array<::epoll_event, 32> events{};
      lock.unlock();
      const int count =
          ::epoll_wait(epoll, events.data(), static_cast<int>(events.size()), look_again ? look_again_ms : -1);
      lock.lock();
      for (int i = 0; i < count; ++i) attend(events[static_cast<std::size_t>(i)]);
      // `look` neither waits nor comes back here, so it may run under the mutex, which keeps its object alive.
      std::erase_if(watched_, [](const watched& entry) { return entry.look_again && entry.watcher->look(); });
    }
    --relieved_;
  }

  void attend(const ::epoll_event& event) {
    const int source = static_cast<int>(event.data.u64 & 0xffff'ffff);
    // The event waited for the mutex, and a ringer may have closed the connection meanwhile. Its number may be that of
    // another by now, even of a socket that is none of ours.
    if (const auto known = serials_.find(source); known == serials_.end() || known->second != event.data.u64 >> 32)
      return;
    if (source == control_.get()) {
      // A relieved sentry may still be asleep: the poke is meant for it, too.
      if (relieved_ != 0) return;
      std::uint64_t pokes = 0;
      [[maybe_unused]] const auto got = ::read(source, &pokes, sizeof pokes);
      return;
    }
    for (auto& entry : watched_) {
      if (entry.line != source) continue;
      entry.look_again = true;
      drop_line(source);  // it would be reported for ever
      return;
    }
    const bool alive = read_notes(source) && (event.events & (EPOLLHUP | EPOLLRDHUP | EPOLLERR)) == 0;
    if (alive) return;
    for (auto line = outgoing_.begin(); line != outgoing_.end(); ++line) {
      if (line->second.connection.get() != source) continue;
      for (auto& entry : watched_) {
        if (entry.process == line->first) entry.look_again = true;
      }
      // The other process may live and have dropped the connection (it had no descriptor left to keep it), and with it
      // the bells that we left there. Hubs that sleep behind them get up and offer them anew, or wait on the futex.
      for (const std::uint64_t number : line->second.offered) doorbell::ring(number);
      forget(source);
      outgoing_.erase(line);
      return;
    }
    forget(source);
    std::erase_if(incoming_, [&](const descriptor& connection) { return connection.get() == source; });
  }

  process_identity identity_;
  descriptor spare_;
  descriptor mailbox_;
  descriptor epoll_;
  descriptor control_;
  /// What the descriptors in epoll are, as the events name them: a number is used again, a serial is not.
  std::map<int, std::uint32_t> serials_;
  std::uint32_t last_serial_ = 0;
  std::map<process_identity, outgoing> outgoing_;
  std::vector<descriptor> incoming_;
  std::map<std::pair<process_identity, std::uint64_t>, bell> bells_;
  std::vector<watched> watched_;
  /// In a circle.
  std::array<process_identity, 256> dead_{};
  std::size_t next_dead_ = 0;
  std::thread sentry_;
  /// Counts the sentries that were started or relieved; a sentry whose number it no longer is goes home.
  std::uint64_t watch_number_ = 0;
  /// Those relieved that have not gone home yet.
  std::uint64_t relieved_ = 0;
};

std::atomic<switchboard*> current_switchboard{nullptr};
std::mutex creation;

/// Has no fork find a mutex of ours held by a thread that the child does not have.
void register_fork_handlers() {
  static const int once = ::pthread_atfork(
      [] {
        creation.lock();
        if (auto* now = current_switchboard.load(std::memory_order_relaxed)) now->mutex.lock();
        doorbell::lock_all();
      },
      [] {
        doorbell::unlock_all();
        if (auto* now = current_switchboard.load(std::memory_order_relaxed)) now->mutex.unlock();
        creation.unlock();
      },
      [] {
        doorbell::renew_all();
        doorbell::unlock_all();
        if (auto* now = current_switchboard.load(std::memory_order_relaxed)) {
          now->abandon_in_child();
          now->mutex.unlock();
          // The child is another process: it draws an identity of its own when it opens a channel.
          current_switchboard.store(nullptr, std::memory_order_relaxed);
        }
        creation.unlock();
      });
  (void)once;
}

switchboard& board() {
  // acquire: pairs with the release below; the object behind the pointer was made by another thread.
  if (auto* made = current_switchboard.load(std::memory_order_acquire)) return *made;
  const std::lock_guard lock{creation};
  if (auto* made = current_switchboard.load(std::memory_order_acquire)) return *made;
  register_fork_handlers();
  auto* made = new switchboard;  // outlives every thread that may still ring
  current_switchboard.store(made, std::memory_order_release);
  return *made;
}

}  // namespace

void attend_forks() {
  register_fork_handlers();
}

process_identity this_process() {
  return board().identity();
}

bool offer_doorbell(process_identity to, std::uint64_t number) noexcept {
  auto& here = board();
  if (to == here.identity()) return true;
  const std::lock_guard lock{here.mutex};
  return here.offer(to, number);
}

void ring_doorbell(process_identity owner, std::uint64_t number) noexcept {
  auto& here = board();
  if (owner == here.identity()) {
    doorbell::ring(number);
    return;
  }
  const std::lock_guard lock{here.mutex};
  here.ring(owner, number);
}

void watch_process(process_identity process, process_watcher& watcher) {
  auto& here = board();
  const std::lock_guard lock{here.mutex};
  here.watch(process, watcher);
}

void watch_line(int line, process_watcher& watcher) {
  auto& here = board();
  const std::lock_guard lock{here.mutex};
  here.watch_line(line, watcher);
}

void unwatch_process(process_watcher& watcher) noexcept {
  // acquire: as in board(). None: nothing was ever watched, and making one may fail.
  auto* const here = current_switchboard.load(std::memory_order_acquire);
  if (here == nullptr) return;
  std::thread idle;
  {
    const std::lock_guard lock{here->mutex};
    here->unwatch(watcher);
    idle = here->stop_sentry_if_idle();
  }
  if (idle.joinable()) idle.join();
}

void remember_death(process_identity process) noexcept {
  auto& here = board();
  const std::lock_guard lock{here.mutex};
  here.remember_death(process);
}

bool is_remembered_dead(process_identity process) noexcept {
  auto& here = board();
  const std::lock_guard lock{here.mutex};
  return here.is_remembered_dead(process);
}

futex_relay::futex_relay(std::atomic<std::uint32_t>& word, std::uint64_t doorbell_number)
    : word_{word}, doorbell_number_{doorbell_number}, thread_{[this] { run(); }} {}

futex_relay::~futex_relay() {
  {
    const std::lock_guard lock{mutex_};
    stopped_ = true;
  }
  changed_.notify_one();
  futex_wake(word_);
  thread_.join();
}

void futex_relay::arm() {
  {
    const std::lock_guard lock{mutex_};
    armed_ = true;
  }
  changed_.notify_one();
}

void futex_relay::run() {
  ::pthread_setname_np(::pthread_self(), "strait-relay");
  std::unique_lock lock{mutex_};
  for (;;) {
    changed_.wait(lock, [this] { return armed_ || stopped_; });
    if (stopped_) return;
    armed_ = false;
    lock.unlock();
    // acquire: pairs with the ringer's compare-exchange, whose publication the hub is about to look for.
    while (word_.load(std::memory_order_acquire) == static_cast<std::uint32_t>(presence::thread_parked)) {
      futex_sleep(word_, presence::thread_parked, std::nullopt);
    }
    doorbell::ring(doorbell_number_);
    lock.lock();
  }
}

}  // namespace strait
