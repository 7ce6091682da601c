/* A CUDA driver without a GPU, for tests: it loads cubins, reads the parameters of their kernels and
 * writes down every launch. Built as libcuda.so.1. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_PARAMETERS = 64, MAX_LAUNCHES = 64 };
enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, NOT_FOUND = 500 };
enum { MAX_DYNAMIC_SHARED_SIZE_BYTES = 8, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76 };

struct launch {
    char symbol[128];
    uint64_t cubin_hash;
    uint32_t grid[3], block[3], shared_bytes;
    uint64_t stream;
    uint32_t num_parameters;
    uint32_t sizes[MAX_PARAMETERS];
    uint8_t values[MAX_PARAMETERS][8];
};

struct function {
    char symbol[128];
    const uint8_t *cubin;
    uint32_t num_parameters, sizes[MAX_PARAMETERS];
    int allowed_shared_bytes;
};

static struct launch launches[MAX_LAUNCHES];
static int num_launches, num_modules, major = 9, minor = 0, without_context, failing_launch;
static unsigned long long context_number = 1;

/* ---------------------------------------------------------------- what tests ask and set */

void fake_reset(void) { num_launches = num_modules = without_context = failing_launch = 0; }
void fake_set_capability(int new_major, int new_minor) { major = new_major, minor = new_minor; }
void fake_lose_context(void) { without_context = 1; }
void fake_use_context(unsigned long long number) { context_number = number; }
void fake_fail_launches(int result) { failing_launch = result; }
int fake_num_launches(void) { return num_launches; }
int fake_num_modules(void) { return num_modules; }
const struct launch *fake_launch(int index) { return &launches[index]; }

/* ---------------------------------------------------------------- ELF */

static uint64_t read(const uint8_t *at, int bytes) {
    uint64_t value = 0;
    memcpy(&value, at, (size_t)bytes);
    return value;
}

static const uint8_t *section(const uint8_t *elf, unsigned index) {
    return elf + read(elf + 0x28, 8) + 64u * index;
}

static const uint8_t *find_section(const uint8_t *elf, const char *prefix, const char *symbol) {
    const uint8_t *names = elf + read(section(elf, (unsigned)read(elf + 0x3e, 2)) + 0x18, 8);
    for (unsigned i = 0; i < read(elf + 0x3c, 2); i++) {
        const char *name = (const char *)names + read(section(elf, i), 4);
        size_t length = strlen(prefix);
        if (strncmp(name, prefix, length) == 0 && strcmp(name + length, symbol) == 0)
            return section(elf, i);
    }
    return NULL;
}

static uint64_t elf_size(const uint8_t *elf) {
    return read(elf + 0x20, 8) + read(elf + 0x36, 2) * read(elf + 0x38, 2);
}

static uint64_t hash(const uint8_t *bytes, uint64_t size) {
    uint64_t value = 14695981039346656037u;
    for (uint64_t i = 0; i < size; i++) value = (value ^ bytes[i]) * 1099511628211u;
    return value;
}

/* Sizes of the kernel's parameters, from the attributes that ptxas wrote. */
static int read_parameters(struct function *function, const uint8_t *info) {
    const uint8_t *at = function->cubin + read(info + 0x18, 8), *end = at + read(info + 0x20, 8);
    while (at < end) {
        unsigned payload = at[0] == 4 ? (unsigned)read(at + 2, 2) : 0;
        if (at[0] == 4 && at[1] == 0x17) { /* KPARAM_INFO: index, ordinal, offset, flags and size */
            unsigned ordinal = (unsigned)read(at + 8, 2);
            if (ordinal >= MAX_PARAMETERS) return 0;
            function->sizes[ordinal] = (uint32_t)read(at + 12, 4) >> 18;
            if (ordinal >= function->num_parameters) function->num_parameters = ordinal + 1;
        }
        at += 4 + payload;
    }
    return 1;
}

/* ---------------------------------------------------------------- the driver's functions */

int cuInit(unsigned flags) { return flags == 0 ? SUCCESS : INVALID_VALUE; }

int cuGetErrorName(int result, const char **text) {
    (void)result;
    *text = "FAKE_ERROR";
    return SUCCESS;
}

int cuGetErrorString(int result, const char **text) {
    (void)result;
    *text = "a made-up error";
    return SUCCESS;
}

int cuCtxGetCurrent(void **context) {
    *context = without_context ? NULL : (void *)(uintptr_t)(0x1000 * context_number);
    return SUCCESS;
}

int cuCtxGetId(void *context, unsigned long long *id) {
    *id = (uintptr_t)context / 0x1000;
    return SUCCESS;
}

int cuCtxGetDevice(int *device) {
    *device = 0;
    return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    *value = attribute == CAPABILITY_MAJOR ? major : attribute == CAPABILITY_MINOR ? minor : 0;
    return SUCCESS;
}

int cuModuleLoadData(void **module, const void *image) {
    if (memcmp(image, "\177ELF", 4) != 0) return INVALID_IMAGE;
    __atomic_add_fetch(&num_modules, 1, __ATOMIC_SEQ_CST);
    uint64_t size = elf_size(image); /* as the real one, it keeps a copy */
    *module = memcpy(malloc(size), image, size);
    return SUCCESS;
}

int cuModuleGetFunction(void **result, void *module, const char *symbol) {
    struct function *function = calloc(1, sizeof *function);
    function->cubin = module;
    strncpy(function->symbol, symbol, sizeof function->symbol - 1);
    function->allowed_shared_bytes = 48 * 1024;
    const uint8_t *info = find_section(module, ".nv.info.", symbol);
    if (!info || !find_section(module, ".text.", symbol)) return NOT_FOUND;
    if (!read_parameters(function, info)) return INVALID_IMAGE;
    *result = function;
    return SUCCESS;
}

int cuFuncSetAttribute(struct function *function, int attribute, int value) {
    if (attribute != MAX_DYNAMIC_SHARED_SIZE_BYTES) return INVALID_VALUE;
    function->allowed_shared_bytes = value;
    return SUCCESS;
}

int cuLaunchKernel(struct function *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                   void *stream, void **parameters, void **extra) {
    if (failing_launch) return failing_launch;
    if (extra || !grid_x || !grid_y || !grid_z || grid_y > 65535 || grid_z > 65535 ||
        (int)shared_bytes > function->allowed_shared_bytes)
        return INVALID_VALUE;
    int index = __atomic_fetch_add(&num_launches, 1, __ATOMIC_SEQ_CST);
    if (index >= MAX_LAUNCHES) return SUCCESS;
    struct launch *launch = &launches[index];
    memset(launch, 0, sizeof *launch);
    strcpy(launch->symbol, function->symbol);
    launch->cubin_hash = hash(function->cubin, elf_size(function->cubin));
    launch->grid[0] = grid_x, launch->grid[1] = grid_y, launch->grid[2] = grid_z;
    launch->block[0] = block_x, launch->block[1] = block_y, launch->block[2] = block_z;
    launch->shared_bytes = shared_bytes;
    launch->stream = (uintptr_t)stream;
    launch->num_parameters = function->num_parameters;
    for (uint32_t i = 0; i < function->num_parameters; i++) {
        launch->sizes[i] = function->sizes[i];
        memcpy(launch->values[i], parameters[i], function->sizes[i]);
    }
    return SUCCESS;
}
