/* Exports: the registry, the gate every guest request passes, and the requests themselves.
 *
 * A request's life: enter the gate -> checks -> root node -> leave the gate.  The gate counts requests in flight in
 * SHARDS cells, one per thread (modulo), so that connections do not share a cache line.  To drain: closed is raised,
 * then the cells are summed; a request adds itself to its cell first and looks at closed afterwards (both sequentially
 * consistent), so either the drain sees the request or the request sees the closed gate, steps back and waits.
 * The request that finds the gate closed when it leaves looks again whether the sum is 0.
 *
 * root is read inside the gate without a lock: it changes only while the gate is closed and drained.
 *
 * Owner of the registry: the process.  Locks: registry.lock (names, the list), then export.lock (the gate's slow
 * path), then the ring's.
 */
#include "node.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { SHARDS = 16 };

enum counter { READ_OPS, READ_BYTES, WRITE_OPS, WRITE_BYTES, ZERO_OPS, ZERO_BYTES, TRIM_OPS, TRIM_BYTES, FLUSH_OPS,
               FAILED_OPS, COUNTERS };

struct shard {
    _Alignas(64) atomic_uint in_flight;
    _Atomic uint64_t counters[COUNTERS];
};

struct waiting_drain {
    struct waiting_drain *next;
    uint64_t token;
};

struct export {
    struct shard shards[SHARDS];
    struct node *root;             /* changed only while closed and drained, under lock */
    char *name;                    /* immutable */
    bool writable;                 /* immutable */
    atomic_bool killed;
    atomic_bool closed;            /* closed_count > 0 */
    atomic_uint refs, clients;
    pthread_mutex_t lock;          /* protects what follows */
    pthread_cond_t opened;
    unsigned closed_count;
    struct waiting_drain *drains;
    bool registered;               /* protected by registry.lock, as is next */
    struct export *next;
};

static struct {
    pthread_mutex_t lock;
    struct export *first;          /* every export that lives, oldest first, registered or not */
} registry = { .lock = PTHREAD_MUTEX_INITIALIZER };

static struct shard *my_shard(struct export *exp)
{
    static atomic_uint threads;
    static _Thread_local unsigned number;      /* 0: not given yet */
    if (!number)
        number = atomic_fetch_add_explicit(&threads, 1, memory_order_relaxed) % SHARDS + 1;
    return &exp->shards[number - 1];
}

/* ---- registry ---- */

static struct export *lookup_locked(const char *name)
{
    for (struct export *exp = registry.first; exp; exp = exp->next)
        if (exp->registered && (!*name || !strcmp(exp->name, name)))
            return exp;
    return NULL;
}

int nb_export_new(const char *name, struct node *root, bool writable, struct export **out)
{
    struct export *exp = aligned_alloc(64, sizeof *exp);
    if (!exp)
        return -ENOMEM;
    memset(exp, 0, sizeof *exp);
    exp->name = strdup(name);
    if (!exp->name) {
        free(exp);
        return -ENOMEM;
    }
    exp->root = nb_node_ref(root);
    exp->writable = writable;
    exp->registered = true;
    atomic_init(&exp->refs, 1);
    pthread_mutex_init(&exp->lock, NULL);
    pthread_cond_init(&exp->opened, NULL);

    pthread_mutex_lock(&registry.lock);
    struct export **end = &registry.first;
    bool taken = *name && lookup_locked(name);
    while (*end)
        end = &(*end)->next;
    if (!taken)
        *end = exp;
    pthread_mutex_unlock(&registry.lock);
    if (taken) {
        nb_export_unref(exp);
        return -EEXIST;
    }
    *out = exp;
    return 0;
}

void nb_export_unregister(struct export *exp)
{
    pthread_mutex_lock(&registry.lock);
    exp->registered = false;
    pthread_mutex_unlock(&registry.lock);
}

struct export *nb_export_find(const char *name)
{
    pthread_mutex_lock(&registry.lock);
    struct export *exp = lookup_locked(name);
    if (exp)
        atomic_fetch_add(&exp->refs, 1);
    pthread_mutex_unlock(&registry.lock);
    return exp;
}

void nb_export_unref(struct export *exp)
{
    if (!exp)
        return;
    /* Under the lock: nb_export_find must not revive an export on its way out. */
    pthread_mutex_lock(&registry.lock);
    bool last = atomic_fetch_sub(&exp->refs, 1) == 1;
    if (last)
        for (struct export **at = &registry.first; *at; at = &(*at)->next)
            if (*at == exp) {
                *at = exp->next;
                break;
            }
    pthread_mutex_unlock(&registry.lock);
    if (!last)
        return;
    nb_node_unref(exp->root);
    pthread_cond_destroy(&exp->opened);
    pthread_mutex_destroy(&exp->lock);
    free(exp->name);
    free(exp);
}

void nb_export_kill(struct export *exp)
{
    atomic_store(&exp->killed, true);
}

uint32_t nb_export_clients(struct export *exp)
{
    return atomic_load(&exp->clients);
}

void nb_export_client(struct export *exp, int change)
{
    atomic_fetch_add(&exp->clients, (unsigned)change);
}

bool nb_export_writable(const struct export *exp)
{
    return exp->writable;
}

uint64_t nb_export_size(struct export *exp)
{
    /* Outside the gate, which may be closed: the lock keeps the root alive. */
    pthread_mutex_lock(&exp->lock);
    uint64_t size = exp->root->size;
    pthread_mutex_unlock(&exp->lock);
    return size;
}

static unsigned in_flight(struct export *exp)
{
    unsigned sum = 0;
    for (int i = 0; i < SHARDS; i++)
        sum += atomic_load(&exp->shards[i].in_flight);
    return sum;
}

void nb_export_counters(struct export *exp, struct nb_counters *out)
{
    uint64_t sum[COUNTERS] = { 0 };
    for (int i = 0; i < SHARDS; i++)
        for (int c = 0; c < COUNTERS; c++)
            sum[c] += atomic_load_explicit(&exp->shards[i].counters[c], memory_order_relaxed);
    *out = (struct nb_counters) {
        .read_ops = sum[READ_OPS], .read_bytes = sum[READ_BYTES],
        .write_ops = sum[WRITE_OPS], .write_bytes = sum[WRITE_BYTES],
        .zero_ops = sum[ZERO_OPS], .zero_bytes = sum[ZERO_BYTES],
        .trim_ops = sum[TRIM_OPS], .trim_bytes = sum[TRIM_BYTES],
        .flush_ops = sum[FLUSH_OPS], .failed_ops = sum[FAILED_OPS], .in_flight = in_flight(exp),
    };
}

bool export_guests_active(uint64_t *seen)
{
    uint64_t done = 0;
    unsigned now = 0;
    pthread_mutex_lock(&registry.lock);
    for (struct export *exp = registry.first; exp; exp = exp->next) {
        now += in_flight(exp);
        for (int i = 0; i < SHARDS; i++)
            for (int c = 0; c < COUNTERS; c++)
                done += atomic_load_explicit(&exp->shards[i].counters[c], memory_order_relaxed);
    }
    pthread_mutex_unlock(&registry.lock);
    bool active = now || done != *seen;
    *seen = done;
    return active;
}

/* ---- gate ---- */

/* Post the drains' events once nothing is in flight. */
static void settle_drains(struct export *exp)
{
    struct waiting_drain *done = NULL;
    pthread_mutex_lock(&exp->lock);
    if (exp->closed_count && !in_flight(exp)) {
        done = exp->drains;
        exp->drains = NULL;
    }
    pthread_mutex_unlock(&exp->lock);
    while (done) {
        struct waiting_drain *next = done->next;
        ring_post(NB_EVENT_DRAINED, 0, done->token, 0, 0, 0);
        free(done);
        done = next;
    }
}

void nb_export_close_gate(struct export *exp, uint64_t token)
{
    struct waiting_drain *drain = malloc(sizeof *drain);
    if (!drain)
        abort();      /* a drain that is not answered would hang the graph for ever */
    drain->token = token;
    pthread_mutex_lock(&exp->lock);
    drain->next = exp->drains;
    exp->drains = drain;
    exp->closed_count++;
    atomic_store(&exp->closed, true);
    pthread_mutex_unlock(&exp->lock);
    settle_drains(exp);
}

void nb_export_open_gate(struct export *exp)
{
    pthread_mutex_lock(&exp->lock);
    assert(exp->closed_count);
    if (--exp->closed_count == 0) {
        atomic_store(&exp->closed, false);
        pthread_cond_broadcast(&exp->opened);
    }
    pthread_mutex_unlock(&exp->lock);
}

int nb_export_set_root(struct export *exp, struct node *root)
{
    pthread_mutex_lock(&exp->lock);
    struct node *old = exp->root;
    exp->root = nb_node_ref(root);
    pthread_mutex_unlock(&exp->lock);
    nb_node_unref(old);
    return 0;
}

static void leave(struct export *exp, struct shard *shard)
{
    atomic_fetch_sub(&shard->in_flight, 1);
    if (atomic_load(&exp->closed))
        settle_drains(exp);
}

static struct shard *enter(struct export *exp)
{
    struct shard *shard = my_shard(exp);
    for (;;) {
        atomic_fetch_add(&shard->in_flight, 1);
        if (!atomic_load(&exp->closed))
            return shard;
        leave(exp, shard);
        pthread_mutex_lock(&exp->lock);
        while (exp->closed_count)
            pthread_cond_wait(&exp->opened, &exp->lock);
        pthread_mutex_unlock(&exp->lock);
    }
}

/* The errors that NBD can express stay; any other (a remote disk that timed out, damaged metadata) is an I/O error.
 * nbdkit would make EINVAL of it, which blames the guest's request. */
static int guest_error(int err)
{
    switch (-err) {
    case 0:
    case EPERM:
    case EROFS:
    case EIO:
    case ENOMEM:
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
    case EINVAL:
    case ESHUTDOWN:
    case EOPNOTSUPP:
    case EOVERFLOW:
        return err;
    default:
        return -EIO;
    }
}

/* Count the request, leave the gate, and say what the guest is told. */
static int finish(struct export *exp, struct shard *shard, enum counter ops, uint64_t bytes, int err)
{
    if (err) {
        ops = FAILED_OPS;
        bytes = 0;
    }
    atomic_fetch_add_explicit(&shard->counters[ops], 1, memory_order_relaxed);
    if (bytes)
        atomic_fetch_add_explicit(&shard->counters[ops + 1], bytes, memory_order_relaxed);
    leave(exp, shard);
    return guest_error(err);
}

/* ---- requests ---- */

static int check_read(struct export *exp, uint64_t length, uint64_t offset)
{
    if (atomic_load_explicit(&exp->killed, memory_order_relaxed))
        return -ESHUTDOWN;
    if (offset > exp->root->size || length > exp->root->size - offset)
        return -EINVAL;
    return 0;
}

static int check_write(struct export *exp, uint64_t length, uint64_t offset)
{
    if (atomic_load_explicit(&exp->killed, memory_order_relaxed))
        return -ESHUTDOWN;
    if (!exp->writable)
        return -EROFS;
    if (offset > exp->root->size || length > exp->root->size - offset)
        return -ENOSPC;
    return 0;
}

int nb_export_pread(struct export *exp, void *buf, uint32_t length, uint64_t offset)
{
    struct shard *shard = enter(exp);
    int err = check_read(exp, length, offset);
    if (!err && length)
        err = node_pread(exp->root, buf, length, offset);
    return finish(exp, shard, READ_OPS, length, err);
}

int nb_export_pwrite(struct export *exp, const void *buf, uint32_t length, uint64_t offset, uint32_t flags)
{
    struct shard *shard = enter(exp);
    int err = check_write(exp, length, offset);
    if (!err && length)
        err = node_pwrite(exp->root, buf, length, offset, flags);
    return finish(exp, shard, WRITE_OPS, length, err);
}

int nb_export_zero(struct export *exp, uint32_t length, uint64_t offset, uint32_t flags)
{
    struct shard *shard = enter(exp);
    int err = check_write(exp, length, offset);
    if (!err && length)
        err = node_zero(exp->root, length, offset, flags);
    return finish(exp, shard, ZERO_OPS, length, err);
}

int nb_export_trim(struct export *exp, uint32_t length, uint64_t offset, uint32_t flags)
{
    struct shard *shard = enter(exp);
    int err = check_write(exp, length, offset);
    if (!err && length)
        err = node_discard(exp->root, length, offset);
    if (!err && (flags & NB_REQ_FUA))
        err = node_flush(exp->root);
    return finish(exp, shard, TRIM_OPS, length, err);
}

int nb_export_flush(struct export *exp)
{
    struct shard *shard = enter(exp);
    int err = atomic_load_explicit(&exp->killed, memory_order_relaxed) ? -ESHUTDOWN : 0;
    if (!err && exp->writable)
        err = node_flush(exp->root);
    return finish(exp, shard, FLUSH_OPS, 0, err);
}

/* Read into nothing: what was read stays in the page cache. */
int nb_export_cache(struct export *exp, uint32_t length, uint64_t offset)
{
    enum { PART = 65536 };
    char *buf = malloc(PART);
    struct shard *shard = enter(exp);
    int err = buf ? check_read(exp, length, offset) : -ENOMEM;
    while (!err && length) {
        uint32_t part = length < PART ? length : PART;
        err = node_pread(exp->root, buf, part, offset);
        length -= part;
        offset += part;
    }
    leave(exp, shard);
    free(buf);
    return guest_error(err);
}

int nb_export_extents(struct export *exp, uint32_t length, uint64_t offset, struct nb_extent *extents,
                      size_t capacity)
{
    struct shard *shard = enter(exp);
    int result = check_read(exp, length, offset);
    if (!result)
        result = nb_node_block_status(exp->root, NULL, offset, length, extents, capacity);
    leave(exp, shard);
    return result < 0 ? guest_error(result) : result;
}
