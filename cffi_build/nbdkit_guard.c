/* Keeps one dying client from ending the server: a way around a bug of nbdkit 1.32.4 to 1.33.9.
 *
 * When a client goes away while several of its requests are being answered, the first reply that fails closes the
 * connection's sending side; the next one meets `assert (sock >= 0)` in nbdkit's raw_send_socket and the whole process
 * aborts, with every other client's disk (upstream commit 9d82aa4f tells the story and mends it in 1.33.10). Debian 12 has
 * 1.32.5.
 *
 * raw_send_socket may return -1, "the reply could not be sent", which is the truth here. So the program's reference to
 * __assert_fail is redirected to a function of ours, which for this one assertion makes raw_send_socket return -1 (by
 * unwinding to its caller, as a debugger's `return` does); every other assertion fails as ever.
 *
 * Done once, by nbdkit's main thread, before any other runs.  If the reference cannot be found (a nbdkit without
 * assertions) there is nothing to guard.
 */
#define _GNU_SOURCE
#define UNW_LOCAL_ONLY
#include <libunwind.h>

#include <assert.h>
#include <elf.h>
#include <errno.h>
#include <link.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "nbdkit_guard.h"

#ifdef __x86_64__
enum { RETURN_VALUE = UNW_X86_64_RAX, RELOCATION = R_X86_64_JUMP_SLOT };
#elif defined __aarch64__
enum { RETURN_VALUE = UNW_AARCH64_X0, RELOCATION = R_AARCH64_JUMP_SLOT };
#else
#error "say which register holds a function's result on this machine"
#endif

/* Return `value` from the function that called the caller of this one.  Comes back only if unwinding fails. */
static void return_from_caller(unw_word_t value)
{
    unw_context_t context;
    unw_cursor_t cursor;
    if (unw_getcontext(&context) || unw_init_local(&cursor, &context))
        return;
    /* From here to failed_assertion, to raw_send_socket, to who called that. */
    for (int frame = 0; frame < 3; frame++)
        if (unw_step(&cursor) <= 0)
            return;
    if (!unw_set_reg(&cursor, RETURN_VALUE, value))
        unw_resume(&cursor);
}

static void __attribute__((noinline)) failed_assertion(const char *assertion, const char *file, unsigned line,
                                                       const char *function)
{
    if (function && !strcmp(function, "raw_send_socket") && !strcmp(assertion, "sock >= 0")) {
        errno = EPIPE;
        return_from_caller((unw_word_t)-1);
    }
    __assert_fail(assertion, file, line, function);
}

/* The loaded program's dynamic section, as far as it is needed. */
struct program {
    const ElfW(Sym) *symbols;
    const char *strings;
    const ElfW(Rela) *relocations;
    size_t relocation_bytes;
};

static struct program read_dynamic(const struct dl_phdr_info *info)
{
    struct program program = { 0 };
    for (int i = 0; i < info->dlpi_phnum; i++) {
        if (info->dlpi_phdr[i].p_type != PT_DYNAMIC)
            continue;
        const ElfW(Dyn) *entry = (const void *)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
        for (; entry->d_tag != DT_NULL; entry++) {
            const void *address = (const void *)entry->d_un.d_ptr;      /* glibc has made it absolute */
            if (entry->d_tag == DT_SYMTAB)
                program.symbols = address;
            else if (entry->d_tag == DT_STRTAB)
                program.strings = address;
            else if (entry->d_tag == DT_JMPREL)
                program.relocations = address;
            else if (entry->d_tag == DT_PLTRELSZ)
                program.relocation_bytes = entry->d_un.d_val;
        }
    }
    return program;
}

/* The slot may lie in memory that the linker made read-only; it stays writable for this moment only. */
static void write_slot(void **slot, void *value, bool was_read_only)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *start = (char *)((uintptr_t)slot / page * page);
    if (mprotect(start, page, PROT_READ | PROT_WRITE))
        return;
    *slot = value;
    if (was_read_only)
        mprotect(start, page, PROT_READ);
}

static bool in_relro(const struct dl_phdr_info *info, const void *slot)
{
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *header = &info->dlpi_phdr[i];
        uintptr_t start = info->dlpi_addr + header->p_vaddr;
        if (header->p_type == PT_GNU_RELRO && (uintptr_t)slot >= start && (uintptr_t)slot < start + header->p_memsz)
            return true;
    }
    return false;
}

/* Called for each loaded object, the program first. */
static int redirect(struct dl_phdr_info *info, size_t size, void *unused)
{
    struct program program = read_dynamic(info);
    (void)size;
    (void)unused;
    for (size_t i = 0; i < program.relocation_bytes / sizeof(ElfW(Rela)); i++) {
        const ElfW(Rela) *relocation = &program.relocations[i];
        const ElfW(Sym) *symbol = &program.symbols[ELF64_R_SYM(relocation->r_info)];
        if (ELF64_R_TYPE(relocation->r_info) == RELOCATION
            && !strcmp(program.strings + symbol->st_name, "__assert_fail")) {
            void **slot = (void **)(info->dlpi_addr + relocation->r_offset);
            write_slot(slot, (void *)(uintptr_t)failed_assertion, in_relro(info, slot));
        }
    }
    return 1;      /* the program alone */
}

void nbdkit_guard_install(void)
{
    dl_iterate_phdr(redirect, NULL);
}
