// What the lanes of a warp hold of a 2:4 weight: a step of its tiles, from shared memory. The records are
// those of conv_sparse.py.
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

// The same from global memory.
template <int TILES>
__device__ __forceinline__ void fetch_weight(uint4 (&a)[TILES][2], u32 (&e)[TILES][2], const char*& records) {
  const char *values = records + threadIdx.x % 32 * 16, *metadata = records + 1024 + threadIdx.x % 32 * 4;
#pragma unroll
  for (int m = 0; m < TILES; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      a[m][half] = fetch16(values + m * 4 * RECORD + half * 512);
      e[m][half] = fetch4(metadata + m * 4 * RECORD + half * META_HALF);
    }
  records += M_TILES * RECORD;
}
