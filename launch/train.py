"""Train GLIDE with CLIP conditioning, under any launcher: `glide-ds train` as a script, as launchers want one.

    deepspeed --num_gpus 8 launch/train.py --ds_config ds_configs/phase3.json
    deepspeed --num_gpus 8 launch/train.py --ds_config ds_configs/phase1.json ds_configs/phase2.json \\
        ds_configs/phase3.json --config run.yaml --set data.shards='/data/{00000..00999}.tar'

The same command again continues where the run was left.
"""

import sys

try:
    from glide_ds.cli import main
except ModuleNotFoundError as error:
    if error.name != "glide_ds":
        raise
    sys.exit(
        f"glide_ds is not installed for {sys.executable} (Python {sys.version.split()[0]}); bash launch/env.sh makes "
        "an environment with it: .venv/bin/python launch/train.py …, or source .venv/bin/activate"
    )

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
