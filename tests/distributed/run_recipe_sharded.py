"""scripts/run_gkd.py as it is, where Accelerate shards on the CPU.

accelerate launch --config_file scripts/accelerate/fsdp2.yaml --num_processes 2 \
    tests/distributed/run_recipe_sharded.py RECIPE key.sub=value…
"""

from __future__ import annotations

import runpy
from pathlib import Path

from tests.distributed.fsdp_on_cpu import let_accelerate_shard_on_the_cpu

if __name__ == "__main__":
    let_accelerate_shard_on_the_cpu()
    runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "run_gkd.py"), run_name="__main__")
