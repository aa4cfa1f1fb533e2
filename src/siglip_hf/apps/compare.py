"""The page "compare": models side by side on one picture and a list of labels.

SigLIP says for each label on its own whether it fits (sigmoid); CLIP shares 100 % out among the labels (softmax), so
that something always wins. Both are drawn, with the time of the answer and what SigLIP's pooling head looks at.
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
One picture, some labels, and what each model makes of them. **Sigmoid** (SigLIP): does this label fit? Each is asked on
its own, and none may fit. **Softmax** (CLIP): which of these labels fits best? The shares add up to 100 %, so one wins
even where none fits: try labels that are all wrong.
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
    names = parse_labels(labels)
    if len(names) > page.MAX_LABELS:
        raise ValueError(f"{len(names)} labels are too many; at most {page.MAX_LABELS} are taken.")
    (pattern,) = parse_templates(template)
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
    """One answer as HTML: bars, best first, and the heat map."""
    scorer, logits = answer.scorer, answer.logits
    scores, shares = scorer.scores(logits).tolist(), logits.softmax(dim=-1).tolist()
    is_sigmoid = scorer.reads_as == "sigmoid"
    bars = [
        page.bar(answer.labels[i], scores[i], shares[i] if is_sigmoid else None)
        for i in logits.argsort(descending=True, stable=True).tolist()
    ]
    facts = f"{scorer.reads_as}, {page.short_count(scorer.parameters)} parameters, {answer.seconds * 1000:.0f} ms"
    parts = [f"<h3>{html.escape(scorer.name)}</h3>", page.note(facts), *bars]
    if is_sigmoid:
        parts.append(page.note("Thin grey bars: the same scores shared out by a softmax, as CLIP's are."))
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
        except ValueError as error:
            return page.problem(error)
        return f'<div class="cards">{"".join(map(as_card, answers))}</div>'

    examples = page.demo_pictures()
    with gr.Blocks(title="siglip-hf: compare", analytics_enabled=False) as blocks:
        gr.Markdown(INTRODUCTION)
        if len(scorers) == 1:
            gr.Markdown(
                "To see models side by side, start with `--model` twice or more: `siglip-hf app compare --help`."
            )
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                picture = page.upload_box("Picture", value=examples[0], elem_id="picture", height=280)
                labels = gr.Textbox(LABELS, label="Labels, separated by commas", elem_id="labels", max_length=10_000)
                template = gr.Textbox(
                    DEFAULT_TEMPLATE, label="Template, with {} for the label", elem_id="template", max_length=500
                )
                button = gr.Button("Compare", variant="primary", elem_id="compare")
                gr.Examples([[path] for path in examples], [picture], examples_per_page=24)
            with gr.Column(scale=2, min_width=400):
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
