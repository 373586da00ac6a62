/* The event ring: nothing is lost, order is kept, the eventfd tells the truth. */
#include <poll.h>
#include <pthread.h>

#include "check.h"
#include "node.h"

enum { POSTERS = 8, EACH = 5000 };

static bool is_readable(void)
{
    struct pollfd ring = { .fd = nb_ring_fd(), .events = POLLIN };
    return poll(&ring, 1, 0) == 1;
}

static void events_posted_before_the_descriptor_existed_are_told(void)
{
    struct nb_event event;
    ring_post(NB_EVENT_TASK, -EIO, 11, 1, 2, 3);
    CHECK(is_readable());
    CHECK_INT(nb_ring_read(&event, 1), 1);
    CHECK_INT(event.kind, NB_EVENT_TASK);
    CHECK_INT(event.error, -EIO);
    CHECK_INT(event.token, 11);
    CHECK_INT(event.a + 10 * event.b + 100 * event.c, 321);
    CHECK(!is_readable());
}

static void it_stays_readable_until_the_last_event_is_read(void)
{
    struct nb_event events[3];
    for (uint64_t i = 0; i < 5; i++)
        ring_post(NB_EVENT_TASK, 0, i, 0, 0, 0);
    CHECK_INT(nb_ring_read(events, 3), 3);
    CHECK(is_readable());
    CHECK_INT(nb_ring_read(events, 3), 2);
    CHECK_INT(events[1].token, 4);
    CHECK(!is_readable());
    CHECK_INT(nb_ring_read(events, 3), 0);
}

static void *post_many(void *arg)
{
    for (uint64_t i = 0; i < EACH; i++)
        ring_post(NB_EVENT_TASK, 0, (uintptr_t)arg, i, 0, 0);
    return NULL;
}

static void every_poster_s_events_come_once_and_in_order(void)
{
    pthread_t threads[POSTERS];
    uint64_t next[POSTERS] = { 0 };
    struct nb_event events[100];
    for (uintptr_t i = 0; i < POSTERS; i++)
        CHECK_OK(pthread_create(&threads[i], NULL, post_many, (void *)i));
    for (int left = POSTERS * EACH; left;) {
        struct pollfd ring = { .fd = nb_ring_fd(), .events = POLLIN };
        CHECK_INT(poll(&ring, 1, 60000), 1);
        int count = nb_ring_read(events, 100);
        for (int i = 0; i < count; i++)
            CHECK_INT(events[i].a, next[events[i].token]++);
        left -= count;
    }
    for (int i = 0; i < POSTERS; i++)
        CHECK_OK(pthread_join(threads[i], NULL));
    CHECK(!is_readable());
}

int main(void)
{
    RUN(events_posted_before_the_descriptor_existed_are_told);
    RUN(it_stays_readable_until_the_last_event_is_read);
    RUN(every_poster_s_events_come_once_and_in_order);
    return 0;
}
