#include "driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "errors.h"

static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct mvk_driver loaded;
static char load_error[512]; /* "" once the driver is loaded and initialised */

static int resolve(void *library, const char *name, void *function) {
    void *symbol = dlsym(library, name);
    memcpy(function, &symbol, sizeof symbol);
    if (!symbol)
        snprintf(load_error, sizeof load_error, "libcuda.so.1 has no %s: update the driver", name);
    return symbol != NULL;
}

static void load(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(load_error, sizeof load_error,
                 "the CUDA driver cannot be loaded (%s): this needs a machine with an NVIDIA GPU "
                 "and its driver, and in a container access to both",
                 dlerror());
        return;
    }
    if (!resolve(library, "cuInit", &loaded.init) ||
        !resolve(library, "cuGetErrorName", &loaded.get_error_name) ||
        !resolve(library, "cuGetErrorString", &loaded.get_error_string) ||
        !resolve(library, "cuCtxGetCurrent", &loaded.context_get_current) ||
        !resolve(library, "cuCtxGetDevice", &loaded.context_get_device) ||
        !resolve(library, "cuDeviceGetAttribute", &loaded.device_get_attribute) ||
        !resolve(library, "cuModuleLoadData", &loaded.module_load_data) ||
        !resolve(library, "cuModuleGetFunction", &loaded.module_get_function) ||
        !resolve(library, "cuFuncSetAttribute", &loaded.function_set_attribute) ||
        !resolve(library, "cuLaunchKernel", &loaded.launch_kernel))
        return;
    *(void **)&loaded.context_get_id = dlsym(library, "cuCtxGetId");

    mvk_cu_result result = loaded.init(0);
    if (result != 0) {
        const char *words = "unknown error";
        loaded.get_error_string(result, &words);
        snprintf(load_error, sizeof load_error, "the CUDA driver does not start: %s", words);
    }
}

mvk_status mvk_get_driver(const struct mvk_driver **driver) {
    pthread_once(&once, load);
    if (load_error[0]) return mvk_fail(MVK_ERROR_NO_DRIVER, "%s", load_error);
    *driver = &loaded;
    return MVK_SUCCESS;
}

mvk_status mvk_check_cuda(const struct mvk_driver *driver, mvk_cu_result result,
                          const char *verb, const char *object) {
    if (result == 0) return MVK_SUCCESS;
    const char *name = "?", *words = "unknown error";
    driver->get_error_name(result, &name);
    driver->get_error_string(result, &words);
    return mvk_fail(MVK_ERROR_CUDA, "cannot %s %s: %s (%s)", verb, object, words, name);
}
