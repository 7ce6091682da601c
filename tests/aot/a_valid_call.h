/* Arguments that are right: tests change one field at a time. */
#ifndef MVK_TEST_A_VALID_CALL_H
#define MVK_TEST_A_VALID_CALL_H

#include "masked_vit_kernels.h"

/* Addresses are never followed here. */
#define SOMEWHERE ((void *)0x10000)

static inline mvk_gather_rows_args a_gather(void) {
    mvk_gather_rows_args args = {0};
    args.dtype = MVK_DTYPE_BFLOAT16;
    args.width = 768;
    args.x = SOMEWHERE;
    args.stride_image = 196 * 768;
    args.stride_token = 768;
    args.index.indices = SOMEWHERE;
    args.index.num_rows = 100;
    args.index.num_tokens = 196;
    args.index.rows_per_image = 50;
    args.out = SOMEWHERE;
    return args;
}

static inline mvk_attention_forward_args an_attention(void) {
    mvk_attention_forward_args args = {0};
    args.dtype = MVK_DTYPE_FLOAT16;
    args.head_dim = 64;
    args.num_heads = 12;
    args.num_sequences = 4;
    args.rows_q = 788;
    args.max_seqlen_q = args.max_seqlen_k = 197;
    args.softmax_scale = 0.125;
    args.q = args.k = args.v = SOMEWHERE;
    args.out = args.lse = SOMEWHERE;
    args.stride_q = args.stride_k = args.stride_v = 3 * 768;
    args.stride_out = 768;
    args.cu_seqlens_q = args.cu_seqlens_k = SOMEWHERE;
    return args;
}

#endif
