#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
// What ThreadSanitizer must not judge, because it cannot see into libstdc++.so:
//  - exception_ptr counts its references in there, so that the last owner's free looks unordered after another's read.
extern "C" const char* __tsan_default_suppressions() {
  return "race:std::__exception_ptr::exception_ptr::_M_release\n";
}
#endif
#endif
