/* Part of decoder.c: coefficients to samples. libjpeg's islow transform (Loeffler, Ligtenberg and Moschytz 1989), in the steps and
   widths of libjpeg-turbo's SIMD code, of two blocks at a time. */

enum { FEW = 9 }; /* up to this place of zigzag order, all coefficients are in the first four rows */

static const uint8_t ZIGZAG[64] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
};

/* For each row of a block and each eight coefficients in zigzag order: the bytes of these that belong there. Coefficients stay in
   that order until here, so that a look writes four at once; 36 shuffles for two blocks put them right. */
static uint8_t picks[8][8][32] __attribute__((aligned(32)));

static void fill_picks(void)
{
    memset(picks, 0x80, sizeof picks);
    for (int k = 0; k < 64; k++)
        for (int byte = 0; byte < 4; byte++) {
            int lane = byte / 2 * 16, low = byte % 2;
            picks[ZIGZAG[k] / 8][k / 8][lane + ZIGZAG[k] % 8 * 2 + low] = (uint8_t)(k % 8 * 2 + low);
        }
}

INLINE AVX2 __m256i both(const int16_t *first, const int16_t *second)
{
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_load_si128((const __m128i *)first)),
                                   _mm_load_si128((const __m128i *)second), 1);
}

/* Row `row` of both blocks, from the eights of zigzag order in the bits of `parts`. */
INLINE AVX2 __m256i pick(const __m256i eights[8], int row, int parts)
{
    __m256i found = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int part = 0; part < 8; part++)
        if (parts >> part & 1)
            found = _mm256_or_si256(found, _mm256_shuffle_epi8(eights[part], _mm256_load_si256((const __m256i *)picks[row][part])));
    return found;
}

/* a * x + b * y of pairs (x, y) */
INLINE AVX2 __m256i weigh(__m256i pairs, int a, int b)
{
    return _mm256_madd_epi16(pairs, _mm256_set1_epi32((int)((uint32_t)(uint16_t)b << 16 | (uint16_t)a)));
}

INLINE AVX2 __m256i interleave_half(__m256i a, __m256i b, int half)
{
    return half ? _mm256_unpackhi_epi16(a, b) : _mm256_unpacklo_epi16(a, b);
}

INLINE AVX2 __m256i shrink(__m256i low, __m256i high, int shift)
{
    return _mm256_packs_epi32(_mm256_srai_epi32(low, shift), _mm256_srai_epi32(high, shift));
}

/* One dimension, of 16 columns; with `few`, inputs 4 to 7 are zero. Constants in units of 2**-13. */
INLINE AVX2 void transform(__m256i v[8], int shift, int few)
{
    enum {
        C0_298 = 2446, C0_390 = 3196, C0_541 = 4433, C0_765 = 6270, C0_899 = 7373, C1_175 = 9633,
        C1_501 = 12299, C1_847 = 15137, C1_961 = 16069, C2_053 = 16819, C2_562 = 20995, C3_072 = 25172,
    };
    const __m256i zero = _mm256_setzero_si256(), round = _mm256_set1_epi32(1 << (shift - 1));
    __m256i even[4][2], odd[4][2];
    /* Sums of 16 bits wrap, as they do in libjpeg-turbo. */
    __m256i sum = few ? v[0] : _mm256_add_epi16(v[0], v[4]), difference = few ? v[0] : _mm256_sub_epi16(v[0], v[4]);
    __m256i z3 = few ? v[3] : _mm256_add_epi16(v[7], v[3]), z4 = few ? v[1] : _mm256_add_epi16(v[5], v[1]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        /* From the upper 16 bits, shifted down by 3: times 2**13. */
        __m256i tmp0 = _mm256_add_epi32(_mm256_srai_epi32(interleave_half(zero, sum, half), 3), round);
        __m256i tmp1 = _mm256_add_epi32(_mm256_srai_epi32(interleave_half(zero, difference, half), 3), round);
        __m256i v26 = interleave_half(v[2], few ? zero : v[6], half);
        __m256i tmp2 = weigh(v26, C0_541, C0_541 - C1_847), tmp3 = weigh(v26, C0_541 + C0_765, C0_541);
        even[0][half] = _mm256_add_epi32(tmp0, tmp3), even[3][half] = _mm256_sub_epi32(tmp0, tmp3);
        even[1][half] = _mm256_add_epi32(tmp1, tmp2), even[2][half] = _mm256_sub_epi32(tmp1, tmp2);
        __m256i z34 = interleave_half(z3, z4, half);
        __m256i z3_turned = weigh(z34, C1_175 - C1_961, C1_175), z4_turned = weigh(z34, C1_175, C1_175 - C0_390);
        __m256i v71 = interleave_half(few ? zero : v[7], v[1], half), v53 = interleave_half(few ? zero : v[5], v[3], half);
        odd[0][half] = _mm256_add_epi32(weigh(v71, C0_298 - C0_899, -C0_899), z3_turned);
        odd[3][half] = _mm256_add_epi32(weigh(v71, -C0_899, C1_501 - C0_899), z4_turned);
        odd[1][half] = _mm256_add_epi32(weigh(v53, C2_053 - C2_562, -C2_562), z4_turned);
        odd[2][half] = _mm256_add_epi32(weigh(v53, -C2_562, C3_072 - C2_562), z3_turned);
    }
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
        __m256i *e = even[n], *o = odd[3 - n];
        v[n] = shrink(_mm256_add_epi32(e[0], o[0]), _mm256_add_epi32(e[1], o[1]), shift);
        v[7 - n] = shrink(_mm256_sub_epi32(e[0], o[0]), _mm256_sub_epi32(e[1], o[1]), shift);
    }
}

/* Two 8x8 blocks, side by side */
INLINE AVX2 void transpose(__m256i v[8])
{
    __m256i pairs[8], fours[8];
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
        pairs[2 * n] = _mm256_unpacklo_epi16(v[2 * n], v[2 * n + 1]);
        pairs[2 * n + 1] = _mm256_unpackhi_epi16(v[2 * n], v[2 * n + 1]);
    }
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
        __m256i above = pairs[n / 2 * 4 + n % 2], below = pairs[n / 2 * 4 + n % 2 + 2];
        fours[n / 2 * 4 + n % 2 * 2] = _mm256_unpacklo_epi32(above, below);
        fours[n / 2 * 4 + n % 2 * 2 + 1] = _mm256_unpackhi_epi32(above, below);
    }
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
        v[2 * n] = _mm256_unpacklo_epi64(fours[n], fours[n + 4]);
        v[2 * n + 1] = _mm256_unpackhi_epi64(fours[n], fours[n + 4]);
    }
}

typedef struct {
    const int16_t *coefficients[2];
    const Quantizer *quantizers[2];
} Pair;

/* To samples: rows[n] holds rows 2n and 2n + 1 of the first block, then of the second. Returns whether a product reaches
   MAX_PRODUCT. */
INLINE AVX2 int inverse(const Pair *pair, int few, __m256i rows[4])
{
    const int16_t *const *from = pair->coefficients;
    const Quantizer *const *by = pair->quantizers;
    __m256i eights[8], v[8], over = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int n = 0; n < 8; n++) {
        if (few && n > 1)
            continue;
        __m256i values = both(from[0] + 8 * n, from[1] + 8 * n);
        over = _mm256_or_si256(over, _mm256_cmpgt_epi16(_mm256_abs_epi16(values), both(by[0]->most + 8 * n, by[1]->most + 8 * n)));
        eights[n] = _mm256_mullo_epi16(values, both(by[0]->factor + 8 * n, by[1]->factor + 8 * n));
    }
    /* The eights of zigzag order that have coefficients of each row. */
    static const uint8_t PARTS[8] = {0x0b, 0x2f, 0x2f, 0x6e, 0x76, 0xf4, 0xf4, 0xd0}, PARTS_OF_FEW[4] = {1, 1, 3, 2};
#pragma GCC unroll 8
    for (int row = 0; row < 8; row++)
        if (!few || row < 4)
            v[row] = pick(eights, row, few ? PARTS_OF_FEW[row] : PARTS[row]);
    transform(v, 11, few);
    transpose(v);
    transform(v, 18, few);
    /* Transposed again as bytes. */
    __m256i c04 = _mm256_packs_epi16(v[0], v[4]), c15 = _mm256_packs_epi16(v[1], v[5]);
    __m256i c26 = _mm256_packs_epi16(v[2], v[6]), c37 = _mm256_packs_epi16(v[3], v[7]);
    __m256i c01 = _mm256_unpacklo_epi8(c04, c15), c45 = _mm256_unpackhi_epi8(c04, c15);
    __m256i c23 = _mm256_unpacklo_epi8(c26, c37), c67 = _mm256_unpackhi_epi8(c26, c37);
    __m256i upper0123 = _mm256_unpacklo_epi16(c01, c23), lower0123 = _mm256_unpackhi_epi16(c01, c23);
    __m256i upper4567 = _mm256_unpacklo_epi16(c45, c67), lower4567 = _mm256_unpackhi_epi16(c45, c67);
    const __m256i center = _mm256_set1_epi8(-128);
    rows[0] = _mm256_xor_si256(_mm256_unpacklo_epi32(upper0123, upper4567), center);
    rows[1] = _mm256_xor_si256(_mm256_unpackhi_epi32(upper0123, upper4567), center);
    rows[2] = _mm256_xor_si256(_mm256_unpacklo_epi32(lower0123, lower4567), center);
    rows[3] = _mm256_xor_si256(_mm256_unpackhi_epi32(lower0123, lower4567), center);
    return !_mm256_testz_si256(over, over);
}

/* Eight samples of a block that has a DC coefficient only. */
INLINE uint64_t flat(const Pair *pair, int block)
{
    int value = (pair->coefficients[block][0] * pair->quantizers[block]->factor[0] + 4) >> 3;
    value = value < -128 ? 0 : value > 127 ? 255 : value + 128;
    return 0x0101010101010101u * (uint64_t)value;
}

INLINE int flat_over(const Pair *pair)
{
    int over = 0;
    for (int block = 0; block < 2; block++)
        over |= abs(pair->coefficients[block][0]) > pair->quantizers[block]->most[0];
    return over;
}

/* Two blocks to `first` and `second`, each eight lines `pitch` apart. `most`: the place of their last coefficient. Returns whether
   a product reaches MAX_PRODUCT. */
AVX2 static int decode_pair(const Pair *pair, int most, uint8_t *first, uint8_t *second, size_t pitch)
{
    int beyond;
    __m256i rows[4];
    if (!most) {
        uint64_t values[2] = {flat(pair, 0), flat(pair, 1)};
        for (int y = 0; y < 8; y++) {
            memcpy(first + y * pitch, &values[0], 8);
            memcpy(second + y * pitch, &values[1], 8);
        }
        return flat_over(pair);
    }
    beyond = most <= FEW ? inverse(pair, 1, rows) : inverse(pair, 0, rows);
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
        __m128i a = _mm256_castsi256_si128(rows[n]), b = _mm256_extracti128_si256(rows[n], 1);
        _mm_storel_epi64((__m128i *)(first + 2 * n * pitch), a);
        _mm_storel_epi64((__m128i *)(first + (2 * n + 1) * pitch), _mm_unpackhi_epi64(a, a));
        _mm_storel_epi64((__m128i *)(second + 2 * n * pitch), b);
        _mm_storel_epi64((__m128i *)(second + (2 * n + 1) * pitch), _mm_unpackhi_epi64(b, b));
    }
    return beyond;
}
