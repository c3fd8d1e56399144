/* Part of decoder.c: the header of a JPEG, up to the entropy-coded data (ITU T.81, B.1 and B.2), and the tables that it makes. */

enum { SOF0 = 0xc0, DHT = 0xc4, SOI = 0xd8, EOI = 0xd9, SOS = 0xda, DQT = 0xdb, DRI = 0xdd, APP0 = 0xe0, APP14 = 0xee, COM = 0xfe };

typedef struct {
    int marker, length; /* of its body */
    const uint8_t *body;
} Segment;

/* The segment at `*at`, which moves behind it; 0 if there is none. */
static int next_segment(const uint8_t *data, int length, int *at, Segment *segment)
{
    while (length - *at > 4 && data[*at] == 0xff && data[*at + 1] == 0xff) /* fill bytes (B.1.1.2) */
        ++*at;
    if (length - *at < 4 || data[*at] != 0xff)
        return 0;
    int size = data[*at + 2] << 8 | data[*at + 3];
    if (size < 2 || size > length - *at - 2)
        return 0;
    *segment = (Segment){data[*at + 1], size - 2, data + *at + 4};
    *at += 2 + size;
    return 1;
}

static int starts_as_jpeg(const uint8_t *data, int length)
{
    return length >= 4 && data[0] == 0xff && data[1] == SOI;
}

/* Of a JPEG of any process; zeros where no frame header is found. */
static void find_size(const uint8_t *data, int length, int32_t *height, int32_t *width)
{
    Segment segment;
    *height = *width = 0;
    if (!starts_as_jpeg(data, length))
        return;
    for (int at = 2; next_segment(data, length, &at, &segment);) {
        int marker = segment.marker;
        if ((marker & 0xf0) == SOF0 && marker != DHT && marker != 0xc8 && marker != 0xcc && segment.length >= 5) {
            *height = segment.body[1] << 8 | segment.body[2];
            *width = segment.body[3] << 8 | segment.body[4];
            return;
        }
    }
}

#if defined(__x86_64__)

/* ---- Huffman tables (T.81 Annex C) ---- */

enum {
    /* Of one look into a table, which has 16 KB. 13 bits leave the inner loop a third less often, but their 64 KB do not fit the
       first-level cache. */
    LOOK_BITS = 11,
    LOOKS = 1 << LOOK_BITS,
    END = 128,      /* added to a look's steps: the block ends there */
    TOO_LONG = 255, /* a look's steps where it holds not one whole coefficient */
    ZEROS = 15,     /* the run of the code for 16 zeros (T.81 F.1.2.2.1) */
};

/* What one look finds: all coefficients that lie whole in it and within four places, zeros included, and the block's end if that
   follows; or one coefficient behind more zeros; or 16 zeros. */
typedef struct {
    int8_t values[4];
    uint32_t facts; /* from the lowest byte: bits used; zeros before `values`; nothing; steps from the last coefficient known.
                       Where TOO_LONG: 0; the code as in `codes`, two bytes; TOO_LONG */
} Look;

typedef struct {
    Look looks[LOOKS];
    uint16_t codes[LOOKS]; /* run << 12 | size << 8 | bits of the code; 0 where the code is longer */
    int32_t limit[17];     /* codes of n bits are below it, left-aligned in 16 bits */
    int32_t delta[17];     /* from a code of n bits to its place in `symbols` */
    uint8_t symbols[256];
} Huffman;

/* The difference that `size` bits stand for (T.81 F.2.2.1, EXTEND). */
static int extend(int value, int size)
{
    return size && value < 1 << (size - 1) ? value - (1 << size) + 1 : value;
}

static void fill_looks(Huffman *table)
{
    for (int n = 0; n < LOOKS; n++) {
        Look *look = &table->looks[n];
        int used = 0, steps = 0, zeros = 0;
        memset(look->values, 0, sizeof look->values);
        while (steps < 4) {
            unsigned code = table->codes[(n << used) & (LOOKS - 1)];
            int bits = code & 255, size = code >> 8 & 15, run = (int)(code >> 12);
            if (!bits || used + bits + size > LOOK_BITS)
                break;
            if (!size && run == ZEROS) {
                if (!used)
                    used = bits, steps = 16;
                break;
            }
            if (!size) { /* libjpeg takes all other runs without a value for the block's end too */
                used += bits, steps += END;
                break;
            }
            int value = extend(n >> (LOOK_BITS - used - bits - size) & ((1 << size) - 1), size);
            if (value < INT8_MIN || value > INT8_MAX || (used && steps + run + 1 > 4))
                break;
            if (run > 3)
                zeros = run, look->values[0] = (int8_t)value;
            else
                look->values[steps + run] = (int8_t)value;
            used += bits + size, steps += run + 1;
        }
        look->facts = used ? (uint32_t)steps << 24 | (uint32_t)zeros << 8 | (uint32_t)used
                           : (uint32_t)TOO_LONG << 24 | (uint32_t)table->codes[n] << 8;
    }
}

/* `symbols` has `total` bytes, the sum of `counts`. Returns 0 where libjpeg refuses the table. */
static int make_huffman(Huffman *table, const uint8_t counts[16], const uint8_t *symbols, int total, int dc)
{
    int code = 0, at = 0;
    memset(table->codes, 0, sizeof table->codes);
    memcpy(table->symbols, symbols, total);
    for (int bits = 1; bits <= 16; bits++, code <<= 1) {
        table->delta[bits] = at - code;
        for (int n = 0; n < counts[bits - 1]; n++, code++, at++) {
            if (code + 1 >= 1 << bits || (dc && symbols[at] > 15)) /* all ones is no code */
                return 0;
            int spare = LOOK_BITS - bits;
            for (int rest = 0; spare >= 0 && rest < 1 << spare; rest++)
                table->codes[(code << spare) + rest] = (uint16_t)(symbols[at] << 8 | bits);
        }
        table->limit[bits] = code << (16 - bits);
    }
    if (!dc)
        fill_looks(table);
    return 1;
}

/* ---- Tables of a header ---- */

enum {
    CYCLE = 6, /* blocks after which their components repeat: an MCU of 4:2:0 (four of luma, Cb, Cr), or two of 4:4:4 */
    MAX_HEADER = 1 << 16,
    /* From here on an image goes to libjpeg-turbo, whose 16-bit arithmetic may overflow. A block of 8-bit samples reaches 1,024
       before quantization, and its rounding adds half a step of 255 at most. */
    MAX_PRODUCT = 4096,
};

typedef struct {
    int16_t factor[64] __attribute__((aligned(32))); /* in zigzag order */
    int16_t most[64] __attribute__((aligned(32)));   /* the largest coefficient whose product is below MAX_PRODUCT */
} Quantizer;

/* Making these takes 23 us, so they are kept for headers that differ in nothing but the size of the image. */
typedef struct {
    Huffman dc[2], ac[2];
    Quantizer quantizers[CHANNELS];
    const Huffman *dc_of[CYCLE], *ac_of[CYCLE]; /* by block of a cycle */
    uint8_t component_of[CYCLE];
    int components;    /* 3, or 1: gray */
    int chroma;        /* pixels of a side of a sample of chroma: 2 in 4:2:0, 1 in 4:4:4, 0 in gray */
    int header_length; /* 0: none yet */
    int size_at;       /* in the header: height and width, four bytes */
    uint8_t header[MAX_HEADER];
} Tables;

typedef struct {
    uint8_t quantizers[4][64];
    int has_quantizer, has_dc, has_ac; /* a bit for each table */
    int quantizer_of[CHANNELS];
    int components, chroma, size_at;
} Found;

static int read_quantizers(Found *found, const Segment *segment)
{
    const uint8_t *at = segment->body;
    int left = segment->length;
    for (; left >= 65; at += 65, left -= 65) {
        if (at[0] > 3 || memchr(at + 1, 0, 64)) /* more than 8 bits, or a factor of 0 */
            return 0;
        memcpy(found->quantizers[at[0]], at + 1, 64);
        found->has_quantizer |= 1 << at[0];
    }
    return left == 0;
}

static int read_huffman(Tables *tables, Found *found, const Segment *segment)
{
    const uint8_t *at = segment->body;
    int left = segment->length;
    while (left >= 17) {
        int ac = at[0] >> 4, number = at[0] & 15, total = 0;
        for (int bits = 1; bits <= 16; bits++)
            total += at[bits];
        if (ac > 1 || number > 1 || total > 256 || total > left - 17)
            return 0;
        if (!make_huffman(ac ? &tables->ac[number] : &tables->dc[number], at + 1, at + 17, total, !ac))
            return 0;
        *(ac ? &found->has_ac : &found->has_dc) |= 1 << number;
        at += 17 + total, left -= 17 + total;
    }
    return left == 0;
}

static int read_frame(const uint8_t *data, Found *found, const Segment *segment)
{
    const uint8_t *body = segment->body;
    int components = segment->length < 9 ? 0 : body[5], halved = components == CHANNELS && body[7] == 0x22;
    if (found->size_at || (components != 1 && components != CHANNELS) || segment->length != 6 + 3 * components || body[0] != 8)
        return 0;
    for (int c = 0; c < components; c++) {
        const uint8_t *component = body + 6 + 3 * c;
        if (component[0] != c + 1 || component[1] != (halved && !c ? 0x22 : 0x11) || component[2] > 3)
            return 0;
        found->quantizer_of[c] = component[2];
    }
    found->components = components;
    found->chroma = components == 1 ? 0 : halved ? 2 : 1;
    found->size_at = (int)(body + 1 - data);
    return 1;
}

static int read_scan(Tables *tables, const Found *found, const Segment *segment)
{
    const uint8_t *body = segment->body, *spectrum = body + 1 + 2 * found->components;
    if (!found->size_at || segment->length != 4 + 2 * found->components || body[0] != found->components || spectrum[0] != 0
        || spectrum[1] != 63 || spectrum[2] != 0)
        return 0;
    tables->components = found->components, tables->chroma = found->chroma;
    for (int block = 0; block < CYCLE; block++) {
        int c = found->chroma == 2 ? (block < 4 ? 0 : block - 3) : block % found->components;
        int dc = body[2 + 2 * c] >> 4, ac = body[2 + 2 * c] & 15, quantizer = found->quantizer_of[c];
        if (body[1 + 2 * c] != c + 1 || dc > 1 || ac > 1 || !(found->has_dc >> dc & 1) || !(found->has_ac >> ac & 1)
            || !(found->has_quantizer >> quantizer & 1))
            return 0;
        tables->component_of[block] = (uint8_t)c;
        tables->dc_of[block] = &tables->dc[dc], tables->ac_of[block] = &tables->ac[ac];
    }
    for (int c = 0; c < found->components; c++)
        for (int k = 0; k < 64; k++) {
            int factor = found->quantizers[found->quantizer_of[c]][k];
            tables->quantizers[c].factor[k] = (int16_t)factor;
            tables->quantizers[c].most[k] = (int16_t)((MAX_PRODUCT - 1) / factor);
        }
    return 1;
}

/* Returns 0 where the image is not regular. */
static int read_header(Tables *tables, const uint8_t *data, int length)
{
    Found found = {0};
    Segment segment;
    int regular = starts_as_jpeg(data, length), at = 2;
    tables->header_length = 0;
    while (regular && at < MAX_HEADER && next_segment(data, length, &at, &segment)) {
        switch (segment.marker) {
        case DQT:
            regular = read_quantizers(&found, &segment);
            break;
        case DHT:
            regular = read_huffman(tables, &found, &segment);
            break;
        case SOF0:
            regular = read_frame(data, &found, &segment);
            break;
        case DRI:
            regular = segment.length == 2 && !segment.body[0] && !segment.body[1];
            break;
        case SOS:
            if (!read_scan(tables, &found, &segment) || at > MAX_HEADER)
                return 0;
            memcpy(tables->header, data, at);
            tables->header_length = at;
            tables->size_at = found.size_at;
            return 1;
        case APP14: /* Adobe's may say that the colors are not YCbCr */
            regular = segment.length >= 12 && !memcmp(segment.body, "Adobe", 5) && segment.body[11] == 1;
            break;
        default:
            regular = (segment.marker & 0xf0) == APP0 || segment.marker == COM;
        }
    }
    return 0;
}

static int same_header(const Tables *tables, const uint8_t *data, int length)
{
    int behind = tables->size_at + 4;
    return tables->header_length && length >= tables->header_length && !memcmp(data, tables->header, tables->size_at)
        && !memcmp(data + behind, tables->header + behind, tables->header_length - behind);
}
#endif
