/* Crops, flips and normalizes decoded images on the CPU: 64 us for 224x224, where PyTorch's own operations take 500 (docs/log.md). */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "pixels.h"

/* Splits a row of RGB pixels into three rows of bytes. */
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
/* 16 pixels at a time: shuffles gather each channel's bytes from three registers into one. */
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

BY_MACHINE static void subtract_row(const uint8_t *row, const float *means, int count, float mean, float scale, float *out)
{
    for (int x = 0; x < count; x++)
        out[x] = ((float)row[x] - (means[x] + mean)) * scale;
}

typedef struct {
    int64_t address; /* of uint8 (height, width, 3) */
    int32_t height, width, top, left, mirror, unused;
} Job;

/* One image to (3, size, size), float32 or uint8. */
static void crop(const Job *job, int size, const float *mean, const float *scale, const float *mean_image, int bytes, void *out)
{
    uint8_t rows[CHANNELS][MAX_SIDE];
    float means[MAX_SIDE];
    const uint8_t *pixels = (const uint8_t *)(intptr_t)job->address;
    int16_t whole[CHANNELS];
    for (int channel = 0; channel < CHANNELS; channel++)
        whole[channel] = rounded_offset(mean[channel]);
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
    Py_buffer jobs, means, scale, image, out;
    int size, bytes;
    Py_ssize_t begin, end;
    if (!PyArg_ParseTuple(args, "y*iy*y*z*w*pnn", &jobs, &size, &means, &scale, &image, &out, &bytes, &begin, &end))
        return NULL;
    Py_ssize_t count = jobs.len / (Py_ssize_t)sizeof(Job), pixels = (Py_ssize_t)CHANNELS * size * size;
    const Job *job = jobs.buf;
    int fits = size > 0 && size <= MAX_SIDE && begin >= 0 && end <= count && means.len == count * 12 && scale.len == 12
        && out.len == count * pixels * (bytes ? 1 : 4);
    for (Py_ssize_t n = begin; fits && n < end; n++)
        fits = job[n].top >= 0 && job[n].left >= 0 && job[n].top + size <= job[n].height && job[n].left + size <= job[n].width
            && (!image.buf || image.len == (Py_ssize_t)job[n].height * job[n].width * CHANNELS * 4);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "the crops do not lie in their images, or the arrays do not fit each other");
    } else {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t n = begin; n < end; n++)
            crop(job + n, size, (float *)means.buf + n * CHANNELS, scale.buf, image.buf, bytes,
                 (char *)out.buf + n * pixels * (bytes ? 1 : 4));
        Py_END_ALLOW_THREADS
    }
    Py_buffer *all[] = {&jobs, &means, &scale, &image, &out};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        PyBuffer_Release(all[i]);
    return fits ? Py_NewRef(Py_None) : NULL;
}

static PyMethodDef methods[] = {
    {"crop", py_crop, METH_VARARGS, crop_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "kernels", "Crops of decoded images; see kernels.c.", -1, methods,
};

PyMODINIT_FUNC PyInit_kernels(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) {
        split = split_row_avx2;
        reverse = reverse_row_avx2;
    }
#endif
    return PyModule_Create(&module);
}
