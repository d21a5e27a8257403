// kill -9 at every system call of an end's life, before the call and after it took effect, at random instructions between
// them, and at random moments: whoever comes next comes in and exchanges messages, and then nothing of ours is left.
//
// The test process steers and opens no channel. Everybody else is a child of it by fork: the victim, which is traced
// (ptrace) and killed where the test wants it; the peer that survives it; and the next comers. All of them live in
// namespaces of their own, with a /dev/shm, sockets and System V segments that nobody else uses: what is left in there is
// ours.
//
//     test-kills             10,000 over all memories: at every system call, before and after it, and the rest at random;
//                            prints what was hit, and at the end how many in which memory
//     test-kills --share     some hundred at random, in seconds
//     test-kills --seed=N    the same choices again
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

import strait;

namespace kills {

struct message {
  std::uint64_t key;
  std::uint64_t mix;
};

}  // namespace kills

template <>
struct strait::message_traits<kills::message> {
  static constexpr std::string_view name = "strait.kills";
  static constexpr std::uint32_t version = 1;
};

namespace kills {

using namespace std::chrono_literals;
using strait::role;

// ---- messages: whose it is, which one, and enough to see a torn one --------------------------------------------------

/// What the dead sent, and what comes after them.
constexpr std::uint64_t of_the_dead = 1;
constexpr std::uint64_t of_the_living = 2;
/// How many the living exchange: several times around the ring.
constexpr std::uint64_t exchanged = 40;
constexpr std::size_t small_ring = 8;
constexpr std::uint64_t no_bound = ~std::uint64_t{0};

constexpr message make(std::uint64_t stream, std::uint64_t sequence) {
  const std::uint64_t key = stream << 32U | sequence;
  return {key, (key ^ key >> 7U) * 0x9e37'79b9'7f4a'7c15};
}

// ---- what a kill is about ---------------------------------------------------------------------------------------------

enum class memory { posix, system_v, file, makeshift_file, handed_over };
constexpr std::array memories{memory::posix, memory::system_v, memory::file, memory::makeshift_file,
                              memory::handed_over};
constexpr std::string_view text_of(memory where) {
  switch (where) {
    case memory::posix:
      return "posix";
    case memory::system_v:
      return "sysv";
    case memory::file:
      return "file";
    case memory::makeshift_file:
      return "file, made under a makeshift name";
    case memory::handed_over:
      return "unix";
  }
  return "";
}
const std::string directory = "/dev/shm/files";
std::string name_in(memory where) {
  switch (where) {
    case memory::posix:
      return "posix:kills";
    case memory::system_v:
      return "sysv:kills";
    default:
      return "file:" + directory + "/ring";
  }
}
/// Whether the last end leaves the name to `strait rm`.
bool outlives_its_ends(memory where) {
  return strait::parse_memory_name(name_in(where)).outlives_its_ends();
}

/// What the victim is doing when it is killed.
enum class phase {
  create,
  attach,
  take_over,
  replace,
  close_beside_peer,
  close_alone,
  close_after_close,
  close_with_deposit,
  close_after_death,
  remove,
};
struct phase_kind {
  phase what;
  std::string_view text;
  bool as_sender;
  bool as_receiver;
  /// Whether somebody lives in the channel meanwhile, and survives.
  bool with_peer;
};
constexpr std::array phases{
    phase_kind{phase::create, "create", true, true, false},
    phase_kind{phase::attach, "attach to a living peer", true, true, true},
    phase_kind{phase::take_over, "attach to what a crash left", true, true, false},
    phase_kind{phase::replace, "replace what a crash left", true, true, false},
    phase_kind{phase::close_beside_peer, "close beside a living peer", true, true, true},
    phase_kind{phase::close_alone, "close, alone", true, true, false},
    phase_kind{phase::close_after_close, "close as the last, after the peer closed", true, true, false},
    phase_kind{phase::close_with_deposit, "close with messages for a receiver to come", true, false, false},
    phase_kind{phase::close_after_death, "close after the peer's death", true, true, false},
    phase_kind{phase::remove, "strait rm", true, false, false},
};

struct scenario {
  memory where = memory::posix;
  phase_kind kind = phases[0];
  role victim = role::sender;

  [[nodiscard]] std::string text() const {
    std::string all = std::string{kind.text} + ", " + std::string{text_of(where)};
    if (kind.what != phase::remove) all += ", " + std::string{to_string(victim)};
    return all;
  }
};

// ---- what everybody writes down ---------------------------------------------------------------------------------------

struct account {
  /// It has opened its end.
  std::atomic<std::uint32_t> in{0};
  std::atomic<std::uint32_t> deaths{0};
  /// Ends of the stream before the last one; `closed`, for a sender.
  std::atomic<std::uint32_t> closes{0};
  std::atomic<std::uint32_t> failed{0};
  std::array<char, 400> failure{};

  void fail(const std::string& what) {
    if (failed.exchange(1) == 0) std::snprintf(failure.data(), failure.size(), "%s", what.c_str());
  }
};

/// In memory that all of them share.
struct board {
  account sender;
  account receiver;
  account victim;
  account others;
  /// What the dead sent; whoever receives sees all of it, from here on at the latest, unless the channel may be gone.
  std::atomic<std::uint64_t> old_messages{0};
  std::atomic<std::uint64_t> old_begin_at_most{0};
  std::atomic<std::uint32_t> old_may_be_gone{0};
  /// Nothing is known of the old messages but that they are whole.
  std::atomic<std::uint32_t> old_are_any{0};
  /// The same of the living's messages, where a receiver was replaced.
  std::atomic<std::uint64_t> new_begin_at_most{0};
  /// The peer may go on; the victim has entered; a looping victim has made its first round.
  std::atomic<std::uint32_t> go{0};
  std::atomic<std::uint32_t> victim_in{0};
  std::atomic<std::uint32_t> loops{0};
};
board* everybody = nullptr;

/// No wait of this test is longer.
constexpr auto patience = 20s;

template <class Condition>
void wait_until(Condition&& condition, const char* what) {
  const auto end = std::chrono::steady_clock::now() + patience;
  for (int looks = 0; !condition(); ++looks) {
    if (std::chrono::steady_clock::now() > end) throw std::runtime_error{std::string{"waited in vain: "} + what};
    // Between two looks, so that the other side can run.
    looks < 100 ? std::this_thread::yield() : std::this_thread::sleep_for(50us);
  }
}

// ---- children ---------------------------------------------------------------------------------------------------------

/// No file system knows nameless files any more.
void forget_nameless_files() {
  constexpr std::uint32_t nameless = O_TMPFILE & ~O_DIRECTORY;
  std::array filter{
      ::sock_filter BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(::seccomp_data, nr)),
      ::sock_filter BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_openat, 0, 3),
      ::sock_filter BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(::seccomp_data, args[2])),
      ::sock_filter BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, nameless, 0, 1),
      ::sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EOPNOTSUPP),
      ::sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const ::sock_fprog program{filter.size(), filter.data()};
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
    throw std::system_error{errno, std::system_category(), "seccomp"};
  }
}

template <class Deed>
::pid_t spawn(memory where, account& book, Deed&& deed) {
  const ::pid_t child = ::fork();
  if (child < 0) throw std::system_error{errno, std::system_category(), "fork"};
  if (child > 0) return child;
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  ::alarm(0);
  ::signal(SIGALRM, SIG_DFL);
  try {
    if (where == memory::makeshift_file) forget_nameless_files();
    deed();
  } catch (const std::exception& error) {
    book.fail(error.what());
  }
  ::_exit(0);
}

/// How the process ended; it is killed, and the wait fails, when it does not.
int reap(::pid_t child) {
  int status = 0;
  ::alarm(30);
  ::pid_t got = 0;
  do {
    got = ::waitpid(child, &status, __WALL);
  } while (got == child && WIFSTOPPED(status));
  ::alarm(0);
  if (got == child) return status;
  ::kill(child, SIGKILL);
  ::waitpid(child, &status, __WALL);
  throw std::runtime_error{"process " + std::to_string(child) + " did not end"};
}

/// Sends what the living send, however often its peer dies or closes, and closes.
void play_sender(memory where, std::optional<std::size_t> capacity) {
  account& mine = everybody->sender;
  auto tx = strait::open_sender<message>(name_in(where), {.capacity = capacity, .wait = strait::wait_policy::park});
  mine.in = 1;
  wait_until([] { return everybody->go != 0; }, "the sender's start");
  for (std::uint64_t i = 0; i < exchanged;) {
    std::error_code error;
    tx.blocking_send(make(of_the_living, i), error);
    if (!error) {
      ++i;
    } else if (error == strait::errc::peer_died) {
      ++mine.deaths;
    } else if (error == strait::errc::closed) {
      ++mine.closes;
      wait_until([] { return everybody->receiver.in != 0; }, "the next receiver");
    } else {
      throw std::system_error{error, "send"};
    }
  }
  tx.close();
}

/// Takes all, and checks it.
void play_receiver(memory where, std::optional<std::size_t> capacity) {
  account& mine = everybody->receiver;
  const board& rules = *everybody;
  auto rx = strait::open_receiver<message>(name_in(where), {.capacity = capacity, .wait = strait::wait_policy::park});
  mine.in = 1;
  wait_until([] { return everybody->go != 0; }, "the receiver's start");
  std::optional<std::uint64_t> last_old;
  std::optional<std::uint64_t> last_new;
  const auto check_old = [&] {
    if (rules.old_are_any != 0) return;
    const std::uint64_t all = rules.old_messages;
    const bool complete = last_old ? *last_old + 1 == all : rules.old_begin_at_most == all;
    if (!complete && (last_old || rules.old_may_be_gone == 0)) {
      throw std::runtime_error{"lost: of " + std::to_string(all) + " old messages the last that came is " +
                               (last_old ? std::to_string(*last_old) : "none")};
    }
  };
  for (;;) {
    std::error_code error;
    const std::optional<message> got = rx.blocking_recv(error);
    if (error == strait::errc::peer_died) {
      ++mine.deaths;
      continue;
    }
    if (error) throw std::system_error{error, "recv"};
    if (!got) {
      check_old();
      if (last_new == exchanged - 1) break;
      ++mine.closes;
      wait_until([] { return everybody->sender.in != 0; }, "the next sender");
      continue;
    }
    const std::uint64_t stream = got->key >> 32U;
    const std::uint64_t sequence = got->key & 0xffff'ffffU;
    if (got->mix != make(stream, sequence).mix) throw std::runtime_error{"torn"};
    if (stream == of_the_dead) {
      if (last_new) throw std::runtime_error{"an old message after a new one"};
      const bool next = last_old ? sequence == *last_old + 1 : sequence <= rules.old_begin_at_most;
      if (!next && rules.old_are_any == 0) {
        throw std::runtime_error{"old message " + std::to_string(sequence) + " after " +
                                 (last_old ? std::to_string(*last_old) : "none")};
      }
      last_old = sequence;
    } else {
      if (!last_new) check_old();
      const bool next = last_new ? sequence == *last_new + 1 : sequence <= rules.new_begin_at_most;
      if (!next) {
        throw std::runtime_error{"new message " + std::to_string(sequence) + " after " +
                                 (last_new ? std::to_string(*last_new) : "none")};
      }
      last_new = sequence;
    }
  }
  rx.close();
}

/// `capacity`: of the channel that is to be made; a next comer takes what is there.
void play(memory where, role who, std::optional<std::size_t> capacity = std::nullopt) {
  who == role::sender ? play_sender(where, capacity) : play_receiver(where, capacity);
}

account& book_of(role who) {
  return who == role::sender ? everybody->sender : everybody->receiver;
}

// ---- the victim -------------------------------------------------------------------------------------------------------

/// What the tracer waits for: a signal that is never delivered.
void say(int signal) {
  static const ::pid_t me = ::getpid();  // asked before the phase begins; the victim's main thread has the same number
  ::syscall(SYS_tgkill, me, me, signal);
}
constexpr int phase_begins = SIGUSR1;
constexpr int phase_ends = SIGUSR2;

/// Both ends dead; five messages were sent, and two taken.
void leave_a_crash(memory where) {
  auto tx = strait::open_sender<message>(name_in(where), {.capacity = small_ring});
  auto rx = strait::open_receiver<message>(name_in(where));
  for (std::uint64_t i = 0; i < 5; ++i) {
    if (!tx.try_send(make(of_the_dead, i))) throw std::runtime_error{"no room in an empty ring"};
  }
  if (!rx.try_recv() || !rx.try_recv()) throw std::runtime_error{"no message where five were sent"};
  ::_exit(0);
}

/// The victim's peer, where it is to leave before the victim: takes or sends a little, and closes or dies.
void play_mortal(const scenario& what) {
  const std::string name = name_in(what.where);
  const bool dies = what.kind.what == phase::close_after_death;
  const strait::channel_options options{.capacity = small_ring, .wait = strait::wait_policy::park};
  if (what.victim == role::sender) {
    auto rx = strait::open_receiver<message>(name, options);
    everybody->others.in = 1;
    wait_until([] { return everybody->victim_in != 0; }, "the victim's messages");
    if (!rx.blocking_recv()) throw std::runtime_error{"the victim closed too early"};
    if (dies) ::_exit(0);
    rx.close();
  } else {
    auto tx = strait::open_sender<message>(name, options);
    everybody->others.in = 1;
    for (std::uint64_t i = 0; i < 3; ++i) tx.blocking_send(make(of_the_dead, i));
    wait_until([] { return everybody->victim_in != 0; }, "the victim's receiving");
    if (dies) ::_exit(0);
    tx.close();
  }
  everybody->others.closes = 1;
}

/// Until the peer is watched: an end begins to watch when it has to wait.
template <class End>
void wait_a_little(End& end, const std::error_code& expected) {
  std::error_code error;
  const auto soon = std::chrono::steady_clock::now() + 1ms;
  if constexpr (std::is_same_v<End, strait::receiver<message>>) {
    if (end.blocking_recv_until(soon, error)) throw std::runtime_error{"a message that nobody sent"};
  } else {
    end.blocking_send_until(make(of_the_dead, 99), soon, error);
  }
  if (error != expected) throw std::system_error{error, "while waiting"};
}

/// The end, open; its destructor is never run.
template <class End>
End& open(memory where, const strait::channel_options& options) {
  if constexpr (std::is_same_v<End, strait::sender<message>>) {
    return *new End{strait::open_sender<message>(name_in(where), options)};
  } else {
    return *new End{strait::open_receiver<message>(name_in(where), options)};
  }
}

template <class End>
void play_victim(const scenario& what) {
  constexpr bool sends = std::is_same_v<End, strait::sender<message>>;
  const strait::channel_options small{.capacity = small_ring, .wait = strait::wait_policy::park};
  const std::error_code timed_out = std::make_error_code(std::errc::timed_out);
  const auto send_some = [&](auto& end, std::uint64_t count) {
    for (std::uint64_t i = 0; i < count; ++i) {
      if (!end.try_send(make(of_the_dead, i))) throw std::runtime_error{"no room in the ring"};
    }
    everybody->old_messages = count;
  };
  const auto close = [](End& end) {
    say(phase_begins);
    end.close();
    say(phase_ends);
  };
  switch (what.kind.what) {
    case phase::create:
    case phase::attach:
    case phase::take_over:
      say(phase_begins);
      (void)open<End>(what.where, {.capacity = small_ring});
      say(phase_ends);
      return;
    case phase::replace:
      say(phase_begins);
      (void)open<End>(what.where, {.capacity = 2 * small_ring});
      say(phase_ends);
      return;
    case phase::remove:
      say(phase_begins);
      strait::remove_channel(name_in(what.where));
      say(phase_ends);
      return;
    case phase::close_alone:
      close(open<End>(what.where, small));
      return;
    case phase::close_with_deposit:
      if constexpr (sends) {
        End& end = open<End>(what.where, small);
        send_some(end, 3);
        close(end);
      }
      return;
    case phase::close_beside_peer: {
      // The peer waits for our word, so that we have to wait as well.
      End& end = open<End>(what.where, small);
      if constexpr (sends) {
        send_some(end, small_ring);
        wait_a_little(end, timed_out);
        everybody->go = 1;
      } else {
        wait_a_little(end, timed_out);
        everybody->go = 1;
        for (int i = 0; i < 3; ++i) {
          if (!end.blocking_recv()) throw std::runtime_error{"the peer closed"};
        }
      }
      close(end);
      return;
    }
    case phase::close_after_close:
    case phase::close_after_death: {
      End& end = open<End>(what.where, small);
      const bool dies = what.kind.what == phase::close_after_death;
      std::error_code error;
      if constexpr (sends) {
        send_some(end, small_ring);
        everybody->victim_in = 1;
        // The peer takes one before it goes: there is room for another eighth at most.
        do {
          end.blocking_send(make(of_the_dead, everybody->old_messages), error);
          if (!error) ++everybody->old_messages;
        } while (!error);
        if (error != (dies ? strait::errc::peer_died : strait::errc::closed)) throw std::system_error{error, "send"};
      } else {
        for (int i = 0; i < 2; ++i) {
          if (!end.blocking_recv()) throw std::runtime_error{"the peer closed too early"};
        }
        everybody->victim_in = 1;
        if (dies) {
          while (end.blocking_recv(error)) {
          }
          if (error != strait::errc::peer_died) throw std::system_error{error, "recv"};
        } else {
          wait_until([] { return everybody->others.closes != 0; }, "the peer's end");
        }
      }
      close(end);
      return;
    }
  }
}

// ---- the tracer -------------------------------------------------------------------------------------------------------

struct call {
  std::uint64_t number = 0;
  /// Of fcntl: the command.
  std::uint64_t command = 0;
  /// How many like it were made before, in the phase. (A number among all calls would not find the same one again:
  /// whether the allocator asks the kernel for memory changes from run to run.)
  std::uint64_t repeated = 0;
  friend auto operator<=>(const call&, const call&) = default;

  [[nodiscard]] std::string text() const {
    static const std::map<std::uint64_t, std::string_view> names{
#define STRAIT_CALL(name) {SYS_##name, #name}
        STRAIT_CALL(openat),
        STRAIT_CALL(close),
        STRAIT_CALL(fcntl),
        STRAIT_CALL(fstat),
        STRAIT_CALL(newfstatat),
        STRAIT_CALL(read),
        STRAIT_CALL(pread64),
        STRAIT_CALL(pwrite64),
        STRAIT_CALL(write),
        STRAIT_CALL(readlinkat),
        STRAIT_CALL(mmap),
        STRAIT_CALL(munmap),
        STRAIT_CALL(mprotect),
        STRAIT_CALL(madvise),
        STRAIT_CALL(brk),
        STRAIT_CALL(mbind),
        STRAIT_CALL(fallocate),
        STRAIT_CALL(ftruncate),
        STRAIT_CALL(memfd_create),
        STRAIT_CALL(fchmod),
        STRAIT_CALL(fchown),
        STRAIT_CALL(fsync),
        STRAIT_CALL(linkat),
        STRAIT_CALL(unlinkat),
        STRAIT_CALL(renameat2),
        STRAIT_CALL(getrandom),
        STRAIT_CALL(epoll_create1),
        STRAIT_CALL(epoll_ctl),
        STRAIT_CALL(eventfd2),
        STRAIT_CALL(socket),
        STRAIT_CALL(socketpair),
        STRAIT_CALL(bind),
        STRAIT_CALL(listen),
        STRAIT_CALL(connect),
        STRAIT_CALL(accept4),
        STRAIT_CALL(getsockopt),
        STRAIT_CALL(sendmsg),
        STRAIT_CALL(recvmsg),
        STRAIT_CALL(sendto),
        STRAIT_CALL(recvfrom),
        STRAIT_CALL(prctl),
        STRAIT_CALL(shutdown),
        STRAIT_CALL(ppoll),
        STRAIT_CALL(futex),
        STRAIT_CALL(membarrier),
        STRAIT_CALL(sysinfo),
        STRAIT_CALL(getpid),
        STRAIT_CALL(geteuid),
        STRAIT_CALL(clone3),
        STRAIT_CALL(rt_sigprocmask),
        STRAIT_CALL(rt_sigaction),
        STRAIT_CALL(set_robust_list),
        STRAIT_CALL(sched_getaffinity),
        STRAIT_CALL(shmget),
        STRAIT_CALL(shmat),
        STRAIT_CALL(shmdt),
        STRAIT_CALL(shmctl),
        STRAIT_CALL(statfs),
        STRAIT_CALL(fstatfs),
        STRAIT_CALL(getdents64),
        STRAIT_CALL(flock),
        STRAIT_CALL(fchmodat),
        STRAIT_CALL(clock_nanosleep),
#ifdef SYS_open  // calls that 64-bit x86 has and younger architectures do not
        STRAIT_CALL(link),
        STRAIT_CALL(unlink),
        STRAIT_CALL(poll),
        STRAIT_CALL(stat),
        STRAIT_CALL(chmod),
        STRAIT_CALL(lstat),
        STRAIT_CALL(readlink),
#endif
#undef STRAIT_CALL
    };
    const auto found = names.find(number);
    std::string all = found != names.end() ? std::string{found->second} : "call " + std::to_string(number);
    if (number == SYS_fcntl) {
      all += command == F_OFD_SETLK ? " SETLK" : command == F_OFD_SETLKW ? " SETLKW" : " GETLK";
    }
    if (repeated != 0) all += " #" + std::to_string(repeated + 1);
    return all;
  }
};

/// Where the victim is killed.
struct place {
  /// At that call of the phase, or at the call with that number among all, from 0; neither: when the phase is over.
  std::optional<call> at;
  std::optional<std::size_t> ordinal;
  bool after = false;
  /// Instructions more, after the call.
  std::uint64_t instructions = 0;

  [[nodiscard]] bool is(const std::vector<call>& made) const {
    return (at && *at == made.back()) || (ordinal && *ordinal + 1 == made.size());
  }
};

struct trace {
  /// The calls of the phase, as far as it came.
  std::vector<call> calls;
  /// Whether the phase was over before the place was reached.
  bool over = false;
};

/// Whose calls count: those of the victim's own thread, or of the one that its listener has at the door.
enum class counted { own_thread, door_thread };

struct stop {
  ::pid_t thread = -1;
  int status = 0;
};

/// The next stop of any of these threads, the first of which is the victim's own. Of the others some may end.
stop next_stop(std::vector<::pid_t>& threads) {
  stop next;
  if (threads.size() == 1) {
    ::alarm(30);
    next.thread = ::waitpid(threads.front(), &next.status, __WALL);
    ::alarm(0);
    if (next.thread != threads.front()) throw std::runtime_error{"the victim hangs"};
  } else {
    // One by one: a wait for whoever it is would also find the ends of other processes.
    wait_until(
        [&] {
          return std::ranges::any_of(threads, [&](::pid_t one) {
            next.thread = ::waitpid(one, &next.status, __WALL | WNOHANG);
            return next.thread == one;
          });
        },
        "the victim's next step");
    if (next.thread != threads.front() && !WIFSTOPPED(next.status)) {
      std::erase(threads, next.thread);
      return next_stop(threads);
    }
  }
  if (!WIFSTOPPED(next.status)) throw std::runtime_error{"the victim ended by itself"};
  return next;
}

/// The other threads of a traced process that was killed: none of them is gone, and so not the process either, before the
/// tracer has seen its end.
void reap_threads(::pid_t process) {
  std::error_code gone;  // it may have been reaped already
  for (const auto& entry : std::filesystem::directory_iterator{"/proc/" + std::to_string(process) + "/task", gone}) {
    const auto thread = static_cast<::pid_t>(std::stol(entry.path().filename().string()));
    if (thread != process) ::waitpid(thread, nullptr, __WALL);
  }
}

void resume(::pid_t thread, int request, int signal) {
  if (::ptrace(static_cast<__ptrace_request>(request), thread, nullptr, signal) != 0) {
    throw std::system_error{errno, std::system_category(), "ptrace of the victim"};
  }
}

/// Runs the victim up to the place and kills it there.
trace kill_at(::pid_t victim, const place& where, counted whose = counted::own_thread) {
  trace seen;
  std::vector<::pid_t> threads{victim};
  (void)next_stop(threads);
  const bool at_the_door = whose == counted::door_thread;
  ::ptrace(PTRACE_SETOPTIONS, victim, nullptr,
           PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL | (at_the_door ? PTRACE_O_TRACECLONE : 0));
  bool begun = false;
  const auto go_on = [&](::pid_t thread, int signal) {
    // The thread at the door is the first that a listener has; there are more, which are let run.
    const bool counts = at_the_door ? threads.size() > 1 && thread == threads[1] : begun;
    resume(thread, counts ? PTRACE_SYSCALL : PTRACE_CONT, signal);
  };
  go_on(victim, 0);
  stop now;
  for (;;) {
    now = next_stop(threads);
    const int signal = WSTOPSIG(now.status);
    if (now.status >> 16 == PTRACE_EVENT_CLONE) {
      unsigned long created = 0;
      ::ptrace(PTRACE_GETEVENTMSG, now.thread, nullptr, &created);
      threads.push_back(static_cast<::pid_t>(created));
      if (::waitpid(threads.back(), nullptr, __WALL) != threads.back()) throw std::runtime_error{"no second thread"};
      go_on(threads.back(), 0);
    } else if (signal == phase_begins) {
      begun = true;
    } else if (signal == phase_ends) {
      seen.over = true;
      break;
    } else if (signal != (SIGTRAP | 0x80)) {
      go_on(now.thread, begun ? 0 : signal);
      continue;
    } else if (begun) {
      __ptrace_syscall_info info{};
      if (::ptrace(PTRACE_GET_SYSCALL_INFO, now.thread, sizeof info, &info) < 0) {
        throw std::system_error{errno, std::system_category(), "ptrace: which system call"};
      }
      if (info.op == PTRACE_SYSCALL_INFO_ENTRY) {
        if (info.entry.nr == SYS_tgkill && info.entry.args[2] == static_cast<std::uint64_t>(phase_ends)) {
          seen.over = true;
          break;
        }
        call made{info.entry.nr, info.entry.nr == SYS_fcntl ? info.entry.args[1] : 0, 0};
        while (std::ranges::find(seen.calls, made) != seen.calls.end()) ++made.repeated;
        seen.calls.push_back(made);
        if (where.is(seen.calls) && !where.after) break;
      } else if (info.op == PTRACE_SYSCALL_INFO_EXIT) {
        // The phase begins with the end of a call that is none of its own.
        if (!seen.calls.empty() && where.is(seen.calls) && where.after) break;
      }
    }
    go_on(now.thread, 0);
  }
  for (std::uint64_t i = 0; i < where.instructions && !seen.over; ++i) {
    resume(now.thread, PTRACE_SINGLESTEP, 0);
    // The others stand still, but for the victim's own thread, which may come to the end of the phase.
    seen.over = WSTOPSIG(next_stop(threads).status) == phase_ends;
  }
  ::kill(victim, SIGKILL);
  if (at_the_door) reap_threads(victim);
  return seen;
}

// ---- what is left -----------------------------------------------------------------------------------------------------

std::vector<std::string> lines_with(const char* file, std::string_view part) {
  std::ifstream all{file};
  std::vector<std::string> found;
  for (std::string line; std::getline(all, line);) {
    if (line.find(part) != std::string::npos) found.push_back(line);
  }
  return found;
}

/// What there is of ours, by kind.
struct leftovers {
  std::vector<std::string> names;
  std::vector<std::string> segments;
  std::vector<std::string> sockets;
  std::vector<std::string> locks;
};

/// Sockets and locks: the kernel takes these with the process.
leftovers in_the_kernel() {
  struct ::stat file{};
  if (::stat("/dev/shm", &file) != 0) throw std::system_error{errno, std::system_category(), "/dev/shm"};
  std::array<char, 32> device{};
  std::snprintf(device.data(), device.size(), " %02x:%02x:", major(file.st_dev), minor(file.st_dev));
  leftovers found;
  found.locks = lines_with("/proc/locks", device.data());
  for (const std::string_view name : {std::string_view{"@strait"}, std::string_view{directory}}) {
    for (auto& socket : lines_with("/proc/self/net/unix", name)) found.sockets.push_back(std::move(socket));
  }
  return found;
}

/// Names and System V segments. (Memory that was handed over has no name, and ends with the last process that has it.)
leftovers in_memory() {
  leftovers found;
  for (const auto& entry : std::filesystem::recursive_directory_iterator{"/dev/shm"}) {
    if (entry.path() != directory) found.names.push_back(entry.path().string());
  }
  found.segments = lines_with("/proc/sysvipc/shm", "");
  found.segments.erase(found.segments.begin());  // the heading
  return found;
}

std::string text_of(const leftovers& found) {
  std::string text;
  const auto add = [&text](const char* what, const std::vector<std::string>& all) {
    for (const std::string& one : all) text += what + one + "; ";
  };
  add("", found.names);
  add("System V segment ", found.segments);
  add("socket ", found.sockets);
  add("lock ", found.locks);
  return text;
}
std::string left_in_the_kernel() {
  return text_of(in_the_kernel());
}
std::string left_in_memory() {
  return text_of(in_memory());
}

// ---- one kill ---------------------------------------------------------------------------------------------------------

std::mt19937_64 chance;
std::uint64_t chance_below(std::uint64_t bound) {
  return chance() % bound;
}

/// The first thing that anybody complained about.
void complain() {
  for (const auto& [who, book] : {std::pair{"sender", &everybody->sender}, std::pair{"receiver", &everybody->receiver},
                                  std::pair{"victim", &everybody->victim}, std::pair{"somebody", &everybody->others}}) {
    if (book->failed != 0) throw std::runtime_error{std::string{who} + ": " + book->failure.data()};
  }
}

void start_afresh() {
  everybody->~board();
  ::new (static_cast<void*>(everybody)) board{};
}

/// Who comes next.
enum class next_comer { sender, receiver, strait_rm };

/// Takes the channel away, if there is one.
void remove_by_hand(memory where) {
  try {
    strait::remove_channel(name_in(where));
  } catch (const std::system_error& error) {
    if (error.code() != std::errc::no_such_file_or_directory) throw;
  }
}

/// The next comers come, exchange messages, and leave; then nothing is left.
void see_that_it_works(memory where, std::optional<std::pair<role, ::pid_t>> survivor, next_comer first) {
  everybody->go = 1;
  if (first == next_comer::strait_rm) {
    (void)reap(spawn(where, everybody->others, [&] { remove_by_hand(where); }));
    complain();
    if (const std::string left = left_in_memory(); !left.empty()) throw std::runtime_error{"left by rm: " + left};
  }
  std::array<role, 2> order{role::sender, role::receiver};
  if (first == next_comer::receiver) std::swap(order[0], order[1]);
  std::vector<::pid_t> living;
  for (const role who : order) {
    if (survivor && survivor->first == who) {
      living.push_back(survivor->second);
      continue;
    }
    living.push_back(spawn(where, book_of(who), [&] { play(where, who); }));
    wait_until([&] { return book_of(who).in != 0 || book_of(who).failed != 0; }, "the next comer's coming in");
    complain();
  }
  for (const ::pid_t one : living) {
    (void)reap(one);
    complain();  // the others may wait for it
  }
  if (outlives_its_ends(where)) {
    // The file is the user's, and there is nothing beside it.
    if (left_in_memory() != name_in(where).substr(5) + "; ") throw std::runtime_error{"left: " + left_in_memory()};
    (void)reap(spawn(where, everybody->others, [&] { strait::remove_channel(name_in(where)); }));
    complain();
  }
  const std::string left = left_in_memory() + left_in_the_kernel();
  if (!left.empty()) throw std::runtime_error{"left: " + left};
}

/// Ends whoever is still there when something went wrong, and takes away what they leave.
class cleaner {
 public:
  void add(::pid_t one) { processes_.push_back(one); }
  void done() { processes_.clear(); }
  ~cleaner() {
    for (const ::pid_t one : processes_) {
      ::kill(one, SIGKILL);
      reap_threads(one);
      ::waitpid(one, nullptr, __WALL);
    }
    std::error_code ignored;
    for (const auto& entry : std::filesystem::directory_iterator{"/dev/shm"}) {
      std::filesystem::remove_all(entry.path(), ignored);
    }
    std::filesystem::create_directory(directory);
  }

 private:
  std::vector<::pid_t> processes_;
};

trace kill_once(const scenario& what, const place& where, next_comer first) {
  start_afresh();
  cleaner after;
  board& all = *everybody;
  const role peer_role = other(what.victim);
  std::optional<std::pair<role, ::pid_t>> survivor;
  ::pid_t mortal = -1;
  switch (what.kind.what) {
    case phase::take_over:
    case phase::replace:
    case phase::remove:
      (void)reap(spawn(what.where, all.others, [&] { leave_a_crash(what.where); }));
      all.old_messages = 5;
      all.old_begin_at_most = 2;
      all.old_may_be_gone = what.kind.what == phase::take_over ? 0 : 1;
      break;
    case phase::attach:
      all.go = 1;
      [[fallthrough]];
    case phase::close_beside_peer:
      survivor = {peer_role, spawn(what.where, book_of(peer_role), [&] { play(what.where, peer_role, small_ring); })};
      after.add(survivor->second);
      wait_until([&] { return book_of(peer_role).in != 0 || book_of(peer_role).failed != 0; }, "the peer");
      if (what.kind.what == phase::close_beside_peer) all.new_begin_at_most = what.victim == role::receiver ? 3 : 0;
      break;
    case phase::close_after_close:
    case phase::close_after_death:
      mortal = spawn(what.where, all.others, [&] { play_mortal(what); });
      after.add(mortal);
      wait_until([&] { return all.others.in != 0 || all.others.failed != 0; }, "the mortal peer");
      all.old_may_be_gone = 1;
      all.old_messages = 3;
      all.old_begin_at_most = what.victim == role::sender ? 1 : what.kind.what == phase::close_after_death ? 3 : 2;
      break;
    default:
      break;
  }
  complain();
  const ::pid_t victim = spawn(what.where, all.victim, [&] {
    ::ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
    ::raise(SIGSTOP);
    try {
      what.victim == role::sender ? play_victim<strait::sender<message>>(what)
                                  : play_victim<strait::receiver<message>>(what);
    } catch (const std::exception& error) {
      all.victim.fail(error.what());
      throw;
    }
  });
  after.add(victim);
  trace seen;
  try {
    seen = kill_at(victim, where);
  } catch (const std::exception&) {
    complain();  // it may have said why
    throw;
  }
  const int status = reap(victim);
  complain();
  if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) throw std::runtime_error{"the victim was not killed"};
  if (mortal > 0) (void)reap(mortal);
  complain();
  if (survivor) {
    account& told = book_of(survivor->first);
    if (what.kind.what == phase::close_beside_peer) {
      // Either it closed, or it died: the survivor is told, once.
      wait_until([&] { return told.deaths + told.closes != 0 || told.failed != 0; }, "the survivor's being told");
    }
    complain();
  } else if (const std::string left = left_in_the_kernel(); !left.empty()) {
    throw std::runtime_error{"left by the dead: " + left};
  }
  if (first == next_comer::strait_rm) {
    if (survivor) first = next_comer::sender;  // who lives in it is not put out
    all.old_may_be_gone = 1;
  }
  see_that_it_works(what.where, survivor, first);
  for (const role who : {role::sender, role::receiver}) {
    const account& told = book_of(who);
    if (told.deaths > 1) throw std::runtime_error{std::string{to_string(who)} + " was told of a death twice"};
    if (told.deaths + told.closes > 1) throw std::runtime_error{std::string{to_string(who)} + " was told too much"};
  }
  if (!survivor && all.sender.closes != 0) throw std::runtime_error{"a receiver of another session closed on a sender"};
  after.done();
  return seen;
}

// ---- kills at random moments ------------------------------------------------------------------------------------------

/// Opens and closes until it is killed.
[[noreturn]] void loop_for_ever(memory where, std::optional<role> who) {
  for (std::uint64_t i = 0;; ++i) {
    try {
      std::error_code error;
      if (!who) {
        auto rx = strait::open_receiver<message>(name_in(where), {.capacity = small_ring});
        auto tx = strait::open_sender<message>(name_in(where), {.capacity = small_ring});
        (void)tx.try_send(make(of_the_dead, i), error);
        (void)rx.try_recv(error);
        rx.close();
      } else if (who == role::sender) {
        auto tx = strait::open_sender<message>(name_in(where), {.capacity = small_ring});
        for (int j = 0; j < 2; ++j) (void)tx.try_send(make(of_the_dead, i), error);
      } else {
        auto rx = strait::open_receiver<message>(name_in(where), {.capacity = small_ring});
        for (int j = 0; j < 4; ++j) (void)rx.try_recv(error);
      }
      everybody->loops.fetch_or(!who ? 3U : who == role::sender ? 1U : 2U);
    } catch (const std::exception& error) {
      everybody->others.fail(error.what());
      ::_exit(1);
    }
  }
}

/// Kills them at some moment of the next millisecond, one right after the other.
void kill_at_a_moment(std::vector<::pid_t>& processes) {
  const auto at = std::chrono::steady_clock::now() + std::chrono::microseconds{chance_below(1000)};
  while (std::chrono::steady_clock::now() < at) {
  }
  if (chance_below(2) == 0) std::ranges::reverse(processes);
  for (const ::pid_t one : processes) ::kill(one, SIGKILL);
  for (const ::pid_t one : processes) (void)reap(one);
}

/// Both ends' processes at once, or one that holds both. Returns how many that were.
std::size_t kill_loopers(memory where, next_comer first) {
  start_afresh();
  cleaner after;
  everybody->old_are_any = 1;
  std::vector<::pid_t> loopers;
  const auto loops = [&](std::optional<role> who) {
    loopers.push_back(spawn(where, everybody->others, [&] { loop_for_ever(where, who); }));
    after.add(loopers.back());
  };
  if (chance_below(4) == 0) {
    loops(std::nullopt);
  } else {
    loops(role::sender);
    loops(role::receiver);
  }
  wait_until([] { return everybody->loops == 3U || everybody->others.failed != 0; }, "the loopers' first round");
  kill_at_a_moment(loopers);
  complain();
  see_that_it_works(where, std::nullopt, first);
  after.done();
  return loopers.size();
}

// ---- memory that is handed over at a socket -----------------------------------------------------------------------------

enum class door_step { listen, stop_listening, let_in, connect, hang_up_as_client, hang_up_as_server };
constexpr std::array door_steps{
    std::pair{door_step::listen, std::string_view{"listen"}},
    std::pair{door_step::stop_listening, std::string_view{"stop listening"}},
    std::pair{door_step::let_in, std::string_view{"let a client in"}},
    std::pair{door_step::connect, std::string_view{"connect"}},
    std::pair{door_step::hang_up_as_client, std::string_view{"hang up, client"}},
    std::pair{door_step::hang_up_as_server, std::string_view{"hang up, server"}},
};
const std::string door_name = "unix:" + directory + "/door";
const strait::channel_options door_lanes{.wait = strait::wait_policy::park};
constexpr std::uint64_t before_the_kill = 3;

using door = strait::listener<message, message>;
using link = strait::duplex<message, message>;

door open_door() {
  strait::listener_options options{.lanes = door_lanes};
  options.lanes.capacity = small_ring;
  return door{door_name, options};
}

/// What ends a session; anything else is thrown.
bool ended(account& mine, const std::error_code& error) {
  if (!error) return false;
  if (error == strait::errc::peer_died) {
    ++mine.deaths;
  } else if (error != strait::errc::closed) {
    throw std::system_error{error, "at the door"};
  }
  return true;
}

/// Sends back what comes, in order and whole, at most so many. Returns how many came.
std::uint64_t serve(account& mine, link& peer, std::uint64_t most) {
  std::uint64_t count = 0;
  std::error_code error;
  while (count < most) {
    const std::optional<message> got = peer.in.blocking_recv(error);
    if (ended(mine, error) || !got) break;
    const std::uint64_t stream = got->key >> 32U;
    if (got->mix != make(stream, count).mix) throw std::runtime_error{"torn, or out of order"};
    ++count;
    peer.out.blocking_send(*got, error);
    if (ended(mine, error)) break;
  }
  return count;
}

/// Asks so often, and checks the answers. False: the server went.
bool ask(account& mine, link& server, std::uint64_t stream, std::uint64_t count) {
  std::error_code error;
  for (std::uint64_t i = 0; i < count; ++i) {
    server.out.blocking_send(make(stream, i), error);
    if (ended(mine, error)) return false;
    const std::optional<message> got = server.in.blocking_recv(error);
    if (ended(mine, error) || !got) return false;
    if (got->key != make(stream, i).key || got->mix != make(stream, i).mix) throw std::runtime_error{"a wrong answer"};
  }
  return true;
}

/// Serves until one has asked all that the living ask.
void play_server() {
  account& mine = everybody->receiver;
  door here = open_door();
  mine.in = 1;
  for (;;) {
    link peer = here.blocking_accept();
    if (serve(mine, peer, no_bound) == exchanged) return;
  }
}

/// Connects; none: nobody is there yet, or he went while we came in.
std::optional<link> reach_server() {
  try {
    return strait::blocking_connect<message, message>(door_name, {.lanes = door_lanes});
  } catch (const std::system_error& error) {
    const bool later = error.code() == std::errc::connection_refused ||
                       error.code() == std::errc::no_such_file_or_directory ||
                       error.code() == std::errc::connection_reset || error.code() == std::errc::broken_pipe ||
                       error.code() == strait::errc::peer_died || error.code() == strait::errc::closed;
    if (!later) throw;
    std::this_thread::sleep_for(100us);  // between two attempts
    return std::nullopt;
  }
}

/// Asks all that the living ask, of one server.
void play_client() {
  account& mine = everybody->sender;
  const auto end = std::chrono::steady_clock::now() + patience;
  while (std::chrono::steady_clock::now() < end) {
    if (std::optional<link> server = reach_server()) {
      mine.in = 1;
      if (ask(mine, *server, of_the_living, exchanged)) return;
    }
  }
  throw std::runtime_error{"waited in vain: a server"};
}

/// Whether this process's thread at the door has begun, and waits for somebody to come.
bool door_is_attended() {
  for (const auto& entry : std::filesystem::directory_iterator{"/proc/self/task"}) {
    std::ifstream file{entry.path() / "stat"};
    std::string line;
    std::getline(file, line);
    if (line.find("(strait-door) S") != std::string::npos) return true;
  }
  return false;
}

void play_at_the_door(door_step step) {
  switch (step) {
    case door_step::listen: {
      say(phase_begins);
      (void)new door{open_door()};
      say(phase_ends);
      return;
    }
    case door_step::stop_listening: {
      auto& here = *new door{open_door()};
      say(phase_begins);
      here.close();
      say(phase_ends);
      return;
    }
    case door_step::let_in: {
      // By the listener's thread, which makes the memory and hands it over; this one only takes what came.
      auto& here = *new door{open_door()};
      wait_until(door_is_attended, "the thread at the door");
      say(phase_begins);
      everybody->victim_in = 1;
      (void)new link{here.blocking_accept()};
      say(phase_ends);
      return;
    }
    case door_step::connect:
      say(phase_begins);
      (void)new link{strait::blocking_connect<message, message>(door_name, {.lanes = door_lanes})};
      say(phase_ends);
      return;
    case door_step::hang_up_as_client: {
      auto& server = *new link{strait::blocking_connect<message, message>(door_name, {.lanes = door_lanes})};
      if (!ask(everybody->victim, server, of_the_dead, before_the_kill)) throw std::runtime_error{"no server"};
      say(phase_begins);
      server.out.close();
      server.in.close();
      say(phase_ends);
      return;
    }
    case door_step::hang_up_as_server: {
      auto& here = *new door{open_door()};
      everybody->victim.in = 1;
      auto& peer = *new link{here.blocking_accept()};
      if (serve(everybody->victim, peer, before_the_kill) != before_the_kill) throw std::runtime_error{"no client"};
      say(phase_begins);
      peer.out.close();
      peer.in.close();
      say(phase_ends);
      return;
    }
  }
}

trace kill_at_the_door(door_step step, const place& where) {
  start_afresh();
  cleaner after;
  board& all = *everybody;
  std::vector<::pid_t> living;
  const auto add = [&](account& book, void (*deed)()) {
    living.push_back(spawn(memory::posix, book, deed));
    after.add(living.back());
  };
  const bool server_survives = step == door_step::connect || step == door_step::hang_up_as_client;
  if (server_survives) {
    add(all.receiver, play_server);
    wait_until([&] { return all.receiver.in != 0 || all.receiver.failed != 0; }, "the server");
  }
  const ::pid_t victim = spawn(memory::posix, all.victim, [&] {
    ::ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
    ::raise(SIGSTOP);
    play_at_the_door(step);
  });
  after.add(victim);
  // Before the victim runs: it tries until there is a server.
  const bool client_survives = step == door_step::hang_up_as_server || step == door_step::let_in;
  if (step == door_step::hang_up_as_server) add(all.sender, play_client);
  if (step == door_step::let_in) {
    add(all.sender, [] {
      wait_until([] { return everybody->victim_in != 0; }, "a listener");
      play_client();
    });
  }
  trace seen;
  try {
    seen = kill_at(victim, where, step == door_step::let_in ? counted::door_thread : counted::own_thread);
  } catch (const std::exception&) {
    complain();
    throw;
  }
  (void)reap(victim);
  complain();
  all.victim_in = 1;  // whom it did not come to say so to is to look for another
  // The client first: the server waits for it.
  if (!client_survives) add(all.sender, play_client);
  std::ranges::reverse(living);
  if (!server_survives) add(all.receiver, play_server);
  for (const ::pid_t one : living) {
    (void)reap(one);
    complain();  // the others may wait for it
  }
  if (all.sender.deaths + all.receiver.deaths > 1) throw std::runtime_error{"one death was told twice"};
  const std::string left = left_in_memory() + left_in_the_kernel();
  if (!left.empty()) throw std::runtime_error{"left: " + left};
  after.done();
  return seen;
}

/// Comes and goes until it is killed.
[[noreturn]] void loop_at_the_door(role who) {
  account& mine = everybody->others;
  try {
    for (std::uint64_t i = 0;; ++i) {
      if (who == role::receiver) {
        door here = open_door();
        std::error_code error;
        link peer = here.blocking_accept_until(std::chrono::steady_clock::now() + 2ms, error);
        if (error == std::errc::timed_out) continue;
        if (error) throw std::system_error{error, "accept"};
        if (serve(mine, peer, 2) != 0) everybody->loops.fetch_or(2U);
      } else if (std::optional<link> server = reach_server()) {
        if (ask(mine, *server, i, 3)) throw std::runtime_error{"more answers than there are"};
        everybody->loops.fetch_or(1U);
      }
    }
  } catch (const std::exception& error) {
    mine.fail(error.what());
    ::_exit(1);
  }
}

/// Both sides' processes at once. Returns how many that were.
std::size_t kill_loopers_at_the_door() {
  start_afresh();
  cleaner after;
  std::vector<::pid_t> loopers;
  for (const role who : {role::sender, role::receiver}) {
    loopers.push_back(spawn(memory::handed_over, everybody->others, [who] { loop_at_the_door(who); }));
    after.add(loopers.back());
  }
  wait_until([] { return everybody->loops == 3U || everybody->others.failed != 0; }, "the loopers' first round");
  kill_at_a_moment(loopers);
  complain();
  std::vector<::pid_t> living{spawn(memory::handed_over, everybody->sender, play_client),
                              spawn(memory::handed_over, everybody->receiver, play_server)};
  for (const ::pid_t one : living) after.add(one);
  for (const ::pid_t one : living) {
    (void)reap(one);
    complain();
  }
  if (const std::string left = left_in_memory() + left_in_the_kernel(); !left.empty()) {
    throw std::runtime_error{"left: " + left};
  }
  after.done();
  return loopers.size();
}

// ---- the campaign -----------------------------------------------------------------------------------------------------

bool only_a_share = false;

std::vector<scenario> scenarios_in(memory where) {
  std::vector<scenario> all;
  for (const phase_kind& kind : phases) {
    if (kind.what == phase::replace && outlives_its_ends(where)) continue;  // the user's, and never replaced
    if (kind.as_sender) all.push_back({where, kind, role::sender});
    if (kind.as_receiver) all.push_back({where, kind, role::receiver});
  }
  return all;
}

/// What was done in one memory.
struct tally {
  std::uint64_t at_calls = 0;
  std::uint64_t at_places = 0;
  std::uint64_t at_moments = 0;
  int failures = 0;
  double seconds = 0;
  int steps = 0;
  /// In how many calls of those steps a process was killed, and how many different ones these are.
  std::uint64_t before = 0;
  std::uint64_t after = 0;
  std::set<std::uint64_t> different;

  [[nodiscard]] std::uint64_t kills() const { return at_calls + at_places + at_moments; }
  [[nodiscard]] bool too_many() const { return failures > 5; }

  /// Does it and counts the kills that it returns; not when something was found.
  template <class Deed>
  void attempt(std::uint64_t& counter, const std::string& what, Deed&& deed) {
    try {
      counter += static_cast<std::uint64_t>(deed());
    } catch (const std::exception& error) {
      ++failures;
      MESSAGE(what, ": ", std::string{error.what()});
    }
  }
};

/// Kills at each call of the step, before and after it, and prints what was hit.
/// `kill_once`: from the place and a number for each time, which chooses who comes next.
template <class KillOnce>
void kill_at_every_call(const std::string& what, tally& done, KillOnce&& kill_once) {
  std::uint64_t turn = 0;
  // What calls there are; the victim is killed when it has made them all. What only one of two runs does depends on
  // others (a wait for a thread, memory for the allocator); it is hit where it happens.
  std::vector<call> calls;
  std::vector<call> again;
  done.attempt(done.at_calls, what + ", at its end", [&] {
    calls = kill_once(place{}, turn++).calls;
    again = kill_once(place{}, turn++).calls;
    return 2;
  });
  CHECK(!calls.empty());
  ++done.steps;
  std::string table;
  std::uint64_t hits = 0;
  for (const call& one : calls) {
    std::array<int, 2> hit{};
    for (const bool after : {false, true}) {
      const std::string text = what + (after ? ", after " : ", before ") + one.text();
      for (int tries = 0; tries < 10 && hit[after ? 1 : 0] < 2; ++tries) {
        const int before = done.failures;
        done.attempt(done.at_calls, text, [&] {
          const trace seen = kill_once(place{.at = one, .ordinal = {}, .after = after}, turn++);
          if (!seen.over) ++hit[after ? 1 : 0];
          return 1;
        });
        if (done.failures != before) break;
      }
    }
    // Another thread may be slower, or have come already: a wait for it is not in every run.
    const bool waits = one.number == SYS_futex || one.number == SYS_clock_nanosleep;
    const bool always = !waits && std::ranges::find(again, one) != again.end();
    CHECK_MESSAGE(std::min(hit[0], hit[1]) >= (always ? 1 : 0), what, ": ", one.text(), " was not hit");
    table += (table.empty() ? "" : ", ") + one.text() + ' ' + std::to_string(hit[0]) + '+' + std::to_string(hit[1]);
    hits += static_cast<std::uint64_t>(hit[0] + hit[1]);
    if (hit[0] != 0) ++done.before;
    if (hit[1] != 0) ++done.after;
    if (hit[0] != 0 && hit[1] != 0) done.different.insert(one.number);
  }
  std::printf("%s: %zu calls, killed before+after: %llu\n    %s\n", what.c_str(), calls.size(),
              static_cast<unsigned long long>(hits), table.c_str());
  std::fflush(stdout);
}

/// At every call of every step that there is in this memory.
void kill_at_every_step(memory where, tally& done) {
  if (where == memory::handed_over) {
    for (const auto& [step, text] : door_steps) {
      if (done.too_many()) break;
      kill_at_every_call("unix, " + std::string{text}, done,
                         [step = step](const place& at, std::uint64_t) { return kill_at_the_door(step, at); });
    }
    return;
  }
  for (const scenario& what : scenarios_in(where)) {
    if (done.too_many()) break;
    // Of each two kills before or after a call the second is followed by a removal.
    kill_at_every_call(what.text(), done, [&](const place& at, std::uint64_t turn) {
      constexpr std::array comers{next_comer::sender, next_comer::strait_rm, next_comer::receiver,
                                  next_comer::strait_rm};
      return kill_once(what, at, comers[turn % comers.size()]);
    });
  }
}

/// At a call of a step, or some instructions behind one.
void kill_at_random_place(memory where, std::uint64_t turn, tally& done) {
  const std::uint64_t instructions = chance_below(2) == 0 ? chance_below(2000) : 0;
  place at{.at = {}, .ordinal = {}, .after = instructions != 0 || chance_below(2) == 0, .instructions = instructions};
  const auto attempt = [&](const std::string& what, auto&& deed) {
    done.attempt(done.at_places,
                 what + (at.after ? ", after call " : ", before call ") + std::to_string(*at.ordinal + 1) + " and " +
                     std::to_string(instructions) + " instructions",
                 [&] {
                   deed();
                   return 1;
                 });
  };
  if (where == memory::handed_over) {
    const auto& [step, text] = door_steps[turn % door_steps.size()];
    at.ordinal = chance_below(60);
    attempt("unix, " + std::string{text}, [&, step = step] { (void)kill_at_the_door(step, at); });
    return;
  }
  static const std::map<memory, std::vector<scenario>> all = [] {
    std::map<memory, std::vector<scenario>> made;
    for (const memory one : memories) made[one] = scenarios_in(one);
    return made;
  }();
  const scenario& what = all.at(where)[turn % all.at(where).size()];
  at.ordinal = chance_below(what.kind.what < phase::close_beside_peer ? 45 : 12);
  const auto first = static_cast<next_comer>(chance_below(3));
  attempt(what.text(), [&] { (void)kill_once(what, at, first); });
}

void kill_at_random_moment(memory where, tally& done) {
  done.attempt(done.at_moments, "coming and going, " + std::string{text_of(where)}, [&] {
    return where == memory::handed_over ? kill_loopers_at_the_door()
                                        : kill_loopers(where, static_cast<next_comer>(chance_below(3)));
  });
}

}  // namespace kills

using namespace kills;

TEST_CASE("killed at every system call of creating, attaching, closing and clearing away, and at random") {
  const auto began = std::chrono::steady_clock::now();
  // Each memory has its share. What all calls leave of it is at random, and that is never only a few.
  const std::uint64_t wanted_in_each = (only_a_share ? 400 : 10'000) / memories.size();
  const std::uint64_t wanted_at_random = only_a_share ? wanted_in_each : 400;
  std::map<memory, tally> all;
  for (const memory where : memories) {
    tally& done = all[where];
    const auto begins = std::chrono::steady_clock::now();
    if (!only_a_share) kill_at_every_step(where, done);
    const auto enough = [&] {
      return done.kills() >= wanted_in_each && done.at_places + done.at_moments >= wanted_at_random;
    };
    for (std::uint64_t turn = 0; !enough() && !done.too_many(); ++turn) {
      kill_at_random_place(where, turn, done);
      kill_at_random_moment(where, done);
    }
    done.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begins).count();
  }
  tally sum;
  for (const memory where : memories) {
    const tally& done = all[where];
    CHECK(done.failures == 0);
    CHECK(done.kills() >= wanted_in_each);
    std::printf("kills, %s: %llu in %.1f s:", text_of(where).data(), static_cast<unsigned long long>(done.kills()),
                done.seconds);
    if (!only_a_share) {
      std::printf(" %llu in %d steps, before %llu and after %llu calls of %zu kinds,",
                  static_cast<unsigned long long>(done.at_calls), done.steps,
                  static_cast<unsigned long long>(done.before), static_cast<unsigned long long>(done.after),
                  done.different.size());
    }
    std::printf(" %llu at random places, %llu at random moments\n", static_cast<unsigned long long>(done.at_places),
                static_cast<unsigned long long>(done.at_moments));
    sum.at_calls += done.at_calls;
    sum.at_places += done.at_places;
    sum.at_moments += done.at_moments;
    sum.before += done.before;
    sum.after += done.after;
    sum.different.insert(done.different.begin(), done.different.end());
  }
  const leftovers memory_left = in_memory();
  const leftovers kernel_left = in_the_kernel();
  CHECK(text_of(memory_left) + text_of(kernel_left) == "");
  std::printf("kills: %llu in %.1f s over %zu memories, ", static_cast<unsigned long long>(sum.kills()),
              std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count(), memories.size());
  if (!only_a_share) {
    std::printf("before %llu and after %llu system calls of %zu kinds and ",
                static_cast<unsigned long long>(sum.before), static_cast<unsigned long long>(sum.after),
                sum.different.size());
  }
  std::printf(
      "at random; after each the next comer came, and left %zu names, %zu segments, %zu sockets and %zu locks\n",
      memory_left.names.size(), memory_left.segments.size(), kernel_left.sockets.size(), kernel_left.locks.size());
}

namespace {

void write_text(const char* path, const std::string& text) {
  std::ofstream file{path};
  file << text;
}

/// A /dev/shm, sockets and System V segments of our own. False when this user may have none.
bool isolate() {
  constexpr int rooms = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC;
  const ::uid_t user = ::geteuid();
  const ::gid_t group = ::getegid();
  if (::unshare(rooms) != 0) {
    if (::unshare(CLONE_NEWUSER | rooms) != 0) return false;
    write_text("/proc/self/setgroups", "deny");
    write_text("/proc/self/uid_map", "0 " + std::to_string(user) + " 1");
    write_text("/proc/self/gid_map", "0 " + std::to_string(group) + " 1");
  }
  return ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
         ::mount("none", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "size=64m") == 0 &&
         ::mkdir(directory.c_str(), 0700) == 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::uint64_t seed = std::random_device{}();
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    constexpr std::string_view same = "--seed=";
    if (word == "--share") only_a_share = true;
    if (word.starts_with(same)) seed = std::stoull(std::string{word.substr(same.size())});
  }
  std::printf("kills: seed %llu\n", static_cast<unsigned long long>(seed));
  chance.seed(seed);
  if (!isolate()) {
    std::puts("skipped: expected the right to namespaces of our own (root, or user namespaces), found none");
    return 77;
  }
  const ::rlimit no_core{0, 0};
  ::setrlimit(RLIMIT_CORE, &no_core);
  void* shared = ::mmap(nullptr, sizeof(board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) return 1;
  everybody = ::new (shared) board{};
  // Interrupts a wait for a process that hangs.
  struct ::sigaction wake_up{};
  wake_up.sa_handler = [](int) {};
  ::sigaction(SIGALRM, &wake_up, nullptr);
  doctest::Context context{argc, argv};
  return context.run();
}
