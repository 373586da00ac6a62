/* The pool of threads. */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>

#include "events.h"
#include "memory_node.h"

enum { LIMIT = 16 };      /* threads of a kind */

static void post_scheduler(void *arg)
{
    sigset_t blocked;
    CHECK_OK(pthread_sigmask(SIG_SETMASK, NULL, &blocked));
    CHECK(sigismember(&blocked, SIGTERM) && sigismember(&blocked, SIGINT) && sigismember(&blocked, SIGUSR1));
    ring_post(NB_EVENT_TASK, 0, (uint64_t)(uintptr_t)arg, (uint64_t)sched_getscheduler(0), 0, 0);
}

static void kinds_have_their_priorities_and_block_signals(void)
{
    CHECK_OK(pool_submit(post_scheduler, (void *)1, false));
    CHECK_OK(pool_submit(post_scheduler, (void *)2, true));
    CHECK_INT(wait_event(NB_EVENT_TASK, 1).a, SCHED_OTHER);
    CHECK_INT(wait_event(NB_EVENT_TASK, 2).a, SCHED_IDLE);
}

static struct gate gate = GATE_INIT;

static void pass_gate(void *arg)
{
    gate_pass(&gate);
    ring_post(NB_EVENT_TASK, 0, (uint64_t)(uintptr_t)arg, 0, 0, 0);
}

static void a_full_kind_queues_and_does_not_hold_up_the_other(void)
{
    for (int i = 0; i < 3 * LIMIT; i++)
        CHECK_OK(pool_submit(pass_gate, (void *)10, true));
    gate_await(&gate, LIMIT);
    CHECK_OK(pool_submit(post_scheduler, (void *)11, false));
    wait_event(NB_EVENT_TASK, 11);
    CHECK_INT(gate.arrived, LIMIT);      /* the others wait for a thread */
    CHECK(!event_came(NB_EVENT_TASK, 10));
    gate_open(&gate);
    for (int i = 0; i < 3 * LIMIT; i++)
        wait_event(NB_EVENT_TASK, 10);
}

static int fail_flush(struct memory_node *disk, enum memory_request request, uint64_t offset, uint64_t count)
{
    (void)disk, (void)offset, (void)count;
    return request == MEMORY_FLUSH ? -EIO : 0;
}

static void node_tasks_report_the_requests_error(void)
{
    struct memory_node *disk = memory_disk(1 << 20);
    CHECK_OK(nb_task_flush(&disk->node, 21));
    CHECK_INT(wait_event(NB_EVENT_TASK, 21).error, 0);
    CHECK_INT(atomic_load(&disk->flushes), 1);
    disk->hook = fail_flush;
    CHECK_OK(nb_task_flush(&disk->node, 22));
    CHECK_INT(wait_event(NB_EVENT_TASK, 22).error, -EIO);
    CHECK_OK(nb_task_write_back(&disk->node, 23));
    CHECK_INT(wait_event(NB_EVENT_TASK, 23).error, 0);
    CHECK_INT(atomic_load(&disk->node.refs), 1);
    nb_node_unref(&disk->node);
}

static atomic_bool closed;

static void note_close(struct node *node)
{
    atomic_store(&closed, true);
    memory_close(node);
}

static void a_node_is_closed_when_its_unref_is_reported(void)
{
    struct node_ops ops = memory_ops;
    struct memory_node *disk = memory_disk(1 << 20);
    ops.close = note_close;
    disk->node.ops = &ops;
    CHECK_OK(nb_task_unref(&disk->node, 31));
    CHECK_INT(wait_event(NB_EVENT_TASK, 31).error, 0);
    CHECK(atomic_load(&closed));
}

int main(void)
{
    RUN(kinds_have_their_priorities_and_block_signals);
    RUN(a_full_kind_queues_and_does_not_hold_up_the_other);
    RUN(node_tasks_report_the_requests_error);
    RUN(a_node_is_closed_when_its_unref_is_reported);
    return 0;
}
