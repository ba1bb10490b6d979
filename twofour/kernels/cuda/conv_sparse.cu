// A convolution whose weight is 2:4 along its input channels, on sparse tensor cores.
//
//   y^T [N, pixels] = w [N, K] x^T [K, pixels],   K = taps * channels
//
// in the order (kh, kw, c), or, with TAPS_INSIDE, 128 bytes of channels after the other, each with all
// taps: then the taps find what they share in the L1 cache.
//
// The sparse operand of the tensor core is its first, so out channels are rows and pixels columns.
// A block computes BM channels of BN pixels. It goes along K in steps of 128 bytes of x, which lie in
// shared memory as BN rows of 128 bytes, 16-byte pieces swizzled as Hopper's tensor cores want it:
// piece c of row n lies at n * 128 + ((c ^ n % 8) * 16). Padding, and what is past the end of K, is
// filled with the zero point. The weight comes in records, see conv_sparse.py:
// what the 32 lanes of a warp hold of 16 channels by 128 bytes, values then metadata.
//
// conv_sparse_text.py writes the constants (in capitals) and the instructions in front of this.

#include "conv_copies.cu"

#include "conv_ends.cu"

#if IS_CONV

#include "conv_weight.cu"

// Of the part of y at hand. Channels go fastest, so that blocks that run together read the same pixels.
#define CHANNEL_BLOCK (part % CHANNEL_BLOCKS)
#define PIXEL_BLOCK (part / CHANNEL_BLOCKS)

// ---- x: what a thread copies ------------------------------------------------------------------

constexpr int ROWS = THREADS / 8;                 // pixels that all threads copy together
constexpr int COPIES = (BN + ROWS - 1) / ROWS;    // pieces of x a thread copies in a step
constexpr int COLUMNS = X_FLAT ? 1 : COPIES;      // places in x that a thread remembers
static_assert(THREADS % 64 == 0, "threads copy whole rows of pieces");

constexpr int KH = TAPS / KW;
static_assert(KH <= 16 && KW <= 16, "a bit for each row and each column of the window");
constexpr bool PADDED = PAD_TOP > 0 || PAD_LEFT > 0 ||
                        (OH - 1) * STRIDE_H + (KH - 1) * DILATION_H >= H ||
                        (OW - 1) * STRIDE_W + (KW - 1) * DILATION_W >= W;

struct Feed {
  const char* x[COLUMNS];  // the window's first tap; where all taps are in each piece, its own piece
  u32 inside[COLUMNS];     // rows of the window that lie in the image: bits 0 to 15; columns: 16 to 31
  int left;                // with X_FLAT, pixels from the thread's first to the last
  const char* w;           // of the next step
};

__device__ __forceinline__ void begin(Feed& feed, const char* x, const char* w, int first, int part) {
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) {
    int pixel = PIXEL_BLOCK * BN + (threadIdx.x >> 3) + i * ROWS;
    feed.left = PIXELS - pixel;
    if (PIXELS % BN != 0 && pixel >= PIXELS) pixel = PIXELS - 1;  // computed once more, not stored
    int image = pixel / (OH * OW), rest = pixel % (OH * OW);
    int ih = rest / OW * STRIDE_H - PAD_TOP, iw = rest % OW * STRIDE_W - PAD_LEFT;
    feed.x[i] = x + ES * ((long long)image * X_IMAGE + (long long)ih * X_ROW + (long long)iw * X_PIXEL);
    if (TAPS_INSIDE) feed.x[i] += (threadIdx.x & 7) * 16;
    feed.inside[i] = 0;
    for (int kh = 0; kh < KH; kh++) feed.inside[i] |= (u32)((u32)(ih + kh * DILATION_H) < H) << kh;
    for (int kw = 0; kw < KW; kw++) feed.inside[i] |= (u32)((u32)(iw + kw * DILATION_W) < W) << (16 + kw);
  }
  feed.w = w + ((long long)first * M_TILES + CHANNEL_BLOCK * (BM / 16)) * RECORD + threadIdx.x * 16;
}

// The steps are copied in their order. Copies stand side by side, each with few instructions of its
// own: a multiprocessor has too few warps here to hide many.
__device__ __forceinline__ void copy_x(const Feed& feed, u32 stage, int step) {
  int piece = threadIdx.x & 7, row = threadIdx.x >> 3;
  int tap = step % TAPS, channel = step / TAPS * 8;  // the same in all threads
  if (!TAPS_INSIDE) tap = (step * 8 + piece) / C_PIECES, channel = (step * 8 + piece) % C_PIECES;
  int kh = tap / KW, kw = tap % KW;
  long long delta = ES * (kh * DILATION_H * X_ROW + kw * DILATION_W * X_PIXEL) + channel * 16;
  u32 wanted = 1u << kh | 1u << (16 + kw), to = stage + row * 128 + ((piece ^ (row & 7)) << 4);
#pragma unroll
  for (int i = 0; i < COPIES; i++) {
    if (BN % ROWS != 0 && i == COPIES - 1 && row >= BN % ROWS) break;
    bool inside = !PADDED || (feed.inside[i % COLUMNS] & wanted) == wanted;
    if (X_FLAT && PIXELS % BN != 0) inside = i * ROWS < feed.left;
    if (!TAPS_INSIDE) inside = inside && tap < TAPS;  // not past the end of K
    // Of flat pixels the places lie in the instructions.
    const char* from = feed.x[i % COLUMNS] + delta + (X_FLAT ? i * ROWS * ES * X_PIXEL : 0);
    u32 place = to + i * ROWS * 128;
    if (PADDING != 0 && !X_FLAT && !inside) fill16(place, PADDING);
    else if (TAPS > 1) copy16_again(place, from, inside ? 16 : 0);
    else copy16(place, from, inside ? 16 : 0);
  }
}

constexpr int WEIGHT = BM / 16 * RECORD;  // bytes of a step

__device__ __forceinline__ void copy_weight(Feed& feed, u32 to) {
  constexpr int PIECES = WEIGHT / 16, REST = PIECES % THREADS;
  u32 place = to + threadIdx.x * 16;
#pragma unroll
  for (int i = 0; i < PIECES / THREADS; i++) copy16(place + i * THREADS * 16, feed.w + i * THREADS * 16);
  if (threadIdx.x < REST) copy16(place + (PIECES - REST) * 16, feed.w + (PIECES - REST) * 16);
  feed.w += M_TILES * RECORD;
}

__device__ __forceinline__ void copy_w(Feed& feed, u32 stage) {
  if (!DIRECT && !HELD) copy_weight(feed, stage + BN * 128);
}

__device__ __forceinline__ void copy_step(Feed& feed, u32 stage, int step) {
  copy_x(feed, stage, step);
  copy_w(feed, stage);
}

// The first steps. The weight is on its way before x is there, where the kernel was started early.
template <int COUNT>
__device__ __forceinline__ void copy_first(Feed& feed, u32 stages, int first, int steps) {
#pragma unroll
  for (int s = 0; s < COUNT; s++)
    if (s < steps) copy_w(feed, stages + s * STAGE_BYTES);
  wait_for_others();
#pragma unroll
  for (int s = 0; s < COUNT; s++) {
    if (s < steps) copy_x(feed, stages + s * STAGE_BYTES, first + s);
    commit_copies();
  }
}

static_assert(STAGE_BYTES % 1024 == 0, "a stage begins where the swizzle begins");

// ---- the block ----------------------------------------------------------------------------------

// Brings the block's part of the residual nearer, into the L2 cache.
__device__ __forceinline__ void prefetch_residual(const Ends& ends, int part) {
  constexpr int LINE = 128 / sizeof(R_TYPE), LINES = (BM + LINE - 1) / LINE;
  for (int i = threadIdx.x; i < BN * LINES; i += THREADS) {
    int pixel = PIXEL_BLOCK * BN + i / LINES, channel = CHANNEL_BLOCK * BM + i % LINES * LINE;
    if (pixel < PIXELS && channel < N)
      prefetch(ends.r + offset(pixel, R_IMAGE, R_ROW, R_PIXEL, R_FLAT) + channel);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) SYMBOL(PARAMETERS) {
  extern __shared__ __align__(1024) char memory[];
  let_others_begin();
  u32 stages = shared_address(memory);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int first = blockIdx.z * STEPS / SPLIT, steps = (blockIdx.z + 1) * STEPS / SPLIT - first;
  // Few steps would be unrolled, for which three warp groups have no registers; this is a zero.
  if (THREADS > 256) steps += blockIdx.y;
  constexpr int AHEAD = STAGES - (WGMMA ? 2 : 1);
  int part = blockIdx.x;
  Feed feed;
  begin(feed, x, w, first, part);
#if PERSISTENT
  // One of WORKERS blocks, which copies for its next part while it finishes this one. Where it holds the
  // weight, all its parts have the same channels: WORKERS is a multiple of CHANNEL_BLOCKS.
  if (HELD)
    for (int step = 0; step < STEPS; step++) copy_weight(feed, stages + STAGES * STAGE_BYTES + step * WEIGHT);
  copy_first<AHEAD>(feed, stages, first, steps);
  for (; part < PARTS; part += WORKERS) {
#endif
  // Channels are shared out so that a thread's lie side by side: RUN of them, of all its tiles.
  constexpr int RUN = 2 * TILES_M;
#if WGMMA
  int channel = CHANNEL_BLOCK * BM + warp * TILES_M * 16 + lane / 4 * RUN, column = lane % 4 * 2;
#else
  constexpr int WARPS_N = THREADS / 32 / WARPS_M, TILES_N = BN / 8 / WARPS_N;
  int warp_m = warp % WARPS_M * TILES_M, warp_n = warp / WARPS_M * TILES_N;
  int channel = CHANNEL_BLOCK * BM + warp_m * 16 + lane / 4 * RUN, column = warp_n * 8 + lane % 4 * 2;
#endif
  const Ends ends = ENDS;
  float scales[RUN], biases[RUN], five[5];  // read now: at the end all would wait for them
  if (SPLIT == 1) load_ends(scales, biases, five, channel, ends);

  if (!PERSISTENT) copy_first<AHEAD>(feed, stages, first, steps);
  if (HAS_R && SPLIT == 1) prefetch_residual(ends, part);
#if !WGMMA
  // A warp computes TILES_M * 16 channels of TILES_N * 8 pixels.
  SUM acc[TILES_M][TILES_N][4] = {};
  for (int step = 0; step < steps; step++) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // this step has arrived, and all are done with the one before
    int next = step + STAGES - 1;
    if (next < steps) copy_step(feed, stages + next % STAGES * STAGE_BYTES, first + next);
    commit_copies();
    u32 xs = stages + step % STAGES * STAGE_BYTES, ws = xs + BN * 128;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint4 a[TILES_M], b[TILES_N];
      u32 e[TILES_M];
#pragma unroll
      for (int m = 0; m < TILES_M; m++) {
        u32 record = ws + (warp_m + m) * RECORD;
        a[m] = load16(record + half * 512 + lane * 16);
        e[m] = load4(record + 1024 + half * META_HALF + lane * 4);
      }
#pragma unroll
      for (int n = 0; n < TILES_N; n++) {
        u32 from = xs + (warp_n + n) * 1024 + (lane & 7) * 128 + (((half * 4 + (lane >> 3)) ^ (lane & 7)) << 4);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(b[n].x), "=r"(b[n].y), "=r"(b[n].z), "=r"(b[n].w)
                     : "r"(from)
                     : "memory");
      }
#pragma unroll
      for (int m = 0; m < TILES_M; m++)
#pragma unroll
        for (int n = 0; n < TILES_N; n++) {
          if (half == 0) mma_sparse_0(acc[m][n], a[m], b[n], e[m]);
          else mma_sparse_1(acc[m][n], a[m], b[n], e[m]);
        }
    }
  }
#else
  // A warp group computes TILES_M * 64 channels of all pixels, each warp 16 of every 64.
  constexpr int TILES_N = BN / 8;
  SUM acc[TILES_M][TILES_N][4] = {};
  int record = warp / 4 * TILES_M * 4 + warp % 4;
  u32 mine = BN * 128 + record * RECORD;
  auto start = [&](int step, uint4(&a)[TILES_M][2], u32(&e)[TILES_M][2]) {
    wait_copies<STAGES - 3>();
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // tensor cores read what copies wrote
    __syncthreads();  // this step has arrived, and all are done with the one before the last
    u32 stage = stages + step % STAGES * STAGE_BYTES;
    u64 x_tile = descriptor(stage);
    if (HELD) load_weight(a, e, stages + STAGES * STAGE_BYTES + step * WEIGHT + record * RECORD);
    else if (!DIRECT) load_weight(a, e, stage + mine);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int m = 0; m < TILES_M; m++) {
      wgmma_sparse_0(acc[m], a[m][0], e[m][0], x_tile);
      wgmma_sparse_1(acc[m], a[m][1], e[m][1], x_tile + 4);  // 64 bytes further along K
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    int next = step + STAGES - 2;
    if (next < steps) copy_step(feed, stages + next % STAGES * STAGE_BYTES, first + next);
    commit_copies();
  };
#if DIRECT
  // Registers are fetched into again when the products that read them are done: two steps ahead.
  const char* records = w + ((long long)first * M_TILES + CHANNEL_BLOCK * (BM / 16) + record) * RECORD;
  uint4 a[3][TILES_M][2];
  u32 e[3][TILES_M][2];
  fetch_weight(a[0], e[0], records);
  if (steps > 1) fetch_weight(a[1], e[1], records);
  for (int step = 0; step < steps; step += 3) {
#pragma unroll
    for (int i = 0; i < 3; i++) {
      if (step + i >= steps) break;
      start(step + i, a[i], e[i]);
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (step + i + 2 < steps) fetch_weight(a[(i + 2) % 3], e[(i + 2) % 3], records);
    }
  }
#else
  int step = 0;
  if (steps % 2) {
    uint4 a[TILES_M][2];
    u32 e[TILES_M][2];
    start(step++, a, e);
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }
  uint4 a0[TILES_M][2], a1[TILES_M][2];  // read until the products are done, behind the loop's end too
  u32 e0[TILES_M][2], e1[TILES_M][2];
  for (; step < steps; step += 2) {
    start(step, a0, e0);
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    start(step + 1, a1, e1);
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
  }
#endif
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
#if PERSISTENT
  __syncthreads();  // all have read the last steps
  if (part + WORKERS < PARTS) {
    begin(feed, x, w, first, part + WORKERS);
    copy_first<AHEAD>(feed, stages, first, steps);
  }
  if (channel >= N) continue;
#else
  if (channel >= N) return;
#endif
  // Of the residual many runs are on their way at once, or each would take the time of all.
  constexpr int WANTED = HAS_R ? 32 / ((int)sizeof(R_TYPE) * RUN) : 1;
  constexpr int TOGETHER = WANTED < 1 ? 1 : WANTED > TILES_N ? TILES_N : WANTED;
  Run<R_TYPE, RUN> before[TOGETHER][2];
#pragma unroll
  for (int n = 0; n < TILES_N; n++) {
    if (HAS_R && SPLIT == 1 && n % TOGETHER == 0)
#pragma unroll
      for (int i = 0; i < 2 * TOGETHER && n + i / 2 < TILES_N; i++) {
        int pixel = PIXEL_BLOCK * BN + column + (n + i / 2) * 8 + i % 2;
        before[i / 2][i % 2] = residual<RUN>(ends, pixel < PIXELS ? pixel : PIXELS - 1, channel);
      }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int pixel = PIXEL_BLOCK * BN + column + n * 8 + i;
      Run<SUM, RUN> run;
#pragma unroll
      for (int m = 0; m < TILES_M; m++)
        run.v[2 * m] = acc[m][n][i], run.v[2 * m + 1] = acc[m][n][2 + i];
      if (PIXELS % BN != 0 && pixel >= PIXELS) continue;
      if (SPLIT > 1) {
        long long row = ((long long)blockIdx.z * PIXELS + pixel) * N_SUMS;
        *(Run<SUM, RUN>*)(SUMS + row + channel) = run;
      } else {
        float v[RUN];
#pragma unroll
        for (int j = 0; j < RUN; j++) v[j] = (float)run.v[j];
        finish_run(v, scales, biases, five, before[n % TOGETHER][i], ends, pixel, channel);
      }
    }
  }
#if PERSISTENT
  }
#endif
}

#else  // the second kernel of a split sum: adds up the parts

extern "C" __global__ void __launch_bounds__(THREADS) SYMBOL(PARAMETERS) {
  let_others_begin();
  const Ends ends = ENDS;
  int at = blockIdx.x * THREADS + threadIdx.x, channel = at % (N_SUMS / 4) * 4, pixel = at / (N_SUMS / 4);
  if (pixel >= PIXELS || channel >= N) return;
  float scales[4], biases[4], five[5], v[4];
  load_ends(scales, biases, five, channel, ends);
  wait_for_others();
  SUM total[4] = {};
#pragma unroll
  for (int part = 0; part < SPLIT; part++) {
    const SUM* from = sums + ((long long)part * PIXELS + pixel) * N_SUMS + channel;
#pragma unroll
    for (int i = 0; i < 4; i++) total[i] += from[i];
  }
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = (float)total[i];
  finish_run(v, scales, biases, five, residual<4>(ends, pixel, channel), ends, pixel, channel);
}

#endif
