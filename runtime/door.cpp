module;
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>  // renameat2
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>
module strait.door;

import strait.error;
import strait.memory;

namespace strait {
namespace {

using std::chrono::steady_clock;

// ---- what travels over the socket -----------------------------------------------------------------------------------

/// A message type, as its owner tells it.
struct told_type {
  char name[64];
  std::uint32_t version;
  std::uint32_t bytes;
  std::uint32_t alignment;
  std::uint32_t unused;
};

struct hello {
  std::uint64_t magic = expected_magic;
  std::uint32_t protocol = expected_protocol;
  std::uint32_t layout = segment_header::expected_layout;
  /// Whether the client granted membarrier to itself.
  std::uint32_t barrier = 0;
  std::uint32_t unused = 0;
  told_type to_listener{};
  told_type to_client{};

  static constexpr std::uint64_t expected_magic = 0x5354'5241'4954'0c00;  // "STRAIT\f\0"
  static constexpr std::uint32_t expected_protocol = 1;
};

/// With three descriptors when both numbers are zero: the memory of the lane to the listener, that of the lane to the
/// client, and the line of the latter.
struct welcome {
  std::uint64_t magic = expected_magic;
  /// Why not: a value of `errc`, or an errno.
  std::uint32_t refusal = 0;
  std::uint32_t system_error = 0;
  char reason[496] = {};

  static constexpr std::uint64_t expected_magic = 0x5354'5241'4954'0d00;
};

struct entered {
  std::uint64_t magic = expected_magic;
  static constexpr std::uint64_t expected_magic = 0x5354'5241'4954'0e00;
};

constexpr std::size_t descriptors_wanted = 3;
static_assert(descriptors_wanted <= most_descriptors);

told_type tell(const message_shape& shape) {
  told_type told{};
  shape.name.copy(told.name, sizeof told.name - 1);
  told.version = shape.version;
  told.bytes = shape.bytes;
  told.alignment = shape.alignment;
  return told;
}

/// Valid as long as what was told.
message_shape shape_of_told(const told_type& told) {
  return {{told.name, ::strnlen(told.name, sizeof told.name)}, told.version, told.bytes, told.alignment};
}

bool same_shape(const message_shape& one, const message_shape& other) {
  return one.name == other.name && one.version == other.version && one.bytes == other.bytes &&
         one.alignment == other.alignment;
}

/// What a stranger says goes to a terminal or a log, where its control characters have no business.
std::string harmless(std::string_view text) {
  std::string shown{text};
  std::ranges::replace_if(
      shown, [](char letter) { return static_cast<unsigned char>(letter) < 0x20 || letter == 0x7f; }, '?');
  return shown;
}

template <class Message>
bool send_message(int connection, const Message& message, std::span<const int> descriptors = {}) noexcept {
  return send_at_once(connection, std::as_bytes(std::span{&message, 1}), descriptors);
}

/// Receives one message of that size. There is no room for descriptors: those that come with it never become ours.
/// Returns what recv does; a message of another size counts as 0, the end, because nothing else can follow.
template <class Message>
::ssize_t receive_message(int connection, Message& message) noexcept {
  ::ssize_t got = 0;
  do {
    got = ::recv(connection, &message, sizeof message, MSG_DONTWAIT | MSG_TRUNC);
  } while (got < 0 && errno == EINTR);
  return got < 0 || got == static_cast<::ssize_t>(sizeof message) ? got : 0;
}

// ---- who is there ---------------------------------------------------------------------------------------------------

std::optional<peer_credentials> credentials_of(int connection) noexcept {
  ::ucred told{};
  ::socklen_t length = sizeof told;
  if (::getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &told, &length) != 0) return std::nullopt;
  return peer_credentials{static_cast<std::uint32_t>(told.pid), told.uid, told.gid};
}

/// The groups of the peer, besides its primary one; none where the kernel does not tell (before 4.13).
std::vector<::gid_t> more_groups_of(int connection) {
#ifdef SO_PEERGROUPS
  std::vector<::gid_t> groups(64);
  for (;;) {
    auto length = static_cast<::socklen_t>(groups.size() * sizeof(::gid_t));
    if (::getsockopt(connection, SOL_SOCKET, SO_PEERGROUPS, groups.data(), &length) == 0) {
      groups.resize(length / sizeof(::gid_t));
      return groups;
    }
    if (errno != ERANGE) return {};
    groups.resize(length / sizeof(::gid_t));
  }
#else
  (void)connection;
  return {};
#endif
}

bool allowed(int connection, const peer_credentials& peer, std::span<const unsigned> users,
             std::span<const unsigned> groups) {
  if (peer.user == ::geteuid() || std::ranges::find(users, peer.user) != users.end()) return true;
  if (groups.empty()) return false;
  const auto listed = [&](unsigned group) { return std::ranges::find(groups, group) != groups.end(); };
  return listed(peer.group) || std::ranges::any_of(more_groups_of(connection), listed);
}

std::string who(const peer_credentials& peer) {
  return "one of user " + std::to_string(peer.user) + " and group " + std::to_string(peer.group);
}

// ---- where the socket is --------------------------------------------------------------------------------------------

struct socket_address {
  ::sockaddr_un address{};
  ::socklen_t length = 0;

  /// A path, or a name in the abstract namespace behind an '@'. It fits: `parse_memory_name` and `listening_socket` saw
  /// to that.
  explicit socket_address(std::string_view name) {
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, name.data(), std::min(name.size(), sizeof address.sun_path - 1));
    length = static_cast<::socklen_t>(offsetof(::sockaddr_un, sun_path) + name.size());
    if (name.front() == '@') {
      address.sun_path[0] = '\0';  // that is what makes it abstract; its length counts, and no NUL ends it
    } else {
      ++length;
    }
  }
  [[nodiscard]] const ::sockaddr* get() const noexcept { return reinterpret_cast<const ::sockaddr*>(&address); }
};

unshared_descriptor open_socket(const std::string& what) {
  const fork_pause pause;
  unshared_descriptor opened{pause, ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
  if (!opened) fail_errno(errno, what + ": making a socket");
  return opened;
}

int try_to_connect(int from, const socket_address& to) noexcept {
  int result = 0;
  do {
    result = ::connect(from, to.get(), to.length);
  } while (result != 0 && errno == EINTR);
  return result == 0 ? 0 : errno;
}

unshared_descriptor open_bell(const std::string& what) {
  const fork_pause pause;
  unshared_descriptor opened{pause, ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  if (!opened) fail_errno(errno, what + ": an eventfd to wake its thread");
  return opened;
}

void poke(int bell) noexcept {
  const std::uint64_t one = 1;
  // EAGAIN: it is full, and readable as it should be.
  [[maybe_unused]] const auto put = ::write(bell, &one, sizeof one);
}

/// One listener at a time comes or goes in a directory. The kernel's lock on the directory itself: no file is needed that
/// somebody would have to remove.
class directory_lock {
 public:
  explicit directory_lock(const std::string& directory) {
    const fork_pause pause;
    directory_ = unshared_descriptor{pause, ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
    if (!directory_) error_ = errno;
  }
  directory_lock(const directory_lock&) = delete;
  directory_lock& operator=(const directory_lock&) = delete;
  ~directory_lock() {
    // A fork between the opening and now left a copy for as long as it took the child to close it.
    if (directory_) ::flock(directory_.get(), LOCK_UN);
  }

  [[nodiscard]] int error() const noexcept { return error_; }
  /// Coming and going take microseconds; who holds the lock for longer is stopped, or none of us.
  [[nodiscard]] bool lock_within(std::chrono::milliseconds patience) noexcept {
    const auto deadline = steady_clock::now() + patience;
    while (::flock(directory_.get(), LOCK_EX | LOCK_NB) != 0) {
      if (steady_clock::now() >= deadline) return false;
      const timespec moment{.tv_sec = 0, .tv_nsec = 1'000'000};
      ::nanosleep(&moment, nullptr);
    }
    return true;
  }

 private:
  unshared_descriptor directory_;
  int error_ = 0;
};

constexpr auto at_the_directory = std::chrono::seconds{1};

/// A listening socket and its name, which the destructor takes away.
///
/// It is bound under a makeshift name, given its mode, told to listen, and only then renamed into place: nobody ever
/// meets one that is half made. The makeshift name is always the same for the same path, so that the next listener
/// clears what one left that died in between.
class listening_socket {
 public:
  listening_socket(const memory_name& name, const listener_options& options)
      : what_{name.text()}, path_{name.name.front() == '@' ? std::string{} : name.name} {
    socket_ = open_socket(what_);
    if (path_.empty()) {
      const socket_address here{name.name};
      if (::bind(socket_.get(), here.get(), here.length) != 0) {
        if (errno == EADDRINUSE) {
          fail(errc::end_in_use, what_ + ": expected no living listener under this name, found one");
        }
        fail_errno(errno, what_ + ": binding its socket");
      }
      listen(options);
      return;
    }
    const std::string directory = path_.substr(0, path_.rfind('/') + 1);
    const std::string makeshift = directory + makeshift_name();
    if (makeshift.size() >= sizeof ::sockaddr_un{}.sun_path) {
      fail(errc::bad_name, what_ + ": expected a directory whose path has up to " +
                               std::to_string(sizeof ::sockaddr_un{}.sun_path - 1 - makeshift_name().size()) +
                               " bytes, found " + std::to_string(directory.size()));
    }
    directory_lock alone{directory};
    if (alone.error() != 0) fail_errno(alone.error(), what_ + ": opening " + directory);
    if (!alone.lock_within(at_the_directory)) {
      fail(errc::end_in_use, what_ + ": expected to find " + directory +
                                 " unlocked within a second, found that somebody holds a lock on it (flock)");
    }
    bool replaces = somebody_was_here();
    bind_under(makeshift);
    try {
      furnish(makeshift, options);
      listen(options);
      while (!take_name(makeshift, replaces)) replaces = somebody_was_here();
    } catch (...) {
      ::unlink(makeshift.c_str());
      throw;
    }
  }
  listening_socket(const listening_socket&) = delete;
  listening_socket& operator=(const listening_socket&) = delete;
  ~listening_socket() {
    if (path_.empty()) return;
    directory_lock alone{path_.substr(0, path_.rfind('/') + 1)};
    // Where the lock is not to be had the name stays; the next listener finds nobody behind it.
    if (alone.error() != 0 || !alone.lock_within(at_the_directory)) return;
    struct ::stat there{};
    if (::lstat(path_.c_str(), &there) == 0 && there.st_ino == file_.st_ino && there.st_dev == file_.st_dev) {
      ::unlink(path_.c_str());
    }
  }

  [[nodiscard]] int get() const noexcept { return socket_.get(); }

 private:
  [[nodiscard]] std::string makeshift_name() const { return ".s" + digest_of_last_part(path_); }

  void listen(const listener_options& options) {
    const auto backlog = static_cast<int>(std::min<std::size_t>(options.backlog, SOMAXCONN));
    if (::listen(socket_.get(), backlog) != 0) fail_errno(errno, what_ + ": listening at its socket");
  }

  void bind_under(const std::string& makeshift) {
    struct ::stat left{};
    if (::lstat(makeshift.c_str(), &left) == 0 && S_ISSOCK(left.st_mode)) ::unlink(makeshift.c_str());
    const socket_address here{makeshift};
    if (::bind(socket_.get(), here.get(), here.length) == 0) return;
    if (errno == EACCES || errno == EPERM || errno == EROFS) {
      fail(errc::no_permission, what_ + ": expected a directory in which user " + std::to_string(::geteuid()) +
                                    " may make a socket, found " + path_.substr(0, path_.rfind('/') + 1));
    }
    fail_errno(errno, what_ + ": binding its socket");
  }

  void furnish(const std::string& makeshift, const listener_options& options) {
    if (options.group && ::lchown(makeshift.c_str(), static_cast<::uid_t>(-1), *options.group) != 0) {
      fail_errno(errno, what_ + ": giving its socket to group " + std::to_string(*options.group));
    }
    if (::chmod(makeshift.c_str(), static_cast<::mode_t>(options.mode & 07777U)) != 0) {
      fail_errno(errno, what_ + ": setting the mode of its socket");
    }
    if (::lstat(makeshift.c_str(), &file_) != 0) fail_errno(errno, what_ + ": looking at its socket");
  }

  /// Renames it into place. False: something came to be there meanwhile. The directory must be locked.
  bool take_name(const std::string& makeshift, bool replaces) {
    // A stale socket is replaced at once, so that a client finds the old one or the new one. Where nothing was, nothing
    // that came meanwhile is replaced. EINVAL: a file system that cannot promise this.
    int result = replaces ? ::rename(makeshift.c_str(), path_.c_str())
                          : ::renameat2(AT_FDCWD, makeshift.c_str(), AT_FDCWD, path_.c_str(), RENAME_NOREPLACE);
    if (result != 0 && errno == EINVAL && !replaces) result = ::rename(makeshift.c_str(), path_.c_str());
    if (result == 0) return true;
    if (errno == EEXIST && !replaces) return false;
    if (errno == EACCES || errno == EPERM) {
      fail(errc::no_permission,
           what_ + ": expected to replace what a dead listener left at " + path_ + ", found a socket of another user");
    }
    fail_errno(errno, what_ + ": giving its socket the name " + path_);
  }

  /// Whether there is a socket in which nobody listens any more. Throws when there is anything else.
  [[nodiscard]] bool somebody_was_here() const {
    struct ::stat there{};
    if (::lstat(path_.c_str(), &there) != 0) {
      if (errno == ENOENT) return false;
      fail_errno(errno, what_ + ": looking at " + path_);
    }
    if (!S_ISSOCK(there.st_mode)) {
      fail(errc::foreign_segment,
           what_ + ": expected a socket or nothing at " + path_ + ", found something else, which stays as it is");
    }
    const unshared_descriptor probe = open_socket(what_);
    switch (const int error = try_to_connect(probe.get(), socket_address{path_})) {
      case ECONNREFUSED:
        return true;
      case ENOENT:
        return false;
      case 0:
      case EAGAIN: {  // so many wait for it that there is no room
        const auto owner = error == 0 ? credentials_of(probe.get()) : std::nullopt;
        fail(errc::end_in_use, what_ + ": expected no living listener, found one" +
                                   (owner ? " in process " + std::to_string(owner->process) : std::string{}));
      }
      case EPROTOTYPE:
        fail(errc::foreign_segment, what_ + ": expected a socket of strait's or nothing at " + path_ +
                                        ", found one of another kind, which stays as it is");
      case EACCES:
      case EPERM:
        fail(errc::no_permission, what_ + ": expected a socket that user " + std::to_string(::geteuid()) +
                                      " may connect to at " + path_ + ", found one of user " +
                                      std::to_string(there.st_uid));
      default:
        fail_errno(error, what_ + ": looking whether somebody listens at " + path_);
    }
  }

  std::string what_;
  std::string path_;
  unshared_descriptor socket_;
  struct ::stat file_{};
};

/// Destroys what has a thread of its own. In a child made by fork that thread does not exist and may have been changing
/// anything, the descriptors were closed and their numbers are somebody else's, and the name is the parent's: there
/// it stays as it is.
template <class State>
void destroy_unless_forked(std::unique_ptr<State>& state) noexcept {
  if (state && state->generation != fork_generation()) (void)state.release();
  state.reset();
}

}  // namespace

std::error_code code_of(const std::exception_ptr& failure) noexcept {
  if (!failure) return {};
  try {
    std::rethrow_exception(failure);
  } catch (const std::system_error& error) {
    return error.code();
  } catch (const std::bad_alloc&) {
    return std::make_error_code(std::errc::not_enough_memory);
  }
}

std::exception_ptr listener_closed() {
  return std::make_exception_ptr(std::system_error{make_error_code(errc::closed), "a listener"});
}

// ---- the listener ---------------------------------------------------------------------------------------------------

struct doorkeeper::state {
  state(const memory_name& named, const duplex_shape& of, const listener_options& how)
      : name{named},
        shape{of},
        options{how},
        bell{open_bell(named.text())},
        socket{named, how},
        // All on their way in may arrive while as many wait, and an eighth may be taken and not released yet.
        channel{make_channel<arrival>({.capacity = 4 * how.backlog})} {
    newcomers.reserve(options.backlog);
    thread = std::thread{[this] { run(); }};
  }
  state(const state&) = delete;
  state& operator=(const state&) = delete;
  ~state() {
    // release: pairs with the acquire in run; the thread is joined in any case.
    stopped.store(true, std::memory_order_release);
    poke(bell.get());
    thread.join();
  }

  /// One that is on its way in.
  struct newcomer {
    unshared_descriptor connection;
    peer_credentials peer;
    steady_clock::time_point came;
    // From the welcome on.
    std::unique_ptr<endpoint> receiving;
    std::unique_ptr<endpoint> sending;
    unshared_descriptor line;
  };

  void run() {
    ::pthread_setname_np(::pthread_self(), "strait-door");
    auto accept_again = steady_clock::time_point::min();
    std::vector<::pollfd> waits;
    for (;;) {
      auto now = steady_clock::now();
      // The backlog is full: who calls now waits in the kernel's, until somebody accepts and pokes.
      const bool room = channel.first.depth() < options.backlog;
      const auto accepts_from = std::max(accept_again, room_for_newcomers());
      waits.clear();
      waits.push_back({bell.get(), POLLIN, 0});
      waits.push_back({room && now >= accepts_from ? socket.get() : -1, POLLIN, 0});
      auto next = room && now < accepts_from ? accepts_from : steady_clock::time_point::max();
      for (const newcomer& one : newcomers) {
        waits.push_back({one.connection.get(), POLLIN, 0});
        next = std::min(next, one.came + options.handshake);
      }
      int timeout = -1;
      if (next != steady_clock::time_point::max()) {
        const auto left = std::chrono::ceil<std::chrono::milliseconds>(next - now).count();
        timeout = static_cast<int>(std::clamp<std::int64_t>(left, 0, INT_MAX));
      }
      const int ready = ::poll(waits.data(), waits.size(), timeout);
      // acquire: pairs with the release in the destructor.
      if (stopped.load(std::memory_order_acquire)) return;
      if (ready > 0 && waits[0].revents != 0) {
        std::uint64_t pokes = 0;
        [[maybe_unused]] const auto got = ::read(bell.get(), &pokes, sizeof pokes);
      }
      now = steady_clock::now();
      std::size_t i = 2;
      std::erase_if(newcomers, [&](newcomer& one) {
        const bool spoke = ready > 0 && waits[i].revents != 0;
        ++i;
        if (spoke) return !attend(one);
        if (now < one.came + options.handshake) return false;
        refused.fetch_add(1, std::memory_order_relaxed);
        return true;
      });
      if (ready > 0 && waits[1].revents != 0 && !accept_newcomers(now)) {
        // Nothing tells when a descriptor becomes free, and poll would say at once that somebody calls.
        accept_again = now + std::chrono::milliseconds{50};
      }
    }
  }

  /// From when on another may come. The oldest makes room for it, but not before it had a moment to speak: many honest
  /// ones that come at once must not drive each other out.
  [[nodiscard]] steady_clock::time_point room_for_newcomers() const {
    if (newcomers.size() < options.backlog) return steady_clock::time_point::min();
    return newcomers.front().came + std::min<steady_clock::duration>(moment_to_speak, options.handshake);
  }
  static constexpr std::chrono::milliseconds moment_to_speak{100};

  /// False: there is no descriptor, or no memory, for more. Of those that call it takes no more than may be on their way
  /// in: many who are refused keep nobody from being answered, nor the listener from closing.
  bool accept_newcomers(steady_clock::time_point now) {
    for (std::size_t calls = 0; calls < options.backlog && now >= room_for_newcomers(); ++calls) {
      unshared_descriptor connection;
      {
        const fork_pause pause;
        connection =
            unshared_descriptor{pause, ::accept4(socket.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK)};
      }
      if (!connection) {
        if (errno == EINTR || errno == ECONNABORTED) continue;
        return errno == EAGAIN || errno == EWOULDBLOCK;
      }
      const auto peer = credentials_of(connection.get());
      if (!peer) continue;
      if (!allowed(connection.get(), *peer, options.users, options.groups)) {
        refuse(connection.get(), make_error_code(errc::no_permission),
               name.text() + ": expected a client of user " + std::to_string(::geteuid()) +
                   " or of those that the listener allows, found " + who(*peer));
        continue;
      }
      if (newcomers.size() >= options.backlog) {
        refused.fetch_add(1, std::memory_order_relaxed);
        newcomers.erase(newcomers.begin());
      }
      newcomers.push_back({std::move(connection), *peer, now, {}, {}, {}});
    }
    return true;
  }

  /// What a newcomer says. False: it is done with.
  bool attend(newcomer& one) {
    std::error_code error;
    std::string reason;
    try {
      return one.receiving ? let_in(one) : answer(one);
    } catch (const std::system_error& failure) {
      error = failure.code();
      reason = failure.what();
    } catch (const std::bad_alloc&) {
      error = std::make_error_code(std::errc::not_enough_memory);
      reason = name.text() + ": the listener is out of memory";
    }
    refuse(one.connection.get(), error, reason);
    return false;
  }

  bool answer(newcomer& one) {
    hello greeting;
    const ::ssize_t got = receive_message(one.connection.get(), greeting);
    if (got < 0) return errno == EAGAIN || errno == EWOULDBLOCK;
    if (got == 0 || greeting.magic != hello::expected_magic) {
      refused.fetch_add(1, std::memory_order_relaxed);
      return false;  // it is none of ours, or has hung up: there is nobody to explain it to
    }
    if (greeting.protocol != hello::expected_protocol || greeting.layout != segment_header::expected_layout) {
      fail(errc::version_mismatch,
           name.text() + ": expected a client of protocol " + std::to_string(hello::expected_protocol) +
               " and layout version " + std::to_string(segment_header::expected_layout) + ", found protocol " +
               std::to_string(greeting.protocol) + " and layout version " + std::to_string(greeting.layout));
    }
    expect(shape.in, greeting.to_listener, "to receive");
    expect(shape.out, greeting.to_client, "to send");
    auto receiving = endpoint::make_handed_over(role::receiver, name, shape.in, options.lanes, greeting.barrier != 0);
    auto sending = endpoint::make_handed_over(role::sender, name, shape.out, options.lanes, greeting.barrier != 0);
    unshared_descriptor theirs;
    {
      const fork_pause pause;
      std::array<int, 2> ends{-1, -1};
      if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends.data()) != 0) {
        fail_errno(errno, name.text() + ": a line for the lane to the client");
      }
      theirs = unshared_descriptor{pause, ends[1]};
      one.line = unshared_descriptor{pause, ends[0]};
    }
    const std::array<int, descriptors_wanted> handed{receiving.memory.get(), sending.memory.get(), theirs.get()};
    one.receiving = std::move(receiving.end);
    one.sending = std::move(sending.end);
    return send_message(one.connection.get(), welcome{}, handed);
  }

  void expect(const message_shape& ours, const told_type& told, const char* purpose) const {
    const message_shape theirs = shape_of_told(told);
    if (same_shape(ours, theirs)) return;
    fail(errc::type_mismatch, name.text() + ": the listener expected " + purpose + " " + describe(ours) +
                                  ", found a client of " + harmless(describe(theirs)));
  }

  bool let_in(newcomer& one) {
    entered word;
    const ::ssize_t got = receive_message(one.connection.get(), word);
    if (got < 0) return errno == EAGAIN || errno == EWOULDBLOCK;
    if (got == 0 || word.magic != entered::expected_magic) {
      refused.fetch_add(1, std::memory_order_relaxed);
      return false;
    }
    one.receiving->take_line(std::move(one.connection));
    one.sending->take_line(std::move(one.line));
    // There is room: see the channel's capacity.
    (void)channel.first.try_send(arrival{std::move(one.receiving), std::move(one.sending), one.peer, {}});
    return false;
  }

  void refuse(int connection, std::error_code why, const std::string& reason) noexcept {
    refused.fetch_add(1, std::memory_order_relaxed);
    if (connection < 0) return;  // it has become a line, and goes with its end
    welcome answer;
    if (why.category() == error_category()) {
      answer.refusal = static_cast<std::uint32_t>(why.value());
    } else {
      answer.system_error = static_cast<std::uint32_t>(why.value());
    }
    std::string_view{reason}.copy(answer.reason, sizeof answer.reason - 1);
    // A peer that does not take the answer goes without.
    (void)send_message(connection, answer);
    // Closed with something unread, the connection would be reset, and our answer lost.
    ::shutdown(connection, SHUT_RD);
    std::array<char, 8> unread{};
    for (int i = 0; i < 16 && ::recv(connection, unread.data(), unread.size(), MSG_DONTWAIT | MSG_TRUNC) > 0; ++i) {
    }
  }

  memory_name name;
  duplex_shape shape;
  listener_options options;
  unshared_descriptor bell;
  listening_socket socket;
  std::pair<sender<arrival>, receiver<arrival>> channel;
  /// The oldest first. The thread's.
  std::vector<newcomer> newcomers;
  std::atomic<bool> stopped{false};
  std::atomic<std::uint64_t> refused{0};
  std::uint32_t generation = fork_generation();
  std::thread thread;
};

doorkeeper::doorkeeper(std::string_view name, const duplex_shape& shape, const listener_options& options) {
  const memory_name parsed = parse_memory_name(name);
  if (parsed.scheme != memory_scheme::handed_over) {
    fail(errc::unknown_scheme, parsed.text() + ": expected the scheme \"unix:\" for a listener");
  }
  if (options.backlog == 0 || options.backlog > 4096) {
    fail(errc::bad_capacity,
         parsed.text() + ": expected a backlog of 1 to 4096, found " + std::to_string(options.backlog));
  }
  if (options.handshake <= std::chrono::milliseconds{0}) {
    fail_errno(EINVAL, parsed.text() + ": expected some time for the handshake, found none");
  }
  state_ = std::make_unique<state>(parsed, shape, options);
}

doorkeeper::~doorkeeper() {
  close();
}

receiver<arrival>& doorkeeper::arrivals() noexcept {
  return state_ ? state_->channel.second : closed_;
}

void doorkeeper::taken() noexcept {
  // In a child made by fork there is nobody to make room for.
  if (state_ && state_->generation == fork_generation()) poke(state_->bell.get());
}

void doorkeeper::close() noexcept {
  destroy_unless_forked(state_);
}

std::uint64_t doorkeeper::refused() const noexcept {
  // relaxed: a figure, from which nothing else follows.
  return state_ ? state_->refused.load(std::memory_order_relaxed) : 0;
}

// ---- the client -----------------------------------------------------------------------------------------------------

namespace {

/// One attempt to connect: as far as the deadline, or until `stop` is readable; -1: nobody stops it.
class conversation {
 public:
  conversation(std::string_view name, const duplex_shape& shape, const connect_options& options, int stop,
               std::optional<steady_clock::time_point> deadline)
      : name_{parse_memory_name(name)},
        what_{name_.text()},
        shape_{shape},
        options_{options},
        stop_{stop},
        deadline_{deadline} {
    if (name_.scheme != memory_scheme::handed_over) {
      fail(errc::unknown_scheme, what_ + ": expected the scheme \"unix:\" to connect to");
    }
  }

  arrival hold() {
    connect();
    const auto peer = credentials_of(connection_.get());
    if (!peer) fail_errno(errno, what_ + ": asking who listens");
    if (!allowed(connection_.get(), *peer, options_.users, options_.groups)) {
      fail(errc::no_permission, what_ + ": expected a listener of user " + std::to_string(::geteuid()) +
                                    " or of those that this client allows, found " + who(*peer));
    }
    hello greeting;
    greeting.barrier =
        options_.lanes.order == ordering::automatic && register_barrier(store_load::by_machine_barrier) ? 1 : 0;
    greeting.to_listener = tell(shape_.out);
    greeting.to_client = tell(shape_.in);
    // Whoever refuses us may have hung up already; why, it has said before.
    (void)send_message(connection_.get(), greeting);
    await_answer();
    read_answer();
    arrival made;
    made.peer = *peer;
    made.sending = endpoint::enter_handed_over(role::sender, name_, handed_[0].get(), shape_.out, options_.lanes);
    made.receiving = endpoint::enter_handed_over(role::receiver, name_, handed_[1].get(), shape_.in, options_.lanes);
    check_line(handed_[2].get());
    if (!send_message(connection_.get(), entered{})) {
      // Whether the end of a connection is met by a send or by a receive is a matter of the moment.
      fail_errno(errno == EPIPE ? ECONNRESET : errno, what_ + ": telling the listener that this end is in");
    }
    made.sending->take_line(std::move(connection_));
    made.receiving->take_line(std::move(handed_[2]));
    return made;
  }

 private:
  void connect() {
    const socket_address there{name_.name};
    connection_ = open_socket(what_);
    for (;;) {
      switch (const int error = try_to_connect(connection_.get(), there)) {
        case 0:
          return;
        case EAGAIN:
          // The listener's backlog is full, and nothing tells when it no longer is.
          sleep_or_stop(std::chrono::milliseconds{5});
          break;
        case EACCES:
        case EPERM:
          fail(errc::no_permission, what_ + ": expected a socket that user " + std::to_string(::geteuid()) +
                                        " may write to, found one that it may not");
        case EPROTOTYPE:
          fail(errc::foreign_segment, what_ + ": expected a listener of strait's, found a socket of another kind");
        default:
          fail_errno(error, what_ + ": expected somebody who listens there, found nobody");
      }
    }
  }

  /// Throws when the attempt is over.
  void sleep_or_stop(std::optional<std::chrono::milliseconds> longest, short events = 0) {
    std::array<::pollfd, 2> waits{{{stop_, POLLIN, 0}, {events != 0 ? connection_.get() : -1, events, 0}}};
    int timeout = longest ? static_cast<int>(longest->count()) : -1;
    if (deadline_) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(*deadline_ - steady_clock::now()).count();
      if (left <= 0) throw std::system_error{std::make_error_code(std::errc::timed_out), what_};
      const int until = static_cast<int>(std::min<std::int64_t>(left, INT_MAX));
      timeout = timeout < 0 ? until : std::min(timeout, until);
    }
    ::poll(waits.data(), waits.size(), timeout);
    if (waits[0].revents != 0) throw std::system_error{std::make_error_code(std::errc::operation_canceled), what_};
    answered_ = waits[1].revents != 0;
  }

  void await_answer() {
    while (!answered_) sleep_or_stop(std::nullopt, POLLIN);
  }

  void read_answer() {
    welcome answer;
    ::iovec part{&answer, sizeof answer};
    // Room for one more than is wanted, to see that there are too many.
    alignas(::cmsghdr) std::array<char, CMSG_SPACE((descriptors_wanted + 1) * sizeof(int))> control{};
    ::msghdr header{};
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    header.msg_control = control.data();
    header.msg_controllen = control.size();
    ::ssize_t got = 0;
    {
      const fork_pause pause;
      do {
        got = ::recvmsg(connection_.get(), &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
      } while (got < 0 && errno == EINTR);
      if (got >= 0) adopt(pause, header);
    }
    if (got < 0) fail_errno(errno, what_ + ": expected the listener's answer, found that it hung up");
    if (got == 0) {
      fail_errno(ECONNRESET, what_ + ": expected the listener's answer, found that it hung up");
    }
    if (got != static_cast<::ssize_t>(sizeof answer) || answer.magic != welcome::expected_magic) {
      fail(errc::foreign_segment, what_ + ": expected a listener of strait's, found one that answers something else");
    }
    const std::string reason = harmless({answer.reason, ::strnlen(answer.reason, sizeof answer.reason)});
    if (answer.refusal != 0) {
      if (answer.refusal > static_cast<std::uint32_t>(errc::inherited)) {
        fail(errc::version_mismatch, what_ + ": the listener refused for a reason that is not known here: " + reason);
      }
      fail(static_cast<errc>(answer.refusal), reason);
    }
    if (answer.system_error != 0)
      fail_errno(static_cast<int>(answer.system_error), what_ + ": the listener: " + reason);
    if (count_ == descriptors_wanted && (header.msg_flags & MSG_CTRUNC) == 0) return;
    // The kernel cuts them short, too, when this process has no numbers left for them.
    if (count_ < descriptors_wanted && (header.msg_flags & MSG_CTRUNC) != 0) {
      fail_errno(EMFILE, what_ + ": taking the descriptors that were handed over");
    }
    fail(errc::foreign_segment, what_ + ": expected " + std::to_string(descriptors_wanted) +
                                    " descriptors to be handed over, found " +
                                    ((header.msg_flags & MSG_CTRUNC) != 0 ? "more" : std::to_string(count_)));
  }

  /// Whatever came is ours now, and must be closed.
  void adopt(const fork_pause& pause, ::msghdr& header) {
    for (::cmsghdr* part = CMSG_FIRSTHDR(&header); part != nullptr; part = CMSG_NXTHDR(&header, part)) {
      if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
      const std::size_t many = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      for (std::size_t i = 0; i < many && count_ < handed_.size(); ++i) {
        int one = -1;
        std::memcpy(&one, CMSG_DATA(part) + i * sizeof(int), sizeof one);
        // There was no room for more than `handed_` holds; and none of these may be closed during the pause.
        handed_[count_++] = unshared_descriptor{pause, one};
      }
    }
  }

  /// Only what can never make a send or a receive of ours wait.
  void check_line(int line) const {
    ::sockaddr_un peer{};
    ::socklen_t length = sizeof peer;
    // One that is not connected could be made to listen, and then be readable for ever with nothing to be read.
    const bool connected = ::getpeername(line, reinterpret_cast<::sockaddr*>(&peer), &length) == 0;
    int type = -1;
    const bool known = connected && ::getsockopt(line, SOL_SOCKET, SO_TYPE, &type, &(length = sizeof type)) == 0;
    if (!known || peer.sun_family != AF_UNIX || type != SOCK_SEQPACKET) {
      fail(errc::foreign_segment, what_ + ": expected a connected Unix socket as the third descriptor, found another");
    }
  }

  memory_name name_;
  std::string what_;
  duplex_shape shape_;
  const connect_options& options_;
  int stop_;
  std::optional<steady_clock::time_point> deadline_;
  unshared_descriptor connection_;
  bool answered_ = false;
  std::array<unshared_descriptor, descriptors_wanted + 1> handed_;
  std::size_t count_ = 0;
};

arrival converse(std::string_view name, const duplex_shape& shape, const connect_options& options, int stop,
                 std::optional<steady_clock::time_point> deadline) noexcept {
  arrival made;
  try {
    made = conversation{name, shape, options, stop, deadline}.hold();
  } catch (...) {
    made = {};
    made.failure = std::current_exception();  // for whoever connects
  }
  return made;
}

}  // namespace

struct caller::state {
  state(std::string_view name, const duplex_shape& of, const connect_options& how)
      : to{name}, shape{of}, options{how}, channel{make_channel<arrival>({.capacity = 1})} {
    try {
      bell = open_bell(to);
      thread = std::thread{[this] {
        ::pthread_setname_np(::pthread_self(), "strait-connect");
        (void)channel.first.try_send(converse(to, shape, options, bell.get(), std::nullopt));
      }};
    } catch (const std::system_error&) {
      arrival none;
      none.failure = std::current_exception();
      (void)channel.first.try_send(std::move(none));
    }
  }
  state(const state&) = delete;
  state& operator=(const state&) = delete;
  ~state() {
    if (!thread.joinable()) return;  // the attempt has failed before it began
    poke(bell.get());
    thread.join();
  }

  std::string to;
  duplex_shape shape;
  connect_options options;
  unshared_descriptor bell;
  std::pair<sender<arrival>, receiver<arrival>> channel;
  std::uint32_t generation = fork_generation();
  std::thread thread;
};

caller::caller(std::string_view name, const duplex_shape& shape, const connect_options& options)
    : state_{std::make_unique<state>(name, shape, options)} {}

caller::~caller() {
  destroy_unless_forked(state_);
}

receiver<arrival>& caller::arrivals() noexcept {
  return state_->channel.second;
}

arrival caller::call(std::string_view name, const duplex_shape& shape, const connect_options& options,
                     std::optional<steady_clock::time_point> deadline) {
  return converse(name, shape, options, -1, deadline);
}

}  // namespace strait
