// Gathering tokens by index from C++: errors as exceptions, device memory that frees itself.
//
// Without a GPU it prints the library's own words about that and ends well.
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.h"
#include "masked_vit_kernels.h"

namespace {

void check(mvk_status status) {
    if (status != MVK_SUCCESS)
        throw std::runtime_error(std::string(mvk_error_string(status)) + ": " +
                                 mvk_last_error_message());
}

template <typename T> class DeviceArray {
  public:
    explicit DeviceArray(const std::vector<T> &host)
        : count_(host.size()), data_(device_copy(host.data(), host.size() * sizeof(T))) {}
    explicit DeviceArray(std::size_t count)
        : count_(count), data_(device_copy(nullptr, count * sizeof(T))) {}
    ~DeviceArray() { device_free(data_); }
    DeviceArray(const DeviceArray &) = delete;
    DeviceArray &operator=(const DeviceArray &) = delete;

    T *get() const { return static_cast<T *>(data_); }
    std::vector<T> to_host() const {
        std::vector<T> host(count_);
        device_read(host.data(), data_, count_ * sizeof(T));
        return host;
    }

  private:
    std::size_t count_;
    void *data_;
};

bool gathers_as_it_should() {
    constexpr int64_t images = 2, tokens = 196, kept = 50, width = 192;
    std::vector<float> x(images * tokens * width);
    for (std::size_t i = 0; i < x.size(); i++) x[i] = static_cast<float>(i);
    std::vector<int64_t> indices(images * kept);
    for (std::size_t i = 0; i < indices.size(); i++) indices[i] = (7 * i) % tokens;
    indices[3] = -1; // padding

    const DeviceArray<float> device_x(x), out(indices.size() * width);
    const DeviceArray<int64_t> device_indices(indices);
    mvk_gather_rows_args args{};
    args.dtype = MVK_DTYPE_FLOAT32;
    args.width = width;
    args.x = device_x.get();
    args.stride_image = tokens * width;
    args.stride_token = width;
    args.index.indices = device_indices.get();
    args.index.num_rows = images * kept;
    args.index.num_tokens = tokens;
    args.index.rows_per_image = kept;
    args.out = out.get();
    check(mvk_gather_rows(&args, nullptr));

    const std::vector<float> found = out.to_host();
    for (int64_t row = 0; row < images * kept; row++)
        for (int64_t column = 0; column < width; column++) {
            const int64_t source = (row / kept * tokens + indices[row]) * width + column;
            const float expected = indices[row] < 0 ? 0.0f : x[source];
            if (found[row * width + column] != expected) return false;
        }
    return true;
}

} // namespace

int main() {
    if (const char *problem = device_start()) {
        const mvk_status status = mvk_check_device();
        std::printf("nothing to run on: %s\nthe library says: %s\n", problem,
                    status == MVK_SUCCESS ? "a device is there" : mvk_last_error_message());
        return 0;
    }
    const bool right = gathers_as_it_should();
    std::printf(right ? "gathered\n" : "the gathered rows are wrong\n");
    return right ? 0 : 1;
}
