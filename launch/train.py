"""Train GLIDE with CLIP conditioning, under any launcher: `glide-ds train` as a script, as launchers want one.

    deepspeed --num_gpus 8 launch/train.py --ds_config ds_configs/phase3.json
    deepspeed --num_gpus 8 launch/train.py --ds_config ds_configs/phase1.json ds_configs/phase2.json \\
        ds_configs/phase3.json --config run.yaml --set data.shards='/data/{00000..00999}.tar'

The same command again continues where the run was left.
"""

import sys

from glide_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
