/* See rangelock.h.  A list under one mutex: there are never more holds than threads, and only requests that
 * allocate, zero or discard come here, so a tree would not pay. */
#include "rangelock.h"

#include <stddef.h>

void range_lock_init(struct range_lock *lock)
{
    pthread_mutex_init(&lock->lock, NULL);
    pthread_cond_init(&lock->released, NULL);
    lock->first = lock->last = NULL;
    lock->waiting = 0;
}

void range_lock_destroy(struct range_lock *lock)
{
    pthread_cond_destroy(&lock->released);
    pthread_mutex_destroy(&lock->lock);
}

static bool conflicts(const struct range_hold *a, const struct range_hold *b)
{
    return a->start < b->end && b->start < a->end && (a->exclusive || b->exclusive);
}

static bool must_wait(const struct range_hold *hold)
{
    for (const struct range_hold *earlier = hold->previous; earlier; earlier = earlier->previous)
        if (conflicts(earlier, hold))
            return true;
    return false;
}

void range_lock(struct range_lock *lock, struct range_hold *hold, uint64_t start, uint64_t end, bool exclusive)
{
    *hold = (struct range_hold) { .start = start, .end = end, .exclusive = exclusive };
    pthread_mutex_lock(&lock->lock);
    hold->previous = lock->last;
    if (lock->last)
        lock->last->next = hold;
    else
        lock->first = hold;
    lock->last = hold;
    while (must_wait(hold)) {
        lock->waiting++;
        pthread_cond_wait(&lock->released, &lock->lock);
        lock->waiting--;
    }
    pthread_mutex_unlock(&lock->lock);
}

void range_unlock(struct range_lock *lock, struct range_hold *hold)
{
    pthread_mutex_lock(&lock->lock);
    if (hold->previous)
        hold->previous->next = hold->next;
    else
        lock->first = hold->next;
    if (hold->next)
        hold->next->previous = hold->previous;
    else
        lock->last = hold->previous;
    if (lock->waiting)
        pthread_cond_broadcast(&lock->released);
    pthread_mutex_unlock(&lock->lock);
}
