/* Functions of cuBLASLt and cuSPARSELt as their headers declare them; each call is written down. */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static char written[1 << 16];
static size_t used;
static int refused_at = -1;
static char refused_name[64];

static int note(const char *name, const char *format, ...) {
  va_list rest;
  va_start(rest, format);
  used += snprintf(written + used, sizeof written - used, "%s ", name);
  used += vsnprintf(written + used, sizeof written - used, format, rest);
  used += snprintf(written + used, sizeof written - used, "\n");
  va_end(rest);
  return strcmp(name, refused_name) ? 0 : 7;
}

const char *fake_written(void) { return written; }
void fake_clear(const char *refuse) {
  used = 0;
  written[0] = 0;
  snprintf(refused_name, sizeof refused_name, "%s", refuse);
}
static long long at(const void *p) { return (long long)(uintptr_t)p; }

/* cublasLt.h, 13.1 */
typedef struct { uint64_t data[8]; } Algo;
typedef struct {
  Algo algo;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
} Heuristic;
int fake_heuristic_bytes(void) { return sizeof(Heuristic); }

const char *cublasLtGetStatusName(int status) { return status == 7 ? "INVALID_VALUE" : "OTHER"; }
int cublasLtGetProperty(int part, int *value) {
  *value = part == 0 ? 13 : part;
  return 0;
}
int cublasLtCreate(void **handle) {
  *handle = (void *)0x100000001ull;
  return note("cublasLtCreate", "");
}
int cublasLtMatmulDescCreate(void **made, int compute, int scale) {
  *made = (void *)0x200000001ull;
  return note("cublasLtMatmulDescCreate", "%d %d", compute, scale);
}
int cublasLtMatmulDescDestroy(void *made) {
  return note("cublasLtMatmulDescDestroy", "%llx", at(made));
}
int cublasLtMatmulDescSetAttribute(void *made, int key, const void *value, size_t size) {
  int64_t number = 0;
  memcpy(&number, value, size);
  return note("cublasLtMatmulDescSetAttribute", "%llx %d %lld/%zu", at(made), key,
              (long long)number, size);
}
static int layouts;
int cublasLtMatrixLayoutCreate(void **made, int type, uint64_t rows, uint64_t columns, int64_t ld) {
  *made = (void *)(0x300000000ull + (uint64_t)(++layouts));
  return note("cublasLtMatrixLayoutCreate", "%d %llu %llu %lld", type, (unsigned long long)rows,
              (unsigned long long)columns, (long long)ld);
}
int cublasLtMatrixLayoutDestroy(void *made) { return note("cublasLtMatrixLayoutDestroy", ""); }
int cublasLtMatmulPreferenceCreate(void **made) {
  *made = (void *)0x400000001ull;
  return 0;
}
int cublasLtMatmulPreferenceDestroy(void *made) { return made == (void *)0x400000001ull ? 0 : 1; }
int cublasLtMatmulPreferenceSetAttribute(void *made, int key, const void *value, size_t size) {
  int64_t number = 0;
  memcpy(&number, value, size);
  return note("cublasLtMatmulPreferenceSetAttribute", "%d %lld/%zu", key, (long long)number, size);
}
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *made, void *a, void *b, void *c, void *d,
                                   void *preference, int most, Heuristic *found, int *count) {
  for (int i = 0; i < most && i < 3; i++) {
    memset(&found[i], i + 1, sizeof(Algo));
    found[i].workspace = 1000 * i;
    found[i].state = i == 1 ? 15 : 0;
  }
  *count = most < 3 ? most : 3;
  return note("cublasLtMatmulAlgoGetHeuristic", "%llx %d", at(handle), most);
}
int cublasLtMatmulAlgoCheck(void *handle, void *made, void *a, void *b, void *c, void *d,
                            const Algo *algo, Heuristic *found) {
  found->workspace = algo->data[0] & 0xff;
  return note("cublasLtMatmulAlgoCheck", "%llx", (long long)algo->data[7]);
}
int cublasLtMatmul(void *handle, void *made, const void *alpha, const void *a, void *la,
                   const void *b, void *lb, const void *beta, const void *c, void *lc, void *d,
                   void *ld, const Algo *algo, void *workspace, size_t size, void *stream) {
  return note("cublasLtMatmul", "%llx %llx %llx %llx %llx beta %g algo %llx %llx/%zu stream %llx",
              (long long)(handle == (void *)0x100000001ull), at(a), at(b), at(c), at(d),
              *(const float *)beta, (long long)algo->data[0], at(workspace), size, at(stream));
}

/* cusparseLt.h, 0.8.0 */
typedef struct { _Alignas(16) uint8_t data[512]; } Struct;
static int even(const void *p) { return (uintptr_t)p % 16 == 0; }

const char *cusparseLtGetErrorName(int status) { return status == 7 ? "INTERNAL" : "OTHER"; }
int cusparseLtGetProperty(int part, int *value) {
  *value = part == 1 ? 8 : 0;
  return 0;
}
int cusparseLtInit(Struct *handle) {
  memset(handle, 1, sizeof *handle);
  return note("cusparseLtInit", "%d", even(handle));
}
int cusparseLtDenseDescriptorInit(const Struct *handle, Struct *made, int64_t rows,
                                  int64_t columns, int64_t ld, uint32_t alignment, int type,
                                  int order) {
  memset(made, 2, sizeof *made);
  return note("cusparseLtDenseDescriptorInit", "%lld %lld %lld %u %d %d", (long long)rows,
              (long long)columns, (long long)ld, alignment, type, order);
}
int cusparseLtStructuredDescriptorInit(const Struct *handle, Struct *made, int64_t rows,
                                       int64_t columns, int64_t ld, uint32_t alignment, int type,
                                       int order, int sparsity) {
  memset(made, 3, sizeof *made);
  return note("cusparseLtStructuredDescriptorInit", "%lld %lld %lld %u %d %d %d", (long long)rows,
              (long long)columns, (long long)ld, alignment, type, order, sparsity);
}
int cusparseLtMatDescriptorDestroy(const Struct *made) {
  return note("cusparseLtMatDescriptorDestroy", "%d", made->data[0]);
}
int cusparseLtMatmulDescriptorInit(const Struct *handle, Struct *made, int op_a, int op_b,
                                   const Struct *a, const Struct *b, const Struct *c,
                                   const Struct *d, int compute) {
  memset(made, 4, sizeof *made);
  return note("cusparseLtMatmulDescriptorInit", "%d %d %d%d%d%d %d", op_a, op_b, a->data[9],
              b->data[9], c->data[9], d->data[9], compute);
}
int cusparseLtMatmulDescSetAttribute(const Struct *handle, Struct *made, int key, const void *value,
                                     size_t size) {
  int64_t number = 0;
  memcpy(&number, value, size);
  return note("cusparseLtMatmulDescSetAttribute", "%d %lld/%zu", key, (long long)number, size);
}
int cusparseLtMatmulAlgSelectionInit(const Struct *handle, Struct *made, const Struct *matmul,
                                     int alg) {
  memset(made, 5, sizeof *made);
  return note("cusparseLtMatmulAlgSelectionInit", "%d %d", matmul->data[1], alg);
}
int cusparseLtMatmulAlgSelectionDestroy(const Struct *made) {
  return note("cusparseLtMatmulAlgSelectionDestroy", "%d", made->data[0]);
}
int cusparseLtMatmulAlgSetAttribute(const Struct *handle, Struct *made, int key, const void *value,
                                    size_t size) {
  return note("cusparseLtMatmulAlgSetAttribute", "%d %d/%zu", key, *(const int *)value, size);
}
int cusparseLtMatmulAlgGetAttribute(const Struct *handle, const Struct *made, int key, void *value,
                                    size_t size) {
  *(int *)value = key == 1 ? 5 : 0;
  return 0;
}
int cusparseLtMatmulPlanInit(const Struct *handle, Struct *plan, const Struct *matmul,
                             const Struct *algorithm) {
  memset(plan, 6, sizeof *plan);
  return note("cusparseLtMatmulPlanInit", "%d%d", matmul->data[0], algorithm->data[0]);
}
int cusparseLtMatmulPlanDestroy(const Struct *plan) {
  return note("cusparseLtMatmulPlanDestroy", "%d", plan->data[0]);
}
int cusparseLtMatmulGetWorkspace(const Struct *handle, const Struct *plan, size_t *size) {
  *size = 512;
  return 0;
}
int cusparseLtSpMMACompressedSize2(const Struct *handle, const Struct *sparse, size_t *size,
                                   size_t *buffer) {
  *size = 2304;
  *buffer = 100;
  return 0;
}
int cusparseLtSpMMACompress2(const Struct *handle, const Struct *sparse, int is_a, int op,
                             const void *dense, void *packed, void *buffer, void *stream) {
  return note("cusparseLtSpMMACompress2", "%d %d %d %llx %llx %llx %llx", sparse->data[0], is_a, op,
              at(dense), at(packed), at(buffer), at(stream));
}
int cusparseLtMatmul(const Struct *handle, const Struct *plan, const void *alpha, const void *a,
                     const void *b, const void *beta, const void *c, void *d, void *workspace,
                     void **streams, int32_t count) {
  return note("cusparseLtMatmul", "%d%d %llx %llx %llx %llx beta %g workspace %llx stream %llx %d",
              handle->data[0], plan->data[0], at(a), at(b), at(c), at(d), *(const float *)beta,
              at(workspace), at(streams[0]), count);
}
