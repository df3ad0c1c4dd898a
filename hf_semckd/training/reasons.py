"""Why the settings of a distillation have their values, in words."""

from collections.abc import Mapping
from typing import Any

from ..config import SemCKDConfig, distillation_fields
from ..losses import FeatureLoss
from ..publishing.redaction import shown_setting
from ..publishing.report.parts import UsedSetting

# What begins the rule for a setting that was left open, in the help of its field.
OPEN = "None: "


def used_settings(
    args: SemCKDConfig, settings: Mapping[str, Any], layers: Mapping[str, list[str]], loss: FeatureLoss | None
) -> tuple[UsedSetting, ...]:
    """Return every setting of `SemCKDConfig` with the value in use and why: given, the default, or by which rule.

    `settings` are those of `Distillation`, `layers` the names by `student_layers` and `teacher_layers`, which are used
    where none were chosen.
    """
    found = []
    # What the feature loss decided by the layers at hand.
    by_layers = {"feature_weight", *loss.settings} if loss is not None and loss.student_specs else set()
    for name in distillation_fields():
        if name not in settings:
            continue
        field, given = SemCKDConfig.__dataclass_fields__[name], getattr(args, name)
        value = settings[name] if settings[name] is not None else layers.get(name) or None
        rule = field.metadata["help"].partition(OPEN)[2]
        if given is not None and given != field.default:
            why = "given"
        elif given is not None:
            why = "default"
        else:
            why = f"chosen for {kind_of_layers(loss)}: {rule}" if loss and name in by_layers else f"left open: {rule}"
        found.append(UsedSetting(name, "not set" if value is None else shown_setting(name, value), why))
    return tuple(found)


def kind_of_layers(loss: FeatureLoss) -> str:
    """Return what the compared layers are, on which defaults depend."""
    specs = (*loss.student_specs, *loss.teacher_specs)
    if all(spec.kind == "map" for spec in specs):
        return "feature maps, as between CNNs"
    grids = all(spec.grid is not None for spec in specs)
    return "image models with a transformer" if grids else "layers without a pixel grid"
