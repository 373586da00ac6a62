/* The copy engine: what is copied, what is not, failures, and the point in time under load. */
#define _GNU_SOURCE
#include <sched.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "events.h"
#include "memory_node.h"

enum { GRANULE = 64 * 1024, DISK = 64 * GRANULE, LONG = 1000000 };

static uint64_t last_token = 1000;
static struct memory_node *source, *target;
static struct bitmap *todo;
static struct copier *copier;

static struct nb_copier_options plain_options(void)
{
    return (struct nb_copier_options) { .max_workers = 2, .chunk = 256 * 1024 };
}

static struct bitmap *new_bitmap(uint64_t size, bool dirty)
{
    struct bitmap *bitmap;
    CHECK_OK(nb_bitmap_new(size, GRANULE, &bitmap));
    if (dirty)
        nb_bitmap_set(bitmap, 0, size);
    return bitmap;
}

/* A source of 0x11, a target of 0xee, nothing dirty. */
static void set_up(struct nb_copier_options options)
{
    source = memory_disk(DISK);
    target = memory_disk(DISK);
    memory_fill(source, 0x11, 0, DISK);
    if (!options.target_is_zero)
        memory_fill(target, 0xee, 0, DISK);
    todo = new_bitmap(DISK, false);
    CHECK_OK(nb_copier_new(&source->node, &target->node, todo, NULL, &options, &copier));
}

/* Nodes are closed by the last task's reference, which may be a moment after the slice's event. */
static void await_last_reference(struct node *node)
{
    while (atomic_load(&node->refs) > 1)
        sched_yield();
}

static void tear_down(void)
{
    CHECK_OK(nb_copier_free(copier));
    await_last_reference(&source->node);
    await_last_reference(&target->node);
    nb_bitmap_free(todo);
    nb_node_unref(&source->node);
    nb_node_unref(&target->node);
}

static uint64_t start_slice(uint64_t max_bytes)
{
    CHECK_OK(nb_copier_slice(copier, max_bytes, LONG, false, ++last_token));
    return last_token;
}

static struct nb_event copy_slice(uint64_t max_bytes)
{
    return wait_event(NB_EVENT_SLICE, start_slice(max_bytes));
}

/* ---- what is copied ---- */

static void only_what_is_dirty_is_copied(void)
{
    set_up(plain_options());
    nb_bitmap_set(todo, 3 * GRANULE, 2 * GRANULE);
    nb_bitmap_set(todo, 40 * GRANULE, 1);
    CHECK_INT(nb_copier_remaining(copier), 3 * GRANULE);
    struct nb_event event = copy_slice(UINT64_MAX);
    CHECK_INT(event.error, 0);
    CHECK_INT(event.a, 3 * GRANULE);
    CHECK_INT(event.b, 3 * GRANULE);
    CHECK_INT(nb_copier_remaining(copier), 0);
    CHECK_INT(source->reads, 2);      /* neighbours in one */
    CHECK_INT(target->written_bytes, 3 * GRANULE);
    CHECK_FILLED(target->data, 0xee, 3 * GRANULE);
    CHECK_FILLED(target->data + 3 * GRANULE, 0x11, 2 * GRANULE);
    CHECK_FILLED(target->data + 5 * GRANULE, 0xee, 35 * GRANULE);
    CHECK_FILLED(target->data + 40 * GRANULE, 0x11, GRANULE);
    tear_down();
}

static void nothing_dirty_ends_at_once(void)
{
    set_up(plain_options());
    struct nb_event event = copy_slice(UINT64_MAX);
    CHECK_INT(event.error, 0);
    CHECK_INT(event.a, 0);
    tear_down();
}

static void zeroes_are_never_read(void)
{
    set_up(plain_options());
    memory_access(source, true, NULL, 32 * GRANULE, 8 * GRANULE);
    nb_bitmap_set(todo, 0, DISK);
    CHECK_INT(copy_slice(UINT64_MAX).a, DISK);
    CHECK_INT(source->read_bytes, DISK - 32 * GRANULE);
    CHECK_INT(target->zeroed_bytes, 32 * GRANULE);
    CHECK_BYTES(target->data, source->data, DISK);
    tear_down();
}

static void zeroes_within_a_granule_are_found(void)
{
    set_up(plain_options());
    memory_access(source, true, NULL, 4 * MEMORY_BLOCK, 5 * GRANULE + MEMORY_BLOCK);
    nb_bitmap_set(todo, 0, DISK);
    CHECK_INT(copy_slice(UINT64_MAX).a, DISK);
    CHECK_INT(source->read_bytes, DISK - 4 * MEMORY_BLOCK);
    CHECK_BYTES(target->data, source->data, DISK);
    tear_down();
}

static void a_zero_target_is_not_written_with_zeroes(void)
{
    struct nb_copier_options options = plain_options();
    options.target_is_zero = true;
    set_up(options);
    memory_access(source, true, NULL, 32 * GRANULE, 0);
    nb_bitmap_set(todo, 0, DISK);
    CHECK_INT(copy_slice(UINT64_MAX).a, DISK);
    CHECK_INT(target->zeroes, 0);
    CHECK_BYTES(target->data, source->data, DISK);
    /* What has been written is no longer zero by itself. */
    memory_access(source, true, NULL, 8 * GRANULE, 32 * GRANULE);
    nb_bitmap_set(todo, 0, DISK);
    CHECK_INT(copy_slice(UINT64_MAX).a, DISK);
    CHECK_INT(target->zeroed_bytes, 8 * GRANULE);
    CHECK_BYTES(target->data, source->data, DISK);
    tear_down();
}

static void data_that_is_zero_is_written_as_zeroes_if_asked(void)
{
    struct nb_copier_options options = plain_options();
    options.detect_zeroes = true;
    set_up(options);
    memory_fill(source, 0, 6 * GRANULE, 5 * GRANULE);
    source->data[8 * GRANULE + 12345] = 1;
    source->data[10 * GRANULE - 1] = 1;
    nb_bitmap_set(todo, 0, DISK);
    CHECK_INT(copy_slice(UINT64_MAX).a, DISK);
    CHECK_INT(target->zeroed_bytes, 3 * GRANULE);
    CHECK_BYTES(target->data, source->data, DISK);
    tear_down();
}

static void a_huge_hole_takes_few_steps_and_no_budget(void)
{
    struct nb_copier_options options = { .max_workers = 1, .chunk = 1 << 20 };
    uint64_t size = UINT64_C(64) << 30;
    struct node *hole, *disk;
    CHECK_OK(nb_null_open(size, 0, true, 0, &hole));
    CHECK_OK(nb_null_open(size, 100000, true, 0, &disk));      /* 65536 steps of 0.1 ms would take 6 s */
    struct bitmap *all = new_bitmap(size, true);
    CHECK_OK(nb_copier_new(hole, disk, all, NULL, &options, &copier));
    CHECK_OK(nb_copier_slice(copier, 1 << 20, 1000, false, ++last_token));
    struct nb_event event = wait_event(NB_EVENT_SLICE, last_token);
    CHECK_INT(event.a, size);
    CHECK_INT(event.b, 0);
    CHECK_OK(nb_copier_free(copier));
    await_last_reference(hole);
    await_last_reference(disk);
    nb_bitmap_free(all);
    nb_node_unref(hole);
    nb_node_unref(disk);
}

static void data_after_a_large_hole_is_shared_between_workers(void)
{
    struct nb_copier_options options = plain_options();
    options.chunk = GRANULE;
    options.max_workers = 1;
    set_up(options);
    memory_access(source, true, NULL, 20 * GRANULE, 0);      /* strides of 1, 4, 16: the third meets data */
    nb_bitmap_set(todo, 0, DISK);
    CHECK_INT(copy_slice(UINT64_MAX).a, DISK);
    CHECK_INT(source->largest_read, GRANULE);
    CHECK_BYTES(target->data, source->data, DISK);
    tear_down();
}

/* ---- limits ---- */

static void a_slice_copies_no_more_than_asked(void)
{
    struct nb_copier_options options = plain_options();
    options.max_workers = 1;
    set_up(options);
    nb_bitmap_set(todo, 0, DISK);
    struct nb_event event = copy_slice(3 * GRANULE);
    CHECK_INT(event.a, 3 * GRANULE);
    CHECK_INT(nb_copier_remaining(copier), DISK - 3 * GRANULE);
    CHECK_INT(copy_slice(0).a, 0);
    for (uint64_t left = DISK - 3 * GRANULE; left;) {
        event = copy_slice(8 * GRANULE);
        CHECK(event.a > 0 && event.a <= 8 * GRANULE);
        left -= event.a;
        CHECK_INT(nb_copier_remaining(copier), left);
    }
    CHECK_BYTES(target->data, source->data, DISK);
    tear_down();
}

static struct gate gate;
static uint64_t gate_offset;

static void close_gate(uint64_t offset)
{
    gate = (struct gate) GATE_INIT;
    gate_offset = offset;
}

static int stop_write(struct memory_node *disk, enum memory_request request, uint64_t offset, uint64_t count)
{
    (void)disk, (void)count;
    if (request == MEMORY_WRITE && offset == gate_offset)
        gate_pass(&gate);
    return 0;
}

static void stop_ends_a_slice_after_the_copies_in_flight(void)
{
    struct nb_copier_options options = plain_options();
    options.max_workers = 1;
    set_up(options);
    close_gate(4 * GRANULE);
    target->hook = stop_write;
    nb_bitmap_set(todo, 0, DISK);
    uint64_t token = start_slice(UINT64_MAX);
    gate_await(&gate, 1);
    CHECK_INT(nb_copier_slice(copier, 1, 1, false, 1), -EBUSY);
    CHECK_INT(nb_copier_free(copier), -EBUSY);
    CHECK_INT(nb_copier_remaining(copier), DISK - 4 * GRANULE);
    nb_copier_stop(copier);
    CHECK(!event_came(NB_EVENT_SLICE, token));
    gate_open(&gate);
    struct nb_event event = wait_event(NB_EVENT_SLICE, token);
    CHECK_INT(event.error, 0);
    CHECK_INT(event.a, 8 * GRANULE);
    nb_copier_stop(copier);      /* none runs: nothing */
    CHECK(!event_came(NB_EVENT_SLICE, token));
    CHECK_INT(copy_slice(UINT64_MAX).a, DISK - 8 * GRANULE);
    tear_down();
}

static void pass_gate(void *arg)
{
    (void)arg;
    gate_pass(&gate);
    ring_post(NB_EVENT_TASK, 0, 7, 0, 0, 0);
}

static void a_slice_that_found_no_thread_can_be_stopped_and_freed(void)
{
    set_up(plain_options());
    close_gate(0);
    for (int i = 0; i < 16; i++)
        CHECK_OK(pool_submit(pass_gate, NULL, false));
    gate_await(&gate, 16);
    nb_bitmap_set(todo, 0, DISK);
    uint64_t token = start_slice(UINT64_MAX);
    nb_copier_stop(copier);
    CHECK_INT(wait_event(NB_EVENT_SLICE, token).a, 0);
    CHECK_OK(nb_copier_free(copier));      /* its task still waits in the pool */
    gate_open(&gate);
    for (int i = 0; i < 16; i++)
        wait_event(NB_EVENT_TASK, 7);
    await_last_reference(&source->node);
    await_last_reference(&target->node);
    struct nb_copier_options options = plain_options();
    CHECK_OK(nb_copier_new(&source->node, &target->node, todo, NULL, &options, &copier));
    tear_down();
}

static void wrong_arguments_are_refused(void)
{
    struct nb_copier_options options = plain_options();
    struct copier *out = NULL;
    set_up(options);
    struct memory_node *small = memory_disk(DISK - 4096);
    CHECK_INT(nb_copier_new(&source->node, &small->node, todo, NULL, &options, &out), -EINVAL);
    CHECK_INT(nb_copier_new(&small->node, &target->node, todo, NULL, &options, &out), -EINVAL);
    CHECK_INT(nb_copier_new(&source->node, &target->node, NULL, NULL, &options, &out), -EINVAL);
    CHECK_INT(nb_copier_new(&source->node, &target->node, NULL, &source->node, &options, &out), -EINVAL);
    options.max_workers = 0;
    CHECK_INT(nb_copier_new(&source->node, &target->node, todo, NULL, &options, &out), -EINVAL);
    options.max_workers = 65;
    CHECK_INT(nb_copier_new(&source->node, &target->node, todo, NULL, &options, &out), -EINVAL);
    options = plain_options();
    options.chunk = 32 * 1024;
    CHECK_INT(nb_copier_new(&source->node, &target->node, todo, NULL, &options, &out), -EINVAL);
    options = plain_options();
    target->node.flags |= NB_NODE_READ_ONLY;
    CHECK_INT(nb_copier_new(&source->node, &target->node, todo, NULL, &options, &out), -EROFS);
    CHECK(out == NULL);
    nb_node_unref(&small->node);
    tear_down();
}

/* ---- failures ---- */

static int fail_at(struct memory_node *disk, enum memory_request request, uint64_t offset, uint64_t count)
{
    uint64_t place = (uint64_t)(uintptr_t)disk->hook_data;
    (void)request;
    return offset <= place && place < offset + count ? -EIO : 0;
}

static void failures_name_their_side_and_leave_it_dirty(void)
{
    struct nb_copier_options options = plain_options();
    options.max_workers = 1;
    for (int side = NB_SIDE_SOURCE; side <= NB_SIDE_TARGET; side++) {
        set_up(options);
        struct memory_node *bad = side == NB_SIDE_SOURCE ? source : target;
        bad->hook = fail_at;
        bad->hook_data = (void *)(uintptr_t)(17 * GRANULE + 100);
        nb_bitmap_set(todo, 0, DISK);
        struct nb_event event = copy_slice(UINT64_MAX);
        CHECK_INT(event.error, -EIO);
        CHECK_INT(event.c, side);
        CHECK_INT(event.b, 16 * GRANULE);
        CHECK_INT(event.a, 16 * GRANULE);
        CHECK_INT(nb_copier_remaining(copier), DISK - event.a);
        CHECK_INT(nb_bitmap_dirty_bytes(todo), DISK - event.a);
        bad->hook = NULL;
        CHECK_INT(copy_slice(UINT64_MAX).error, 0);
        CHECK_INT(nb_copier_remaining(copier), 0);
        CHECK_BYTES(target->data, source->data, DISK);
        tear_down();
    }
}

/* ---- races with guests, by construction ---- */

static atomic_int writes_in_flight, most_in_flight;

static int count_and_stop_write(struct memory_node *disk, enum memory_request request, uint64_t offset, uint64_t count)
{
    if (request != MEMORY_WRITE)
        return 0;
    int now = atomic_fetch_add(&writes_in_flight, 1) + 1, before = atomic_load(&most_in_flight);
    while (before < now && !atomic_compare_exchange_weak(&most_in_flight, &before, now))
        ;
    int err = stop_write(disk, request, offset, count);
    atomic_fetch_sub(&writes_in_flight, 1);
    return err;
}

static void a_write_during_the_copy_stays_dirty_and_is_not_copied_at_once(void)
{
    set_up(plain_options());
    close_gate(4 * GRANULE);
    atomic_store(&most_in_flight, 0);
    target->hook = count_and_stop_write;
    nb_bitmap_set(todo, 4 * GRANULE, 4 * GRANULE);
    uint64_t token = start_slice(UINT64_MAX);
    gate_await(&gate, 1);      /* the old data is on its way to the target */
    memory_fill(source, 0x22, 5 * GRANULE, GRANULE);
    nb_bitmap_set(todo, 5 * GRANULE, GRANULE);
    CHECK_INT(nb_copier_remaining(copier), 5 * GRANULE);
    gate_open(&gate);
    struct nb_event event = wait_event(NB_EVENT_SLICE, token);
    CHECK_INT(event.error, 0);
    CHECK_INT(nb_copier_remaining(copier), 0);
    CHECK_INT(atomic_load(&most_in_flight), 1);      /* never two copies of one place at once */
    CHECK_BYTES(target->data + 4 * GRANULE, source->data + 4 * GRANULE, 4 * GRANULE);
    tear_down();
}

static struct node *cbw;

static void open_cbw(uint64_t memory_limit, int scratch_fd, uint64_t token)
{
    struct nb_cbw_options options = {
        .cluster_size = GRANULE, .memory_limit = memory_limit, .scratch_fd = scratch_fd, .token = token,
    };
    CHECK_OK(nb_cbw_open(&source->node, new_bitmap(source->node.size, true), &options, &cbw));
}

static void set_up_cbw(struct nb_copier_options options)
{
    source = memory_disk(DISK);
    target = memory_disk(DISK);
    memory_fill(source, 0x11, 0, DISK);
    open_cbw(DISK, -1, ++last_token);
    todo = NULL;
    CHECK_OK(nb_copier_new(cbw, &target->node, NULL, cbw, &options, &copier));
}

static void tear_down_cbw(void)
{
    CHECK_OK(nb_copier_free(copier));
    await_last_reference(cbw);
    nb_node_unref(cbw);
    await_last_reference(&target->node);
    CHECK_INT(atomic_load(&source->node.refs), 1);
    nb_node_unref(&source->node);
    nb_node_unref(&target->node);
}

static void guest_write(uint8_t byte, uint64_t offset, uint64_t count)
{
    uint8_t *data = malloc(count);
    memset(data, byte, count);
    CHECK_OK(nb_node_pwrite(cbw, data, count, offset, 0));
    free(data);
}

static void a_guest_writes_on_while_the_target_hangs(void)
{
    set_up_cbw(plain_options());
    close_gate(0);
    target->hook = stop_write;
    uint64_t token = start_slice(UINT64_MAX);
    gate_await(&gate, 1);
    guest_write(0x22, 0, DISK);      /* also what is on its way to the target */
    gate_open(&gate);
    CHECK_INT(wait_event(NB_EVENT_SLICE, token).error, 0);
    CHECK_INT(copy_slice(UINT64_MAX).error, 0);
    CHECK_INT(nb_copier_remaining(copier), 0);
    CHECK_FILLED(target->data, 0x11, DISK);
    CHECK_FILLED(source->data, 0x22, DISK);
    tear_down_cbw();
}

static int stop_read(struct memory_node *disk, enum memory_request request, uint64_t offset, uint64_t count)
{
    (void)disk;
    if (request == MEMORY_READ && offset == gate_offset && count > GRANULE)
        gate_pass(&gate);
    return 0;
}

static void what_a_guest_changed_before_the_engine_read_it_is_dropped(void)
{
    set_up_cbw(plain_options());
    close_gate(0);
    source->hook = stop_read;
    uint64_t token = start_slice(UINT64_MAX);
    gate_await(&gate, 1);      /* the engine claimed [0, 4) and is about to read */
    guest_write(0x22, GRANULE, GRANULE);
    gate_open(&gate);
    CHECK_INT(wait_event(NB_EVENT_SLICE, token).error, 0);
    CHECK_INT(nb_copier_remaining(copier), 0);
    CHECK_FILLED(target->data, 0x11, DISK);
    CHECK_INT(target->written_bytes, DISK);
    tear_down_cbw();
}

static void a_failed_target_loses_nothing_of_the_point_in_time(void)
{
    struct nb_copier_options options = plain_options();
    set_up_cbw(options);
    target->hook = fail_at;
    target->hook_data = (void *)(uintptr_t)100;
    struct nb_event event = copy_slice(UINT64_MAX);
    CHECK_INT(event.error, -EIO);
    CHECK_INT(event.c, NB_SIDE_TARGET);
    guest_write(0x22, 0, DISK);
    CHECK_INT(copy_slice(UINT64_MAX).error, -EIO);      /* now from the store */
    CHECK(nb_copier_remaining(copier) >= GRANULE);
    target->hook = NULL;
    CHECK_INT(copy_slice(UINT64_MAX).error, 0);
    CHECK_INT(nb_copier_remaining(copier), 0);
    CHECK_FILLED(target->data, 0x11, DISK);
    tear_down_cbw();
}

static void store_only_copies_what_guests_overwrote(void)
{
    set_up_cbw(plain_options());
    memory_fill(target, 0xee, 0, DISK);
    guest_write(0x22, 7 * GRANULE, 1);
    CHECK_OK(nb_copier_slice(copier, UINT64_MAX, LONG, true, ++last_token));
    struct nb_event event = wait_event(NB_EVENT_SLICE, last_token);
    CHECK_INT(event.error, 0);
    CHECK_INT(event.a, GRANULE);
    CHECK_FILLED(target->data, 0xee, 7 * GRANULE);
    CHECK_FILLED(target->data + 7 * GRANULE, 0x11, GRANULE);
    CHECK_FILLED(target->data + 8 * GRANULE, 0xee, DISK - 8 * GRANULE);
    tear_down_cbw();
}

static void the_store_goes_first(void)
{
    struct nb_copier_options options = plain_options();
    options.max_workers = 1;
    set_up_cbw(options);
    guest_write(0x22, 50 * GRANULE, GRANULE);
    CHECK_INT(copy_slice(GRANULE).a, GRANULE);
    CHECK_FILLED(target->data + 50 * GRANULE, 0x11, GRANULE);
    CHECK_INT(target->writes, 1);
    tear_down_cbw();
}

static void a_released_filter_ends_the_slice(void)
{
    set_up_cbw(plain_options());
    close_gate(0);
    target->hook = stop_write;
    uint64_t token = start_slice(UINT64_MAX);
    gate_await(&gate, 1);
    nb_cbw_release(cbw);
    gate_open(&gate);
    struct nb_event event = wait_event(NB_EVENT_SLICE, token);
    CHECK_INT(event.error, -ECANCELED);
    CHECK_INT(event.c, NB_SIDE_STORE);
    tear_down_cbw();
}

/* ---- guests first ---- */

struct reader {
    pthread_t thread;
    struct export *exp;
};

static void *read_export(void *arg)
{
    struct reader *reader = arg;
    char buf[512];
    CHECK_OK(nb_export_pread(reader->exp, buf, sizeof buf, 0));
    return NULL;
}

static int stop_guest_read(struct memory_node *disk, enum memory_request request, uint64_t offset, uint64_t count)
{
    (void)disk, (void)offset, (void)count;
    if (request == MEMORY_READ)
        gate_pass(&gate);
    return 0;
}

static int count_writes(struct memory_node *disk, enum memory_request request, uint64_t offset, uint64_t count)
{
    sched_yield();
    return count_and_stop_write(disk, request, offset, count);
}

static void while_guests_are_active_background_copies_are_few_and_small(void)
{
    struct nb_copier_options options = { .max_workers = 8, .chunk = 1 << 20, .background = true };
    struct memory_node *disk = memory_disk(1 << 20);
    struct reader reader;
    set_up(options);
    close_gate(UINT64_MAX);
    memory_fill(disk, 1, 0, 1 << 20);
    disk->hook = stop_guest_read;
    CHECK_OK(nb_export_new("busy", &disk->node, true, &reader.exp));
    CHECK_OK(pthread_create(&reader.thread, NULL, read_export, &reader));
    gate_await(&gate, 1);      /* a guest's request is in flight until the gate opens */
    atomic_store(&most_in_flight, 0);
    target->hook = count_writes;
    nb_bitmap_set(todo, 0, DISK);
    CHECK_INT(copy_slice(UINT64_MAX).a, DISK);
    CHECK_INT(source->largest_read, 128 * 1024);
    long workers = sysconf(_SC_NPROCESSORS_ONLN) / 2;
    CHECK(atomic_load(&most_in_flight) <= (workers ? workers : 1) + 1);      /* one more: the standby */
    gate_open(&gate);
    pthread_join(reader.thread, NULL);
    nb_export_unregister(reader.exp);
    nb_export_unref(reader.exp);
    await_last_reference(&disk->node);
    nb_node_unref(&disk->node);
    CHECK_BYTES(target->data, source->data, DISK);
    tear_down();
}

static void a_starved_background_does_not_stop_the_copy(void)
{
    struct nb_copier_options options = { .max_workers = 1, .chunk = 256 * 1024, .background = true };
    set_up(options);
    close_gate(0);
    source->hook = stop_read;      /* the only worker hangs, as if it got no processor */
    nb_bitmap_set(todo, 0, DISK);
    uint64_t token = start_slice(UINT64_MAX);
    gate_await(&gate, 1);
    while (nb_copier_remaining(copier) > 4 * GRANULE)      /* the standby does the rest */
        sched_yield();
    CHECK(!event_came(NB_EVENT_SLICE, token));
    gate_open(&gate);
    CHECK_INT(wait_event(NB_EVENT_SLICE, token).a, DISK);
    CHECK_BYTES(target->data, source->data, DISK);
    tear_down();
}

/* ---- the point in time, at random ---- */

#ifdef __SANITIZE_THREAD__      /* ten times slower */
enum { BACKUPS = 40, STORES = 10 };
#else
enum { BACKUPS = 300, STORES = 40 };
#endif

enum { STRESS_DISK = 48 * GRANULE - 512, GUESTS = 3, SECTOR = 4096 };

struct guest {
    pthread_t thread;
    uint64_t state;
    atomic_bool *stop;
    unsigned number;
};

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static atomic_uint noise;
static unsigned failure_odds;      /* one in so many requests to the target fails; 0: none */

/* Delays of the size of a request, and failures, by chance. */
static int disturb(struct memory_node *disk, enum memory_request request, uint64_t offset, uint64_t count)
{
    unsigned chance = (atomic_fetch_add(&noise, 1) * 2654435761u) >> 8;
    (void)offset, (void)count;
    if (chance % 4 == 0)
        sched_yield();
    if (chance % 16 == 1)
        nanosleep(&(struct timespec) { 0, 20000 }, NULL);
    bool to_target = disk == target && (request == MEMORY_WRITE || request == MEMORY_ZERO);
    return to_target && failure_odds && chance % failure_odds == 2 ? -EIO : 0;
}

static void *stamp(void *arg)
{
    struct guest *guest = arg;
    uint8_t *data = malloc(4 * GRANULE);
    for (uint64_t sequence = 1; !atomic_load(guest->stop); sequence++) {
        uint64_t random = next_random(&guest->state);
        uint64_t count = random % 8 ? SECTOR : 1 + (random >> 8) % (3 * GRANULE);
        uint64_t offset = (random >> 20) % (STRESS_DISK - count);
        if (random % 8)
            offset -= offset % SECTOR;
        uint64_t stamped = sequence << 8 | guest->number;
        for (uint64_t at = 0; at < count; at += sizeof stamped)
            memcpy(data + at, &stamped, sizeof stamped);
        switch (random >> 3 & 7) {
        case 0:
            CHECK_OK(nb_node_zero(cbw, count, offset, NB_REQ_MAY_UNMAP));
            break;
        case 1:
            CHECK_OK(nb_node_discard(cbw, count, offset));
            break;
        case 2:
            CHECK_OK(nb_node_pread(cbw, data, count, offset));
            break;
        default:
            CHECK_OK(nb_node_pwrite(cbw, data, count, offset, 0));
        }
    }
    free(data);
    return NULL;
}

static void fill_randomly(struct memory_node *disk, uint64_t *state)
{
    uint8_t *data = malloc(GRANULE);
    for (uint64_t at = 0; at < disk->node.size; at += GRANULE) {
        uint64_t length = at + GRANULE < disk->node.size ? GRANULE : disk->node.size - at;
        if (next_random(state) % 3 == 0)
            continue;
        for (uint64_t i = 0; i < length; i += 8)
            *(uint64_t *)(data + i) = next_random(state);
        memory_access(disk, true, data, length, at);
    }
    free(data);
}

static void run_guests(struct guest *guests, uint64_t *state, atomic_bool *stop)
{
    atomic_store(stop, false);
    for (unsigned i = 0; i < GUESTS; i++) {
        guests[i] = (struct guest) { .state = next_random(state) | 1, .stop = stop, .number = i };
        CHECK_OK(pthread_create(&guests[i].thread, NULL, stamp, &guests[i]));
    }
}

static void stop_guests(struct guest *guests, atomic_bool *stop)
{
    atomic_store(stop, true);
    for (unsigned i = 0; i < GUESTS; i++)
        pthread_join(guests[i].thread, NULL);
}

/* One backup with guests writing: the target must be what the source was when the filter was put in. */
static void back_up_at_random(uint64_t seed)
{
    uint64_t state = seed * 0x9e3779b97f4a7c15u + 1, token = ++last_token;
    struct nb_copier_options options = {
        .max_workers = 1 + (uint32_t)(next_random(&state) % 4),
        .chunk = GRANULE << next_random(&state) % 4,
        .target_is_zero = next_random(&state) % 2,
        .detect_zeroes = next_random(&state) % 2,
        .background = next_random(&state) % 2,
    };
    bool scratch = next_random(&state) % 2;
    int fd = scratch ? memfd_create("scratch", MFD_CLOEXEC) : -1;
    uint64_t memory = (1 + next_random(&state) % 8) * GRANULE;
    struct guest guests[GUESTS];
    atomic_bool stop;
    source = memory_disk(STRESS_DISK);
    target = memory_disk(STRESS_DISK);
    fill_randomly(source, &state);
    if (!options.target_is_zero)
        memory_fill(target, 0xee, 0, STRESS_DISK);
    uint8_t *snapshot = malloc(STRESS_DISK);
    memcpy(snapshot, source->data, STRESS_DISK);
    open_cbw(memory, fd, token);
    CHECK_OK(nb_copier_new(cbw, &target->node, NULL, cbw, &options, &copier));
    failure_odds = next_random(&state) % 3 ? 0 : 40;
    source->hook = target->hook = disturb;
    run_guests(guests, &state, &stop);
    while (nb_copier_remaining(copier)) {
        uint64_t bytes = next_random(&state) % 2 ? UINT64_MAX : GRANULE * (1 + next_random(&state) % 16);
        bool store_only = next_random(&state) % 8 == 0;
        CHECK_OK(nb_copier_slice(copier, bytes, 50, store_only, ++last_token));
        if (next_random(&state) % 16 == 0)
            nb_copier_stop(copier);
        struct nb_event event = wait_event(NB_EVENT_SLICE, last_token);
        CHECK(event.error == 0 || (event.error == -EIO && event.c == NB_SIDE_TARGET && failure_odds));
    }
    stop_guests(guests, &stop);
    CHECK(!event_came(NB_EVENT_CBW_BROKEN, token));
    CHECK_BYTES(target->data, snapshot, STRESS_DISK);
    while (event_came(NB_EVENT_CBW_FULL, token) || event_came(NB_EVENT_CBW_STORED, token))
        ;
    free(snapshot);
    tear_down_cbw();
    if (fd >= 0)
        close(fd);
}

static void the_target_is_the_disk_at_the_start(void)
{
    for (uint64_t seed = 1; seed <= BACKUPS; seed++)
        back_up_at_random(seed);
}

/* Only what guests overwrote (sync=none): together with the source it makes the old disk. */
static void the_store_alone_keeps_the_old_disk(void)
{
    for (uint64_t seed = 1; seed <= STORES; seed++) {
        uint64_t state = seed * 0x9e3779b97f4a7c15u + 7, token = ++last_token;
        struct nb_copier_options options = plain_options();
        struct guest guests[GUESTS];
        atomic_bool stop;
        source = memory_disk(STRESS_DISK);
        target = memory_disk(STRESS_DISK);
        fill_randomly(source, &state);
        uint8_t *snapshot = malloc(STRESS_DISK);
        memcpy(snapshot, source->data, STRESS_DISK);
        open_cbw(4 * GRANULE, -1, token);
        CHECK_OK(nb_copier_new(cbw, &target->node, NULL, cbw, &options, &copier));
        source->hook = target->hook = disturb;
        failure_odds = 0;
        run_guests(guests, &state, &stop);
        for (int i = 0; i < 20; i++) {      /* as a job does: drain when told */
            struct nb_event event;
            if (!event_within(NB_EVENT_CBW_STORED, token, 10, &event))
                break;
            CHECK_OK(nb_copier_slice(copier, UINT64_MAX, 50, true, ++last_token));
            CHECK_INT(wait_event(NB_EVENT_SLICE, last_token).error, 0);
        }
        atomic_store(&stop, true);
        /* Guests may wait for room: drain until all have ended and nothing is stored. */
        struct nb_event event;
        while (event_within(NB_EVENT_CBW_STORED, token, 10, &event)) {
            CHECK_OK(nb_copier_slice(copier, UINT64_MAX, LONG, true, ++last_token));
            CHECK_INT(wait_event(NB_EVENT_SLICE, last_token).error, 0);
        }
        stop_guests(guests, &stop);
        CHECK_OK(nb_copier_slice(copier, UINT64_MAX, LONG, true, ++last_token));
        CHECK_INT(wait_event(NB_EVENT_SLICE, last_token).error, 0);
        /* What is not in the target is still in the source. */
        uint64_t left = nb_copier_remaining(copier);
        source->hook = target->hook = NULL;
        CHECK_INT(copy_slice(UINT64_MAX).a, left);
        CHECK_BYTES(target->data, snapshot, STRESS_DISK);
        while (event_came(NB_EVENT_CBW_FULL, token) || event_came(NB_EVENT_CBW_STORED, token))
            ;
        free(snapshot);
        tear_down_cbw();
    }
}

/* ---- what is allocated ---- */

static void allocated_areas_of_a_chain_are_set(void)
{
    struct memory_node *base = memory_disk(16 * GRANULE), *top = memory_disk(16 * GRANULE);
    memory_fill(base, 1, 0, 4 * GRANULE);
    memory_fill(top, 2, 2 * GRANULE, 4 * GRANULE);
    top->absent = true;
    CHECK_OK(nb_node_set_backing(&top->node, &base->node));
    struct bitmap *bitmap = new_bitmap(16 * GRANULE, false);
    CHECK_OK(nb_bitmap_set_allocated(bitmap, &top->node, &base->node, false, ++last_token));
    CHECK_INT(wait_event(NB_EVENT_TASK, last_token).error, 0);
    CHECK_INT(nb_bitmap_dirty_bytes(bitmap), 4 * GRANULE);
    CHECK(!nb_bitmap_test(bitmap, 0, 2 * GRANULE) && nb_bitmap_test(bitmap, 2 * GRANULE, 1));
    nb_bitmap_clear(bitmap, 0, 16 * GRANULE);
    CHECK_OK(nb_bitmap_set_allocated(bitmap, &top->node, NULL, true, ++last_token));
    CHECK_INT(wait_event(NB_EVENT_TASK, last_token).error, 0);
    CHECK_INT(nb_bitmap_dirty_bytes(bitmap), 6 * GRANULE);
    CHECK_OK(nb_bitmap_set_allocated(bitmap, &top->node, NULL, false, ++last_token));      /* base holds all of it */
    CHECK_INT(wait_event(NB_EVENT_TASK, last_token).error, 0);
    CHECK_INT(nb_bitmap_dirty_bytes(bitmap), 16 * GRANULE);
    nb_bitmap_free(bitmap);
    nb_node_unref(&top->node);
    nb_node_unref(&base->node);
}

int main(void)
{
    RUN(only_what_is_dirty_is_copied);
    RUN(nothing_dirty_ends_at_once);
    RUN(zeroes_are_never_read);
    RUN(zeroes_within_a_granule_are_found);
    RUN(a_zero_target_is_not_written_with_zeroes);
    RUN(data_that_is_zero_is_written_as_zeroes_if_asked);
    RUN(a_huge_hole_takes_few_steps_and_no_budget);
    RUN(data_after_a_large_hole_is_shared_between_workers);
    RUN(a_slice_copies_no_more_than_asked);
    RUN(stop_ends_a_slice_after_the_copies_in_flight);
    RUN(a_slice_that_found_no_thread_can_be_stopped_and_freed);
    RUN(wrong_arguments_are_refused);
    RUN(failures_name_their_side_and_leave_it_dirty);
    RUN(a_write_during_the_copy_stays_dirty_and_is_not_copied_at_once);
    RUN(a_guest_writes_on_while_the_target_hangs);
    RUN(what_a_guest_changed_before_the_engine_read_it_is_dropped);
    RUN(a_failed_target_loses_nothing_of_the_point_in_time);
    RUN(store_only_copies_what_guests_overwrote);
    RUN(the_store_goes_first);
    RUN(a_released_filter_ends_the_slice);
    RUN(while_guests_are_active_background_copies_are_few_and_small);
    RUN(a_starved_background_does_not_stop_the_copy);
    RUN(the_target_is_the_disk_at_the_start);
    RUN(the_store_alone_keeps_the_old_disk);
    RUN(allocated_areas_of_a_chain_are_set);
    return 0;
}
