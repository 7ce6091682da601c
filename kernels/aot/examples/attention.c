/* Attention over packed sequences from C: describe the sequences, launch, compare with plain C.
 *
 * Without a GPU it prints the library's own words about that and ends well. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"
#include "masked_vit_kernels.h"

enum { SEQUENCES = 3, HEADS = 2, D = 64, ROWS = 100 + 0 + 37, LONGEST = 100 };
static const int64_t lengths[SEQUENCES] = {100, 0, 37};

static uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float from_bfloat16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* Part 0, 1, 2 (q, k, v) of row `row`, head `head` of qkv (ROWS, 3, HEADS, D). */
static const uint16_t *part_of(const uint16_t *qkv, int row, int part, int head) {
    return qkv + ((row * 3 + part) * HEADS + head) * D;
}

static float dot(const uint16_t *a, const uint16_t *b) {
    float sum = 0;
    for (int d = 0; d < D; d++) sum += from_bfloat16(a[d]) * from_bfloat16(b[d]);
    return sum;
}

/* Largest difference of `out` (ROWS, HEADS, D) from plain loops. */
static float largest_error(const uint16_t *qkv, const uint16_t *out, const int32_t *cu_seqlens) {
    float worst = 0;
    for (int s = 0; s < SEQUENCES; s++)
        for (int row = cu_seqlens[s]; row < cu_seqlens[s + 1]; row++)
            for (int head = 0; head < HEADS; head++) {
                double sum = 0, mixed[D] = {0};
                for (int key = cu_seqlens[s]; key < cu_seqlens[s + 1]; key++) {
                    const uint16_t *v = part_of(qkv, key, 2, head);
                    double weight =
                        exp(dot(part_of(qkv, row, 0, head), part_of(qkv, key, 1, head)) / 8.0);
                    sum += weight;
                    for (int d = 0; d < D; d++) mixed[d] += weight * from_bfloat16(v[d]);
                }
                for (int d = 0; d < D; d++) {
                    float found = from_bfloat16(out[(row * HEADS + head) * D + d]);
                    float error = fabsf(found - (float)(mixed[d] / sum));
                    if (!(error <= worst)) worst = error;
                }
            }
    return worst;
}

int main(void) {
    printf("masked_vit_kernels %s, %d kernels\n", mvk_version(), mvk_kernel_count());

    /* Where each sequence lies, on the host. */
    int32_t cu_seqlens[SEQUENCES + 1], order[SEQUENCES];
    int64_t num_tiles = mvk_num_tiles(ROWS, SEQUENCES, MVK_TILE_ROWS);
    int64_t num_wide = mvk_num_tiles(ROWS, SEQUENCES, MVK_WIDE_TILE_ROWS);
    int32_t *tiles = malloc(2 * sizeof(int32_t) * (size_t)num_tiles);
    int32_t *wide_tiles = malloc(2 * sizeof(int32_t) * (size_t)num_wide);
    mvk_pack_lengths_args packing = {
        .lengths = lengths, .num_sequences = SEQUENCES, .capacity = ROWS, .cu_seqlens = cu_seqlens,
        .sequence_order = order, .tile_map = tiles, .wide_tile_map = wide_tiles};
    if (mvk_pack_lengths(&packing) != MVK_SUCCESS) {
        fprintf(stderr, "%s\n", mvk_last_error_message());
        return 1;
    }

    mvk_attention_forward_args args = {
        .dtype = MVK_DTYPE_BFLOAT16, .head_dim = D, .num_heads = HEADS,
        .num_sequences = SEQUENCES, .rows_q = ROWS, .max_seqlen_q = LONGEST,
        .max_seqlen_k = LONGEST, .softmax_scale = 0.125, .stride_q = 3 * HEADS * D,
        .stride_k = 3 * HEADS * D, .stride_v = 3 * HEADS * D, .stride_out = HEADS * D,
        .num_tiles_q = num_tiles, .num_wide_tiles_q = num_wide};
    const char *problem = device_start();
    mvk_status status = mvk_check_device();
    if (problem || status != MVK_SUCCESS) {
        printf("nothing to run on: %s\n", problem ? problem : mvk_error_string(status));
        printf("the library says: %s\n", mvk_last_error_message());
        free(tiles);
        free(wide_tiles);
        return 0;
    }

    uint16_t *qkv = malloc(sizeof(uint16_t) * ROWS * 3 * HEADS * D);
    uint16_t *out = malloc(sizeof(uint16_t) * ROWS * HEADS * D);
    for (int i = 0; i < ROWS * 3 * HEADS * D; i++)
        qkv[i] = to_bfloat16(2.0f * (float)rand() / (float)RAND_MAX - 1.0f);
    uint16_t *device_qkv = device_copy(qkv, sizeof(uint16_t) * ROWS * 3 * HEADS * D);
    args.q = device_qkv;
    args.k = device_qkv + HEADS * D;
    args.v = device_qkv + 2 * HEADS * D;
    args.out = device_copy(NULL, sizeof(uint16_t) * ROWS * HEADS * D);
    args.lse = device_copy(NULL, sizeof(float) * HEADS * ROWS);
    args.cu_seqlens_q = args.cu_seqlens_k = device_copy(cu_seqlens, sizeof cu_seqlens);
    args.tile_map_q = device_copy(tiles, 2 * sizeof(int32_t) * (size_t)num_tiles);
    args.wide_tile_map_q = device_copy(wide_tiles, 2 * sizeof(int32_t) * (size_t)num_wide);

    status = mvk_attention_forward(&args, NULL);
    if (status != MVK_SUCCESS) {
        fprintf(stderr, "%s: %s\n", mvk_error_string(status), mvk_last_error_message());
        return 1;
    }
    device_read(out, args.out, sizeof(uint16_t) * ROWS * HEADS * D);
    float error = largest_error(qkv, out, cu_seqlens);
    printf("%d rows in %d sequences, largest difference from plain C: %g\n", ROWS, SEQUENCES,
           (double)error);
    return error < 0.02f ? 0 : 1;
}
