/* Kernels of the cubins, loaded once for each CUDA context. */
#ifndef MVK_MODULES_H
#define MVK_MODULES_H

#include "device.h"

/* The function of a kernel (index into mvk_kernels) in the device's context. Thread-safe. */
mvk_status mvk_load_kernel(const struct mvk_device *device, uint32_t kernel,
                           mvk_cu_function *function);

#endif
