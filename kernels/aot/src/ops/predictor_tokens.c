/* The predictor's tokens and their backward. */
#include "launch.h"

mvk_status mvk_assemble_predictor_tokens(const mvk_assemble_predictor_tokens_args *args,
                                         mvk_stream stream) {
    MVK_NEED_ARGS(args);
    mvk_call call;
    mvk_begin(&call, MVK_OP_assemble_predictor_tokens);
    MVK_TRY(mvk_check_size(&call, "num_rows", args->num_rows, 0, INT32_MAX));
    MVK_TRY(mvk_check_size(&call, "num_context", args->num_context, 0, INT32_MAX));
    MVK_TRY(mvk_check_size(&call, "num_targets", args->num_targets, 0, INT32_MAX));
    MVK_TRY(mvk_check_size(&call, "num_positions", args->num_positions, 1, INT32_MAX));
    mvk_key(&call, "dtype", args->dtype);
    mvk_key(&call, "width", args->width);
    mvk_key(&call, "mask_dtype", args->mask_dtype);
    MVK_TRY(mvk_find(&call));
    mvk_pointer(&call, "context_ptr", args->context);
    mvk_pointer(&call, "mask_token_ptr", args->mask_token);
    mvk_pointer(&call, "position_ptr", args->position);
    mvk_pointer(&call, "context_ids_ptr", args->context_ids);
    mvk_pointer(&call, "target_ids_ptr", args->target_ids);
    mvk_pointer(&call, "source_rows_ptr", args->source_rows);
    mvk_pointer(&call, "out_ptr", args->out);
    mvk_integer(&call, "num_rows", args->num_rows);
    mvk_integer(&call, "num_context", args->num_context);
    mvk_integer(&call, "num_targets", args->num_targets);
    mvk_integer(&call, "num_positions", args->num_positions);
    mvk_integer(&call, "stride_ct", args->stride_context);
    mvk_integer(&call, "P", args->width);
    struct mvk_grid grid =
        mvk_tiles(&call, args->num_rows, "BLOCK_ROWS", args->width, "BLOCK_P");
    return mvk_launch_one(&call, 0, grid, stream);
}

mvk_status
mvk_assemble_predictor_tokens_backward(const mvk_assemble_predictor_tokens_backward_args *args,
                                       mvk_stream stream) {
    MVK_NEED_ARGS(args);
    mvk_call call;
    mvk_begin(&call, MVK_OP_assemble_predictor_tokens_backward);
    MVK_TRY(mvk_check_size(&call, "num_context", args->num_context, 0, INT32_MAX));
    MVK_TRY(mvk_check_size(&call, "num_targets", args->num_targets, 0, INT32_MAX));
    MVK_TRY(mvk_check_size(&call, "chunks", args->chunks, 1, INT32_MAX / 2));
    mvk_key(&call, "dtype", args->dtype);
    mvk_key(&call, "width", args->width);
    mvk_key(&call, "copies", args->copies);
    MVK_TRY(mvk_find(&call));
    int64_t block_rows = mvk_compiled(&call, 0, "BLOCK_ROWS");
    int64_t context_programs = mvk_ceil_div(args->num_context, block_rows);
    int64_t per_chunk = mvk_ceil_div(args->num_targets, args->chunks);
    mvk_pointer(&call, "grad_ptr", args->grad);
    mvk_pointer(&call, "context_copies_ptr", args->context_copies);
    mvk_pointer(&call, "target_rows_ptr", args->target_rows);
    mvk_pointer(&call, "grad_context_ptr", args->grad_context);
    mvk_pointer(&call, "partial_ptr", args->partial);
    mvk_integer(&call, "num_context", args->num_context);
    mvk_integer(&call, "num_targets", args->num_targets);
    mvk_integer(&call, "context_programs", context_programs);
    mvk_integer(&call, "targets_per_chunk", mvk_ceil_div(per_chunk, block_rows) * block_rows);
    mvk_integer(&call, "stride_gr", args->stride_row);
    mvk_integer(&call, "COPIES", args->copies);
    mvk_integer(&call, "P", args->width);
    struct mvk_grid grid = {context_programs + args->chunks,
                            mvk_ceil_div(args->width, mvk_compiled(&call, 0, "BLOCK_P")), 1};
    return mvk_launch_one(&call, 0, grid, stream);
}
