/* From named arguments to a launch: the way of every op.
 *
 *     mvk_call call;
 *     mvk_begin(&call, MVK_OP_gather_rows);
 *     mvk_key(&call, "dtype", args->dtype);            what the tables are searched by
 *     MVK_TRY(mvk_find(&call));
 *     mvk_pointer(&call, "x_ptr", args->x);            the kernel's parameters, by its names
 *     MVK_TRY(mvk_launch_one(&call, 0, grid, stream));
 *
 * Arguments that a kernel has compiled in are given all the same and must agree with it.
 */
#ifndef MVK_LAUNCH_H
#define MVK_LAUNCH_H

#include "device.h"
#include "errors.h"
#include "table_types.h"

#define MVK_MAX_ARGUMENTS 48

struct mvk_argument {
    const char *name;
    int is_float;
    int64_t integer; /* or an address */
    double real;
};

typedef struct mvk_call {
    const struct mvk_op *op;
    struct mvk_device device;
    int has_device;
    int32_t keys[MVK_MAX_KEYS];
    uint32_t keys_given; /* bit i: key i */
    const struct mvk_case *found;
    struct mvk_argument arguments[MVK_MAX_ARGUMENTS];
    int num_arguments;
    const char *defect; /* a call that does not fit the tables: reported by the next step */
} mvk_call;

struct mvk_grid {
    int64_t x, y, z;
};

/* Start a call. Without a usable device it goes on, so that wrong arguments are found anywhere;
 * the launch itself then fails with the reason. */
void mvk_begin(mvk_call *call, enum mvk_op_number op);

/* MVK_ERROR_INVALID_ARGUMENT unless least <= value <= most. */
mvk_status mvk_check_size(const mvk_call *call, const char *name, int64_t value, int64_t least,
                          int64_t most);

/* Say what is known of the sizes and dtypes; every key of the op once. */
void mvk_key(mvk_call *call, const char *name, int64_t value);

/* Find the case of the keys; MVK_ERROR_NOT_COMPILED with what there is. */
mvk_status mvk_find(mvk_call *call);

/* Give arguments by the kernel's names; a later one replaces an earlier one. */
void mvk_pointer(mvk_call *call, const char *name, const void *value);
void mvk_integer(mvk_call *call, const char *name, int64_t value);
void mvk_real(mvk_call *call, const char *name, double value);

/* A number compiled into the case's launch `number`, for the grid. */
int64_t mvk_compiled(mvk_call *call, uint32_t number, const char *name);

/* Whether the launch has `text` compiled in as `name`. */
int mvk_compiled_is(mvk_call *call, uint32_t number, const char *name, const char *text);

/* Programs that cut `rows` and `columns` into tiles, by the block sizes that the case's first launch
 * has compiled in. */
struct mvk_grid mvk_tiles(mvk_call *call, int64_t rows, const char *block_rows, int64_t columns,
                          const char *block_columns);

/* Launch one kernel of the case. An empty grid launches nothing. */
mvk_status mvk_launch_one(mvk_call *call, uint32_t number, struct mvk_grid grid, mvk_stream stream);

/* Leave the calling function, which returns a status, unless `args` was given. */
#define MVK_NEED_ARGS(args)                                                                        \
    do {                                                                                           \
        if (!(args)) return mvk_fail(MVK_ERROR_INVALID_ARGUMENT, "%s: args is NULL", __func__);    \
    } while (0)

/* ceil(a / b) for a >= 0, b > 0. */
static inline int64_t mvk_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#endif
