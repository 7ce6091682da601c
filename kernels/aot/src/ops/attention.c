/* Attention: which tiles, and how many programs, follow from the tables and the maps. */
#include <stddef.h>

#include "launch.h"

/* Programs a head on axes 1 and 2: `attention_grid` of the Python launch. */
static struct mvk_grid attention_grid(int64_t num_heads, int64_t num_programs) {
    int64_t layers = mvk_ceil_div(num_programs, MVK_MAX_GRID_Y);
    if (layers < 1) layers = 1;
    return (struct mvk_grid){num_heads, mvk_ceil_div(num_programs, layers), layers};
}

struct token_stride {
    const char *name;      /* of the argument */
    const char *parameter; /* of the kernel: the stride over 8 */
    const char *heads;     /* of the kernel: the head stride, which is D */
    int64_t stride;
};

static mvk_status give_strides(mvk_call *call, const struct token_stride *strides, int count,
                               int64_t head_dim, int64_t num_heads) {
    for (int i = 0; i < count; i++) {
        if (strides[i].stride < num_heads * head_dim || strides[i].stride % 8 != 0)
            return mvk_fail(MVK_ERROR_INVALID_ARGUMENT,
                            "%s: %s must be a multiple of 8 and at least H * D = %lld, got %lld",
                            call->op->name, strides[i].name, (long long)(num_heads * head_dim),
                            (long long)strides[i].stride);
        mvk_integer(call, strides[i].parameter, strides[i].stride / 8);
        mvk_integer(call, strides[i].heads, head_dim);
    }
    return MVK_SUCCESS;
}

static mvk_status check_sizes(const mvk_call *call, int64_t num_heads, int64_t num_sequences,
                              int64_t rows, int64_t max_seqlen_q, int64_t max_seqlen_k,
                              double softmax_scale) {
    MVK_TRY(mvk_check_size(call, "num_heads", num_heads, 1, INT32_MAX));
    MVK_TRY(mvk_check_size(call, "num_sequences", num_sequences, 0, INT32_MAX));
    MVK_TRY(mvk_check_size(call, "rows", rows, 0, INT32_MAX));
    MVK_TRY(mvk_check_size(call, "max_seqlen_q", max_seqlen_q, 0, INT32_MAX));
    MVK_TRY(mvk_check_size(call, "max_seqlen_k", max_seqlen_k, 0, INT32_MAX));
    if (!(softmax_scale > 0))
        return mvk_fail(MVK_ERROR_INVALID_ARGUMENT, "%s: softmax_scale must be positive, got %g",
                        call->op->name, softmax_scale);
    return MVK_SUCCESS;
}

static void give_keys(mvk_call *call, mvk_dtype dtype, int64_t head_dim, int mapped,
                      int64_t max_seqlen_q, int64_t max_seqlen_k) {
    mvk_key(call, "dtype", dtype);
    mvk_key(call, "head_dim", head_dim);
    mvk_key(call, "mapped", mapped);
    mvk_key(call, "max_seqlen_k", max_seqlen_k);
    mvk_key(call, "max_seqlen_q", max_seqlen_q);
    mvk_integer(call, "HEAD_DIM", head_dim);
}

static int64_t tiles_per_sequence(int64_t max_seqlen, int64_t rows) {
    return mvk_ceil_div(max_seqlen, rows);
}

mvk_status mvk_attention_forward(const mvk_attention_forward_args *args, mvk_stream stream) {
    MVK_NEED_ARGS(args);
    mvk_call call;
    mvk_begin(&call, MVK_OP_attention_forward);
    MVK_TRY(check_sizes(&call, args->num_heads, args->num_sequences, args->rows_q,
                        args->max_seqlen_q, args->max_seqlen_k, args->softmax_scale));
    int mapped = args->tile_map_q != NULL;
    if (mapped != (args->wide_tile_map_q != NULL))
        return mvk_fail(MVK_ERROR_INVALID_ARGUMENT,
                        "attention_forward: give tile_map_q and wide_tile_map_q, or neither");
    give_keys(&call, args->dtype, args->head_dim, mapped, args->max_seqlen_q, args->max_seqlen_k);
    MVK_TRY(mvk_find(&call));

    const struct token_stride strides[] = {
        {"stride_q", "stride_qt_by_8", "STRIDE_QH", args->stride_q},
        {"stride_k", "stride_kt_by_8", "STRIDE_KH", args->stride_k},
        {"stride_v", "stride_vt_by_8", "STRIDE_VH", args->stride_v},
        {"stride_out", "stride_ot_by_8", "STRIDE_OH", args->stride_out},
    };
    MVK_TRY(give_strides(&call, strides, 4, args->head_dim, args->num_heads));

    int64_t block_q = mvk_compiled(&call, 0, "BLOCK_Q");
    int64_t per_sequence = tiles_per_sequence(args->max_seqlen_q, block_q);
    int64_t num_tiles = args->num_sequences * per_sequence;
    const int32_t *tile_map = NULL;
    if (mapped && block_q == MVK_WIDE_TILE_ROWS) {
        tile_map = args->wide_tile_map_q;
        num_tiles = args->num_wide_tiles_q;
    } else if (mapped) {
        tile_map = args->tile_map_q;
        num_tiles = args->num_tiles_q;
    }
    MVK_TRY(mvk_check_size(&call, "the number of tiles", num_tiles, 0, INT32_MAX / 2));
    mvk_pointer(&call, "q_ptr", args->q);
    mvk_pointer(&call, "k_ptr", args->k);
    mvk_pointer(&call, "v_ptr", args->v);
    mvk_pointer(&call, "out_ptr", args->out);
    mvk_pointer(&call, "lse_ptr", args->lse);
    mvk_pointer(&call, "cu_seqlens_q_ptr", args->cu_seqlens_q);
    mvk_pointer(&call, "cu_seqlens_k_ptr", args->cu_seqlens_k);
    mvk_pointer(&call, "tile_map_ptr", tile_map);
    mvk_integer(&call, "num_rows", args->rows_q);
    mvk_integer(&call, "num_sequences", args->num_sequences);
    mvk_integer(&call, "num_tiles", num_tiles);
    mvk_integer(&call, "tiles_per_sequence", per_sequence > 1 ? per_sequence : 1);
    mvk_real(&call, "scale_log2", args->softmax_scale * MVK_LOG2_E);
    int64_t clearing = mvk_compiled(&call, 0, "CLEAR_PARTS");
    return mvk_launch_one(&call, 0, attention_grid(args->num_heads, num_tiles + clearing), stream);
}

/* One launch of the backward: its programs' map, and how many there are. */
static mvk_status launch_backward(mvk_call *call, uint32_t number,
                                  const mvk_attention_backward_args *args, mvk_stream stream) {
    int64_t per_sequence = 1, num_work = args->num_sequences;
    const int32_t *order = args->sequence_order;
    int queries = mvk_compiled_is(call, number, "KIND", "flash_queries");
    if (queries || mvk_compiled_is(call, number, "KIND", "flash_keys")) {
        int64_t rows = mvk_compiled(call, number, queries ? "BLOCK_Q" : "BLOCK_K");
        per_sequence = tiles_per_sequence(queries ? args->max_seqlen_q : args->max_seqlen_k, rows);
        num_work = args->num_sequences * per_sequence;
        if (order) {
            int wide = rows == MVK_WIDE_TILE_ROWS;
            order = queries ? args->tile_map_q : wide ? args->wide_tile_map_k : args->tile_map_k;
            num_work = queries ? args->num_tiles_q
                       : wide  ? args->num_wide_tiles_k
                               : args->num_tiles_k;
        }
    }
    MVK_TRY(mvk_check_size(call, "the number of tiles", num_work, 0, INT32_MAX / 2));
    mvk_pointer(call, "order_ptr", order);
    mvk_integer(call, "num_work", num_work);
    mvk_integer(call, "tiles_per_sequence", per_sequence > 1 ? per_sequence : 1);
    /* The first launch clears the padding. */
    int64_t clearing = number == 0 ? mvk_compiled(call, number, "CLEAR_PARTS") : 0;
    return mvk_launch_one(call, number, attention_grid(args->num_heads, num_work + clearing),
                          stream);
}

mvk_status mvk_attention_backward(const mvk_attention_backward_args *args, mvk_stream stream) {
    MVK_NEED_ARGS(args);
    mvk_call call;
    mvk_begin(&call, MVK_OP_attention_backward);
    MVK_TRY(check_sizes(&call, args->num_heads, args->num_sequences, args->rows_q,
                        args->max_seqlen_q, args->max_seqlen_k, args->softmax_scale));
    MVK_TRY(mvk_check_size(&call, "rows_k", args->rows_k, 0, INT32_MAX));
    int maps = (args->sequence_order != NULL) + (args->tile_map_q != NULL) +
               (args->tile_map_k != NULL) + (args->wide_tile_map_k != NULL);
    if (maps != 0 && maps != 4)
        return mvk_fail(MVK_ERROR_INVALID_ARGUMENT,
                        "attention_backward: give sequence_order, tile_map_q, tile_map_k and "
                        "wide_tile_map_k, or none of them, got %d",
                        maps);
    give_keys(&call, args->dtype, args->head_dim, maps == 4, args->max_seqlen_q,
              args->max_seqlen_k);
    MVK_TRY(mvk_find(&call));

    const struct token_stride strides[] = {
        {"stride_q", "stride_qt_by_8", "STRIDE_QH", args->stride_q},
        {"stride_k", "stride_kt_by_8", "STRIDE_KH", args->stride_k},
        {"stride_v", "stride_vt_by_8", "STRIDE_VH", args->stride_v},
        {"stride_out", "stride_ot_by_8", "STRIDE_OH", args->stride_out},
        {"stride_dout", "stride_dot_by_8", "STRIDE_DOH", args->stride_dout},
        {"stride_dq", "stride_dqt_by_8", "STRIDE_DQH", args->stride_dq},
        {"stride_dk", "stride_dkt_by_8", "STRIDE_DKH", args->stride_dk},
        {"stride_dv", "stride_dvt_by_8", "STRIDE_DVH", args->stride_dv},
    };
    MVK_TRY(give_strides(&call, strides, 8, args->head_dim, args->num_heads));
    mvk_pointer(&call, "q_ptr", args->q);
    mvk_pointer(&call, "k_ptr", args->k);
    mvk_pointer(&call, "v_ptr", args->v);
    mvk_pointer(&call, "out_ptr", args->out);
    mvk_pointer(&call, "dout_ptr", args->dout);
    mvk_pointer(&call, "lse_ptr", args->lse);
    mvk_pointer(&call, "delta_ptr", args->delta);
    mvk_pointer(&call, "dq_ptr", args->dq);
    mvk_pointer(&call, "dk_ptr", args->dk);
    mvk_pointer(&call, "dv_ptr", args->dv);
    mvk_pointer(&call, "cu_seqlens_q_ptr", args->cu_seqlens_q);
    mvk_pointer(&call, "cu_seqlens_k_ptr", args->cu_seqlens_k);
    mvk_integer(&call, "rows_q", args->rows_q);
    mvk_integer(&call, "rows_k", args->rows_k);
    mvk_integer(&call, "num_sequences", args->num_sequences);
    mvk_real(&call, "scale", args->softmax_scale);
    for (uint32_t number = 0; number < call.found->num_launches; number++)
        MVK_TRY(launch_backward(&call, number, args, stream));
    return MVK_SUCCESS;
}
