/* The generated tables (tables.c): which kernels each op launches for which sizes. */
#ifndef MVK_TABLE_TYPES_H
#define MVK_TABLE_TYPES_H

#include <stdint.h>

#include "tables.h"

#define MVK_MAX_KEYS 6

enum mvk_parameter_type { MVK_POINTER, MVK_INT32, MVK_INT64, MVK_FLOAT };

/* An argument the kernel takes at run time, in the order of its signature. */
struct mvk_parameter {
    const char *name;
    enum mvk_parameter_type type;
    int multiple_of_16; /* the kernel was compiled for such values alone */
};

/* An argument that is compiled in, or that a table fixes. */
struct mvk_constant {
    const char *name;
    const char *text; /* NULL where it is a number */
    int64_t number;   /* 0 for None: a null pointer */
};

struct mvk_kernel {
    const char *symbol;
    uint32_t offset, packed_size; /* of the compressed cubin in mvk_cubins */
    uint32_t size;                /* of the cubin itself */
    uint32_t first_parameter, num_parameters;
    uint32_t first_constant, num_constants;
    uint32_t num_warps, shared_bytes;
};

struct mvk_launch {
    uint32_t kernel;
    uint32_t first_fixed, num_fixed; /* of mvk_constants: run-time arguments the table gives */
};

struct mvk_case {
    uint32_t capability; /* 80, 90, 100 */
    uint32_t first_launch, num_launches;
    int32_t keys[MVK_MAX_KEYS];
};

struct mvk_op {
    const char *name;
    const char *key_names[MVK_MAX_KEYS];
    uint32_t num_keys;
    uint32_t bounds; /* bit i: key i is an upper bound */
    uint32_t first_case, num_cases;
};

extern const struct mvk_parameter mvk_parameters[];
extern const struct mvk_constant mvk_constants[];
extern const struct mvk_kernel mvk_kernels[];
extern const struct mvk_launch mvk_launches[];
extern const struct mvk_case mvk_cases[];
extern const struct mvk_op mvk_ops[];
extern const int mvk_num_kernels;
extern const unsigned char mvk_cubins[];

#endif
