"""How a student is loaded."""

from pathlib import Path

from .redaction import is_plain_text, repository_name


def shown_source(folder: str) -> str:
    """Return a relative path of plain words as it is, and of others a name made of the last part.

    Where an absolute path lies is private.
    """
    path = Path(folder)
    plain = not path.is_absolute() and ".." not in path.parts and all(map(is_plain_text, path.parts))
    return path.as_posix() if plain else repository_name(path.name)


def loading_code(name: str, student_class: str, processor: str | None) -> str:
    """Return Python that loads a student, and the processor saved beside it, by their auto classes."""
    lines = [f"from transformers import {', '.join(sorted({student_class, processor or student_class}))}", ""]
    if processor is not None:
        variable = "tokenizer" if processor == "AutoTokenizer" else "processor"
        lines.append(f'{variable} = {processor}.from_pretrained("{name}")')
    return "\n".join([*lines, f'model = {student_class}.from_pretrained("{name}")'])
