/* Answers for the CUDA runtime and driver on a machine without a GPU, as much as PyTorch asks while it compiles: one device, no
   error, no work. Preloaded, and as libcuda.so.1; see gpu_standins.py. */

typedef int Status;
enum { VERSION = 13000 };

Status cudaGetDeviceCount(int *count) { *count = 1; return 0; }
Status cudaGetDevice(int *device) { *device = 0; return 0; }
Status cudaSetDevice(int device) { (void)device; return 0; }
Status cudaGetLastError(void) { return 0; }
Status cudaPeekAtLastError(void) { return 0; }
Status cudaDriverGetVersion(int *version) { *version = VERSION; return 0; }
Status cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
Status cudaStreamIsCapturing(void *stream, int *status) { (void)stream; *status = 0; return 0; }
Status cudaDeviceSynchronize(void) { return 0; }
Status cudaStreamSynchronize(void *stream) { (void)stream; return 0; }

Status cuInit(unsigned flags) { (void)flags; return 0; }
Status cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
Status cuDeviceGetCount(int *count) { *count = 1; return 0; }
Status cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { (void)device; *flags = 0; *active = 0; return 0; }
Status cuGetErrorString(int error, const char **text) { (void)error; *text = "stand-in"; return 0; }
