/* Undo the compression of the embedded cubins. */
#ifndef MVK_INFLATE_H
#define MVK_INFLATE_H

#include <stddef.h>
#include <stdint.h>

/* Decompress a raw DEFLATE stream (RFC 1951) into exactly `out_size` bytes. 1, or 0 where the
 * stream is broken or holds another number of bytes. Never reads or writes outside the two. */
int mvk_inflate(const uint8_t *in, size_t in_size, uint8_t *out, size_t out_size);

#endif
