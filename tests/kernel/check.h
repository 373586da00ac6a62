/* What every C test of the kernel starts from.
 *
 * A test is one file, tests/kernel/test_<source>.c, for one source file of the kernel: a program of its own, linked
 * with all of the kernel but filter.c.  It includes this header, has functions `static void behaviour_it_shows(void)`
 * and a main that RUNs each.  The first check that fails prints what was expected and ends the program.
 */
#ifndef NB_CHECK_H
#define NB_CHECK_H

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Name of the test function that is running, for the message of a failed check. */
static const char *check_running = "main";

__attribute__((format(printf, 3, 4), noreturn, unused)) static void
check_failed(const char *file, int line, const char *format, ...)
{
    va_list args;

    fprintf(stderr, "%s:%d: %s: ", file, line, check_running);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(EXIT_FAILURE);
}

/* The condition holds. */
#define CHECK(condition) \
    do { \
        if (!(condition)) \
            check_failed(__FILE__, __LINE__, "not true: %s", #condition); \
    } while (0)

/* Two integers (of any type that fits intmax_t; compared and shown as such) are equal. */
#define CHECK_INT(actual, expected) \
    do { \
        intmax_t check_actual = (intmax_t)(actual), check_expected = (intmax_t)(expected); \
        if (check_actual != check_expected) \
            check_failed(__FILE__, __LINE__, "%s is %jd (0x%jx), expected %jd (0x%jx)", #actual, \
                         check_actual, (uintmax_t)check_actual, check_expected, (uintmax_t)check_expected); \
    } while (0)

/* The call returned 0 rather than -errno. */
#define CHECK_OK(call) \
    do { \
        intmax_t check_result = (intmax_t)(call); \
        if (check_result != 0) \
            check_failed(__FILE__, __LINE__, "%s returned %jd (%s)", #call, check_result, \
                         check_result < 0 ? strerror((int)-check_result) : "expected 0"); \
    } while (0)

/* The two buffers hold the same bytes. */
#define CHECK_BYTES(actual, expected, count) check_bytes(__FILE__, __LINE__, #actual, actual, expected, count)

/* Every byte of the buffer has this value. */
#define CHECK_FILLED(actual, byte, count) check_filled(__FILE__, __LINE__, #actual, actual, byte, count)

#define RUN(test) \
    do { \
        check_running = #test; \
        test(); \
    } while (0)

__attribute__((unused)) static void
check_bytes(const char *file, int line, const char *name, const void *actual, const void *expected, size_t count)
{
    const uint8_t *a = actual, *b = expected;

    for (size_t i = 0; i < count; i++) {
        if (a[i] != b[i])
            check_failed(file, line, "%s[%zu] is 0x%02x, expected 0x%02x", name, i, a[i], b[i]);
    }
}

__attribute__((unused)) static void
check_filled(const char *file, int line, const char *name, const void *actual, uint8_t byte, size_t count)
{
    const uint8_t *a = actual;

    for (size_t i = 0; i < count; i++) {
        if (a[i] != byte)
            check_failed(file, line, "%s[%zu] is 0x%02x, expected 0x%02x", name, i, a[i], byte);
    }
}

#endif
