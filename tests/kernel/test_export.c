/* Exports: bounds, permissions, the gate, the registry. */
#include "events.h"
#include "image_file.h"

#define SIZE 65536u

static struct image_file *make_disk(void)
{
    struct image_file *disk = image_file_new(2 * SIZE);
    disk->node.size = SIZE;
    return disk;
}

static struct export *make_export(struct image_file *disk, bool writable)
{
    struct export *exp;
    CHECK_OK(nb_export_new("e", &disk->node, writable, &exp));
    return exp;
}

static void drop(struct export *exp, struct image_file *disk)
{
    nb_export_unregister(exp);
    nb_export_unref(exp);
    nb_node_unref(&disk->node);
}

static void nothing_outside_the_disk_is_touched(void)
{
    struct image_file *disk = make_disk();
    struct export *exp = make_export(disk, true);
    struct nb_extent extent;
    uint8_t buf[1024] = { 0 };
    static const uint64_t offsets[] = { SIZE - 1023, SIZE, SIZE + 1, UINT64_MAX, UINT64_MAX - 511 };
    for (int i = 0; i < 5; i++) {
        CHECK_INT(nb_export_pread(exp, buf, 1024, offsets[i]), -EINVAL);
        CHECK_INT(nb_export_pwrite(exp, buf, 1024, offsets[i], 0), -ENOSPC);
        CHECK_INT(nb_export_zero(exp, 1024, offsets[i], 0), -ENOSPC);
        CHECK_INT(nb_export_trim(exp, 1024, offsets[i], 0), -ENOSPC);
        CHECK_INT(nb_export_cache(exp, 1024, offsets[i]), -EINVAL);
        CHECK_INT(nb_export_extents(exp, 1024, offsets[i], &extent, 1), -EINVAL);
    }
    CHECK_INT(disk->reads + disk->writes + disk->discards, 0);
    CHECK_OK(nb_export_pread(exp, buf, 1024, SIZE - 1024));
    CHECK_OK(nb_export_pwrite(exp, buf, 1024, SIZE - 1024, 0));
    CHECK_OK(nb_export_pread(exp, buf, 0, SIZE));
    drop(exp, disk);
}

static void a_read_only_export_takes_no_write(void)
{
    struct image_file *disk = make_disk();
    struct export *exp = make_export(disk, false);
    uint8_t buf[512] = { 0 };
    CHECK_INT(nb_export_pwrite(exp, buf, 512, 0, 0), -EROFS);
    CHECK_INT(nb_export_zero(exp, 512, 0, 0), -EROFS);
    CHECK_INT(nb_export_trim(exp, 512, 0, 0), -EROFS);
    CHECK_OK(nb_export_flush(exp));
    CHECK_OK(nb_export_pread(exp, buf, 512, 0));
    CHECK_INT(disk->writes + disk->discards + disk->flushes, 0);
    drop(exp, disk);
}

static void a_killed_export_serves_nothing(void)
{
    struct image_file *disk = make_disk();
    struct export *exp = make_export(disk, true);
    struct nb_extent extent;
    uint8_t buf[512] = { 0 };
    nb_export_kill(exp);
    CHECK_INT(nb_export_pread(exp, buf, 512, 0), -ESHUTDOWN);
    CHECK_INT(nb_export_pwrite(exp, buf, 512, 0, 0), -ESHUTDOWN);
    CHECK_INT(nb_export_zero(exp, 512, 0, 0), -ESHUTDOWN);
    CHECK_INT(nb_export_trim(exp, 512, 0, 0), -ESHUTDOWN);
    CHECK_INT(nb_export_flush(exp), -ESHUTDOWN);
    CHECK_INT(nb_export_cache(exp, 512, 0), -ESHUTDOWN);
    CHECK_INT(nb_export_extents(exp, 512, 0, &extent, 1), -ESHUTDOWN);
    CHECK_INT(disk->reads + disk->writes + disk->discards + disk->flushes, 0);
    drop(exp, disk);
}

static void counters_tell_what_succeeded_and_failed(void)
{
    struct image_file *disk = make_disk();
    struct export *exp = make_export(disk, true);
    struct nb_counters counters;
    uint8_t buf[1024] = { 0 };
    CHECK_OK(nb_export_pwrite(exp, buf, 1024, 0, 0));
    CHECK_OK(nb_export_pread(exp, buf, 512, 0));
    CHECK_OK(nb_export_flush(exp));
    CHECK_INT(nb_export_pread(exp, buf, 512, SIZE), -EINVAL);
    nb_export_counters(exp, &counters);
    CHECK_INT(counters.write_ops, 1);
    CHECK_INT(counters.write_bytes, 1024);
    CHECK_INT(counters.read_ops, 1);
    CHECK_INT(counters.read_bytes, 512);
    CHECK_INT(counters.flush_ops, 1);
    CHECK_INT(counters.failed_ops, 1);
    CHECK_INT(counters.in_flight, 0);
    drop(exp, disk);
}

static void a_name_is_taken_once_and_found_while_registered(void)
{
    struct image_file *disk = make_disk();
    struct export *exp = make_export(disk, true), *other = NULL;
    CHECK_INT(nb_export_new("e", &disk->node, true, &other), -EEXIST);
    struct export *found = nb_export_find("e");
    CHECK(found == exp);
    nb_export_unref(found);
    found = nb_export_find("");      /* the default: the oldest */
    CHECK(found == exp);
    nb_export_unref(found);
    CHECK(!nb_export_find("f"));
    nb_export_unregister(exp);
    CHECK(!nb_export_find("e"));
    drop(exp, disk);
}

/* ---- the gate ---- */

static struct gate in_request = GATE_INIT;

static int stop_reads(struct image_file *file, enum file_op op, bool after, uint64_t offset, uint64_t count)
{
    (void)file, (void)offset, (void)count;
    if (op == FILE_READ && !after)
        gate_pass(&in_request);
    return 0;
}

static void *read_once(void *exp)
{
    uint8_t buf[512];
    CHECK_OK(nb_export_pread(exp, buf, 512, 0));
    return NULL;
}

static void a_drain_waits_for_the_request_in_flight(void)
{
    struct image_file *disk = make_disk();
    struct export *exp = make_export(disk, true);
    pthread_t thread;
    uint64_t seen = 0;
    CHECK(!export_guests_active(&seen));
    disk->hook = stop_reads;
    CHECK_OK(pthread_create(&thread, NULL, read_once, exp));
    gate_await(&in_request, 1);
    CHECK(export_guests_active(&seen));
    CHECK(export_guests_active(&seen));      /* for as long as it is in flight */
    nb_export_close_gate(exp, 7);
    CHECK(!event_came(NB_EVENT_DRAINED, 7));
    gate_open(&in_request);
    wait_event(NB_EVENT_DRAINED, 7);
    CHECK_OK(pthread_join(thread, NULL));
    CHECK(export_guests_active(&seen));      /* it has ended since */
    CHECK(!export_guests_active(&seen));
    nb_export_open_gate(exp);
    drop(exp, disk);
}

static void the_gate_opens_with_the_last_of_its_closers(void)
{
    struct image_file *disk = make_disk();
    struct export *exp = make_export(disk, true);
    pthread_t thread;
    nb_export_close_gate(exp, 8);
    nb_export_close_gate(exp, 9);
    wait_event(NB_EVENT_DRAINED, 8);
    wait_event(NB_EVENT_DRAINED, 9);
    CHECK_OK(pthread_create(&thread, NULL, read_once, exp));
    nb_export_open_gate(exp);
    pause_ns(5000000);
    CHECK_INT(disk->reads, 0);
    nb_export_open_gate(exp);
    CHECK_OK(pthread_join(thread, NULL));
    CHECK_INT(disk->reads, 1);
    drop(exp, disk);
}

/* ---- drain against load ---- */

enum { WRITERS = 16, EXCHANGES = 60 };

static atomic_bool writers_stop;
static _Atomic(struct image_file *) current_root;
static atomic_ulong acknowledged;

static int only_the_root(struct image_file *file, enum file_op op, bool after, uint64_t offset, uint64_t count)
{
    (void)op, (void)after, (void)offset, (void)count;
    CHECK(atomic_load(&current_root) == file);
    return 0;
}

static void *write_on(void *exp)
{
    uint8_t buf[512] = { 0 };
    while (!atomic_load(&writers_stop)) {
        CHECK_OK(nb_export_pwrite(exp, buf, 512, 0, 0));
        atomic_fetch_add(&acknowledged, 1);
    }
    return NULL;
}

static void *ask_size(void *exp)
{
    while (!atomic_load(&writers_stop))
        CHECK_INT(nb_export_size(exp), SIZE);
    return NULL;
}

/* Each exchange gives the export a root of its own and frees the last one: any straggler would touch freed memory. */
static void roots_change_under_load_and_no_request_is_lost(void)
{
    struct image_file *disk = make_disk();
    struct export *exp = make_export(disk, true);
    pthread_t threads[WRITERS + 1];
    unsigned long served = 0;
    disk->hook = only_the_root;
    atomic_store(&current_root, disk);
    for (int i = 0; i < WRITERS + 1; i++)
        CHECK_OK(pthread_create(&threads[i], NULL, i < WRITERS ? write_on : ask_size, exp));
    for (uint64_t token = 100; token < 100 + EXCHANGES; token++) {
        pause_ns(200000);
        nb_export_close_gate(exp, token);
        wait_event(NB_EVENT_DRAINED, token);
        served += disk->writes;
        struct image_file *next = make_disk();
        next->hook = only_the_root;
        atomic_store(&current_root, next);
        CHECK_OK(nb_export_set_root(exp, &next->node));
        nb_node_unref(&disk->node);
        disk = next;
        nb_export_open_gate(exp);
    }
    atomic_store(&writers_stop, true);
    for (int i = 0; i < WRITERS + 1; i++)
        CHECK_OK(pthread_join(threads[i], NULL));
    CHECK_INT(served + disk->writes, atomic_load(&acknowledged));
    drop(exp, disk);
}

int main(void)
{
    RUN(nothing_outside_the_disk_is_touched);
    RUN(a_read_only_export_takes_no_write);
    RUN(a_killed_export_serves_nothing);
    RUN(counters_tell_what_succeeded_and_failed);
    RUN(a_name_is_taken_once_and_found_while_registered);
    RUN(a_drain_waits_for_the_request_in_flight);
    RUN(the_gate_opens_with_the_last_of_its_closers);
    RUN(roots_change_under_load_and_no_request_is_lost);
    return 0;
}
