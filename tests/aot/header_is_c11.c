#include "masked_vit_kernels.h"

/* A zeroed struct is a valid start in C. */
int64_t width_of_nothing(void);
int64_t width_of_nothing(void) {
    mvk_gather_rows_args args = {0};
    return args.width + MVK_TENSOR_TILE;
}
