/* What crops and augmentation share: rows of bytes to pixels less their mean. */

#include <stdint.h>

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
