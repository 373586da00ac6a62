/* Copy before write: a filter that keeps the state of a disk at one moment while guests go on writing it.
 *
 * Every cluster of `todo` is in one of three states:
 *
 *   TODO   the bit in `todo` is set: the old data is only in the source
 *   BUSY   TODO, and inside a `struct save` in `saves`: a guest's request is saving it
 *   DONE   the bit is clear: the old data is in the store or in the target, or was never wanted
 *
 *   event                           TODO                          BUSY                       DONE
 *   guest changes it                becomes BUSY, reads, saves    waits for that save        passes, no lock taken
 *   guest reads it                  passes                        passes                     passes
 *   its save ends                   -                             stored, DONE; go on        data dropped (*); go on
 *   its save fails                  -                             broken; go on              data dropped; go on
 *   store is full                   -                             TODO; wait, or broken      -
 *   copy engine has read it         may write it to the target    may write it               must drop what it read
 *   copy engine has written it      DONE                          DONE                       nothing
 *   copy engine failed on it        stays                         stays                      nothing (the store has it)
 *
 *   state of the filter: KEEPING -> BROKEN (event) or RELEASED, for good; then everything passes.
 *
 * The copy engine takes no hold on what it reads: no guest ever waits for a background thread.  What makes its read
 * valid is the check afterwards (cbw_still_old): a guest's request changes a cluster only after its bit was cleared, and
 * the bit is never set again; so if the bit is still set after the read, nothing had changed the cluster before the
 * read ended.  (*) The same argument serves the save: if the copy engine finished the cluster meanwhile, the bit is
 * clear, other writes may have passed during the read, and the data is dropped.  If both store and copy engine have a
 * cluster, both have the same bytes, so the order in which they reach the target is of no matter.
 *
 * Failures lose nothing: the copy engine clears the bit only once the target has the cluster, so a failed read or write of its
 * leaves it TODO with the source untouched.
 *
 * A guest's request changes the source only when every cluster it touches is DONE; bits only go from set to clear, so
 * what was true stays true while it writes.  Requests in flight when the filter is inserted are excluded by the drain.
 *
 * Lock: `lock` protects what is grouped under it; bits of `todo` are cleared only under it, after the data they stood
 * for was read, by a sequentially consistent write; the fast path reads them without the lock, and its request, which
 * follows, follows that read too.  No I/O happens under it.  Order: copier.lock, cbw.lock, bitmap.lock and ring.lock.
 *
 * The store.  Memory: one reserved mapping of memory_limit bytes, given out in runs of clusters (first fit, so that it
 * stays compact), returned to the system when the store is empty but for KEEP_WARM.  Scratch file: the same, holes
 * punched when an entry is drained.  Areas known to read as zeroes take no room, only a bit in `zeroes`.
 */
#define _GNU_SOURCE
#include "intercept.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    RUN_BYTES = 1 << 20,         /* most that one save reads at once (or one cluster) */
    KEEP_WARM = 1 << 20,         /* memory of an empty store that is kept for the next entries */
    TRIM_STEP = 256 * 1024       /* memory returned per hold of the lock */
};

enum state { KEEPING, BROKEN, RELEASED };

/* Room given out in clusters. */
struct space {
    struct bitmap *free;
    uint64_t size, used;         /* bytes */
    uint64_t touched;            /* everything given out so far lies below it */
};

struct signal {
    pthread_cond_t changed;      /* CLOCK_MONOTONIC */
    unsigned sleepers;
};

/* How a guest's request waited so far. */
struct patience {
    uint64_t deadline;           /* for room; 0: not set */
    bool waited;
};

/* A guest's request saving [start, end); lives on its stack. */
struct save {
    uint64_t start, end;
    struct save *next;
};

struct cbw {
    struct node node;            /* node.file is the source */

    /* Immutable. */
    struct nb_cbw_options options;
    struct bitmap *todo;         /* see above */
    char *memory;                /* memory.size bytes */

    atomic_int state;            /* enum state; written under lock */

    /* Under lock. */
    pthread_mutex_t lock;
    struct signal saved;         /* a save ended, or the state changed */
    struct signal room;          /* room became free, or the state changed; its sleepers are not woken for less: each
                                  * tries again, and its failure must not wake the others */
    uint64_t given;              /* how often room became free: who tried without the lock compares before it sleeps */
    int error;                   /* why BROKEN */
    struct save *saves;
    struct space memory_space, scratch_space;
    struct bitmap *zeroes;       /* saved areas that read as zeroes */
    struct saved *first, **last; /* the other saved areas, oldest first */
    uint64_t entry_bytes;        /* in the list */
    uint64_t taken_bytes;        /* taken by the copy engine */
    unsigned slices;             /* attached */
    bool announced;              /* NB_EVENT_CBW_STORED was posted since the last slice */
    bool full_posted;
    uint64_t waits, wait_ns;
};

static struct cbw *cbw_from(struct node *node)
{
    return container_of(node, struct cbw, node);
}

static uint64_t round_down(const struct cbw *cbw, uint64_t bytes)
{
    return bytes & ~(uint64_t)(cbw->options.cluster_size - 1);
}

static uint64_t round_up(const struct cbw *cbw, uint64_t bytes)
{
    return round_down(cbw, bytes + cbw->options.cluster_size - 1);
}

static bool keeping(struct cbw *cbw)
{
    return atomic_load(&cbw->state) == KEEPING;
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* The first dirty area in [from, to). */
static bool next_in(const struct bitmap *bitmap, uint64_t from, uint64_t to, uint64_t *start, uint64_t *length)
{
    if (from >= to || !nb_bitmap_next_dirty(bitmap, from, to - from, start, length) || *start >= to)
        return false;
    if (*length > to - *start)
        *length = to - *start;
    return true;
}

/* ---- room ---- */

static int space_init(struct space *space, uint64_t size, uint32_t cluster)
{
    space->size = size & ~(uint64_t)(cluster - 1);
    int err = nb_bitmap_new(space->size, cluster, &space->free);
    if (!err)
        nb_bitmap_set(space->free, 0, space->size);
    return err;
}

/* Up to `want` bytes in one piece: true with *at and *got. */
static bool space_take(struct space *space, uint64_t want, uint64_t *at, uint64_t *got)
{
    if (!nb_bitmap_next_dirty(space->free, 0, want, at, got))
        return false;
    nb_bitmap_clear(space->free, *at, *got);
    space->used += *got;
    if (space->touched < *at + *got)
        space->touched = *at + *got;
    return true;
}

static void space_give(struct space *space, uint64_t at, uint64_t count)
{
    nb_bitmap_set(space->free, at, count);
    space->used -= count;
}

static struct space *space_of(struct cbw *cbw, int place)
{
    return place == SAVED_MEMORY ? &cbw->memory_space : &cbw->scratch_space;
}

static void wake_locked(struct signal *signal)
{
    if (signal->sleepers)
        pthread_cond_broadcast(&signal->changed);
}

static bool half_full_locked(const struct cbw *cbw)
{
    const struct space *space = cbw->memory_space.size ? &cbw->memory_space : &cbw->scratch_space;
    return space->used > space->size / 2;
}

static void give_room_locked(struct cbw *cbw, int place, uint64_t at, uint64_t length)
{
    space_give(space_of(cbw, place), at, round_up(cbw, length));
    cbw->given++;
    if (!half_full_locked(cbw))
        cbw->full_posted = false;
    wake_locked(&cbw->room);
}

static bool empty_locked(const struct cbw *cbw)
{
    return !cbw->first && !nb_bitmap_dirty_bytes(cbw->zeroes);
}

/* ---- the end of keeping ---- */

static void forget_entry_locked(struct cbw *cbw, struct saved *saved)
{
    if (saved->place != SAVED_ZERO)
        give_room_locked(cbw, saved->place, saved->at, saved->length);
    free(saved);
}

static void stop_keeping_locked(struct cbw *cbw, enum state state)
{
    atomic_store(&cbw->state, state);
    while (cbw->first) {
        struct saved *saved = cbw->first;
        cbw->first = saved->next;
        forget_entry_locked(cbw, saved);
    }
    cbw->last = &cbw->first;
    cbw->entry_bytes = 0;
    nb_bitmap_clear(cbw->zeroes, 0, cbw->node.size);
    wake_locked(&cbw->saved);
    wake_locked(&cbw->room);
}

static void break_locked(struct cbw *cbw, int error)
{
    if (!keeping(cbw))
        return;
    cbw->error = error;
    stop_keeping_locked(cbw, BROKEN);
    ring_post(NB_EVENT_CBW_BROKEN, error, cbw->options.token, 0, 0, 0);
}

/* Return memory that no entry uses to the system, in steps so that no guest waits long for the lock. */
static void trim(struct cbw *cbw)
{
    struct space *space = &cbw->memory_space;
    for (bool more = true; more;) {
        pthread_mutex_lock(&cbw->lock);
        uint64_t keep = keeping(cbw) ? KEEP_WARM : 0;
        more = !space->used && space->touched > keep;
        if (more) {
            uint64_t from = space->touched > keep + TRIM_STEP ? space->touched - TRIM_STEP : keep;
            madvise(cbw->memory + from, space->touched - from, MADV_DONTNEED);
            space->touched = from;
        }
        pthread_mutex_unlock(&cbw->lock);
    }
}

/* ---- a guest's request: waiting ---- */

/* Sleep until the signal or the deadline (0: none); false: it passed. */
static bool sleep_locked(struct cbw *cbw, struct signal *signal, uint64_t deadline, struct patience *patience)
{
    struct timespec until = { (time_t)(deadline / 1000000000), (long)(deadline % 1000000000) };
    uint64_t begin = now_ns();
    int err = 0;
    cbw->waits += !patience->waited;
    patience->waited = true;
    signal->sleepers++;
    if (deadline)
        err = pthread_cond_timedwait(&signal->changed, &cbw->lock, &until);
    else
        pthread_cond_wait(&signal->changed, &cbw->lock);
    signal->sleepers--;
    cbw->wait_ns += now_ns() - begin;
    return err != ETIMEDOUT;
}

/* The store has no room for a guest's old data: the policy decides. */
static void no_room_locked(struct cbw *cbw, struct patience *patience)
{
    const struct nb_cbw_options *options = &cbw->options;
    uint64_t used = cbw->memory_space.used + cbw->scratch_space.used;
    if (options->on_full || !used) {      /* nothing stored that could make room: waiting would never end */
        break_locked(cbw, -ENOSPC);
        return;
    }
    if (!cbw->full_posted) {
        cbw->full_posted = true;
        ring_post(NB_EVENT_CBW_FULL, 0, options->token, used, 0, 0);
    }
    if (options->wait_ms && !patience->deadline)
        patience->deadline = now_ns() + (uint64_t)options->wait_ms * 1000000;
    if (!sleep_locked(cbw, &cbw->room, patience->deadline, patience))
        break_locked(cbw, -ETIMEDOUT);
}

/* ---- a guest's request: saving ---- */

static void announce_locked(struct cbw *cbw)
{
    if (cbw->slices || cbw->announced)
        return;
    cbw->announced = true;
    ring_post(NB_EVENT_CBW_STORED, 0, cbw->options.token, 0, 0, 0);
}

static void append_locked(struct cbw *cbw, struct saved *saved)
{
    saved->next = NULL;
    *cbw->last = saved;
    cbw->last = &saved->next;
    cbw->entry_bytes += saved->length;
    announce_locked(cbw);
}

/* The part of the run at the front that reads as zeroes, in whole clusters; the disk's end counts as a whole one. */
static uint64_t leading_zeroes(struct cbw *cbw, uint64_t start, uint64_t end)
{
    uint64_t at = start;
    while (at < end) {
        struct nb_extent extent;
        /* An error here shows again in the read that follows. */
        if (node_status(cbw->node.file, NULL, at, end - at, &extent) || !(extent.flags & NB_EXTENT_ZERO))
            break;
        at += extent.length;
    }
    return at == end ? end - start : round_down(cbw, at) - start;
}

static void store_zeroes_locked(struct cbw *cbw, uint64_t start, uint64_t end)
{
    uint64_t area, length;
    if (!keeping(cbw))
        return;
    while (next_in(cbw->todo, start, end, &area, &length)) {
        nb_bitmap_set(cbw->zeroes, area, length);
        nb_bitmap_clear(cbw->todo, area, length);
        announce_locked(cbw);
    }
}

/* The old data of [start, start+length) lies at `at`: keep what is still wanted of it, give back the other room. */
static void store_data_locked(struct cbw *cbw, uint64_t start, uint64_t length, int place, uint64_t at)
{
    uint64_t from = start, end = start + length, area, count;
    while (keeping(cbw) && next_in(cbw->todo, from, end, &area, &count)) {
        struct saved *saved = malloc(sizeof *saved);
        if (!saved) {
            break_locked(cbw, -ENOMEM);
            break;
        }
        if (area > from)
            give_room_locked(cbw, place, at + (from - start), area - from);
        *saved = (struct saved) { .offset = area, .length = count, .place = place, .at = at + (area - start) };
        nb_bitmap_clear(cbw->todo, area, count);
        append_locked(cbw, saved);
        from = area + count;
    }
    if (from < end)
        give_room_locked(cbw, place, at + (from - start), end - from);
}

static int write_fully(int fd, const char *data, uint64_t count, uint64_t offset)
{
    while (count) {
        ssize_t done = pwrite(fd, data, count, (off_t)offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return done < 0 ? -errno : -EIO;
        data += done;
        offset += (uint64_t)done;
        count -= (uint64_t)done;
    }
    return 0;
}

/* Read the old data into its room.  *store_error: the scratch file failed, not the source. */
static int fill_room(struct cbw *cbw, uint64_t start, uint64_t length, int place, uint64_t at, bool *store_error)
{
    *store_error = false;
    if (place == SAVED_MEMORY)
        return node_pread(cbw->node.file, cbw->memory + at, length, start);
    /* Not mmap: unmapping interrupts every processor that runs a thread of this process. */
    void *buffer = aligned_alloc(4096, (length + 4095) / 4096 * 4096);
    if (!buffer)
        return -ENOMEM;
    int err = node_pread(cbw->node.file, buffer, length, start);
    if (!err) {
        err = write_fully(cbw->options.scratch_fd, buffer, length, at);
        *store_error = err;
    }
    free(buffer);
    return err;
}

/* Save up to [start, end) as data.  False: there is no room.  Leaves the lock while it reads. */
static bool save_data_locked(struct cbw *cbw, uint64_t start, uint64_t end)
{
    uint64_t at, room, area, count;
    int place = SAVED_MEMORY;
    bool store_error;
    if (!space_take(&cbw->memory_space, round_up(cbw, end - start), &at, &room)) {
        place = SAVED_SCRATCH;
        if (!space_take(&cbw->scratch_space, round_up(cbw, end - start), &at, &room))
            return false;
    }
    uint64_t length = room < end - start ? room : end - start;
    pthread_mutex_unlock(&cbw->lock);
    int err = fill_room(cbw, start, length, place, at, &store_error);
    pthread_mutex_lock(&cbw->lock);
    if (!err) {
        store_data_locked(cbw, start, length, place, at);
        return true;
    }
    if (store_error && (err == -ENOSPC || err == -EDQUOT || err == -EFBIG)) {
        space_give(&cbw->scratch_space, at, room);      /* wakes nobody: see struct cbw.room */
        return false;
    }
    give_room_locked(cbw, place, at, length);
    if (next_in(cbw->todo, start, start + length, &area, &count))      /* else somebody else had saved it */
        break_locked(cbw, err);
    return true;
}

/* Save the first part of [start, end), which is TODO, or wait for who is saving it.  Leaves the lock meanwhile. */
static void save_some_locked(struct cbw *cbw, uint64_t start, uint64_t end, struct patience *patience)
{
    uint64_t most = cbw->options.cluster_size > RUN_BYTES ? cbw->options.cluster_size : RUN_BYTES;
    struct save save = { .start = start, .end = end - start > most ? start + most : end };
    for (struct save *other = cbw->saves; other; other = other->next) {
        if (other->start <= start && start < other->end) {
            sleep_locked(cbw, &cbw->saved, 0, patience);
            return;
        }
        if (other->start > start && other->start < save.end)
            save.end = other->start;
    }
    save.next = cbw->saves;
    cbw->saves = &save;
    pthread_mutex_unlock(&cbw->lock);
    uint64_t zeroes = leading_zeroes(cbw, save.start, save.end);
    pthread_mutex_lock(&cbw->lock);
    bool room = true;
    uint64_t given = cbw->given;
    if (zeroes)
        store_zeroes_locked(cbw, save.start, save.start + zeroes);
    else
        room = save_data_locked(cbw, save.start, save.end);
    struct save **link = &cbw->saves;
    while (*link != &save)
        link = &(*link)->next;
    *link = save.next;
    wake_locked(&cbw->saved);
    if (!room && keeping(cbw) && cbw->given == given)
        no_room_locked(cbw, patience);
}

static void save_range(struct cbw *cbw, uint64_t offset, uint64_t count)
{
    uint64_t start = round_down(cbw, offset), end = round_up(cbw, offset + count), area, length;
    struct patience patience = { 0 };
    if (end > cbw->node.size)
        end = cbw->node.size;
    pthread_mutex_lock(&cbw->lock);
    while (keeping(cbw) && next_in(cbw->todo, start, end, &area, &length))
        save_some_locked(cbw, area, area + length, &patience);
    pthread_mutex_unlock(&cbw->lock);
    if (!keeping(cbw))
        trim(cbw);
}

/* Called before a guest's request changes the range; on its thread, no lock held; when it returns the change may
 * happen.  It cannot fail: at worst the point in time breaks. */
static void before_change(struct node *node, uint64_t offset, uint64_t count)
{
    struct cbw *cbw = cbw_from(node);
    if (keeping(cbw) && nb_bitmap_test(cbw->todo, offset, count))
        save_range(cbw, offset, count);
}

/* ---- the node ---- */

static int cbw_pread(struct node *node, void *buf, size_t count, uint64_t offset)
{
    return node_pread(node->file, buf, count, offset);
}

static int cbw_pwrite(struct node *node, const void *buf, size_t count, uint64_t offset, uint32_t flags)
{
    before_change(node, offset, count);
    return node_pwrite(node->file, buf, count, offset, flags);
}

static int cbw_zero(struct node *node, uint64_t count, uint64_t offset, uint32_t flags)
{
    before_change(node, offset, count);
    return node_zero(node->file, count, offset, flags);
}

static int cbw_discard(struct node *node, uint64_t count, uint64_t offset)
{
    before_change(node, offset, count);
    return node_discard(node->file, count, offset);
}

static int cbw_flush(struct node *node)
{
    return node_flush(node->file);
}

static void cbw_close(struct node *node)
{
    struct cbw *cbw = cbw_from(node);
    while (cbw->first) {
        struct saved *saved = cbw->first;
        cbw->first = saved->next;
        free(saved);
    }
    if (cbw->memory)
        munmap(cbw->memory, cbw->memory_space.size);
    nb_bitmap_free(cbw->todo);
    nb_bitmap_free(cbw->zeroes);
    nb_bitmap_free(cbw->memory_space.free);
    nb_bitmap_free(cbw->scratch_space.free);
    pthread_cond_destroy(&cbw->saved.changed);
    pthread_cond_destroy(&cbw->room.changed);
    pthread_mutex_destroy(&cbw->lock);
}

static const struct node_ops cbw_ops = {
    .driver = "copy-before-write",
    .pread = cbw_pread,
    .pwrite = cbw_pwrite,
    .zero = cbw_zero,
    .discard = cbw_discard,
    .flush = cbw_flush,
    .close = cbw_close,
};

static int init_store(struct cbw *cbw)
{
    const struct nb_cbw_options *options = &cbw->options;
    uint64_t disk = round_up(cbw, cbw->node.size);      /* no more is ever needed */
    uint64_t memory = options->memory_limit < disk ? options->memory_limit : disk;
    uint64_t scratch = options->scratch_limit && options->scratch_limit < disk ? options->scratch_limit : disk;
    int err = space_init(&cbw->memory_space, memory, options->cluster_size);
    if (!err)
        err = space_init(&cbw->scratch_space, options->scratch_fd < 0 ? 0 : scratch, options->cluster_size);
    if (!err)
        err = nb_bitmap_new(cbw->node.size, options->cluster_size, &cbw->zeroes);
    if (err || !cbw->memory_space.size)
        return err;
    void *map = mmap(NULL, cbw->memory_space.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                     -1, 0);
    if (map == MAP_FAILED)
        return -ENOMEM;
    cbw->memory = map;
    return 0;
}

/* `todo` in clusters: a cluster is wanted if any part of it is. */
static int adopt_todo(struct cbw *cbw, struct bitmap *todo)
{
    if (nb_bitmap_granularity(todo) == cbw->options.cluster_size) {
        cbw->todo = todo;
        return 0;
    }
    int err = nb_bitmap_new(cbw->node.size, cbw->options.cluster_size, &cbw->todo);
    if (err)
        return err;
    nb_bitmap_merge(cbw->todo, todo);
    nb_bitmap_free(todo);
    return 0;
}

int nb_cbw_open(struct node *source, struct bitmap *todo, const struct nb_cbw_options *options, struct node **out)
{
    uint32_t cluster = options->cluster_size;
    pthread_condattr_t attributes;
    if (cluster < 4096 || cluster > UINT32_C(64) << 20 || (cluster & (cluster - 1)))
        return -EINVAL;
    if (nb_bitmap_size(todo) != source->size || options->on_full > 1)
        return -EINVAL;
    struct cbw *cbw = node_alloc(sizeof *cbw, &cbw_ops, source->size, source->flags, source, NULL);
    if (!cbw)
        return -ENOMEM;
    cbw->node.filter = true;
    cbw->options = *options;
    cbw->last = &cbw->first;
    atomic_init(&cbw->state, KEEPING);
    pthread_mutex_init(&cbw->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&cbw->saved.changed, &attributes);
    pthread_cond_init(&cbw->room.changed, &attributes);
    pthread_condattr_destroy(&attributes);
    int err = init_store(cbw);
    if (!err)
        err = adopt_todo(cbw, todo);      /* last: from here on todo is ours */
    if (err) {
        nb_node_unref(&cbw->node);
        return err;
    }
    *out = &cbw->node;
    return 0;
}

void nb_cbw_release(struct node *node)
{
    struct cbw *cbw = cbw_of(node);
    if (!cbw)
        return;
    pthread_mutex_lock(&cbw->lock);
    if (keeping(cbw))
        stop_keeping_locked(cbw, RELEASED);
    pthread_mutex_unlock(&cbw->lock);
    trim(cbw);
}

void nb_cbw_usage(struct node *node, uint64_t *memory, uint64_t *scratch, uint64_t *waits, uint64_t *wait_ns)
{
    struct cbw *cbw = cbw_from(node);
    pthread_mutex_lock(&cbw->lock);
    *memory = cbw->memory_space.used;
    *scratch = cbw->scratch_space.used;
    *waits = cbw->waits;
    *wait_ns = cbw->wait_ns;
    pthread_mutex_unlock(&cbw->lock);
}

/* ---- the copy engine's side ---- */

struct cbw *cbw_of(struct node *node)
{
    return node->ops == &cbw_ops ? cbw_from(node) : NULL;
}

struct bitmap *cbw_todo(struct cbw *cbw)
{
    return cbw->todo;
}

static int error_locked(struct cbw *cbw)
{
    if (keeping(cbw))
        return 0;
    return cbw->error ? cbw->error : -ECANCELED;
}

int cbw_error(struct cbw *cbw)
{
    pthread_mutex_lock(&cbw->lock);
    int err = error_locked(cbw);
    pthread_mutex_unlock(&cbw->lock);
    return err;
}

int cbw_still_old(struct cbw *cbw, uint64_t offset, uint64_t count, uint64_t *start, uint64_t *length)
{
    pthread_mutex_lock(&cbw->lock);
    int result = error_locked(cbw);
    if (!result)
        result = next_in(cbw->todo, offset, offset + count, start, length);
    pthread_mutex_unlock(&cbw->lock);
    return result;
}

void cbw_copied(struct cbw *cbw, uint64_t offset, uint64_t count)
{
    pthread_mutex_lock(&cbw->lock);
    nb_bitmap_clear(cbw->todo, offset, count);
    pthread_mutex_unlock(&cbw->lock);
}

/* The list before the bits of `zeroes`: it is what takes room. */
struct saved *cbw_take(struct cbw *cbw)
{
    uint64_t start, length;
    pthread_mutex_lock(&cbw->lock);
    struct saved *saved = cbw->first;
    if (saved) {
        cbw->first = saved->next;
        if (!cbw->first)
            cbw->last = &cbw->first;
        cbw->entry_bytes -= saved->length;
    } else if (nb_bitmap_next_dirty(cbw->zeroes, 0, UINT64_MAX, &start, &length) && (saved = malloc(sizeof *saved))) {
        nb_bitmap_clear(cbw->zeroes, start, length);
        *saved = (struct saved) { .offset = start, .length = length, .place = SAVED_ZERO };
    }
    if (saved)
        cbw->taken_bytes += saved->length;
    pthread_mutex_unlock(&cbw->lock);
    return saved;
}

int cbw_saved_read(struct cbw *cbw, const struct saved *saved, uint64_t skip, size_t count, void *buf,
                   const void **data)
{
    if (saved->place == SAVED_MEMORY) {
        *data = cbw->memory + saved->at + skip;
        return 0;
    }
    *data = buf;
    for (size_t done = 0; done < count;) {
        ssize_t got = pread(cbw->options.scratch_fd, (char *)buf + done, count - done,
                            (off_t)(saved->at + skip + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? -errno : -EIO;      /* somebody cut the file */
        done += (size_t)got;
    }
    return 0;
}

void cbw_saved_written(struct cbw *cbw, struct saved *saved)
{
    if (saved->place == SAVED_SCRATCH)      /* where holes cannot be punched the file keeps its size until it is closed */
        (void)fallocate(cbw->options.scratch_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)saved->at,
                        (off_t)round_up(cbw, saved->length));
    pthread_mutex_lock(&cbw->lock);
    cbw->taken_bytes -= saved->length;
    forget_entry_locked(cbw, saved);
    pthread_mutex_unlock(&cbw->lock);
}

void cbw_saved_keep(struct cbw *cbw, struct saved *saved)
{
    pthread_mutex_lock(&cbw->lock);
    cbw->taken_bytes -= saved->length;
    if (!keeping(cbw)) {
        forget_entry_locked(cbw, saved);
    } else if (saved->place == SAVED_ZERO) {
        nb_bitmap_set(cbw->zeroes, saved->offset, saved->length);
        free(saved);
    } else {
        saved->next = cbw->first;
        if (!cbw->first)
            cbw->last = &saved->next;
        cbw->first = saved;
        cbw->entry_bytes += saved->length;
    }
    pthread_mutex_unlock(&cbw->lock);
}

uint64_t cbw_stored(struct cbw *cbw)
{
    pthread_mutex_lock(&cbw->lock);
    uint64_t bytes = cbw->entry_bytes + cbw->taken_bytes + nb_bitmap_dirty_bytes(cbw->zeroes);
    pthread_mutex_unlock(&cbw->lock);
    return bytes;
}

bool cbw_urgent(struct cbw *cbw)
{
    pthread_mutex_lock(&cbw->lock);
    bool urgent = keeping(cbw) && (cbw->full_posted || half_full_locked(cbw));
    pthread_mutex_unlock(&cbw->lock);
    return urgent;
}

void cbw_attach(struct cbw *cbw)
{
    pthread_mutex_lock(&cbw->lock);
    cbw->slices++;
    cbw->announced = false;
    pthread_mutex_unlock(&cbw->lock);
}

void cbw_detach(struct cbw *cbw)
{
    pthread_mutex_lock(&cbw->lock);
    assert(cbw->slices > 0);
    cbw->slices--;
    if (keeping(cbw) && !empty_locked(cbw))
        announce_locked(cbw);
    pthread_mutex_unlock(&cbw->lock);
    trim(cbw);
}
