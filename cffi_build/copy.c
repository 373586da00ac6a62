/* The copy engine: copies what a bitmap has dirty from one node to another, in slices that the loop asks for.
 *
 * A slice is run by tasks of the pool ("workers"), each in a loop of steps.  A step is an entry of the
 * copy-before-write store, which goes first, or else a claim: the next dirty area at a cursor that moves round.
 *
 *   what happens       bitmap alone (mirror, commit, stream)      with copy before write
 *   claim              its bits are cleared; then it is read      its bits stay set; read, checked (cbw_still_old)
 *   guest changes it   the bit is set again: copied again later   the store gets the old data
 *   copied             nothing                                    its bits are cleared (cbw_copied)
 *   failed             its bits are set again                     nothing
 *
 * Claims never overlap claims in flight, so no two writes to one place of the target run at once with different data.
 * "Dirty plus in flight" (nb_copier_remaining) is read in one hold of the lock, under which claims move between the two.
 *
 * A claim is read by block status: what is known to read as zeroes is never read.  While claims turn out to be all
 * zero and quickly done the next ones grow (`stride`), so that a large hole takes few steps; the first data found gives
 * the rest of a large claim back.
 *
 * Guest first.  See pace_locked: all of the policy.  A background copier's workers run under SCHED_IDLE.  Beside them a
 * normal thread (the standby) sleeps; it works only when they made no progress for a tick, because guests saturate
 * the processors, or when the store fills up.
 *
 * The slice ends, and its event is posted, when a worker finds nothing to do and no other is in a step.  Tasks that are
 * still queued then hold a reference and find no slice, or join the next one.
 *
 * Lock: copier.lock protects what is grouped under it; no I/O under it.  Order: copier.lock, then cbw.lock, bitmap.lock,
 * the pool's and the ring's.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "intercept.h"

#define MILLISECOND UINT64_C(1000000)      /* in ns, as all times here */

enum {
    MIN_CHUNK = 64 * 1024,
    ZERO_BLOCK = 64 * 1024,            /* detect_zeroes looks at blocks of this size */
    MAX_WORKERS = 64
};

static const uint64_t MAX_STRIDE = UINT64_C(1) << 40;
static const uint64_t STRIDE_TIME = 2 * MILLISECOND;      /* a claim of zeroes done in less makes the next one larger */

/* An area being copied; lives on the worker's stack, linked while its step runs. */
struct claim {
    struct claim *next;
    uint64_t start, end;
};

/* What a worker does between two holds of the lock. */
struct step {
    struct saved *saved;               /* an entry of the store, or NULL: the claim */
    struct claim claim;
    uint64_t piece;                    /* most bytes to read at once */
    uint64_t pause;                    /* ns to sleep after each read */
    uint64_t reserved;                 /* taken from the slice's budget */
    /* The outcome. */
    uint64_t done;                     /* bytes of todo or store that were dealt with */
    uint64_t moved;                    /* bytes that were read */
    int error;
    int side;                          /* NB_SIDE_* */
    uint64_t failed_at;
};

struct slice {
    bool running, store_only;
    uint64_t token;
    uint64_t deadline;                 /* CLOCK_MONOTONIC */
    uint64_t budget;                   /* bytes that may still be moved */
    uint64_t done, moved;
    int error, side;                   /* the first failure */
    uint64_t failed_at;
};

struct buffer {                        /* kept at the buffer's own begin while it is free */
    struct buffer *next;
};

struct copier {
    /* Immutable. */
    struct node *source, *target;      /* referenced */
    struct bitmap *todo;               /* the caller's or the cbw's */
    struct cbw *cbw;                   /* or NULL */
    struct node *cbw_node;             /* referenced; or NULL */
    struct bitmap *written;            /* target_is_zero without cbw: where the target no longer is; else NULL */
    struct nb_copier_options options;
    uint64_t granule;                  /* bytes */

    atomic_uint refs;                  /* the owner's and one per task */
    atomic_bool stop;                  /* written under lock */

    /* Under lock. */
    pthread_mutex_t lock;
    pthread_cond_t changed;            /* for the standby: the slice ended, or it is alone; CLOCK_MONOTONIC */
    struct slice slice;
    struct claim *claims;
    uint64_t claimed;                  /* bytes in claims */
    uint64_t in_flight;                /* bytes in claims and taken from the store */
    uint64_t cursor, stride;
    unsigned active, queued;           /* workers in a step; tasks that wait for a thread */
    bool standby;                      /* a standby is queued or alive */
    uint64_t steps;                    /* finished */
    uint64_t guest_activity;           /* for export_guests_active */
    uint64_t guest_seen;               /* when it last said yes */
    struct buffer *buffers;            /* free ones, of buffer_size each */
};

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 * MILLISECOND + (uint64_t)now.tv_nsec;
}

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static uint64_t most(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static uint64_t round_up(const struct copier *copier, uint64_t bytes)
{
    return (bytes + copier->granule - 1) & ~(copier->granule - 1);
}

/* ---- the policy: guests first ---- */

enum {
    GUEST_CHUNK = 128 * 1024,     /* bytes read at once while guests are active: short holds of disk and processor */
    CPUS_PER_WORKER = 2,           /* while guests are active */
    GUEST_PAUSE = 60 * 1000        /* ns between two reads, while guests are active */
};

static const uint64_t GUEST_MEMORY = 50 * MILLISECOND;    /* so long after its last request a guest counts as active */
static const uint64_t STANDBY_TICK = 25 * MILLISECOND;    /* without a step for so long the background is starved */

struct pace {
    unsigned workers;
    uint64_t chunk, pause;
};

/* How many workers may be in flight now and how much each may take at once. */
static struct pace pace_locked(struct copier *copier, uint64_t now)
{
    struct pace full = { copier->options.max_workers, copier->options.chunk, 0 };
    if (!copier->options.background)
        return full;
    if (export_guests_active(&copier->guest_activity))
        copier->guest_seen = now;
    if (now - copier->guest_seen > GUEST_MEMORY)
        return full;
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    unsigned workers = cpus > CPUS_PER_WORKER ? (unsigned)cpus / CPUS_PER_WORKER : 1;
    return (struct pace) { (unsigned)least(workers, full.workers), least(GUEST_CHUNK, full.chunk), GUEST_PAUSE };
}

/* ---- buffers: page aligned, reused between steps, given back to the system when a slice leaves nothing to do ---- */

static void *get_buffer(struct copier *copier)
{
    pthread_mutex_lock(&copier->lock);
    struct buffer *buffer = copier->buffers;
    if (buffer)
        copier->buffers = buffer->next;
    pthread_mutex_unlock(&copier->lock);
    if (buffer)
        return buffer;
    void *memory = mmap(NULL, copier->options.chunk, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

static void put_buffer(struct copier *copier, void *memory)
{
    struct buffer *buffer = memory;
    if (!buffer)
        return;
    pthread_mutex_lock(&copier->lock);
    buffer->next = copier->buffers;
    copier->buffers = buffer;
    pthread_mutex_unlock(&copier->lock);
}

static void free_buffers(struct copier *copier, struct buffer *buffer)
{
    while (buffer) {
        struct buffer *next = buffer->next;
        munmap(buffer, copier->options.chunk);
        buffer = next;
    }
}

/* ---- writing to the target ---- */

static bool is_zero(const char *data, size_t count)
{
    static const char zeroes[64];
    size_t head = count < sizeof zeroes ? count : sizeof zeroes;
    /* Equal to itself moved by `head`, whose begin is zero: one pass of the C library's vector compare. */
    return !memcmp(data, zeroes, head) && !memcmp(data, data + head, count - head);
}

/* A target that was zero needs zeroes only where something has been written to it since. */
static int write_zeroes(struct copier *copier, uint64_t offset, uint64_t count)
{
    uint64_t start = offset, length = count, end = offset + count;
    if (!copier->options.target_is_zero)
        return node_zero(copier->target, count, offset, NB_REQ_MAY_UNMAP);
    if (!copier->written)
        return 0;
    for (; nb_bitmap_next_dirty(copier->written, offset, end - offset, &start, &length) && start < end;
         offset = start + length) {
        length = least(length, end - start);
        int err = node_zero(copier->target, length, start, NB_REQ_MAY_UNMAP);
        if (err || start + length == end)
            return err;
    }
    return 0;
}

static int write_data(struct copier *copier, const void *data, uint64_t offset, uint64_t count)
{
    if (copier->written)
        nb_bitmap_set(copier->written, offset, count);
    return node_pwrite(copier->target, data, count, offset, 0);
}

/* Length of the run of blocks at the front that are all zero or all not. */
static uint64_t same_kind(const char *data, uint64_t offset, uint64_t count, bool *zero)
{
    uint64_t at = 0;
    while (at < count) {
        uint64_t block = least(ZERO_BLOCK - ((offset + at) & (ZERO_BLOCK - 1)), count - at);
        bool is = is_zero(data + at, block);
        if (at && is != *zero)
            break;
        *zero = is;
        at += block;
    }
    return at;
}

/* data NULL: zeroes. */
static int write_target(struct copier *copier, const char *data, uint64_t offset, uint64_t count)
{
    if (!data)
        return write_zeroes(copier, offset, count);
    if (!copier->options.detect_zeroes)
        return write_data(copier, data, offset, count);
    for (uint64_t at = 0; at < count;) {
        bool zero = false;
        uint64_t length = same_kind(data + at, offset + at, count - at, &zero);
        int err = zero ? write_zeroes(copier, offset + at, length) : write_data(copier, data + at, offset + at, length);
        if (err)
            return err;
        at += length;
    }
    return 0;
}

/* ---- one step ---- */

static bool fail(struct step *step, int error, int side, uint64_t offset)
{
    step->error = error;
    step->side = side;
    step->failed_at = offset;
    return false;
}

/* What was read (data NULL: known to be zeroes) goes to the target, but for what guests saved meanwhile. */
static bool deliver(struct copier *copier, struct step *step, const char *data, uint64_t offset, uint64_t count)
{
    uint64_t at = offset, end = offset + count;
    while (at < end) {
        uint64_t start = at, length = end - at;
        int found = copier->cbw ? cbw_still_old(copier->cbw, at, end - at, &start, &length) : 1;
        if (found < 0)
            return fail(step, found, NB_SIDE_STORE, at);
        if (!found)
            break;
        int err = write_target(copier, data ? data + (start - offset) : NULL, start, length);
        if (err)
            return fail(step, err, NB_SIDE_TARGET, start);
        step->done += length;
        at = start + length;
    }
    return true;
}

/* Of a claim that grew because all had been zeroes, keep what one step should take of the data at `at`. */
static void give_back(struct copier *copier, struct step *step, uint64_t at)
{
    struct claim *claim = &step->claim;
    uint64_t end = (at & ~(copier->granule - 1)) + round_up(copier, step->piece);
    if (end >= claim->end)
        return;
    pthread_mutex_lock(&copier->lock);
    if (!copier->cbw)
        nb_bitmap_set(copier->todo, end, claim->end - end);
    copier->claimed -= claim->end - end;
    copier->in_flight -= claim->end - end;
    claim->end = end;
    copier->cursor = end;
    pthread_mutex_unlock(&copier->lock);
}

/* Length of what lies at `at` and has to be read, at most `limit`; 0: zeroes, *zeroes long. */
static int data_run(struct copier *copier, uint64_t at, uint64_t end, uint64_t limit, uint64_t *length,
                    uint64_t *zeroes)
{
    *length = *zeroes = 0;
    while (*length < limit && at + *length < end) {
        struct nb_extent extent;
        int err = node_status(copier->source, NULL, at + *length, end - at - *length, &extent);
        if (err)
            return err;
        if (extent.flags & NB_EXTENT_ZERO) {
            if (!*length)
                *zeroes = extent.length;
            break;
        }
        *length += extent.length;
    }
    *length = least(*length, least(limit, end - at));
    return 0;
}

/* Leave the processor to guests for a moment.  SCHED_IDLE alone does not: a kernel without full preemption lets the
 * worker go on until the next timer tick, up to 4 ms, which a guest's request then waits. */
static void give_way(const struct step *step)
{
    if (step->pause)
        nanosleep(&(struct timespec) { 0, (long)step->pause }, NULL);
}

static bool copy_data(struct copier *copier, struct step *step, char **buffer, uint64_t offset, uint64_t count)
{
    if (!*buffer)
        *buffer = get_buffer(copier);
    if (!*buffer)
        return fail(step, -ENOMEM, NB_SIDE_SOURCE, offset);
    int err = node_pread(copier->source, *buffer, count, offset);
    if (err)
        return fail(step, err, NB_SIDE_SOURCE, offset);
    step->moved += count;
    bool ok = deliver(copier, step, *buffer, offset, count);
    give_way(step);
    return ok;
}

static bool copy_claim(struct copier *copier, struct step *step, char **buffer)
{
    for (uint64_t at = step->claim.start; at < step->claim.end;) {
        uint64_t length, zeroes;
        int err = data_run(copier, at, step->claim.end, step->piece, &length, &zeroes);
        if (err)
            return fail(step, err, NB_SIDE_SOURCE, at);
        if (!length) {
            if (!deliver(copier, step, NULL, at, zeroes))
                return false;
            at += zeroes;
            continue;
        }
        give_back(copier, step, at);
        length = least(length, step->claim.end - at);
        if (!copy_data(copier, step, buffer, at, length))
            return false;
        at += length;
    }
    if (copier->cbw)
        cbw_copied(copier->cbw, step->claim.start, step->claim.end - step->claim.start);
    return true;
}

static bool copy_saved(struct copier *copier, struct step *step, char **buffer)
{
    const struct saved *saved = step->saved;
    for (uint64_t at = 0; at < saved->length;) {
        uint64_t length = saved->length - at;
        const void *data = NULL;
        if (saved->place != SAVED_ZERO) {
            length = least(length, copier->options.chunk);
            if (saved->place == SAVED_SCRATCH && !*buffer && !(*buffer = get_buffer(copier)))
                return fail(step, -ENOMEM, NB_SIDE_STORE, saved->offset + at);
            int err = cbw_saved_read(copier->cbw, saved, at, length, *buffer, &data);
            if (err)
                return fail(step, err, NB_SIDE_STORE, saved->offset + at);
            step->moved += length;
        }
        int err = write_target(copier, data, saved->offset + at, length);
        if (err)
            return fail(step, err, NB_SIDE_TARGET, saved->offset + at);
        at += length;
    }
    step->done = saved->length;
    return true;
}

/* ---- choosing steps ---- */

static const struct claim *overlapping_locked(const struct copier *copier, uint64_t start, uint64_t end)
{
    const struct claim *claim = copier->claims;
    while (claim && !(claim->start < end && start < claim->end))
        claim = claim->next;
    return claim;
}

/* The first area at or after `from` that is dirty and in no claim. */
static bool find_locked(struct copier *copier, uint64_t from, uint64_t limit, uint64_t *start, uint64_t *end)
{
    uint64_t length;
    while (nb_bitmap_next_dirty(copier->todo, from, limit, start, &length)) {
        const struct claim *other;
        *end = *start + length;
        while ((other = overlapping_locked(copier, *start, *end)) && other->start > *start)
            *end = other->start;
        if (!other)
            return true;
        from = other->end;
    }
    return false;
}

static bool claim_locked(struct copier *copier, uint64_t chunk, struct step *step)
{
    struct claim *claim = &step->claim;
    uint64_t limit = round_up(copier, most(copier->stride, chunk));
    if (!find_locked(copier, copier->cursor, limit, &claim->start, &claim->end) &&
        !find_locked(copier, 0, limit, &claim->start, &claim->end))
        return false;
    uint64_t length = claim->end - claim->start;
    claim->next = copier->claims;
    copier->claims = claim;
    copier->claimed += length;
    copier->cursor = claim->end;
    if (!copier->cbw)
        nb_bitmap_clear(copier->todo, claim->start, length);
    return true;
}

static uint64_t remaining_locked(struct copier *copier)
{
    uint64_t bytes = nb_bitmap_dirty_bytes(copier->todo);
    return bytes + (copier->cbw ? cbw_stored(copier->cbw) : copier->claimed);
}

static void record_failure_locked(struct slice *slice, int error, int side, uint64_t offset)
{
    if (slice->error)
        return;
    slice->error = error;
    slice->side = side;
    slice->failed_at = offset;
}

static void spawn_locked(struct copier *copier, unsigned workers);

/* False: there is nothing to do for the caller (a worker that counts itself in copier.active, or the standby). */
static bool next_step_locked(struct copier *copier, struct step *step, bool standby)
{
    struct slice *slice = &copier->slice;
    uint64_t now = now_ns();
    *step = (struct step) { 0 };
    if (!slice->running || atomic_load(&copier->stop) || slice->error || !slice->budget || now >= slice->deadline)
        return false;
    struct pace pace = pace_locked(copier, now);
    if (!standby && copier->active > pace.workers)
        return false;
    int broken = copier->cbw ? cbw_error(copier->cbw) : 0;
    if (broken) {
        record_failure_locked(slice, broken, NB_SIDE_STORE, 0);
        return false;
    }
    step->piece = least(pace.chunk, least(slice->budget, MAX_STRIDE) + MIN_CHUNK - 1) & ~(uint64_t)(MIN_CHUNK - 1);
    step->pause = standby ? 0 : pace.pause;
    if (standby)
        step->piece = least(step->piece, GUEST_CHUNK);
    step->saved = copier->cbw ? cbw_take(copier->cbw) : NULL;
    if (!step->saved && (slice->store_only || !claim_locked(copier, step->piece, step)))
        return false;
    uint64_t length = step->saved ? step->saved->length : step->claim.end - step->claim.start;
    step->reserved = least(slice->budget, least(length, step->piece));
    slice->budget -= step->reserved;
    copier->in_flight += length;
    if (remaining_locked(copier) > copier->in_flight)
        spawn_locked(copier, pace.workers);
    return true;
}

static void unlink_claim_locked(struct copier *copier, struct step *step)
{
    struct claim **link = &copier->claims;
    uint64_t length = step->claim.end - step->claim.start;
    while (*link != &step->claim)
        link = &(*link)->next;
    *link = step->claim.next;
    if (step->error && !copier->cbw)
        nb_bitmap_set(copier->todo, step->claim.start, length);
    copier->claimed -= length;
    copier->in_flight -= length;
}

/* Do a step and settle it.  Called and returns with the lock held. */
static void run_step_locked(struct copier *copier, struct step *step)
{
    char *buffer = NULL;
    uint64_t begin = now_ns();
    pthread_mutex_unlock(&copier->lock);
    bool ok = step->saved ? copy_saved(copier, step, &buffer) : copy_claim(copier, step, &buffer);
    put_buffer(copier, buffer);
    uint64_t stored = step->saved ? step->saved->length : 0;
    if (step->saved)
        (ok ? cbw_saved_written : cbw_saved_keep)(copier->cbw, step->saved);
    pthread_mutex_lock(&copier->lock);
    if (step->saved) {
        copier->in_flight -= stored;
    } else {
        unlink_claim_locked(copier, step);
        bool grow = ok && !step->moved && now_ns() - begin < STRIDE_TIME;
        copier->stride = grow ? least(most(copier->stride, copier->options.chunk) * 4, MAX_STRIDE) : 0;
    }
    struct slice *slice = &copier->slice;
    slice->budget += step->reserved;
    slice->budget -= least(slice->budget, step->moved);
    slice->done += step->done;
    slice->moved += step->moved;
    copier->steps++;
    if (!ok)
        record_failure_locked(slice, step->error, step->side, step->failed_at);
}

/* ---- slices ---- */

static void copier_unref(struct copier *copier)
{
    if (atomic_fetch_sub(&copier->refs, 1) != 1)
        return;
    free_buffers(copier, copier->buffers);
    nb_bitmap_free(copier->written);
    nb_node_unref(copier->source);
    nb_node_unref(copier->target);
    nb_node_unref(copier->cbw_node);
    pthread_cond_destroy(&copier->changed);
    pthread_mutex_destroy(&copier->lock);
    free(copier);
}

/* End the slice if the caller, who found nothing to do, was the last; true: it must call after_slice once unlocked. */
static bool end_slice_locked(struct copier *copier, struct buffer **unused)
{
    struct slice *slice = &copier->slice;
    *unused = NULL;
    if (!slice->running || copier->active)
        return false;
    slice->running = false;
    if (slice->error || atomic_load(&copier->stop) || !remaining_locked(copier)) {
        *unused = copier->buffers;
        copier->buffers = NULL;
    }
    pthread_cond_signal(&copier->changed);
    ring_post(NB_EVENT_SLICE, slice->error, slice->token, slice->done, slice->error ? slice->failed_at : slice->moved,
              (uint64_t)slice->side);
    return true;
}

/* The caller holds a reference: the owner may have freed the copier as soon as the event was posted. */
static void after_slice(struct copier *copier, struct buffer *unused)
{
    free_buffers(copier, unused);
    if (copier->cbw)
        cbw_detach(copier->cbw);
}

static void run_worker(void *arg)
{
    struct copier *copier = arg;
    struct buffer *unused;
    struct step step;
    pthread_mutex_lock(&copier->lock);
    copier->queued--;
    copier->active++;
    while (next_step_locked(copier, &step, false))
        run_step_locked(copier, &step);
    copier->active--;
    bool ended = end_slice_locked(copier, &unused);
    pthread_mutex_unlock(&copier->lock);
    if (ended)
        after_slice(copier, unused);
    copier_unref(copier);
}

/* Sleep for a tick or until signalled; true: a tick went by without a step. */
static bool starved_locked(struct copier *copier)
{
    uint64_t end = now_ns() + STANDBY_TICK, steps = copier->steps;
    struct timespec until = { (time_t)(end / (1000 * MILLISECOND)), (long)(end % (1000 * MILLISECOND)) };
    int err = pthread_cond_timedwait(&copier->changed, &copier->lock, &until);
    return err == ETIMEDOUT && copier->steps == steps;
}

/* See "Guest first" above. */
static void run_standby(void *arg)
{
    struct copier *copier = arg;
    struct buffer *unused;
    struct step step;
    bool starved = false;
    pthread_mutex_lock(&copier->lock);
    while (copier->slice.running) {
        bool alone = !copier->active && !copier->queued;
        if (alone || starved || (copier->cbw && cbw_urgent(copier->cbw))) {
            if (next_step_locked(copier, &step, true)) {
                copier->active++;
                run_step_locked(copier, &step);
                copier->active--;
                starved = false;
                continue;
            }
            if (end_slice_locked(copier, &unused)) {
                pthread_mutex_unlock(&copier->lock);
                after_slice(copier, unused);
                pthread_mutex_lock(&copier->lock);
                continue;
            }
        }
        starved = starved_locked(copier);
    }
    copier->standby = false;
    pthread_mutex_unlock(&copier->lock);
    copier_unref(copier);
}

static int submit_locked(struct copier *copier, void (*fn)(void *arg), bool background)
{
    atomic_fetch_add(&copier->refs, 1);
    int err = pool_submit(fn, copier, background);
    if (err)
        atomic_fetch_sub(&copier->refs, 1);      /* never the last: the caller has one */
    return err;
}

/* One more worker, if so many may be in flight.  That none can be had is no error: those that run go on. */
static void spawn_locked(struct copier *copier, unsigned workers)
{
    if (copier->active + copier->queued < workers && !submit_locked(copier, run_worker, copier->options.background))
        copier->queued++;
}

int nb_copier_slice(struct copier *copier, uint64_t max_bytes, uint32_t max_ms, bool store_only, uint64_t token)
{
    pthread_mutex_lock(&copier->lock);
    if (copier->slice.running) {
        pthread_mutex_unlock(&copier->lock);
        return -EBUSY;
    }
    copier->slice = (struct slice) {
        .running = true,
        .store_only = store_only,
        .token = token,
        .deadline = now_ns() + max_ms * MILLISECOND,
        .budget = max_bytes,
    };
    atomic_store(&copier->stop, false);
    int err = 0;
    if (copier->options.background && !copier->standby) {
        err = submit_locked(copier, run_standby, false);
        copier->standby = !err;
    }
    if (!copier->queued)
        spawn_locked(copier, copier->options.max_workers);
    if (!copier->queued && !copier->standby && !err)
        err = -EAGAIN;
    copier->slice.running = copier->queued || copier->standby;
    if (copier->slice.running) {
        err = 0;
        if (copier->cbw)
            cbw_attach(copier->cbw);
    }
    pthread_mutex_unlock(&copier->lock);
    return err;
}

uint64_t nb_copier_remaining(struct copier *copier)
{
    pthread_mutex_lock(&copier->lock);
    uint64_t bytes = remaining_locked(copier);
    pthread_mutex_unlock(&copier->lock);
    return bytes;
}

void nb_copier_stop(struct copier *copier)
{
    struct buffer *unused;
    pthread_mutex_lock(&copier->lock);
    atomic_store(&copier->stop, true);
    atomic_fetch_add(&copier->refs, 1);
    bool ended = end_slice_locked(copier, &unused);      /* else the last worker ends it */
    pthread_mutex_unlock(&copier->lock);
    if (ended)
        after_slice(copier, unused);
    copier_unref(copier);
}

/* ---- life time ---- */

static int check_options(const struct node *source, const struct node *target, const struct bitmap *todo,
                         const struct nb_copier_options *options)
{
    if (target->flags & NB_NODE_READ_ONLY)
        return -EROFS;
    if (!todo || nb_bitmap_size(todo) != source->size || target->size < source->size)
        return -EINVAL;
    if (options->max_workers < 1 || options->max_workers > MAX_WORKERS || options->chunk < MIN_CHUNK)
        return -EINVAL;
    return 0;
}

int nb_copier_new(struct node *source, struct node *target, struct bitmap *todo, struct node *cbw,
                  const struct nb_copier_options *options, struct copier **out)
{
    pthread_condattr_t attributes;
    struct cbw *filter = cbw ? cbw_of(cbw) : NULL;
    if (cbw && (!filter || source != cbw || todo))
        return -EINVAL;
    todo = filter ? cbw_todo(filter) : todo;
    int err = check_options(source, target, todo, options);
    if (err)
        return err;
    struct copier *copier = calloc(1, sizeof *copier);
    if (!copier)
        return -ENOMEM;
    if (options->target_is_zero && !filter)
        err = nb_bitmap_new(source->size, nb_bitmap_granularity(todo), &copier->written);
    if (err) {
        free(copier);
        return err;
    }
    copier->source = nb_node_ref(source);
    copier->target = nb_node_ref(target);
    copier->todo = todo;
    copier->cbw = filter;
    copier->cbw_node = cbw ? nb_node_ref(cbw) : NULL;
    copier->options = *options;
    copier->options.chunk &= ~(uint32_t)(MIN_CHUNK - 1);
    copier->granule = nb_bitmap_granularity(todo);
    export_guests_active(&copier->guest_activity);      /* what guests did before this copy began does not count */
    atomic_init(&copier->refs, 1);
    atomic_init(&copier->stop, false);
    pthread_mutex_init(&copier->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&copier->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    *out = copier;
    return 0;
}

int nb_copier_free(struct copier *copier)
{
    if (!copier)
        return 0;
    pthread_mutex_lock(&copier->lock);
    bool running = copier->slice.running;
    pthread_mutex_unlock(&copier->lock);
    if (running)
        return -EBUSY;
    copier_unref(copier);
    return 0;
}

/* ---- what a job has to copy ---- */

struct allocated_task {
    struct bitmap *bitmap;
    struct node *node, *base;      /* referenced; base may be NULL */
    bool skip_zero;
    uint64_t token;
};

/* Layers from node down to base, as node_status counts depth. */
static uint32_t layers_above(const struct node *node, const struct node *base)
{
    uint32_t layers = 0;
    for (; node && node != base; node = node->filter ? node->file : node->backing)
        layers += !node->filter;
    return layers;
}

static int set_allocated(const struct allocated_task *task)
{
    uint32_t layers = layers_above(task->node, task->base);
    uint64_t end = least(task->node->size, nb_bitmap_size(task->bitmap));
    for (uint64_t at = 0; at < end;) {
        struct nb_extent extent;
        int err = node_status(task->node, task->base, at, end - at, &extent);
        if (err)
            return err;
        /* A layer that answers is above base; none did: the walk ended at base's depth. */
        if (extent.depth < layers && !(task->skip_zero && extent.flags & NB_EXTENT_ZERO))
            nb_bitmap_set(task->bitmap, at, extent.length);
        at += extent.length;
    }
    return 0;
}

static void run_set_allocated(void *arg)
{
    struct allocated_task task = *(struct allocated_task *)arg;
    free(arg);
    int err = set_allocated(&task);
    nb_node_unref(task.node);
    nb_node_unref(task.base);
    ring_post(NB_EVENT_TASK, err, task.token, 0, 0, 0);
}

int nb_bitmap_set_allocated(struct bitmap *bitmap, struct node *node, struct node *base, bool skip_zero, uint64_t token)
{
    struct allocated_task *task = malloc(sizeof *task);
    if (!task)
        return -ENOMEM;
    *task = (struct allocated_task) {
        .bitmap = bitmap,
        .node = nb_node_ref(node),
        .base = base ? nb_node_ref(base) : NULL,
        .skip_zero = skip_zero,
        .token = token,
    };
    int err = pool_submit(run_set_allocated, task, false);
    if (err) {
        nb_node_unref(node);
        nb_node_unref(base);
        free(task);
    }
    return err;
}
