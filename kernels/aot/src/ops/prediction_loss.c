/* The loss in latent space and its gradient. */
#include <stddef.h>

#include "launch.h"

int64_t mvk_loss_programs(int64_t num_rows) {
    int64_t rows = num_rows > 1 ? num_rows : 1;
    int64_t programs = mvk_ceil_div(num_rows, mvk_ceil_div(rows, MVK_MOST_LOSS_PROGRAMS));
    return programs > 1 ? programs : 1;
}

static mvk_status give_sizes(mvk_call *call, mvk_dtype dtype, mvk_dtype feature_dtype,
                             mvk_loss_kind kind, int64_t width, int64_t num_rows,
                             int64_t num_features) {
    MVK_TRY(mvk_check_size(call, "num_rows", num_rows, 0, INT32_MAX));
    MVK_TRY(mvk_check_size(call, "num_features", num_features, 0, INT32_MAX));
    mvk_key(call, "dtype", dtype);
    mvk_key(call, "feature_dtype", feature_dtype);
    mvk_key(call, "width", width);
    mvk_key(call, "kind", kind);
    mvk_integer(call, "num_rows", num_rows);
    mvk_integer(call, "num_features", num_features);
    mvk_integer(call, "D", width);
    return mvk_find(call);
}

/* The second launch: partial sums to the loss. */
static mvk_status finish(const mvk_prediction_loss_args *args, int64_t programs,
                         mvk_stream stream) {
    mvk_call call;
    mvk_begin(&call, MVK_OP_loss_finish);
    mvk_key(&call, "denominator_dtype", args->denominator ? (int)args->denominator_dtype : -1);
    mvk_key(&call, "max_programs", programs);
    MVK_TRY(mvk_find(&call));
    mvk_pointer(&call, "partial_ptr", args->partial);
    mvk_pointer(&call, "denominator_ptr", args->denominator);
    mvk_pointer(&call, "out_ptr", args->out);
    mvk_integer(&call, "num_programs", programs);
    mvk_integer(&call, "width", args->width);
    return mvk_launch_one(&call, 0, (struct mvk_grid){1, 1, 1}, stream);
}

mvk_status mvk_prediction_loss(const mvk_prediction_loss_args *args, mvk_stream stream) {
    MVK_NEED_ARGS(args);
    mvk_call call;
    mvk_begin(&call, MVK_OP_prediction_loss);
    MVK_TRY(give_sizes(&call, args->dtype, args->feature_dtype, args->kind, args->width,
                       args->num_rows, args->num_features));
    int64_t programs = mvk_loss_programs(args->num_rows);
    mvk_pointer(&call, "predictions_ptr", args->predictions);
    mvk_pointer(&call, "features_ptr", args->features);
    mvk_pointer(&call, "target_rows_ptr", args->target_rows);
    mvk_pointer(&call, "mean_ptr", args->mean);
    mvk_pointer(&call, "rstd_ptr", args->rstd);
    mvk_pointer(&call, "partial_ptr", args->partial);
    mvk_integer(&call, "rows_per_program", mvk_ceil_div(args->num_rows, programs));
    mvk_integer(&call, "stride_pr", args->stride_prediction);
    mvk_integer(&call, "stride_fr", args->stride_feature);
    MVK_TRY(mvk_launch_one(&call, 0, (struct mvk_grid){programs, 1, 1}, stream));
    return finish(args, programs, stream);
}

mvk_status mvk_prediction_loss_backward(const mvk_prediction_loss_backward_args *args,
                                        mvk_stream stream) {
    MVK_NEED_ARGS(args);
    mvk_call call;
    mvk_begin(&call, MVK_OP_prediction_loss_backward);
    MVK_TRY(give_sizes(&call, args->dtype, args->feature_dtype, args->kind, args->width,
                       args->num_rows, args->num_features));
    mvk_pointer(&call, "grad_loss_ptr", args->grad_loss);
    mvk_pointer(&call, "out_ptr", args->out);
    mvk_pointer(&call, "predictions_ptr", args->predictions);
    mvk_pointer(&call, "features_ptr", args->features);
    mvk_pointer(&call, "target_rows_ptr", args->target_rows);
    mvk_pointer(&call, "mean_ptr", args->mean);
    mvk_pointer(&call, "rstd_ptr", args->rstd);
    mvk_pointer(&call, "grad_ptr", args->grad);
    mvk_integer(&call, "stride_pr", args->stride_prediction);
    mvk_integer(&call, "stride_fr", args->stride_feature);
    struct mvk_grid grid =
        mvk_tiles(&call, args->num_rows, "BLOCK_ROWS", args->width, "BLOCK_D");
    return mvk_launch_one(&call, 0, grid, stream);
}
