"""Runs ``train`` with FSDP 2 on processes of the CPU: python sharded_run.py OPTIONS_OF_EACH_RUN.

accelerate's FSDP is for GPUs, though ``fully_shard`` is not: a process on the CPU is told here that
it is one of FSDP.
"""

import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from toy import toy_recipe  # noqa: E402

from landmark.train.run import train  # noqa: E402

stock = AcceleratorState.__init__


def init(self, *args, fsdp_plugin=None, **more):
    stock(self, *args, fsdp_plugin=fsdp_plugin, **more)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
    if getattr(self, "fsdp_plugin", None) is not None:
        self.distributed_type = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = init
    for options in json.loads(sys.argv[1]):
        recipe = toy_recipe(**options.pop("changes"))
        train(**options, recipe=recipe)
