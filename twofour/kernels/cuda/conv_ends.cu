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

constexpr float MIDDLE = 12582912.0f;  // 1.5 * 2**23: its last place is 1, so sums with it are whole

// v -> y, in steps as MIDDLE more than it. See finish.py: its numbers are residual_scale, y_factor,
// low, high, y_zero. For a result in steps they are, with unit = y_factor / (high - low):
//   residual_scale (times unit where all is linear), unit, -low / (high - low), high - low,
//   low + y_zero + MIDDLE
// and scale and bias hold unit and the third one, where all is linear. So one multiply-add bounds the
// result, saturating between 0 and 1, and another one rounds it: no minimum, maximum or conversion,
// of which a multiprocessor does half as many or fewer.
__device__ __forceinline__ float finish(float v, float scale, float bias, float r, const float* numbers) {
#if Y_COARSE
  if (ACTIVATION == 0) {
    v = __saturatef(fmaf(v, scale, HAS_R ? fmaf(r, numbers[0], bias) : bias));
    return fmaf(v, numbers[3], numbers[4]);
  }
#endif
  v = SCALED ? fmaf(v, scale, bias) : v + bias;
  if (HAS_R && !ADD_LAST) v = fmaf(r, numbers[0], v);
  v = activate(v);
  if (HAS_R && ADD_LAST) v = fmaf(r - RESIDUAL_ZERO, numbers[0], v);
  if (Y_COARSE) return fmaf(__saturatef(fmaf(v, numbers[1], numbers[2])), numbers[3], numbers[4]);
  v *= numbers[1];
  return v != v ? v : fminf(fmaxf(v, numbers[2]), numbers[3]);
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

// COUNT channels of one pixel: sums -> y.
template <int COUNT>
__device__ __forceinline__ Run<Y_TYPE, COUNT> finished(const float (&sums)[COUNT], const float (&scale)[COUNT],
                                                       const float (&bias)[COUNT], const float (&numbers)[5],
                                                       const Run<R_TYPE, COUNT>& r, float row_scale) {
  Run<Y_TYPE, COUNT> run;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    float v = finish(sums[i] * row_scale, scale[i], bias[i], HAS_R ? r_value(r.v[i]) : 0.0f, numbers);
    run.v[i] = y_value(v);
  }
  return run;
}

// The same, stored: at once where all runs are inside N.
template <int COUNT>
__device__ __forceinline__ void finish_run(const float (&sums)[COUNT], const float (&scale)[COUNT],
                                           const float (&bias)[COUNT], const float (&numbers)[5],
                                           const Run<R_TYPE, COUNT>& r, const Ends& ends, int pixel,
                                           int channel) {
  Run<Y_TYPE, COUNT> run = finished(sums, scale, bias, numbers, r, BY_ROWS ? ends.row_scales[pixel] : 1.0f);
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
#if Y_COARSE
  float low = numbers[2] + MIDDLE - MIDDLE, high = numbers[3] + MIDDLE - MIDDLE;  // whole, as y will be
  float span = high - low, part = __fdividef(1.0f, span), unit = numbers[1] * part, up = -low * part;
  numbers[1] = unit, numbers[2] = up, numbers[3] = span, numbers[4] += low + MIDDLE;
  if (ACTIVATION == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      if (HAS_R && ADD_LAST) bias[i] = fmaf(-RESIDUAL_ZERO, numbers[0], bias[i]);
      scale[i] = (SCALED ? scale[i] : 1.0f) * unit, bias[i] = fmaf(bias[i], unit, up);
    }
    numbers[0] *= unit;
  }
#endif
}
