/* Part of decoder.c: lines of RGB to the type and layout of a batch, mirrored and normalized. */

typedef struct {
    int64_t data; /* address of the JPEG; for `convert`, of uint8 (image_height, image_width, 3) */
    int64_t out;  /* address of the crop's first value */
    int32_t length; /* of the JPEG, in bytes */
    int32_t image_height, image_width; /* as `sizes` finds them */
    int32_t top, left, height, width, mirror; /* of the crop */
    float mean[CHANNELS];
    int32_t done; /* directly behind `mean`, which is read as four floats; of PLANES 1 + chroma, as in Tables */
    int32_t size; /* if not 0, the crop is resized to (size, size) */
    int32_t recolor; /* whether pixels p become colors[0] p + colors[1] m, and m is the mean pixel of the crop */
    float colors[2][CHANNELS][CHANNELS];
    int64_t keep; /* if not 0, address to which `decode` writes the whole image too, uint8 (image_height, image_width, 3) */
} Job;

typedef enum { FLOAT32, BFLOAT16, FLOAT16, BYTES, PLANES } Type;

typedef struct {
    Type type;
    int channels_last;
    float scale[CHANNELS + 1]; /* of which the last is not used */
    const float *mean_image; /* (3, height, width) of the image, or NULL */
} Format;

/* Lines of an image, on their way to the output. Each array is a multiple of 64 bytes and has room for a vector more. */
enum { LINES = 17 }; /* of a row of MCUs, and the last one of the row before */

typedef struct {
    uint8_t rows[LINES][CHANNELS][SIDE_ROOM] __attribute__((aligned(64)));
    uint8_t made[CHANNELS][SIDE_ROOM] __attribute__((aligned(64))); /* resized, or of other colors */
    uint8_t changed[CHANNELS][SIDE_ROOM] __attribute__((aligned(64)));
    uint8_t mixed[CHANNELS * SIDE_ROOM];
    float means[CHANNELS * SIDE_ROOM];
} Lines;

/* Of a plane of samples, whose sides are whole MCUs. */
static size_t plane_bytes(const Job *job)
{
    return (size_t)((job->image_height + 15) / 16 * 16) * (size_t)((job->image_width + 15) / 16 * 16);
}

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

/* How pixels become floats: (pixel - mean) * scale. */
typedef struct {
    const float *mean, *scale; /* of one channel; or where `mixed`, of three in turn, with room for a fourth */
    const float *means;        /* one for each value, instead of `mean`; or NULL */
    int mixed;
    Type type;
} Map;

static void write_floats_plain(const uint8_t *from, int begin, int end, const Map *map, void *out)
{
    for (int x = begin; x < end; x++) {
        int c = map->mixed ? x % CHANNELS : 0;
        float value = ((float)from[x] - (map->means ? map->means[x] : map->mean[c])) * map->scale[c];
        if (map->type == FLOAT32)
            ((float *)out)[x] = value;
        else
            ((uint16_t *)out)[x] = map->type == FLOAT16 ? to_float16(value) : to_bfloat16(value);
    }
}

static void reverse_plain(const uint8_t *from, int count, uint8_t *out)
{
    for (int x = 0; x < count; x++)
        out[count - 1 - x] = from[x];
}

static void interleave_plain(const uint8_t *const rows[CHANNELS], int count, uint8_t *out)
{
    for (int x = 0; x < count; x++)
        for (int c = 0; c < CHANNELS; c++)
            out[CHANNELS * x + c] = rows[c][x];
}

static void split_plain(const uint8_t *from, int count, uint8_t *const rows[CHANNELS])
{
    for (int x = 0; x < count; x++)
        for (int c = 0; c < CHANNELS; c++)
            rows[c][x] = from[CHANNELS * x + c];
}

#if defined(__x86_64__)
/* Which pixel of 16 gives each byte of three vectors, by channel; 0x80 where another channel does. And which byte of each of the
   three gives each pixel of a channel; 0x80 where another vector does. */
static uint8_t places[3][CHANNELS][16], sources[3][CHANNELS][16];

static void fill_places(void)
{
    memset(sources, 0x80, sizeof sources);
    for (int n = 0; n < 48; n++) {
        for (int c = 0; c < CHANNELS; c++)
            places[n / 16][c][n % 16] = n % CHANNELS == c ? (uint8_t)(n / CHANNELS) : 0x80;
        sources[n / 16][n % CHANNELS][n / CHANNELS] = (uint8_t)(n % 16);
    }
}

/* Streaming stores go around the cache, in which a batch would not stay anyway: ordinary ones took longer by 0.09 of the time of
   libjpeg-turbo's decoding (docs/log.md). */
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

/* Three eights of one value, or of three values in turn. Made anew for each line, but not in memory: writing and reading arrays of
   24 took longer. */
INLINE AVX2 void spread(const float *values, int mixed, __m256 eights[3])
{
    if (!mixed) {
        eights[0] = eights[1] = eights[2] = _mm256_broadcast_ss(values);
        return;
    }
    __m256 three = _mm256_castps128_ps256(_mm_loadu_ps(values));
    eights[0] = _mm256_permutevar8x32_ps(three, _mm256_setr_epi32(0, 1, 2, 0, 1, 2, 0, 1));
    eights[1] = _mm256_permutevar8x32_ps(three, _mm256_setr_epi32(2, 0, 1, 2, 0, 1, 2, 0));
    eights[2] = _mm256_permutevar8x32_ps(three, _mm256_setr_epi32(1, 2, 0, 1, 2, 0, 1, 2));
}

INLINE AVX2 void write_floats_as(const uint8_t *from, int begin, int end, const Map *map, Type type, int own_means, int stream,
                                 void *out)
{
    __m256 mean[3], scale[3];
    spread(map->scale, map->mixed, scale);
    if (!own_means)
        spread(map->mean, map->mixed, mean);
    int x = begin;
    for (; x + 24 <= end; x += 24)
#pragma GCC unroll 3
        for (int n = 0; n < 3; n++) {
            __m256i whole = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(from + x + 8 * n)));
            __m256 less = _mm256_sub_ps(_mm256_cvtepi32_ps(whole), own_means ? _mm256_loadu_ps(map->means + x + 8 * n) : mean[n]);
            write_eight(_mm256_mul_ps(less, scale[n]), type, stream, out, x + 8 * n);
        }
    for (int n = 0; x + 8 <= end; x += 8, n++) {
        __m256i whole = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(from + x)));
        __m256 less = _mm256_sub_ps(_mm256_cvtepi32_ps(whole), own_means ? _mm256_loadu_ps(map->means + x) : mean[n]);
        write_eight(_mm256_mul_ps(less, scale[n]), type, stream, out, x);
    }
    _mm256_zeroupper(); /* gcc 12 forgets it here, and then SSE code after it takes twice the time */
    write_floats_plain(from, x, end, map, out);
}

AVX2 static void write_floats_avx2(const uint8_t *from, int begin, int end, const Map *map, void *out)
{
    int stream = (uintptr_t)out % (8 * value_bytes(map->type)) == 0;
#define WRITE_AS(type)                                                                         \
    if (stream && map->means)                                                                  \
        write_floats_as(from, begin, end, map, type, 1, 1, out);                               \
    else if (stream)                                                                           \
        write_floats_as(from, begin, end, map, type, 0, 1, out);                               \
    else if (map->means)                                                                       \
        write_floats_as(from, begin, end, map, type, 1, 0, out);                               \
    else                                                                                       \
        write_floats_as(from, begin, end, map, type, 0, 0, out);
    if (map->type == FLOAT32) {
        WRITE_AS(FLOAT32)
    } else if (map->type == FLOAT16) {
        WRITE_AS(FLOAT16)
    } else {
        WRITE_AS(BFLOAT16)
    }
}

AVX2 static void reverse_avx2(const uint8_t *from, int count, uint8_t *out)
{
    const __m128i backwards = _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m256i both = _mm256_broadcastsi128_si256(backwards);
    int x = 0;
    for (; x + 32 <= count; x += 32) {
        __m256i values = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)(from + count - 32 - x)), both);
        _mm256_storeu_si256((__m256i *)(out + x), _mm256_permute4x64_epi64(values, 0x4e));
    }
    for (; x + 16 <= count; x += 16) {
        __m128i values = _mm_loadu_si128((const __m128i *)(from + count - 16 - x));
        _mm_storeu_si128((__m128i *)(out + x), _mm_shuffle_epi8(values, backwards));
    }
    reverse_plain(from, count - x, out + x);
}

AVX2 static void interleave_avx2(const uint8_t *const rows[CHANNELS], int count, uint8_t *out)
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
    interleave_plain((const uint8_t *[]){rows[0] + x, rows[1] + x, rows[2] + x}, count - x, out + CHANNELS * x);
}

AVX2 static void split_avx2(const uint8_t *from, int count, uint8_t *const rows[CHANNELS])
{
    __m128i source[3][CHANNELS];
    memcpy(source, sources, sizeof source);
    int x = 0;
    for (; x + 16 <= count; x += 16) {
        const __m128i *pixels = (const __m128i *)(from + CHANNELS * x);
        __m128i first = _mm_loadu_si128(pixels), second = _mm_loadu_si128(pixels + 1), third = _mm_loadu_si128(pixels + 2);
        for (int c = 0; c < CHANNELS; c++) {
            __m128i both = _mm_or_si128(_mm_shuffle_epi8(first, source[0][c]), _mm_shuffle_epi8(second, source[1][c]));
            _mm_storeu_si128((__m128i *)(rows[c] + x), _mm_or_si128(both, _mm_shuffle_epi8(third, source[2][c])));
        }
    }
    split_plain(from + CHANNELS * x, count - x, (uint8_t *[]){rows[0] + x, rows[1] + x, rows[2] + x});
}
#endif

static void (*write_floats)(const uint8_t *, int, int, const Map *, void *) = write_floats_plain;
static void (*reverse)(const uint8_t *, int, uint8_t *) = reverse_plain;
static void (*interleave)(const uint8_t *const[CHANNELS], int, uint8_t *) = interleave_plain;
static void (*split)(const uint8_t *, int, uint8_t *const[CHANNELS]) = split_plain;

/* For bytes, a mean is rounded; a pixel is whole, so rounding their difference would be the same. */
static int16_t rounded_offset(float mean)
{
    float clipped = mean > 255 ? -255 : mean < -255 ? 255 : -mean;
    return (int16_t)((int)(clipped + 256.5f) - 256);
}

static void add_offset(const uint8_t *from, int count, int16_t offset, uint8_t *out)
{
    for (int x = 0; x < count; x++) {
        int16_t value = (int16_t)(from[x] + offset);
        value = value < 0 ? 0 : value;
        out[x] = (uint8_t)(value > 255 ? 255 : value);
    }
}

INLINE void add_mean(const float *from, int count, int mirror, int step, float mean, float *means)
{
    for (int x = 0; x < count; x++)
        means[step * x] = from[mirror ? count - 1 - x : x] + mean;
}

/* The mean image under line y of the crop, plus the mean of the job; `step` floats from pixel to pixel. */
static void find_means(const Job *job, const float *image, int c, int y, int step, float *means)
{
    const float *from = image + ((size_t)c * job->image_height + job->top + y) * job->image_width + job->left;
    for (int x = 0; x < job->width; x += 16) /* the next line, which is in no near cache: 0.74 of libjpeg-turbo's time, not 0.85 */
        __builtin_prefetch(from + job->image_width + x);
    if (step == 1 && job->mirror) /* with constants these loops become vectors */
        add_mean(from, job->width, 1, 1, job->mean[c], means);
    else if (step == 1)
        add_mean(from, job->width, 0, 1, job->mean[c], means);
    else
        add_mean(from, job->width, job->mirror, step, job->mean[c], means);
}

/* Line y of the crop. */
static void write_line(Lines *lines, const uint8_t *const pixels[CHANNELS], const Job *job, const Format *format, int y)
{
    Type type = format->type;
    int width = job->width, mixed = format->channels_last, count = mixed ? CHANNELS * width : width;
    const uint8_t *rows[CHANNELS];
    for (int c = 0; c < CHANNELS; c++) {
        int16_t offset = type == BYTES ? rounded_offset(job->mean[c]) : 0;
        rows[c] = pixels[c];
        if (job->mirror)
            reverse(rows[c], width, lines->changed[c]);
        if (job->mirror)
            rows[c] = lines->changed[c];
        if (offset)
            add_offset(rows[c], width, offset, lines->changed[c]);
        if (offset)
            rows[c] = lines->changed[c];
    }
    for (int group = 0; group < (mixed ? 1 : CHANNELS); group++) { /* a channel, or all three interleaved */
        size_t lines_before = mixed ? (size_t)y : (size_t)group * job->height + y;
        uint8_t *out = (uint8_t *)(intptr_t)job->out + lines_before * count * value_bytes(type);
        if (mixed)
            interleave(rows, width, type == BYTES ? out : lines->mixed);
        else if (type == BYTES)
            memcpy(out, rows[group], width);
        if (type == BYTES)
            continue;
        Map map = {job->mean + group, format->scale + group, format->mean_image ? lines->means : NULL, mixed, type};
        for (int c = 0; format->mean_image && c < CHANNELS; c++)
            if (mixed || c == group)
                find_means(job, format->mean_image, c, y, mixed ? CHANNELS : 1, lines->means + (mixed ? c : 0));
        write_floats(mixed ? lines->mixed : rows[group], 0, count, &map, out);
    }
}
