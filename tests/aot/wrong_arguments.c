/* Every kind of wrong argument is refused with a message that names it; none reaches a launch. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>

#include "a_valid_call.h"
#include "check.h"

static int launches(void) {
    static int (*count)(void);
    if (!count) *(void **)&count = dlsym(dlopen("libcuda.so.1", RTLD_NOW), "fake_num_launches");
    return count();
}

/* The gather with one field changed. */
#define GATHER(change, status, text)                                                               \
    do {                                                                                           \
        mvk_gather_rows_args args = a_gather();                                                    \
        change;                                                                                    \
        CHECK_FAILS(mvk_gather_rows(&args, NULL), status, text);                                   \
    } while (0)

#define ATTENTION(change, status, text)                                                            \
    do {                                                                                           \
        mvk_attention_forward_args args = an_attention();                                          \
        change;                                                                                    \
        CHECK_FAILS(mvk_attention_forward(&args, NULL), status, text);                             \
    } while (0)

static void check_gather(void) {
    CHECK_FAILS(mvk_gather_rows(NULL, NULL), MVK_ERROR_INVALID_ARGUMENT, "args is NULL");
    GATHER(args.x = NULL, MVK_ERROR_INVALID_ARGUMENT, "x must not be NULL");
    GATHER(args.x = (char *)SOMEWHERE + 8, MVK_ERROR_INVALID_ARGUMENT, "16-byte aligned");
    GATHER(args.stride_token = 776, MVK_ERROR_INVALID_ARGUMENT, "multiple of 16, got 776");
    GATHER(args.stride_image = (int64_t)1 << 40, MVK_ERROR_INVALID_ARGUMENT, "fit 32 bits");
    GATHER(args.width = 769, MVK_ERROR_NOT_COMPILED, "width 769, only for 192, 384, 768");
    GATHER(args.dtype = MVK_DTYPE_UINT8, MVK_ERROR_NOT_COMPILED, "dtype 3");
    GATHER(args.index.indices = NULL, MVK_ERROR_INVALID_ARGUMENT, "index.indices");
    GATHER(args.index.num_rows = -1, MVK_ERROR_INVALID_ARGUMENT, "num_rows must be from 0");
    GATHER(args.index.num_rows = (int64_t)1 << 31, MVK_ERROR_INVALID_ARGUMENT, "num_rows");
    GATHER(args.index.num_tokens = 0, MVK_ERROR_INVALID_ARGUMENT, "num_tokens must be from 1");
    GATHER(args.index.rows_per_image = 0, MVK_ERROR_INVALID_ARGUMENT, "rows_per_image");
    GATHER(args.index.sequence_ids = SOMEWHERE, MVK_ERROR_INVALID_ARGUMENT, "sequences_per_image");
}

static void check_attention(void) {
    ATTENTION(args.head_dim = 96, MVK_ERROR_NOT_COMPILED, "only for 24, 32, 64, 80, 88");
    ATTENTION(args.dtype = MVK_DTYPE_FLOAT32, MVK_ERROR_NOT_COMPILED, "dtype 0");
    ATTENTION(args.num_heads = 0, MVK_ERROR_INVALID_ARGUMENT, "num_heads must be from 1");
    ATTENTION(args.softmax_scale = 0, MVK_ERROR_INVALID_ARGUMENT, "softmax_scale");
    ATTENTION(args.softmax_scale = NAN, MVK_ERROR_INVALID_ARGUMENT, "softmax_scale");
    ATTENTION(args.stride_q = 700, MVK_ERROR_INVALID_ARGUMENT, "stride_q must be a multiple of 8");
    ATTENTION(args.stride_v = 764, MVK_ERROR_INVALID_ARGUMENT, "stride_v");
    ATTENTION(args.tile_map_q = SOMEWHERE, MVK_ERROR_INVALID_ARGUMENT, "or neither");
    ATTENTION(args.lse = NULL, MVK_ERROR_INVALID_ARGUMENT, "lse must not be NULL");
    ATTENTION(args.cu_seqlens_k = NULL, MVK_ERROR_INVALID_ARGUMENT, "cu_seqlens_k");
    ATTENTION(args.max_seqlen_k = -1, MVK_ERROR_INVALID_ARGUMENT, "max_seqlen_k");
    mvk_attention_backward_args backward = {0};
    backward.num_heads = 1;
    backward.softmax_scale = 1;
    backward.sequence_order = SOMEWHERE;
    CHECK_FAILS(mvk_attention_backward(&backward, NULL), MVK_ERROR_INVALID_ARGUMENT, "got 1");
}

static void check_others(void) {
    mvk_patch_rows_args patches = {0};
    patches.image_dtype = MVK_DTYPE_UINT8;
    CHECK_FAILS(mvk_patch_rows(&patches, NULL), MVK_ERROR_INVALID_ARGUMENT, "mean and std");
    patches.mean = patches.std = SOMEWHERE;
    patches.image_size = 224;
    patches.patch_size = 16;
    patches.index.num_tokens = 195;
    CHECK_FAILS(mvk_patch_rows(&patches, NULL), MVK_ERROR_INVALID_ARGUMENT, "num_tokens");
    mvk_ema_update_args ema = {0};
    ema.momentum = 1.5;
    CHECK_FAILS(mvk_ema_update(&ema, NULL), MVK_ERROR_INVALID_ARGUMENT, "momentum");
    mvk_adamw_ema_update_args update = {0};
    update.first_tile = -1;
    CHECK_FAILS(mvk_adamw_ema_update(&update, NULL), MVK_ERROR_INVALID_ARGUMENT, "first_tile");
    mvk_assemble_predictor_tokens_backward_args tokens = {0};
    tokens.chunks = 1;
    tokens.width = 384;
    tokens.copies = 3;
    CHECK_FAILS(mvk_assemble_predictor_tokens_backward(&tokens, NULL), MVK_ERROR_NOT_COMPILED,
                "copies 3, only for 1, 4");
    mvk_prediction_loss_args loss = {0};
    loss.width = 768;
    loss.kind = (mvk_loss_kind)2;
    CHECK_FAILS(mvk_prediction_loss(&loss, NULL), MVK_ERROR_NOT_COMPILED, "kind 2");
    const int64_t lengths[] = {3, -1};
    mvk_pack_lengths_args pack = {0};
    pack.lengths = lengths;
    pack.num_sequences = 2;
    pack.capacity = 10;
    CHECK_FAILS(mvk_pack_lengths(&pack), MVK_ERROR_INVALID_ARGUMENT, "negative, got -1");
    pack.num_sequences = 1;
    pack.capacity = 2;
    CHECK_FAILS(mvk_pack_lengths(&pack), MVK_ERROR_INVALID_ARGUMENT, "do not fit capacity 2");
}

int main(void) {
    void (*set_capability)(int, int);
    *(void **)&set_capability = dlsym(dlopen("libcuda.so.1", RTLD_NOW), "fake_set_capability");
    /* Any architecture that was built will do. */
    const int majors[] = {8, 9, 10};
    for (int i = 0; i < 3; i++) {
        set_capability(majors[i], 0);
        if (mvk_check_device() == MVK_SUCCESS) break;
    }
    CHECK(mvk_check_device() == MVK_SUCCESS);
    check_gather();
    check_attention();
    check_others();
    CHECK(launches() == 0);

    mvk_gather_rows_args gather = a_gather();
    CHECK(mvk_gather_rows(&gather, NULL) == MVK_SUCCESS);
    CHECK(launches() == 1);
    gather.index.num_rows = 0;
    CHECK(mvk_gather_rows(&gather, NULL) == MVK_SUCCESS);
    CHECK(launches() == 1);
    return 0;
}
