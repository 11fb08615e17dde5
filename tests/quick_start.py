"""Imported first, here and where tools are forked: what takes most of the time of a tiny run.

MMEngine lays out the text of configs with yapf, and asks compilers for their versions, which it
remembers.
"""

import mmengine.config.config
from mmengine.utils.dl_utils import collect_env

mmengine.config.config.FormatCode = lambda text, **style: (text, True)
collect_env()
