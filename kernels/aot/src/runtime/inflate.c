#include "inflate.h"

#include <string.h>

enum { MAX_BITS = 15, LITERALS = 288, DISTANCES = 32, LENGTH_CODES = 19, END_OF_BLOCK = 256 };

struct stream {
    const uint8_t *in;
    size_t in_size, in_used;
    uint32_t held; /* bits read from `in` and not yet taken, the next one lowest */
    int num_held;
    uint8_t *out;
    size_t out_size, out_used;
    int broken;
};

/* A canonical prefix code: how many codes there are of each length, and their symbols in order. */
struct code {
    uint16_t count[MAX_BITS + 1];
    uint16_t symbols[LITERALS];
};

static uint32_t take(struct stream *s, int bits) {
    while (s->num_held < bits) {
        if (s->in_used == s->in_size) {
            s->broken = 1;
            return 0;
        }
        s->held |= (uint32_t)s->in[s->in_used++] << s->num_held;
        s->num_held += 8;
    }
    uint32_t value = s->held & ((1u << bits) - 1);
    s->held >>= bits;
    s->num_held -= bits;
    return value;
}

static void make_code(struct code *code, const uint8_t *lengths, int symbols) {
    uint16_t next[MAX_BITS + 2] = {0};
    memset(code->count, 0, sizeof code->count);
    for (int symbol = 0; symbol < symbols; symbol++) code->count[lengths[symbol]]++;
    code->count[0] = 0;
    for (int bits = 1; bits <= MAX_BITS; bits++)
        next[bits + 1] = (uint16_t)(next[bits] + code->count[bits]);
    for (int symbol = 0; symbol < symbols; symbol++)
        if (lengths[symbol]) code->symbols[next[lengths[symbol]]++] = (uint16_t)symbol;
}

/* Codes of one length are consecutive numbers, and longer codes follow shorter ones. */
static int take_symbol(struct stream *s, const struct code *code) {
    int value = 0, first = 0, index = 0;
    for (int bits = 1; bits <= MAX_BITS && !s->broken; bits++) {
        value |= (int)take(s, 1);
        int count = code->count[bits];
        if (value - first < count) return code->symbols[index + value - first];
        index += count;
        first = (first + count) << 1;
        value <<= 1;
    }
    s->broken = 1;
    return 0;
}

static void put(struct stream *s, uint8_t byte) {
    if (s->out_used == s->out_size) s->broken = 1;
    else s->out[s->out_used++] = byte;
}

/* `length` bytes again from `distance` bytes back; the two may overlap. */
static void repeat(struct stream *s, uint32_t distance, uint32_t length) {
    if (distance > s->out_used || length > s->out_size - s->out_used) {
        s->broken = 1;
        return;
    }
    for (; length; length--, s->out_used++) s->out[s->out_used] = s->out[s->out_used - distance];
}

static void take_stored(struct stream *s) {
    s->held = 0; /* the rest of the byte is padding; `take` never holds a whole byte more */
    s->num_held = 0;
    uint32_t length = take(s, 16);
    if (take(s, 16) != (length ^ 0xffff)) s->broken = 1;
    while (length-- && !s->broken) put(s, (uint8_t)take(s, 8));
}

static void take_block(struct stream *s, const struct code *literals,
                       const struct code *distances) {
    static const uint16_t length_base[] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,
                                           15, 17, 19, 23, 27, 31, 35, 43, 51,  59,
                                           67, 83, 99, 115, 131, 163, 195, 227, 258};
    static const uint8_t length_extra[] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                           2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
    static const uint16_t distance_base[] = {1,   2,   3,   4,   5,    7,    9,    13,   17,  25,
                                             33,  49,  65,  97,  129,  193,  257,  385,  513, 769,
                                             1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289,
                                             16385, 24577};
    while (!s->broken) {
        int symbol = take_symbol(s, literals);
        if (symbol == END_OF_BLOCK) return;
        if (symbol < END_OF_BLOCK) {
            put(s, (uint8_t)symbol);
            continue;
        }
        symbol -= END_OF_BLOCK + 1;
        if (symbol >= 29) break;
        uint32_t length = length_base[symbol] + take(s, length_extra[symbol]);
        int far = take_symbol(s, distances);
        if (far >= 30) break;
        repeat(s, distance_base[far] + take(s, far < 2 ? 0 : far / 2 - 1), length);
    }
    s->broken = 1;
}

static void take_fixed(struct stream *s) {
    uint8_t lengths[LITERALS];
    struct code literals, distances;
    for (int i = 0; i < LITERALS; i++) lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
    make_code(&literals, lengths, LITERALS);
    memset(lengths, 5, 30);
    make_code(&distances, lengths, 30);
    take_block(s, &literals, &distances);
}

static void take_dynamic(struct stream *s) {
    static const uint8_t order[LENGTH_CODES] = {16, 17, 18, 0, 8,  7, 9,  6, 10, 5,
                                                11, 4,  12, 3, 13, 2, 14, 1, 15};
    uint8_t lengths[LITERALS + DISTANCES] = {0};
    struct code literals, distances;
    int num_literals = (int)take(s, 5) + 257, num_distances = (int)take(s, 5) + 1;
    int num_lengths = (int)take(s, 4) + 4;
    if (num_literals > 286 || num_distances > 30) s->broken = 1;
    for (int i = 0; i < num_lengths; i++) lengths[order[i]] = (uint8_t)take(s, 3);
    make_code(&literals, lengths, LENGTH_CODES);
    memset(lengths, 0, sizeof lengths);
    for (int i = 0; i < num_literals + num_distances && !s->broken;) {
        int symbol = take_symbol(s, &literals), times = 1;
        uint8_t value = (uint8_t)symbol;
        if (symbol == 16) { /* the last length again */
            value = i ? lengths[i - 1] : 0;
            times = 3 + (int)take(s, 2);
        } else if (symbol > 16) { /* zeros */
            value = 0;
            times = symbol == 17 ? 3 + (int)take(s, 3) : 11 + (int)take(s, 7);
        }
        if (i + times > num_literals + num_distances) s->broken = 1;
        else
            for (; times; times--) lengths[i++] = value;
    }
    if (s->broken) return;
    make_code(&literals, lengths, num_literals);
    make_code(&distances, lengths + num_literals, num_distances);
    take_block(s, &literals, &distances);
}

int mvk_inflate(const uint8_t *in, size_t in_size, uint8_t *out, size_t out_size) {
    struct stream s = {.in = in, .in_size = in_size, .out = out, .out_size = out_size};
    for (int last = 0; !last && !s.broken;) {
        last = (int)take(&s, 1);
        switch (take(&s, 2)) {
        case 0: take_stored(&s); break;
        case 1: take_fixed(&s); break;
        case 2: take_dynamic(&s); break;
        default: s.broken = 1;
        }
    }
    return !s.broken && s.out_used == out_size;
}
