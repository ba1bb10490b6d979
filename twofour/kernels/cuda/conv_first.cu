// A convolution of int8 over pixels of four bytes, such as the first layer of a network for images.
//
//   y^T [N, pixels] = w [N, K] x^T [K, pixels],   K = words of four channels, one for each tap
//
// Other kernels gather the taps of each pixel of y anew, and of so few channels that takes longer than
// the products. Here a block brings the part of x that TR rows of TC pixels of y look at to shared
// memory once, as it lies, while it computes the part before. Each operand of the tensor core is one word a
// lane: the word of one tap at one pixel, read where it is. A warp keeps its weights in registers for all
// tiles of the block, and goes on with 8 * TOGETHER pixels at once: products wait for those before them.
//
// The weight comes as what the lanes hold: see conv_first.py. Constants in capitals are written there.

#include "conv_copies.cu"

__device__ __forceinline__ void copy4(u32 to, const char* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void fill4(u32 to, u32 value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

// 16 channels by 8 pixels by 8 taps.
__device__ __forceinline__ void mma_words(int (&d)[4], const uint4& a, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

#include "conv_ends.cu"

static_assert(TC / 8 % TOGETHER == 0, "pixels that go on together lie in a row");
constexpr u32 INPUT = (IN_ROWS * IN_COLUMNS * 4 + 15) / 16 * 16;

// The part of x below a tile, padding included.
__device__ __forceinline__ void copy_tile(const char* x, u32 input, int tile) {
  int image = tile / (AREAS_Y * AREAS_X), rest = tile % (AREAS_Y * AREAS_X);
  int ih = rest / AREAS_X * TR * STRIDE_H - PAD_TOP, iw = rest % AREAS_X * TC * STRIDE_W - PAD_LEFT;
  const char* from = x + image * X_IMAGE;
  for (int i = threadIdx.x; i < IN_ROWS * IN_COLUMNS; i += THREADS) {
    int row = ih + i / IN_COLUMNS, column = iw + i % IN_COLUMNS;
    u32 to = input + i * 4;
    if ((u32)row < H && (u32)column < W) copy4(to, from + row * X_ROW + column * X_PIXEL);
    else fill4(to, PADDING);
  }
  commit_copies();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) SYMBOL(PARAMETERS) {
  extern __shared__ __align__(1024) char memory[];
  let_others_begin();
  u32 input = shared_address(memory), other = input + INPUT;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, part = lane % 4;
  int block = blockIdx.x % CHANNEL_BLOCKS;

  // A lane holds rows g and g + 8 of all its tiles of 16 channels: they are neighbours in y.
  constexpr int RUN = 2 * TILES_M;
  int channel = block * BM + group * RUN;
  const Ends ends = ENDS;
  float scales[RUN], biases[RUN], five[5];
  load_ends(scales, biases, five, channel, ends);

  uint4 a[K_BLOCKS][TILES_M];
  int tap_at[K_BLOCKS][2];  // bytes from the window's first tap to the lane's two of each 8 taps
#pragma unroll
  for (int k = 0; k < K_BLOCKS; k++) {
#pragma unroll
    for (int m = 0; m < TILES_M; m++)
      a[k][m] = fetch16(w + ((block * K_BLOCKS + k) * TILES_M + m) * 512 + lane * 16);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int tap = k * 8 + i * 4 + part;  // behind the last one the weight is 0
      tap_at[k][i] = tap < TAPS ? (tap / KW * DILATION_H * IN_COLUMNS + tap % KW * DILATION_W) * 4 : 0;
    }
  }

  wait_for_others();
  int tile = blockIdx.x / CHANNEL_BLOCKS;
  copy_tile(x, input, tile);
  for (; tile < AREAS; tile += WORKERS) {
    int image = tile / (AREAS_Y * AREAS_X), rest = tile % (AREAS_Y * AREAS_X);
    int top = rest / AREAS_X * TR, left = rest % AREAS_X * TC;
    wait_copies<0>();
    __syncthreads();  // this tile has arrived, and all are done with the one before
    if (tile + WORKERS < AREAS) copy_tile(x, other, tile + WORKERS);
    for (int n = warp * TOGETHER; n < TR * TC / 8; n += THREADS / 32 * TOGETHER) {
      int row = n / (TC / 8), column = n % (TC / 8) * 8;
      if (top + row >= OH || left + column >= OW) continue;
      __syncwarp();  // lanes whose pixels are not stored may be ahead
      u32 at = input + (row * STRIDE_H * IN_COLUMNS + (column + group) * STRIDE_W) * 4;
      int acc[TOGETHER][TILES_M][4] = {};
#pragma unroll
      for (int k = 0; k < K_BLOCKS; k++)
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
          u32 from = at + j * 8 * STRIDE_W * 4, b0 = load4(from + tap_at[k][0]), b1 = load4(from + tap_at[k][1]);
#pragma unroll
          for (int m = 0; m < TILES_M; m++) mma_words(acc[j][m], a[k][m], b0, b1);
        }
#pragma unroll
      for (int j = 0; j < 2 * TOGETHER; j++) {
        int i = j % 2, ow = left + column + j / 2 * 8 + part * 2 + i;
        if (ow >= OW || channel >= N) continue;
        float v[RUN];
#pragma unroll
        for (int m = 0; m < TILES_M; m++)
          v[2 * m] = (float)acc[j / 2][m][i], v[2 * m + 1] = (float)acc[j / 2][m][2 + i];
        finish_run(v, scales, biases, five, Run<R_TYPE, RUN>{}, ends, (image * OH + top + row) * OW + ow, channel);
      }
    }
    u32 last = input;
    input = other, other = last;
  }
}
