/* Without a CUDA driver everything but launching works, and a launch says what is missing. */
#include "a_valid_call.h"
#include "check.h"

int main(void) {
    CHECK(strcmp(mvk_version(), MVK_VERSION) == 0);
    CHECK(mvk_kernel_count() > 100);
    CHECK(strcmp(mvk_last_error_message(), "") == 0);
    for (int status = MVK_SUCCESS; status <= MVK_ERROR_INTERNAL; status++)
        CHECK(strcmp(mvk_error_string(status), "unknown status") != 0);
    CHECK(strcmp(mvk_error_string((mvk_status)99), "unknown status") == 0);

    CHECK_FAILS(mvk_check_device(), MVK_ERROR_NO_DRIVER, "libcuda.so.1");
    mvk_gather_rows_args gather = a_gather();
    CHECK_FAILS(mvk_gather_rows(&gather, NULL), MVK_ERROR_NO_DRIVER, "libcuda.so.1");
    mvk_attention_forward_args attention = an_attention();
    CHECK_FAILS(mvk_attention_forward(&attention, NULL), MVK_ERROR_NO_DRIVER, "libcuda.so.1");

    /* Wrong arguments are found here as well. */
    gather.out = NULL;
    CHECK_FAILS(mvk_gather_rows(&gather, NULL), MVK_ERROR_INVALID_ARGUMENT, "out must not be NULL");
    attention.head_dim = 96;
    CHECK_FAILS(mvk_attention_forward(&attention, NULL), MVK_ERROR_NOT_COMPILED, "head_dim 96");

    /* Nothing to do needs no GPU. */
    gather = a_gather();
    gather.index.num_rows = 0;
    CHECK(mvk_gather_rows(&gather, NULL) == MVK_SUCCESS);
    return 0;
}
