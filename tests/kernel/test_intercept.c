/* Copy before write: the store, the states of a cluster, the end of keeping. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "events.h"
#include "intercept.h"
#include "memory_node.h"

enum { CLUSTER = 64 * 1024, CLUSTERS = 64, DISK = CLUSTERS * CLUSTER };

static uint64_t last_token = 100;

static struct memory_node *source;
static struct node *node;
static struct cbw *cbw;
static struct nb_cbw_options options;

static int memory_file(void)
{
    int fd = memfd_create("scratch", MFD_CLOEXEC);
    CHECK(fd >= 0);
    return fd;
}

/* A source of 0x11 everywhere, all of it wanted, behind a filter with these limits. */
static void set_up_disk(uint64_t size, uint64_t memory_limit, uint64_t scratch_limit, uint32_t on_full,
                        uint32_t wait_ms)
{
    struct bitmap *todo;
    source = memory_disk(size);
    memory_fill(source, 0x11, 0, size);
    CHECK_OK(nb_bitmap_new(size, CLUSTER, &todo));
    nb_bitmap_set(todo, 0, size);
    options = (struct nb_cbw_options) {
        .cluster_size = CLUSTER,
        .on_full = on_full,
        .memory_limit = memory_limit,
        .scratch_limit = scratch_limit,
        .scratch_fd = scratch_limit ? memory_file() : -1,
        .wait_ms = wait_ms,
        .token = ++last_token,
    };
    CHECK_OK(nb_cbw_open(&source->node, todo, &options, &node));
    cbw = cbw_of(node);
    CHECK(cbw != NULL && cbw_of(&source->node) == NULL);
}

static void set_up(uint64_t memory_limit, uint64_t scratch_limit, uint32_t on_full, uint32_t wait_ms)
{
    set_up_disk(DISK, memory_limit, scratch_limit, on_full, wait_ms);
}

static void tear_down(void)
{
    nb_node_unref(node);
    CHECK_INT(atomic_load(&source->node.refs), 1);
    nb_node_unref(&source->node);
    if (options.scratch_fd >= 0)
        close(options.scratch_fd);
}

static void guest_write(uint8_t byte, uint64_t offset, uint64_t count)
{
    uint8_t *data = malloc(count);
    memset(data, byte, count);
    CHECK_OK(nb_node_pwrite(node, data, count, offset, 0));
    free(data);
}

static uint64_t memory_used(void)
{
    uint64_t memory, scratch, waits, ns;
    nb_cbw_usage(node, &memory, &scratch, &waits, &ns);
    return memory;
}

static uint64_t scratch_used(void)
{
    uint64_t memory, scratch, waits, ns;
    nb_cbw_usage(node, &memory, &scratch, &waits, &ns);
    return scratch;
}

static uint64_t waits_seen(void)
{
    uint64_t memory, scratch, waits, ns;
    nb_cbw_usage(node, &memory, &scratch, &waits, &ns);
    return waits;
}

/* Take the next entry, which must be this area and all of this byte, as written. */
static void drain_one(uint64_t offset, uint64_t length, uint8_t byte)
{
    struct saved *saved = cbw_take(cbw);
    CHECK(saved != NULL);
    CHECK_INT(saved->offset, offset);
    CHECK_INT(saved->length, length);
    if (saved->place != SAVED_ZERO) {
        uint8_t *buffer = malloc(length);
        const void *data;
        CHECK_OK(cbw_saved_read(cbw, saved, 0, length, buffer, &data));
        CHECK_FILLED(data, byte, length);
        free(buffer);
    } else {
        CHECK_INT(byte, 0);
    }
    cbw_saved_written(cbw, saved);
}

static bool is_todo(uint64_t cluster)
{
    return nb_bitmap_test(cbw_todo(cbw), cluster * CLUSTER, 1);
}

/* Wait until a guest's thread sleeps, which nothing announces. */
static void await_waits(uint64_t count)
{
    while (waits_seen() < count)
        sched_yield();
}

struct writer {
    pthread_t thread;
    uint64_t offset, count;
    uint8_t byte;
    atomic_bool done;
};

static void *run_writer(void *arg)
{
    struct writer *writer = arg;
    guest_write(writer->byte, writer->offset, writer->count);
    atomic_store(&writer->done, true);
    return NULL;
}

static void start_writer(struct writer *writer, uint8_t byte, uint64_t offset, uint64_t count)
{
    *writer = (struct writer) { .offset = offset, .count = count, .byte = byte };
    CHECK_OK(pthread_create(&writer->thread, NULL, run_writer, writer));
}

static void join_writer(struct writer *writer)
{
    pthread_join(writer->thread, NULL);
    CHECK(atomic_load(&writer->done));
}

/* ---- saving ---- */

static void a_write_saves_the_clusters_it_touches_once(void)
{
    set_up(DISK, 0, 0, 0);
    guest_write(0x22, 2 * CLUSTER - 1, 2);
    CHECK_INT(source->read_bytes, 2 * CLUSTER);
    CHECK_INT(source->reads, 1);
    CHECK_INT(memory_used(), 2 * CLUSTER);
    CHECK(is_todo(0) && !is_todo(1) && !is_todo(2) && is_todo(3));
    guest_write(0x33, CLUSTER, 2 * CLUSTER);
    CHECK_INT(source->reads, 1);
    CHECK_INT(cbw_stored(cbw), 2 * CLUSTER);
    drain_one(CLUSTER, 2 * CLUSTER, 0x11);
    CHECK(cbw_take(cbw) == NULL);
    CHECK_INT(cbw_stored(cbw), 0);
    CHECK_INT(memory_used(), 0);
    CHECK_FILLED(source->data + CLUSTER, 0x33, 2 * CLUSTER);
    tear_down();
}

static void zeroes_and_discards_save_too(void)
{
    set_up(DISK, 0, 0, 0);
    CHECK_OK(nb_node_zero(node, 10, 5 * CLUSTER, 0));
    CHECK_OK(nb_node_discard(node, CLUSTER, 7 * CLUSTER));
    drain_one(5 * CLUSTER, CLUSTER, 0x11);
    drain_one(7 * CLUSTER, CLUSTER, 0x11);
    CHECK_FILLED(source->data + 5 * CLUSTER, 0, 10);
    CHECK_OK(nb_node_flush(node));
    CHECK_INT(source->flushes, 1);
    tear_down();
}

static void clusters_that_are_not_wanted_pass(void)
{
    set_up(DISK, 0, 0, 0);
    nb_bitmap_clear(cbw_todo(cbw), 0, DISK / 2);
    guest_write(0x22, 0, DISK / 2);
    CHECK_INT(source->reads, 0);
    CHECK_INT(memory_used(), 0);
    tear_down();
}

static void known_zeroes_take_a_mark_and_no_room(void)
{
    set_up(DISK, 0, 0, 0);
    memory_access(source, true, NULL, 8 * CLUSTER, 4 * CLUSTER);
    guest_write(0x22, 4 * CLUSTER, 2 * CLUSTER);
    guest_write(0x22, 6 * CLUSTER, 1);
    CHECK_INT(source->reads, 0);
    CHECK_INT(memory_used(), 0);
    CHECK_INT(cbw_stored(cbw), 3 * CLUSTER);
    drain_one(4 * CLUSTER, 3 * CLUSTER, 0);
    CHECK_INT(cbw_stored(cbw), 0);
    guest_write(0x22, 10 * CLUSTER, 4 * CLUSTER);      /* zeroes, then data */
    CHECK_INT(source->read_bytes, 2 * CLUSTER);
    drain_one(12 * CLUSTER, 2 * CLUSTER, 0x11);
    drain_one(10 * CLUSTER, 2 * CLUSTER, 0);
    tear_down();
}

static void a_cluster_that_is_partly_zero_is_kept_as_data(void)
{
    set_up(DISK, 0, 0, 0);
    memory_access(source, true, NULL, CLUSTER + MEMORY_BLOCK, 0);
    guest_write(0x22, CLUSTER, 1);
    struct saved *saved = cbw_take(cbw);
    const void *data;
    CHECK_OK(cbw_saved_read(cbw, saved, 0, CLUSTER, NULL, &data));
    CHECK_FILLED(data, 0, MEMORY_BLOCK);
    CHECK_FILLED((const char *)data + MEMORY_BLOCK, 0x11, CLUSTER - MEMORY_BLOCK);
    cbw_saved_written(cbw, saved);
    tear_down();
}

static void the_last_cluster_may_be_short(void)
{
    set_up_disk(2 * CLUSTER + 512, DISK, 0, 0, 0);
    guest_write(0x22, 2 * CLUSTER + 511, 1);
    CHECK_INT(memory_used(), CLUSTER);
    drain_one(2 * CLUSTER, 512, 0x11);
    CHECK_INT(memory_used(), 0);
    tear_down();
}

static void large_requests_are_saved_in_runs(void)
{
    set_up(DISK, 0, 0, 0);
    guest_write(0x22, 0, DISK);
    CHECK_INT(source->largest_read, 1 << 20);
    for (int i = 0; i < DISK >> 20; i++)
        drain_one((uint64_t)i << 20, 1 << 20, 0x11);
    CHECK_INT(memory_used(), 0);
    tear_down();
}

static void beyond_the_memory_the_scratch_file_is_used(void)
{
    set_up(2 * CLUSTER, DISK, 0, 0);
    guest_write(0x22, 0, 2 * CLUSTER);
    guest_write(0x22, 8 * CLUSTER, 3 * CLUSTER);
    CHECK_INT(memory_used(), 2 * CLUSTER);
    CHECK_INT(scratch_used(), 3 * CLUSTER);
    drain_one(0, 2 * CLUSTER, 0x11);
    guest_write(0x22, 20 * CLUSTER, 1);
    CHECK_INT(memory_used(), CLUSTER);
    drain_one(8 * CLUSTER, 3 * CLUSTER, 0x11);
    drain_one(20 * CLUSTER, CLUSTER, 0x11);
    CHECK_INT(scratch_used(), 0);
    struct stat st;
    CHECK_OK(fstat(options.scratch_fd, &st));
    CHECK_INT(st.st_blocks, 0);      /* what was drained takes no space any more */
    tear_down();
}

static void an_entry_that_was_not_written_stays_first(void)
{
    set_up(DISK, 0, 0, 0);
    memory_access(source, true, NULL, CLUSTER, 9 * CLUSTER);
    guest_write(0x22, 0, 1);
    guest_write(0x22, 2 * CLUSTER, 1);
    guest_write(0x22, 9 * CLUSTER, 1);
    struct saved *first = cbw_take(cbw), *second = cbw_take(cbw), *zero = cbw_take(cbw);
    CHECK_INT(zero->place, SAVED_ZERO);
    CHECK_INT(cbw_stored(cbw), 3 * CLUSTER);
    cbw_saved_keep(cbw, zero);
    cbw_saved_keep(cbw, second);
    cbw_saved_keep(cbw, first);
    CHECK_INT(cbw_stored(cbw), 3 * CLUSTER);
    drain_one(0, CLUSTER, 0x11);
    drain_one(2 * CLUSTER, CLUSTER, 0x11);
    drain_one(9 * CLUSTER, CLUSTER, 0);
    tear_down();
}

static void a_finer_todo_is_widened_to_clusters(void)
{
    struct bitmap *todo;
    source = memory_disk(DISK);
    memory_fill(source, 0x11, 0, DISK);
    CHECK_OK(nb_bitmap_new(DISK, 4096, &todo));
    nb_bitmap_set(todo, 3 * CLUSTER + 8192, 1);
    options = (struct nb_cbw_options) { .cluster_size = CLUSTER, .memory_limit = DISK, .scratch_fd = -1, .token = 1 };
    CHECK_OK(nb_cbw_open(&source->node, todo, &options, &node));
    cbw = cbw_of(node);
    CHECK_INT(nb_bitmap_dirty_bytes(cbw_todo(cbw)), CLUSTER);
    guest_write(0x22, 2 * CLUSTER, 2 * CLUSTER);
    drain_one(3 * CLUSTER, CLUSTER, 0x11);
    tear_down();
}

static void wrong_options_are_refused(void)
{
    struct memory_node *disk = memory_disk(DISK);
    struct bitmap *todo, *other;
    struct node *out = NULL;
    CHECK_OK(nb_bitmap_new(DISK, CLUSTER, &todo));
    CHECK_OK(nb_bitmap_new(DISK - 512, CLUSTER, &other));
    struct nb_cbw_options good = { .cluster_size = CLUSTER, .memory_limit = DISK, .scratch_fd = -1 }, wrong = good;
    CHECK_INT(nb_cbw_open(&disk->node, other, &good, &out), -EINVAL);
    wrong.cluster_size = 2048;
    CHECK_INT(nb_cbw_open(&disk->node, todo, &wrong, &out), -EINVAL);
    wrong.cluster_size = 3 * 4096;
    CHECK_INT(nb_cbw_open(&disk->node, todo, &wrong, &out), -EINVAL);
    wrong.cluster_size = 128 << 20;
    CHECK_INT(nb_cbw_open(&disk->node, todo, &wrong, &out), -EINVAL);
    wrong = good;
    wrong.on_full = 2;
    CHECK_INT(nb_cbw_open(&disk->node, todo, &wrong, &out), -EINVAL);
    CHECK(out == NULL);
    nb_bitmap_free(todo);
    nb_bitmap_free(other);
    nb_node_unref(&disk->node);
}

/* ---- the store is full ---- */

static void a_guest_waits_for_room_and_goes_on(void)
{
    struct writer writer;
    set_up(2 * CLUSTER, 0, 0, 0);
    guest_write(0x22, 0, 2 * CLUSTER);
    start_writer(&writer, 0x33, 2 * CLUSTER, 3 * CLUSTER);
    struct nb_event full = wait_event(NB_EVENT_CBW_FULL, options.token);
    CHECK_INT(full.a, 2 * CLUSTER);
    await_waits(1);
    CHECK(!atomic_load(&writer.done));
    CHECK(cbw_urgent(cbw));
    drain_one(0, 2 * CLUSTER, 0x11);      /* room for two of the three */
    wait_event(NB_EVENT_CBW_FULL, options.token);      /* full again */
    CHECK(!atomic_load(&writer.done));
    CHECK_FILLED(source->data + 2 * CLUSTER, 0x11, 3 * CLUSTER);
    drain_one(2 * CLUSTER, 2 * CLUSTER, 0x11);
    join_writer(&writer);
    drain_one(4 * CLUSTER, CLUSTER, 0x11);
    CHECK_INT(waits_seen(), 1);
    CHECK_INT(cbw_error(cbw), 0);
    tear_down();
}

static void zeroes_pass_a_full_store(void)
{
    set_up(CLUSTER, 0, 0, 0);
    memory_access(source, true, NULL, CLUSTER, 5 * CLUSTER);
    guest_write(0x22, 0, 1);
    guest_write(0x22, 5 * CLUSTER, 1);
    CHECK_INT(waits_seen(), 0);
    tear_down();
}

static void full_breaks_the_point_in_time_where_that_is_the_policy(void)
{
    set_up(2 * CLUSTER, 0, 1, 0);
    guest_write(0x22, 0, 2 * CLUSTER);
    guest_write(0x33, 2 * CLUSTER, 3 * CLUSTER);
    CHECK_INT(wait_event(NB_EVENT_CBW_BROKEN, options.token).error, -ENOSPC);
    CHECK_INT(cbw_error(cbw), -ENOSPC);
    CHECK_FILLED(source->data + 2 * CLUSTER, 0x33, 3 * CLUSTER);
    CHECK_INT(memory_used(), 0);
    CHECK(cbw_take(cbw) == NULL);
    guest_write(0x44, 0, DISK);
    CHECK(!event_came(NB_EVENT_CBW_BROKEN, options.token));
    tear_down();
}

static void a_guest_waits_no_longer_than_told(void)
{
    set_up(CLUSTER, 0, 0, 20);
    guest_write(0x22, 0, 1);
    guest_write(0x33, CLUSTER, 1);
    CHECK_INT(wait_event(NB_EVENT_CBW_BROKEN, options.token).error, -ETIMEDOUT);
    CHECK_INT(source->data[CLUSTER], 0x33);
    tear_down();
}

static void a_store_that_never_has_room_breaks_instead_of_hanging(void)
{
    set_up(0, 0, 0, 0);
    guest_write(0x22, 0, 1);
    CHECK_INT(wait_event(NB_EVENT_CBW_BROKEN, options.token).error, -ENOSPC);
    tear_down();
}

/* The file may grow to 4 clusters: what a full filesystem does. */
static void a_full_scratch_filesystem_counts_as_a_full_store(void)
{
    struct rlimit before, limit;
    struct writer first, second;
    CHECK_OK(getrlimit(RLIMIT_FSIZE, &before));
    signal(SIGXFSZ, SIG_IGN);
    set_up(CLUSTER, DISK, 0, 0);
    limit = before;
    limit.rlim_cur = 4 * CLUSTER;
    CHECK_OK(setrlimit(RLIMIT_FSIZE, &limit));
    guest_write(0x22, 0, 5 * CLUSTER);
    start_writer(&first, 0x33, 10 * CLUSTER, 1);
    start_writer(&second, 0x44, 12 * CLUSTER, 1);
    wait_event(NB_EVENT_CBW_FULL, options.token);
    await_waits(2);
    uint64_t reads = source->reads;
    CHECK(!atomic_load(&first.done) && !atomic_load(&second.done));
    drain_one(0, CLUSTER, 0x11);
    drain_one(CLUSTER, 4 * CLUSTER, 0x11);
    join_writer(&first);
    join_writer(&second);
    CHECK(source->reads <= reads + 4);      /* the two did not wake one another in a circle */
    CHECK_INT(cbw_error(cbw), 0);
    CHECK_OK(setrlimit(RLIMIT_FSIZE, &before));
    signal(SIGXFSZ, SIG_DFL);
    tear_down();
}

/* ---- failures ---- */

static int fail_reads(struct memory_node *disk, enum memory_request request, uint64_t offset, uint64_t count)
{
    (void)disk, (void)offset, (void)count;
    return request == MEMORY_READ ? -EIO : 0;
}

static void a_source_that_cannot_be_read_breaks_the_backup_not_the_guest(void)
{
    set_up(DISK, 0, 0, 0);
    source->hook = fail_reads;
    guest_write(0x22, CLUSTER, 10);
    CHECK_INT(wait_event(NB_EVENT_CBW_BROKEN, options.token).error, -EIO);
    CHECK_FILLED(source->data + CLUSTER, 0x22, 10);
    uint64_t start, length;
    CHECK_INT(cbw_still_old(cbw, 0, DISK, &start, &length), -EIO);
    CHECK_INT(memory_used(), 0);
    tear_down();
}

static void a_scratch_file_that_cannot_be_written_breaks_it_too(void)
{
    set_up(0, DISK, 0, 0);
    int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0 && dup2(fd, options.scratch_fd) == options.scratch_fd);
    close(fd);
    guest_write(0x22, 0, 10);
    CHECK_INT(wait_event(NB_EVENT_CBW_BROKEN, options.token).error, -EBADF);
    CHECK_INT(scratch_used(), 0);
    tear_down();
}

static void release_lets_everything_pass_and_frees_the_store(void)
{
    struct writer writer;
    set_up(2 * CLUSTER, 0, 0, 0);
    guest_write(0x22, 0, 2 * CLUSTER);
    struct saved *taken = cbw_take(cbw);
    start_writer(&writer, 0x33, 2 * CLUSTER, CLUSTER);
    wait_event(NB_EVENT_CBW_FULL, options.token);
    nb_cbw_release(node);
    join_writer(&writer);
    CHECK_INT(cbw_error(cbw), -ECANCELED);
    cbw_saved_keep(cbw, taken);
    CHECK_INT(memory_used(), 0);
    CHECK_INT(cbw_stored(cbw), 0);
    nb_cbw_release(node);
    nb_cbw_release(&source->node);      /* another kind of node: nothing */
    CHECK(!event_came(NB_EVENT_CBW_BROKEN, options.token));
    tear_down();
}

/* ---- races, by construction ---- */

static struct gate gate;
static uint64_t gate_offset;

static int stop_read_done(struct memory_node *disk, enum memory_request request, uint64_t offset, uint64_t count)
{
    (void)disk, (void)count;
    if (request == MEMORY_READ_DONE && offset == gate_offset)
        gate_pass(&gate);
    return 0;
}

static void close_gate(uint64_t offset)
{
    gate = (struct gate) GATE_INIT;
    gate_offset = offset;
    source->hook = stop_read_done;
}

static void a_second_guest_waits_for_the_save_and_does_not_repeat_it(void)
{
    struct writer first, second;
    set_up(DISK, 0, 0, 0);
    close_gate(4 * CLUSTER);
    start_writer(&first, 0x22, 4 * CLUSTER, 2 * CLUSTER);
    gate_await(&gate, 1);
    start_writer(&second, 0x33, 5 * CLUSTER, 2 * CLUSTER);
    await_waits(1);
    guest_write(0x44, 20 * CLUSTER, 1);      /* elsewhere: passes */
    CHECK(!atomic_load(&second.done));
    CHECK_FILLED(source->data + 4 * CLUSTER, 0x11, 3 * CLUSTER);
    gate_open(&gate);
    join_writer(&first);
    join_writer(&second);
    CHECK_INT(source->read_bytes, 4 * CLUSTER);
    drain_one(20 * CLUSTER, CLUSTER, 0x11);
    drain_one(4 * CLUSTER, 2 * CLUSTER, 0x11);
    drain_one(6 * CLUSTER, CLUSTER, 0x11);
    tear_down();
}

static void a_guest_does_not_wait_for_the_copy_engine_which_drops_what_it_read(void)
{
    uint8_t old[CLUSTER];
    uint64_t start, length;
    set_up(DISK, 0, 0, 0);
    CHECK_OK(node_pread(node, old, CLUSTER, 3 * CLUSTER));      /* the copy engine: read and not yet written */
    guest_write(0x22, 3 * CLUSTER, 1);
    CHECK_INT(waits_seen(), 0);
    CHECK_INT(cbw_still_old(cbw, 3 * CLUSTER, CLUSTER, &start, &length), 0);
    CHECK_INT(cbw_still_old(cbw, 2 * CLUSTER, 3 * CLUSTER, &start, &length), 1);
    CHECK_INT(start, 2 * CLUSTER);
    CHECK_INT(length, CLUSTER);
    drain_one(3 * CLUSTER, CLUSTER, 0x11);
    tear_down();
}

static void a_save_that_the_copy_engine_overtook_keeps_nothing(void)
{
    struct writer writer;
    set_up(DISK, 0, 0, 0);
    close_gate(4 * CLUSTER);
    start_writer(&writer, 0x22, 4 * CLUSTER, 3 * CLUSTER);
    gate_await(&gate, 1);
    cbw_copied(cbw, 5 * CLUSTER, CLUSTER);
    guest_write(0x33, 5 * CLUSTER, CLUSTER);      /* DONE: passes while the save still runs */
    gate_open(&gate);
    join_writer(&writer);
    CHECK_INT(memory_used(), 2 * CLUSTER);
    drain_one(4 * CLUSTER, CLUSTER, 0x11);
    drain_one(6 * CLUSTER, CLUSTER, 0x11);
    CHECK_INT(memory_used(), 0);
    tear_down();
}

static void release_during_a_save_keeps_nothing(void)
{
    struct writer writer;
    set_up(DISK, 0, 0, 0);
    close_gate(0);
    start_writer(&writer, 0x22, 0, 1);
    gate_await(&gate, 1);
    nb_cbw_release(node);
    gate_open(&gate);
    join_writer(&writer);
    CHECK_INT(memory_used(), 0);
    CHECK(cbw_take(cbw) == NULL);
    tear_down();
}

static void the_first_entry_is_announced_unless_a_slice_is_there(void)
{
    set_up(DISK, 0, 0, 0);
    guest_write(0x22, 0, 1);
    wait_event(NB_EVENT_CBW_STORED, options.token);
    guest_write(0x22, CLUSTER, 1);
    CHECK(!event_came(NB_EVENT_CBW_STORED, options.token));
    cbw_attach(cbw);
    drain_one(0, CLUSTER, 0x11);
    drain_one(CLUSTER, CLUSTER, 0x11);
    guest_write(0x22, 2 * CLUSTER, 1);
    CHECK(!event_came(NB_EVENT_CBW_STORED, options.token));
    cbw_detach(cbw);      /* and it did not drain that: said now */
    wait_event(NB_EVENT_CBW_STORED, options.token);
    cbw_attach(cbw);
    drain_one(2 * CLUSTER, CLUSTER, 0x11);
    cbw_detach(cbw);
    CHECK(!event_came(NB_EVENT_CBW_STORED, options.token));
    guest_write(0x22, 3 * CLUSTER, 1);
    wait_event(NB_EVENT_CBW_STORED, options.token);
    tear_down();
}

int main(void)
{
    RUN(a_write_saves_the_clusters_it_touches_once);
    RUN(zeroes_and_discards_save_too);
    RUN(clusters_that_are_not_wanted_pass);
    RUN(known_zeroes_take_a_mark_and_no_room);
    RUN(a_cluster_that_is_partly_zero_is_kept_as_data);
    RUN(the_last_cluster_may_be_short);
    RUN(large_requests_are_saved_in_runs);
    RUN(beyond_the_memory_the_scratch_file_is_used);
    RUN(an_entry_that_was_not_written_stays_first);
    RUN(a_finer_todo_is_widened_to_clusters);
    RUN(wrong_options_are_refused);
    RUN(a_guest_waits_for_room_and_goes_on);
    RUN(zeroes_pass_a_full_store);
    RUN(full_breaks_the_point_in_time_where_that_is_the_policy);
    RUN(a_guest_waits_no_longer_than_told);
    RUN(a_store_that_never_has_room_breaks_instead_of_hanging);
    RUN(a_full_scratch_filesystem_counts_as_a_full_store);
    RUN(a_source_that_cannot_be_read_breaks_the_backup_not_the_guest);
    RUN(a_scratch_file_that_cannot_be_written_breaks_it_too);
    RUN(release_lets_everything_pass_and_frees_the_store);
    RUN(a_second_guest_waits_for_the_save_and_does_not_repeat_it);
    RUN(a_guest_does_not_wait_for_the_copy_engine_which_drops_what_it_read);
    RUN(a_save_that_the_copy_engine_overtook_keeps_nothing);
    RUN(release_during_a_save_keeps_nothing);
    RUN(the_first_entry_is_announced_unless_a_slice_is_there);
    return 0;
}
