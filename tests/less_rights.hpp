#pragma once
/// What a process, or a thread of it, gives up for good: to see what strait does without.
#include <doctest/doctest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <array>
#include <cstddef>
#include <cstdint>

namespace test {

inline constexpr ::uid_t nobody = 65534;

/// Has this process, which is root's, be nobody's: other rights than its parent's, and no CAP_SYS_NICE.
inline void become_nobody() {
  REQUIRE(::setresgid(nobody, nobody, nobody) == 0);
  REQUIRE(::setresuid(nobody, nobody, nobody) == 0);
  REQUIRE(::prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);  // the change of the user has forgotten it
}

/// From here on the kernel answers this system call with that errno, to this thread and what it starts.
inline void refuse_call(long call, int error) {
  std::array filter{
      ::sock_filter BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(::seccomp_data, nr)),
      ::sock_filter BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<std::uint32_t>(call), 0, 1),
      ::sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | static_cast<std::uint32_t>(error)),
      ::sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const ::sock_fprog program{filter.size(), filter.data()};
  REQUIRE(::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
  REQUIRE(::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
}

}  // namespace test
