// entry points whose arguments do not matter, without their prototypes
void simulated_count(const char *);
int cuTensorMapEncodeTiled() { return 0; }
int cuLinkAddData_v2() { return 0; }
int cuLinkComplete() { return 0; }
int cuLinkCreate_v2() { return 0; }
int cuLinkDestroy() { return 0; }
int cuMemcpyDtoH_v2() { return 0; }
int cuMemcpyHtoD_v2() { return 0; }
int cuStreamSynchronize() { return 0; }
int cuFuncGetModule() { return 0; }
int cuStreamGetCtx() { return 0; }
int cuCtxCreate_v2() { return 0; }
int cuCtxGetStreamPriorityRange() { return 0; }
int cuEventRecord() { return 0; }
int cuEventCreate() { return 0; }
int cuMemAlloc_v2() { return 0; }
int cuMemFree_v2() { return 0; }
int cuMemsetD8Async() { return 0; }
int cuMemcpyDtoHAsync_v2() { return 0; }
int cuMemcpyHtoDAsync_v2() { return 0; }
int cuMemGetAddressRange_v2() { return 0; }
int cublasSgemv_v2() { simulated_count("gemm:sgemv"); return 0; }
int cublasDgemv_v2() { simulated_count("gemm:dgemv"); return 0; }
int cublasSdot_v2() { simulated_count("gemm:sdot"); return 0; }
int cublasDdot_v2() { simulated_count("gemm:ddot"); return 0; }
int cublasDotEx() { simulated_count("gemm:dotEx"); return 0; }
int __cudaInitModule() { simulated_count("other:__cudaInitModule"); return 0; }
int cudaDeviceGetDefaultMemPool() { simulated_count("other:cudaDeviceGetDefaultMemPool"); return 0; }
int cudaDeviceGetGraphMemAttribute() { simulated_count("other:cudaDeviceGetGraphMemAttribute"); return 0; }
int cudaDeviceSetGraphMemAttribute() { simulated_count("other:cudaDeviceSetGraphMemAttribute"); return 0; }
int cudaGraphAddNode() { simulated_count("other:cudaGraphAddNode"); return 0; }
int cudaGraphConditionalHandleCreate() { simulated_count("other:cudaGraphConditionalHandleCreate"); return 0; }
int cudaGraphNodeGetDependencies() { simulated_count("other:cudaGraphNodeGetDependencies"); return 0; }
int cudaGraphRetainUserObject() { simulated_count("other:cudaGraphRetainUserObject"); return 0; }
int cudaKernelSetAttributeForDevice() { simulated_count("other:cudaKernelSetAttributeForDevice"); return 0; }
int cudaLaunchHostFunc() { simulated_count("other:cudaLaunchHostFunc"); return 0; }
int cudaLibraryGetKernel() { simulated_count("other:cudaLibraryGetKernel"); return 0; }
int cudaLibraryLoadData() { simulated_count("other:cudaLibraryLoadData"); return 0; }
int cudaLibraryUnload() { simulated_count("other:cudaLibraryUnload"); return 0; }
int cudaMemPoolGetAttribute() { simulated_count("other:cudaMemPoolGetAttribute"); return 0; }
int cudaMemPoolSetAccess() { simulated_count("other:cudaMemPoolSetAccess"); return 0; }
int cudaMemPoolSetAttribute() { simulated_count("other:cudaMemPoolSetAttribute"); return 0; }
int cudaMemPoolTrimTo() { simulated_count("other:cudaMemPoolTrimTo"); return 0; }
int cudaMemcpy2DAsync() { simulated_count("other:cudaMemcpy2DAsync"); return 0; }
int cudaStreamAddCallback() { simulated_count("other:cudaStreamAddCallback"); return 0; }
int cudaUserObjectCreate() { simulated_count("other:cudaUserObjectCreate"); return 0; }
int cudaUserObjectRelease() { simulated_count("other:cudaUserObjectRelease"); return 0; }
int cudaStreamUpdateCaptureDependencies() { simulated_count("other:cudaStreamUpdateCaptureDependencies"); return 0; }
int cuCtxGetLimit() { return 0; }
int cuCtxSetLimit() { return 0; }
int cuTensorMapEncodeIm2col() { return 0; }
int cuPointerGetAttributes(unsigned n, int *a, void **data, unsigned long long p) { for (unsigned i = 0; i < n; i++) { if (a[i] == 3) *(unsigned long long *)data[i] = p; else *(int *)data[i] = 2; } return 0; }
