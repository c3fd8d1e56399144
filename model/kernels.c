/* Local response normalization on the CPU, forward and backward, in one pass over the activations (docs/log.md: its share of
   AlexNet's step). The formulas are in lrn.py. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#define BY_MACHINE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define BY_MACHINE
#endif
#define INLINE static inline __attribute__((always_inline)) /* into each of BY_MACHINE's versions */

/* A tile fits into the first caches: the channels of a tower at LANES pixels if pixels are contiguous (NCHW), at one pixel if
   channels are (NHWC). In both, neighbors in channel are `lanes` numbers apart. */
enum { REACH = 2, LANES = 64 };

typedef struct {
    int64_t pixels, towers, width; /* width: channels of a tower */
    int nhwc, bfloat16;
    float k, alpha;
} Shape;

typedef struct {
    float *a, *squares, *own, *shared, *out; /* squares and shared have REACH * lanes zeros before and after them */
} Tile;

/* bfloat16 is the upper half of a float32. */
INLINE float widen(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To the nearest, ties to even; NaN stays NaN. */
INLINE uint16_t narrow(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

INLINE void load(const Shape *shape, const void *from, int64_t at, int64_t lanes, float *restrict to)
{
    int64_t rows = shape->nhwc ? 1 : shape->width, count = shape->nhwc ? shape->width : lanes;
    for (int64_t row = 0; row < rows; row++, at += shape->pixels, to += count) {
        if (shape->bfloat16)
            for (int64_t i = 0; i < count; i++)
                to[i] = widen(((const uint16_t *)from)[at + i]);
        else
            memcpy(to, (const float *)from + at, count * sizeof *to);
    }
}

INLINE void store(const Shape *shape, const float *from, int64_t at, int64_t lanes, void *restrict to)
{
    int64_t rows = shape->nhwc ? 1 : shape->width, count = shape->nhwc ? shape->width : lanes;
    for (int64_t row = 0; row < rows; row++, at += shape->pixels, from += count) {
        if (shape->bfloat16)
            for (int64_t i = 0; i < count; i++)
                ((uint16_t *)to)[at + i] = narrow(from[i]);
        else
            memcpy((float *)to + at, from, count * sizeof *from);
    }
}

INLINE void clear_ends(float *values, int64_t count, int64_t lanes)
{
    memset(values - REACH * lanes, 0, REACH * lanes * sizeof *values);
    memset(values + count, 0, REACH * lanes * sizeof *values);
}

/* The sum over a place and the two on either side. */
#define WINDOW(v) ((v)[i - 2 * lanes] + (v)[i - lanes] + (v)[i] + (v)[i + lanes] + (v)[i + 2 * lanes])

INLINE void differentiate(const Shape *shape, const float *a, const float *squares, const float *grad, int64_t lanes,
                          float *restrict own, float *restrict shared)
{
    for (int64_t i = 0; i < shape->width * lanes; i++) {
        float sum = shape->k + shape->alpha * WINDOW(squares), root = sqrtf(sum);
        own[i] = grad[i] / (root * sqrtf(root));
        shared[i] = own[i] * a[i] / sum;
    }
}

/* Works on the tile that begins at element `at` of each array; `grad` is NULL for the forward pass. */
INLINE void pass(const Shape *shape, const Tile *tile, const void *x, const void *grad, void *result, int64_t at, int64_t lanes)
{
    const int64_t count = shape->width * lanes;
    const float k = shape->k, alpha = shape->alpha;
    float *restrict a = tile->a, *restrict squares = tile->squares, *restrict out = tile->out;
    float *restrict own = tile->own, *restrict shared = tile->shared;
    load(shape, x, at, lanes, a);
    for (int64_t i = 0; i < count; i++)
        squares[i] = a[i] * a[i];
    clear_ends(squares, count, lanes);
    if (!grad) {
        for (int64_t i = 0; i < count; i++) {
            float root = sqrtf(k + alpha * WINDOW(squares));
            out[i] = a[i] / (root * sqrtf(root));
        }
    } else {
        load(shape, grad, at, lanes, out);
        differentiate(shape, a, squares, out, lanes, own, shared);
        clear_ends(shared, count, lanes);
        for (int64_t i = 0; i < count; i++)
            out[i] = own[i] - 1.5f * alpha * a[i] * WINDOW(shared);
    }
    store(shape, out, at, lanes, result);
}

BY_MACHINE static void run(const Shape *shape, const Tile *tile, const void *x, const void *grad, void *out, int64_t begin,
                           int64_t end)
{
    for (int64_t unit = begin; unit < end; unit++) {
        if (shape->nhwc)
            for (int64_t tower = 0; tower < shape->towers; tower++)
                pass(shape, tile, x, grad, out, (unit * shape->towers + tower) * shape->width, 1);
        else
            for (int64_t first = 0; first < shape->pixels; first += LANES) {
                int64_t left = shape->pixels - first < LANES ? shape->pixels - first : LANES;
                pass(shape, tile, x, grad, out, unit * shape->width * shape->pixels + first, left);
            }
    }
}

PyDoc_STRVAR(lrn_doc,
"Normalizes x into out, or, if grad is not 0, turns grad, the gradient of the result, into that of x. x, grad and out are\n"
"addresses of (images, towers * width, pixels) numbers, or (images, pixels, towers * width) with nhwc, in float32 or\n"
"bfloat16. Works on `begin` to `end` of the images * towers, or images * pixels with nhwc. Releases the interpreter's lock.");

static PyObject *py_lrn(PyObject *self, PyObject *args)
{
    unsigned long long x, grad, out;
    long long images, pixels, towers, width, begin, end;
    Shape shape;
    if (!PyArg_ParseTuple(args, "KKKLLLLppffLL", &x, &grad, &out, &images, &pixels, &towers, &width, &shape.nhwc,
                          &shape.bfloat16, &shape.k, &shape.alpha, &begin, &end))
        return NULL;
    shape.pixels = pixels, shape.towers = towers, shape.width = width;
    if (images < 0 || pixels < 0 || towers < 1 || width < 1 || begin < 0 || end > images * (shape.nhwc ? pixels : towers)) {
        PyErr_SetString(PyExc_ValueError, "images, pixels, towers, width, begin and end do not fit each other");
        return NULL;
    }
    size_t lanes = shape.nhwc ? 1 : LANES, room = (width + 2 * REACH) * lanes;
    float *scratch = malloc(5 * room * sizeof(float));
    if (!scratch)
        return PyErr_NoMemory();
    float *first = scratch + REACH * lanes;
    Tile tile = {first, first + room, first + 2 * room, first + 3 * room, first + 4 * room};
    Py_BEGIN_ALLOW_THREADS
    run(&shape, &tile, (const void *)(uintptr_t)x, (const void *)(uintptr_t)grad, (void *)(uintptr_t)out, begin, end);
    Py_END_ALLOW_THREADS
    free(scratch);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"lrn", py_lrn, METH_VARARGS, lrn_doc}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "kernels", "Local response normalization.", -1, methods};

PyMODINIT_FUNC PyInit_kernels(void) { return PyModule_Create(&module); }
