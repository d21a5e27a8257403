module;
#include <string>
#include <system_error>
export module strait.error;

/// What can go wrong, as values of one category. Every room throws or returns these; none invents its own.
export namespace strait {

/// Errors of category "strait". Errors that the kernel reports keep their own errno in `std::system_category()`.
enum class errc {
  /// The other end closed: nothing can be sent any more.
  closed = 1,
  /// The other end's process died without closing. Reported once; the next operation waits for a replacement.
  peer_died,
  /// A word in shared memory held a value that no correct peer writes. The channel is poisoned for good.
  corrupt,
  /// The memory scheme before the colon is not one of ours.
  unknown_scheme,
  /// The name is empty, too long or holds a slash.
  bad_name,
  /// The capacity is zero or beyond what the memory can hold.
  bad_capacity,
  /// The object under that name is not a strait segment.
  foreign_segment,
  /// The segment is shorter than its header says.
  truncated_segment,
  /// The segment was made by another layout version of strait.
  version_mismatch,
  /// The segment was made with another layout or other options.
  layout_mismatch,
  /// The segment carries another message type.
  type_mismatch,
  /// A living end already holds this role, or lives in the channel that is to be removed.
  end_in_use,
  /// The memory is not large enough for the segment.
  no_space,
  /// The kernel refuses the barrier that the channel was created with.
  no_barrier,
  /// A coroutine waits where no hub can be found to resume it.
  no_hub,
  /// This user may not read and write the segment, or not take a leftover's name away. Equals
  /// `std::errc::permission_denied`.
  no_permission,
  /// This process is a child, made by fork, of the one that opened the end.
  inherited,
};

/// The category of `errc`; its name is "strait".
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
[[nodiscard]] const std::error_category& error_category() noexcept;

/// Makes `std::error_code e = strait::errc::closed;` work.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
[[nodiscard]] inline std::error_code make_error_code(errc e) noexcept {
  return {static_cast<int>(e), error_category()};
}

/// Throws `std::system_error` with `e` and a sentence that names what was expected and what was found.
///
/// Waits: never. Allocates: the exception. Errors: that one. Complexity: linear in the sentence.
[[noreturn]] void fail(errc e, const std::string& what);

/// Throws `std::system_error` with the given errno and a sentence that names what was attempted.
///
/// Waits: never. Allocates: the exception. Errors: that one. Complexity: linear in the sentence.
[[noreturn]] void fail_errno(int error, const std::string& what);

}  // namespace strait

export template <>
struct std::is_error_code_enum<strait::errc> : std::true_type {};
