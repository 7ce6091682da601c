#include "launch.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "modules.h"

int mvk_kernel_count(void) { return mvk_num_kernels; }

/* ---------------------------------------------------------------- tables */

void mvk_begin(mvk_call *call, enum mvk_op_number op) {
    memset(call, 0, sizeof *call);
    call->op = &mvk_ops[op];
    call->has_device = mvk_current_device(&call->device) == MVK_SUCCESS;
    if (!call->has_device) call->device.capability = mvk_cases[call->op->first_case].capability;
}

mvk_status mvk_check_size(const mvk_call *call, const char *name, int64_t value, int64_t least,
                          int64_t most) {
    if (least <= value && value <= most) return MVK_SUCCESS;
    return mvk_fail(MVK_ERROR_INVALID_ARGUMENT, "%s: %s must be from %lld to %lld, got %lld",
                    call->op->name, name, (long long)least, (long long)most, (long long)value);
}

void mvk_key(mvk_call *call, const char *name, int64_t value) {
    for (uint32_t i = 0; i < call->op->num_keys; i++)
        if (strcmp(call->op->key_names[i], name) == 0) {
            /* No key is as large as this, so that a larger value finds nothing as well. */
            call->keys[i] = (int32_t)(value > INT32_MAX   ? INT32_MAX
                                      : value < INT32_MIN ? INT32_MIN
                                                          : value);
            call->keys_given |= 1u << i;
            return;
        }
    call->defect = name;
}

static int key_fits(const struct mvk_op *op, const struct mvk_case *row, uint32_t i,
                    int32_t value) {
    return op->bounds >> i & 1 ? value <= row->keys[i] : value == row->keys[i];
}

/* The keys before `count` fit: which values of key `count` there are, as text. */
static void list_values(const mvk_call *call, uint32_t count, char *text, size_t size) {
    int32_t seen[64];
    int num_seen = 0;
    size_t used = 0;
    text[0] = 0;
    for (uint32_t c = 0; c < call->op->num_cases; c++) {
        const struct mvk_case *row = &mvk_cases[call->op->first_case + c];
        int wanted = row->capability == call->device.capability;
        for (uint32_t i = 0; i < count; i++) wanted &= key_fits(call->op, row, i, call->keys[i]);
        for (int s = 0; s < num_seen; s++) wanted &= seen[s] != row->keys[count];
        if (!wanted || num_seen == 64 || used + 16 > size) continue;
        seen[num_seen++] = row->keys[count];
        used += (size_t)snprintf(text + used, size - used, "%s%d", used ? ", " : "",
                                 row->keys[count]);
    }
}

mvk_status mvk_find(mvk_call *call) {
    const struct mvk_op *op = call->op;
    if (call->defect || call->keys_given != (1u << op->num_keys) - 1)
        return mvk_fail(MVK_ERROR_INTERNAL, "%s: the tables have other keys%s%s", op->name,
                        call->defect ? " than " : "", call->defect ? call->defect : "");
    uint32_t longest = 0; /* keys that fit some case together */
    for (uint32_t c = 0; c < op->num_cases; c++) {
        const struct mvk_case *row = &mvk_cases[op->first_case + c];
        if (row->capability != call->device.capability) continue;
        uint32_t fits = 0;
        while (fits < op->num_keys && key_fits(op, row, fits, call->keys[fits])) fits++;
        if (fits == op->num_keys) {
            call->found = row;
            return MVK_SUCCESS;
        }
        if (fits > longest) longest = fits;
    }
    char values[256];
    list_values(call, longest, values, sizeof values);
    return mvk_fail(MVK_ERROR_NOT_COMPILED, "%s: no kernel was compiled for %s %d, only for %s",
                    op->name, op->key_names[longest], call->keys[longest], values);
}

/* ---------------------------------------------------------------- arguments */

static struct mvk_argument *argument(mvk_call *call, const char *name) {
    for (int i = 0; i < call->num_arguments; i++)
        if (strcmp(call->arguments[i].name, name) == 0) return &call->arguments[i];
    return NULL;
}

static void give(mvk_call *call, struct mvk_argument value) {
    struct mvk_argument *known = argument(call, value.name);
    if (known) *known = value;
    else if (call->num_arguments < MVK_MAX_ARGUMENTS)
        call->arguments[call->num_arguments++] = value;
    else call->defect = value.name;
}

void mvk_pointer(mvk_call *call, const char *name, const void *value) {
    give(call, (struct mvk_argument){name, 0, (int64_t)(intptr_t)value, 0});
}

void mvk_integer(mvk_call *call, const char *name, int64_t value) {
    give(call, (struct mvk_argument){name, 0, value, 0});
}

void mvk_real(mvk_call *call, const char *name, double value) {
    give(call, (struct mvk_argument){name, 1, 0, value});
}

static const struct mvk_kernel *kernel_of(const mvk_call *call, uint32_t number) {
    return &mvk_kernels[mvk_launches[call->found->first_launch + number].kernel];
}

static const struct mvk_constant *constant(const struct mvk_kernel *kernel, const char *name) {
    for (uint32_t i = 0; i < kernel->num_constants; i++) {
        const struct mvk_constant *candidate = &mvk_constants[kernel->first_constant + i];
        if (strcmp(candidate->name, name) == 0) return candidate;
    }
    return NULL;
}

int64_t mvk_compiled(mvk_call *call, uint32_t number, const char *name) {
    const struct mvk_constant *value = constant(kernel_of(call, number), name);
    if (value && !value->text && value->number > 0) return value->number;
    call->defect = name;
    return 1;
}

int mvk_compiled_is(mvk_call *call, uint32_t number, const char *name, const char *text) {
    const struct mvk_constant *value = constant(kernel_of(call, number), name);
    if (!value || !value->text) call->defect = name;
    return value && value->text && strcmp(value->text, text) == 0;
}

struct mvk_grid mvk_tiles(mvk_call *call, int64_t rows, const char *block_rows, int64_t columns,
                          const char *block_columns) {
    return (struct mvk_grid){mvk_ceil_div(rows, mvk_compiled(call, 0, block_rows)),
                             mvk_ceil_div(columns, mvk_compiled(call, 0, block_columns)), 1};
}

/* An argument as the user knows it: "x" for the parameter "x_ptr". */
static void public_name(const char *name, char *text, size_t size) {
    snprintf(text, size, "%s", name);
    size_t length = strlen(text);
    if (length > 4 && strcmp(text + length - 4, "_ptr") == 0) text[length - 4] = 0;
}

/* What the kernel has compiled in must be what it was called with. */
static mvk_status check_constants(mvk_call *call, const struct mvk_kernel *kernel) {
    for (int i = 0; i < call->num_arguments; i++) {
        const struct mvk_argument *given = &call->arguments[i];
        const struct mvk_constant *compiled = constant(kernel, given->name);
        if (compiled && (compiled->text || compiled->number != given->integer))
            return mvk_fail(MVK_ERROR_INTERNAL, "%s: %s was compiled for %s = %lld, not %lld",
                            call->op->name, kernel->symbol, given->name,
                            (long long)compiled->number, (long long)given->integer);
    }
    return MVK_SUCCESS;
}

union slot {
    int32_t i32;
    int64_t i64;
    float f32;
};

static mvk_status fill_slot(mvk_call *call, const struct mvk_parameter *parameter,
                            union slot *slot) {
    const struct mvk_argument *value = argument(call, parameter->name);
    if (!value || value->is_float != (parameter->type == MVK_FLOAT))
        return mvk_fail(MVK_ERROR_INTERNAL, "%s: the kernel takes %s", call->op->name,
                        parameter->name);
    char name[64];
    public_name(parameter->name, name, sizeof name);
    if (parameter->type == MVK_FLOAT) {
        slot->f32 = (float)value->real;
        return MVK_SUCCESS;
    }
    if (parameter->type == MVK_POINTER && value->integer == 0)
        return mvk_fail(MVK_ERROR_INVALID_ARGUMENT, "%s: %s must not be NULL", call->op->name,
                        name);
    if (parameter->multiple_of_16 && value->integer % 16 != 0)
        return mvk_fail(MVK_ERROR_INVALID_ARGUMENT,
                        parameter->type == MVK_POINTER
                            ? "%s: %s must be 16-byte aligned, got %#llx: copy it to an aligned "
                              "buffer"
                            : "%s: %s must be a multiple of 16, got %lld: copy to a contiguous "
                              "tensor",
                        call->op->name, name, (long long)value->integer);
    if (parameter->type == MVK_INT32) {
        if (value->integer > INT32_MAX || value->integer < INT32_MIN)
            return mvk_fail(MVK_ERROR_INVALID_ARGUMENT, "%s: %s must fit 32 bits, got %lld",
                            call->op->name, name, (long long)value->integer);
        slot->i32 = (int32_t)value->integer;
    } else slot->i64 = value->integer;
    return MVK_SUCCESS;
}

mvk_status mvk_launch_one(mvk_call *call, uint32_t number, struct mvk_grid grid,
                          mvk_stream stream) {
    const struct mvk_launch *launch = &mvk_launches[call->found->first_launch + number];
    const struct mvk_kernel *kernel = &mvk_kernels[launch->kernel];
    for (uint32_t i = 0; i < launch->num_fixed; i++) {
        const struct mvk_constant *fixed = &mvk_constants[launch->first_fixed + i];
        mvk_integer(call, fixed->name, fixed->number);
    }
    if (call->defect)
        return mvk_fail(MVK_ERROR_INTERNAL, "%s: %s has no %s", call->op->name, kernel->symbol,
                        call->defect);
    MVK_TRY(check_constants(call, kernel));

    union slot slots[MVK_MAX_ARGUMENTS];
    void *parameters[MVK_MAX_ARGUMENTS + 2], *no_scratch = NULL;
    for (uint32_t i = 0; i < kernel->num_parameters; i++) {
        MVK_TRY(fill_slot(call, &mvk_parameters[kernel->first_parameter + i], &slots[i]));
        parameters[i] = &slots[i];
    }
    /* Triton's kernels end with two pointers to scratch memory, which none of these uses. */
    parameters[kernel->num_parameters] = &no_scratch;
    parameters[kernel->num_parameters + 1] = &no_scratch;

    if (grid.x <= 0 || grid.y <= 0 || grid.z <= 0) return MVK_SUCCESS;
    if (grid.x > INT32_MAX || grid.y > MVK_MAX_GRID_Y || grid.z > MVK_MAX_GRID_Y)
        return mvk_fail(MVK_ERROR_INVALID_ARGUMENT,
                        "%s: %lld x %lld x %lld programs exceed a CUDA grid: split the batch",
                        call->op->name, (long long)grid.x, (long long)grid.y, (long long)grid.z);
    if (!call->has_device) MVK_TRY(mvk_current_device(&call->device));
    mvk_cu_function function;
    MVK_TRY(mvk_load_kernel(&call->device, launch->kernel, &function));
    const struct mvk_driver *driver = call->device.driver;
    return mvk_check_cuda(driver,
                          driver->launch_kernel(function, (unsigned)grid.x, (unsigned)grid.y,
                                                (unsigned)grid.z, 32 * kernel->num_warps, 1, 1,
                                                kernel->shared_bytes, stream, parameters, NULL),
                          "launch", kernel->symbol);
}
