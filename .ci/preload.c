/* Preloaded beside a sanitizer's runtime: starts it before anything else runs.
 *
 * The runtime starts at the first call that it intercepts.  In nbdkit that is an allocation under glibc's lock on the
 * locale (newlocale, in a constructor of p11-kit), and the runtime's start takes and drops that lock once more, by way
 * of dlsym's error message.  The lock is broken from then on, and Python hangs in setlocale.
 */
#include <stdlib.h>

__attribute__((constructor)) static void start_sanitizer(void)
{
    void *volatile block = malloc(1);
    free(block);
}
