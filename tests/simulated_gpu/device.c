// A GPU that is not there: CUDA runtime, driver and cuBLAS entry points that do no arithmetic. Kernels are counted by name and
// do nothing; device memory is unbacked host memory. torch's dispatcher, caching allocator, autograd, sync debug mode, SDPA choice
// and Inductor/Triton compilation are the real ones.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <stdint.h>
#include <sys/mman.h>
#include <pthread.h>
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#undef cuGetProcAddress
#include <cuda_runtime_api.h>
#include <cublas_v2.h>
#include <cublasLt.h>
#undef cublasCreate_v2

static pthread_mutex_t L = PTHREAD_MUTEX_INITIALIZER;
// ---- counting
typedef struct { const char *name; long n; } Count;
#define MAXC 8192
static Count counts[MAXC]; static int ncounts;
static int tracing;
void simulated_count(const char *name) {
  pthread_mutex_lock(&L);
  int i; for (i = 0; i < ncounts; i++) if (counts[i].name == name || !strcmp(counts[i].name, name)) break;
  if (i == ncounts && ncounts < MAXC) { counts[ncounts++] = (Count){strdup(name), 0}; }
  counts[i].n++;
  pthread_mutex_unlock(&L);
  if (tracing) fprintf(stderr, "SIMULATED %s\n", name);
}
void simulated_reset(void) { for (int i = 0; i < ncounts; i++) counts[i].n = 0; }
int simulated_size(void) { return ncounts; }
const char *simulated_name(int i) { return counts[i].name; }
long simulated_n(int i) { return counts[i].n; }
void simulated_trace(int on) { tracing = on; }
#define C(x) simulated_count(x)
// ---- memory
typedef struct { char *p; size_t n; int host; } Range;
static Range ranges[65536]; static int nranges;
static void *take(size_t n, int host) {
  int flags = MAP_ANONYMOUS | MAP_NORESERVE | (host ? MAP_PRIVATE : MAP_SHARED); // RssAnon of the process: the host's part
  void *p = mmap(0, n ? n : 1, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (p == MAP_FAILED) return 0;
  pthread_mutex_lock(&L); int i; for (i = 0; i < nranges; i++) if (!ranges[i].p) break; if (i == nranges) nranges++;
  ranges[i] = (Range){p, n ? n : 1, host}; pthread_mutex_unlock(&L); return p;
}
static void drop(void *p) {
  for (int i = 0; i < nranges; i++) if (ranges[i].p == p) { munmap(p, ranges[i].n); ranges[i].p = 0; return; }
}
static int kind(const void *p) { // 0 unknown, 1 host, 2 device
  for (int i = 0; i < nranges; i++) if (ranges[i].p && (char *)p >= ranges[i].p && (char *)p < ranges[i].p + ranges[i].n) return ranges[i].host ? 1 : 2;
  return 0;
}
static size_t TOTAL(void) { const char *e = getenv("SIMULATED_GIB"); return (size_t)((e ? atof(e) : 141.0) * (1ull << 30)); }
static size_t used;
// ---- capture of a CUDA graph: one stream at a time; what no capture holds breaks it, as on a GPU
static cudaStream_t capturing; static pthread_t capturer; static int broken; static size_t nodes;
static __thread enum cudaStreamCaptureMode mode; // of this thread; 2: relaxed, by torch's allocator
static int refused(int unsafe, const char *what) {
  if (!unsafe) return 0;
  char t[128]; snprintf(t, 128, "refused:%s", what); C(t); broken = 1; return cudaErrorStreamCaptureUnsupported;
}
static int here(void) { return capturing && pthread_equal(capturer, pthread_self()) && mode != cudaStreamCaptureModeRelaxed; }
static int on(cudaStream_t s) { return capturing && s == capturing; }
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) { capturing = s; capturer = pthread_self(); broken = 0; nodes = 0; return 0; }
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) { capturing = 0; *g = broken ? 0 : (void *)0x10; return broken ? cudaErrorStreamCaptureInvalidated : 0; }
cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *n, size_t *count) { *count = nodes; return 0; }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long f) { *e = (void *)0x20; return 0; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s) { C("graph:launch"); return 0; }
cudaError_t cudaGraphDestroy(cudaGraph_t g) { return 0; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) { return 0; }
// ---- runtime
cudaError_t cudaGetDeviceCount(int *n) { const char *e = getenv("SIMULATED_COUNT"); *n = e ? atoi(e) : 1; return 0; }
static __thread int current;
cudaError_t cudaGetDevice(int *d) { *d = current; return 0; }
cudaError_t cudaSetDevice(int d) { current = d; return 0; }
cudaError_t cudaDriverGetVersion(int *v) { *v = 13000; return 0; }
cudaError_t cudaRuntimeGetVersion(int *v) { *v = 13000; return 0; }
cudaError_t cudaGetLastError(void) { return 0; }
cudaError_t cudaPeekAtLastError(void) { return 0; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p); strcpy(p->name, getenv("SIMULATED_NAME") ? getenv("SIMULATED_NAME") : "NVIDIA H200");
  p->totalGlobalMem = TOTAL(); p->sharedMemPerBlock = 49152; p->regsPerBlock = 65536; p->warpSize = 32; p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64; p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536; p->major = 9; p->minor = 0; p->multiProcessorCount = 132; p->l2CacheSize = 60 << 20; p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerMultiprocessor = 233472; p->regsPerMultiprocessor = 65536; p->sharedMemPerBlockOptin = 232448; p->reservedSharedMemPerBlock = 1024;
  p->memoryBusWidth = 6144; p->unifiedAddressing = 1; p->concurrentKernels = 1; p->maxBlocksPerMultiProcessor = 32; p->cooperativeLaunch = 1; p->asyncEngineCount = 3;
  p->memoryPoolsSupported = 1; p->textureAlignment = 512;
  return 0;
}
static int attribute(int a) {
  switch (a) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024; case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024; case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647; case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152; case cudaDevAttrWarpSize: return 32; case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrClockRate: return 1980000; case cudaDevAttrMultiProcessorCount: return 132; case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrComputeCapabilityMajor: return 9; case cudaDevAttrComputeCapabilityMinor: return 0; case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536; case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448; case cudaDevAttrMemoryClockRate: return 3201000;
    case cudaDevAttrGlobalMemoryBusWidth: return 6144; case cudaDevAttrL2CacheSize: return 60 << 20; case cudaDevAttrUnifiedAddressing: return 1; case cudaDevAttrCooperativeLaunch: return 1;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32; case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
  }
  return 0;
}
cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) { *v = attribute(a); return 0; }
cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int d) { snprintf(s, n, "0000:00:00.0"); return 0; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *lo, int *hi) { *lo = 0; *hi = -5; return 0; }
cudaError_t cudaDeviceCanAccessPeer(int *v, int a, int b) { *v = 1; return 0; }
cudaError_t cudaDeviceEnablePeerAccess(int d, unsigned f) { return 0; }
cudaError_t cudaDeviceSynchronize(void) { if (refused(here(), "cudaDeviceSynchronize")) return cudaErrorStreamCaptureUnsupported; C("sync:cudaDeviceSynchronize"); return 0; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { if (refused(here() || on(s), "cudaStreamSynchronize")) return cudaErrorStreamCaptureUnsupported; C("sync:cudaStreamSynchronize"); return 0; }
cudaError_t cudaEventSynchronize(cudaEvent_t s) { if (refused(here(), "cudaEventSynchronize")) return cudaErrorStreamCaptureUnsupported; C("sync:cudaEventSynchronize"); return 0; }
cudaError_t cudaMalloc(void **p, size_t n) { if (refused(here(), "cudaMalloc")) return cudaErrorStreamCaptureUnsupported; C("mem:cudaMalloc"); if (used + n > TOTAL()) return cudaErrorMemoryAllocation; *p = take(n, 0); used += n; return *p ? 0 : cudaErrorMemoryAllocation; }
cudaError_t cudaFree(void *p) { C("mem:cudaFree"); for (int i = 0; i < nranges; i++) if (ranges[i].p == p && p) used -= ranges[i].n; drop(p); return 0; }
cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) { return cudaMalloc(p, n); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return cudaFree(p); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned f) { if (refused(here(), "cudaHostAlloc")) return cudaErrorStreamCaptureUnsupported; C("mem:cudaHostAlloc"); *p = take(n, 1); return 0; }
cudaError_t cudaFreeHost(void *p) { drop(p); return 0; }
cudaError_t cudaHostRegister(void *p, size_t n, unsigned f) { return 0; }
cudaError_t cudaHostUnregister(void *p) { return 0; }
cudaError_t cudaMemGetInfo(size_t *f, size_t *t) { *t = TOTAL(); *f = TOTAL() - used; return 0; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a); int k = kind(p); a->type = k == 2 ? cudaMemoryTypeDevice : k == 1 ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  a->device = 0; a->devicePointer = (void *)p; a->hostPointer = k == 2 ? 0 : (void *)p; return 0;
}
static void copy(void *d, const void *s, size_t n, const char *how) {
  int a = kind(s), b = kind(d); char t[64];
  snprintf(t, 64, "copy:%s %s->%s", how, a == 2 ? "dev" : a == 1 ? "pinned" : "pageable", b == 2 ? "dev" : b == 1 ? "pinned" : "pageable"); C(t);
  if (a == 2 && b == 2) return;
  memcpy(d, s, n);
}
cudaError_t cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind k) { if (refused(here(), "cudaMemcpy")) return cudaErrorStreamCaptureUnsupported; copy(d, s, n, "cudaMemcpy"); return 0; }
cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, enum cudaMemcpyKind k, cudaStream_t st) { if (refused(on(st) && (!kind(s) || !kind(d)), "cudaMemcpyAsync")) return cudaErrorStreamCaptureUnsupported; nodes += on(st); copy(d, s, n, "cudaMemcpyAsync"); return 0; }
cudaError_t cudaMemcpyPeerAsync(void *d, int a, const void *s, int b, size_t n, cudaStream_t st) { return 0; }
cudaError_t cudaMemset(void *d, int v, size_t n) { C("memset"); return 0; }
cudaError_t cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t s) { C("memset"); return 0; }
cudaError_t cudaMemcpyToSymbol(const void *d, const void *s, size_t n, size_t o, enum cudaMemcpyKind k) { return 0; }
static char symbol_space[1 << 20];
cudaError_t cudaGetSymbolAddress(void **p, const void *s) { *p = symbol_space; return 0; }
static long handle = 0x1000;
cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = (void *)(handle += 16); return 0; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) { *s = (void *)(handle += 16); return 0; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) { *s = (void *)(handle += 16); return 0; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) { *p = 0; return 0; }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return 0; }
cudaError_t cudaStreamQuery(cudaStream_t s) { return 0; }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned f) { C("event:wait"); return 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *c) { *c = on(s); return 0; }
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *m) { enum cudaStreamCaptureMode before = mode; mode = *m; *m = before; return 0; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = (void *)(handle += 16); return 0; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { *e = (void *)(handle += 16); return 0; }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return 0; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { C("event:record"); return 0; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) { C("event:record"); return 0; }
cudaError_t cudaEventQuery(cudaEvent_t e) { return 0; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1; return 0; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) { memset(a, 0, sizeof *a); a->maxThreadsPerBlock = 1024; a->numRegs = 32; a->binaryVersion = 90; a->ptxVersion = 90; a->maxDynamicSharedSizeBytes = 232448; return 0; }
cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute a, int v) { return 0; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b, size_t s) { *n = 2; return 0; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned g) { *n = 2; return 0; }
// kernels by name
typedef struct { const void *host; const char *name; } Kernel;
#define HASH (1 << 18)
static Kernel kernels[HASH];
static unsigned slot(const void *p) { uint64_t x = (uint64_t)p * 0x9E3779B97F4A7C15ull; return x >> 46; }
void __cudaRegisterFunction(void **h, const char *host, char *dev, const char *name, int tl, void *tid, void *bid, void *bd, void *gd, int *ws) {
  unsigned i = slot(host); while (kernels[i].host && kernels[i].host != host) i = (i + 1) % HASH; kernels[i] = (Kernel){host, name};
}
static const char *name_of(const void *host) { unsigned i = slot(host); while (kernels[i].host) { if (kernels[i].host == host) return kernels[i].name; i = (i + 1) % HASH; } return "?"; }
void **__cudaRegisterFatBinary(void *x) { static void *h[4]; return h; }
void __cudaRegisterFatBinaryEnd(void **h) {}
void __cudaUnregisterFatBinary(void **h) {}
void __cudaRegisterVar(void **h, char *a, char *b, const char *n, int e, size_t s, int c, int g) {}
static void launched(const char *name) { nodes += capturing != 0; char t[512]; snprintf(t, 512, "kernel:%s", name); C(t); }
cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t st) { launched(name_of(f)); return 0; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { launched(name_of(f)); return 0; }
cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t st) { launched(name_of(f)); return 0; }
static __thread struct { dim3 g, b; size_t s; void *st; } pushed;
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t s, struct CUstream_st *st) { pushed.g = g; pushed.b = b; pushed.s = s; pushed.st = st; return 0; }
cudaError_t __cudaPopCallConfiguration(dim3 *g, dim3 *b, size_t *s, void *st) { *g = pushed.g; *b = pushed.b; *s = pushed.s; *(void **)st = pushed.st; return 0; }
cudaError_t __cudaGetKernel(cudaKernel_t *k, const void *f) { *k = (cudaKernel_t)f; return 0; }
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t st) { launched(name_of(f)); return 0; }
cudaError_t cudaProfilerStart(void) { return 0; }
cudaError_t cudaProfilerStop(void) { return 0; }
static int nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *s, void **f, unsigned v, unsigned long long fl, enum cudaDriverEntryPointQueryResult *r) {
  char t[128]; snprintf(t, 128, "%s_v2", s); void *p = dlsym(RTLD_DEFAULT, s); if (!p) p = dlsym(RTLD_DEFAULT, t); *f = p ? p : (void *)nothing; if (r) *r = 0; return 0;
}
// ---- driver
#define D(name) CUresult name() { return 0; }
CUresult cuInit(unsigned f) { return 0; }
CUresult cuDriverGetVersion(int *v) { *v = 13000; return 0; }
CUresult cuDeviceGetCount(int *n) { return cudaGetDeviceCount(n); }
CUresult cuDeviceGet(CUdevice *d, int i) { *d = i; return 0; }
CUresult cuDeviceGetName(char *s, int n, CUdevice d) { snprintf(s, n, "NVIDIA H200"); return 0; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) { *v = attribute((int)a); return 0; }
CUresult cuDeviceTotalMem_v2(size_t *n, CUdevice d) { *n = TOTAL(); return 0; }
static long context[64];
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)context; return 0; }
CUresult cuCtxSetCurrent(CUcontext c) { return 0; }
CUresult cuCtxGetDevice(CUdevice *d) { *d = 0; return 0; }
CUresult cuCtxPushCurrent_v2(CUcontext c) { return 0; }
CUresult cuCtxPopCurrent_v2(CUcontext *c) { *c = (CUcontext)context; return 0; }
CUresult cuCtxSynchronize(void) { C("sync:cuCtxSynchronize"); return 0; }
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *f, int *active) { *f = 0; *active = 1; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)context; return 0; }
CUresult cuModuleLoadData(CUmodule *m, const void *x) { *m = (CUmodule)(handle += 16); return 0; }
CUresult cuModuleLoadDataEx(CUmodule *m, const void *x, unsigned n, CUjit_option *o, void **v) { *m = (CUmodule)(handle += 16); return 0; }
CUresult cuModuleLoad(CUmodule *m, const char *x) { *m = (CUmodule)(handle += 16); return 0; }
CUresult cuModuleUnload(CUmodule m) { return 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *n) { *f = (CUfunction)strdup(n); return 0; }
CUresult cuModuleGetGlobal_v2(CUdeviceptr *p, size_t *n, CUmodule m, const char *s) { *p = (CUdeviceptr)symbol_space; if (n) *n = 4; return 0; }
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) { *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0; return 0; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return 0; }
CUresult cuGetErrorString(CUresult r, const char **s) { *s = "fake"; return 0; }
CUresult cuGetErrorName(CUresult r, const char **s) { *s = "fake"; return 0; }
CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) { if (a == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)v = p; else *(int *)v = 0; return 0; }
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int b, size_t s) { *n = 2; return 0; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 2; return 0; }
CUresult cuLaunchKernel(CUfunction f, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned g, unsigned s, CUstream st, void **p, void **x) { launched((const char *)f); return 0; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **x) { launched((const char *)f); return 0; }
CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned g, unsigned s, CUstream st, void **p) { launched((const char *)f); return 0; }
CUresult cuGetProcAddress_v2(const char *s, void **f, int v, cuuint64_t fl, CUdriverProcAddressQueryResult *r) { return cudaGetDriverEntryPointByVersion(s, f, v, 0, (void *)r); }
CUresult cuGetProcAddress(const char *s, void **f, int v, cuuint64_t fl) { return cudaGetDriverEntryPointByVersion(s, f, v, 0, 0); }
// ---- cuBLAS
cublasStatus_t cublasCreate_v2(cublasHandle_t *h) { *h = (void *)(handle += 16); return 0; }
cublasStatus_t cublasDestroy_v2(cublasHandle_t h) { return 0; }
cublasStatus_t cublasSetStream_v2(cublasHandle_t h, cudaStream_t s) { return 0; }
cublasStatus_t cublasGetStream_v2(cublasHandle_t h, cudaStream_t *s) { *s = 0; return 0; }
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t h, void *w, size_t n) { return 0; }
static cublasMath_t math;
cublasStatus_t cublasSetMathMode(cublasHandle_t h, cublasMath_t m) { math = m; return 0; }
cublasStatus_t cublasGetMathMode(cublasHandle_t h, cublasMath_t *m) { *m = math; return 0; }
cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t h, cublasPointerMode_t m) { return 0; }
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t h, cublasPointerMode_t *m) { *m = 0; return 0; }
static const char *type_name(int t) { return t == CUDA_R_16BF ? "bf16" : t == CUDA_R_16F ? "fp16" : t == CUDA_R_32F ? "fp32" : t == CUDA_R_64F ? "fp64" : "?"; }
static void product(const char *how, int m, int n, int k, int a, int c, int batch) {
  char t[200]; if (getenv("SIMULATED_SHAPES")) snprintf(t, 200, "gemm:%s %s->%s %dx%dx%d b%d", how, type_name(a), type_name(c), m, n, k, batch); else snprintf(t, 200, "gemm:%s %s->%s", how, type_name(a), type_name(c)); C(t);
}
cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const void *al, const void *A, cudaDataType At, int lda, const void *B, cudaDataType Bt, int ldb, const void *be, void *Cc, cudaDataType Ct, int ldc, cublasComputeType_t ct, cublasGemmAlgo_t algo) { product("gemmEx", m, n, k, At, Ct, 1); return 0; }
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const void *al, const void *A, cudaDataType At, int lda, long long sa, const void *B, cudaDataType Bt, int ldb, long long sb, const void *be, void *Cc, cudaDataType Ct, int ldc, long long sc, int bc, cublasComputeType_t ct, cublasGemmAlgo_t algo) { product("gemmStridedBatchedEx", m, n, k, At, Ct, bc); return 0; }
cublasStatus_t cublasSgemm_v2(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const float *al, const float *A, int lda, const float *B, int ldb, const float *be, float *Cc, int ldc) { product("sgemm", m, n, k, CUDA_R_32F, CUDA_R_32F, 1); return 0; }
cublasStatus_t cublasDgemm_v2(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const double *al, const double *A, int lda, const double *B, int ldb, const double *be, double *Cc, int ldc) { product("dgemm", m, n, k, CUDA_R_64F, CUDA_R_64F, 1); return 0; }
cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const float *al, const float *A, int lda, long long sa, const float *B, int ldb, long long sb, const float *be, float *Cc, int ldc, long long sc, int bc) { product("sgemmStridedBatched", m, n, k, CUDA_R_32F, CUDA_R_32F, bc); return 0; }
cublasStatus_t cublasDgemmStridedBatched(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const double *al, const double *A, int lda, long long sa, const double *B, int ldb, long long sb, const double *be, double *Cc, int ldc, long long sc, int bc) { product("dgemmStridedBatched", m, n, k, CUDA_R_64F, CUDA_R_64F, bc); return 0; }
cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) { *h = (void *)(handle += 16); return 0; }
cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) { return 0; }
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t h, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t e, cublasLtMatmulPreference_t p, int n, cublasLtMatmulHeuristicResult_t *r, int *got) { memset(r, 0, sizeof *r); *got = 1; return 0; }
cublasStatus_t cublasLtMatmul(cublasLtHandle_t h, cublasLtMatmulDesc_t d, const void *al, const void *A, cublasLtMatrixLayout_t a, const void *B, cublasLtMatrixLayout_t b, const void *be, const void *Cc, cublasLtMatrixLayout_t c, void *Dd, cublasLtMatrixLayout_t dl, const cublasLtMatmulAlgo_t *al2, void *w, size_t n, cudaStream_t s) {
  uint64_t ar = 0, ac = 0, dr = 0, dc = 0; uint32_t at = 0, dt = 0; int32_t ta = 0; size_t z;
  static int (*lay)(void *, int, void *, size_t, size_t *), (*des)(void *, int, void *, size_t, size_t *);
  if (!lay) { void *l = dlopen("libcublasLt.so.13", RTLD_NOLOAD | RTLD_LAZY); lay = dlsym(l, "cublasLtMatrixLayoutGetAttribute"); des = dlsym(l, "cublasLtMatmulDescGetAttribute"); }
  lay((void *)a, CUBLASLT_MATRIX_LAYOUT_ROWS, &ar, 8, &z); lay((void *)a, CUBLASLT_MATRIX_LAYOUT_COLS, &ac, 8, &z);
  lay((void *)dl, CUBLASLT_MATRIX_LAYOUT_ROWS, &dr, 8, &z); lay((void *)dl, CUBLASLT_MATRIX_LAYOUT_COLS, &dc, 8, &z);
  lay((void *)a, CUBLASLT_MATRIX_LAYOUT_TYPE, &at, 4, &z); lay((void *)dl, CUBLASLT_MATRIX_LAYOUT_TYPE, &dt, 4, &z);
  des((void *)d, CUBLASLT_MATMUL_DESC_TRANSA, &ta, 4, &z);
  product("lt", (int)dr, (int)dc, (int)(ta ? ar : ac), at, dt, 1); return 0;
}
#undef cudaStreamGetCaptureInfo
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *st, unsigned long long *id, cudaGraph_t *g, const cudaGraphNode_t **d, const cudaGraphEdgeData **e, size_t *n) { *st = on(s); if (id) *id = on(s); if (g) *g = (void *)0x10; if (n) *n = 0; return 0; }
const char *cudaGetErrorString(cudaError_t e) { return e == cudaErrorMemoryAllocation ? "out of memory" : e == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing" : e == 0 ? "no error" : "fake error"; }
const char *cudaGetErrorName(cudaError_t e) { return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaSuccess"; }
