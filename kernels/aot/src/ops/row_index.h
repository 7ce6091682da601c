/* An mvk_row_index as keys and kernel arguments. */
#ifndef MVK_ROW_INDEX_H
#define MVK_ROW_INDEX_H

#include "launch.h"

/* Check it, and give the key "layout" (which must not be `every token` unless `every` allows it)
 * and the parameters that every kernel with an index has. */
mvk_status mvk_give_index(mvk_call *call, const mvk_row_index *index, int every);

#endif
