# find_package(masked_vit_kernels) -> the target masked_vit_kernels::masked_vit_kernels
include(${CMAKE_CURRENT_LIST_DIR}/masked_vit_kernels-targets.cmake)
