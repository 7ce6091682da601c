#include "row_index.h"

#include <stddef.h>

enum layout { EVERY_TOKEN = 0, DENSE = 1, PACKED = 2 }; /* the key's values */

mvk_status mvk_give_index(mvk_call *call, const mvk_row_index *index, int every) {
    MVK_TRY(mvk_check_size(call, "index.num_rows", index->num_rows, 0, INT32_MAX));
    MVK_TRY(mvk_check_size(call, "index.num_tokens", index->num_tokens, 1, INT32_MAX));
    enum layout layout = index->sequence_ids ? PACKED : index->indices ? DENSE : EVERY_TOKEN;
    if (!index->indices && (index->sequence_ids || !every))
        return mvk_fail(MVK_ERROR_INVALID_ARGUMENT, "%s: index.indices must not be NULL",
                        call->op->name);
    int64_t rows_per_image = 1, sequences_per_image = 1; /* the one its layout does not read */
    if (layout == PACKED) {
        sequences_per_image = index->sequences_per_image;
        MVK_TRY(mvk_check_size(call, "index.sequences_per_image", sequences_per_image, 1,
                               INT32_MAX));
    } else {
        rows_per_image = layout == DENSE ? index->rows_per_image : index->num_tokens;
        MVK_TRY(mvk_check_size(call, "index.rows_per_image", rows_per_image, 1, INT32_MAX));
    }
    mvk_key(call, "layout", layout);
    mvk_pointer(call, "indices_ptr", index->indices);
    mvk_pointer(call, "sequence_ids_ptr", index->sequence_ids);
    mvk_integer(call, "num_rows", index->num_rows);
    mvk_integer(call, "num_tokens", index->num_tokens);
    mvk_integer(call, "rows_per_image", rows_per_image);
    mvk_integer(call, "sequences_per_image", sequences_per_image);
    return MVK_SUCCESS;
}
