// Two pipes, one a direction.
#include <fcntl.h>
#include <unistd.h>

#include "bytes.hpp"

namespace bench {
namespace {

link connect(const job& task) {
  int there[2];
  checked(::pipe2(there, O_CLOEXEC), "cannot make a pipe");
  descriptor there_out{there[0]};
  descriptor there_in{there[1]};
  int back[2];
  checked(::pipe2(back, O_CLOEXEC), "cannot make a pipe");
  descriptor back_out{back[0]};
  descriptor back_in{back[1]};
  // As large as an unprivileged process may have it; refused where the user's pipes are too many, and then it stays.
  if (task.kind == work::stream || task.kind == work::batch) ::fcntl(there[1], F_SETPIPE_SZ, 1 << 20);
  link both;
  both.producer.push_back(std::move(back_out));
  both.producer.push_back(std::move(there_in));
  both.consumer.push_back(std::move(there_out));
  both.consumer.push_back(std::move(back_in));
  return both;
}

void run(end& self) {
  with_message(self.message_bytes(), [&self]<class M>() { run_bytes<M>(self, self.fd(0), self.fd(1)); });
}

}  // namespace

subject pipe_subject() {
  return {.name = "pipe", .run = run, .connect = connect};
}

}  // namespace bench
