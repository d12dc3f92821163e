"""Controls of a run: the same student trained without the curriculum's knowledge, from the same start and cache."""

import json
import math
from pathlib import Path
from typing import Any

from ...curriculum import KNEE, RANKED, CurriculumPlan
from ...errors import UserError
from ...files import write_text
from ...selection import ALL
from ..config import RunConfig
from ..modes import reflects
from .run import json_text
from .settings import training_config

CONTROLS = "controls"


def control_folder(config: RunConfig, name: str) -> Path:
    """The run folder of a control."""
    return Path(config.output_dir) / CONTROLS / name


def control_outputs(config: RunConfig) -> list[str]:
    """The files in the run folder that show that a control is done."""
    return [f"{CONTROLS}/{name}/summary.json" for name in config.controls]


def control_config(config: RunConfig, name: str, plan: CurriculumPlan) -> RunConfig:
    """The config of a control.

    "random" drops as many rows as the run, but at random, and divides the rest at random into stages of the same sizes.
    "none" trains on all rows in every stage, for as many steps as the run has in it. Both have the run's schedule and
    number of steps, and no bands or weights of samples.

    Args:
        config: the run's config.
        name: the control's name.
        plan: the run's plan.

    Returns:
        A config for a separate run, in a folder below the run's.
    """
    given, distill = config.curate, dict(config.distill)
    sizes = [len(subset) for subset in plan.subset_columns]
    rows = sum(sizes) + len(plan.dropped)
    looked_at = [*given.band, *([] if given.weight_by is None else [given.weight_by])]
    curate: dict[str, Any] = {"method": name, "order": RANKED, "reflect_again": False, "band": {}, "weight_by": None}
    if given.keep == KNEE:
        curate["keep"] = plan.keep
    if looked_at:  # samples without their values are in no control either
        signals = given.signals or dict.fromkeys(config.reflect.signals, 1.0)
        curate["signals"] = {**dict.fromkeys(looked_at, 0.0), **signals}
        if len(plan.fused) < rows:  # some rows are outside the band, so convert to a share of all rows
            curate["keep"] = min(1.0, math.nextafter(plan.keep * len(plan.fused) / rows, 1.0))
    made = config.model_copy(
        update={
            "controls": [],
            "curate": given.model_copy(update=curate),
            "distill": distill,
            "output_dir": str(control_folder(config, name)),
        }
    )
    if name == "none":
        if not reflects(made):  # without scores, it also has the samples that could not be scored
            rows += len(plan.unscored_rows)
        passes = training_config(config).of_stages(len(sizes)).epochs
        distill["epochs_per_stage"] = [p * sum(sizes[: k + 1]) / rows for k, p in enumerate(passes)]
    return made


def check_controls(config: RunConfig) -> None:
    """Refuse a control that is named twice, controls of a run that is one itself, and "none" with selected samples.

    Raises:
        UserError: there is such a control.
    """
    if len({*config.controls}) < len(config.controls):
        raise UserError(f"config: controls is {config.controls}: name each control once")
    if config.controls and config.curate.method != "srd":
        raise UserError(
            f"config: controls is {config.controls}, and curate.method is {config.curate.method!r}, which is a control "
            "itself: set curate.method to 'srd', or controls to []"
        )
    policy = config.distill.get("sample_selection", ALL)
    if "none" in config.controls and policy != ALL:
        raise UserError(
            f"config: controls has 'none', which trains on all samples, and distill.sample_selection is {policy!r}: "
            "leave one of the two out"
        )


def adopt_evaluations(source: Path, folder: Path) -> None:
    """Copy another run's evaluations of teacher and starting student. Each entry has the key of what it depends on."""
    theirs, ours = source / "evaluation.json", folder / "evaluation.json"
    if theirs.is_file() and not ours.is_file():
        kept = json.loads(theirs.read_text(encoding="utf-8"))
        write_text(ours, json_text({name: kept[name] for name in ("teacher", "start") if name in kept}))
