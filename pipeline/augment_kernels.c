/* The operations of TrivialAugment and RandAugment on planar RGB bytes, as torchvision.transforms.v2 has them, and what follows on
   the pixels: erasing, mixup and cutmix. operations.py has the same for a GPU, equal to the bit. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#define BY_MACHINE __attribute__((target_clones("avx2", "default")))
#else
#define BY_MACHINE
#endif

enum { MAX_SIDE = 4096, CHANNELS = 3 };

BY_MACHINE static void subtract(const uint8_t *row, int count, float mean, float scale, float *out)
{
    for (int x = 0; x < count; x++)
        out[x] = ((float)row[x] - mean) * scale;
}

/* Of a pixel x, for dtype uint8: x is whole, so rounding x - mean equals adding the rounded -mean. */
static int16_t rounded_offset(float mean)
{
    float offset = mean > 255 ? -255 : mean < -255 ? 255 : -mean;
    return (int16_t)((int)(offset + 256.5f) - 256);
}

BY_MACHINE static void add_offset(const uint8_t *row, int count, int16_t offset, uint8_t *out)
{
    for (int x = 0; x < count; x++) {
        int16_t value = (int16_t)(row[x] + offset);
        value = value < 0 ? 0 : value;
        out[x] = (uint8_t)(value > 255 ? 255 : value);
    }
}

enum {
    IDENTITY, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE, /* by the matrix */
    BRIGHTNESS, COLOR, CONTRAST, SHARPNESS, POSTERIZE, SOLARIZE, AUTOCONTRAST, EQUALIZE /* by the value */
};

typedef struct {
    int32_t kind;
    float value;
    float matrix[6]; /* from a pixel's x, y, 1 to the x and y of its source */
} Operation;

static uint8_t clipped(float value)
{
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

static inline int32_t floor_of(float value) /* gcc keeps loops with floorf scalar */
{
    int32_t whole = (int32_t)value;
    return whole - (value < (float)whole);
}

/* The source of each pixel of row y, the nearest one; 0 in `inside`, else -1, where it lies outside. Returns whether the sources
   follow one another. */
BY_MACHINE static int find_sources(const float *matrix, int y, int size, int32_t *restrict from, int32_t *restrict inside)
{
    float right = matrix[1] * (float)y + matrix[2], down = matrix[4] * (float)y + matrix[5];
    int32_t first = floor_of(down + 0.5f) * size + floor_of(right + 0.5f), bent = 0;
    for (int x = 0; x < size; x++) {
        int32_t column = floor_of(matrix[0] * (float)x + right + 0.5f), row = floor_of(matrix[3] * (float)x + down + 0.5f);
        int32_t at = row * size + column;
        bent |= at ^ (first + x);
        inside[x] = -((column >= 0) & (column < size) & (row >= 0) & (row < size));
        from[x] = at & inside[x];
    }
    return !bent;
}

static void warp(const uint8_t *in, const float *matrix, int size, uint8_t *out)
{
    int32_t from[MAX_SIDE], inside[MAX_SIDE];
    size_t plane = (size_t)size * size;
    for (int y = 0; y < size; y++) {
        int straight = find_sources(matrix, y, size, from, inside), begin = 0, end = straight ? size : 0;
        while (begin < end && !inside[begin])
            begin++;
        while (begin < end && !inside[end - 1])
            end--;
        uint8_t *restrict row = out + (size_t)y * size;
        for (int channel = 0; channel < CHANNELS && straight; channel++) {
            memset(row + channel * plane, 0, size);
            memcpy(row + channel * plane + begin, in + channel * plane + from[begin < end ? begin : 0], end - begin);
        }
        for (int x = 0; x < size && !straight; x++) {
            const uint8_t *pixel = in + from[x];
            uint8_t mask = (uint8_t)inside[x];
            row[x] = pixel[0] & mask;
            row[x + plane] = pixel[plane] & mask;
            row[x + 2 * plane] = pixel[2 * plane] & mask;
        }
    }
}

static void look_up(const uint8_t *in, size_t count, const uint8_t *table, uint8_t *restrict out)
{
    for (size_t i = 0; i < count; i++)
        out[i] = table[in[i]];
}

BY_MACHINE static void gray_row(const uint8_t *in, size_t plane, int count, float *out)
{
    for (int x = 0; x < count; x++)
        out[x] = (float)(int32_t)((float)in[x] * 0.2989f + (float)in[x + plane] * 0.587f + (float)in[x + 2 * plane] * 0.114f);
}

BY_MACHINE static void blend_row(const uint8_t *in, const float *other, int count, float ratio, uint8_t *out)
{
    for (int x = 0; x < count; x++) {
        float value = (float)in[x] * ratio + other[x] * (1 - ratio);
        value = value < 0 ? 0 : value;
        out[x] = (uint8_t)(int32_t)(value > 255 ? 255 : value);
    }
}

static void change_color(const uint8_t *in, float ratio, int size, uint8_t *out)
{
    float gray[MAX_SIDE];
    size_t plane = (size_t)size * size;
    for (size_t at = 0; at < plane; at += size) {
        gray_row(in + at, plane, size, gray);
        for (int channel = 0; channel < CHANNELS; channel++)
            blend_row(in + at + channel * plane, gray, size, ratio, out + at + channel * plane);
    }
}

static float mean_gray(const uint8_t *in, int size)
{
    float gray[MAX_SIDE];
    size_t plane = (size_t)size * size;
    double sum = 0;
    for (size_t at = 0; at < plane; at += size) {
        int32_t of_row = 0;
        gray_row(in + at, plane, size, gray);
        for (int x = 0; x < size; x++)
            of_row += (int32_t)gray[x];
        sum += of_row;
    }
    return (float)(sum / (double)plane);
}

/* Blends with the mean of 3x3 pixels, the middle one five times, as Pillow's SMOOTH has it. */
BY_MACHINE static void sharpen_row(const uint8_t *in, int size, float ratio, uint8_t *restrict out)
{
    const uint8_t *above = in - size, *below = in + size;
    for (int x = 1; x < size - 1; x++) {
        uint16_t sum = (uint16_t)(above[x - 1] + above[x] + above[x + 1] + in[x - 1] + 5 * in[x] + in[x + 1] + below[x - 1]
            + below[x] + below[x + 1]);
        float pixel = in[x], mean = (float)(int32_t)((float)sum * (1.0f / 13) + 0.5f), value = pixel + (mean - pixel) * (1 - ratio);
        value = value < 0 ? 0 : value;
        out[x] = (uint8_t)(int32_t)(value > 255 ? 255 : value);
    }
}

static void sharpen(const uint8_t *in, float ratio, int size, uint8_t *out)
{
    memcpy(out, in, (size_t)CHANNELS * size * size); /* the border stays */
    for (int channel = 0; channel < CHANNELS && size > 2; channel++)
        for (int y = 1; y < size - 1; y++) {
            size_t at = ((size_t)channel * size + y) * size;
            sharpen_row(in + at, size, ratio, out + at);
        }
}

static void count_values(const uint8_t *in, size_t count, uint32_t *counts)
{
    uint32_t parts[4][256] = {{0}}; /* an increment has to wait for one of the same value just before */
    size_t i = 0;
    for (; i + 4 <= count; i += 4)
        for (int part = 0; part < 4; part++)
            parts[part][in[i + part]]++;
    for (; i < count; i++)
        parts[0][in[i]]++;
    for (int value = 0; value < 256; value++)
        counts[value] = parts[0][value] + parts[1][value] + parts[2][value] + parts[3][value];
}

/* The table of an operation that looks at one value of one channel at a time. */
static void fill_table(const Operation *operation, const uint8_t *in, size_t count, float gray, uint8_t *table)
{
    float ratio = operation->value;
    uint32_t counts[256] = {0};
    int low = 0, high = 255;
    if (operation->kind == AUTOCONTRAST || operation->kind == EQUALIZE) {
        count_values(in, count, counts);
        while (!counts[low])
            low++;
        while (!counts[high])
            high--;
    }
    float scale = low < high ? (float)(high - low) * (float)(1.0 / 255) : 1;
    uint32_t step = low < high ? (uint32_t)(count - counts[high]) / 255 : 0, sum = step / 2;
    for (int x = 0; x < 256; x++) {
        table[x] = (uint8_t)x;
        if (operation->kind == BRIGHTNESS) {
            table[x] = clipped((float)x * ratio);
        } else if (operation->kind == CONTRAST) {
            table[x] = clipped((float)x * ratio + gray * (1 - ratio));
        } else if (operation->kind == POSTERIZE) {
            table[x] = (uint8_t)(x & -(1 << (8 - (int)ratio)));
        } else if (operation->kind == SOLARIZE) {
            table[x] = (uint8_t)((float)x >= ratio ? 255 - x : x);
        } else if (operation->kind == AUTOCONTRAST && low < high) {
            table[x] = clipped((float)(x - low) / scale);
        } else if (operation->kind == EQUALIZE && step) { /* Pillow's, with its rounding */
            table[x] = (uint8_t)(sum / step > 255 ? 255 : sum / step);
            sum += counts[x];
        }
    }
}

static void apply(const Operation *operation, const uint8_t *in, int size, uint8_t *out)
{
    size_t plane = (size_t)size * size;
    uint8_t table[256];
    if (operation->kind <= ROTATE) {
        warp(in, operation->matrix, size, out);
    } else if (operation->kind == COLOR) {
        change_color(in, operation->value, size, out);
    } else if (operation->kind == SHARPNESS) {
        sharpen(in, operation->value, size, out);
    } else {
        float gray = operation->kind == CONTRAST ? mean_gray(in, size) : 0;
        for (int channel = 0; channel < CHANNELS; channel++) {
            fill_table(operation, in + channel * plane, plane, gray, table);
            look_up(in + channel * plane, plane, table, out + channel * plane);
        }
    }
}

/* `spare` has room for two images. */
static void augment(const uint8_t *image, const Operation *operations, int count, int size, const float *mean, const float *scale,
                    int bytes, uint8_t *spare, void *out)
{
    int plane = size * size, turn = 0;
    for (int n = 0; n < count; n++) {
        if (operations[n].kind == IDENTITY)
            continue;
        uint8_t *next = spare + (size_t)(turn++ % 2) * CHANNELS * plane;
        apply(operations + n, image, size, next);
        image = next;
    }
    for (int channel = 0; channel < CHANNELS; channel++) {
        size_t at = (size_t)channel * plane;
        if (bytes)
            add_offset(image + at, plane, rounded_offset(mean[channel]), (uint8_t *)out + at);
        else
            subtract(image + at, plane, mean[channel], scale[channel], (float *)out + at);
    }
}

PyDoc_STRVAR(augment_doc,
"augment(images, operations, size, means, scale, out, bytes, begin, end)\n\n"
"Images `begin` to `end` of a batch after their operations, minus their mean, times the scale, into `out`, as codec.decoder.convert does.\n"
"images: uint8 (N, 3, size, size); operations: (N, K) records (kind int32, value float32, matrix float32 (2, 3)), see\n"
"operations.py; out: float32, or with `bytes` uint8 (N, 3, size, size). Releases the interpreter's lock.");

static PyObject *py_augment(PyObject *self, PyObject *args)
{
    Py_buffer images, operations, means, scale, out;
    int size, bytes;
    Py_ssize_t begin, end;
    if (!PyArg_ParseTuple(args, "y*y*iy*y*w*pnn", &images, &operations, &size, &means, &scale, &out, &bytes, &begin, &end))
        return NULL;
    Py_ssize_t pixels = (Py_ssize_t)CHANNELS * size * size, count = means.len / 12;
    Py_ssize_t each = count ? operations.len / (Py_ssize_t)sizeof(Operation) / count : 0;
    int fits = size > 0 && size <= MAX_SIDE && begin >= 0 && begin <= end && end <= count && images.len == count * pixels
        && operations.len == count * each * (Py_ssize_t)sizeof(Operation) && scale.len == 12
        && out.len == count * pixels * (bytes ? 1 : 4);
    uint8_t *spare = fits ? PyMem_Malloc(2 * pixels) : NULL;
    if (spare) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t n = begin; n < end; n++)
            augment((uint8_t *)images.buf + n * pixels, (Operation *)operations.buf + n * each, (int)each, size,
                    (float *)means.buf + n * CHANNELS, scale.buf, bytes, spare, (char *)out.buf + n * pixels * (bytes ? 1 : 4));
        Py_END_ALLOW_THREADS
        PyMem_Free(spare);
    } else if (fits) {
        PyErr_NoMemory();
    } else {
        PyErr_SetString(PyExc_ValueError, "the arrays do not fit each other");
    }
    Py_buffer *all[] = {&images, &operations, &means, &scale, &out};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        PyBuffer_Release(all[i]);
    return spare ? Py_NewRef(Py_None) : NULL;
}

typedef struct {
    int32_t top, left, height, width;
} Box;

typedef struct {
    float share;
    Box box;
} Mix;

BY_MACHINE static void mix_pixels(float *one, float *other, size_t count, float share)
{
    for (size_t i = 0; i < count; i++) {
        float a = one[i], b = other[i];
        one[i] = a * share + b * (1 - share);
        other[i] = b * share + a * (1 - share);
    }
}

/* Sets the box of an image to 0; or with `other` exchanges it between two. */
static void exchange(char *one, char *other, Box box, int size, int item)
{
    char kept[4 * MAX_SIDE];
    size_t bytes = (size_t)box.width * item;
    for (int row = 0; row < CHANNELS * box.height; row++) {
        size_t at = (((size_t)(row / box.height) * size + box.top + row % box.height) * size + box.left) * item;
        if (other) {
            memcpy(kept, one + at, bytes);
            memcpy(one + at, other + at, bytes);
            memcpy(other + at, kept, bytes);
        } else {
            memset(one + at, 0, bytes);
        }
    }
}

static int lies_in(Box box, int size)
{
    return box.top >= 0 && box.left >= 0 && box.height >= 0 && box.width >= 0 && box.top + box.height <= size
        && box.left + box.width <= size;
}

PyDoc_STRVAR(mix_doc,
"mix(images, size, item, erased, mixes, apart, begin, end)\n\n"
"Erases and mixes pairs `begin` to `end` of the images of a batch, in place. images: (N, 3, size, size) of `item` bytes each, 4 being\n"
"float32; erased: int32 (N, 4), top, left, height and width of what becomes 0; mixes: (N / 2,) records (share float32, box int32\n"
"(4,)), or empty: two images exchange the box, if it has an area; otherwise each keeps that share of itself, if it is below 1, and\n"
"takes the rest of the other. In each 2 * apart images, the first is paired with the one that comes `apart` later, and so on.\n"
"Releases the interpreter's lock.");

static PyObject *py_mix(PyObject *self, PyObject *args)
{
    Py_buffer images, erased, mixes;
    int size, item, apart;
    Py_ssize_t begin, end;
    if (!PyArg_ParseTuple(args, "w*iiy*y*inn", &images, &size, &item, &erased, &mixes, &apart, &begin, &end))
        return NULL;
    Py_ssize_t count = erased.len / (Py_ssize_t)sizeof(Box), pairs = mixes.len / (Py_ssize_t)sizeof(Mix);
    size_t bytes = (size_t)CHANNELS * size * size * item;
    const Box *box = erased.buf;
    const Mix *mix = mixes.buf;
    int fits = size > 0 && size <= MAX_SIDE && (item == 1 || item == 4) && apart > 0 && begin >= 0 && 2 * end <= count + 1
        && (size_t)images.len == count * bytes && (!pairs || (2 * pairs == count && pairs % apart == 0));
    for (Py_ssize_t n = 0; fits && n < count; n++)
        fits = lies_in(box[n], size);
    for (Py_ssize_t n = 0; fits && n < pairs; n++)
        fits = lies_in(mix[n].box, size) && (item == 4 || mix[n].share == 1 || mix[n].box.height);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "the boxes do not lie in their images, or the arrays do not fit each other");
    } else {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t n = begin; n < end; n++) {
            Py_ssize_t one = pairs ? n / apart * 2 * apart + n % apart : 2 * n, other = one + (pairs ? apart : 1);
            char *image = (char *)images.buf + one * bytes, *second = (char *)images.buf + other * bytes;
            exchange(image, NULL, box[one], size, item);
            if (other < count)
                exchange(second, NULL, box[other], size, item);
            if (pairs && mix[n].box.height && mix[n].box.width)
                exchange(image, second, mix[n].box, size, item);
            else if (pairs && mix[n].share < 1)
                mix_pixels((float *)image, (float *)second, bytes / 4, mix[n].share);
        }
        Py_END_ALLOW_THREADS
    }
    Py_buffer *all[] = {&images, &erased, &mixes};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        PyBuffer_Release(all[i]);
    return fits ? Py_NewRef(Py_None) : NULL;
}

static PyMethodDef methods[] = {
    {"augment", py_augment, METH_VARARGS, augment_doc},
    {"mix", py_mix, METH_VARARGS, mix_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "augment_kernels", "Augmentation of crops; see augment_kernels.c.", -1, methods,
};

PyMODINIT_FUNC PyInit_augment_kernels(void)
{
    return PyModule_Create(&module);
}
