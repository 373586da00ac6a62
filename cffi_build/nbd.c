/* The NBD client driver: another server's export as a node, through libnbd.
 *
 * One connection, or several where the server says that they see each other's writes (multi-conn).  Each has a libnbd
 * handle and one poller thread.  A request runs on the live connection that has the fewest in flight: the caller's
 * thread hands its commands to libnbd, which sends at once what the socket takes, and waits on a condition; the poller
 * does the rest of the sending, all receiving, and wakes the caller.  So any number of threads keep one connection full.
 *
 * What a request is made of:
 *   call      on the caller's stack: counts its commands in flight, keeps the first error
 *   command   one NBD command, at most the server's maximum block size; up to CALL_WINDOW of a call are in flight
 *
 * Writes by the server's minimum block size.  A server may refuse what is not a multiple of it, so an unaligned write
 * or zero reads the blocks around it, changes them and writes them back, with the blocks held exclusively; aligned
 * writes, zeroes and discards hold theirs shared.  With a minimum of 1, the common case, nothing is locked.
 *
 * Connections do not come back.  When the server goes away libnbd fails all that is in flight and the poller ends;
 * requests then fail with -ECONNRESET.  nb_nbd_abort makes the same of a server that hangs: it shuts the sockets down,
 * through descriptors of its own, because libnbd closes its when a connection dies.
 *
 * Locks: call.lock; blocks (rangelock.h), held across whole requests; libnbd's own lock per handle, which it holds
 * while it calls back.  Order: blocks, libnbd's, call.lock; a caller holds no call.lock while it calls libnbd.
 */
#define _GNU_SOURCE    /* vasprintf */
#include <libnbd.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "node.h"
#include "rangelock.h"

#define DATA_LIMIT (UINT64_C(32) << 20)   /* most bytes of a read, write or zero, unless the server says less */
#define RANGE_LIMIT (UINT64_C(1) << 30)   /* most bytes of a trim or a block status, which carry no data */
#define CALL_WINDOW 16
#define MAX_CONNECTIONS 16

struct connection {
    struct nbd_handle *handle;
    pthread_t poller;
    bool polling;               /* the poller was started; used by the opening and closing thread only */
    int wake;                   /* eventfd: the poller looks at the handle again */
    int socket;                 /* a duplicate of libnbd's, open as long as the node; -1: none */
    atomic_bool stop;           /* the poller shall end */
    atomic_bool lost;           /* no requests any more: the poller has ended, or the connection was aborted */
    atomic_uint calls;          /* in flight */
};

struct nbd_node {
    struct node node;
    /* immutable once open */
    uint64_t block;             /* bytes: the server's minimum block size */
    uint64_t data_limit;        /* bytes of one read, write or zero; a multiple of block */
    uint64_t range_limit;       /* bytes of one trim or block status; a multiple of block */
    bool can_flush, can_fua, can_zero, can_fast_zero, can_trim, can_status;
    uint32_t connection_count;
    struct range_lock blocks;   /* used with block > 1 only */
    struct connection connections[MAX_CONNECTIONS];
};

enum command_kind { COMMAND_READ, COMMAND_WRITE, COMMAND_ZERO, COMMAND_TRIM, COMMAND_FLUSH, COMMAND_STATUS };

struct command {
    enum command_kind kind;
    uint32_t flags;             /* LIBNBD_CMD_FLAG_* */
    char *buf;                  /* read into or written from; NULL without data */
    uint64_t count, offset;
};

struct call {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    unsigned in_flight;         /* commands; protected by lock, as is error */
    int error;                  /* positive errno of the first command that failed */
    uint32_t status_length, status_flags;   /* of the first run that a block status told; written by the poller */
};

static struct nbd_node *nbd_of(struct node *node)
{
    return container_of(node, struct nbd_node, node);
}

/* ---- one call: callbacks on the poller's thread, waiting on the caller's ---- */

static void call_fail(struct call *call, int error)
{
    pthread_mutex_lock(&call->lock);
    if (!call->error)
        call->error = error;
    pthread_mutex_unlock(&call->lock);
}

static int on_completion(void *arg, int *error)
{
    if (*error)
        call_fail(arg, *error);
    return 1;       /* libnbd forgets the command */
}

/* libnbd has done with the command, whether it ran, was refused, or died with its connection: the one call that
 * always comes, exactly once. */
static void on_release(void *arg)
{
    struct call *call = arg;

    pthread_mutex_lock(&call->lock);
    call->in_flight--;
    pthread_cond_signal(&call->changed);
    pthread_mutex_unlock(&call->lock);
}

static int on_extents(void *arg, const char *context, uint64_t offset, uint32_t *entries, size_t entry_count,
                      int *error)
{
    struct call *call = arg;

    (void)offset, (void)error;
    if (strcmp(context, LIBNBD_CONTEXT_BASE_ALLOCATION) == 0 && entry_count >= 2) {
        call->status_length = entries[0];
        call->status_flags = entries[1];
    }
    return 0;
}

/* Wait until fewer than `limit` commands are in flight; the first error so far (positive errno). */
static int call_wait(struct call *call, unsigned limit)
{
    int error;

    pthread_mutex_lock(&call->lock);
    while (call->in_flight >= limit)
        pthread_cond_wait(&call->changed, &call->lock);
    error = call->error;
    pthread_mutex_unlock(&call->lock);
    return error;
}

static int64_t hand_to_libnbd(struct nbd_handle *handle, const struct command *command, struct call *call)
{
    nbd_completion_callback done = { .callback = on_completion, .user_data = call, .free = on_release };

    switch (command->kind) {
    case COMMAND_READ:
        return nbd_aio_pread(handle, command->buf, command->count, command->offset, done, command->flags);
    case COMMAND_WRITE:
        return nbd_aio_pwrite(handle, command->buf, command->count, command->offset, done, command->flags);
    case COMMAND_ZERO:
        return nbd_aio_zero(handle, command->count, command->offset, done, command->flags);
    case COMMAND_TRIM:
        return nbd_aio_trim(handle, command->count, command->offset, done, command->flags);
    case COMMAND_STATUS:
        return nbd_aio_block_status(handle, command->count, command->offset,
                                    (nbd_extent_callback) { .callback = on_extents, .user_data = call }, done,
                                    command->flags);
    case COMMAND_FLUSH:
    default:
        return nbd_aio_flush(handle, done, command->flags);
    }
}

static bool connection_alive(const struct connection *connection)
{
    return !nbd_aio_is_dead(connection->handle) && !nbd_aio_is_closed(connection->handle);
}

static void wake_poller(struct connection *connection)
{
    eventfd_write(connection->wake, 1);     /* fails only when 2^64 wake-ups wait: then it is awake */
}

static void issue(struct connection *connection, const struct command *command, struct call *call)
{
    pthread_mutex_lock(&call->lock);
    call->in_flight++;
    pthread_mutex_unlock(&call->lock);
    if (hand_to_libnbd(connection->handle, command, call) == -1) {
        int error = nbd_get_errno();
        call_fail(call, !connection_alive(connection) || error == 0 ? ECONNRESET : error);
    }
    /* The poller waits for input alone unless it knew of something to send. */
    if (nbd_aio_get_direction(connection->handle) != LIBNBD_AIO_DIRECTION_READ)
        wake_poller(connection);
}

/* What libnbd says for a lost connection, or the server while it ends, is one thing to the layers above; -ESHUTDOWN
 * means there that our own export is gone. */
static int errno_of_nbd(int error)
{
    return error == ENOTCONN || error == ESHUTDOWN || error == EPIPE ? ECONNRESET : error;
}

static struct connection *pick_connection(struct nbd_node *nbd)
{
    struct connection *best = NULL;
    unsigned fewest = 0;

    for (uint32_t i = 0; i < nbd->connection_count; i++) {
        struct connection *connection = &nbd->connections[i];
        unsigned calls = atomic_load_explicit(&connection->calls, memory_order_relaxed);

        if (!atomic_load(&connection->lost) && (!best || calls < fewest)) {
            best = connection;
            fewest = calls;
        }
    }
    return best;
}

/* Run `whole` in commands of at most `limit` bytes, several in flight.  0 or -errno of the first that failed. */
static int run_call(struct nbd_node *nbd, const struct command *whole, uint64_t limit, struct call *call)
{
    struct connection *connection = pick_connection(nbd);
    struct command command = *whole;
    uint64_t left = whole->count;
    int error;

    if (!connection)
        return -ECONNRESET;
    pthread_mutex_init(&call->lock, NULL);
    pthread_cond_init(&call->changed, NULL);
    atomic_fetch_add_explicit(&connection->calls, 1, memory_order_relaxed);
    do {
        command.count = left < limit ? left : limit;
        issue(connection, &command, call);
        command.offset += command.count;
        if (command.buf)
            command.buf += command.count;
        left -= command.count;
        error = call_wait(call, left ? CALL_WINDOW : 1);
    } while (left && !error);
    error = call_wait(call, 1);
    atomic_fetch_sub_explicit(&connection->calls, 1, memory_order_relaxed);
    pthread_cond_destroy(&call->changed);
    pthread_mutex_destroy(&call->lock);
    return -errno_of_nbd(error);
}

static int run(struct nbd_node *nbd, const struct command *whole, uint64_t limit)
{
    struct call call = { .error = 0 };

    return run_call(nbd, whole, limit, &call);
}

/* ---- the poller ---- */

static void notify(struct nbd_handle *handle, short revents)
{
    unsigned direction = nbd_aio_get_direction(handle);     /* a caller may have changed it while we slept */

    /* One notification at a time: the first changes the state that the second would be for.  Their errors show in
     * the state of the handle and in the commands that fail. */
    if ((revents & (POLLIN | POLLHUP | POLLERR)) && (direction & LIBNBD_AIO_DIRECTION_READ))
        nbd_aio_notify_read(handle);
    else if ((revents & (POLLOUT | POLLHUP | POLLERR)) && (direction & LIBNBD_AIO_DIRECTION_WRITE))
        nbd_aio_notify_write(handle);
}

static void *poller_main(void *arg)
{
    struct connection *connection = arg;
    struct nbd_handle *handle = connection->handle;

    thread_take_process_priority();
    while (!atomic_load(&connection->stop) && connection_alive(connection)) {
        unsigned direction = nbd_aio_get_direction(handle);
        struct pollfd fds[2] = {
            { .fd = nbd_aio_get_fd(handle),
              .events = (short)((direction & LIBNBD_AIO_DIRECTION_READ ? POLLIN : 0) |
                                (direction & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : 0)) },
            { .fd = connection->wake, .events = POLLIN },
        };
        eventfd_t wakes;

        if (poll(fds, 2, -1) <= 0)
            continue;
        if (fds[1].revents)
            eventfd_read(connection->wake, &wakes);
        if (fds[0].revents)
            notify(handle, fds[0].revents);
    }
    atomic_store(&connection->lost, true);
    if (!connection_alive(connection))
        shutdown(connection->socket, SHUT_RDWR);    /* else our descriptor would keep it open */
    return NULL;
}

/* ---- requests ---- */

static uint64_t align_down(const struct nbd_node *nbd, uint64_t offset)
{
    return offset - offset % nbd->block;
}

/* Never beyond the node's size, which is a multiple of the block. */
static uint64_t align_up(const struct nbd_node *nbd, uint64_t offset)
{
    return align_down(nbd, offset + (nbd->block - 1));
}

static bool is_aligned(const struct nbd_node *nbd, uint64_t count, uint64_t offset)
{
    return nbd->block == 1 || (offset % nbd->block == 0 && count % nbd->block == 0);
}

static int read_blocks(struct nbd_node *nbd, void *buf, uint64_t count, uint64_t offset)
{
    return run(nbd, &(struct command) { COMMAND_READ, 0, buf, count, offset }, nbd->data_limit);
}

static int client_pread(struct node *node, void *buf, size_t count, uint64_t offset)
{
    struct nbd_node *nbd = nbd_of(node);
    uint64_t start = align_down(nbd, offset), end = align_up(nbd, offset + count);
    char *blocks;
    int err;

    if (is_aligned(nbd, count, offset))
        return read_blocks(nbd, buf, count, offset);
    blocks = malloc(end - start);
    if (!blocks)
        return -ENOMEM;
    err = read_blocks(nbd, blocks, end - start, start);
    if (!err)
        memcpy(buf, blocks + (offset - start), count);
    free(blocks);
    return err;
}

static int flush_server(struct nbd_node *nbd)
{
    /* Without the command everything is as durable as that server ever makes it. */
    return nbd->can_flush ? run(nbd, &(struct command) { .kind = COMMAND_FLUSH }, 1) : 0;
}

/* Run what changes data: FUA by the server, or by a flush. */
static int run_write(struct nbd_node *nbd, struct command command, uint32_t flags)
{
    bool fua = (flags & NB_REQ_FUA) && !(nbd->node.flags & NB_NODE_NO_FLUSH);
    int err;

    if (fua && nbd->can_fua)
        command.flags |= LIBNBD_CMD_FLAG_FUA;
    err = run(nbd, &command, nbd->data_limit);
    return err || !fua || nbd->can_fua ? err : flush_server(nbd);
}

static int write_blocks(struct nbd_node *nbd, const void *buf, uint64_t count, uint64_t offset, uint32_t flags)
{
    /* libnbd does not write to the buffer of a write. */
    return run_write(nbd, (struct command) { COMMAND_WRITE, 0, (char *)(uintptr_t)buf, count, offset }, flags);
}

/* Write `buf`, or zeroes where it is NULL, to what need not be whole blocks; the blocks around are held exclusively. */
static int write_into_blocks_locked(struct nbd_node *nbd, const void *buf, uint64_t count, uint64_t offset,
                                    uint32_t flags)
{
    uint64_t start = align_down(nbd, offset), end = align_up(nbd, offset + count);
    uint64_t last = end - nbd->block;
    char *blocks = malloc(end - start);
    int err;

    if (!blocks)
        return -ENOMEM;
    err = read_blocks(nbd, blocks, nbd->block, start);
    if (!err && last != start)
        err = read_blocks(nbd, blocks + (last - start), nbd->block, last);
    if (err)
        goto out;
    if (buf)
        memcpy(blocks + (offset - start), buf, count);
    else
        memset(blocks + (offset - start), 0, count);
    err = write_blocks(nbd, blocks, end - start, start, flags);
out:
    free(blocks);
    return err;
}

static void hold_blocks(struct nbd_node *nbd, struct range_hold *hold, uint64_t count, uint64_t offset)
{
    if (nbd->block > 1)
        range_lock(&nbd->blocks, hold, align_down(nbd, offset), align_up(nbd, offset + count),
                   !is_aligned(nbd, count, offset));
}

static void release_blocks(struct nbd_node *nbd, struct range_hold *hold)
{
    if (nbd->block > 1)
        range_unlock(&nbd->blocks, hold);
}

static int client_pwrite(struct node *node, const void *buf, size_t count, uint64_t offset, uint32_t flags)
{
    struct nbd_node *nbd = nbd_of(node);
    struct range_hold hold;
    int err;

    hold_blocks(nbd, &hold, count, offset);
    err = is_aligned(nbd, count, offset) ? write_blocks(nbd, buf, count, offset, flags)
                                         : write_into_blocks_locked(nbd, buf, count, offset, flags);
    release_blocks(nbd, &hold);
    return err;
}

static int zero_blocks(struct nbd_node *nbd, uint64_t count, uint64_t offset, uint32_t flags)
{
    uint32_t command_flags = (flags & NB_REQ_MAY_UNMAP ? 0 : LIBNBD_CMD_FLAG_NO_HOLE) |
                             (flags & NB_REQ_FAST ? LIBNBD_CMD_FLAG_FAST_ZERO : 0);

    return run_write(nbd, (struct command) { COMMAND_ZERO, command_flags, NULL, count, offset }, flags);
}

/* The whole blocks by the server's zero command, what is left at both ends as data. */
static int zero_parts_locked(struct nbd_node *nbd, uint64_t count, uint64_t offset, uint32_t flags)
{
    uint64_t end = offset + count, start = align_up(nbd, offset), stop = align_down(nbd, end);
    int err = 0;

    if (start >= stop)
        return write_into_blocks_locked(nbd, NULL, count, offset, flags);
    err = zero_blocks(nbd, stop - start, start, flags);
    if (!err && offset < start)
        err = write_into_blocks_locked(nbd, NULL, start - offset, offset, flags);
    if (!err && stop < end)
        err = write_into_blocks_locked(nbd, NULL, end - stop, stop, flags);
    return err;
}

/* -EOPNOTSUPP where the server cannot: the caller then writes zeroes, or does without if it asked for a fast zero. */
static int client_zero(struct node *node, uint64_t count, uint64_t offset, uint32_t flags)
{
    struct nbd_node *nbd = nbd_of(node);
    struct range_hold hold;
    int err;

    if (!nbd->can_zero || ((flags & NB_REQ_FAST) && !nbd->can_fast_zero))
        return -EOPNOTSUPP;
    hold_blocks(nbd, &hold, count, offset);
    err = is_aligned(nbd, count, offset) ? zero_blocks(nbd, count, offset, flags)
                                         : zero_parts_locked(nbd, count, offset, flags);
    release_blocks(nbd, &hold);
    return err;
}

/* A hint, so blocks that are only partly discarded stay. */
static int client_discard(struct node *node, uint64_t count, uint64_t offset)
{
    struct nbd_node *nbd = nbd_of(node);
    uint64_t start = align_up(nbd, offset), stop = align_down(nbd, offset + count);
    struct range_hold hold;
    int err;

    if (!nbd->can_trim || start >= stop)
        return 0;
    hold_blocks(nbd, &hold, stop - start, start);
    err = run(nbd, &(struct command) { COMMAND_TRIM, 0, NULL, stop - start, start }, nbd->range_limit);
    release_blocks(nbd, &hold);
    return err;
}

static int client_flush(struct node *node)
{
    return flush_server(nbd_of(node));
}

static int client_map(struct node *node, uint64_t offset, uint64_t count, struct mapping *out)
{
    struct nbd_node *nbd = nbd_of(node);
    uint64_t start = align_down(nbd, offset), length = align_up(nbd, offset + count) - start;
    struct call call = { .status_length = 0 };
    int err;

    *out = (struct mapping) { .kind = MAP_DATA, .allocated = true, .length = count };
    if (!nbd->can_status)
        return 0;
    if (length > nbd->range_limit)
        length = nbd->range_limit;
    err = run_call(nbd, &(struct command) { COMMAND_STATUS, LIBNBD_CMD_FLAG_REQ_ONE, NULL, length, start },
                   nbd->range_limit, &call);
    if (err)
        return err;
    if (call.status_length <= offset - start)
        return 0;           /* an answer that ends before what was asked: data is always true */
    out->kind = call.status_flags & LIBNBD_STATE_ZERO ? MAP_ZERO : MAP_DATA;
    out->allocated = !(call.status_flags & LIBNBD_STATE_HOLE);
    if (count > call.status_length - (offset - start))
        out->length = call.status_length - (offset - start);
    return 0;
}

static int64_t client_allocated(struct node *node)
{
    (void)node;
    return -ENOTSUP;        /* the protocol does not tell */
}

/* ---- open and close ---- */

static void close_connection(struct connection *connection)
{
    if (connection->polling) {
        atomic_store(&connection->stop, true);
        wake_poller(connection);
        pthread_join(connection->poller, NULL);
    }
    /* The goodbye is for a server that still listens; it is not waited for. */
    if (connection->handle && connection_alive(connection))
        nbd_aio_disconnect(connection->handle, 0);
    nbd_close(connection->handle);
    if (connection->socket >= 0)
        close(connection->socket);
    if (connection->wake >= 0)
        close(connection->wake);
}

static void client_close(struct node *node)
{
    struct nbd_node *nbd = nbd_of(node);

    for (uint32_t i = 0; i < nbd->connection_count; i++)
        close_connection(&nbd->connections[i]);
    range_lock_destroy(&nbd->blocks);
}

static const struct node_ops nbd_ops = {
    .driver = "nbd",
    .pread = client_pread,
    .pwrite = client_pwrite,
    .zero = client_zero,
    .discard = client_discard,
    .flush = client_flush,
    .map = client_map,
    .allocated = client_allocated,
    .close = client_close,
};

/* Set *message (NULL without memory) and return -error. */
__attribute__((format(printf, 3, 4))) static int open_failed(char **message, int error, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    if (vasprintf(message, format, args) < 0)
        *message = NULL;
    va_end(args);
    return -error;
}

/* The same with libnbd's reason for the call that failed last. */
static int libnbd_failed(char **message)
{
    int error = nbd_get_errno();
    const char *reason = nbd_get_error();

    return open_failed(message, error ? error : EIO, "%s", reason ? reason : "libnbd gives no reason");
}

/* Started with all signals blocked: they are for the threads of the program. */
static int start_poller(struct connection *connection)
{
    sigset_t all, before;
    int error;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&connection->poller, NULL, poller_main, connection);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    connection->polling = error == 0;
    return error;
}

/* Connect the next connection of the node; its poller is not started yet.  What was made is the node's to close. */
static int connect_next(struct nbd_node *nbd, const char *uri, char **message)
{
    struct connection *connection = &nbd->connections[nbd->connection_count++];

    connection->socket = -1;
    connection->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (connection->wake < 0)
        return open_failed(message, errno, "cannot make an event descriptor: %s", strerror(errno));
    connection->handle = nbd_create();
    if (!connection->handle ||
        nbd_add_meta_context(connection->handle, LIBNBD_CONTEXT_BASE_ALLOCATION) == -1 ||
        nbd_connect_uri(connection->handle, uri) == -1)
        return libnbd_failed(message);
    connection->socket = fcntl(nbd_aio_get_fd(connection->handle), F_DUPFD_CLOEXEC, 0);
    if (connection->socket < 0)
        return open_failed(message, errno, "cannot duplicate the connection's descriptor: %s", strerror(errno));
    return 0;
}

static int read_capabilities(struct nbd_node *nbd, char **message)
{
    struct nbd_handle *handle = nbd->connections[0].handle;
    int64_t size = nbd_get_size(handle);
    int64_t minimum = nbd_get_block_size(handle, LIBNBD_SIZE_MINIMUM);
    int64_t maximum = nbd_get_block_size(handle, LIBNBD_SIZE_MAXIMUM);

    if (size < 0 || minimum < 0 || maximum < 0)
        return libnbd_failed(message);
    nbd->node.size = (uint64_t)size;
    nbd->block = minimum ? (uint64_t)minimum : 1;
    nbd->data_limit = maximum && (uint64_t)maximum < DATA_LIMIT ? (uint64_t)maximum : DATA_LIMIT;
    nbd->data_limit = align_down(nbd, nbd->data_limit);
    nbd->range_limit = align_down(nbd, RANGE_LIMIT);
    if (!nbd->data_limit)
        return open_failed(message, EINVAL, "the server's maximum block size %" PRId64 " is below its minimum %" PRId64,
                           maximum, minimum);
    if (nbd->node.size % nbd->block)
        return open_failed(message, EINVAL, "the export's size %" PRId64
                           " is no multiple of the server's minimum block size %" PRId64, size, minimum);
    if (nbd_is_read_only(handle) == 1)
        nbd->node.flags |= NB_NODE_READ_ONLY;
    nbd->can_flush = nbd_can_flush(handle) == 1;
    nbd->can_fua = nbd_can_fua(handle) == 1;
    nbd->can_zero = nbd_can_zero(handle) == 1;
    nbd->can_fast_zero = nbd_can_fast_zero(handle) == 1;
    nbd->can_trim = nbd_can_trim(handle) == 1;
    nbd->can_status = nbd_can_meta_context(handle, LIBNBD_CONTEXT_BASE_ALLOCATION) == 1;
    return 0;
}

/* Make the further connections, of a server on which they see each other's writes, and start all pollers. */
static int connect_all(struct nbd_node *nbd, const char *uri, uint32_t connections, char **message)
{
    int err = connect_next(nbd, uri, message);

    if (!err)
        err = read_capabilities(nbd, message);
    if (!err && nbd_can_multi_conn(nbd->connections[0].handle) != 1)
        connections = 1;
    while (!err && nbd->connection_count < connections) {
        err = connect_next(nbd, uri, message);
        if (!err && nbd_get_size(nbd->connections[nbd->connection_count - 1].handle) != (int64_t)nbd->node.size)
            err = open_failed(message, EIO, "the server gives another size on connection %u than on the first",
                              nbd->connection_count);
    }
    for (uint32_t i = 0; !err && i < nbd->connection_count; i++) {
        int error = start_poller(&nbd->connections[i]);
        if (error)
            err = open_failed(message, error, "cannot start a thread: %s", strerror(error));
    }
    return err;
}

int nb_nbd_open(const char *uri, uint32_t connections, uint32_t flags, struct node **out, char **message)
{
    struct nbd_node *nbd;
    int err;

    *message = NULL;
    if (connections < 1 || connections > MAX_CONNECTIONS)
        return open_failed(message, EINVAL, "the number of connections is %u, not 1 to %d", connections,
                           MAX_CONNECTIONS);
    nbd = node_alloc(sizeof(*nbd), &nbd_ops, 0, flags, NULL, NULL);
    if (!nbd)
        return -ENOMEM;
    range_lock_init(&nbd->blocks);
    err = connect_all(nbd, uri, connections, message);
    if (err) {
        nb_node_unref(&nbd->node);
        return err;
    }
    *out = &nbd->node;
    return 0;
}

void nb_nbd_abort(struct node *node)
{
    struct nbd_node *nbd;

    while (node && node->ops != &nbd_ops)
        node = node->file;
    if (!node)
        return;
    nbd = nbd_of(node);
    for (uint32_t i = 0; i < nbd->connection_count; i++) {
        atomic_store(&nbd->connections[i].lost, true);
        /* The poller wakes to an end of file, and libnbd fails what is in flight.  This fails only for a connection
         * that the server has closed. */
        shutdown(nbd->connections[i].socket, SHUT_RDWR);
    }
}

void nb_string_free(char *s)
{
    free(s);
}
