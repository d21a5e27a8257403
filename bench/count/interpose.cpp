// A malloc that counts: preloaded (LD_PRELOAD) into the ends whose allocations are counted, before every other library,
// mimalloc included. Each entry point counts once and hands on to the next library's, so it does not change who
// allocates. Built as C++ without exceptions, RTTI or a single allocation of its own.
#include <dlfcn.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

std::atomic<std::uint64_t> allocations{0};

// One allocation may pass several entry points (operator new of libstdc++ calls malloc): only the outermost counts.
// initial-exec: the usual way to a thread's variable may itself allocate.
__attribute__((tls_model("initial-exec"))) thread_local unsigned depth = 0;

struct counted {
  counted() noexcept {
    if (depth++ == 0) allocations.fetch_add(1, std::memory_order_relaxed);
  }
  ~counted() { --depth; }
  counted(const counted&) = delete;
  counted& operator=(const counted&) = delete;
};

// dlsym may allocate before malloc is found. Those few bytes come from here and are never given back.
alignas(16) std::byte first_bytes[16384];
std::size_t first_used = 0;
thread_local bool looking __attribute__((tls_model("initial-exec"))) = false;

void* from_first_bytes(std::size_t size) noexcept {
  const std::size_t rounded = (size + 15) & ~std::size_t{15};
  if (first_used + rounded > sizeof first_bytes) __builtin_trap();
  void* result = first_bytes + first_used;
  first_used += rounded;
  return result;
}

bool is_first(const void* block) noexcept {
  const auto* byte = static_cast<const std::byte*>(block);
  return byte >= first_bytes && byte < first_bytes + sizeof first_bytes;
}

template <class Function>
Function next(std::atomic<void*>& cache, const char* name) noexcept {
  void* found = cache.load(std::memory_order_relaxed);
  if (found == nullptr) {
    looking = true;
    found = ::dlsym(RTLD_NEXT, name);
    looking = false;
    if (found == nullptr) __builtin_trap();
    cache.store(found, std::memory_order_relaxed);
  }
  Function function;
  std::memcpy(&function, &found, sizeof function);
  return function;
}

}  // namespace

extern "C" std::uint64_t strait_bench_allocations() {
  return allocations.load(std::memory_order_relaxed);
}

// FORWARD(result, name, parameters, arguments): counts, then calls the next library's function of that name.
#define FORWARD(result, name, parameters, arguments)           \
  extern "C" result name parameters {                          \
    static std::atomic<void*> cache{nullptr};                  \
    const counted count;                                       \
    return next<result(*) parameters>(cache, #name) arguments; \
  }

extern "C" void* malloc(std::size_t size) {
  static std::atomic<void*> cache{nullptr};
  if (looking) return from_first_bytes(size);
  const counted count;
  return next<void* (*)(std::size_t)>(cache, "malloc")(size);
}
extern "C" void* calloc(std::size_t n, std::size_t size) {
  static std::atomic<void*> cache{nullptr};
  if (looking) return from_first_bytes(n * size);
  const counted count;
  return next<void* (*)(std::size_t, std::size_t)>(cache, "calloc")(n, size);
}
extern "C" void* realloc(void* block, std::size_t size) {
  static std::atomic<void*> cache{nullptr};
  const counted count;
  if (is_first(block)) {
    void* moved = malloc(size);
    const auto rest = static_cast<std::size_t>(first_bytes + sizeof first_bytes - static_cast<std::byte*>(block));
    std::memcpy(moved, block, size < rest ? size : rest);
    return moved;
  }
  return next<void* (*)(void*, std::size_t)>(cache, "realloc")(block, size);
}
extern "C" void free(void* block) {
  static std::atomic<void*> cache{nullptr};
  if (is_first(block)) return;
  next<void (*)(void*)>(cache, "free")(block);
}

FORWARD(int, posix_memalign, (void** out, std::size_t alignment, std::size_t size), (out, alignment, size))
FORWARD(void*, aligned_alloc, (std::size_t alignment, std::size_t size), (alignment, size))
FORWARD(void*, memalign, (std::size_t alignment, std::size_t size), (alignment, size))
FORWARD(void*, valloc, (std::size_t size), (size))
FORWARD(void*, reallocarray, (void* block, std::size_t n, std::size_t size), (block, n, size))

// operator new and its kin, by their mangled names, so that this file replaces none for itself.
struct nothrow_tag;
FORWARD(void*, _Znwm, (std::size_t size), (size))
FORWARD(void*, _Znam, (std::size_t size), (size))
FORWARD(void*, _ZnwmRKSt9nothrow_t, (std::size_t size, const nothrow_tag& tag), (size, tag))
FORWARD(void*, _ZnamRKSt9nothrow_t, (std::size_t size, const nothrow_tag& tag), (size, tag))
FORWARD(void*, _ZnwmSt11align_val_t, (std::size_t size, std::size_t alignment), (size, alignment))
FORWARD(void*, _ZnamSt11align_val_t, (std::size_t size, std::size_t alignment), (size, alignment))

// mimalloc called by its own names, as strait's coroutine frames and message storage do. Where mimalloc is not linked
// nobody calls these.
struct mi_heap;
FORWARD(void*, mi_malloc, (std::size_t size), (size))
FORWARD(void*, mi_malloc_small, (std::size_t size), (size))
FORWARD(void*, mi_zalloc, (std::size_t size), (size))
FORWARD(void*, mi_zalloc_small, (std::size_t size), (size))
FORWARD(void*, mi_calloc, (std::size_t n, std::size_t size), (n, size))
FORWARD(void*, mi_mallocn, (std::size_t n, std::size_t size), (n, size))
FORWARD(void*, mi_realloc, (void* block, std::size_t size), (block, size))
FORWARD(void*, mi_malloc_aligned, (std::size_t size, std::size_t alignment), (size, alignment))
FORWARD(void*, mi_zalloc_aligned, (std::size_t size, std::size_t alignment), (size, alignment))
FORWARD(void*, mi_aligned_alloc, (std::size_t alignment, std::size_t size), (alignment, size))
FORWARD(void*, mi_new, (std::size_t size), (size))
FORWARD(void*, mi_new_n, (std::size_t n, std::size_t size), (n, size))
FORWARD(void*, mi_new_aligned, (std::size_t size, std::size_t alignment), (size, alignment))
FORWARD(void*, mi_new_nothrow, (std::size_t size), (size))
FORWARD(void*, mi_new_aligned_nothrow, (std::size_t size, std::size_t alignment), (size, alignment))
FORWARD(void*, mi_heap_malloc, (mi_heap * heap, std::size_t size), (heap, size))
FORWARD(void*, mi_heap_malloc_small, (mi_heap * heap, std::size_t size), (heap, size))
FORWARD(void*, mi_heap_zalloc, (mi_heap * heap, std::size_t size), (heap, size))
FORWARD(void*, mi_heap_calloc, (mi_heap * heap, std::size_t n, std::size_t size), (heap, n, size))
FORWARD(void*, mi_heap_mallocn, (mi_heap * heap, std::size_t n, std::size_t size), (heap, n, size))
FORWARD(void*, mi_heap_realloc, (mi_heap * heap, void* block, std::size_t size), (heap, block, size))
FORWARD(void*, mi_heap_malloc_aligned, (mi_heap * heap, std::size_t size, std::size_t alignment),
        (heap, size, alignment))
FORWARD(void*, mi_heap_zalloc_aligned, (mi_heap * heap, std::size_t size, std::size_t alignment),
        (heap, size, alignment))
FORWARD(void*, mi_heap_alloc_new, (mi_heap * heap, std::size_t size), (heap, size))
FORWARD(void*, mi_heap_alloc_new_n, (mi_heap * heap, std::size_t n, std::size_t size), (heap, n, size))
