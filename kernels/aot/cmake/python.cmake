# Sets MVK_PYTHON_FOUND: a Python that imports torch and triton, for the build alone.
#
# MVK_PYTHON, if given; the .venv of `make test`; python3. Where neither of these has both (and
# pytest, for the tests), the Makefile installs .venv with the test tools, once.

set(_can_build "import torch, triton, sys; sys.exit(triton.__version__ < '3.6')")
if(BUILD_TESTING)
    string(PREPEND _can_build "import pytest; ")
endif()

function(mvk_try_python candidate)
    if(NOT MVK_PYTHON_FOUND AND candidate AND EXISTS ${candidate})
        execute_process(COMMAND ${candidate} -c "${_can_build}"
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
        message(FATAL_ERROR "MVK_PYTHON (${MVK_PYTHON}) must import torch, triton >= 3.6 and, "
                "for the tests, pytest: pip install -c constraints.txt -e .[dev] with it, or leave "
                "MVK_PYTHON unset")
    endif()
else()
    set(_venv ${PROJECT_SOURCE_DIR}/.venv/bin/python)
    find_program(_system_python python3)
    mvk_try_python(${_venv})
    mvk_try_python(${_system_python})
    if(NOT MVK_PYTHON_FOUND)
        message(STATUS "No Python with torch, triton and pytest: installing .venv, once ...")
        execute_process(COMMAND make .venv/installed-test
                        WORKING_DIRECTORY ${PROJECT_SOURCE_DIR} RESULT_VARIABLE failed)
        mvk_try_python(${_venv})
        if(failed OR NOT MVK_PYTHON_FOUND)
            message(FATAL_ERROR "No Python with torch and triton >= 3.6, and `make "
                    ".venv/installed-test` did not bring one: set MVK_PYTHON to one that has both")
        endif()
    endif()
endif()
message(STATUS "Kernels are compiled by the triton of ${MVK_PYTHON_FOUND}")
