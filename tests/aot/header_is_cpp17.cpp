#include "masked_vit_kernels.h"

static_assert(MVK_SUCCESS == 0);

// A value-initialised struct is a valid start in C++.
int64_t width_of_nothing();
int64_t width_of_nothing() {
    mvk_gather_rows_args args{};
    return args.width + MVK_TENSOR_TILE;
}
