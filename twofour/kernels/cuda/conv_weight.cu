// What the lanes of a warp hold of a weight: a step of its tiles, from shared memory. The records are those
// of conv_sparse.py: QUADS times 16 bytes a lane, with metadata where it is 2:4.
constexpr bool SPARSE = QUADS == 2;

template <int TILES>
__device__ __forceinline__ void load_weight(uint4 (&a)[TILES][QUADS], u32 (&e)[TILES][2], u32 record) {
#pragma unroll
  for (int m = 0; m < TILES; m++)
#pragma unroll
    for (int quad = 0; quad < QUADS; quad++) {
      a[m][quad] = load16(record + m * 4 * RECORD + quad * 512 + threadIdx.x % 32 * 16);
      if (SPARSE) e[m][quad & 1] = load4(record + m * 4 * RECORD + 1024 + quad * META_HALF + threadIdx.x % 32 * 4);
    }
}

// The same from global memory.
template <int TILES>
__device__ __forceinline__ void fetch_weight(uint4 (&a)[TILES][QUADS], u32 (&e)[TILES][2], const char*& records) {
  const char *values = records + threadIdx.x % 32 * 16, *metadata = records + 1024 + threadIdx.x % 32 * 4;
#pragma unroll
  for (int m = 0; m < TILES; m++)
#pragma unroll
    for (int quad = 0; quad < QUADS; quad++) {
      a[m][quad] = fetch16(values + m * 4 * RECORD + quad * 512);
      if (SPARSE) e[m][quad & 1] = fetch4(metadata + m * 4 * RECORD + quad * META_HALF);
    }
  records += M_TILES * RECORD;
}
