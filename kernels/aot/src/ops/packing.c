/* Sequences laid end to end, described on the host: `pack_lengths` of the Python library. */
#include <stddef.h>
#include <stdlib.h>

#include "errors.h"

struct entry {
    int64_t length, sequence;
};

/* Longest first; equal lengths in their own order. */
static int by_length(const void *left, const void *right) {
    const struct entry *a = left, *b = right;
    if (a->length != b->length) return a->length < b->length ? 1 : -1;
    return a->sequence < b->sequence ? -1 : 1;
}

int64_t mvk_num_tiles(int64_t capacity, int64_t num_sequences, int64_t tile_rows) {
    return capacity / tile_rows + num_sequences;
}

static void fill_tile_map(const struct entry *order, const mvk_pack_lengths_args *args,
                          int64_t rows, int32_t *map) {
    int64_t entry = 0;
    for (int64_t i = 0; i < args->num_sequences; i++)
        for (int64_t row = 0; row < order[i].length; row += rows, entry++) {
            map[2 * entry] = (int32_t)order[i].sequence;
            map[2 * entry + 1] = (int32_t)row;
        }
    for (; entry < mvk_num_tiles(args->capacity, args->num_sequences, rows); entry++)
        map[2 * entry] = map[2 * entry + 1] = -1;
}

mvk_status mvk_pack_lengths(const mvk_pack_lengths_args *args) {
    if (!args || (!args->lengths && args->num_sequences > 0))
        return mvk_fail(MVK_ERROR_INVALID_ARGUMENT, "pack_lengths: lengths must not be NULL");
    int64_t total = 0;
    for (int64_t s = 0; s < args->num_sequences; s++) {
        if (args->lengths[s] < 0)
            return mvk_fail(MVK_ERROR_INVALID_ARGUMENT,
                            "pack_lengths: lengths must not be negative, got %lld",
                            (long long)args->lengths[s]);
        if (args->cu_seqlens) args->cu_seqlens[s] = (int32_t)total;
        total += args->lengths[s];
        if (total > args->capacity || total > INT32_MAX)
            return mvk_fail(MVK_ERROR_INVALID_ARGUMENT,
                            "pack_lengths: %lld tokens do not fit capacity %lld", (long long)total,
                            (long long)args->capacity);
    }
    if (args->cu_seqlens) args->cu_seqlens[args->num_sequences] = (int32_t)total;

    struct entry *order = malloc(((size_t)args->num_sequences + 1) * sizeof *order);
    if (!order) return mvk_fail(MVK_ERROR_INTERNAL, "pack_lengths: out of memory");
    int64_t row = 0;
    for (int64_t s = 0; s < args->num_sequences; s++) {
        order[s] = (struct entry){args->lengths[s], s};
        for (int64_t i = 0; args->sequence_ids && i < args->lengths[s]; i++)
            args->sequence_ids[row++] = (int32_t)s;
    }
    while (args->sequence_ids && row < args->capacity) args->sequence_ids[row++] = -1;
    qsort(order, (size_t)args->num_sequences, sizeof *order, by_length);
    for (int64_t s = 0; args->sequence_order && s < args->num_sequences; s++)
        args->sequence_order[s] = (int32_t)order[s].sequence;
    if (args->tile_map) fill_tile_map(order, args, MVK_TILE_ROWS, args->tile_map);
    if (args->wide_tile_map) fill_tile_map(order, args, MVK_WIDE_TILE_ROWS, args->wide_tile_map);
    free(order);
    return MVK_SUCCESS;
}
