/* Feeds damaged JPEGs to the decoder, under sanitizers, beside libjpeg-turbo: an image that the decoder takes must be one that
   libjpeg-turbo takes without a warning, with the same pixels; and a sound image decoded at the same time must come out the same.

   `make fuzz` builds it for libFuzzer if there is clang. Otherwise it brings mutations of its own: fuzz CORPUS SECONDS [SEED]. */

#include <dirent.h>
#include <setjmp.h>
#include <stdio.h>
#include <time.h>

#define WITHOUT_PYTHON
#include "../../codec/decoder.c"

#include <jerror.h>
#include <jpeglib.h>

enum { MOST = 1 << 17 }; /* pixels of an image that is compared, and bytes of a file */

static struct {
    struct jpeg_error_mgr base;
    jmp_buf escape;
} errors;

static void refuse(j_common_ptr jpeg)
{
    (void)jpeg;
    longjmp(errors.escape, 1);
}

static void on_message(j_common_ptr jpeg, int level)
{
    /* codec/libjpeg.c ignores these two as well. */
    if (level < 0 && jpeg->err->msg_code != JWRN_JFIF_MAJOR && jpeg->err->msg_code != JWRN_ADOBE_XFORM)
        refuse(jpeg);
}

/* RGB of an image without damage, or NULL. */
static uint8_t *by_libjpeg(const uint8_t *data, size_t length, int *height, int *width)
{
    struct jpeg_decompress_struct jpeg = {0};
    uint8_t *volatile pixels = NULL;
    volatile int sound = 0;
    jpeg.err = jpeg_std_error(&errors.base);
    errors.base.error_exit = refuse;
    errors.base.emit_message = on_message;
    if (!setjmp(errors.escape)) {
        jpeg_create_decompress(&jpeg);
        jpeg_mem_src(&jpeg, data, length);
        jpeg_read_header(&jpeg, TRUE);
        jpeg.out_color_space = JCS_RGB;
        if (jpeg.image_width * (size_t)jpeg.image_height > MOST)
            refuse((j_common_ptr)&jpeg);
        jpeg_start_decompress(&jpeg);
        *height = (int)jpeg.output_height, *width = (int)jpeg.output_width;
        pixels = malloc((size_t)*height * *width * CHANNELS);
        while (jpeg.output_scanline < jpeg.output_height) {
            JSAMPROW row = pixels + (size_t)jpeg.output_scanline * *width * CHANNELS;
            jpeg_read_scanlines(&jpeg, &row, 1);
        }
        jpeg_finish_decompress(&jpeg);
        sound = 1;
    }
    jpeg_destroy_decompress(&jpeg);
    if (!sound)
        free(pixels);
    return sound ? pixels : NULL;
}

/* Whether an image has no damage and these samples, all of them or those that the job asks for, as `decode_jobs` writes PLANES. */
static int has_samples(const uint8_t *data, size_t length, const Job *job, const uint8_t *samples)
{
    struct jpeg_decompress_struct jpeg = {0};
    uint8_t *volatile row = NULL;
    volatile int sound = 0, same = 1;
    jpeg.err = jpeg_std_error(&errors.base);
    errors.base.error_exit = refuse;
    errors.base.emit_message = on_message;
    if (!setjmp(errors.escape)) {
        JSAMPROW lines[CHANNELS][16];
        JSAMPARRAY bands[CHANNELS] = {lines[0], lines[1], lines[2]};
        size_t pitch = ((size_t)job->image_width + 15) / 16 * 16;
        jpeg_create_decompress(&jpeg);
        jpeg_mem_src(&jpeg, data, length);
        jpeg_read_header(&jpeg, TRUE);
        jpeg.raw_data_out = TRUE, jpeg.out_color_space = jpeg.jpeg_color_space;
        jpeg_start_decompress(&jpeg);
        row = malloc(CHANNELS * 16 * pitch);
        for (int c = 0; c < CHANNELS; c++)
            for (int y = 0; y < 16; y++)
                lines[c][y] = row + (c * 16 + y) * pitch;
        int step = 8 * jpeg.max_v_samp_factor;
        for (int top = 0; jpeg.output_scanline < jpeg.output_height; top += step) {
            jpeg_read_raw_data(&jpeg, bands, step);
            for (int c = 0; c < jpeg.num_components; c++) {
                int pixels = c ? jpeg.max_v_samp_factor : 1, left = (job->left + pixels - 1) / pixels;
                int end = (job->left + job->width) / pixels, last = (job->top + job->height) / pixels;
                for (int y = top / pixels; y < last && y < (top + step) / pixels; y++)
                    same &= y < (job->top + pixels - 1) / pixels || left >= end
                        || !memcmp(samples + c * plane_bytes(job) + y * pitch + left, lines[c][y - top / pixels] + left, end - left);
            }
        }
        jpeg_finish_decompress(&jpeg);
        sound = 1;
    }
    jpeg_destroy_decompress(&jpeg);
    free(row);
    return sound && same;
}

static uint64_t state = 88172645463325252u;

static uint32_t draw(uint32_t below) /* Marsaglia, Xorshift RNGs, 2003 */
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 20) % below;
}

static void demand(int fact, const char *what)
{
    if (!fact) {
        fprintf(stderr, "%s\n", what);
        abort();
    }
}

static Workspace *workspace;
static const uint8_t *sound_jpeg, *sound_pixels;
static size_t sound_length;
static struct {
    long tried, taken, refused, samples;
} counts;

static size_t output_bytes(const Job *job, Type type)
{
    size_t pixels = job->size ? (size_t)job->size * job->size : (size_t)job->height * job->width;
    return pixels * CHANNELS * value_bytes(type);
}

/* Exactly as many bytes as the crop takes, so that a sanitizer sees a byte more. */
static void *output(const Job *job, Type type)
{
    void *out = NULL;
    demand(!posix_memalign(&out, 64, output_bytes(job, type)), "no memory");
    return out;
}

static Job whole(const uint8_t *data, size_t length)
{
    Job job = {.data = (intptr_t)data, .length = (int32_t)length};
    find_size(data, job.length, &job.image_height, &job.image_width);
    job.height = job.image_height, job.width = job.image_width < MAX_SIDE ? job.image_width : MAX_SIDE;
    return job;
}

static int decode_whole(const uint8_t *data, size_t length, uint8_t **pixels)
{
    Format format = {BYTES, 1, {1, 1, 1}, NULL};
    Job job = whole(data, length);
    *pixels = NULL;
    if (job.height < 1 || job.width < 1 || (size_t)job.height * job.width > MOST)
        return 0;
    *pixels = output(&job, BYTES);
    job.out = (intptr_t)*pixels;
    decode_jobs(workspace, &job, &job + 1, &format, 1);
    return job.done;
}

/* As on a CPU without AVX2, until `prepare`. */
static void use_plain_code(void)
{
    write_floats = write_floats_plain, reverse = reverse_plain, interleave = interleave_plain, split = split_plain;
    resize_across = across_plain, resize_down = down_plain, recolor = recolor_plain, add_bytes = add_bytes_plain;
}

/* Crops of the image and of a sound one in any order, type and layout, some resized and some with other colors; some keep the whole
   image too. */
static void decode_crops(const uint8_t *data, size_t length, const uint8_t *pixels)
{
    Format format = {(Type)draw(4), (int)draw(2), {0.5f, 2, 1}, NULL};
    Job jobs[4];
    void *outputs[4], *expected[4];
    for (int n = 0; n < 4; n++) {
        Job *job = &jobs[n];
        *job = draw(2) ? whole(sound_jpeg, sound_length) : whole(data, length);
        if (job->height < 1 || job->width < 1 || (size_t)job->height * job->width > MOST)
            *job = whole(sound_jpeg, sound_length);
        if (!draw(3))
            job->keep = (intptr_t)output(job, BYTES);
        job->top = (int)draw((uint32_t)job->height), job->left = (int)draw((uint32_t)job->width);
        job->height = 1 + (int)draw((uint32_t)(job->height - job->top));
        job->width = 1 + (int)draw((uint32_t)(job->width - job->left));
        job->mirror = (int)draw(2);
        for (int c = 0; c < CHANNELS; c++)
            job->mean[c] = (float)draw(300);
        job->size = draw(3) ? 0 : 1 + (int)draw(100);
        job->recolor = !draw(3);
        for (int n = 0; n < 2 * CHANNELS * CHANNELS; n++)
            job->colors[n / 9][n % 9 / 3][n % 3] = (float)draw(4) - 1.3f;
        outputs[n] = output(job, format.type), expected[n] = output(job, format.type);
        job->out = (intptr_t)outputs[n];
    }
    decode_jobs(workspace, jobs, jobs + 4, &format, (int)draw(2));
    static Lines lines;
    static Crops crops;
    for (int n = 0; n < 4; n++) {
        Job job = jobs[n];
        const uint8_t *from = job.data == (intptr_t)sound_jpeg ? sound_pixels : pixels;
        demand(job.done || from != sound_pixels, "a sound image is refused beside a damaged one");
        if (job.done && from) {
            job.data = (intptr_t)from, job.out = (intptr_t)expected[n];
            use_plain_code();
            demand(convert_image(&crops, &lines, &job, 1, &format), "no memory");
            prepare();
            demand(!memcmp(outputs[n], expected[n], output_bytes(&job, format.type)), "a crop differs from libjpeg-turbo's");
            size_t size = (size_t)job.image_height * job.image_width * CHANNELS;
            demand(!job.keep || !memcmp((void *)(intptr_t)job.keep, from, size), "a kept image differs from libjpeg-turbo's");
        }
        free(outputs[n]), free(expected[n]), free((void *)(intptr_t)job.keep);
    }
}

/* The samples of a part of the image, and of a sound one in turns. */
static void decode_samples(const uint8_t *data, size_t length)
{
    Format format = {.type = PLANES};
    Job jobs[3] = {whole(sound_jpeg, sound_length), whole(data, length), whole(sound_jpeg, sound_length)};
    if ((size_t)jobs[1].height * jobs[1].width > MOST)
        return;
    for (int n = 0; n < 3; n++) { /* as for `samples`, sides of 0 are no error here */
        Job *job = &jobs[n];
        job->top = (int)draw((uint32_t)job->height + !job->height) / 2;
        job->left = (int)draw((uint32_t)job->width + !job->width) / 2;
        job->height -= 2 * job->top, job->width -= 2 * job->left;
        job->out = (intptr_t)malloc(CHANNELS * plane_bytes(job));
    }
    decode_jobs(workspace, jobs, jobs + 3, &format, 1);
    for (int n = 0; n < 3; n++) {
        const Job *job = &jobs[n];
        const uint8_t *from = (const uint8_t *)(intptr_t)job->data;
        demand(job->done || n == 1, "a sound image is refused beside a damaged one");
        demand(!job->done || has_samples(from, (size_t)job->length, job, (uint8_t *)(intptr_t)job->out),
               "samples are taken that libjpeg-turbo does not make");
        counts.samples += job->done && n == 1;
        free((void *)(intptr_t)job->out);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length)
{
    int height = 0, width = 0;
    uint8_t *ours;
#ifdef LIBFUZZER /* the same input must do the same */
    state = 88172645463325252u + length;
#endif
    if (!workspace) {
        (void)!posix_memalign((void **)&workspace, 64, sizeof *workspace);
        memset(workspace, 0, sizeof *workspace);
        prepare();
    }
    if (!sound_jpeg) {
        uint8_t *copy = malloc(length + 1);
        if (!decode_whole(data, length, &ours)) {
            free(copy), free(ours);
            return 0;
        }
        free(ours);
        sound_jpeg = memcpy(copy, data, length), sound_length = length;
        sound_pixels = by_libjpeg(data, length, &height, &width);
    }
    int taken = decode_whole(data, length, &ours);
    uint8_t *pixels = by_libjpeg(data, length, &height, &width);
    counts.tried++, counts.taken += taken, counts.refused += !taken && pixels;
    demand(!taken || pixels, "an image is taken of which libjpeg-turbo warns");
    demand(!taken || !memcmp(ours, pixels, (size_t)height * width * CHANNELS), "pixels differ from libjpeg-turbo's");
    decode_crops(data, length, pixels);
    decode_samples(data, length);
    free(ours), free(pixels);
    return 0;
}

#ifndef LIBFUZZER

typedef struct {
    uint8_t *data;
    size_t length;
} File;

static size_t mutate(uint8_t *data, size_t length, size_t header)
{
    size_t at = header + draw((uint32_t)(length - header)), count = 1 + draw(64);
    switch (draw(8)) {
    case 0: /* bits anywhere */
        for (int n = 1 + (int)draw(4); n--;)
            data[draw((uint32_t)length)] ^= (uint8_t)(1 << draw(8));
        break;
    case 1: /* bits of the data */
        for (int n = 1 + (int)draw(4); n--;)
            data[header + draw((uint32_t)(length - header))] ^= (uint8_t)(1 << draw(8));
        break;
    case 2: /* bytes of the header */
        for (int n = 1 + (int)draw(3); n--;)
            data[draw((uint32_t)header)] = (uint8_t)draw(256);
        break;
    case 3: /* small changes in the header */
        data[draw((uint32_t)header)] += (uint8_t)(draw(3) - 1);
        break;
    case 4: /* a cut */
        return draw((uint32_t)length);
    case 5: /* a hole */
        count = draw((uint32_t)(length - at)) % 2000;
        memmove(data + at, data + at + count, length - at - count);
        return length - count;
    case 6: /* markers and stuffing */
        for (; count-- && at < length; at++)
            data[at] = draw(3) ? 0xff : (uint8_t)(draw(2) ? 0 : draw(256));
        break;
    default: /* the same value up to the end marker */
        memset(data + at, draw(2) ? 0xfe : (int)draw(256), length - at);
        data[length - 2] = 0xff, data[length - 1] = EOI;
    }
    return length;
}

int main(int argc, char **argv)
{
    static File files[4096];
    int count = 0;
    DIR *folder = argc > 2 ? opendir(argv[1]) : NULL;
    demand(folder != NULL, "usage: fuzz CORPUS SECONDS [SEED]");
    for (struct dirent *entry; (entry = readdir(folder)) && count < 4096;) {
        char path[4096];
        snprintf(path, sizeof path, "%s/%s", argv[1], entry->d_name);
        FILE *file = entry->d_name[0] == '.' ? NULL : fopen(path, "rb");
        if (!file)
            continue;
        uint8_t *data = malloc(MOST);
        size_t length = fread(data, 1, MOST, file);
        fclose(file);
        files[count++] = (File){data, length};
        LLVMFuzzerTestOneInput(data, length);
    }
    closedir(folder);
    demand(sound_jpeg != NULL, "the corpus has no regular JPEG");
    printf("%d images: %ld taken\n", count, counts.taken);
    if (argc > 3)
        state = strtoull(argv[3], NULL, 10) * 2654435761u + 1;
    for (time_t end = time(NULL) + atol(argv[2]); time(NULL) < end;) {
        File file = files[draw((uint32_t)count)];
        uint8_t *copy = malloc(file.length);
        memcpy(copy, file.data, file.length);
        size_t header = file.length < 700 ? file.length / 2 : 623, length = mutate(copy, file.length, header);
        uint8_t *exact = malloc(length + !length); /* so that a sanitizer sees a byte more */
        memcpy(exact, copy, length);
        LLVMFuzzerTestOneInput(exact, length);
        free(copy), free(exact);
    }
    printf("%ld images: %ld taken, with the pixels of libjpeg-turbo; %ld left to it that it takes; samples of %ld\n", counts.tried,
           counts.taken, counts.refused, counts.samples);
    return 0;
}
#endif
