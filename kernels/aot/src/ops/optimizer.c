/* Moving averages and AdamW over tables of tensors. */
#include <stddef.h>

#include "launch.h"

int64_t mvk_tensor_tiles(const int64_t *sizes, int64_t num_tensors, int32_t *tiles) {
    int64_t count = 0;
    for (int64_t tensor = 0; tensor < num_tensors; tensor++) {
        int64_t own = mvk_ceil_div(sizes[tensor], MVK_TENSOR_TILE);
        for (int64_t tile = 0; tiles && tile < own; tile++) {
            tiles[2 * (count + tile)] = (int32_t)tensor;
            tiles[2 * (count + tile) + 1] = (int32_t)tile;
        }
        count += own;
    }
    return count;
}

static struct mvk_grid programs(int64_t count) { return (struct mvk_grid){count, 1, 1}; }

mvk_status mvk_ema_update(const mvk_ema_update_args *args, mvk_stream stream) {
    MVK_NEED_ARGS(args);
    mvk_call call;
    mvk_begin(&call, MVK_OP_ema_update);
    MVK_TRY(mvk_check_size(&call, "num_tiles", args->num_tiles, 0, INT32_MAX));
    int on_device = args->momentum_ptr != NULL;
    if (!on_device && !(args->momentum >= 0.0 && args->momentum <= 1.0))
        return mvk_fail(MVK_ERROR_INVALID_ARGUMENT,
                        "ema_update: momentum must be from 0 to 1, got %g", args->momentum);
    mvk_key(&call, "source_dtype", args->source_dtype);
    mvk_key(&call, "momentum_on_device", on_device);
    MVK_TRY(mvk_find(&call));
    mvk_pointer(&call, "tiles_ptr", args->tiles);
    mvk_pointer(&call, "table_ptr", args->table);
    /* Never read without a momentum on the device, but an address all the same. */
    mvk_pointer(&call, "momentum_ptr",
                on_device ? (const void *)args->momentum_ptr : (const void *)args->table);
    mvk_real(&call, "keep", on_device ? 0.0 : args->momentum);
    mvk_real(&call, "rate", on_device ? 0.0 : 1.0 - args->momentum);
    return mvk_launch_one(&call, 0, programs(args->num_tiles), stream);
}

static mvk_status give_range(mvk_call *call, const int32_t *tiles, int64_t first_tile,
                             int64_t num_tiles, const int64_t *table, const int64_t *gradients) {
    MVK_TRY(mvk_check_size(call, "first_tile", first_tile, 0, INT32_MAX));
    MVK_TRY(mvk_check_size(call, "num_tiles", num_tiles, 0, INT32_MAX - first_tile));
    mvk_pointer(call, "tiles_ptr", tiles);
    mvk_pointer(call, "table_ptr", table);
    mvk_pointer(call, "gradients_ptr", gradients);
    mvk_integer(call, "first_tile", first_tile);
    return mvk_find(call);
}

mvk_status mvk_adamw_ema_gradient_norm(const mvk_adamw_ema_gradient_norm_args *args,
                                       mvk_stream stream) {
    MVK_NEED_ARGS(args);
    mvk_call call;
    mvk_begin(&call, MVK_OP_adamw_ema_gradient_norm);
    mvk_key(&call, "gradient_dtype", args->gradient_dtype);
    MVK_TRY(give_range(&call, args->tiles, args->first_tile, args->num_tiles, args->table,
                       args->gradients));
    mvk_pointer(&call, "partials_ptr", args->partials);
    return mvk_launch_one(&call, 0, programs(args->num_tiles), stream);
}

mvk_status mvk_adamw_ema_decide(const mvk_adamw_ema_decide_args *args, mvk_stream stream) {
    MVK_NEED_ARGS(args);
    mvk_call call;
    mvk_begin(&call, MVK_OP_adamw_ema_decide);
    MVK_TRY(mvk_check_size(&call, "num_partials", args->num_partials, 0, INT32_MAX));
    MVK_TRY(mvk_check_size(&call, "num_slots", args->num_slots, 0, INT32_MAX));
    mvk_key(&call, "has_loss", args->loss != NULL);
    MVK_TRY(mvk_find(&call));
    mvk_pointer(&call, "partials_ptr", args->partials);
    mvk_pointer(&call, "loss_ptr", args->loss ? args->loss : args->partials);
    mvk_pointer(&call, "hyper_ptr", args->hyper);
    mvk_pointer(&call, "groups_ptr", args->groups);
    mvk_pointer(&call, "gradients_ptr", args->gradients);
    mvk_pointer(&call, "steps_ptr", args->steps);
    mvk_pointer(&call, "coefficients_ptr", args->coefficients);
    mvk_pointer(&call, "scalars_ptr", args->scalars);
    mvk_pointer(&call, "grad_norm_ptr", args->grad_norm);
    mvk_pointer(&call, "skipped_ptr", args->skipped);
    mvk_pointer(&call, "skip_count_ptr", args->skip_count);
    mvk_integer(&call, "num_partials", args->num_partials);
    mvk_integer(&call, "num_slots", args->num_slots);
    return mvk_launch_one(&call, 0, programs(1), stream);
}

mvk_status mvk_adamw_ema_update(const mvk_adamw_ema_update_args *args, mvk_stream stream) {
    MVK_NEED_ARGS(args);
    mvk_call call;
    mvk_begin(&call, MVK_OP_adamw_ema_update);
    mvk_key(&call, "dtype", args->dtype);
    mvk_key(&call, "gradient_dtype", args->gradient_dtype);
    MVK_TRY(give_range(&call, args->tiles, args->first_tile, args->num_tiles, args->table,
                       args->gradients));
    mvk_pointer(&call, "coefficients_ptr", args->coefficients);
    mvk_pointer(&call, "scalars_ptr", args->scalars);
    return mvk_launch_one(&call, 0, programs(args->num_tiles), stream);
}
