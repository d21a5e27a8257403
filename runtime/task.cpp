module;
#include <cstddef>
#include <new>
#include <utility>
#ifdef STRAIT_MIMALLOC
#include <mimalloc.h>
#endif
module strait.task;

namespace strait {

constinit thread_local frame_heap* frame_heap::current_ = nullptr;

#ifdef STRAIT_MIMALLOC

void* frame_heap::make(std::size_t bytes) {
  // Whole steps, because it may be used again for any frame of that many.
  const std::size_t rounded = (bytes + step - 1) / step * step;
  void* const frame =
      current_ != nullptr ? mi_heap_malloc(static_cast<mi_heap_t*>(current_->heap_), rounded) : mi_malloc(rounded);
  if (frame == nullptr) throw std::bad_alloc{};
  return frame;
}

void frame_heap::destroy(void* frame) noexcept {
  mi_free(frame);
}

frame_heap::frame_heap() : heap_{mi_heap_new()}, before_{current_} {
  if (heap_ == nullptr) throw std::bad_alloc{};
  current_ = this;
}

frame_heap::~frame_heap() {
  current_ = before_;
  for (size_class& kept : kept_) {
    while (kept.first != nullptr) destroy(std::exchange(kept.first, kept.first->next));
  }
  // Frames that still live move to the thread's own heap.
  mi_heap_delete(static_cast<mi_heap_t*>(heap_));
}

#else

void* frame_heap::make(std::size_t bytes) {
  return ::operator new(bytes);
}
void frame_heap::destroy(void* frame) noexcept {
  ::operator delete(frame);
}
// Nothing is kept: whoever builds without mimalloc wants a sanitizer to see every frame.
frame_heap::frame_heap() = default;
frame_heap::~frame_heap() = default;

#endif

}  // namespace strait
