/* Part of decoder.c: lines of a box to those of a crop, which may be resized and get other colors. */

typedef struct {
    Job job; /* that writes the lines of the crop */
    int lines_made;
    Filter across, down;
    uint8_t *ring; /* the last lines, resized along rows: as many as the filter `down` takes */
    size_t pitch;  /* of a channel in them, or in `pixels` */
    uint8_t *pixels; /* of the whole crop, whose colors depend on their mean */
    uint64_t sums[CHANNELS];
    double *exact;
    const uint8_t **rows;
    uint8_t *memory; /* of all that */
    size_t room;
} Crop;

/* In floating point, because the factors have no bound. `shift` includes the half that rounds. */
static void recolor_plain(const uint8_t *from, size_t pitch, int count, float map[CHANNELS][CHANNELS], const float *shift,
                          uint8_t *const to[CHANNELS])
{
    for (int c = 0; c < CHANNELS; c++)
        for (int x = 0; x < count; x++) {
            float value = map[c][0] * from[x] + map[c][1] * from[pitch + x] + map[c][2] * from[2 * pitch + x] + shift[c];
            value = value < 255.5f ? value : 255.5f;
            to[c][x] = (uint8_t)(value > 0 ? value : 0);
        }
}

static uint64_t add_bytes_plain(const uint8_t *bytes, int count)
{
    uint64_t sum = 0;
    for (int x = 0; x < count; x++)
        sum += bytes[x];
    return sum;
}

#if defined(__x86_64__)
AVX2 static uint64_t add_bytes_avx2(const uint8_t *bytes, int count)
{
    uint64_t sums[4];
    __m256i sum = _mm256_setzero_si256();
    int x = 0;
    for (; x + 32 <= count; x += 32)
        sum = _mm256_add_epi64(sum, _mm256_sad_epu8(_mm256_loadu_si256((const __m256i *)(bytes + x)), _mm256_setzero_si256()));
    _mm256_storeu_si256((__m256i *)sums, sum);
    return sums[0] + sums[1] + sums[2] + sums[3] + add_bytes_plain(bytes + x, count - x);
}

AVX2 static void recolor_avx2(const uint8_t *from, size_t pitch, int count, float map[CHANNELS][CHANNELS], const float *shift,
                              uint8_t *const to[CHANNELS])
{
    __m256 factors[CHANNELS][CHANNELS], shifts[CHANNELS];
    for (int c = 0; c < CHANNELS; c++) {
        shifts[c] = _mm256_set1_ps(shift[c]);
        for (int n = 0; n < CHANNELS; n++)
            factors[c][n] = _mm256_set1_ps(map[c][n]);
    }
    for (int x = 0; x < count; x += BLOCK) {
        __m256i values[CHANNELS][4];
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) {
            __m256 rgb[CHANNELS];
#pragma GCC unroll 3
            for (int n = 0; n < CHANNELS; n++)
                rgb[n] = _mm256_cvtepi32_ps(
                    _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(from + n * pitch + x + 8 * part))));
#pragma GCC unroll 3
            for (int c = 0; c < CHANNELS; c++) {
                __m256 sum = _mm256_add_ps(_mm256_mul_ps(factors[c][0], rgb[0]), _mm256_mul_ps(factors[c][1], rgb[1]));
                sum = _mm256_add_ps(_mm256_add_ps(sum, _mm256_mul_ps(factors[c][2], rgb[2])), shifts[c]);
                values[c][part] = _mm256_cvttps_epi32(_mm256_min_ps(sum, _mm256_set1_ps(255.5f)));
            }
        }
        for (int c = 0; c < CHANNELS; c++)
            _mm256_storeu_si256((__m256i *)(to[c] + x), in_order(to_bytes(values[c], _mm_setzero_si128())));
    }
}
#endif

static void (*recolor)(const uint8_t *, size_t, int, float[CHANNELS][CHANNELS], const float *, uint8_t *const[CHANNELS]) =
    recolor_plain;
static uint64_t (*add_bytes)(const uint8_t *, int) = add_bytes_plain;

static void *carve(uint8_t *memory, size_t *used, size_t bytes)
{
    void *part = memory ? memory + *used : NULL;
    *used += (bytes + 63) / 64 * 64;
    return part;
}

/* Divides `memory`, if there is any, and returns how much the crop takes. */
static size_t divide(Crop *crop, uint8_t *memory)
{
    Filter *filters[] = {&crop->across, &crop->down};
    size_t used = 0, weights = 0, lines = 2 * (size_t)crop->down.pairs;
    for (int n = 0; n < 2 && crop->job.size; n++) {
        size_t padded = (size_t)filters[n]->padded, taps = 2 * (size_t)filters[n]->pairs;
        filters[n]->first = carve(memory, &used, padded * sizeof(int32_t));
        filters[n]->weights = carve(memory, &used, taps * padded * sizeof(int16_t));
        filters[n]->base = carve(memory, &used, padded / QUAD * sizeof(int32_t));
        filters[n]->masks = carve(memory, &used, padded * 4);
        weights = taps * padded > weights ? taps * padded : weights;
    }
    crop->exact = carve(memory, &used, weights * sizeof(double));
    crop->rows = carve(memory, &used, lines * sizeof *crop->rows);
    crop->ring = carve(memory, &used, lines * CHANNELS * crop->pitch);
    crop->pixels = carve(memory, &used, crop->job.recolor ? (size_t)crop->job.height * CHANNELS * crop->pitch : 0);
    return used;
}

/* For the lines of a job's box. Returns 0 if there is no memory. */
static int begin_crop(Crop *crop, const Job *job)
{
    crop->job = *job;
    crop->lines_made = 0;
    if (!job->size && !job->recolor)
        return 1;
    if (job->size) {
        set_sizes(&crop->across, job->width, job->size);
        set_sizes(&crop->down, job->height, job->size);
        crop->job.height = crop->job.width = job->size;
        crop->job.mirror = 0; /* the filter does it */
    }
    crop->pitch = (size_t)padded_to(crop->job.width, BLOCK);
    memset(crop->sums, 0, sizeof crop->sums);
    size_t bytes = divide(crop, NULL);
    if (bytes > crop->room) {
        free(crop->memory);
        crop->memory = aligned_alloc(64, bytes);
        crop->room = crop->memory ? bytes : 0;
    }
    if (!crop->memory)
        return 0;
    divide(crop, crop->memory);
    if (job->size) {
        fill_filter(&crop->across, job->mirror, crop->exact);
        fill_masks(&crop->across);
        fill_filter(&crop->down, 0, crop->exact);
    }
    return 1;
}

/* The next line of the crop. */
static void finish_line(Crop *crop, Lines *lines, const uint8_t *const rows[CHANNELS], const Format *format)
{
    Job *job = &crop->job;
    size_t pitch = crop->pitch;
    int y = crop->lines_made++;
    if (!job->recolor) {
        write_line(lines, rows, job, format, y);
        return;
    }
    for (int c = 0; c < CHANNELS; c++) {
        memcpy(crop->pixels + (CHANNELS * (size_t)y + c) * pitch, rows[c], job->width);
        crop->sums[c] += add_bytes(rows[c], job->width);
    }
    if (crop->lines_made < job->height)
        return;
    float shift[CHANNELS];
    for (int c = 0; c < CHANNELS; c++) {
        double sum = 0;
        for (int from = 0; from < CHANNELS; from++)
            sum += (double)job->colors[1][c][from] * (double)crop->sums[from];
        shift[c] = (float)(sum / ((double)job->width * job->height) + 0.5);
    }
    uint8_t *made[CHANNELS] = {lines->made[0], lines->made[1], lines->made[2]};
    for (y = 0; y < job->height; y++) {
        recolor(crop->pixels + CHANNELS * (size_t)y * pitch, pitch, job->width, job->colors[0], shift, made);
        write_line(lines, (const uint8_t *const *)made, job, format, y);
    }
}

/* Takes line y of the crop's box, and writes what is then known of the crop. */
static void take_line(Crop *crop, Lines *lines, const uint8_t *const rows[CHANNELS], const Format *format, int y)
{
    Filter *down = &crop->down;
    int taps = 2 * down->pairs;
    if (!crop->job.size) {
        finish_line(crop, lines, rows, format);
        return;
    }
    const uint8_t *made[CHANNELS] = {lines->made[0], lines->made[1], lines->made[2]};
    for (int c = 0; c < CHANNELS; c++)
        resize_across(&crop->across, rows[c], crop->ring + ((size_t)(y % taps) * CHANNELS + c) * crop->pitch);
    while (crop->lines_made < down->outputs) {
        int first = down->first[crop->lines_made], end = first + taps;
        if (y + 1 < (end < down->inputs ? end : down->inputs))
            break;
        for (int n = 0; n < taps; n++)
            crop->rows[n] = crop->ring + (size_t)((first + n) % taps) * CHANNELS * crop->pitch;
        for (int c = 0; c < CHANNELS; c++)
            resize_down(down, crop->lines_made, crop->rows, c * crop->pitch, (int)crop->pitch, lines->made[c]);
        finish_line(crop, lines, made, format);
    }
}

/* ---- Several crops of an image, made at once from each of its lines ---- */

typedef struct {
    Crop *each;
    int64_t room;
} Crops;

/* How many jobs from the first on are of the same image. */
static int64_t same_image(const Job *jobs, const Job *end)
{
    int64_t count = 1;
    while (jobs + count < end && jobs[count].data == jobs->data && jobs[count].length == jobs->length
           && jobs[count].image_height == jobs->image_height && jobs[count].image_width == jobs->image_width)
        count++;
    return count;
}

/* The smallest crop that contains those of all jobs, or the whole image if one is to keep it. */
static Job surround(const Job *jobs, int64_t count)
{
    Job box = *jobs;
    int bottom = 0, right = 0;
    for (const Job *job = jobs; job < jobs + count; job++) {
        box.top = job->top < box.top ? job->top : box.top, box.left = job->left < box.left ? job->left : box.left;
        bottom = job->top + job->height > bottom ? job->top + job->height : bottom;
        right = job->left + job->width > right ? job->left + job->width : right;
        if (job->keep)
            box.top = box.left = 0, bottom = job->image_height, right = job->image_width;
    }
    box.height = bottom - box.top, box.width = right - box.left;
    return box;
}

/* For the lines of the jobs' boxes. Returns 0 if there is no memory. */
static int begin_crops(Crops *crops, const Job *jobs, int64_t count)
{
    if (count > crops->room) {
        Crop *more = realloc(crops->each, (size_t)count * sizeof *more);
        if (!more)
            return 0;
        memset(more + crops->room, 0, (size_t)(count - crops->room) * sizeof *more);
        crops->each = more, crops->room = count;
    }
    for (int64_t n = 0; n < count; n++)
        if (!begin_crop(&crops->each[n], &jobs[n]))
            return 0;
    return 1;
}

static void free_crops(Crops *crops)
{
    for (int64_t n = 0; n < crops->room; n++)
        free(crops->each[n].memory);
    free(crops->each);
}

/* What the jobs need of the image's lines `begin` to `end`, which lie in lines->rows, from column `left` on. One crop after the
   other: line by line, memory takes the writes to all of them a third slower. */
static void take_lines(Crops *crops, Lines *lines, const Job *jobs, int64_t count, const Format *format, int begin, int end,
                       int left)
{
    for (int64_t n = 0; n < count; n++) {
        const Job *job = &jobs[n];
        for (int y = clamp(job->top, begin, end); y < clamp(job->top + job->height, begin, end); y++) {
            uint8_t(*from)[SIDE_ROOM] = lines->rows[y - begin];
            int skip = job->left - left;
            const uint8_t *rows[CHANNELS] = {from[0] + skip, from[1] + skip, from[2] + skip};
            take_line(&crops->each[n], lines, rows, format, y - job->top);
        }
    }
}

/* From decoded pixels. Returns 0 if there is no memory. */
static int convert_image(Crops *crops, Lines *lines, const Job *jobs, int64_t count, const Format *format)
{
    Job box = surround(jobs, count);
    int step = count > 1 ? LINES : 1;
    if (!begin_crops(crops, jobs, count))
        return 0;
    for (int begin = box.top, end; begin < box.top + box.height; begin = end) {
        end = clamp(begin + step, begin, box.top + box.height);
        for (int y = begin; y < end; y++) {
            uint8_t(*to)[SIDE_ROOM] = lines->rows[y - begin];
            const uint8_t *from = (const uint8_t *)(intptr_t)box.data + ((size_t)y * box.image_width + box.left) * CHANNELS;
            split(from, box.width, (uint8_t *[]){to[0], to[1], to[2]});
        }
        take_lines(crops, lines, jobs, count, format, begin, end, box.left);
    }
    return 1;
}
