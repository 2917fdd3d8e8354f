"""The phases of training as data. To add one, add a row here and a JSON in ds_configs."""

from __future__ import annotations

from typing import NamedTuple

ADAPTER_ROLES = ("adapter", "gates")
PRETRAINED_ROLES = ("unet", "text")
ROLES = (*ADAPTER_ROLES, *PRETRAINED_ROLES)


class Phase(NamedTuple):
    """One stage of the run, trained by its own DeepSpeed engine."""

    name: str
    folder: str  # below the run directory
    trains: tuple[str, ...]  # roles
    parents: tuple[str, ...] = ()  # phases it continues, the preferred one first
    clip: bool = True  # whether CLIP conditions it
    needs_adapter: bool = False  # weights without a trained adapter are no start for it
    scoped: bool = False  # train.scope may narrow what trains
    # What its seed follows from. Phases were numbered by their place once; one without a number follows from its name,
    # so that a new phase changes the order of nobody's data.
    number: int | None = None


PHASES = {
    phase.name: phase
    for phase in (
        Phase("base", "base", PRETRAINED_ROLES, clip=False, scoped=True, number=0),
        Phase("adapter_only", "phase1", ("adapter",), ("base",), number=1),
        Phase("adapter_gates", "phase2", ADAPTER_ROLES, ("adapter_only",), needs_adapter=True, number=2),
        Phase("full", "phase3", ROLES, ("adapter_gates", "adapter_only"), needs_adapter=True, number=3),
    )
}
