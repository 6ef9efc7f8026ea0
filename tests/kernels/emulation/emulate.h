// Runs CUDA kernels on the CPU, a block at a time, its threads as fibers that switch at barriers only. It refuses a launch that no
// device takes, a barrier that not all threads reach, a race in shared memory or a read of it before a write, an index beyond it.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include "tensor.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(int64_t x_ = 1, int64_t y_ = 1, int64_t z_ = 1) : x(x_), y(y_), z(z_) {}
  int64_t count() const { return int64_t{x} * y * z; }
};

#define QEXP_DEVICE CPU
#define QEXP_MAX_BLOCKS 6  // so that small tensors already need the loop that goes on where a whole grid ended
#define QEXP_SHARED(type, name, size) const auto name = ::emulation::shared<type>(#name, size)
#define QEXP_DYNAMIC_SHARED(type, name) const auto name = ::emulation::dynamic_shared<type>(#name)
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __syncthreads() ::emulation::barrier(__LINE__)
#define threadIdx (::emulation::block->thread)
#define blockIdx (::emulation::block->index)
#define blockDim (::emulation::block->threads)
#define gridDim (::emulation::block->blocks)
using std::max;
using std::min;

// Saves the registers that a call keeps, and goes on where `to` was left.
extern "C" void emulation_switch(void** from, void* to);
asm(".text\n.weak emulation_switch\n.hidden emulation_switch\n.type emulation_switch,@function\nemulation_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\nmovq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n.size emulation_switch,.-emulation_switch\n");

namespace emulation {

constexpr size_t kStack = 128 << 10, kSharedLimit = 48 << 10;
constexpr int kRunning = 0, kEnded = -1;

struct Touched {  // an element of shared memory: when, counted in barriers, and by which thread
  int64_t written = -1, read = -1, counted = -1;
  int writer = -1, reader = -1;  // reader -2: several
};

struct Array {
  std::string name;
  std::unique_ptr<char[]> data;  // exactly as long as it is, so that AddressSanitizer sees what lies beyond
  size_t bytes = 0;
  std::vector<Touched> touched;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* at = nullptr;
  void* fake = nullptr;  // AddressSanitizer's own stack
  int line = kRunning;   // of the barrier it waits at
};

struct Block {
  dim3 thread, index, threads, blocks;
  std::vector<Fiber> fibers;
  std::map<std::string, Array> arrays;
  size_t dynamic = 0;
  int64_t barriers = 0;
  int current = 0;
  void *scheduler = nullptr, *scheduler_fake = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  std::function<void()> body;
};

inline Block the_block;
inline Block* const block = &the_block;
inline std::string failure;
inline std::mutex one_at_a_time;

template <class... A>
std::string text(const A&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

inline void fail(const std::string& why) {
  if (failure.empty()) failure = why;
}

inline void leave() {  // this fiber, for the scheduler
  Fiber& me = block->fibers[block->current];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&me.fake, block->scheduler_stack, block->scheduler_size);
#endif
  emulation_switch(&me.at, block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me.fake, &block->scheduler_stack, &block->scheduler_size);
#endif
}

inline void barrier(int line) {
  block->fibers[block->current].line = line;
  leave();
}

inline void run_body() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_size);
#endif
  block->body();
  block->fibers[block->current].line = kEnded;
  leave();
  std::abort();  // nobody goes on with a fiber that has ended
}

inline void resume(int64_t thread, bool first) {
  Fiber& f = block->fibers[thread];
  if (first) {  // returned to, the stack is then aligned as after a call
    auto** words = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(f.stack.get() + kStack) & ~uintptr_t{15}) - 8;
    std::memset(words, 0, 8 * sizeof(void*));
    words[6] = reinterpret_cast<void*>(&run_body);
    f.at = words;
  }
  block->current = static_cast<int>(thread);
  block->thread = dim3(thread % block->threads.x, thread / block->threads.x % block->threads.y,
                       thread / (int64_t{block->threads.x} * block->threads.y));
  f.line = kRunning;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block->scheduler_fake, f.stack.get(), kStack);
#endif
  emulation_switch(&block->scheduler, f.at);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block->scheduler_fake, nullptr, nullptr);
#endif
}

inline void run_block(bool backwards) {
  const int64_t n = block->threads.count();
  block->arrays.clear();
  block->barriers = 0;
  for (bool first = true;; first = false) {
    for (int64_t t = 0; t < n; ++t) resume(backwards ? n - 1 - t : t, first);
    const int line = block->fibers[0].line;
    for (int64_t t = 1; t < n; ++t)
      if (block->fibers[t].line != line)
        fail(text("thread 0 waits at line ", line, " and thread ", t, " at ", block->fibers[t].line, " (-1: it has ended)"));
    if (line == kEnded || !failure.empty()) return;
    ++block->barriers;
  }
}

enum class Access { read, write, count };

inline void touch(Array& a, int64_t i, Access access) {
  if (i < 0 || i >= static_cast<int64_t>(a.touched.size())) {
    std::fprintf(stderr, "CUDA emulation: %s[%ld] of %zu\n", a.name.c_str(), static_cast<long>(i), a.touched.size());
    std::abort();
  }
  Touched& t = a.touched[i];
  const int me = block->current;
  const int64_t now = block->barriers;
  const bool written = t.written == now && t.writer != me, read = t.read == now && t.reader != me;
  if (access == Access::read ? written || t.counted == now : access == Access::write ? written || read || t.counted == now : t.written == now)
    fail(text("race on ", a.name, "[", i, "]: threads ", me, ", ", t.writer, " and ", t.reader));
  if (access != Access::write && t.written < 0) fail(text(a.name, "[", i, "] is read before it is written"));
  if (access == Access::read) {
    t.reader = t.read == now && t.reader != me ? -2 : me;
    t.read = now;
  } else if (access == Access::write) {
    t.written = now;
    t.writer = me;
  } else {
    t.counted = now;
  }
}

template <class T>
struct Element {
  Array* array;
  int64_t i;

  T* at() const { return reinterpret_cast<T*>(array->data.get()) + i; }
  operator T() const {
    touch(*array, i, Access::read);
    return *at();
  }
  T operator=(T v) const {
    touch(*array, i, Access::write);
    return *at() = v;
  }
  T operator=(const Element& other) const { return *this = static_cast<T>(other); }
  Element(const Element&) = default;
  Element(Array* a, int64_t index) : array(a), i(index) {}
};

template <class T>
struct Shared {
  Array* array;
  int64_t begin = 0;

  Element<T> operator[](int64_t i) const { return {array, begin + i}; }
  Shared operator+(int64_t n) const { return {array, begin + n}; }
};

template <class T>
Shared<T> shared(const char* name, size_t n) {
  Array& a = block->arrays[name];
  if (!a.data) {
    a.name = name;
    a.bytes = n * sizeof(T);
    a.data.reset(new char[a.bytes]);
    a.touched.resize(n);
    size_t all = 0;
    for (const auto& [key, array] : block->arrays) all += array.bytes;
    if (all > kSharedLimit) fail(text(all, " bytes of shared memory"));
  }
  return {&a};
}

template <class T>
Shared<T> dynamic_shared(const char* name) {
  return shared<T>(name, block->dynamic / sizeof(T));
}

}  // namespace emulation

namespace qexp {

// As in device.cuh. QEXP_EMULATION_ORDER=backwards runs blocks and threads from the last to the first.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 blocks, dim3 threads, size_t shared_bytes, const Tensor&, A... arguments) {
  emulation::Block& b = emulation::the_block;
  static const char* order = std::getenv("QEXP_EMULATION_ORDER");
  const bool backwards = order && std::string(order) == "backwards";
  const std::lock_guard lock(emulation::one_at_a_time);
  const bool fits = blocks.count() > 0 && blocks.x <= INT32_MAX && blocks.y <= 65535 && blocks.z <= 65535;
  STD_TORCH_CHECK(fits, "CUDA emulation: a grid of ", blocks.x, " x ", blocks.y, " x ", blocks.z);
  STD_TORCH_CHECK(threads.count() >= 1 && threads.count() <= 256, "CUDA emulation: ", threads.count(), " threads per block");
  STD_TORCH_CHECK(shared_bytes <= emulation::kSharedLimit, "CUDA emulation: ", shared_bytes, " bytes of shared memory");
  b.blocks = blocks;
  b.threads = threads;
  b.dynamic = shared_bytes;
  b.fibers.resize(threads.count());
  b.body = [&] { kernel(static_cast<P>(arguments)...); };
  emulation::failure.clear();
  for (int64_t k = 0; k < blocks.count() && emulation::failure.empty(); ++k) {
    const int64_t i = backwards ? blocks.count() - 1 - k : k;
    b.index = dim3(i % blocks.x, i / blocks.x % blocks.y, i / (int64_t{blocks.x} * blocks.y));
    emulation::run_block(backwards);
  }
  if (!emulation::failure.empty()) b.fibers.clear();  // those that wait are given up
  STD_TORCH_CHECK(emulation::failure.empty(), "CUDA emulation: ", emulation::failure);
}

}  // namespace qexp

template <class T>
T atomicAdd(T* at, T v) {
  const T before = *at;
  *at = before + v;
  return before;
}

template <class T>
T atomicAdd(emulation::Shared<T> at, T v) {
  const auto e = at[0];
  emulation::touch(*e.array, e.i, emulation::Access::count);
  return atomicAdd(e.at(), v);
}
