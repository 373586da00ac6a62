/* Waiting for a given time, for the drivers that make storage slow. */
#ifndef NB_DELAY_H
#define NB_DELAY_H

#include <errno.h>
#include <stdint.h>
#include <time.h>

#define NANOSECONDS_PER_SECOND UINT64_C(1000000000)

/* Wait ns nanoseconds of CLOCK_MONOTONIC, signals notwithstanding.  Any thread; blocks. */
static inline void delay_ns(uint64_t ns)
{
    struct timespec end;

    if (ns == 0)
        return;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += (time_t)(ns / NANOSECONDS_PER_SECOND);
    end.tv_nsec += (long)(ns % NANOSECONDS_PER_SECOND);
    if (end.tv_nsec >= (long)NANOSECONDS_PER_SECOND) {
        end.tv_sec++;
        end.tv_nsec -= (long)NANOSECONDS_PER_SECOND;
    }
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &end, NULL) == EINTR)
        ;
}

#endif
