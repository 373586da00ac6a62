/* The NBD client driver against nbdkit: data, what servers cannot do, limits, errors, and a server that dies. */
#define _GNU_SOURCE
#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "node.h"

#define SOCKET "test_nbd.sock"
#define LOG "test_nbd.log"
#define URI "nbd+unix:///?socket=" SOCKET
#define MAX_ARGUMENTS 20

/* Run nbdkit with the arguments, up to NULL, on a socket that listens already; its process id. */
__attribute__((sentinel)) static pid_t start_server(const char *first, ...)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = SOCKET };
    const char *arguments[MAX_ARGUMENTS] = { "nbdkit", "-f", "--exit-with-parent", first };
    int count = 4, listener = socket(AF_UNIX, SOCK_STREAM, 0);
    va_list more;
    pid_t pid;

    va_start(more, first);
    while (count < MAX_ARGUMENTS && (arguments[count] = va_arg(more, const char *)))
        count++;
    va_end(more);
    CHECK(count < MAX_ARGUMENTS);
    unlink(SOCKET);
    CHECK(listener >= 0);
    CHECK_INT(bind(listener, (struct sockaddr *)&address, sizeof address), 0);
    CHECK_INT(listen(listener, 32), 0);
    pid = fork();
    if (pid == 0) {
        char own[16];
        snprintf(own, sizeof own, "%d", getpid());
        setenv("LISTEN_PID", own, 1);
        setenv("LISTEN_FDS", "1", 1);
        dup2(listener, 3);
        execvp("nbdkit", (char **)(uintptr_t)arguments);
        _exit(127);
    }
    CHECK(pid > 0);
    close(listener);
    return pid;
}

static void stop_server(pid_t pid, int signal_number)
{
    kill(pid, signal_number);
    CHECK_INT(waitpid(pid, NULL, 0), pid);
    unlink(SOCKET);
}

static struct node *connect_node(uint32_t connections, uint32_t flags)
{
    struct node *node;
    char *message;
    int err = nb_nbd_open(URI, connections, flags, &node, &message);

    if (err)
        check_failed(__FILE__, __LINE__, "nb_nbd_open: %d: %s", err, message);
    return node;
}

static void *filled(uint8_t byte, size_t count)
{
    void *buf = malloc(count);

    CHECK(buf);
    memset(buf, byte, count);
    return buf;
}

static uint64_t now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* How often `text` stands in the server's log. */
static int count_in_log(const char *text)
{
    FILE *log = fopen(LOG, "r");
    char line[512];
    int count = 0;

    while (log && fgets(line, sizeof line, log))
        count += strstr(line, text) != NULL;
    if (log)
        fclose(log);
    return count;
}

static int thread_count(void)
{
    DIR *tasks = opendir("/proc/self/task");
    int count = 0;

    CHECK(tasks);
    for (struct dirent *entry; (entry = readdir(tasks));)
        count += entry->d_name[0] != '.';
    closedir(tasks);
    return count;
}

/* ---- data ---- */

static void data_written_is_read_back(void)
{
    pid_t server = start_server("memory", "10M", NULL);
    struct node *node = connect_node(1, 0);
    char *data = filled(0xa5, 100000), *got = filled(0, 100000);

    CHECK_INT(nb_node_size(node), 10 << 20);
    CHECK(!nb_node_read_only(node));
    CHECK_INT(nb_node_allocated(node), -ENOTSUP);
    CHECK_OK(nb_node_pwrite(node, data, 100000, 12345, 0));
    CHECK_OK(nb_node_flush(node));
    CHECK_OK(nb_node_pread(node, got, 100000, 12345));
    CHECK_BYTES(got, data, 100000);
    CHECK_INT(nb_node_pread(node, got, 2, (10 << 20) - 1), -EINVAL);
    CHECK_INT(nb_node_pwrite(node, got, 2, (10 << 20) - 1, 0), -ENOSPC);
    free(data);
    free(got);
    nb_node_unref(node);
    stop_server(server, SIGTERM);
}

static void large_requests_are_split_at_the_default_limit(void)
{
    const size_t count = (40 << 20) + 4096;
    pid_t server = start_server("memory", "64M", NULL);
    struct node *node = connect_node(1, 0);
    char *data = filled(0, count), *got = filled(0, count);

    for (size_t i = 0; i < count; i += 512)
        memcpy(data + i, &i, sizeof i);
    CHECK_OK(nb_node_pwrite(node, data, count, 512, NB_REQ_FUA));
    CHECK_OK(nb_node_pread(node, got, count, 512));
    CHECK(memcmp(data, got, count) == 0);
    free(data);
    free(got);
    nb_node_unref(node);
    stop_server(server, SIGTERM);
}

static void requests_keep_to_the_servers_maximum(void)
{
    const size_t count = (3 << 20) + 100;      /* more commands than are in flight at once */
    pid_t server = start_server("--filter=blocksize-policy", "memory", "64M", "blocksize-minimum=1",
                                "blocksize-preferred=4096", "blocksize-maximum=65536",
                                "blocksize-error-policy=error", NULL);
    struct node *node = connect_node(1, 0);
    char *data = filled(0, count), *got = filled(0, count);

    for (size_t i = 0; i < count; i++)
        data[i] = (char)(i * 2654435761u >> 13);
    CHECK_OK(nb_node_pwrite(node, data, count, 1, 0));
    CHECK_OK(nb_node_pread(node, got, count, 1));
    CHECK(memcmp(data, got, count) == 0);
    CHECK_OK(nb_node_zero(node, count, 1, NB_REQ_MAY_UNMAP));
    CHECK_OK(nb_node_pread(node, got, count, 1));
    CHECK_FILLED(got, 0, count);
    free(data);
    free(got);
    nb_node_unref(node);
    stop_server(server, SIGTERM);
}

/* ---- concurrency ---- */

#define WORKERS 16

struct worker {
    pthread_t thread;
    struct node *node;
    int number;
    int result;
};

static void run_workers(struct worker *workers, struct node *node, void *(*fn)(void *))
{
    for (int i = 0; i < WORKERS; i++) {
        workers[i] = (struct worker) { .node = node, .number = i };
        CHECK_OK(pthread_create(&workers[i].thread, NULL, fn, &workers[i]));
    }
}

static void join_workers(struct worker *workers, int result)
{
    for (int i = 0; i < WORKERS; i++) {
        CHECK_INT(pthread_join(workers[i].thread, NULL), 0);
        CHECK_INT(workers[i].result, result);
    }
}

static void *read_one_block(void *arg)
{
    struct worker *worker = arg;
    char buf[4096];

    worker->result = nb_node_pread(worker->node, buf, sizeof buf, (uint64_t)worker->number * sizeof buf);
    return NULL;
}

static void many_requests_are_in_flight_on_one_connection(void)
{
    pid_t server = start_server("--filter=delay", "-t16", "memory", "1M", "rdelay=200ms", NULL);
    struct node *node = connect_node(1, 0);
    struct worker workers[WORKERS];
    uint64_t begin = now_ms();

    run_workers(workers, node, read_one_block);
    join_workers(workers, 0);
    CHECK(now_ms() - begin < WORKERS * 200 / 2);
    nb_node_unref(node);
    stop_server(server, SIGTERM);
}

static void the_parts_of_one_request_are_in_flight_together(void)
{
    const size_t count = 32 << 16;
    pid_t server = start_server("--filter=blocksize-policy", "--filter=delay", "-t16", "memory", "4M", "rdelay=50ms",
                                "blocksize-minimum=1", "blocksize-preferred=4096", "blocksize-maximum=65536", NULL);
    struct node *node = connect_node(1, 0);
    char *buf = filled(0, count);
    uint64_t begin = now_ms();

    CHECK_OK(nb_node_pread(node, buf, count, 0));
    CHECK(now_ms() - begin < 32 * 50 / 2);
    free(buf);
    nb_node_unref(node);
    stop_server(server, SIGTERM);
}

/* Own blocks, written and checked again and again, of sizes from one byte to more than a socket buffer. */
static void *write_and_verify(void *arg)
{
    struct worker *worker = arg;
    const size_t span = 1 << 19;
    char *data = filled(0, span), *got = filled(0, span);
    unsigned seed = (unsigned)worker->number;

    for (int round = 0; round < 40 && worker->result == 0; round++) {
        size_t count = 1 + (size_t)rand_r(&seed) % (round % 4 ? 8192 : span);
        uint64_t offset = (uint64_t)worker->number * span + (uint64_t)rand_r(&seed) % (span - count + 1);

        memset(data, round + worker->number, count);
        worker->result = nb_node_pwrite(worker->node, data, count, offset, round % 8 ? 0 : NB_REQ_FUA);
        if (!worker->result)
            worker->result = nb_node_pread(worker->node, got, count, offset);
        if (!worker->result && memcmp(data, got, count))
            worker->result = -EILSEQ;
    }
    free(data);
    free(got);
    return NULL;
}

static void threads_read_what_they_wrote(uint32_t connections)
{
    pid_t server = start_server("memory", "8M", NULL);
    struct node *node = connect_node(connections, 0);
    struct worker workers[WORKERS];

    run_workers(workers, node, write_and_verify);
    join_workers(workers, 0);
    nb_node_unref(node);
    stop_server(server, SIGTERM);
}

static void threads_share_one_connection(void)
{
    threads_read_what_they_wrote(1);
}

static void threads_share_several_connections(void)
{
    threads_read_what_they_wrote(4);
}

static void connections_are_as_many_as_the_server_allows(void)
{
    int before = thread_count();
    pid_t server = start_server("memory", "1M", NULL);
    struct node *node = connect_node(4, 0);

    CHECK_INT(thread_count() - before, 4);
    nb_node_unref(node);
    CHECK_INT(thread_count() - before, 0);
    stop_server(server, SIGTERM);

    server = start_server("--filter=multi-conn", "memory", "1M", "multi-conn-mode=disable", NULL);
    node = connect_node(4, 0);
    CHECK_INT(thread_count() - before, 1);
    nb_node_unref(node);
    CHECK_INT(thread_count() - before, 0);
    stop_server(server, SIGTERM);
}

/* ---- what servers can and cannot ---- */

static void fua_is_emulated_by_a_flush(void)
{
    pid_t server = start_server("--filter=log", "--filter=fua", "memory", "1M", "logfile=" LOG, NULL);
    struct node *node = connect_node(1, 0);

    CHECK_OK(nb_node_pwrite(node, "x", 1, 0, 0));
    CHECK_INT(count_in_log(" Flush "), 0);
    CHECK_OK(nb_node_pwrite(node, "x", 1, 0, NB_REQ_FUA));
    nb_node_unref(node);
    stop_server(server, SIGTERM);
    CHECK_INT(count_in_log(" Flush "), 1);
    unlink(LOG);
}

static void fua_goes_to_a_server_that_has_it(void)
{
    pid_t server = start_server("--filter=log", "--filter=fua", "memory", "1M", "fuamode=force", "logfile=" LOG, NULL);
    struct node *node = connect_node(1, 0), *unsafe;

    CHECK_OK(nb_node_pwrite(node, "x", 1, 0, NB_REQ_FUA));
    nb_node_unref(node);
    unsafe = connect_node(1, NB_NODE_NO_FLUSH);
    CHECK_OK(nb_node_pwrite(unsafe, "x", 1, 0, NB_REQ_FUA));
    CHECK_OK(nb_node_flush(unsafe));
    nb_node_unref(unsafe);
    stop_server(server, SIGTERM);
    CHECK_INT(count_in_log("fua=1"), 1);
    CHECK_INT(count_in_log(" Flush "), 0);
    unlink(LOG);
}

static void zero_says_whether_space_may_be_freed(void)
{
    pid_t server = start_server("--filter=log", "memory", "1M", "logfile=" LOG, NULL);
    struct node *node = connect_node(1, 0);

    CHECK_OK(nb_node_zero(node, 4096, 0, 0));
    CHECK_INT(count_in_log("trim=0 fua"), 1);
    CHECK_OK(nb_node_zero(node, 4096, 0, NB_REQ_MAY_UNMAP));
    nb_node_unref(node);
    stop_server(server, SIGTERM);
    CHECK_INT(count_in_log("trim=1 fua"), 1);
    unlink(LOG);
}

static void zeroes_are_written_where_the_server_cannot_zero(void)
{
    pid_t server = start_server("--filter=nozero", "memory", "1M", NULL);
    struct node *node = connect_node(1, 0);
    char *data = filled(0x11, 200000);

    CHECK_OK(nb_node_pwrite(node, data, 200000, 0, 0));
    CHECK_INT(nb_node_zero(node, 199998, 1, NB_REQ_FAST), -EOPNOTSUPP);
    CHECK_OK(nb_node_zero(node, 199998, 1, NB_REQ_MAY_UNMAP));
    CHECK_OK(nb_node_pread(node, data, 200000, 0));
    CHECK_INT(data[0], 0x11);
    CHECK_FILLED(data + 1, 0, 199998);
    CHECK_INT(data[199999], 0x11);
    free(data);
    nb_node_unref(node);
    stop_server(server, SIGTERM);
}

static void fast_zero_is_the_servers_to_refuse(void)
{
    pid_t server = start_server("memory", "1M", NULL);
    struct node *node = connect_node(1, 0);

    CHECK_OK(nb_node_zero(node, 65536, 0, NB_REQ_FAST | NB_REQ_MAY_UNMAP));
    nb_node_unref(node);
    stop_server(server, SIGTERM);

    server = start_server("--filter=nozero", "memory", "1M", "zeromode=emulate", "fastzeromode=slow", NULL);
    node = connect_node(1, 0);
    CHECK_INT(nb_node_zero(node, 65536, 0, NB_REQ_FAST | NB_REQ_MAY_UNMAP), -EOPNOTSUPP);
    nb_node_unref(node);
    stop_server(server, SIGTERM);
}

static void discard_reaches_the_server_only_with_unmap(void)
{
    pid_t server = start_server("memory", "1M", NULL);
    struct node *keep = connect_node(1, 0), *unmap;
    char *data = filled(0x22, 65536);

    CHECK_OK(nb_node_pwrite(keep, data, 65536, 0, 0));
    CHECK_OK(nb_node_discard(keep, 65536, 0));
    CHECK_OK(nb_node_pread(keep, data, 65536, 0));
    CHECK_FILLED(data, 0x22, 65536);
    unmap = connect_node(1, NB_NODE_UNMAP);
    CHECK_OK(nb_node_discard(unmap, 65536, 0));
    CHECK_OK(nb_node_pread(unmap, data, 65536, 0));
    CHECK_FILLED(data, 0, 65536);       /* as nbdkit's memory disk shows what was trimmed */
    free(data);
    nb_node_unref(keep);
    nb_node_unref(unmap);
    stop_server(server, SIGTERM);
}

static void block_status_tells_the_servers_holes(void)
{
    pid_t server = start_server("memory", "1M", NULL);
    struct node *node = connect_node(1, 0);
    struct nb_extent extents[4];
    char *data = filled(0x33, 65536);

    CHECK_OK(nb_node_pwrite(node, data, 65536, 65536, 0));
    CHECK_INT(nb_node_block_status(node, NULL, 512, (1 << 20) - 512, extents, 4), 3);
    CHECK_INT(extents[0].length, 65536 - 512);
    CHECK_INT(extents[0].flags, NB_EXTENT_ZERO | NB_EXTENT_HOLE);
    CHECK_INT(extents[1].offset, 65536);
    CHECK_INT(extents[1].length, 65536);
    CHECK_INT(extents[1].flags, NB_EXTENT_DATA);
    CHECK_INT(extents[2].length, (1 << 20) - 131072);
    CHECK_INT(nb_node_block_status(node, NULL, 70000, 100, extents, 4), 1);
    CHECK_INT(extents[0].length, 100);
    free(data);
    nb_node_unref(node);
    stop_server(server, SIGTERM);
}

static void everything_is_data_without_block_status(void)
{
    pid_t server = start_server("--no-sr", "memory", "1M", NULL);
    struct node *node = connect_node(1, 0);
    struct nb_extent extent;

    CHECK_INT(nb_node_block_status(node, NULL, 0, 1 << 20, &extent, 1), 1);
    CHECK_INT(extent.length, 1 << 20);
    CHECK_INT(extent.flags, NB_EXTENT_DATA);
    nb_node_unref(node);
    stop_server(server, SIGTERM);
}

static void a_server_that_tells_too_little_counts_as_data(void)
{
    pid_t server = start_server("--filter=blocksize-policy", "eval", "get_size=echo 1048576",
                                "pread=head -c $3 /dev/zero", "can_extents=exit 0",
                                "extents=echo 0 512 hole,zero; echo 512 1048064", "blocksize-minimum=4096",
                                "blocksize-preferred=4096", NULL);
    struct node *node = connect_node(1, 0);
    struct nb_extent extent;

    CHECK_INT(nb_node_block_status(node, NULL, 1024, 512, &extent, 1), 1);
    CHECK_INT(extent.length, 512);
    CHECK_INT(extent.flags, NB_EXTENT_DATA);
    nb_node_unref(node);
    stop_server(server, SIGTERM);
}

static void a_read_only_server_makes_the_node_read_only(void)
{
    pid_t server = start_server("-r", "memory", "1M", NULL);
    struct node *node = connect_node(1, 0);

    CHECK(nb_node_read_only(node));
    CHECK_INT(nb_node_pwrite(node, "x", 1, 0, 0), -EROFS);
    CHECK_INT(nb_node_zero(node, 512, 0, 0), -EROFS);
    nb_node_unref(node);
    stop_server(server, SIGTERM);
}

/* ---- minimum block size ---- */

static pid_t start_block_server(void)
{
    return start_server("--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=4096",
                        "blocksize-preferred=4096", "blocksize-maximum=65536", "blocksize-error-policy=error", NULL);
}

static void unaligned_requests_work_against_a_minimum_block_size(void)
{
    static const struct { uint64_t offset, count; } ranges[] = {
        { 0, 1 }, { 4095, 2 }, { 5000, 100 }, { 8192, 4096 }, { 12000, 20000 }, { 100, 200000 },
        { (1 << 20) - 1, 1 },
    };
    pid_t server = start_block_server();
    struct node *node = connect_node(1, NB_NODE_UNMAP);
    char *model = filled(0, 1 << 20), *got = filled(0, 1 << 20);
    struct nb_extent extent;

    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        uint64_t offset = ranges[i].offset, count = ranges[i].count;

        memset(model + offset, 0x40 + (int)i, count);
        CHECK_OK(nb_node_pwrite(node, model + offset, count, offset, NB_REQ_FUA));
        CHECK_OK(nb_node_pread(node, got, count, offset));
        CHECK_BYTES(got, model + offset, count);
    }
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        memset(model + ranges[i].offset, 0, ranges[i].count);
        CHECK_OK(nb_node_zero(node, ranges[i].count, ranges[i].offset, NB_REQ_MAY_UNMAP));
        CHECK_OK(nb_node_pread(node, got, 1 << 20, 0));
        CHECK(memcmp(got, model, 1 << 20) == 0);
    }
    CHECK_OK(nb_node_discard(node, 100000, 1));
    CHECK_INT(nb_node_block_status(node, NULL, 300001, 7, &extent, 1), 1);
    CHECK_INT(extent.offset, 300001);
    CHECK_INT(extent.length, 7);
    free(model);
    free(got);
    nb_node_unref(node);
    stop_server(server, SIGTERM);
}

/* Neighbours in one block: a read-modify-write without a lock would lose one's write. */
static void *write_own_sector(void *arg)
{
    struct worker *worker = arg;
    uint64_t offset = 8192 + (uint64_t)worker->number * 256;
    char data[256], got[256];

    for (int round = 1; round <= 50 && worker->result == 0; round++) {
        memset(data, round, sizeof data);
        worker->result = nb_node_pwrite(worker->node, data, sizeof data, offset, 0);
        if (!worker->result)
            worker->result = nb_node_pread(worker->node, got, sizeof got, offset);
        if (!worker->result && memcmp(data, got, sizeof got))
            worker->result = -EILSEQ;
    }
    return NULL;
}

static void unaligned_writers_of_one_block_lose_nothing(void)
{
    pid_t server = start_block_server();
    struct node *node = connect_node(1, 0);
    struct worker workers[WORKERS];

    run_workers(workers, node, write_own_sector);
    join_workers(workers, 0);
    nb_node_unref(node);
    stop_server(server, SIGTERM);
}

/* ---- errors ---- */

static void the_servers_errors_keep_their_number(void)
{
    pid_t server = start_server("--filter=error", "memory", "1M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%",
                                "error-pread=EIO", "error-pread-rate=100%", NULL);
    struct node *node = connect_node(1, 0);
    char buf[512] = { 0 };

    CHECK_INT(nb_node_pwrite(node, buf, sizeof buf, 0, 0), -ENOSPC);
    CHECK_INT(nb_node_pread(node, buf, sizeof buf, 0), -EIO);
    CHECK_OK(nb_node_flush(node));
    nb_node_unref(node);
    stop_server(server, SIGTERM);
}

static void expect_open_error(const char *uri, uint32_t connections, int error, const char *part)
{
    struct node *node;
    char *message;

    CHECK_INT(nb_nbd_open(uri, connections, 0, &node, &message), -error);
    CHECK(message);
    if (!strstr(message, part))
        check_failed(__FILE__, __LINE__, "'%s' does not say '%s'", message, part);
    nb_string_free(message);
}

static void opening_tells_why_it_failed(void)
{
    pid_t server;

    expect_open_error("nbd+unix:///?socket=missing.sock", 1, ENOENT, "No such file");
    expect_open_error(URI, 0, EINVAL, "0, not 1 to 16");
    expect_open_error(URI, 17, EINVAL, "17, not 1 to 16");
    expect_open_error("gopher://nowhere/", 1, EINVAL, "URI");
    server = start_server("--filter=exportname", "memory", "1M", "exportname-strict=true", "exportname=disk", NULL);
    expect_open_error("nbd+unix:///other?socket=" SOCKET, 1, ENOENT, "other");
    stop_server(server, SIGTERM);
    server = start_server("--filter=blocksize-policy", "memory", "1000000", "blocksize-minimum=4096",
                          "blocksize-preferred=4096", NULL);
    expect_open_error(URI, 1, EINVAL, "1000000 is no multiple of the server's minimum block size 4096");
    stop_server(server, SIGTERM);
}

static void a_server_that_dies_fails_what_is_in_flight(uint32_t connections)
{
    int before = thread_count();
    pid_t server = start_server("--filter=log", "--filter=delay", "-t16", "memory", "1M", "rdelay=60", "logfile=" LOG, NULL);
    struct node *node = connect_node(connections, 0);
    struct worker workers[WORKERS];
    struct nb_extent extent;
    char buf[512] = { 0 };

    run_workers(workers, node, read_one_block);
    while (count_in_log(" Read ") < WORKERS)
        usleep(1000);
    stop_server(server, SIGKILL);
    join_workers(workers, -ECONNRESET);
    CHECK_INT(nb_node_pread(node, buf, sizeof buf, 0), -ECONNRESET);
    CHECK_INT(nb_node_pwrite(node, buf, sizeof buf, 0, NB_REQ_FUA), -ECONNRESET);
    CHECK_INT(nb_node_flush(node), -ECONNRESET);
    CHECK_INT(nb_node_block_status(node, NULL, 0, 512, &extent, 1), -ECONNRESET);
    nb_node_unref(node);
    CHECK_INT(thread_count(), before);
    unlink(LOG);
}

static void a_dead_server_on_one_connection(void)
{
    a_server_that_dies_fails_what_is_in_flight(1);
}

static void a_dead_server_on_several_connections(void)
{
    a_server_that_dies_fails_what_is_in_flight(3);
}

/* Shut the first socket of this process: the server lives, one connection to it does not. */
static void cut_one_connection(void)
{
    int domain;
    socklen_t length = sizeof domain;

    for (int fd = 3; fd < 1024; fd++) {
        if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) == 0) {
            CHECK_INT(shutdown(fd, SHUT_RDWR), 0);
            return;
        }
    }
    CHECK(!"there is a connection");
}

static void requests_go_on_over_the_connections_that_are_left(void)
{
    pid_t server = start_server("memory", "1M", NULL);
    struct node *node = connect_node(3, 0);
    uint64_t begin = now_ms();
    char byte;

    cut_one_connection();
    while (nb_node_pread(node, &byte, 1, 0) != 0)
        CHECK(now_ms() - begin < 10000);
    for (int i = 0; i < 10; i++)
        CHECK_OK(nb_node_pwrite(node, "x", 1, 0, NB_REQ_FUA));
    nb_node_unref(node);
    stop_server(server, SIGTERM);
}

static void *write_until_it_fails(void *arg)
{
    struct worker *worker = arg;
    char *data = filled(0x99, 1 << 19);

    while (!worker->result)
        worker->result = nb_node_pwrite(worker->node, data, 1 << 19, (uint64_t)worker->number << 19, 0);
    free(data);
    return NULL;
}

static void a_server_that_dies_while_it_is_sent_to(void)
{
    pid_t server = start_server("--filter=log", "memory", "8M", "logfile=" LOG, NULL);
    struct node *node = connect_node(2, 0);
    struct worker workers[WORKERS];

    run_workers(workers, node, write_until_it_fails);
    while (count_in_log(" Write ") < 4 * WORKERS)
        usleep(1000);
    stop_server(server, SIGKILL);
    join_workers(workers, -ECONNRESET);
    nb_node_unref(node);
    unlink(LOG);
}

/* ---- a server that hangs ---- */

static void *flush_once(void *arg)
{
    struct worker *worker = arg;

    worker->result = nb_node_flush(worker->node);
    return NULL;
}

/* Wait until the process is stopped. */
static void stop_process(pid_t pid)
{
    int status;

    kill(pid, SIGSTOP);
    CHECK_INT(waitpid(pid, &status, WUNTRACED), pid);
    CHECK(WIFSTOPPED(status));
}

static int sockets_open(void)
{
    int count = 0, domain;
    socklen_t length = sizeof domain;

    for (int fd = 3; fd < 1024; fd++)
        count += getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) == 0;
    return count;
}

static void abort_fails_what_a_hanging_server_holds(uint32_t connections, void *(*request)(void *))
{
    int threads = thread_count(), sockets = sockets_open();
    pid_t server = start_server("memory", "8M", NULL);
    struct node *node = connect_node(connections, 0), *raw;
    struct worker workers[WORKERS];
    uint64_t begin;
    char byte;

    CHECK_OK(nb_raw_open(node, 0, 0, 0, &raw));
    stop_process(server);
    run_workers(workers, raw, request);
    usleep(20000);              /* most are in flight by then; the others must fail as well */
    begin = now_ms();
    nb_nbd_abort(raw);
    join_workers(workers, -ECONNRESET);
    CHECK_INT(nb_node_pread(raw, &byte, 1, 0), -ECONNRESET);
    CHECK_INT(nb_node_flush(node), -ECONNRESET);
    CHECK(now_ms() - begin < 5000);
    kill(server, SIGCONT);
    CHECK_INT(nb_node_pread(raw, &byte, 1, 0), -ECONNRESET);
    nb_nbd_abort(raw);
    nb_node_unref(raw);
    nb_node_unref(node);
    CHECK_INT(thread_count(), threads);
    CHECK_INT(sockets_open(), sockets);
    stop_server(server, SIGTERM);
}

static void abort_fails_what_waits_for_an_answer(void)
{
    abort_fails_what_a_hanging_server_holds(1, flush_once);
    abort_fails_what_a_hanging_server_holds(3, flush_once);
}

static void abort_fails_what_waits_to_be_sent(void)
{
    abort_fails_what_a_hanging_server_holds(1, write_until_it_fails);
    abort_fails_what_a_hanging_server_holds(3, write_until_it_fails);
}

static void abort_is_for_one_node(void)
{
    pid_t server = start_server("memory", "1M", NULL);
    struct node *given_up = connect_node(1, 0), *other = connect_node(1, 0);
    char byte;

    nb_nbd_abort(given_up);
    CHECK_INT(nb_node_pread(given_up, &byte, 1, 0), -ECONNRESET);
    CHECK_OK(nb_node_pread(other, &byte, 1, 0));
    nb_node_unref(given_up);
    nb_node_unref(other);
    stop_server(server, SIGTERM);
}

static void abort_leaves_other_drivers_alone(void)
{
    struct node *null, *raw;
    char byte;

    CHECK_OK(nb_null_open(1 << 20, 0, true, 0, &null));
    CHECK_OK(nb_raw_open(null, 0, 0, 0, &raw));
    nb_nbd_abort(raw);
    CHECK_OK(nb_node_pread(raw, &byte, 1, 0));
    nb_node_unref(raw);
    nb_node_unref(null);
}

int main(void)
{
    RUN(data_written_is_read_back);
    RUN(large_requests_are_split_at_the_default_limit);
    RUN(requests_keep_to_the_servers_maximum);
    RUN(many_requests_are_in_flight_on_one_connection);
    RUN(the_parts_of_one_request_are_in_flight_together);
    RUN(threads_share_one_connection);
    RUN(threads_share_several_connections);
    RUN(connections_are_as_many_as_the_server_allows);
    RUN(fua_is_emulated_by_a_flush);
    RUN(fua_goes_to_a_server_that_has_it);
    RUN(zero_says_whether_space_may_be_freed);
    RUN(zeroes_are_written_where_the_server_cannot_zero);
    RUN(fast_zero_is_the_servers_to_refuse);
    RUN(discard_reaches_the_server_only_with_unmap);
    RUN(block_status_tells_the_servers_holes);
    RUN(everything_is_data_without_block_status);
    RUN(a_server_that_tells_too_little_counts_as_data);
    RUN(a_read_only_server_makes_the_node_read_only);
    RUN(unaligned_requests_work_against_a_minimum_block_size);
    RUN(unaligned_writers_of_one_block_lose_nothing);
    RUN(the_servers_errors_keep_their_number);
    RUN(opening_tells_why_it_failed);
    RUN(a_dead_server_on_one_connection);
    RUN(a_dead_server_on_several_connections);
    RUN(requests_go_on_over_the_connections_that_are_left);
    RUN(a_server_that_dies_while_it_is_sent_to);
    RUN(abort_fails_what_waits_for_an_answer);
    RUN(abort_fails_what_waits_to_be_sent);
    RUN(abort_is_for_one_node);
    RUN(abort_leaves_other_drivers_alone);
    return EXIT_SUCCESS;
}
