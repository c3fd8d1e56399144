/* Part of decoder.c: entropy-coded data to coefficients (T.81 F.2.2). */

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

   Each look has to wait for the one before, and its table is in memory. While one image waits, the other works: decoding takes 0.88
   (Zen 5) to 0.92 (Zen 3) of the time of one image after the other. Three or four bring no more. */

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
    int block;           /* of the cycle */
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
    int *dc = &lane->dc[lane->tables->component_of[lane->block]];
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
    lane->block = lane->block == CYCLE - 1 ? 0 : lane->block + 1;
    lane->blocks_left--;
    if (unlikely(!lane->blocks_left || reader->in > lane->end + 8))
        return 1;
    begin_block(reader, lane);
    return 0;
}

/* Decodes until one of the lanes has a row of MCUs, or fails; returns which. `two` is a constant, which the inner loop need not
   test. */
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
