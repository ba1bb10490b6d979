// A GPU for one kernel, in C++ on the CPU: blocks run one after the other, the threads of a block
// as coroutines. Products of warp groups are computed as late as the kernel allows, when they are
// waited for, or at once, copies likewise. So a wait that is missing gives a wrong result.
//
// emulate.py puts this in front of a kernel and the functions below in the place of its assembly.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

typedef unsigned int u32;
typedef unsigned long long u64;
struct uint4 { u32 x, y, z, w; };
struct Index { u32 x, y, z; };

alignas(1024) static char memory[232448];  // shared memory
static Index blockIdx;

struct Copy { u32 to; const char* from; int size = 16; };

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  Index index;
  bool done, waited;
  std::vector<Copy> copies;  // not yet committed
  std::deque<std::vector<Copy>> groups;
};

static std::vector<Thread> threads;
static ucontext_t scheduler;
static int current;
#define threadIdx (threads[current].index)

static char failure[200];  // "" as long as all is well

// Ends the grid; a thread does not come back from here.
static void stop(const char* why) {
  snprintf(failure, sizeof failure, "block %u, thread %u: %s", blockIdx.x, threadIdx.x, why);
  swapcontext(&threads[current].context, &scheduler);
}

// All of `size` threads come here; the last does the work of all before any goes on.
struct Meeting { int count = 0; unsigned generation = 0; };
static unsigned progress;  // of all threads: how often one came to a meeting, or went on

template <class Work>
static void meet(Meeting& meeting, int size, Work work) {
  unsigned generation = meeting.generation;
  progress++;
  if (++meeting.count == size) {
    work();
    meeting.count = 0;
    meeting.generation++;
  } else {
    while (meeting.generation == generation) {
      int me = current;
      swapcontext(&threads[me].context, &scheduler);
    }
    progress++;
  }
}

static Meeting everyone;
inline void __syncwarp() {}  // instructions of a warp wait for all its lanes here anyway
inline void __syncthreads() { meet(everyone, (int)threads.size(), [] {}); }

// ---- copies -------------------------------------------------------------------------------------

static bool at_once;

// What another kernel wrote, which has ended when this one waited for it.
static const char *others_begin, *others_end;

inline void let_others_begin() {}
inline void wait_for_others() { threads[current].waited = true; }

static void require_waited(const char* from) {
  if (from >= others_begin && from < others_end && !threads[current].waited)
    stop("what another kernel writes is read before it was waited for");
}

// The operands of the kernel; nothing else is read.
static std::vector<std::pair<const char*, const char*>> operands;

static void require_inside(const char* from, int size) {
  for (const auto& [begin, end] : operands)
    if (from >= begin && from + size <= end) return;
  stop("what is read belongs to no operand");
}

inline u32 shared_address(const void* p) { return (u32)((const char*)p - memory); }

inline void copy16(u32 to, const char* from, int size = 16) {
  if (to % 16 || (uintptr_t)from % 16) stop("a copy of 16 bytes is not aligned");
  static const char zeros[16] = {};
  if (size == 0) from = zeros;
  else require_inside(from, size);
  require_waited(from);
  if (at_once) memcpy(memory + to, from, 16);
  else threads[current].copies.push_back({to, from});
}

inline void copy16_again(u32 to, const char* from, int size) { copy16(to, from, size); }
inline void prefetch(const void*) {}

inline void fill16(u32 to, u32 value) {
  for (int i = 0; i < 16; i += 4) memcpy(memory + to + i, &value, 4);
}

inline void commit_copies() {
  Thread& me = threads[current];
  me.groups.push_back(me.copies);
  me.copies.clear();
}

template <int PENDING>
inline void wait_copies() {
  Thread& me = threads[current];
  for (; (int)me.groups.size() > PENDING; me.groups.pop_front())
    for (const Copy& copy : me.groups.front()) memcpy(memory + copy.to, copy.from, copy.size);
}

inline uint4 load16(u32 from) {
  uint4 v;
  if (from % 16) stop("a load of 16 bytes is not aligned");
  memcpy(&v, memory + from, 16);
  return v;
}

inline u32 load4(u32 from) {
  u32 v;
  memcpy(&v, memory + from, 4);
  return v;
}

inline void copy4(u32 to, const char* from) {
  if (to % 4 || (uintptr_t)from % 4) stop("a copy of 4 bytes is not aligned");
  require_inside(from, 4);
  require_waited(from);
  if (at_once) memcpy(memory + to, from, 4);
  else threads[current].copies.push_back({to, from, 4});
}

inline void fill4(u32 to, u32 value) { memcpy(memory + to, &value, 4); }

inline uint4 fetch16(const char* from) {
  uint4 v;
  if ((uintptr_t)from % 16) stop("a fetch of 16 bytes is not aligned");
  require_inside(from, 16);
  memcpy(&v, from, 16);
  return v;
}

inline u32 fetch4(const char* from) {
  u32 v;
  require_inside(from, 4);
  memcpy(&v, from, 4);
  return v;
}

// ---- arithmetic ---------------------------------------------------------------------------------

inline float __uint_as_float(u32 bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline int __float_as_int(float f) {
  int bits;
  memcpy(&bits, &f, 4);
  return bits;
}
inline float __expf(float v) { return expf(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float v) { return fminf(fmaxf(v, 0.0f), 1.0f); }

static float half_value(unsigned short h) {
  int exponent = h >> 10 & 31, fraction = h & 1023;
  float size = exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
  return h >> 15 ? -size : size;
}

template <int SIZE>
static double element(const void* p) {
  const unsigned char* bytes = (const unsigned char*)p;
  return SIZE == 1 ? (double)(signed char)bytes[0] : (double)half_value(bytes[0] | bytes[1] << 8);
}

// ---- tensor cores: the PTX ISA, fragments of mma.sp.m16n8k64 (.s8) and m16n8k32 (.f16) ------------

// The 16 rows that a warp holds of A, with its zeros.
template <int SIZE>
static void expand(const uint4* a, const u32* e, int selector, double (*rows)[64]) {
  int nibbles[16][16] = {};
  for (int lane = 0; lane < 32; lane++) {
    int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; i++) {
      int said = e[lane] >> 4 * i & 15;
      if (SIZE == 1) nibbles[g + 8 * (t % 2)][8 * (t / 2) + i] = said;
      if (SIZE == 2 && t / 2 == selector) nibbles[g + 8 * (i / 4)][4 * (t % 2) + i % 4] = said;
    }
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 64; k++) rows[row][k] = 0;
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4 / SIZE; j++) {
        int row = lane / 4 + 8 * (i % 2), kept = (16 * (i / 2) + lane % 4 * 4) / SIZE + j;
        int said = nibbles[row][kept / 2];
        if ((said & 3) >= said >> 2) stop("metadata is not in order");
        int place = said >> 2 * (kept % 2) & 3;
        rows[row][kept / 2 * 4 + place] = element<SIZE>((const char*)(&a[lane].x + i) + j * SIZE);
      }
}

// The 16 rows that a warp holds of a dense A, 32 bytes of each.
template <int SIZE>
static void spread(const uint4* a, double (*rows)[64]) {
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4 / SIZE; j++)
        rows[lane / 4 + 8 * (i % 2)][(16 * (i / 2) + lane % 4 * 4) / SIZE + j] =
            element<SIZE>((const char*)(&a[lane].x + i) + j * SIZE);
}

struct Warp {
  Meeting meeting;
  u32 address[32], e[32];
  uint4 a[32], b[32];
  void* d[32];
};
static Warp warps[32];

inline void ldmatrix(uint4& v, u32 from) {
  Warp& warp = warps[threadIdx.x / 32];
  int lane = threadIdx.x % 32;
  warp.address[lane] = from;
  meet(warp.meeting, 32, [&] {
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++)
        (&warp.b[l].x)[i] = load4(warp.address[8 * i + l / 4] + l % 4 * 4);
  });
  v = warp.b[lane];
}

template <int SIZE, class SUM>
inline void mma_sparse(SUM (&d)[4], const uint4& a, const uint4& b, u32 e, int selector) {
  Warp& warp = warps[threadIdx.x / 32];
  int lane = threadIdx.x % 32;
  warp.a[lane] = a, warp.b[lane] = b, warp.e[lane] = e, warp.d[lane] = d;
  meet(warp.meeting, 32, [&] {
    double rows[16][64], columns[8][64];
    expand<SIZE>(warp.a, warp.e, selector, rows);
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4 / SIZE; j++)
          columns[l / 4][(16 * i + l % 4 * 4) / SIZE + j] =
              element<SIZE>((const char*)(&warp.b[l].x + i) + j * SIZE);
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) {
        double sum = 0;
        for (int k = 0; k < 64 / SIZE; k++)
          sum += rows[l / 4 + i / 2 * 8][k] * columns[l % 4 * 2 + i % 2][k];
        ((SUM*)warp.d[l])[i] += (SUM)sum;
      }
  });
}

// mma.m16n8k32 of bytes, dense.
inline void mma_words(int (&d)[4], const uint4& a, u32 b0, u32 b1) {
  Warp& warp = warps[threadIdx.x / 32];
  int lane = threadIdx.x % 32;
  warp.a[lane] = a, warp.b[lane] = {b0, b1, 0, 0}, warp.d[lane] = d;
  meet(warp.meeting, 32, [&] {
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) {
        int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2, sum = 0;
        for (int k = 0; k < 32; k++) {
          const u32* a_words = &warp.a[row % 8 * 4 + k % 16 / 4].x;
          const u32* b_words = &warp.b[column * 4 + k % 16 / 4].x;
          u32 left = a_words[row / 8 + k / 16 * 2], right = b_words[k / 16];
          sum += (signed char)(left >> k % 4 * 8) * (signed char)(right >> k % 4 * 8);
        }
        ((int*)warp.d[l])[i] += sum;
      }
  });
}

struct Product {
  u64 x;
  uint4 a[128];
  u32 e[128];
  const uint4* a_at[128];  // the registers, which have to hold the same when the product is done
  const u32* e_at[128];
  void* d[128];
  int selector, pixels;  // -1: A is dense
  bool add;  // to what d holds
};

struct WarpGroup {
  Meeting meeting;
  Product next;
  std::vector<Product> products;  // not yet committed
  std::deque<std::vector<Product>> groups;
};
static WarpGroup warp_groups[8];

inline u64 descriptor(u32 address) {
  return (u64)((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// x by a descriptor: 8 rows of 128 or 64 bytes together, swizzled by bits of the address.
template <int SIZE, class SUM>
static void multiply(const Product& p) {
  static double rows[64][64], columns[256][64];
  u32 start = (p.x & 0x3fff) << 4, further = (p.x >> 32 & 0x3fff) << 4;
  for (int t = 0; t < 128; t++)
    if (memcmp(p.a_at[t], p.a + t, 16) || (p.selector >= 0 && *p.e_at[t] != p.e[t]))
      stop("a register changed too early");
  int bytes = p.selector < 0 ? 32 : 64;  // along K
  u32 row_bytes = p.x >> 62 == 1 ? 128 : 64;
  if (p.x >> 62 != 1 && p.x >> 62 != 2) stop("a descriptor without a swizzle of 128 or 64 bytes");
  for (int warp = 0; warp < 4; warp++)
    if (p.selector < 0) spread<SIZE>(p.a + 32 * warp, rows + 16 * warp);
    else expand<SIZE>(p.a + 32 * warp, p.e + 32 * warp, p.selector, rows + 16 * warp);
  for (int n = 0; n < p.pixels; n++)
    for (int k = 0; k < bytes / SIZE; k++) {
      u32 at = start + n / 8 * further + n % 8 * row_bytes + k * SIZE;
      columns[n][k] = element<SIZE>(memory + (at ^ (at >> 7 & row_bytes / 16 - 1) << 4));
    }
  for (int t = 0; t < 128; t++)
    for (int i = 0; i < p.pixels / 2; i++) {
      int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + t % 4 * 2 + i % 2;
      double sum = 0;
      for (int k = 0; k < bytes / SIZE; k++) sum += rows[row][k] * columns[n][k];
      ((SUM*)p.d[t])[i] = (SUM)sum + (p.add ? ((SUM*)p.d[t])[i] : (SUM)0);
    }
}

template <int SIZE, class SUM, int TILES>
inline void wgmma_sparse(SUM (&d)[TILES][4], const uint4& a, const u32& e, u64 x, int selector, bool add) {
  WarpGroup& group = warp_groups[threadIdx.x / 128];
  int t = threadIdx.x % 128;
  Product& p = group.next;
  p.a[t] = a, p.e[t] = e, p.a_at[t] = &a, p.e_at[t] = &e, p.d[t] = d, p.x = x, p.selector = selector, p.pixels = 8 * TILES, p.add = add;
  meet(group.meeting, 128, [&] { group.products.push_back(group.next); });
}

static bool at_commit;  // when products are computed, if not when they are waited for

template <int SIZE, class SUM>
inline void wgmma_commit() {
  WarpGroup& group = warp_groups[threadIdx.x / 128];
  meet(group.meeting, 128, [&] {
    if (at_commit)
      for (const Product& p : group.products) multiply<SIZE, SUM>(p);
    else group.groups.push_back(group.products);
    group.products.clear();
  });
}

template <int SIZE, class SUM>
inline void wgmma_wait(int pending) {
  WarpGroup& group = warp_groups[threadIdx.x / 128];
  meet(group.meeting, 128, [&] {
    for (; (int)group.groups.size() > pending; group.groups.pop_front())
      for (const Product& p : group.groups.front()) multiply<SIZE, SUM>(p);
  });
}

// ---- the grid -----------------------------------------------------------------------------------

static void (*kernel)(void**);
static void** arguments;

static void run_thread() {
  kernel(arguments);
  threads[current].done = true;
  swapcontext(&threads[current].context, &scheduler);
}

// What is left of a warp, after one turn of each of its threads.
static int run_warp(int first, int count) {
  int left = 0;
  for (int i = first; i < first + 32 && i < count && !*failure; i++) {
    current = i;
    if (!threads[i].done) swapcontext(&scheduler, &threads[i].context);
    left += !threads[i].done;
  }
  return left;
}

// Warps take turns. With `together`, so many go on as far as they can without the others.
static void run_block(int count, bool backwards, int together) {
  memset(memory, 0x55, sizeof memory);
  everyone = Meeting();
  for (Warp& warp : warps) warp.meeting = Meeting();
  for (WarpGroup& group : warp_groups) group = WarpGroup();
  threads.clear();
  threads.resize(count);
  for (int i = 0; i < count; i++) {
    Thread& t = threads[i];
    t.index = {(u32)i, 0, 0};
    t.done = t.waited = false;
    t.stack.resize(1 << 16);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.data();
    t.context.uc_stack.ss_size = t.stack.size();
    t.context.uc_link = &scheduler;
    makecontext(&t.context, run_thread, 0);
  }
  int left = count;
  for (int rounds = 0; left && rounds < 1000000; rounds++) {
    left = 0;
    int some = together ? 32 * together : 32, turns = (count + some - 1) / some;
    for (int i = 0; i < turns; i++) {
      int first = (backwards ? turns - 1 - i : i) * some, rest;
      unsigned before;
      do {
        before = progress, rest = 0;
        for (int warp = first; warp < first + some && warp < count; warp += 32) {
          rest += run_warp(warp, count);
          if (*failure) return;
        }
      } while (together && rest && progress != before);
      left += rest;
    }
  }
  if (left) snprintf(failure, sizeof failure, "threads wait for others that never come");
}

// "" or what went wrong.
static const char* run_grid(void (*function)(void**), void** given, int blocks, int parts, int count,
                            bool eager) {
  at_once = eager;
  kernel = function;
  arguments = given;
  for (int part = 0; part < parts; part++)
    for (int block = 0; block < blocks && !*failure; block++) {
      blockIdx = {(u32)block, 0, (u32)part};
      at_commit = !eager && block % 2;
      run_block(count, block % 2, eager ? 1 : block % 2 * 4);  // a warp, or a warp group
    }
  return failure;
}
