module;
#include <cstddef>
#include <new>
#include <utility>
#ifdef STRAIT_MIMALLOC
#include <mimalloc.h>
#endif
module strait.task;

namespace strait {

#ifdef STRAIT_MIMALLOC

namespace {
thread_local mi_heap_t* heap_of_thread = nullptr;
}

void* allocate_frame(std::size_t bytes) {
  void* frame = heap_of_thread != nullptr ? mi_heap_malloc(heap_of_thread, bytes) : mi_malloc(bytes);
  if (frame == nullptr) throw std::bad_alloc{};
  return frame;
}

void free_frame(void* frame) noexcept {
  mi_free(frame);
}

frame_heap::frame_heap() : heap_{mi_heap_new()}, before_{heap_of_thread} {
  if (heap_ == nullptr) throw std::bad_alloc{};
  heap_of_thread = static_cast<mi_heap_t*>(heap_);
}

frame_heap::~frame_heap() {
  heap_of_thread = static_cast<mi_heap_t*>(before_);
  // Frames that still live move to the thread's own heap.
  mi_heap_delete(static_cast<mi_heap_t*>(heap_));
}

#else

void* allocate_frame(std::size_t bytes) {
  return ::operator new(bytes);
}
void free_frame(void* frame) noexcept {
  ::operator delete(frame);
}
frame_heap::frame_heap() = default;
frame_heap::~frame_heap() = default;

#endif

}  // namespace strait
