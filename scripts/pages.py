"""Fill the marked regions of README.md and docs/results from the stored measurements.

    python scripts/pages.py            # rewrites what is stale
    python scripts/pages.py --check    # names the stale pages, and exits with status 1 if there are any

A region is what stands between `<!-- name arguments -->` and `<!-- /name -->`: a block where the first mark ends its
line, otherwise a part of the sentence. Its text is computed by the function of that name.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import benchmark_memory  # noqa: E402
import benchmark_vocabulary  # noqa: E402
import compare_cached_logits  # noqa: E402
import compare_sampling  # noqa: E402
import run_demo_seeds  # noqa: E402
import study_students  # noqa: E402
from accuracy.regions import GAINING, accuracy_regions, read_shown  # noqa: E402
from step_cost.regions import step_regions  # noqa: E402

from hf_semckd.errors import InputError, nearest  # noqa: E402

REGION = re.compile(
    r"<!-- (?P<name>[\w-]+)(?P<arguments>(?: [\w.+-]+)*) -->(?P<text>.*?)<!-- /(?P=name) -->", re.DOTALL
)


def pages() -> list[Path]:
    """Return the pages that have regions."""
    return [
        ROOT / "README.md",
        ROOT / "docs" / "guides" / "deploy.md",
        *sorted((ROOT / "docs" / "results").glob("*.md")),
    ]


def regions() -> dict[str, Callable[..., str]]:
    """Return what computes a region's text, by the region's name."""
    found = {
        **accuracy_regions(read_shown(SCRIPTS / "results" / "accuracy")),
        **step_regions(SCRIPTS / "results" / "step"),
        "demo": run_demo_seeds.table,
        "vocabulary": benchmark_vocabulary.table,
        "memory": benchmark_memory.table,
        "sampling": compare_sampling.table,
        "cached-logits": compare_cached_logits.table,
        "students": study_students.table,
        "starts": study_students.starts_table,
    }
    return {**found, "summary": lambda: summary(found)}


def summary(found: Mapping[str, Callable[..., str]]) -> str:
    """Return what README.md says of the results below the headline, as a list."""
    gain, fresh = partial(found["gain"], "semckd", "kd"), partial(found["fresh-gain"], "semckd", "kd")
    overhead = found["overhead"]
    return "\n".join(
        [
            f"- {found['fresh']()}",
            f"- **Images**: {gain(*GAINING)} points over KD ({fresh(*GAINING)} with fresh seeds), except where a ViT "
            f"teaches a ResNet ({gain('vit_resnet_fashion')}; {fresh('vit_resnet_fashion')}).",
            f"- **Text**: {gain('minilm_snippets')} points on movie snippets ({fresh('minilm_snippets')}), and "
            f"{gain('minilm_newsgroups')} on 20 newsgroups ({fresh('minilm_newsgroups')}), where KD is worse than no "
            "distillation.",
            f"- **Between CNNs the association pays**: {gain('resnet_fashion')} points, with equal weights "
            f"{found['gain']('semckd-uniform', 'kd', 'resnet_fashion')}. With transformers it is the comparison of "
            "relations between samples that helps; equal or random weights are as good there.",
            f"- **It helps most with few or wrong labels**: {gain('resnet_fashion_noisy')} points with 40 % wrong "
            f"labels, {gain('resnet_fashion_full')} with all labels of Fashion-MNIST.",
            f"- **Price of a step**: {overhead('cpu-amd-epyc', 'cpu-intel-xeon')} over KD on a CPU; "
            f"{overhead('nvidia-h100-80gb-hbm3')} on an H100, where steps of small models are launch-bound.",
        ]
    )


def fill(text: str, found: Mapping[str, Callable[..., str]]) -> str:
    """Return a page with the text of every region computed anew.

    Args:
        text: The page.
        found: What computes a region's text from its arguments, by the region's name.

    Raises:
        InputError: For a region that nothing computes.
    """

    def replacement(region: re.Match[str]) -> str:
        name, arguments = region["name"], region["arguments"].split()
        if name not in found:
            raise InputError(
                "Nothing computes this region",
                received=f"<!-- {name} -->",
                expected=f"a region such as {', '.join(nearest(name, found))}",
                todo="correct its name",
            )
        content = found[name](*arguments)
        content = f"\n{content}\n" if region["text"].startswith("\n") else content
        return f"<!-- {' '.join([name, *arguments])} -->{content}<!-- /{name} -->"

    return REGION.sub(replacement, text)


def main() -> int:
    """Fill or check the pages; the exit status is 1 if one is stale and only checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing.")
    options = parser.parse_args()
    found, stale = regions(), []
    for page in pages():
        text = page.read_text("utf-8")
        filled = fill(text, found)
        if filled != text:
            stale.append(page.relative_to(ROOT))
            if not options.check:
                page.write_text(filled, "utf-8")
    for page in stale:
        print(f"{page} {'is stale: run python scripts/pages.py' if options.check else 'was rewritten'}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
