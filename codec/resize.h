/* Part of decoder.c: the resize of torch on uint8 with antialias=True, to the bit (compute_index_ranges_int16_weights in
   aten/src/ATen/native/cpu/UpSampleKernel.cpp, after Pillow's Resample.c): triangles that reach a pixel of the larger side in
   each direction, along rows and then, from bytes again, down columns; weights of 16 bits. */

enum { BLOCK = 32, QUAD = 4 }; /* outputs that are made at a time; those whose inputs one vector of 16 bytes holds */

/* Along one dimension. Arrays have a place for each output, padded to whole blocks of outputs that weigh nothing. */
typedef struct {
    int inputs, outputs, padded;
    int pairs; /* of neighboring inputs that make an output */
    int shift; /* weights are in units of 2**-shift */
    int32_t *first;   /* input of an output */
    int16_t *weights; /* of pair p of output n, from 2 * (p * padded + n) on */
    int32_t *base;    /* of a quad: its first input */
    uint8_t *masks;   /* four of an output: which bytes behind `base` are its pair, as words; NULL where one is beyond a vector */
} Filter;

static int padded_to(int count, int multiple)
{
    return (count + multiple - 1) / multiple * multiple;
}

static void set_sizes(Filter *filter, int inputs, int outputs)
{
    *filter = (Filter){.inputs = inputs, .outputs = outputs, .padded = padded_to(outputs, BLOCK)};
    int taps = inputs > outputs ? (2 * inputs + outputs - 1) / outputs : 2;
    filter->pairs = ((taps < inputs ? taps : inputs) + 1) / 2;
}

/* `exact` has room for the weights before they are rounded. */
static void fill_filter(Filter *filter, int mirror, double *exact)
{
    int taps = 2 * filter->pairs, last = filter->outputs - 1;
    size_t count = (size_t)taps * filter->padded;
    double scale = (double)filter->inputs / filter->outputs, reach = scale > 1 ? scale : 1, steepness = 1 / reach, most = 0;
    memset(exact, 0, count * sizeof *exact);
    for (int n = 0; n <= last; n++) {
        double center = scale * (n + 0.5), sum = 0;
        /* Never so far that more than one input of a pair is beyond the last. */
        int first = clamp((int)(center - reach + 0.5), 0, filter->inputs > taps ? filter->inputs - taps : 0);
        int place = mirror ? last - n : n;
        filter->first[place] = first;
        for (int tap = 0; tap < taps; tap++) {
            double distance = fabs((first + tap - center + 0.5) * steepness);
            double weight = first + tap < filter->inputs && distance < 1 ? 1 - distance : 0;
            exact[2 * ((size_t)(tap / 2) * filter->padded + place) + tap % 2] = weight;
            sum += weight;
        }
        for (int tap = 0; tap < taps; tap++) {
            double *weight = &exact[2 * ((size_t)(tap / 2) * filter->padded + place) + tap % 2];
            *weight *= 1 / sum;
            most = *weight > most ? *weight : most;
        }
    }
    for (int n = last + 1; n < filter->padded; n++)
        filter->first[n] = filter->first[last];
    for (filter->shift = 0; filter->shift < 22 && (int)(0.5 + most * (2 << filter->shift)) < 1 << 15;)
        filter->shift++;
    for (size_t n = 0; n < count; n++)
        filter->weights[n] = (int16_t)(0.5 + exact[n] * (1 << filter->shift));
}

static void fill_masks(Filter *filter)
{
    uint8_t *masks = filter->masks;
    for (int n = 0; n < filter->padded; n++) {
        const int32_t *first = filter->first + n / QUAD * QUAD;
        int base = first[0] < first[QUAD - 1] ? first[0] : first[QUAD - 1], behind = filter->first[n] - base;
        filter->base[n / QUAD] = base;
        if (behind > 14) {
            filter->masks = NULL;
            return;
        }
        memcpy(masks + 4 * n, (uint8_t[]){(uint8_t)behind, 0x80, (uint8_t)(behind + 1), 0x80}, 4);
    }
}

static uint8_t to_byte(int32_t sum, int shift)
{
    int32_t value = (sum + (1 << (shift - 1))) >> shift;
    return value > 255 ? 255 : (uint8_t)value; /* no weight is negative */
}

static void across_plain(const Filter *filter, const uint8_t *row, uint8_t *out)
{
    for (int n = 0; n < filter->outputs; n++) {
        const uint8_t *from = row + filter->first[n];
        int32_t sum = 0;
        for (int pair = 0; pair < filter->pairs; pair++) {
            const int16_t *weights = filter->weights + 2 * ((size_t)pair * filter->padded + n);
            sum += from[2 * pair] * weights[0] + from[2 * pair + 1] * weights[1];
        }
        out[n] = to_byte(sum, filter->shift);
    }
}

/* Output y of the filter, from `count` columns of `rows`, which it takes. */
static void down_plain(const Filter *filter, int y, const uint8_t *const *rows, size_t at, int count, uint8_t *out)
{
    for (int x = 0; x < count; x++) {
        int32_t sum = 0;
        for (int pair = 0; pair < filter->pairs; pair++) {
            const int16_t *weights = filter->weights + 2 * ((size_t)pair * filter->padded + y);
            sum += rows[2 * pair][at + x] * weights[0] + rows[2 * pair + 1][at + x] * weights[1];
        }
        out[x] = to_byte(sum, filter->shift);
    }
}

#if defined(__x86_64__)
INLINE AVX2 __m256i add_pairs(__m256i sums, __m256i words, __m256i weights)
{
    return _mm256_add_epi32(sums, _mm256_madd_epi16(words, weights));
}

INLINE AVX2 __m256i to_bytes(__m256i sums[4], __m128i shift)
{
    for (int n = 0; n < 4; n++)
        sums[n] = _mm256_sra_epi32(sums[n], shift);
    return _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
}

/* Of eights, of which each lane has a half */
INLINE AVX2 __m256i in_order(__m256i bytes)
{
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

INLINE AVX2 void across_pairs(const Filter *filter, const uint8_t *row, int pairs, uint8_t *out)
{
    const __m256i half = _mm256_set1_epi32(1 << (filter->shift - 1));
    for (int x = 0; x < filter->padded; x += BLOCK) {
        __m256i sums[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) {
            int at = x + 2 * QUAD * n;
            const uint8_t *low = row + filter->base[at / QUAD], *high = row + filter->base[at / QUAD + 1];
            __m256i mask = _mm256_load_si256((const __m256i *)(filter->masks + 4 * at));
            sums[n] = half;
            for (int pair = 0; pair < pairs; pair++) {
                __m256i bytes = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(low + 2 * pair)));
                bytes = _mm256_inserti128_si256(bytes, _mm_loadu_si128((const __m128i *)(high + 2 * pair)), 1);
                const int16_t *weights = filter->weights + 2 * ((size_t)pair * filter->padded + at);
                sums[n] = add_pairs(sums[n], _mm256_shuffle_epi8(bytes, mask), _mm256_load_si256((const __m256i *)weights));
            }
        }
        _mm256_store_si256((__m256i *)(out + x), in_order(to_bytes(sums, _mm_cvtsi32_si128(filter->shift))));
    }
}

/* Reads up to a vector behind the row, which its buffer has room for. */
AVX2 static void across_avx2(const Filter *filter, const uint8_t *row, uint8_t *out)
{
    if (!filter->masks)
        across_plain(filter, row, out);
    else if (filter->pairs == 1) /* constants, which unroll the inner loop */
        across_pairs(filter, row, 1, out);
    else if (filter->pairs == 2)
        across_pairs(filter, row, 2, out);
    else
        across_pairs(filter, row, filter->pairs, out);
}

INLINE AVX2 void down_pairs(const Filter *filter, int y, const uint8_t *const *rows, size_t at, int count, int pairs, uint8_t *out)
{
    const __m256i half = _mm256_set1_epi32(1 << (filter->shift - 1)), zero = _mm256_setzero_si256();
    for (int x = 0; x < count; x += BLOCK) {
        __m256i sums[4] = {half, half, half, half};
        for (int pair = 0; pair < pairs; pair++) {
            int32_t both;
            memcpy(&both, filter->weights + 2 * ((size_t)pair * filter->padded + y), sizeof both);
            __m256i upper = _mm256_load_si256((const __m256i *)(rows[2 * pair] + at + x)), weights = _mm256_set1_epi32(both);
            __m256i lower = _mm256_load_si256((const __m256i *)(rows[2 * pair + 1] + at + x));
            __m256i first = _mm256_unpacklo_epi8(upper, lower), last = _mm256_unpackhi_epi8(upper, lower);
            sums[0] = add_pairs(sums[0], _mm256_unpacklo_epi8(first, zero), weights);
            sums[1] = add_pairs(sums[1], _mm256_unpackhi_epi8(first, zero), weights);
            sums[2] = add_pairs(sums[2], _mm256_unpacklo_epi8(last, zero), weights);
            sums[3] = add_pairs(sums[3], _mm256_unpackhi_epi8(last, zero), weights);
        }
        _mm256_storeu_si256((__m256i *)(out + x), to_bytes(sums, _mm_cvtsi32_si128(filter->shift)));
    }
}

AVX2 static void down_avx2(const Filter *filter, int y, const uint8_t *const *rows, size_t at, int count, uint8_t *out)
{
    if (filter->pairs == 1)
        down_pairs(filter, y, rows, at, count, 1, out);
    else if (filter->pairs == 2)
        down_pairs(filter, y, rows, at, count, 2, out);
    else
        down_pairs(filter, y, rows, at, count, filter->pairs, out);
}
#endif

static void (*resize_across)(const Filter *, const uint8_t *, uint8_t *) = across_plain;
static void (*resize_down)(const Filter *, int, const uint8_t *const *, size_t, int, uint8_t *) = down_plain;
