/* Device memory through the CUDA driver alone: what the examples and the GPU tests need of it. */
#ifndef MVK_EXAMPLE_DEVICE_H
#define MVK_EXAMPLE_DEVICE_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Make the first GPU's primary context current. 0, or a reason in words. */
const char *device_start(void);

/* Device memory, filled with `bytes` bytes from the host, or with 0xff (NaN) where `host` is NULL.
 * 256-byte aligned. Ends the program where the device has none left. */
void *device_copy(const void *host, size_t bytes);

/* Wait for all work, then copy to the host. Ends the program where work has failed. */
void device_read(void *host, const void *device, size_t bytes);

void device_free(void *device);

#ifdef __cplusplus
}
#endif

#endif
