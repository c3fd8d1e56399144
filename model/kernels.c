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

/* A tile is what fits into the first caches: the channels of a tower at LANES pixels where pixels are contiguous (NCHW), at one
   pixel where channels are (NHWC). In both, neighbors in channel lie `lanes` numbers apart. */
enum { REACH = 2, LANES = 64 };

typedef struct {
    int64_t units, pixels, towers, width; /* width: channels of a tower */
    int nhwc, bfloat16;
    float k, alpha;
} Shape;

typedef struct {
    float *a, *squares, *grad, *own, *shared, *out; /* squares and shared have REACH * lanes zeros before and after them */
} Tile;

/* bfloat16 is the upper half of a float32. */
INLINE void widen(const uint16_t *from, int64_t count, float *restrict to)
{
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, sizeof bits);
    }
}

/* To the nearest, ties to even; what is no number stays none. */
INLINE void narrow(const float *from, int64_t count, uint16_t *restrict to)
{
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, sizeof bits);
        uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        to[i] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
    }
}

INLINE void square(const float *a, int64_t count, float *restrict squares)
{
    for (int64_t i = 0; i < count; i++)
        squares[i] = a[i] * a[i];
}

/* Of the values around each place, two on either side. */
#define WINDOW(values) ((values)[i - 2 * lanes] + (values)[i - lanes] + (values)[i] + (values)[i + lanes] + (values)[i + 2 * lanes])

INLINE void normalize(const float *a, const float *squares, int64_t count, int64_t lanes, float k, float alpha,
                          float *restrict out)
{
    for (int64_t i = 0; i < count; i++) {
        float root = sqrtf(k + alpha * WINDOW(squares));
        out[i] = a[i] / (root * sqrtf(root));
    }
}

INLINE void differentiate(const float *a, const float *squares, const float *grad, int64_t count, int64_t lanes,
                          float k, float alpha, float *restrict own, float *restrict shared)
{
    for (int64_t i = 0; i < count; i++) {
        float sum = k + alpha * WINDOW(squares), root = sqrtf(sum);
        own[i] = grad[i] / (root * sqrtf(root));
        shared[i] = own[i] * a[i] / sum;
    }
}

INLINE void gather(const float *a, const float *own, const float *shared, int64_t count, int64_t lanes, float factor,
                          float *restrict out)
{
    for (int64_t i = 0; i < count; i++)
        out[i] = own[i] - factor * a[i] * WINDOW(shared);
}

INLINE void load(const Shape *shape, const void *from, int64_t at, int64_t lanes, float *restrict to)
{
    int64_t rows = shape->nhwc ? 1 : shape->width, count = shape->nhwc ? shape->width : lanes;
    for (int64_t row = 0; row < rows; row++, at += shape->pixels, to += count) {
        if (shape->bfloat16)
            widen((const uint16_t *)from + at, count, to);
        else
            memcpy(to, (const float *)from + at, count * sizeof *to);
    }
}

INLINE void store(const Shape *shape, const float *from, int64_t at, int64_t lanes, void *to)
{
    int64_t rows = shape->nhwc ? 1 : shape->width, count = shape->nhwc ? shape->width : lanes;
    for (int64_t row = 0; row < rows; row++, at += shape->pixels, from += count) {
        if (shape->bfloat16)
            narrow(from, count, (uint16_t *)to + at);
        else
            memcpy((float *)to + at, from, count * sizeof *from);
    }
}

/* The tile that begins at element `at` of each array; `grad` is NULL for the forward pass. */
INLINE void pass(const Shape *shape, const Tile *tile, const void *x, const void *grad, void *out, int64_t at, int64_t lanes)
{
    int64_t count = shape->width * lanes;
    load(shape, x, at, lanes, tile->a);
    square(tile->a, count, tile->squares);
    memset(tile->squares + count, 0, REACH * lanes * sizeof(float));
    if (grad) {
        load(shape, grad, at, lanes, tile->grad);
        differentiate(tile->a, tile->squares, tile->grad, count, lanes, shape->k, shape->alpha, tile->own, tile->shared);
        memset(tile->shared + count, 0, REACH * lanes * sizeof(float));
        gather(tile->a, tile->own, tile->shared, count, lanes, 1.5f * shape->alpha, tile->out);
    } else {
        normalize(tile->a, tile->squares, count, lanes, shape->k, shape->alpha, tile->out);
    }
    store(shape, tile->out, at, lanes, out);
}

BY_MACHINE static void run(const Shape *shape, const Tile *tile, const void *x, const void *grad, void *out, int64_t begin,
                           int64_t end)
{
    for (int64_t unit = begin; unit < end; unit++) {
        if (shape->nhwc) {
            for (int64_t tower = 0; tower < shape->towers; tower++)
                pass(shape, tile, x, grad, out, (unit * shape->towers + tower) * shape->width, 1);
            continue;
        }
        for (int64_t first = 0; first < shape->pixels; first += LANES) {
            int64_t left = shape->pixels - first < LANES ? shape->pixels - first : LANES;
            memset(tile->squares - REACH * left, 0, REACH * left * sizeof(float));
            memset(tile->shared - REACH * left, 0, REACH * left * sizeof(float));
            pass(shape, tile, x, grad, out, unit * shape->width * shape->pixels + first, left);
        }
    }
}

PyDoc_STRVAR(lrn_doc,
"lrn(x, grad, out, images, pixels, towers, width, nhwc, bfloat16, k, alpha, begin, end)\n\n"
"Normalizes x into out, or where grad is not 0 takes grad, the gradient of the result, back to that of x. x, grad and out are\n"
"addresses of (images, towers * width, pixels) numbers, with nhwc of (images, pixels, towers * width), float32 or bfloat16. Only\n"
"`begin` to `end` of the images * towers are done, of images * pixels with nhwc. Releases the interpreter's lock.");

static PyObject *py_lrn(PyObject *self, PyObject *args)
{
    unsigned long long x, grad, out;
    long long images, pixels, towers, width, begin, end;
    Shape shape;
    if (!PyArg_ParseTuple(args, "KKKLLLLppffLL", &x, &grad, &out, &images, &pixels, &towers, &width, &shape.nhwc,
                          &shape.bfloat16, &shape.k, &shape.alpha, &begin, &end))
        return NULL;
    shape.pixels = pixels, shape.towers = towers, shape.width = width;
    shape.units = images * (shape.nhwc ? pixels : towers);
    if (images < 0 || pixels < 0 || towers < 1 || width < 1 || begin < 0 || end > shape.units) {
        PyErr_SetString(PyExc_ValueError, "these are no images * pixels * towers * width");
        return NULL;
    }
    size_t lanes = shape.nhwc ? 1 : LANES, room = (width + 2 * REACH) * lanes;
    float *scratch = calloc(6 * room, sizeof(float));
    if (!scratch)
        return PyErr_NoMemory();
    float *part[6];
    for (int i = 0; i < 6; i++)
        part[i] = scratch + i * room + REACH * lanes;
    Tile tile = {part[0], part[1], part[2], part[3], part[4], part[5]};
    Py_BEGIN_ALLOW_THREADS
    run(&shape, &tile, (const void *)(uintptr_t)x, (const void *)(uintptr_t)grad, (void *)(uintptr_t)out, begin, end);
    Py_END_ALLOW_THREADS
    free(scratch);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"lrn", py_lrn, METH_VARARGS, lrn_doc}, {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "kernels", "Local response normalization; see kernels.c.", -1, methods,
};

PyMODINIT_FUNC PyInit_kernels(void) { return PyModule_Create(&module); }
