#include "modules.h"

#include <pthread.h>
#include <stdlib.h>

#include "errors.h"
#include "inflate.h"
#include "table_types.h"

enum { ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 };
enum { SHARED_BYTES_WITHOUT_ASKING = 48 * 1024 };

/* One context's functions by kernel, NULL where none was loaded yet. */
struct context_functions {
    unsigned long long context;
    mvk_cu_function *functions;
    struct context_functions *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct context_functions *contexts;

static struct context_functions *functions_of(unsigned long long context) {
    for (struct context_functions *c = contexts; c; c = c->next)
        if (c->context == context) return c;
    struct context_functions *fresh = calloc(1, sizeof *fresh);
    if (!fresh) return NULL;
    fresh->functions = calloc((size_t)mvk_num_kernels, sizeof *fresh->functions);
    if (!fresh->functions) {
        free(fresh);
        return NULL;
    }
    fresh->context = context;
    fresh->next = contexts;
    return contexts = fresh;
}

/* The module stays loaded as long as its context lives. */
static mvk_status load(const struct mvk_driver *driver, const struct mvk_kernel *kernel,
                       mvk_cu_function *function) {
    uint8_t *cubin = malloc(kernel->size);
    if (!cubin) return mvk_fail(MVK_ERROR_INTERNAL, "out of memory");
    if (!mvk_inflate(mvk_cubins + kernel->offset, kernel->packed_size, cubin, kernel->size)) {
        free(cubin);
        return mvk_fail(MVK_ERROR_INTERNAL, "the library's copy of %s is damaged: install it again",
                        kernel->symbol);
    }
    mvk_cu_module module;
    mvk_cu_result result = driver->module_load_data(&module, cubin);
    free(cubin);
    MVK_TRY(mvk_check_cuda(driver, result, "load", kernel->symbol));
    MVK_TRY(mvk_check_cuda(driver, driver->module_get_function(function, module, kernel->symbol),
                           "find", kernel->symbol));
    if (kernel->shared_bytes <= SHARED_BYTES_WITHOUT_ASKING) return MVK_SUCCESS;
    return mvk_check_cuda(driver,
                          driver->function_set_attribute(*function,
                                                         ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                                         (int)kernel->shared_bytes),
                          "get shared memory for", kernel->symbol);
}

mvk_status mvk_load_kernel(const struct mvk_device *device, uint32_t kernel,
                           mvk_cu_function *function) {
    pthread_mutex_lock(&lock);
    mvk_status status = MVK_SUCCESS;
    struct context_functions *known = functions_of(device->context);
    if (!known) status = mvk_fail(MVK_ERROR_INTERNAL, "out of memory");
    else if (known->functions[kernel]) *function = known->functions[kernel];
    else {
        status = load(device->driver, &mvk_kernels[kernel], function);
        if (status == MVK_SUCCESS) known->functions[kernel] = *function;
    }
    pthread_mutex_unlock(&lock);
    return status;
}
