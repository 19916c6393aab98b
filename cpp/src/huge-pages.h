// Large memory in huge pages where Linux gives them on request: with 4 KB pages, looking up a new page's address holds
// up what reads weights or a cache from front to back.

#pragma once

#include <stddef.h>

#if defined(__linux__)
#include <stdint.h>
#include <sys/mman.h>
#endif

// Asks for huge pages for what lies wholly in data, which nothing has been written to yet. What is smaller than
// a few of them is left alone; a refusal changes nothing.
static inline void melt_ask_for_huge_pages(void * data, size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const size_t    page  = (size_t) 2 << 20; // with pages of 4 KB; the address has to be a multiple of those alone
    const uintptr_t start = ((uintptr_t) data + page - 1) / page * page;
    const uintptr_t end   = ((uintptr_t) data + size) / page * page;
    if (end > start && end - start >= 4 * page) {
        (void) madvise((void *) start, end - start, MADV_HUGEPAGE);
    }
#else
    (void) data;
    (void) size;
#endif
}
