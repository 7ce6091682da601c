#include "plain_ops.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static double dot(const float *a, const float *b, int count) {
    double sum = 0;
    for (int i = 0; i < count; i++) sum += (double)a[i] * b[i];
    return sum;
}

/* ---------------------------------------------------------------- attention */

void plain_attention_forward(int sequences, int heads, int head_dim, int rows_q, double scale,
                             const int32_t *cu_q, const int32_t *cu_k, const float *q,
                             const float *k, const float *v, float *out, float *lse) {
    double *mixed = malloc(sizeof(double) * (size_t)head_dim);
    memset(out, 0, sizeof(float) * (size_t)rows_q * heads * head_dim);
    for (int i = 0; i < heads * rows_q; i++) lse[i] = -INFINITY;
    for (int s = 0; s < sequences; s++)
        for (int i = cu_q[s]; i < cu_q[s + 1]; i++)
            for (int h = 0; h < heads; h++) {
                double sum = 0;
                memset(mixed, 0, sizeof(double) * (size_t)head_dim);
                for (int j = cu_k[s]; j < cu_k[s + 1]; j++) {
                    const float *key = k + ((size_t)j * heads + h) * head_dim;
                    const float *value = v + ((size_t)j * heads + h) * head_dim;
                    double weight =
                        exp(scale * dot(q + ((size_t)i * heads + h) * head_dim, key, head_dim));
                    sum += weight;
                    for (int d = 0; d < head_dim; d++) mixed[d] += weight * value[d];
                }
                if (sum == 0) continue;
                for (int d = 0; d < head_dim; d++)
                    out[((size_t)i * heads + h) * head_dim + d] = (float)(mixed[d] / sum);
                lse[(size_t)h * rows_q + i] = (float)log(sum);
            }
    free(mixed);
}

void plain_attention_backward(int sequences, int heads, int head_dim, int rows_q, int rows_k,
                              double scale, const int32_t *cu_q, const int32_t *cu_k,
                              const float *q, const float *k, const float *v, const float *dout,
                              float *dq, float *dk, float *dv) {
    size_t width = (size_t)heads * head_dim;
    float *out = malloc(sizeof(float) * rows_q * width);
    float *lse = malloc(sizeof(float) * (size_t)heads * rows_q);
    plain_attention_forward(sequences, heads, head_dim, rows_q, scale, cu_q, cu_k, q, k, v, out,
                            lse);
    memset(dq, 0, sizeof(float) * rows_q * width);
    memset(dk, 0, sizeof(float) * rows_k * width);
    memset(dv, 0, sizeof(float) * rows_k * width);
    for (int s = 0; s < sequences; s++)
        for (int i = cu_q[s]; i < cu_q[s + 1]; i++)
            for (int h = 0; h < heads; h++) {
                size_t row = i * width + (size_t)h * head_dim;
                double delta = dot(dout + row, out + row, head_dim);
                for (int j = cu_k[s]; j < cu_k[s + 1]; j++) {
                    size_t key = j * width + (size_t)h * head_dim;
                    double p = exp(scale * dot(q + row, k + key, head_dim) -
                                   lse[(size_t)h * rows_q + i]);
                    double ds = p * (dot(dout + row, v + key, head_dim) - delta) * scale;
                    for (int d = 0; d < head_dim; d++) {
                        dq[row + d] += (float)(ds * k[key + d]);
                        dk[key + d] += (float)(ds * q[row + d]);
                        dv[key + d] += (float)(p * dout[row + d]);
                    }
                }
            }
    free(out);
    free(lse);
}

/* ---------------------------------------------------------------- tokens */

/* The place image * N + token of a row, -1 where it stands for nothing. */
static int64_t place_of(const struct plain_index *index, int row) {
    int64_t token = index->indices ? index->indices[row] : row % index->tokens;
    int64_t image = row / index->rows_per_image;
    if (index->sequence_ids) {
        if (index->sequence_ids[row] < 0) return -1;
        image = index->sequence_ids[row] / index->sequences_per_image;
    }
    return token < 0 || token >= index->tokens ? -1 : image * index->tokens + token;
}

void plain_gather(const struct plain_index *index, int width, const float *x, float *out) {
    for (int row = 0; row < index->rows; row++) {
        int64_t place = place_of(index, row);
        for (int d = 0; d < width; d++)
            out[(size_t)row * width + d] = place < 0 ? 0 : x[place * width + d];
    }
}

void plain_scatter(const struct plain_index *index, int images, int width, const float *x,
                   const float *fill, float *out) {
    size_t bytes = sizeof(float) * images * (size_t)index->tokens * width;
    if (fill) memcpy(out, fill, bytes);
    else memset(out, 0, bytes);
    for (int row = 0; row < index->rows; row++) {
        int64_t place = place_of(index, row);
        if (place >= 0)
            memcpy(out + place * width, x + (size_t)row * width, sizeof(float) * (size_t)width);
    }
}

void plain_scatter_fill_gradient(const struct plain_index *index, int images, int width,
                                 const float *grad, float *fill_gradient) {
    int64_t places = (int64_t)images * index->tokens;
    char *taken = calloc((size_t)places, 1);
    for (int row = 0; row < index->rows; row++)
        if (place_of(index, row) >= 0) taken[place_of(index, row)] = 1;
    for (int d = 0; d < width; d++) {
        double sum = 0;
        for (int64_t place = 0; place < places; place++)
            if (!taken[place]) sum += grad[place * width + d];
        fill_gradient[d] = (float)sum;
    }
    free(taken);
}

void plain_sum_rows_by_place(int places, int width, const int64_t *order, const int64_t *starts,
                             const float *values, float *out) {
    for (int place = 0; place < places; place++)
        for (int d = 0; d < width; d++) {
            double sum = 0;
            for (int64_t i = starts[place]; i < starts[place + 1]; i++)
                sum += values[order[i] * width + d];
            out[(size_t)place * width + d] = (float)sum;
        }
}

/* ---------------------------------------------------------------- embedding */

void plain_patch_rows(const struct plain_index *index, int size, int patch, int columns,
                      const uint8_t *images, const float *mean, const float *std, float *out) {
    memset(out, 0, sizeof(float) * (size_t)index->rows * columns);
    int grid = size / patch;
    for (int row = 0; row < index->rows; row++) {
        int64_t place = place_of(index, row);
        if (place < 0) continue;
        int64_t image = place / index->tokens, token = place % index->tokens;
        int top = (int)(token / grid) * patch, left = (int)(token % grid) * patch;
        for (int c = 0; c < 3; c++)
            for (int y = 0; y < patch; y++)
                for (int x = 0; x < patch; x++) {
                    float pixel = images[((image * 3 + c) * size + top + y) * size + left + x];
                    out[(size_t)row * columns + (c * patch + y) * patch + x] =
                        (pixel / 255.0f - mean[c]) / std[c];
                }
    }
}

void plain_add_position(const struct plain_index *index, int width, const float *x,
                        const float *bias, const float *position, float *out) {
    for (int row = 0; row < index->rows; row++) {
        int64_t place = place_of(index, row);
        for (int d = 0; d < width; d++)
            out[(size_t)row * width + d] =
                place < 0 ? 0
                          : x[(size_t)row * width + d] + bias[d] +
                                position[place % index->tokens * width + d];
    }
}

void plain_add_position_backward(const struct plain_index *index, int width, const float *grad,
                                 float *grad_x, float *sum) {
    for (int d = 0; d < width; d++) {
        double total = 0;
        for (int row = 0; row < index->rows; row++) {
            float value = place_of(index, row) < 0 ? 0 : grad[(size_t)row * width + d];
            grad_x[(size_t)row * width + d] = value;
            total += value;
        }
        sum[d] = (float)total;
    }
}

void plain_linear(int rows, int columns, int width, const float *patches, const float *weight,
                  float *out) {
    for (int row = 0; row < rows; row++)
        for (int d = 0; d < width; d++)
            out[(size_t)row * width + d] = (float)dot(patches + (size_t)row * columns,
                                                      weight + (size_t)d * columns, columns);
}

/* ---------------------------------------------------------------- predictor tokens */

void plain_assemble(int rows, int num_context, int num_targets, int width, const float *context,
                    const float *mask_token, const float *position, const int64_t *context_ids,
                    const int64_t *target_ids, const int64_t *source_rows, float *out) {
    for (int row = 0; row < rows; row++) {
        int64_t source = source_rows[row];
        const float *token = NULL;
        int64_t id = -1;
        if (source >= 0 && source < num_context) {
            token = context + source * width;
            id = context_ids[source];
        } else if (source >= num_context && source < num_context + num_targets) {
            token = mask_token;
            id = target_ids[source - num_context];
        }
        for (int d = 0; d < width; d++)
            out[(size_t)row * width + d] =
                (token ? token[d] : 0) + (id >= 0 ? position[id * width + d] : 0);
    }
}

void plain_assemble_backward(int num_context, int num_targets, int copies, int width,
                             const float *grad, const int64_t *context_copies,
                             const int64_t *target_rows, float *grad_context, float *grad_mask) {
    for (int d = 0; d < width; d++) {
        for (int c = 0; c < num_context; c++) {
            double sum = 0;
            for (int m = 0; m < copies; m++) {
                int64_t row = context_copies[c * copies + m];
                if (row >= 0) sum += grad[row * width + d];
            }
            grad_context[(size_t)c * width + d] = (float)sum;
        }
        double sum = 0;
        for (int t = 0; t < num_targets; t++)
            if (target_rows[t] >= 0) sum += grad[target_rows[t] * width + d];
        grad_mask[d] = (float)sum;
    }
}

/* ---------------------------------------------------------------- loss */

double plain_loss(int l2, int rows, int width, const float *predictions, const float *features,
                  const int64_t *target_rows, double denominator, float *grad) {
    double total = 0;
    int64_t valid = 0;
    for (int row = 0; row < rows; row++) valid += target_rows[row] >= 0;
    if (denominator == 0) denominator = valid ? (double)valid * width : 1;
    memset(grad, 0, sizeof(float) * (size_t)rows * width);
    for (int row = 0; row < rows; row++) {
        if (target_rows[row] < 0) continue;
        const float *feature = features + target_rows[row] * width;
        double mean = 0, variance = 0;
        for (int d = 0; d < width; d++) mean += feature[d] / (double)width;
        for (int d = 0; d < width; d++)
            variance += (feature[d] - mean) * (feature[d] - mean) / width;
        for (int d = 0; d < width; d++) {
            double target = (feature[d] - mean) / sqrt(variance + 1e-5);
            double difference = predictions[(size_t)row * width + d] - target;
            double size = fabs(difference), slope;
            if (l2) {
                total += difference * difference;
                slope = 2 * difference;
            } else {
                total += size < 1 ? size * size / 2 : size - 0.5;
                slope = size < 1 ? difference : difference / size;
            }
            grad[(size_t)row * width + d] = (float)(slope / denominator);
        }
    }
    return total / denominator;
}

/* ---------------------------------------------------------------- optimiser */

void plain_ema(int64_t count, double momentum, float *target, const float *source) {
    for (int64_t i = 0; i < count; i++)
        target[i] = (float)(momentum * target[i] + (1 - momentum) * source[i]);
}

void plain_adamw_ema(const struct plain_adamw *with, int64_t count, const float *gradient,
                     float *weights, float *exp_avg, float *exp_avg_sq, float *average) {
    double bias1 = 1 - pow(with->beta1, with->step), bias2 = 1 - pow(with->beta2, with->step);
    for (int64_t i = 0; i < count; i++) {
        double g = with->clip * gradient[i];
        exp_avg[i] = (float)(with->beta1 * exp_avg[i] + (1 - with->beta1) * g);
        exp_avg_sq[i] = (float)(with->beta2 * exp_avg_sq[i] + (1 - with->beta2) * g * g);
        double step = with->lr / bias1 * exp_avg[i] / (sqrt(exp_avg_sq[i] / bias2) + with->eps);
        weights[i] = (float)(weights[i] * (1 - with->lr * with->weight_decay) - step);
        average[i] = (float)(with->momentum * average[i] + (1 - with->momentum) * weights[i]);
    }
}
