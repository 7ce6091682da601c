#include "errors.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char last_message[1024];

mvk_status mvk_fail(mvk_status status, const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(last_message, sizeof last_message, format, values);
    va_end(values);
    return status;
}

const char *mvk_last_error_message(void) { return last_message; }

const char *mvk_error_string(mvk_status status) {
    switch (status) {
    case MVK_SUCCESS: return "success";
    case MVK_ERROR_INVALID_ARGUMENT: return "invalid argument";
    case MVK_ERROR_NOT_COMPILED: return "no kernel was compiled for these sizes or dtypes";
    case MVK_ERROR_NO_DRIVER: return "no usable CUDA driver";
    case MVK_ERROR_NO_CONTEXT: return "no current CUDA context";
    case MVK_ERROR_UNSUPPORTED_DEVICE: return "no kernels for this device";
    case MVK_ERROR_CUDA: return "the CUDA driver reported an error";
    case MVK_ERROR_INTERNAL: return "internal error";
    }
    return "unknown status";
}

const char *mvk_version(void) { return MVK_VERSION; }
