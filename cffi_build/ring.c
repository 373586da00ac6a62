/* The one way from C to Python: a queue of events and an eventfd that is readable while it holds any.
 *
 * Owner: the process.  `ring` lives as long as the module; the eventfd is made by the first nb_ring_fd.
 * Lock: ring.lock, innermost of all (nothing is called under it).  The queue grows by doubling and never drops:
 * an event lost would be a job that never ends.
 */
#include "node.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

static struct {
    pthread_mutex_t lock;
    struct nb_event *events;       /* circular */
    size_t capacity, first, count;
    int fd;
} ring = { .lock = PTHREAD_MUTEX_INITIALIZER, .fd = -1 };

int nb_ring_fd(void)
{
    pthread_mutex_lock(&ring.lock);
    if (ring.fd < 0) {
        int fd = eventfd(ring.count ? 1 : 0, EFD_CLOEXEC | EFD_NONBLOCK);
        ring.fd = fd < 0 ? -errno : fd;
    }
    int fd = ring.fd;
    pthread_mutex_unlock(&ring.lock);
    return fd;
}

static void grow_locked(void)
{
    size_t capacity = ring.capacity ? 2 * ring.capacity : 64;
    struct nb_event *events = malloc(capacity * sizeof *events);
    if (!events)
        abort();
    for (size_t i = 0; i < ring.count; i++)
        events[i] = ring.events[(ring.first + i) % ring.capacity];
    free(ring.events);
    ring.events = events;
    ring.capacity = capacity;
    ring.first = 0;
}

void ring_post(uint32_t kind, int error, uint64_t token, uint64_t a, uint64_t b, uint64_t c)
{
    pthread_mutex_lock(&ring.lock);
    if (ring.count == ring.capacity)
        grow_locked();
    ring.events[(ring.first + ring.count) % ring.capacity] =
        (struct nb_event) { .kind = kind, .error = error, .token = token, .a = a, .b = b, .c = c };
    if (ring.count++ == 0 && ring.fd >= 0) {
        uint64_t one = 1;
        /* Cannot fail: the counter is 0 or 1 and the descriptor is ours. */
        if (write(ring.fd, &one, sizeof one) != sizeof one && errno != EAGAIN)
            abort();
    }
    pthread_mutex_unlock(&ring.lock);
}

int nb_ring_read(struct nb_event *events, int max)
{
    int count = 0;
    pthread_mutex_lock(&ring.lock);
    while (count < max && ring.count) {
        events[count++] = ring.events[ring.first];
        ring.first = (ring.first + 1) % ring.capacity;
        ring.count--;
    }
    if (!ring.count && ring.fd >= 0) {
        uint64_t value;
        ssize_t got = read(ring.fd, &value, sizeof value);
        (void)got;      /* EAGAIN: nothing had been posted since the last read */
    }
    pthread_mutex_unlock(&ring.lock);
    return count;
}
