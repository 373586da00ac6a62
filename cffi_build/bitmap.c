/* Dirty bitmaps: which granules of a disk changed, set by guests at full speed, cleared and searched by jobs.
 *
 * Levels of 64-bit words.  Bit i of level 0 is granule i; bit i of level k+1 is set when word i of level k is not zero
 * (a race may leave it set above a zero word, which only costs the search a look), so a search skips clean space 64
 * times faster per level.
 *
 * Threads: `set` and the test of a short range take no lock.  Clearing and searching take `lock`.  Why that is enough:
 * - A set that has returned is seen by every later search.  set: (A) sets its bit, then (B) reads the bit above and sets
 *   it if it is clear.  A clear that empties a word: (C) clears the bit above, (D) reads the word again and puts the bit
 *   above back if the word is not zero.  All four are sequentially consistent.  If B saw the bit set, B came before C,
 *   so A came before D, and D sees A's bit.  Between C and D a search could miss it; C and D hold the lock, so does
 *   the search.
 * - `set` always writes, even a bit that is set already: an order between it and a concurrent clear is what makes "write
 *   the data, set the bit" against "clear the bit, read the data" safe.
 *
 * Memory: one reserved mapping; the system gives a page (of 32768 granules) when a bit in it is first set and keeps it
 * until the bitmap is freed.  All dirty: size / granularity / 8 bytes and 1.6 % more; 64 TiB at 64 KiB are 128 MiB.
 * 64 TiB at 512 B reserve 16 GiB of addresses but take memory only where bits were set.
 */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "kernel.h"

enum {
    WORD_SHIFT = 6,
    WORD_BITS = 1 << WORD_SHIFT,
    MAX_LEVELS = 10,             /* 64^10 bits are more than any disk has */
    SHORT_TEST_WORDS = 32        /* a test of at most so many words reads level 0; a longer one searches */
};

struct bitmap {
    /* Immutable. */
    uint64_t size;               /* bytes of the disk */
    uint64_t bits;               /* granules */
    unsigned shift;              /* log2 of the granularity */
    unsigned levels;             /* at least 1; the last one is a single word */
    uint64_t words[MAX_LEVELS];
    size_t mapped;               /* bytes at level[0] */
    _Atomic uint64_t *level[MAX_LEVELS];

    atomic_int_least64_t dirty;  /* bits set in level 0; below zero for a moment when a clear overtakes a set's count */
    pthread_mutex_t lock;        /* clearing and searching; innermost */
};

static uint64_t words_for(uint64_t bits)
{
    return (bits >> WORD_SHIFT) + ((bits & (WORD_BITS - 1)) != 0);
}

/* Bits first..last of a word, both 0..63. */
static uint64_t word_mask(unsigned first, unsigned last)
{
    return (UINT64_MAX << first) & (UINT64_MAX >> (WORD_BITS - 1 - last));
}

int nb_bitmap_new(uint64_t size, uint32_t granularity, struct bitmap **out)
{
    uint64_t total = 0;
    if (granularity < 512 || granularity > UINT32_C(1) << 31 || (granularity & (granularity - 1)))
        return -EINVAL;
    struct bitmap *bitmap = calloc(1, sizeof *bitmap);
    if (!bitmap)
        return -ENOMEM;
    bitmap->size = size;
    bitmap->shift = (unsigned)__builtin_ctz(granularity);
    bitmap->bits = (size >> bitmap->shift) + ((size & (granularity - 1)) != 0);
    for (uint64_t bits = bitmap->bits, words = 0; words != 1; bits = words) {
        words = bits ? words_for(bits) : 1;
        bitmap->words[bitmap->levels++] = words;
        total += words;
    }
    bitmap->mapped = total * sizeof(uint64_t);
    void *memory = mmap(NULL, bitmap->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        free(bitmap);
        return -ENOMEM;
    }
    madvise(memory, bitmap->mapped, MADV_NOHUGEPAGE);      /* fails only on kernels that have none */
    _Atomic uint64_t *next = memory;
    for (unsigned i = 0; i < bitmap->levels; next += bitmap->words[i++])
        bitmap->level[i] = next;
    pthread_mutex_init(&bitmap->lock, NULL);
    *out = bitmap;
    return 0;
}

void nb_bitmap_free(struct bitmap *bitmap)
{
    if (!bitmap)
        return;
    munmap((void *)bitmap->level[0], bitmap->mapped);
    pthread_mutex_destroy(&bitmap->lock);
    free(bitmap);
}

uint32_t nb_bitmap_granularity(const struct bitmap *bitmap)
{
    return UINT32_C(1) << bitmap->shift;
}

uint64_t nb_bitmap_size(const struct bitmap *bitmap)
{
    return bitmap->size;
}

/* Bytes of the range that lie on the disk. */
static uint64_t on_disk(const struct bitmap *bitmap, uint64_t offset, uint64_t count)
{
    if (offset >= bitmap->size)
        return 0;
    return count < bitmap->size - offset ? count : bitmap->size - offset;
}

/* ---- set and clear ---- */

/* Word `index` of `level` is not zero: say so in the levels above. */
static void mark_above(struct bitmap *bitmap, unsigned level, uint64_t index)
{
    while (++level < bitmap->levels) {
        _Atomic uint64_t *word = &bitmap->level[level][index >> WORD_SHIFT];
        uint64_t bit = UINT64_C(1) << (index & (WORD_BITS - 1));
        if (!(atomic_load(word) & bit))
            atomic_fetch_or(word, bit);
        index >>= WORD_SHIFT;
    }
}

/* Word `index` of `level` was seen zero: clear its bits above, and put them back if a set came between. */
static void unmark_above_locked(struct bitmap *bitmap, unsigned level, uint64_t index)
{
    while (level + 1 < bitmap->levels) {
        _Atomic uint64_t *above = &bitmap->level[level + 1][index >> WORD_SHIFT];
        uint64_t bit = UINT64_C(1) << (index & (WORD_BITS - 1));
        uint64_t old = atomic_fetch_and(above, ~bit);
        if (atomic_load(&bitmap->level[level][index])) {
            mark_above(bitmap, level, index);
            return;
        }
        if (old & ~bit)
            return;
        level++;
        index >>= WORD_SHIFT;
    }
}

void nb_bitmap_set(struct bitmap *bitmap, uint64_t offset, uint64_t count)
{
    int64_t changed = 0;
    count = on_disk(bitmap, offset, count);
    if (!count)
        return;
    uint64_t first = offset >> bitmap->shift, last = (offset + count - 1) >> bitmap->shift;
    for (uint64_t word = first >> WORD_SHIFT; word <= last >> WORD_SHIFT; word++) {
        unsigned low = word == first >> WORD_SHIFT ? first & (WORD_BITS - 1) : 0;
        unsigned high = word == last >> WORD_SHIFT ? last & (WORD_BITS - 1) : WORD_BITS - 1;
        uint64_t mask = word_mask(low, high);
        uint64_t old = atomic_fetch_or(&bitmap->level[0][word], mask);
        mark_above(bitmap, 0, word);
        changed += __builtin_popcountll(mask & ~old);
    }
    if (changed)
        atomic_fetch_add(&bitmap->dirty, changed);
}

/* The first set bit at or after `bit`, or bitmap->bits: up the levels until something is set, then down to it. */
static uint64_t next_set_locked(const struct bitmap *bitmap, uint64_t bit)
{
    unsigned level = 0;
    uint64_t index = bit;      /* a bit of `level` */
    for (;;) {
        uint64_t at = index >> WORD_SHIFT;
        if (at >= bitmap->words[level])
            return bitmap->bits;
        uint64_t word = atomic_load(&bitmap->level[level][at]) & (UINT64_MAX << (index & (WORD_BITS - 1)));
        if (!word) {
            if (++level == bitmap->levels)
                return bitmap->bits;
            index = at + 1;
            continue;
        }
        index = (at << WORD_SHIFT) | (unsigned)__builtin_ctzll(word);
        if (level == 0)
            return index;
        level--;
        index <<= WORD_SHIFT;
    }
}

void nb_bitmap_clear(struct bitmap *bitmap, uint64_t offset, uint64_t count)
{
    count = on_disk(bitmap, offset, count);
    uint64_t granule = UINT64_C(1) << bitmap->shift, end = offset + count;
    uint64_t first = (offset >> bitmap->shift) + ((offset & (granule - 1)) != 0);
    uint64_t stop = end == bitmap->size ? bitmap->bits : end >> bitmap->shift;
    if (!count || first >= stop)
        return;
    pthread_mutex_lock(&bitmap->lock);
    for (uint64_t bit; (bit = next_set_locked(bitmap, first)) < stop;) {
        uint64_t word = bit >> WORD_SHIFT, last = (word + 1) << WORD_SHIFT;
        last = last < stop ? last : stop;
        uint64_t mask = word_mask(bit & (WORD_BITS - 1), (last - 1) & (WORD_BITS - 1));
        uint64_t old = atomic_fetch_and(&bitmap->level[0][word], ~mask);
        if (!(old & ~mask))
            unmark_above_locked(bitmap, 0, word);
        atomic_fetch_sub(&bitmap->dirty, __builtin_popcountll(old & mask));
        first = last;
    }
    pthread_mutex_unlock(&bitmap->lock);
}

/* ---- look ---- */

/* The first clear bit after `bit`, which is set, or `stop`. */
static uint64_t run_end(const struct bitmap *bitmap, uint64_t bit, uint64_t stop)
{
    while (bit < stop) {
        uint64_t clear = ~atomic_load(&bitmap->level[0][bit >> WORD_SHIFT]) & (UINT64_MAX << (bit & (WORD_BITS - 1)));
        if (clear) {
            bit = (bit & ~(uint64_t)(WORD_BITS - 1)) | (unsigned)__builtin_ctzll(clear);
            break;
        }
        bit = (bit | (WORD_BITS - 1)) + 1;
    }
    return bit < stop ? bit : stop;
}

bool nb_bitmap_next_dirty(const struct bitmap *bitmap, uint64_t offset, uint64_t max, uint64_t *start, uint64_t *length)
{
    pthread_mutex_t *lock = (pthread_mutex_t *)&bitmap->lock;      /* not part of what const promises */
    if (offset >= bitmap->size || !max)
        return false;
    pthread_mutex_lock(lock);
    uint64_t bit = next_set_locked(bitmap, offset >> bitmap->shift);
    if (bit == bitmap->bits) {
        pthread_mutex_unlock(lock);
        return false;
    }
    uint64_t from = bit << bitmap->shift > offset ? bit << bitmap->shift : offset;
    uint64_t limit = max < bitmap->size - from ? from + max : bitmap->size;
    uint64_t stop = run_end(bitmap, bit, ((limit - 1) >> bitmap->shift) + 1);
    pthread_mutex_unlock(lock);
    uint64_t end = stop << bitmap->shift;
    *start = from;
    *length = (end < limit ? end : limit) - from;
    return true;
}

bool nb_bitmap_test(const struct bitmap *bitmap, uint64_t offset, uint64_t count)
{
    count = on_disk(bitmap, offset, count);
    if (!count)
        return false;
    uint64_t first = offset >> bitmap->shift, last = (offset + count - 1) >> bitmap->shift;
    if ((last >> WORD_SHIFT) - (first >> WORD_SHIFT) >= SHORT_TEST_WORDS) {
        uint64_t start, length;
        return nb_bitmap_next_dirty(bitmap, offset, UINT64_MAX, &start, &length) && start < offset + count;
    }
    for (uint64_t word = first >> WORD_SHIFT; word <= last >> WORD_SHIFT; word++) {
        unsigned low = word == first >> WORD_SHIFT ? first & (WORD_BITS - 1) : 0;
        unsigned high = word == last >> WORD_SHIFT ? last & (WORD_BITS - 1) : WORD_BITS - 1;
        if (atomic_load(&bitmap->level[0][word]) & word_mask(low, high))
            return true;
    }
    return false;
}

uint64_t nb_bitmap_dirty_bytes(const struct bitmap *bitmap)
{
    int64_t dirty = atomic_load(&bitmap->dirty);
    if (dirty <= 0)
        return 0;
    uint64_t bytes = (uint64_t)dirty << bitmap->shift, cut = (bitmap->bits << bitmap->shift) - bitmap->size;
    if (cut && nb_bitmap_test(bitmap, bitmap->size - 1, 1))
        bytes -= cut;
    return bytes;
}

int nb_bitmap_merge(struct bitmap *dst, const struct bitmap *src)
{
    uint64_t start = 0, length = 0;
    if (dst->size != src->size)
        return -EINVAL;
    while (nb_bitmap_next_dirty(src, start + length, UINT64_MAX, &start, &length))
        nb_bitmap_set(dst, start, length);
    return 0;
}
