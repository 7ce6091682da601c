#include "device.h"

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static struct {
    int (*init)(unsigned);
    int (*device_get)(int *, int);
    int (*retain)(void **, int);
    int (*set_current)(void *);
    int (*allocate)(uint64_t *, size_t);
    int (*release)(uint64_t);
    int (*upload)(uint64_t, const void *, size_t);
    int (*download)(void *, uint64_t, size_t);
    int (*fill)(uint64_t, unsigned char, size_t);
    int (*synchronize)(void);
} cuda;

const char *device_start(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) return "libcuda.so.1 cannot be loaded";
    *(void **)&cuda.init = dlsym(library, "cuInit");
    *(void **)&cuda.device_get = dlsym(library, "cuDeviceGet");
    *(void **)&cuda.retain = dlsym(library, "cuDevicePrimaryCtxRetain");
    *(void **)&cuda.set_current = dlsym(library, "cuCtxSetCurrent");
    *(void **)&cuda.allocate = dlsym(library, "cuMemAlloc_v2");
    *(void **)&cuda.release = dlsym(library, "cuMemFree_v2");
    *(void **)&cuda.upload = dlsym(library, "cuMemcpyHtoD_v2");
    *(void **)&cuda.download = dlsym(library, "cuMemcpyDtoH_v2");
    *(void **)&cuda.fill = dlsym(library, "cuMemsetD8_v2");
    *(void **)&cuda.synchronize = dlsym(library, "cuCtxSynchronize");
    if (!cuda.init || !cuda.allocate || !cuda.synchronize) return "libcuda.so.1 is no CUDA driver";
    int device;
    void *context;
    if (cuda.init(0) || cuda.device_get(&device, 0)) return "there is no GPU";
    if (cuda.retain(&context, device) || cuda.set_current(context)) return "the GPU is not usable";
    return NULL;
}

static void must(int result, const char *doing) {
    if (result == 0) return;
    fprintf(stderr, "cannot %s: CUDA error %d\n", doing, result);
    exit(1);
}

void *device_copy(const void *host, size_t bytes) {
    uint64_t address;
    must(cuda.allocate(&address, bytes ? bytes : 1), "allocate device memory");
    if (host) must(cuda.upload(address, host, bytes), "copy to the device");
    else must(cuda.fill(address, 0xff, bytes), "fill device memory");
    return (void *)(uintptr_t)address;
}

void device_read(void *host, const void *device, size_t bytes) {
    must(cuda.synchronize(), "finish the work on the device");
    must(cuda.download(host, (uint64_t)(uintptr_t)device, bytes), "copy from the device");
}

void device_free(void *device) {
    must(cuda.release((uint64_t)(uintptr_t)device), "free device memory");
}
