module;
#include <cstdio>
#include <cstdlib>
#include <string>
#include <system_error>
module strait.channel;

import strait.error;

namespace strait {

#ifndef NDEBUG
void single_user::two_users() noexcept {
  std::fputs("strait: a channel handle was used by two threads at the same time; expected one\n", stderr);
  std::abort();
}
#endif

void report(news why, std::error_code* error, const std::string& channel) {
  if (why == news::none) {
    if (error != nullptr) error->clear();
    return;
  }
  const std::error_code code = make_error_code(to_errc(why));
  if (error == nullptr) throw std::system_error{code, channel};
  *error = code;
}

}  // namespace strait
