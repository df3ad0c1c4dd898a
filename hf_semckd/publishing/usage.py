"""How a published student is loaded."""


def loading_code(name: str, student_class: str, processor: str | None) -> str:
    """Return Python that loads a student, and the processor saved beside it, by their auto classes."""
    lines = [f"from transformers import {', '.join(sorted({student_class, processor or student_class}))}", ""]
    if processor is not None:
        variable = "tokenizer" if processor == "AutoTokenizer" else "processor"
        lines.append(f'{variable} = {processor}.from_pretrained("{name}")')
    return "\n".join([*lines, f'model = {student_class}.from_pretrained("{name}")'])
