/* The file driver: short and unaligned requests, direct I/O's read-modify-write, holes, flushes that fail.
 *
 * The calls to the system that a test must stop or fail are defined here, before the C library's.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "events.h"
#include "node.h"

static atomic_int fdatasync_error;
static struct gate before_write = GATE_INIT;
static atomic_bool stop_next_write;
static atomic_size_t longest_transfer = SIZE_MAX;

int fdatasync(int fd)
{
    int error = atomic_exchange(&fdatasync_error, 0);
    if (error) {
        errno = error;
        return -1;
    }
    return (int)syscall(SYS_fdatasync, fd);
}

/* Without O_DIRECT, so that the locks around direct I/O are tested on every filesystem. */
int open(const char *path, int flags, ...)
{
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags & ~O_DIRECT, 0600);
}

ssize_t pwrite(int fd, const void *buf, size_t count, off_t offset)
{
    if (atomic_exchange(&stop_next_write, false))
        gate_pass(&before_write);
    if (count > atomic_load(&longest_transfer))
        count = atomic_load(&longest_transfer);
    return syscall(SYS_pwrite64, fd, buf, count, offset);
}

ssize_t pread(int fd, void *buf, size_t count, off_t offset)
{
    if (count > atomic_load(&longest_transfer))
        count = atomic_load(&longest_transfer);
    return syscall(SYS_pread64, fd, buf, count, offset);
}

enum { SIZE = 65536 };

static struct node *open_file(const char *name, uint8_t byte, uint32_t flags)
{
    uint8_t bytes[SIZE];
    struct node *node;
    memset(bytes, byte, SIZE);
    int fd = open(name, O_CREAT | O_TRUNC | O_WRONLY);
    CHECK(fd >= 0);
    CHECK_INT(write(fd, bytes, SIZE), SIZE);
    close(fd);
    CHECK_OK(nb_file_open(name, flags, &node));
    return node;
}

static void check_reads(struct node *node, uint8_t byte, size_t count, uint64_t offset)
{
    uint8_t buf[SIZE];
    CHECK_OK(nb_node_pread(node, buf, count, offset));
    CHECK_FILLED(buf, byte, count);
}

static void only_files_and_disks_are_opened(void)
{
    struct node *node;
    CHECK_INT(nb_file_open("/nowhere/at/all", 0, &node), -ENOENT);
    CHECK_INT(nb_file_open(".", NB_NODE_READ_ONLY, &node), -EISDIR);
    CHECK_INT(mkfifo("pipe", 0600), 0);
    CHECK_INT(nb_file_open("pipe", NB_NODE_READ_ONLY, &node), -EINVAL);
    CHECK_INT(nb_file_open("/dev/zero", NB_NODE_READ_ONLY, &node), -EINVAL);
}

static void short_transfers_are_continued(void)
{
    struct node *node = open_file("short", 0x11, 0);
    uint8_t buf[5000];
    atomic_store(&longest_transfer, 700);
    memset(buf, 0x22, sizeof buf);
    CHECK_OK(nb_node_pwrite(node, buf, sizeof buf, 300, 0));
    check_reads(node, 0x11, 300, 0);
    check_reads(node, 0x22, sizeof buf, 300);
    check_reads(node, 0x11, 1000, 5300);
    atomic_store(&longest_transfer, SIZE_MAX);
    nb_node_unref(node);
}

static void beyond_the_end_are_zeroes(void)
{
    struct node *node = open_file("end", 0x11, 0);
    uint8_t buf[1024];
    CHECK_OK(node_pread(node, buf, 1024, SIZE - 512));
    CHECK_FILLED(buf, 0x11, 512);
    CHECK_FILLED(buf + 512, 0, 512);
    uint64_t size;
    CHECK_OK(node_pwrite(node, buf, 512, SIZE + 512, 0));
    CHECK_OK(file_current_size(node, &size));
    CHECK_INT(size, SIZE + 1024);
    nb_node_unref(node);
}

/* The kernel forgets which pages it could not write: a later fdatasync would succeed without them. */
static void a_failed_flush_stays_failed(void)
{
    struct node *node = open_file("flush", 0x11, 0);
    CHECK_OK(nb_node_flush(node));
    atomic_store(&fdatasync_error, EIO);
    CHECK_INT(nb_node_flush(node), -EIO);
    CHECK_INT(nb_node_flush(node), -EIO);
    CHECK_INT(nb_node_pwrite(node, "x", 1, 0, NB_REQ_FUA), -EIO);
    nb_node_unref(node);
}

static void zeroes_and_holes_stay_in_their_range(void)
{
    for (uint32_t direct = 0; direct <= NB_NODE_DIRECT; direct += NB_NODE_DIRECT) {
        struct node *node = open_file("zero", 0x11, NB_NODE_UNMAP | direct);
        CHECK_OK(nb_node_zero(node, 8192, 4096, 0));
        CHECK_OK(nb_node_zero(node, 1000, 20000, NB_REQ_MAY_UNMAP));
        CHECK_OK(nb_node_discard(node, 4096, 32768));
        check_reads(node, 0x11, 4096, 0);
        check_reads(node, 0, 8192, 4096);
        check_reads(node, 0x11, 20000 - 12288, 12288);
        check_reads(node, 0, 1000, 20000);
        check_reads(node, 0x11, 32768 - 21000, 21000);
        check_reads(node, 0x11, 4096, 36864);
        nb_node_unref(node);
    }
}

static void unaligned_direct_requests_keep_their_neighbours(void)
{
    struct node *node = open_file("direct", 0x11, NB_NODE_DIRECT);
    uint8_t buf[9000];
    memset(buf, 0x22, sizeof buf);
    CHECK_OK(nb_node_pwrite(node, buf, sizeof buf, 4095, 0));
    check_reads(node, 0x11, 4095, 0);
    check_reads(node, 0x22, 9000, 4095);
    check_reads(node, 0x11, 1000, 13095);
    nb_node_unref(node);
}

/* ---- read-modify-write against what happens in the same block meanwhile ---- */

enum other { OTHER_WRITE, OTHER_ZERO, OTHER_DISCARD };

struct racer {
    struct node *node;
    enum other other;
    pthread_t thread;
    atomic_bool ended;
};

static void *write_one_sector(void *node)
{
    uint8_t buf[512];
    memset(buf, 0x22, sizeof buf);
    CHECK_OK(nb_node_pwrite(node, buf, sizeof buf, 4096 + 1024, 0));
    return NULL;
}

static void *change_the_block(void *arg)
{
    static _Alignas(4096) const uint8_t zeroes[4096];
    struct racer *racer = arg;
    if (racer->other == OTHER_WRITE)
        CHECK_OK(nb_node_pwrite(racer->node, zeroes, 4096, 4096, 0));
    else if (racer->other == OTHER_ZERO)
        CHECK_OK(nb_node_zero(racer->node, 4096, 4096, 0));
    else
        CHECK_OK(nb_node_discard(racer->node, 4096, 4096));
    atomic_store(&racer->ended, true);
    return NULL;
}

static void a_read_modify_write_undoes_nothing_around_it(void)
{
    for (enum other other = OTHER_WRITE; other <= OTHER_DISCARD; other++) {
        struct node *node = open_file("race", 0x11, NB_NODE_DIRECT | NB_NODE_UNMAP);
        struct racer racer = { .node = node, .other = other };
        pthread_t writer;
        before_write = (struct gate) GATE_INIT;
        atomic_store(&stop_next_write, true);
        CHECK_OK(pthread_create(&writer, NULL, write_one_sector, node));
        gate_await(&before_write, 1);      /* it has read the block */
        CHECK_OK(pthread_create(&racer.thread, NULL, change_the_block, &racer));
        nanosleep(&(struct timespec) { .tv_nsec = 20000000 }, NULL);      /* no event tells that it waits */
        gate_open(&before_write);
        CHECK_OK(pthread_join(writer, NULL));
        CHECK_OK(pthread_join(racer.thread, NULL));
        check_reads(node, 0, 1024, 4096);
        check_reads(node, 0, 4096 - 1536, 4096 + 1536);
        nb_node_unref(node);
    }
}

static void holes_read_as_known_zeroes(void)
{
    struct node *node;
    struct nb_extent extents[4];
    int fd = open("sparse", O_CREAT | O_TRUNC | O_RDWR);
    CHECK_INT(ftruncate(fd, 1 << 20), 0);
    CHECK_INT(pwrite(fd, "x", 1, 1 << 19), 1);
    close(fd);
    CHECK_OK(nb_file_open("sparse", NB_NODE_READ_ONLY, &node));
    CHECK_INT(nb_node_block_status(node, NULL, 0, 1 << 20, extents, 4), 3);
    CHECK_INT(extents[0].flags & (NB_EXTENT_ZERO | NB_EXTENT_HOLE), NB_EXTENT_ZERO | NB_EXTENT_HOLE);
    CHECK_INT(extents[0].length, 1 << 19);
    CHECK(extents[1].flags & NB_EXTENT_DATA);
    CHECK(nb_node_allocated(node) < 1 << 19);
    nb_node_unref(node);
}

int main(void)
{
    RUN(only_files_and_disks_are_opened);
    RUN(short_transfers_are_continued);
    RUN(beyond_the_end_are_zeroes);
    RUN(a_failed_flush_stays_failed);
    RUN(zeroes_and_holes_stay_in_their_range);
    RUN(unaligned_direct_requests_keep_their_neighbours);
    RUN(a_read_modify_write_undoes_nothing_around_it);
    RUN(holes_read_as_known_zeroes);
    return 0;
}
