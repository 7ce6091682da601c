/* The few functions of the CUDA driver that a launch needs, loaded at the first use. */
#ifndef MVK_DRIVER_H
#define MVK_DRIVER_H

#include <stddef.h>
#include <stdint.h>

#include "masked_vit_kernels.h"

typedef int mvk_cu_result;
typedef int mvk_cu_device;
typedef struct mvk_cu_context_ *mvk_cu_context;
typedef struct mvk_cu_module_ *mvk_cu_module;
typedef struct mvk_cu_function_ *mvk_cu_function;

struct mvk_driver {
    mvk_cu_result (*init)(unsigned flags);
    mvk_cu_result (*get_error_name)(mvk_cu_result, const char **);
    mvk_cu_result (*get_error_string)(mvk_cu_result, const char **);
    mvk_cu_result (*context_get_current)(mvk_cu_context *);
    mvk_cu_result (*context_get_device)(mvk_cu_device *);
    mvk_cu_result (*context_get_id)(mvk_cu_context, unsigned long long *); /* NULL before CUDA 12 */
    mvk_cu_result (*device_get_attribute)(int *, int attribute, mvk_cu_device);
    mvk_cu_result (*module_load_data)(mvk_cu_module *, const void *image);
    mvk_cu_result (*module_get_function)(mvk_cu_function *, mvk_cu_module, const char *name);
    mvk_cu_result (*function_set_attribute)(mvk_cu_function, int attribute, int value);
    mvk_cu_result (*launch_kernel)(mvk_cu_function, unsigned grid_x, unsigned grid_y,
                                   unsigned grid_z, unsigned block_x, unsigned block_y,
                                   unsigned block_z, unsigned shared_bytes, void *stream,
                                   void **parameters, void **extra);
};

/* The loaded driver; MVK_ERROR_NO_DRIVER with the reason where there is none. */
mvk_status mvk_get_driver(const struct mvk_driver **driver);

/* MVK_ERROR_CUDA with the driver's words unless `result` is success: "cannot load x: ...". */
mvk_status mvk_check_cuda(const struct mvk_driver *driver, mvk_cu_result result, const char *verb,
                          const char *object);

#endif
