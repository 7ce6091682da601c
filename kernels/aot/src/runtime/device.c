#include "device.h"

#include "errors.h"
#include "table_types.h"

enum { ATTRIBUTE_CAPABILITY_MAJOR = 75, ATTRIBUTE_CAPABILITY_MINOR = 76 };

static mvk_status capability_of(int major, int minor, uint32_t *capability) {
    /* Code for 8.0 runs on every 8.x; 9.0 and 10.0 are compiled with features of their own alone. */
    if (major == 8) *capability = 80;
    else if (major == 9 && minor == 0) *capability = 90;
    else if (major == 10 && minor == 0) *capability = 100;
    else
        return mvk_fail(MVK_ERROR_UNSUPPORTED_DEVICE,
                        "the device has compute capability %d.%d; kernels exist for 8.x, 9.0 and "
                        "10.0",
                        major, minor);
    const struct mvk_op *op = &mvk_ops[0];
    for (uint32_t i = 0; i < op->num_cases; i++)
        if (mvk_cases[op->first_case + i].capability == *capability) return MVK_SUCCESS;
    return mvk_fail(MVK_ERROR_UNSUPPORTED_DEVICE,
                    "the device has compute capability %d.%d, but this library was built without "
                    "%u: add it to MVK_ARCHS and build again",
                    major, minor, *capability);
}

mvk_status mvk_current_device(struct mvk_device *device) {
    const struct mvk_driver *driver;
    MVK_TRY(mvk_get_driver(&driver));
    mvk_cu_context context = NULL;
    MVK_TRY(mvk_check_cuda(driver, driver->context_get_current(&context), "ask for", "the context"));
    if (!context)
        return mvk_fail(MVK_ERROR_NO_CONTEXT,
                        "no CUDA context is current on this thread: call cudaSetDevice or "
                        "cuCtxSetCurrent first");
    mvk_cu_device number;
    int major = 0, minor = 0;
    MVK_TRY(mvk_check_cuda(driver, driver->context_get_device(&number), "ask for", "the device"));
    MVK_TRY(mvk_check_cuda(
        driver, driver->device_get_attribute(&major, ATTRIBUTE_CAPABILITY_MAJOR, number),
        "ask for", "the compute capability"));
    MVK_TRY(mvk_check_cuda(
        driver, driver->device_get_attribute(&minor, ATTRIBUTE_CAPABILITY_MINOR, number),
        "ask for", "the compute capability"));
    device->driver = driver;
    device->context = (unsigned long long)(uintptr_t)context;
    /* An address can be that of a later context; its id cannot. */
    if (driver->context_get_id)
        MVK_TRY(mvk_check_cuda(driver, driver->context_get_id(context, &device->context),
                               "ask for", "the context's id"));
    return capability_of(major, minor, &device->capability);
}

mvk_status mvk_check_device(void) {
    struct mvk_device device;
    return mvk_current_device(&device);
}
