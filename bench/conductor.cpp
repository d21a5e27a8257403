#include "conductor.hpp"

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <spawn.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <climits>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <memory>
#include <system_error>

#include <fmt/format.h>

extern char** environ;

namespace bench {
namespace {

constexpr std::string_view end_option = "--end";

std::string_view role_name(role which) {
  return which == role::producer ? "producer" : "consumer";
}

sigset_t served_signals() {
  sigset_t set;
  ::sigemptyset(&set);
  for (const int signal : {SIGCHLD, SIGINT, SIGTERM, SIGHUP}) ::sigaddset(&set, signal);
  return set;
}

/// Above every number that an end's descriptors get, so that moving one never closes another.
descriptor out_of_the_way(int fd) {
  return descriptor{checked(::fcntl(fd, F_DUPFD_CLOEXEC, 64), "cannot duplicate a descriptor")};
}

std::string interposer_path() {
  const auto path = std::filesystem::read_symlink("/proc/self/exe").parent_path() / "libstrait-count.so";
  if (!std::filesystem::exists(path)) {
    throw std::runtime_error{fmt::format(
        "cannot count allocations: expected the counting malloc at {}, found nothing there", path.string())};
  }
  return path.string();
}

/// The environment of an end.
std::vector<std::string> environment(bool count_allocations) {
  std::vector<std::string> entries;
  std::string preload;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text{*entry};
    if (count_allocations && text.starts_with("LD_PRELOAD=")) {
      preload = text.substr(text.find('=') + 1);
    } else {
      entries.emplace_back(text);
    }
  }
  if (count_allocations) {
    // First, before whatever else is preloaded: what comes later is what it counts.
    entries.push_back("LD_PRELOAD=" + interposer_path() + (preload.empty() ? "" : ":" + preload));
  }
  return entries;
}

std::vector<char*> pointers(std::vector<std::string>& strings) {
  std::vector<char*> result;
  for (std::string& one : strings) result.push_back(one.data());
  result.push_back(nullptr);
  return result;
}

std::string describe_status(int status) {
  if (WIFSIGNALED(status)) return fmt::format("signal {} ({})", WTERMSIG(status), ::strsignal(WTERMSIG(status)));
  return fmt::format("exit status {}", WEXITSTATUS(status));
}

/// The threads of a process, those among them that have ended and nobody has waited for.
std::vector<pid_t> threads_of(pid_t process) {
  std::vector<pid_t> found;
  std::error_code gone;
  for (const auto& entry : std::filesystem::directory_iterator{fmt::format("/proc/{}/task", process), gone}) {
    found.push_back(static_cast<pid_t>(std::stol(entry.path().filename().string())));
  }
  return found;
}

/// Of a child, or of a thread that is traced; returns at once for any other.
void wait_for_end(pid_t id) {
  int status = 0;
  // __WALL: a traced one reports other things first.
  while (::waitpid(id, &status, __WALL) == id && WIFSTOPPED(status)) {
  }
}

}  // namespace

conductor::conductor(placement where) : where_{std::move(where)}, clock_{tick_clock::calibrate()} {
  const sigset_t served = served_signals();
  ::sigprocmask(SIG_BLOCK, &served, nullptr);
  signals_ = descriptor{checked(::signalfd(-1, &served, SFD_CLOEXEC | SFD_NONBLOCK), "cannot make a signalfd")};
  bell_ = descriptor{checked(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "cannot make an eventfd")};
}

conductor::~conductor() {
  const sigset_t served = served_signals();
  ::sigprocmask(SIG_UNBLOCK, &served, nullptr);
}

void conductor::serve_children() {
  for (;;) {
    int status = 0;
    const pid_t id = ::waitpid(-1, &status, WNOHANG | __WALL);
    if (id <= 0) return;
    if (WIFSTOPPED(status)) {
      // Only between `begin` and `done` of the end does a system call count.
      if (const pid_t caller = counter_.stopped(id, status)) {
        for (pair* one : pairs_) {
          for (const auto& process : one->processes_) {
            if (process.id != caller) continue;
            const auto& ends = one->map_.as<control>().ends;
            const auto counts = [&](role which) {
              return ends[static_cast<unsigned>(which)].counting.load(std::memory_order_seq_cst) == 1;
            };
            if (std::ranges::any_of(one->roles_of(process), counts)) ++one->syscalls_;
          }
        }
      }
      counter_.go_on(id, status);
      continue;
    }
    counter_.forget(id);
    for (pair* one : pairs_) {
      for (auto& process : one->processes_) {
        if (process.id != id) continue;
        process.alive = false;
        const bool well = one->ending_ && WIFEXITED(status) && WEXITSTATUS(status) == 0;
        if (!well) one->report_death(process, status);
      }
    }
  }
}

template <class There, class Late>
void conductor::wait_until(There&& there, Late&& late) {
  const auto deadline = std::chrono::steady_clock::now() + patience;
  while (!there()) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    if (left.count() <= 0) throw std::runtime_error{late()};
    pollfd watched[] = {{signals_.get(), POLLIN, 0}, {bell_.get(), POLLIN, 0}};
    ::poll(watched, 2, static_cast<int>(left.count()) + 1);
    std::uint64_t rung = 0;
    // Read before anything is looked at: what comes after the read rings again.
    [[maybe_unused]] const auto got = ::read(bell_.get(), &rung, sizeof rung);
    signalfd_siginfo signal{};
    while (::read(signals_.get(), &signal, sizeof signal) == static_cast<ssize_t>(sizeof signal)) {
      if (signal.ssi_signo != SIGCHLD) throw interrupted{static_cast<int>(signal.ssi_signo)};
    }
    serve_children();
  }
}

pair::pair(conductor& by, const subject& what, unsigned variant, const job& task, plant fault, std::string label)
    : by_{by},
      what_{what},
      label_{std::move(label)},
      task_{task},
      memory_{make_memory("strait-demo control", sizeof(control))},
      map_{memory_.get(), sizeof(control)},
      in_one_process_{task.memory == bench::memory::private_memory && what.in_any_memory && !alone(task.kind)} {
  static_assert(std::is_trivially_destructible_v<control>);
  auto& shared = *::new (static_cast<void*>(&map_.as<control>())) control;
  shared.kind = task.kind;
  shared.counted = task.counted;
  shared.message_bytes = static_cast<std::uint32_t>(task.message_bytes);
  shared.variant = variant;
  shared.cpus[0] = by.where_.producer;
  shared.cpus[1] = by.where_.consumer;
  what.name.copy(shared.subject, sizeof shared.subject - 1);
  shared.tsc = by.clock_.tsc();
  shared.ns_per_tick = by.clock_.ns_per_tick();
  shared.nonce = (static_cast<std::uint64_t>(::getpid()) << 40) ^ tick_clock::monotonic_ns();
  shared.fault = fault;
  shared.memory = task.memory;
  shared.conductor = ::getpid();

  by_.pairs_.push_back(this);
  try {
    // The conductor's own copies close at the end of this block: an end that dies is then seen as hung up.
    const link inherited = what.connect != nullptr ? what.connect(task) : link{};
    processes_.reserve(2);
    processes_.push_back({.which = role::producer});
    start(processes_.back(), inherited.producer);
    if (!alone(task.kind) && !in_one_process_) {
      processes_.push_back({.which = role::consumer});
      start(processes_.back(), inherited.consumer);
    }
    by_.wait_until([this] { return all_ready(); }, [this] { return waiting_for(0); });
  } catch (...) {
    end_all();
    throw;
  }
}

pair::~pair() {
  end_all();
}

void pair::end_all() noexcept {
  for (process& one : processes_) {
    if (!one.alive) continue;
    ::kill(one.id, SIGKILL);
    // Of a process that is traced each thread is ours to wait for, and the process has ended when all the others have.
    for (const pid_t thread : threads_of(one.id)) {
      if (thread != one.id) wait_for_end(thread);
    }
    wait_for_end(one.id);
    one.alive = false;
  }
  forget_names();
  std::erase(by_.pairs_, this);
}

void pair::forget_names() noexcept {
  if (what_.forget_names != nullptr) what_.forget_names(task_.memory, map_.as<control>().nonce);
}

void pair::start(process& one, const std::vector<descriptor>& inherited) {
  const descriptor memory = out_of_the_way(memory_.get());
  const descriptor bell = out_of_the_way(by_.bell_.get());
  std::vector<descriptor> moved;
  for (const descriptor& each : inherited) moved.push_back(out_of_the_way(each.get()));

  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, memory.get(), control_descriptor);
  ::posix_spawn_file_actions_adddup2(&actions, bell.get(), bell_descriptor);
  for (std::size_t i = 0; i < moved.size(); ++i) {
    ::posix_spawn_file_actions_adddup2(&actions, moved[i].get(), first_descriptor + static_cast<int>(i));
  }
  // A group of its own: Ctrl-C is the conductor's, which then ends the others in order.
  posix_spawnattr_t attributes;
  ::posix_spawnattr_init(&attributes);
  sigset_t none;
  ::sigemptyset(&none);
  ::posix_spawnattr_setsigmask(&attributes, &none);
  ::posix_spawnattr_setpgroup(&attributes, 0);
  ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETPGROUP);

  std::vector<std::string> arguments{"strait-demo", std::string{end_option}, std::string{role_name(one.which)}};
  std::vector<std::string> variables = environment(task_.counted == tally::allocations);
  auto argv = pointers(arguments);
  auto envp = pointers(variables);
  const int error = ::posix_spawn(&one.id, "/proc/self/exe", &actions, &attributes, argv.data(), envp.data());
  ::posix_spawnattr_destroy(&attributes);
  ::posix_spawn_file_actions_destroy(&actions);
  if (error != 0) throw std::system_error{error, std::system_category(), "cannot start " + who(one)};
  one.alive = true;
}

std::span<const role> pair::roles() const {
  static constexpr std::array both{role::producer, role::consumer};
  return std::span{both}.first(alone(task_.kind) ? 1 : 2);
}

std::span<const role> pair::roles_of(const process& one) const {
  return in_one_process_ ? roles() : std::span{&one.which, 1};
}

bool pair::all_ready() const {
  return std::ranges::all_of(roles(), [this](role which) {
    return map_.as<control>().ends[static_cast<unsigned>(which)].ready.load(std::memory_order_acquire) == 1;
  });
}

bool pair::all_finished(std::uint32_t round) const {
  return std::ranges::all_of(roles(), [this, round](role which) {
    // acquire: pairs with the release in end::finish_last; the report is read after this.
    return map_.as<control>().ends[static_cast<unsigned>(which)].finished.load(std::memory_order_acquire) == round;
  });
}

bool pair::all_ended() const {
  return std::none_of(processes_.begin(), processes_.end(), [](const process& one) { return one.alive; });
}

std::string pair::who(const process& one) const {
  return fmt::format("{}, {}", label_, role_name(one.which));
}

std::string pair::waiting_for(std::uint32_t round) const {
  std::string late;
  for (const role which : roles()) {
    const auto& report = map_.as<control>().ends[static_cast<unsigned>(which)];
    const bool there = round == 0 ? report.ready.load() == 1 : report.finished.load() == round;
    if (!there) late += fmt::format("{}{}", late.empty() ? "" : " and the ", role_name(which));
  }
  return fmt::format("{}: expected the {} to {} within {} s, found that it did not", label_, late,
                     round == 0 ? std::string{"be set up"} : fmt::format("finish round {}", round),
                     conductor::patience.count());
}

void pair::report_death(const process& one, int status) {
  const auto& ends = map_.as<control>().ends;
  const auto died = [&](const process& which, int how) {
    throw std::runtime_error{
        fmt::format("{}: expected it to run to the end, found it ended with {}", who(which), describe_status(how))};
  };
  if (WIFSIGNALED(status)) died(one, status);
  // Its peer may be what really went first: this one only saw a connection close.
  ::usleep(10'000);
  for (process& other : processes_) {
    int how = 0;
    if (!other.alive || ::waitpid(other.id, &how, WNOHANG | __WALL) != other.id || WIFSTOPPED(how)) continue;
    other.alive = false;
    if (WIFSIGNALED(how)) died(other, how);
  }
  const process* first = nullptr;
  for (const process& each : processes_) {
    const auto& report = ends[static_cast<unsigned>(each.which)];
    if (report.error[0] == '\0') continue;
    if (first == nullptr || report.error_ns < ends[static_cast<unsigned>(first->which)].error_ns) first = &each;
  }
  if (first == nullptr) died(one, status);
  throw std::runtime_error{
      fmt::format("{}: {}", who(*first), static_cast<const char*>(ends[static_cast<unsigned>(first->which)].error))};
}

void pair::play(const end::round& round) {
  auto& shared = map_.as<control>();
  shared.warm_up = round.warm_up;
  shared.messages = round.messages;
  shared.stamped = round.stamped;
  syscalls_ = 0;
  const std::uint32_t number = shared.round.load(std::memory_order_relaxed) + 1;
  // release: the ends read the numbers above after they see the round.
  shared.round.store(number, std::memory_order_release);
  ::syscall(SYS_futex, &shared.round, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  by_.wait_until([&] { return all_finished(number); }, [&] { return waiting_for(number); });
}

std::string pair::count_syscalls() {
  try {
    for (const process& one : processes_) by_.counter_.follow(one.id);
    return {};
  } catch (const std::system_error& refused) {
    return refused.what();
  }
}

void pair::finish() {
  auto& shared = map_.as<control>();
  ending_ = true;
  shared.over = 1;
  shared.round.fetch_add(1, std::memory_order_release);
  ::syscall(SYS_futex, &shared.round, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  by_.wait_until(
      [this] { return all_ended(); },
      [this] { return fmt::format("{}: expected both ends to close and exit, found that one did not", label_); });
}

double pair::stream_ns() const {
  const auto& ends = map_.as<control>().ends;
  const auto& last = alone(task_.kind) ? ends[0] : ends[1];
  return static_cast<double>(last.end_ns - ends[0].begin_ns);
}

double pair::ping_ns() const {
  const auto& report = map_.as<control>().ends[0];
  return static_cast<double>(report.end_ns - report.begin_ns);
}

std::vector<double> pair::samples() const {
  const auto& shared = map_.as<control>();
  std::vector<double> result;
  const std::size_t n = std::min<std::size_t>(shared.ends[0].samples, sample_limit);
  result.reserve(n);
  for (std::size_t i = 0; i < n; ++i) result.push_back(static_cast<double>(shared.samples[i]) * shared.ns_per_tick);
  return result;
}

std::uint64_t pair::allocations() const {
  const auto& ends = map_.as<control>().ends;
  return ends[0].allocations + ends[1].allocations;
}

std::uint64_t pair::load() const {
  return map_.as<control>().ends[0].load;
}

std::uint64_t pair::mimalloc_growth() const {
  const auto& ends = map_.as<control>().ends;
  return ends[0].mimalloc_growth + ends[1].mimalloc_growth;
}

int run_end(int argc, char** argv) {
  if (argc != 3 || argv[1] != end_option) return -1;
  const auto which = std::string_view{argv[2]} == "producer" ? role::producer : role::consumer;
  // An end never outlives its conductor, whatever ends that.
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  std::unique_ptr<mapping> map;
  try {
    map = std::make_unique<mapping>(control_descriptor, sizeof(control));
    if (map->as<control>().magic != control::magic_value) throw std::runtime_error{"foreign memory"};
  } catch (const std::exception&) {
    fmt::print(stderr,
               "strait-demo: {} is for strait-demo itself: expected its control block as descriptor {}, found none\n",
               end_option, control_descriptor);
    return 2;
  }
  auto& shared = map->as<control>();
  if (::getppid() != shared.conductor) return 1;  // it ended before we asked to be told
  end self{shared, which};
  try {
    const subject& what = subject_named(shared.subject);
    if (!what.pins_itself) pin_to(self.cpu());
    if (shared.counted == tally::allocations) check_allocation_counter();
    what.run(self);
    return 0;
  } catch (const std::exception& problem) {
    self.complain(problem.what());
    return 1;
  }
}

}  // namespace bench
