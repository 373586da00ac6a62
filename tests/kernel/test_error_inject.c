/* Fault injection: which requests a rule acts on, how often, and that nothing else changes. */
#include <fcntl.h>
#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "node.h"

enum { READ = 1, WRITE = 2, FLUSH = 4, ZERO = 8 };
#define SIZE 65536
#define EVERYWHERE 0, UINT64_MAX

static struct node *open_faulty(void)
{
    const char *path = "error_inject.raw";
    struct node *file, *node;
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);

    CHECK(fd >= 0 && ftruncate(fd, SIZE) == 0);
    close(fd);
    CHECK_OK(nb_file_open(path, NB_NODE_UNMAP, &file));
    unlink(path);
    CHECK_OK(nb_error_inject_open(file, NB_NODE_UNMAP, &node));
    nb_node_unref(file);
    return node;
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static int read_at(struct node *node, uint64_t offset, size_t count)
{
    char buf[SIZE];

    return nb_node_pread(node, buf, count, offset);
}

static void without_rules_everything_passes_to_the_child(void)
{
    struct node *node = open_faulty();
    struct nb_extent extent;
    char buf[4096], got[4096];

    memset(buf, 0x77, sizeof buf);
    CHECK_OK(nb_node_pwrite(node, buf, sizeof buf, 8192, NB_REQ_FUA));
    CHECK_OK(nb_node_pread(node->file, got, sizeof got, 8192));
    CHECK_BYTES(got, buf, sizeof buf);
    CHECK_OK(nb_node_zero(node, 512, 8192, NB_REQ_MAY_UNMAP));
    CHECK_OK(nb_node_pread(node, got, sizeof got, 8192));
    CHECK_FILLED(got, 0, 512);
    CHECK_FILLED(got + 512, 0x77, sizeof got - 512);
    CHECK_OK(nb_node_discard(node, 4096, 8192));
    CHECK_OK(nb_node_flush(node));
    CHECK_INT(nb_node_size(node), SIZE);
    CHECK_INT(nb_node_allocated(node), nb_node_allocated(node->file));
    CHECK_INT(nb_node_block_status(node, NULL, 0, SIZE, &extent, 1), 1);
    CHECK_INT(extent.depth, 0);
    nb_node_unref(node);
}

static void a_rule_acts_on_the_operations_of_its_mask_only(void)
{
    struct node *node = open_faulty();

    CHECK_OK(nb_error_inject_rule(node, WRITE | FLUSH, EVERYWHERE, EIO, 0, 0, 0));
    CHECK_INT(nb_node_pwrite(node, "x", 1, 0, 0), -EIO);
    CHECK_INT(nb_node_flush(node), -EIO);
    CHECK_OK(read_at(node, 0, 1));
    CHECK_OK(nb_node_zero(node, 512, 0, 0));
    CHECK_OK(nb_error_inject_rule(node, ZERO, EVERYWHERE, ENOSPC, 0, 0, 0));
    CHECK_INT(nb_node_zero(node, 512, 0, 0), -ENOSPC);
    CHECK_INT(nb_node_discard(node, 512, 0), -ENOSPC);
    nb_node_unref(node);
}

static void a_failed_write_does_not_reach_the_child(void)
{
    struct node *node = open_faulty();
    char got;

    CHECK_OK(nb_error_inject_rule(node, WRITE, EVERYWHERE, EIO, 0, 0, 1));
    CHECK_INT(nb_node_pwrite(node, "x", 1, 100, 0), -EIO);
    CHECK_OK(nb_node_pread(node, &got, 1, 100));
    CHECK_INT(got, 0);
    nb_node_unref(node);
}

static void a_rule_acts_on_requests_that_overlap_its_range(void)
{
    struct node *node = open_faulty();

    CHECK_OK(nb_error_inject_rule(node, READ | FLUSH, 4096, 512, EIO, 0, 0, 0));
    CHECK_OK(read_at(node, 0, 4096));
    CHECK_OK(read_at(node, 4608, 512));
    CHECK_INT(read_at(node, 4095, 2), -EIO);
    CHECK_INT(read_at(node, 4607, 2), -EIO);
    CHECK_INT(read_at(node, 0, SIZE), -EIO);
    CHECK_INT(nb_node_flush(node), -EIO);      /* no range: always meant */
    nb_node_unref(node);
}

static void a_range_up_to_the_largest_offset_does_not_wrap(void)
{
    struct node *node = open_faulty();

    CHECK_OK(nb_error_inject_rule(node, READ, 4096, UINT64_MAX, EIO, 0, 0, 0));
    CHECK_OK(read_at(node, 0, 4096));
    CHECK_INT(read_at(node, SIZE - 1, 1), -EIO);
    nb_node_unref(node);
}

static void skip_passes_requests_and_count_ends_the_rule(void)
{
    struct node *node = open_faulty();

    CHECK_OK(nb_error_inject_rule(node, READ, 0, 512, EIO, 0, 2, 3));
    for (int i = 0; i < 8; i++) {
        CHECK_OK(read_at(node, 512, 512));      /* does not match, so it is not counted */
        CHECK_INT(read_at(node, 0, 512), i >= 2 && i < 5 ? -EIO : 0);
    }
    nb_node_unref(node);
}

static void the_first_error_hides_later_rules(void)
{
    struct node *node = open_faulty();

    CHECK_OK(nb_error_inject_rule(node, READ, EVERYWHERE, ENOSPC, 0, 0, 1));
    CHECK_OK(nb_error_inject_rule(node, READ, EVERYWHERE, EIO, 0, 0, 1));
    CHECK_INT(read_at(node, 0, 1), -ENOSPC);
    CHECK_INT(read_at(node, 0, 1), -EIO);
    CHECK_OK(read_at(node, 0, 1));
    nb_node_unref(node);
}

static void delays_add_up_and_need_no_error(void)
{
    const uint64_t delay = 20000000;
    struct node *node = open_faulty();
    uint64_t begin;

    CHECK_OK(nb_error_inject_rule(node, READ, EVERYWHERE, 0, delay, 0, 2));
    CHECK_OK(nb_error_inject_rule(node, READ, EVERYWHERE, EIO, delay, 1, 1));
    begin = now_ns();
    CHECK_OK(read_at(node, 0, 1));
    CHECK(now_ns() - begin >= delay);
    begin = now_ns();
    CHECK_INT(read_at(node, 0, 1), -EIO);
    CHECK(now_ns() - begin >= 2 * delay);
    nb_node_unref(node);
}

static void *read_often(void *arg)
{
    intptr_t failed = 0;

    for (int i = 0; i < 500; i++)
        failed += read_at(arg, 0, 512) == -EIO;
    return (void *)failed;
}

static void counters_are_exact_with_many_threads(void)
{
    struct node *node = open_faulty();
    pthread_t threads[8];
    intptr_t failed = 0;

    CHECK_OK(nb_error_inject_rule(node, READ, EVERYWHERE, EIO, 0, 1000, 777));
    for (int i = 0; i < 8; i++)
        CHECK_OK(pthread_create(&threads[i], NULL, read_often, node));
    for (int i = 0; i < 8; i++) {
        void *result;
        pthread_join(threads[i], &result);
        failed += (intptr_t)result;
    }
    CHECK_INT(failed, 777);
    nb_node_unref(node);
}

static void rules_are_refused_where_they_make_no_sense(void)
{
    struct node *node = open_faulty();

    CHECK_INT(nb_error_inject_rule(node->file, READ, EVERYWHERE, EIO, 0, 0, 0), -EINVAL);
    CHECK_INT(nb_error_inject_rule(node, 0, EVERYWHERE, EIO, 0, 0, 0), -EINVAL);
    CHECK_INT(nb_error_inject_rule(node, 16, EVERYWHERE, EIO, 0, 0, 0), -EINVAL);
    CHECK_INT(nb_error_inject_rule(node, READ, EVERYWHERE, -EIO, 0, 0, 0), -EINVAL);
    nb_node_unref(node);
}

int main(void)
{
    RUN(without_rules_everything_passes_to_the_child);
    RUN(a_rule_acts_on_the_operations_of_its_mask_only);
    RUN(a_failed_write_does_not_reach_the_child);
    RUN(a_rule_acts_on_requests_that_overlap_its_range);
    RUN(a_range_up_to_the_largest_offset_does_not_wrap);
    RUN(skip_passes_requests_and_count_ends_the_rule);
    RUN(the_first_error_hides_later_rules);
    RUN(delays_add_up_and_need_no_error);
    RUN(counters_are_exact_with_many_threads);
    RUN(rules_are_refused_where_they_make_no_sense);
    return EXIT_SUCCESS;
}
