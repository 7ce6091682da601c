# Install BUILD, then configure, build and run the project SOURCE, which finds the package.
set(prefix ${BUILD}/tests/installed)
file(REMOVE_RECURSE ${prefix} ${BUILD}/tests/consumer)

function(run)
    execute_process(COMMAND ${ARGN} RESULT_VARIABLE failed)
    if(failed)
        message(FATAL_ERROR "failed: ${ARGN}")
    endif()
endfunction()

run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${prefix})
run(${CMAKE_COMMAND} -S ${SOURCE} -B ${BUILD}/tests/consumer -D CMAKE_PREFIX_PATH=${prefix})
run(${CMAKE_COMMAND} --build ${BUILD}/tests/consumer)
run(${BUILD}/tests/consumer/consumer)
if(NOT EXISTS ${prefix}/share/masked_vit_kernels/bundle/triton-version.txt)
    message(FATAL_ERROR "the bundle was not installed")
endif()
