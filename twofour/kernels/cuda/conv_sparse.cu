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

typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ u32 shared_address(const void* p) {
  return (u32)__cvta_generic_to_shared(p);
}

// Copies `size` of 16 bytes, 16 or 0; the others become 0, and with 0 nothing is read.
__device__ __forceinline__ void copy16(u32 to, const char* from, int size = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
}

// By way of the L1 cache, for what this or a neighbouring block reads again soon: the taps of a window.
__device__ __forceinline__ void copy16_again(u32 to, const char* from, int size) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
}

__device__ __forceinline__ void fill16(u32 to, u32 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(value) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

__device__ __forceinline__ uint4 load16(u32 from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ u32 load4(u32 from) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
  return v;
}

// ---- from sums to y -----------------------------------------------------------------------------

__device__ __forceinline__ float sigmoid(float v) { return __fdividef(1.0f, 1.0f + __expf(-v)); }

// The share of a normal distribution below v: Abramowitz and Stegun 1964, 7.1.26, 1.5e-7 at most off.
__device__ __forceinline__ float below(float v) {
  float x = fabsf(v) * 0.7071067811865476f, t = __fdividef(1.0f, fmaf(0.3275911f, x, 1.0f));
  float p = fmaf(fmaf(fmaf(fmaf(1.061405429f, t, -1.453152027f), t, 1.421413741f), t, -0.284496736f), t,
                 0.254829592f);
  float tail = 0.5f * p * t * __expf(-x * x);
  return v < 0.0f ? tail : 1.0f - tail;
}

// v below(v) for a result in 255 steps, without an exponential: see coarse_gelu in finish.py.
__device__ __forceinline__ float coarse_gelu(float v) {
  float least = fmaxf(v, -4.0f), z = fminf(least, 4.0f), u = z * z;
  float q = fmaf(-1.3012929622746583e-09f, u, 1.041959620806665e-07f);
  q = fmaf(q, u, -3.6571309465216473e-06f);
  q = fmaf(q, u, 7.485502283088863e-05f);
  q = fmaf(q, u, -0.001006490201689303f);
  q = fmaf(q, u, 0.009505397640168667f);
  q = fmaf(q, u, -0.06588783860206604f);
  q = fmaf(q, u, 0.3986733853816986f);
  return least * fmaf(z, q, 0.5f);
}

// The factor v is limited from below where the other one is 0 by then.
__device__ __forceinline__ float activate(float v) {
#if ACTIVATION == ACTIVATION_Sigmoid
  return sigmoid(v);
#elif ACTIVATION == ACTIVATION_Silu
  return fmaxf(v, -80.0f) * sigmoid(v);
#elif ACTIVATION == ACTIVATION_Gelu && Y_COARSE
  return coarse_gelu(v);
#elif ACTIVATION == ACTIVATION_Gelu
  return fmaxf(v, -16.0f) * below(v);
#elif ACTIVATION == ACTIVATION_GeluTanh
  return fmaxf(v, -16.0f) * sigmoid(fmaxf(v, -16.0f) * (1.5957691216057308f + 0.07135481627260025f * v * v));
#elif ACTIVATION == ACTIVATION_Tanh
  return 2.0f * sigmoid(2.0f * fminf(fmaxf(v, -20.0f), 20.0f)) - 1.0f;
#elif ACTIVATION == ACTIVATION_HardSigmoid
  return __saturatef(v * 0.16666666666666666f + 0.5f);
#elif ACTIVATION == ACTIVATION_HardSwish
  return v * __saturatef(v * 0.16666666666666666f + 0.5f);
#else
  return v;
#endif
}

// See finish.py: its numbers are residual_scale, y_factor, low, high, y_zero.
__device__ __forceinline__ float finish(float v, float scale, float bias, float r, const float* numbers) {
  v = SCALED ? fmaf(v, scale, bias) : v + bias;
  if (HAS_R && !ADD_LAST) v = fmaf(r, numbers[0], v);
  v = activate(v);
  if (HAS_R && ADD_LAST) v = fmaf(r - RESIDUAL_ZERO, numbers[0], v);
  v *= numbers[1];
  if (!Y_COARSE && v != v) return v;
  return fminf(fmaxf(v, numbers[2]), numbers[3]);
}

struct Ends {  // operands of what follows the sums; null where the problem has none
  const float *scales, *row_scales, *biases, *numbers;
  const R_TYPE* r;
  Y_TYPE* y;
};

__device__ __forceinline__ long long offset(int pixel, long long image, long long row, long long step,
                                            bool flat) {
  if (flat) return pixel * step;
  int line = pixel / OW;
  return line / OH * image + line % OH * row + pixel % OW * step;
}

// COUNT channels of the residual at one pixel.
template <int COUNT>
__device__ __forceinline__ Run<R_TYPE, COUNT> residual(const Ends& ends, int pixel, int channel) {
  Run<R_TYPE, COUNT> run = {};
  if (!HAS_R) return run;
  const R_TYPE* from = ends.r + offset(pixel, R_IMAGE, R_ROW, R_PIXEL, R_FLAT) + channel;
  if (R_ALIGNED % COUNT == 0) return *(const Run<R_TYPE, COUNT>*)from;
#pragma unroll
  for (int i = 0; i < COUNT; i++)
    if (channel + i < N) run.v[i] = from[i];
  return run;
}

// COUNT channels of one pixel: sums -> y. They are stored at once where all runs are inside N.
template <int COUNT>
__device__ __forceinline__ void finish_run(const float (&sums)[COUNT], const float (&scale)[COUNT],
                                           const float (&bias)[COUNT], const float (&numbers)[5],
                                           const Run<R_TYPE, COUNT>& r, const Ends& ends, int pixel,
                                           int channel) {
  float row_scale = BY_ROWS ? ends.row_scales[pixel] : 1.0f;
  Run<Y_TYPE, COUNT> run;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    float v = finish(sums[i] * row_scale, scale[i], bias[i], HAS_R ? r_value(r.v[i]) : 0.0f, numbers);
    run.v[i] = y_value(v, numbers[4]);
  }
  Y_TYPE* to = ends.y + offset(pixel, Y_IMAGE, Y_ROW, Y_PIXEL, Y_FLAT) + channel;
  if (Y_ALIGNED % COUNT == 0) {
    *(Run<Y_TYPE, COUNT>*)to = run;
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      if (channel + i < N) to[i] = run.v[i];
  }
}

template <int COUNT>
__device__ __forceinline__ void load_ends(float (&scale)[COUNT], float (&bias)[COUNT], float (&numbers)[5],
                                          int channel, const Ends& ends) {
#pragma unroll
  for (int i = 0; i < 5; i++) numbers[i] = ends.numbers[i];
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    bool inside = channel + i < N;
    scale[i] = SCALED && inside ? ends.scales[channel + i] : 0.0f;
    bias[i] = HAS_BIAS && inside ? ends.biases[channel + i] : 0.0f;
  }
}

#if IS_CONV

// Channels go fastest, so that blocks that run together read the same pixels.
#define CHANNEL_BLOCK (blockIdx.x % CHANNEL_BLOCKS)
#define PIXEL_BLOCK (blockIdx.x / CHANNEL_BLOCKS)

// ---- x: what a thread copies ------------------------------------------------------------------

constexpr int COPIES = BN * 8 / THREADS;  // pieces of x a thread copies in a step
static_assert(BN * 8 % THREADS == 0 && THREADS % 64 == 0, "threads copy whole rows of pieces");

struct Pixels {
  const char* base[COPIES];  // of the window's first tap; nowhere near x for what is outside
  int ih[COPIES], iw[COPIES];
};

__device__ __forceinline__ void find_pixels(Pixels& p, const char* x) {
#pragma unroll
  for (int i = 0; i < COPIES; i++) {
    int pixel = PIXEL_BLOCK * BN + (threadIdx.x >> 3) + i * (THREADS / 8);
    int image = pixel / (OH * OW), rest = pixel % (OH * OW);
    int ih = rest / OW * STRIDE_H - PAD_TOP, iw = rest % OW * STRIDE_W - PAD_LEFT;
    p.base[i] = x + ES * ((long long)image * X_IMAGE + (long long)ih * X_ROW + (long long)iw * X_PIXEL);
    p.ih[i] = pixel < PIXELS ? ih : -(1 << 28);
    p.iw[i] = iw;
  }
}

__device__ __forceinline__ void copy_step(const Pixels& p, const char* w, u32 stage,
                                          int step) {
  int piece = threadIdx.x & 7, row = threadIdx.x >> 3, k = step * 8 + piece;
  int tap = k / C_PIECES, channel = k % C_PIECES;
  if (TAPS_INSIDE) tap = step % TAPS, channel = step / TAPS * 8 + piece;
  int kh = tap / KW * DILATION_H, kw = tap % KW * DILATION_W;
  long long delta = ES * ((long long)kh * X_ROW + (long long)kw * X_PIXEL) + channel * 16;
  u32 to = stage + row * 128 + ((piece ^ (row & 7)) << 4);
#pragma unroll
  for (int i = 0; i < COPIES; i++) {
    bool inside = (u32)(p.ih[i] + kh) < H && (u32)(p.iw[i] + kw) < W && k < TAPS * C_PIECES;
    const char* from = inside ? p.base[i] + delta : p.base[0];
    u32 place = to + i * (THREADS / 8) * 128;
    if (PADDING != 0 && !inside) fill16(place, PADDING);
    else if (TAPS > 1) copy16_again(place, from, inside ? 16 : 0);
    else copy16(place, from, inside ? 16 : 0);
  }
  const char* from = w + ((long long)step * M_TILES + CHANNEL_BLOCK * (BM / 16)) * RECORD;
#pragma unroll
  for (int i = threadIdx.x; i < BM / 16 * RECORD / 16; i += THREADS)
    copy16(stage + BN * 128 + i * 16, from + i * 16);
}

static_assert(STAGE_BYTES % 1024 == 0, "a stage begins where the swizzle begins");

// ---- the block ----------------------------------------------------------------------------------

// Brings the block's part of the residual nearer, into the L2 cache.
__device__ __forceinline__ void prefetch_residual(const Ends& ends) {
  constexpr int LINE = 128 / sizeof(R_TYPE), LINES = (BM + LINE - 1) / LINE;
  for (int i = threadIdx.x; i < BN * LINES; i += THREADS) {
    int pixel = PIXEL_BLOCK * BN + i / LINES, channel = CHANNEL_BLOCK * BM + i % LINES * LINE;
    if (pixel < PIXELS && channel < N)
      prefetch(ends.r + offset(pixel, R_IMAGE, R_ROW, R_PIXEL, R_FLAT) + channel);
  }
}

template <int TILES>
__device__ __forceinline__ void load_weight(uint4 (&a)[TILES][2], u32 (&e)[TILES][2], u32 record) {
#pragma unroll
  for (int m = 0; m < TILES; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      a[m][half] = load16(record + m * 4 * RECORD + half * 512 + threadIdx.x % 32 * 16);
      e[m][half] = load4(record + m * 4 * RECORD + 1024 + half * META_HALF + threadIdx.x % 32 * 4);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) SYMBOL(PARAMETERS) {
  extern __shared__ __align__(1024) char memory[];
  u32 stages = shared_address(memory);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int first = blockIdx.z * STEPS / SPLIT, steps = (blockIdx.z + 1) * STEPS / SPLIT - first;
  Pixels pixels;
  find_pixels(pixels, x);

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
  if (HAS_R && SPLIT == 1) prefetch_residual(ends);

#if !WGMMA
  // A warp computes TILES_M * 16 channels of TILES_N * 8 pixels.
  SUM acc[TILES_M][TILES_N][4] = {};
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < steps) copy_step(pixels, w, stages + s * STAGE_BYTES, first + s);
    commit_copies();
  }
  for (int step = 0; step < steps; step++) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // this step has arrived, and all are done with the one before
    int next = step + STAGES - 1;
    if (next < steps) copy_step(pixels, w, stages + next % STAGES * STAGE_BYTES, first + next);
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
#pragma unroll
  for (int s = 0; s < STAGES - 2; s++) {
    if (s < steps) copy_step(pixels, w, stages + s * STAGE_BYTES, first + s);
    commit_copies();
  }
  u32 mine = BN * 128 + (warp / 4 * TILES_M * 4 + warp % 4) * RECORD;
  auto start = [&](int step, uint4(&a)[TILES_M][2], u32(&e)[TILES_M][2]) {
    wait_copies<STAGES - 3>();
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // tensor cores read what copies wrote
    __syncthreads();  // this step has arrived, and all are done with the one before the last
    u32 stage = stages + step % STAGES * STAGE_BYTES;
    u64 x_tile = descriptor(stage);
    load_weight(a, e, stage + mine);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int m = 0; m < TILES_M; m++) {
      wgmma_sparse_0(acc[m], a[m][0], e[m][0], x_tile);
      wgmma_sparse_1(acc[m], a[m][1], e[m][1], x_tile + 4);  // 64 bytes further along K
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    int next = step + STAGES - 2;
    if (next < steps) copy_step(pixels, w, stages + next % STAGES * STAGE_BYTES, first + next);
    commit_copies();
  };
  int step = 0;
  if (steps % 2) {
    uint4 a[TILES_M][2];
    u32 e[TILES_M][2];
    start(step++, a, e);
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }
  for (; step < steps; step += 2) {
    uint4 a0[TILES_M][2], a1[TILES_M][2];
    u32 e0[TILES_M][2], e1[TILES_M][2];
    start(step, a0, e0);
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    start(step + 1, a1, e1);
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
  if (channel >= N) return;
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
        long long part = ((long long)blockIdx.z * PIXELS + pixel) * N_SUMS;
        *(Run<SUM, RUN>*)(SUMS + part + channel) = run;
      } else {
        float v[RUN];
#pragma unroll
        for (int j = 0; j < RUN; j++) v[j] = (float)run.v[j];
        finish_run(v, scales, biases, five, before[n % TOGETHER][i], ends, pixel, channel);
      }
    }
  }
}

#else  // the second kernel of a split sum: adds up the parts

extern "C" __global__ void __launch_bounds__(THREADS) SYMBOL(PARAMETERS) {
  const Ends ends = ENDS;
  int at = blockIdx.x * THREADS + threadIdx.x, channel = at % (N_SUMS / 4) * 4, pixel = at / (N_SUMS / 4);
  if (pixel >= PIXELS || channel >= N) return;
  float scales[4], biases[4], five[5], v[4];
  load_ends(scales, biases, five, channel, ends);
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
