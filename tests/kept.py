"""What a loss keeps of a teacher, by kind and layer, so that tests can name it."""

from torch import Tensor

from hf_semckd.features.targets import TeacherTargets

KINDS = ("whole", "tokens", "grid", "mean", "embedding", "summary")


def named(targets: TeacherTargets) -> dict[str, Tensor]:
    """Return the tensors as `kind.layer`, and a token choice under the first layer that has it."""
    found: dict[str, Tensor] = {}
    for number, part in enumerate(targets.parts):
        found |= {f"{number}/{name}": value for name, value in named(part).items()}
    choices: list[object] = []
    for t, layer in enumerate(targets.layers):
        found |= {f"{kind}.{t}": getattr(layer, kind) for kind in KINDS if getattr(layer, kind) is not None}
        if layer.choice is not None and not any(layer.choice is known for known in choices):
            choices.append(layer.choice)
            parts = {f"positions.{t}": layer.choice.positions, f"mask.{t}": layer.choice.mask}
            found |= {name: value for name, value in parts.items() if value is not None}
    return found if targets.mask is None else {**found, "mask": targets.mask}
