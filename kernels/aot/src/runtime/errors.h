/* Failing with a message that names the value, what was expected and what to try. */
#ifndef MVK_ERRORS_H
#define MVK_ERRORS_H

#include "masked_vit_kernels.h"

/* Keep the message for mvk_last_error_message of this thread and return `status`. */
mvk_status mvk_fail(mvk_status status, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Leave the calling function with its status unless it is success. */
#define MVK_TRY(call)                                                                              \
    do {                                                                                           \
        mvk_status mvk_try_status = (call);                                                        \
        if (mvk_try_status != MVK_SUCCESS) return mvk_try_status;                                  \
    } while (0)

#endif
