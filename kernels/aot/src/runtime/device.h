/* The GPU a call runs on, and whether the library has kernels for it. */
#ifndef MVK_DEVICE_H
#define MVK_DEVICE_H

#include "driver.h"

struct mvk_device {
    const struct mvk_driver *driver;
    unsigned long long context; /* identifies it for the life of the process where it can */
    uint32_t capability;        /* of the kernels that serve it: 80, 90, 100 */
};

/* Find the device of the current context. */
mvk_status mvk_current_device(struct mvk_device *device);

#endif
