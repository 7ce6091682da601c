"""python -m masked_vit_kernels.audit"""

import sys

from masked_vit_kernels.audit import main

sys.exit(main())
