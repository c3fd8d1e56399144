/* Reads records from memory-mapped shards: requests their pages ahead of time, copies them into one array and verifies their
   CRC-32C. */

#define _DEFAULT_SOURCE
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { PIECE = 1 << 17 };

PyDoc_STRVAR(will_need_doc,
"will_need(addresses, lengths, /)\n--\n\n"
"Asks the system to read these stretches of mapped files (int64 arrays) into the page cache, and returns without waiting.");

static PyObject *py_will_need(PyObject *self, PyObject *args)
{
    Py_buffer addresses, lengths;
    if (!PyArg_ParseTuple(args, "y*y*", &addresses, &lengths))
        return NULL;
    Py_ssize_t count = addresses.len < lengths.len ? addresses.len / 8 : lengths.len / 8;
    Py_BEGIN_ALLOW_THREADS
    intptr_t page = sysconf(_SC_PAGESIZE);
    for (Py_ssize_t n = 0; n < count; n++) {
        intptr_t begin = (intptr_t)((int64_t *)addresses.buf)[n], end = begin + (intptr_t)((int64_t *)lengths.buf)[n];
        /* In pieces, because the system may cut a long stretch short (at read_ahead_kb, 128 KB on many disks). Failure is
           ignored: this is only advice. */
        for (begin -= begin % page; begin < end; begin += PIECE)
            madvise((void *)begin, (size_t)(end - begin < PIECE ? end - begin : PIECE), MADV_WILLNEED);
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&addresses);
    PyBuffer_Release(&lengths);
    Py_RETURN_NONE;
}

/* A row of the index (dataset/records.py: INDEX_DTYPE). */
typedef struct __attribute__((packed)) {
    uint32_t shard;
    uint64_t offset;
    uint32_t length, crc32c;
    int32_t label;
} Row;

enum { LANES = 3, POLYNOMIAL = (int)0x82f63b78 }; /* of CRC-32C, bits reversed (RFC 3720, B.4) */

static uint32_t table[256];

static void fill_table(void)
{
    for (uint32_t n = 0; n < 256; n++) {
        uint32_t crc = n;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? (uint32_t)POLYNOMIAL : 0);
        table[n] = crc;
    }
}

/* CRC-32C of LANES stretches at once. */
static void checksums(const uint8_t *const data[LANES], const uint32_t lengths[LANES], uint32_t crcs[LANES])
{
    for (int lane = 0; lane < LANES; lane++) {
        uint32_t crc = ~0u;
        for (uint32_t n = 0; n < lengths[lane]; n++)
            crc = crc >> 8 ^ table[(crc ^ data[lane][n]) & 255];
        crcs[lane] = ~crc;
    }
}

#if defined(__x86_64__)
/* The instruction takes 8 bytes in each cycle but has a latency of three, so three records go side by side. */
__attribute__((target("sse4.2"))) static void checksums_sse42(const uint8_t *const data[LANES], const uint32_t lengths[LANES],
                                                              uint32_t crcs[LANES])
{
    uint64_t crc[LANES] = {~0u, ~0u, ~0u}, word[LANES];
    uint32_t shortest = lengths[0] < lengths[1] ? lengths[0] : lengths[1], at = 0;
    shortest = shortest < lengths[2] ? shortest : lengths[2];
    for (; at + 8 <= shortest; at += 8)
        for (int lane = 0; lane < LANES; lane++) {
            memcpy(&word[lane], data[lane] + at, 8);
            crc[lane] = _mm_crc32_u64(crc[lane], word[lane]);
        }
    for (int lane = 0; lane < LANES; lane++) {
        uint32_t n = at;
        for (; n + 8 <= lengths[lane]; n += 8) {
            memcpy(&word[lane], data[lane] + n, 8);
            crc[lane] = _mm_crc32_u64(crc[lane], word[lane]);
        }
        for (; n < lengths[lane]; n++)
            crc[lane] = _mm_crc32_u8((uint32_t)crc[lane], data[lane][n]);
        crcs[lane] = ~(uint32_t)crc[lane];
    }
}
#endif

static void (*check)(const uint8_t *const[LANES], const uint32_t[LANES], uint32_t[LANES]) = checksums;

PyDoc_STRVAR(gather_doc,
"gather(rows, bases, out, stride, checked, bad, /)\n--\n\n"
"Copies records into `out`, a writable array of uint8 (N, stride), and fills the rest of each row with zeros.\n\n"
"rows: N rows of the index (INDEX_DTYPE); bases: int64 (shards,), the addresses of the mapped shards, 0 of others; bad: writable\n"
"uint8 (N,), set to 0 or, where `checked` and the CRC-32C differs from the row's, or the pages cannot be read, to 1. Releases the\n"
"GIL. Raises ValueError if the arrays do not match.");

/* A page of a map whose read fails, or that a shortened file no longer has, raises SIGBUS, which would end the process. While
   `guard` is set, the thread goes on there instead. pread(2) or process_vm_readv(2) would take 4 or 6 us more than the 3.5 us of
   memcpy for 22 KB, 2 % of what the loader takes for an image. The JVM and Go treat maps in this way. */
static _Thread_local sigjmp_buf *volatile guard;
static struct sigaction others; /* the handler that was there */
static volatile sig_atomic_t passed_on;

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    int sent = info->si_code <= 0; /* by kill(2) */
    if (guard && !sent)
        siglongjmp(*guard, 1);
    if (sent && others.sa_handler == SIG_IGN)
        return;
    /* The second time, the other handler has come back to this one, so the default must end the process. */
    if (passed_on++ || others.sa_handler == SIG_DFL || others.sa_handler == SIG_IGN) {
        signal(number, SIG_DFL);
        if (sent)
            raise(number); /* else the failing instruction runs again */
    } else if (others.sa_flags & SA_SIGINFO) {
        others.sa_sigaction(number, info, context);
    } else {
        others.sa_handler(number);
    }
}

/* Before each batch, because others (faulthandler, the workers of torch's DataLoader) set theirs at any time. */
static void catch_sigbus(void)
{
    struct sigaction now, ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    if (sigaction(SIGBUS, NULL, &now) || ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_sigbus))
        return;
    others = now;
    sigaction(SIGBUS, &ours, NULL);
}

/* Copies memory of a mapped file; returns whether it could be read. */
static int copy(void *to, const void *from, size_t length)
{
    sigjmp_buf here;
    if (sigsetjmp(here, 0)) {
        guard = NULL;
        return 0;
    }
    guard = &here;
    atomic_signal_fence(memory_order_seq_cst); /* the compiler must not move the copy out of the guard */
    memcpy(to, from, length);
    atomic_signal_fence(memory_order_seq_cst);
    guard = NULL;
    return 1;
}

static PyObject *py_gather(PyObject *self, PyObject *args)
{
    Py_buffer rows, bases, out, bad;
    Py_ssize_t stride;
    int checked;
    if (!PyArg_ParseTuple(args, "y*y*w*npw*", &rows, &bases, &out, &stride, &checked, &bad))
        return NULL;
    const Row *row = rows.buf;
    const int64_t *base = bases.buf;
    Py_ssize_t count = rows.len / (Py_ssize_t)sizeof(Row), shards = bases.len / 8;
    int fits = bad.len == count && out.len >= count * stride;
    for (Py_ssize_t n = 0; fits && n < count; n++)
        fits = row[n].shard < shards && row[n].length <= stride;
    if (fits) {
        catch_sigbus();
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t first = 0; first < count; first += LANES) {
            const uint8_t *data[LANES];
            uint32_t lengths[LANES] = {0}, crcs[LANES];
            int lanes = count - first < LANES ? (int)(count - first) : LANES, unread[LANES] = {0};
            for (int lane = 0; lane < LANES; lane++)
                data[lane] = (uint8_t *)out.buf + (first + (lane < lanes ? lane : 0)) * stride;
            for (int lane = 0; lane < lanes; lane++) {
                const Row *from = row + first + lane;
                uint8_t *to = (uint8_t *)out.buf + (first + lane) * stride;
                intptr_t map = (intptr_t)base[from->shard];
                unread[lane] = !map || !copy(to, (const uint8_t *)map + from->offset, from->length);
                memset(to + from->length, 0, (size_t)stride - from->length);
                lengths[lane] = from->length;
            }
            if (checked)
                check(data, lengths, crcs);
            for (int lane = 0; lane < lanes; lane++)
                ((uint8_t *)bad.buf)[first + lane] = unread[lane] || (checked && crcs[lane] != row[first + lane].crc32c);
        }
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, "the sizes of the arrays do not match");
    }
    Py_buffer *all[] = {&rows, &bases, &out, &bad};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        PyBuffer_Release(all[i]);
    return fits ? Py_NewRef(Py_None) : NULL;
}

static PyMethodDef methods[] = {
    {"will_need", py_will_need, METH_VARARGS, will_need_doc},
    {"gather", py_gather, METH_VARARGS, gather_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "gather", "Reads and verifies records of mapped shards; see gather.c.", -1, methods,
};

PyMODINIT_FUNC PyInit_gather(void)
{
    fill_table();
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2"))
        check = checksums_sse42;
#endif
    return PyModule_Create(&module);
}
