/* Gather, scatter, the gradient of a scatter's fill, and sums by place. */
#include <stddef.h>

#include "row_index.h"

mvk_status mvk_gather_rows(const mvk_gather_rows_args *args, mvk_stream stream) {
    MVK_NEED_ARGS(args);
    mvk_call call;
    mvk_begin(&call, MVK_OP_gather_rows);
    mvk_key(&call, "dtype", args->dtype);
    mvk_key(&call, "width", args->width);
    MVK_TRY(mvk_give_index(&call, &args->index, 0));
    MVK_TRY(mvk_find(&call));
    mvk_pointer(&call, "x_ptr", args->x);
    mvk_pointer(&call, "out_ptr", args->out);
    mvk_integer(&call, "stride_xb", args->stride_image);
    mvk_integer(&call, "stride_xn", args->stride_token);
    mvk_integer(&call, "D", args->width);
    struct mvk_grid grid =
        mvk_tiles(&call, args->index.num_rows, "BLOCK_ROWS", args->width, "BLOCK_D");
    return mvk_launch_one(&call, 0, grid, stream);
}

/* Note which row lies at each place: the first launch of a scatter and of its fill's gradient. */
static mvk_status invert_rows(const mvk_row_index *index, int32_t *place_to_row,
                              mvk_stream stream) {
    mvk_call call;
    mvk_begin(&call, MVK_OP_invert_rows);
    MVK_TRY(mvk_give_index(&call, index, 0));
    MVK_TRY(mvk_find(&call));
    mvk_pointer(&call, "place_to_row_ptr", place_to_row);
    int64_t programs = mvk_ceil_div(index->num_rows, mvk_compiled(&call, 0, "BLOCK_ROWS"));
    return mvk_launch_one(&call, 0, (struct mvk_grid){programs, 1, 1}, stream);
}

mvk_status mvk_scatter_rows(const mvk_scatter_rows_args *args, mvk_stream stream) {
    MVK_NEED_ARGS(args);
    mvk_call call;
    mvk_begin(&call, MVK_OP_scatter_rows);
    MVK_TRY(mvk_check_size(&call, "num_images", args->num_images, 0, INT32_MAX));
    mvk_key(&call, "dtype", args->dtype);
    mvk_key(&call, "width", args->width);
    mvk_key(&call, "filled", args->fill != NULL);
    MVK_TRY(mvk_give_index(&call, &args->index, 0));
    MVK_TRY(mvk_find(&call));
    int64_t num_places = args->num_images * args->index.num_tokens;
    mvk_pointer(&call, "x_ptr", args->x);
    mvk_pointer(&call, "fill_ptr", args->fill);
    mvk_pointer(&call, "place_to_row_ptr", args->place_to_row);
    mvk_pointer(&call, "out_ptr", args->out);
    mvk_integer(&call, "num_places", num_places);
    mvk_integer(&call, "stride_xr", args->stride_row);
    mvk_integer(&call, "stride_fb", args->fill ? args->stride_fill_image : 0);
    mvk_integer(&call, "stride_fn", args->fill ? args->stride_fill_token : 0);
    mvk_integer(&call, "D", args->width);
    struct mvk_grid grid = mvk_tiles(&call, num_places, "BLOCK_PLACES", args->width, "BLOCK_D");
    MVK_TRY(invert_rows(&args->index, args->place_to_row, stream));
    return mvk_launch_one(&call, 0, grid, stream);
}

mvk_status mvk_scatter_fill_gradient(const mvk_scatter_fill_gradient_args *args,
                                     mvk_stream stream) {
    MVK_NEED_ARGS(args);
    mvk_call call;
    mvk_begin(&call, MVK_OP_scatter_fill_gradient);
    MVK_TRY(mvk_check_size(&call, "num_images", args->num_images, 0, INT32_MAX));
    MVK_TRY(mvk_check_size(&call, "chunks", args->chunks, 1, MVK_MAX_GRID_Y));
    MVK_TRY(mvk_check_size(&call, "inner", args->inner, 1, INT32_MAX));
    mvk_key(&call, "dtype", args->dtype);
    mvk_key(&call, "width", args->width);
    MVK_TRY(mvk_give_index(&call, &args->index, 0));
    MVK_TRY(mvk_find(&call));
    int64_t num_places = args->num_images * args->index.num_tokens;
    int64_t outer = mvk_ceil_div(num_places, args->inner);
    mvk_pointer(&call, "grad_ptr", args->grad);
    mvk_pointer(&call, "place_to_row_ptr", args->place_to_row);
    mvk_pointer(&call, "partial_ptr", args->partial);
    mvk_integer(&call, "num_places", num_places);
    mvk_integer(&call, "num_inner", args->inner);
    mvk_integer(&call, "outer_per_chunk", mvk_ceil_div(outer, args->chunks));
    mvk_integer(&call, "D", args->width);
    struct mvk_grid grid = mvk_tiles(&call, args->inner, "BLOCK_INNER", args->width, "BLOCK_D");
    grid.z = args->chunks;
    MVK_TRY(invert_rows(&args->index, args->place_to_row, stream));
    return mvk_launch_one(&call, 0, grid, stream);
}

mvk_status mvk_sum_rows_by_place(const mvk_sum_rows_by_place_args *args, mvk_stream stream) {
    MVK_NEED_ARGS(args);
    mvk_call call;
    mvk_begin(&call, MVK_OP_sum_rows_by_place);
    MVK_TRY(mvk_check_size(&call, "num_rows", args->num_rows, 0, INT32_MAX));
    MVK_TRY(mvk_check_size(&call, "num_places", args->num_places, 0, INT32_MAX));
    mvk_key(&call, "dtype", args->dtype);
    mvk_key(&call, "width", args->width);
    mvk_key(&call, "many", args->num_rows > MVK_MANY_ROWS * args->num_places);
    MVK_TRY(mvk_find(&call));
    mvk_pointer(&call, "values_ptr", args->values);
    mvk_pointer(&call, "order_ptr", args->order);
    mvk_pointer(&call, "starts_ptr", args->starts);
    mvk_pointer(&call, "out_ptr", args->out);
    mvk_integer(&call, "num_places", args->num_places);
    mvk_integer(&call, "stride_vr", args->stride_row);
    mvk_integer(&call, "D", args->width);
    struct mvk_grid grid =
        mvk_tiles(&call, args->num_places, "BLOCK_PLACES", args->width, "BLOCK_D");
    return mvk_launch_one(&call, 0, grid, stream);
}
