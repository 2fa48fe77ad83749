/* libcuda.so.1 as far as Triton's launcher uses it, without a GPU: it writes down what would have been launched.

   Before a function is loaded, expect_function() tells the sizes of its parameters in bytes, as CUDA would read them
   from the binary. take_launches() gives what was launched since it was last asked: for each launch the function's
   number, the grid (3), threads per block, shared memory, the parameters' size in all and their bytes, padded to 8. */
#include <stdint.h>
#include <string.h>
#include "cuda.h"

#define MOST 64
static struct { char name[64]; int count, sizes[MOST]; } functions[MOST];
static int known;
static int64_t log_[1 << 16];
static size_t used;

int expect_function(const char *name, int count, const int *sizes) {
  if (known == MOST || count > MOST) return -1;
  strncpy(functions[known].name, name, sizeof functions[known].name - 1);
  functions[known].count = count;
  memcpy(functions[known].sizes, sizes, count * sizeof *sizes);
  return known++;
}

size_t take_launches(int64_t *out, size_t room) {
  size_t taken = used < room ? used : room;
  memcpy(out, log_, taken * sizeof *out);
  used = 0;
  return taken;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)1; return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  for (int i = known - 1; i >= 0; i--)
    if (!strcmp(functions[i].name, name)) { *function = (CUfunction)(uintptr_t)(i + 1); return CUDA_SUCCESS; }
  return CUDA_ERROR_NOT_FOUND;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  int number = (int)(uintptr_t)function - 1;
  if (number < 0 || number >= known || extra) return CUDA_ERROR_INVALID_VALUE;
  int bytes = 0;
  for (int i = 0; i < functions[number].count; i++) bytes += functions[number].sizes[i];
  if (used + 7 + bytes / 8 + 1 > sizeof log_ / sizeof *log_) used = 0; /* nobody asks: a benchmark */
  int64_t head[] = {number, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
                    config->sharedMemBytes, bytes};
  memcpy(log_ + used, head, sizeof head);
  used += 7;
  char *to = (char *)(log_ + used);
  for (int i = 0; i < functions[number].count; i++) {
    memcpy(to, parameters[i], functions[number].sizes[i]);
    to += functions[number].sizes[i];
  }
  memset(to, 0, -bytes & 7);
  used += (bytes + 7) / 8;
  return CUDA_SUCCESS;
}

/* A tensor map here is what it was made of. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  if (!address || (uintptr_t)address & 15 || rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
  uint64_t *to = (uint64_t *)map;
  memset(map, 0, sizeof *map);
  *to++ = (uint64_t)address;
  *to++ = (uint64_t)type | (uint64_t)rank << 16 | (uint64_t)swizzle << 32;
  for (unsigned i = 0; i < rank; i++) {
    if (!sizes[i]) return CUDA_ERROR_INVALID_VALUE;
    if (i + 1 < rank && strides[i] & 15) return CUDA_ERROR_INVALID_VALUE;
    *to++ = sizes[i] << 16 | box[i];
    if (i + 1 < rank) *to++ = strides[i];
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute what, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return what == CU_POINTER_ATTRIBUTE_DEVICE_POINTER ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute what, CUdevice device) {
  *value = what == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32 : 227 << 10; /* shared memory of an H200; nothing else counts */
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute what, CUfunction function) {
  *value = what == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute what, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "refused by the stand-in"; return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  *count = 1;
  return CUDA_SUCCESS;
}
