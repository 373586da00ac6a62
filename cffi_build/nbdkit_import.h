/* nbdkit's filter interface for a module that must also load without nbdkit.
 *
 * Python imports the kernel in processes where nobody defines nbdkit's functions (the tests, the command line), and
 * it resolves every symbol at once.  As weak symbols they are null there, and nbdkit's own where nbdkit runs, the only
 * place where the filter's callbacks are called.  A function of nbdkit that filter.c calls needs its line here;
 * tests/unit/test_project.py says which one is missing.
 */
#ifndef NB_NBDKIT_IMPORT_H
#define NB_NBDKIT_IMPORT_H

#include <nbdkit-filter.h>

#pragma weak nbdkit_add_extent
#pragma weak nbdkit_add_export
#pragma weak nbdkit_debug
#pragma weak nbdkit_error
#pragma weak nbdkit_extents_count
#pragma weak nbdkit_nanosleep
#pragma weak nbdkit_shutdown
#pragma weak nbdkit_strdup_intern

#endif
