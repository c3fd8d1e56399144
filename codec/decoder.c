/* Decodes regular JPEGs, with crop, flip and normalization, in one pass into a batch: 0.55 of the time that libjpeg-turbo takes to
   decode alone (docs/log.md). The pixels equal those of libjpeg-turbo's default (islow, fancy upsampling) to the bit.

   Regular is what `build` stores: baseline (ITU T.81), 8 bits, YCbCr 4:2:0 in one scan, without restart markers. Every other image,
   anything damaged or beyond the range of 8-bit pictures, and every image on a CPU without AVX2 is left undone: the caller hands
   it to libjpeg.c, whose verdict stands.

   Nothing in a JPEG can cause a read or write out of bounds; the reasons stand where the bounds are. */

#ifndef WITHOUT_PYTHON /* the fuzzer includes this file without it */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#endif

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,bmi,bmi2,f16c")))
#endif

#define INLINE static inline __attribute__((always_inline))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

enum { MAX_SIDE = 65535 /* of 16 bits */, CHANNELS = 3 };

static int available; /* whether this CPU has AVX2 and all else that the decoder needs */

typedef struct {
    int64_t data;                                  /* address of the JPEG; for `convert`, of uint8 (image_height, image_width, 3) */
    int64_t out;                                   /* address of the crop's first value */
    int32_t length;                                /* of the JPEG, in bytes */
    int32_t image_height, image_width;             /* as `sizes` finds them */
    int32_t top, left, height, width, mirror;      /* of the crop */
    float mean[CHANNELS];
    int32_t done;
} Job;

typedef enum { FLOAT32, BFLOAT16, FLOAT16, BYTES } Type;

typedef struct {
    Type type;
    int channels_last;
    const float *scale;      /* (3,) */
    const float *mean_image; /* (3, height, width) of the image, or NULL */
} Format;

/* ---- Headers: segments up to the entropy-coded data (T.81 B.1, B.2) ---- */

enum { SOF0 = 0xc0, DHT = 0xc4, SOI = 0xd8, EOI = 0xd9, SOS = 0xda, DQT = 0xdb, DRI = 0xdd, APP0 = 0xe0, APP14 = 0xee, COM = 0xfe };

typedef struct {
    int marker, length; /* of its body */
    const uint8_t *body;
} Segment;

/* The segment at `*at`, which moves behind it; 0 if there is none. */
static int next_segment(const uint8_t *data, int length, int *at, Segment *segment)
{
    while (length - *at > 4 && data[*at] == 0xff && data[*at + 1] == 0xff) /* fill bytes (B.1.1.2) */
        ++*at;
    if (length - *at < 4 || data[*at] != 0xff)
        return 0;
    int size = data[*at + 2] << 8 | data[*at + 3];
    if (size < 2 || size > length - *at - 2)
        return 0;
    *segment = (Segment){data[*at + 1], size - 2, data + *at + 4};
    *at += 2 + size;
    return 1;
}

static int starts_as_jpeg(const uint8_t *data, int length)
{
    return length >= 4 && data[0] == 0xff && data[1] == SOI;
}

/* Of a JPEG of any process; zeros where no frame header is found. */
static void find_size(const uint8_t *data, int length, int32_t *height, int32_t *width)
{
    Segment segment;
    *height = *width = 0;
    if (!starts_as_jpeg(data, length))
        return;
    for (int at = 2; next_segment(data, length, &at, &segment);) {
        int marker = segment.marker;
        if ((marker & 0xf0) == SOF0 && marker != DHT && marker != 0xc8 && marker != 0xcc && segment.length >= 5) {
            *height = segment.body[1] << 8 | segment.body[2];
            *width = segment.body[3] << 8 | segment.body[4];
            return;
        }
    }
}

#if defined(__x86_64__)

/* ---- Huffman tables (T.81 Annex C) ---- */

enum {
    /* Of one look into a table. With 13 there are a third fewer exits from the inner loop, but its 64 KB do not fit the first-level
       cache: slower with two lanes (docs/log.md). */
    LOOK_BITS = 11,
    LOOKS = 1 << LOOK_BITS,
    END = 128,      /* added to a look's steps: the block ends there */
    TOO_LONG = 255, /* a look's steps where it holds not one whole coefficient */
    ZEROS = 15,     /* the run of the code for 16 zeros (T.81 F.1.2.2.1) */
};

/* What one look finds: all coefficients that lie whole in it and within four places, zeros included, and the block's end if that
   follows; or one coefficient behind more zeros; or 16 zeros. */
typedef struct {
    int8_t values[4];
    uint32_t facts; /* from the lowest byte: bits used; zeros before `values`; nothing; steps from the last coefficient known.
                       Where TOO_LONG: 0; the code as in `codes`, two bytes; TOO_LONG */
} Look;

typedef struct {
    Look looks[LOOKS];
    uint16_t codes[LOOKS]; /* run << 12 | size << 8 | bits of the code; 0 where the code is longer */
    int32_t limit[17];     /* codes of n bits are below it, left-aligned in 16 bits */
    int32_t delta[17];     /* from a code of n bits to its place in `symbols` */
    uint8_t symbols[256];
} Huffman;

/* The difference that `size` bits stand for (T.81 F.2.2.1, EXTEND). */
static int extend(int value, int size)
{
    return size && value < 1 << (size - 1) ? value - (1 << size) + 1 : value;
}

static void fill_looks(Huffman *table)
{
    for (int n = 0; n < LOOKS; n++) {
        Look *look = &table->looks[n];
        int used = 0, steps = 0, zeros = 0;
        memset(look->values, 0, sizeof look->values);
        while (steps < 4) {
            unsigned code = table->codes[(n << used) & (LOOKS - 1)];
            int bits = code & 255, size = code >> 8 & 15, run = (int)(code >> 12);
            if (!bits || used + bits + size > LOOK_BITS)
                break;
            if (!size && run == ZEROS) {
                if (!used)
                    used = bits, steps = 16;
                break;
            }
            if (!size) { /* libjpeg takes all other runs without a value for the block's end too */
                used += bits, steps += END;
                break;
            }
            int value = extend(n >> (LOOK_BITS - used - bits - size) & ((1 << size) - 1), size);
            if (value < INT8_MIN || value > INT8_MAX || (used && steps + run + 1 > 4))
                break;
            if (run > 3)
                zeros = run, look->values[0] = (int8_t)value;
            else
                look->values[steps + run] = (int8_t)value;
            used += bits + size, steps += run + 1;
        }
        look->facts = used ? (uint32_t)steps << 24 | (uint32_t)zeros << 8 | (uint32_t)used
                           : (uint32_t)TOO_LONG << 24 | (uint32_t)table->codes[n] << 8;
    }
}

/* `symbols` has `total` bytes, the sum of `counts`. Returns 0 where libjpeg refuses the table. */
static int make_huffman(Huffman *table, const uint8_t counts[16], const uint8_t *symbols, int total, int dc)
{
    int code = 0, at = 0;
    memset(table->codes, 0, sizeof table->codes);
    memcpy(table->symbols, symbols, total);
    for (int bits = 1; bits <= 16; bits++, code <<= 1) {
        table->delta[bits] = at - code;
        for (int n = 0; n < counts[bits - 1]; n++, code++, at++) {
            if (code + 1 >= 1 << bits || (dc && symbols[at] > 15)) /* all ones is no code */
                return 0;
            int spare = LOOK_BITS - bits;
            for (int rest = 0; spare >= 0 && rest < 1 << spare; rest++)
                table->codes[(code << spare) + rest] = (uint16_t)(symbols[at] << 8 | bits);
        }
        table->limit[bits] = code << (16 - bits);
    }
    if (!dc)
        fill_looks(table);
    return 1;
}

/* ---- Tables of a header ---- */

enum {
    MCU_BLOCKS = 6, /* of 4:2:0: four of luma, Cb, Cr */
    MAX_HEADER = 1 << 16,
    /* From here on an image goes to libjpeg-turbo, whose 16-bit arithmetic may overflow. A block of 8-bit samples reaches 1,024
       before quantization, and its rounding adds half a step of 255 at most. */
    MAX_PRODUCT = 4096,
};

typedef struct {
    int16_t factor[64] __attribute__((aligned(32))); /* in zigzag order */
    int16_t most[64] __attribute__((aligned(32)));   /* the largest coefficient whose product is below MAX_PRODUCT */
} Quantizer;

/* Making these takes 23 us, so they are kept for headers that differ in nothing but the size of the image. */
typedef struct {
    Huffman dc[2], ac[2];
    Quantizer quantizers[CHANNELS];
    const Huffman *dc_of[MCU_BLOCKS], *ac_of[MCU_BLOCKS]; /* by block of an MCU */
    int header_length;                                    /* 0: none yet */
    int size_at;                                          /* in the header: height and width, four bytes */
    uint8_t header[MAX_HEADER];
} Tables;

typedef struct {
    uint8_t quantizers[4][64];
    int has_quantizer, has_dc, has_ac; /* a bit for each table */
    int quantizer_of[CHANNELS];
    int size_at;
} Found;

static int read_quantizers(Found *found, const Segment *segment)
{
    const uint8_t *at = segment->body;
    int left = segment->length;
    for (; left >= 65; at += 65, left -= 65) {
        if (at[0] > 3 || memchr(at + 1, 0, 64)) /* more than 8 bits, or a factor of 0 */
            return 0;
        memcpy(found->quantizers[at[0]], at + 1, 64);
        found->has_quantizer |= 1 << at[0];
    }
    return left == 0;
}

static int read_huffman(Tables *tables, Found *found, const Segment *segment)
{
    const uint8_t *at = segment->body;
    int left = segment->length;
    while (left >= 17) {
        int ac = at[0] >> 4, number = at[0] & 15, total = 0;
        for (int bits = 1; bits <= 16; bits++)
            total += at[bits];
        if (ac > 1 || number > 1 || total > 256 || total > left - 17)
            return 0;
        if (!make_huffman(ac ? &tables->ac[number] : &tables->dc[number], at + 1, at + 17, total, !ac))
            return 0;
        *(ac ? &found->has_ac : &found->has_dc) |= 1 << number;
        at += 17 + total, left -= 17 + total;
    }
    return left == 0;
}

static int read_frame(const uint8_t *data, Found *found, const Segment *segment)
{
    static const uint8_t SAMPLING[CHANNELS] = {0x22, 0x11, 0x11};
    const uint8_t *body = segment->body;
    if (found->size_at || segment->length != 15 || body[0] != 8 || body[5] != CHANNELS)
        return 0;
    for (int c = 0; c < CHANNELS; c++) {
        const uint8_t *component = body + 6 + 3 * c;
        if (component[0] != c + 1 || component[1] != SAMPLING[c] || component[2] > 3)
            return 0;
        found->quantizer_of[c] = component[2];
    }
    found->size_at = (int)(body + 1 - data);
    return 1;
}

static int read_scan(Tables *tables, const Found *found, const Segment *segment)
{
    const uint8_t *body = segment->body;
    if (!found->size_at || segment->length != 10 || body[0] != 3 || body[7] != 0 || body[8] != 63 || body[9] != 0)
        return 0;
    for (int c = 0; c < CHANNELS; c++) {
        int dc = body[2 + 2 * c] >> 4, ac = body[2 + 2 * c] & 15, quantizer = found->quantizer_of[c];
        if (body[1 + 2 * c] != c + 1 || dc > 1 || ac > 1 || !(found->has_dc >> dc & 1) || !(found->has_ac >> ac & 1)
            || !(found->has_quantizer >> quantizer & 1))
            return 0;
        for (int block = c ? c + 3 : 0; block < c + 4; block++)
            tables->dc_of[block] = &tables->dc[dc], tables->ac_of[block] = &tables->ac[ac];
        for (int k = 0; k < 64; k++) {
            tables->quantizers[c].factor[k] = found->quantizers[quantizer][k];
            tables->quantizers[c].most[k] = (int16_t)((MAX_PRODUCT - 1) / found->quantizers[quantizer][k]);
        }
    }
    return 1;
}

/* Returns 0 where the image is not regular. */
static int read_header(Tables *tables, const uint8_t *data, int length)
{
    Found found = {0};
    Segment segment;
    int regular = starts_as_jpeg(data, length), at = 2;
    tables->header_length = 0;
    while (regular && at < MAX_HEADER && next_segment(data, length, &at, &segment)) {
        switch (segment.marker) {
        case DQT:
            regular = read_quantizers(&found, &segment);
            break;
        case DHT:
            regular = read_huffman(tables, &found, &segment);
            break;
        case SOF0:
            regular = read_frame(data, &found, &segment);
            break;
        case DRI:
            regular = segment.length == 2 && !segment.body[0] && !segment.body[1];
            break;
        case SOS:
            if (!read_scan(tables, &found, &segment) || at > MAX_HEADER)
                return 0;
            memcpy(tables->header, data, at);
            tables->header_length = at;
            tables->size_at = found.size_at;
            return 1;
        case APP14: /* Adobe's may say that the colors are not YCbCr */
            regular = segment.length >= 12 && !memcmp(segment.body, "Adobe", 5) && segment.body[11] == 1;
            break;
        default:
            regular = (segment.marker & 0xf0) == APP0 || segment.marker == COM;
        }
    }
    return 0;
}

static int same_header(const Tables *tables, const uint8_t *data, int length)
{
    int behind = tables->size_at + 4;
    return tables->header_length && length >= tables->header_length && !memcmp(data, tables->header, tables->size_at)
        && !memcmp(data + behind, tables->header + behind, tables->header_length - behind);
}

/* ---- Entropy-coded data without its stuffed zeros (T.81 B.1.1.5) ---- */

/* Zeros behind the data: a block reads at most 64 x 31 bits, and its end is compared with the data's end only after each block. */
enum { PADDING = 640 };

/* Returns the end of what was written to `out`, which has room for the input and PADDING + 32 bytes; NULL where another marker than
   EOI comes, or none. */
AVX2 static const uint8_t *unstuff(const uint8_t *in, const uint8_t *end, uint8_t *out)
{
    const __m256i ff = _mm256_set1_epi8(-1);
    while (end - in >= 34) { /* 32 bytes are read, and the one behind the last */
        __m256i bytes = _mm256_loadu_si256((const __m256i *)in);
        uint32_t found = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, ff));
        int before = found ? __builtin_ctz(found) : 32;
        _mm256_storeu_si256((__m256i *)out, bytes);
        in += before, out += before;
        if (likely(!found))
            continue;
        if (in[1])
            break;
        in += 2, out++;
    }
    while (end - in >= 2) {
        int byte = *in++;
        if (byte == 0xff) {
            if (*in == EOI) {
                memset(out, 0, PADDING);
                return out;
            }
            if (*in++)
                return NULL;
        }
        *out++ = (uint8_t)byte;
    }
    return NULL;
}

/* ---- Huffman decoding (T.81 F.2.2), of two images in turns ----

   A look depends on the one before through a table in memory, 9 cycles at least, so that two images at once take 0.8 of the time of
   one after the other. */

typedef struct {
    uint64_t window;   /* the next bits, the first one highest */
    const uint8_t *in; /* the first byte of which not all bits are in the window */
    uint32_t bits;     /* how many bits are; only its lowest six count */
    uint32_t facts;    /* of the last look */
    uintptr_t at;      /* address of the last known coefficient of the block; beyond `last` when the block is left */
    uintptr_t last;    /* of the block's last coefficient */
    const Look *looks;
} Reader;

typedef struct {
    Reader reader;
    const uint8_t *end;  /* of the data */
    const Tables *tables;
    uint8_t *reach;      /* for each block: the place of its last coefficient in zigzag order */
    int blocks_left;     /* in the row of MCUs */
    int block;           /* of the MCU */
    int inside;          /* of a block */
    int failed;
    int dc[CHANNELS];
} Lane;

INLINE void skip(Reader *reader, unsigned bits)
{
    reader->window <<= bits & 63;
    reader->bits -= bits;
}

/* To 56 bits or more (Giesen, "Reading bits in far too many ways", 2018, variant 4). Reads 8 bytes. */
INLINE void refill(Reader *reader)
{
    uint64_t bytes;
    memcpy(&bytes, reader->in, 8);
    reader->window |= __builtin_bswap64(bytes) >> (reader->bits & 63);
    reader->in += (63 - reader->bits) >> 3 & 7;
    reader->bits |= 56;
}

/* The difference in the next `size` bits, 0 to 15. */
INLINE int take(Reader *reader, unsigned size)
{
    int negative = (int)((int64_t)~reader->window >> 63);
    int value = (int)(reader->window >> 1 >> (63 - size)) + (negative & ((int)(~0u << size) + 1));
    skip(reader, size);
    return value;
}

/* The place of the last known coefficient, 0 to 62, or beyond. */
INLINE int place(const Reader *reader)
{
    return 63 + (int)((intptr_t)(reader->at - reader->last) >> 1);
}

/* A code of up to 16 bits, in the form of `codes`; 0 where there is none. */
static __attribute__((noinline)) unsigned find_code(const Huffman *table, uint64_t window)
{
    unsigned code = table->codes[window >> (64 - LOOK_BITS)];
    int top = (int)(window >> 48);
    for (int bits = LOOK_BITS + 1; !code && bits <= 16; bits++)
        if (top < table->limit[bits])
            code = (unsigned)table->symbols[((top >> (16 - bits)) + table->delta[bits]) & 255] << 8 | (unsigned)bits;
    return code;
}

/* One symbol without a value, or with a code that is too long for a look. Returns the place of the block's last coefficient where
   that ends, above 63 where it is damaged, or -1. */
static __attribute__((noinline)) int slow_symbol(Reader *reader, const Huffman *table)
{
    unsigned code = find_code(table, reader->window), size = code >> 8 & 15, run = code >> 12;
    int from = place(reader);
    if (!code)
        return 64;
    skip(reader, code & 63);
    if (!size && run != ZEROS)
        return from;
    reader->at += 2 * (run + 1);
    if (size)
        *(int16_t *)reader->at = (int16_t)take(reader, size);
    return place(reader) < 63 ? -1 : place(reader);
}

/* A block's DC coefficient. The four coefficients that it writes cover what the block before left here: see `look`. */
AVX2 INLINE void begin_block(Reader *reader, Lane *lane)
{
    const Huffman *table = lane->tables->dc_of[lane->block];
    int *dc = &lane->dc[lane->block < 4 ? 0 : lane->block - 3];
    refill(reader);
    unsigned code = table->codes[reader->window >> (64 - LOOK_BITS)];
    if (unlikely(!code)) {
        code = find_code(table, reader->window);
        lane->failed |= !code;
    }
    skip(reader, code & 63);
    *dc += take(reader, code >> 8);
    lane->failed |= *dc >= MAX_PRODUCT || *dc <= -MAX_PRODUCT;
    reader->at = reader->last - 63 * 2;
    reader->looks = lane->tables->ac_of[lane->block]->looks;
    _mm_storel_epi64((__m128i *)reader->at, _mm_cvtsi32_si128(*dc & 0xffff));
}

/* One look. Returns 1 where the block has to be left, whatever the reason; then nothing is consumed yet.

   It begins at place 62 at most and writes four coefficients behind at most 15 zeros, so up to place 81: into the next block, or
   behind the last, for which the row has room. Unless the block is damaged, what falls into the next block lies at its first three
   places, or is zero. */
AVX2 INLINE int look(Reader *reader)
{
    const Look *found = reader->looks + (reader->window >> (64 - LOOK_BITS));
    uint32_t facts = reader->facts = found->facts;
    _mm_storel_epi64((__m128i *)(reader->at + 2 * (size_t)(facts >> 8 & 255) + 2),
                     _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)found)));
    reader->at += 2 * (size_t)(facts >> 24);
    if (unlikely(reader->at >= reader->last))
        return 1;
    skip(reader, facts);
    return 0;
}

/* After a look that left the block: at its end, or because a coefficient is too long for a look, or to take the look's symbols one
   by one where the block ends between them. Returns 1 at the end of the row, or where the data is damaged. */
AVX2 INLINE int leave(Reader *reader, Lane *lane)
{
    uint32_t facts = reader->facts;
    int last = place(reader) - END;
    if (likely((facts & 255) && last >= 0 && last < 63)) {
        skip(reader, facts);
    } else {
        reader->at -= 2 * (size_t)(facts >> 24);
        refill(reader);
        const Huffman *table = lane->tables->ac_of[lane->block];
        unsigned code = facts & 255 ? table->codes[reader->window >> (64 - LOOK_BITS)] : facts >> 8 & 0xffff;
        unsigned size = code >> 8 & 15;
        if (likely(size)) {
            skip(reader, code & 63);
            reader->at += 2 * ((size_t)(code >> 12) + 1); /* to place 62 + 16 at most */
            *(int16_t *)reader->at = (int16_t)take(reader, size);
            last = place(reader);
            if (likely(last < 63))
                return 0;
        } else {
            Reader copy = *reader; /* the address of `reader` itself must not be taken, or its parts leave the registers */
            last = slow_symbol(&copy, table);
            *reader = copy;
            if (last < 0)
                return 0;
        }
        lane->failed |= last > 63;
    }
    *lane->reach++ = (uint8_t)last;
    reader->last += 64 * 2;
    lane->block = lane->block == MCU_BLOCKS - 1 ? 0 : lane->block + 1;
    lane->blocks_left--;
    if (unlikely(!lane->blocks_left || reader->in > lane->end + 8))
        return 1;
    begin_block(reader, lane);
    return 0;
}

/* Decodes until one of the lanes has a row of MCUs, or fails; returns which. `two` is a constant, or the inner loop would test it. */
AVX2 INLINE int run(Lane *first, Lane *second, int two)
{
    Reader a = first->reader, b = second->reader;
    if (!first->inside)
        begin_block(&a, first);
    if (two && !second->inside)
        begin_block(&b, second);
    first->inside = second->inside = 1;
    Lane *done;
    for (;;) {
        refill(&a);
        if (two)
            refill(&b);
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) { /* 4 x 11 of the 56 bits */
            if (unlikely(look(&a)))
                goto leave_first;
            if (two && unlikely(look(&b)))
                goto leave_second;
        }
        continue;
    leave_first:
        done = first;
        if (unlikely(leave(&a, first)))
            break;
        continue;
    leave_second:
        done = second;
        if (unlikely(leave(&b, second)))
            break;
    }
    first->reader = a;
    if (two)
        second->reader = b;
    done->inside = 0;
    done->failed |= done->blocks_left > 0;
    return done == second;
}

/* Not inlined, for the sake of registers. */
AVX2 static __attribute__((noinline)) void run_one(Lane *lane)
{
    run(lane, lane, 0);
}

AVX2 static __attribute__((noinline)) int run_two(Lane *first, Lane *second)
{
    return run(first, second, 1);
}

/* ---- Dequantization and inverse transform: libjpeg's islow (Loeffler, Ligtenberg and Moschytz 1989), in the steps and widths of
   libjpeg-turbo's SIMD code, of two blocks at a time ---- */

enum { FEW = 9 }; /* up to this place of zigzag order, all coefficients are in the first four rows */

static const uint8_t ZIGZAG[64] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
};

/* For each row of a block and each eight coefficients in zigzag order: the bytes of these that belong there. Coefficients stay in
   that order until here, so that a look writes four at once; 36 shuffles for two blocks put them right. */
static uint8_t picks[8][8][32] __attribute__((aligned(32)));

static void fill_picks(void)
{
    memset(picks, 0x80, sizeof picks);
    for (int k = 0; k < 64; k++)
        for (int byte = 0; byte < 4; byte++) {
            int lane = byte / 2 * 16, low = byte % 2;
            picks[ZIGZAG[k] / 8][k / 8][lane + ZIGZAG[k] % 8 * 2 + low] = (uint8_t)(k % 8 * 2 + low);
        }
}

INLINE AVX2 __m256i both(const int16_t *first, const int16_t *second)
{
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_load_si128((const __m128i *)first)),
                                   _mm_load_si128((const __m128i *)second), 1);
}

/* Row `row` of both blocks, from the eights of zigzag order in the bits of `parts`. */
INLINE AVX2 __m256i pick(const __m256i eights[8], int row, int parts)
{
    __m256i found = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int part = 0; part < 8; part++)
        if (parts >> part & 1)
            found = _mm256_or_si256(found, _mm256_shuffle_epi8(eights[part], _mm256_load_si256((const __m256i *)picks[row][part])));
    return found;
}

/* a * x + b * y of pairs (x, y) */
INLINE AVX2 __m256i weigh(__m256i pairs, int a, int b)
{
    return _mm256_madd_epi16(pairs, _mm256_set1_epi32((int)((uint32_t)(uint16_t)b << 16 | (uint16_t)a)));
}

INLINE AVX2 __m256i interleave_half(__m256i a, __m256i b, int half)
{
    return half ? _mm256_unpackhi_epi16(a, b) : _mm256_unpacklo_epi16(a, b);
}

INLINE AVX2 __m256i shrink(__m256i low, __m256i high, int shift)
{
    return _mm256_packs_epi32(_mm256_srai_epi32(low, shift), _mm256_srai_epi32(high, shift));
}

/* One dimension, of 16 columns; with `few`, inputs 4 to 7 are zero. Constants in units of 2**-13. */
INLINE AVX2 void transform(__m256i v[8], int shift, int few)
{
    enum {
        C0_298 = 2446, C0_390 = 3196, C0_541 = 4433, C0_765 = 6270, C0_899 = 7373, C1_175 = 9633,
        C1_501 = 12299, C1_847 = 15137, C1_961 = 16069, C2_053 = 16819, C2_562 = 20995, C3_072 = 25172,
    };
    const __m256i zero = _mm256_setzero_si256(), round = _mm256_set1_epi32(1 << (shift - 1));
    __m256i even[4][2], odd[4][2];
    /* Sums of 16 bits wrap, as they do in libjpeg-turbo. */
    __m256i sum = few ? v[0] : _mm256_add_epi16(v[0], v[4]), difference = few ? v[0] : _mm256_sub_epi16(v[0], v[4]);
    __m256i z3 = few ? v[3] : _mm256_add_epi16(v[7], v[3]), z4 = few ? v[1] : _mm256_add_epi16(v[5], v[1]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        /* From the upper 16 bits, shifted down by 3: times 2**13. */
        __m256i tmp0 = _mm256_add_epi32(_mm256_srai_epi32(interleave_half(zero, sum, half), 3), round);
        __m256i tmp1 = _mm256_add_epi32(_mm256_srai_epi32(interleave_half(zero, difference, half), 3), round);
        __m256i v26 = interleave_half(v[2], few ? zero : v[6], half);
        __m256i tmp2 = weigh(v26, C0_541, C0_541 - C1_847), tmp3 = weigh(v26, C0_541 + C0_765, C0_541);
        even[0][half] = _mm256_add_epi32(tmp0, tmp3), even[3][half] = _mm256_sub_epi32(tmp0, tmp3);
        even[1][half] = _mm256_add_epi32(tmp1, tmp2), even[2][half] = _mm256_sub_epi32(tmp1, tmp2);
        __m256i z34 = interleave_half(z3, z4, half);
        __m256i z3_turned = weigh(z34, C1_175 - C1_961, C1_175), z4_turned = weigh(z34, C1_175, C1_175 - C0_390);
        __m256i v71 = interleave_half(few ? zero : v[7], v[1], half), v53 = interleave_half(few ? zero : v[5], v[3], half);
        odd[0][half] = _mm256_add_epi32(weigh(v71, C0_298 - C0_899, -C0_899), z3_turned);
        odd[3][half] = _mm256_add_epi32(weigh(v71, -C0_899, C1_501 - C0_899), z4_turned);
        odd[1][half] = _mm256_add_epi32(weigh(v53, C2_053 - C2_562, -C2_562), z4_turned);
        odd[2][half] = _mm256_add_epi32(weigh(v53, -C2_562, C3_072 - C2_562), z3_turned);
    }
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
        __m256i *e = even[n], *o = odd[3 - n];
        v[n] = shrink(_mm256_add_epi32(e[0], o[0]), _mm256_add_epi32(e[1], o[1]), shift);
        v[7 - n] = shrink(_mm256_sub_epi32(e[0], o[0]), _mm256_sub_epi32(e[1], o[1]), shift);
    }
}

/* Two 8x8 blocks, side by side */
INLINE AVX2 void transpose(__m256i v[8])
{
    __m256i pairs[8], fours[8];
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
        pairs[2 * n] = _mm256_unpacklo_epi16(v[2 * n], v[2 * n + 1]);
        pairs[2 * n + 1] = _mm256_unpackhi_epi16(v[2 * n], v[2 * n + 1]);
    }
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
        __m256i above = pairs[n / 2 * 4 + n % 2], below = pairs[n / 2 * 4 + n % 2 + 2];
        fours[n / 2 * 4 + n % 2 * 2] = _mm256_unpacklo_epi32(above, below);
        fours[n / 2 * 4 + n % 2 * 2 + 1] = _mm256_unpackhi_epi32(above, below);
    }
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
        v[2 * n] = _mm256_unpacklo_epi64(fours[n], fours[n + 4]);
        v[2 * n + 1] = _mm256_unpackhi_epi64(fours[n], fours[n + 4]);
    }
}

typedef struct {
    const int16_t *coefficients[2];
    const Quantizer *quantizers[2];
} Pair;

/* To samples: rows[n] holds row 2n and 2n+1 of the first block, then of the second. Returns whether a product reaches MAX_PRODUCT. */
INLINE AVX2 int inverse(const Pair *pair, int few, __m256i rows[4])
{
    const int16_t *const *from = pair->coefficients;
    const Quantizer *const *by = pair->quantizers;
    __m256i eights[8], v[8], over = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int n = 0; n < 8; n++) {
        if (few && n > 1)
            continue;
        __m256i values = both(from[0] + 8 * n, from[1] + 8 * n);
        over = _mm256_or_si256(over, _mm256_cmpgt_epi16(_mm256_abs_epi16(values), both(by[0]->most + 8 * n, by[1]->most + 8 * n)));
        eights[n] = _mm256_mullo_epi16(values, both(by[0]->factor + 8 * n, by[1]->factor + 8 * n));
    }
    /* The eights of zigzag order that have coefficients of each row. */
    static const uint8_t PARTS[8] = {0x0b, 0x2f, 0x2f, 0x6e, 0x76, 0xf4, 0xf4, 0xd0}, PARTS_OF_FEW[4] = {1, 1, 3, 2};
#pragma GCC unroll 8
    for (int row = 0; row < 8; row++)
        if (!few || row < 4)
            v[row] = pick(eights, row, few ? PARTS_OF_FEW[row] : PARTS[row]);
    transform(v, 11, few);
    transpose(v);
    transform(v, 18, few);
    /* Transposed again as bytes. */
    __m256i c04 = _mm256_packs_epi16(v[0], v[4]), c15 = _mm256_packs_epi16(v[1], v[5]);
    __m256i c26 = _mm256_packs_epi16(v[2], v[6]), c37 = _mm256_packs_epi16(v[3], v[7]);
    __m256i c01 = _mm256_unpacklo_epi8(c04, c15), c45 = _mm256_unpackhi_epi8(c04, c15);
    __m256i c23 = _mm256_unpacklo_epi8(c26, c37), c67 = _mm256_unpackhi_epi8(c26, c37);
    __m256i upper0123 = _mm256_unpacklo_epi16(c01, c23), lower0123 = _mm256_unpackhi_epi16(c01, c23);
    __m256i upper4567 = _mm256_unpacklo_epi16(c45, c67), lower4567 = _mm256_unpackhi_epi16(c45, c67);
    const __m256i center = _mm256_set1_epi8(-128);
    rows[0] = _mm256_xor_si256(_mm256_unpacklo_epi32(upper0123, upper4567), center);
    rows[1] = _mm256_xor_si256(_mm256_unpackhi_epi32(upper0123, upper4567), center);
    rows[2] = _mm256_xor_si256(_mm256_unpacklo_epi32(lower0123, lower4567), center);
    rows[3] = _mm256_xor_si256(_mm256_unpackhi_epi32(lower0123, lower4567), center);
    return !_mm256_testz_si256(over, over);
}

/* Eight samples of a block that has a DC coefficient only. */
INLINE uint64_t flat(const Pair *pair, int block)
{
    int value = (pair->coefficients[block][0] * pair->quantizers[block]->factor[0] + 4) >> 3;
    value = value < -128 ? 0 : value > 127 ? 255 : value + 128;
    return 0x0101010101010101u * (uint64_t)value;
}

INLINE int over(const Pair *pair)
{
    return abs(pair->coefficients[0][0]) > pair->quantizers[0]->most[0] || abs(pair->coefficients[1][0]) > pair->quantizers[1]->most[0];
}

/* Two blocks to `first` and `second`, each eight lines `pitch` apart. Returns whether a product reaches MAX_PRODUCT. */
AVX2 static int decode_pair(const Pair *pair, const uint8_t reach[2], uint8_t *first, uint8_t *second, size_t pitch)
{
    int most = reach[0] > reach[1] ? reach[0] : reach[1], beyond;
    __m256i rows[4];
    if (!most) {
        uint64_t values[2] = {flat(pair, 0), flat(pair, 1)};
        for (int y = 0; y < 8; y++) {
            memcpy(first + y * pitch, &values[0], 8);
            memcpy(second + y * pitch, &values[1], 8);
        }
        return over(pair);
    }
    beyond = most <= FEW ? inverse(pair, 1, rows) : inverse(pair, 0, rows);
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
        __m128i a = _mm256_castsi256_si128(rows[n]), b = _mm256_extracti128_si256(rows[n], 1);
        _mm_storel_epi64((__m128i *)(first + 2 * n * pitch), a);
        _mm_storel_epi64((__m128i *)(first + (2 * n + 1) * pitch), _mm_unpackhi_epi64(a, a));
        _mm_storel_epi64((__m128i *)(second + 2 * n * pitch), b);
        _mm_storel_epi64((__m128i *)(second + (2 * n + 1) * pitch), _mm_unpackhi_epi64(b, b));
    }
    return beyond;
}

/* ---- Images: from rows of MCUs to lines of RGB ---- */

enum {
    MARGIN = 64,    /* bytes before the first line of samples and behind each, which vectors may read */
    LUMA_RING = 32, /* lines: two rows of MCUs, because the last of one are needed with the next */
    CHROMA_RING = 16,
};
#endif

/* A line of the crop, on its way to the output. */
typedef struct {
    uint8_t rows[CHANNELS][MAX_SIDE + 64];
    uint8_t mixed[CHANNELS * MAX_SIDE + 64];
    float means[CHANNELS * MAX_SIDE + 64];
} Line;

#if defined(__x86_64__)
typedef struct {
    Lane lane;
    Job *job;
    int height, width;
    int mcu_columns, mcu_rows, mcu_row;
    int first_row, last_row;                                           /* rows of MCUs that the crop needs */
    int first_luma_column, last_luma_column;                           /* columns of MCUs, likewise */
    int first_chroma_column, last_chroma_column;
    int lines_written;
    int over; /* a product has reached MAX_PRODUCT */
    size_t luma_pitch, chroma_pitch;
    uint8_t *bytes; /* the entropy-coded data, unstuffed */
    size_t room;
    int columns; /* of MCUs, for which these have room */
    int16_t *coefficients; /* of a row of MCUs, and 64 more: see `look` */
    uint8_t *reach, *luma, *chroma[2];
} Image;

typedef struct Workspace {
    struct Workspace *next;
    Tables tables[3]; /* both images share one if they can: with a copy each, the first-level cache thrashes */
    unsigned tables_made;
    Image images[2];
    Line line;
    int16_t chroma_lines[2][MAX_SIDE / 2 + 64];
} Workspace;

static void *renew(void *old, size_t bytes)
{
    free(old);
    return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

/* Makes room for images of so many columns of MCUs; returns 0 if there is no memory. */
static int reserve(Image *image, int columns)
{
    size_t blocks = (size_t)columns * MCU_BLOCKS, chroma = MARGIN + CHROMA_RING * ((size_t)columns * 8 + MARGIN);
    if (columns <= image->columns)
        return 1;
    image->coefficients = renew(image->coefficients, (blocks + 1) * 64 * sizeof *image->coefficients);
    image->reach = renew(image->reach, blocks);
    image->luma = renew(image->luma, MARGIN + LUMA_RING * ((size_t)columns * 16 + MARGIN));
    image->chroma[0] = renew(image->chroma[0], chroma), image->chroma[1] = renew(image->chroma[1], chroma);
    int made = image->coefficients && image->reach && image->luma && image->chroma[0] && image->chroma[1];
    image->columns = made ? columns : 0;
    return made;
}

INLINE uint8_t *luma_line(Image *image, int y)
{
    return image->luma + MARGIN + y % LUMA_RING * image->luma_pitch;
}

INLINE uint8_t *chroma_line(Image *image, int c, int y)
{
    return image->chroma[c] + MARGIN + y % CHROMA_RING * image->chroma_pitch;
}

static int clamp(int value, int low, int high)
{
    return value < low ? low : value > high ? high : value;
}

AVX2 static void transform_row(Image *image)
{
    const Job *job = image->job;
    const Quantizer *quantizers = image->lane.tables->quantizers;
    int top = 16 * image->mcu_row, bottom = job->top + job->height;
    for (int column = image->first_luma_column; column <= image->last_luma_column; column++)
        for (int half = 0; half < 2; half++) {
            int first = column * MCU_BLOCKS + 2 * half, y = top + 8 * half;
            const int16_t *from = image->coefficients + first * 64;
            Pair pair = {{from, from + 64}, {&quantizers[0], &quantizers[0]}};
            uint8_t *to = luma_line(image, y) + 16 * column;
            if (y < bottom && y + 8 > job->top)
                image->over |= decode_pair(&pair, image->reach + first, to, to + 8, image->luma_pitch);
        }
    for (int column = image->first_chroma_column; column <= image->last_chroma_column; column++) {
        int first = column * MCU_BLOCKS + 4;
        const int16_t *from = image->coefficients + first * 64;
        Pair pair = {{from, from + 64}, {&quantizers[1], &quantizers[2]}};
        image->over |= decode_pair(&pair, image->reach + first, chroma_line(image, 0, top / 2) + 8 * column,
                                   chroma_line(image, 1, top / 2) + 8 * column, image->chroma_pitch);
    }
}

/* ---- Upsampling and color, as libjpeg-turbo's h2v2 fancy upsampling and its SIMD color conversion ---- */

/* Three parts of the nearer line and one of the other: chroma times 4. */
AVX2 static void mix_lines(const uint8_t *near, const uint8_t *far, int count, int16_t *out)
{
    for (int x = 0; x < count; x += 16) {
        __m256i n = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(near + x)));
        __m256i f = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(far + x)));
        _mm256_storeu_si256((__m256i *)(out + x), _mm256_add_epi16(_mm256_add_epi16(n, f), _mm256_add_epi16(n, n)));
    }
}

typedef struct {
    __m256i even, odd; /* 16 values each, of even and odd columns */
} Columns;

/* Chroma - 128 of columns 2x and 2x + 1 from mixed lines at x - 1, x and x + 1 */
INLINE AVX2 Columns upsample(const int16_t *mixed)
{
    const __m256i three = _mm256_set1_epi16(3), center = _mm256_set1_epi16(128);
    __m256i before = _mm256_loadu_si256((const __m256i *)mixed), after = _mm256_loadu_si256((const __m256i *)(mixed + 2));
    __m256i here = _mm256_mullo_epi16(_mm256_loadu_si256((const __m256i *)(mixed + 1)), three);
    __m256i even = _mm256_add_epi16(_mm256_add_epi16(here, before), _mm256_set1_epi16(8));
    __m256i odd = _mm256_add_epi16(_mm256_add_epi16(here, after), _mm256_set1_epi16(7));
    return (Columns){_mm256_sub_epi16(_mm256_srli_epi16(even, 4), center), _mm256_sub_epi16(_mm256_srli_epi16(odd, 4), center)};
}

/* What chroma adds to luma for red, green and blue (JFIF 1.02, section 7); factors in units of 2**-16, less their whole parts. */
INLINE AVX2 void color_offsets(__m256i cb, __m256i cr, __m256i offsets[CHANNELS])
{
    enum { R_CR = 26345 /* 0.402 */, G_CB = -22554 /* -0.344 */, G_CR = 18734 /* 1 - 0.714 */, B_CB = -14942 /* 1.772 - 2 */ };
    const __m256i one = _mm256_set1_epi16(1), half = _mm256_set1_epi32(1 << 15);
    __m256i twice_cb = _mm256_add_epi16(cb, cb), twice_cr = _mm256_add_epi16(cr, cr);
    __m256i red = _mm256_add_epi16(_mm256_mulhi_epi16(twice_cr, _mm256_set1_epi16(R_CR)), one);
    __m256i blue = _mm256_add_epi16(_mm256_mulhi_epi16(twice_cb, _mm256_set1_epi16(B_CB)), one);
    __m256i low = _mm256_add_epi32(weigh(_mm256_unpacklo_epi16(cb, cr), G_CB, G_CR), half);
    __m256i high = _mm256_add_epi32(weigh(_mm256_unpackhi_epi16(cb, cr), G_CB, G_CR), half);
    offsets[0] = _mm256_add_epi16(_mm256_srai_epi16(red, 1), cr);
    offsets[1] = _mm256_sub_epi16(shrink(low, high, 16), cr);
    offsets[2] = _mm256_add_epi16(_mm256_srai_epi16(blue, 1), twice_cb);
}

/* Line y of the image, from the pair of columns of the crop's first pixel to that of its last. */
AVX2 static void rgb_line(Workspace *workspace, Image *image, int y)
{
    const Job *job = image->job;
    int first = job->left / 2, last = (job->left + job->width - 1) / 2, count = last - first + 1;
    int near = y / 2, far = clamp(y % 2 ? near + 1 : near - 1, 0, (image->height + 1) / 2 - 1);
    for (int c = 0; c < 2; c++) {
        int16_t *mixed = workspace->chroma_lines[c];
        mix_lines(chroma_line(image, c, near) + first - 1, chroma_line(image, c, far) + first - 1, count + 2, mixed);
        if (first == 0)
            mixed[0] = mixed[1];
        if (last == (image->width + 1) / 2 - 1)
            mixed[count + 1] = mixed[count];
    }
    const uint8_t *luma = luma_line(image, y) + 2 * first;
    const __m256i low = _mm256_set1_epi16(255), zero = _mm256_setzero_si256();
    for (int x = 0; x < count; x += 16) {
        Columns cb = upsample(workspace->chroma_lines[0] + x), cr = upsample(workspace->chroma_lines[1] + x);
        __m256i even[CHANNELS], odd[CHANNELS], both_columns = _mm256_loadu_si256((const __m256i *)(luma + 2 * x));
        __m256i even_luma = _mm256_and_si256(both_columns, low), odd_luma = _mm256_srli_epi16(both_columns, 8);
        color_offsets(cb.even, cr.even, even);
        color_offsets(cb.odd, cr.odd, odd);
#pragma GCC unroll 3
        for (int c = 0; c < CHANNELS; c++) {
            __m256i e = _mm256_min_epi16(_mm256_max_epi16(_mm256_add_epi16(even_luma, even[c]), zero), low);
            __m256i o = _mm256_min_epi16(_mm256_max_epi16(_mm256_add_epi16(odd_luma, odd[c]), zero), low);
            _mm256_storeu_si256((__m256i *)(workspace->line.rows[c] + 2 * x), _mm256_or_si256(e, _mm256_slli_epi16(o, 8)));
        }
    }
}
#endif

/* ---- Output: mirrored lines of RGB to the type and layout of the batch ---- */

static size_t value_bytes(Type type)
{
    return type == FLOAT32 ? 4 : type == BYTES ? 1 : 2;
}

/* IEEE 754 binary16, rounded to even; any NaN becomes a quiet one. */
static uint16_t to_float16(float value)
{
    uint32_t bits, sign;
    memcpy(&bits, &value, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x477ff000) /* 65,520 and more */
        return (uint16_t)(sign | 0x7c00);
    if (bits < 0x38800000) { /* below 2**-14: in units of 2**-24, which is what adding 1/2 leaves in the low bits */
        float sum;
        uint32_t half;
        memcpy(&sum, &bits, 4);
        sum += 0.5f;
        memcpy(&half, &sum, 4);
        return (uint16_t)(sign | (half - 0x3f000000));
    }
    return (uint16_t)(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

/* The upper half of a float32, rounded to even. */
static uint16_t to_bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

enum { PATTERN = 24 }; /* means or scales of so many values repeat: three vectors of eight, and eight interleaved pixels */

/* (from - mean) * scale. `means` are as many as values where `own_means`, else PATTERN. */
static void write_floats_plain(const uint8_t *from, int count, const float *means, int own_means, const float *scales, Type type, void *out)
{
    for (int x = 0; x < count; x++) {
        float value = ((float)from[x] - means[own_means ? x : x % PATTERN]) * scales[x % PATTERN];
        if (type == FLOAT32)
            ((float *)out)[x] = value;
        else
            ((uint16_t *)out)[x] = type == FLOAT16 ? to_float16(value) : to_bfloat16(value);
    }
}

static void reverse_plain(uint8_t *row, int count)
{
    for (int left = 0, right = count - 1; left < right; left++, right--) {
        uint8_t value = row[left];
        row[left] = row[right];
        row[right] = value;
    }
}

static void interleave_plain(uint8_t *const rows[CHANNELS], int count, uint8_t *out)
{
    for (int x = 0; x < count; x++)
        for (int c = 0; c < CHANNELS; c++)
            out[CHANNELS * x + c] = rows[c][x];
}

#if defined(__x86_64__)
/* Which pixel of 16 gives each byte of three vectors, by channel; 0x80 where another channel does. */
static uint8_t places[3][CHANNELS][16];

static void fill_places(void)
{
    for (int n = 0; n < 48; n++)
        for (int c = 0; c < CHANNELS; c++)
            places[n / 16][c][n % 16] = n % CHANNELS == c ? (uint8_t)(n / CHANNELS) : 0x80;
}

/* Streaming stores go around the cache, to which a batch would not return anyway: ordinary ones took 0.09 of libjpeg-turbo's decoding
   more (docs/log.md). */
INLINE AVX2 void write_eight(__m256 values, Type type, int stream, void *out, int x)
{
    if (type == FLOAT32) {
        if (stream)
            _mm256_stream_ps((float *)out + x, values);
        else
            _mm256_storeu_ps((float *)out + x, values);
        return;
    }
    __m128i packed;
    if (type == FLOAT16) {
        packed = _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
    } else {
        __m256i bits = _mm256_castps_si256(values), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
        packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    }
    if (stream)
        _mm_stream_si128((__m128i *)((uint16_t *)out + x), packed);
    else
        _mm_storeu_si128((__m128i *)((uint16_t *)out + x), packed);
}

INLINE AVX2 void write_floats_as(const uint8_t *from, int count, const float *means, int own_means, const float *scales, Type type,
                                 int stream, void *out)
{
    __m256 mean[3], scale[3];
    for (int n = 0; n < 3; n++)
        mean[n] = _mm256_loadu_ps(means + 8 * n), scale[n] = _mm256_loadu_ps(scales + 8 * n);
    int x = 0;
    for (; x + PATTERN <= count; x += PATTERN)
#pragma GCC unroll 3
        for (int n = 0; n < 3; n++) {
            __m256i whole = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(from + x + 8 * n)));
            __m256 less = _mm256_sub_ps(_mm256_cvtepi32_ps(whole), own_means ? _mm256_loadu_ps(means + x + 8 * n) : mean[n]);
            write_eight(_mm256_mul_ps(less, scale[n]), type, stream, out, x + 8 * n);
        }
    for (int n = 0; x + 8 <= count; x += 8, n++) {
        __m256i whole = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(from + x)));
        __m256 less = _mm256_sub_ps(_mm256_cvtepi32_ps(whole), _mm256_loadu_ps(means + (own_means ? x : 8 * n)));
        write_eight(_mm256_mul_ps(less, _mm256_loadu_ps(scales + 8 * n)), type, stream, out, x);
    }
    /* Fewer than eight, whose pattern begins at a multiple of eight. */
    write_floats_plain(from + x, count - x, means + (own_means ? x : x % PATTERN), own_means, scales + x % PATTERN, type,
                 (uint8_t *)out + (size_t)x * value_bytes(type));
}

AVX2 static void write_floats_avx2(const uint8_t *from, int count, const float *means, int own_means, const float *scales, Type type,
                                   void *out)
{
    int stream = (uintptr_t)out % (8 * value_bytes(type)) == 0;
#define WRITE_AS(type)                                                                         \
    if (stream)                                                                                \
        write_floats_as(from, count, means, own_means, scales, type, 1, out);                  \
    else                                                                                       \
        write_floats_as(from, count, means, own_means, scales, type, 0, out);
    if (type == FLOAT32) {
        WRITE_AS(FLOAT32)
    } else if (type == FLOAT16) {
        WRITE_AS(FLOAT16)
    } else {
        WRITE_AS(BFLOAT16)
    }
}

AVX2 static void reverse_avx2(uint8_t *row, int count)
{
    const __m128i backwards = _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int left = 0;
    for (; 2 * left + 32 <= count; left += 16) {
        uint8_t *right = row + count - 16 - left;
        __m128i first = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(row + left)), backwards);
        __m128i last = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)right), backwards);
        _mm_storeu_si128((__m128i *)(row + left), last);
        _mm_storeu_si128((__m128i *)right, first);
    }
    reverse_plain(row + left, count - 2 * left);
}

AVX2 static void interleave_avx2(uint8_t *const rows[CHANNELS], int count, uint8_t *out)
{
    __m128i place[3][CHANNELS], row[CHANNELS];
    memcpy(place, places, sizeof place);
    int x = 0;
    for (; x + 16 <= count; x += 16) {
        for (int c = 0; c < CHANNELS; c++)
            row[c] = _mm_loadu_si128((const __m128i *)(rows[c] + x));
        for (int part = 0; part < 3; part++) {
            __m128i red_green = _mm_or_si128(_mm_shuffle_epi8(row[0], place[part][0]), _mm_shuffle_epi8(row[1], place[part][1]));
            _mm_storeu_si128((__m128i *)(out + CHANNELS * x + 16 * part),
                             _mm_or_si128(red_green, _mm_shuffle_epi8(row[2], place[part][2])));
        }
    }
    interleave_plain((uint8_t *[]){rows[0] + x, rows[1] + x, rows[2] + x}, count - x, out + CHANNELS * x);
}
#endif

static void (*write_floats)(const uint8_t *, int, const float *, int, const float *, Type, void *) = write_floats_plain;
static void (*reverse)(uint8_t *, int) = reverse_plain;
static void (*interleave)(uint8_t *const[CHANNELS], int, uint8_t *) = interleave_plain;

/* For bytes, a mean is rounded; a pixel is whole, so rounding their difference would be the same. */
static void subtract_from_bytes(uint8_t *row, int count, float mean)
{
    float clipped = mean > 255 ? -255 : mean < -255 ? 255 : -mean;
    int16_t offset = (int16_t)((int)(clipped + 256.5f) - 256);
    for (int x = 0; offset && x < count; x++) {
        int16_t value = (int16_t)(row[x] + offset);
        value = value < 0 ? 0 : value;
        row[x] = (uint8_t)(value > 255 ? 255 : value);
    }
}

/* The mean image under a line of the crop, plus the mean of the job, every `step` floats. */
static void find_means(const Job *job, const float *image, int c, int y, int step, float *means)
{
    const float *from = image + ((size_t)c * job->image_height + job->top + y) * job->image_width + job->left;
    for (int x = 0; x < job->width; x++)
        means[step * x] = from[job->mirror ? job->width - 1 - x : x] + job->mean[c];
}

/* Line y of the crop, whose pixels begin at `skip` of line->rows and may be changed. */
static void write_line(Line *line, int skip, const Job *job, const Format *format, int y)
{
    Type type = format->type;
    int width = job->width, groups = format->channels_last ? 1 : CHANNELS, count = CHANNELS / groups * width;
    uint8_t *rows[CHANNELS];
    for (int c = 0; c < CHANNELS; c++) {
        rows[c] = line->rows[c] + skip;
        if (job->mirror)
            reverse(rows[c], width);
        if (type == BYTES)
            subtract_from_bytes(rows[c], width, job->mean[c]);
    }
    for (int group = 0; group < groups; group++) { /* a channel, or all three interleaved */
        size_t lines_before = format->channels_last ? (size_t)y : (size_t)group * job->height + y;
        uint8_t *out = (uint8_t *)(intptr_t)job->out + lines_before * count * value_bytes(type);
        if (format->channels_last)
            interleave(rows, width, type == BYTES ? out : line->mixed);
        else if (type == BYTES)
            memcpy(out, rows[group], width);
        if (type == BYTES)
            continue;
        float means[PATTERN], scales[PATTERN];
        for (int n = 0; format->channels_last && n < PATTERN; n++)
            means[n] = job->mean[n % CHANNELS], scales[n] = format->scale[n % CHANNELS];
        for (int n = 0; !format->channels_last && n < PATTERN; n++)
            means[n] = job->mean[group], scales[n] = format->scale[group];
        for (int c = 0; format->mean_image && c < CHANNELS; c++)
            if (format->channels_last || c == group)
                find_means(job, format->mean_image, c, y, CHANNELS / groups, line->means + (format->channels_last ? c : 0));
        write_floats(format->channels_last ? line->mixed : rows[group], count, format->mean_image ? line->means : means,
                        format->mean_image != NULL, scales, type, out);
    }
}

static void convert_image(Line *line, const Job *job, const Format *format)
{
    const uint8_t *pixels = (const uint8_t *)(intptr_t)job->data;
    for (int y = 0; y < job->height; y++) {
        const uint8_t *from = pixels + ((size_t)(job->top + y) * job->image_width + job->left) * CHANNELS;
        for (int x = 0; x < job->width; x++)
            for (int c = 0; c < CHANNELS; c++)
                line->rows[c][x] = from[CHANNELS * x + c];
        write_line(line, 0, job, format, y);
    }
}

/* ---- Batches ---- */

#if defined(__x86_64__)
/* The tables of a header, made where it has none yet; never in place of those that the other image uses. */
static const Tables *find_tables(Workspace *workspace, const Tables *used, const uint8_t *data, int length)
{
    enum { KEPT = sizeof workspace->tables / sizeof *workspace->tables };
    for (int n = 0; n < KEPT; n++)
        if (same_header(&workspace->tables[n], data, length))
            return &workspace->tables[n];
    int place = workspace->tables_made++ % KEPT;
    if (&workspace->tables[place] == used)
        place = workspace->tables_made++ % KEPT;
    return read_header(&workspace->tables[place], data, length) ? &workspace->tables[place] : NULL;
}

static void begin_row(Image *image)
{
    memset(image->coefficients, 0, (size_t)image->mcu_columns * MCU_BLOCKS * 64 * sizeof *image->coefficients);
    image->lane.reader.last = (uintptr_t)&image->coefficients[63];
    image->lane.reach = image->reach;
    image->lane.blocks_left = image->mcu_columns * MCU_BLOCKS;
}

/* Returns 0 where the image is not regular. */
static int begin_image(Workspace *workspace, Image *image, const Tables *used, Job *job)
{
    const uint8_t *data = (const uint8_t *)(intptr_t)job->data;
    const Tables *tables = find_tables(workspace, used, data, job->length);
    if (!tables)
        return 0;
    const uint8_t *size = data + tables->size_at;
    int height = size[0] << 8 | size[1], width = size[2] << 8 | size[3];
    /* Below 5 columns libjpeg-turbo does not interpolate chroma. */
    if (height != job->image_height || width != job->image_width || width < 5 || !reserve(image, (width + 15) / 16))
        return 0;
    size_t room = (size_t)(job->length - tables->header_length) + PADDING + 32;
    if (room > image->room) {
        free(image->bytes);
        image->bytes = malloc(room);
        image->room = image->bytes ? room : 0;
    }
    const uint8_t *end = image->bytes ? unstuff(data + tables->header_length, data + job->length, image->bytes) : NULL;
    if (!end)
        return 0;
    image->lane = (Lane){.reader = {.in = image->bytes}, .end = end, .tables = tables};
    image->job = job;
    image->height = height, image->width = width;
    image->mcu_columns = (width + 15) / 16, image->mcu_rows = (height + 15) / 16, image->mcu_row = 0;
    image->luma_pitch = (size_t)image->mcu_columns * 16 + MARGIN, image->chroma_pitch = (size_t)image->mcu_columns * 8 + MARGIN;
    image->lines_written = image->over = 0;
    /* A pixel takes the chroma of the samples beside its own too. */
    int bottom = job->top + job->height - 1, right = job->left + job->width - 1;
    int last_chroma_line = (height + 1) / 2 - 1, last_chroma = (width + 1) / 2 - 1;
    image->first_row = clamp(job->top / 2 - 1, 0, last_chroma_line) / 8;
    image->last_row = clamp(bottom / 2 + bottom % 2, 0, last_chroma_line) / 8; /* never above that of the last line's luma */
    image->first_luma_column = job->left / 16, image->last_luma_column = right / 16;
    image->first_chroma_column = clamp(job->left / 2 - 1, 0, last_chroma) / 8;
    image->last_chroma_column = clamp(right / 2 + 1, 0, last_chroma) / 8;
    begin_row(image);
    return 1;
}

/* Returns 1 while the image has more rows to decode. */
static int end_row(Workspace *workspace, Image *image, const Format *format, int to_end)
{
    const Lane *lane = &image->lane;
    Job *job = image->job;
    int row = image->mcu_row, final = row == image->mcu_rows - 1;
    int64_t bits_left = (lane->end - lane->reader.in) * 8 + (lane->reader.bits & 63);
    if (lane->failed || bits_left < 0 || (final && bits_left > 7)) /* libjpeg warns of bytes left or missing */
        return 0;
    if (row >= image->first_row && row <= image->last_row) {
        transform_row(image);
        /* The last line of the row takes chroma of the next. */
        int end = row == image->last_row ? job->height : clamp(16 * row + 15 - job->top, 0, job->height);
        for (; image->lines_written < end; image->lines_written++) {
            rgb_line(workspace, image, job->top + image->lines_written);
            write_line(&workspace->line, job->left % 2, job, format, image->lines_written);
        }
    }
    if (row >= image->last_row && (final || !to_end)) {
        job->done = !image->over;
        return 0;
    }
    image->mcu_row++;
    begin_row(image);
    return 1;
}

AVX2 static void decode_jobs(Workspace *workspace, Job *jobs, int64_t count, const Format *format, int to_end)
{
    Image *active[2] = {&workspace->images[0], &workspace->images[1]};
    int64_t next = 0;
    for (int images = 0;;) {
        while (images < 2 && next < count)
            images += begin_image(workspace, active[images], images ? active[0]->lane.tables : NULL, &jobs[next++]);
        if (!images)
            break;
        int ready = images == 2 ? run_two(&active[0]->lane, &active[1]->lane) : 0;
        if (images == 1)
            run_one(&active[0]->lane);
        if (!end_row(workspace, active[ready], format, to_end)) {
            Image *ended = active[ready];
            active[ready] = active[--images];
            active[images] = ended;
        }
    }
    _mm_sfence(); /* streaming stores are seen by other threads only after it */
}

/* Prepares the fast code where this CPU can run it. F16C is older than AVX2, and Clang 14 does not know how to ask for it. */
static void prepare(void)
{
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("bmi") || !__builtin_cpu_supports("bmi2"))
        return;
    fill_picks();
    fill_places();
    write_floats = write_floats_avx2;
    reverse = reverse_avx2;
    interleave = interleave_avx2;
    available = 1;
}
#endif

#ifndef WITHOUT_PYTHON
/* ---- Python ---- */

static const char *const TYPES[] = {"float32", "bfloat16", "float16", "uint8"};

typedef struct {
    Py_buffer jobs, scale, mean_image;
    Job *begin, *end;
    Format format;
    int to_end;
} Call;

static void end_call(Call *call)
{
    PyBuffer_Release(&call->jobs);
    PyBuffer_Release(&call->scale);
    PyBuffer_Release(&call->mean_image);
}

/* Reads the arguments of `decode` and `convert`; 0 with a Python exception if they do not fit. */
static int begin_call(PyObject *args, Call *call)
{
    const char *type;
    Py_ssize_t begin, end, count;
    int found = -1;
    if (!PyArg_ParseTuple(args, "w*y*z*sppnn", &call->jobs, &call->scale, &call->mean_image, &type, &call->format.channels_last,
                          &call->to_end, &begin, &end))
        return 0;
    for (int n = 0; n < 4; n++)
        if (!strcmp(type, TYPES[n]))
            found = n;
    count = call->jobs.len / (Py_ssize_t)sizeof(Job);
    int fits = found >= 0 && call->jobs.len % (Py_ssize_t)sizeof(Job) == 0 && begin >= 0 && begin <= end && end <= count
        && call->scale.len == CHANNELS * 4;
    if (fits) {
        call->format.type = (Type)found;
        call->format.scale = call->scale.buf;
        call->format.mean_image = call->mean_image.buf;
        call->begin = (Job *)call->jobs.buf + begin, call->end = (Job *)call->jobs.buf + end;
    }
    for (const Job *job = call->begin; fits && job < call->end; job++)
        fits = job->length >= 0 && job->top >= 0 && job->left >= 0 && job->height > 0 && job->width > 0 && job->width <= MAX_SIDE
            && job->height <= job->image_height - job->top && job->width <= job->image_width - job->left
            && (!call->mean_image.buf || call->mean_image.len == (Py_ssize_t)job->image_height * job->image_width * CHANNELS * 4);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "the crops do not lie in their images, or the arguments do not fit each other");
        end_call(call);
    }
    return fits;
}

PyDoc_STRVAR(sizes_doc,
"sizes(jobs, /)\n--\n\n"
"Sets image_height and image_width of each job from the header of its JPEG; to 0 where there is none.");

static PyObject *py_sizes(PyObject *self, PyObject *args)
{
    Py_buffer jobs;
    if (!PyArg_ParseTuple(args, "w*", &jobs))
        return NULL;
    Job *job = jobs.buf, *end = job + jobs.len / (Py_ssize_t)sizeof(Job);
    Py_BEGIN_ALLOW_THREADS
    for (; job < end; job++)
        find_size((const uint8_t *)(intptr_t)job->data, job->length, &job->image_height, &job->image_width);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&jobs);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(decode_doc,
"decode(jobs, scale, mean_image, type, channels_last, to_end, begin, end, /)\n--\n\n"
"Decodes JPEGs of jobs `begin` to `end`, and writes their crops: mirrored left to right if the job says so, minus mean and mean\n"
"image, times scale. jobs: a writable array of JOB (imagefeed.codec.decode). scale: float32 (3,). mean_image: float32 (3,\n"
"image_height, image_width) or None. type: 'float32', 'bfloat16', 'float16' or 'uint8', of which uint8 is rounded and clipped and\n"
"takes neither scale nor mean image. channels_last: (height, width, 3) instead of (3, height, width).\n\n"
"Sets `done` of each job: 0 where the JPEG is not regular or is damaged; its crop may then be written in part. What follows the\n"
"crop's last row is looked at only with `to_end`. Releases the GIL; several threads may work on parts of one array.");

#if defined(__x86_64__)
static Workspace *workspaces; /* not in use; guarded by the GIL */

static PyObject *py_decode(PyObject *self, PyObject *args)
{
    Call call = {0};
    if (!begin_call(args, &call))
        return NULL;
    for (Job *job = call.begin; job < call.end; job++)
        job->done = 0;
    Workspace *workspace = workspaces;
    if (workspace)
        workspaces = workspace->next;
    else if ((workspace = aligned_alloc(64, (sizeof *workspace + 63) / 64 * 64)))
        memset(workspace, 0, sizeof *workspace);
    if (workspace && available) {
        Py_BEGIN_ALLOW_THREADS
        decode_jobs(workspace, call.begin, call.end - call.begin, &call.format, call.to_end);
        Py_END_ALLOW_THREADS
    }
    if (workspace) {
        workspace->next = workspaces;
        workspaces = workspace;
    }
    end_call(&call);
    return workspace ? Py_NewRef(Py_None) : PyErr_NoMemory();
}
#else
static PyObject *py_decode(PyObject *self, PyObject *args)
{
    Call call = {0};
    if (!begin_call(args, &call))
        return NULL;
    for (Job *job = call.begin; job < call.end; job++)
        job->done = 0;
    end_call(&call);
    Py_RETURN_NONE;
}
#endif

PyDoc_STRVAR(convert_doc,
"convert(jobs, scale, mean_image, type, channels_last, to_end, begin, end, /)\n--\n\n"
"As `decode`, from decoded pixels: the `data` of a job is the address of uint8 (image_height, image_width, 3).");

static PyObject *py_convert(PyObject *self, PyObject *args)
{
    Call call = {0};
    if (!begin_call(args, &call))
        return NULL;
    Line *line = malloc(sizeof *line);
    if (line) {
        Py_BEGIN_ALLOW_THREADS
        for (Job *job = call.begin; job < call.end; job++) {
            convert_image(line, job, &call.format);
            job->done = 1;
        }
#if defined(__x86_64__)
        _mm_sfence();
#endif
        Py_END_ALLOW_THREADS
    }
    free(line);
    end_call(&call);
    return line ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

static PyMethodDef methods[] = {
    {"sizes", py_sizes, METH_VARARGS, sizes_doc},
    {"decode", py_decode, METH_VARARGS, decode_doc},
    {"convert", py_convert, METH_VARARGS, convert_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "decoder", "Decodes regular JPEGs into a batch; see decoder.c.", -1, methods,
};

PyMODINIT_FUNC PyInit_decoder(void)
{
#if defined(__x86_64__)
    prepare();
#endif
    PyObject *self = PyModule_Create(&module);
    if (self)
        PyModule_AddObjectRef(self, "AVAILABLE", available ? Py_True : Py_False);
    return self;
}
#endif
