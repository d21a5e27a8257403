// What the surroundings deny: descriptors, locked memory, membarrier, a common PID namespace, a common user; and peers that
// make a mess of their doorbells. Each ends in an error that says so, or in the documented fallback, with nothing lost.
#include <doctest/doctest.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>

#include "less_rights.hpp"
#include "other_process.hpp"
#include "segment_files.hpp"
#include "strangers.hpp"

import strait;

using number = std::uint64_t;
using strait::errc;
using test::channel_name;
using test::check_refused;

namespace {

constexpr strait::wait_policy park = strait::wait_policy::park;

/// Sends as many as `receive_all` takes: several rings full, so that both ends wait for each other.
constexpr number several_rings = 200;
void send_all(const std::string& name, const strait::channel_options& options) {
  auto tx = strait::open_sender<number>(name, options);
  for (number i = 0; i < several_rings; ++i) tx.blocking_send(i);
}
void receive_all(const std::string& name, const strait::channel_options& options) {
  auto rx = strait::open_receiver<number>(name, options);
  for (number i = 0; i < several_rings; ++i) REQUIRE(rx.blocking_recv() == i);
  CHECK_FALSE(rx.blocking_recv());
}

}  // namespace

TEST_CASE("child: has no descriptors" * doctest::skip()) {
  if (!test::is_child()) return;
  const std::string name = test::parent_says();
  const int free = ::open("/dev/null", O_RDONLY | O_CLOEXEC);  // all below are taken
  REQUIRE(free >= 0);
  ::close(free);
  ::rlimit before{};
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &before) == 0);
  int refused = 0;
  for (::rlim_t more = 0;; ++more) {
    REQUIRE(more < 32);
    const ::rlimit limit{static_cast<::rlim_t>(free) + more, before.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_NOFILE, &limit) == 0);
    try {
      auto rx = strait::open_receiver<number>(name, {.capacity = 16, .wait = park});
      REQUIRE(::setrlimit(RLIMIT_NOFILE, &before) == 0);
      test::tell_parent("in after " + std::to_string(refused));
      // What was short while it came in is not missing now.
      for (number i = 0; i < several_rings; ++i) REQUIRE(rx.blocking_recv() == i);
      CHECK_FALSE(rx.blocking_recv());
      return;
    } catch (const std::system_error& error) {
      CAPTURE(std::string{error.what()});
      CHECK(error.code() == std::error_code{EMFILE, std::system_category()});
      ++refused;
    }
  }
}
TEST_CASE_TEMPLATE("limits: without a descriptor entering is an error that says so, and later it succeeds", memory,
                   STRAIT_NAMED_MEMORIES) {
  for (const bool there : {false, true}) {
    CAPTURE(there);
    const channel_name name{"descriptors", memory::scheme};
    std::optional<strait::sender<number>> tx;
    if (there) tx = strait::open_sender<number>(name.text(), {.capacity = 16, .wait = park});
    test::other_process child{"child: has no descriptors"};
    child.say(name.text());
    const std::string said = child.hears();
    REQUIRE(said.starts_with("in after "));
    CHECK(said != "in after 0");
    if (!tx) tx = strait::open_sender<number>(name.text(), {.wait = park});
    for (number i = 0; i < several_rings; ++i) tx->blocking_send(i);
    tx->close();
    CHECK(child.finish() == 0);
    CHECK(name.exists() == name.outlives_its_ends());
  }
}

TEST_CASE("child: may lock no memory" * doctest::skip()) {
  if (!test::is_child()) return;
  const ::rlimit none{0, 0};
  REQUIRE(::setrlimit(RLIMIT_MEMLOCK, &none) == 0);
  receive_all(test::parent_says(), {.capacity = 16, .wait = park});
}
TEST_CASE_TEMPLATE("limits: nothing of a channel is locked memory", memory, STRAIT_NAMED_MEMORIES) {
  const channel_name name{"locked", memory::scheme};
  test::other_process child{"child: may lock no memory"};
  child.say(name.text());
  send_all(name.text(), {.capacity = 16, .wait = park});
  CHECK(child.finish() == 0);
}

TEST_CASE("child: may not call membarrier" * doctest::skip()) {
  if (!test::is_child()) return;
  test::refuse_call(SYS_membarrier, test::parent_says() == "ENOSYS" ? ENOSYS : EPERM);
  const std::string theirs = test::parent_says();
  const std::string fenced = test::parent_says();
  const std::string ours = test::parent_says();
  check_refused(errc::no_barrier, {theirs, "membarrier", "order = fence"},
                [&] { (void)strait::open_receiver<number>(theirs); });
  receive_all(fenced, {.wait = park});
  // What it makes itself is made without.
  test::tell_parent("making");
  receive_all(ours, {.capacity = 16, .wait = park});
}
TEST_CASE_TEMPLATE("limits: without membarrier a channel is made with fences, and one made with it is refused", memory,
                   STRAIT_NAMED_MEMORIES) {
  for (const std::string error : {"ENOSYS", "EPERM"}) {
    CAPTURE(error);
    const channel_name theirs{"with", memory::scheme};
    const channel_name fenced{"fenced", memory::scheme};
    const channel_name ours{"without", memory::scheme};
    auto asymmetric = strait::open_sender<number>(theirs.text());
    test::other_process child{"child: may not call membarrier"};
    child.say(error);
    auto fence =
        strait::open_sender<number>(fenced.text(), {.capacity = 16, .wait = park, .order = strait::ordering::fence});
    for (const std::string& word : {theirs.text(), fenced.text(), ours.text()}) child.say(word);
    for (number i = 0; i < several_rings; ++i) fence.blocking_send(i);
    fence.close();
    REQUIRE(child.hears() == "making");
    test::eventually([&] { return ours.exists(); });
    send_all(ours.text(), {.wait = park});
    CHECK(child.finish() == 0);
    CHECK(asymmetric.try_send(number{1}));  // is as it was
  }
}

TEST_CASE("child: lives in a PID namespace of its own" * doctest::skip()) {
  if (!test::is_child()) return;
  const std::string name = test::parent_says();
  if (::unshare(CLONE_NEWPID) != 0) {
    test::tell_parent("not allowed");
    return;
  }
  const ::pid_t first = ::fork();
  REQUIRE(first >= 0);
  if (first == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    auto rx = strait::open_receiver<number>(name, {.capacity = 16, .wait = park});
    test::tell_parent("process " + std::to_string(::getpid()));
    for (number i = 0; i < several_rings; ++i) {
      if (rx.blocking_recv() != i) ::_exit(1);
    }
    test::tell_parent("all");
    for (;;) (void)rx.blocking_recv();  // is killed here
  }
  if (test::parent_says() == "kill") ::kill(first, SIGKILL);
  int status = 0;
  ::waitpid(first, &status, 0);
  CHECK(WIFSIGNALED(status));
}
TEST_CASE_TEMPLATE("limits: ends in two PID namespaces exchange messages, and the death of one is told", memory,
                   STRAIT_NAMED_MEMORIES) {
  const channel_name name{"namespaces", memory::scheme};
  test::other_process child{"child: lives in a PID namespace of its own"};
  child.say(name.text());
  const std::string allowed = child.hears();
  if (allowed == "not allowed") {
    MESSAGE("skipped: expected the right to a PID namespace (root), found none");
    return;
  }
  CHECK(allowed == "process 1");
  auto tx = strait::open_sender<number>(name.text(), {.wait = park});
  // The number is its own, of its namespace: for people to read.
  CHECK(strait::inspect(name.text()).ends[1].pid == 1);
  for (number i = 0; i < several_rings; ++i) tx.blocking_send(i);
  REQUIRE(child.hears() == "all");
  child.say("kill");
  std::error_code error;
  while (!error) tx.blocking_send(number{0}, error);
  CHECK(error == errc::peer_died);
  CHECK(child.finish() == 0);
}

TEST_CASE("child: is another user" * doctest::skip()) {
  if (!test::is_child()) return;
  const std::string name = test::parent_says();
  test::become_nobody();
  auto rx = strait::open_receiver<number>(name, {.wait = park});
  for (number i = 0; i < several_rings; ++i) REQUIRE(rx.blocking_recv() == i);
  test::tell_parent("all");
  (void)rx.blocking_recv();  // is killed here
}
TEST_CASE_TEMPLATE("limits: ends of two users exchange messages, and the death of one is told to the other", memory,
                   STRAIT_NAMED_MEMORIES) {
  if (::geteuid() != 0) {
    MESSAGE("skipped: expected to be root, who can become nobody; found user ", ::geteuid());
    return;
  }
  const channel_name name{"users", memory::scheme};
  auto tx = strait::open_sender<number>(name.text(), {.capacity = 16, .wait = park, .mode = 0666});
  test::other_process child{"child: is another user"};
  child.say(name.text());
  for (number i = 0; i < several_rings; ++i) tx.blocking_send(i);
  REQUIRE(child.hears() == "all");
  child.kill();
  std::error_code error;
  while (!error) tx.blocking_send(number{0}, error);
  CHECK(error == errc::peer_died);
}

// ---- hubs ------------------------------------------------------------------------------------------------------------

TEST_CASE("child: waits in one context after another" * doctest::skip()) {
  if (!test::is_child()) return;
  auto rx = strait::open_receiver<number>(test::parent_says(), {.wait = park});
  for (;;) {
    const auto next = strait::block_on([](strait::receiver<number>& from) -> strait::task<std::optional<number>> {
      co_return co_await from.recv();
    }(rx));
    if (!next) return;
  }
}
TEST_CASE("limits: a peer whose contexts come and go takes no descriptor for each from whoever rings it") {
  const channel_name name{"contexts"};
  auto tx = strait::open_sender<number>(name.text());
  test::other_process child{"child: waits in one context after another"};
  child.say(name.text());
  const auto ring_it = [&](int times) {
    for (int i = 0; i < times; ++i) {
      test::eventually([&] { return strait::inspect(name.text()).ends[1].state == strait::presence::hub_parked; });
      tx.blocking_send(number{1});
    }
  };
  ring_it(4);
  const std::size_t before = test::open_descriptors();
  ring_it(64);
  CHECK(test::open_descriptors() == before);
  tx.close();
  CHECK(child.finish() == 0);
}

namespace {

/// Takes turns: each waits in a hub for what the other sends. Returns how many turns it had.
strait::task<number> take_turns(strait::sender<number>& tx, strait::receiver<number>& rx, bool begins, number turns) {
  std::error_code error;
  for (number i = 0; i < turns; ++i) {
    if (begins) co_await tx.send(i);
    const auto next = co_await (rx.recv(error) | strait::timeout(std::chrono::seconds{5}));
    if (next != i) co_return i;
    if (!begins) co_await tx.send(i);
  }
  co_return turns;
}

}  // namespace

/// Takes /proc away from this process, as a chroot does.
bool lose_proc() {
  return ::unshare(CLONE_NEWNS) == 0 && ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
         ::umount2("/proc", MNT_DETACH) == 0;
}

TEST_CASE("child: loses its /proc" * doctest::skip()) {
  if (!test::is_child()) return;
  const std::string name = test::parent_says();
  constexpr number turns = 20;
  const auto play = [&](const char* to, const char* from, bool begins) {
    auto tx = strait::open_sender<number>(name + to, {.wait = park});
    auto rx = strait::open_receiver<number>(name + from, {.wait = park});
    if (!lose_proc()) return turns;
    return strait::block_on(take_turns(tx, rx, begins, turns));
  };
  const ::pid_t other = ::fork();
  REQUIRE(other >= 0);
  if (other == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    ::_exit(play("-1", "-2", false) == turns ? 0 : 1);
  }
  CHECK(play("-2", "-1", true) == turns);
  int status = 0;
  ::waitpid(other, &status, 0);
  CHECK(status == 0);
  test::tell_parent(::access("/proc/self", F_OK) == 0 ? "not allowed" : "done");
}
TEST_CASE("limits: without /proc, where nobody can see what a descriptor is, hubs are woken all the same") {
  const channel_name name{"no-proc"};
  test::other_process child{"child: loses its /proc"};
  child.say(name.text());
  if (child.hears() == "not allowed") {
    MESSAGE("skipped: expected the right to a mount namespace (root), found none");
  }
  CHECK(child.finish() == 0);
}

// ---- peers that make a mess of their doorbells ------------------------------------------------------------------------

namespace {

/// What travels to a mailbox (runtime/switchboard.cpp).
struct note {
  std::uint64_t magic = 0x74696172'74530001;
  strait::process_identity from;
  std::uint64_t doorbell_number = 0;
};

/// Connects to the mailbox of a process and leaves a note there, with a descriptor where one is given.
int leave_note(strait::process_identity to, const note& text, int descriptor) {
  const int line = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  ::sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const int written = std::snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "strait-%016llx%016llx",
                                    static_cast<unsigned long long>(to.high), static_cast<unsigned long long>(to.low));
  const auto length =
      static_cast<::socklen_t>(offsetof(::sockaddr_un, sun_path) + 1 + static_cast<std::size_t>(written));
  REQUIRE(::connect(line, reinterpret_cast<const ::sockaddr*>(&address), length) == 0);
  ::iovec part{const_cast<note*>(&text), sizeof text};
  alignas(::cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  ::msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (descriptor >= 0) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    ::cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &descriptor, sizeof descriptor);
  }
  REQUIRE(::sendmsg(line, &message, MSG_NOSIGNAL) == sizeof text);
  return line;
}

}  // namespace

TEST_CASE("child: leaves a bad doorbell" * doctest::skip()) {
  if (!test::is_child()) return;
  const std::string name = test::parent_says();
  const std::string kind = test::parent_says();
  auto rx = strait::open_receiver<number>(name);
  const int file = ::open(("/dev/shm/" + name.substr(name.find(':') + 1)).c_str(), O_RDWR | O_CLOEXEC);
  REQUIRE(file >= 0);
  void* mapped = ::mmap(nullptr, sizeof(strait::segment_header), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  REQUIRE(mapped != MAP_FAILED);
  auto& header = *static_cast<strait::segment_header*>(mapped);
  const strait::end_entry& sender = header.ends[0];
  const strait::process_identity parent{sender.process_high.load(), sender.process_low.load()};
  constexpr std::uint64_t bell_number = 4711;
  std::array<int, 2> pipe{-1, -1};
  REQUIRE(::pipe(pipe.data()) == 0);
  int bell = -1;
  if (kind == "full and blocking") {
    bell = ::eventfd(0, 0);
    const std::uint64_t most = ~std::uint64_t{0} - 1;
    REQUIRE(::write(bell, &most, sizeof most) == sizeof most);
  } else if (kind == "a pipe") {
    // Full: who writes to it blocks.
    const int flags = ::fcntl(pipe[1], F_GETFL);
    REQUIRE(::fcntl(pipe[1], F_SETFL, flags | O_NONBLOCK) == 0);
    while (::write(pipe[1], &bell, sizeof bell) > 0) {
    }
    REQUIRE(::fcntl(pipe[1], F_SETFL, flags) == 0);
    bell = pipe[1];
  }
  const int line = leave_note(parent, {.from = strait::this_process(), .doorbell_number = bell_number}, bell);
  if (bell >= 0) ::close(bell);
  if (kind == "hung up") ::close(line);
  header.ends[1].doorbell = bell_number;
  header.ends[1].presence = static_cast<std::uint32_t>(strait::presence::hub_parked);
  test::tell_parent("parked");
  // Not before, or we would announce that a thread waits.
  test::eventually([&] { return rx.depth() != 0; });
  CHECK(rx.blocking_recv() == 7);
  REQUIRE(test::parent_says() == "sent");
}
TEST_CASE("limits: a peer's doorbell that is full, none, closed or something else blocks nobody and loses nothing") {
  for (const std::string kind : {"full and blocking", "a pipe", "none", "hung up"}) {
    CAPTURE(kind);
    const channel_name name{"bell"};
    auto tx = strait::open_sender<number>(name.text(), {.capacity = 16});
    test::other_process child{"child: leaves a bad doorbell"};
    child.say(name.text());
    child.say(kind);
    REQUIRE(child.hears() == "parked");
    std::atomic<bool> sent{false};
    std::thread sends{[&] {
      tx.blocking_send(number{7});
      sent = true;
    }};
    const auto patience = std::chrono::steady_clock::now() + std::chrono::seconds{10};
    while (!sent && std::chrono::steady_clock::now() < patience) std::this_thread::yield();
    if (!sent) {
      std::puts("the sender hangs at the doorbell");
      std::abort();  // it cannot be joined
    }
    sends.join();
    child.say("sent");
    CHECK(child.finish() == 0);
    std::error_code error;
    CHECK_FALSE(tx.try_send(number{8}, error));
    CHECK(error == errc::closed);  // and the bell is of no interest any more
  }
}
