"""Names that keys had before. A person is told the new one; a run.json that was written with them is read."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

BLOCK = "glide_ds"


class Renamed(NamedTuple):
    """The key's new name, and what its old values are called now; those that are not in it are as they were."""

    name: str
    values: Mapping[Any, Any] = {}

    def now(self, value: Any) -> Any:
        return self.values.get(value, value) if isinstance(value, str | bool) else value

    def advice(self, value: Any) -> str:
        now = self.now(value)
        return f"write {self.name}={now if isinstance(now, str) else json.dumps(now)}"


RENAMED = {
    "train.checkpointing": Renamed("train.recompute"),
    "train.tf32": Renamed("train.precision", {True: "tf32-fp16-kernels", False: "fp32"}),
    "checkpoint.background": Renamed("checkpoint.async_save"),
    "data.tail": Renamed("data.drop_last", {"drop": True, "pad": False}),
}
# Of DeepSpeed's part: never did anything here.
GONE = ("zero_allow_untested_optimizer", "steps_per_print", "dump_state", "comms_logger")


def upgraded(document: Mapping[str, Any]) -> dict[str, Any]:
    """A phase of a run.json under today's names: what was written before keys were renamed is read as it was meant."""
    new = {key: value for key, value in copy.deepcopy(dict(document)).items() if key not in GONE}
    block = new.get(BLOCK, {})
    for old, renamed in RENAMED.items():
        section, _, key = old.partition(".")
        if key in block.get(section, {}):
            home, _, name = renamed.name.partition(".")
            block[home][name] = renamed.now(block[section].pop(key))
    return new
