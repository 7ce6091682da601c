# Sets MVK_PYTHON_FOUND: a Python that imports torch and triton, for the build alone.
#
# MVK_PYTHON, if given; the .venv that `make test` and `make demo` use; python3. Where none of them
# has both, the Makefile installs .venv, once, as it does for the demo.

set(_can_build "import torch, triton, sys; sys.exit(triton.__version__ < '3.6')")

function(mvk_try_python candidate)
    if(NOT MVK_PYTHON_FOUND AND candidate AND EXISTS ${candidate})
        execute_process(COMMAND ${candidate} -c ${_can_build}
                        RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET)
        if(NOT failed)
            set(MVK_PYTHON_FOUND ${candidate} PARENT_SCOPE)
        endif()
    endif()
endfunction()

set(MVK_PYTHON_FOUND "")
if(MVK_PYTHON)
    mvk_try_python(${MVK_PYTHON})
    if(NOT MVK_PYTHON_FOUND)
        message(FATAL_ERROR "MVK_PYTHON (${MVK_PYTHON}) must import torch and triton >= 3.6: "
                "pip install -c constraints.txt -e . with it, or leave MVK_PYTHON unset")
    endif()
else()
    set(_venv ${PROJECT_SOURCE_DIR}/.venv/bin/python)
    find_program(_system_python python3)
    mvk_try_python(${_venv})
    mvk_try_python(${_system_python})
    if(NOT MVK_PYTHON_FOUND)
        message(STATUS "No Python with torch and triton: installing .venv, once ...")
        execute_process(COMMAND make .venv/installed-demo
                        WORKING_DIRECTORY ${PROJECT_SOURCE_DIR} RESULT_VARIABLE failed)
        mvk_try_python(${_venv})
        if(failed OR NOT MVK_PYTHON_FOUND)
            message(FATAL_ERROR "No Python with torch and triton >= 3.6, and `make "
                    ".venv/installed-demo` did not bring one: set MVK_PYTHON to one that has both")
        endif()
    endif()
endif()
message(STATUS "Kernels are compiled by the triton of ${MVK_PYTHON_FOUND}")
