/* The pool: threads that work for the loop, so that the loop never waits for storage.
 *
 * Two kinds, each with its own queue, so that neither waits behind the other:
 * - normal: what somebody waits for (flushes, closing, the copy that must not starve);
 * - background: SCHED_IDLE, any other thread of the machine preempts them at once.  An unprivileged thread can enter
 *   SCHED_IDLE but not leave it, so a thread keeps its kind for life.
 *
 * A thread is made when work is queued and none is idle, up to MAX_THREADS of a kind, and ends after IDLE_SECONDS without
 * work.  Tasks are taken in order.  Threads have small stacks and every signal blocked.
 *
 * End of the process: threads are detached and never joined; on exit they are simply gone.  The one danger is code that
 * is unloaded under an idle thread (nbdkit closes its filters and plugins before it exits), so the first thread pins
 * the module in memory.
 *
 * Locks: queue.lock, innermost; no task runs under it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "node.h"

enum {
    MAX_THREADS = 16,                /* of each kind */
    IDLE_SECONDS = 10,
    STACK_BYTES = 256 * 1024
};

struct task {
    struct task *next;
    void (*fn)(void *arg);
    void *arg;
};

struct queue {
    pthread_mutex_t lock;
    pthread_cond_t work;             /* CLOCK_MONOTONIC; made with the first thread */
    bool ready, background;
    struct task *first, **last;
    unsigned waiting, threads, idle;
};

static struct queue queues[2] = {
    { .lock = PTHREAD_MUTEX_INITIALIZER },
    { .lock = PTHREAD_MUTEX_INITIALIZER, .background = true },
};

/* ---- threads ---- */

/* The next task, or NULL when none came for IDLE_SECONDS. */
static struct task *next_task_locked(struct queue *queue)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += IDLE_SECONDS;
    queue->idle++;
    while (!queue->first)
        if (pthread_cond_timedwait(&queue->work, &queue->lock, &until) == ETIMEDOUT && !queue->first)
            break;
    queue->idle--;
    struct task *task = queue->first;
    if (!task)
        return NULL;
    queue->first = task->next;
    if (!queue->first)
        queue->last = &queue->first;
    queue->waiting--;
    return task;
}

void thread_take_process_priority(void)
{
    setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, (id_t)getpid()));      /* 0: this thread */
}

static void *run_tasks(void *arg)
{
    struct queue *queue = arg;
    thread_take_process_priority();
    if (queue->background)
        sched_setscheduler(0, SCHED_IDLE, &(struct sched_param) { 0 });      /* refused: it runs at normal priority */
    pthread_setname_np(pthread_self(), queue->background ? "nb-copy" : "nb-work");
    pthread_mutex_lock(&queue->lock);
    for (struct task *task; (task = next_task_locked(queue));) {
        pthread_mutex_unlock(&queue->lock);
        task->fn(task->arg);
        free(task);
        pthread_mutex_lock(&queue->lock);
    }
    queue->threads--;
    pthread_mutex_unlock(&queue->lock);
    return NULL;
}

/* Keep this shared object loaded until the process ends. */
static void pin_module(void)
{
    Dl_info info;
    if (dladdr((void *)pin_module, &info) && info.dli_fname)
        (void)dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);      /* a program is never unloaded */
}

static int prepare_locked(struct queue *queue)
{
    pthread_condattr_t attributes;
    if (queue->ready)
        return 0;
    pin_module();
    int err = pthread_condattr_init(&attributes);
    if (err)
        return -err;
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    err = pthread_cond_init(&queue->work, &attributes);
    pthread_condattr_destroy(&attributes);
    queue->last = &queue->first;
    queue->ready = !err;
    return -err;
}

/* A normal thread is not to inherit the priority of the background thread that happens to ask for it.  Where that is
 * refused (unprivileged), it inherits: slower, not wrong. */
static int start_thread_locked(struct queue *queue)
{
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t all, before;
    int err = pthread_attr_init(&attributes);
    if (err)
        return -err;
    sigfillset(&all);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_setinheritsched(&attributes, PTHREAD_EXPLICIT_SCHED);
    err = pthread_create(&thread, &attributes, run_tasks, queue);
    if (err == EPERM) {
        pthread_attr_setinheritsched(&attributes, PTHREAD_INHERIT_SCHED);
        err = pthread_create(&thread, &attributes, run_tasks, queue);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    queue->threads += !err;
    return -err;
}

int pool_submit(void (*fn)(void *arg), void *arg, bool background)
{
    struct queue *queue = &queues[background];
    struct task *task = malloc(sizeof *task);
    if (!task)
        return -ENOMEM;
    *task = (struct task) { .fn = fn, .arg = arg };
    pthread_mutex_lock(&queue->lock);
    int err = prepare_locked(queue);
    if (!err && queue->waiting >= queue->idle && queue->threads < MAX_THREADS) {
        err = start_thread_locked(queue);
        if (queue->threads)
            err = 0;      /* one of those that run will take it */
    }
    if (!err) {
        *queue->last = task;
        queue->last = &task->next;
        queue->waiting++;
        pthread_cond_signal(&queue->work);
    }
    pthread_mutex_unlock(&queue->lock);
    if (err)
        free(task);
    return err;
}

/* ---- requests that the loop awaits ---- */

struct node_task {
    struct node *node;
    uint64_t token;
    int (*request)(struct node *node);
};

/* The reference is dropped first, so that whoever awaits the event finds the files closed. */
static void run_node_task(void *arg)
{
    struct node_task task = *(struct node_task *)arg;
    free(arg);
    int err = task.request ? task.request(task.node) : 0;
    nb_node_unref(task.node);
    ring_post(NB_EVENT_TASK, err, task.token, 0, 0, 0);
}

/* The task takes over the caller's reference unless it fails. */
static int submit_node_task(struct node *node, int (*request)(struct node *node), uint64_t token)
{
    struct node_task *task = malloc(sizeof *task);
    if (!task)
        return -ENOMEM;
    *task = (struct node_task) { .node = node, .token = token, .request = request };
    int err = pool_submit(run_node_task, task, false);
    if (err)
        free(task);
    return err;
}

static int submit_with_reference(struct node *node, int (*request)(struct node *node), uint64_t token)
{
    int err = submit_node_task(nb_node_ref(node), request, token);
    if (err)
        nb_node_unref(node);
    return err;
}

int nb_task_flush(struct node *node, uint64_t token)
{
    return submit_with_reference(node, nb_node_flush, token);
}

int nb_task_write_back(struct node *node, uint64_t token)
{
    return submit_with_reference(node, nb_node_write_back, token);
}

int nb_task_unref(struct node *node, uint64_t token)
{
    return submit_node_task(node, NULL, token);
}
