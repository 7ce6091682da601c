/* Patch rows, positions and their backward, and the fused embedding. */
#include <stddef.h>

#include "row_index.h"

enum { CHANNELS = 3 };

int64_t mvk_patch_row_width(int64_t patch_size) {
    return mvk_ceil_div(CHANNELS * patch_size * patch_size, 16) * 16;
}

/* What the kernels have compiled in of contiguous square images; the kernel checks it. */
static mvk_status give_images(mvk_call *call, const void *images, const float *mean,
                              const float *std, int64_t size, int64_t patch, int64_t num_tokens) {
    mvk_key(call, "image_size", size);
    mvk_key(call, "patch_size", patch);
    mvk_pointer(call, "images_ptr", images);
    mvk_pointer(call, "mean_ptr", mean);
    mvk_pointer(call, "std_ptr", std);
    mvk_integer(call, "STRIDE_B", CHANNELS * size * size);
    mvk_integer(call, "STRIDE_C", size * size);
    mvk_integer(call, "STRIDE_H", size);
    mvk_integer(call, "STRIDE_W", 1);
    mvk_integer(call, "PH", patch);
    mvk_integer(call, "PW", patch);
    mvk_integer(call, "K", CHANNELS * patch * patch);
    mvk_integer(call, "K_PADDED", mvk_patch_row_width(patch));
    int64_t grid = patch > 0 ? size / patch : 0;
    mvk_integer(call, "GRID_WIDTH", grid);
    return mvk_check_size(call, "index.num_tokens", num_tokens, grid * grid, grid * grid);
}

static mvk_status check_statistics(const mvk_call *call, const float *mean, const float *std,
                                   int wanted) {
    if ((mean != NULL) == wanted && (std != NULL) == wanted) return MVK_SUCCESS;
    return mvk_fail(MVK_ERROR_INVALID_ARGUMENT,
                    wanted ? "%s: mean and std must not be NULL, uint8 pixels are normalised"
                           : "%s: mean and std must be NULL, float images are taken as normalised",
                    call->op->name);
}

mvk_status mvk_patch_rows(const mvk_patch_rows_args *args, mvk_stream stream) {
    MVK_NEED_ARGS(args);
    mvk_call call;
    mvk_begin(&call, MVK_OP_patch_rows);
    MVK_TRY(
        check_statistics(&call, args->mean, args->std, args->image_dtype == MVK_DTYPE_UINT8));
    mvk_key(&call, "image_dtype", args->image_dtype);
    mvk_key(&call, "dtype", args->dtype);
    MVK_TRY(give_images(&call, args->images, args->mean, args->std, args->image_size,
                        args->patch_size, args->index.num_tokens));
    MVK_TRY(mvk_give_index(&call, &args->index, 1));
    MVK_TRY(mvk_find(&call));
    mvk_pointer(&call, "out_ptr", args->out);
    struct mvk_grid grid = mvk_tiles(&call, args->index.num_rows, "BLOCK_ROWS",
                                     mvk_patch_row_width(args->patch_size), "BLOCK_K");
    return mvk_launch_one(&call, 0, grid, stream);
}

mvk_status mvk_embed_visible_patches(const mvk_embed_visible_patches_args *args,
                                     mvk_stream stream) {
    MVK_NEED_ARGS(args);
    mvk_call call;
    mvk_begin(&call, MVK_OP_embed_visible_patches);
    MVK_TRY(check_statistics(&call, args->mean, args->std, 1));
    mvk_key(&call, "image_dtype", MVK_DTYPE_UINT8);
    mvk_key(&call, "dtype", args->dtype);
    mvk_key(&call, "width", args->width);
    MVK_TRY(give_images(&call, args->images, args->mean, args->std, args->image_size,
                        args->patch_size, args->index.num_tokens));
    MVK_TRY(mvk_give_index(&call, &args->index, 1));
    MVK_TRY(mvk_find(&call));
    mvk_pointer(&call, "weight_ptr", args->weight);
    mvk_pointer(&call, "bias_ptr", args->bias);
    mvk_pointer(&call, "position_ptr", args->position);
    mvk_pointer(&call, "out_ptr", args->out);
    mvk_integer(&call, "D", args->width);
    struct mvk_grid grid =
        mvk_tiles(&call, args->width, "BLOCK_D", args->index.num_rows, "BLOCK_ROWS");
    return mvk_launch_one(&call, 0, grid, stream);
}

mvk_status mvk_add_position(const mvk_add_position_args *args, mvk_stream stream) {
    MVK_NEED_ARGS(args);
    mvk_call call;
    mvk_begin(&call, MVK_OP_add_position);
    mvk_key(&call, "dtype", args->dtype);
    mvk_key(&call, "width", args->width);
    mvk_key(&call, "bias_dtype", args->bias_dtype);
    MVK_TRY(mvk_give_index(&call, &args->index, 1));
    MVK_TRY(mvk_find(&call));
    mvk_pointer(&call, "x_ptr", args->x);
    mvk_pointer(&call, "bias_ptr", args->bias);
    mvk_pointer(&call, "position_ptr", args->position);
    mvk_pointer(&call, "out_ptr", args->out);
    mvk_integer(&call, "stride_xr", args->stride_row);
    mvk_integer(&call, "D", args->width);
    struct mvk_grid grid =
        mvk_tiles(&call, args->index.num_rows, "BLOCK_ROWS", args->width, "BLOCK_D");
    return mvk_launch_one(&call, 0, grid, stream);
}

mvk_status mvk_add_position_backward(const mvk_add_position_backward_args *args,
                                     mvk_stream stream) {
    MVK_NEED_ARGS(args);
    mvk_call call;
    mvk_begin(&call, MVK_OP_add_position_backward);
    MVK_TRY(mvk_check_size(&call, "chunks", args->chunks, 1, INT32_MAX));
    mvk_key(&call, "dtype", args->dtype);
    mvk_key(&call, "width", args->width);
    MVK_TRY(mvk_give_index(&call, &args->index, 1));
    MVK_TRY(mvk_find(&call));
    int64_t block_rows = mvk_compiled(&call, 0, "BLOCK_ROWS");
    int64_t per_chunk = mvk_ceil_div(args->index.num_rows, args->chunks);
    mvk_pointer(&call, "grad_ptr", args->grad);
    mvk_pointer(&call, "grad_x_ptr", args->grad_x);
    mvk_pointer(&call, "partial_ptr", args->partial);
    mvk_integer(&call, "rows_per_chunk", mvk_ceil_div(per_chunk, block_rows) * block_rows);
    mvk_integer(&call, "stride_gr", args->stride_row);
    mvk_integer(&call, "D", args->width);
    struct mvk_grid grid = {args->chunks,
                            mvk_ceil_div(args->width, mvk_compiled(&call, 0, "BLOCK_D")), 1};
    return mvk_launch_one(&call, 0, grid, stream);
}
