/* Every op on a GPU against the plain C ops. Skipped (exit status 77) where there is none.
 *
 * Outputs are filled with NaN first: what a kernel leaves unwritten shows. Half-precision inputs are
 * random numbers that were rounded before both sides read them. */
#include <math.h>

#include "check.h"
#include "device.h"
#include "plain_ops.h"

/* ---------------------------------------------------------------- numbers and arrays */

static uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float from_bfloat16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static float uniform(void) { return 2.0f * (float)rand() / (float)RAND_MAX - 1.0f; }

/* Floats on the host, and the same on the device as float32 or bfloat16. */
struct array {
    float *host;
    void *device;
    size_t count;
    int half;
};

static void send(struct array *array) {
    if (!array->half) {
        array->device = device_copy(array->host, array->count * sizeof(float));
        return;
    }
    uint16_t *rounded = malloc(array->count * sizeof *rounded);
    for (size_t i = 0; i < array->count; i++) {
        rounded[i] = to_bfloat16(array->host[i]);
        array->host[i] = from_bfloat16(rounded[i]);
    }
    array->device = device_copy(rounded, array->count * sizeof *rounded);
    free(rounded);
}

static struct array random_array(size_t count, int half) {
    struct array array = {malloc(count * sizeof(float)), NULL, count, half};
    for (size_t i = 0; i < count; i++) array.host[i] = uniform();
    send(&array);
    return array;
}

/* NaN on the device; `host` is room for what is expected. */
static struct array result_array(size_t count, int half) {
    struct array array = {calloc(count, sizeof(float)), NULL, count, half};
    array.device = device_copy(NULL, count * (half ? sizeof(uint16_t) : sizeof(float)));
    return array;
}

static void *copy_numbers(const void *numbers, size_t bytes) { return device_copy(numbers, bytes); }

/* The device's values as floats. */
static float *received(const struct array *array) {
    float *values = malloc(array->count * sizeof(float));
    if (!array->half) {
        device_read(values, array->device, array->count * sizeof(float));
        return values;
    }
    uint16_t *raw = malloc(array->count * sizeof *raw);
    device_read(raw, array->device, array->count * sizeof *raw);
    for (size_t i = 0; i < array->count; i++) values[i] = from_bfloat16(raw[i]);
    free(raw);
    return values;
}

/* The device's values are array->host's, within `tolerance` of their largest. */
static void check_close(const char *name, const struct array *array, float tolerance) {
    float *found = received(array);
    float largest = 1e-6f;
    for (size_t i = 0; i < array->count; i++)
        if (isfinite(array->host[i])) largest = fmaxf(largest, fabsf(array->host[i]));
    for (size_t i = 0; i < array->count; i++) {
        float expected = array->host[i];
        int same = isfinite(expected) ? fabsf(found[i] - expected) <= tolerance * largest
                                      : found[i] == expected;
        if (!same) {
            fprintf(stderr, "%s[%zu]: %g, expected %g within %g\n", name, i, (double)found[i],
                    (double)expected, (double)(tolerance * largest));
            exit(1);
        }
    }
    free(found);
    printf("  %s\n", name);
}

static void run(mvk_status status) {
    CHECK(status == MVK_SUCCESS);
}

/* Rounding of one result to bfloat16, and of the products before it. */
static const float EXACT = 1e-6f, ROUNDED = 0.005f, PRODUCTS = 0.02f;

/* ---------------------------------------------------------------- attention */

static void check_attention(int head_dim, const int64_t *lengths, int mapped) {
    enum { S = 4, H = 3, CAPACITY = 900 };
    int32_t cu_seqlens[S + 1], order[S], longest = 0;
    for (int s = 0; s < S; s++) longest = lengths[s] > longest ? (int32_t)lengths[s] : longest;
    int64_t num_tiles = mvk_num_tiles(CAPACITY, S, MVK_TILE_ROWS);
    int64_t num_wide = mvk_num_tiles(CAPACITY, S, MVK_WIDE_TILE_ROWS);
    int32_t tiles[2 * (CAPACITY / 64 + S)], wide_tiles[2 * (CAPACITY / 128 + S)];
    mvk_pack_lengths_args packing = {.lengths = lengths, .num_sequences = S, .capacity = CAPACITY,
                                     .cu_seqlens = cu_seqlens, .sequence_order = order,
                                     .tile_map = tiles, .wide_tile_map = wide_tiles};
    run(mvk_pack_lengths(&packing));
    size_t count = (size_t)CAPACITY * H * head_dim;
    struct array q = random_array(count, 1), k = random_array(count, 1), v = random_array(count, 1);
    struct array dout = random_array(count, 1), out = result_array(count, 1);
    struct array lse = result_array(H * CAPACITY, 0), delta = result_array(H * CAPACITY, 0);
    struct array dq = result_array(count, 1), dk = result_array(count, 1);
    struct array dv = result_array(count, 1);
    double scale = 1 / sqrt(head_dim);
    plain_attention_forward(S, H, head_dim, CAPACITY, scale, cu_seqlens, cu_seqlens, q.host,
                            k.host, v.host, out.host, lse.host);
    plain_attention_backward(S, H, head_dim, CAPACITY, CAPACITY, scale, cu_seqlens, cu_seqlens,
                             q.host, k.host, v.host, dout.host, dq.host, dk.host, dv.host);

    const int32_t *device_cu = copy_numbers(cu_seqlens, sizeof cu_seqlens);
    const int32_t *device_tiles = copy_numbers(tiles, 8 * (size_t)num_tiles);
    const int32_t *device_wide = copy_numbers(wide_tiles, 8 * (size_t)num_wide);
    const int32_t *device_order = copy_numbers(order, sizeof order);
    int64_t stride = (int64_t)H * head_dim;
    mvk_attention_forward_args forward = {
        .dtype = MVK_DTYPE_BFLOAT16, .head_dim = head_dim, .num_heads = H, .num_sequences = S,
        .rows_q = CAPACITY, .max_seqlen_q = longest, .max_seqlen_k = longest,
        .softmax_scale = scale, .q = q.device, .k = k.device, .v = v.device, .out = out.device,
        .lse = lse.device, .stride_q = stride, .stride_k = stride, .stride_v = stride,
        .stride_out = stride, .cu_seqlens_q = device_cu, .cu_seqlens_k = device_cu};
    mvk_attention_backward_args backward = {
        .dtype = MVK_DTYPE_BFLOAT16, .head_dim = head_dim, .num_heads = H, .num_sequences = S,
        .rows_q = CAPACITY, .rows_k = CAPACITY, .max_seqlen_q = longest, .max_seqlen_k = longest,
        .softmax_scale = scale, .q = q.device, .k = k.device, .v = v.device, .out = out.device,
        .dout = dout.device, .lse = lse.device, .delta = delta.device, .dq = dq.device,
        .dk = dk.device, .dv = dv.device, .stride_q = stride, .stride_k = stride,
        .stride_v = stride, .stride_out = stride, .stride_dout = stride, .stride_dq = stride,
        .stride_dk = stride, .stride_dv = stride, .cu_seqlens_q = device_cu,
        .cu_seqlens_k = device_cu};
    if (mapped) {
        forward.tile_map_q = backward.tile_map_q = backward.tile_map_k = device_tiles;
        forward.wide_tile_map_q = backward.wide_tile_map_k = device_wide;
        forward.num_tiles_q = backward.num_tiles_q = backward.num_tiles_k = num_tiles;
        forward.num_wide_tiles_q = backward.num_wide_tiles_k = num_wide;
        backward.sequence_order = device_order;
    }
    printf("attention, D %d, lengths up to %d, %s\n", head_dim, (int)longest,
           mapped ? "mapped" : "not mapped");
    run(mvk_attention_forward(&forward, NULL));
    check_close("out", &out, PRODUCTS);
    check_close("lse", &lse, PRODUCTS);
    run(mvk_attention_backward(&backward, NULL));
    check_close("dq", &dq, PRODUCTS);
    check_close("dk", &dk, PRODUCTS);
    check_close("dv", &dv, PRODUCTS);
}

/* ---------------------------------------------------------------- tokens */

enum { B = 2, N = 196, R = 120 };
static int64_t ids[R];

/* Dense ids, distinct within an image, some of them padding. */
static void fill_ids(void) {
    for (int row = 0; row < R; row++) ids[row] = row % 11 == 10 ? -1 : (row % (R / B)) * 3 % N;
}

static mvk_row_index device_index(void) {
    mvk_row_index index = {.indices = copy_numbers(ids, sizeof ids), .num_rows = R,
                           .num_tokens = N, .rows_per_image = R / B};
    return index;
}

static const struct plain_index host_index = {ids, NULL, R, N, R / B, 1};

static void check_tokens(int half) {
    enum { D = 384 };
    mvk_dtype dtype = half ? MVK_DTYPE_BFLOAT16 : MVK_DTYPE_FLOAT32;
    printf("tokens in %s\n", half ? "bfloat16" : "float32");
    struct array x = random_array(B * N * D, half), rows = random_array(R * D, half);
    struct array gathered = result_array(R * D, half), scattered = result_array(B * N * D, half);
    int32_t *places = device_copy(NULL, B * N * sizeof(int32_t));
    plain_gather(&host_index, D, x.host, gathered.host);
    mvk_gather_rows_args gather = {.dtype = dtype, .width = D, .x = x.device,
                                   .stride_image = N * D, .stride_token = D,
                                   .index = device_index(), .out = gathered.device};
    run(mvk_gather_rows(&gather, NULL));
    check_close("gather", &gathered, 0);

    plain_scatter(&host_index, B, D, rows.host, x.host, scattered.host);
    mvk_scatter_rows_args scatter = {
        .dtype = dtype, .width = D, .num_images = B, .x = rows.device, .stride_row = D,
        .fill = x.device, .stride_fill_image = N * D, .stride_fill_token = D,
        .index = device_index(), .place_to_row = places, .out = scattered.device};
    run(mvk_scatter_rows(&scatter, NULL));
    check_close("scatter", &scattered, 0);

    enum { CHUNKS = 5, INNER = 16 };
    struct array partial = result_array(CHUNKS * INNER * D, 0), fill = result_array(D, 0);
    plain_scatter_fill_gradient(&host_index, B, D, x.host, fill.host);
    mvk_scatter_fill_gradient_args gradient = {
        .dtype = dtype, .width = D, .num_images = B, .grad = x.device, .index = device_index(),
        .place_to_row = places, .chunks = CHUNKS, .inner = INNER, .partial = partial.device};
    run(mvk_scatter_fill_gradient(&gradient, NULL));
    float *parts = received(&partial);
    struct array sum = result_array(D, 0);
    for (int d = 0; d < D; d++)
        for (int i = 0; i < CHUNKS * INNER; i++) sum.host[d] += parts[i * D + d];
    for (int d = 0; d < D; d++) CHECK(fabsf(sum.host[d] - fill.host[d]) < 1e-3f);
    printf("  fill gradient\n");

    enum { P = 40 };
    int64_t order[R], starts[P + 1];
    for (int i = 0; i < R; i++) order[i] = (i * 7) % R;
    for (int p = 0; p <= P; p++) starts[p] = p < 3 ? 0 : (int64_t)(p - 3) * R / (P - 3);
    struct array sums = result_array(P * D, half);
    plain_sum_rows_by_place(P, D, order, starts, rows.host, sums.host);
    mvk_sum_rows_by_place_args by_place = {
        .dtype = dtype, .width = D, .num_rows = R, .num_places = P, .values = rows.device,
        .stride_row = D, .order = copy_numbers(order, sizeof order),
        .starts = copy_numbers(starts, sizeof starts), .out = sums.device};
    run(mvk_sum_rows_by_place(&by_place, NULL));
    check_close("sum by place", &sums, half ? ROUNDED : EXACT);
}

/* ---------------------------------------------------------------- embedding */

static void check_embedding(void) {
    enum { D = 768, SIZE = 224, PATCH = 16, K = 768 };
    printf("patch embedding\n");
    uint8_t *images = malloc(B * 3 * SIZE * SIZE);
    for (int i = 0; i < B * 3 * SIZE * SIZE; i++) images[i] = (uint8_t)(rand() >> 7);
    uint8_t *device_images = device_copy(images, B * 3 * SIZE * SIZE);
    float mean[3] = {0.4f, 0.5f, 0.6f}, std[3] = {0.2f, 0.3f, 0.4f};
    float *device_mean = device_copy(mean, sizeof mean), *device_std = device_copy(std, sizeof std);
    struct array patches = result_array(R * K, 1), weight = random_array(D * K, 1);
    struct array bias = random_array(D, 1), position = random_array(N * D, 0);
    struct array product = random_array(R * D, 1), tokens = result_array(R * D, 1);

    plain_patch_rows(&host_index, SIZE, PATCH, K, images, mean, std, patches.host);
    mvk_patch_rows_args rows = {
        .image_dtype = MVK_DTYPE_UINT8, .dtype = MVK_DTYPE_BFLOAT16, .image_size = SIZE,
        .patch_size = PATCH, .images = device_images, .mean = device_mean, .std = device_std,
        .index = device_index(), .out = patches.device};
    run(mvk_patch_rows(&rows, NULL));
    check_close("patch rows", &patches, ROUNDED);

    plain_add_position(&host_index, D, product.host, bias.host, position.host, tokens.host);
    mvk_add_position_args add = {
        .dtype = MVK_DTYPE_BFLOAT16, .bias_dtype = MVK_DTYPE_BFLOAT16, .width = D,
        .x = product.device, .stride_row = D, .bias = bias.device, .position = position.device,
        .index = device_index(), .out = tokens.device};
    run(mvk_add_position(&add, NULL));
    check_close("add position", &tokens, ROUNDED);

    enum { CHUNKS = 3 };
    struct array grad_x = result_array(R * D, 1), partial = result_array(CHUNKS * D, 0);
    float *sum = malloc(D * sizeof(float));
    plain_add_position_backward(&host_index, D, product.host, grad_x.host, sum);
    mvk_add_position_backward_args back = {
        .dtype = MVK_DTYPE_BFLOAT16, .width = D, .grad = product.device, .stride_row = D,
        .index = device_index(), .grad_x = grad_x.device, .chunks = CHUNKS,
        .partial = partial.device};
    run(mvk_add_position_backward(&back, NULL));
    check_close("gradient of the product", &grad_x, 0);
    float *parts = received(&partial);
    for (int d = 0; d < D; d++)
        CHECK(fabsf(parts[d] + parts[D + d] + parts[2 * D + d] - sum[d]) < 1e-3f);
    printf("  gradient of the bias\n");

    /* The fused kernel knows no dense layout: the same rows as two packed sequences. */
    int32_t sequences[R];
    for (int row = 0; row < R; row++) sequences[row] = row / (R / B);
    mvk_row_index packed = device_index();
    packed.sequence_ids = copy_numbers(sequences, sizeof sequences);
    packed.sequences_per_image = 1;
    float *rounded = malloc(R * K * sizeof(float)), *linear = malloc(R * D * sizeof(float));
    for (int i = 0; i < R * K; i++) rounded[i] = from_bfloat16(to_bfloat16(patches.host[i]));
    plain_linear(R, K, D, rounded, weight.host, linear);
    struct array fused = result_array(R * D, 1);
    plain_add_position(&host_index, D, linear, bias.host, position.host, fused.host);
    mvk_embed_visible_patches_args embed = {
        .dtype = MVK_DTYPE_BFLOAT16, .width = D, .image_size = SIZE, .patch_size = PATCH,
        .images = device_images, .mean = device_mean, .std = device_std, .weight = weight.device,
        .bias = bias.device, .position = position.device, .index = packed, .out = fused.device};
    run(mvk_embed_visible_patches(&embed, NULL));
    check_close("fused embedding", &fused, ROUNDED);
}

/* ---------------------------------------------------------------- predictor and loss */

static void check_predictor(void) {
    enum { P = 384, TC = 50, TT = 30, TP = 2 * TC + TT + 5, M = 1, CHUNKS = 2 };
    printf("predictor tokens\n");
    int64_t context_ids[TC], target_ids[TT], source_rows[TP], copies[TC], target_rows[TT];
    for (int c = 0; c < TC; c++) context_ids[c] = c * 3, copies[c] = c % 7 ? c : -1;
    for (int t = 0; t < TT; t++) target_ids[t] = t + 9, target_rows[t] = t % 5 ? 2 * TC + t : -1;
    for (int row = 0; row < TP; row++)
        source_rows[row] = row < 2 * TC ? row % TC : row < 2 * TC + TT ? row - TC : -1;
    struct array context = random_array(TC * P, 0), mask = random_array(P, 1);
    struct array position = random_array(N * P, 0), out = result_array(TP * P, 0);
    plain_assemble(TP, TC, TT, P, context.host, mask.host, position.host, context_ids, target_ids,
                   source_rows, out.host);
    const int64_t *device_rows = copy_numbers(target_rows, sizeof target_rows);
    mvk_assemble_predictor_tokens_args assemble = {
        .dtype = MVK_DTYPE_FLOAT32, .mask_dtype = MVK_DTYPE_BFLOAT16, .width = P, .num_rows = TP,
        .num_context = TC, .num_targets = TT, .num_positions = N, .context = context.device,
        .stride_context = P, .mask_token = mask.device, .position = position.device,
        .context_ids = copy_numbers(context_ids, sizeof context_ids),
        .target_ids = copy_numbers(target_ids, sizeof target_ids),
        .source_rows = copy_numbers(source_rows, sizeof source_rows), .out = out.device};
    run(mvk_assemble_predictor_tokens(&assemble, NULL));
    check_close("assembled", &out, EXACT);

    struct array grad = random_array(TP * P, 0), grad_context = result_array(TC * P, 0);
    struct array partial = result_array(CHUNKS * P, 0);
    float grad_mask[P];
    plain_assemble_backward(TC, TT, M, P, grad.host, copies, target_rows, grad_context.host,
                            grad_mask);
    mvk_assemble_predictor_tokens_backward_args backward = {
        .dtype = MVK_DTYPE_FLOAT32, .width = P, .num_context = TC, .num_targets = TT, .copies = M,
        .grad = grad.device, .stride_row = P, .context_copies = copy_numbers(copies, sizeof copies),
        .target_rows = device_rows, .grad_context = grad_context.device, .chunks = CHUNKS,
        .partial = partial.device};
    run(mvk_assemble_predictor_tokens_backward(&backward, NULL));
    check_close("gradient of the context", &grad_context, EXACT);
    float *parts = received(&partial);
    for (int d = 0; d < P; d++) CHECK(fabsf(parts[d] + parts[P + d] - grad_mask[d]) < 1e-3f);
    printf("  gradient of the mask token\n");
}

static void check_loss(mvk_loss_kind kind, float denominator) {
    enum { D = 768, TT = 70, F = 40 };
    printf("loss, %s, denominator %g\n", kind == MVK_LOSS_L2 ? "l2" : "smooth l1",
           (double)denominator);
    int64_t target_rows[TT];
    for (int t = 0; t < TT; t++) target_rows[t] = t % 9 == 8 ? -1 : t * 3 % F;
    struct array predictions = random_array(TT * D, 1), features = random_array(F * D, 0);
    for (size_t i = 0; i < predictions.count; i++) predictions.host[i] *= 3;
    send(&predictions);
    struct array grad = result_array(TT * D, 1), mean = result_array(TT, 0);
    struct array rstd = result_array(TT, 0), out = result_array(2, 0);
    struct array partial = result_array(2 * (size_t)mvk_loss_programs(TT), 0);
    double expected = plain_loss(kind == MVK_LOSS_L2, TT, D, predictions.host, features.host,
                                 target_rows, denominator, grad.host);
    float one = 1;
    mvk_prediction_loss_args forward = {
        .dtype = MVK_DTYPE_BFLOAT16, .feature_dtype = MVK_DTYPE_FLOAT32, .kind = kind, .width = D,
        .num_rows = TT, .num_features = F, .predictions = predictions.device,
        .stride_prediction = D, .features = features.device, .stride_feature = D,
        .target_rows = copy_numbers(target_rows, sizeof target_rows),
        .denominator = denominator > 0 ? copy_numbers(&denominator, sizeof denominator) : NULL,
        .denominator_dtype = MVK_DTYPE_FLOAT32, .partial = partial.device, .mean = mean.device,
        .rstd = rstd.device, .out = out.device};
    run(mvk_prediction_loss(&forward, NULL));
    float *found = received(&out);
    CHECK(fabs(found[0] - expected) <= 1e-4 * fabs(expected));
    mvk_prediction_loss_backward_args backward = {
        .dtype = MVK_DTYPE_BFLOAT16, .feature_dtype = MVK_DTYPE_FLOAT32, .kind = kind, .width = D,
        .num_rows = TT, .num_features = F, .grad_loss = copy_numbers(&one, sizeof one),
        .out = out.device, .predictions = predictions.device, .stride_prediction = D,
        .features = features.device, .stride_feature = D, .target_rows = forward.target_rows,
        .mean = mean.device, .rstd = rstd.device, .grad = grad.device};
    run(mvk_prediction_loss_backward(&backward, NULL));
    check_close("gradient of the predictions", &grad, ROUNDED);
}

/* ---------------------------------------------------------------- optimiser */

enum { COUNT = 3 * MVK_TENSOR_TILE + 13 };

static int32_t *device_tiles(int64_t *num_tiles) {
    const int64_t size = COUNT;
    int32_t tiles[16];
    *num_tiles = mvk_tensor_tiles(&size, 1, tiles);
    return device_copy(tiles, 8 * (size_t)*num_tiles);
}

static void check_ema(void) {
    printf("moving average\n");
    struct array target = random_array(COUNT, 0), source = random_array(COUNT, 1);
    int64_t table[4] = {(int64_t)(intptr_t)target.device, (int64_t)(intptr_t)source.device, COUNT, 0};
    mvk_ema_update_args args = {.source_dtype = MVK_DTYPE_BFLOAT16,
                                .table = copy_numbers(table, sizeof table), .momentum = 0.9};
    args.tiles = device_tiles(&args.num_tiles);
    plain_ema(COUNT, 0.9, target.host, source.host);
    run(mvk_ema_update(&args, NULL));
    check_close("average", &target, EXACT);
}

static void check_adamw(void) {
    printf("adamw\n");
    struct array weights = random_array(COUNT, 0), gradient = random_array(COUNT, 1);
    struct array exp_avg = random_array(COUNT, 0), exp_avg_sq = random_array(COUNT, 0);
    struct array average = random_array(COUNT, 0);
    for (size_t i = 0; i < COUNT; i++) exp_avg_sq.host[i] = fabsf(exp_avg_sq.host[i]);
    send(&exp_avg_sq);
    uint16_t *copy = device_copy(NULL, COUNT * sizeof *copy);
    uint16_t *average_copy = device_copy(NULL, COUNT * sizeof *average_copy);
    int64_t table[MVK_ADAMW_TABLE_COLUMNS] = {
        (int64_t)(intptr_t)weights.device, (int64_t)(intptr_t)copy,
        (int64_t)(intptr_t)exp_avg.device, (int64_t)(intptr_t)exp_avg_sq.device,
        (int64_t)(intptr_t)average.device, (int64_t)(intptr_t)average_copy, COUNT, 0};
    int64_t gradients[1] = {(int64_t)(intptr_t)gradient.device}, num_tiles, no_skips = 0;
    int32_t group = 0, *tiles = device_tiles(&num_tiles);
    float step = 4;
    double hyper[2 + MVK_ADAMW_GROUP_VALUES] = {0.9, 1.0, 0.01, 0.9, 0.999, 1e-8, 0.1}, squares = 0;
    for (size_t i = 0; i < COUNT; i++) squares += gradient.host[i] * gradient.host[i];
    struct plain_adamw with = {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8,
                               .weight_decay = 0.1, .momentum = 0.9,
                               .clip = fmin(1, 1 / (sqrt(squares) + 1e-6)), .step = 5};
    plain_adamw_ema(&with, COUNT, gradient.host, weights.host, exp_avg.host, exp_avg_sq.host,
                    average.host);

    struct array partials = result_array((size_t)num_tiles, 0), scalars = result_array(4, 0);
    struct array coefficients = result_array(MVK_ADAMW_COEFFICIENTS, 0);
    struct array norm = result_array(1, 0);
    const int64_t *device_table = copy_numbers(table, sizeof table);
    const int64_t *device_gradients = copy_numbers(gradients, sizeof gradients);
    mvk_adamw_ema_gradient_norm_args squared = {
        .gradient_dtype = MVK_DTYPE_BFLOAT16, .tiles = tiles, .num_tiles = num_tiles,
        .table = device_table, .gradients = device_gradients, .partials = partials.device};
    run(mvk_adamw_ema_gradient_norm(&squared, NULL));
    uint8_t skipped, *device_skipped = device_copy(NULL, 1);
    mvk_adamw_ema_decide_args decide = {
        .partials = partials.device, .num_partials = num_tiles,
        .hyper = copy_numbers(hyper, sizeof hyper), .groups = copy_numbers(&group, sizeof group),
        .gradients = device_gradients, .steps = copy_numbers(&step, sizeof step), .num_slots = 1,
        .coefficients = coefficients.device, .scalars = scalars.device, .grad_norm = norm.device,
        .skipped = device_skipped, .skip_count = copy_numbers(&no_skips, sizeof no_skips)};
    run(mvk_adamw_ema_decide(&decide, NULL));
    device_read(&skipped, device_skipped, 1);
    CHECK(skipped == 0);
    norm.host[0] = (float)sqrt(squares);
    check_close("norm", &norm, 1e-4f);
    mvk_adamw_ema_update_args update = {
        .dtype = MVK_DTYPE_BFLOAT16, .gradient_dtype = MVK_DTYPE_BFLOAT16, .tiles = tiles,
        .num_tiles = num_tiles, .table = device_table, .gradients = device_gradients,
        .coefficients = coefficients.device, .scalars = scalars.device};
    run(mvk_adamw_ema_update(&update, NULL));
    check_close("weights", &weights, 1e-5f);
    check_close("first moment", &exp_avg, 1e-5f);
    check_close("second moment", &exp_avg_sq, 1e-5f);
    check_close("average", &average, 1e-5f);
}

int main(void) {
    const char *problem = device_start();
    if (problem) {
        printf("skipped: %s\n", problem);
        return 77;
    }
    if (mvk_check_device() != MVK_SUCCESS) {
        printf("skipped: %s\n", mvk_last_error_message());
        return 77;
    }
    fill_ids();
    const int head_dims[] = {24, 32, 64, 80, 88};
    const int64_t lengths[][4] = {{1, 0, 63, 64}, {65, 0, 128, 3}, {197, 64, 0, 256}, {300, 1, 0, 513}};
    for (int d = 0; d < 5; d++)
        for (int l = 0; l < 4; l++) check_attention(head_dims[d], lengths[l], (d + l) % 2);
    check_tokens(0);
    check_tokens(1);
    check_embedding();
    check_predictor();
    check_loss(MVK_LOSS_SMOOTH_L1, 0);
    check_loss(MVK_LOSS_L2, 1000);
    check_ema();
    check_adamw();
    printf("every op agrees with plain C\n");
    return 0;
}
