/* Part of libjpeg.c: planes of samples, rescaled by Pillow's bicubic with antialiasing. */

typedef struct {
    int outputs, stride; /* `stride` weights per output, a multiple of LANES, those beyond its taps zero */
    int *start, *taps;   /* per output: the first input, and the number of inputs */
    int16_t *weights;    /* in units of 2**-BITS; those of an output sum to 1 */
} Filter;

static inline double bicubic(double x)
{
    /* Keys 1981, a = -0.5. */
    x = x < 0 ? -x : x;
    if (x < 1)
        return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

static void free_filter(Filter *filter)
{
    free(filter->start);
    free(filter->taps);
    free(filter->weights);
    memset(filter, 0, sizeof *filter);
}

/* Maps [from, to) of `inputs` samples to `outputs`. Returns 0 if there is no memory. */
static int make_filter(Filter *filter, int inputs, double from, double to, int outputs)
{
    double scale = (to - from) / outputs, widened = scale > 1 ? scale : 1, narrowed = 1 / widened, reach = 2 * widened;
    int most = (int)ceil(reach) * 2 + 1;
    double *exact = malloc(most * sizeof *exact);
    filter->outputs = outputs;
    filter->stride = (most + LANES - 1) / LANES * LANES;
    filter->start = malloc(outputs * sizeof(int));
    filter->taps = malloc(outputs * sizeof(int));
    filter->weights = calloc((size_t)outputs * filter->stride, sizeof(int16_t));
    if (!exact || !filter->start || !filter->taps || !filter->weights) {
        free(exact);
        return 0;
    }
    for (int out = 0; out < outputs; out++) {
        double center = from + (out + 0.5) * scale, sum = 0;
        int first = center - reach + 0.5 > 0 ? (int)(center - reach + 0.5) : 0;
        int end = center + reach + 0.5 < inputs ? (int)(center + reach + 0.5) : inputs;
        int16_t *weights = filter->weights + (size_t)out * filter->stride;
        int largest = 0, rest = 1 << BITS;
        for (int tap = 0; tap < end - first; tap++)
            sum += exact[tap] = bicubic((first + tap - center + 0.5) * narrowed);
        double unit = (1 << BITS) / sum;
        for (int tap = 0; tap < end - first; tap++) {
            /* Rounded to nearest; adding 2 keeps it positive, which saves a call of floor(). */
            rest -= weights[tap] = (int16_t)((int)(exact[tap] * unit + (2 << BITS) + 0.5) - (2 << BITS));
            if (weights[tap] > weights[largest])
                largest = tap;
        }
        weights[largest] += rest; /* so that a uniform area keeps its value */
        filter->start[out] = first;
        filter->taps[out] = end - first;
    }
    free(exact);
    return 1;
}

static inline uint8_t to_byte(int32_t sum)
{
    int32_t value = (sum + (1 << (BITS - 1))) >> BITS;
    return value < 0 ? 0 : value > 255 ? 255 : (uint8_t)value;
}

static void shrink_row(const uint8_t *row, uint8_t *out, const Filter *filter)
{
    for (int x = 0; x < filter->outputs; x++) {
        const uint8_t *from = row + filter->start[x];
        const int16_t *weights = filter->weights + (size_t)x * filter->stride;
        int32_t sum = 0;
        for (int tap = 0; tap < filter->taps[x]; tap++)
            sum += from[tap] * weights[tap];
        out[x] = to_byte(sum);
    }
}

static void mix_rows(const uint8_t *rows, size_t pitch, int width, uint8_t *out, const int16_t *weights, int taps)
{
    for (int x = 0; x < width; x++) {
        int32_t sum = 0;
        for (int tap = 0; tap < taps; tap++)
            sum += rows[tap * pitch + x] * weights[tap];
        out[x] = to_byte(sum);
    }
}

#if defined(__x86_64__)
/* Four outputs at a time. Reads up to a stride beyond the row, for which its buffer has room. */
__attribute__((target("avx2"))) static inline __attribute__((always_inline)) void
shrink_fours(const uint8_t *row, uint8_t *out, const Filter *filter, int stride)
{
    const __m128i half = _mm_set1_epi32(1 << (BITS - 1));
    const int16_t *weights = filter->weights;
    for (int x = 0; x + 4 <= filter->outputs; x += 4) {
        __m128i sums[4];
        for (int i = 0; i < 4; i++, weights += stride) {
            const uint8_t *from = row + filter->start[x + i];
            sums[i] = _mm_madd_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)from)),
                                     _mm_loadu_si128((const __m128i *)weights));
            for (int tap = LANES; tap < stride; tap += LANES)
                sums[i] = _mm_add_epi32(sums[i],
                                        _mm_madd_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)(from + tap))),
                                                       _mm_loadu_si128((const __m128i *)(weights + tap))));
        }
        __m128i sum = _mm_hadd_epi32(_mm_hadd_epi32(sums[0], sums[1]), _mm_hadd_epi32(sums[2], sums[3]));
        sum = _mm_srai_epi32(_mm_add_epi32(sum, half), BITS);
        sum = _mm_packs_epi32(sum, sum);
        int32_t four = _mm_cvtsi128_si32(_mm_packus_epi16(sum, sum));
        memcpy(out + x, &four, 4);
    }
}

__attribute__((target("avx2"))) static void shrink_row_avx2(const uint8_t *row, uint8_t *out, const Filter *filter)
{
    int stride = filter->stride, done = filter->outputs / 4 * 4;
    if (stride == LANES)
        shrink_fours(row, out, filter, LANES); /* a constant, so that the compiler unrolls the inner loop */
    else if (stride == 2 * LANES)
        shrink_fours(row, out, filter, 2 * LANES);
    else
        shrink_fours(row, out, filter, stride);
    Filter rest = {filter->outputs - done, stride, filter->start + done, filter->taps + done,
                   filter->weights + (size_t)done * stride};
    shrink_row(row, out + done, &rest);
}

/* 32 columns and two rows at a time. Of an odd number of rows it reads one more, for which the buffer has room. */
__attribute__((target("avx2"))) static void mix_rows_avx2(const uint8_t *rows, size_t pitch, int width, uint8_t *out,
                                                          const int16_t *weights, int taps)
{
    const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(1 << (BITS - 1));
    if (width < 32) {
        mix_rows(rows, pitch, width, out, weights, taps);
        return;
    }
    for (int begin = 0; begin < width; begin += 32) {
        int x = begin + 32 <= width ? begin : width - 32; /* the last ones overlap */
        __m256i sums[4] = {half, half, half, half};
        for (int tap = 0; tap < taps; tap += 2) {
            const uint8_t *at = rows + tap * pitch + x;
            __m256i upper = _mm256_loadu_si256((const __m256i *)at), lower = _mm256_loadu_si256((const __m256i *)(at + pitch));
            __m256i low = _mm256_unpacklo_epi8(upper, lower), high = _mm256_unpackhi_epi8(upper, lower);
            int32_t both;
            memcpy(&both, weights + tap, sizeof both); /* the weight of an extra row is zero */
            __m256i pair = _mm256_set1_epi32(both);
            sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), pair));
            sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), pair));
            sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), pair));
            sums[3] = _mm256_add_epi32(sums[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), pair));
        }
        for (int n = 0; n < 4; n++)
            sums[n] = _mm256_srai_epi32(sums[n], BITS);
        __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
        _mm256_storeu_si256((__m256i *)(out + x), bytes);
    }
}
#endif

static void (*shrink)(const uint8_t *, uint8_t *, const Filter *) = shrink_row;
static void (*mix)(const uint8_t *, size_t, int, uint8_t *, const int16_t *, int) = mix_rows;

/* ---- Planes ---- */

typedef struct {
    Filter across, down;
    int first_row, end_row; /* the rows and columns that the filters use */
    int first_column, end_column;
    uint8_t *line; /* several rows mixed into one */
} Plane;

typedef struct {
    int size, crop, mirrored_x, mirrored_y;
    int width, height;
    double left, top, wide, high; /* the part of the image that is kept, in its own pixels */
    Plane planes[PLANES];
    uint8_t *out[PLANES];
} Picture;

static void free_planes(Picture *picture)
{
    for (int c = 0; c < PLANES; c++) {
        Plane *plane = &picture->planes[c];
        free_filter(&plane->across);
        free_filter(&plane->down);
        free(plane->line);
        free(picture->out[c]);
    }
}

/* Decides the size of the result, and which part of an image of `width` x `height` it shows. */
static void place_picture(Picture *picture, double width, double height)
{
    double shorter = width < height ? width : height;
    if (picture->crop) {
        picture->width = picture->height = picture->size;
        picture->wide = picture->high = shorter;
    } else {
        picture->width = (int)floor(width * picture->size / shorter + 0.5);
        picture->height = (int)floor(height * picture->size / shorter + 0.5);
        picture->wide = width, picture->high = height;
    }
    picture->left = (width - picture->wide) / 2, picture->top = (height - picture->high) / 2;
}

/* Of component c: `rows` of `inputs` samples, `across` and `down` of them per pixel of the image. Returns 0 if there is no memory. */
static int prepare_plane(Picture *picture, int c, int inputs, int rows, double across, double down)
{
    Plane *plane = &picture->planes[c];
    int stored = c ? 2 : 1; /* pixels per stored sample */
    int columns = (picture->width + stored - 1) / stored, lines = (picture->height + stored - 1) / stored;
    /* On an odd side, the last chroma sample covers a pixel that does not exist; the first does if the plane will be mirrored. */
    double from_x = picture->left - (c && picture->mirrored_x && picture->width % 2 ? picture->wide / picture->width : 0);
    double from_y = picture->top - (c && picture->mirrored_y && picture->height % 2 ? picture->high / picture->height : 0);
    double to_x = from_x + picture->wide * columns * stored / picture->width;
    double to_y = from_y + picture->high * lines * stored / picture->height;
    if (!make_filter(&plane->across, inputs, from_x * across, to_x * across, columns)
        || !make_filter(&plane->down, rows, from_y * down, to_y * down, lines))
        return 0;
    plane->first_row = plane->down.start[0];
    plane->end_row = plane->down.start[lines - 1] + plane->down.taps[lines - 1];
    plane->first_column = plane->across.start[0];
    plane->end_column = plane->across.start[columns - 1] + plane->across.taps[columns - 1];
    for (int x = 0; x < columns; x++)
        plane->across.start[x] -= plane->first_column;
    plane->line = calloc(1, plane->end_column - plane->first_column + plane->across.stride);
    return plane->line != NULL;
}

/* Returns the result, or NULL if there is no memory. `samples`: rows `pitch` apart. Weights of zero read a row more than there are. */
static uint8_t *rescale_plane(const Plane *plane, const uint8_t *samples, size_t pitch)
{
    const Filter *down = &plane->down;
    uint8_t *out = malloc((size_t)plane->across.outputs * down->outputs);
    for (int y = 0; out && y < down->outputs; y++) {
        mix(samples + down->start[y] * pitch + plane->first_column, pitch, plane->end_column - plane->first_column, plane->line,
            down->weights + (size_t)y * down->stride, down->taps[y]);
        shrink(plane->line, out + (size_t)y * plane->across.outputs, &plane->across);
    }
    return out;
}
