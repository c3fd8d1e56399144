/* What the input pipeline does for every image where Python would be too slow: it crops, mirrors and normalises decoded images
   on the CPU (64 us for 224x224, where PyTorch's own operations take 500; docs/log.md), asks for pages ahead of time, and copies
   records into one array, checking them. */

#define _DEFAULT_SOURCE
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define BY_MACHINE __attribute__((target_clones("avx2", "default")))
#else
#define BY_MACHINE
#endif

enum { MAX_SIDE = 4096, CHANNELS = 3, PIECE = 1 << 17 };

/* A row of RGB pixels to three rows of bytes. */
static void split_row(const uint8_t *rgb, int count, uint8_t rows[CHANNELS][MAX_SIDE])
{
    for (int x = 0; x < count; x++)
        for (int channel = 0; channel < CHANNELS; channel++)
            rows[channel][x] = rgb[CHANNELS * x + channel];
}

static void reverse_row(uint8_t *row, int count)
{
    for (int left = 0, right = count - 1; left < right; left++, right--) {
        uint8_t value = row[left];
        row[left] = row[right];
        row[right] = value;
    }
}

#if defined(__x86_64__)
/* 16 pixels at a time: of three registers, each channel's bytes are picked into one. */
__attribute__((target("avx2"))) static void split_row_avx2(const uint8_t *rgb, int count, uint8_t rows[CHANNELS][MAX_SIDE])
{
    int8_t pick[CHANNELS][3][16];
    memset(pick, -1, sizeof pick);
    for (int i = 0; i < 48; i++)
        pick[i % 3][i / 16][i / 3] = (int8_t)(i % 16);
    int x = 0;
    for (; x + 16 <= count; x += 16) {
        __m128i parts[3];
        for (int part = 0; part < 3; part++)
            parts[part] = _mm_loadu_si128((const __m128i *)(rgb + 3 * x + 16 * part));
        for (int channel = 0; channel < CHANNELS; channel++) {
            __m128i row = _mm_setzero_si128();
            for (int part = 0; part < 3; part++)
                row = _mm_or_si128(row, _mm_shuffle_epi8(parts[part], _mm_loadu_si128((const __m128i *)pick[channel][part])));
            _mm_storeu_si128((__m128i *)(rows[channel] + x), row);
        }
    }
    for (; x < count; x++)
        for (int channel = 0; channel < CHANNELS; channel++)
            rows[channel][x] = rgb[CHANNELS * x + channel];
}

__attribute__((target("avx2"))) static void reverse_row_avx2(uint8_t *row, int count)
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
    reverse_row(row + left, count - 2 * left);
}
#endif

static void (*split)(const uint8_t *, int, uint8_t[CHANNELS][MAX_SIDE]) = split_row;
static void (*reverse)(uint8_t *, int) = reverse_row;

BY_MACHINE static void subtract(const uint8_t *row, int count, float mean, float scale, float *out)
{
    for (int x = 0; x < count; x++)
        out[x] = ((float)row[x] - mean) * scale;
}

BY_MACHINE static void subtract_row(const uint8_t *row, const float *means, int count, float mean, float scale, float *out)
{
    for (int x = 0; x < count; x++)
        out[x] = ((float)row[x] - (means[x] + mean)) * scale;
}

/* Of whole numbers, rounding x - mean is adding what -mean rounds to. */
BY_MACHINE static void add_offset(const uint8_t *row, int count, int16_t offset, uint8_t *out)
{
    for (int x = 0; x < count; x++) {
        int16_t value = (int16_t)(row[x] + offset);
        value = value < 0 ? 0 : value;
        out[x] = (uint8_t)(value > 255 ? 255 : value);
    }
}

typedef struct {
    int64_t address; /* of uint8 (height, width, 3) */
    int32_t height, width, top, left, mirror, unused;
} Job;

/* One image to (3, size, size), float32 or uint8. */
static void crop(const Job *job, int size, const float *mean, const float *scale, const float *mean_image, int bytes,
                 void *out)
{
    uint8_t rows[CHANNELS][MAX_SIDE];
    float means[MAX_SIDE];
    const uint8_t *pixels = (const uint8_t *)(intptr_t)job->address;
    int16_t whole[CHANNELS];
    for (int channel = 0; channel < CHANNELS; channel++) {
        float offset = mean[channel] > 255 ? -255 : mean[channel] < -255 ? 255 : -mean[channel];
        whole[channel] = (int16_t)((int)(offset + 256.5f) - 256);
    }
    for (int y = 0; y < size; y++) {
        split(pixels + ((size_t)(job->top + y) * job->width + job->left) * CHANNELS, size, rows);
        for (int channel = 0; channel < CHANNELS; channel++) {
            size_t to = ((size_t)channel * size + y) * size;
            if (job->mirror)
                reverse(rows[channel], size);
            if (bytes) {
                add_offset(rows[channel], size, whole[channel], (uint8_t *)out + to);
            } else if (mean_image) {
                const float *from = mean_image + ((size_t)channel * job->height + job->top + y) * job->width + job->left;
                for (int x = 0; x < size; x++)
                    means[x] = from[job->mirror ? size - 1 - x : x];
                subtract_row(rows[channel], means, size, mean[channel], scale[channel], (float *)out + to);
            } else {
                subtract(rows[channel], size, mean[channel], scale[channel], (float *)out + to);
            }
        }
    }
}

PyDoc_STRVAR(crop_doc,
"crop(jobs, size, means, scale, mean_image, out, bytes, begin, end)\n\n"
"Images `begin` to `end` of a batch, cropped, mirrored, minus their mean, times the scale of each channel, into `out`, a writable\n"
"array (N, 3, size, size) of float32, or with `bytes` of uint8 (rounded and clipped; no scale then). jobs: an array of records\n"
"(address int64 of uint8 (height, width, 3), height, width, top, left, mirror, unused int32); means: float32 (N, 3); scale:\n"
"float32 (3,); mean_image: float32 (3, height, width), subtracted too, or None. Releases the interpreter's lock.");

static PyObject *py_crop(PyObject *self, PyObject *args)
{
    Py_buffer jobs, means, scale, image = {0}, out;
    PyObject *mean_image;
    int size, bytes;
    Py_ssize_t begin, end;
    if (!PyArg_ParseTuple(args, "y*iy*y*Ow*pnn", &jobs, &size, &means, &scale, &mean_image, &out, &bytes, &begin, &end))
        return NULL;
    int fits = mean_image == Py_None || !PyObject_GetBuffer(mean_image, &image, PyBUF_C_CONTIGUOUS);
    Py_ssize_t count = jobs.len / (Py_ssize_t)sizeof(Job), pixels = (Py_ssize_t)CHANNELS * size * size;
    const Job *job = jobs.buf;
    if (fits) {
        fits = size > 0 && size <= MAX_SIDE && begin >= 0 && end <= count && means.len == count * 12 && scale.len == 12
            && out.len == count * pixels * (bytes ? 1 : 4);
        for (Py_ssize_t n = begin; fits && n < end; n++)
            fits = job[n].top >= 0 && job[n].left >= 0 && job[n].top + size <= job[n].height
                && job[n].left + size <= job[n].width
                && (!image.buf || image.len == (Py_ssize_t)job[n].height * job[n].width * CHANNELS * 4);
        if (!fits)
            PyErr_SetString(PyExc_ValueError, "the crops do not lie in their images, or the arrays do not fit each other");
    }
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t n = begin; n < end; n++)
            crop(job + n, size, (float *)means.buf + n * CHANNELS, scale.buf, image.buf, bytes,
                 (char *)out.buf + n * pixels * (bytes ? 1 : 4));
        Py_END_ALLOW_THREADS
    }
    Py_buffer *all[] = {&jobs, &means, &scale, &image, &out};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i]->obj)
            PyBuffer_Release(all[i]);
    return fits ? Py_NewRef(Py_None) : NULL;
}

PyDoc_STRVAR(will_need_doc,
"will_need(addresses, lengths)\n\n"
"Asks the system to read these stretches of mapped files (int64 arrays) into the page cache, and returns without waiting.");

static PyObject *py_will_need(PyObject *self, PyObject *args)
{
    Py_buffer addresses, lengths;
    if (!PyArg_ParseTuple(args, "y*y*", &addresses, &lengths))
        return NULL;
    Py_ssize_t count = addresses.len < lengths.len ? addresses.len / 8 : lengths.len / 8;
    Py_BEGIN_ALLOW_THREADS
    intptr_t page = sysconf(_SC_PAGESIZE);
    for (Py_ssize_t n = 0; n < count; n++) {
        intptr_t begin = (intptr_t)((int64_t *)addresses.buf)[n], end = begin + (intptr_t)((int64_t *)lengths.buf)[n];
        /* In pieces, for the system may cut a long stretch short (at read_ahead_kb, 128 KB on many disks). That advice fails is
           no error. */
        for (begin -= begin % page; begin < end; begin += PIECE)
            madvise((void *)begin, (size_t)(end - begin < PIECE ? end - begin : PIECE), MADV_WILLNEED);
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&addresses);
    PyBuffer_Release(&lengths);
    Py_RETURN_NONE;
}

/* A row of the index (preprocess/records.py: INDEX_DTYPE). */
typedef struct __attribute__((packed)) {
    uint32_t shard;
    uint64_t offset;
    uint32_t length, crc32c;
    int32_t label;
} Row;

enum { LANES = 3, POLYNOMIAL = (int)0x82f63b78 }; /* of CRC-32C, bits reversed (RFC 3720, B.4) */

static uint32_t table[256];

static void fill_table(void)
{
    for (uint32_t n = 0; n < 256; n++) {
        uint32_t crc = n;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? (uint32_t)POLYNOMIAL : 0);
        table[n] = crc;
    }
}

/* CRC-32C of LANES stretches at once. */
static void checksums(const uint8_t *const data[LANES], const uint32_t lengths[LANES], uint32_t crcs[LANES])
{
    for (int lane = 0; lane < LANES; lane++) {
        uint32_t crc = ~0u;
        for (uint32_t n = 0; n < lengths[lane]; n++)
            crc = crc >> 8 ^ table[(crc ^ data[lane][n]) & 255];
        crcs[lane] = ~crc;
    }
}

#if defined(__x86_64__)
/* The instruction takes 8 bytes in each cycle, but gives its result after three; so three records go side by side. */
__attribute__((target("sse4.2"))) static void checksums_sse42(const uint8_t *const data[LANES], const uint32_t lengths[LANES],
                                                              uint32_t crcs[LANES])
{
    uint64_t crc[LANES] = {~0u, ~0u, ~0u}, word[LANES];
    uint32_t shortest = lengths[0] < lengths[1] ? lengths[0] : lengths[1], at = 0;
    shortest = shortest < lengths[2] ? shortest : lengths[2];
    for (; at + 8 <= shortest; at += 8)
        for (int lane = 0; lane < LANES; lane++) {
            memcpy(&word[lane], data[lane] + at, 8);
            crc[lane] = _mm_crc32_u64(crc[lane], word[lane]);
        }
    for (int lane = 0; lane < LANES; lane++) {
        uint32_t n = at;
        for (; n + 8 <= lengths[lane]; n += 8) {
            memcpy(&word[lane], data[lane] + n, 8);
            crc[lane] = _mm_crc32_u64(crc[lane], word[lane]);
        }
        for (; n < lengths[lane]; n++)
            crc[lane] = _mm_crc32_u8((uint32_t)crc[lane], data[lane][n]);
        crcs[lane] = ~(uint32_t)crc[lane];
    }
}
#endif

static void (*check)(const uint8_t *const[LANES], const uint32_t[LANES], uint32_t[LANES]) = checksums;

PyDoc_STRVAR(gather_doc,
"gather(rows, bases, out, stride, checked, bad)\n\n"
"Copies records into `out`, a writable array of uint8 (N, stride), the rest of each row zeros. rows: those of the index (N rows of\n"
"INDEX_DTYPE); bases: int64 (shards,), where the maps of their shards begin; bad: writable uint8 (N,), 1 where `checked` and the\n"
"CRC-32C is not the row's. Releases the interpreter's lock.");

static PyObject *py_gather(PyObject *self, PyObject *args)
{
    Py_buffer rows, bases, out, bad;
    Py_ssize_t stride;
    int checked;
    if (!PyArg_ParseTuple(args, "y*y*w*npw*", &rows, &bases, &out, &stride, &checked, &bad))
        return NULL;
    const Row *row = rows.buf;
    const int64_t *base = bases.buf;
    Py_ssize_t count = rows.len / (Py_ssize_t)sizeof(Row), shards = bases.len / 8;
    int fits = bad.len == count && out.len >= count * stride;
    for (Py_ssize_t n = 0; fits && n < count; n++)
        fits = row[n].shard < shards && base[row[n].shard] && row[n].length <= stride;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t first = 0; first < count; first += LANES) {
            const uint8_t *data[LANES];
            uint32_t lengths[LANES] = {0}, crcs[LANES];
            int lanes = count - first < LANES ? (int)(count - first) : LANES;
            for (int lane = 0; lane < LANES; lane++)
                data[lane] = (uint8_t *)out.buf + (first + (lane < lanes ? lane : 0)) * stride;
            for (int lane = 0; lane < lanes; lane++) {
                const Row *from = row + first + lane;
                uint8_t *to = (uint8_t *)out.buf + (first + lane) * stride;
                memcpy(to, (const uint8_t *)(intptr_t)base[from->shard] + from->offset, from->length);
                memset(to + from->length, 0, (size_t)stride - from->length);
                lengths[lane] = from->length;
            }
            if (checked)
                check(data, lengths, crcs);
            for (int lane = 0; lane < lanes; lane++)
                ((uint8_t *)bad.buf)[first + lane] = checked && crcs[lane] != row[first + lane].crc32c;
        }
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, "the records are of shards that are not mapped, or the arrays do not fit each other");
    }
    Py_buffer *all[] = {&rows, &bases, &out, &bad};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        PyBuffer_Release(all[i]);
    return fits ? Py_NewRef(Py_None) : NULL;
}

static PyMethodDef methods[] = {
    {"crop", py_crop, METH_VARARGS, crop_doc},
    {"will_need", py_will_need, METH_VARARGS, will_need_doc},
    {"gather", py_gather, METH_VARARGS, gather_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "kernels", "Crops of decoded images, pages ahead of time, and records in one array; see kernels.c.", -1, methods,
};

PyMODINIT_FUNC PyInit_kernels(void)
{
    fill_table();
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) {
        split = split_row_avx2;
        reverse = reverse_row_avx2;
    }
    if (__builtin_cpu_supports("sse4.2"))
        check = checksums_sse42;
#endif
    return PyModule_Create(&module);
}
