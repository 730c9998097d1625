/* gguf.c - the one part of reading a GGUF file whose cost grows with the vocabulary: finding the strings of an array. */
#include "common.h"

PL_API int64_t pl_gguf_scan_strings(const void *data, int64_t n_bytes, int64_t n_strings, int64_t *offsets, int64_t *lengths,
                                    pl_error *err) {
    const uint8_t *bytes = data;
    int64_t at = 0;
    for (int64_t i = 0; i < n_strings; i++) {
        uint64_t length;
        if (n_bytes - at < (int64_t)sizeof length) {
            return pl_fail(err, "string %lld of %lld begins past the end of the file", (long long)i, (long long)n_strings);
        }
        memcpy(&length, bytes + at, sizeof length);
        at += (int64_t)sizeof length;
        if (length > (uint64_t)(n_bytes - at)) {
            return pl_fail(err, "string %lld of %lld has a length of %llu and does not fit into the file", (long long)i,
                           (long long)n_strings, (unsigned long long)length);
        }
        offsets[i] = at;
        lengths[i] = (int64_t)length;
        at += (int64_t)length;
    }
    return at;
}
