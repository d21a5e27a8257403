module;
#include <string>
#include <system_error>
module strait.error;

namespace strait {
namespace {

class category final : public std::error_category {
 public:
  const char* name() const noexcept override { return "strait"; }

  std::string message(int value) const override {
    switch (static_cast<errc>(value)) {
      case errc::closed:
        return "the other end of the channel closed";
      case errc::peer_died:
        return "the process at the other end of the channel died";
      case errc::corrupt:
        return "the channel's shared memory holds a value that no correct peer writes";
      case errc::unknown_scheme:
        return "unknown memory scheme";
      case errc::bad_name:
        return "not a usable channel name";
      case errc::bad_capacity:
        return "not a usable capacity";
      case errc::foreign_segment:
        return "not a strait segment";
      case errc::truncated_segment:
        return "the segment is shorter than its header says";
      case errc::version_mismatch:
        return "the segment has another layout version";
      case errc::layout_mismatch:
        return "the segment was made with another layout or other options";
      case errc::type_mismatch:
        return "the segment carries another message type";
      case errc::end_in_use:
        return "a living end is in the way";
      case errc::no_space:
        return "not enough memory for the segment";
      case errc::no_barrier:
        return "the kernel refuses the channel's memory barrier";
      case errc::no_hub:
        return "no hub to resume the waiting coroutine";
      case errc::no_permission:
        return "no permission to use the segment";
      case errc::inherited:
        return "the channel's end belongs to the parent process";
    }
    return "unknown strait error " + std::to_string(value);
  }

  std::error_condition default_error_condition(int value) const noexcept override {
    if (static_cast<errc>(value) == errc::no_permission) return std::errc::permission_denied;
    return {value, *this};
  }
};

}  // namespace

const std::error_category& error_category() noexcept {
  static const category instance;
  return instance;
}

void fail(errc e, const std::string& what) {
  throw std::system_error{make_error_code(e), what};
}

void fail_errno(int error, const std::string& what) {
  throw std::system_error{error, std::system_category(), what};
}

}  // namespace strait
