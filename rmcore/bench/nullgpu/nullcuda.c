// A GPU that does nothing: the entry points of the CUDA runtime, the driver, cuBLAS and NCCL that PyTorch calls.
//
// Input: calls of a CUDA build of PyTorch, into which this library is preloaded (see __init__.py).
// Output: counters. Kernels are counted by name, and floating point operations of matrix products are added up.
// Example: a layer of 1.4 billion parameters runs forward and backward in no time, and nullcuda_launches() grows by
// 137.
//
// Memory is reserved and never touched, so 150 GB of it fit on a small machine. Only small copies and collectives move
// bytes, because the host reads them. All other values are garbage. NULLCUDA_DEVICES, NULLCUDA_BYTES and NULLCUDA_ARCH
// choose the machine.

#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <pthread.h>
#include <sys/mman.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdarg.h>

// Calls that only succeed, by the type that they return.
#define RUNTIME(name, ...) \
  cudaError_t name(__VA_ARGS__) { return cudaSuccess; }
#define LIBRARY(name, ...) \
  int name(__VA_ARGS__) { return 0; }
#define DRIVER(name, ...) \
  CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }

static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
static __thread int cur = 0;
static int ndev(void) {
  const char* e = getenv("NULLCUDA_DEVICES");
  return e ? atoi(e) : 1;
}
static size_t total_mem(void) {
  const char* e = getenv("NULLCUDA_BYTES");
  return e ? strtoull(e, 0, 10) : 150754820096ull;
}
static int arch(void) {
  const char* e = getenv("NULLCUDA_ARCH");
  return e ? atoi(e) : 90;
}

// ---- names of kernels, by the address of their host functions
#define HN (1 << 18)
static const void* hk[HN];
static const char* hv[HN];
static void put(const void* k, const char* v) {
  uint64_t h = ((uintptr_t)k >> 4) * 0x9E3779B97F4A7C15ull;
  for (size_t i = h >> 46;; i = (i + 1) & (HN - 1)) {
    if (!hk[i] || hk[i] == k) {
      hk[i] = k;
      hv[i] = v;
      return;
    }
  }
}
static const char* get(const void* k) {
  uint64_t h = ((uintptr_t)k >> 4) * 0x9E3779B97F4A7C15ull;
  for (size_t i = h >> 46;; i = (i + 1) & (HN - 1)) {
    if (!hk[i]) return "?";
    if (hk[i] == k) return hv[i];
  }
}
// ---- counters by name
#define CN (1 << 14)
static const char* ck[CN];
static uint64_t cc[CN];
void nullcuda_count(const char* name) {
  pthread_mutex_lock(&mu);
  uint64_t h = 0;
  for (const char* p = name; *p; p++) h = h * 131 + (unsigned char)*p;
  for (size_t i = h & (CN - 1);; i = (i + 1) & (CN - 1)) {
    if (!ck[i]) {
      ck[i] = strdup(name);
      cc[i] = 1;
      break;
    }
    if (!strcmp(ck[i], name)) {
      cc[i]++;
      break;
    }
  }
  pthread_mutex_unlock(&mu);
}
void nullcuda_reset(void) {
  pthread_mutex_lock(&mu);
  memset(cc, 0, sizeof cc);
  pthread_mutex_unlock(&mu);
}
void nullcuda_dump(const char* path) {
  FILE* f = fopen(path, "w");
  pthread_mutex_lock(&mu);
  for (int i = 0; i < CN; i++)
    if (ck[i] && cc[i]) fprintf(f, "%llu\t%s\n", (unsigned long long)cc[i], ck[i]);
  pthread_mutex_unlock(&mu);
  fclose(f);
}
static void countf(const char* fmt, ...) {
  char b[256];
  va_list a;
  va_start(a, fmt);
  vsnprintf(b, sizeof b, fmt, a);
  va_end(a);
  nullcuda_count(b);
}

static uint64_t launches;
uint64_t nullcuda_launches(void) {
  pthread_mutex_lock(&mu);
  uint64_t n = launches;
  pthread_mutex_unlock(&mu);
  return n;
}
static void launch(const char* name) {
  pthread_mutex_lock(&mu);
  launches++;
  pthread_mutex_unlock(&mu);
  nullcuda_count(name);
}

// ---- memory
typedef struct {
  char* p;
  size_t n;
  int dev;
} blk;
static blk* bl;
static size_t nb, capb;
static size_t used[64];
static cudaError_t alloc_dev(void** out, size_t n) {
  if (n == 0) {
    *out = NULL;
    return cudaSuccess;
  }
  size_t m = (n + 4095) & ~4095ull;
  pthread_mutex_lock(&mu);
  if (used[cur] + m > total_mem()) {
    pthread_mutex_unlock(&mu);
    *out = NULL;
    return cudaErrorMemoryAllocation;
  }
  char* p = mmap(NULL, m + (2 << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    pthread_mutex_unlock(&mu);
    return cudaErrorMemoryAllocation;
  }
  char* q = (char*)(((uintptr_t)p + (2 << 20) - 1) & ~((uintptr_t)(2 << 20) - 1));
  if (nb == capb) {
    capb = capb ? 2 * capb : 1024;
    bl = realloc(bl, capb * sizeof *bl);
  }
  bl[nb++] = (blk){q, m, cur};
  used[cur] += m;
  pthread_mutex_unlock(&mu);
  *out = q;
  return cudaSuccess;
}
static int find(const void* p) {
  for (size_t i = 0; i < nb; i++)
    if ((char*)p >= bl[i].p && (char*)p < bl[i].p + bl[i].n) return i;
  return -1;
}
static int is_dev(const void* p) {
  pthread_mutex_lock(&mu);
  int r = find(p) >= 0;
  pthread_mutex_unlock(&mu);
  return r;
}
cudaError_t cudaMalloc(void** p, size_t n) {
  countf("api cudaMalloc");
  return alloc_dev(p, n);
}
cudaError_t cudaFree(void* p) {
  if (!p) return cudaSuccess;
  countf("api cudaFree");
  pthread_mutex_lock(&mu);
  for (size_t i = 0; i < nb; i++)
    if (bl[i].p == p) {
      used[bl[i].dev] -= bl[i].n;
      munmap(p, bl[i].n);
      bl[i] = bl[--nb];
      break;
    }
  pthread_mutex_unlock(&mu);
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t s) { return cudaMalloc(p, n); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t s) { return cudaFree(p); }
typedef struct {
  char* p;
  size_t n;
} hb;
static hb hbs[65536];
static int nh;
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned f) {
  countf("api cudaHostAlloc %zu", n);
  if (!n) n = 1;
  *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  pthread_mutex_lock(&mu);
  hbs[nh++] = (hb){*p, n};
  pthread_mutex_unlock(&mu);
  return *p == MAP_FAILED ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaMallocHost(void** p, size_t n) { return cudaHostAlloc(p, n, 0); }
cudaError_t cudaFreeHost(void* p) {
  countf("api cudaFreeHost");
  pthread_mutex_lock(&mu);
  for (int i = 0; i < nh; i++)
    if (hbs[i].p == p) {
      munmap(p, hbs[i].n);
      hbs[i] = hbs[--nh];
      break;
    }
  pthread_mutex_unlock(&mu);
  return cudaSuccess;
}
RUNTIME(cudaHostRegister, void* p, size_t n, unsigned f)
RUNTIME(cudaHostUnregister, void* p)
cudaError_t cudaMemGetInfo(size_t* f, size_t* t) {
  *t = total_mem();
  *f = *t - used[cur];
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  a->device = -1;
  a->type = cudaMemoryTypeUnregistered;
  pthread_mutex_lock(&mu);
  int i = find(p);
  if (i >= 0) {
    a->type = cudaMemoryTypeDevice;
    a->device = bl[i].dev;
    a->devicePointer = (void*)p;
  } else
    for (int j = 0; j < nh; j++)
      if ((char*)p >= hbs[j].p && (char*)p < hbs[j].p + hbs[j].n) {
        a->type = cudaMemoryTypeHost;
        a->hostPointer = (void*)p;
        a->devicePointer = (void*)p;
        a->device = 0;
        break;
      }
  pthread_mutex_unlock(&mu);
  return cudaSuccess;
}
static cudaError_t cpy(void* d, const void* s, size_t n, const char* how, cudaStream_t st) {
  int dd = is_dev(d), ss = is_dev(s);
  int own = st && st != cudaStreamLegacy && st != cudaStreamPerThread;
  countf("memcpy %s %s2%s%s", how, ss ? "D" : "H", dd ? "D" : "H", own ? ", own stream" : "");
  size_t limit = dd && ss ? 1 << 16 : dd ? 1 << 20 : (size_t)1 << 33;
  if (n <= limit) memcpy(d, s, n);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* d, const void* s, size_t n, enum cudaMemcpyKind k) { return cpy(d, s, n, "sync", 0); }
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, enum cudaMemcpyKind k, cudaStream_t st) {
  return cpy(d, s, n, "async", st);
}
cudaError_t cudaMemcpyPeerAsync(void* d, int dd, const void* s, int sd, size_t n, cudaStream_t st) {
  return cpy(d, s, n, "peer", st);
}
RUNTIME(cudaMemcpy2DAsync, void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, enum cudaMemcpyKind k,
        cudaStream_t st)
RUNTIME(cudaMemcpyToSymbol, const void* a, const void* b, size_t c, size_t o, enum cudaMemcpyKind k)
cudaError_t cudaMemset(void* d, int v, size_t n) {
  countf("memset");
  if (n <= 1 << 16 && is_dev(d)) memset(d, v, n);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t s) {
  countf("memset");
  if (n <= 1 << 16 && is_dev(d)) memset(d, v, n);
  return cudaSuccess;
}

// ---- device
cudaError_t cudaGetDeviceCount(int* n) {
  *n = ndev();
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* d) {
  *d = cur;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int d) {
  cur = d;
  return cudaSuccess;
}
RUNTIME(cudaInitDevice, int d, unsigned a, unsigned b)
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, getenv("NULLCUDA_NAME") ? getenv("NULLCUDA_NAME") : "NVIDIA H200");
  p->totalGlobalMem = total_mem();
  p->sharedMemPerBlock = 49152;
  p->regsPerBlock = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = 1024;
  p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = 65535;
  p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = arch() / 10;
  p->minor = arch() % 10;
  p->textureAlignment = 512;
  p->multiProcessorCount = 132;
  p->l2CacheSize = 62914560;
  p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlockOptin = 232448;
  p->reservedSharedMemPerBlock = 1024;
  p->maxBlocksPerMultiProcessor = 32;
  p->memoryBusWidth = 6144;
  p->unifiedAddressing = 1;
  p->concurrentKernels = 1;
  p->cooperativeLaunch = 1;
  p->persistingL2CacheMaxSize = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* v, enum cudaDeviceAttr a, int d) {
  switch ((int)a) {
    case cudaDevAttrMaxThreadsPerBlock:
      *v = 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *v = 49152;
      break;
    case cudaDevAttrWarpSize:
      *v = 32;
      break;
    case cudaDevAttrMultiProcessorCount:
      *v = 132;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *v = 2048;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *v = arch() / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *v = arch() % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *v = 232448;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *v = 233472;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
      *v = 65536;
      break;
    case cudaDevAttrMaxGridDimX:
      *v = 2147483647;
      break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *v = 65535;
      break;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      *v = 1024;
      break;
    case cudaDevAttrMaxBlockDimZ:
      *v = 64;
      break;
    case cudaDevAttrClockRate:
      *v = 1980000;
      break;
    case cudaDevAttrMemoryClockRate:
      *v = 3201000;
      break;
    case cudaDevAttrGlobalMemoryBusWidth:
      *v = 6144;
      break;
    case cudaDevAttrL2CacheSize:
      *v = 62914560;
      break;
    default:
      *v = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* c, int a, int b) {
  *c = 1;
  return cudaSuccess;
}
RUNTIME(cudaDeviceEnablePeerAccess, int d, unsigned f)
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* m, int d) {
  *m = (void*)8;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int d) {
  snprintf(s, n, "0000:%02x:00.0", d);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* a, int* b) {
  *a = 0;
  *b = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
  countf("SYNC device");
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}
RUNTIME(cudaGetLastError, void)
RUNTIME(cudaPeekAtLastError, void)
const char* cudaGetErrorString(cudaError_t e) { return e == 2 ? "out of memory" : "null cuda error"; }
const char* cudaGetErrorName(cudaError_t e) { return "nullCudaError"; }
cudaError_t cudaGetSymbolAddress(void** p, const void* s) {
  *p = (void*)s;
  return cudaSuccess;
}
RUNTIME(cudaProfilerStart, void)
RUNTIME(cudaProfilerStop, void)
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned v, unsigned long long fl,
                                             enum cudaDriverEntryPointQueryResult* r) {
  *f = dlsym(RTLD_DEFAULT, name);
  if (r) *r = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *f ? cudaSuccess : cudaErrorNotSupported;
}
RUNTIME(cudaMemPoolGetAttribute, cudaMemPool_t m, enum cudaMemPoolAttr a, void* v)
RUNTIME(cudaMemPoolSetAttribute, cudaMemPool_t m, enum cudaMemPoolAttr a, void* v)
RUNTIME(cudaMemPoolSetAccess, cudaMemPool_t m, const struct cudaMemAccessDesc* d, size_t n)
RUNTIME(cudaMemPoolTrimTo, cudaMemPool_t m, size_t n)
// ---- streams, events
static cudaError_t mk(void** p) {
  *p = calloc(1, 64);
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* s) { return mk((void**)s); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned f) { return mk((void**)s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned f, int p) { return mk((void**)s); }
cudaError_t cudaStreamDestroy(cudaStream_t s) {
  free(s);
  return cudaSuccess;
}
RUNTIME(cudaStreamQuery, cudaStream_t s)
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  countf("SYNC stream");
  return cudaSuccess;
}
RUNTIME(cudaStreamWaitEvent, cudaStream_t s, cudaEvent_t e, unsigned f)
cudaError_t cudaStreamGetPriority(cudaStream_t s, int* p) {
  *p = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus* c) {
  *c = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus* c, unsigned long long* id,
                                     cudaGraph_t* g, const cudaGraphNode_t** dp, const cudaGraphEdgeData** ed,
                                     size_t* n) {
  *c = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (g) *g = 0;
  if (dp) *dp = 0;
  if (n) *n = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) { return cudaErrorNotSupported; }
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* g) { return cudaErrorNotSupported; }
RUNTIME(cudaThreadExchangeStreamCaptureMode, enum cudaStreamCaptureMode* m)
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void* u, unsigned fl) {
  f(s, cudaSuccess, u);
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void* u) {
  f(u);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* e) { return mk((void**)e); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned f) { return mk((void**)e); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
  free(e);
  return cudaSuccess;
}
RUNTIME(cudaEventRecord, cudaEvent_t e, cudaStream_t s)
RUNTIME(cudaEventRecordWithFlags, cudaEvent_t e, cudaStream_t s, unsigned f)
RUNTIME(cudaEventQuery, cudaEvent_t e)
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  countf("SYNC event");
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* t, cudaEvent_t a, cudaEvent_t b) {
  *t = 1.0f;
  return cudaSuccess;
}
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* h, void* p) {
  memset(h, 0, sizeof *h);
  return cudaSuccess;
}
// ---- kernels
void** __cudaRegisterFatBinary(void* f) { return calloc(1, 64); }
void __cudaRegisterFatBinaryEnd(void** h) {}
void __cudaUnregisterFatBinary(void** h) {}
char __cudaInitModule(void** h) { return 1; }
void __cudaRegisterFunction(void** h, const char* hostFun, char* deviceFun, const char* deviceName, int tl, void* tid,
                            void* bid, void* bd, void* gd, int* ws) {
  pthread_mutex_lock(&mu);
  put(hostFun, deviceName);
  pthread_mutex_unlock(&mu);
}
void __cudaRegisterVar(void** h, char* hv_, char* da, const char* dn, int ext, size_t size, int c, int g) {}
void __cudaRegisterManagedVar(void** h, void** a, char* b, const char* c, int d, size_t e, int f, int g) {}
static __thread struct {
  dim3 g, b;
  size_t sh;
  void* st;
} cfg;
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t sh, void* st) {
  cfg.g = g;
  cfg.b = b;
  cfg.sh = sh;
  cfg.st = st;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* sh, void* st) {
  *g = cfg.g;
  *b = cfg.b;
  *sh = cfg.sh;
  *(void**)st = cfg.st;
  return cudaSuccess;
}
static cudaError_t check(dim3 g, dim3 b) {
  if (!g.x || !g.y || !g.z || g.y > 65535 || g.z > 65535 || (uint64_t)b.x * b.y * b.z > 1024 || !b.x) {
    countf("BAD LAUNCH grid %u %u %u block %u %u %u", g.x, g.y, g.z, b.x, b.y, b.z);
    return cudaErrorInvalidConfiguration;
  }
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void** a, size_t sh, cudaStream_t s) {
  launch(get(f));
  return check(g, b);
}
cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 g, dim3 b, void** a, size_t sh, cudaStream_t s) {
  launch(get(f));
  return check(g, b);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** a) {
  launch(get(f));
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) {
  *k = (cudaKernel_t)f;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 g, dim3 b, void** a, size_t sh, cudaStream_t s) {
  launch(get((const void*)f));
  return check(g, b);
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* a, const void* f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->ptxVersion = arch();
  a->binaryVersion = arch();
  a->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
RUNTIME(cudaFuncSetAttribute, const void* f, enum cudaFuncAttribute a, int v)
RUNTIME(cudaFuncSetCacheConfig, const void* f, enum cudaFuncCache c)
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void* f, int b, size_t s) {
  *n = 4;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* f, int b, size_t s,
                                                                   unsigned fl) {
  *n = 4;
  return cudaSuccess;
}
// ---- cuBLAS
static double gemm_flops = 0;
double nullcuda_flops(int reset) {
  pthread_mutex_lock(&mu);
  double r = gemm_flops;
  if (reset) gemm_flops = 0;
  pthread_mutex_unlock(&mu);
  return r;
}
static void gemm(const char* w, int m, int n, int k, int b) {
  pthread_mutex_lock(&mu);
  launches++;
  gemm_flops += 2.0 * m * n * k * b;
  pthread_mutex_unlock(&mu);
  countf("GEMM %s m=%d n=%d k=%d b=%d", w, m, n, k, b);
}
int cublasCreate_v2(void** h) {
  *h = calloc(1, 256);
  return 0;
}
LIBRARY(cublasDestroy_v2, void* h)
LIBRARY(cublasSetStream_v2, void* h, void* s)
LIBRARY(cublasSetWorkspace_v2, void* h, void* w, size_t n)
LIBRARY(cublasSetMathMode, void* h, int m)
int cublasGetMathMode(void* h, int* m) {
  *m = 0;
  return 0;
}
LIBRARY(cublasSetPointerMode_v2, void* h, int m)
int cublasGetPointerMode_v2(void* h, int* m) {
  *m = 0;
  return 0;
}
int cublasGemmEx(void* h, int ta, int tb, int m, int n, int k, const void* al, const void* A, int at, int lda,
                 const void* B, int bt, int ldb, const void* be, void* C, int ct, int ldc, int comp, int algo) {
  char w[32];
  snprintf(w, 32, "Ex%d.%d ta%d tb%d", at, comp, ta, tb);
  gemm(w, m, n, k, 1);
  return 0;
}
int cublasGemmStridedBatchedEx(void* h, int ta, int tb, int m, int n, int k, const void* al, const void* A, int at,
                               int lda, long long sa, const void* B, int bt, int ldb, long long sb, const void* be,
                               void* C, int ct, int ldc, long long sc, int count, int comp, int algo) {
  gemm("SBEx", m, n, k, count);
  return 0;
}
int cublasSgemm_v2(void* h, int ta, int tb, int m, int n, int k, const float* al, const float* A, int lda,
                   const float* B, int ldb, const float* be, float* C, int ldc) {
  gemm("S", m, n, k, 1);
  return 0;
}
int cublasSgemmStridedBatched(void* h, int ta, int tb, int m, int n, int k, const float* al, const float* A, int lda,
                              long long sa, const float* B, int ldb, long long sb, const float* be, float* C, int ldc,
                              long long sc, int count) {
  gemm("SSB", m, n, k, count);
  return 0;
}
int cublasSgemmEx(void* h, int ta, int tb, int m, int n, int k, const float* al, const void* A, int at, int lda,
                  const void* B, int bt, int ldb, const float* be, void* C, int ct, int ldc) {
  gemm("SEx", m, n, k, 1);
  return 0;
}
int cublasDgemm_v2(void* h, int ta, int tb, int m, int n, int k) {
  gemm("D", m, n, k, 1);
  return 0;
}
int cublasDgemmStridedBatched(void* h, int ta, int tb, int m, int n, int k) {
  gemm("DSB", m, n, k, 1);
  return 0;
}
int cublasSgemv_v2(void* h, int t, int m, int n) {
  gemm("Sgemv", m, n, 1, 1);
  return 0;
}
int cublasDgemv_v2(void* h, int t, int m, int n) {
  gemm("Dgemv", m, n, 1, 1);
  return 0;
}
int cublasSdot_v2(void* h) {
  countf("cublasSdot");
  return 0;
}
int cublasDdot_v2(void* h) {
  countf("cublasDdot");
  return 0;
}
int cublasDotEx(void* h) {
  countf("cublasDotEx");
  return 0;
}
// cublasLt
typedef struct {
  int type;
  uint64_t r, c;
  int64_t ld;
  int batch;
} LT;
int cublasLtMatrixLayoutCreate(void** l, int type, uint64_t r, uint64_t c, int64_t ld) {
  LT* x = calloc(1, sizeof *x);
  x->type = type;
  x->r = r;
  x->c = c;
  x->ld = ld;
  x->batch = 1;
  *l = x;
  return 0;
}
int cublasLtMatrixLayoutDestroy(void* l) {
  free(l);
  return 0;
}
int cublasLtMatrixLayoutSetAttribute(void* l, int a, const void* b, size_t n) {
  if (a == 5) ((LT*)l)->batch = *(int*)b;
  return 0;
}
typedef struct {
  int ta, tb, epi;
} LD;
int cublasLtMatmulDescCreate(void** d, int c, int s) {
  *d = calloc(1, sizeof(LD));
  return 0;
}
int cublasLtMatmulDescDestroy(void* d) {
  free(d);
  return 0;
}
int cublasLtMatmulDescSetAttribute(void* d, int a, const void* b, size_t n) {
  if (a == 3) ((LD*)d)->ta = *(int*)b;
  if (a == 4) ((LD*)d)->tb = *(int*)b;
  if (a == 7) ((LD*)d)->epi = *(int*)b;
  return 0;
}
int cublasLtMatmulPreferenceCreate(void** p) {
  *p = calloc(1, 64);
  return 0;
}
int cublasLtMatmulPreferenceDestroy(void* p) {
  free(p);
  return 0;
}
LIBRARY(cublasLtMatmulPreferenceSetAttribute, void* p, int a, const void* b, size_t n)
int cublasLtMatmulAlgoGetHeuristic(void* h, void* d, void* a, void* b, void* c, void* dd, void* p, int req, void* res,
                                   int* ret) {
  memset(res, 0, 88);
  *ret = 1;
  return 0;
}
int cublasLtMatmul(void* h, void* d, const void* al, const void* A, void* la, const void* B, void* lb, const void* be,
                   const void* C, void* lc, void* D, void* ld) {
  LT *c = ld, *a = la;
  LD* e = d;
  int k = e->ta ? a->r : a->c;
  char w[48];
  snprintf(w, 48, "Lt%d ta%d tb%d epi%d", a->type, e->ta, e->tb, e->epi);
  gemm(w, c->r, c->c, k, c->batch);
  return 0;
}
size_t cublasLtGetVersion(void) { return 130100; }
// ---- NCCL
int ncclGetVersion(int* v) {
  *v = 22809;
  return 0;
}
int ncclGetUniqueId(void* id) {
  memset(id, 7, 128);
  return 0;
}
typedef struct {
  int rank, size;
} NC;
static int mkc(void** c, int n, int r) {
  NC* x = calloc(1, sizeof *x);
  x->rank = r;
  x->size = n;
  *c = x;
  countf("nccl comm of %d", n);
  return 0;
}
typedef struct {
  char b[128];
} UID;
int ncclCommInitRank(void** c, int n, UID id, int r) { return mkc(c, n, r); }
int ncclCommInitRankConfig(void** c, int n, UID id, int r, void* cf) { return mkc(c, n, r); }
int ncclCommInitRankScalable(void** c, int n, int r, int ni, void* ids, void* cf) { return mkc(c, n, r); }
int ncclCommSplit(void* c, int color, int key, void** n, void* cf) {
  NC* x = c;
  countf("nccl split");
  return mkc(n, x->size, x->rank);
}
LIBRARY(ncclCommAbort, void* c)
LIBRARY(ncclCommDestroy, void* c)
LIBRARY(ncclCommFinalize, void* c)
int ncclCommGetAsyncError(void* c, int* e) {
  *e = 0;
  return 0;
}
int ncclCommCount(void* c, int* n) {
  *n = ((NC*)c)->size;
  return 0;
}
int ncclCommUserRank(void* c, int* n) {
  *n = ((NC*)c)->rank;
  return 0;
}
const char* ncclGetErrorString(int e) { return "nccl"; }
const char* ncclGetLastError(void* c) { return ""; }
LIBRARY(ncclGroupStart, void)
LIBRARY(ncclGroupEnd, void)
int ncclAllReduce(const void* s, void* r, size_t n, int t, int op, void* c, void* st) {
  static const int ts[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  if (n * ts[t] <= 65536 && s != r) memcpy(r, s, n * ts[t]);
  countf("NCCL allreduce n=%zu type=%d of %d", n, t, ((NC*)c)->size);
  if (!is_dev(s)) countf("NCCL BAD POINTER");
  return 0;
}
static const int tsz[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
int ncclAllGather(const void* s, void* r, size_t n, int t, void* c, void* st) {
  size_t b = n * tsz[t];
  if (b <= 65536)
    for (int i = 0; i < ((NC*)c)->size; i++) memcpy((char*)r + i * b, s, b);
  countf("NCCL allgather n=%zu type=%d of %d", n, t, ((NC*)c)->size);
  if (!is_dev(s)) countf("NCCL BAD POINTER");
  return 0;
}
int ncclReduceScatter(const void* s, void* r, size_t n, int t, int op, void* c, void* st) {
  countf("NCCL reducescatter n=%zu type=%d of %d", n, t, ((NC*)c)->size);
  return 0;
}
int ncclBroadcast(const void* s, void* r, size_t n, int t, int root, void* c, void* st) {
  countf("NCCL broadcast n=%zu type=%d root=%d", n, t, root);
  return 0;
}
int ncclBcast(void* r, size_t n, int t, int root, void* c, void* st) {
  countf("NCCL bcast n=%zu root=%d", n, root);
  return 0;
}
int ncclReduce(const void* s, void* r, size_t n, int t, int op, int root, void* c, void* st) {
  countf("NCCL reduce");
  return 0;
}
int ncclSend(void) {
  countf("NCCL send");
  return 0;
}
int ncclRecv(void) {
  countf("NCCL recv");
  return 0;
}
int ncclAlltoAll(void) {
  countf("NCCL alltoall");
  return 0;
}
int ncclRedOpCreatePreMulSum(int* op, void* s, int t, int res, void* c) {
  *op = 5;
  return 0;
}
LIBRARY(ncclRedOpDestroy, int op, void* c)
int ncclMemAlloc(void** p, size_t n) { return alloc_dev(p, n); }
int ncclMemFree(void* p) { return cudaFree(p); }
int ncclCommRegister(void* c, void* b, size_t n, void** h) {
  *h = (void*)1;
  return 0;
}
LIBRARY(ncclCommDeregister, void* c, void* h)
// ---- driver
DRIVER(cuInit, unsigned f)
CUresult cuDriverGetVersion(int* v) {
  *v = 13000;
  return 0;
}
CUresult cuDeviceGetCount(int* n) {
  *n = ndev();
  return 0;
}
CUresult cuDeviceGet(CUdevice* d, int i) {
  *d = i;
  return 0;
}
CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice d) {
  return cudaDeviceGetAttribute(v, (enum cudaDeviceAttr)a, d);
}
CUresult cuDeviceGetName(char* n, int l, CUdevice d) {
  snprintf(n, l, "NVIDIA H200");
  return 0;
}
#undef cuDevicePrimaryCtxRetain
#undef cuCtxCreate
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice d) {
  *c = (void*)(uintptr_t)(16 + d);
  return 0;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned* f, int* a) {
  *f = 0;
  *a = 1;
  return 0;
}
CUresult cuCtxGetCurrent(CUcontext* c) {
  *c = (void*)(uintptr_t)(16 + cur);
  return 0;
}
DRIVER(cuCtxSetCurrent, CUcontext c)
CUresult cuCtxGetDevice(CUdevice* d) {
  *d = cur;
  return 0;
}
DRIVER(cuCtxSetLimit, CUlimit l, size_t v)
CUresult cuCtxGetLimit(size_t* v, CUlimit l) {
  *v = 0;
  return 0;
}
CUresult cuGetErrorString(CUresult e, const char** s) {
  *s = "null driver error";
  return 0;
}
CUresult cuGetErrorName(CUresult e, const char** s) {
  *s = "NULLERR";
  return 0;
}
CUresult cuModuleLoadData(CUmodule* m, const void* i) {
  *m = calloc(1, 64);
  return 0;
}
CUresult cuModuleLoadDataEx(CUmodule* m, const void* i, unsigned n, CUjit_option* o, void** v) {
  *m = calloc(1, 64);
  return 0;
}
DRIVER(cuModuleUnload, CUmodule m)
CUresult cuModuleGetFunction(CUfunction* f, CUmodule m, const char* n) {
  char* s;
  if (asprintf(&s, "triton %s", n) < 0) return 1;
  *f = (CUfunction)s;
  return 0;
}
CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction f) {
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 32;
  if (a == CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES) *v = 0;
  return 0;
}
DRIVER(cuFuncSetAttribute, CUfunction f, CUfunction_attribute a, int v)
DRIVER(cuFuncSetCacheConfig, CUfunction f, CUfunc_cache c)
CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction f, const CUlaunchConfig* c) {
  *n = 1;
  return 0;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction f, int b, size_t s) {
  *n = 4;
  return 0;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** p, void** e) {
  launch((const char*)f);
  if (c->gridDimY > 65535 || c->gridDimZ > 65535 || !c->gridDimX) countf("BAD LAUNCH triton %s", (char*)f);
  return 0;
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned sh, CUstream s, void** p, void** e) {
  launch((const char*)f);
  return 0;
}
CUresult cuPointerGetAttribute(void* d, CUpointer_attribute a, CUdeviceptr p) {
  if (a == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    *(CUdeviceptr*)d = p;
  else
    *(int*)d = 0;
  return is_dev((void*)p) ? 0 : CUDA_ERROR_INVALID_VALUE;
}
DRIVER(cuTensorMapEncodeTiled, CUtensorMap* m, CUtensorMapDataType a, cuuint32_t b, void* c, const cuuint64_t* d,
       const cuuint64_t* e, const cuuint32_t* f, const cuuint32_t* g, CUtensorMapInterleave h, CUtensorMapSwizzle i,
       CUtensorMapL2promotion j, CUtensorMapFloatOOBfill k)
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus* c) {
  *c = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream s) {
  countf("SYNC stream");
  return 0;
}
CUresult cuGetProcAddress_v2(const char* n, void** f, int v, cuuint64_t fl, CUdriverProcAddressQueryResult* r) {
  *f = dlsym(RTLD_DEFAULT, n);
  if (r) *r = *f ? 0 : 1;
  return *f ? 0 : CUDA_ERROR_NOT_FOUND;
}
CUresult cuModuleLoad(CUmodule* m, const char* f) {
  *m = calloc(1, 64);
  return 0;
}
CUresult cuGetExportTable(const void** t, const CUuuid* u) { return CUDA_ERROR_NOT_FOUND; }
CUresult cuLibraryGetKernel(CUkernel* k, CUlibrary l, const char* n) {
  *k = (CUkernel)n;
  return 0;
}
CUresult cuKernelGetFunction(CUfunction* f, CUkernel k) {
  *f = (CUfunction)k;
  return 0;
}
CUresult cuModuleGetGlobal_v2(CUdeviceptr* p, size_t* n, CUmodule m, const char* s) {
  *p = 0;
  return 0;
}
CUresult cuDeviceTotalMem_v2(size_t* n, CUdevice d) {
  *n = total_mem();
  return 0;
}
CUresult cuDeviceGetUuid_v2(CUuuid* u, CUdevice d) {
  memset(u, 1, sizeof *u);
  return 0;
}
CUresult cuMemGetInfo_v2(size_t* f, size_t* t) { return cudaMemGetInfo(f, t); }
DRIVER(cuCtxSynchronize, void)

// ---- virtual memory management (expandable segments)
CUresult cuMemGetAllocationGranularity(size_t* g, const CUmemAllocationProp* p, CUmemAllocationGranularity_flags o) {
  *g = 2 << 20;
  return 0;
}
typedef struct {
  size_t n;
  int dev;
} vmh;
CUresult cuMemCreate(CUmemGenericAllocationHandle* h, size_t n, const CUmemAllocationProp* p, unsigned long long f) {
  pthread_mutex_lock(&mu);
  if (used[cur] + n > total_mem()) {
    pthread_mutex_unlock(&mu);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  used[cur] += n;
  pthread_mutex_unlock(&mu);
  vmh* x = malloc(sizeof *x);
  x->n = n;
  x->dev = cur;
  *h = (CUmemGenericAllocationHandle)(uintptr_t)x;
  countf("api cuMemCreate");
  return 0;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle h) {
  vmh* x = (vmh*)(uintptr_t)h;
  pthread_mutex_lock(&mu);
  used[x->dev] -= x->n;
  pthread_mutex_unlock(&mu);
  countf("api cuMemRelease");
  return 0;
}
CUresult cuMemAddressReserve(CUdeviceptr* p, size_t n, size_t al, CUdeviceptr a, unsigned long long f) {
  char* m = mmap(NULL, n + (2 << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (m == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  char* q = (char*)(((uintptr_t)m + (2 << 20) - 1) & ~((uintptr_t)(2 << 20) - 1));
  pthread_mutex_lock(&mu);
  if (nb == capb) {
    capb = capb ? 2 * capb : 1024;
    bl = realloc(bl, capb * sizeof *bl);
  }
  bl[nb++] = (blk){q, n, cur};
  pthread_mutex_unlock(&mu);
  *p = (CUdeviceptr)q;
  return 0;
}
CUresult cuMemAddressFree(CUdeviceptr p, size_t n) {
  pthread_mutex_lock(&mu);
  for (size_t i = 0; i < nb; i++)
    if (bl[i].p == (char*)p) {
      bl[i] = bl[--nb];
      break;
    }
  pthread_mutex_unlock(&mu);
  munmap((void*)p, n);
  return 0;
}
DRIVER(cuMemMap, CUdeviceptr p, size_t n, size_t o, CUmemGenericAllocationHandle h, unsigned long long f)
DRIVER(cuMemUnmap, CUdeviceptr p, size_t n)
DRIVER(cuMemSetAccess, CUdeviceptr p, size_t n, const CUmemAccessDesc* d, size_t c)
CUresult cuMemExportToShareableHandle(void* s, CUmemGenericAllocationHandle h, CUmemAllocationHandleType t,
                                      unsigned long long f) {
  return 1;
}
CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* h, void* s, CUmemAllocationHandleType t) {
  return 1;
}
