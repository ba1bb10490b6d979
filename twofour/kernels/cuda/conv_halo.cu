// A convolution whose weight is 2:4 along its input channels, on Hopper's sparse tensor cores, or dense, on
// its others, for a window that steps by one: x is copied with its halo, once for all taps.
//
//   y^T [N, cells] = sum over taps of w[tap] [N, C] x^T [C, cells moved on by the tap]
//
// Cells are the pixels of x with the padding between them: rows of PITCH cells, IMAGE_LINES rows an image, the
// padding in front of a row and above an image. What is behind a row is the padding of the next one, so
// a tap lies the same number of cells further for each pixel. A block computes BM channels of BN cells
// that follow each other; of those that no pixel of y belongs to, nothing is stored.
//
// A block goes along the channels in chunks, with all taps of each, while the next chunk is copied. A
// chunk lies in shared memory as PLANES of ROW bytes for each cell, 16-byte pieces swizzled by bits of the
// address as Hopper's tensor cores want it: a tap is the same operand some rows further. A product has
// one tap, its cells are the pixels, and all channels are one chunk. The weight comes in records, see conv_sparse.py: from global memory, or it is HELD by the block
// for all its parts of y, in shared memory or, if it is DIRECT, too, in registers. The residual comes by
// shared memory, and y goes by it, so that they move in pieces of 16 bytes.
//
// conv_halo.py writes the constants (in capitals) and the instructions in front of this.

#include "conv_copies.cu"

#include "conv_ends.cu"

#include "conv_weight.cu"

// Of the part of y at hand. Channels go fastest, so that blocks that run together read the same cells.
#define CHANNEL_BLOCK (part % CHANNEL_BLOCKS)
#define CELL_BLOCK (part / CHANNEL_BLOCKS)

constexpr int KH = TAPS / KW;
constexpr int CELLS = BN + (KH - 1) * DILATION_H * PITCH + (KW - 1) * DILATION_W;
constexpr int PLANE = (CELLS * ROW + 1023) / 1024 * 1024, BUFFER = PLANES * PLANE;
constexpr int TAP_HALVES = ROW / 64, HALVES = PLANES * TAPS * TAP_HALVES, CHUNK_STEPS = (HALVES + 1) / 2;
constexpr int WEIGHT = BM / 16 * RECORD;  // bytes of a step
static_assert(ROW == 128 || STEPS == CHUNK_STEPS, "a chunk of 64 bytes is the only one");
static_assert(CHUNK_STEPS % 3 == 0 || STEPS == CHUNK_STEPS, "registers go round in a chunk");
static_assert(!X_FLAT || CELLS == BN, "cells are pixels");

// The pixel of y that a cell is the first of, PIXELS for none.
__device__ __forceinline__ int pixel_at(int cell) {
  if (X_FLAT) return cell < PIXELS ? cell : PIXELS;
  int image = cell / (IMAGE_LINES * PITCH), rest = cell % (IMAGE_LINES * PITCH), oh = rest / PITCH, ow = rest % PITCH;
  bool is_one = image < IMAGES && oh < OH && ow < OW;
  return is_one ? (image * OH + oh) * OW + ow : PIXELS;
}

// Where a cell's first channel lies in x, in pieces of 16 bytes; -1 for padding.
__device__ __forceinline__ int place_of(u32 cell) {
  constexpr u32 IMAGE = IMAGE_LINES * PITCH;
  constexpr long long IMAGE_PIECES = ES * X_IMAGE / 16, ROW_PIECES = ES * X_ROW / 16;
  constexpr int PIXEL_PIECES = ES * X_PIXEL / 16;
  if (X_FLAT) return cell < PIXELS ? cell * PIXEL_PIECES : -1;
  u32 image = cell / IMAGE, rest = cell % IMAGE;
  int ih = (int)(rest / PITCH) - PAD_TOP, iw = (int)(rest % PITCH) - PAD_LEFT;
  if (image >= IMAGES || (u32)ih >= H || (u32)iw >= W) return -1;
  return image * IMAGE_PIECES + ih * ROW_PIECES + iw * PIXEL_PIECES;
}

// Of all cells of a part: once for all of their pieces, for the divisions take longer than the copies.
__device__ __forceinline__ void find_places(int* places, int part) {
  for (int i = threadIdx.x; i < CELLS; i += THREADS) places[i] = place_of(CELL_BLOCK * BN + i);
}

__device__ __forceinline__ void copy_chunk(const char* x, u32 buffer, const int* places, int chunk) {
  constexpr int PIECES = PLANES * ROW / 16, TOGETHER = THREADS / PIECES;
  static_assert(THREADS % PIECES == 0, "threads copy whole cells");
  int piece = threadIdx.x % PIECES, first = threadIdx.x / PIECES;
  x += (chunk * PIECES + piece) * 16;
  buffer += piece / 8 * PLANE;
#pragma unroll 4
  for (int row = first; row < CELLS; row += TOGETHER) {
    int place = places[row], phase = TOGETHER % 8 == 0 ? first : row;
    u32 to = buffer + row * ROW + (((piece & 7) ^ (ROW == 128 ? phase & 7 : phase >> 1 & 3)) << 4);
    if (PADDING != 0 && place < 0) fill16(to, PADDING);
    else copy16(to, place < 0 ? x : x + place * 16ll, place < 0 ? 0 : 16);
  }
}

// Eight rows, then the next eight.
__device__ __forceinline__ u64 rows_from(u32 address) {
  return (u64)((address & 0x3ffff) >> 4) | 1ull << 16 | (u64)(ROW * 8 >> 4) << 32 | (ROW == 128 ? 1ull : 2ull) << 62;
}

// x as the product of a chunk with that number takes it, from the chunk's first cell.
__device__ __forceinline__ constexpr int half_at(int half) {
  int tap = half / TAP_HALVES % TAPS, plane = half / TAP_HALVES / TAPS;
  return plane * PLANE + (tap / KW * DILATION_H * PITCH + tap % KW * DILATION_W) * ROW + half % TAP_HALVES * 64;
}

// 64 bytes of a tap's channels: one instruction of sparse tensor cores, two of others. They begin the sums, or
// add to them.
template <int HALF, int TILES_N>
__device__ __forceinline__ void multiply(SUM (&acc)[TILES_N][4], const uint4 (&a)[QUADS], const u32 (&e)[2], u64 rows,
                                         bool add) {
#if QUADS == 4
  wgmma_dense(acc, a[2 * HALF], rows, add);
  wgmma_dense(acc, a[2 * HALF + 1], rows + (32 >> 4), true);
#else
  if (HALF == 0) wgmma_sparse_0(acc, a[0], e[0], rows, add);
  else wgmma_sparse_1(acc, a[1], e[1], rows, add);
#endif
}

// ---- y and its residual ---------------------------------------------------------------------------

// A row for each column of the block, its channels side by side; 16 bytes more keep banks apart.
constexpr int Y_PITCH = BM * sizeof(Y_TYPE) + 16, R_PITCH = BM * sizeof(R_TYPE) + 16;
constexpr bool IN_PLACE = HAS_R && sizeof(R_TYPE) == sizeof(Y_TYPE);
constexpr int Y_BYTES = BN * Y_PITCH, R_BYTES = HAS_R && !IN_PLACE ? BN * R_PITCH : 0;

__device__ __forceinline__ void copy_residual(const Ends& ends, char* rows, const int* pixels, int first) {
  constexpr int WIDE = 16 / sizeof(R_TYPE), PIECES = BM / WIDE;
  for (int i = threadIdx.x; i < BN * PIECES; i += THREADS) {
    int column = i / PIECES, pixel = pixels[column], channel = first + i % PIECES * WIDE;
    if (pixel >= PIXELS || channel >= N) continue;
    const R_TYPE* from = ends.r + offset(pixel, R_IMAGE, R_ROW, R_PIXEL, R_FLAT) + channel;
    char* to = rows + column * R_PITCH + i % PIECES * 16;
    if (R_ALIGNED % WIDE == 0) copy16(shared_address(to), (const char*)from);
    else
      for (int j = 0; j < WIDE && channel + j < N; j++) ((R_TYPE*)to)[j] = from[j];
  }
}

// Brings the residual of a part nearer, into the L2 cache.
__device__ __forceinline__ void prefetch_residual(const Ends& ends, int part) {
  constexpr int LINE = 128 / sizeof(R_TYPE), LINES = (BM + LINE - 1) / LINE;
  for (int i = threadIdx.x; i < BN * LINES; i += THREADS) {
    int pixel = pixel_at(CELL_BLOCK * BN + i / LINES), channel = CHANNEL_BLOCK * BM + i % LINES * LINE;
    if (pixel < PIXELS && channel < N)
      prefetch(ends.r + offset(pixel, R_IMAGE, R_ROW, R_PIXEL, R_FLAT) + channel);
  }
}

__device__ __forceinline__ void store_y(const Ends& ends, const char* rows, const int* pixels, int first) {
  constexpr int WIDE = 16 / sizeof(Y_TYPE), PIECES = BM / WIDE;
  for (int i = threadIdx.x; i < BN * PIECES; i += THREADS) {
    int column = i / PIECES, pixel = pixels[column], channel = first + i % PIECES * WIDE;
    if (pixel >= PIXELS || channel >= N) continue;
    const char* from = rows + column * Y_PITCH + i % PIECES * 16;
    Y_TYPE* to = ends.y + offset(pixel, Y_IMAGE, Y_ROW, Y_PIXEL, Y_FLAT) + channel;
    if (Y_ALIGNED % WIDE == 0) *(uint4*)to = *(const uint4*)from;
    else
      for (int j = 0; j < WIDE && channel + j < N; j++) to[j] = ((const Y_TYPE*)from)[j];
  }
}

// The sums of a thread: RUN channels side by side, of the columns from `column`, two of each eight.
template <int TILES_N>
__device__ __forceinline__ void finish_tile(const SUM (&acc)[TILES_M][TILES_N][4], const Ends& ends,
                                            const float (&scales)[2 * TILES_M], const float (&biases)[2 * TILES_M],
                                            const float (&numbers)[5], const int* pixels, char* y_rows,
                                            const char* r_rows, int channel, int column) {
  constexpr int RUN = 2 * TILES_M;
#pragma unroll
  for (int n = 0; n < TILES_N; n++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int of = column + n * 8 + i;
      float v[RUN], row_scale = 1.0f;
      if (BY_ROWS && pixels[of] < PIXELS) row_scale = ends.row_scales[pixels[of]];
      Run<R_TYPE, RUN> before = {};
      if (HAS_R) before = *(const Run<R_TYPE, RUN>*)(r_rows + of * R_PITCH + channel * sizeof(R_TYPE));
#pragma unroll
      for (int m = 0; m < TILES_M; m++)
        v[2 * m] = (float)acc[m][n][i], v[2 * m + 1] = (float)acc[m][n][2 + i];
      *(Run<Y_TYPE, RUN>*)(y_rows + of * Y_PITCH + channel * sizeof(Y_TYPE)) =
          finished(v, scales, biases, numbers, before, row_scale);
    }
}

// ---- the block ------------------------------------------------------------------------------------

constexpr bool SAME_CHANNELS = HELD || CHANNEL_BLOCKS == 1;  // of all parts of a block
constexpr bool IN_REGISTERS = HELD && DIRECT, IN_SHARED = HELD && !DIRECT;
constexpr int WEIGHT_BYTES = IN_SHARED ? STEPS * WEIGHT : 0, SETS = IN_REGISTERS ? STEPS : 3;
static_assert(!IN_REGISTERS || STEPS == CHUNK_STEPS, "each step has its registers");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) SYMBOL(PARAMETERS) {
  extern __shared__ __align__(1024) char memory[];
  let_others_begin();
  u32 buffer = shared_address(memory), other = buffer + BUFFER, weights = other + BUFFER;
  char *y_rows = memory + 2 * BUFFER + WEIGHT_BYTES, *r_rows = IN_PLACE ? y_rows : y_rows + Y_BYTES;
  int *pixels = (int*)(y_rows + Y_BYTES + R_BYTES), *places = pixels + BN;  // of the part's columns, of cells
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, record = warp / 4 * TILES_M * 4 + warp % 4;
  int channel = warp * TILES_M * 16 + lane / 4 * 2 * TILES_M, column = lane % 4 * 2;
  int part = blockIdx.x;
  const Ends ends = ENDS;
  // Where the block holds it, all its parts have the same channels: WORKERS is a multiple of CHANNEL_BLOCKS.
  uint4 a[SETS][TILES_M][QUADS];
  u32 e[SETS][TILES_M][2];
  const char* records = w + ((long long)CHANNEL_BLOCK * (BM / 16) + record) * RECORD;
  if (IN_REGISTERS)
#pragma unroll
    for (int step = 0; step < SETS; step++) fetch_weight(a[step], e[step], records);
  if (IN_SHARED)
    for (int i = threadIdx.x; i < STEPS * WEIGHT / 16; i += THREADS) {
      int step = i / (WEIGHT / 16), rest = i % (WEIGHT / 16);
      copy16(weights + i * 16, w + ((long long)step * M_TILES + CHANNEL_BLOCK * (BM / 16)) * RECORD + rest * 16);
    }
  float scales[2 * TILES_M], biases[2 * TILES_M], five[5];
  if (SAME_CHANNELS) load_ends(scales, biases, five, CHANNEL_BLOCK * BM + channel, ends);
  find_places(places, part);
  __syncthreads();  // places are known to all
  wait_for_others();
  copy_chunk(x, buffer, places, 0);
  commit_copies();
  for (; part < PARTS; part += WORKERS) {
    int first = CHANNEL_BLOCK * BM;
    SUM acc[TILES_M][BN / 8][4];
    if (!HELD) {
      records = w + ((long long)CHANNEL_BLOCK * (BM / 16) + record) * RECORD;
      fetch_weight(a[0], e[0], records);
      if (STEPS > 1) fetch_weight(a[1], e[1], records);
    }
    for (int chunk = 0; chunk < STEPS / CHUNK_STEPS; chunk++) {
      wait_copies<0>();
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // tensor cores read what copies wrote
      __syncthreads();  // this chunk has arrived, and all are done with the rows of the last part
      u32 held = weights + chunk * CHUNK_STEPS * WEIGHT + record * RECORD;
#pragma unroll
      for (int step = 0; step < CHUNK_STEPS; step++) {
        auto& values = a[step % SETS];
        auto& metadata = e[step % SETS];
        if (IN_SHARED) load_weight(values, metadata, held + step * WEIGHT);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int m = 0; m < TILES_M; m++) {
          bool add = step != 0 || chunk != 0;
          multiply<0>(acc[m], values[m], metadata[m], rows_from(buffer + half_at(2 * step)), add);
          if (2 * step + 1 < HALVES)  // else it has no weight
            multiply<1>(acc[m], values[m], metadata[m], rows_from(buffer + half_at(2 * step + 1)), true);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        bool is_last = (chunk + 1) * CHUNK_STEPS >= STEPS;
        int next = is_last ? part + WORKERS : part;
        if (step == 0 && chunk == 0)
          for (int i = threadIdx.x; i < BN; i += THREADS) pixels[i] = pixel_at(CELL_BLOCK * BN + i);
        if (step == 0 && is_last && next < PARTS) find_places(places, next);
        if (step != 0 && IN_REGISTERS) continue;  // there are no registers to wait for
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (!HELD && (step + 2 < CHUNK_STEPS || !is_last))
          fetch_weight(a[(step + 2) % 3], e[(step + 2) % 3], records);
        if (step != 0) continue;
        __syncthreads();  // all are done with the chunk before this one: its room is free
        if (HAS_R && chunk == 0) {
          copy_residual(ends, r_rows, pixels, first);
          commit_copies();
        }
        if (next < PARTS) copy_chunk(x, other, places, is_last ? 0 : chunk + 1);
        commit_copies();
        if (HAS_R && chunk == 0 && part + WORKERS < PARTS) prefetch_residual(ends, part + WORKERS);
      }
      u32 last = buffer;
      buffer = other, other = last;
    }
    if (!SAME_CHANNELS) load_ends(scales, biases, five, first + channel, ends);
    if (HAS_R) wait_copies<1>();  // but for the next part's x
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (HAS_R) __syncthreads();  // the residual has arrived
    finish_tile(acc, ends, scales, biases, five, pixels, y_rows, r_rows, channel, column);
    __syncthreads();
    store_y(ends, y_rows, pixels, first);
  }
}
