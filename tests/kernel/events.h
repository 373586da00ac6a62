/* The loop's side in tests: wait for events of the ring; and a gate at which a hook stops a request. */
#ifndef NB_EVENTS_H
#define NB_EVENTS_H

#include <poll.h>
#include <pthread.h>

#include "check.h"
#include "kernel.h"

/* Events read and not yet asked for. */
static struct nb_event events_kept[4096];
static int events_count;

/* The oldest event of that kind with that token; other events are kept.  Fails the test after `ms`: true if it came. */
static inline bool event_within(uint32_t kind, uint64_t token, int ms, struct nb_event *event)
{
    struct pollfd ring = { .fd = nb_ring_fd(), .events = POLLIN };
    for (;;) {
        CHECK(events_count < 4000);
        events_count += nb_ring_read(events_kept + events_count, 4096 - events_count);
        for (int i = 0; i < events_count; i++) {
            if (events_kept[i].kind != kind || events_kept[i].token != token)
                continue;
            *event = events_kept[i];
            memmove(events_kept + i, events_kept + i + 1, (size_t)(--events_count - i) * sizeof *events_kept);
            return true;
        }
        if (poll(&ring, 1, ms) <= 0)
            return false;
    }
}

static inline struct nb_event wait_event(uint32_t kind, uint64_t token)
{
    struct nb_event event = { 0 };
    if (!event_within(kind, token, 60000, &event))
        check_failed(__FILE__, __LINE__, "no event of kind %u with token %" PRIu64 " within a minute", kind, token);
    return event;
}

static inline bool event_came(uint32_t kind, uint64_t token)
{
    struct nb_event event;
    return event_within(kind, token, 0, &event);
}

/* A place where threads stop until it is opened. */
struct gate {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int arrived;
    bool open;
};

#define GATE_INIT { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, false }

static inline void gate_pass(struct gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    gate->arrived++;
    pthread_cond_broadcast(&gate->changed);
    while (!gate->open)
        pthread_cond_wait(&gate->changed, &gate->lock);
    pthread_mutex_unlock(&gate->lock);
}

/* Wait until so many threads have come, in all. */
static inline void gate_await(struct gate *gate, int arrived)
{
    pthread_mutex_lock(&gate->lock);
    while (gate->arrived < arrived)
        pthread_cond_wait(&gate->changed, &gate->lock);
    pthread_mutex_unlock(&gate->lock);
}

static inline void gate_open(struct gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    gate->open = true;
    pthread_cond_broadcast(&gate->changed);
    pthread_mutex_unlock(&gate->lock);
}

#endif
