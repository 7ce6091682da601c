/* Which device gets which kernels; contexts, failing launches, and many threads at once. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>

#include "a_valid_call.h"
#include "check.h"

static struct {
    void (*reset)(void), (*set_capability)(int, int), (*lose_context)(void);
    void (*use_context)(unsigned long long), (*fail_launches)(int);
    int (*num_launches)(void), (*num_modules)(void);
} fake;

static void load_fake(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    *(void **)&fake.reset = dlsym(library, "fake_reset");
    *(void **)&fake.set_capability = dlsym(library, "fake_set_capability");
    *(void **)&fake.lose_context = dlsym(library, "fake_lose_context");
    *(void **)&fake.use_context = dlsym(library, "fake_use_context");
    *(void **)&fake.fail_launches = dlsym(library, "fake_fail_launches");
    *(void **)&fake.num_launches = dlsym(library, "fake_num_launches");
    *(void **)&fake.num_modules = dlsym(library, "fake_num_modules");
    CHECK(fake.num_modules);
}

static mvk_status gather(void) {
    mvk_gather_rows_args args = a_gather();
    return mvk_gather_rows(&args, NULL);
}

/* An architecture that was built, as (major, minor). */
static int built_major(void) {
    const int majors[] = {8, 9, 10};
    for (int i = 0; i < 3; i++) {
        fake.set_capability(majors[i], 0);
        if (mvk_check_device() == MVK_SUCCESS) return majors[i];
        CHECK_FAILS(mvk_check_device(), MVK_ERROR_UNSUPPORTED_DEVICE, "MVK_ARCHS");
    }
    CHECK(!"no architecture was built");
    return 0;
}

static void check_devices(void) {
    fake.set_capability(7, 5);
    CHECK_FAILS(gather(), MVK_ERROR_UNSUPPORTED_DEVICE, "7.5");
    fake.set_capability(12, 0);
    CHECK_FAILS(gather(), MVK_ERROR_UNSUPPORTED_DEVICE, "12.0");
    fake.set_capability(10, 3);
    CHECK_FAILS(gather(), MVK_ERROR_UNSUPPORTED_DEVICE, "10.3");
    int major = built_major();
    if (major == 8) {
        fake.set_capability(8, 9);
        CHECK(gather() == MVK_SUCCESS);
    }
    fake.set_capability(major, 0);
}

static void check_contexts(void) {
    fake.reset();
    fake.lose_context();
    CHECK_FAILS(gather(), MVK_ERROR_NO_CONTEXT, "cudaSetDevice");
    fake.reset();
    fake.use_context(7);
    CHECK(gather() == MVK_SUCCESS && gather() == MVK_SUCCESS);
    CHECK(fake.num_modules() == 1 && fake.num_launches() == 2);
    fake.use_context(8); /* a module belongs to its context */
    CHECK(gather() == MVK_SUCCESS);
    CHECK(fake.num_modules() == 2);
    fake.fail_launches(700);
    CHECK_FAILS(gather(), MVK_ERROR_CUDA, "launch _gather_rows_kernel: a made-up error");
    fake.reset();
}

enum { THREADS = 8, CALLS = 50 };

static void *launch_and_fail(void *number) {
    for (int call = 0; call < CALLS; call++) {
        mvk_attention_forward_args args = an_attention();
        args.max_seqlen_k = call % 2 ? 64 : 256;
        CHECK(mvk_attention_forward(&args, NULL) == MVK_SUCCESS);
        /* Messages are each thread's own. */
        char expected[64];
        args.head_dim = 1000 + (int)(intptr_t)number;
        snprintf(expected, sizeof expected, "head_dim %d,", (int)args.head_dim);
        CHECK_FAILS(mvk_attention_forward(&args, NULL), MVK_ERROR_NOT_COMPILED, expected);
    }
    return NULL;
}

static void check_threads(void) {
    fake.use_context(9);
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, launch_and_fail, (void *)(intptr_t)i);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    CHECK(fake.num_launches() == THREADS * CALLS);
    CHECK(fake.num_modules() == 2); /* each kernel once */
}

int main(void) {
    load_fake();
    check_devices();
    check_contexts();
    check_threads();
    return 0;
}
