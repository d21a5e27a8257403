#include "process.hpp"

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "count/count.hpp"

namespace bench {

descriptor::~descriptor() {
  if (fd_ >= 0) ::close(fd_);
}

descriptor descriptor::duplicate() const {
  return descriptor{checked(::fcntl(fd_, F_DUPFD_CLOEXEC, 0), "cannot duplicate a descriptor")};
}

int checked(int result, const char* attempt) {
  if (result < 0) throw std::system_error{errno, std::system_category(), attempt};
  return result;
}

descriptor make_memory(const char* label, std::size_t bytes) {
  descriptor memory{checked(::memfd_create(label, MFD_CLOEXEC), "cannot make shared memory")};
  // fallocate, not ftruncate: a full tmpfs is an error here instead of a SIGBUS in the middle of a round.
  checked(::fallocate(memory.get(), 0, 0, static_cast<off_t>(bytes)), "cannot allocate shared memory");
  return memory;
}

mapping::mapping(int fd, std::size_t bytes)
    : address_{::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0)}, bytes_{bytes} {
  if (address_ == MAP_FAILED) throw std::system_error{errno, std::system_category(), "cannot map shared memory"};
}

mapping::~mapping() {
  if (address_ != nullptr) ::munmap(address_, bytes_);
}

void relax(bool one_cpu) noexcept {
  if (one_cpu) {
    ::sched_yield();
  } else {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

end::end(control& shared, role which) noexcept
    : shared_{shared},
      report_{shared.ends[static_cast<unsigned>(which)]},
      role_{which},
      clock_{shared.tsc, shared.ns_per_tick} {}

void end::finish_last() noexcept {
  if (number_ == 0) {
    report_.ready.store(1, std::memory_order_release);
  } else {
    // release: the conductor reads the times and the samples after this.
    report_.finished.store(number_, std::memory_order_release);
  }
  const std::uint64_t one = 1;
  // The bell is not full before 2^64 rounds; a failed write would show as a round that never ends.
  [[maybe_unused]] const auto written = ::write(bell_descriptor, &one, sizeof one);
}

end::round end::next_round() {
  finish_last();
  for (;;) {
    const std::uint32_t next = shared_.round.load(std::memory_order_acquire);
    if (next != number_) {
      number_ = next;
      break;
    }
    ::syscall(SYS_futex, &shared_.round, FUTEX_WAIT, number_, nullptr, nullptr, 0);
  }
  if (shared_.over != 0) return {};
  report_.samples = 0;
  // Not in the first round: something must have come whole before.
  if (number_ == 2) fault_ = shared_.fault;
  if (!alone(shared_.kind)) {
    const end_report& other = shared_.ends[producing() ? 1 : 0];
    report_.arrived.store(number_, std::memory_order_release);
    while (other.arrived.load(std::memory_order_acquire) != number_) relax(one_cpu());
  }
  return {.warm_up = shared_.warm_up, .messages = shared_.messages, .stamped = shared_.stamped};
}

void end::begin() noexcept {
  if (shared_.counted == tally::allocations) {
    // In this order, and the other way round at the end: asking mimalloc is nothing that should be counted.
    report_.mimalloc_growth = mimalloc_committed();
    report_.allocations = allocations_so_far();
  }
  report_.counting.store(1, std::memory_order_seq_cst);
  report_.begin_ns = tick_clock::monotonic_ns();
}

void end::done() noexcept {
  report_.end_ns = tick_clock::monotonic_ns();
  report_.counting.store(0, std::memory_order_seq_cst);
  if (shared_.counted == tally::allocations) {
    report_.allocations = allocations_so_far() - report_.allocations;
    const std::uint64_t committed = mimalloc_committed();
    report_.mimalloc_growth = committed > report_.mimalloc_growth ? committed - report_.mimalloc_growth : 0;
  }
}

void end::report_time(std::uint64_t ns) noexcept {
  report_.begin_ns = 0;
  report_.end_ns = ns;
}

void end::pause_before_ping() const noexcept {
  // Some ten wake-ups long: the other end has answered, found nothing and gone to sleep well before.
  const timespec pause{.tv_sec = 0, .tv_nsec = 300'000};
  ::nanosleep(&pause, nullptr);
}

void end::complain(std::string_view what) noexcept {
  report_.error_ns = tick_clock::monotonic_ns();
  const std::size_t length = std::min(what.size(), sizeof report_.error - 1);
  std::memcpy(report_.error, what.data(), length);
  report_.error[length] = '\0';
}

}  // namespace bench
