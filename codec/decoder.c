/* Decodes regular JPEGs, with crop, flip and normalization, in one pass into a batch: 0.55 of the time that libjpeg-turbo takes to
   decode alone (docs/log.md). The pixels equal those of libjpeg-turbo's default (islow, fancy upsampling) to the bit.

   Regular is what `build` stores: baseline (ITU T.81), 8 bits, YCbCr 4:2:0 in one scan, without restart markers. Planes of samples,
   which is how `build` reads photos, are made of 4:4:4 and gray too. Every other image, anything damaged or beyond the range of
   8-bit pictures, and every image on a CPU without AVX2 is left undone: the caller hands it to libjpeg.c, whose verdict stands.

   Nothing in a JPEG can cause a read or write out of bounds; the reasons stand where the bounds are. */

#ifndef WITHOUT_PYTHON /* the fuzzer includes this file without it */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#endif

#include <math.h>
#include <stddef.h>
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

enum { CHANNELS = 3, MAX_SIDE = 65535 /* of 16 bits */, SIDE_ROOM = MAX_SIDE + 1 + 64, LIBJPEG_SIDE = 65500 /* its limit */ };

static int clamp(int value, int low, int high)
{
    return value < low ? low : value > high ? high : value;
}

static int available; /* whether this CPU has AVX2 and all else that the decoder needs */

#include "header.h"
#include "output.h"
#include "resize.h"
#include "crop.h"

#if defined(__x86_64__)
#include "huffman.h"
#include "idct.h"

/* ---- Images: from rows of MCUs to lines of RGB ---- */

enum {
    MARGIN = 64,    /* bytes before the first line of samples and behind each, which vectors may read */
    LUMA_RING = 32, /* lines: two rows of MCUs, because the last of one are needed with the next */
    CHROMA_RING = 16,
};

typedef struct {
    Lane lane;
    Job *jobs; /* of this image */
    int64_t job_count;
    Job box; /* what they need of it */
    int height, width;
    int mcu_height, mcu_rows, mcu_row; /* the last one counts */
    int row_blocks, room_blocks; /* of a row of MCUs; and of all columns, of 16 pixels each, whose last one may be in part */
    /* The rows of MCUs, and the columns, that the box needs. */
    int first_row, last_row, first_luma_column, last_luma_column, first_chroma_column, last_chroma_column;
    int lines_written; /* of the box */
    int over;       /* a product has reached MAX_PRODUCT */
    uint8_t *bytes; /* the entropy-coded data, unstuffed */
    size_t room;    /* for it */
    int columns;    /* for which the following have room */
    int16_t *coefficients; /* of a row of MCUs, and 64 more: see `look` */
    uint8_t *reach, *luma, *chroma[2];
    struct {
        uint8_t *start;
        size_t pitch;
        int mask; /* line y lies at place y & mask */
    } planes[CHANNELS];
    Crops crops;
} Image;

typedef struct Workspace {
    struct Workspace *next;
    Tables tables[3]; /* both images share one if they can: with a copy each, the first-level cache thrashes */
    unsigned tables_made;
    Image images[2];
    Lines lines;
    int16_t chroma_lines[2][SIDE_ROOM / 2];
} Workspace;

static void *renew(void *old, size_t bytes)
{
    free(old);
    return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

/* Makes room for images of so many columns of 16 pixels; returns 0 if there is no memory. */
static int reserve(Image *image, int columns)
{
    size_t blocks = (size_t)columns * CYCLE, chroma = MARGIN + CHROMA_RING * ((size_t)columns * 8 + MARGIN);
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

INLINE uint8_t *sample_line(Image *image, int c, int y)
{
    return image->planes[c].start + (size_t)(y & image->planes[c].mask) * image->planes[c].pitch;
}

/* The blocks `first` and `second` of the row to lines of planes c and d, from line y on */
INLINE AVX2 void transform_pair(Image *image, int first, int second, int c, int d, int y, int x, int second_x)
{
    const Quantizer *quantizers = image->lane.tables->quantizers;
    const int16_t *coefficients = image->coefficients;
    Pair pair = {{coefficients + 64 * first, coefficients + 64 * second}, {&quantizers[c], &quantizers[d]}};
    int most = image->reach[first] > image->reach[second] ? image->reach[first] : image->reach[second];
    uint8_t *to = sample_line(image, c, y) + x, *second_to = sample_line(image, d, y) + second_x;
    image->over |= decode_pair(&pair, most, to, second_to, image->planes[c].pitch);
}

AVX2 static void transform_row(Image *image)
{
    const Job *job = &image->box;
    int top = image->mcu_height * image->mcu_row, bottom = job->top + job->height, components = image->lane.tables->components;
    if (image->lane.tables->chroma != 2) { /* a block of each component, of two MCUs at a time */
        for (int column = image->first_luma_column; column <= image->last_luma_column; column++)
            for (int c = 0; c < components; c++) {
                int first = column * 2 * components + c;
                transform_pair(image, first, first + components, c, c, top, 16 * column, 16 * column + 8);
            }
        return;
    }
    for (int column = image->first_luma_column; column <= image->last_luma_column; column++)
        for (int half = 0; half < 2; half++) {
            int first = column * CYCLE + 2 * half, y = top + 8 * half;
            if (y < bottom && y + 8 > job->top)
                transform_pair(image, first, first + 1, 0, 0, y, 16 * column, 16 * column + 8);
        }
    for (int column = image->first_chroma_column; column <= image->last_chroma_column; column++)
        transform_pair(image, column * CYCLE + 4, column * CYCLE + 5, 1, 2, top / 2, 8 * column, 8 * column);
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

/* Line y of the image, from the pair of columns of the box's first pixel to that of its last. */
AVX2 static void rgb_line(Workspace *workspace, Image *image, int y, uint8_t rows[CHANNELS][SIDE_ROOM])
{
    const Job *job = &image->box;
    int first = job->left / 2, last = (job->left + job->width - 1) / 2, count = last - first + 1;
    int near = y / 2, far = clamp(y % 2 ? near + 1 : near - 1, 0, (image->height + 1) / 2 - 1);
    for (int c = 0; c < 2; c++) {
        int16_t *mixed = workspace->chroma_lines[c];
        mix_lines(sample_line(image, c + 1, near) + first - 1, sample_line(image, c + 1, far) + first - 1, count + 2, mixed);
        if (first == 0)
            mixed[0] = mixed[1];
        if (last == (image->width + 1) / 2 - 1)
            mixed[count + 1] = mixed[count];
    }
    const uint8_t *luma = sample_line(image, 0, y) + 2 * first;
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
            _mm256_storeu_si256((__m256i *)(rows[c] + 2 * x), _mm256_or_si256(e, _mm256_slli_epi16(o, 8)));
        }
    }
}

/* ---- Batches ---- */

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
    memset(image->coefficients, 0, (size_t)image->room_blocks * 64 * sizeof *image->coefficients);
    image->lane.reader.last = (uintptr_t)&image->coefficients[63];
    image->lane.reach = image->reach;
    image->lane.blocks_left = image->row_blocks;
    image->lane.block = 0;
}

/* Where samples go: to rings of lines, or to the whole planes of the output. */
static void place_planes(Image *image, int columns, Type type)
{
    uint8_t *rings[CHANNELS] = {image->luma, image->chroma[0], image->chroma[1]};
    for (int c = 0; c < CHANNELS; c++) {
        size_t pitch = (size_t)columns * (c ? 8 : 16) + MARGIN;
        image->planes[c].start = rings[c] + MARGIN, image->planes[c].pitch = pitch;
        image->planes[c].mask = (c ? CHROMA_RING : LUMA_RING) - 1;
        if (type != PLANES)
            continue;
        image->planes[c].start = (uint8_t *)(intptr_t)image->box.out + c * plane_bytes(&image->box);
        image->planes[c].pitch = (size_t)columns * 16, image->planes[c].mask = -1;
    }
}

/* What the box needs. */
static void place_crop(Image *image)
{
    const Job *job = &image->box;
    int bottom = job->top + job->height - 1, right = job->left + job->width - 1;
    image->first_row = job->top / image->mcu_height, image->last_row = bottom / image->mcu_height;
    image->first_luma_column = job->left / 16, image->last_luma_column = right / 16;
    if (image->lane.tables->chroma != 2)
        return;
    /* A pixel takes the chroma of the samples beside its own too. */
    int last_chroma_line = (image->height + 1) / 2 - 1, last_chroma = (image->width + 1) / 2 - 1;
    image->first_row = clamp(job->top / 2 - 1, 0, last_chroma_line) / 8;
    image->last_row = clamp(bottom / 2 + bottom % 2, 0, last_chroma_line) / 8; /* never above that of the last line's luma */
    image->first_chroma_column = clamp(job->left / 2 - 1, 0, last_chroma) / 8;
    image->last_chroma_column = clamp(right / 2 + 1, 0, last_chroma) / 8;
}

/* Returns 0 where the image is not regular. */
static int begin_image(Workspace *workspace, Image *image, const Tables *used, Job *jobs, int64_t count, Type type)
{
    const Job *job = &image->box;
    image->box = surround(jobs, count);
    const uint8_t *data = (const uint8_t *)(intptr_t)job->data;
    const Tables *tables = find_tables(workspace, used, data, job->length);
    if (!tables || (tables->chroma != 2 && type != PLANES))
        return 0;
    const uint8_t *size = data + tables->size_at;
    int height = size[0] << 8 | size[1], width = size[2] << 8 | size[3], columns = (width + 15) / 16;
    /* A height of 0 stands behind the scan (T.81 B.2.5). Below 5 columns libjpeg-turbo does not interpolate chroma. */
    if (height != job->image_height || width != job->image_width || height < 1 || width < 5 || height > LIBJPEG_SIDE
        || width > LIBJPEG_SIDE || !reserve(image, columns))
        return 0;
    size_t room = (size_t)(job->length - tables->header_length) + PADDING + 32;
    if (room > image->room) {
        free(image->bytes);
        image->bytes = malloc(room);
        image->room = image->bytes ? room : 0;
    }
    const uint8_t *end = image->bytes ? unstuff(data + tables->header_length, data + job->length, image->bytes) : NULL;
    if (!end || !begin_crops(&image->crops, jobs, count))
        return 0;
    image->lane = (Lane){.reader = {.in = image->bytes}, .end = end, .tables = tables};
    image->jobs = jobs, image->job_count = count;
    image->height = height, image->width = width;
    image->mcu_height = tables->chroma == 2 ? 16 : 8;
    image->mcu_rows = (height + image->mcu_height - 1) / image->mcu_height, image->mcu_row = 0;
    image->room_blocks = columns * (tables->chroma == 2 ? CYCLE : 2 * tables->components);
    image->row_blocks = tables->chroma == 2 ? image->room_blocks : (width + 7) / 8 * tables->components;
    memset(image->reach + image->row_blocks, 0, image->room_blocks - image->row_blocks);
    image->lines_written = image->over = 0;
    place_planes(image, columns, type);
    place_crop(image);
    begin_row(image);
    return 1;
}

static void keep_line(const Image *image, uint8_t line[CHANNELS][SIDE_ROOM], int y)
{
    const uint8_t *rows[CHANNELS] = {line[0], line[1], line[2]};
    for (const Job *job = image->jobs; job < image->jobs + image->job_count; job++)
        if (job->keep)
            interleave(rows, image->width, (uint8_t *)(intptr_t)job->keep + (size_t)y * image->width * CHANNELS);
}

/* Returns 1 while the image has more rows to decode. */
static int end_row(Workspace *workspace, Image *image, const Format *format, int to_end)
{
    const Lane *lane = &image->lane;
    const Job *job = &image->box;
    int row = image->mcu_row, final = row == image->mcu_rows - 1;
    int64_t bits_left = (lane->end - lane->reader.in) * 8 + (lane->reader.bits & 63);
    if (lane->failed || bits_left < 0 || (final && bits_left > 7)) /* libjpeg warns of bytes left or missing */
        return 0;
    if (row >= image->first_row && row <= image->last_row) {
        transform_row(image);
        /* The last line of the row takes chroma of the next. */
        int end = row == image->last_row ? job->height : clamp(16 * row + 15 - job->top, 0, job->height);
        int step = image->job_count > 1 ? LINES : 1;
        while (format->type != PLANES && image->lines_written < end) {
            int first = job->top + image->lines_written, behind = clamp(first + step, first, job->top + end);
            for (int y = first; y < behind; y++) {
                rgb_line(workspace, image, y, workspace->lines.rows[y - first]);
                keep_line(image, workspace->lines.rows[y - first], y);
            }
            take_lines(&image->crops, &workspace->lines, image->jobs, image->job_count, format, first, behind,
                       job->left / 2 * 2);
            image->lines_written = behind - job->top;
        }
    }
    if (row >= image->last_row && (final || !to_end)) {
        for (Job *done = image->jobs; done < image->jobs + image->job_count; done++)
            done->done = image->over ? 0 : format->type == PLANES ? 1 + lane->tables->chroma : 1;
        return 0;
    }
    image->mcu_row++;
    begin_row(image);
    return 1;
}

AVX2 static void decode_jobs(Workspace *workspace, Job *next, Job *end, const Format *format, int to_end)
{
    Image *active[2] = {&workspace->images[0], &workspace->images[1]};
    for (int images = 0;;) {
        while (images < 2 && next < end) {
            int64_t count = format->type == PLANES ? 1 : same_image(next, end);
            const Tables *used = images ? active[0]->lane.tables : NULL;
            images += begin_image(workspace, active[images], used, next, count, format->type);
            next += count;
        }
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
    split = split_avx2;
    resize_across = across_avx2;
    resize_down = down_avx2;
    recolor = recolor_avx2;
    add_bytes = add_bytes_avx2;
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
        memcpy(call->format.scale, call->scale.buf, CHANNELS * sizeof *call->format.scale);
        call->format.mean_image = call->mean_image.buf;
        call->begin = (Job *)call->jobs.buf + begin, call->end = (Job *)call->jobs.buf + end;
    }
    for (const Job *job = call->begin; fits && job < call->end; job++)
        fits = job->length >= 0 && job->top >= 0 && job->left >= 0 && job->height > 0 && job->width > 0 && job->image_width <= MAX_SIDE
            && job->height <= job->image_height - job->top && job->width <= job->image_width - job->left
            && job->size >= 0 && job->size <= MAX_SIDE && !(job->size && call->mean_image.buf)
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

PyDoc_STRVAR(locate_doc,
"locate(jobs, buffers, /)\n--\n\n"
"Sets data and length of each job to those of a buffer, which must live as long as the jobs are used. NumPy takes 12 us for each.");

static PyObject *py_locate(PyObject *self, PyObject *args)
{
    Py_buffer jobs, bytes;
    PyObject *buffers, *found = NULL;
    if (!PyArg_ParseTuple(args, "w*O", &jobs, &buffers))
        return NULL;
    Py_ssize_t count = jobs.len / (Py_ssize_t)sizeof(Job), n = 0;
    while (n < count && (found = PySequence_GetItem(buffers, n)) && !PyObject_GetBuffer(found, &bytes, PyBUF_SIMPLE)) {
        ((Job *)jobs.buf)[n].data = (intptr_t)bytes.buf;
        ((Job *)jobs.buf)[n++].length = bytes.len <= INT32_MAX ? (int32_t)bytes.len : 0;
        PyBuffer_Release(&bytes);
        Py_CLEAR(found);
    }
    Py_XDECREF(found);
    PyBuffer_Release(&jobs);
    return n == count ? Py_NewRef(Py_None) : NULL;
}

PyDoc_STRVAR(decode_doc,
"decode(jobs, scale, mean_image, type, channels_last, to_end, begin, end, /)\n--\n\n"
"Decodes JPEGs of jobs `begin` to `end`, and writes their crops: mirrored left to right if the job says so, minus mean and mean\n"
"image, times scale. jobs: a writable array of JOB (imagefeed.codec.decode). scale: float32 (3,). mean_image: float32 (3,\n"
"image_height, image_width) or None. type: 'float32', 'bfloat16', 'float16' or 'uint8', of which uint8 is rounded and clipped and\n"
"takes neither scale nor mean image. channels_last: (height, width, 3) instead of (3, height, width).\n\n"
"Jobs that follow each other with the same JPEG are decoded once, whole if one of them is to `keep` it.\n\n"
"Sets `done` of each job: 0 where the JPEG is not regular or is damaged; its crop may then be written in part. What follows the\n"
"crop's last row is looked at only with `to_end`. Releases the GIL; several threads may work on parts of one array.");

#if defined(__x86_64__)
static Workspace *workspaces; /* not in use; guarded by the GIL */

/* Returns 0 if there is no memory. */
static int decode_call(const Call *call)
{
    Workspace *workspace = workspaces;
    if (workspace)
        workspaces = workspace->next;
    else if ((workspace = aligned_alloc(64, (sizeof *workspace + 63) / 64 * 64)))
        memset(workspace, 0, offsetof(Workspace, lines)); /* the rest is written before it is read */
    else
        return 0;
    if (available) {
        Py_BEGIN_ALLOW_THREADS
        decode_jobs(workspace, call->begin, call->end, &call->format, call->to_end);
        Py_END_ALLOW_THREADS
    }
    workspace->next = workspaces;
    workspaces = workspace;
    return 1;
}
#else
static int decode_call(const Call *call)
{
    return 1; /* every job stays undone */
}
#endif

static PyObject *py_decode(PyObject *self, PyObject *args)
{
    Call call = {0};
    if (!begin_call(args, &call))
        return NULL;
    for (Job *job = call.begin; job < call.end; job++)
        job->done = 0;
    int enough = decode_call(&call);
    end_call(&call);
    return enough ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

PyDoc_STRVAR(samples_doc,
"samples(jpegs, below, square, /)\n--\n\n"
"Decodes JPEGs to samples, without upsampling. Returns, for each of the sequence, (samples, height, width, chroma) or None: where\n"
"its shorter side is not below `below`, or it is not regular, or damaged. samples, bytes: planes of Y, Cb and Cr one behind the\n"
"other, with sides rounded up to 16, and a row more. A sample of chroma stands for `chroma` x `chroma` pixels: 2 in 4:2:0, 1 in\n"
"4:4:4, 0 in gray, which has none. With `square` only those of the center square and 16 pixels on each side of it are set.");

enum { AROUND = 16 }; /* bicubic rescaling by less than 2 reaches 8 pixels for chroma */

/* Sets what a job needs, and makes room for its samples. Returns NULL with a Python exception if there is no memory. */
static PyObject *prepare_samples(Job *job, const Py_buffer *jpeg, int below, int square)
{
    job->data = (intptr_t)jpeg->buf, job->length = jpeg->len > INT32_MAX ? 0 : (int32_t)jpeg->len;
    find_size(jpeg->buf, job->length, &job->image_height, &job->image_width);
    int shorter = job->image_height < job->image_width ? job->image_height : job->image_width;
    if (shorter >= below)
        job->length = job->image_height = job->image_width = shorter = 0;
    int down = square ? (job->image_height - shorter) / 2 - AROUND : 0, right = square ? (job->image_width - shorter) / 2 - AROUND : 0;
    job->top = down > 0 ? down : 0, job->left = right > 0 ? right : 0;
    job->height = job->image_height - 2 * job->top, job->width = job->image_width - 2 * job->left;
    size_t row = ((size_t)job->image_width + 15) / 16 * 16;
    PyObject *samples = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(CHANNELS * plane_bytes(job) + row));
    job->out = samples ? (intptr_t)PyBytes_AsString(samples) : 0;
    return samples;
}

static PyObject *py_samples(PyObject *self, PyObject *args)
{
    PyObject *sequence, *result = NULL;
    int below, square;
    if (!PyArg_ParseTuple(args, "Oip", &sequence, &below, &square))
        return NULL;
    Py_ssize_t count = PySequence_Size(sequence), made = 0;
    Py_buffer *jpegs = PyMem_Calloc(count > 0 ? count : 1, sizeof *jpegs);
    Job *jobs = PyMem_Calloc(count > 0 ? count : 1, sizeof *jobs);
    PyObject *samples = count < 0 ? NULL : PyList_New(count);
    if (!jpegs || !jobs)
        PyErr_NoMemory();
    for (; jpegs && jobs && samples && made < count; made++) {
        PyObject *jpeg = PySequence_GetItem(sequence, made), *room = NULL;
        int given = jpeg && !PyObject_GetBuffer(jpeg, &jpegs[made], PyBUF_SIMPLE);
        Py_XDECREF(jpeg);
        if (given && !(room = prepare_samples(&jobs[made], &jpegs[made], below, square)))
            PyBuffer_Release(&jpegs[made]);
        if (!room)
            break;
        PyList_SetItem(samples, made, room);
    }
    Call call = {.begin = jobs, .end = jobs + made, .format = {.type = PLANES}, .to_end = 1};
    if (jpegs && jobs && samples && made == count) {
        if (decode_call(&call))
            result = samples;
        else
            PyErr_NoMemory();
    }
    for (Py_ssize_t n = 0; n < made; n++) {
        const Job *job = &jobs[n];
        PyBuffer_Release(&jpegs[n]);
        PyObject *found = !result ? NULL : job->done ? Py_BuildValue("Oiii", PyList_GetItem(samples, n), job->image_height,
                                                                     job->image_width, job->done - 1) : Py_NewRef(Py_None);
        if (!result || !found || PyList_SetItem(samples, n, found))
            result = NULL;
    }
    PyMem_Free(jpegs);
    PyMem_Free(jobs);
    if (!result)
        Py_XDECREF(samples);
    return result;
}

PyDoc_STRVAR(convert_doc,
"convert(jobs, scale, mean_image, type, channels_last, to_end, begin, end, /)\n--\n\n"
"As `decode`, from decoded pixels: the `data` of a job is the address of uint8 (image_height, image_width, 3).");

static PyObject *py_convert(PyObject *self, PyObject *args)
{
    Call call = {0};
    if (!begin_call(args, &call))
        return NULL;
    Lines *lines = malloc(sizeof *lines);
    Crops crops = {0};
    int enough = lines != NULL;
    if (lines) {
        Py_BEGIN_ALLOW_THREADS
        int64_t count;
        for (Job *jobs = call.begin; jobs < call.end && enough; jobs += count) {
            count = same_image(jobs, call.end);
            enough = convert_image(&crops, lines, jobs, count, &call.format);
            for (int64_t n = 0; n < count; n++)
                jobs[n].done = enough;
        }
#if defined(__x86_64__)
        _mm_sfence();
#endif
        Py_END_ALLOW_THREADS
    }
    free_crops(&crops);
    free(lines);
    end_call(&call);
    return enough ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

static PyMethodDef methods[] = {
    {"sizes", py_sizes, METH_VARARGS, sizes_doc},
    {"locate", py_locate, METH_VARARGS, locate_doc},
    {"decode", py_decode, METH_VARARGS, decode_doc},
    {"samples", py_samples, METH_VARARGS, samples_doc},
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
