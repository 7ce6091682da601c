/* Assertions that say what they found. */
#ifndef MVK_TEST_CHECK_H
#define MVK_TEST_CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "masked_vit_kernels.h"

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s\n  last message: %s\n", __FILE__, __LINE__, #condition,     \
                    mvk_last_error_message());                                                     \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

/* The call fails with this status, and its message holds this text. */
#define CHECK_FAILS(call, expected, text)                                                          \
    do {                                                                                           \
        mvk_status found = (call);                                                                 \
        if (found != (expected) || !strstr(mvk_last_error_message(), text)) {                      \
            fprintf(stderr, "%s:%d: status %d (%s), message: %s\n  expected %s with \"%s\"\n",     \
                    __FILE__, __LINE__, found, mvk_error_string(found), mvk_last_error_message(),  \
                    #expected, text);                                                              \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

#endif
