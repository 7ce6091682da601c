#include <masked_vit_kernels.h>
#include <stdio.h>

int main(void) {
    printf("masked_vit_kernels %s, %d kernels\n", mvk_version(), mvk_kernel_count());
    return mvk_kernel_count() > 0 ? 0 : 1;
}
