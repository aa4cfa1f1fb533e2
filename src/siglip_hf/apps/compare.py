"""The page "compare": models side by side on one picture and a list of labels.

The softmax shares 100 % out among the labels, so that something always wins. SigLIP also says for each label on its own
whether it fits (sigmoid). Both are drawn, with the time of the answer and what SigLIP's pooling head looks at.
"""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image

from siglip_hf.apps import page
from siglip_hf.apps.scorers import Scorer
from siglip_hf.inference.label_bank import parse_labels, parse_templates
from siglip_hf.inference.pipeline import DEFAULT_TEMPLATE
from siglip_hf.inference.pooling_map import draw_heat_map

if TYPE_CHECKING:
    import gradio

LABELS = "cat, dog, pizza, rocket, house"
INTRODUCTION = """
# Models side by side
Choose a picture and write some labels; each model says which label fits the picture best.

- **Share** (softmax): which of *these* labels fits best? The shares add up to 100 %, so one wins even where none fits.
- **Fit** (sigmoid, SigLIP only): does this label fit, asked on its own? Several may, or none. Small numbers are normal.
"""


@dataclass(frozen=True)
class Answer:
    """What one model says.

    Attributes:
        scorer: the model.
        labels: C labels.
        logits: (C,) float32.
        seconds: from the picture to the logits.
        heat_map: what its pooling head looks at, or None if it has none.
    """

    scorer: Scorer
    labels: tuple[str, ...]
    logits: torch.Tensor
    seconds: float
    heat_map: Image.Image | None


def compare(
    scorers: Sequence[Scorer], picture: Image.Image, labels: str, template: str = DEFAULT_TEMPLATE
) -> list[Answer]:
    """Asks each model about a picture.

    Args:
        scorers: the models.
        picture: an RGB picture.
        labels: labels, separated by commas.
        template: a text with `{}` for the label.

    Raises:
        ValueError: for labels or a template that cannot be.
    """
    names = parse_labels(page.limited(labels, "the labels", page.MAX_LABELS_TEXT))
    if len(names) > page.MAX_LABELS:
        raise ValueError(f"{len(names)} labels are too many; at most {page.MAX_LABELS} are taken.")
    (pattern,) = parse_templates(page.limited(template, "the template", page.MAX_TEMPLATE))
    texts = [pattern.format(name) for name in names]
    answers = []
    for scorer in scorers:
        start = time.perf_counter()
        logits = scorer.logits(picture, texts)
        seconds = time.perf_counter() - start
        attention = scorer.attention(picture)
        heat_map = None if attention is None else draw_heat_map(picture, attention)
        answers.append(Answer(scorer, names, logits, seconds, heat_map))
    return answers


def as_card(answer: Answer) -> str:
    """One answer as HTML: shares as bars, best first, for SigLIP the sigmoid beneath; and the heat map."""
    scorer, logits = answer.scorer, answer.logits
    scores, shares = scorer.scores(logits).tolist(), logits.softmax(dim=-1).tolist()
    is_sigmoid = scorer.reads_as == "sigmoid"
    bars = [
        page.bar(answer.labels[i], shares[i], scores[i] if is_sigmoid else None)
        for i in logits.argsort(descending=True, stable=True).tolist()
    ]
    facts = f"{scorer.reads_as}, {page.short_count(scorer.parameters)} parameters, {answer.seconds * 1000:.0f} ms"
    parts = [f"<h3>{html.escape(scorer.name)}</h3>", page.note(facts), *bars]
    if is_sigmoid:
        parts.append(
            page.note("Thick: share (softmax). Thin and grey: does it fit at all (sigmoid); 1 % can be a yes.")
        )
    if answer.heat_map is not None:
        parts.append(page.inline_picture(answer.heat_map, "what the pooling head looks at"))
        parts.append(page.note("What the pooling head looks at, whatever the label: the brighter, the more."))
    return f'<section class="card">{"".join(parts)}</section>'


def build(scorers: Sequence[Scorer]) -> gradio.Blocks:
    """The page.

    Args:
        scorers: the models, in the order they are shown.
    """
    gr = page.import_gradio()

    def answer(path: str | None, labels: str, template: str) -> str:
        if not path:
            return page.note("Upload or paste a picture, or take an example.")
        try:
            answers = compare(scorers, page.read_upload(path), labels, template)
        except (ValueError, OSError) as error:
            return page.problem(error)
        return f'<div class="cards">{"".join(map(as_card, answers))}</div>'

    examples = page.demo_pictures()
    with gr.Blocks(title="siglip-hf: compare", analytics_enabled=False) as blocks:
        gr.Markdown(INTRODUCTION)
        gr.HTML(page.model_line([scorer.source for scorer in scorers]))
        if len(scorers) == 1:
            gr.Markdown(
                "To see models side by side, start with `--model` twice or more: `siglip-hf app compare --help`."
            )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                picture = page.upload_box("Picture", value=examples[0], elem_id="picture", height=280)
                labels = gr.Textbox(
                    LABELS, label="Labels, separated by commas", elem_id="labels", max_length=page.MAX_LABELS_TEXT
                )
                template = gr.Textbox(
                    DEFAULT_TEMPLATE,
                    label="Template, with {} for the label",
                    elem_id="template",
                    max_length=page.MAX_TEMPLATE,
                )
                button = gr.Button("Compare", variant="primary", elem_id="compare")
                gr.Examples([[path] for path in examples], [picture], examples_per_page=24)
            with gr.Column(scale=2, min_width=280):
                results = gr.HTML(elem_id="results")
        inputs = [picture, labels, template]
        gr.on(
            [picture.change, labels.submit, template.submit, button.click, blocks.load],
            answer,
            inputs,
            results,
            trigger_mode="always_last",
        )
    return blocks
