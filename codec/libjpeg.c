/* libjpeg-turbo: decodes JPEGs strictly, to RGB or to planes that are rescaled on the way; and sums pixels for the statistics.

   The JPEG of a photo holds a plane of luma (Y) and two of chroma (Cb, Cr), and so does the stored one. Between the two
   nothing needs RGB: each plane is rescaled as it is, chroma straight to half the size. docs/log.md has the measurements.

   All arithmetic on pixels is integer, and floating point is not contracted: every machine gives the same bytes. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jerror.h>
#include <jpeglib.h>

#if JPEG_LIB_VERSION >= 70 /* libjpeg-turbo built to be binary compatible with libjpeg 8 */
#define DCT_scaled_size DCT_h_scaled_size
#define min_DCT_scaled_size min_DCT_h_scaled_size
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#define BY_MACHINE __attribute__((target_clones("avx2", "default")))
#else
#define BY_MACHINE
#endif

enum { MAX_SCANS = 100, PLANES = 3, BITS = 14, LANES = 8 };

/* ---- libjpeg-turbo: errors and warnings end the decoding with its message ---- */

typedef struct {
    struct jpeg_error_mgr base;
    jmp_buf escape;
    char message[JMSG_LENGTH_MAX];
} Errors;

static void fail(j_common_ptr jpeg)
{
    Errors *errors = (Errors *)jpeg->err;
    jpeg->err->format_message(jpeg, errors->message);
    longjmp(errors->escape, 1);
}

static void fail_because(j_decompress_ptr jpeg, const char *reason)
{
    Errors *errors = (Errors *)jpeg->err;
    snprintf(errors->message, sizeof errors->message, "%s", reason);
    errors->base.msg_code = 0;
    longjmp(errors->escape, 1);
}

static void on_message(j_common_ptr jpeg, int level)
{
    /* A warning means damaged data, which libjpeg would fill with gray. Only two are harmless: headers of an unknown version. */
    int code = jpeg->err->msg_code;
    if (level < 0 && code != JWRN_JFIF_MAJOR && code != JWRN_ADOBE_XFORM)
        fail(jpeg);
}

static void on_progress(j_common_ptr jpeg)
{
    /* A small file can demand thousands of passes over its picture. */
    if (jpeg->is_decompressor && ((j_decompress_ptr)jpeg)->input_scan_number > MAX_SCANS)
        fail_because((j_decompress_ptr)jpeg, "more than 100 scans");
}

static void start(j_decompress_ptr jpeg, J_COLOR_SPACE colors)
{
    jpeg->out_color_space = colors;
    jpeg_start_decompress(jpeg);
    /* To libjpeg, a file cut between two scans and then closed properly is whole: what is missing is gray, or coarse. */
    for (int c = 0; c < jpeg->num_components; c++) {
        int missing = !jpeg->comp_info[c].quant_table;
        if (jpeg->progressive_mode && jpeg->coef_bits) {
            missing |= jpeg->coef_bits[c][0] != 0;
            for (int k = 1; k < DCTSIZE2; k++)
                missing |= jpeg->coef_bits[c][k] > 0;
        }
        if (missing)
            fail_because(jpeg, "scans of it are missing");
    }
}

/* Has `work` decode a JPEG without the GIL, and releases `data`. Returns 0 with a Python exception if that fails. */
static int with_jpeg(Py_buffer *data, void (*work)(j_decompress_ptr, void *), void *context)
{
    struct jpeg_decompress_struct jpeg = {0};
    struct jpeg_progress_mgr progress = {.progress_monitor = on_progress};
    Errors errors;
    volatile int done = 0;
    PyThreadState *thread = PyEval_SaveThread();
    jpeg.err = jpeg_std_error(&errors.base);
    errors.base.error_exit = fail;
    errors.base.emit_message = on_message;
    if (!setjmp(errors.escape)) {
        jpeg_create_decompress(&jpeg);
        jpeg.progress = &progress;
        jpeg_mem_src(&jpeg, data->buf, data->len);
        work(&jpeg, context);
        done = 1;
    }
    jpeg_destroy_decompress(&jpeg);
    PyEval_RestoreThread(thread);
    PyBuffer_Release(data);
    if (!done && errors.base.msg_code == JERR_OUT_OF_MEMORY) /* says nothing about the image */
        PyErr_NoMemory();
    else if (!done)
        PyErr_SetString(PyExc_ValueError, errors.message);
    return done;
}

#include "bicubic.h"

/* ---- From a JPEG to rescaled planes ---- */

/* libjpeg-turbo decodes at 1/2, 1/4 and 1/8 with fast code; chosen so that every plane keeps as many samples as are stored. */
static void choose_scale(j_decompress_ptr jpeg, int shorter, int size)
{
    for (jpeg->scale_num = 1, jpeg->scale_denom = 8; jpeg->scale_denom > 1; jpeg->scale_denom /= 2) {
        int scaled = (shorter + (int)jpeg->scale_denom - 1) / (int)jpeg->scale_denom, enough = 1, most_h = 1, most_v = 1;
        for (int c = 0; c < jpeg->num_components; c++) {
            most_h = jpeg->comp_info[c].h_samp_factor > most_h ? jpeg->comp_info[c].h_samp_factor : most_h;
            most_v = jpeg->comp_info[c].v_samp_factor > most_v ? jpeg->comp_info[c].v_samp_factor : most_v;
        }
        for (int c = 0; c < jpeg->num_components; c++)
            enough &= scaled * (c ? 2 : 1) * jpeg->comp_info[c].h_samp_factor >= size * most_h
                   && scaled * (c ? 2 : 1) * jpeg->comp_info[c].v_samp_factor >= size * most_v;
        if (enough)
            return;
    }
}

typedef struct {
    Picture picture;
    uint8_t *samples[PLANES]; /* as decoded */
    size_t pitches[PLANES];
    int bands[PLANES]; /* rows that libjpeg-turbo delivers at a time */
} Rescaling;

static void prepare_samples(j_decompress_ptr jpeg, Rescaling *work, int c)
{
    jpeg_component_info *component = &jpeg->comp_info[c];
    double across = (double)component->h_samp_factor * component->DCT_scaled_size / (jpeg->max_h_samp_factor * DCTSIZE);
    double down = (double)component->v_samp_factor * component->DCT_scaled_size / (jpeg->max_v_samp_factor * DCTSIZE);
    int rows = (int)component->downsampled_height;
    work->bands[c] = component->v_samp_factor * component->DCT_scaled_size;
    work->pitches[c] = (size_t)component->width_in_blocks * component->DCT_scaled_size;
    work->samples[c] = malloc(work->pitches[c] * (rows + work->bands[c] + 1));
    if (!work->samples[c] || !prepare_plane(&work->picture, c, (int)component->downsampled_width, rows, across, down))
        ERREXIT1(jpeg, JERR_OUT_OF_MEMORY, 0);
}

static void read_samples(j_decompress_ptr jpeg, Rescaling *work)
{
    JSAMPROW lines[PLANES][MAX_SAMP_FACTOR * DCTSIZE];
    JSAMPARRAY bands[PLANES] = {lines[0], lines[1], lines[2]};
    int step = jpeg->max_v_samp_factor * jpeg->min_DCT_scaled_size;
    for (int number = 0; jpeg->output_scanline < jpeg->output_height; number++) {
        for (int c = 0; c < jpeg->num_components; c++) {
            const Plane *plane = &work->picture.planes[c];
            int band = work->bands[c], begin = number * band;
            for (int row = 0; row < band; row++)
                lines[c][row] = work->samples[c] + (begin + row) * work->pitches[c];
            /* Rows that are cropped away are read, which finds damage in them, but not transformed. */
            jpeg->comp_info[c].component_needed = begin < plane->end_row && begin + band > plane->first_row;
        }
        jpeg_read_raw_data(jpeg, bands, step);
    }
    jpeg_finish_decompress(jpeg);
}

static void rescale_work(j_decompress_ptr jpeg, void *context)
{
    Rescaling *work = context;
    jpeg_read_header(jpeg, TRUE);
    if (jpeg->jpeg_color_space != JCS_YCbCr && jpeg->jpeg_color_space != JCS_GRAYSCALE)
        fail_because(jpeg, "its colors are neither YCbCr nor gray");
    place_picture(&work->picture, jpeg->image_width, jpeg->image_height);
    jpeg->raw_data_out = TRUE;
    jpeg->do_fancy_upsampling = FALSE;
    choose_scale(jpeg, jpeg->image_width < jpeg->image_height ? jpeg->image_width : jpeg->image_height, work->picture.size);
    start(jpeg, jpeg->jpeg_color_space);
    for (int c = 0; c < jpeg->num_components; c++)
        prepare_samples(jpeg, work, c);
    read_samples(jpeg, work);
    for (int c = 0; c < jpeg->num_components; c++)
        if (!(work->picture.out[c] = rescale_plane(&work->picture.planes[c], work->samples[c], work->pitches[c])))
            ERREXIT1(jpeg, JERR_OUT_OF_MEMORY, 0);
}

/* (height, width, y, cb, cr) */
static PyObject *rescaled(const Picture *picture)
{
    Py_ssize_t quarter = (Py_ssize_t)((picture->width + 1) / 2) * ((picture->height + 1) / 2);
    PyObject *planes[PLANES], *result = NULL;
    for (int c = 0; c < PLANES; c++) {
        planes[c] = PyBytes_FromStringAndSize((char *)picture->out[c],
                                              c ? quarter : (Py_ssize_t)picture->width * picture->height);
        if (planes[c] && !picture->out[c])
            memset(PyBytes_AsString(planes[c]), 128, quarter); /* gray has no chroma */
    }
    if (planes[0] && planes[1] && planes[2])
        result = Py_BuildValue("iiOOO", picture->height, picture->width, planes[0], planes[1], planes[2]);
    for (int c = 0; c < PLANES; c++)
        Py_XDECREF(planes[c]);
    return result;
}

PyDoc_STRVAR(rescale_doc,
"rescale(data, size, crop, mirrored_x, mirrored_y, /)\n--\n\n"
"Decodes a JPEG of YCbCr or gray strictly and rescales it to a shorter side of `size` pixels; with `crop` only the center\n"
"size x size is kept. Returns (height, width, y, cb, cr): y has height * width bytes, cb and cr half of each side, rounded up.\n"
"`mirrored_x` and `mirrored_y` say that the caller will mirror the planes along an axis, which decides where the chroma of an odd\n"
"side lies. Raises ValueError with libjpeg-turbo's message on any damage.");

static PyObject *py_rescale(PyObject *self, PyObject *args)
{
    Py_buffer data;
    Rescaling work = {0};
    Picture *picture = &work.picture;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*ippp", &data, &picture->size, &picture->crop, &picture->mirrored_x, &picture->mirrored_y))
        return NULL;
    if (picture->size < 1) {
        PyBuffer_Release(&data);
        PyErr_SetString(PyExc_ValueError, "size must be 1 pixel or more");
        return NULL;
    }
    if (with_jpeg(&data, rescale_work, &work))
        result = rescaled(picture);
    free_planes(picture);
    for (int c = 0; c < PLANES; c++)
        free(work.samples[c]);
    return result;
}

PyDoc_STRVAR(rescale_samples_doc,
"rescale_samples(samples, height, width, chroma, size, crop, mirrored_x, mirrored_y, /)\n--\n\n"
"As `rescale`, from the samples of an image of `height` and `width`, as `decoder.samples` gives them.");

static PyObject *py_rescale_samples(PyObject *self, PyObject *args)
{
    Py_buffer samples;
    Picture picture = {0};
    PyObject *result = NULL;
    int height, width, chroma, enough = 1;
    if (!PyArg_ParseTuple(args, "y*iiiippp", &samples, &height, &width, &chroma, &picture.size, &picture.crop,
                          &picture.mirrored_x, &picture.mirrored_y))
        return NULL;
    size_t pitch = ((size_t)width + 15) / 16 * 16, lines = ((size_t)height + 15) / 16 * 16;
    if (height < 1 || width < 1 || height > UINT16_MAX || width > UINT16_MAX || chroma < 0 || chroma > 2 || picture.size < 1
        || samples.len < (Py_ssize_t)((PLANES * lines + 1) * pitch)) {
        PyBuffer_Release(&samples);
        PyErr_SetString(PyExc_ValueError, "the samples and the sizes do not match");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    place_picture(&picture, width, height);
    for (int c = 0; enough && c < (chroma ? PLANES : 1); c++) {
        int pixels = c ? chroma : 1, plane = c ? 1 : 0; /* per sample; filters of Cb, which are those of Cr */
        enough = c == 2 || prepare_plane(&picture, c, (width + pixels - 1) / pixels, (height + pixels - 1) / pixels, 1.0 / pixels,
                                         1.0 / pixels);
        if (enough)
            picture.out[c] = rescale_plane(&picture.planes[plane], (const uint8_t *)samples.buf + c * lines * pitch, pitch);
        enough = enough && picture.out[c];
    }
    Py_END_ALLOW_THREADS
    result = enough ? rescaled(&picture) : PyErr_NoMemory();
    free_planes(&picture);
    PyBuffer_Release(&samples);
    return result;
}

typedef struct {
    int width, height, exif;
    const char *colors;
} Header;

static void header_work(j_decompress_ptr jpeg, void *context)
{
    static const unsigned char EXIF[6] = "Exif\0"; /* Exif 2.32, section 4.7.2 */
    Header *header = context;
    jpeg_save_markers(jpeg, JPEG_APP0 + 1, sizeof EXIF);
    jpeg_read_header(jpeg, TRUE);
    header->width = (int)jpeg->image_width;
    header->height = (int)jpeg->image_height;
    J_COLOR_SPACE colors = jpeg->jpeg_color_space;
    header->colors = colors == JCS_YCbCr ? "YCbCr" : colors == JCS_GRAYSCALE ? "gray" : "other";
    for (jpeg_saved_marker_ptr marker = jpeg->marker_list; marker; marker = marker->next)
        header->exif |= marker->data_length == sizeof EXIF && !memcmp(marker->data, EXIF, sizeof EXIF);
}

PyDoc_STRVAR(header_doc,
"header(data, /)\n--\n\n"
"Returns (width, height, colors, exif) of a JPEG: colors is 'YCbCr', 'gray' or 'other', exif whether it has an EXIF block.\n"
"Raises ValueError if libjpeg-turbo cannot read the header.");

static PyObject *py_header(PyObject *self, PyObject *args)
{
    Py_buffer data;
    Header header = {0};
    if (!PyArg_ParseTuple(args, "y*", &data) || !with_jpeg(&data, header_work, &header))
        return NULL;
    return Py_BuildValue("iisN", header.width, header.height, header.colors, PyBool_FromLong(header.exif));
}

static void check_work(j_decompress_ptr jpeg, void *context)
{
    jpeg_read_header(jpeg, TRUE);
    start(jpeg, jpeg->jpeg_color_space);
    JSAMPARRAY row = jpeg->mem->alloc_sarray((j_common_ptr)jpeg, JPOOL_IMAGE, jpeg->output_width * jpeg->output_components, 1);
    while (jpeg->output_scanline < jpeg->output_height)
        jpeg_read_scanlines(jpeg, row, 1);
    jpeg_finish_decompress(jpeg);
}

PyDoc_STRVAR(check_doc,
"check(data, /)\n--\n\n"
"Decodes a JPEG of any colors strictly and discards it. Raises ValueError with libjpeg-turbo's message on any damage.");

static PyObject *py_check(PyObject *self, PyObject *args)
{
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "y*", &data) || !with_jpeg(&data, check_work, NULL))
        return NULL;
    Py_RETURN_NONE;
}

static void decode_work(j_decompress_ptr jpeg, void *context)
{
    const Py_buffer *out = context;
    jpeg_read_header(jpeg, TRUE);
    J_COLOR_SPACE colors = jpeg->jpeg_color_space;
    if (colors != JCS_YCbCr && colors != JCS_GRAYSCALE && colors != JCS_RGB)
        fail_because(jpeg, "its colors are neither YCbCr, gray nor RGB");
    start(jpeg, JCS_RGB);
    size_t pitch = (size_t)jpeg->output_width * 3;
    if (out->len != (Py_ssize_t)(pitch * jpeg->output_height))
        fail_because(jpeg, "it has not the size of the array for its pixels");
    while (jpeg->output_scanline < jpeg->output_height) {
        JSAMPROW row = (JSAMPROW)out->buf + jpeg->output_scanline * pitch;
        jpeg_read_scanlines(jpeg, &row, 1);
    }
    jpeg_finish_decompress(jpeg);
}

PyDoc_STRVAR(decode_doc,
"decode(data, out, /)\n--\n\n"
"Decodes a JPEG of YCbCr, gray or RGB strictly to RGB: `out` is a writable array of uint8 (height, width, 3). Raises ValueError\n"
"with libjpeg-turbo's message on any damage, or if `out` has another size.");

static PyObject *py_decode(PyObject *self, PyObject *args)
{
    Py_buffer data, out;
    if (!PyArg_ParseTuple(args, "y*w*", &data, &out))
        return NULL;
    int done = with_jpeg(&data, decode_work, &out);
    PyBuffer_Release(&out);
    return done ? Py_NewRef(Py_None) : NULL;
}

/* ---- Statistics ---- */

enum { CHUNK = 2048, PRODUCTS = 6 };

/* What a chroma sample adds to the luma of its pixels (JFIF 1.02, section 7; rounded as by libjpeg). */
BY_MACHINE static void color_offsets(const uint8_t *cb, const uint8_t *cr, int count, int16_t offsets[3][CHUNK])
{
    int16_t half[3][CHUNK / 2];
    for (int i = 0; i < count; i++) {
        int32_t blue = cb[i] - 128, red = cr[i] - 128;
        half[0][i] = (int16_t)((91881 * red + 32768) >> 16);
        half[1][i] = (int16_t)((-22554 * blue - 46802 * red + 32768) >> 16);
        half[2][i] = (int16_t)((116130 * blue + 32768) >> 16);
    }
    for (int channel = 0; channel < 3; channel++)
        for (int i = 0; i < count; i++)
            offsets[channel][2 * i] = offsets[channel][2 * i + 1] = half[channel][i];
}

BY_MACHINE static void to_rgb(const uint8_t *y, int16_t offsets[3][CHUNK], int count, int16_t rgb[3][CHUNK])
{
    for (int channel = 0; channel < 3; channel++)
        for (int i = 0; i < count; i++) {
            int16_t value = (int16_t)(y[i] + offsets[channel][i]);
            value = value < 0 ? 0 : value;
            rgb[channel][i] = value > 255 ? 255 : value;
        }
}

/* Each sum is at most CHUNK * 255 * 255, which fits 32 bits. */
BY_MACHINE static void add_products(int16_t rgb[3][CHUNK], int count, int64_t *channels, int64_t *products)
{
    int32_t r = 0, g = 0, b = 0, rr = 0, rg = 0, rb = 0, gg = 0, gb = 0, bb = 0;
    for (int i = 0; i < count; i++) {
        int16_t red = rgb[0][i], green = rgb[1][i], blue = rgb[2][i];
        r += red, g += green, b += blue;
        rr += red * red, rg += red * green, rb += red * blue;
        gg += green * green, gb += green * blue, bb += blue * blue;
    }
    channels[0] += r, channels[1] += g, channels[2] += b;
    products[0] += rr, products[1] += rg, products[2] += rb, products[3] += gg, products[4] += gb, products[5] += bb;
}

BY_MACHINE static void add_row(const int16_t *values, int count, uint32_t *sums)
{
    for (int i = 0; i < count; i++)
        sums[i] += (uint32_t)values[i];
}

static void add_picture(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, int height, int width, uint32_t *image,
                        int size, int64_t *channels, int64_t *products)
{
    int16_t offsets[3][CHUNK], rgb[3][CHUNK];
    int top = (height - size) / 2, left = (width - size) / 2, half = (width + 1) / 2;
    for (int begin = 0; begin < width; begin += CHUNK)
        for (int row = 0; row < height; row++) {
            int count = width - begin < CHUNK ? width - begin : CHUNK;
            size_t chroma = (size_t)(row / 2) * half + begin / 2;
            if (row % 2 == 0)
                color_offsets(cb + chroma, cr + chroma, (count + 1) / 2, offsets);
            to_rgb(y + (size_t)row * width + begin, offsets, count, rgb);
            add_products(rgb, count, channels, products);
            int from = left > begin ? left : begin, to = left + size < begin + count ? left + size : begin + count;
            if (row >= top && row < top + size && from < to)
                for (int channel = 0; channel < 3; channel++)
                    add_row(rgb[channel] + from - begin, to - from,
                            image + ((size_t)channel * size + row - top) * size + from - left);
        }
}

PyDoc_STRVAR(add_doc,
"add(y, cb, cr, height, width, image, channels, products, /)\n--\n\n"
"Adds the RGB pixels of a picture to sums, which are writable arrays: its center to `image`, uint32 (3, size, size), its channels\n"
"to `channels`, int64 (3,), and their products RR, RG, RB, GG, GB, BB to `products`, int64 (6,). Raises ValueError if the arrays\n"
"do not match.");

static PyObject *py_add(PyObject *self, PyObject *args)
{
    Py_buffer y, cb, cr, image, channels, products;
    int height, width;
    if (!PyArg_ParseTuple(args, "y*y*y*iiw*w*w*", &y, &cb, &cr, &height, &width, &image, &channels, &products))
        return NULL;
    int size = (int)(sqrt(image.len / 12.0) + 0.5);
    Py_ssize_t quarter = (Py_ssize_t)((width + 1) / 2) * ((height + 1) / 2);
    int fits = width >= size && height >= size && y.len == (Py_ssize_t)height * width && cb.len == quarter
            && cr.len == quarter && image.len == (Py_ssize_t)size * size * 12 && channels.len == 3 * 8
            && products.len == PRODUCTS * 8;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        add_picture(y.buf, cb.buf, cr.buf, height, width, image.buf, size, channels.buf, products.buf);
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, "the sizes of the planes and the sums do not match");
    }
    Py_buffer *all[] = {&y, &cb, &cr, &image, &channels, &products};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        PyBuffer_Release(all[i]);
    return fits ? Py_NewRef(Py_None) : NULL;
}

static PyMethodDef methods[] = {
    {"header", py_header, METH_VARARGS, header_doc},
    {"check", py_check, METH_VARARGS, check_doc},
    {"decode", py_decode, METH_VARARGS, decode_doc},
    {"rescale", py_rescale, METH_VARARGS, rescale_doc},
    {"rescale_samples", py_rescale_samples, METH_VARARGS, rescale_samples_doc},
    {"add", py_add, METH_VARARGS, add_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "libjpeg", "Decodes JPEGs by libjpeg-turbo, and sums pixels; see libjpeg.c.", -1, methods,
};

PyMODINIT_FUNC PyInit_libjpeg(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) {
        shrink = shrink_row_avx2;
        mix = mix_rows_avx2;
    }
#endif
    PyObject *self = PyModule_Create(&module);
#define TEXT(x) #x
#define VALUE(x) TEXT(x)
#ifdef LIBJPEG_TURBO_VERSION
    if (self)
        PyModule_AddStringConstant(self, "LIBJPEG", "turbo " VALUE(LIBJPEG_TURBO_VERSION));
#else
    if (self)
        PyModule_AddIntConstant(self, "LIBJPEG", JPEG_LIB_VERSION);
#endif
    return self;
}
